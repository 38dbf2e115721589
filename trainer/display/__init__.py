"""What people see: the live panel, plain lines, the plots, the table at the end."""

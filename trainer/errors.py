"""The ways a run ends early, and their exit codes."""


class UserError(ValueError):
    """The user's mistake: config, data or a missing file. Shown without a traceback; exit code 2."""

    exit_code = 2


class TrainingStopped(RuntimeError):
    """Training stopped itself: non-finite loss past its limit, or out of memory. Exit code 3."""

    exit_code = 3

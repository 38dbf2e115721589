"""Libraries that run the distributed step, each behind the interface of `base.Engine`."""

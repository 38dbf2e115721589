"""The ways a run ends early, and their exit codes."""


class UserError(ValueError):
    """The user's mistake: config, data or a missing file. Shown without a traceback; exit code 2."""

    exit_code = 2


class TrainingStopped(RuntimeError):
    """Training stopped itself: non-finite loss past its limit, or out of memory. Exit code 3."""

    exit_code = 3


class RankFailed(TrainingStopped):
    """Another rank ended the job, or kept it waiting too long. Exit code 3.

    Attributes:
        speaks: whether this process is the one to say so.
    """

    def __init__(self, text: str, *, speaks: bool) -> None:
        super().__init__(text)
        self.speaks = speaks


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none, for a message of our own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")[:300]

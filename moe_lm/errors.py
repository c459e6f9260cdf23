"""The exceptions whose message is for the user, who sees them without a traceback, and other exceptions as words."""


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names the field, its value and the remedy.

    The command line prints it without a traceback. Every other exception is a bug.
    """

    code = 2
    """Exit code of the process."""
    told = False
    """Whether another process of the job tells the user."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run that was asked to stop, or had to, and can go on from its newest checkpoint. Exit code 75."""


class RunError(RuntimeError):
    """A run that can not go on, through no mistake in its input: one sentence that says why and what to try."""

    code = 1
    """Exit code of the process."""
    told = False
    """Whether another process of the job tells the user."""


def in_one_line(error: Exception) -> str:
    """What an exception of a library says, as part of one sentence."""
    return " ".join(str(error).split()).rstrip(".")[:300] or type(error).__name__

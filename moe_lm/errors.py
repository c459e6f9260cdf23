"""The exceptions whose message is for the user, who sees them without a traceback."""


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names the field, its value and the remedy.

    The command line prints it without a traceback and exits with code 2. Every other exception is a bug.
    """


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A run that was asked to stop, or had to, and can go on from its newest checkpoint. Exit code 75."""


class RunError(RuntimeError):
    """A run that can not go on, through no mistake in its input: one sentence that says why and what to try. Exit code
    1.
    """

"""The one exception that means "the user can mend this"."""


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names the field, its value and the remedy.

    The command line prints it without a traceback and exits with code 2. Every other exception is a bug.
    """

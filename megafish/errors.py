"""The one exception that means: the user can mend this."""


class InputError(ValueError):
    """A mistake in a file, a key or a value that the user gave.

    The message is one line: what is wrong, where, and what to do. The command line prints it without a traceback and
    exits with code 2. Everything else that is raised is a defect of megafish and keeps its traceback.
    """


class Stopped(SystemExit):
    """The end of a run that a signal stopped, and that has said so."""

"""The errors that a command prints as one line."""


class UserError(ValueError):
    """A wrong option, file or row: the user's to mend. Exit code 2."""


class RunStopped(RuntimeError):
    """A run that cannot go on as it is; its last checkpoint stays. Exit code 1."""

"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """A wrong option, file or row. Commands print it as one line and exit with code 2."""

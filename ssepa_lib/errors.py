"""The one exception a user is meant to read."""


class UserError(Exception):
    """Bad input: one sentence that names the file or setting and the remedy; the command line exits with 2."""

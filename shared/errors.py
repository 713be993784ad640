"""The one exception that a command line shows without a traceback."""


class UserError(ValueError):
    """Something the user can mend.

    The message names the file or field, what was found, what was expected, and the cure.
    """

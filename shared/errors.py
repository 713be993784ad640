"""The exception that a command line shows without a traceback."""


class UserError(ValueError):
    """Something the user can mend.

    The message names the file or field, what was found, what was expected, and the cure.
    """


def first_line(error: BaseException) -> str:
    """Kind and first line of an error: libraries' messages can be pages long, or empty."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

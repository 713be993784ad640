"""The exception that a command line shows without a traceback."""


class UserError(ValueError):
    """Something the user can mend.

    The message names the file or field, what was found, what was expected, and the cure.
    """


def json_kind(value: object) -> str:
    """What JSON calls a parsed value, with its article: users know no dict and no NoneType."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return kinds[type(value)]


def first_line(error: BaseException) -> str:
    """Kind and first line of an error: libraries' messages can be pages long, or empty."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Names of files and samples: matched, printed, pasted into a shell.

A name is taken as it is. It stands for others only where patterns are documented, where nothing is
named exactly so, and then by `*` and `?` alone.
"""

import re
import shlex
from collections.abc import Callable
from fnmatch import translate
from pathlib import Path

# What a terminal obeys or that breaks a line: control characters, line and paragraph separators,
# changes of direction, halves of characters.
_OBEYED = "\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff"
_BYTE = re.compile(r"\\u(dc[89a-f][0-9a-f])")
_IN_TEXT = re.compile(f"[{_OBEYED}]")
_IN_LINE = re.compile(f"[{_OBEYED}\t\n]")

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)([^\s\"'<>]+)")
# `user:password@`, where a password may have slashes, and a port is none. In an address of the web
# any `user@`, which may be a token; elsewhere it is a user or a container (`abfs://it@account`).
_LOGIN = re.compile(r"[^/@:]*:(?!\d{1,5}(?:[/?#]|$))[^@]*@(?:[^/@]*@)*")
_WEB_LOGIN = re.compile(rf"{_LOGIN.pattern}|[^/@]+@")
_SIGNATURE = re.compile(
    r"([?&](?:[\w.-]*(?:signature|credential|token|secret|passw(?:or)?d|api[_-]?key|accesskeyid)"
    r"|sig|auth)=)[^&#]+",
    re.IGNORECASE,
)


def has_wildcard(name: str) -> bool:
    """Whether a name may be a pattern."""
    return "*" in name or "?" in name


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether a whole text fits, where `*` stands for any characters, `/` too, and `?` for one."""
    match = re.compile(translate(for_glob(pattern))).match
    return lambda text: match(text) is not None


def for_glob(pattern: str) -> str:
    """For `fnmatch` and `Path.glob`, to which brackets and `**` are special, too."""
    return re.sub(r"\*+", "*", pattern).replace("[", "[[]")


def exists(path: Path) -> bool:
    """Whether there is such a file or folder; a name too long for one is none, and no OSError."""
    try:
        return path.exists()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """The same of a folder."""
    return exists(path) and path.is_dir()


def in_home_folder(name: str) -> Path:
    """`~/models` of the user; a name that begins with the name of no user stays as it is."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def on_one_line(text: str) -> str:
    """Text of any origin as one line of a terminal; � in place of what it would obey."""
    return _IN_LINE.sub("�", text)


def on_lines(text: str) -> str:
    """The same for text that has lines of its own."""
    return _IN_TEXT.sub("�", text)


def as_text(name: str) -> str:
    """A name with `\\udce9` for each byte that is no UTF-8 (zips of other systems have such)."""
    return name.encode("utf-8", "backslashreplace").decode()


def as_name(text: str) -> str:
    """The inverse of `as_text`: the name that the operating system knows."""
    return _BYTE.sub(lambda found: chr(int(found[1], 16)), text)


def without_secrets(text: str) -> str:
    """A text in whose URLs no password is left, and `***` stands for signatures and tokens."""
    return _URL.sub(_without_secrets, text) if "://" in text else text


def _without_secrets(url: re.Match[str]) -> str:
    scheme, rest = url.groups()
    login = (_WEB_LOGIN if scheme.lower() in ("http://", "https://") else _LOGIN).match(rest)
    return scheme + _SIGNATURE.sub(r"\1***", rest[login.end() :] if login else rest)


def quoted(name: object) -> str:
    """A folder, file, store or name as a shell takes it."""
    return shlex.quote(str(name))

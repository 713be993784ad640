"""What `fsspec` says of an object store: its file system, and its errors in words that help."""

import errno
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from shared.errors import UserError, first_line
from shared.io.hashing import cache_folder
from shared.io.names import without_secrets

Result = TypeVar("Result")
_URL = re.compile(r"(?P<protocol>[A-Za-z][A-Za-z0-9+.-]*)://")
_LOCAL = ("file", "local")
_SIGNATURES = ("ETag", "etag", "md5Hash", "content_settings", "mtime", "LastModified", "created")
_WAITS = (1, 2, 4, 8, 16, 32)  # seconds between the attempts at one object


def is_url(text: str) -> bool:
    """Whether it names a place that `fsspec` knows rather than a folder."""
    return _URL.match(text) is not None


def refuse_secrets(text: str) -> None:
    """UserError for a URL with a password or signature: what names a place is written to files."""
    if (without := without_secrets(text)) != text:
        raise UserError(
            f"{without}: found with a password or signature in its URL, expected one without: it "
            "would be written to files, and to others' eyes. Give credentials as the store's own "
            "tools take them (for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws; "
            "others: ~/.config/fsspec), or download it first."
        )


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path in it.

    Raises UserError where the package for the protocol is missing or the protocol is unknown.
    """
    import fsspec
    from fsspec.registry import known_implementations

    found = _URL.match(url)
    assert found is not None, url
    protocol = found["protocol"].lower()
    try:
        options = {"use_listings_cache": False} if protocol == "s3" else {}
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        hint = known_implementations.get(protocol, {}).get("err") or str(error)
        install = 'pip install "wandistill[s3]"' if protocol in ("s3", "s3a") else hint
        raise UserError(f"{url}: {protocol}:// needs a package: {install}") from error
    except ValueError as error:
        raise UserError(
            f"{url}: {first_line(error)}. Expected a folder or a URL that fsspec knows, e.g. "
            "s3://bucket/shards"
        ) from error


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what a store answers into a UserError that says what can be done."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each store has exceptions of its own
        raise UserError(f"{url}: {why(error)}") from error


def why(error: BaseException) -> str:
    """What a store's error means, and what can be done about it."""
    kind, said = type(error).__name__, without_secrets(first_line(error))
    if isinstance(error, FileNotFoundError):
        return "there is no such bucket or object. Make the bucket, or correct the URL."
    if _is_full(error):
        return f"there is no room for it here, in {shard_cache()}. Make room there."
    if isinstance(error, PermissionError):
        return (
            "access is denied. Give this process credentials that may list, read and write there, "
            "as fsspec and the store's own tools take them (environment, ~/.aws, ~/.config/fsspec)."
        )
    if "Credentials" in kind:
        return (
            f"no credentials ({said}). Set them as the store's own tools take them "
            "(for S3: AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws)."
        )
    return (
        f"the store does not answer as expected ({said}). Is its address right "
        "(for S3: AWS_ENDPOINT_URL), and is it up?"
    )


def _for_good(error: BaseException) -> bool:
    """Whether trying again is of no use."""
    return (
        isinstance(error, (FileNotFoundError, PermissionError, UserError))
        or "Credentials" in type(error).__name__
        or _is_full(error)
    )


def _is_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def patiently(what: str, attempt: Callable[[], Result]) -> Result:
    """Its result; a store that is not there for a minute does not end a long run.

    Raises OSError, as a disk would.
    """
    for wait in (*_WAITS, None):
        try:
            return attempt()
        except Exception as error:
            if wait is None or _for_good(error):
                raise OSError(errno.EIO, f"{what}: {why(error)}") from error
            time.sleep(wait)
    raise AssertionError


def signature_of(info: Mapping[str, Any]) -> str:
    """Changes when the object does, as far as the store tells."""
    told = [str(info[key]) for key in _SIGNATURES if info.get(key) is not None]
    return "|".join([str(info.get("size")), *told])


def local_path(location: str | Path) -> Path | None:
    """The place of this machine that a path or a file:// URL names; None for any other URL."""
    if isinstance(location, Path) or not is_url(location):
        return Path(location)
    protocol, _, path = location.partition("://")
    return Path(path) if protocol.lower() in _LOCAL else None


def shard_cache() -> Path:
    """Where whole shards of stores lie."""
    return cache_folder() / "shards"

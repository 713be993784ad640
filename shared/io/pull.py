"""A folder of this machine made like what lies below a URL."""

import json
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io.durable import write_bytes
from shared.io.locks import file_lock
from shared.io.object_store import explained, filesystem, signature_of

_AT_ONCE = 16  # small files that are asked for together


def pull_folder(
    url: str,
    folder: Path,
    *,
    is_wanted: Callable[[str], bool],
    has_content: Callable[[str, int], bool],
    unchanged: Collection[str] = (),
) -> dict[str, str]:
    """Make `folder` like the store; name → what tells whether the object has changed.

    Of the names that are wanted, those that have content here (name, bytes) are fetched where they
    changed; the others are empty files. `unchanged` are here as they are there in any case. What is
    wanted, but gone there, goes. Raises UserError where the store can't be read.
    """
    state = folder.with_suffix(".json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(folder.with_suffix(".lock")), explained(url):
        files, root = filesystem(url)
        prefix = root.rstrip("/") + "/"
        found = {name: info for name, info in _found(files, prefix).items() if is_wanted(name)}
        listed = {name: signature_of(info) for name, info in found.items()}
        folder.mkdir(parents=True, exist_ok=True)
        known = _last(state)
        missing = []
        for name, signature in listed.items():
            here = folder / name
            has_bytes = has_content(name, found[name].get("size") or 0)
            _make_room(here, f"{url}/{name}", touch=not has_bytes)
            there = known.get(name) == signature or name in unchanged
            if has_bytes and not (there and here.exists()):
                missing.append(name)

        def fetch(name: str, number: int) -> str | None:
            """Its name where it is gone: somebody replaced or removed it meanwhile."""
            beside = folder.with_name(f"{folder.name}-{number}")
            try:
                beside.write_bytes(files.cat_file(prefix + name))
            except FileNotFoundError:
                (folder / name).unlink(missing_ok=True)
                return name
            beside.replace(folder / name)
            return None

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            gone = set(pool.map(fetch, missing, range(len(missing))))
        for path in [*folder.rglob("*")]:
            name = path.relative_to(folder).as_posix()
            if name not in listed and is_wanted(name) and path.is_file():
                path.unlink(missing_ok=True)
        listed = {name: signature for name, signature in listed.items() if name not in gone}
        write_bytes(state, json.dumps(listed).encode())
        return listed


def _found(files: Any, prefix: str) -> dict[str, dict[str, Any]]:
    """Name below the prefix → what the store tells of it; {} where there is only the bucket."""
    files.invalidate_cache()
    try:
        found = files.find(prefix.rstrip("/"), detail=True)
    except FileNotFoundError:
        if not files.exists(prefix.split("/")[0]):
            raise
        found = {}
    return {
        path.removeprefix(prefix): info for path, info in found.items() if path.startswith(prefix)
    }


def _make_room(here: Path, place: str, *, touch: bool) -> None:
    """A folder for a file; with `touch` an empty file, too, where there is none."""
    try:
        here.parent.mkdir(parents=True, exist_ok=True)
        if touch:
            here.touch()
    except OSError as error:
        raise UserError(
            f"{place}: no folder here takes this name ({error.strerror}). Rename it."
        ) from error


def _last(state: Path) -> dict[str, str]:
    """Name → signature, as the last pull has left it in its state file; {} if that is gone."""
    with suppress(OSError, ValueError):
        found = json.loads(state.read_bytes())
        if isinstance(found, dict):
            return found
    return {}

"""Reads caches full of pickles, under an audit hook that reports any unpickling.

    python -m tests.preprocess.unpickling CACHE FOLDER

CACHE is a copy of `hostile.make`'s; an unpickled payload would write FOLDER/harmed.
"""

import io
import json
import os
import pickle
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import torch

from shared.errors import UserError
from shared.format.schema import MEMBERS
from tests.preprocess.hostile import (
    copy,
    read,
    rebuilt,
    replace_tar,
    rewrite_json,
    sample,
    shard,
    with_members,
)

unpickled: list[str] = []


class Payload:
    """What a pickle of somebody else's may do."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self._mark),)


def main(whole: Path, folder: Path) -> None:
    mark = folder / "harmed"
    payload = pickle.dumps(Payload(mark))
    saved = io.BytesIO()
    torch.save({"latents": torch.zeros(2, 2, 3, 2), "x": Payload(mark)}, saved)
    sys.addaudithook(
        lambda event, _: unpickled.append(event) if event == "pickle.find_class" else None
    )
    for number, member in enumerate(MEMBERS):
        data = payload if number % 2 else saved.getvalue()
        attempt(whole, folder, lambda cache, m=member, d=data: with_members(cache, 0, {m: d}))
    for suffix in ("text.pyd", "pkl", "pth"):  # what webdataset's decoders unpickle
        attempt(whole, folder, lambda cache, s=suffix: in_the_prompt_bank(cache, s, payload))
    attempt(whole, folder, lambda cache: of_zarr_2(cache, payload))
    attempt(whole, folder, lambda cache: with_another_codec(cache, payload))
    assert not unpickled and not mark.exists(), unpickled
    pickle.loads(payload)  # the control: hook and payload do what they are for
    assert unpickled and mark.exists()
    mark.rmdir()
    print("control: unpickled")


def attempt(whole: Path, folder: Path, harm: Callable[[Path], object]) -> None:
    """Harm a copy and read it in every way; UserError is what is expected."""
    cache = copy(whole, folder / "copy")
    harm(cache)
    messages = []
    for reader in (read, rebuilt):
        try:
            reader(cache)
        except UserError as error:
            messages.append(str(error).splitlines()[0])
    assert messages, "nothing was refused"
    print("refused:", messages[-1])


def in_the_prompt_bank(cache: Path, suffix: str, payload: bytes) -> None:
    members = {**sample(0).members(), suffix: payload}
    files = [
        (tarfile.TarInfo(f"{sample(0).key}.{name}"), members[name]) for name in ("json", suffix)
    ]
    replace_tar(shard(cache, "prompts"), files)


def of_zarr_2(cache: Path, payload: bytes) -> None:
    """A column in zarr's old format, whose filters may be pickles."""
    column = cache / "index.zarr" / "key"
    (column / "zarr.json").unlink()
    metadata = {
        "zarr_format": 2, "shape": [3, 16], "chunks": [3, 16], "dtype": "|O", "order": "C",
        "compressor": None, "fill_value": None, "filters": [{"id": "pickle", "protocol": 5}],
    }  # fmt: skip
    (column / ".zarray").write_text(json.dumps(metadata))
    (column / "0.0").write_bytes(payload)


def with_another_codec(cache: Path, payload: bytes) -> None:
    column = cache / "index.zarr" / "key"
    rewrite_json(
        column / "zarr.json",
        lambda metadata: {**metadata, "codecs": [{"name": "numcodecs.pickle"}]},
    )
    (column / "c" / "0" / "0").write_bytes(payload)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

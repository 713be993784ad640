"""Text embeddings on disk, between the text pass and the shards.

The text encoder leaves memory before the VAE enters it, so what it made waits here, one file per
caption; an interrupted text pass goes on where it stopped. Deleted once everything is in shards.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from shared.cache.session import CacheSession
from shared.format.fingerprint import Fingerprint
from shared.format.schema import TEXT_MEMBER, pack, unpack
from shared.io.durable import remove_tree, rename, write_bytes
from shared.io.hashing import digest_of

PREFIX = ".text-"


class TextCache:
    """Caption → (tokens, D) tensor, in a folder that belongs to one text fingerprint."""

    def __init__(self, output: Path, fingerprint: Fingerprint, writer: int = 0) -> None:
        self._output = output
        self._mine = f"-w{writer:03d}"
        self._folder = output / f"{PREFIX}{digest_of(fingerprint['text'])[:12]}{self._mine}"

    @classmethod
    def of(cls, session: CacheSession) -> "TextCache":
        """Where the embeddings of a session's run wait for their samples."""
        return cls(session.store.folder, session.fingerprint, session.rank.number)

    def __contains__(self, caption: str) -> bool:
        """Whether a whole file is there; its header says how long it must be."""
        try:
            with safe_open(self._path(caption), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def get(self, caption: str) -> torch.Tensor:
        """The embedding of a caption that is there."""
        return unpack(self._path(caption).read_bytes(), TEXT_MEMBER)["text"]

    def put(self, caption: str, text: torch.Tensor) -> None:
        """Store an embedding in the dtype that it has.

        Renamed into place but not fsynced: a file torn by a power cut is noticed and made
        again, which is cheaper than a flush per caption.
        """
        write_bytes(self._path(caption), pack(text=text), commit=rename)

    def delete(self) -> None:
        """Remove this folder, and those that this writer left under other settings."""
        for folder in self._output.glob(f"{PREFIX}*{self._mine}"):
            remove_tree(folder)

    def _path(self, caption: str) -> Path:
        name = hashlib.sha256(caption.encode()).hexdigest()
        return self._folder / name[:2] / f"{name}.safetensors"

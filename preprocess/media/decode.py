"""What is done to a media file in a worker process. Imported there, so nothing heavy: no torch."""

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from preprocess.frames.media_info import Frame, Kind, MediaError, Probe, Shortcut
from preprocess.media.reader import probe, read_frames
from preprocess.media.sources import MediaFile, local_file
from preprocess.media.worker_process import alive
from shared.format.buckets import Bucket
from shared.format.resize import fit_to
from shared.io.hashing import sha256_of


def probe_file(media_file: MediaFile, kind: Kind, sha256: str | None) -> tuple[Probe, str]:
    """What a file holds, and its content's digest unless `sha256` is known. Raises MediaError."""
    with local_file(media_file, on_progress=alive) as path:
        found = probe(path, kind, on_progress=alive)
        return found, sha256 or sha256_of(path, on_progress=alive)


def digest(media_file: MediaFile, sha256: str | None) -> str:
    """The digest of a file's content, unless `sha256` is known. Raises MediaError."""
    with local_file(media_file, on_progress=alive) as path:
        if not path.exists():
            raise MediaError(f"{path}: there is no such file")
        return sha256 or sha256_of(path, on_progress=alive)


def fitted_frames(
    media_file: MediaFile,
    kind: Literal["video", "image"],
    indices: Sequence[int],
    bucket: Bucket,
    shortcut: Shortcut | None = None,
) -> npt.NDArray[np.uint8]:
    """(F, H, W, 3) uint8 RGB, as every encoder gets them. Raises MediaError."""
    with local_file(media_file, on_progress=alive) as path:
        return fit(read_frames(path, kind, indices, shortcut, on_progress=alive), bucket)


def fit(frames: Iterable[Frame], bucket: Bucket) -> npt.NDArray[np.uint8]:
    """Resize and crop frames of one size to a bucket: (F, height, width, 3) uint8."""
    images = (fit_to(Image.fromarray(frame), bucket.height, bucket.width) for frame in frames)
    fitted = np.stack([np.asarray(image) for image in images])
    assert fitted.shape == (bucket.frames, bucket.height, bucket.width, 3)
    return fitted

"""Several datasets in one TOML file, in the shape of musubi-tuner's and diffusion-pipe's.

    [general]                      # for all datasets; diffusion-pipe writes these at the top
    [[datasets]]                   # or diffusion-pipe's [[directory]]

`docs/inputs.md` lists the keys. A key without a meaning here is refused, not passed over: it would
make other samples than its author believes.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from preprocess.dataset.clip_overrides import Resolution, Sampling
from preprocess.dataset.entries import Dataset, Entry, Rejected, load_dataset
from preprocess.dataset.sizes import LARGEST_SIZE, SMALLEST_SIZE, Clips
from preprocess.media.remote import media_folder, metadata_file
from preprocess.media.tars import base_folder, is_tars
from shared.errors import UserError
from shared.io.mirror import followed
from shared.io.names import exists, in_home_folder, is_folder
from shared.io.object_store import is_url

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES = ("datasets", "directory")
GENERAL = "general"

# Where a dataset's media are → the only kind of media that counts there.
FOLDERS = {"video_directory": "video", "image_directory": "image", "path": None}
LISTS = {"video_jsonl_file": "video", "image_jsonl_file": "image", "metadata": None}

# Keys of training, which has options of its own; they change nothing in a cache.
IGNORED = ("batch_size", "cache_directory")
# Keys that say what is done anyway, and the value that says it.
FIXED: dict[str, Any] = {
    "bucket_no_upscale": False,
    "skip_empty_caption": True,
    "multiple_target": False,
}
# Keys → the field of `ClipRule` that they set.
OWN = {
    "image_sample_size": "image_size",
    "video_sample_size": "video_size",
    "token_sample_size": "token_size",
    "training_with_video_token_length": "token_budget",
    "random_hw_adapt": "adapt",
    "enable_bucket": "buckets",
    "enable_ar_bucket": "buckets",
    "fix_sample_size": "fixed_size",
    "random_ratio_crop": "ratio_crop",
    "video_sample_stride": "stride",
    "video_sample_n_frames": "frames",
    "fps": "fps",
    "clips": "clips",
    "clips_per_video": "clips_per_video",
    "variants": "variants",
}
# Keys that people may well bring, and why there is nothing to set.
REFUSED = {
    **dict.fromkeys(
        ("min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "size_buckets"),
        "aspect buckets are Wan's fixed table (shards/README.md)",
    ),
    **dict.fromkeys(
        ("control_directory", "control_path", "control_resolution", "no_resize_control"),
        "there are no control images",
    ),
    "mask_path": "there are no masks",
}


class _BadValueError(Exception):
    """What a key's value should have been."""


def load_dataset_config(file: Path) -> Dataset:
    """All datasets of a TOML file, in its order.

    Raises UserError naming the file, the dataset, the key, what was found and what was expected.
    """
    general, tables = _tables(file)
    parts = []
    for number, table in enumerate(tables, start=1):
        where = f"dataset: {file}: dataset {number}"
        try:
            parts.append(_load(file, where, {**general, **table}))
        except _BadValueError as error:
            raise UserError(f"{where}: {error}") from error
    return Dataset(
        origin=file,
        entries=tuple(entry for part in parts for entry in part.entries),
        rejected=tuple(one for part in parts for one in part.rejected),
    )


def _tables(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is said for all datasets, and the datasets."""
    example = '[[datasets]]\nvideo_directory = "clips"'
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"--dataset-config: cannot read {file} ({error.strerror}). Expected a TOML file such "
            f"as:\n{example}"
        ) from error
    except ValueError as error:  # tomllib's and UnicodeDecodeError
        raise UserError(f"--dataset-config: {file} is no TOML ({error}).") from error
    found = [name for name in TABLES if name in content]
    if len(found) != 1 or not isinstance(content[found[0]], list) or not content[found[0]]:
        given = " and ".join(found) or "none"
        raise UserError(
            f"dataset: {file}: expected tables [[datasets]] (or [[directory]]), found {given}. "
            f"Write:\n{example}"
        )
    tables = content.pop(found[0])
    general = content.pop(GENERAL, {})
    if not all(isinstance(table, dict) for table in (general, *tables)):
        raise UserError(
            f"dataset: {file}: {found[0]} must be tables and {GENERAL} one. Write:\n{example}"
        )
    general = {**content, **general}  # diffusion-pipe's stand at the top
    for name in general:
        if name in FOLDERS or name in LISTS:
            raise UserError(
                f"dataset: {file}: {name} stands outside of a dataset. Put it under [[datasets]]."
            )
    return general, tables


def _load(file: Path, where: str, table: Mapping[str, Any]) -> Dataset:
    """One dataset."""
    sources = [name for name in (*FOLDERS, *LISTS) if name in table]
    known = {*FOLDERS, *LISTS, *IGNORED, *FIXED, *READERS}
    for name, value in table.items():
        if name in REFUSED:
            raise _BadValueError(f"{name} has no meaning here: {REFUSED[name]}. Delete the line.")
        if name not in known:
            raise _BadValueError(f"unknown key {name!r}. Expected: {', '.join(sorted(known))}.")
        if name in FIXED and value is not FIXED[name]:
            meant = str(FIXED[name]).lower()
            raise _BadValueError(
                f"{name} is {value!r}, only {meant} is supported. Delete the line."
            )
    values: dict[str, Any] = {}
    for name, read in READERS.items():
        if name in table:
            try:
                values[name] = read(table[name])
            except _BadValueError as error:
                found = table[name]
                raise _BadValueError(f"{name} is {found!r}, expected {error}.") from error
    folder = [name for name in sources if name in FOLDERS]
    listed = [name for name in sources if name in LISTS]
    if len(folder) > 1 or len(listed) > 1 or not sources:
        raise _BadValueError(
            f"its media are given by {' and '.join(sources) or 'nothing'}, expected one of "
            f"{', '.join((*FOLDERS, *LISTS))}."
        )
    suffix = values.get("caption_extension", ".txt")
    paths = {name: _path(file, name, table[name], suffix) for name in sources}
    kind = next((k for n in sources if (k := FOLDERS.get(n) or LISTS.get(n))), None)
    metadata = paths[listed[0]] if listed else None
    if folder:
        data_dir = paths[folder[0]]
    elif is_url(table[listed[0]]):
        data_dir = _pulled(media_folder(table[listed[0]].rpartition("/")[0]))
    else:
        data_dir = paths[listed[0]].parent
    if folder and not is_folder(data_dir) and not is_tars(data_dir):
        raise _BadValueError(f"{folder[0]}: there is no folder {data_dir}.")
    if metadata is not None and not metadata.is_file():
        raise _BadValueError(f"{listed[0]}: there is no file {metadata}.")
    try:
        loaded = load_dataset(
            data_dir,
            metadata,
            caption_suffix=suffix,
            kind=kind,  # type: ignore[arg-type]
        )
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('dataset: ')}") from error
    sampling = _sampling(values)
    repeats = values.get("num_repeats", 1)

    def named(source: str) -> str:
        """As the file would be found from here: names of two folders must not be mixed up."""
        here = base_folder(data_dir)
        if is_url(source) or Path(source).is_absolute():
            return source
        if (store := followed(data_dir)) is not None:
            return f"{store.url}/{source}"
        return (here / source).as_posix()

    def own(entry: Entry) -> Entry:
        source = "" if entry.path is None else named(entry.source)
        return replace(entry, source=source, sampling=sampling, repeats=repeats)

    return Dataset(
        origin=loaded.origin,
        entries=tuple(own(entry) for entry in loaded.entries),
        rejected=tuple(
            Rejected(source=named(one.source), reason=one.reason) for one in loaded.rejected
        ),
    )


def _pulled(path: Path) -> Path:
    """A store's folder or file, looked at now: only here is it known which there are."""
    if (found := followed(path)) is not None:
        found.pull()
    return path


def _path(file: Path, name: str, value: Any, caption_suffix: str) -> Path:
    """From the working folder, as both projects have it, or else from the file's own."""
    if not isinstance(value, str) or not value:
        raise _BadValueError(f"{name} is {value!r}, expected a path.")
    if is_url(value):
        if name in LISTS:
            return _pulled(metadata_file(value))
        return _pulled(media_folder(value, caption_suffix=caption_suffix))
    for path in (Path(value), file.parent / value):
        if exists(path):
            return path
    return in_home_folder(value)


def _sampling(values: Mapping[str, Any]) -> Sampling:
    """What the keys say about sizes and frames."""
    clash = [
        ("resolution", "resolutions"),
        ("target_frames", "frame_buckets"),
        *(("video_sample_n_frames", name) for name in ("target_frames", "frame_buckets")),
        ("fps", "video_sample_stride"),
        ("enable_bucket", "enable_ar_bucket"),
        ("fix_sample_size", "random_ratio_crop"),
        *(("fix_sample_size", name) for name in ("resolution", "resolutions")),
    ]
    for one, other in clash:
        if one in values and other in values:
            raise _BadValueError(f"{one} and {other} are both given, expected one of them.")
    single = values.get("resolution")
    resolutions = values.get("resolutions", () if single is None else (single,))
    lengths = values.get("target_frames", values.get("frame_buckets", ()))
    if "frame_buckets" in values:  # 1 is for images there: a video is never cut down to a still
        lengths = tuple(n for n in lengths if n > 1) or lengths
    return Sampling(
        own={field: values[name] for name, field in OWN.items() if name in values},
        resolutions=resolutions,
        lengths=lengths,
        every_length="target_frames" in values,
    )


def _integer(least: int, most: int | None = None) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or value < least or (most is not None and value > most):
            until = f" to {most}" if most is not None else ""
            start = f"from {least}{until}" if until else f"of at least {least}"
            raise _BadValueError(f"a whole number {start}")
        return int(value)

    return read


_size = _integer(SMALLEST_SIZE, LARGEST_SIZE)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _BadValueError("true or false")
    return value


def _rate(value: Any) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < math.inf:
        raise _BadValueError("frames a second above 0")
    return float(value)


def _clips(value: Any) -> str:
    if value not in get_args(Clips):
        raise _BadValueError(f"one of {', '.join(get_args(Clips))}")
    return str(value)


def _side_by_side(value: Any) -> tuple[int, int]:
    try:
        height, width = (_size(side) for side in value)
    except (_BadValueError, TypeError, ValueError):
        raise _BadValueError(
            f"[height, width] in pixels, each from {SMALLEST_SIZE} to {LARGEST_SIZE}"
        ) from None
    return height, width


def _frames(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1 or value % 4 != 1:
        raise _BadValueError("frames of the form 4n+1 (1, 5, 9, … 81)")
    return value


def _lengths(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise _BadValueError("a list of frames of the form 4n+1, as [1, 33, 81]")
    return tuple(sorted({_frames(one) for one in value}))


def _resolution(value: Any) -> Resolution | int:
    try:
        if isinstance(value, list):
            width, height = (_size(side) for side in value)
            return Resolution(width=width, height=height)
        return _size(value)
    except (_BadValueError, ValueError):
        raise _BadValueError(
            f"a size or [width, height] in pixels, each from {SMALLEST_SIZE} to {LARGEST_SIZE}"
        ) from None


def _resolutions(value: Any) -> tuple[Resolution | int, ...]:
    if not isinstance(value, list) or not value:
        raise _BadValueError("a list, as [512] or [[832, 480], [480, 832]]")
    return tuple(dict.fromkeys(_resolution(one) for one in value))


def _suffix(value: Any) -> str:
    if not isinstance(value, str) or not value.startswith(".") or len(value) < 2:
        raise _BadValueError('an ending such as ".txt"')
    return value


READERS: dict[str, Callable[[Any], Any]] = {
    "caption_extension": _suffix,
    "num_repeats": _integer(1),
    "resolution": _resolution,
    "resolutions": _resolutions,
    "image_sample_size": _size,
    "video_sample_size": _size,
    "token_sample_size": _size,
    "training_with_video_token_length": _flag,
    "random_hw_adapt": _flag,
    "enable_bucket": _flag,
    "enable_ar_bucket": _flag,
    "fix_sample_size": _side_by_side,
    "random_ratio_crop": _flag,
    "fps": _rate,
    "clips": _clips,
    "clips_per_video": _integer(1),
    "variants": _integer(1),
    "video_sample_stride": _integer(1),
    "video_sample_n_frames": _frames,
    "target_frames": _lengths,
    "frame_buckets": _lengths,
}

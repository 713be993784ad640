"""Several datasets in one TOML file, in the shape of musubi-tuner's and diffusion-pipe's.

    [general]                      # for all datasets; diffusion-pipe writes these at the top
    [[datasets]]                   # or diffusion-pipe's [[directory]]

`docs/inputs.md` lists the keys. A key without a meaning here is refused, not passed over: it would
make other samples than its author believes.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from preprocess.dataset.clip_overrides import Resolution, Sampling
from preprocess.dataset.entries import load_dataset
from preprocess.dataset.entry import Dataset, Entry
from preprocess.dataset.sizes import LARGEST_SIZE, SMALLEST_SIZE, Clips
from preprocess.frames.media_info import MediaKind
from preprocess.media.remote import DataDir, MediaList, here, open_folder, open_list
from preprocess.media.tars import base_folder, is_tars
from shared.errors import UserError
from shared.io.names import exists, in_home_folder, is_folder
from shared.io.object_store import is_url, refuse_secrets
from shared.io.toml_file import read_toml

TABLES = ("datasets", "directory")
GENERAL = "general"

# Where a dataset's media are → the only kind of media that counts there.
FOLDERS: dict[str, MediaKind | None] = {
    "video_directory": "video",
    "image_directory": "image",
    "path": None,
}
LISTS: dict[str, MediaKind | None] = {
    "video_jsonl_file": "video",
    "image_jsonl_file": "image",
    "metadata": None,
}

# Keys of training, which has options of its own; they change nothing in a cache.
IGNORED = ("batch_size", "cache_directory")
# Keys that say what is done anyway, and the value that says it.
FIXED: dict[str, Any] = {
    "bucket_no_upscale": False,
    "skip_empty_caption": True,
    "multiple_target": False,
}
# Keys that people may well bring: why there is nothing to set, and what to write instead.
REFUSED = {
    **dict.fromkeys(
        ("min_ar", "max_ar", "num_ar_buckets", "ar_buckets", "size_buckets"),
        "aspect buckets are Wan's fixed table (shards/README.md). Delete the line.",
    ),
    **dict.fromkeys(
        (
            *("control_directory", "control_path", "control_resolution", "no_resize_control"),
            *("flux_kontext_no_resize_control", "qwen_image_edit_no_resize_control"),
            "qwen_image_edit_control_resolution",
        ),
        "there are no control images. Delete the line.",
    ),
    **dict.fromkeys(("mask_path", "mask_directory"), "there are no masks. Delete the line."),
    **dict.fromkeys(
        ("fp_latent_window_size", "fp_1f_clean_indices", "fp_1f_target_index", "fp_1f_no_post"),
        "it is FramePack's. Delete the line.",
    ),
    **dict.fromkeys(
        ("source_fps", "target_fps"),
        "rates are read from the videos. To take 16 frames a second, musubi-tuner's rate for Wan, "
        "write fps = 16.0 in its place.",
    ),
    "subsets": "a dataset has one folder. Write a [[datasets]] table for each subset, with "
    "video_directory or image_directory and its num_repeats.",
}


class _BadValueError(Exception):
    """What a key's value should have been."""


@dataclass(frozen=True)
class _Value:
    """What a key's value must be."""

    expected: str
    """For messages."""
    types: tuple[type, ...]
    """As tomllib gives them: true is no number."""
    fits: Callable[[Any], bool] = lambda value: True
    as_read: Callable[[Any], Any] = lambda value: value

    def read(self, value: Any) -> Any:
        """Raises _BadValueError."""
        if type(value) not in self.types or not self.fits(value):
            raise _BadValueError(self.expected)
        return self.as_read(value)

    def several(self, expected: str) -> "_Value":
        """A list of such values, none twice."""
        return _Value(
            expected, (list,), bool, lambda values: tuple(dict.fromkeys(map(self.read, values)))
        )


def _is_size(value: Any) -> bool:
    return type(value) is int and SMALLEST_SIZE <= value <= LARGEST_SIZE


def _is_pair(value: Any) -> bool:
    return type(value) is list and len(value) == 2 and all(map(_is_size, value))


_SIDES = f"in pixels, each from {SMALLEST_SIZE} to {LARGEST_SIZE}"
_FLAG = _Value("true or false", (bool,))
_COUNT = _Value("a whole number of at least 1", (int,), lambda value: value >= 1)
_SIZE = _Value(f"a whole number from {SMALLEST_SIZE} to {LARGEST_SIZE}", (int,), _is_size)
_PAIR = _Value(f"[height, width] {_SIDES}", (list,), _is_pair, tuple)
_RATE = _Value("frames a second above 0", (int, float), lambda value: 0 < value < math.inf, float)
_FRAMES = _Value(
    "frames of the form 4n+1 (1, 5, 9, … 81)", (int,), lambda value: value > 0 and value % 4 == 1
)
_LENGTHS = _FRAMES.several("a list of frames of the form 4n+1, as [1, 33, 81]")
_RESOLUTION = _Value(
    f"a size or [width, height] {_SIDES}",
    (int, list),
    lambda value: _is_size(value) or _is_pair(value),
    lambda value: value if isinstance(value, int) else Resolution(width=value[0], height=value[1]),
)
_CLIPS = _Value(f"one of {', '.join(get_args(Clips))}", (str,), get_args(Clips).__contains__)
_EXTRACTION = _Value(
    'one of head, chunk, uniform, full; for slide, windows that overlap, write clips = "uniform" '
    'with clips_per_video, or clips = "chunk"',
    (str,),
    ("head", "chunk", "uniform", "full").__contains__,
)
_SUFFIX = _Value(
    'an ending such as ".txt"', (str,), lambda value: value.startswith(".") and len(value) > 1
)

# Keys that set a field of `ClipRule`, and which.
OWN = {
    "image_sample_size": ("image_size", _SIZE),
    "video_sample_size": ("video_size", _SIZE),
    "token_sample_size": ("token_size", _SIZE),
    "training_with_video_token_length": ("token_budget", _FLAG),
    "random_hw_adapt": ("adapt", _FLAG),
    "enable_bucket": ("buckets", _FLAG),
    "enable_ar_bucket": ("buckets", _FLAG),
    "fix_sample_size": ("fixed_size", _PAIR),
    "random_ratio_crop": ("ratio_crop", _FLAG),
    "fps": ("fps", _RATE),
    "clips": ("clips", _CLIPS),
    "clips_per_video": ("clips_per_video", _COUNT),
    "variants": ("variants", _COUNT),
    "video_sample_stride": ("stride", _COUNT),
    "video_sample_n_frames": ("frames", _FRAMES),
}
VALUES = {
    "caption_extension": _SUFFIX,
    "num_repeats": _COUNT,
    "resolution": _RESOLUTION,
    "resolutions": _RESOLUTION.several("a list, as [512] or [[832, 480], [480, 832]]"),
    "target_frames": _LENGTHS,
    "frame_buckets": _LENGTHS,
    "frame_extraction": _EXTRACTION,
    "frame_stride": _COUNT,
    "frame_sample": _COUNT,
    "max_frames": _COUNT,
    **{name: value for name, (_, value) in OWN.items()},
}
MOST_FRAMES = 129
"""musubi-tuner's `max_frames` where it is not given."""
# Of these only one may be given.
CLASHES = (
    ("resolution", "resolutions"),
    ("target_frames", "frame_buckets"),
    ("video_sample_n_frames", "target_frames"),
    ("video_sample_n_frames", "frame_buckets"),
    ("fps", "video_sample_stride"),
    ("frame_extraction", "clips"),
    ("frame_extraction", "clips_per_video"),
    ("frame_extraction", "frame_buckets"),
    ("frame_extraction", "video_sample_n_frames"),
    ("enable_bucket", "enable_ar_bucket"),
    ("fix_sample_size", "random_ratio_crop"),
    ("fix_sample_size", "resolution"),
    ("fix_sample_size", "resolutions"),
)


def read_dataset(config: Path | None, data_dir: str, metadata: str | None) -> Dataset:
    """What a command is given: the datasets of a TOML file, or the one of a folder and its list."""
    if config is not None:
        return load_dataset_config(config)
    return load_dataset(open_folder(data_dir), None if metadata is None else open_list(metadata))


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
        origin=str(file),
        entries=tuple(entry for part in parts for entry in part.entries),
        rejected=tuple(one for part in parts for one in part.rejected),
        left_out=tuple(one for part in parts for one in part.left_out),
        tallies=tuple(one for part in parts for one in part.tallies),
    )


def _tables(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What is said for all datasets, and the datasets."""
    example = '[[datasets]]\nvideo_directory = "clips"'
    try:
        content = read_toml(file)
    except OSError as error:
        raise UserError(
            f"--dataset-config: cannot read {file} ({error.strerror}). Expected a TOML file such "
            f"as:\n{example}"
        ) from error
    except ValueError as error:  # no TOML, or no UTF-8
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
    _refuse_unknown(table)
    values = {name: _read(name, table[name]) for name in VALUES if name in table}
    suffix = values.get("caption_extension", ".txt")
    data_dir, metadata, kind = _media(file, table, suffix)
    try:
        loaded = load_dataset(data_dir, metadata, caption_suffix=suffix, kind=kind)
    except UserError as error:
        raise UserError(f"{where}: {str(error).removeprefix('dataset: ')}") from error
    sampling, repeats = _sampling(values), values.get("num_repeats", 1)

    def named(source: str) -> str:
        """As the file would be found from here: names of two folders must not be mixed up."""
        if is_url(source) or Path(source).is_absolute():
            return source
        base = base_folder(data_dir)
        return (base / source).as_posix() if isinstance(base, Path) else f"{base}/{source}"

    def own(entry: Entry) -> Entry:
        source = "" if entry.path is None else named(entry.source)
        return replace(entry, source=source, sampling=sampling, repeats=repeats)

    return replace(
        loaded,
        entries=tuple(map(own, loaded.entries)),
        rejected=tuple(replace(one, source=named(one.source)) for one in loaded.rejected),
        left_out=tuple(replace(one, source=named(one.source)) for one in loaded.left_out),
    )


def _refuse_unknown(table: Mapping[str, Any]) -> None:
    known = {*FOLDERS, *LISTS, *IGNORED, *FIXED, *VALUES}
    for name, value in table.items():
        if name in REFUSED:
            raise _BadValueError(f"{name} has no meaning here: {REFUSED[name]}")
        if name not in known:
            raise _BadValueError(f"unknown key {name!r}. Expected: {', '.join(sorted(known))}.")
        if name in FIXED and value is not FIXED[name]:
            meant = str(FIXED[name]).lower()
            raise _BadValueError(
                f"{name} is {value!r}, only {meant} is supported. Delete the line."
            )


def _read(name: str, value: Any) -> Any:
    try:
        return VALUES[name].read(value)
    except _BadValueError as error:
        raise _BadValueError(f"{name} is {value!r}, expected {error}.") from error


def _media(
    file: Path, table: Mapping[str, Any], suffix: str
) -> tuple[DataDir, MediaList | None, MediaKind | None]:
    """Where a dataset's media are, its list if it has one, and their kind if it has one only."""
    folders = [name for name in FOLDERS if name in table]
    lists = [name for name in LISTS if name in table]
    sources = folders + lists
    if len(folders) > 1 or len(lists) > 1 or not sources:
        raise _BadValueError(
            f"its media are given by {' and '.join(sources) or 'nothing'}, expected one of "
            f"{', '.join((*FOLDERS, *LISTS))}."
        )
    data_dir: DataDir
    metadata: MediaList | None = None
    if lists:
        listed = _location(file, lists[0], table[lists[0]])
        metadata = open_list(listed)
    if folders:
        data_dir = open_folder(
            _location(file, folders[0], table[folders[0]]), caption_suffix=suffix
        )
    elif isinstance(listed, Path):
        data_dir = listed.parent
    else:
        data_dir = open_folder(listed.rpartition("/")[0])
    if folders and not is_folder(here(data_dir)) and not is_tars(here(data_dir)):
        raise _BadValueError(f"{folders[0]}: there is no folder {data_dir}.")
    if metadata is not None and not here(metadata).is_file():
        raise _BadValueError(f"{lists[0]}: there is no file {metadata}.")
    kinds = (FOLDERS.get(name) or LISTS.get(name) for name in sources)
    return data_dir, metadata, next((kind for kind in kinds if kind), None)


def _location(file: Path, name: str, value: Any) -> str | Path:
    """A URL, or a path: from the working folder, as both projects have it, or the file's own."""
    if not isinstance(value, str) or not value:
        raise _BadValueError(f"{name} is {value!r}, expected a path.")
    if is_url(value):
        try:
            refuse_secrets(value)
        except UserError as error:
            raise _BadValueError(f"{name}: {error}") from error
        return value
    # The second: as Windows writes it.
    for here_value in (value, value.replace("\\", "/")):
        for path in (Path(here_value), file.parent / here_value):
            if exists(path):
                return path
    return in_home_folder(value)


def _sampling(values: Mapping[str, Any]) -> Sampling:
    """What the keys say about sizes and frames."""
    for one, other in CLASHES:
        if one in values and other in values:
            raise _BadValueError(f"{one} and {other} are both given, expected one of them.")
    if values.get("enable_bucket") is False and (sides := _oblong(values)):
        raise _BadValueError(
            f"enable_bucket is false and resolution [{sides.width}, {sides.height}]: without "
            "buckets there are squares. To fit every sample to this one size write "
            f"fix_sample_size = [{sides.height}, {sides.width}] in place of both."
        )
    single = values.get("resolution")
    resolutions = values.get("resolutions", () if single is None else (single,))
    lengths = tuple(sorted(values.get("target_frames", values.get("frame_buckets", ()))))
    if "frame_buckets" in values:  # 1 is for images there: a video is never cut down to a still
        lengths = tuple(n for n in lengths if n > 1) or lengths
    extraction = values.get("frame_extraction")
    return Sampling(
        own={field: values[name] for name, (field, _) in OWN.items() if name in values}
        | _extracted(values),
        resolutions=resolutions,
        lengths=() if extraction == "full" else lengths,
        every_length="target_frames" in values,
    )


def _extracted(values: Mapping[str, Any]) -> dict[str, Any]:
    """musubi-tuner's `frame_extraction` as fields of `ClipRule`.

    As there, the keys of the other ways count for nothing: `frame_sample` is of uniform, where one
    sample is the head; `max_frames` of full, which has no `target_frames`.
    """
    match values.get("frame_extraction"):
        case "head":
            return {"clips": "first"}
        case "chunk":
            return {"clips": "chunk"}
        case "uniform" if (number := values.get("frame_sample", 1)) > 1:
            return {"clips": "uniform", "clips_per_video": number}
        case "uniform":
            return {"clips": "first"}
        case "full":
            most = values.get("max_frames", MOST_FRAMES)
            return {"clips": "first", "frames": (most - 1) // 4 * 4 + 1}
    return {}


def _oblong(values: Mapping[str, Any]) -> Resolution | None:
    """A resolution that is no square."""
    found = (values.get("resolution"), *values.get("resolutions", ()))
    sides = (one for one in found if isinstance(one, Resolution))
    return next((one for one in sides if one.width != one.height), None)

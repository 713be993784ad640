"""`--validation-prompts`: what a training run will sample, encoded beside its samples.

A list in a file → the list in the prompt bank, with text, shape and, where a prompt begins with a
picture, what the model takes of it. The bank's newest list counts, whole; what an older one has
encoded already is copied, not encoded again.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from preprocess.dataset.clips import ClipRule, caption_clips
from preprocess.dataset.metadata import Form, Record, as_number, read_metadata
from preprocess.frames.media_info import MediaError
from preprocess.media.decode import fit
from preprocess.media.reader import probe, read_frames
from shared.errors import UserError, json_kind
from shared.format.buckets import Bucket
from shared.format.captions import is_blank
from shared.format.prompts import VALIDATION, Prompt, current_validation
from shared.format.strict_json import is_count
from shared.io.hashing import sha256_of
from shared.models.spec import ModelSpec

OPTION = "--validation-prompts"
PROMPT_FIELDS = ("prompt", "text", "caption")
PICTURE_FIELDS = ("image", "image_path", "file_path", "file_name")
"""The first is ours; finetrainers' and musubi-tuner's; VideoX-Fun's and Hugging Face datasets'."""
LAST_PICTURE_FIELDS = ("last_image", "end_image")
FRAMES_FIELDS = ("frames", "num_frames")
LANDSCAPE = (9, 16)
"""The (height, width) whose bucket a prompt gets that has neither a picture nor a size."""

FORM = Form(
    subject=OPTION,
    entry=f"a prompt ({' | '.join(PROMPT_FIELDS)}), for image-to-video an image "
    f"({' | '.join(PICTURE_FIELDS)}), and perhaps height, width and frames",
    lines="a prompt a line",
    option=OPTION,
    columns={"prompt": PROMPT_FIELDS},
)

# musubi-tuner's sample prompts: "a cat --w 832 --h 480 --f 81 --i cat.png". What a line may say of
# a sampler is not needed: steps, guidance and seed are the training's.
_OPTION = re.compile(r"\s--(?P<name>[a-z]+)(?:\s+(?P<value>[^\s].*?))?(?=\s--[a-z]+\s|\s*$)")
_LINE_OPTIONS = {"w": "width", "h": "height", "f": "frames", "i": "image", "ei": "last_image"}
_UNUSED = {"d", "s", "g", "l", "fs", "n", "t", "cn"}


@dataclass(frozen=True, kw_only=True)
class ValidationPrompt:
    """An entry of the list, checked."""

    prompt: str
    bucket: Bucket
    picture: Path | None = None
    image: str | None = None
    """SHA-256 of the picture."""
    last_picture: Path | None = None
    last_image: str | None = None
    """Of the one that the clip ends with, for flf2v."""

    def in_bank(
        self, text: torch.Tensor, condition: Mapping[str, torch.Tensor] | None = None
    ) -> Prompt:
        """The prompt bank's entry with this text and what the model takes of the picture."""
        return Prompt(
            VALIDATION,
            self.prompt,
            text,
            bucket=self.bucket,
            image=self.image,
            last_image=self.last_image,
            **(condition or {}),
        )

    @property
    def key(self) -> str:
        """Of the entry in the bank."""
        return self.in_bank(torch.empty(0, 0)).key


def read_validation_prompts(
    path: Path, spec: ModelSpec, rule: ClipRule
) -> tuple[list[ValidationPrompt], str]:
    """The prompts of a list, each once, and a note on what of it is not used; "" if all is.

    A prompt without a size gets the bucket of its picture's shape, or of 16:9, and as many frames
    as a clip of the cache. Raises UserError naming the entry and the field.
    """
    found: dict[str, ValidationPrompt] = {}
    unused: set[str] = set()
    for record in read_metadata(path, FORM):
        item = _fields(record, path)
        if path.suffix.lower() == ".txt":
            if item["caption"].lstrip().startswith("#"):  # a comment, as in musubi-tuner's files
                continue
            item = _split_line(item["caption"], record.where, unused)
        one = _checked(_Item(item, record.where), path.parent, spec, rule)
        found.setdefault(one.key, one)
    if not found:
        raise UserError(f"{OPTION}: {path} has no prompts, only comments. Write one a line.")
    options = ", ".join(f"--{name}" for name in sorted(unused))
    why = "steps, guidance and seed are those of the training"
    note = f"{options} in {path.name} are not used: {why}" if unused else ""
    return list(found.values()), note


def _fields(record: Record, path: Path) -> dict[str, Any]:
    if record.problem is not None:
        raise UserError(f"{OPTION}: {record.where}: {record.problem}. Mend or delete it.")
    if not isinstance(record.value, dict):
        raise UserError(
            f"{OPTION}: {record.where} is {json_kind(record.value)}, expected an object with "
            f"{FORM.entry}."
        )
    return record.value


def _split_line(line: str, where: str, unused: set[str]) -> dict[str, Any]:
    """A line of text → prompt and the fields that options at its end stand for."""
    options = list(_OPTION.finditer(line))
    item: dict[str, Any] = {"prompt": line[: options[0].start()] if options else line}
    for option in options:
        name = option["name"]
        if name in _UNUSED:
            unused.add(name)
        elif name in _LINE_OPTIONS:
            item[_LINE_OPTIONS[name]] = (option["value"] or "").strip()
        else:
            raise UserError(
                f"{OPTION}: {where}: found --{name}, expected --w, --h, --f, --i or --ei (width, "
                "height, frames, image, last image) at the end of a line."
            )
    return item


@dataclass(frozen=True)
class _Item:
    """An entry of the list, not checked yet."""

    fields: dict[str, Any]
    where: str

    def refused(self, why: str) -> UserError:
        return UserError(f"{OPTION}: {self.where}{why}")

    def text(self, names: Sequence[str]) -> str:
        """The one of these fields that is filled; "" without any."""
        filled = {n: self.fields[n] for n in names if not is_blank(self.fields.get(n))}
        for name, value in filled.items():
            if not isinstance(value, str):
                raise self.refused(f": {name} is {json_kind(value)}, expected text.")
        if len({value.strip() for value in filled.values()}) > 1:
            raise self.refused(f" has {' and '.join(filled)}, expected one of them.")
        return next((value.strip() for value in filled.values()), "")

    def number(self, *names: str) -> int | None:
        """A whole number from 1, of the first of these fields that is filled."""
        filled = (name for name in names if self.fields.get(name) not in (None, ""))
        if (name := next(filled, None)) is None:
            return None
        value = as_number(self.fields[name])
        if not is_count(value, least=1):
            raise self.refused(f": {name} is {value!r:.40}, expected a whole number from 1.")
        return int(value)


def _checked(item: _Item, folder: Path, spec: ModelSpec, rule: ClipRule) -> ValidationPrompt:
    prompt = item.text(PROMPT_FIELDS)
    if not prompt:
        raise item.refused(f" has no prompt, expected text in {' | '.join(PROMPT_FIELDS)}.")
    picture, image, shape = None, None, LANDSCAPE
    if name := item.text(PICTURE_FIELDS):
        if spec.mode == "t2v":
            raise item.refused(
                f" has an image, {name!r:.80}, and the shards are for a t2v model, which takes "
                "none. Leave it out."
            )
        picture, shape = _picture(item, folder, name)
        image = sha256_of(picture)
    elif spec.given_frames:
        raise item.refused(
            f" has no image, and {spec.folder} is an i2v model. Expected a field "
            f"{' | '.join(PICTURE_FIELDS)}, or --i FILE at the end of a line of text."
        )
    last_picture, last_image = None, None
    if name := item.text(LAST_PICTURE_FIELDS):
        if len(spec.given_frames) < 2:
            raise item.refused(
                f" has a last image, {name!r:.80}, and the shards are for {spec.mode}, without a "
                "last frame. Leave it out, or encode with --train-mode flf2v."
            )
        last_picture, _ = _picture(item, folder, name)
        last_image = sha256_of(last_picture)
    elif len(spec.given_frames) > 1:
        raise item.refused(
            " has no last image, and the shards are for flf2v. Expected a field "
            f"{' | '.join(LAST_PICTURE_FIELDS)}, or --ei FILE at the end of a line of text."
        )
    size, frames = _shape(item, spec)
    # Its bucket as a text-only sample gets it; what is drawn there is drawn from the prompt.
    rule = replace(rule, variants=1, frames=frames or rule.frames)
    (clip,) = caption_clips(prompt, rule, shape=shape, frames=None)
    height, width = size or (clip.bucket.height, clip.bucket.width)
    bucket = Bucket(height, width, frames or clip.bucket.frames)
    return ValidationPrompt(
        prompt=prompt,
        bucket=bucket,
        picture=picture,
        image=image,
        last_picture=last_picture,
        last_image=last_image,
    )


def _picture(item: _Item, folder: Path, name: str) -> tuple[Path, tuple[int, int]]:
    """A picture of the list in `folder`, and its height and width."""
    names = (name, name.replace("\\", "/"))  # the second: as Windows writes it
    places = [place for one in names for place in (folder / one, Path(one))]
    picture = next((place for place in places if place.is_file()), folder / name)
    try:
        seen = probe(picture, "image")
    except MediaError as error:
        raise item.refused(f": {error}. Name an image, e.g. a PNG.") from error
    return picture, (seen.height, seen.width)


def _shape(item: _Item, spec: ModelSpec) -> tuple[tuple[int, int] | None, int | None]:
    """((height, width), frames) that an entry asks for."""
    height, width, frames = item.number("height"), item.number("width"), item.number(*FRAMES_FIELDS)
    multiple, step = spec.side_multiple, spec.stride[0]
    if (height is None) != (width is None):
        raise item.refused(" has one of height and width, expected both or none.")
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % multiple:
            nearest = max(multiple, math.floor(side / multiple + 0.5) * multiple)
            raise item.refused(
                f": {name} is {side}, expected a multiple of {multiple}, e.g. {nearest}."
            )
    if frames is not None and (frames - 1) % step:
        nearest = max(0, frames - 1) // step * step + 1
        raise item.refused(f": frames is {frames}, expected {step}n+1, e.g. {nearest}.")
    return None if height is None or width is None else (height, width), frames


@dataclass(frozen=True, kw_only=True)
class MissingPrompts:
    """What is to be encoded so that the bank's list is the one that is wanted; empty if it is."""

    wanted: Sequence[ValidationPrompt] = ()
    known: Mapping[str, Prompt] = field(default_factory=dict)
    """Key → entry that some list of the bank has, to be copied."""
    texts: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Prompt → embedding that the bank has."""

    @property
    def pictures(self) -> list[ValidationPrompt]:
        """Whose picture is to be encoded."""
        return [one for one in self.wanted if one.picture and one.key not in self.known]

    def in_bank(
        self,
        text: Callable[[str], torch.Tensor],
        conditions: Mapping[str, Mapping[str, torch.Tensor]],
    ) -> list[Prompt]:
        """The whole list, with the embeddings that `text` gives; `conditions` by key."""
        return [
            self.known.get(one.key) or one.in_bank(text(one.prompt), conditions.get(one.key))
            for one in self.wanted
        ]


def missing_validation(
    wanted: Sequence[ValidationPrompt], bank: list[list[Prompt]]
) -> MissingPrompts:
    """What the bank lacks of these; `bank`: prompts by shard, oldest first."""
    current = [prompt.key for prompt in current_validation(bank)]
    if not wanted or current == [one.key for one in wanted]:
        return MissingPrompts()
    every = [prompt for shard in bank for prompt in shard]
    return MissingPrompts(
        wanted=wanted,
        known={prompt.key: prompt for prompt in every if prompt.role == VALIDATION},
        texts={prompt.prompt: prompt.text for prompt in every},
    )


def last_of_roles(bank: list[list[Prompt]]) -> dict[str, str]:
    """Role → its prompt that counts, the newest, without validation prompts."""
    every = (prompt for shard in bank for prompt in shard if prompt.role != VALIDATION)
    return {prompt.role: prompt.prompt for prompt in every}


def missing_roles(wanted: Mapping[str, str], bank: list[list[Prompt]]) -> list[tuple[str, str]]:
    """(role, prompt) that the bank, by shard, lacks of these."""
    last = last_of_roles(bank)
    return [(role, text) for role, text in wanted.items() if last.get(role) != text]


Conditions = dict[str, dict[str, torch.Tensor]]
"""Key of a validation prompt → what the model takes of its pictures, as of a sample's frames."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """The picture of a prompt, or both, ready for an encoder."""

    key: str
    """Of the prompt's entry in the bank."""
    bucket: Bucket
    given: npt.NDArray[np.uint8]
    """(1 or 2, H, W, 3) RGB, resized and cropped as a sample is."""


def read_pictures(prompts: Sequence[ValidationPrompt]) -> list[Picture]:
    """Of prompts that have one. Raises UserError for a picture that cannot be read."""
    pictures = []
    for one in prompts:
        shape, files = replace(one.bucket, frames=1), (one.picture, one.last_picture)
        try:
            given = [fit(read_frames(f, "image", [0]), shape) for f in files if f is not None]
        except MediaError as error:
            raise UserError(f"{OPTION}: {error}. Name an image, e.g. a PNG.") from error
        pictures.append(Picture(key=one.key, bucket=one.bucket, given=np.concatenate(given)))
    return pictures

"""Validation: what the trained LoRA makes of fixed inputs during training.

Latents are sampled with the roles as they are in training, at the trained steps, and shown by their
colours (`shared.format.latent_rgb`): no VAE is there. They are kept, so that `wantrain decode` can
show the real thing. The noise is counted, of a stream of its own, and no weight changes, so
training goes on as if nothing had been.

Inputs are the validation prompts of the prompt bank. An expert that begins from latents, as the low
one does, cannot begin them: it gets fixed samples of the cache, with their own captions, noised to
its first step.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL.Image import Image

from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, CacheIndex
from shared.format.latent_rgb import R2_FLOOR, LatentRgb, latents_to_rgb
from shared.format.prompts import Prompt, current_validation, prompts_by_shard
from shared.format.schema import DTYPES, TEXT_MEMBER
from shared.io.durable import building_folder, fsync_folder, write_bytes, write_json
from shared.io.mp4 import Clip, write_mp4
from shared.io.names import quoted
from shared.models.spec import ModelSpec
from shared.spread import spread_over
from train.data.batches import MicroBatches, StoredBatch
from train.data.dataset import Dataset
from train.distributed.process_group import Ranks
from train.methods.base import Objective
from train.model.roles import Roles
from train.sampling.contact_sheet import contact_sheet
from train.sampling.latent_files import LatentClip, latent_bytes
from train.strategies.base import TrainedRole
from train.tracking.trackers import SampledClip, Tracker

FOLDER, CLIPS = "validation", "clips.json"
CACHE_SAMPLES = 4
"""Samples of the cache that are shown where there are no prompts to say how many."""
_PREVIEW_SIDE = 256


@dataclass(frozen=True, kw_only=True)
class ValidationInput:
    """One clip that is to be made."""

    label: str
    """Its prompt or caption."""
    batch: StoredBatch
    """Of one sample; `update` 0, `samples` its number."""
    seed: int = 0
    """Which of the clips of its prompt it is."""


@dataclass(frozen=True, kw_only=True)
class Validation:
    """What is sampled, how often, and where it goes."""

    inputs: Sequence[ValidationInput]
    every: int
    """Steps of the main role."""
    folder: Path
    rgb: LatentRgb | None
    vae: str
    """Digest of the VAE that the latents are for."""
    dtype: torch.dtype
    """That the cache keeps latents in."""
    fps: float
    """Of previews, which have a frame for each latent frame."""
    seeds: int = 1
    """Clips in a row that are of one prompt, each from its own noise."""

    def describe(self) -> list[str]:
        """Lines for people."""
        each = f" ({self.seeds} of each prompt)" if self.seeds > 1 else ""
        lines = [
            f"validate {len(self.inputs)} clips{each} every {self.every} updates in {self.folder}"
        ]
        if self.rgb is None:
            lines.append(
                "validate no previews: these shards have no latent → RGB map; decode with wantrain "
                f"decode --latents {quoted(self.folder)}"
            )
        elif self.rgb.r2 is not None and self.rgb.r2 < R2_FLOOR:
            lines.append(
                f"validate the colours of latents are a poor guide here (R² {self.rgb.r2:.2f}); "
                f"decode with wantrain decode --latents {quoted(self.folder)}"
            )
        return lines

    def sample(
        self,
        objective: Objective,
        roles: Roles,
        negative: torch.Tensor,
        trackers: Sequence[Tracker],
        *,
        number: int,
        step: int,
        writes: bool = True,
        stopped: Callable[[], bool] = lambda: False,
    ) -> float | None:
        """Make every clip with the weights as they are; their variety, None with one seed.

        It is the root mean square difference of the latents of two clips of a prompt, the mean of
        all pairs of a prompt, then of the prompts.

        `number`: steps of the main role, `step`: of all roles. `stopped` is asked before each
        clip; if so, nothing is left. Without `writes` clips are made only for the ranks' common
        passes.
        """
        device = negative.device
        made = []
        for one in self.inputs:
            if stopped():
                return None
            made.append(objective.sample(roles, one.batch.to(device), negative)[0])
        variety = None if self.seeds == 1 else variety_of(made, self.seeds)
        if writes:
            shown, sheet = self.write(made, self.records(number), number=number)
            if sheet is not None:
                for tracker in trackers:
                    tracker.show(sheet, shown, self.fps, step)
        return variety

    def records(self, number: int) -> list[dict[str, Any]]:
        """What `CLIPS` says of the clips after `number` steps of the main role."""
        return [
            {"file": _latents_name(position), "prompt": one.label, "update": number}
            for position, one in enumerate(self.inputs)
        ]

    def folder_of(self, number: int) -> Path:
        """Where the clips after `number` steps of the main role lie."""
        return self.folder / f"step-{number}"

    def write(
        self, made: Sequence[torch.Tensor], records: Sequence[Mapping[str, Any]], *, number: int
    ) -> tuple[list[SampledClip], Image | None]:
        """The clips' folder, whole or not at all, in place of one that is there; the previews, and
        a contact sheet of them if there are any.

        `made`: latents (C, T, h, w) of each input, on any device.
        """
        shown: list[SampledClip] = []
        sheet = None
        final = self.folder_of(number)
        with building_folder(final) as building:
            for position, (one, latents) in enumerate(zip(self.inputs, made, strict=True)):
                stored = LatentClip(
                    latents=latents.to("cpu", self.dtype), label=one.label, vae=self.vae
                )
                latents_file = building / _latents_name(position)
                write_bytes(latents_file, latent_bytes(stored))
                if self.rgb is not None:
                    clip = preview(latents, self.rgb)
                    mp4 = final / latents_file.with_suffix(".mp4").name
                    write_mp4(building / mp4.name, clip, self.fps)
                    shown.append(SampledClip(name=mp4.stem, label=one.label, clip=clip, mp4=mp4))
            write_json(building / CLIPS, records)
            if shown:
                sheet = contact_sheet([(one.label, one.clip) for one in shown])
                sheet.save(building / "sheet.png")
            shutil.rmtree(final, ignore_errors=True)
            building.rename(final)
        fsync_folder(self.folder)
        return shown, sheet


def read_records(folder: Path) -> list[dict[str, Any]] | None:
    """What `CLIPS` says of the clips in a folder; None where there are none."""
    try:
        found: list[dict[str, Any]] = json.loads((folder / CLIPS).read_text())
    except (OSError, ValueError):
        return None
    return found


def _latents_name(position: int) -> str:
    return f"{position:03d}.safetensors"


def variety_of(clips: Sequence[torch.Tensor], seeds: int) -> float:
    """See `Validation.sample`; `seeds` clips in a row are of one prompt, (C, T, h, w) each."""
    distances = []
    for first in range(0, len(clips), seeds):
        pairs = combinations(clips[first : first + seeds], 2)
        gaps = [(one - other).square().mean().sqrt() for one, other in pairs]
        distances.append(torch.stack(gaps).mean())
    return torch.stack(distances).mean().item()


def preview(latents: torch.Tensor, rgb: LatentRgb) -> Clip:
    """(C, T, h, w) latents → frames, each cell a square of several pixels."""
    frames = latents_to_rgb(latents, rgb)
    zoom = max(1, _PREVIEW_SIDE // max(frames.shape[1:3]))
    enlarged: Clip = frames.repeat(zoom, axis=1).repeat(zoom, axis=2)
    return enlarged


@contextmanager
def weights_in_place(
    role: TrainedRole, weights: Mapping[str, torch.Tensor], ranks: Ranks
) -> Iterator[None]:
    """While the block runs, the role has these values; then its own again, to the bit.

    All processes enter it together.
    """
    own = {name: value.detach().clone() for name, value in role.weights().items()}
    role.load(weights, {})
    try:
        yield
    except BaseException:
        if ranks.world_size == 1:  # of several, one that failed would wait for the others
            role.load(own, {})
        raise
    role.load(own, {})


def prepare_validation(
    data: Dataset,
    spec: ModelSpec,
    objective: Objective,
    batches: MicroBatches,
    *,
    every: int,
    output: Path,
    seeds: int = 1,
) -> Validation:
    """Read what is to be sampled, each input `seeds` times.

    UserError where the (first) cache has no validation prompts, or not what the model needs of
    them.
    """
    index = data.first
    prompts = validation_prompts(index)
    if objective.samples_from_latents:
        inputs = _of_cache(data, batches, len(prompts) or CACHE_SAMPLES)
    else:
        if not prompts:
            raise UserError(
                f"--validation-steps: {index.store} has no validation prompts. Encode some: "
                "wanprep encode with the same options and --validation-prompts FILE; only the "
                "prompts are encoded. Or leave --validation-steps out."
            )
        inputs = [
            ValidationInput(label=prompt.prompt, batch=_batch(prompt, number, spec, index))
            for number, prompt in enumerate(prompts)
        ]
    # The noise of the first seed's clips is what it is with one seed.
    inputs = [
        replace(one, batch=replace(one.batch, samples=(number + seed * len(inputs),)), seed=seed)
        for number, one in enumerate(inputs)
        for seed in range(seeds)
    ]
    return Validation(
        inputs=inputs,
        seeds=seeds,
        every=every,
        folder=output / FOLDER,
        rgb=index.latent_rgb,
        vae=str(index.fingerprint["latents"]["vae"]),
        dtype=DTYPES[index.fingerprint["latents"]["dtype"]],
        fps=spec.family.frames_per_second / spec.stride[0],
    )


def validation_prompts(index: CacheIndex) -> list[Prompt]:
    """The list that counts, with text by the encoder of the captions that are trained on."""
    own = prompts_by_shard(index.store, index.prompt_shards)
    overlay = index.overlays.get(TEXT_MEMBER)
    if overlay is None:
        return current_validation(own)
    beside = overlay.index
    listed = current_validation(prompts_by_shard(beside.store, beside.prompt_shards))
    images = {prompt.key: prompt for shard in own for prompt in shard}
    found = []
    for prompt in listed:
        image = images.get(prompt.key, prompt)
        both = {"cond": image.cond, "first_last": image.first_last, "clip": image.clip}
        found.append(Prompt(**(prompt.__dict__ | both)))
    return found


def _of_cache(data: Dataset, batches: MicroBatches, count: int) -> list[ValidationInput]:
    """Samples spread over the cache, videos before images; the same ones in every run."""
    videos = np.flatnonzero(data.types == MEDIA_TYPES.index("video"))
    rows = videos if len(videos) else np.flatnonzero(data.types == MEDIA_TYPES.index("image"))
    chosen = rows[spread_over(len(rows), count)]
    inputs = []
    for number, row in enumerate(map(int, chosen)):
        batch, caption = batches.whole_sample(row, number)
        inputs.append(ValidationInput(label=caption, batch=batch))
    return inputs


def _batch(prompt: Prompt, number: int, spec: ModelSpec, index: CacheIndex) -> StoredBatch:
    assert prompt.bucket is not None, "the bank's reader refuses validation prompts without"
    shape = prompt.bucket.latent_shape(spec.latent_channels, spec.stride)
    dtype = DTYPES[index.fingerprint["latents"]["dtype"]]
    latents = torch.zeros(1, *shape, dtype=dtype)
    condition, image, noised = None, None, None
    own = prompt.first_last if len(spec.given_frames) > 1 else prompt.cond
    found = None if own is None else tuple(own.shape)

    def refuse_if(wrong: bool, what: str, subject: str = "the validation prompt") -> None:
        if wrong:
            raise UserError(
                f"--validation-steps: {subject} {prompt.prompt[:60]!r} in {index.store} has "
                f"{what}. Encode the prompts for this model: wanprep encode with "
                "--validation-prompts FILE, or leave --validation-steps out."
            )

    if spec.given_frames:
        needs = f"a condition of shape {found}, and the {spec.mode} model needs one of {shape}"
        refuse_if(found != shape, needs)
        condition = cast(torch.Tensor, own)[None]
        if spec.image_dim is not None:
            width = None if prompt.clip is None else prompt.clip.shape[1]
            refuse_if(width != spec.image_dim, f"no CLIP embedding of width {spec.image_dim}")
            image = cast(torch.Tensor, prompt.clip)[None]
    elif spec.mode == "ti2v":
        noised = torch.ones(1, 1, shape[1], 1, 1)
        if own is not None:
            one = (shape[0], 1, *shape[2:])
            refuse_if(found != one, f"shape {found}, expected {one}", "the image of")
            latents[0, :, :1] = own
            noised[:, :, 0] = 0
    width = prompt.text.shape[1]
    refuse_if(width != spec.text_dim, f"{width} numbers a token, expected {spec.text_dim}")
    return StoredBatch(
        family=spec.family,
        given=spec.given_frames,
        update=0,
        samples=(number,),
        keys=(prompt.key,),
        latents=latents,
        texts=(prompt.text,),
        condition=condition,
        image=image,
        noised=noised,
    )

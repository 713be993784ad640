"""Batches from shards: byte ranges, read ahead by threads, collated for the loop."""

import itertools
import threading
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from shared.device import take_device, to_device
from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, REENCODE_SHARD, CacheIndex, MemberHeader, MemberReader
from shared.format.fingerprint import condition_tensor
from shared.format.overlays import made_by
from shared.format.prompts import read_prompts
from shared.format.schema import (
    CONDITION_MEMBER,
    DTYPES,
    LATENTS_MEMBER,
    STATES_MEMBER,
    TEXT_MEMBER,
    TORCH_DTYPES,
)
from shared.format.tensor_header import TensorHeader
from shared.io.names import quoted
from shared.models.family import Family
from shared.models.spec import ModelSpec
from train.data.batch_plan import BatchPlan, micro_batch
from train.data.buffer_pool import Buffers
from train.data.dataset import Dataset
from train.functional.rng import counted_rng, noise

VIDEO, TEXT = (MEDIA_TYPES.index(name) for name in ("video", "text"))
TEXT_ONLY_SHARE = 0.5  # of a ti2v model's clips: it must go on to serve text to video, too
READ_AHEAD = 2  # batches a thread
OPEN_FILES = 32  # of all caches, a thread

_NO_TENSOR = TensorHeader("none", (0, 0), 0)

Drawn = Mapping[tuple[int, str], torch.Tensor]
"""(seed, stream) → noise (B, C, T, H, W) fp32 that was drawn ahead."""


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """What a batch has in the shards' dtype as well as on the device, there in fp32."""

    update: int
    """Number of the optimizer step, counted from the start of the run: randomness hangs on it."""
    samples: tuple[int, ...]
    """Positions inside the update batch: the global sample numbers of `train.functional.rng`."""
    keys: tuple[str, ...]
    latents: torch.Tensor
    """(B, C, T, H, W), normalised; zeros of a text-only sample."""
    condition: torch.Tensor | None = None
    """i2v, flf2v: (B, C, T, H, W), normalised condition latents, on the device below their mask as
    (B, 4+C, T, H, W); else None."""
    image: torch.Tensor | None = None
    """Wan 2.1 i2v, flf2v: (B, tokens, D), CLIP's embeddings of the given frames one after the other
    (zeros of an image), always in the shards' dtype; else None."""
    noised: torch.Tensor | None = None
    """ti2v: (B, 1, T, 1, 1), 0 on a latent frame that is the condition and so kept clean (the
    first, or none of a sample that is text to video this time), 1 elsewhere; else None."""
    states: torch.Tensor | None = None
    """(B, S, C, T, H, W), a sampler's x_t at the steps that the run asked for; else None."""
    drawn: Drawn = field(default_factory=dict)

    def tensors(self) -> dict[str, Any]:
        """By name, of all samples each; without those that are None."""
        found = vars(self).items()
        return {name: value for name, value in found if isinstance(value, torch.Tensor)}


@dataclass(frozen=True, kw_only=True)
class Batch(_Samples):
    """What one rank computes with in one micro-step, on its device."""

    text: torch.Tensor
    """(B, tokens, D) in the cache's dtype, as many as the family takes, zeros after each caption's
    true length: the transformer attends to them, as in diffusers' pipelines."""

    def noise(self, seed: int, stream: str) -> torch.Tensor:
        """(B, C, T, H, W) fp32 standard normal: `train.functional.rng.noise` of these samples."""
        ahead = self.drawn.get((seed, stream))
        if ahead is not None:
            return ahead
        now = noise(self.latents.shape[1:], seed, stream, self.update, self.samples)
        return to_device(now, self.latents.device)


@dataclass(frozen=True, kw_only=True)
class StoredBatch(_Samples):
    """A `Batch` as the shards have it: nothing was copied, padded or converted yet."""

    family: Family
    given: tuple[int, ...]
    """`ModelSpec.given_frames`: what the mask says."""
    texts: tuple[torch.Tensor, ...]
    """B of (tokens, D)."""

    def page_locked(self) -> "StoredBatch":
        """The same in memory that a GPU copies from by itself; for the threads that read ahead."""

        def locked(tensor: torch.Tensor) -> Any:
            return tensor.contiguous().pin_memory()

        return replace(
            self,
            texts=tuple(map(locked, self.texts)),
            drawn={stream: locked(drawn) for stream, drawn in self.drawn.items()},
            **{name: locked(tensor) for name, tensor in self.tensors().items()},
        )

    def to(self, device: torch.device) -> Batch:
        """What the loop computes with. Padding and mask are made where they are needed: reading
        is so a copy of the shards' bytes, and nothing else goes through the memory."""
        first = self.texts[0]
        padded = (len(self.texts), self.family.text_tokens, first.shape[1])
        text = torch.zeros(padded, dtype=first.dtype, device=device)
        for row, own in zip(text, self.texts, strict=True):
            row[: len(own)] = to_device(own, device)
        there = {name: to_device(tensor, device) for name, tensor in self.tensors().items()}
        there |= {name: tensor.float() for name, tensor in there.items() if name != "image"}
        if self.condition is not None:
            masked = (self.family.mask_channels, self.given)
            there["condition"] = with_mask(there["condition"], *masked)
        return Batch(
            update=self.update,
            samples=self.samples,
            keys=self.keys,
            text=text,
            drawn={stream: to_device(drawn, device) for stream, drawn in self.drawn.items()},
            **there,
        )


def pad_text(text: torch.Tensor, tokens: int) -> torch.Tensor:
    """(≤ tokens, D) → (tokens, D), zeros behind."""
    return torch.nn.functional.pad(text, (0, 0, 0, tokens - text.shape[0]))


def cropped_frames(frames: int, seed: int, update: int) -> int:
    """Latent frames that an update shows of clips of `frames`: all in 90% of updates, else 2 to
    frames − 1, evenly (VideoX-Fun's shares). The same for all samples of the update."""
    rng = counted_rng(seed, "frame crop", update)
    shorter = range(2, frames)
    return shorter[int(rng.integers(len(shorter)))] if shorter and rng.random() >= 0.9 else frames


def with_mask(cond: torch.Tensor, channels: int, given: Sequence[int]) -> torch.Tensor:
    """(B, C, T, H, W) condition latents → (B, channels + C, T, H, W): ones at the `given` frames.

    A channel stands for one of the pixel frames that a latent frame covers; the first covers one,
    which all channels stand for. So ones are in latent frame 0, and for a last frame in the last
    channel of the last latent frame (`WanImageToVideoPipeline.prepare_latents`).

    The target of a single frame, an image or a video cut that short, would be its own condition,
    so its mask is 0 (and its cached condition the encoding of zeros).
    """
    mask = cond.new_zeros(len(cond), channels, *cond.shape[2:])
    if cond.shape[2] > 1:
        if 0 in given:
            mask[:, :, 0] = 1
        if -1 in given:
            mask[:, -1, -1] = 1
    return torch.cat([mask, cond], dim=1)


@dataclass(frozen=True, kw_only=True)
class PromptBank:
    """Embeddings that training needs beside the captions, (tokens, D), zero-padded."""

    empty: torch.Tensor
    negative: torch.Tensor


def load_prompt_bank(index: CacheIndex, family: Family) -> PromptBank:
    """Read the prompt bank. UserError names a role that the cache lacks."""
    overlay = index.overlays.get(TEXT_MEMBER)
    bank = index if overlay is None else overlay.index  # the same text encoder as the captions'
    prompts = {p.role: p.text for p in read_prompts(bank.store, bank.prompt_shards)}
    command = made_by(bank.fingerprint)
    missing = [role for role in ("empty", "negative") if role not in prompts]
    if missing:
        raise UserError(
            f"shards: the prompt bank of {bank.store} has no {' and no '.join(missing)} prompt. "
            f"Run `{command}` again; it adds what is missing."
        )
    width = bank.fingerprint.get("text", {}).get("dim")
    for role in ("empty", "negative"):
        if (found := prompts[role].shape[1]) != width:
            raise UserError(
                f"shards: the {role} prompt of {bank.store} has {found} numbers a token, expected "
                f"{width}. Delete {', '.join(bank.prompt_shards)} with their .json and run "
                f"`{command}` again."
            )
    empty, negative = (pad_text(prompts[r], family.text_tokens) for r in ("empty", "negative"))
    return PromptBank(empty=empty, negative=negative)


@dataclass(frozen=True, eq=False)
class MicroBatches:
    """(update, micro-step) → StoredBatch: a pure function, so threads may do it ahead."""

    dataset: Dataset
    plan: BatchPlan
    spec: ModelSpec
    _: KW_ONLY
    empty_text: torch.Tensor
    caption_dropout: float
    frame_crop: bool
    """Now and then show the beginning of clips only (`cropped_frames`)."""
    text_only: bool = False
    """Show all clips of a ti2v model as text to video."""
    first_noise: str | None = None
    """Stream of the noise that an update begins with: drawn with its batch, for else the device
    would wait for it. What comes later is drawn while the device works."""
    states: range | None = None
    """Of the cached states those at these steps are read; None: none."""
    accumulation: int
    data_rank: int
    data_size: int
    """Of the group of processes whose samples these are."""
    _buffers: Buffers = field(default_factory=Buffers, init=False)
    _local: threading.local = field(default_factory=threading.local, init=False)
    """A reader of each thread: its files may be closed by its next read."""

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.dataset.first.fingerprint["latents"]["dtype"]]

    def load(self, update: int, micro_step: int) -> StoredBatch:
        """This rank's samples of one micro-step. Raises UserError on damaged or missing members."""
        positions = micro_batch(
            self.plan.batch_size,
            micro_step=micro_step,
            data_rank=self.data_rank,
            data_size=self.data_size,
            accumulation=self.accumulation,
        )
        update_batch = self.plan.batch(update)
        rows = [int(update_batch[position]) for position in positions]
        drawn = list(zip(rows, positions, strict=True))
        frames = self._latent_shape(rows[0])[1]
        batch = self._read_batch(
            update,
            tuple(positions),
            rows,
            captioned=[self._keeps_caption(row, update, position) for row, position in drawn],
            conditioned=[self._keeps_first_frame(row, update, position) for row, position in drawn],
            frames=cropped_frames(frames, self.plan.seed, update) if self.frame_crop else frames,
        )
        if self.first_noise is None:
            return batch
        shape, stream = batch.latents.shape[1:], (self.plan.seed, self.first_noise)
        return replace(batch, drawn={stream: noise(shape, *stream, update, batch.samples)})

    def whole_sample(self, row: int, number: int) -> tuple[StoredBatch, str]:
        """Sample `row` as it was encoded, with its caption, and that caption: nothing is drawn.

        `number` is its place among others of update 0. Of ti2v a video keeps its first frame.
        """
        frames = self._latent_shape(row)[1]
        first_kept = frames > 1 and not self.text_only
        batch = self.whole_samples([row], (number,), conditioned=[first_kept])
        reader, at = self._reader(row)
        return batch, str(reader.info(at)["caption"])

    @classmethod
    def of_whole_samples(
        cls, dataset: Dataset, spec: ModelSpec, bank: PromptBank
    ) -> "MicroBatches":
        """For `whole_sample` and `whole_samples` alone, which no plan and no draw decides."""
        return cls(
            dataset,
            BatchPlan(dataset.bucket_ids, np.ones(len(dataset), dtype=np.int64), 1, seed=0),
            spec,
            empty_text=bank.empty,
            caption_dropout=0.0,
            frame_crop=False,
            accumulation=1,
            data_rank=0,
            data_size=1,
        )

    def whole_samples(
        self, rows: list[int], numbers: tuple[int, ...], *, conditioned: list[bool]
    ) -> StoredBatch:
        """Samples of one bucket as they were encoded, with their captions: nothing is drawn.

        `numbers`: their places among others of update 0. `conditioned`: of ti2v, whose first frame
        is kept.
        """
        frames = self._latent_shape(rows[0])[1]
        return self._read_batch(
            0, numbers, rows, captioned=[True] * len(rows), conditioned=conditioned, frames=frames
        )

    def _read_batch(
        self,
        update: int,
        samples: tuple[int, ...],
        rows: list[int],
        *,
        captioned: list[bool],
        conditioned: list[bool],
        frames: int,
    ) -> StoredBatch:
        """The first latent `frames` of these rows; the empty prompt where not `captioned`.

        `conditioned`: of ti2v, whose first frame is kept.
        """
        condition, image, noised = None, None, None
        if self.spec.given_frames:
            condition, image = self._conditions(rows)
            condition = condition[:, :, :frames]
        texts = [
            self._text(row) if own else self.empty_text
            for row, own in zip(rows, captioned, strict=True)
        ]
        # The VAE is causal: its first frames *are* the encoding of the shorter clip, to the bit.
        latents = self._targets(rows)[:, :, :frames]
        states = None if self.states is None else self._states(rows, self.states)[:, :, :, :frames]
        if self.spec.mode == "ti2v":
            noised = torch.ones(len(rows), 1, frames, 1, 1)
            if states is not None:  # its path was sampled with a first frame, or without
                conditioned = self._sampled_with_first_frame(rows, latents, states)
            noised[conditioned, :, 0] = 0
        return StoredBatch(
            family=self.spec.family,
            given=self.spec.given_frames,
            update=update,
            samples=samples,
            keys=tuple(self.dataset.key(row) for row in rows),
            latents=latents,
            noised=noised,
            texts=tuple(texts),
            condition=condition,
            image=image,
            states=states,
        )

    def ahead(
        self, *, start: int, stop: int, workers: int, device: str = "cpu"
    ) -> Generator[StoredBatch, None, None]:
        """Batches of updates start..stop−1 in order, read ahead by `workers` threads (0: none); for
        a GPU as `device` in page-locked memory.

        Threads, not processes: reading releases the GIL, and there is nothing to fork, to pickle
        or to shut down. An error is raised where its batch would have come.
        """

        def load(update: int, micro_step: int) -> StoredBatch:
            batch = self.load(update, micro_step)
            return batch.page_locked() if device.startswith("cuda") else batch

        wanted = itertools.product(range(start, stop), range(self.accumulation))
        if workers == 0:
            yield from itertools.starmap(load, wanted)
            return
        # Memory is locked by way of the thread's device, which at first is card 0.
        pool = ThreadPoolExecutor(workers, "loader", initializer=take_device, initargs=(device,))
        try:
            first = itertools.islice(wanted, READ_AHEAD * workers)
            queue = deque(pool.submit(load, *item) for item in first)
            while queue:
                yield queue.popleft().result()
                queue.extend(pool.submit(load, *item) for item in itertools.islice(wanted, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _keeps_caption(self, row: int, update: int, position: int) -> bool:
        """Whether a sample is shown with its own caption this time. Of a text-only sample
        nothing would be left."""
        draw = counted_rng(self.plan.seed, "caption dropout", update, position).random()
        return bool(draw >= self.caption_dropout) or int(self.dataset.types[row]) == TEXT

    def _keeps_first_frame(self, row: int, update: int, position: int) -> bool:
        """ti2v: whether a sample is image to video this time. Of a single frame nothing would be
        left to learn."""
        bucket = self.dataset.buckets[int(self.dataset.bucket_ids[row])]
        if self.spec.mode != "ti2v" or self.text_only:
            return False
        if int(self.dataset.types[row]) != VIDEO or bucket.frames == 1:
            return False
        draw = counted_rng(self.plan.seed, "text only", update, position).random()
        return bool(draw >= TEXT_ONLY_SHARE)

    def _latent_shape(self, row: int) -> tuple[int, ...]:
        """(C, T, H, W) of the sample's bucket."""
        bucket = self.dataset.buckets[int(self.dataset.bucket_ids[row])]
        return bucket.latent_shape(self.spec.latent_channels, self.spec.stride)

    # Of each member: its header, memory for its tensors, then their bytes into it.

    def _text(self, row: int) -> torch.Tensor:
        """(tokens, D) of a caption."""
        reader, header = self._header(row, TEXT_MEMBER)
        (tokens, width), most = header.tensors["text"].shape, self.spec.family.text_tokens
        if tokens > most or width != self.spec.text_dim:
            expected = f"(up to {most}, {self.spec.text_dim})"
            raise self._misshapen(row, header, "text", expected)
        room = self._buffers.empty((most, width), self.empty_text.dtype)
        return self._read(row, reader, header, "text", room[:tokens])

    def _targets(self, rows: list[int]) -> torch.Tensor:
        """(B, C, T, H, W) latents; zeros where there is only a caption."""
        targets = self._buffers.empty((len(rows), *self._latent_shape(rows[0])), self._dtype)
        for target, row in zip(targets, rows, strict=True):
            if int(self.dataset.types[row]) == TEXT:
                target.zero_()
            else:
                self._read(row, *self._header(row, LATENTS_MEMBER), "latents", target)
        return targets

    def _states(self, rows: list[int], steps: range) -> torch.Tensor:
        """(B, S, C, T, H, W) states at these steps."""
        shape = self._latent_shape(rows[0])
        states = self._buffers.empty((len(rows), len(steps), *shape), self._dtype)
        for target, row in zip(states, rows, strict=True):
            reader, header = self._header(row, STATES_MEMBER)
            most, *found = header.tensors["states"].shape
            if tuple(found) != shape or most < steps.stop:
                expected = f"({steps.stop} or more, {', '.join(map(str, shape))})"
                raise self._misshapen(row, header, "states", expected)
            self._read(row, reader, header, "states", target, first=steps.start)
        return states

    def _sampled_with_first_frame(
        self, rows: list[int], latents: torch.Tensor, states: torch.Tensor
    ) -> list[bool]:
        """ti2v: of which rows the path kept its first frame clean, as the clip has it.

        UserError where that is not how the run shows its samples.
        """
        kept = [
            clip.shape[1] > 1 and bool((path[:, :, 0] == clip[:, 0]).all())
            for clip, path in zip(latents, states, strict=True)
        ]
        if self.text_only and any(kept):
            row = rows[kept.index(True)]
            raise UserError(
                f"--train-mode: normal, but {self.dataset.where(row, STATES_MEMBER)} was sampled "
                "from its first frame. Leave the option out, or synthesize states without them."
            )
        return kept

    def _conditions(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, C, T, H, W), and CLIP's (B, tokens, D) where the model takes it."""
        shape = (len(rows), *self._latent_shape(rows[0]))
        conditions = self._buffers.empty(shape, self._dtype)
        name = condition_tensor(self.spec.mode)
        assert name is not None
        images: list[torch.Tensor] = []
        for condition, row in zip(conditions, rows, strict=True):
            reader, header = self._header(row, CONDITION_MEMBER)
            self._read(row, reader, header, name, condition)
            if (width := self.spec.image_dim) is not None:
                clip = header.tensors.get("clip", _NO_TENSOR)
                if clip.shape[1] != width:
                    raise self._misshapen(row, header, "clip", f"(tokens, {width}) as clip")
                room = torch.empty(clip.shape, dtype=self._dtype)
                images.append(self._read(row, reader, header, "clip", room))
        return conditions, torch.stack(images) if images else None

    def _reader(self, row: int) -> tuple[MemberReader, int]:
        """This thread's reader of a sample's cache, and the sample's row there."""
        if not hasattr(self._local, "readers"):
            parts = self.dataset.parts
            files = max(2, OPEN_FILES // len(parts))
            self._local.readers = [MemberReader(part.index, open_files=files) for part in parts]
        part, at = self.dataset.place(row)
        return self._local.readers[part], at

    def _header(self, row: int, member: str) -> tuple[MemberReader, MemberHeader]:
        """Raises UserError where the sample lacks the member."""
        reader, at = self._reader(row)
        header = reader.header(at, member)
        if header is None and member == STATES_MEMBER:
            raise UserError(
                f"shards: {self.dataset.where(row)} has no {member}, though the fingerprint says "
                f"that all samples have. {REENCODE_SHARD}"
            )
        if header is None:
            raise UserError(
                f"shards: {self.dataset.where(row)} has no {member}, which every "
                f"{self.spec.mode} model needs. Encode with this model: wanprep encode "
                f"--pretrained-model-name-or-path {quoted(self.spec.folder)} --output <new folder>"
            )
        return reader, header

    def _read(
        self,
        row: int,
        reader: MemberReader,
        header: MemberHeader,
        name: str,
        target: torch.Tensor,
        *,
        first: int | None = None,
    ) -> torch.Tensor:
        """`target`, filled. Raises UserError unless the tensor has its shape and dtype.

        `first`: where a part of the tensor begins that is as long as `target`.
        """
        found = header.tensors.get(name, _NO_TENSOR)
        if first is None and found.shape != target.shape:
            raise self._misshapen(row, header, name, str(tuple(target.shape)))
        if TORCH_DTYPES[found.dtype] != target.dtype:
            raise UserError(
                f"shards: {self.dataset.where(row, header.member)}: {header.member} holds "
                f"{found.dtype}, expected {target.dtype} as the fingerprint says. {REENCODE_SHARD}"
            )
        reader.read_into(header, name, target, first=first or 0)
        return target

    def _misshapen(self, row: int, header: MemberHeader, name: str, expected: str) -> UserError:
        return UserError(
            f"shards: {self.dataset.where(row, header.member)}: {header.member} has "
            + (f"shape {header.tensors[name].shape}" if name in header.tensors else f"no {name}")
            + f", expected {expected}. {REENCODE_SHARD}"
        )

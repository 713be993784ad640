"""Batches from shards: byte ranges, read ahead by threads, collated for the loop."""

import itertools
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES, REENCODE_SHARD, CacheIndex, MemberReader
from shared.format.prompts import read_prompts
from shared.format.schema import CONDITION_MEMBER, DTYPES, LATENTS_MEMBER, TEXT_MEMBER, TORCH_DTYPES
from shared.format.tensor_header import TensorHeader
from shared.io.names import quoted
from shared.models.family import Family
from shared.models.spec import ModelSpec
from train.data.batch_plan import BatchPlan, micro_batch
from train.data.buffer_pool import Buffers
from train.data.dataset import Dataset
from train.functional.rng import counted_rng

VIDEO, TEXT = (MEDIA_TYPES.index(name) for name in ("video", "text"))
TEXT_ONLY_SHARE = 0.5  # of a ti2v model's clips: it must go on to serve text to video, too
READ_AHEAD = 2  # batches a thread
OPEN_FILES = 32  # of all caches, a thread

Tensors = Mapping[str, TensorHeader]
Room = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank computes with in one micro-step, on its device."""

    update: int
    """Number of the optimizer step, counted from the start of the run: randomness hangs on it."""
    samples: tuple[int, ...]
    """Positions inside the update batch: the global sample numbers of `train.functional.rng`."""
    keys: tuple[str, ...]
    latents: torch.Tensor
    """(B, C, T, H, W) fp32, normalised; zeros of a caption without a medium."""
    text: torch.Tensor
    """(B, tokens, D) in the cache's dtype, as many as the family takes, zeros after each caption's
    true length: the transformer attends to them, as in diffusers' pipelines."""
    condition: torch.Tensor | None
    """i2v: (B, 4+C, T, H, W) fp32, mask then normalised condition latents; else None."""
    image: torch.Tensor | None = None
    """Wan 2.1 i2v: (B, tokens, D), CLIP's embedding of the first frame (zeros of an image);
    else None."""
    noised: torch.Tensor | None = None
    """ti2v: (B, 1, T, 1, 1), 0 on a latent frame that is the condition and so kept clean (the
    first, or none of a sample that is text to video this time), 1 elsewhere; else None."""


@dataclass(frozen=True, kw_only=True)
class StoredBatch:
    """A `Batch` as the shards have it: nothing was copied, padded or converted yet."""

    family: Family
    update: int
    samples: tuple[int, ...]
    keys: tuple[str, ...]
    latents: torch.Tensor
    """(B, C, T, H, W)."""
    texts: tuple[torch.Tensor, ...]
    """B of (tokens, D)."""
    condition: torch.Tensor | None
    """(B, C, T, H, W), without the mask."""
    image: torch.Tensor | None
    noised: torch.Tensor | None

    def to(self, device: torch.device) -> Batch:
        """What the loop computes with. Padding and mask are made where they are needed: reading
        is so a copy of the shards' bytes, and nothing else goes through the memory."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        first = self.texts[0]
        padded = (len(self.texts), self.family.text_tokens, first.shape[1])
        text = torch.zeros(padded, dtype=first.dtype, device=device)
        for row, own in zip(text, self.texts, strict=True):
            row[: len(own)] = move(own)
        condition = self.condition
        if condition is not None:
            condition = with_mask(move(condition).float(), self.family.mask_channels)
        return Batch(
            update=self.update,
            samples=self.samples,
            keys=self.keys,
            latents=move(self.latents).float(),
            text=text,
            condition=condition,
            image=None if self.image is None else move(self.image),
            noised=None if self.noised is None else move(self.noised).float(),
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


def with_mask(cond: torch.Tensor, channels: int) -> torch.Tensor:
    """(B, C, T, H, W) condition latents → (B, channels + C, T, H, W): ones in latent frame 0.

    The target of a single frame, an image or a video cut that short, would be its own condition,
    so its mask is 0 (and its cached condition the encoding of zeros).
    """
    mask = cond.new_zeros(len(cond), channels, *cond.shape[2:])
    if cond.shape[2] > 1:
        mask[:, :, 0] = 1
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
    prompts = {p.role: p.text for p in read_prompts(bank.folder, bank.prompt_shards)}
    missing = [role for role in ("empty", "negative") if role not in prompts]
    if missing:
        raise UserError(
            f"shards: the prompt bank of {bank.folder} has no {' and no '.join(missing)} prompt. "
            f"Run `wanprep {'encode' if overlay is None else 'recaption'}` again; it adds what is "
            "missing."
        )
    width = bank.fingerprint.get("text", {}).get("dim")
    for role in ("empty", "negative"):
        if (found := prompts[role].shape[1]) != width:
            raise UserError(
                f"shards: the {role} prompt of {bank.folder} has {found} numbers a token, expected "
                f"{width}. Delete {', '.join(bank.prompt_shards)} with their .json and run "
                f"`wanprep {'encode' if overlay is None else 'recaption'}` again."
            )
    empty, negative = (pad_text(prompts[r], family.text_tokens) for r in ("empty", "negative"))
    return PromptBank(empty=empty, negative=negative)


class MicroBatches:
    """(update, micro-step) → StoredBatch: a pure function, so threads may do it ahead."""

    def __init__(
        self,
        dataset: Dataset,
        plan: BatchPlan,
        spec: ModelSpec,
        *,
        empty_text: torch.Tensor,
        caption_dropout: float,
        frame_crop: bool,
        text_only: bool = False,
        accumulation: int,
        data_rank: int,
        data_size: int,
    ) -> None:
        """`data_rank` of `data_size`: the group of processes whose samples these are.

        `frame_crop`: now and then show the beginning of clips only (`cropped_frames`).

        `text_only`: show all clips of a ti2v model as text to video.
        """
        self._dataset = dataset
        self._plan = plan
        self._spec = spec
        self._empty_text = empty_text
        self._caption_dropout = caption_dropout
        self._frame_crop = frame_crop
        self._text_only = text_only
        self._accumulation = accumulation
        self._data_rank = data_rank
        self._data_size = data_size
        self._dtype = DTYPES[dataset.first.fingerprint["latents"]["dtype"]]
        self._buffers = Buffers()
        self._local = threading.local()  # a reader's files may be closed by the thread's next read

    def load(self, update: int, micro_step: int) -> StoredBatch:
        """This rank's samples of one micro-step. Raises UserError on damaged or missing members."""
        positions = micro_batch(
            self._plan.batch_size,
            micro_step=micro_step,
            data_rank=self._data_rank,
            data_size=self._data_size,
            accumulation=self._accumulation,
        )
        update_batch = self._plan.batch(update)
        rows = [int(update_batch[position]) for position in positions]
        i2v = self._spec.mode == "i2v"
        condition, image = self._conditions(rows) if i2v else (None, None)
        texts = self._texts(rows, update, positions)
        latents = self._targets(rows)
        if self._frame_crop:
            # The VAE is causal: this *is* the encoding of the shorter clip, to the bit.
            frames = cropped_frames(latents.shape[2], self._plan.seed, update)
            latents = latents[:, :, :frames]
            condition = None if condition is None else condition[:, :, :frames]
        noised = None
        if self._spec.mode == "ti2v":
            noised = torch.ones(len(rows), 1, latents.shape[2], 1, 1)
            for number, (row, position) in enumerate(zip(rows, positions, strict=True)):
                if self._keeps_first_frame(row, update, position):
                    noised[number, :, 0] = 0
        return StoredBatch(
            family=self._spec.family,
            update=update,
            samples=tuple(positions),
            keys=tuple(self._dataset.key(row) for row in rows),
            latents=latents,
            noised=noised,
            texts=texts,
            condition=condition,
            image=image,
        )

    def whole_sample(self, row: int, number: int) -> tuple[StoredBatch, str]:
        """Sample `row` as it was encoded, with its caption, and that caption: nothing is drawn.

        `number` is its place among others of update 0. Of ti2v a video keeps its first frame.
        """
        i2v = self._spec.mode == "i2v"
        condition, image = self._conditions([row]) if i2v else (None, None)
        texts: list[torch.Tensor] = []
        self._read(row, TEXT_MEMBER, partial(self._room_for_text, row, texts))
        latents = self._targets([row])
        noised = None
        if self._spec.mode == "ti2v":
            noised = torch.ones(1, 1, latents.shape[2], 1, 1)
            if latents.shape[2] > 1:
                noised[:, :, 0] = 0
        batch = StoredBatch(
            family=self._spec.family,
            update=0,
            samples=(number,),
            keys=(self._dataset.key(row),),
            latents=latents,
            noised=noised,
            texts=tuple(texts),
            condition=condition,
            image=image,
        )
        reader, at = self._reader(row)
        return batch, str(reader.info(at)["caption"])

    def ahead(self, *, start: int, stop: int, workers: int) -> Generator[StoredBatch, None, None]:
        """Batches of updates start..stop−1 in order, read ahead by `workers` threads (0: none).

        Threads, not processes: reading releases the GIL, and there is nothing to fork, to pickle
        or to shut down. An error is raised where its batch would have come.
        """
        wanted = itertools.product(range(start, stop), range(self._accumulation))
        if workers == 0:
            yield from itertools.starmap(self.load, wanted)
            return
        pool = ThreadPoolExecutor(workers, thread_name_prefix="loader")
        try:
            first = itertools.islice(wanted, READ_AHEAD * workers)
            queue = deque(pool.submit(self.load, *item) for item in first)
            while queue:
                yield queue.popleft().result()
                queue.extend(pool.submit(self.load, *item) for item in itertools.islice(wanted, 1))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _keeps_first_frame(self, row: int, update: int, position: int) -> bool:
        """ti2v: whether a sample is image to video this time. Of a single frame nothing would be
        left to learn."""
        bucket = self._dataset.buckets[int(self._dataset.bucket_ids[row])]
        if self._text_only or int(self._dataset.types[row]) != VIDEO or bucket.frames == 1:
            return False
        draw = counted_rng(self._plan.seed, "text only", update, position).random()
        return bool(draw >= TEXT_ONLY_SHARE)

    def _texts(
        self, rows: list[int], update: int, positions: Sequence[int]
    ) -> tuple[torch.Tensor, ...]:
        """(tokens, D) each: its own, or the empty prompt's."""
        texts = []
        for row, position in zip(rows, positions, strict=True):
            draw = counted_rng(self._plan.seed, "caption dropout", update, position).random()
            # Of a caption alone nothing would be left.
            if draw < self._caption_dropout and int(self._dataset.types[row]) != TEXT:
                texts.append(self._empty_text)
            else:
                self._read(row, TEXT_MEMBER, partial(self._room_for_text, row, texts))
        return tuple(texts)

    def _room_for_text(self, row: int, texts: list[torch.Tensor], found: Tensors) -> Room:
        (tokens, width), most = found["text"].shape, self._spec.family.text_tokens
        if tokens > most or width != self._spec.text_dim:
            expected = f"(up to {most}, {self._spec.text_dim})"
            raise self._misshapen(row, TEXT_MEMBER, found["text"], expected)
        empty = self._empty_text
        text = self._buffers.empty((most, width), empty.dtype)[:tokens]
        texts.append(self._of_dtype(row, TEXT_MEMBER, found["text"], text))
        return {"text": text}

    def _targets(self, rows: list[int]) -> torch.Tensor:
        """(B, C, T, H, W) latents; zeros where there is only a caption."""
        targets = self._buffers.empty((len(rows), *self._latent_shape(rows[0])), self._dtype)
        for target, row in zip(targets, rows, strict=True):
            if int(self._dataset.types[row]) == TEXT:
                target.zero_()
            else:
                self._read(row, LATENTS_MEMBER, partial(self._room_for_latents, row, target))
        return targets

    def _room_for_latents(self, row: int, target: torch.Tensor, found: Tensors) -> Room:
        return {"latents": self._latents(row, LATENTS_MEMBER, found["latents"], target)}

    def _conditions(self, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(B, C, T, H, W), and CLIP's (B, tokens, D) where the model takes it."""
        shape = (len(rows), *self._latent_shape(rows[0]))
        conditions = self._buffers.empty(shape, self._dtype)
        images: list[torch.Tensor] = []
        for condition, row in zip(conditions, rows, strict=True):
            room = partial(self._room_for_condition, row, condition, images)
            self._read(row, CONDITION_MEMBER, room)
        return conditions, torch.stack(images) if images else None

    def _room_for_condition(
        self, row: int, target: torch.Tensor, images: list[torch.Tensor], found: Tensors
    ) -> Room:
        room = {"cond": self._latents(row, CONDITION_MEMBER, found["cond"], target)}
        if (width := self._spec.image_dim) is not None:
            clip = found.get("clip", TensorHeader("none", (0, 0), 0))
            if clip.shape[1] != width:
                raise self._misshapen(row, CONDITION_MEMBER, clip, f"(tokens, {width}) as clip")
            image = torch.empty(clip.shape, dtype=self._dtype)
            images.append(image)
            room["clip"] = self._of_dtype(row, CONDITION_MEMBER, clip, image)
        return room

    def _latent_shape(self, row: int) -> tuple[int, ...]:
        """(C, T, H, W) of the sample's bucket."""
        bucket = self._dataset.buckets[int(self._dataset.bucket_ids[row])]
        return bucket.latent_shape(self._spec.latent_channels, self._spec.stride)

    def _latents(
        self, row: int, member: str, found: TensorHeader, target: torch.Tensor
    ) -> torch.Tensor:
        """`target` if latents of that shape were found."""
        if found.shape != target.shape:
            raise self._misshapen(row, member, found, str(tuple(target.shape)))
        return self._of_dtype(row, member, found, target)

    def _of_dtype(
        self, row: int, member: str, found: TensorHeader, target: torch.Tensor
    ) -> torch.Tensor:
        if TORCH_DTYPES[found.dtype] != target.dtype:
            raise UserError(
                f"shards: {self._dataset.where(row, member)}: {member} holds {found.dtype}, "
                f"expected {target.dtype} as the fingerprint says. {REENCODE_SHARD}"
            )
        return target

    def _reader(self, row: int) -> tuple[MemberReader, int]:
        """This thread's reader of a sample's cache, and the sample's row there."""
        if not hasattr(self._local, "readers"):
            parts = self._dataset.parts
            files = max(2, OPEN_FILES // len(parts))
            self._local.readers = [MemberReader(part.index, open_files=files) for part in parts]
        part, at = self._dataset.place(row)
        return self._local.readers[part], at

    def _read(self, row: int, member: str, room: Callable[[Tensors], Room]) -> None:
        reader, at = self._reader(row)
        if not reader.read_into(at, member, room):
            raise UserError(
                f"shards: {self._dataset.where(row)} has no {member}, which every "
                f"{self._spec.mode} model needs. Encode with this model: wanprep encode "
                f"--pretrained-model-name-or-path {quoted(self._spec.folder)} --output <new folder>"
            )

    def _misshapen(self, row: int, member: str, found: TensorHeader, expected: str) -> UserError:
        return UserError(
            f"shards: {self._dataset.where(row, member)}: {member} has shape "
            f"{found.shape}, expected {expected}. {REENCODE_SHARD}"
        )

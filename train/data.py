"""Batches from shards: byte ranges, read ahead by threads, collated for the loop."""

import itertools
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from shared.cache import MEDIA_TYPES, REENCODE_SHARD, CacheIndex, MemberReader, read_prompts
from shared.errors import UserError
from shared.model_spec import MAX_TEXT_TOKENS, ModelSpec
from shared.schema import CONDITION_MEMBER, LATENTS_MEMBER, TEXT_MEMBER
from train.plan import BatchPlan, micro_batch
from train.rng import counted_rng

VIDEO, TEXT = (MEDIA_TYPES.index(name) for name in ("video", "text"))
MASK_CHANNELS = 4
TEXT_ONLY_SHARE = 0.5  # of a ti2v model's clips: it must go on to serve text to video, too
READ_AHEAD = 2  # batches a thread


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank computes with in one micro-step; in the cache's dtype until `to`."""

    update: int
    """Number of the optimizer step, counted from the start of the run: randomness hangs on it."""
    samples: tuple[int, ...]
    """Positions inside the update batch: the global sample numbers of `train.rng`."""
    keys: tuple[str, ...]
    latents: torch.Tensor
    """(B, C, T, H, W), normalised; zeros of a caption without a medium."""
    text: torch.Tensor
    """(B, 512, D), zeros after each caption's true length."""
    condition: torch.Tensor | None
    """i2v: (B, 4+C, T, H, W), mask then normalised condition latents; else None."""
    image: torch.Tensor | None = None
    """Wan 2.1 i2v: (B, tokens, D), CLIP's embedding of the first frame (zeros of an image);
    else None."""
    noised: torch.Tensor | None = None
    """ti2v: (B, 1, T, 1, 1), 0 on a latent frame that is the condition and so kept clean (the
    first, or none of a sample that is text to video this time), 1 elsewhere; else None."""

    def to(self, device: torch.device) -> "Batch":
        """On `device`, latents and condition in fp32, in which the loop computes."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            pinned = tensor.pin_memory() if device.type == "cuda" else tensor
            return pinned.to(device, non_blocking=True)

        return replace(
            self,
            latents=move(self.latents).float(),
            text=move(self.text),
            condition=None if self.condition is None else move(self.condition).float(),
            image=None if self.image is None else move(self.image),
            noised=None if self.noised is None else move(self.noised).float(),
        )


def pad_text(text: torch.Tensor) -> torch.Tensor:
    """(tokens, D) → (512, D): the transformer attends to the zeros, as in diffusers' pipelines."""
    return torch.nn.functional.pad(text, (0, 0, 0, MAX_TEXT_TOKENS - text.shape[0]))


def cropped_frames(frames: int, seed: int, update: int) -> int:
    """Latent frames that an update shows of clips of `frames`: all in 90% of updates, else 2 to
    frames − 1, evenly (VideoX-Fun's shares). The same for all samples of the update."""
    rng = counted_rng(seed, "frame crop", update)
    shorter = range(2, frames)
    return shorter[int(rng.integers(len(shorter)))] if shorter and rng.random() >= 0.9 else frames


def condition_with_mask(cond: torch.Tensor) -> torch.Tensor:
    """(C, T, H, W) condition latents → (4+C, T, H, W): ones in latent frame 0.

    The target of a single frame, an image or a video cut that short, would be its own condition,
    so its mask is 0 (and its cached condition the encoding of zeros).
    """
    mask = torch.zeros(MASK_CHANNELS, *cond.shape[1:], dtype=cond.dtype)
    if cond.shape[1] > 1:
        mask[:, 0] = 1
    return torch.cat([mask, cond])


@dataclass(frozen=True, kw_only=True)
class PromptBank:
    """Embeddings that training needs beside the captions, (512, D), zero-padded."""

    empty: torch.Tensor
    negative: torch.Tensor


def load_prompt_bank(index: CacheIndex) -> PromptBank:
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
    return PromptBank(empty=pad_text(prompts["empty"]), negative=pad_text(prompts["negative"]))


class MicroBatches:
    """(update, micro-step) → Batch. Loading is a pure function, so threads may do it ahead."""

    def __init__(
        self,
        index: CacheIndex,
        plan: BatchPlan,
        spec: ModelSpec,
        *,
        empty_text: torch.Tensor,
        caption_dropout: float,
        frame_crop: bool,
        accumulation: int,
        rank: int,
        world_size: int,
    ) -> None:
        """`frame_crop`: now and then show the beginning of clips only (`cropped_frames`)."""
        self._index = index
        self._plan = plan
        self._spec = spec
        self._empty_text = empty_text
        self._caption_dropout = caption_dropout
        self._frame_crop = frame_crop
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._local = threading.local()  # a reader's files may be closed by the thread's next read

    def load(self, update: int, micro_step: int) -> Batch:
        """This rank's samples of one micro-step. Raises UserError on damaged or missing members."""
        positions = micro_batch(
            self._plan.batch_size,
            micro_step=micro_step,
            rank=self._rank,
            world_size=self._world_size,
            accumulation=self._accumulation,
        )
        update_batch = self._plan.batch(update)
        rows = [int(update_batch[position]) for position in positions]
        conditions = [self._condition(row) for row in rows] if self._spec.mode == "i2v" else []
        texts = [
            self._text(row, update, position) for row, position in zip(rows, positions, strict=True)
        ]
        latents = torch.stack([self._target(row) for row in rows])
        condition = torch.stack([cond for cond, _ in conditions]) if conditions else None
        images = [image for _, image in conditions if image is not None]
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
        return Batch(
            update=update,
            samples=tuple(positions),
            keys=tuple(self._index.key(row) for row in rows),
            latents=latents,
            noised=noised,
            text=torch.stack(texts),
            condition=condition,
            image=torch.stack(images) if images else None,
        )

    def ahead(self, *, start: int, stop: int, workers: int) -> Generator[Batch, None, None]:
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
        bucket = self._index.buckets[int(self._index.bucket_ids[row])]
        if int(self._index.types[row]) != VIDEO or bucket.frames == 1:
            return False
        draw = counted_rng(self._plan.seed, "text only", update, position).random()
        return bool(draw >= TEXT_ONLY_SHARE)

    def _text(self, row: int, update: int, position: int) -> torch.Tensor:
        draw = counted_rng(self._plan.seed, "caption dropout", update, position).random()
        # Of a caption alone nothing would be left.
        if draw < self._caption_dropout and int(self._index.types[row]) != TEXT:
            return self._empty_text
        text = self._read(row, TEXT_MEMBER)["text"]
        if (
            text.ndim != 2
            or text.shape[0] > MAX_TEXT_TOKENS
            or text.shape[1] != self._spec.text_dim
        ):
            raise self._misshapen(row, TEXT_MEMBER, text, f"(up to 512, {self._spec.text_dim})")
        return pad_text(text)

    def _target(self, row: int) -> torch.Tensor:
        """(C, T, H, W) latents; zeros of that shape where there is only a caption."""
        if int(self._index.types[row]) != TEXT:
            return self._checked(row, LATENTS_MEMBER, self._read(row, LATENTS_MEMBER)["latents"])
        bucket = self._index.buckets[int(self._index.bucket_ids[row])]
        shape = bucket.latent_shape(self._spec.latent_channels, self._spec.stride)
        return torch.zeros(shape, dtype=self._empty_text.dtype)

    def _condition(self, row: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(4+C, T, H, W), and CLIP's (tokens, D) where the model takes it."""
        tensors = self._read(row, CONDITION_MEMBER)
        cond = self._checked(row, CONDITION_MEMBER, tensors["cond"])
        with_mask = condition_with_mask(cond)
        if (width := self._spec.image_dim) is None:
            return with_mask, None
        image = tensors.get("clip", cond.new_zeros(0, 0))
        if image.shape[1] != width:
            raise self._misshapen(row, CONDITION_MEMBER, image, f"(tokens, {width}) as clip")
        return with_mask, image

    def _checked(self, row: int, member: str, latents: torch.Tensor) -> torch.Tensor:
        """`latents` if they are (C, T, H, W) of the sample's bucket."""
        bucket = self._index.buckets[int(self._index.bucket_ids[row])]
        expected = bucket.latent_shape(self._spec.latent_channels, self._spec.stride)
        if latents.shape != expected:
            raise self._misshapen(row, member, latents, str(expected))
        return latents

    def _read(self, row: int, member: str) -> dict[str, torch.Tensor]:
        if not hasattr(self._local, "reader"):
            self._local.reader = MemberReader(self._index)
        tensors = self._local.reader.read(row, member)
        if tensors is None:
            raise UserError(
                f"shards: {self._index.where(row)} has no {member}, which every "
                f"{self._spec.mode} model needs. Encode with this model: wanprep encode "
                f"--pretrained-model-name-or-path {self._spec.folder} --output <new folder>"
            )
        return dict(tensors)

    def _misshapen(self, row: int, member: str, found: torch.Tensor, expected: str) -> UserError:
        return UserError(
            f"shards: {self._index.where(row, member)}: {member} has shape "
            f"{tuple(found.shape)}, expected {expected}. {REENCODE_SHARD}"
        )

"""Batches from shards: byte ranges read by workers, collated to what the loop computes with."""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from shared.cache import MEDIA_TYPES, CacheIndex, MemberReader, read_prompts
from shared.errors import UserError
from shared.model_spec import MAX_TEXT_TOKENS, ModelSpec
from shared.schema import CONDITION_MEMBER, LATENTS_MEMBER, TEXT_MEMBER
from train.plan import BatchPlan, micro_batch
from train.rng import counted_rng
from train.stopping import ignore_stop_signals

IMAGE = MEDIA_TYPES.index("image")
MASK_CHANNELS = 4


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank computes with in one micro-step. Latents fp32, text in the cache's dtype."""

    update: int
    """Number of the optimizer step, counted from the start of the run: randomness hangs on it."""
    samples: tuple[int, ...]
    """Positions inside the update batch: the global sample numbers of `train.rng`."""
    keys: tuple[str, ...]
    latents: torch.Tensor
    """(B, C, T, H, W), normalised."""
    text: torch.Tensor
    """(B, 512, D), zeros after each caption's true length."""
    condition: torch.Tensor | None
    """i2v: (B, 4+C, T, H, W), mask then normalised condition latents; else None."""

    def to(self, device: torch.device) -> "Batch":
        moved = {
            name: value.to(device, non_blocking=True)
            for name in ("latents", "text", "condition")
            if (value := getattr(self, name)) is not None
        }
        return Batch(**{**self.__dict__, **moved})


def pad_text(text: torch.Tensor) -> torch.Tensor:
    """(tokens, D) → (512, D): the transformer attends to the zeros, as in diffusers' pipelines."""
    return torch.nn.functional.pad(text, (0, 0, 0, MAX_TEXT_TOKENS - text.shape[0]))


def condition_with_mask(cond: torch.Tensor, *, is_image: bool) -> torch.Tensor:
    """(C, T, H, W) condition latents → (4+C, T, H, W): ones in latent frame 0 of videos.

    An image's target would be its own condition, so its mask is 0 (and its cached condition the
    encoding of zeros).
    """
    mask = torch.zeros(MASK_CHANNELS, *cond.shape[1:], dtype=cond.dtype)
    if not is_image:
        mask[:, 0] = 1
    return torch.cat([mask, cond])


@dataclass(frozen=True, kw_only=True)
class PromptBank:
    """Embeddings that training needs beside the captions, (512, D), zero-padded."""

    empty: torch.Tensor
    negative: torch.Tensor


def load_prompt_bank(index: CacheIndex) -> PromptBank:
    """Read the prompt bank. UserError names a role that the cache lacks."""
    prompts = {p.role: p.text for p in read_prompts(index.folder, index.prompt_shards)}
    missing = [role for role in ("empty", "negative") if role not in prompts]
    if missing:
        raise UserError(
            f"shards: the prompt bank of {index.folder} has no {' and no '.join(missing)} prompt. "
            f"Run `wanprep encode --output {index.folder}` again; it adds what is missing."
        )
    return PromptBank(empty=pad_text(prompts["empty"]), negative=pad_text(prompts["negative"]))


class MicroBatches(Dataset["Batch | UserError"]):
    """Map-style: (update, micro-step) → Batch. Workers only read; all choices are arithmetic."""

    def __init__(
        self,
        index: CacheIndex,
        plan: BatchPlan,
        spec: ModelSpec,
        *,
        empty_text: torch.Tensor,
        caption_dropout: float,
        accumulation: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._index = index
        self._plan = plan
        self._spec = spec
        self._empty_text = empty_text
        self._caption_dropout = caption_dropout
        self._accumulation = accumulation
        self._rank = rank
        self._world_size = world_size
        self._reader: MemberReader | None = None

    def __getitem__(self, item: tuple[int, int]) -> Batch | UserError:
        # Returned, not raised: DataLoader would bury a worker's message under its traceback.
        try:
            return self.load(*item)
        except UserError as error:
            return error

    def load(self, update: int, micro_step: int) -> Batch:
        """This rank's samples of one micro-step. Raises UserError on damaged or missing members."""
        positions = micro_batch(
            self._plan.batch_size,
            micro_step=micro_step,
            rank=self._rank,
            world_size=self._world_size,
            accumulation=self._accumulation,
        )
        rows = [int(self._plan.batch(update)[position]) for position in positions]
        conditions = [self._condition(row) for row in rows] if self._spec.mode == "i2v" else None
        return Batch(
            update=update,
            samples=tuple(positions),
            keys=tuple(self._index.key(row) for row in rows),
            latents=torch.stack(
                [self._read(row, LATENTS_MEMBER)["latents"] for row in rows]
            ).float(),
            text=torch.stack(
                [
                    self._text(row, update, position)
                    for row, position in zip(rows, positions, strict=True)
                ]
            ),
            condition=None if conditions is None else torch.stack(conditions),
        )

    def _text(self, row: int, update: int, position: int) -> torch.Tensor:
        draw = counted_rng(self._plan.seed, "caption dropout", update, position).random()
        if draw < self._caption_dropout:
            return self._empty_text
        return pad_text(self._read(row, TEXT_MEMBER)["text"])

    def _condition(self, row: int) -> torch.Tensor:
        cond = self._read(row, CONDITION_MEMBER)["cond"].float()
        return condition_with_mask(cond, is_image=int(self._index.types[row]) == IMAGE)

    def _read(self, row: int, member: str) -> dict[str, torch.Tensor]:
        if self._reader is None:  # opened in the worker, not inherited across the fork
            self._reader = MemberReader(self._index)
        tensors = self._reader.read(row, member)
        if tensors is None:
            raise UserError(
                f"shards: sample {self._index.key(row)} in "
                f"{self._index.shards[int(self._index.shard_ids[row])]} has no {member}, which a "
                f"{self._spec.mode} model needs. Encode with this model: wanprep encode "
                f"--pretrained-model-name-or-path {self._spec.folder} --output <new folder>"
            )
        return tensors


class _UpdateOrder:
    """(update, micro-step) pairs, made as they are asked for: a long run has many millions."""

    def __init__(self, start: int, stop: int, accumulation: int) -> None:
        self._updates = range(start, stop)
        self._accumulation = accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return itertools.product(self._updates, range(self._accumulation))


def micro_batches(
    dataset: MicroBatches, *, start: int, stop: int, accumulation: int, workers: int
) -> Iterator[Batch]:
    """Batches of updates start..stop−1 in order, read ahead by `workers` processes (0: inline).

    Never more workers than CPU cores: they would only wait for one another.
    """
    workers = min(workers, os.cpu_count() or 1)
    loader = DataLoader(
        dataset,
        sampler=_UpdateOrder(start, stop, accumulation),
        batch_size=None,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=2 if workers else None,
        worker_init_fn=ignore_stop_signals,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch

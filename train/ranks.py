"""The processes of a run: which one this is, and the few things that all of them do together."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from shared.errors import UserError, first_line

T = TypeVar("T")

# How long one process waits for another. A process that died is noticed at once, by its closed
# connections and by the launcher; this is for one that hangs, and must be longer than what one may
# do alone: write a checkpoint to a slow disk, fetch a shard, compile.
TIMEOUT = timedelta(minutes=20)


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its GPU."""

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.rank == 0

    def from_first(self, value: T) -> T:
        """What the first process has, in every process; the others' own is not looked at."""
        if self.world_size == 1:
            return value
        box = [value if self.first else None]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]  # type: ignore[return-value]

    def gathered(self, value: T) -> list[T]:
        """The value of every process, in their order."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def first_does(self, work: Callable[[], T]) -> T:
        """What `work` gives in the first process, the only one to do it, in every process.

        An error of it ends all of them; the first one raises it, and so is the one to tell.
        """
        if self.world_size == 1:
            return work()
        done: tuple[Any, bool] = (None, False)
        if self.first:
            try:
                done = (work(), True)
            except Exception:
                self.from_first(done)
                raise
        value, worked = self.from_first(done)
        if not worked:
            raise SystemExit(1)
        return cast(T, value)


def launched() -> Ranks | None:
    """This process as `torchrun` or `accelerate launch` started it; None: it was not.

    By LOCAL_RANK: the seed's shell blocks export WORLD_SIZE and RANK for machines, before any
    launcher runs.
    """
    if "LOCAL_RANK" not in os.environ:
        return None
    rank, world, local = (int(os.environ[n]) for n in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Ranks(rank=rank, world_size=world, local_rank=local)


@contextmanager
def joined(ranks: Ranks, device: torch.device) -> Iterator[None]:
    """Block in which the processes can reach one another.

    One that loses another raises UserError in place of torch's error; the other one has told why.
    """
    if launched() is None:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Small numbers and whole checkpoints travel as CPU tensors, gradients where they are.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
        yield
    except RuntimeError as error:
        if not _is_of_connection(error):
            raise
        # One of each machine speaks, and not all of them.
        raise _lost(ranks, error) if ranks.local_rank == 0 else SystemExit(1) from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _is_of_connection(error: RuntimeError) -> bool:
    # gloo raises RuntimeError itself, with the place in its code.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _lost(ranks: Ranks, error: RuntimeError) -> UserError:
    return UserError(
        f"process {ranks.rank} can't reach the others of the run "
        f"({first_line(error).split('. ')[0]}). Where one of them ended, it has said why; where "
        "none did, check --main-process-ip, and that --main-process-port is not another run's. Go "
        "on from the last checkpoint: the same command with --resume-from-checkpoint latest"
    )

"""The processes of a run: which one this is, and the few things that all of them do together."""

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from shared.cli.support import echo
from shared.errors import UserError, first_line
from train.distributed.failure_report import Answer, RollCall
from train.distributed.mesh import Mesh

T = TypeVar("T")

# How long the first ones wait at the start, for machines whose command is typed later.
_MEETING = timedelta(minutes=20)
_RESUME = "Resume from the last checkpoint: the same command with --resume-from-checkpoint latest"


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among those of the run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among those of this machine: the number of its GPU."""
    timeout: timedelta = timedelta(minutes=20)
    """How long one waits for another. One that died is noticed at once, by its closed connections;
    this is for one that hangs, and must be longer than what one may do on its own: write a
    checkpoint to a slow disk, read the base, fetch a shard, compile."""

    @property
    def mesh(self) -> Mesh:
        """What all of them are."""
        return Mesh(data=self.world_size)

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    @property
    def of_machine(self) -> range:
        """Those on this one's machine."""
        first = self.rank - self.local_rank
        return range(first, first + int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

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

        An error of it ends all of them; the first one raises it, and so is the one to print it.
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

    def time_all_groups(self) -> None:
        """Give process groups that a library made the run's time-out; torch's own is half an hour.

        torch has no public way to, and DeepSpeed, which makes one, takes no time-out.
        """
        for group in dist.distributed_c10d._world.pg_map:
            dist.distributed_c10d._set_pg_timeout(self.timeout, group)


SINGLE = Ranks()


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
def joined(ranks: Ranks, device: torch.device) -> Iterator[Callable[[], None]]:
    """Block in which the processes can reach one another.

    One that loses another raises UserError in place of torch's error, with what is known of it;
    one that does not notice is ended. A process that has noticed, and has something left to do,
    calls what the block is given.
    """
    if launched() is None:
        yield lambda: None
        return
    # Small numbers and whole checkpoints travel as CPU tensors, gradients where they are.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    roll_call: RollCall | None = None
    try:
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=_MEETING)))
        roll_call = RollCall(dist.PrefixStore("roll-call", store), rank, world_size)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("groups", store),
            rank=rank,
            world_size=world_size,
            timeout=ranks.timeout,
        )
        with roll_call.watched(partial(_leave_after, ranks)) as noticed:
            yield noticed
    except BaseException as error:
        # Not destroyed here: NCCL would wait for the others, which wait for this process.
        atexit.register(_leave)
        if not isinstance(error, Exception):
            raise
        if _is_of_connection(error):
            raise _lost(ranks, error, roll_call) from error
        if roll_call is not None:
            roll_call.report_end(str(error) if isinstance(error, UserError) else first_line(error))
        if ranks.rank and isinstance(error, UserError):
            raise UserError(f"process {ranks.rank}: {error}") from error
        if not isinstance(error, UserError):
            echo(f"error: process {ranks.rank} failed:", err=True)
        raise
    dist.destroy_process_group()


def _leave() -> None:
    """End this process before torch takes its groups apart, which can wait for ever."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(1)


def _leave_after(ranks: Ranks, ended: int, why: str) -> None:
    """End a process that waits for one that has ended; one of each other machine says why."""
    if ranks.local_rank == 0 and ended not in ranks.of_machine:
        echo(f"error: process {ended} ended the run: {why} {_RESUME}", err=True)
    _leave()


def _is_of_connection(error: Exception) -> bool:
    # gloo raises RuntimeError itself, with the place in its code.
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


def _lost(ranks: Ranks, error: Exception, roll_call: RollCall | None) -> UserError | SystemExit:
    """What to raise in a process that can't reach another; one of each machine prints it."""
    answer = roll_call.answer() if roll_call else Answer(store="is gone")
    beside = ranks.of_machine
    prints = ranks.local_rank == 0
    if answer.store == "answers":
        prints = ranks.rank == min(rank for rank in answer.present if rank in beside)
    elif answer.store == "hangs":
        prints |= ranks.rank == 1  # the first process may be the one that holds it
    if answer.ended and answer.ended[0] in beside:
        prints = False  # it prints its own error
    return UserError(_what_is_known(ranks, error, answer)) if prints else SystemExit(1)


def _what_is_known(ranks: Ranks, error: Exception, answer: Answer) -> str:
    if answer.ended:
        return f"process {answer.ended[0]} ended the run: {answer.ended[1]} {_RESUME}"
    missing = ", ".join(f"process {rank} ({where})" for rank, where in answer.silent.items())
    if answer.store == "hangs":
        missing = "process 0, or its machine"
    if missing and "timed out" in str(error).lower():
        seconds = round(ranks.timeout.total_seconds())
        return (
            f"process {ranks.rank} waited {seconds} s (--ddp-timeout) for {missing}: it hangs, or "
            "its disk, its network or its GPU does. If it was only slow, allow more: "
            f"--ddp-timeout {3 * seconds}. {_RESUME}"
        )
    if missing:
        return (
            f"process {ranks.rank} lost {missing}, which ended without an error message: it was "
            f"killed, perhaps out of memory, or its machine is gone. {_RESUME}"
        )
    return (
        f"process {ranks.rank} can't reach the others of the run "
        f"({first_line(error).split('. ')[0]}). If one of them ended, it printed why; if "
        f"none did, check --main-process-ip, and that --main-process-port is not another run's. "
        f"{_RESUME}"
    )

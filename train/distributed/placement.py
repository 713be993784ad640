"""Which strategy, in how many processes, and which of them this one is: options and environment."""

import os
from dataclasses import dataclass, replace
from datetime import timedelta

from shared.device import chosen_device, take_device
from shared.errors import UserError
from train.distributed.launcher import Machines
from train.distributed.mesh import Mesh
from train.distributed.options import ProcessOptions
from train.distributed.process_group import SINGLE, Ranks, launched
from train.distributed.zero_file import stage_of_launcher, zero_section
from train.options import StrategyName


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a run computes."""

    machines: Machines
    ranks: Ranks
    device: str
    """Of this process."""
    to_launch: bool
    """Whether this process has yet to start those of the run."""

    @property
    def mesh(self) -> Mesh:
        """Of the run, its processes started or not."""
        return Mesh(data=self.machines.num_processes)


def place(strategy: StrategyName | None, options: ProcessOptions) -> tuple[StrategyName, Placement]:
    """Strategy and placement by options and environment. UserError where they contradict.

    In a process that a launcher started, its environment says how many there are.
    """
    num_processes, num_machines = options.num_processes, options.num_machines
    if (ddp_timeout := options.ddp_timeout) < 1:
        raise UserError(f"--ddp-timeout: found {ddp_timeout}, expected seconds, 1 or more.")
    if ranks := launched():
        ranks = replace(ranks, timeout=timedelta(seconds=ddp_timeout))
        strategy = strategy or _strategy_of_accelerate(ranks)
        if strategy == "single" and ranks.world_size > 1:
            raise UserError(
                f"--strategy: found single in a run of {ranks.world_size} processes, which would "
                "all write to one folder. Use ddp, zero2, zero3 or fsdp."
            )
        _check_file(strategy)
        return strategy, Placement(
            machines=Machines(num_processes=ranks.world_size),
            ranks=ranks,
            device=_device(options.device, ranks),
            to_launch=False,
        )
    _check_machines(options)
    if num_processes is None:
        several = strategy not in (None, "single") or num_machines > 1
        num_processes = num_machines * (max(1, _gpus()) if several else 1)
    strategy = strategy_for(num_processes, strategy)
    _check_file(strategy)
    machines = Machines(
        num_processes=num_processes,
        num_machines=num_machines,
        machine_rank=options.machine_rank,
        main_process_ip=options.main_process_ip,
        main_process_port=options.main_process_port,
    )
    device, to_launch = _device(options.device, SINGLE), strategy != "single"
    if to_launch:
        _check_device_of_each(options.device, device, machines.here)
    placed = Placement(machines=machines, ranks=SINGLE, device=device, to_launch=to_launch)
    return strategy, placed


def strategy_for(num_processes: int, wanted: StrategyName | None) -> StrategyName:
    """The one that is wanted, or else the simplest. UserError where it is not for so many."""
    strategy = wanted or ("ddp" if num_processes > 1 else "single")
    if strategy == "single" and num_processes > 1:
        raise UserError(
            f"--num-processes: found {num_processes} with --strategy single, which is one process. "
            "Use --strategy ddp, zero2, zero3 or fsdp."
        )
    return strategy


def _check_file(strategy: StrategyName) -> None:
    """UserError for a DeepSpeed file that does not fit, before weights are read."""
    if strategy in ("zero2", "zero3"):
        zero_section(3 if strategy == "zero3" else 2)


def _check_device_of_each(wanted: str, device: str, processes: int) -> None:
    """UserError unless each process of this machine has a device.

    GPUs are only counted: a context would take memory of one as long as the launcher lives.
    """
    if not device.startswith("cuda"):
        take_device(device)
    elif wanted.startswith("cuda:") and processes > 1:
        raise UserError(
            f"--device: found {wanted} with {processes} processes on this machine, which can't "
            "share a GPU. Use --device cuda, one GPU for each, and CUDA_VISIBLE_DEVICES for which."
        )
    elif processes > (gpus := _gpus()):
        raise UserError(
            f"--num-processes: found {processes} for this machine with --device {wanted}, which "
            f"has {gpus} GPU(s) that torch can use; each process takes one. Expected up to {gpus}."
        )


def _check_machines(options: ProcessOptions) -> None:
    num_machines, num_processes = options.num_machines, options.num_processes
    if not 0 <= (machine_rank := options.machine_rank) < num_machines:
        raise UserError(
            f"--machine-rank: found {machine_rank}, expected 0 to {num_machines - 1}, the number "
            f"of this machine among {num_machines} (--num-machines; or RANK and WORLD_SIZE)."
        )
    if num_processes is not None and (num_processes < 1 or num_processes % num_machines):
        raise UserError(
            f"--num-processes: found {num_processes}, expected a multiple of the {num_machines} "
            "machines: processes of all machines together (or NUM_PROCESS)."
        )
    if num_machines > 1 and options.main_process_port is None:
        raise UserError(
            "--main-process-port: machines need a port of the first one at which to meet, e.g. "
            "--main-process-port 29500 (or MASTER_PORT), with --main-process-ip (or MASTER_ADDR)."
        )


def _strategy_of_accelerate(ranks: Ranks) -> StrategyName:
    """What `accelerate launch` was configured for, by the environment of its processes."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        if stage not in (None, "2", "3"):
            raise UserError(
                f"--zero_stage of accelerate: found {stage}, expected 2 or 3. Stage 1 gains "
                "nothing for a LoRA, whose optimizer is small."
            )
        if stage is None:
            return "zero3" if stage_of_launcher() == 3 else "zero2"
        return "zero3" if stage == "3" else "zero2"
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "fsdp"
    return "ddp" if ranks.world_size > 1 else "single"


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _device(wanted: str, ranks: Ranks) -> str:
    device = chosen_device(wanted)
    if device != "cuda":
        return device
    gpus = _gpus()
    if gpus <= 1:  # some launchers show each process only its own (Slurm: --gpus-per-task=1)
        return "cuda:0"
    if ranks.local_rank >= gpus:
        raise UserError(
            f"--device: process {ranks.rank} is number {ranks.local_rank} of its machine, which "
            f"shows it {gpus} GPUs; each process takes one. Start {gpus} processes a machine, or "
            "show it all GPUs (CUDA_VISIBLE_DEVICES)."
        )
    return f"cuda:{ranks.local_rank}"

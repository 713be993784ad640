"""What options may be, and under which heading of a help page they stand.

Without torch: the rooms that use these values take their types from here, and a help page needs
nothing else.
"""

from typing import Literal

INPUT = "Input"
OUTPUT = "Output"
LENGTH = "Length and checkpoints"
WATCH = "Monitoring"
LORA = "LoRA"
OPTIMIZER = "Optimizer"
DATA = "Data"
DEVICE = "Device"
PROCESSES = "Processes"

Expert = Literal["low", "high", "full"]
Experts = Literal["low", "high", "full", "both"]
"""What a run may be asked to train."""
Precision = Literal["bf16", "no"]
BasePrecision = Literal["bf16", "fp8", "int8", "nf4"]
QuantisedPrecision = Literal["fp8", "int8", "nf4"]
StrategyName = Literal["single", "ddp", "zero2", "zero3", "fsdp"]
OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "muon"]
Tail = Literal["pad", "drop"]
LrScheduler = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "warmup_stable_decay",
]
Maths = Literal["corrected", "seed"]
DistillMethod = Literal["dmd", "regression"]
Start = Literal["latents", "noise", "states"]
Match = Literal["x0", "handover"]
Pairing = Literal["renoise", "euler"]
ScoreFloor = Literal["boundary", "handover"]
LevelRange = Literal["interval", "exit"]
Exits = Literal["all", "last"]
Gauge = Literal["contrast", "motion", "variety"]
TimestepSampling = Literal["uniform", "logit-normal"]

SHARDED: tuple[StrategyName, ...] = ("zero3", "fsdp")
"""Strategies that shard base parameters across ranks."""
LEAST_POLYNOMIAL_RATE = 1e-7
"""Where diffusers' polynomial schedule ends."""


def is_number(text: str) -> bool:
    """Whether `float` reads it."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def names(text: str) -> tuple[str, ...]:
    """ "q,k v" → ("q", "k", "v")."""
    return tuple(text.replace(",", " ").split())

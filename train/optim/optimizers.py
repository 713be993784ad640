"""The optimizers of `--optimizer`, as their packages have them, and what they keep as tensors.

All state is given and taken as tensors by name, so that checkpoints are the same for every one:
what belongs to a weight, and the numbers that some keep for all weights together.
"""

from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np
import torch
from torch import nn

from shared.errors import UserError
from train.optim.adamw8bit import AdamW8bit, moment_bytes
from train.options import OptimizerName

CLASSES: Mapping[OptimizerName, str] = {
    "adamw": "torch.optim.AdamW",
    "adamw8bit": "AdamW8bit",
    "adafactor": "torch.optim.Adafactor",
    "prodigy": "prodigyopt.Prodigy",
    "muon": "torch.optim.Muon",
}
"""As other tools call them in a LoRA's metadata."""
_FP32 = 4
# The squares of gradients, clipped to a norm of 0.05, are about 1e-11 where a LoRA has 1e8 weights:
# below torch's default floor for them (1.2e-7), under which rows and columns would count for
# nothing. The square of this is still no denormal: a gradient of 0 is divided by more than 0.
ADAFACTOR_EPS = (1e-18, 1e-3)
_OF_ALL = ("k", "d", "d_max", "d_numerator")  # Prodigy's, for all weights together


def check_optimizer(name: OptimizerName) -> None:
    """UserError where the package that an optimizer is of is not here, or too old for it."""
    if name == "prodigy" and find_spec("prodigyopt") is None:
        raise UserError(
            "--optimizer: found prodigy, which needs prodigyopt. Install it: pip install "
            "'wandistill[prodigy]', or use adamw."
        )
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"--optimizer: found muon, which needs torch 2.9 or later; this is "
            f"{torch.__version__}. Install a later torch, or use adamw."
        )


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """All but the rate, which comes with each update; named as AdamW's.

    adafactor has no `betas` and an `eps` of its own; muon has no `betas`.
    """

    name: OptimizerName = "adamw"
    """All others need whole states: `single` and `ddp`."""
    betas: tuple[float, float]
    eps: float
    weight_decay: float


def make_optimizer(
    settings: OptimizerSettings, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    """The optimizer of these settings; its rate is set before each step.

    Muon's rate is as large as AdamW's: a step has a root mean square of 0.2 times it
    (arXiv:2502.16982, section 2.2).
    """
    name = settings.name
    given: dict[str, Any] = {"weight_decay": settings.weight_decay}
    if name == "adafactor":
        return torch.optim.Adafactor(parameters, eps=ADAFACTOR_EPS, **given)
    given["eps"] = settings.eps
    if name == "muon":
        return torch.optim.Muon(parameters, adjust_lr_fn="match_rms_adamw", **given)
    given["betas"] = settings.betas
    if name == "prodigy":
        from prodigyopt import Prodigy

        # Warm-up would otherwise count as small gradients. It prints that decay is decoupled.
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            prodigy: torch.optim.Optimizer = Prodigy(parameters, safeguard_warmup=True, **given)
        return prodigy
    return (AdamW8bit if name == "adamw8bit" else torch.optim.AdamW)(parameters, **given)


def state_of(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> Mapping[str, torch.Tensor]:
    """Name → tensor, of one weight; empty before the first step."""
    if isinstance(optimizer, AdamW8bit):
        return optimizer.moments(parameter)
    return {name: torch.as_tensor(v) for name, v in optimizer.state.get(parameter, {}).items()}


def put_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, name: str, value: torch.Tensor
) -> None:
    """Keep a copy of one tensor of `state_of`, on the device that it is to be on."""
    if isinstance(optimizer, AdamW8bit):
        optimizer.put(parameter, name, value.clone())
    else:
        integer = name == "step" and not value.is_floating_point()
        optimizer.state[parameter][name] = int(value) if integer else value.clone()


def numbers_of(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Name → number (float64 or int64, no dimensions) for all weights together; mostly none."""
    (group,) = optimizer.param_groups
    return {name: torch.from_numpy(np.array(group[name])) for name in _OF_ALL if group.get("k")}


def state_bytes(name: OptimizerName, weights: int, rank: int) -> int:
    """What an optimizer keeps of a matrix with so many weights and a side of `rank`, at most."""
    if name == "adamw8bit":
        return moment_bytes(weights)
    if name == "adafactor":
        return _FP32 * (rank + weights // rank)
    # prodigy: both moments, a sum of gradients, and where a weight began (of a new LoRA's B, which
    # is 0, that is one number)
    tensors = {"adamw": 2, "prodigy": 4, "muon": 1}[name]
    return _FP32 * tensors * weights

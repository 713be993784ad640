"""AdamW whose moments are kept in 8 bits (`--use-8bit-adam`).

Codes of a nonlinear map in blocks of 256, each with its largest value, as of Dettmers et al.
(arXiv:2110.02861). Three things are not as in bitsandbytes. Not the second moment but its root is
kept, which has the range of the first one, and what is not 0 never becomes 0: nothing that moves a
weight is divided by ε alone. It is rounded by chance: what changes by a thousandth in a step
(1 - β2) would be rounded back to what it was, and stand still. And the map is the same up
and down, so that a block's largest value is kept exactly: values that were decoded give the same
codes again, and checkpoints hold plain fp32 moments.
"""

from functools import cache
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

BLOCK = 256
LEAST = 4096
"""Matrices of fewer weights keep fp32 moments."""
_COARSE = 1.5
"""Neighbours in the map that are farther apart than this are too far to round down to: a step
would grow as much."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def moment_bytes(weights: int) -> int:
    """Of both moments of a matrix with so many weights."""
    return 8 * weights if weights < LEAST else 2 * (weights + 4 * -(-weights // BLOCK))


class AdamW8bit(torch.optim.AdamW):
    """torch's AdamW on moments that are decoded for the step of one matrix, and coded again."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            chance = None
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                held = self.moments(parameter) or {
                    "step": torch.tensor(0.0),
                    **{name: torch.zeros_like(parameter) for name in _MOMENTS},
                }
                adamw(
                    [parameter], [parameter.grad], [held["exp_avg"]], [held["exp_avg_sq"]], [],
                    [held["step"]], foreach=False, amsgrad=False, beta1=beta1, beta2=beta2,
                    lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
                    maximize=False,
                )  # fmt: skip
                if chance is None:  # in all processes, and after a resume, the same
                    chance = torch.Generator(parameter.device)
                    chance.manual_seed(int(held["step"]))
                for name, value in held.items():
                    self.put(parameter, name, value, chance)

    def moments(self, parameter: nn.Parameter) -> dict[str, torch.Tensor]:
        """step, exp_avg and exp_avg_sq in fp32, as of `torch.optim.AdamW`; empty before a step."""
        state = self.state.get(parameter, {})
        held = {name: state[name] for name in ("step", *_MOMENTS) if name in state}
        for name in _MOMENTS:
            if f"{name}/codes" in state:
                value = decoded(
                    state[f"{name}/codes"], state[f"{name}/largest"], parameter.shape,
                    signed=name == "exp_avg",
                )  # fmt: skip
                held[name] = value if name == "exp_avg" else value.square_()
        return held

    def put(
        self,
        parameter: nn.Parameter,
        name: str,
        value: torch.Tensor,
        chance: torch.Generator | None = None,
    ) -> None:
        """Keep one of what `moments` gives. What it gave gets the same codes, without `chance`."""
        state = self.state[parameter]
        if name == "step" or parameter.numel() < LEAST:
            state[name] = value
            return
        signed = name == "exp_avg"
        kept = coded(
            value if signed else value.sqrt(), signed=signed, chance=None if signed else chance
        )
        state[f"{name}/codes"], state[f"{name}/largest"] = kept


def coded(
    values: torch.Tensor, *, signed: bool, chance: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 codes, flat (the place in the map; of signed values the highest bit is the sign); and
    each block's largest absolute value, fp32.

    Rounded to the nearest value; with `chance` up or down, so that the mean is right, and always up
    where the map is coarse. Of values that have no sign, those which are not 0 don't become 0.
    """
    flat = values.flatten()
    blocks = nn.functional.pad(flat, (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    scaled = (blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)).abs()
    grid = _map(values.device, signed)
    above = torch.bucketize(scaled, grid).clamp_(1, len(grid) - 1)
    low, high = grid[above - 1], grid[above]
    share = (scaled - low) / (high - low)
    if chance is None:
        limit = torch.full_like(share, 0.5)
    else:
        limit = torch.rand(share.shape, generator=chance, device=values.device)
        limit[high > _COARSE * low] = 0
    place = torch.where(share > limit, above, above - 1)
    if not signed:
        place.clamp_(min=(blocks != 0).long())
    codes = place.to(torch.uint8)
    if signed:
        codes |= (blocks < 0).to(torch.uint8) << 7
    return codes.view(-1)[: len(flat)].clone(), largest.view(-1)


def decoded(
    codes: torch.Tensor, largest: torch.Tensor, shape: torch.Size, *, signed: bool
) -> torch.Tensor:
    """fp32 values."""
    grid = _map(codes.device, signed)
    if signed:
        grid = torch.cat([grid, -grid])
    return (grid[codes.int()] * largest.repeat_interleave(BLOCK)[: len(codes)]).view(shape)


@cache
def _map(device: torch.device, signed: bool) -> torch.Tensor:
    """128 (signed) or 256 values: 0, and 7 or 8 decades up to 1, each of twice as many steps as the
    one below."""
    values, decades = [0.0], 7 if signed else 8
    for decade in range(decades):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float64)
        middles = (edges[:-1] + edges[1:]) / 2
        values += (middles * 10.0 ** (decade - decades + 1)).tolist()
    values[-1] = 1.0
    return torch.tensor(values, dtype=torch.float32, device=device)

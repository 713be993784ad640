"""Warns of a learning rate that changes nothing: before the run, at its first step, at its end.

AdamW moves a weight by about the rate, whatever the gradient's size, so a step is lost where the
rate is less than half the distance from the weight to its neighbours in fp32. B begins at zero,
where any step counts; A (about 1/√in) and the B of a LoRA that training starts from are what can
stand still. And what moved in fp32 can be the old value again in a bf16 file.
"""

from collections.abc import Callable, Mapping

import torch

from train.options import OptimizerName

Weights = Mapping[str, torch.Tensor]
Whole = Callable[[], Weights]
_MOST = 0.5
_LEAST_ADAFACTOR = 1e-3


def lost_steps(weights: Weights, rate: float) -> float:
    """Share of the weights other than 0 that a step of `rate` up or down leaves as they are."""
    lost = counted = 0
    for weight in weights.values():
        stays = (weight + rate == weight) & (weight - rate == weight)
        lost += int((stays & (weight != 0)).sum())
        counted += int(torch.count_nonzero(weight))
    return lost / counted if counted else 0.0


def unchanged(before: Weights, after: Weights, dtype: torch.dtype) -> float:
    """Share of the weights that are bit for bit what they were, written in `dtype`."""
    same = sum(int((before[n].to(dtype) == after[n].to(dtype)).sum()) for n in before)
    return same / sum(weight.numel() for weight in before.values())


def warn_of_learning_rate(
    role: str, option: str, weights: Weights, rate: float, optimizer: OptimizerName = "adamw"
) -> str | None:
    """What to say before the run, if most steps of a role would be rounded away or too small."""
    if optimizer == "prodigy":  # finds the size of its steps itself
        return None
    if optimizer == "adafactor":  # its steps are relative to a matrix's root mean square
        if rate >= _LEAST_ADAFACTOR:
            return None
        return (
            f"{option}: adafactor's step is {rate:g} times a matrix's root mean square, or times "
            f"0.001 where that is less: the {role}'s B, which begins at 0, would move by "
            f"{rate / 1000:g}. Usual is 0.01."
        )
    share = lost_steps(weights, rate)
    if share <= _MOST:
        return None
    return (
        f"{option}: a step of {rate:g} is rounded away in fp32 at {share:.0%} of the {role}'s "
        "weights that are not 0; these would never move. Raise it (usual are 1e-6 to 1e-4)."
    )


class FirstSteps:
    """Looks at each role's first step at its full rate in this process, then no more."""

    def __init__(self) -> None:
        self._seen: set[str] = set()

    def before(self, role: str, weights: Whole, *, full_rate: bool) -> Weights | None:
        """A copy to compare with, where this step is to be looked at.

        `weights` are called together by all processes of a run, or not at all.
        """
        if role in self._seen or not full_rate:
            return None
        self._seen.add(role)
        return {name: weight.detach().clone() for name, weight in weights().items()}

    @staticmethod
    def after(role: str, before: Weights | None, weights: Whole, norm: float) -> str | None:
        """What to say if a gradient other than 0 moved nothing at all."""
        if before is None or not norm:
            return None
        now = weights()
        if any(not torch.equal(old, now[name]) for name, old in before.items()):
            return None
        return (
            f"learning rate: an update of the {role} with gradient norm {norm:.3g} left every "
            "weight bit for bit as it was; the rate is too small for fp32. Raise it."
        )


def warn_of_file(start: Weights | None, trained: Weights, dtype: torch.dtype) -> str | None:
    """What to say at the end, if the LoRA's file is the one that the run began with.

    `start`: the B matrices of --init-lora; None: B began at zero. Only B tells: A alone, with B at
    zero, adds nothing.
    """
    ups = {name: weight for name, weight in trained.items() if ".lora_B." in name}
    share = unchanged(start or {n: torch.zeros_like(w) for n, w in ups.items()}, ups, dtype)
    if share < 1:
        return None
    was = "the one of --init-lora" if start else "without effect"
    return (
        f"the LoRA in {str(dtype).removeprefix('torch.')} is {was}: no weight of B moved far "
        "enough to be another number. Train longer or with a larger learning rate; "
        "--save-precision fp32 keeps smaller changes."
    )

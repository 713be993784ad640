"""Which expert holds a student back? Each half of its path is done by the teacher in turn.

    python benchmarks/which_expert.py regression --updates 640 --teacher-clips 1620

takes the runs that `learning.py recipes` has left under --work (an average of the path where there
is one), draws the captions of one seed, and prints for each combination how many are right, how
far from the teacher's clips of the same noise they are (root mean square of latents), and the
distance, contrast, variety, between and motion of `learning.py`. The teacher takes 40 Euler steps
with CFG, and one more at the hand-over.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from learning import (
    ALPHA,
    EXPERIMENTS,
    MANY_SHIFT,
    RANK,
    RATIOS,
    REFERENCE_SEED,
    Bench,
    make_draw,
)
from safetensors.torch import load_file
from toy_sampling import velocity
from toy_students import (
    BATCH,
    LATENT_CHANNELS,
    LATENT_SHAPE,
    NOISE_SEED,
    ToyBench,
    TwoExperts,
    deviations,
    even_steps,
    sliced_wasserstein,
    step_levels,
)


@dataclass(frozen=True, kw_only=True)
class Half:
    """Who goes one half of the way, over which noise levels."""

    model: TwoExperts
    levels: tuple[float, ...]
    guidance: float


@torch.no_grad()
def go(half: Half, x: torch.Tensor, text: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
    """Euler steps of latents [B, 16, 5, 8, 8] along the half's levels."""
    for now, after in itertools.pairwise(half.levels):
        sigma = torch.full((len(x),), now)
        v = velocity(half.model, x, sigma, text, None)
        if half.guidance != 1:
            without = velocity(half.model, x, sigma, empty.expand_as(text), None)
            v = without + half.guidance * (v - without)
        x = x + (after - now) * v
    return x


def draw(toy: ToyBench, halves: Sequence[Half], seed: int) -> torch.Tensor:
    """Latents of every caption, from the noise that `learning.py` draws its rows of a seed from."""
    text, drawn = toy.text, []
    for start in range(0, len(text), BATCH):
        part = text[start : start + BATCH]
        generator = torch.Generator().manual_seed(NOISE_SEED + 1000 * seed + start // BATCH)
        x = torch.randn((len(part), LATENT_CHANNELS, *LATENT_SHAPE), generator=generator)
        for half in halves:
            x = go(half, x, part, toy.empty)
        drawn.append(x)
    return torch.cat(drawn)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("student", choices=list(EXPERIMENTS["recipes"].students))
    parser.add_argument("--updates", type=int, default=640)
    parser.add_argument("--teacher-clips", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"))
    args = parser.parse_args()

    recipes = EXPERIMENTS["recipes"]
    one = replace(
        recipes,
        students={args.student: recipes.students[args.student]},
        updates=(args.updates,),
        teacher_clips=args.teacher_clips,
    )
    bench = Bench(one, 1, args.work.resolve())
    loras = {}
    for arm in bench.arms(args.student):
        name = "generator_ema" if arm.averaged else "generator_weights"
        run = Path(bench.training(arm, args.seed, args.updates).folder)
        file = run / f"checkpoint-{args.updates}" / f"{name}.safetensors"
        if not file.exists():
            parser.error(f"no {file}: run learning.py recipes first, with the same --work")
        loras[arm.expert] = (file, ALPHA / RANK)

    toy = ToyBench(one.model, one.captions)
    few = step_levels([index / 1000 for index in one.indices], one.shift).tolist()
    many = step_levels([i / 1000 for i in even_steps(one.teacher_steps)], MANY_SHIFT).tolist()
    at = next(level for level in few if level < toy.boundary)  # where the low expert begins
    teacher, student = toy.both({}), toy.both(loras)
    sides = (lambda level: level >= at, lambda level: level <= at)
    guided, alone = (
        [
            Half(
                model=model,
                levels=tuple(sorted({at, *filter(side, levels)}, reverse=True)),
                guidance=guidance,
            )
            for side in sides
        ]
        for model, levels, guidance in ((teacher, many, one.guidance), (student, few, 1.0))
    )

    reference = bench.many_steps(REFERENCE_SEED)
    make_draw(reference)
    theirs = load_file(reference.file)["latents"]
    measured = toy.seen(theirs) | deviations(theirs, toy.captions)
    print(f"| high | low | accuracy | from its own clip | distance | {' | '.join(RATIOS)} |")
    print("|---" * (5 + len(RATIOS)) + "|")
    own = draw(toy, guided, args.seed)
    for high, low in itertools.product(("teacher", "student"), repeat=2):
        halves = [(guided if who == "teacher" else alone)[i] for i, who in enumerate((high, low))]
        latents = own if halves == guided else draw(toy, halves, args.seed)
        seen = toy.seen(latents) | deviations(latents, toy.captions)
        numbers = [
            seen["accuracy"],
            float((latents - own).square().mean().sqrt()),
            sliced_wasserstein(latents, theirs),
            *(seen[key] / measured[key] for key in RATIOS.values()),
        ]
        print(f"| {high} | {low} | {' | '.join(f'{x:.3f}' for x in numbers)} |", flush=True)


if __name__ == "__main__":
    main()

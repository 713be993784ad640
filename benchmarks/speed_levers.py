"""What each speed lever does to the time of an update. Ratios, measured in one run.

    python benchmarks/speed_levers.py                 # a quarter of an hour on a CPU
    python benchmarks/speed_levers.py --device cuda   # with the attention backends that train there
    python benchmarks/speed_levers.py --profile       # where a plain update's time goes
    python benchmarks/speed_levers.py --quick         # that it runs; its numbers mean nothing

Updates of `wantrain distill` (the steps themselves, forward and backward, guided by 6, LoRA of rank
8, checkpointed) on a Wan t2v transformer with random weights. In each round all levers take turns
with the plain run, so that other work on the machine strikes both sides of a ratio; the median of
the rounds is shown. Below 1 is faster. The first update, in which blocks are compiled, is not
counted; its time is shown beside.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from shared.models.spec import read_model_spec
from tests.models import TEXT_DIM, tiny_model
from train.data.batches import Batch
from train.functional.schedule import Schedule
from train.memory.keep_attention import keep_attention
from train.methods.dmd import Recipe, critic_step, generator_step
from train.model.attention import NATIVE, trainable, use_attention
from train.model.base import load_base
from train.model.compile import compile_blocks
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles
from train.options import Precision

RECIPE = Recipe(
    expert="full",
    schedule=Schedule(indices=(1000, 750, 500, 250), shift=5.0, boundary=None),
    start="noise",
    pairing="renoise",
    score_floor="boundary",
    maths="corrected",
    real_guidance_scale=6.0,
    fake_guidance_scale=0.0,
    fm_loss_weight=0.0,
    score_strata=1,
    batched_guidance=False,
    seed=1,
)
UPDATE = 3
"""One whose rollout exits at the second of the four steps."""


@dataclass
class Lever:
    """One way to make the same updates."""

    name: str
    roles: Roles
    recipe: Recipe = RECIPE
    attention: str = NATIVE
    first: float = 0.0
    """Seconds of the first update of both roles."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {CRITIC: [], GENERATOR: []})

    def update(self, role: str, batch: Batch, negative: torch.Tensor) -> float:
        """Seconds of one."""
        use_attention(self.roles.transformer, self.attention)
        _wait(batch)
        began = time.perf_counter()
        step = (
            critic_step(self.roles, self.recipe, batch)
            if role == CRITIC
            else generator_step(self.roles, self.recipe, batch, negative)
        )
        with self.roles.role(role):
            step.loss.backward()
        _wait(batch)
        for parameter in self.roles.parameters(role).values():
            parameter.grad = None
        return time.perf_counter() - began


def _wait(batch: Batch) -> None:
    if batch.latents.is_cuda:
        torch.cuda.synchronize(batch.latents.device)


def make_roles(
    model: Path, device: torch.device, precision: Precision, *, fused: bool = False
) -> Roles:
    transformer = load_base(
        read_model_spec(model), "full", precision=precision, device=device,
        gradient_checkpointing=True,
    ).to(device)  # fmt: skip
    targets = select_targets(transformer, ("q", "k", "v", "ffn.0", "ffn.2"))
    roles = Roles(transformer, LoraSpec(rank=8, alpha=4, targets=targets), seed=1, fused=fused)
    roles.transformer.to(device)
    return roles


def make_batch(samples: int, grid: tuple[int, int, int], device: torch.device) -> Batch:
    random = torch.Generator().manual_seed(2)
    latents = torch.randn(samples, 16, *grid, generator=random)
    text = torch.randn(samples, 512, TEXT_DIM, generator=random)
    numbers = tuple(range(samples))
    return Batch(
        update=UPDATE, samples=numbers, keys=tuple(map(str, numbers)), latents=latents.to(device),
        text=text.to(device), condition=None,
    )  # fmt: skip


def measure(levers: list[Lever], batch: Batch, rounds: int) -> None:
    """Fill in the levers' seconds; the order changes from round to round."""
    negative = torch.randn(512, TEXT_DIM, generator=torch.Generator().manual_seed(3))
    negative = negative.to(batch.text)
    for lever in levers:
        lever.first = sum(lever.update(role, batch, negative) for role in lever.seconds)
    for number in range(rounds):
        for lever in levers if number % 2 else reversed(levers):
            for role, seconds in lever.seconds.items():
                seconds.append(lever.update(role, batch, negative))


def report(title: str, levers: list[Lever]) -> None:
    plain, *others = levers
    print(f"\n{title}, load {os.getloadavg()[0]:.1f}")
    absolute = ", ".join(f"{r} {statistics.median(s):.3f} s" for r, s in plain.seconds.items())
    print(f"plain update, median: {absolute}")
    for lever in others:
        ratios = {
            role: statistics.median(
                mine / theirs for mine, theirs in zip(seconds, plain.seconds[role], strict=True)
            )
            for role, seconds in lever.seconds.items()
        }
        shown = "  ".join(f"{role} {ratio:6.3f}" for role, ratio in ratios.items())
        print(f"{lever.name + ' / plain':<44}{shown}  first {lever.first:6.1f} s")


def profile(title: str, plain: Lever, batch: Batch) -> None:
    """Operators of an update of each role by the time in themselves."""
    negative = torch.zeros(512, TEXT_DIM).to(batch.text)
    for role in plain.seconds:
        plain.update(role, batch, negative)
        with torch.profiler.profile() as found:
            plain.update(role, batch, negative)
        on_gpu = batch.latents.is_cuda
        spent = {
            event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total
            for event in found.key_averages()
        }
        print(f"\n{title}, {role} update")
        for name in sorted(spent, key=lambda name: -spent[name])[:14]:
            print(f"{name:<52}{spent[name] / sum(spent.values()):8.2%}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, nothing compiled")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("bf16", "no"), default="bf16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-compile", action="store_true", help="leave --compile out")
    parser.add_argument("--profile", action="store_true", help="in place of the levers")
    args = parser.parse_args()
    heads, layers, rounds = (2, 2, 1) if args.quick else (8, 8, args.rounds)
    device = torch.device(args.device)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="levers-") as folder:
        model = tiny_model(
            Path(folder), "t2v", two_experts=False, num_attention_heads=heads,
            attention_head_dim=64, ffn_dim=256 * heads, num_layers=layers, dtype=torch.bfloat16,
        )  # fmt: skip
        eager = make_roles(model, device, args.precision)
        fused = make_roles(model, device, args.precision, fused=True)
        kept = make_roles(model, device, args.precision)
        kept.transformer.enable_gradient_checkpointing(keep_attention)
        compiled = None
        if not (args.quick or args.no_compile or args.profile):
            compiled = make_roles(model, device, args.precision)
            compile_blocks(compiled.transformer, several_shapes=True)
    sizes = {"small": (2, (2, 8, 8)), "large": (1, (3, 8, 8) if args.quick else (5, 32, 32))}
    for size, (samples, grid) in sizes.items():
        tokens = grid[0] * grid[1] * grid[2] // 4
        title = f"{size}: {samples} x {tokens} tokens, {args.device}, {args.precision}"
        batch = make_batch(samples, grid, device)
        if args.profile:
            profile(title, Lever("plain", eager), batch)
            continue
        levers = [
            Lever("plain", eager),
            Lever("--batched-guidance", eager, replace(RECIPE, batched_guidance=True)),
            Lever("--keep-attention", kept),
            Lever("--fused-lora", fused),
        ]
        if compiled is not None:
            levers.append(Lever("--compile", compiled))
        levers += [
            Lever(f"--attention-backend {name}", eager, attention=name)
            for name in trainable(args.device, args.precision)
            if name != NATIVE
        ]
        measure(levers, batch, rounds)
        report(title, levers)


if __name__ == "__main__":
    main()

"""What `--base-precision` does to the model and to what is learned from it: the toy, in numbers.

    python benchmarks/quantised_base.py            # a minute

On real latents and captions of the toy, beside the same in the unquantised fp32 or bf16: the
relative L2 distance of the velocity; and the cosine of the gradients that the generator (DMD) and
the critic get, all their weights as one vector, with the same LoRAs and the same noise. bf16 beside
fp32 shows what rounding that nobody minds does. Mean and smallest over the seeds.
"""

import argparse
import os
from collections.abc import Callable
from functools import cache
from statistics import mean

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from diffusers import AutoencoderKLWan
from toy_students import (
    HELD_OUT_SEED,
    LATENT_CHANNELS,
    embed_captions,
    encode_moments,
    normalise,
    render_clips,
    to_pixels,
    toy_folder,
)

from shared.models.spec import MAX_TEXT_TOKENS, read_model_spec
from train.data.batches import Batch
from train.functional.schedule import Schedule
from train.memory.quantize import quantise
from train.methods.dmd import Recipe, critic_step, generator_step
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles
from train.options import BasePrecision, Precision

CPU = torch.device("cpu")
SAMPLES = 4
LORA_SIZE = 0.02
"""Standard deviation of the LoRAs' weights: B is not zero, as after some updates."""


def build_roles(precision: Precision, stored: BasePrecision | None, seed: int) -> Roles:
    base = load_base(
        read_model_spec(toy_folder("toy")), "full", precision=precision, device=CPU,
        gradient_checkpointing=False,
    )  # fmt: skip
    targets = select_targets(base, ("q", "k", "v", "ffn.0", "ffn.2"))
    roles = Roles(base, LoraSpec(rank=8, alpha=4, targets=targets), seed=seed)
    quantise(base, stored, CPU)
    rng = torch.Generator().manual_seed(seed)
    for role in (GENERATOR, CRITIC):
        for weight in roles.parameters(role).values():
            weight.data.copy_(LORA_SIZE * torch.randn(weight.shape, generator=rng))
    return roles


@cache
def inputs(seed: int) -> tuple[Batch, torch.Tensor]:
    """Real clips with their captions, and the empty caption."""
    folder, every = toy_folder("toy"), render_clips.CAPTIONS
    captions = [every[(SAMPLES * seed + i) % len(every)] for i in range(SAMPLES)]
    embedded = embed_captions([*captions, ""], folder)
    text = torch.nn.functional.pad(embedded, (0, 0, 0, MAX_TEXT_TOKENS - embedded.shape[1]))
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    latents = []
    for number, caption in enumerate(captions):
        pixels = to_pixels(
            render_clips.render_clip(caption, HELD_OUT_SEED + SAMPLES * seed + number)[None]
        )
        latents.append(normalise(encode_moments(vae, pixels)[:, :LATENT_CHANNELS], vae))
    batch = Batch(
        update=seed, samples=tuple(range(SAMPLES)), keys=tuple(map(str, range(SAMPLES))),
        latents=torch.cat(latents).float(), text=text[:SAMPLES], condition=None,
    )  # fmt: skip
    return batch, text[SAMPLES]


def build_recipe(seed: int) -> Recipe:
    return Recipe(
        expert="full",
        schedule=Schedule(indices=(1000, 750, 500, 250), shift=5.0, boundary=None),
        start="noise", pairing="renoise", score_floor="boundary", maths="corrected",
        real_guidance_scale=3.0, fake_guidance_scale=0.0, fm_loss_weight=0.0, score_strata=SAMPLES,
        batched_guidance=False, seed=seed,
    )  # fmt: skip


def velocity(roles: Roles, batch: Batch, seed: int) -> torch.Tensor:
    """Of the teacher, at noise levels from almost all to almost none."""
    sigma = torch.linspace(0.95, 0.1, SAMPLES)
    at = sigma.view(-1, 1, 1, 1, 1)
    noise = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(seed))
    x_t = at * noise + (1 - at) * batch.latents
    with torch.no_grad(), roles.teacher():
        return roles.velocity(x_t, 1000 * sigma, batch.text, None)


def gradient(roles: Roles, role: str, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    with roles.role(role):
        parts = torch.autograd.grad(loss(), list(roles.parameters(role).values()))
    return torch.cat([part.flatten() for part in parts]).double()


def measured(precision: Precision, stored: BasePrecision | None, seed: int) -> list[torch.Tensor]:
    """Velocity, gradients of generator and critic."""
    roles, (batch, negative) = build_roles(precision, stored, seed), inputs(seed)
    recipe = build_recipe(seed)
    return [
        velocity(roles, batch, seed).double().flatten(),
        gradient(roles, GENERATOR, lambda: generator_step(roles, recipe, batch, negative).loss),
        gradient(roles, CRITIC, lambda: critic_step(roles, recipe, batch).loss),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    print(
        "| computed in | base | velocity, relative L2 | generator's gradient | critic's gradient |"
    )
    print("|---|---|---|---|---|")
    rounded = ("bf16", None, "no")
    pairs = [(p, s, p) for p in ("no", "bf16") for s in ("int8", "fp8", "nf4")]
    whole = {p: [measured(p, None, seed) for seed in seeds] for p in ("no", "bf16")}
    for precision, stored, beside in (rounded, *pairs):
        far, cosines = [], ([], [])
        for seed in seeds:
            other = measured(precision, stored, seed) if stored else whole[precision][seed]
            exact = whole[beside][seed]
            far.append(float((other[0] - exact[0]).norm() / exact[0].norm()))
            for found, one, two in zip(cosines, other[1:], exact[1:], strict=True):
                found.append(float(torch.nn.functional.cosine_similarity(one, two, dim=0)))
        shown = " | ".join(f"{mean(c):.4f} (least {min(c):.4f})" for c in cosines)
        name = {"no": "fp32"}
        print(
            f"| {name.get(precision, precision)} | {stored or precision} beside "
            f"{name.get(beside, beside)} | {mean(far):.4f} (most {max(far):.4f}) | {shown} |"
        )


if __name__ == "__main__":
    main()

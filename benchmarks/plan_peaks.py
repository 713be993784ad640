"""Peaks of whole updates at true sizes, without the memory, beside what `wantrain plan` says.

    python benchmarks/plan_peaks.py [--model wan2.1-t2v-1.3b] [--layers 4] [--no-checkpointing]
    python benchmarks/plan_peaks.py --vae     # encoding and decoding by its VAE, at 480p and 720p

The real transformer, LoRAs, losses and optimizers run on torch's fake tensors, which have shapes
and no data; the bytes of all storages that are alive are counted. So this is what the tensors need,
not what a GPU's allocator and libraries take.
"""

import argparse
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared.format.buckets import Bucket
from shared.models.spec import MAX_TEXT_TOKENS, ModelSpec, read_model_spec
from shared.models.wan import CLIP_TOKENS, PUBLISHED, write_configs
from train.data.batches import Batch
from train.functional.schedule import Schedule
from train.memory.estimate import Settings, estimate_of, tokens_of
from train.memory.options import MemoryOptions
from train.methods.dmd import Recipe, critic_step, generator_step
from train.model.base import keep_from_autocast
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles

TARGETS = ("q", "k", "v", "ffn.0", "ffn.2")
GIB = 2**30


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage from the operation that makes it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was there before."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += self._sizes[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.see(leaf)
        return out


def peak_of_updates(
    roles: Roles, recipe: Recipe, batch: Batch, negative: torch.Tensor
) -> dict[str, int]:
    """Role → most bytes alive in its second update, from rollout to optimizer step."""
    live = LiveBytes()
    transformer = roles.transformer
    given = [batch.latents, batch.text, batch.condition, batch.image, batch.noised, negative]
    for tensor in [*transformer.parameters(), *transformer.buffers(), *given]:
        if tensor is not None:
            live.see(tensor)
    optimizers = {r: torch.optim.AdamW(roles.parameters(r).values()) for r in (CRITIC, GENERATOR)}
    peaks = {}
    with live:
        for role in (CRITIC, GENERATOR) * 2:  # moments are there from the second on
            live.peak = live.now
            if role == CRITIC:
                loss = critic_step(roles, recipe, batch).loss
            else:
                loss = generator_step(roles, recipe, batch, negative).loss
            with roles.role(role):
                loss.backward()
            del loss
            optimizers[role].step()
            optimizers[role].zero_grad(set_to_none=True)
            peaks[role] = live.peak
    return peaks


def batch_of(spec: ModelSpec, grid: tuple[int, ...], *, samples: int, text: int) -> Batch:
    """Empty tensors of the shapes that a batch has."""
    channels = spec.latent_channels
    i2v = (samples, spec.family.mask_channels + channels, *grid)
    return Batch(
        update=0,
        samples=tuple(range(samples)),
        keys=("key",) * samples,
        latents=torch.zeros(samples, channels, *grid),
        text=torch.zeros(samples, MAX_TEXT_TOKENS, text, dtype=torch.bfloat16),
        condition=torch.zeros(i2v) if spec.given_frames else None,
        image=None
        if spec.image_dim is None
        else torch.zeros(samples, CLIP_TOKENS * len(spec.given_frames), spec.image_dim),
        noised=torch.ones(samples, 1, grid[0], 1, 1) if spec.mode == "ti2v" else None,
    )


def recipe_of(spec: ModelSpec) -> Recipe:
    """The default one, of the low-noise expert or the only one."""
    return Recipe(
        expert="low" if spec.two_experts else "full",
        schedule=Schedule(indices=(1000, 750, 500, 250), shift=5.0, boundary=spec.boundary),
        start="latents" if spec.two_experts else "noise",
        pairing="renoise",
        score_floor="boundary",
        real_guidance_scale=6.0,
        fake_guidance_scale=0.0,
        maths="corrected",
        fm_loss_weight=0.0,
        batched_guidance=False,
        score_strata=1,
        seed=1,
    )


def with_fake_weights(transformer: nn.Module) -> None:
    """Weights and buffers of a transformer on the meta device, bf16 base and fp32 LoRA, faked."""
    kept: set[str] = set(transformer._keep_in_fp32_modules)  # type: ignore[arg-type]
    for prefix, module in transformer.named_modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                full = f"{prefix}.{name}"
                whole = "lora_" in full or kept & set(full.split("."))
                empty = torch.empty(weight.shape, dtype=torch.float32 if whole else torch.bfloat16)
                module._parameters[name] = nn.Parameter(empty, weight.requires_grad)
        for name, value in module._buffers.items():
            if value is not None:
                module._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
    keep_from_autocast(transformer, torch.device("cpu"))


@torch.inference_mode()
def print_vae_peaks(vae: Mapping[str, Any], frames: int) -> None:
    """GB of all tensors while a clip is encoded, or decoded, by number format and size."""
    stride = vae.get("scale_factor_spatial", 8)
    for dtype in (torch.float32, torch.bfloat16):
        for height, width in ((480, 832), (720, 1280)):
            with FakeTensorMode():
                torch.set_default_dtype(dtype)
                model = AutoencoderKLWan.from_config(dict(vae))
                grid = (frames + 3) // 4, height // stride, width // stride
                given = {
                    "encode": torch.zeros(1, 3, frames, height, width),
                    "decode": torch.zeros(1, vae["z_dim"], *grid),
                }
                torch.set_default_dtype(torch.float32)
                for direction, tensor in given.items():
                    live = LiveBytes()
                    for one in [*model.parameters(), tensor]:
                        live.see(one)
                    with live:
                        getattr(model, direction)(tensor)
                    print(f"{dtype} {width}x{height} {direction}: {live.peak / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=PUBLISHED, default="wan2.1-t2v-1.3b")
    parser.add_argument("--layers", type=int, help="fewer than the model has, to be done sooner")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--size", default="480x832")
    parser.add_argument("--frames", type=int, default=81)
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--vae", action="store_true", help="the peaks of its VAE in their place")
    given = parser.parse_args()
    if given.vae:
        print_vae_peaks(PUBLISHED[given.model].vae, given.frames)
        return
    with tempfile.TemporaryDirectory() as folder:
        write_configs(PUBLISHED[given.model], Path(folder))
        spec = read_model_spec(Path(folder))
    config = PUBLISHED[given.model].transformer_config()
    config["num_layers"] = given.layers or config["num_layers"]
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(config)
    memory = MemoryOptions(gradient_checkpointing=not given.no_checkpointing)
    settings = Settings(samples=1, rank=given.rank, target_name=TARGETS, roles=2, memory=memory)
    height, width = map(int, given.size.split("x"))
    bucket = Bucket(height, width, given.frames)
    grid = bucket.latent_shape(spec.latent_channels, spec.stride)[1:]
    said = estimate_of(transformer, spec.mode, tokens_of(grid, spec), settings)
    transformer.patch_embedding.to(torch.bfloat16)  # by which Roles knows what to compute in
    if memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    targets = select_targets(transformer, TARGETS)
    roles = Roles(transformer, LoraSpec(rank=given.rank, alpha=32, targets=targets), seed=1)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with_fake_weights(transformer)
        batch = batch_of(spec, grid, samples=1, text=config["text_dim"])
        negative = torch.zeros(MAX_TEXT_TOKENS, config["text_dim"], dtype=torch.bfloat16)
        peaks = peak_of_updates(roles, recipe_of(spec), batch, negative)
    print(f"{given.model} ({config['num_layers']} blocks) {bucket}, rank {given.rank}")
    for name, part in said.parts.items():
        print(f"  {name}: {part / GIB:.2f} GiB")
    print(f"plan    {said.total / GIB:.2f} GiB")
    for role, peak in peaks.items():
        print(f"counted {role}: {peak / GIB:.2f} GiB")
    print(f"plan / counted: {said.total / max(peaks.values()):.3f}")


if __name__ == "__main__":
    main()

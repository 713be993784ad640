"""Updates as scripts without a cache train them, to compare with: everything in every step.

Each update decodes a clip and encodes it, its condition and its caption; teacher, generator and
critic are a model each. The maths of the steps is `wantrain distill`'s own.
"""

import json
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import decord
import torch

from preprocess.encode.encoders import LatentEncoder, TextEncoder
from preprocess.media.decode import fit
from shared.cli.config_command import configuration
from train.cli.app import app
from train.data.batches import Batch, pad_text, with_mask
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import Roles
from train.prepare import prepare_distillation
from train.run import Run
from train.tracking.step_log import peak_memory


class ThreeModels:
    """What `train.methods.dmd` asks of `Roles`, with a model each."""

    def __init__(self, models: dict[str, Roles]) -> None:
        self._models, self._active = models, "teacher"

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        before, self._active = self._active, name
        try:
            yield
        finally:
            self._active = before

    def teacher(self) -> Any:
        return self.role("teacher")

    def generator(self) -> Any:
        return self.role("generator")

    def critic(self) -> Any:
        return self.role("critic")

    def velocity(self, *inputs: Any) -> torch.Tensor:
        own = self._models[self._active]
        with own.teacher() if self._active == "teacher" else own.role(self._active):
            return own.velocity(*inputs)


class Encoders:
    """VAE and text encoder beside the transformers, as such scripts hold them."""

    def __init__(self, run: Run, clips: Path, vae_dtype: torch.dtype) -> None:
        self._device = torch.device(run.device)
        device = run.device
        self._family = run.spec.family
        self._text = TextEncoder(run.spec, dtype=torch.bfloat16, device=device)
        self._vae = LatentEncoder(run.spec, dtype=vae_dtype, device=device)
        self._given = run.spec.given_frames
        (self._bucket,) = run.data.buckets
        self._clips = sorted(clips.glob("*.mp4"))
        self.modules = (self._text._model, self._vae._vae)

    def caption(self, text: str) -> torch.Tensor:
        """(tokens, D). A clone: autograd keeps no tensors of inference mode."""
        return pad_text(self._text.encode(text), self._family.text_tokens).clone().to(self._device)

    def batch(self, update: int) -> Batch:
        """One clip, from its file."""
        clip = self._clips[update % len(self._clips)]
        read = decord.VideoReader(str(clip)).get_batch(list(range(self._bucket.frames)))
        frames = fit(read.asnumpy(), self._bucket)
        condition = None
        if self._given:
            (encoded, *_) = self._vae.condition(frames).values()
            encoded = encoded[None].clone().to(self._device)
            condition = with_mask(encoded, self._family.mask_channels, self._given)
        return Batch(
            update=max(update, 0),
            samples=(0,),
            keys=(clip.stem,),
            latents=self._vae.latents(frames)[None].clone().to(self._device),
            text=self.caption(clip.with_suffix(".txt").read_text())[None],
            condition=condition,
        )


def train(run: Run, clips: Path, vae_dtype: torch.dtype) -> dict[str, Any]:
    """One cycle after one update that warms up. Seconds by role, and bytes."""
    config, device = run.config, torch.device(run.device)
    models = {}
    for name in ("teacher", "generator", "critic"):
        transformer = load_base(
            run.spec,
            run.objective.expert,
            precision=config.mixed_precision,
            device=device,
            gradient_checkpointing=config.gradient_checkpointing,
        )
        targets = select_targets(transformer, config.targets)
        lora = LoraSpec(rank=config.rank, alpha=config.network_alpha, targets=targets)
        names = () if name == "teacher" else (name,)
        models[name] = Roles(transformer, lora, seed=1, names=names)
        transformer.to(device)
    three: Any = ThreeModels(models)
    optimizers = {
        name: torch.optim.AdamW(models[name].parameters(name).values(), lr=1e-5)
        for name in ("generator", "critic")
    }
    encoders = Encoders(run, clips, vae_dtype)
    negative = encoders.caption("")
    encoding: list[float] = []
    by_role: dict[str, list[float]] = {}
    for update in range(-1, run.cycle):
        began = _now(device)
        batch = encoders.batch(update)
        encoded = _now(device)
        role = run.objective.role_of(max(update, 0))
        step = run.objective.loss(three, role, batch, negative)
        with models[role].role(role):
            step.loss.backward()
        torch.nn.utils.clip_grad_norm_(models[role].parameters(role).values(), 0.05)
        optimizers[role].step()
        optimizers[role].zero_grad(set_to_none=True)
        if update >= 0:
            encoding.append(encoded - began)
            by_role.setdefault(role, []).append(_now(device) - began)
    modules = (*(roles.transformer for roles in models.values()), *encoders.modules)
    return {
        "by_role": {role: statistics.median(times) for role, times in by_role.items()},
        "encode": statistics.mean(encoding),
        "peak": peak_memory(device),
        "weights": sum(p.nbytes for module in modules for p in module.parameters()),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure(
    options: list[str], clips: Path, result: Path, vae_dtype: torch.dtype = torch.float32
) -> None:
    """Train in-loop with options of `wantrain distill`; write what was found as JSON."""
    run = prepare_distillation(configuration(app, ["distill", *options]))
    result.write_text(json.dumps(train(run, clips, vae_dtype)))

"""One transformer of the model, loaded to sample with; and what a run of it needs of a device."""

import gc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from shared.errors import UserError
from shared.io.hashing import digest_of
from shared.models.original_layout import is_original
from shared.models.spec import ModelSpec, blocks_of
from train.memory.block_offload import stream_blocks, streaming_line
from train.memory.estimate import Estimate, Settings, estimate_of, tokens_of
from train.memory.options import ForwardOnly
from train.memory.quantize import check_installed, quantise
from train.model.attention import check_attention, use_attention
from train.model.base import Base, base_digest, component_of, load_base
from train.model.custom_weights import empty_transformer
from train.model.lora_adapter import LoraSpec
from train.model.lora_source import ScaledLora
from train.model.roles import Roles
from train.options import Expert
from train.synthesis.clips import Group
from train.synthesis.config import SynthesizeConfig

_NO_LORA = LoraSpec(rank=1, alpha=1, targets=())


def bases_of(config: SynthesizeConfig, spec: ModelSpec) -> dict[Expert, Base]:
    """The weights of each expert, as the options say. UserError where they don't fit the model."""
    given: dict[Expert, tuple[Any, Any, str]] = {
        "high": (config.transformer_high_path, config.high_lora, "high"),
        "low": (config.transformer_path, config.low_lora, "low"),
    }
    if not spec.two_experts:
        for value, option in (
            (config.transformer_high_path, "--transformer-high-path"),
            (config.high_lora, "--high-lora"),
        ):
            if value:
                raise UserError(
                    f"{option}: {spec.folder} has one transformer and no high-noise expert. Use "
                    f"{option.replace('high-', '').replace('--lora', '--low-lora')}."
                )
        given = {"full": given["low"]}
    bases: dict[Expert, Base] = {}
    for expert, (own, loras, name) in given.items():
        merged = tuple(ScaledLora.parse(text, f"--{name}-lora") for text in loras or ())
        base = Base(own=own, merged=merged)
        bases[expert] = base.fetched(config.model, spec, component_of(expert))
    return bases


def identity_of(config: SynthesizeConfig, spec: ModelSpec, bases: Mapping[Expert, Base]) -> Any:
    """What a fingerprint's `synthesis` says of the weights and how they are computed with."""
    digests = [
        base_digest(spec.folder, component_of(expert), Base(own=base.own))
        for expert, base in bases.items()
    ]
    loras = [
        {"expert": expert, "digest": lora.digest, "strength": lora.strength}
        for expert, base in bases.items()
        for lora in base.merged
    ]
    return {
        "model": digests[0] if len(digests) == 1 else digest_of(digests),
        "loras": loras,
        "mode": "t2v" if config.train_mode == "normal" else spec.mode,
        "compute": "fp32" if config.mixed_precision == "no" else "bf16",
        "base_precision": config.base_precision,
    }


def check_here(config: ForwardOnly, device: str) -> None:
    """UserError for what can't be computed here, before weights are read."""
    check_installed(config.base_precision)
    check_attention(config.attention_backend, device, config.mixed_precision)


@contextmanager
def loaded(
    config: ForwardOnly,
    spec: ModelSpec,
    expert: Expert,
    base: Base,
    device: torch.device,
    say: Callable[[str], None],
) -> Iterator[Roles]:
    """The expert on the device, without adapters; its memory is free again after the block."""
    memory = config.memory
    transformer: Any = load_base(
        spec,
        expert,
        precision=memory.mixed_precision,
        device=device,
        gradient_checkpointing=False,
        base=base,
    )
    use_attention(transformer, config.attention_backend)
    quantise(transformer, memory.base_precision, device)
    if streamed := memory.streamed(len(blocks_of(transformer))):
        say(streaming_line([stream_blocks(transformer, streamed, device)]))
    transformer.to(device)
    roles = Roles(transformer, _NO_LORA, seed=0, names=())
    del transformer
    try:
        with torch.no_grad():
            yield roles
    finally:
        del roles
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def needed(config: SynthesizeConfig, spec: ModelSpec, groups: list[Group]) -> Estimate | None:
    """Of the largest group; None for models in Wan's original layout."""
    if is_original(spec.folder) or not groups:
        return None
    samples = max(len(group.clips) for group in groups)
    doubled = config.batched_guidance and config.guidance not in (0, 1)
    shapes = (g.bucket.latent_shape(spec.latent_channels, spec.stride)[1:] for g in groups)
    settings = Settings(
        samples=samples * (2 if doubled else 1),
        rank=0,
        target_name=(),
        roles=0,
        memory=config.memory,
    )
    transformer = empty_transformer(spec, spec.expert_folders[-1])
    most = max(tokens_of(shape, spec) for shape in shapes)
    return estimate_of(transformer, spec.mode, most, settings)

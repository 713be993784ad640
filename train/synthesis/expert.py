"""The transformers that sample, and what they need of a device."""

from collections.abc import Mapping
from typing import Any

from shared.errors import UserError
from shared.io.hashing import digest_of
from shared.models.original_layout import is_original
from shared.models.spec import ModelSpec
from train.memory.estimate import Estimate, Settings, estimate_of, tokens_of
from train.model.base import Base, base_digest, component_of
from train.model.custom_weights import empty_transformer
from train.model.lora_source import ScaledLora
from train.options import Expert
from train.synthesis.clips import Group
from train.synthesis.config import SynthesizeConfig


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

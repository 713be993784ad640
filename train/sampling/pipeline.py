"""A diffusers pipeline from a model, weights of other files and LoRAs, on its device.

The only module of this stage that builds a text encoder, and with `decode` a VAE: in processes that
train nothing.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import UniPCMultistepScheduler

from shared.cli.checks import check_writable
from shared.device import chosen_device, take_device
from shared.errors import UserError
from shared.format.schema import DTYPES
from shared.models import weights
from shared.models.pixels import tile_if_full
from shared.models.processors import load_image_processor, load_tokenizer
from shared.models.spec import ModelSpec, blocks_of
from train.memory.block_offload import StreamedBlocks, streaming_line
from train.memory.quantize import check_installed, quantise
from train.model.base import Base, base_digest, component_of, load_weights, merge
from train.model.lora_files import LoraFile, check_fits_model, read_lora
from train.model.peft_config import PEFT_METADATA_KEY
from train.sampling.config import PipelineConfig
from train.saving.lora_formats import DIFFUSERS_PREFIX, to_form
from train.saving.provenance import (
    Provenance,
    check_expert,
    check_pair,
    read_provenance,
    wrong_base,
)


@dataclass(frozen=True)
class TrainedLora:
    """A LoRA file and what it says about its training."""

    file: LoraFile
    provenance: Provenance

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def component(self) -> str:
        """The transformer that it is for."""
        return component_of(self.provenance.expert)


def read_loras(paths: Sequence[Path], spec: ModelSpec) -> list[TrainedLora]:
    """Read the files, in any form; UserError when they don't fit the model or one another."""
    # Provenance first: the tensors may be large
    trained = [(path, read_provenance(path)) for path in paths]
    loras = [TrainedLora(read_lora(path), provenance) for path, provenance in trained]
    check_pair(trained)
    first = loras[0]
    frames = {"i2v": "without --last-image", "flf2v": "wantrain sample with --last-image FILE"}
    if first.provenance.mode != spec.mode and {first.provenance.mode, spec.mode} <= frames.keys():
        raise UserError(
            f"--lora: {first.path} was trained for {first.provenance.mode}, and this is "
            f"{spec.mode}. Use it {frames[first.provenance.mode]}."
        )
    if first.provenance.mode != spec.mode:
        raise UserError(
            f"--lora: {first.path} was trained for {first.provenance.mode}, the model "
            f"{spec.folder} is {spec.mode}."
        )
    check_expert(first.path, first.provenance.expert, spec)
    for lora in loras:
        check_fits_model(lora.file, spec, lora.component)
        if lora.file.lora.diffs:
            raise UserError(
                f"--lora: {lora.path} changes whole weights ({next(iter(lora.file.lora.diffs))}), "
                "which no adapter can. Merge it (wantrain merge), or leave them out: wantrain "
                "export --drop-extras"
            )
    return loras


def open_pipeline(
    config: PipelineConfig,
    spec: ModelSpec,
    loras: Sequence[TrainedLora],
    *,
    from_image: bool,
    output: Path,
    say: Callable[..., None],
) -> Any:
    """The pipeline with the LoRAs, on its device, as the options ask for it.

    UserError, before weights are loaded, for what does not fit, or if nothing can be written to
    `output`; warns of what may be a mistake.
    """
    experts = [lora.provenance.expert for lora in loras]
    bases = _bases(config, spec, single="full" in experts)
    for component, base in bases.items():
        for line in filter(None, (base.describe(), *base.notes())):
            say(f"base     {component}: {line}")
    for lora in loras:
        found = base_digest(spec.folder, lora.component, bases[lora.component])
        wrong = wrong_base(lora.path, lora.provenance, found, str(spec.folder))
        for warning in filter(None, (lora.file.note, wrong)):
            say(f"warning  {warning}", style="yellow")
    if spec.two_experts and len(experts) == 1 and experts != ["full"]:
        student = loras[0].provenance.method == "distill"
        say(
            f"warning  only the {experts[0]}-noise expert has a LoRA; the other runs "
            f"{'undistilled' if student else 'without one'}. Give both with --lora … --lora …",
            style="yellow",
        )
    check_installed(config.base_precision)
    device_name = chosen_device(config.device)
    take_device(device_name)
    check_writable("--output", output)
    device = torch.device(device_name)

    # On the CPU: VAE in fp32, the rest as asked; a `full` LoRA leaves the second expert out.
    kind = spec.family.load_class("image_pipeline" if from_image else "pipeline")
    transformers.utils.logging.disable_progress_bar()  # ours follows; two would tear each other
    parts = _weighty_parts(spec, DTYPES[config.dtype], bases)
    pipeline = kind(**parts, **_light_parts(spec, parts, from_image=from_image))
    for component, base in bases.items():
        merge(getattr(pipeline, component), base.merged, device)
    for lora in loras:
        _apply(lora, getattr(pipeline, lora.component))
    pipeline.set_progress_bar_config(disable=True)

    place(pipeline, config, device, say)
    tile_if_full(pipeline.vae, say)
    return pipeline


def _bases(config: PipelineConfig, spec: ModelSpec, *, single: bool) -> dict[str, Base]:
    """Component → its weights. `single`: the first runs every step (a `full` LoRA).

    Raises UserError for weights of an expert that takes no part, or that don't fit.
    """
    base = Base.parse(config.transformer_path, config.base_lora)
    base_high = Base.parse(config.transformer_high_path, config.base_lora_high)
    if spec.two_experts and not single:
        bases = {"transformer": base_high, "transformer_2": base}
    elif found := base_high.describe():
        raise UserError(
            f"--transformer-high-path, --base-lora-high: found {found}, but one transformer "
            "runs every step here. Leave out -high."
        )
    else:
        bases = {"transformer": base}
    for component, own in bases.items():
        own.check(spec, component)
    return bases


def _apply(lora: TrainedLora, transformer: Any) -> None:
    """Add a LoRA of any form to the transformer, as an adapter that is named after its expert.

    Read by us and handed over in diffusers' own form: what diffusers makes of the others is not the
    same. It fails at kohya's where a layer of a block is left out, and multiplies A by the strength
    of ComfyUI's, which rounds in bf16.
    """
    tensors, needed = to_form(lora.file.lora, "diffusers")
    transformer.load_lora_adapter(
        tensors,
        prefix=DIFFUSERS_PREFIX.removesuffix("."),
        adapter_name=lora.provenance.expert,
        metadata=json.loads(needed[PEFT_METADATA_KEY]),
        low_cpu_mem_usage=True,  # takes the tensors as they are, in the file's dtype
    )


def place(
    pipeline: Any, config: PipelineConfig, device: torch.device, say: Callable[[str], None]
) -> None:
    """Quantise the transformers if so asked, and bring the pipeline, on the CPU, to `device`.

    With `low_vram` the blocks of transformers (LoRAs too) and text encoder stream, and what is
    outside of them comes and goes with its component. UserError where memory can't be locked.
    """
    experts = [e for e in (pipeline.transformer, pipeline.transformer_2) if e is not None]
    for transformer in experts:
        quantise(transformer, config.base_precision, device)
    if config.low_vram:
        stacks = [*map(blocks_of, experts), pipeline.text_encoder.encoder.block]
        streamed = [StreamedBlocks(list(stack.requires_grad_(False)), device) for stack in stacks]
        say(streaming_line(streamed))
    if config.low_vram or config.offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)


def _weighty_parts(
    spec: ModelSpec, dtype: torch.dtype, bases: Mapping[str, Base]
) -> dict[str, Any]:
    """All of a pipeline that has weights, by name. None is loaded by diffusers' pipeline, which
    would leave out what it has no place for. Raises UserError."""
    parts = {
        component: load_weights(spec, component, dtype=dtype, own=base.own)
        for component, base in bases.items()
    }
    others = {"text_encoder": dtype, "vae": torch.float32}
    if spec.image_dim is not None:  # in fp32, as the shards' embeddings were computed
        others["image_encoder"] = torch.float32
    for component, own in others.items():
        parts[component] = weights.load_component(spec.family, spec.folder, component, dtype=own)
    return parts


def _light_parts(
    spec: ModelSpec, weighty: Mapping[str, Any], *, from_image: bool
) -> dict[str, Any]:
    """The rest of a pipeline, by name. The second expert is left out where it is none of the parts.
    Raises UserError."""
    two_experts = "transformer_2" in weighty
    parts: dict[str, Any] = {
        "tokenizer": load_tokenizer(spec.folder),
        "scheduler": teacher_scheduler(spec.flow_shift),
        "boundary_ratio": spec.boundary if two_experts else None,
        "expand_timesteps": spec.mode == "ti2v",
        **({} if two_experts else {"transformer_2": None}),
    }
    if from_image and spec.image_dim is None:
        parts |= {"image_encoder": None, "image_processor": None}
    elif from_image:
        size = weighty["image_encoder"].config.image_size
        kind = transformers.CLIPImageProcessor
        parts["image_processor"] = load_image_processor(kind, spec.folder, size)
    return parts


def teacher_scheduler(shift: float) -> UniPCMultistepScheduler:
    """Wan's usual sampler, at the shift that LoRAs are trained with."""
    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


@contextmanager
def loras_off(pipeline: Any) -> Iterator[None]:
    """A block in which the pipeline is its base model, to the bit."""
    experts = [e for e in (pipeline.transformer, pipeline.transformer_2) if e is not None]
    adapted = [expert for expert in experts if hasattr(expert, "peft_config")]
    for expert in adapted:
        expert.disable_lora()
    try:
        yield
    finally:
        for expert in adapted:
            expert.enable_lora()
            expert.requires_grad_(False)  # peft makes what it enables trainable

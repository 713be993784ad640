"""A LoRA file's metadata about its training: for `wantrain sample`, and for other tools.

Three dialects in a file's metadata, all of strings: ours, one JSON object with everything; kohya's
`ss_…`, which ComfyUI's and web UIs' LoRA lists show; and `modelspec.…`, the standard of model hubs.
None holds a date: equal runs give equal files.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError, first_line
from shared.models.spec import Mode, ModelSpec
from shared.version import VERSION
from train.functional.schedule import Schedule
from train.methods.base import Method
from train.model.lora_source import read_metadata
from train.optim.optimizers import CLASSES
from train.options import Expert, OptimizerName, Pairing

METADATA_KEY = "wandistill"
SAMPLERS = {"renoise": "LCM", "euler": "Euler"}
TITLES = {"high": "high-noise expert", "low": "low-noise expert", "full": "all steps"}
# A pair of experts works one trajectory together, so these must be the same in both files. Plain
# LoRAs go with any shift, so it is no reason to refuse them.
AGREEING = ("method", "denoising_step_indices_list", "flow_shift", "boundary", "pairing", "mode")
# kohya's name → ours, in `Provenance.recipe`.
_SAME = ("seed", "learning_rate", "lr_warmup_steps", "max_grad_norm", "mixed_precision")
_SS_RECIPE = {f"ss_{name}": name for name in (*_SAME, "gradient_accumulation_steps")} | {
    "ss_batch_size_per_device": "train_batch_size"
}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """How a LoRA was trained, and what sampling needs to reproduce it."""

    method: Method
    expert: Expert
    mode: Mode
    denoising_step_indices_list: tuple[float, ...]
    """Of `distill`; of `lora` empty: it goes with any steps."""
    flow_shift: float
    boundary: float | None
    pairing: Pairing | None
    """Of `distill`; of `lora` None."""
    base: str
    """Digest of the transformer that it was trained on."""
    cache: dict[str, Any]
    """What it was trained on: `digest` of the shards, their `fingerprint`, `samples`, `buckets`."""
    rank: int
    alpha: float
    updates: int
    """Of the LoRA itself; of `distill` a critic's come on top."""
    recipe: dict[str, Any]
    """The other settings of the run, for people."""
    version: str = VERSION
    gauges: dict[str, float] | None = None
    """Contrast, motion, variety at the end (`train.tracking.gauges`), where they are known."""

    @property
    def schedule(self) -> Schedule:
        return Schedule(
            indices=self.denoising_step_indices_list, shift=self.flow_shift, boundary=self.boundary
        )

    @property
    def name(self) -> str:
        """What its files are called, the form apart."""
        return f"lora-{self.expert}"

    def facts(self) -> dict[str, Any]:
        """The fields that are known, for JSON."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name != "gauges" or value is not None
        }

    def to_json(self) -> str:
        return json.dumps(self.facts(), sort_keys=True)

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Provenance":
        """From what `asdict` or JSON gave. KeyError or TypeError when it is something else."""
        # Fields that a later version adds are not ours to understand.
        known = {name: stored[name] for name in cls.__dataclass_fields__ if name != "gauges"}
        known["denoising_step_indices_list"] = tuple(known["denoising_step_indices_list"])
        return cls(**known, gauges=stored.get("gauges"))  # earlier ones had none

    def metadata(self) -> dict[str, str]:
        """All metadata about training, whatever the form of the tensors."""
        return {METADATA_KEY: self.to_json()} | dict(self._kohya()) | dict(self._model_spec())

    def _kohya(self) -> Iterator[tuple[str, str]]:
        yield "ss_network_module", "networks.lora_wan"  # musubi-tuner's, whose form kohya's is
        yield "ss_network_dim", str(self.rank)
        yield "ss_network_alpha", f"{self.alpha:g}"
        yield "ss_base_model_version", self.family
        yield "ss_output_name", self.name
        yield "ss_steps", str(self.updates)
        yield "ss_num_train_items", str(self.cache["samples"])
        eight_bit = self.recipe.get("use_8bit_adam")
        name: OptimizerName = "adamw8bit" if eight_bit else self.recipe.get("optimizer", "adamw")
        yield "ss_optimizer", CLASSES[name]
        yield "ss_training_comment", f"wandistill {self.version}"
        for theirs, ours in _SS_RECIPE.items():
            if ours in self.recipe:
                yield theirs, str(self.recipe[ours])

    def _model_spec(self) -> Iterator[tuple[str, str]]:
        yield "modelspec.sai_model_spec", "1.0.0"
        yield "modelspec.architecture", f"{self.family}/lora"
        yield "modelspec.implementation", f"https://github.com/Wan-Video/{self.family.title()}"
        yield "modelspec.title", f"{self.name}, {self.family} {self.mode}, {TITLES[self.expert]}"
        if self.cache["buckets"]:
            height, width = max(
                (tuple(bucket[:2]) for bucket in self.cache["buckets"]), key=lambda s: s[0] * s[1]
            )
            yield "modelspec.resolution", f"{width}x{height}"
        switch = round(1000 * (self.boundary or 0))
        ranges = {"high": f"{switch},1000", "low": f"0,{switch}", "full": "0,1000"}
        yield "modelspec.timestep_range", ranges[self.expert]
        yield "modelspec.usage_hint", self._usage()

    def _usage(self) -> str:
        if self.pairing is None:
            return f"steps, CFG and sampler of the base model; trained at shift {self.flow_shift:g}"
        steps = ", ".join(f"{t:.1f}" for t in self.schedule.timesteps)
        return (
            f"{len(self.schedule.indices)} steps at timesteps {steps} (shift "
            f"{self.flow_shift:g}), CFG 1, sampler {SAMPLERS[self.pairing]}"
        )

    @property
    def family(self) -> str:
        # No config says its version; two experts and ti2v came with 2.2.
        return "wan2.2" if self.boundary is not None or self.mode == "ti2v" else "wan2.1"


def wrong_base(path: Path, provenance: Provenance, found: str, model: str) -> str | None:
    """A warning where the LoRA in `path` was trained on other weights than `found`, the model's."""
    if found == provenance.base:
        return None
    trained = provenance.recipe.get("base")
    cure = f". It was trained on: {trained}" if trained else ""
    return (
        f"{path} was trained on other weights than {model} holds "
        f"({provenance.base[:12]}… against {found[:12]}…){cure}"
    )


def check_pair(loras: Sequence[tuple[Path, Provenance]]) -> None:
    """UserError unless they are for one expert, or for two that were trained for one another."""
    experts = [provenance.expert for _, provenance in loras]
    if len(set(experts)) != len(experts) or ("full" in experts and len(experts) > 1):
        raise UserError(
            f"--lora: found experts {', '.join(experts)}; expected one, or a high and a low one."
        )
    (first, one), *others = loras
    for path, other in others:
        for field in AGREEING:
            if field == "flow_shift" and one.method == "lora":
                continue
            a, b = getattr(one, field), getattr(other, field)
            if a != b:
                raise UserError(
                    f"--lora: {first} and {path} were trained apart: {field} is {a!r} "
                    f"in the first and {b!r} in the second. Train both with the same value."
                )


def check_expert(path: Path, expert: Expert, spec: ModelSpec) -> None:
    """UserError where a LoRA is for one of two experts and the model has but one transformer."""
    if expert != "full" and not spec.two_experts:
        raise UserError(
            f"--lora: {path} is for the {expert}-noise expert, but {spec.folder} has only one "
            "transformer. Use the model that it was trained on."
        )


def read_provenance(path: Path) -> Provenance:
    """The provenance in a LoRA file of any form. UserError when it is no such file."""
    metadata = read_metadata(path)
    if METADATA_KEY not in metadata:
        raise UserError(
            f"LoRA: {path} has no training metadata ({METADATA_KEY!r}), "
            "so its steps can't be reproduced. Expected a file that `wantrain distill` or `lora` "
            "wrote; other LoRAs are merged into the base: --base-lora FILE (or "
            "--base-lora-high), with --teacher or the LoRA that was trained on it."
        )
    try:
        return Provenance.of(json.loads(metadata[METADATA_KEY]))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"LoRA: the {METADATA_KEY!r} metadata of {path} is damaged ({first_line(error)}). "
            "Expected a file that `wantrain` wrote; write it again from its checkpoint."
        ) from error

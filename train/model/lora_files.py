"""LoRAs of others and ours, in any of the forms that Wan LoRAs come in, under global names.

Read are the names of diffusers and peft (`transformer.blocks.0.attn1.to_q.lora_A.weight`), Wan's
own as ComfyUI has them (`diffusion_model.blocks.0.self_attn.q.lora_down.weight`) and kohya's
(`lora_unet_blocks_0_self_attn_q.lora_down.weight`, VideoX-Fun's with two underscores), whatever
wrapper a trainer put before them. Where the strength alpha is written differs: a tensor beside the
pair, peft's configuration in the metadata or in a file of its own, or nowhere, which all readers
take for alpha = rank. Beside the pairs there may be differences of whole weights: `.diff` of a
weight, `.diff_b` of a bias, `.diff_m` of a modulation, as ComfyUI and lightx2v have them.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shared.errors import UserError
from shared.models.family import Family, star_block
from shared.models.spec import FAMILIES, ModelSpec, family_of_layers
from train.model.custom_weights import empty_transformer
from train.model.lora_names import Form, Parsed, parse
from train.model.lora_source import lora_files, opened, peft_config_of
from train.model.peft_config import PEFT_METADATA_KEY, Pair, peft_alphas

# What else is found in files that are called LoRAs.
_OTHER_KINDS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "a DoRA"),
    (re.compile(r"\.(lokr|hada|oft|boft)_"), "a LoKr, LoHa or OFT"),
    (re.compile(r"lora_mid"), "a LoCon with a third matrix"),
    (re.compile(r"lora_(te|unet_(down|mid|up|input|output)_)"), "a LoRA of another model than Wan"),
    (
        re.compile(r"(base_layer|modules_to_save(\.[\w-]+)?)\.(weight|bias)$"),
        "a LoRA with whole weights that were trained, too (bias, modules_to_save)",
    ),
)
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class LoraWeights:
    """An adapter, free of any file's form: W + (alpha / rank)·B·A for each module."""

    weights: Mapping[str, torch.Tensor]
    """`blocks.0.attn1.to_q.lora_A.weight` (rank, in), `….lora_B.weight` (out, rank), any dtype; of
    a convolution (rank, in, *kernel) and (out, rank, 1, …)."""
    alphas: Mapping[str, float]
    """Module, e.g. `blocks.0.attn1.to_q`, → its alpha; its rank is that of its matrices."""
    diffs: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Weight of the transformer, e.g. `blocks.0.norm2.bias`, → what is added to it, any dtype."""

    @classmethod
    def uniform(cls, weights: Mapping[str, torch.Tensor], alpha: float) -> "LoraWeights":
        """With one alpha for all modules, as our own are."""
        modules = {name.rsplit(".lora_", 1)[0] for name in weights}
        return cls(weights=weights, alphas=dict.fromkeys(modules, float(alpha)))

    @property
    def family(self) -> Family:
        """The one whose transformer has all its modules."""
        return family_of_layers(self.alphas)

    @property
    def modules(self) -> list[str]:
        """The adapted modules: blocks in their order, layers by name; then those outside."""
        blocks = self.family.blocks

        def place(name: str) -> tuple[float, str]:
            number = star_block(name, blocks)[1]
            return float(number or math.inf), name

        return sorted(self.alphas, key=place)

    @property
    def extras(self) -> list[str]:
        """What is no pair on a linear layer of a block, and so no part of an adapter of ours."""
        outside = [module for module in self.modules if not self.family.has_layer(module)]
        return outside + sorted(self.diffs)

    def without_extras(self) -> "LoraWeights":
        """Only the pairs on linear layers of blocks."""
        kept = {m: alpha for m, alpha in self.alphas.items() if self.family.has_layer(m)}
        pairs = {n: w for n, w in self.weights.items() if n.rsplit(".lora_", 1)[0] in kept}
        return LoraWeights(weights=pairs, alphas=kept)

    @property
    def changed(self) -> list[str]:
        """The weights of the transformer to which it adds something."""
        return list(dict.fromkeys([*(f"{module}.weight" for module in self.modules), *self.diffs]))

    def down(self, module: str) -> torch.Tensor:
        """A, (rank, in)."""
        return self.weights[f"{module}.lora_A.weight"]

    def up(self, module: str) -> torch.Tensor:
        """B, (out, rank)."""
        return self.weights[f"{module}.lora_B.weight"]

    def rank(self, module: str) -> int:
        return self.down(module).shape[0]

    @property
    def width(self) -> int:
        """Of the hidden states: the feed-forward layers are wider inside."""
        sides = ((self.down(m).shape[1], self.up(m).shape[0]) for m in self.without_extras().alphas)
        return min(map(min, sides))

    def scale(self, module: str) -> float:
        """alpha / rank: what B·A is multiplied by."""
        return self.alphas[module] / self.rank(module)

    def to(self, dtype: torch.dtype) -> "LoraWeights":
        """The same on the CPU in another dtype, free of any graph."""

        def cast(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}

        return replace(self, weights=cast(self.weights), diffs=cast(self.diffs))

    def delta(
        self, module: str, strength: float = 1.0, device: torch.device | None = None
    ) -> torch.Tensor:
        """What a pair adds, (out, in) in fp32: strength·(alpha / rank)·B·A."""
        up, down = (
            part.to(device).float().flatten(1) for part in (self.up(module), self.down(module))
        )
        return (up @ down).mul_(strength * self.scale(module))


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What one file holds."""

    path: Path
    form: Form
    lora: LoraWeights
    metadata: Mapping[str, str]
    """As it stands in the file."""
    alpha_assumed: bool
    """The file has no alpha; the rank was assumed, which is a strength of 1."""
    for_transformer_2: bool
    """Its names begin with `transformer_2.`: a LoRA of the low-noise expert."""

    @property
    def note(self) -> str | None:
        """What to print about it, if anything."""
        if not self.alpha_assumed:
            return None
        alpha, rank = (self.metadata.get(f"ss_network_{name}") for name in ("alpha", "dim"))
        told = ""
        if alpha != rank and alpha is not None:
            # musubi-tuner's converter multiplies alpha into the matrices and keeps the metadata.
            told = (
                f". Its metadata has alpha {alpha} of rank {rank}, which converters multiply into "
                "the matrices; if this one did not: wantrain export --alpha"
            )
        return (
            f"{self.path} has no alpha; alpha = rank is assumed (strength 1), as in diffusers "
            f"and ComfyUI{told}"
        )

    def added_to(
        self,
        name: str,
        weight: torch.Tensor,
        strength: float,
        *,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """A weight of the transformer that is `changed` with all that is added to it, in fp32.

        UserError where it can't be held in `dtype`.
        """
        before, lora = weight.to(device).float(), self.lora
        total = before
        if (module := name.removesuffix(".weight")) != name and module in lora.alphas:
            total = lora.delta(module, strength, device).reshape(weight.shape).add_(total)
        if name in lora.diffs:
            total = lora.diffs[name].to(device).float().mul(strength).add_(total)
        if not total.to(dtype).isfinite().all() and before.isfinite().all():
            raise UserError(
                f"LoRA: {self.path} at strength {strength:g} makes {_shown(name)} infinite. "
                "Take a smaller strength, or check its alpha."
            )
        return total


def read_lora(path: Path, alpha: float | None = None) -> LoraFile:
    """Read a LoRA in any form, its tensors on the CPU in the dtypes that the file has.

    `path`: a file, a folder of peft or diffusers, or an index. `alpha`: of every pair, in place of
    what is written. Raises UserError for what cannot be read, holds anything that is not understood
    or no finite number, lacks half of a pair, or whose shapes, ranks and alphas contradict one
    another.
    """
    files = lora_files(path)
    tensors: dict[str, torch.Tensor] = {}
    metadata: dict[str, str] = {}
    for file in files:
        with opened(file) as opened_file:
            tensors |= {key: opened_file.get_tensor(key) for key in opened_file.keys()}  # noqa: SIM118
            metadata |= opened_file.metadata() or {}
    family = min(FAMILIES, key=lambda one: sum(parse(key, one) is None for key in tensors))
    parsed = {key: parse(key, family) for key in tensors}
    if unknown := [key for key, found in parsed.items() if found is None]:
        raise _not_understood(path, unknown, len(tensors), family)
    known = {key: found for key, found in parsed.items() if found is not None}
    form = _form(path, known)
    parts = _by_module(path, known, tensors)
    _check_finite(path, tensors, known)
    pairs = {module: held for module, held in parts.items() if held.keys() - {"diff", "diff_b"}}
    for module, held in pairs.items():
        _check_pair(path, module, held, family)
    in_file = {found.module: found.name for found in known.values()}
    if alpha is not None:
        alphas, assumed = dict.fromkeys(pairs, float(alpha)), False
    else:
        alphas, assumed = _alphas(path, files, metadata, pairs, in_file)
    lora = LoraWeights(
        weights={
            f"{module}.{part}.weight": held[part]
            for module, held in pairs.items()
            for part in ("lora_A", "lora_B")
        },
        alphas=alphas,
    )
    return LoraFile(
        path=path,
        form=form,
        lora=replace(lora, diffs=_diffs(lora, parts, family)),
        metadata=metadata,
        alpha_assumed=assumed,
        for_transformer_2=any(found.low_noise for found in known.values()),
    )


def check_fits(lora: LoraFile, shapes: Mapping[str, torch.Size], model: str) -> None:
    """UserError unless each module is in a transformer, in the LoRA's shape.

    `shapes`: the shapes of the transformer's weights by diffusers' names; `model`: what to call it.
    """
    held = lora.lora
    lost = [name for name in held.changed if name not in shapes]
    if lost:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UserError(
            f"LoRA: {lora.path} adapts {_shown(lost[0].removesuffix('.weight'))}{more}, which "
            f"{model} does not have. Use the model that the LoRA was trained on."
        )

    def refuse(what: str, found: Iterable[int], expected: Iterable[int]) -> None:
        raise UserError(
            f"LoRA: {lora.path} adapts {_shown(what)} as a weight of shape {list(found)}; {model} "
            f"has {list(expected)}. Use the model that the LoRA was trained on."
        )

    for module in held.modules:
        expected = shapes[f"{module}.weight"]
        found = (held.up(module).shape[0], *held.down(module).shape[1:])
        # A convolution's pair may be flat, as for all but its output a linear layer's is.
        flat = (found[0], math.prod(found[1:])) == (expected[0], math.prod(expected[1:]))
        if found != tuple(expected) and not (flat and len(expected) > 2):
            refuse(module, found, expected)
    for name, diff in held.diffs.items():
        if diff.shape != shapes[name]:
            refuse(name, diff.shape, shapes[name])


def check_fits_model(lora: LoraFile, spec: ModelSpec, component: str) -> None:
    """UserError unless it fits one of a model's transformers, whose weights need not be there."""
    model = empty_transformer(spec, component)
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    check_fits(lora, shapes, f"the {component} of {spec.folder}")


def _shown(module: str) -> str:
    """A module, or a weight of one, by both of its names: the file's reader may know either."""
    whole, dot, last = module.rpartition(".")
    module, dot, last = (whole, dot, last) if last in ("weight", "bias") else (module, "", "")
    original = next((f.original(module) for f in FAMILIES if f.has(module)), module)
    return f"{module}{dot}{last} ({original}{dot}{last})"


def _not_understood(path: Path, keys: list[str], total: int, family: Family) -> UserError:
    shown = ", ".join(sorted(keys)[:_SHOWN]) + (", …" if len(keys) > _SHOWN else "")
    kinds = [what for pattern, what in _OTHER_KINDS if any(map(pattern.search, keys))]
    if kinds:
        what = "it is " + " and ".join(kinds)
    elif any(".lora" in key for key in keys):
        what = "layers that a Wan transformer does not have"
    else:
        what = "names of no known form"
    return UserError(
        f"LoRA: {path}: {len(keys)} of its {total} tensors can't be used, {shown}: {what}. "
        "Expected pairs such as blocks.0.attn1.to_q.lora_A.weight and lora_B (diffusers, ComfyUI "
        "and kohya names), or differences of weights (.diff, .diff_b, .diff_m), on "
        f"{', '.join(family.lora_layers)}, norms, modulation, embeddings or head."
    )


def _form(path: Path, known: Mapping[str, Parsed]) -> Form:
    """The one that its names have. UserError where they have several, or there are none."""
    forms = {found.form: key for key, found in known.items() if found.form is not None}
    if len(forms) > 1 or not known:
        found = "; ".join(f"{form}: {key}" for form, key in sorted(forms.items()))
        raise UserError(
            f"LoRA: {path} holds {f'names of several forms ({found})' if found else 'no tensors'}. "
            "Expected a LoRA in diffusers', ComfyUI's or kohya's form."
        )
    return next(iter(forms), "comfyui")


def _by_module(
    path: Path, known: Mapping[str, Parsed], tensors: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, found in known.items():
        held = parts.setdefault(found.module, {})
        if found.part in held:
            both = ": transformer and transformer_2, one LoRA for each expert" * (
                len({one.low_noise for one in known.values()}) > 1
            )
            raise UserError(
                f"LoRA: {path} holds {found.part} of {found.module} twice{both}. Expected one LoRA "
                "of one transformer in a file."
            )
        held[found.part] = tensors[key]
    return parts


def _check_finite(
    path: Path, tensors: Mapping[str, torch.Tensor], known: Mapping[str, Parsed]
) -> None:
    """UserError for integers and for numbers that are not finite; alphas are checked apart."""
    weights = {key: tensor for key, tensor in tensors.items() if known[key].part != "alpha"}
    if other := [key for key, tensor in weights.items() if not tensor.is_floating_point()]:
        raise UserError(
            f"LoRA: {path}: {other[0]} holds {tensors[other[0]].dtype}; expected floats. It is "
            "quantised in a way that is not read: get it in bf16, fp16 or fp32."
        )
    if bad := [key for key, tensor in weights.items() if not tensor.float().isfinite().all()]:
        count = int((~tensors[bad[0]].float().isfinite()).sum())
        more = f", like {len(bad) - 1} more of its {len(weights)} tensors" if len(bad) > 1 else ""
        raise UserError(
            f"LoRA: {path}: {bad[0]} holds NaN or infinite values ({count} of "
            f"{tensors[bad[0]].numel()}){more}. Its "
            "training diverged: take an earlier save of it, or train again at a lower rate."
        )


def _check_pair(path: Path, module: str, held: Mapping[str, torch.Tensor], family: Family) -> None:
    for part, others in (("lora_A", "down"), ("lora_B", "up")):
        if part not in held:
            raise UserError(
                f"LoRA: {path} lacks {part} (lora_{others}) of {_shown(module)}; there is only "
                f"{', '.join(sorted(held))}. Its file is damaged: get it again."
            )
    down, up = held["lora_A"], held["lora_B"]
    fits = min(down.dim(), up.dim()) >= 2 and down.shape[0] == math.prod(up.shape[1:]) > 0
    if not fits or (family.has_layer(module) and (down.dim(), up.dim()) != (2, 2)):
        raise UserError(
            f"LoRA: {path}: {_shown(module)} has A of shape {list(down.shape)} and B of "
            f"{list(up.shape)}; expected (rank, in) and (out, rank). Its file is damaged: get it "
            "again."
        )


def _diffs(
    lora: LoraWeights, parts: Mapping[str, Mapping[str, torch.Tensor]], family: Family
) -> dict[str, torch.Tensor]:
    """Weight → what is added as a whole; zeros, which many files hold for norms, left out."""
    found: dict[str, torch.Tensor] = {}
    for module, held in parts.items():
        bare = star_block(module, family.blocks)[0] in family.bare_weights
        if "diff" in held:
            found[module if bare else f"{module}.weight"] = held["diff"]
        if "diff_b" in held:
            found[f"{module}.bias"] = held["diff_b"]
        if "lora_B.bias" in held:  # peft scales it as it scales B·A
            bias = held["lora_B.bias"].float() * lora.scale(module)
            found[f"{module}.bias"] = found.get(f"{module}.bias", 0) + bias
    return {name: diff for name, diff in found.items() if diff.float().any()}


def _alphas(
    path: Path,
    files: list[Path],
    metadata: Mapping[str, str],
    pairs: Mapping[str, Mapping[str, torch.Tensor]],
    in_file: Mapping[str, str],
) -> tuple[dict[str, float], bool]:
    """Module → alpha, and whether one was assumed. Raises UserError."""
    ranks = {m: Pair(held["lora_A"].shape[0], in_file[m]) for m, held in pairs.items()}
    by_config: Mapping[str, Any] = {}
    beside = peft_config_of(files)
    if PEFT_METADATA_KEY in metadata:
        where = f"the {PEFT_METADATA_KEY!r} metadata of {path}"
        by_config = peft_alphas(metadata[PEFT_METADATA_KEY], where, ranks)
    elif beside is not None:
        by_config = peft_alphas(beside.read_bytes(), str(beside), ranks)
    alphas: dict[str, float] = {}
    assumed = False
    for module, held in pairs.items():
        if "alpha" in held:
            alphas[module] = _alpha(path, module, held["alpha"])
        elif module in by_config:
            alphas[module] = _checked_alpha(path, module, by_config[module])
        else:
            alphas[module], assumed = float(ranks[module].rank), True
    return alphas, assumed


def _alpha(path: Path, module: str, alpha: torch.Tensor) -> float:
    if alpha.numel() != 1:
        raise UserError(
            f"LoRA: {path}: alpha of {_shown(module)} has shape {list(alpha.shape)}; expected one "
            "number. Its file is damaged: get it again."
        )
    return _checked_alpha(path, module, _as_meant(alpha))


def _as_meant(alpha: torch.Tensor) -> Any:
    """The number that a tensor was made of: 0.3 where fp32 holds 0.300000011920929.

    So that a LoRA has one strength, whichever of its forms is read, and each form gives the others.
    """
    if alpha.dtype != torch.float32:
        return alpha.item()
    return float(str(np.float32(alpha.item())))  # the shortest that is this one in fp32


def _checked_alpha(path: Path, module: str, alpha: Any) -> float:
    # Programs don't agree on zero: no effect in ComfyUI, strength 1 in kohya's tools.
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
    if not number or not math.isfinite(alpha) or alpha == 0:
        raise UserError(
            f"LoRA: {path}: alpha of {_shown(module)} is {alpha!r}; expected a number other than "
            "0. Get the file again, or write it with the right one: wantrain export --alpha"
        )
    return float(alpha)

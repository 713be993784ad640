"""`--init-lora`: a LoRA that exists, in any form, as the first weights of the one that is trained.

Exact for any smaller rank, any alpha and strength: the new A begins with the file's rows and keeps
its own random ones below, the new B has zeros against those, so they add nothing and still learn
(two zero matrices never would). Strength and the other alpha / rank are multiplied into B.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from shared.errors import UserError
from shared.models.family import split_layer
from shared.models.spec import ModelSpec
from train.model.custom_weights import empty_transformer
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.lora_files import LoraFile, check_fits_model, read_lora


def check_init(
    path: Path,
    spec: ModelSpec,
    component: str,
    *,
    rank: int,
    target_name: tuple[str, ...],
    skipped: tuple[str, ...] = (),
) -> LoraFile:
    """The file, if a LoRA of this rank on these layers can begin as it. Raises UserError."""
    file = read_lora(path)
    check_fits_model(file, spec, component)
    if extras := file.lora.extras:
        raise UserError(
            f"--init-lora: {path} changes more than linear layers of blocks, which a LoRA here "
            f"can't: {', '.join(extras[:3])}{f' and {len(extras) - 3} more' * (len(extras) > 3)}. "
            "Leave them out (wantrain export --drop-extras), or merge the file: --base-lora"
        )
    model = empty_transformer(spec, component)
    original = spec.family.original_layers
    held = list(dict.fromkeys(split_layer(module)[2] for module in file.lora.modules))
    if lost := [original[one] for one in held if one not in select_targets(model, target_name)]:
        raise UserError(
            f"--init-lora: {path} adapts {', '.join(lost)}, which --target-name "
            f"{','.join(target_name)} leaves out. Add {'it' if len(lost) == 1 else 'them'}: "
            f"--target-name {','.join((*target_name, *lost))}"
        )
    targets = select_targets(model, target_name, skipped)
    if lost := [original[one] for one in held if one not in targets]:
        raise UserError(
            f"--init-lora: {path} adapts {', '.join(lost)}, which --lora-skip-name "
            f"{','.join(skipped)} leaves out. Leave the option out, or choose another LoRA."
        )
    if (found := max(map(file.lora.rank, file.lora.modules))) > rank:
        first = next(m for m in file.lora.modules if file.lora.rank(m) == found)
        raise UserError(
            f"--init-lora: {path} has rank {found} at {first}, --rank is {rank}. A smaller one "
            f"can't hold it: --rank {found} or more."
        )
    return file


@torch.no_grad()
def start_from(
    file: LoraFile, parameters: Mapping[str, nn.Parameter], spec: LoraSpec, strength: float = 1.0
) -> None:
    """Fill a new adapter (B zero) so that it adds what the checked file adds at this strength.

    `parameters` under `train.model.lora_adapter`'s names, (rank, in) and (out, rank). Modules that
    the file does not have stay as they are. UserError where the strength is too great for fp32.
    """
    for module in file.lora.modules:
        rank = file.lora.rank(module)
        down = parameters[f"{module}.lora_A.weight"]
        up = parameters[f"{module}.lora_B.weight"]
        down[:rank].copy_(file.lora.down(module))
        factor = strength * file.lora.scale(module) / (spec.alpha / spec.rank)
        up[:, :rank].copy_(file.lora.up(module).float() * factor)
        if not up.isfinite().all():
            raise UserError(
                f"--init-lora: {file.path} at strength {strength:g} makes {module} infinite. Take "
                "a smaller strength, or check its alpha."
            )

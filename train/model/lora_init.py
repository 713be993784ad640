"""`--init-lora`: a LoRA that exists, in any form, as the first weights of the one that is trained.

Exact for any smaller rank and any alpha: the new A begins with the file's rows and keeps its own
random ones below, the new B has zeros against those, so they add nothing and still learn (two zero
matrices never would). The other strength alpha / rank is multiplied into B.
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
    path: Path, spec: ModelSpec, component: str, *, rank: int, target_name: tuple[str, ...]
) -> LoraFile:
    """The file, if a LoRA of this rank on these layers can begin as it. Raises UserError."""
    file = read_lora(path)
    check_fits_model(file, spec, component)
    targets = select_targets(empty_transformer(spec, component), target_name)
    for module in file.lora.modules:
        _, _, inside = split_layer(module)
        if inside not in targets:
            name = spec.family.original_layers[inside]
            raise UserError(
                f"--init-lora: {path} adapts {module} ({name}), which --target-name "
                f"{','.join(target_name)} leaves out. Add it: --target-name "
                f"{','.join((*target_name, name))}"
            )
        if (found := file.lora.rank(module)) > rank:
            raise UserError(
                f"--init-lora: {path} has rank {found} at {module}, --rank is {rank}. A smaller "
                f"one can't hold it: --rank {found} or more."
            )
    return file


@torch.no_grad()
def start_from(file: LoraFile, parameters: Mapping[str, nn.Parameter], spec: LoraSpec) -> None:
    """Fill a new adapter (B zero) so that it adds what the checked file adds.

    `parameters` under `train.model.lora_adapter`'s names, (rank, in) and (out, rank). Modules that
    the file does not have stay as they are.
    """
    for module in file.lora.modules:
        rank = file.lora.rank(module)
        down = parameters[f"{module}.lora_A.weight"]
        up = parameters[f"{module}.lora_B.weight"]
        down[:rank].copy_(file.lora.down(module))
        factor = file.lora.scale(module) / (spec.alpha / spec.rank)
        up[:, :rank].copy_(file.lora.up(module).float() * factor)

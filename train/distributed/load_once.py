"""A module that one process of the run reads, for strategies that shard it across all ranks.

The others make room for its parameters and never touch it, so it takes no memory: a page of the CPU
is there from its first use on. What shards the module fills it, part by part.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from train.distributed.process_group import Ranks


@dataclass(frozen=True)
class _Form:
    """What a module is beside the values of its parameters."""

    dtypes: Mapping[str, torch.dtype]
    """Of each parameter."""
    buffers: Mapping[str, torch.Tensor]
    """Tables of a few MB, whole."""

    @classmethod
    def of(cls, module: nn.Module) -> "_Form":
        dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        return cls(dtypes, dict(module.named_buffers()))

    def given_to(self, module: nn.Module) -> nn.Module:
        """`module`, of any dtypes and perhaps on the meta device, with room on the CPU."""
        room = {
            name: torch.empty(parameter.shape, dtype=self.dtypes[name])
            for name, parameter in module.named_parameters()
        }
        module.load_state_dict(room, assign=True, strict=False)
        for name, buffer in self.buffers.items():
            owner, _, own_name = name.rpartition(".")
            setattr(module.get_submodule(owner), own_name, buffer)
        return module.eval()


def read_once(
    ranks: Ranks, read: Callable[[], nn.Module], empty: Callable[[], nn.Module]
) -> nn.Module:
    """What `read` gives in the first of `ranks`; in the others the same, with any values in it.

    `read` gives a module on the CPU, in evaluation; `empty` one with the same names and shapes.
    What `read` raises ends all processes, and the first one raises it. All call this together.
    """
    own: list[nn.Module] = []

    def form() -> _Form:
        own.append(read())
        return _Form.of(own[0])

    layout = ranks.first_does(form)
    return own[0] if ranks.first else layout.given_to(empty())

"""DeepSpeed ZeRO: gradients and moments are sharded across ranks (2), and the base, too (3).

One engine over the transformer, with a parameter group for each role. Without DeepSpeed's own bf16
and fp16, which would cast the LoRAs; compute is under our autocast. Without its linear layer, too
(`train.distributed.zero_file`), which rounds otherwise.
"""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from shared.errors import UserError, first_line
from train.distributed.process_group import Ranks
from train.distributed.zero_file import zero_section
from train.model.roles import Roles
from train.optim.optimizers import OptimizerSettings
from train.strategies.base import Strategy

_MOMENTS = ("exp_avg", "exp_avg_sq")


class RoleAdamW(torch.optim.AdamW):
    """AdamW that steps only the active role's groups.

    DeepSpeed hands a role without gradients zeros, with which AdamW would still decay its weights
    and moments.
    """

    active: str | None = None

    def step(self, closure: Any = None) -> Any:
        groups = self.param_groups
        self.param_groups = [group for group in groups if group["role"] == self.active]
        try:
            return super().step(closure)
        finally:
            self.param_groups = groups


@dataclass(frozen=True)
class ZeroRole:
    """A role of which every process holds parts, in DeepSpeed's flat buffers."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    engine: Any
    adam: RoleAdamW
    stage: Literal[2, 3]

    def update(self, rate: float, max_norm: float) -> float:
        # Clipping is DeepSpeed's, with the max_norm that its engine was made with.
        for group in self.adam.param_groups:
            group["lr"] = rate
        self.adam.active = self.name
        if self.stage == 3:
            self._forget_idle_gradients()
        self.engine.step()
        return float(self.engine.get_global_grad_norm())  # inf where it refused to step

    def _forget_idle_gradients(self) -> None:
        """Stage 3 would count what a role left in its buffers in the norm of the next one."""
        optimizer = self.engine.optimizer
        for part, gradients in optimizer.averaged_gradients.items():
            group = self.adam.param_groups[optimizer.sub_group_to_group_id[part]]
            if group["role"] != self.name:
                for gradient in gradients:
                    gradient.zero_()

    def weights(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        if self.stage == 2:
            return {name: parameter.detach() for name, parameter in self.parameters.items()}
        return {name: safe_get_full_fp32_param(p) for name, p in self.parameters.items()}

    def moments(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        step = self._flat_states()[0]["step"]
        if not step:
            return {}
        moments = {}
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                moments[f"{name}/{moment}"] = safe_get_full_optimizer_state(parameter, moment)
            moments[f"{name}/step"] = step.clone()
        return moments

    def load(
        self, weights: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor]
    ) -> None:
        put = self._put_shard if self.stage == 3 else self._put_whole
        for name, parameter in self.parameters.items():
            put(parameter, None, weights[name].to(self.engine.device))
            for moment in _MOMENTS if moments else ():
                put(parameter, moment, moments[f"{name}/{moment}"].to(self.engine.device))
        if moments:
            (step,) = {float(v) for name, v in moments.items() if name.endswith("/step")}
            for state in self._flat_states():
                state["step"].fill_(step)

    @staticmethod
    def _put_whole(parameter: Any, moment: str | None, value: torch.Tensor) -> None:
        """Stage 2: a moment, or the weights (None), as forward passes and as AdamW have them."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if moment is not None:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            parameter.data.copy_(value)
            safe_set_full_fp32_param(parameter, value)

    @staticmethod
    def _put_shard(parameter: Any, moment: str | None, value: torch.Tensor) -> None:
        """The same in stage 3. DeepSpeed's own setters of whole values leave out what forward
        passes gather, and can't shard what the number of ranks doesn't divide."""
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        size, rank = parameter.ds_tensor.numel(), dist.get_rank()
        flat = value.flatten()
        padded = torch.nn.functional.pad(flat, (0, size * dist.get_world_size() - len(flat)))
        part = padded[rank * size : (rank + 1) * size]
        if moment is not None:
            safe_set_local_optimizer_state(parameter, part, moment)
            return
        safe_set_local_fp32_param(parameter, part)
        parameter.ds_tensor.copy_(part)
        if parameter.numel() == value.numel():  # gathered now: small ones stay so
            parameter.data.copy_(value)

    def _flat_states(self) -> list[dict[str, torch.Tensor]]:
        """Of the flat buffers that hold this role's parameters."""
        groups = _flat_groups(self.engine.optimizer, self.stage)
        roles = [group["role"] for group in self.adam.param_groups]
        return [self.adam.state[flat] for flat, group in groups if roles[group] == self.name]


def _flat_groups(optimizer: Any, stage: Literal[2, 3]) -> list[tuple[torch.Tensor, int]]:
    """DeepSpeed's fp32 buffers, each with the number of its parameter group."""
    if stage == 2:
        return [(flat, i) for i, flat in enumerate(optimizer.single_partition_of_fp32_groups)]
    groups = optimizer.sub_group_to_group_id
    return [(flat, groups[i]) for i, flat in enumerate(optimizer.fp32_partitioned_groups_flat)]


def partitioned(
    roles: Roles, rates: Mapping[str, float], settings: OptimizerSettings,
    *, stage: Literal[2, 3], ranks: Ranks, device: torch.device, accumulation: int,
    max_norm: float,
) -> Strategy:  # fmt: skip
    """The strategies `zero2` and `zero3`.

    Raises UserError where DeepSpeed is missing or its configuration file does not fit.
    """
    deepspeed = _deepspeed()
    section, notes = zero_section(stage)
    groups = [{"params": list(roles.parameters(role).values()), "role": role} for role in rates]
    optimizer = RoleAdamW(
        groups, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,  # nothing of DeepSpeed's counts samples
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": max_norm,
        "steps_per_print": 1 << 40,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": section,
    }
    if stage == 3:  # weight by weight, from the CPU: `initialize` would move the whole first
        deepspeed.zero.Init(module=roles.transformer, config_dict_or_path=config)
        for buffer in roles.transformer.buffers():
            buffer.data = buffer.to(device)
    engine, *_ = deepspeed.initialize(model=roles.transformer, optimizer=optimizer, config=config)
    ranks.time_all_groups()
    # Made now and not by the first step, so that a checkpoint can be loaded into them.
    for flat, _ in _flat_groups(engine.optimizer, stage):
        optimizer.state[flat] = {"step": torch.zeros(())} | {
            moment: torch.zeros_like(flat) for moment in _MOMENTS
        }
    zero_roles = {
        role: ZeroRole(role, roles.parameters(role), engine, optimizer, stage) for role in rates
    }
    if stage == 2:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        for (flat, _), role in zip(_flat_groups(engine.optimizer, 2), rates, strict=True):
            parameters = list(zero_roles[role].parameters.values())
            lazy_init_hp_params_optimizer_state(parameters, flat, optimizer.state)
    return Strategy(trained=zero_roles, backward=partial(_backward, engine), notes=notes)


def _backward(engine: Any, loss: torch.Tensor) -> None:
    # What DeepSpeed's engine does before a forward pass. Ours don't go through the engine,
    # which would take its own (disabled) autocast for ours.
    engine.optimizer.clear_backward_seen_flag()
    engine.backward(loss, scale_wrt_gas=False)
    if not engine.is_gradient_accumulation_boundary():
        engine.step()  # counts the micro-step; `update` makes the step of the last one


def _deepspeed() -> Any:
    on_cpu = not torch.cuda.is_available()
    if on_cpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed

        if on_cpu:  # else it would first compile a kernel for processes that share memory
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except ImportError as error:
        raise UserError(
            f"--strategy: zero2 and zero3 need DeepSpeed ({first_line(error)}). Install it: "
            "pip install 'wandistill[deepspeed]'; or use --strategy fsdp."
        ) from error
    # Of its own calls of torch, in every pass.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    return deepspeed

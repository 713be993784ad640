"""`wantrain distill`: set up, walk the updates, leave a checkpoint and LoRA files."""

from functools import partial

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from shared.errors import UserError
from shared.hashing import digest_of
from train.base import base_digest, component_of, load_base
from train.checkpoint import (
    RoleState,
    TrainState,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from train.config import DistillConfig, learning_rate
from train.data import Batch, MicroBatches, load_prompt_bank, micro_batches
from train.dmd import Recipe, critic_step, generator_step
from train.export import Provenance, write_loras
from train.lora import LoraSpec, select_targets
from train.progress import TrainProgress
from train.roles import CRITIC, GENERATOR, Roles
from train.run import prepare, run_identity
from train.stopping import StopOnSignal

DTYPES = {"bf16": torch.bfloat16, "no": torch.float32}


def distill(config: DistillConfig, console: Console) -> int | None:
    """Train until the end or a signal. Returns the signal's number, None at the end."""
    say = partial(console.print, highlight=False, soft_wrap=True)
    run = prepare(config)
    resume_from = find_checkpoint(config.output_dir, config.resume_from_checkpoint)
    for line in run.describe():
        say(line)

    # Base, adapters, optimizers
    device = torch.device(config.device)
    bank = load_prompt_bank(run.index)
    transformer = load_base(
        run.spec,
        run.recipe.expert,
        precision=config.mixed_precision,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    lora = LoraSpec(
        rank=config.rank,
        alpha=config.network_alpha,
        targets=select_targets(transformer, config.target_name),
    )
    roles = Roles(transformer, lora, seed=config.seed)
    state = TrainState({name: _role_state(roles, name, config) for name in (GENERATOR, CRITIC)})
    digest = base_digest(run.spec.folder / component_of(run.recipe.expert))
    identity = run_identity(run, lora, digest)

    if resume_from:
        for change in load_checkpoint(resume_from, state, identity):
            say(f"resume   changed since the checkpoint: {change}")
        say(f"resume   from {resume_from} at update {state.updates}")
    elif config.resume_from_checkpoint:
        say(f"resume   no checkpoint in {config.output_dir} yet: a new run")

    # Data, from the counter's position on
    dataset = MicroBatches(
        run.index,
        run.plan,
        run.spec,
        empty_text=bank.empty,
        caption_dropout=config.caption_dropout,
        accumulation=config.gradient_accumulation_steps,
        rank=0,
        world_size=1,
    )
    batches = micro_batches(
        dataset,
        start=state.updates,
        stop=run.updates,
        accumulation=config.gradient_accumulation_steps,
        workers=config.dataloader_num_workers,
    )

    # The loop
    negative = bank.negative.to(device)
    logs = SummaryWriter(str(config.output_dir / "logs"), purge_step=state.updates + 1)
    progress = TrainProgress(run.generator_updates, run.cycle, console, start=state.updates)
    saved_at = state.updates if resume_from else None
    with progress, logs, StopOnSignal() as stop:
        while state.updates < run.updates:
            update = state.updates
            role = run.role_of(update)
            role_state = state.roles[role]

            loss = 0.0
            keys: tuple[str, ...] = ()
            for _ in range(config.gradient_accumulation_steps):
                batch = next(batches).to(device)
                loss += _backward(roles, run.recipe, role, batch, negative, config)
                keys += batch.keys
            norm = torch.nn.utils.clip_grad_norm_(
                role_state.parameters.values(), config.max_grad_norm
            ).item()
            _refuse_not_finite(role, loss, norm, update, keys)

            rate = learning_rate(
                config.learning_rate if role == GENERATOR else config.learning_rate_critic,
                run.role_updates(role, update),
                config.lr_warmup_steps,
            )
            for group in role_state.optimizer.param_groups:
                group["lr"] = rate
            with stop.uninterrupted():
                role_state.optimizer.step()
                state.updates = update + 1
            role_state.optimizer.zero_grad(set_to_none=True)

            progress.step(role, loss, state.updates)
            for name, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", rate)):
                logs.add_scalar(f"{name}/{role}", value, state.updates)
            if state.updates % (run.cycle * config.checkpointing_steps) == 0:
                with stop.uninterrupted():
                    save_checkpoint(config.output_dir, state, identity, cycle=run.cycle)
                    saved_at = state.updates

    # What is left behind
    if saved_at != state.updates:
        saved = save_checkpoint(config.output_dir, state, identity, cycle=run.cycle)
        say(f"saved    {saved}")
    provenance = Provenance(
        expert=run.recipe.expert,
        mode=run.spec.mode,
        denoising_step_indices_list=run.recipe.schedule.indices,
        flow_shift=run.recipe.schedule.shift,
        boundary=run.spec.boundary,
        pairing=run.recipe.pairing,
        base=digest,
        rank=lora.rank,
        alpha=lora.alpha,
        generator_updates=state.updates // run.cycle,
        recipe={**identity.loose, "shards": digest_of(run.index.fingerprint)},
    )
    weights = state.roles[GENERATOR].parameters
    for path in write_loras(
        config.output_dir, weights, lora, provenance, DTYPES[config.save_precision]
    ):
        say(f"LoRA     {path}")
    return stop.signal if state.updates < run.updates else None


def _role_state(roles: Roles, name: str, config: DistillConfig) -> RoleState:
    parameters = roles.parameters(name)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate if name == GENERATOR else config.learning_rate_critic,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    return RoleState(parameters, optimizer)


def _backward(
    roles: Roles,
    recipe: Recipe,
    role: str,
    batch: Batch,
    negative: torch.Tensor,
    config: DistillConfig,
) -> float:
    """Add one micro-step's gradients; its share of the update's loss."""
    # `backward` runs inside the role: checkpointed blocks are recomputed with the active adapter.
    if role == GENERATOR:
        loss = generator_step(roles, recipe, batch, negative)
        with roles.generator():
            (loss / config.gradient_accumulation_steps).backward()
    else:
        loss = critic_step(roles, recipe, batch)
        with roles.critic():
            (loss / config.gradient_accumulation_steps).backward()
    return loss.item() / config.gradient_accumulation_steps


def _refuse_not_finite(
    role: str, loss: float, norm: float, update: int, keys: tuple[str, ...]
) -> None:
    if not torch.isfinite(torch.tensor([loss, norm])).all():
        raise UserError(
            f"training stopped before update {update + 1} touched the weights: {role} loss {loss}, "
            f"gradient norm {norm}; samples {', '.join(keys)}. Check these samples, lower the "
            "learning rate, or resume from the last checkpoint: --resume-from-checkpoint latest"
        )

"""A run: set up, walk the updates, leave a checkpoint and LoRA files."""

from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from shared import cli_support
from shared.errors import UserError
from shared.interrupt import Interrupted, Interruption, catch_signals
from shared.schema import DTYPES
from train.base import base_digest, component_of, load_base
from train.checkpoint import (
    Identity,
    RoleState,
    TrainState,
    checkpoint_name,
    find_checkpoint,
    load_checkpoint,
    remove_oldest,
    save_checkpoint,
    set_later_aside,
)
from train.config import TrainConfig, check_writable, learning_rate
from train.data import Batch, MicroBatches, PromptBank, load_prompt_bank
from train.ema import Ema
from train.export import write_loras
from train.lora import LoraSpec, select_targets
from train.lora_files import LoraWeights
from train.progress import TrainProgress
from train.provenance import Provenance
from train.roles import Roles
from train.run import Run, run_identity
from train.tail_log import TailLog


def train(run: Run, console: Console) -> int | None:
    """Train until the end or a signal. Returns the signal's number, None at the end."""
    say = partial(cli_support.say, console)
    config, objective = run.config, run.objective
    resume_from = find_checkpoint(
        config.output_dir,
        config.resume_from_checkpoint,
        on_damaged=lambda why: say(f"resume   {why}; an earlier one is taken"),
    )
    check_writable("--output-dir", config.output_dir)
    for line in run.describe():
        say(line)

    for note in config.base.notes():
        say(f"base     {note}")

    # Base, adapters, optimizers
    device = torch.device(config.device)
    bank = load_prompt_bank(run.data.first)
    digest = base_digest(run.spec.folder, component_of(objective.expert), config.base)
    transformer = load_base(
        run.spec,
        objective.expert,
        precision=config.mixed_precision,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
        base=config.base,
    )
    lora = LoraSpec(
        rank=config.rank,
        alpha=config.network_alpha,
        targets=select_targets(transformer, config.target_name),
    )
    rates = objective.learning_rates
    roles = Roles(transformer, lora, seed=config.seed, names=rates)
    state = TrainState({role: _role_state(roles, role, rates[role], config) for role in rates})
    if config.ema_decay:
        role = objective.product
        weights = state.roles[role].parameters
        state.ema = Ema.of(role, weights, decay=config.ema_decay, start=config.ema_start)
    identity = run_identity(run, lora, digest)

    if resume_from:
        for change in load_checkpoint(resume_from, state, identity):
            say(f"resume   changed since the checkpoint: {change}")
        say(f"resume   from {resume_from} at update {state.updates}")
        for path in set_later_aside(resume_from):
            say(f"resume   set aside the later {path.name}")
        if state.updates >= run.updates:
            say(
                f"resume   the run of {run.product_updates} {objective.product} updates is complete"
            )
    elif config.resume_from_checkpoint:
        say(f"resume   no checkpoint in {config.output_dir} yet: a new run")

    with catch_signals("stopping: saving the updates that are done ...") as signals:
        try:
            _train(run, roles, state, identity, bank, console, signals)
        except Interrupted:
            pass
        finally:
            # However it ended, state is that of the last whole update: keep it.
            with signals.deferred(raise_after=False):
                if state.updates > 0:
                    _leave_behind(run, state, lora, identity, say)
    return signals.signum if state.updates < run.updates else None


def micro_batches(run: Run, bank: PromptBank) -> MicroBatches:
    """The run's batches, for this process."""
    config = run.config
    return MicroBatches(
        run.data,
        run.plan,
        run.spec,
        empty_text=bank.empty,
        caption_dropout=config.caption_dropout,
        frame_crop=config.random_frame_crop,
        accumulation=config.gradient_accumulation_steps,
        rank=0,
        world_size=1,
    )


def _train(
    run: Run,
    roles: Roles,
    state: TrainState,
    identity: Identity,
    bank: PromptBank,
    console: Console,
    signals: Interruption,
) -> None:
    """Walk the updates from `state.updates` on, changing `state` once for each."""
    config, objective = run.config, run.objective
    device = torch.device(config.device)
    negative = bank.negative.to(device)
    batches = micro_batches(run, bank).ahead(
        start=state.updates, stop=run.updates, workers=config.dataloader_num_workers
    )
    tails = TailLog(config.output_dir, run.data, run.plan, start=state.updates)
    logs = SummaryWriter(str(config.output_dir / "logs"), purge_step=state.updates + 1)
    progress = TrainProgress(
        run.product_updates,
        run.cycle,
        console,
        title=objective.method,
        start=state.updates,
        device=device,
    )
    with closing(batches), progress, logs:
        while state.updates < run.updates:
            update = state.updates
            tails.begin(update)
            role = objective.role_of(update)
            role_state = state.roles[role]

            # Gradients of one update batch
            loss = 0.0
            keys: tuple[str, ...] = ()
            for _ in range(config.gradient_accumulation_steps):
                batch = next(batches).to(device)
                loss += _backward(run, roles, role, batch, negative)
                keys += batch.keys
            norm = torch.nn.utils.clip_grad_norm_(
                role_state.parameters.values(), config.max_grad_norm
            ).item()
            _refuse_not_finite(role, loss, norm, update, keys)

            # The optimizer step
            rate = learning_rate(
                objective.learning_rates[role],
                objective.role_updates(role, update),
                config.lr_warmup_steps,
            )
            for group in role_state.optimizer.param_groups:
                group["lr"] = rate
            with signals.deferred():
                role_state.optimizer.step()
                state.updates = update + 1
                if state.ema is not None and role == objective.product:
                    state.ema.update(role_state.parameters, state.updates // run.cycle)
            role_state.optimizer.zero_grad(set_to_none=True)

            # What a watcher sees, and what survives a kill -9
            progress.step(role, loss, state.updates)
            for name, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", rate)):
                logs.add_scalar(f"{name}/{role}", value, state.updates)
            if state.updates % (run.cycle * config.checkpointing_steps) == 0:
                with signals.deferred():
                    _save(run, state, identity)


def _leave_behind(
    run: Run,
    state: TrainState,
    lora: LoraSpec,
    identity: Identity,
    say: Callable[[str], None],
) -> None:
    """A checkpoint of the last update, unless there is one, and the LoRA files."""
    folder = run.config.output_dir
    if not (folder / checkpoint_name(state.updates, run.cycle)).exists():
        say(f"saved    {_save(run, state, identity)}")
    told = identity.product["provenance"]
    provenance = Provenance.of({**told, "updates": state.updates // run.cycle})
    weights = state.ema.weights if state.ema else state.roles[run.objective.product].parameters
    product = LoraWeights.uniform(weights, lora.alpha).to(DTYPES[run.config.save_precision])
    for path in write_loras(folder, product, provenance):
        say(f"LoRA     {path}")


def _save(run: Run, state: TrainState, identity: Identity) -> Path:
    """A checkpoint, and the oldest deleted where there are more than wanted; its path."""
    saved = save_checkpoint(run.config.output_dir, state, identity, cycle=run.cycle)
    if run.config.checkpoints_total_limit is not None:
        remove_oldest(run.config.output_dir, run.config.checkpoints_total_limit)
    return saved


def _role_state(roles: Roles, role: str, rate: float, config: TrainConfig) -> RoleState:
    parameters = roles.parameters(role)
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    return RoleState(parameters, optimizer)


def _backward(run: Run, roles: Roles, role: str, batch: Batch, negative: torch.Tensor) -> float:
    """Add one micro-step's gradients; its share of the update's loss."""
    loss = run.objective.loss(roles, role, batch, negative)
    share = loss / run.config.gradient_accumulation_steps
    with roles.role(role):  # checkpointed blocks are recomputed with the adapter active here
        share.backward()
    return share.item()


def _refuse_not_finite(
    role: str, loss: float, norm: float, update: int, keys: tuple[str, ...]
) -> None:
    if not torch.isfinite(torch.tensor([loss, norm])).all():
        raise UserError(
            f"training stopped before update {update + 1} touched the weights: {role} loss {loss}, "
            f"gradient norm {norm}; samples {', '.join(keys)}. Check these samples, lower the "
            "learning rate, then go on from the update before: --resume-from-checkpoint latest"
        )

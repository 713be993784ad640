"""The loop: walk the updates, and leave a checkpoint and LoRA files however it ends."""

import math
import signal
from contextlib import closing, nullcontext
from functools import partial

import torch
from rich.console import Console
from torch.utils.tensorboard import SummaryWriter

from shared import cli_support
from shared.errors import UserError
from shared.interrupt import Interrupted, Interruption, catch_signals
from train.config import learning_rate
from train.data import Batch, MicroBatches, PromptBank
from train.progress import TrainProgress
from train.ranks import joined
from train.run import Run
from train.session import Session, open_session
from train.tail_log import TailLog


class NotFiniteError(UserError):
    """A loss or gradient that must not reach the weights; all processes see it together."""


def train(run: Run, console: Console) -> int | None:
    """Train until the end or a signal. Returns the signal's number, None at the end.

    Every process of the run calls it; the first one writes and speaks.
    """
    ranks = run.ranks
    console = console if ranks.first else Console(quiet=True)
    with joined(ranks, torch.device(run.config.device)):
        session = open_session(run, partial(cli_support.say, console))
        state, stopped_by = session.state, None
        # One process can save whatever ended it: its state is that of the last whole update. Of
        # several, one that failed alone is not there to save with the others.
        together = ranks.world_size == 1
        with catch_signals("stopping: saving the updates that are done ...") as signals:
            try:
                _walk(session, console, signals)
                together = True
            except Interrupted as stopped:
                together, stopped_by = True, stopped.signum
            except NotFiniteError as error:
                together = True
                raise error if ranks.first else SystemExit(1) from error
            finally:
                with signals.deferred(raise_after=False):
                    if together and state.updates > 0:
                        session.leave_behind()
    return stopped_by if state.updates < run.updates else None


def _walk(session: Session, console: Console, signals: Interruption) -> None:
    """Walk the updates from `state.updates` on, changing the state once for each."""
    run, state = session.run, session.state
    config, objective, ranks = run.config, run.objective, run.ranks
    device = torch.device(config.device)
    negative = session.bank.negative.to(device)
    batches = micro_batches(run, session.bank).ahead(
        start=state.updates, stop=run.updates, workers=config.dataloader_num_workers
    )
    tails = (
        TailLog(config.output_dir, run.data, run.plan, start=state.updates) if ranks.first else None
    )
    progress = TrainProgress(
        run.product_updates,
        run.cycle,
        console,
        title=objective.method,
        start=state.updates,
        device=device,
    )
    with (
        closing(batches),
        progress,
        _logs(run, state.updates) if ranks.first else nullcontext() as logs,
        # Several processes stop together, after an update that all know of.
        nullcontext() if ranks.world_size == 1 else signals.deferred(raise_after=False),
    ):
        while state.updates < run.updates:
            update = state.updates
            if tails is not None:
                tails.begin(update)
            role = objective.role_of(update)
            trained = state.roles[role]

            # Gradients of one update batch
            loss = 0.0
            keys: tuple[str, ...] = ()
            for _ in range(config.gradient_accumulation_steps):
                batch = next(batches).to(device)
                loss += _backward(session, role, batch, negative)
                keys += batch.keys
            loss, stopping = ranks.mean((loss, signals.signum or 0))

            # The optimizer step
            rate = learning_rate(
                objective.learning_rates[role],
                objective.role_updates(role, update),
                config.lr_warmup_steps,
            )
            if not math.isfinite(loss):
                raise _not_finite(run, role, update, keys, f"loss {loss}")
            with signals.deferred():
                norm = trained.update(rate, config.max_grad_norm)
                if not math.isfinite(norm):
                    why = f"loss {loss}, gradient norm {norm}"
                    raise _not_finite(run, role, update, keys, why)
                state.updates = update + 1
                if config.ema_decay and role == objective.product:
                    weights = trained.weights()
                    if state.ema is not None:
                        state.ema.update(weights, state.updates // run.cycle)

            # What a watcher sees, and what survives a kill -9
            progress.step(role, loss, state.updates)
            if logs is not None:
                for name, value in (("loss", loss), ("grad_norm", norm), ("learning_rate", rate)):
                    logs.add_scalar(f"{name}/{role}", value, state.updates)
            if state.updates % (run.cycle * config.checkpointing_steps) == 0:
                with signals.deferred():
                    session.save()
            if stopping and ranks.world_size > 1:
                raise Interrupted(signals.signum or signal.SIGTERM)


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
        rank=run.ranks.rank,
        world_size=run.ranks.world_size,
    )


def _backward(session: Session, role: str, batch: Batch, negative: torch.Tensor) -> float:
    """Add one micro-step's gradients; its share of the update's loss."""
    loss = session.run.objective.loss(session.roles, role, batch, negative)
    share = loss / session.run.config.gradient_accumulation_steps
    with session.roles.role(
        role
    ):  # checkpointed blocks are recomputed with the adapter active here
        session.strategy.backward(share)
    return share.item()


def _logs(run: Run, updates: int) -> SummaryWriter:
    return SummaryWriter(str(run.config.output_dir / "logs"), purge_step=updates + 1)


def _not_finite(
    run: Run, role: str, update: int, keys: tuple[str, ...], found: str
) -> NotFiniteError:
    """The error to raise in every process; `keys` are the samples of this one."""
    samples = ", ".join(key for of_one in run.ranks.gathered(keys) for key in of_one)
    return NotFiniteError(
        f"training stopped before update {update + 1} touched the weights: {role} {found}; "
        f"samples {samples}. Check these samples, lower the learning rate, then go on from the "
        "update before: --resume-from-checkpoint latest"
    )

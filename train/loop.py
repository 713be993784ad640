"""The training loop: all updates, and a checkpoint and LoRA files however it ends."""

import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import get_type_hints

import torch
from rich.console import Console

from shared.cli import support
from shared.cli.library_log import library_log
from shared.cli.run_file import RUN_FILE, write_run_file
from shared.errors import UserError
from shared.interrupt import Interrupted, Interruption, catch_signals
from train.config import DistillConfig, FinetuneConfig, TrainConfig
from train.data.batches import Batch, MicroBatches, PromptBank, load_prompt_bank
from train.data.tail_log import TailLog
from train.distributed.process_group import joined
from train.methods.finetune import Finetuning
from train.methods.step_output import StepOutput, together
from train.optim.lr_checks import FirstSteps
from train.optim.lr_schedule import learning_rate
from train.options import names
from train.out_of_memory import explained
from train.page.run_page import PAGE, RunPage
from train.run import Run
from train.saving.output_lock import hold_folder
from train.session import Session, open_session
from train.tracking.gauges import Gauges, teacher_samples
from train.tracking.held_out import RECORD, HeldOut
from train.tracking.metrics_file import METRICS, MetricsFile
from train.tracking.progress import TrainProgress
from train.tracking.step_log import StepLog
from train.tracking.trackers import Tracker, chosen, open_trackers
from train.tracking.validation import Validation, prepare_validation, weights_in_place


class NotFiniteError(UserError):
    """A loss or gradient that must not reach the weights; all processes see it together."""


def train(run: Run, console: Console, *, keep: bool = True) -> int | None:
    """Train until the end or a signal. Returns the signal's number, None at the end.

    Every process of the run calls it; the first one writes files and prints. `keep`: leave a
    checkpoint and LoRA files, however it ends.
    """
    with joined(run.ranks, torch.device(run.device)) as noticed:
        return train_joined(run, console, noticed, keep=keep)


def train_joined(
    run: Run,
    console: Console,
    noticed: Callable[[], None],
    *,
    keep: bool = True,
    begun: Callable[[], None] = lambda: None,
) -> int | None:
    """`train` in processes that `joined` has brought together, and given `noticed`.

    `begun`: called by the first process once nothing can be refused any more.
    """
    ranks = run.ranks
    console = console if ranks.first else Console(quiet=True)
    with ExitStack() as held:
        ranks.first_does(partial(_hold_folders, held, run, console))
        validation = validation_of(run)  # refuses before weights are read
        measured = held_out_of(run)
        with explained(run):
            session = open_session(run, partial(support.say, console))
        ranks.first_does(partial(leave_run_file, run, run.config))
        ranks.first_does(begun)
        state, stopped_by = session.state, None
        page = RunPage(run, state, session.say, writes=ranks.first and keep)
        # Several stop together, after an update that all have agreed on. When one fails, they can't
        # save together; a process that holds all can alone: its state is of the last whole update.
        single = all_there = ranks.world_size == 1
        message = "stopping: saving the updates that are done ..." if ranks.first else None
        with (
            catch_signals(message) as signals,
            nullcontext() if single else signals.deferred(raise_after=False),
            page.until_the_end(signals),
        ):
            try:
                with explained(run):
                    _walk(session, validation, measured, page, console, signals)
                all_there = True
            except Interrupted as stopped:
                all_there, stopped_by = True, stopped.signum
            except NotFiniteError as error:
                all_there = True
                raise error if ranks.first else SystemExit(1) from error
            finally:
                with signals.deferred(raise_after=False):
                    if not all_there and ranks.first and not run.config.shards_moments:
                        noticed()
                        all_there, session = True, session.alone()
                    if all_there and state.updates > 0 and keep:
                        session.leave_behind()
    return stopped_by if state.updates < run.updates else None


def _hold_folders(held: ExitStack, run: Run, console: Console) -> None:
    """Output and logs are this run's, and libraries log to the output, until `held` ends."""
    config, say = run.config, partial(support.say, console)
    hold_folder(held, "--output-dir", config.output_dir, say)
    logs = config.logging_dir
    if logs is not None and not logs.resolve().is_relative_to(config.output_dir.resolve()):
        hold_folder(held, "--logging-dir", logs, say)
    held.enter_context(library_log(config.output_dir))


def leave_run_file(run: Run, config: TrainConfig) -> None:
    """Leave the options in their output folder, so that what they ask for can be done again.

    `config`: the run's own, or the one that the run is a part of.
    """
    decided = {
        "strategy": run.config.strategy,
        "num_processes": run.placement.machines.num_processes,
    }
    settled = vars(config) | decided
    hints = get_type_hints(type(config), include_extras=True)
    write_run_file(config.output_dir / RUN_FILE, run.objective.method, hints, settled)


def _walk(
    session: Session,
    validation: Validation | None,
    measured: HeldOut | None,
    page: RunPage,
    console: Console,
    signals: Interruption,
) -> None:
    """Walk the updates from `state.updates` on, changing the state once for each."""
    run, state = session.run, session.state
    config, objective, ranks = run.config, run.objective, run.ranks
    device = torch.device(run.device)
    negative = session.bank.negative.to(device)
    logged: list[Tracker] = []
    if page.writes:
        logged.append(MetricsFile(config.output_dir / METRICS, done=state.updates))
        page.write("training")
        session.say(f"page     {config.output_dir / PAGE}")
    source = micro_batches(run, session.bank)
    gauges = _gauges(session, source, negative)
    batches = source.ahead(
        start=state.updates,
        stop=run.updates,
        workers=config.dataloader_num_workers,
        device=run.device,
    )
    tails = (
        TailLog(config.output_dir, run.data, run.plan, start=state.updates) if ranks.first else None
    )
    looks = FirstSteps()
    with ExitStack() as held:
        held.enter_context(closing(batches))
        trackers: list[Tracker] = []
        if ranks.first:
            opened = open_trackers(
                chosen(names(config.report_to)),
                config.logging_dir or config.output_dir / "logs",
                config.tracker_project_name,
                done=state.updates,
                settings=config.__dict__,
            )
            trackers = held.enter_context(opened)
        progress = TrainProgress(
            run.steps,
            run.cycle,
            console,
            head_start=objective.head_start,
            title=objective.method,
            start=state.updates,
            device=device,
        )
        shown_by = held.enter_context(progress)
        step_log = StepLog(shown_by, [*logged, *trackers], device=device)
        validate = partial(
            _validate, session, validation, negative, trackers, signals, step_log, gauges
        )
        # A checkpoint of a run that was stopped in its validation lacks the clips' variety.
        behind = gauges.validated not in (None, state.updates) and not run.counted(state.updates)[1]
        measure = partial(_measure_held_out, session, measured, trackers, signals, step_log)
        if state.updates == 0 or behind:
            validate()
        if measured is not None:
            measured.begin(state.updates // run.cycle)
        measure()
        with step_log.paused(), signals.deferred():
            page.refresh()
        while state.updates < run.updates:
            update = state.updates
            if tails is not None:
                tails.begin(update)
            role = objective.role_of(update)
            trained = state.trained[role]

            # Gradients of one update batch
            outputs: list[StepOutput] = []
            keys: tuple[str, ...] = ()
            for _ in range(config.gradient_accumulation_steps):
                with step_log.waiting():
                    batch = next(batches)
                outputs.append(_backward(session, role, batch.to(device), negative))
                keys += batch.keys
            steps = together([output.numbers() for output in outputs])  # waits for the device
            everyone = ranks.gathered((steps, signals.signum or 0))
            stopping = any(signum for _, signum in everyone)
            numbers = together(
                [replace(of_one, loss=of_one.loss / len(everyone)) for of_one, _ in everyone]
            )
            loss = numbers.loss

            # The optimizer step
            peak = objective.learning_rates[role]
            rate = learning_rate(
                peak,
                objective.role_updates(role, update),
                scheduler=config.lr_scheduler,
                warmup=config.lr_warmup_steps,
                length=objective.role_updates(role, run.updates),
            )
            if not math.isfinite(loss):
                raise _not_finite(run, role, update, keys, f"loss {loss}")
            before = looks.before(role, trained.weights, full_rate=rate == peak)
            with signals.deferred():
                norm = trained.update(rate, config.max_grad_norm)
                if not math.isfinite(norm):
                    why = f"loss {loss}, gradient norm {norm}"
                    raise _not_finite(run, role, update, keys, why)
                state.updates = update + 1
                shown = gauges.add(numbers.metrics, share=state.updates / run.updates)
                if config.ema_decay and role == objective.main_role:
                    weights = trained.weights()
                    if state.ema is not None:
                        state.ema.update(weights, run.counted(state.updates)[0])

                step_log.update(
                    role,
                    numbers,
                    grad_norm=norm,
                    learning_rate=rate,
                    samples=len(keys) * ranks.mesh.data,
                    done=state.updates,
                    gauges=shown,
                )

            if warning := looks.after(role, before, trained.weights, norm):
                session.say(f"warning  {warning}")

            # Validation and checkpoint, which keeps what the validation found
            if role == objective.main_role:
                validate()
                measure()
            for warning in gauges.warnings():
                session.say(f"warning  {warning}")
            done, others = run.counted(state.updates)
            if saved := not others and done % config.checkpointing_steps == 0:
                with signals.deferred():
                    session.save_if_best()
            with step_log.paused(), signals.deferred():
                page.refresh(at_once=saved)
            if stopping and ranks.world_size > 1:
                raise Interrupted(signals.signum or signal.SIGTERM)


def _gauges(session: Session, batches: MicroBatches, negative: torch.Tensor) -> Gauges:
    """The gauges of a run, with the teacher's side measured if it is not in the checkpoint."""
    run, gauges = session.run, Gauges(session.state.record)
    config, objective = run.config, run.objective
    number = config.batches_of_gauges(run.steps) if isinstance(config, DistillConfig) else 0
    if number and objective.gauge_passes and not gauges.has_reference:
        passes = number * objective.gauge_passes
        session.say(
            f"gauges   measuring the teacher on {number} batches of {config.train_batch_size}: "
            f"{passes} passes without gradients, once"
        )
        gauges.refer_to(
            teacher_samples(objective, session.roles, batches, negative, run.ranks, number=number)
        )
    for line in gauges.describe():
        session.say(line)
    return gauges


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
        text_only=config.train_mode == "normal",
        first_noise=run.objective.first_noise,
        states=run.objective.states,
        accumulation=config.gradient_accumulation_steps,
        data_rank=run.ranks.mesh.data_rank(run.ranks.rank),
        data_size=run.ranks.mesh.data,
    )


def validation_of(run: Run) -> Validation | None:
    """What the run samples while it trains; UserError where it cannot."""
    config = run.config
    if not config.validation_steps:
        return None
    return prepare_validation(
        run.data,
        run.spec,
        run.objective,
        micro_batches(run, load_prompt_bank(run.data.first, run.spec.family)),
        every=config.validation_steps,
        output=config.output_dir,
        seeds=config.validation_seeds,
    )


def _validate(
    session: Session,
    validation: Validation | None,
    negative: torch.Tensor,
    trackers: Sequence[Tracker],
    signals: Interruption,
    step_log: StepLog,
    gauges: Gauges,
) -> None:
    """Sample, if it is time, with the weights that would be saved now.

    All processes do the same, since a strategy may need all of them for a pass; the first writes.
    """
    run, state = session.run, session.state
    number, _ = run.counted(state.updates)
    if validation is None or number % validation.every:
        return
    if number == 0:
        for line in validation.describe():
            session.say(line)
    with _as_saved(session, signals, step_log) as stopped:
        distance = validation.sample(
            run.objective,
            session.roles,
            negative,
            trackers,
            number=number,
            step=state.updates,
            writes=run.ranks.first,
            stopped=stopped,
        )
        distance = run.ranks.from_first(distance)
        if distance is not None:
            gauges.add_variety(
                distance,
                len(validation.inputs),
                updates=state.updates,
                share=state.updates / run.updates,
            )


@contextmanager
def _as_saved(
    session: Session, signals: Interruption, step_log: StepLog
) -> Iterator[Callable[[], bool]]:
    """Block in which the weights are those that would be saved now; it takes no time of an update.

    Gives what says whether a signal came, after which the block should end.
    """
    run, state = session.run, session.state
    single = run.ranks.world_size == 1
    ema: AbstractContextManager[None] = nullcontext()
    if run.config.ema_decay:
        weights = run.ranks.from_first(state.ema.weights if state.ema else {})
        ema = weights_in_place(state.trained[run.objective.main_role], weights, run.ranks)
    # Several are deferred already, all along; weights are put back before a signal is handled.
    with step_log.paused(), signals.deferred() if single else nullcontext(), ema:
        yield lambda: single and signals.signum is not None


def held_out_of(run: Run) -> HeldOut | None:
    """What the run measures on the samples that `--holdout` keeps from training."""
    config, objective = run.config, run.objective
    if run.held_out is None:
        return None
    assert isinstance(config, FinetuneConfig) and isinstance(objective, Finetuning)
    bank = load_prompt_bank(run.data.first, run.spec.family)
    return HeldOut(
        objective=objective,
        batches=replace(micro_batches(run, bank), dataset=run.held_out),
        every=config.held_out_every,
        record=config.output_dir / RECORD,
        ranks=run.ranks,
    )


def _measure_held_out(
    session: Session,
    measured: HeldOut | None,
    trackers: Sequence[Tracker],
    signals: Interruption,
    step_log: StepLog,
) -> None:
    """Measure, if it is time, with the weights that would be saved now; all processes together."""
    run = session.run
    number = session.state.updates // run.cycle
    if measured is None or not measured.due(number):
        return
    if number == 0:
        for line in measured.describe():
            session.say(line)
    with _as_saved(session, signals, step_log) as stopped:
        loss = measured.measure(
            session.roles, trackers, step=number, device=torch.device(run.device), stopped=stopped
        )
    if loss is not None:
        step_log.held_out(loss)
        session.say(f"held out loss {loss:.5f} after {number} updates")


def _backward(session: Session, role: str, batch: Batch, negative: torch.Tensor) -> StepOutput:
    """Add one micro-step's gradients; its share of the update's loss, with its metrics."""
    step = session.run.objective.loss(session.roles, role, batch, negative)
    share = step.loss / session.run.config.gradient_accumulation_steps
    with session.roles.role(role):  # checkpointed blocks are recomputed with what is active here
        session.strategy.backward(share)
    return replace(step, loss=share.detach())


def _not_finite(
    run: Run, role: str, update: int, keys: tuple[str, ...], found: str
) -> NotFiniteError:
    """The error to raise in every process; `keys` are the samples of this one."""
    samples = ", ".join(key for of_one in run.ranks.gathered(keys) for key in of_one)
    return NotFiniteError(
        f"training stopped before update {update + 1} touched the weights: {role} {found}; "
        f"samples {samples}. Check these samples, lower the learning rate, then resume from the "
        "update before: --resume-from-checkpoint latest"
    )

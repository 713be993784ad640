"""`--boundary-type both`: a run for each expert, one after the other, in folders of one folder."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from rich.console import Console

from shared.cli import support
from shared.errors import UserError
from shared.format.schema import DTYPES
from shared.io.names import quoted
from shared.models.original_layout import is_original
from shared.models.spec import read_model_spec, resolve_model
from train.config import DistillConfig, TrainConfig
from train.distributed.process_group import joined
from train.joint_validation import validate_jointly
from train.loop import leave_run_file, train_joined
from train.memory.forward_only import free_memory
from train.model.base import base_digest, component_of
from train.model.custom_weights import empty_transformer
from train.model.lora_files import read_lora
from train.options import Expert
from train.page.run_page import RunPage, write_page_of_experts
from train.page.usage import comfyui_hint, sampling_hint
from train.run import Run, run_identity
from train.sampling.model_card import Trained, write_guides
from train.saving.checkpoint import (
    TrainState,
    check_identity,
    checkpoint_name,
    find_checkpoint,
    list_checkpoints,
)
from train.saving.export import lora_path, write_loras_of
from train.saving.output_lock import hold_folder
from train.saving.provenance import read_provenance
from train.session import Say, guide, held_out_loss, keep_best_of, lora_of

ORDER: tuple[Expert, ...] = ("high", "low")
"""As they work on a clip."""
_OF_ONE = {
    "transformer_path": "weights of one expert",
    "base_lora": "a LoRA that belongs to the weights of one expert",
    "init_lora": "a LoRA of one expert",
}
_OF_HIGH = ("match", "score_floor")
"""Options that mean something for the high-noise expert only, of those of `distill`."""
_Config = TypeVar("_Config", bound=TrainConfig)


def with_default(config: _Config) -> _Config:
    """With both experts asked for, where the model has two and nothing is said.

    VideoX-Fun's recipe trains what its script does, the low-noise expert.
    """
    seed = isinstance(config, DistillConfig) and config.recipe == "seed"
    if config.boundary_type is not None or seed:
        return config
    two_experts = read_model_spec(resolve_model(config.model, [])).two_experts
    return replace(config, boundary_type="both") if two_experts else config


def configs_of_experts(config: _Config) -> tuple[_Config, ...]:
    """What each expert's run is asked for, in their order.

    An option of one expert goes to that one: `--match` and `--score-floor` to the high-noise
    expert, `--start` to the low-noise one, unless it is noise; the other has the default.

    Raises UserError for a model with one transformer, and for files of one expert.
    """
    folder = quoted(config.output_dir)
    alone = f"Train the experts one by one: --boundary-type high --output-dir {folder}/high"
    for name, what in _OF_ONE.items():
        if getattr(config, name):
            raise UserError(
                f"--{name.replace('_', '-')}: found with --boundary-type both, the default of "
                f"models with two experts, but it is {what}. {alone}; then low."
            )
    if config.resume_from_checkpoint not in (None, "latest"):
        raise UserError(
            f"--resume-from-checkpoint: found {config.resume_from_checkpoint} with --boundary-type "
            f"both, but a checkpoint is of one expert. Expected latest. {alone}"
        )
    if not read_model_spec(resolve_model(config.model, [])).two_experts:
        raise UserError(
            f"--boundary-type: found both, but {config.model} has one transformer. Use "
            "--boundary-type full."
        )
    return tuple(_of_expert(config, expert) for expert in ORDER)


def _of_expert(config: _Config, expert: Expert) -> _Config:
    changed: dict[str, Any] = {
        "boundary_type": expert,
        "output_dir": config.output_dir / expert,
        "logging_dir": config.logging_dir and config.logging_dir / expert,
    }
    if isinstance(config, DistillConfig):
        if expert == "low":
            options = DistillConfig.__dataclass_fields__
            changed |= {name: options[name].default for name in _OF_HIGH}
        elif config.start != "noise":
            changed["start"] = None
    return replace(config, **changed)


def train_both(config: TrainConfig, runs: Sequence[Run], console: Console) -> int | None:
    """Train one after the other. Returns a signal's number if it ended them, None at the end.

    Every process calls it; the runs are of `configs_of_experts`. Of a run that is complete no
    weights are read again. Killed anywhere and resumed, it leaves what it would have left in peace.
    """
    ranks = runs[0].ranks
    console = console if ranks.first else Console(quiet=True)
    say = partial(support.say, console)
    with ExitStack() as held:
        with joined(ranks, torch.device(runs[0].device)) as noticed:
            ranks.first_does(partial(_begin, held, config, runs, say))
            held.callback(_without_empty, runs)
            for run in runs:
                say(f"expert   {run.objective.expert}-noise, into {run.config.output_dir}")
                if ranks.first_does(partial(_is_complete, run, say)):
                    continue
                begun = partial(_leave, config, runs, say)
                stopped_by = train_joined(run, console, noticed, begun=begun)
                if stopped_by is not None:
                    return stopped_by
                _free(run)
        # The others have left: however long the rest takes, none waits for it.
        return _end(config, runs, console) if ranks.first else None


def _begin(held: ExitStack, config: TrainConfig, runs: Sequence[Run], say: Say) -> None:
    """The folder is ours until `held` ends.

    UserError where an earlier run, of either expert, would be written over.
    """
    hold_folder(held, "--output-dir", config.output_dir, say)
    if of_one := list_checkpoints(config.output_dir):
        raise UserError(
            f"--output-dir: {config.output_dir} holds {of_one[-1].name} of a run of one expert, "
            "and both would go into folders of it (--boundary-type both, the default of a model "
            "with two experts). Go on with that run: --boundary-type low, or high, as it was; or "
            "choose another --output-dir."
        )
    for run in runs:
        if run.config.output_dir.exists():
            find_checkpoint(run.config.output_dir, config.resume_from_checkpoint)


def _leave(config: TrainConfig, runs: Sequence[Run], say: Say) -> None:
    """Once an expert has its weights: how to do all again, and the page above both."""
    leave_run_file(runs[0], config)
    write_page_of_experts(config, runs, say, ended=False)


def _without_empty(runs: Sequence[Run]) -> None:
    """A refused run leaves no folder behind."""
    for run in runs:
        with suppress(OSError):  # there is something in it
            run.config.output_dir.rmdir()


def _is_complete(run: Run, say: Say) -> bool:
    """Whether a run has nothing left to do. Its LoRA files, which a kill may have cost it, are
    written again from its last checkpoint.

    UserError where the checkpoint is of another run.
    """
    config, expert = run.config, run.objective.expert
    if (
        config.resume_from_checkpoint is None
        or keep_best_of(config)
        or is_original(run.spec.folder)
    ):
        return False
    found = find_checkpoint(config.output_dir, "latest")
    if found is None or found.name != checkpoint_name(*run.counted(run.updates)):
        return False
    component = component_of(expert)
    lora = lora_of(config, empty_transformer(run.spec, component))
    digest = base_digest(run.spec.folder, component, run.base)
    check_identity(found, run_identity(run, lora, digest))
    write_loras_of(found, config.output_dir, expert, DTYPES[config.save_precision])
    guide(run, config.output_dir)
    RunPage(run, TrainState({}, run.updates), say, writes=True).write("finished")
    say(f"resume   complete ({found.name})")
    return True


def _free(run: Run) -> None:
    """Give the memory of a run that has ended back, before the next one reads its base."""
    if run.config.compile:
        torch.compiler.reset()  # compiled code refers to the blocks it was made of
    free_memory()


def _end(config: TrainConfig, runs: Sequence[Run], console: Console) -> int | None:
    """Write how to use both LoRAs, make the clips of both, and say how to go on.

    Returns a signal's number if it ended that.
    """
    say = partial(support.say, console)
    paths = [lora_path(run.config.output_dir, run.objective.expert, "comfyui") for run in runs]
    trained = [
        Trained(
            provenance=read_provenance(path),
            held_out=held_out_loss(run),
            folder=run.config.output_dir.name,
        )
        for path, run in zip(paths, runs, strict=True)
    ]
    width = read_lora(paths[-1]).lora.width
    _, card = write_guides(config.output_dir, trained, width, model=config.model)
    stopped_by = validate_jointly(config, runs, console)
    if stopped_by is not None:
        return stopped_by
    write_page_of_experts(config, runs, say, ended=True)
    say(f"next     {sampling_hint(config, runs)}")
    say(f"ComfyUI  {comfyui_hint(config, runs)}")
    say(f"card     {card}")
    return None

"""How a run of each method is prepared: what its options mean for this model and these shards."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from shared.cli.videox_fun_command import Given
from shared.errors import UserError
from shared.format.cache import MEDIA_TYPES
from shared.models.spec import ModelSpec
from train.config import DistillConfig, FinetuneConfig, TrainConfig
from train.data.dataset import Dataset
from train.data.holdout import split_held_out
from train.data.path_states import refuse_other_states
from train.functional.guidance import Guidance
from train.functional.schedule import Schedule, step_indices
from train.methods.distillation import Distillation
from train.methods.dmd import Recipe
from train.methods.finetune import LORA, Finetuning
from train.methods.flow_matching import NoiseLevels
from train.methods.guidance_file import read_guidance
from train.methods.regression import Regression
from train.methods.teacher_gauges import ends_in_clips
from train.model.base import Base, base_digest, component_of
from train.model.roles import CRITIC, GENERATOR
from train.options import Expert, is_number
from train.run import Run, open_data, place_run, plan_run, update_batch

NONE_GIVEN: Given = {}


def prepare_distillation(config: DistillConfig, given_elsewhere: Given = NONE_GIVEN) -> Run:
    """Read configs and index, check that shards and model belong together, and plan.

    Raises UserError for everything that a user can get wrong; no weight has been read by then.
    """
    config, placement = place_run(config)
    spec, data = open_data(config, given_elsewhere)
    expert = _expert(config, spec)
    schedule = Schedule(
        indices=step_indices(config.denoising_step_indices_list, "--denoising-step-indices-list"),
        shift=spec.flow_shift if config.flow_shift is None else config.flow_shift,
        boundary=spec.boundary,
    )
    strata = update_batch(config, placement) if config.uniform_sampling else 1
    if config.method == "regression":
        schedule.owned_steps(expert)  # refuses an expert without steps
        if have := text_only(spec, data):
            raise UserError(
                f"--method regression: {have}, and so without a path to learn. Leave these "
                "out: --where 'type!=text'; or make clips of them: wantrain synthesize --states"
            )
        refuse_other_states(data, schedule, "--method regression")
        regression = Regression(
            expert=expert,
            schedule=schedule,
            uniform_sampling=config.uniform_sampling,
            strata=strata,
            learning_rates={GENERATOR: config.learning_rate},
            seed=config.seed,
        )
        return plan_run(config, placement, spec, data, regression)
    recipe = Recipe(
        expert=expert,
        schedule=schedule,
        start=config.start
        or ("latents" if expert == "low" and config.recipe == "corrected" else "noise"),
        pairing=config.pairing,
        match=config.match,
        score_floor=config.score_floor,
        maths=config.recipe,
        real_guidance_scale=_guidance(config, spec, expert),
        fake_guidance_scale=config.fake_guidance_scale,
        fm_loss_weight=config.fm_loss_weight,
        score_strata=strata,
        batched_guidance=config.batched_guidance,
        seed=config.seed,
        score_levels=config.score_levels,
        exits=config.exits,
    )
    for step in recipe.exit_steps:
        recipe.score_interval_of(step)  # refuses an expert without steps, steps without levels
    if config.score_floor != "boundary" and expert != "high":
        raise UserError(
            f"--score-floor: found {config.score_floor} with --boundary-type {expert}; it is a "
            "choice only for the high-noise expert. Leave it out."
        )
    if config.match == "handover" and (expert != "high" or ends_in_clips(recipe)):
        raise UserError(
            f"--match: found handover with --boundary-type {expert}, which hands no state over: "
            "its last step ends with the clip. It is for a high-noise expert whose steps another "
            "goes on with. Leave it out."
        )
    if config.start == "states" and expert != "low":
        raise UserError(
            f"--start: found states with --boundary-type {expert}, whose first state is pure "
            "noise. It is for the low-noise expert: use --start noise."
        )
    _refuse_text_only(config, spec, data, recipe)
    if recipe.start == "states":
        refuse_other_states(data, schedule, "--start states")
    objective = Distillation(
        recipe=recipe,
        gen_update_interval=config.gen_update_interval,
        head_start=config.critic_warmup,
        uniform_sampling=config.uniform_sampling,
        learning_rates={GENERATOR: config.learning_rate, CRITIC: config.learning_rate_critic},
    )
    return plan_run(config, placement, spec, data, objective)


def _expert(config: TrainConfig, spec: ModelSpec) -> Expert:
    """The one that a run is for."""
    asked = config.boundary_type
    assert asked != "both", "`train.both` makes a run of each"
    return asked or ("low" if spec.two_experts else "full")


def _guidance(config: DistillConfig, spec: ModelSpec, expert: Expert) -> Guidance:
    """The teacher's. UserError where the file has no table of this teacher's."""
    given = config.real_guidance_scale
    if is_number(given):
        return float(given)
    component = component_of(expert)
    base = Base.parse(config.transformer_path, config.base_lora)
    base.fetched(config.model, spec, component)
    digest = base_digest(spec.folder, component, base)
    return read_guidance(Path(given), expert, base=digest, model=config.model)


def _refuse_text_only(
    config: DistillConfig, spec: ModelSpec, data: Dataset, recipe: Recipe
) -> None:
    """UserError where text-only samples could train nothing: they have no latents."""
    have = text_only(spec, data)
    if have is None:
        return
    if recipe.start != "noise":
        given = "" if config.start else f", the default of the {recipe.expert}-noise expert"
        raise UserError(
            f"--start: {recipe.start}{given}, but {have}. Start from noise: --start noise; or "
            "encode the media into another folder, or leave them out (--where 'type!=text')."
        )
    if recipe.fm_loss_weight:
        raise UserError(
            f"--fm-loss-weight: {recipe.fm_loss_weight:g}, but {have}, which this loss "
            "needs. Leave it out, or encode the media into another folder."
        )


def prepare_finetuning(config: FinetuneConfig, given_elsewhere: Given = NONE_GIVEN) -> Run:
    """Read configs and index, check that shards and model belong together, and plan.

    Raises UserError for everything that a user can get wrong; no weight has been read by then.
    """
    config, placement = place_run(config)
    spec, data = open_data(config, given_elsewhere)
    levels = NoiseLevels(
        expert=_expert(config, spec),
        shift=spec.flow_shift if config.flow_shift is None else config.flow_shift,
        boundary=spec.boundary,
        sampling=config.timestep_sampling,
        mean=0.0 if config.logit_mean is None else config.logit_mean,
        std=1.0 if config.logit_std is None else config.logit_std,
    )
    if have := text_only(spec, data):
        raise UserError(
            f"shards: {have}, which `wantrain lora` needs. Leave these out: --where "
            "'type!=text'; or encode the media."
        )
    objective = Finetuning(
        levels=levels,
        uniform_sampling=config.uniform_sampling,
        strata=update_batch(config, placement) if config.uniform_sampling else 1,
        learning_rates={LORA: config.learning_rate},
        seed=config.seed,
    )
    if not config.holdout:
        return plan_run(config, placement, spec, data, objective)
    data, held_out, lines = split_held_out(data, config.holdout)
    run = plan_run(config, placement, spec, data, objective)
    return replace(run, held_out=held_out, notes=(*run.notes, *lines))


def text_only(spec: ModelSpec, data: Dataset) -> str | None:
    """Describes text-only samples, which have no latents; None if there are none.

    UserError for a model with a condition, which can't learn from them at all.
    """
    number = int(np.count_nonzero(data.types == MEDIA_TYPES.index("text")))
    if not number:
        return None
    have = f"{number} of the {len(data)} samples in {data.folders} are text-only, without latents"
    if spec.given_frames:
        raise UserError(
            f"shards: {have} and no first frame for an {spec.mode} model. Encode the media into "
            "another "
            "folder, leave these out (--where 'type!=text'), or train a t2v model on them."
        )
    return have

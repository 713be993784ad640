"""What a run is before any weight is read: configuration, model facts, index, plan, length."""

import json
import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.cache import MEDIA_TYPES, CacheIndex, open_cache
from shared.device import check_device
from shared.errors import UserError
from shared.fingerprint import (
    LACKING,
    Fingerprint,
    cache_mode,
    differences,
    model_fields,
    refuse_differences,
)
from shared.hashing import FileHasher
from shared.mirror import described
from shared.model_spec import ModelSpec, read_model_spec, resolve_model
from shared.overlays import CONDITIONS, with_captions, with_conditions
from shared.schema import TEXT_MEMBER
from train.base import component_of
from train.checkpoint import Identity
from train.config import DistillConfig
from train.dmd import Recipe
from train.flow import Expert, Schedule
from train.lora import LoraSpec
from train.plan import BatchPlan
from train.roles import CRITIC, GENERATOR


@dataclass(frozen=True, kw_only=True)
class Run:
    """What configuration, model configs and index decide before any weight is read."""

    config: DistillConfig
    spec: ModelSpec
    index: CacheIndex
    plan: BatchPlan
    recipe: Recipe
    generator_updates: int

    @property
    def cycle(self) -> int:
        """Updates from one generator update to the next."""
        return self.config.gen_update_interval + 1

    @property
    def updates(self) -> int:
        return self.generator_updates * self.cycle

    def role_of(self, update: int) -> str:
        """The critic goes first: a generator can't learn from a critic that knows nothing yet."""
        return GENERATOR if update % self.cycle == self.cycle - 1 else CRITIC

    def role_updates(self, role: str, update: int) -> int:
        """How many updates a role has made when `update` begins."""
        generator = update // self.cycle
        return generator if role == GENERATOR else update - generator

    def _captions(self) -> str:
        overlay = self.index.overlays.get(TEXT_MEMBER)
        if overlay is None:
            return ""
        own = len(overlay.lacking)
        kept = f" ({own} of {len(self.index)} have none and keep the shards' own)" if own else ""
        return f" with the captions {self.config.captions!r}{kept}"

    def describe(self) -> list[str]:
        """The derived arithmetic, printed at the start and by --dry-run."""
        config, plan, schedule = self.config, self.plan, self.recipe.schedule
        epochs = self.updates / plan.batches_per_epoch
        steps = ", ".join(f"{t:.1f}" for t in schedule.timesteps)
        owned = schedule.owned_steps(self.recipe.expert)
        own = ", ".join(f"{schedule.timesteps[step]:.1f}" for step in owned)
        low, high = self.recipe.score_interval
        until = (
            "--max-train-steps" if config.max_train_steps else f"{config.num_train_epochs} epochs"
        )
        ema = (
            f"; the LoRA is their average (decay {config.ema_decay:g}) from update "
            f"{config.ema_start + 1} on"
            if config.ema_decay
            else ""
        )
        again = "shown again" if config.tail == "pad" else "left out"
        return [
            f"model    {self.spec.folder} ({self.spec.mode}), expert {self.recipe.expert} "
            f"({component_of(self.recipe.expert)})",
            f"data     {len(self.index)} samples in {len(self.index.buckets)} bucket(s) of "
            f"{config.shards}{self._captions()}; update batch {plan.batch_size} = "
            f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulation; "
            f"{plan.batches_per_epoch} updates an epoch ({plan.tail_samples} tail samples {again})",
            *described(config.shards),
            f"steps    {steps} (shift {schedule.shift:g}); this expert owns {own}; start "
            f"{self.recipe.start}; score levels u in [{low:.3f}, {high:.3f}]",
            f"length   {until}: {self.generator_updates} generator updates, each after "
            f"{config.gen_update_interval} critic updates = {self.updates} updates "
            f"({epochs:.1f} epochs){ema}",
        ]


def prepare(config: DistillConfig) -> Run:
    """Read configs and index, check that shards and model belong together, and plan.

    Raises UserError for everything that a user can get wrong; no weight has been read by then.
    """
    check_device(config.device)
    if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UserError(
            f"wantrain distill trains in one process so far, and WORLD_SIZE={world} says that a "
            "launcher started several, which would all write to one folder. Start it by itself."
        )
    folder = resolve_model(config.model, [])  # the configs decide which expert is needed
    spec = read_model_spec(folder)
    index = open_cache(config.shards)
    if not len(index):
        raise UserError(
            f"shards: {config.shards} has no samples; all were removed. Encode "
            f"some: wanprep encode --output {config.shards}"
        )
    if config.captions is not None:
        index = with_captions(index, config.captions)
    expected = model_fields(spec, FileHasher())
    image = {"image": expected.pop("image", {})}  # CLIP's embeddings may have been added later
    _refuse_other_model(config, index, expected)
    if index.fingerprint.get("mode") in LACKING.get(cache_mode(spec), ()):
        index = with_conditions(index, config.model)
    _refuse_other_model(config, index, image)
    expert: Expert = config.boundary_type or ("low" if spec.two_experts else "full")
    schedule = Schedule(
        indices=config.denoising_step_indices_list,
        shift=spec.flow_shift if config.flow_shift is None else config.flow_shift,
        boundary=spec.boundary,
    )
    recipe = Recipe(
        expert=expert,
        schedule=schedule,
        start=config.start
        or ("latents" if expert == "low" and config.recipe == "corrected" else "noise"),
        pairing=config.pairing,
        score_floor=config.score_floor,
        maths=config.recipe,
        real_guidance_scale=config.real_guidance_scale,
        fake_guidance_scale=config.fake_guidance_scale,
        fm_loss_weight=config.fm_loss_weight,
        seed=config.seed,
    )
    _ = recipe.score_interval  # refuses an expert without steps
    if config.score_floor != "boundary" and expert != "high":
        raise UserError(
            f"--score-floor: found {config.score_floor} with --boundary-type {expert}; it is a "
            "choice for the high-noise expert alone. Leave it out."
        )
    _refuse_captions_alone(config, spec, index, recipe)
    resolve_model(config.model, [component_of(expert)])
    of_type = np.where(index.types == MEDIA_TYPES.index("video"), config.video_repeat, 1)
    repeats = of_type * index.repeats.astype(np.int64)
    plan = BatchPlan(
        bucket_ids=index.bucket_ids,
        repeats=repeats,
        batch_size=config.update_batch,
        seed=config.seed,
        tail=config.tail,
    )
    return Run(
        config=config,
        spec=spec,
        index=index,
        plan=plan,
        recipe=recipe,
        generator_updates=config.max_train_steps or _updates_in_epochs(config, plan),
    )


def _refuse_captions_alone(
    config: DistillConfig, spec: ModelSpec, index: CacheIndex, recipe: Recipe
) -> None:
    """Samples that are captions without a medium train only what begins and ends in noise."""
    alone = int(np.count_nonzero(index.types == MEDIA_TYPES.index("text")))
    if not alone:
        return
    have = (
        f"{alone} of the {len(index)} samples in {config.shards} are captions without a medium, "
        "which have no latents"
    )
    if spec.mode == "i2v":
        raise UserError(
            f"shards: {have} and no first frame for an i2v model. Encode the media into a folder "
            "of their own, or train a t2v model on these."
        )
    if recipe.start == "latents":
        given = "" if config.start else f", the default of the {recipe.expert}-noise expert"
        raise UserError(
            f"--start: latents{given}, but {have}. Begin from noise: --start noise; or encode the "
            "media into a folder of their own."
        )
    if recipe.fm_loss_weight:
        raise UserError(
            f"--fm-loss-weight: {recipe.fm_loss_weight:g}, but {have}, which this loss learns "
            "from. Leave it out, or encode the media into a folder of their own."
        )


def _refuse_other_model(config: DistillConfig, index: CacheIndex, expected: Fingerprint) -> None:
    refuse_differences(
        index.fingerprint,
        expected,
        what=f"{config.shards} were encoded with another model than {config.model}",
        cure=_cure(config, index.fingerprint, expected),
    )


def _cure(config: DistillConfig, found: Fingerprint, expected: Fingerprint) -> str:
    """What to do about shards of another model."""
    model = f"--pretrained-model-name-or-path {config.model}"
    cure = (
        "Use the model that encoded them (--pretrained-model-name-or-path), or encode for this "
        f"one: wanprep encode {model} --output <folder>"
    )
    differing = differences(found, expected)
    if all(field.startswith("text.") for field, _, _ in differing):
        return (
            f"Encode the text anew: wanprep recaption --name NAME --same-captions --shards "
            f"{config.shards} {model}, then train with --captions NAME. {cure}"
        )
    conditions = config.shards / CONDITIONS
    if all(field.startswith("image.") for field, _, _ in differing) and conditions.is_dir():
        return (
            f"Delete {conditions} and add them for this model: wanprep add-condition --shards "
            f"{config.shards} {model} --train-data-dir DIR. {cure}"
        )
    return cure


def _updates_in_epochs(config: DistillConfig, plan: BatchPlan) -> int:
    updates = config.num_train_epochs * plan.batches_per_epoch
    generator = updates // (config.gen_update_interval + 1)
    if generator == 0:
        raise UserError(
            f"--num-train-epochs: {config.num_train_epochs} epochs of {plan.batches_per_epoch} "
            f"updates are {updates} updates, fewer than one cycle of {config.gen_update_interval} "
            "critic updates and a generator update. Raise it, or set --max-train-steps."
        )
    return generator


def run_identity(run: Run, lora: LoraSpec, digest: str) -> Identity:
    """What a checkpoint of this run must match to be resumed, and what it merely remembers."""
    config, recipe = run.config, run.recipe
    fixed = {
        "model": {"base": digest, "mode": run.spec.mode},
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)},
        "recipe": {
            "boundary_type": recipe.expert,
            "denoising_step_indices_list": list(recipe.schedule.indices),
            "flow_shift": recipe.schedule.shift,
            "start": recipe.start,
            "pairing": recipe.pairing,
            "score_floor": recipe.score_floor,
            "maths": recipe.maths,
            "real_guidance_scale": recipe.real_guidance_scale,
            "fake_guidance_scale": recipe.fake_guidance_scale,
            "gen_update_interval": config.gen_update_interval,
            "fm_loss_weight": recipe.fm_loss_weight,
            "ema_decay": config.ema_decay,
            "ema_start": config.ema_start,
        },
    }
    loose_names = (
        "seed", "learning_rate", "learning_rate_critic", "lr_warmup_steps", "adam_beta1",
        "adam_beta2", "adam_weight_decay", "adam_epsilon", "max_grad_norm", "train_batch_size",
        "gradient_accumulation_steps", "video_repeat", "caption_dropout", "random_frame_crop",
        "tail", "mixed_precision",
    )  # fmt: skip
    loose: dict[str, Any] = {name: getattr(config, name) for name in loose_names}
    loose["shards"] = run.index.digest
    overlay = run.index.overlays.get(TEXT_MEMBER)
    loose["captions"] = overlay and f"{config.captions} {overlay.index.digest}"
    return Identity(fixed, loose)


def resolved_configuration(run: Run) -> str:
    """The configuration with the model's defaults filled in, as JSON for --dry-run."""
    shown = {**run.config.__dict__, "boundary_type": run.recipe.expert, "start": run.recipe.start}
    shown["flow_shift"] = run.recipe.schedule.shift
    return json.dumps(shown, indent=2, default=str)

"""A prepared run: configuration, model spec, dataset, batch plan, length; no weights loaded."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from torch import nn

from shared.cli.checks import remembered
from shared.cli.videox_fun_command import Given
from shared.device import take_device
from shared.errors import UserError
from shared.format.cache import CacheIndex, open_cache
from shared.format.fingerprint import (
    LACKING,
    Fingerprint,
    as_in_cache,
    cache_mode,
    differences,
    model_fields,
    refuse_differences,
)
from shared.format.overlays import CONDITIONS, with_captions, with_conditions
from shared.format.schema import TEXT_MEMBER
from shared.io.hashing import FileHasher
from shared.io.mirror import open_store
from shared.io.names import quoted
from shared.io.store import Store
from shared.models.family import Mode, TrainMode
from shared.models.original_layout import is_original
from shared.models.spec import (
    ModelSpec,
    blocks_of,
    in_train_mode,
    read_model_spec,
    resolve_model,
)
from train.config import TrainConfig
from train.data.batch_plan import BatchPlan
from train.data.dataset import Dataset, dataset_of
from train.data.encoding_check import refuse_other_encoding
from train.data.filters import condition
from train.data.tail_log import TAIL_LOG
from train.data.weighted_folder import WeightedFolder
from train.distributed.placement import Placement, place
from train.distributed.process_group import Ranks
from train.memory.estimate import Estimate, Settings, estimate_of, tokens_of
from train.memory.keep_attention import check_keeps
from train.memory.quantize import check_installed, is_quantised
from train.methods.base import Objective
from train.model.attention import check_attention, check_deterministic, check_name
from train.model.base import Base, component_of
from train.model.custom_weights import empty_transformer
from train.model.lora_adapter import LoraSpec
from train.model.lora_init import check_init
from train.model.lora_source import ScaledLora
from train.optim.lr_schedule import DECAYING
from train.optim.optimizers import check_optimizer
from train.options import names
from train.saving.checkpoint import Identity
from train.saving.provenance import Provenance
from train.tracking.trackers import chosen

_Config = TypeVar("_Config", bound=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run with everything decided that needs no weights."""

    config: TrainConfig
    """Its `strategy` is decided."""
    placement: Placement
    base: Base
    spec: ModelSpec
    data: Dataset
    plan: BatchPlan
    objective: Objective
    steps: int
    """Optimizer steps of the objective's main role."""
    held_out: Dataset | None = None
    """Samples of the caches that are not trained on, but measured (`--holdout`)."""
    notes: tuple[str, ...] = ()
    """Lines about it."""

    @property
    def ranks(self) -> Ranks:
        return self.placement.ranks

    @property
    def device(self) -> str:
        """Of this process."""
        return self.placement.device

    @property
    def cycle(self) -> int:
        return self.objective.cycle

    @property
    def updates(self) -> int:
        """Optimizer steps of all roles."""
        return self.objective.head_start + self.steps * self.cycle

    def counted(self, updates: int) -> tuple[int, int]:
        """Steps of the main role among the first `updates`, and updates since the last of them."""
        steps = self.objective.role_updates(self.objective.main_role, updates)
        before = self.objective.head_start + steps * self.cycle if steps else 0
        return steps, updates - before

    @property
    def most_tokens(self) -> int:
        """Of a sample of the largest bucket."""
        spec = self.spec
        shapes = (
            bucket.latent_shape(spec.latent_channels, spec.stride)
            for bucket in self.data.filled_buckets()
        )
        return max(tokens_of(shape[1:], spec) for shape in shapes)

    def _captions(self) -> str:
        indexes = [part.index for part in self.data.parts]
        overlays = [o for index in indexes if (o := index.overlays.get(TEXT_MEMBER)) is not None]
        if not overlays:
            return ""
        own, samples = sum(len(overlay.lacking) for overlay in overlays), sum(map(len, indexes))
        kept = f" ({own} of {samples} have none and keep the shards' own)" if own else ""
        return f" with the captions {self.config.captions!r}{kept}"

    def _processes(self) -> str:
        strategy = self.config.strategy
        if strategy == "single":
            return ""
        return f" x {self.placement.mesh.data} processes ({strategy})"

    def describe(self) -> list[str]:
        """The derived arithmetic, printed at the start and by --dry-run."""
        config, plan = self.config, self.plan
        epochs = self.updates / plan.batches_per_epoch
        until = (
            "--max-train-steps" if config.max_train_steps else f"{config.num_train_epochs} epochs"
        )
        ema = (
            f"; the LoRA is their EMA (decay {config.ema_decay:g}) from update "
            f"{config.ema_start + 1} on"
            if config.ema_decay
            else ""
        )
        tail = (
            f"{plan.tail_samples} samples {'shown again' if config.tail == 'pad' else 'left out'}"
        )
        if plan.tail_samples:
            tail += f" to fill batches: their keys go to {config.output_dir / TAIL_LOG}"
        expert = self.objective.expert
        return [
            f"model    {self.spec.folder} ({self.spec.mode}), expert {expert} "
            f"({component_of(expert)})",
            *([f"base     {base}"] if (base := self.base.describe()) else []),
            f"data     {len(self.data)} samples in {len(self.data.filled_buckets())} bucket(s) of "
            f"{self.data.folders}{self._captions()}; update batch {plan.batch_size} = "
            f"{config.train_batch_size} x {config.gradient_accumulation_steps} accumulation"
            f"{self._processes()}; "
            f"{plan.batches_per_epoch} updates an epoch ({tail})",
            *self.data.describe(),
            *self.notes,
            *(line for part in self.data.parts for line in part.index.store.described()),
            *self.objective.describe(),
            *(
                [f"stream   --low-vram has no effect: {config.strategy} shards the base already"]
                if config.low_vram and config.shards_base
                else []
            ),
            f"length   {until}: {self.objective.describe_length(self.steps)} "
            f"({epochs:.1f} epochs){ema}",
        ]


def place_run(config: _Config) -> tuple[_Config, Placement]:
    """Where it computes, by options and environment; its strategy is decided then.

    Raises UserError where they contradict.
    """
    strategy, placement = place(config.strategy, config)
    config = replace(config, strategy=strategy)
    chosen(names(config.report_to))
    check_name(config.attention_backend)
    if config.deterministic:
        check_deterministic(config.attention_backend)
    if not placement.to_launch:  # else a GPU's memory would be taken here for nothing
        take_device(placement.device)
        asked = (config.attention_backend, placement.device, config.mixed_precision)
        check_attention(*asked)
        if config.keep_attention:
            check_keeps(*asked)
    return config, placement


class DataOptions(Protocol):
    """Which samples of which caches, for which model: as the options of that name say."""

    @property
    def shards(self) -> Sequence[WeightedFolder]: ...
    @property
    def shard_cache_gb(self) -> float: ...
    @property
    def where(self) -> Sequence[str] | None: ...
    @property
    def captions(self) -> str | None: ...
    @property
    def model(self) -> str: ...
    @property
    def train_mode(self) -> TrainMode | None: ...


def open_data(config: DataOptions, given_elsewhere: Given) -> tuple[ModelSpec, Dataset]:
    """The model's facts and the samples, from configs and index only (and from the samples'
    KEY.json, where `--where` asks for what stands there).

    The shards must be encoded as flags for `wanprep encode` say. Raises UserError where they don't
    belong together.
    """
    with ExitStack() as opening:
        stores = [
            opening.enter_context(
                open_store(one.path, shard_cache_gb=config.shard_cache_gb).pulled()
            )
            for one in config.shards
        ]
        where = tuple(map(condition, config.where or ()))
        folder = resolve_model(config.model, [])  # the configs decide which expert is needed
        spec = in_train_mode(read_model_spec(folder), config.train_mode)
        fields = model_fields(spec, FileHasher())
        caches = []
        for one, store in zip(config.shards, stores, strict=True):
            index = _open(store, config, spec, fields)
            refuse_other_encoding(given_elsewhere, index.fingerprint, store)
            caches.append((index, one.weight))
        _refuse_other_numbers([index for index, _ in caches])
        return spec, dataset_of(caches, where)


def _open(store: Store, config: DataOptions, spec: ModelSpec, fields: Fingerprint) -> CacheIndex:
    """One of the caches, with the captions and conditions that the run takes."""
    index = open_cache(store)
    if not len(index):
        raise UserError(
            f"shards: {store} has no samples; all were removed. Encode "
            f"some: wanprep encode --output {quoted(store)}"
        )
    if config.captions is not None:
        index = with_captions(index, config.captions)
    expected = as_in_cache(fields, index.fingerprint, spec.folder, FileHasher())
    expected = dict(expected)
    image = {"image": expected.pop("image", {})}  # CLIP's embeddings may have been added later
    _refuse_other_model(config, index, expected)
    wanted = cache_mode(spec)
    if index.fingerprint.get("mode") in LACKING.get(wanted, ()):
        index = with_conditions(index, config.model, wanted)
    _refuse_other_model(config, index, image)
    return index


def _refuse_other_numbers(caches: Sequence[CacheIndex]) -> None:
    """UserError where samples of several caches would not fit into one batch."""
    first = caches[0]
    for group in ("latents", "text"):
        for index in caches[1:]:
            one, other = (c.fingerprint.get(group, {}).get("dtype") for c in (first, index))
            if one != other:
                raise UserError(
                    f"shards: {group} of {first.store} are {one}, those of {index.store} "
                    f"{other}; a batch can't hold both. Encode one of them anew: wanprep encode "
                    f"--dtype {one} --output <new folder>"
                )


def update_batch(config: TrainConfig, placement: Placement) -> int:
    """Samples of one optimizer step, over all processes."""
    return config.train_batch_size * config.gradient_accumulation_steps * placement.mesh.data


def plan_run(
    config: TrainConfig, placement: Placement, spec: ModelSpec, data: Dataset, objective: Objective
) -> Run:
    """Plan the batches and the length. UserError where the data make no update."""
    if config.random_frame_crop and len(spec.given_frames) > 1:
        raise UserError(
            f"--random-frame-crop: with {spec.mode} a truncated clip would lose its last "
            "frame, which is part of its condition. Leave it out, or encode shorter clips, "
            "too: wanprep encode --video-sample-n-frames N --output <new folder>"
        )
    component = component_of(objective.expert)
    base = Base.parse(config.transformer_path, config.base_lora)
    base.fetched(config.model, spec, component)
    check_installed(config.base_precision)
    check_optimizer(config.chosen_optimizer)
    if config.blocks_to_swap is not None:
        config.streamed(len(blocks_of(empty_transformer(spec, component))))
    if config.init_lora is not None:
        check_init(
            ScaledLora.parse(config.init_lora, "--init-lora").path,
            spec,
            component,
            rank=config.rank,
            target_name=config.targets,
            skipped=config.skipped,
        )
    repeats, epochs = data.shown(config.video_repeat)
    plan = BatchPlan(
        bucket_ids=data.bucket_ids,
        repeats=repeats,
        epochs=epochs,
        batch_size=update_batch(config, placement),
        seed=config.seed,
        tail=config.tail,
    )
    return Run(
        config=config,
        placement=placement,
        base=base,
        spec=spec,
        data=data,
        plan=plan,
        objective=objective,
        steps=config.max_train_steps or _updates_in_epochs(config, plan, objective),
    )


def _refuse_other_model(config: DataOptions, index: CacheIndex, expected: Fingerprint) -> None:
    refuse_differences(
        index.fingerprint,
        expected,
        what=f"{index.store} were encoded with another model than {config.model}",
        cure=_cure(config, index, expected),
    )


def _cure(config: DataOptions, index: CacheIndex, expected: Fingerprint) -> str:
    """What to do about shards of another model."""
    model = f"--pretrained-model-name-or-path {quoted(config.model)}"
    cure = (
        "Use the model that encoded them (--pretrained-model-name-or-path), or encode for this "
        f"one: wanprep encode {model} --output <folder>"
    )
    differing = differences(index.fingerprint, expected)
    if all(field.startswith("text.") for field, _, _ in differing):
        return (
            f"Encode the text anew: wanprep recaption --name NAME --same-captions --shards "
            f"{quoted(index.store)} {model}, then train with --captions NAME. {cure}"
        )
    conditions = index.store.below(CONDITIONS)
    if all(field.startswith("image.") for field, _, _ in differing) and conditions.folder.is_dir():
        return (
            f"Delete {conditions} and add them for this model: wanprep add-condition --shards "
            f"{quoted(index.store)} {model} --train-data-dir DIR. {cure}"
        )
    return cure


def _updates_in_epochs(config: TrainConfig, plan: BatchPlan, objective: Objective) -> int:
    updates = config.num_train_epochs * plan.batches_per_epoch
    steps = objective.role_updates(objective.main_role, updates)
    if not steps:
        ahead = f"{objective.head_start} critic updates and " if objective.head_start else ""
        raise UserError(
            f"--num-train-epochs: {config.num_train_epochs} epochs of {plan.batches_per_epoch} "
            f"updates are {updates} updates, fewer than {ahead}one cycle of {objective.cycle - 1} "
            "critic updates and a generator update. Raise it, or set --max-train-steps."
        )
    return steps


def run_identity(run: Run, lora: LoraSpec, digest: str) -> Identity:
    """What a checkpoint of this run must match to be resumed, and what it merely remembers."""
    config = run.config
    ema = {"ema_decay": config.ema_decay, "ema_start": config.ema_start}
    model: dict[str, Any] = {"base": digest, "mode": run.spec.mode}
    if merged := run.base.merged:  # in the base's digest too; listed for people
        model["base_lora"] = [f"{x.digest[:12]} x {x.strength:g}" for x in merged]
    fixed: dict[str, Any] = {
        "model": model,
        "lora": {"rank": lora.rank, "alpha": lora.alpha, "targets": list(lora.targets)},
        "method": run.objective.method,
        "recipe": run.objective.identity() | ema,
    }
    loose: dict[str, Any] = remembered(config)
    if run.held_out is not None:
        fixed["holdout"] = loose["holdout"] = getattr(config, "holdout", None)
    optimizer = config.chosen_optimizer
    loose["use_8bit_adam"] = optimizer == "adamw8bit"
    if optimizer not in ("adamw", "adamw8bit"):  # which take each other's states; not to name
        fixed["optimizer"] = loose["optimizer"] = optimizer  # one is to be of AdamW
    # bf16 is what it is without the option
    loose["base_precision"] = config.base_precision if is_quantised(config.base_precision) else None
    loose |= run.objective.settings()
    for role, rate in run.objective.learning_rates.items():  # as the options are called
        loose["learning_rate" if role == run.objective.main_role else f"learning_rate_{role}"] = (
            rate
        )
    if config.lr_scheduler in DECAYING:
        loose["max_train_steps"] = run.steps
    loose["num_processes"] = run.placement.machines.num_processes
    loose["strategy"] = config.strategy
    loose["shards"] = run.data.identity()
    captions = run.data.captions_identity()
    loose["captions"] = captions and f"{config.captions} {captions}"
    loose["where"] = ", ".join(str(condition(one)) for one in config.where or ()) or None
    loose["init_lora"] = config.init_lora
    loose["base"] = run.base.describe() or None
    provenance = Provenance(
        expert=run.objective.expert,
        mode=run.spec.mode,
        **run.objective.sampling(),
        base=digest,
        cache={
            "digest": run.data.identity(),
            "fingerprint": run.data.first.fingerprint,
            "samples": len(run.data),
            "buckets": [[b.height, b.width, b.frames] for b in run.data.filled_buckets()],
        },
        rank=lora.rank,
        alpha=lora.alpha,
        updates=0,
        recipe={**fixed["recipe"], **loose, **_public(run)},
    )
    return Identity(
        fixed, loose, {"role": run.objective.main_role, "provenance": provenance.facts()}
    )


def _public(run: Run) -> dict[str, str | None]:
    """What LoRA files, which go to others, say of options that hold folders and a user's words."""
    init = run.config.init_lora
    return {
        "base": run.base.without_folders.describe() or None,
        "init_lora": init and str(ScaledLora.parse(init, "--init-lora").without_folder),
        "where": None,
    }


def resolved_configuration(run: Run) -> str:
    """The configuration with the model's defaults filled in, as JSON for --dry-run."""
    decided = run.objective.identity()
    options = asdict(run.config) | {"shards": [str(folder) for folder in run.config.shards]}
    shown = {name: decided.get(name, value) for name, value in options.items()}
    shown |= {"device": run.device} | vars(run.placement.machines)
    return json.dumps(shown, indent=2, default=str)


def estimate(run: Run) -> Estimate | None:
    """None for models in Wan's original layout, whose configs follow from their weights."""
    found = memory_settings(run)
    return None if found is None else estimate_of(*found)


def memory_settings(run: Run) -> tuple[nn.Module, Mode, int, Settings] | None:
    """What `estimate_of` takes, of the largest bucket; None as `estimate`."""
    config, spec = run.config, run.spec
    if is_original(spec.folder):
        return None
    transformer = empty_transformer(spec, component_of(run.objective.expert))
    settings = Settings(
        samples=config.train_batch_size,
        rank=config.rank,
        target_name=config.targets,
        lora_skip_name=config.skipped,
        roles=len(run.objective.learning_rates),
        average=bool(config.ema_decay),
        processes=run.placement.machines.num_processes,
        memory=config,
    )
    return transformer, spec.mode, run.most_tokens, settings

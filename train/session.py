"""A run with its weights: base, adapters, optimizers, perhaps a checkpoint; and saving it."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shared.errors import UserError
from shared.format.schema import DTYPES
from shared.models.spec import blocks_of
from train.config import DistillConfig, TrainConfig
from train.data.batches import PromptBank, load_prompt_bank
from train.distributed.process_group import SINGLE
from train.memory.activation_offload import ActivationOffloading
from train.memory.block_offload import streamed_blocks, streaming_line
from train.memory.keep_attention import keep_attention
from train.memory.quantize import quantise
from train.model.attention import chosen_kernel, use_attention
from train.model.base import base_digest, component_of, load_base
from train.model.compile import check_compile, compile_blocks
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.lora_files import LoraWeights, read_lora
from train.model.lora_init import start_from
from train.model.lora_source import ScaledLora
from train.model.roles import Roles
from train.optim.ema import Ema
from train.optim.lr_checks import Weights, warn_of_file, warn_of_learning_rate
from train.optim.optimizers import OptimizerSettings
from train.options import Gauge
from train.run import Run, run_identity
from train.sampling.model_card import Trained, write_guides
from train.saving.best import best_folder, keep_as_best, settle_best
from train.saving.checkpoint import (
    Files,
    Identity,
    TrainState,
    checkpoint_name,
    ema_file,
    find_checkpoint,
    load_checkpoint,
    remove_oldest,
    save_checkpoint,
    set_later_aside,
)
from train.saving.export import lora_path, write_loras
from train.saving.provenance import Provenance, read_provenance
from train.strategies.base import Strategy
from train.strategies.spread import device_bytes, parameter_bytes, spread
from train.tracking.gauges import Gauges
from train.tracking.held_out import losses_of

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Session:
    """What the loop works on. All processes have one, and call its methods together."""

    run: Run
    roles: Roles
    strategy: Strategy
    state: TrainState
    lora: LoraSpec
    identity: Identity
    bank: PromptBank
    start: Weights | None
    """B of --init-lora, in the dtype of the run's files."""
    say: Say

    def save(self) -> Path:
        """A checkpoint, and the oldest deleted where there are more than wanted; its path."""
        files = self.state.files()
        config = self.run.config

        def write() -> Path:
            updates = self.state.updates
            steps, others = self.run.counted(updates)
            folder, limit = config.output_dir, config.checkpoints_total_limit
            with _writing_to(folder):
                saved = save_checkpoint(
                    folder,
                    files,
                    updates,
                    replace(self.identity, lora=self._lora_facts()),
                    steps=steps,
                    others=others,
                    record=self.state.record,
                )
                if limit is not None:
                    remove_oldest(folder, limit)
            return saved

        return self.run.ranks.first_does(write)

    def save_if_best(self) -> Path:
        """`save`, and keep the checkpoint beside the last ones if its gauge is the best so far."""
        wanted, updates = keep_best_of(self.run.config), self.state.updates
        best = wanted is not None and Gauges(self.state.record).is_best(wanted, updates)
        saved = self.save()
        if best:
            self.run.ranks.first_does(partial(self._keep_best, saved))
        return saved

    def _keep_best(self, checkpoint: Path) -> Path:
        config, wanted = self.run.config, keep_best_of(self.run.config)
        assert wanted is not None
        with _writing_to(config.output_dir):
            return keep_as_best(
                config.output_dir,
                wanted,
                checkpoint,
                self.run.objective.expert,
                DTYPES[config.save_precision],
                partial(guide, self.run),
            )

    def settle_best(self) -> None:
        """Make the folder of the best agree with the state that the run starts from."""
        wanted = keep_best_of(self.run.config)
        if wanted is None:
            return
        best = self.state.record.get("best", {})
        name = (
            checkpoint_name(*self.run.counted(best["updates"]))
            if best.get("gauge") == wanted
            else None
        )
        agrees, note = self.run.ranks.first_does(
            partial(settle_best, self.run.config.output_dir, wanted, name, self._keep_best)
        )
        if note:
            self.say(f"best     {note}")
        if not agrees:
            del self.state.record["best"]

    def _lora_facts(self) -> dict[str, Any]:
        """`Identity.lora` with what the gauges say now."""
        facts, gauges = self.identity.lora, Gauges(self.state.record).summary()
        if gauges is None:
            return facts
        return {**facts, "provenance": {**facts["provenance"], "gauges": gauges}}

    def alone(self) -> "Session":
        """The same without the other processes, for one that holds all."""
        placement = replace(self.run.placement, ranks=SINGLE)
        return replace(self, run=replace(self.run, placement=placement))

    def leave_behind(self) -> None:
        """A checkpoint of the last update, unless there is one, and the LoRA files."""
        run, state = self.run, self.state
        last = run.config.output_dir / checkpoint_name(*run.counted(state.updates))
        if not run.ranks.first_does(last.exists):
            # A state in which the run was stopped is no candidate: left in peace it would not be.
            save = self.save_if_best if state.updates == run.updates else self.save
            self.say(f"saved    {save()}")
        readings = Gauges(state.record).readings()
        if readings:
            shown = ", ".join(f"{gauge} {reading}" for gauge, reading in readings.items())
            self.say(f"gauges   {shown} (1: as the teacher)")
        if best := state.record.get("best"):
            folder = best_folder(run.config.output_dir, best["gauge"])
            self.say(f"best     {folder} (step {run.counted(best['updates'])[0]})")
        weights = state.trained[run.objective.main_role].weights()
        loras, workflow, card = run.ranks.first_does(partial(self._write_loras, weights))
        for path in loras:
            self.say(f"LoRA     {path}")
        self.say(f"ComfyUI  {workflow}")
        self.say(f"card     {card}")

    def _write_loras(self, weights: Mapping[str, torch.Tensor]) -> tuple[list[Path], Path, str]:
        """In every form, with how to use them; the paths, and a line about the model card."""
        config = self.run.config
        steps, _ = self.run.counted(self.state.updates)
        provenance = Provenance.of({**self._lora_facts()["provenance"], "updates": steps})
        weights = self.state.ema.weights if self.state.ema else weights
        dtype = DTYPES[config.save_precision]
        lora = LoraWeights.uniform(weights, self.lora.alpha).to(dtype)
        if steps and (warning := warn_of_file(self.start, lora.weights, dtype)):
            self.say(f"warning  {warning}")
        folder = config.output_dir
        with _writing_to(folder):
            loras = write_loras(folder, lora, provenance)
            return loras, *guide(self.run, folder)


def guide(run: Run, folder: Path) -> tuple[Path, str]:
    """Write how to use the LoRA files of a run that are in `folder`; as `write_guides`."""
    path = lora_path(folder, run.objective.expert, "comfyui")
    trained = Trained(provenance=read_provenance(path), held_out=held_out_loss(run))
    changed = run.base.without_folders.describe()
    width = read_lora(path).lora.width
    return write_guides(folder, [trained], width, model=run.config.model, changed=changed)


def held_out_loss(run: Run) -> float | None:
    """What the run has measured last, if it measures."""
    measured = losses_of(run.config.output_dir) if run.held_out is not None else []
    return measured[-1][1] if measured else None


def keep_best_of(config: TrainConfig) -> Gauge | None:
    """--keep-best, where the command has it."""
    return config.keep_best if isinstance(config, DistillConfig) else None


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """Block whose OSErrors, such as a full disk's, become UserErrors."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"--output-dir: can't write to {folder} ({error.strerror}); what was saved before is "
            "intact. Free some space there, then resume from the last checkpoint: "
            "--resume-from-checkpoint latest"
        ) from error


def open_session(run: Run, say: Say) -> Session:
    """Load the base, add adapters and optimizers, and resume from a checkpoint if asked for."""
    config, objective, ranks = run.config, run.objective, run.ranks

    resume_from = ranks.first_does(
        lambda: find_checkpoint(
            config.output_dir,
            config.resume_from_checkpoint,
            on_damaged=lambda why: say(f"resume   {why}; an earlier one is taken"),
        )
    )
    for line in run.describe():
        say(line)

    for note in run.base.notes():
        say(f"base     {note}")

    # Base, adapters, optimizers
    bank = load_prompt_bank(run.data.first, run.spec.family)
    device = torch.device(run.device)
    settle_rounding(config)
    if config.compile:
        check_compile(run.device)
    component = component_of(objective.expert)
    digest = ranks.first_does(partial(base_digest, run.spec.folder, component, run.base))
    transformer = load_base(
        run.spec,
        objective.expert,
        precision=config.mixed_precision,
        device=device,
        gradient_checkpointing=config.gradient_checkpointing,
        base=run.base,
        sharing=ranks if config.shards_base else SINGLE,
    )
    use_attention(transformer, config.attention_backend)
    facts: Any = transformer.config
    kernel, slow = chosen_kernel(
        config.attention_backend,
        device,
        config.mixed_precision,
        (facts.num_attention_heads, facts.attention_head_dim),
        run.most_tokens,
    )
    say(f"kernel   {kernel}")
    if slow:
        say(f"warning  {slow}")
    if config.compile:
        several = len(run.data.filled_buckets()) > 1 or config.random_frame_crop
        compile_blocks(transformer, several_shapes=several)
    lora = lora_of(config, transformer)
    rates = objective.learning_rates
    roles = Roles(transformer, lora, seed=config.seed, names=rates, fused=config.fused_lora)
    start = _warm_start(roles, run, lora, say)
    for name, rate in rates.items():
        option = "--learning-rate" if name == objective.main_role else f"--learning-rate-{name}"
        own = roles.parameters(name)
        if warning := warn_of_learning_rate(name, option, own, rate, config.chosen_optimizer):
            say(f"warning  {warning}")
    quantise(transformer, config.base_precision, device)
    whole_bytes = parameter_bytes(transformer)
    streamed = config.streamed(len(blocks_of(transformer)))
    settings = OptimizerSettings(
        name=config.chosen_optimizer,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        weight_decay=config.adam_weight_decay,
    )
    assert config.strategy is not None  # `place_run` decided it
    strategy = spread(
        config.strategy,
        roles,
        rates,
        settings,
        ranks=ranks,
        device=device,
        streamed=streamed,
        accumulation=config.gradient_accumulation_steps,
        max_norm=config.max_grad_norm,
    )
    for note in strategy.notes:
        say(f"spread   {note}")
    if (blocks := streamed_blocks(transformer)) is not None:
        say(streaming_line([blocks]))
    if config.activation_offloading:
        offloading = ActivationOffloading(device, keep_attention=config.keep_attention)
        transformer.enable_gradient_checkpointing(offloading.checkpoint)  # type: ignore[operator]
    elif config.keep_attention:
        transformer.enable_gradient_checkpointing(keep_attention)  # type: ignore[operator]
    if ranks.world_size > 1:
        held = device_bytes(transformer)
        say(
            f"spread   {config.strategy}: each of {ranks.world_size} ranks stores "
            f"{held / 1e6:.3f} of {whole_bytes / 1e6:.3f} MB of parameters"
        )

    # The state of a new run, or of a resumed one
    state = TrainState(strategy.trained)
    weights: Files = {
        f"{name}_weights.safetensors": role.weights() for name, role in state.trained.items()
    }
    if config.ema_decay and ranks.first:
        role = objective.main_role
        trained = weights[f"{role}_weights.safetensors"]
        state.ema = Ema.of(role, trained, decay=config.ema_decay, start=config.ema_start)
        weights[ema_file(role)] = state.ema.weights
    identity = run_identity(run, lora, digest)
    if resume_from:
        loaded = ranks.first_does(partial(load_checkpoint, resume_from, weights, identity))
        state.load(loaded.files, loaded.updates, loaded.record)
        for change in loaded.changes:
            say(f"resume   changed since the checkpoint: {change}")
        say(f"resume   from {resume_from} at update {state.updates}")
        for path in ranks.first_does(partial(set_later_aside, resume_from, config.output_dir)):
            say(f"resume   set aside the later {path.name}")
        if state.updates >= run.updates:
            length = f"{run.steps} {objective.main_role} updates"
            say(f"resume   the run of {length} is complete")
    elif config.resume_from_checkpoint:
        say(f"resume   no checkpoint in {config.output_dir} yet: a new run")
    session = Session(
        run=run,
        roles=roles,
        strategy=strategy,
        state=state,
        lora=lora,
        identity=identity,
        bank=bank,
        start=start,
        say=say,
    )
    session.settle_best()
    return session


def settle_rounding(config: TrainConfig) -> None:
    """How CUDA's matmuls round, and whether its kernels add up in one order."""
    torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
    # A LoRA's gradient is a sum over all tokens, 32,760 at 480p: partial sums stay fp32.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by its first matmul
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(config.deterministic)


def lora_of(config: TrainConfig, transformer: nn.Module) -> LoraSpec:
    """The adapters that a run puts on its transformer. UserError as of `select_targets`."""
    targets = select_targets(transformer, config.targets, config.skipped)
    return LoraSpec(rank=config.rank, alpha=config.network_alpha, targets=targets)


def _warm_start(roles: Roles, run: Run, lora: LoraSpec, say: Say) -> Weights | None:
    """Fill the main role from --init-lora; its B matrices then, in the dtype of the run's files."""
    config, parameters = run.config, roles.parameters(run.objective.main_role)
    if config.init_lora is None:
        return None
    init = ScaledLora.parse(config.init_lora, "--init-lora")
    file = read_lora(init.path)
    start_from(file, parameters, lora, init.strength)
    say(f"start    {init}: {len(file.lora.modules)} layers, {file.form} form")
    if file.note:
        say(f"start    {file.note}")
    if warning := _led_on_otherwise(init, run):
        say(f"warning  {warning}")
    ups = {name: weight.detach() for name, weight in parameters.items() if ".lora_B." in name}
    dtype = DTYPES[config.save_precision]
    return {name: weight.to("cpu", dtype, copy=True) for name, weight in ups.items()}


def _led_on_otherwise(init: ScaledLora, run: Run) -> str | None:
    """A warning where the steps of --init-lora were learned for another pairing than the run's."""
    try:
        theirs = read_provenance(init.path).pairing
    except UserError:  # another trainer's
        return None
    ours = run.objective.sampling()["pairing"]
    if None in (theirs, ours) or theirs == ours:
        return None
    return (
        f"--init-lora: the steps of {init.path} lead on by {theirs}, this run's by {ours}. Go on "
        f"as it learned: --pairing {theirs}"
    )

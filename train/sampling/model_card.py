"""How to use LoRA files, beside them: a model card (README.md) and a ComfyUI workflow.

The card is one of Hugging Face's: YAML, then Markdown. It says nothing of where things lie on this
machine, and no caption; a name of a file is text in it, whatever characters it has.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from huggingface_hub import ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from shared.io.durable import write_bytes
from shared.io.names import in_home_folder, is_folder, on_one_line, quoted
from shared.models.spec import DEFAULT_MODEL, TIMESTEPS
from shared.models.toy_model import TOY_MODELS
from shared.models.wan import WAN, published_model
from train.model.lora_names import Form
from train.options import Expert
from train.sampling.comfyui import (
    UI_FILE,
    frames_per_second,
    largest_clip,
    loras_of_run,
    prompt_hint,
    transformer_files,
    write_workflow,
)
from train.sampling.config import TEACHER_GUIDANCE, TEACHER_STEPS, SampleConfig
from train.saving.export import lora_path
from train.saving.provenance import SAMPLERS, TITLES, Provenance

CARD = "README.md"
MARKER = "<!-- wandistill writes this file with its LoRA. Without this line it leaves it alone. -->"
_CACHED = re.compile(r"/models--([^/]+)/snapshots/")
_SCHEDULERS = {
    "renoise": "FlowMatchLCMScheduler",
    "euler": "FlowMatchEulerDiscreteScheduler",
    None: "UniPCMultistepScheduler",
}
# Mode → the hub's names for it, its pipeline's first.
_TASKS = {
    "t2v": ("text-to-video",),
    "i2v": ("image-to-video",),
    "flf2v": ("image-to-video",),
    "ti2v": ("text-to-video", "image-to-video"),
}
# Of `Provenance.recipe`, what tells runs apart. None of them holds a path or a text of the user's.
_SETTINGS = """
    start pairing match exits maths score_floor score_levels real_guidance_scale
    fake_guidance_scale fm_loss_weight gen_update_interval critic_warmup timestep_sampling
    logit_mean logit_std learning_rate learning_rate_critic lr_scheduler lr_warmup_steps optimizer
    use_8bit_adam adam_weight_decay max_grad_norm train_batch_size gradient_accumulation_steps
    num_processes ema_decay caption_dropout random_frame_crop mixed_precision base_precision seed
"""
_GAUGES = ("contrast", "motion", "variety")


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A LoRA that a card is about."""

    provenance: Provenance
    held_out: float | None = None
    """The last loss on what `--holdout` keeps from training."""
    folder: str = "."
    """Of its files, seen from the card's."""

    def file(self, form: Form) -> str:
        return lora_path(Path(self.folder), self.provenance.expert, form).as_posix()


def write_guides(
    folder: Path, trained: Sequence[Trained], width: int, *, model: str, changed: str = ""
) -> tuple[Path, str]:
    """Write the workflow and the card; the workflow's path, and a line about the card.

    `width`: of the transformer's hidden states; `model`: as --model names it; `changed`: what was
    done to its weights before training, in words without folders. A README.md that somebody else
    has written stays.
    """
    first = trained[-1].provenance
    names = {expert: Path(file).name for expert, file in _files(trained, "comfyui").items()}
    workflow = write_workflow(folder, loras_of_run(first) | names, first, width)[0]
    card = folder / CARD
    if card.is_dir() or (card.exists() and MARKER not in card.read_text(errors="replace")):
        return workflow, f"{card} is not wandistill's: left as it is"
    text = model_card(trained, width, model=model, changed=changed)
    write_bytes(card, text.encode())
    return workflow, str(card)


def model_card(trained: Sequence[Trained], width: int, *, model: str, changed: str = "") -> str:
    """The card's text; arguments as of `write_guides`."""
    first, hub_id = trained[-1].provenance, hub_id_of(model)
    few, given = first.method == "distill", WAN.given_frames.get(first.mode, ())
    base = hub_id or on_one_line(Path(model).name or Path(model).absolute().name)
    loras = loras_of_run(first, "diffusers") | _files(trained, "diffusers")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"text": partial(json.dumps, ensure_ascii=False), "code": _code}
    return environment.get_template("model_card.md").render(
        front=_front(first, None if changed else hub_id),
        marker=MARKER,
        title=f"{'Few-step ' * few}LoRA for {hub_id or f'{first.family.title()} {first.mode}'}",
        what=_what(trained, base),
        trained=trained,
        first=first,
        few=few,
        hub_id=hub_id,
        base=base,
        changed=changed,
        given=given,
        loras=loras,
        comfyui=_comfyui(trained, width),
        workflow=UI_FILE,
        pipeline=WAN.classes["image_pipeline" if given else "pipeline"][1],
        scheduler=_SCHEDULERS[first.pairing],
        sampler=first.pairing and SAMPLERS[first.pairing],
        sigmas=[index / TIMESTEPS for index in first.denoising_step_indices_list],
        timesteps=", ".join(f"{t:.1f}" for t in first.schedule.timesteps) if few else "",
        steps=len(first.denoising_step_indices_list) if few else TEACHER_STEPS,
        guidance=1.0 if few else TEACHER_GUIDANCE,
        prompt=prompt_hint(first.mode),
        negative_prompt=WAN.negative_prompt,
        text_tokens=WAN.text_tokens,
        clip=largest_clip(first),
        fps=frames_per_second(first),
        full_of_two=first.boundary is not None and first.expert == "full",
        # As the shards' embeddings were computed
        clip_dtype=', "image_encoder": torch.float32' if given and first.boundary is None else "",
        sample=sample_command(first, loras.values(), base),
        columns=[TITLES[one.provenance.expert] for one in trained],
        rows=dict(_rows(trained)),
    )


def hub_id_of(model: str) -> str | None:
    """The id on the Hugging Face hub of what `--model` names; None where that is not certain.

    Certain is an id that was asked for, and a folder of the hub's own cache. What another folder
    holds its name does not say.
    """
    name = model
    if is_folder(Path(model)) or is_folder(in_home_folder(model)) or model in TOY_MODELS:
        cached = _CACHED.search(str(Path(model).absolute()))
        if cached is None:
            return None
        name = cached[1].replace("--", "/", 1)
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    known = published_model(name)
    return known.hub_id if known else name


def sample_command(
    provenance: Provenance, loras: Iterable[object], model: str, more: Sequence[str] = ()
) -> str:
    """The command that makes a clip as large and long as the largest of the training."""
    words = ["wantrain sample"]
    if model != DEFAULT_MODEL:
        words.append(f"--model {quoted(model)}")
    words += [f"--lora {quoted(lora)}" for lora in loras]
    options = SampleConfig.__dataclass_fields__
    for name, value in largest_clip(provenance).items():
        if value != options[name].default:
            words.append(f"--{name.replace('_', '-')} {value}")
    frames = ("--image FIRST-FRAME", "--last-image LAST-FRAME")
    given = frames[: len(WAN.given_frames.get(provenance.mode, ()))]
    return " ".join([*words, *more, *given, "--prompt TEXT"])


def _files(trained: Sequence[Trained], form: Form) -> dict[Expert, str]:
    """Expert → LoRA, as seen from the card."""
    return {one.provenance.expert: one.file(form) for one in trained}


def _front(provenance: Provenance, hub_id: str | None) -> str:
    """The card's YAML."""
    tasks = _TASKS[provenance.mode]
    few = ("few-step", "distillation") if provenance.method == "distill" else ()
    data = ModelCardData(
        base_model=hub_id,
        base_model_relation="adapter" if hub_id else None,
        library_name="diffusers",
        pipeline_tag=tasks[0],
        tags=["lora", provenance.family, *tasks, *few, "comfyui", "wandistill"],
    )
    return data.to_yaml() + "\n"


def _what(trained: Sequence[Trained], base: str) -> str:
    first = trained[-1].provenance
    how = "flow matching on clips"
    if first.method == "distill":
        how = "distribution matching (DMD)"
        if first.recipe.get("method") == "regression":
            how = "regression on its teacher's trajectories"
    parts = " and ".join(TITLES[one.provenance.expert] for one in trained)
    return f"Trained on {_code(base)} by {how}: {parts}. wandistill {first.version}."


def _comfyui(trained: Sequence[Trained], width: int) -> dict[str, str]:
    """LoRA → the base's file."""
    first = trained[-1].provenance
    models = transformer_files(first, width)
    loras = loras_of_run(first) | _files(trained, "comfyui")
    return {file: models[-1 if expert == "low" else 0] for expert, file in loras.items()}


def _rows(trained: Sequence[Trained]) -> Iterator[tuple[str, list[str]]]:
    """Name → what each LoRA has of it; what none has is left out."""
    columns = [_values(one) for one in trained]
    for name in columns[0]:
        values = [column[name] for column in columns]
        if any(values):
            yield name, [value or "–" for value in values]


def _values(one: Trained) -> dict[str, str]:
    """Name → how a LoRA was trained, and what was measured; empty: nothing."""
    told, gauges = one.provenance, one.provenance.gauges or {}
    named = {
        "rank": str(told.rank),
        "alpha": f"{told.alpha:g}",
        "optimizer steps": str(told.updates),
        "shift": f"{told.flow_shift:g}",
    }
    settings = {name: _setting(told.recipe.get(name)) for name in _SETTINGS.split()}
    measured = {f"{name}, 1: as the teacher": _setting(gauges.get(name)) for name in _GAUGES}
    held_out = {
        "loss on clips kept from training": "" if one.held_out is None else f"{one.held_out:.4f}"
    }
    return named | {f"`{name}`": value for name, value in settings.items()} | measured | held_out


def _setting(value: float | str | None) -> str:
    if value is None or value is False:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return "by noise level" if str(value).startswith("table ") else str(value)


def _code(text: str) -> str:
    """Text of any origin as code in Markdown."""
    text = on_one_line(text)
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    space = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"

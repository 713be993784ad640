"""What the page of a run shows of its data and of the files in its folder."""

import re
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared.cli.console import count
from shared.cli.run_file import RUN_FILE
from shared.errors import UserError
from shared.format.cache import MemberReader
from shared.io.durable import TEMPORARY_SUFFIX
from shared.io.toml_file import read_toml
from shared.pages.html import data_uri
from shared.pages.thumbnail import thumbnail_of
from shared.spread import spread_over
from train.data.dataset import Dataset
from train.saving.checkpoint import list_checkpoints
from train.tracking.held_out import RECORD
from train.tracking.metrics_file import METRICS
from train.tracking.validation import FOLDER, read_records

_SAMPLES, _MOST_PROMPTS, _MOST_STEPS, _MOST_CHECKPOINTS = 8, 6, 6, 3
_MOST_CLIP_BYTES = 1 << 20
_STEP = re.compile(r"step-(\d+)")
_FILES = {
    "lora-*-diffusers.safetensors": "LoRA for diffusers",
    "lora-*-comfyui.safetensors": "LoRA for ComfyUI",
    "lora-*-kohya.safetensors": "LoRA for musubi-tuner and ComfyUI",
    "README.md": "model card",
    "workflow-comfyui.json": "ComfyUI workflow",
    "workflow-comfyui-api.json": "the same for ComfyUI's server",
    "checkpoint-*": "to resume from, or for wantrain export",
    "best-*": "the checkpoint whose gauge was best",
    RUN_FILE: "the options, for --config",
    METRICS: "numbers of each update",
    RECORD: "held-out losses",
    "tail.jsonl": "samples shown again to fill batches",
    FOLDER: "validation clips",
    "logs": "files of trackers",
    "log.txt": "what libraries logged",
}


@dataclass(frozen=True, kw_only=True)
class Card:
    """A sample of the data."""

    picture: str | None
    """A data URI."""
    caption: str
    what: str


def cards_of(data: Dataset) -> list[Card]:
    """A few samples, spread over them all. One that can't be read is left out."""
    cards = []
    for sample in map(int, spread_over(len(data), _SAMPLES)):
        number, row = data.place(sample)
        index = data.parts[number].index
        with closing(MemberReader(index)) as reader:
            try:
                info, picture = reader.info(row), thumbnail_of(index, reader, row)
            except UserError:  # training names it when it comes to it
                continue
        length = f"{info['frames']} frames" if info["frames"] > 1 else "image"
        what = f"{info['width']}×{info['height']} · {length}"
        cards.append(Card(picture=picture, caption=info["caption"], what=what))
    return cards


@dataclass(frozen=True, kw_only=True)
class Clips:
    """Validation clips: rows of prompts, columns of steps."""

    steps: Sequence[int]
    rows: Sequence[tuple[str, Sequence[str | None]]]
    """Prompt, and data URIs; None for a clip that is not there or too large."""
    left_out: str
    """In words; empty where all are shown."""


def clips_of(folder: Path, last: int) -> Clips | None:
    """Those in `folder` of steps up to `last`, one a prompt; None where there are none."""
    found = {int(m[1]): path for path in folder.glob("step-*") if (m := _STEP.fullmatch(path.name))}
    steps = sorted(step for step in found if step <= last)
    if not steps:
        return None
    shown = [steps[place] for place in spread_over(len(steps), _MOST_STEPS)]
    prompts = {step: _prompts(found[step]) for step in shown}
    listed = max(prompts.values(), key=len)
    first = {prompt: file for file, prompt in reversed(listed.items())}
    rows = [
        (prompt, [_clip(found[step], file, prompts[step].get(file) == prompt) for step in shown])
        for prompt, file in sorted(first.items(), key=lambda pair: pair[1])[:_MOST_PROMPTS]
    ]
    more = {"clips of each step": len(listed) - len(rows), "steps": len(steps) - len(shown)}
    left_out = " and ".join(f"{number} {what}" for what, number in more.items() if number)
    return Clips(steps=shown, rows=rows, left_out=left_out)


def _prompts(folder: Path) -> dict[str, str]:
    """File of latents → its prompt."""
    return {record["file"]: record["prompt"] for record in read_records(folder) or ()}


def _clip(folder: Path, file: str, of_prompt: bool) -> str | None:
    path = (folder / file).with_suffix(".mp4")
    if not of_prompt or not path.is_file() or path.stat().st_size > _MOST_CLIP_BYTES:
        return None
    return data_uri("video/mp4", path.read_bytes())


def configuration_of(folder: Path, command: str) -> dict[str, Any]:
    """The options that the run's own file has, without secrets as they are there."""
    options = read_toml(folder / RUN_FILE)[command]
    assert isinstance(options, dict)
    return options


def files_of(folder: Path) -> list[tuple[str, str, int]]:
    """Name, what for, and bytes of what is in the folder of a run; folders with all below them."""
    earlier = {path.name for path in list_checkpoints(folder)[:-_MOST_CHECKPOINTS]}
    found = []
    for pattern, what in _FILES.items():
        paths = [path for path in sorted(folder.glob(pattern)) if path.suffix != TEMPORARY_SUFFIX]
        found += [(p.name, what, _bytes(p)) for p in paths if p.name not in earlier]
        hidden = [path for path in paths if path.name in earlier]
        if hidden:
            sizes = sum(map(_bytes, hidden))
            found.append((count(len(hidden), "earlier checkpoint"), "", sizes))
    return found


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    files = (file for file in path.rglob("*") if file.is_file())
    return sum(file.stat().st_size for file in files)

"""A clip of one side and its numbers; a prompt's numbers are means over its clips."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shared.errors import UserError
from shared.io.mp4 import Clip, read_mp4
from train.evaluation.agreement import PromptAgreement
from train.evaluation.measures import Measures, measure, thumbnail, variety
from train.evaluation.prompts import Prompt

TEACHER, STUDENT = SIDES = ("teacher", "student")
MEASURES = {
    "motion": "px a frame",
    "dynamic": "share of clips",
    "contrast": "of 127.5",
    "saturation": "of 1",
    "sharpness": "",
    "variety": "of 255",
    "agreement": "of 100",
}
"""Name → unit, in the order of tables."""


@dataclass(frozen=True, kw_only=True)
class MeasuredClip:
    """One clip of one side."""

    side: str
    prompt: str
    image: str | None
    seed: int | None
    path: Path
    shape: tuple[int, ...]
    measures: Measures
    agreement: float | None
    thumbnail: Clip

    def numbers(self) -> dict[str, float]:
        """Measure → value, of those that one clip has."""
        agreement = {} if self.agreement is None else {"agreement": self.agreement}
        return asdict(self.measures) | agreement

    def record(self) -> dict[str, Any]:
        """For JSON."""
        frames, height, width, _ = self.shape
        return {
            "side": self.side,
            "file": str(self.path),
            "prompt": self.prompt,
            "seed": self.seed,
            "frames": frames,
            "height": height,
            "width": width,
        } | self.numbers()


def measured_clip(
    side: str, prompt: Prompt, seed: int | None, path: Path, agreement: PromptAgreement | None
) -> MeasuredClip:
    """A clip's file, measured. UserError where it is none, or has one frame."""
    try:
        frames = read_mp4(path)
    except OSError as error:
        raise UserError(f"--{side}-clips: {error}. Expected an mp4 file.") from error
    if len(frames) < 2:
        raise UserError(f"--{side}-clips: {path} has one frame, expected two or more.")
    return MeasuredClip(
        side=side,
        prompt=prompt.text,
        image=None if prompt.image is None else str(prompt.image),
        seed=seed,
        path=path,
        shape=frames.shape,
        measures=measure(frames),
        agreement=None if agreement is None else agreement.score(frames, prompt.text),
        thumbnail=thumbnail(frames),
    )


def by_prompt(
    clips: Sequence[MeasuredClip],
) -> dict[tuple[str, str | None], dict[str, dict[str, float]]]:
    """(prompt, image) → side → measure → mean over seeds; variety where there are several."""
    found: dict[tuple[str, str | None], dict[str, dict[str, float]]] = {}
    for prompt in dict.fromkeys((clip.prompt, clip.image) for clip in clips):
        for side in SIDES:
            own = [c for c in clips if (c.prompt, c.image) == prompt and c.side == side]
            numbers = [clip.numbers() for clip in own]
            means = {n: sum(each[n] for each in numbers) / len(numbers) for n in numbers[0]}
            apart = variety([clip.thumbnail for clip in own])
            found.setdefault(prompt, {})[side] = means | (
                {} if apart is None else {"variety": apart}
            )
    return found

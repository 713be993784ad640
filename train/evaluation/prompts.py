"""Which prompts are compared, each with its first frame where the model takes one."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shared.errors import UserError
from shared.format.captions import is_blank
from train.evaluation.config import EvaluateConfig

_OPTION = re.compile(r"\s--(?P<name>[a-z]+)(?:\s+(?P<value>\S.*))?$")


@dataclass(frozen=True)
class Prompt:
    """One to be sampled."""

    text: str
    image: Path | None = None


def read_prompts(config: EvaluateConfig) -> list[Prompt]:
    """Those of the command line, then those of the file. UserError naming what is wrong."""
    texts, images = config.prompt or [], config.image or []
    if len(images) not in (0, 1, len(texts)):
        raise UserError(
            f"--image: found {len(images)} for {len(texts)} --prompt, expected one, or one for "
            "each. In --prompts FILE an image stands in its line: a cat --i cat.png"
        )
    pictures: Sequence[Path | None] = images
    if len(images) < 2:
        pictures = [*images, None][:1] * len(texts)
    found = [Prompt(text.strip(), image) for text, image in zip(texts, pictures, strict=True)]
    if config.prompts is not None:
        found += _listed(config.prompts)
    if any(is_blank(prompt.text) for prompt in found):
        raise UserError("--prompt: found an empty prompt, expected text.")
    for prompt in found:
        if found.count(prompt) > 1:  # it would pass for more evidence than it is
            raise UserError(f"--prompt: found {prompt.text!r} twice, expected each once.")
    if len({prompt.image is None for prompt in found}) > 1:
        without = next(prompt.text for prompt in found if prompt.image is None)
        raise UserError(f"--image: {without!r} has none and others do. Expected all or none.")
    return found


def _listed(path: Path) -> list[Prompt]:
    """A prompt a line; empty lines and lines with # are none."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no UTF-8"
        raise UserError(f"--prompts: cannot read {path} as text ({why}).") from error
    found = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        option = _OPTION.search(line.rstrip())
        text, image = line, None
        if option is not None:
            if option["name"] != "i" or not option["value"] or " --" in option["value"]:
                raise UserError(
                    f"--prompts: line {number} of {path} ends in {option[0].strip()!r}, expected "
                    "nothing but --i FILE after the prompt. Size and seeds are options of the "
                    "command."
                )
            text, image = line[: option.start()], path.parent / option["value"].strip()
        if not text.strip():
            raise UserError(f"--prompts: line {number} of {path} has no prompt before its image.")
        found.append(Prompt(text.strip(), image))
    if not found:
        raise UserError(f"--prompts: {path} has no prompts. Write one a line.")
    return found

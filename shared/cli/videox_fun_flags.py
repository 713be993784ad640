"""Every flag of VideoX-Fun's `scripts/wan2.2/train_distill_lora.py`: an option here, or why not.

So that a shell file for that script can be handed to `wanprep encode` and `wantrain distill` as it
is. The table is the JSON file beside this one; docs/from-videox-fun.md says the same to people.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Values = Literal[0, 1, 2, "+"]


@dataclass(frozen=True, kw_only=True)
class VideoXFunFlag:
    """One flag, as the script's parser has it."""

    name: str
    """With underscores, without dashes."""
    values: Values = 1
    """How many follow it; 0: a switch."""
    reason: str = ""
    """Of a flag that no command of ours has as an option: why it is not needed, or not
    supported."""
    refused: bool = False
    """It would change the LoRA and is not supported: an error, not ignored."""
    same_as: str | None = None
    """A value of a refused flag that asks for what is done here anyway."""

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


VIDEOX_FUN_FLAGS: tuple[VideoXFunFlag, ...] = tuple(
    VideoXFunFlag(name=name, **facts)
    for name, facts in json.loads(Path(__file__).with_suffix(".json").read_text()).items()
)

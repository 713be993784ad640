"""The commands of `wantrain` that take a whole shell file of VideoX-Fun."""

from dataclasses import fields

from shared.cli.videox_fun_command import SeedCommand
from shared.cli.videox_fun_flags import ENCODE, TRAIN
from train.config import DistillConfig

_DISTILL = {field.name for field in fields(DistillConfig)}


class TrainCommand(SeedCommand):
    """Flags that it lacks are those of `wantrain distill`, else of `wanprep encode`."""

    def owner_of(self, name: str) -> str:
        return TRAIN if name in _DISTILL else ENCODE

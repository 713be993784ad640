"""The commands of `wanprep` that take a whole shell file of VideoX-Fun."""

from shared.cli.videox_fun_command import SeedCommand
from shared.cli.videox_fun_flags import TRAIN


class PrepCommand(SeedCommand):
    """Flags that it lacks are those of `wantrain distill`."""

    def owner_of(self, name: str) -> str:
        return TRAIN

"""The console scripts. Of our packages' plain names, `train` among them, others have some, too.

`accelerate launch --use_deepspeed` and Ray put the folder that they were started in before all
packages, and it may hold a `train.py` or a folder `train`.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent
OURS = ("preprocess", "shared", "train")


class _OursFirst:
    """Finds our packages beside this file, and nothing else."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(ROOT)]) if name in OURS else None


def ours_first() -> None:
    """From now on this process imports our packages, whatever stands before them on the path."""
    if _OursFirst not in sys.meta_path:
        sys.meta_path.insert(0, _OursFirst)


def wanprep() -> None:
    """Console script `wanprep`."""
    ours_first()
    from preprocess.cli.app import main

    main()


def wantrain() -> None:
    """Console script `wantrain`."""
    ours_first()
    from train.cli.app import main

    main()

"""Libraries that others import wherever they are installed, kept out until somebody asks."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

# peft, diffusers and transformers import them. bitsandbytes takes seconds, and on a GPU makes a
# context on card 0 in every process; of scipy transformers wants a loss for detectors.
_LEFT_OUT = ("bitsandbytes", "scipy")
_MODULES: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]


@contextmanager
def unasked_left_out() -> Iterator[None]:
    """A block in which they seem not to be installed, but for those that are imported already."""
    left_out = [name for name in _LEFT_OUT if name not in _MODULES]
    _MODULES.update(dict.fromkeys(left_out))
    try:
        yield
    finally:
        for name in left_out:
            ask_for(name)


def ask_for(name: str) -> None:
    """Let `import name` find it again."""
    if name in _MODULES and _MODULES[name] is None:
        del _MODULES[name]

"""What is no caption, and no prompt: text that nobody sees."""

import unicodedata
from typing import Any

_INVISIBLE_KINDS = frozenset(("Cc", "Cf", "Zs", "Zl", "Zp"))
# Characters that Unicode counts as letters, marks or symbols: fillers, joiners, an empty Braille
# cell, variation selectors.
_INVISIBLE = frozenset(
    (
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
        *range(0x180B, 0x1810),
        *range(0xFE00, 0xFE10),
        *range(0xE0100, 0xE01F0),
    )
)


def is_blank(value: Any) -> bool:
    """Whether a field says nothing: tables leave blanks, JSON may say null, and copied text may
    hold characters that nobody sees (zero-width spaces, byte order marks, soft hyphens)."""
    return value is None or (isinstance(value, str) and all(map(_is_invisible, value)))


def _is_invisible(character: str) -> bool:
    return unicodedata.category(character) in _INVISIBLE_KINDS or ord(character) in _INVISIBLE

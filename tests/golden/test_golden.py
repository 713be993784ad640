"""wandistill gives what it gave before its modules were moved; see `make.py`."""

import math
from pathlib import Path

import pytest

from tests.golden.make import Mode, family, pages

KEPT = Path(__file__).parent / "files"
KINDS = ("help", "options")


def test_options_and_help_pages(tmp_path: Path) -> None:
    pages(tmp_path)
    made = {file.name: file.read_text() for file in tmp_path.iterdir()}
    kept = {f.name: f.read_text() for f in KEPT.iterdir() if f.name.split(".")[-2] in KINDS}
    assert made.keys() == kept.keys()
    for name in sorted(kept):
        assert made[name] == kept[name], name


# The other three are made and compared by hand, with `diff -r`.
@pytest.mark.long
@pytest.mark.parametrize(
    ("mode", "precision"), [("t2v", "fp32"), ("i2v", "bf16"), ("ti2v", "bf16")]
)
def test_cache_checkpoint_and_loras(mode: Mode, precision: str, tmp_path: Path) -> None:
    family(mode, precision, tmp_path)
    name = f"{mode}-{precision}"
    said = (tmp_path / f"{name}.dry-run.txt").read_text()
    assert said == (KEPT / f"{name}.dry-run.txt").read_text()

    made = (tmp_path / f"{name}.files.txt").read_text().splitlines()
    kept = (KEPT / f"{name}.files.txt").read_text().splitlines()
    assert [_place(line) for line in made] == [_place(line) for line in kept]
    for now, before in zip(made, kept, strict=True):
        assert math.isclose(_spread(now), _spread(before), rel_tol=0.05, abs_tol=1e-6), (
            now,
            before,
        )


def _place(line: str) -> list[str]:
    """File, name and form; not the last two: how far values spread, and their digest."""
    return line.split(" | ")[:-2]


def _spread(line: str) -> float:
    spread = line.split(" | ")[-2]
    return 0.0 if spread == "-" else float(spread)

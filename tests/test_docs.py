"""What the documentation and the docstrings point at is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / folder / "README.md" for folder in ("benchmarks", "shards")),
    *(
        file
        for folder in ("preprocess", "shared", "train", "tests", "benchmarks", "scripts")
        for file in (ROOT / folder).rglob("*.py")
    ),
]
SOURCE = re.compile(r"(?<![\w/])(?:preprocess|train|shared|tests|scripts|benchmarks)/[\w./-]*\w")
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
NOT_OURS = (
    "benchmarks/work",  # made by a command
    *("scripts/wan2.2", "scripts/convert_wan_to_diffusers.py"),  # of VideoX-Fun, of diffusers
    *("shared/toy/MODE", "train/utils.py"),  # a pattern; what a test makes
    # What the examples of docs/extending.md make.
    *("shared/models/pretend", "train/model/pretend_transformer", "train/strategies/ddp_bf16"),
)


def test_files_and_links_exist() -> None:
    named = 0
    for page in PAGES:
        text = page.read_text()
        for found in SOURCE.findall(text):
            if found.startswith(NOT_OURS):
                continue
            named += 1
            assert (ROOT / found.split("::")[0]).exists(), f"{page.name}: {found}"
        for link in LINK.findall(text) if page.suffix == ".md" else ():
            named += 1
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert named > 150

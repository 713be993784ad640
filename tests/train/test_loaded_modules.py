"""A command imports what it needs: libraries that others drag in stay out until asked for."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from importlib import import_module
stage, out, *words = sys.argv[1:]
sys.argv = [stage, *words]
try:
    import_module(stage + ".cli.app").main()
finally:
    open(out, "w").write("\\n".join(name for name, one in sys.modules.items() if one is not None))
"""
HEAVY = (
    "bitsandbytes",
    "scipy",
    "deepspeed",
    "ray",
    "tensorboard",
    "wandb",
    "torchao",
    "av",
    "cv2",
)
TRAIN = ("--boundary-type", "low", "--max-train-steps", "1", "--rank", "4", "--report-to", "csv")


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (("train", "lora", *TRAIN), set()),
        pytest.param(
            ("train", "lora", *TRAIN, "--base-precision", "nf4"),
            {"bitsandbytes"},
            marks=pytest.mark.long,
        ),
        (("train", "distill", *TRAIN, "--dry-run"), set()),
        (("train", "synthesize", "--dry-run"), set()),
        (("preprocess", "inspect"), set()),
        (("preprocess", "verify"), {"av"}),  # for --decode
    ],
    ids=lambda value: " ".join(value[1:2] + value[8:]) if isinstance(value, tuple) else None,
)
def test_only_what_is_asked_for(
    words: tuple[str, ...], asked: set[str], tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    stage, command, *options = words
    if stage == "train":
        output = "--output" if command == "synthesize" else "--output-dir"
        options += ["--model", str(tiny_t2v), output, str(tmp_path / "out")]
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, stage, tmp_path / "modules", command,
         "--shards", t2v_shards, *options],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    loaded = (tmp_path / "modules").read_text().split("\n")
    assert {name for name in HEAVY if name in loaded} == asked

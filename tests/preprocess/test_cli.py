"""The command line as people type it."""

import json
import shutil
from pathlib import Path

import pytest

from tests.preprocess.conftest import (
    VIDEOS,
    Cache,
    render_clip,
    wanprep,
    wanprep_process,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    folder.mkdir()
    render_clip(folder / "clip.mp4", height=64, width=112, frames=12)
    (folder / "clip.txt").write_text("moving")
    return folder


def test_underscores_and_dashes_are_the_same(data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    seed_style = wanprep(
        *("encode", f"--pretrained_model_name_or_path={tiny_t2v}", f"--train_data_dir={data}"),
        *("--video_sample_size=64", "--image_sample_size=64", "--video_sample_stride=1"),
        *("--video_sample_n_frames=5", "--vae_dtype=fp32", "--output", tmp_path / "one"),
    )
    assert seed_style.code == 0, seed_style.err
    dashes = wanprep(
        *("encode", "--model", tiny_t2v, "--train-data-dir", data, "--size", 64),
        *("--video-sample-stride", 1, "--video-sample-n-frames", 5),
        *("--output", tmp_path / "two"),
    )
    assert dashes.code == 0, dashes.err
    one, two = Cache.open(tmp_path / "one"), Cache.open(tmp_path / "two")
    assert one.contents() == two.contents()
    assert one.index.fingerprint == two.index.fingerprint


def test_environment_variables_count_as_flags(
    data: Path, tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = tmp_path / "elsewhere.json"
    metadata.write_text(json.dumps([{"file_path": "clip.mp4", "text": "from the metadata"}]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MODEL_NAME", str(tiny_t2v))
    monkeypatch.setenv("DATASET_NAME", str(data))
    monkeypatch.setenv("DATASET_META_NAME", str(metadata))
    ran = wanprep("encode", "--size", 64, "--video-sample-n-frames", 5)
    assert ran.code == 0, ran.err
    cache = Cache.open(Path("shards"))
    assert cache.info(0)["caption"] == "from the metadata"

    # A flag is stronger.
    ran = wanprep("encode", "--size", 64, "--train-data-meta", "nowhere.json")
    assert ran.code == 1 and "cannot read nowhere.json" in ran.err


def test_without_anything_one_message_says_what_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = wanprep("encode", "--size", 640)
    assert ran.code == 1
    assert ran.err.startswith("error: dataset: no folder datasets. Set --train-data-dir")
    assert ran.err.count("error") == 1
    assert not Path("shards").exists()


def test_without_the_model_one_message_says_what_to_set(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    ran = wanprep("encode", "--train-data-dir", data)
    assert ran.code == 1
    assert "Set --pretrained-model-name-or-path (or MODEL_NAME)" in ran.err
    assert "Wan-AI/Wan2.2-I2V-A14B-Diffusers" in ran.err


def test_short_videos_are_mentioned(data: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    ran = wanprep(
        *("encode", "--model", tiny_t2v, "--train-data-dir", data, "--size", 64),
        *("--output", tmp_path / "shards"),
    )
    assert ran.code == 0, ran.err
    # 12 frames at stride 2 give 6, of which 5 are 4n+1
    assert "shortened 1 video: clip.mp4 (81 frames asked, 5 taken of 12)" in ran.err
    assert ran.out.splitlines() == [
        f"{tmp_path / 'shards'}: 1 sample in 1 shard",
        "  80x48, 5 frames: 1",
        f"next: wantrain distill --shards {tmp_path / 'shards'}",
    ]


def test_short_videos_count_once_however_many_clips(
    data: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    ran = wanprep(
        *("encode", "--model", tiny_t2v, "--train-data-dir", data, "--size", 64),
        *("--clips", "uniform", "--clips-per-video", 4, "--output", tmp_path / "shards"),
    )
    assert "shortened 1 video: clip.mp4 (81 frames asked, 5 taken of 12)\n" in ran.err
    assert "samples  4: " in ran.err


@pytest.mark.long
def test_the_command_of_the_users_card(tmp_path: Path) -> None:
    """`wanprep encode --size 640`, with MODEL_NAME=toy and a short real clip."""
    (tmp_path / "datasets").mkdir()
    shutil.copy(VIDEOS / "bigbuckbunny.mp4", tmp_path / "datasets")
    (tmp_path / "datasets" / "bigbuckbunny.txt").write_text("a rabbit in a meadow")
    process = wanprep_process("encode", "--size", "640", cwd=tmp_path, MODEL_NAME="toy")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "832x480, 65 frames: 1" in out
    cache = Cache.open(tmp_path / "shards")
    assert cache.tensor(0, "latents").shape == (16, 17, 60, 104)
    assert cache.index.fingerprint["mode"] == "t2v"

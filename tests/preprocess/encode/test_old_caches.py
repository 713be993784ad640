"""A cache of the first frame rule: what is right in it stays, what is not is found and replaced."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from preprocess.dataset.clips import ClipRule, choose_clips
from preprocess.frames.first_rule import wrong_sample
from preprocess.frames.media_info import Probe
from preprocess.media.decode import fitted_frames
from preprocess.media.reader import probe
from shared.format.buckets import Bucket
from shared.format.cache import committed_shards
from shared.format.fingerprint import FIRST_FRAME_RULE, FRAME_RULE
from tests.preprocess.conftest import Cache, Ran, wanprep

OLD = Path(__file__).parents[2] / "old_caches" / "d0f92fe"
READ: dict[str, dict[str, Any]] = json.loads((OLD / "read_at_d0f92fe.json").read_text())
CACHES = {"shards": ("media", "--video-sample-stride", 2), "timed-shards": ("timed", "--fps", 16)}
RIGHT = sorted(name for name in READ if Path(name).name[1] != "-")
WRONG = sorted(READ.keys() - set(RIGHT))


def kind(name: str) -> Any:
    return "image" if READ[name]["fps"] is None else "video"


@pytest.mark.parametrize("name", RIGHT)
def test_what_was_right_is_read_to_the_same_bits(name: str) -> None:
    """Colours (601, 709, 2020, limited and full range), codecs, rotation, stills."""
    was = READ[name]
    seen = probe(OLD / name, kind(name))
    assert seen.old_reading is None and seen.fps == was["fps"]
    upright = (64, 48) if seen.height > seen.width else (48, 64)
    frames = fitted_frames(
        OLD / name, kind(name), was["frame_indices"], Bucket(*upright, len(was["frame_indices"]))
    )
    assert hashlib.sha256(frames.tobytes()).hexdigest() == was["frames_sha256"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old caches and their media, in a folder that may be written to."""
    return Path(shutil.copytree(OLD, tmp_path_factory.mktemp("old") / "caches"))


def verify(folder: Path, shards: str, *more: object) -> tuple[Ran, list[dict[str, Any]]]:
    media = folder / CACHES[shards][0]
    report = folder / f"{shards}.report"
    ran = wanprep(
        *("verify", "--shards", folder / shards, "--train-data-dir", media, "--json", report),
        *more,
    )
    return ran, json.loads(report.read_text())["findings"]


def encode(folder: Path, shards: str, *more: object) -> Ran:
    media, *flags = CACHES[shards]
    return wanprep(
        *("encode", "--model", "toy-i2v", "--train-data-dir", folder / media),
        *("--output", folder / shards, "--size", 64, "--video-sample-n-frames", 17),
        *("--clips", "first", "--device", "cpu", *flags, *more),
    )


def tensors(folder: Path) -> dict[str, tuple[str, torch.Tensor, torch.Tensor]]:
    """Key → (source, latents, condition) of live samples."""
    found = Cache.open(folder)
    return {
        found.index.key(row): (
            found.info(row)["source"],
            found.tensor(row, "latents"),
            found.tensor(row, "cond"),
        )
        for row in range(len(found.index))
    }


def test_an_old_cache_is_mended_by_one_command(cache: Path) -> None:
    for shards in CACHES:
        media = CACHES[shards][0]
        wrong = {Path(name).name for name in WRONG if name.startswith(f"{media}/")}
        keys = {READ[f"{media}/{name}"]["key"] for name in wrong}
        before = tensors(cache / shards)

        ran, found = verify(cache, shards)
        assert ran.code == 1 and {one["code"] for one in found} == {"frames-misread"}
        assert {one["key"] for one in found} == keys
        assert all(one["severity"] == "error" and one["cure"] for one in found)
        for name in wrong:  # with its reason
            (said,) = [one["found"] for one in found if one["found"].startswith(f"{name}: ")]
            assert REASONS[name] in said

        ran = encode(cache, shards)
        assert ran.code == 0, ran.err
        assert f"{len(wrong)} samples replaced" in ran.out
        after = tensors(cache / shards)
        assert not keys & after.keys()
        assert sorted(source for source, *_ in after.values()) == sorted(
            source for source, *_ in before.values()
        )
        for key in before.keys() - keys:
            assert all(torch.equal(one, other) for one, other in
                       zip(before[key][1:], after[key][1:], strict=True))  # fmt: skip
        rules = {s.fingerprint["media"]["frame_rule"] for s in committed_shards(cache / shards)}
        assert rules == {FIRST_FRAME_RULE, FRAME_RULE}

        ran, found = verify(cache, shards)
        assert ran.code == 0 and not found, ran.out
        ran = encode(cache, shards)  # nothing is left to do
        assert ran.code == 0 and "0 to encode" in ran.err and "replaced" not in ran.out
        assert wanprep("compact", "--shards", cache / shards).code == 0
        assert verify(cache, shards)[0].code == 0
        assert tensors(cache / shards).keys() == after.keys()


REASONS = {
    "A-h264.avi": "frames of avi files were taken by seeking",
    "A-mpeg2.mpg": "frames of mpeg files were taken by seeking",
    "A-open-gop.mp4": "open GOP",
    "A-ten-bit-420.mp4": "colours of yuv420p10le video",
    "B-cut.mp4": "edit list",
    "E-mirrored.mp4": "mirrored",
    "E-portrait.tiff": "the source was taken for 96x64, it is shown as 64x96",
    "B-600.avi": "frames of avi files",
    "B-anim.webp": "nearest in time are 0, 2, 3, 5 …, taken were 0, 1, 2, 3 …",
    "B-slow.mp4": "nearest in time are 0, 1, 1, 2, 2 …",
    "B-vfr.mp4": "frames nearest in time are",
}


def test_without_its_media_a_cache_is_used_as_it_is_and_verify_says_so(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    shutil.rmtree(folder / "media")
    ran, found = verify(folder, "shards")
    assert ran.code == 0
    (note,) = found
    assert note["code"] == "source-missing" and "21 samples" in note["found"]
    assert "--train-data-dir" in note["cure"]


@pytest.mark.long
def test_a_fresh_cache_of_what_was_right_has_the_old_keys_and_latents(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    for media in ("media", "timed"):
        (folder / media).mkdir(parents=True)
        for name in RIGHT:
            if name.startswith(f"{media}/"):
                shutil.copy(OLD / name, folder / name)
                shutil.copy((OLD / name).with_suffix(".txt"), (folder / name).with_suffix(".txt"))
    for shards in CACHES:
        assert encode(folder, shards).code == 0
        before, after = tensors(OLD / shards), tensors(folder / shards)
        assert after.keys() <= before.keys() and after
        for key, (_, *found) in after.items():
            for new, old in zip(found, before[key][1:], strict=True):
                # On the machine that made them equal to the bit; bf16 rounds 1 in 256.
                torch.testing.assert_close(new, old, rtol=2**-7, atol=2**-7)


@pytest.mark.long
def test_decoding_shows_which_frames_are_others(tmp_path: Path) -> None:
    """By the pictures and the ffmpeg program, whatever the encoder's rule is."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    for shards, others in (
        ("shards", {"A-h264.avi", "A-mpeg2.mpg", "B-cut.mp4"}),
        ("timed-shards", {"B-slow.mp4", "B-vfr.mp4"}),
    ):
        _, found = verify(
            *(folder, shards, "--decode", 30, "--model", "toy-i2v", "--device", "cpu"),
            *("--output", tmp_path / "decoded"),
        )
        named = {one["found"].split(": ")[0] for one in found if one["code"] == "frames-order"}
        assert named == others


def test_a_file_that_took_anothers_name_says_nothing_of_the_sample(tmp_path: Path) -> None:
    """What was right stays, whatever lies under its name today."""
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    shutil.copy(folder / "media" / "E-mirrored.mp4", folder / "media" / "h264.mp4")
    _, found = verify(folder, "shards")
    assert READ["media/h264.mp4"]["key"] not in {one["key"] for one in found}
    (note,) = [one for one in found if one["code"] == "source-missing"]
    assert "h264.mp4: its content is not what was encoded" in note["found"]
    assert encode(folder, "shards").code == 0
    assert READ["media/h264.mp4"]["key"] in tensors(folder / "shards")


def test_no_rank_takes_out_what_another_has_still_to_make(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(OLD, tmp_path / "old"))
    sources = {source for source, *_ in tensors(folder / "shards").values()}
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert encode(folder, "shards").code == 0
        assert {source for source, *_ in tensors(folder / "shards").values()} == sources
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert encode(folder, "shards").code == 0
    assert verify(folder, "shards")[0].code == 0


@pytest.mark.parametrize("clips", ["chunk", "uniform", "random"])
def test_what_was_picked_right_by_time_is_not_named(clips: str) -> None:
    """Whatever the clips, `verify` names no sample that `encode` would make with the same key."""
    seen = Probe(frames=300, height=64, width=96, fps=29.97)
    media = {"fps": 16.0, "video_sample_n_frames": 33, "clips": clips}
    rule = ClipRule(
        image_size=64, video_size=64, stride=2, frames=33, seed=1, multiple=16, temporal_stride=4,
        fps=16.0, clips=clips, clips_per_video=3,  # type: ignore[arg-type]
    )  # fmt: skip
    taken = choose_clips(seen, "ab" * 32, rule)
    assert len(taken) > 2
    for clip in taken:
        info = {"type": "video", "frame_indices": list(clip.frame_indices), "fps": 29.97}
        assert wrong_sample(info, seen, media) is None
        info["frame_indices"] = [index + 1 for index in clip.frame_indices[:-1]]
        info["frame_indices"] += [clip.frame_indices[-1] + 3]
        assert wrong_sample(info, seen, media) is not None

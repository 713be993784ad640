"""The contract of stage one: shards hold what diffusers' pipelines compute, from the mp4 on."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from tests.preprocess.conftest import PHOTOS, VIDEOS, Cache, render_clip, wanprep, write_metadata
from tests.preprocess.reference import (
    Pipelines,
    bucket,
    chosen_frames,
    fitted,
    image_frame,
    video_frames,
)
from train.data.batches import with_mask

SEED, STRIDE, FRAMES, VIDEO_SIZE, IMAGE_SIZE = 7, 3, 13, 96, 80
CAPTIONS = {
    "bikes.mp4": "Two  bikers &amp;amp; a road\n\tin the sun",
    "portrait.mp4": "a pattern that moves; schÃ¶n",  # mojibake, which ftfy mends
    "short.mp4": "short " * 700,  # cut to 512 tokens
    "china.jpg": "a temple in the mountains",
    "turned.jpg": "a flower, lying on its side",
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real clip, rendered ones (portrait; shorter than asked), a photo, a turned photo."""
    folder = tmp_path_factory.mktemp("parity")
    shutil.copy(VIDEOS / "bikes.mp4", folder)
    render_clip(folder / "portrait.mp4", height=130, width=70, frames=60)
    render_clip(folder / "short.mp4", height=64, width=64, frames=23, seed=1)
    shutil.copy(PHOTOS / "china.jpg", folder)
    with Image.open(PHOTOS / "flower.jpg") as flower:
        exif = flower.getexif()
        exif[0x0112] = 6  # the camera was held upright
        flower.resize((320, 213)).save(folder / "turned.jpg", exif=exif)
    write_metadata(folder, [{"file_path": name, "text": text} for name, text in CAPTIONS.items()])
    return folder


@pytest.mark.parametrize(
    ("mode", "dtype", "vae_dtype", "text_dtype"),
    [
        ("i2v", "fp32", "fp32", "fp32"),
        ("t2v", "fp32", "fp32", "fp32"),
        ("i2v", "bf16", "fp32", "bf16"),  # the defaults
        pytest.param("i2v", "fp32", "bf16", "fp32", marks=pytest.mark.long),
        ("ti2v", "fp32", "fp32", "fp32"),
        ("ti2v", "bf16", "bf16", "bf16"),
        ("wan21-i2v", "fp32", "fp32", "fp32"),
        ("wan21-i2v", "bf16", "fp32", "bf16"),
        ("flf2v", "fp32", "fp32", "fp32"),
        ("wan21-flf2v", "bf16", "fp32", "bf16"),
    ],
)
def test_the_cache_equals_the_pipeline(
    mode: str,
    dtype: str,
    vae_dtype: str,
    text_dtype: str,
    data: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    own = "i2v" if mode == "flf2v" else mode  # which Wan 2.2's i2v model serves, too
    model = request.getfixturevalue(f"tiny_{own.replace('-', '_')}")
    ran = wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--output", tmp_path),
        *("--video-sample-size", VIDEO_SIZE, "--image-sample-size", IMAGE_SIZE, "--seed", SEED),
        *("--video-sample-stride", STRIDE, "--video-sample-n-frames", FRAMES),
        *("--dtype", dtype, "--vae-dtype", vae_dtype, "--text-encoder-dtype", text_dtype),
        *("--device", "cpu", *(["--train-mode", mode] if own != mode else [])),
    )
    assert ran.code == 0, ran.err
    cache = Cache.open(tmp_path)
    assert len(cache.index) == len(CAPTIONS)
    pipelines = Pipelines(model, mode, vae=DTYPES[vae_dtype], text_encoder=DTYPES[text_dtype])

    expected_frames = {"bikes.mp4": 13, "portrait.mp4": 13, "short.mp4": 5}
    for source, caption in CAPTIONS.items():
        path = data / source
        if path.suffix == ".mp4":
            indices = chosen_frames(path, stride=STRIDE, wanted=FRAMES, seed=SEED)
            frames = video_frames(path, indices)
            assert len(frames) == expected_frames[source]
            size = VIDEO_SIZE
        else:
            indices, frames, size = [0], image_frame(path), IMAGE_SIZE
        multiple, stride, channels = (32, 16, 48) if mode == "ti2v" else (16, 8, 16)
        height, width = bucket(frames[0].height, frames[0].width, size, multiple)
        assert height != width or source == "short.mp4" or mode == "ti2v"
        reference = pipelines.of(fitted(frames, height, width), caption)

        row = cache.row(source=source)
        info = cache.info(row)
        assert info["frame_indices"] == indices
        assert (info["height"], info["width"], info["frames"]) == (height, width, len(frames))
        assert (info["source_height"], info["source_width"]) == (frames[0].height, frames[0].width)
        assert info["caption"] == caption.strip()

        latents = cache.tensor(row, "latents")
        assert latents.dtype == DTYPES[dtype]
        grid = ((len(frames) - 1) // 4 + 1, height // stride, width // stride)
        assert latents.shape == (channels, *grid)
        for number in range(latents.shape[1]):  # every latent frame
            assert torch.equal(latents[:, number], reference.latents[:, number].to(DTYPES[dtype]))
        assert reference.latents.std() > 0.05  # something was compared

        if mode not in ("t2v", "ti2v"):
            assert reference.condition is not None
            both = mode.endswith("flf2v")
            name = "first_last" if both else "cond"
            member = safetensors.torch.load(cache.raw(row, "cond.safetensors"))
            assert sorted(member) == sorted({name, *(["clip"] if "wan21" in mode else [])})
            condition = member[name]
            assert torch.equal(condition, reference.condition.to(DTYPES[dtype]))
            assert not torch.equal(condition, latents)
            if len(frames) > 1:
                assert reference.mask is not None
                masked = with_mask(condition[None], 4, (0, -1) if both else (0,))[0, :4]
                assert torch.equal(masked.float(), reference.mask)
                assert reference.mask.sum() == (5 if both else 4) * grid[1] * grid[2]
        if "wan21" in mode:
            assert reference.clip is not None and reference.clip.shape == (20 if both else 10, 32)
            assert torch.equal(member["clip"], reference.clip.to(DTYPES[dtype]))
            assert (float(reference.clip.std()) > 0.1) == (len(frames) > 1)
        if mode in ("t2v", "ti2v"):
            assert cache.raw(row, "cond.safetensors") == b""
        if mode == "ti2v" and len(frames) > 1:
            # Nothing more is cached: the pipeline's condition is the clip's own first latent frame.
            assert reference.condition is not None
            assert torch.equal(latents[:, :1], reference.condition.to(DTYPES[dtype]))

        text = cache.tensor(row, "text")
        padded = torch.zeros(512, text.shape[1], dtype=text.dtype)
        padded[: len(text)] = text
        assert torch.equal(padded, reference.text.to(DTYPES[dtype]))
        assert len(text) == cache.index.tokens[row]
        assert (len(text) == 512) == (source == "short.mp4")


@pytest.mark.parametrize("mode", ["i2v", "ti2v"])
def test_latents_are_causal(mode: str, data: Path, request: pytest.FixtureRequest) -> None:
    """A shorter clip from the same start is a slice of the longer one's latents: what lets
    training cut in time for free, and what makes ti2v's condition a latent frame.
    """
    from preprocess.encode.encoders import LatentEncoder
    from preprocess.media.decode import fit
    from preprocess.media.reader import read_frames
    from shared.format.buckets import Bucket
    from shared.models.spec import read_model_spec

    model = read_model_spec(request.getfixturevalue(f"tiny_{mode}"))
    encoder = LatentEncoder(model, dtype=torch.float32, device="cpu")
    frames = fit(read_frames(data / "bikes.mp4", "video", range(9)), Bucket(64, 96, 9))
    assert torch.equal(encoder.latents(frames[:1]), encoder.latents(frames)[:, :1])
    assert torch.equal(encoder.latents(frames[:5]), encoder.latents(frames)[:, :2])
    if mode == "i2v":
        short, long = encoder.condition(frames[:5])["cond"], encoder.condition(frames)["cond"]
        assert torch.equal(short, long[:, :2])

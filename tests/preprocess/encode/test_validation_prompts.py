"""`--validation-prompts`: the list in the prompt bank is the file's, with what a model takes."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from preprocess.dataset.clips import ClipRule
from preprocess.encode.validation_prompts import read_validation_prompts
from shared.cache.writer import ShardWriter
from shared.errors import UserError
from shared.format.buckets import Bucket
from shared.format.cache import committed_shards
from shared.format.overlays import captions_of
from shared.format.prompts import VALIDATION, Prompt, current_validation, prompts_by_shard
from shared.format.resize import fit_to
from shared.io.store import Store
from shared.models.spec import ModelSpec, read_model_spec
from tests.preprocess.conftest import Cache, wanprep

RULE = ClipRule(
    image_size=640,
    video_size=640,
    stride=2,
    frames=81,
    seed=42,
    multiple=16,
    temporal_stride=4,
)


def listed(folder: Path) -> list[Prompt]:
    """The validation prompts that count."""
    return current_validation(
        prompts_by_shard(Store(folder), Cache.open(folder).index.prompt_shards)
    )


def encode(data: Path, model: Path, output: Path, prompts: Path | None, *more: object) -> Any:
    given = [] if prompts is None else ["--validation-prompts", prompts]
    return wanprep(
        *("encode", "--model", model, "--train-data-dir", data, "--size", 64, "--output", output),
        *("--video-sample-n-frames", 9, "--device", "cpu", "--num-workers", 1, *given, *more),
        *("--dtype", "fp32", "--text-encoder-dtype", "fp32"),
    )


@pytest.fixture(scope="module")
def data(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation")
    for name in ("0-0.png", "0-0.txt"):
        shutil.copy(pictures / name, folder)
    return folder


@pytest.fixture
def spec(tiny_t2v: Path) -> ModelSpec:
    return read_model_spec(tiny_t2v)


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def test_a_line_a_prompt_with_musubi_tuners_options(tmp_path: Path, spec: ModelSpec) -> None:
    lines = "# comment\na cat --w 832 --h 480 --f 21 --s 20 --d 1\n\nno options: a -- dash\n"
    found, note = read_validation_prompts(write(tmp_path, "p.txt", lines), spec, RULE)
    assert [(one.prompt, one.bucket) for one in found] == [
        ("a cat", Bucket(480, 832, 21)),
        ("no options: a -- dash", Bucket(480, 832, 81)),  # 16:9 at the size of the cache
    ]
    assert "--d, --s" in note


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.json", '[{"prompt": "a cat", "height": 32, "width": 48, "num_frames": 5}]'),
        ("p.jsonl", '{"text": "a cat", "height": 32, "width": 48, "frames": 5}\n'),
        ("p.csv", "caption,width,height,frames\na cat,48,32,5\n"),
    ],
)
def test_records_in_every_form(tmp_path: Path, spec: ModelSpec, name: str, text: str) -> None:
    (one,), _ = read_validation_prompts(write(tmp_path, name, text), spec, RULE)
    assert (one.prompt, one.bucket) == ("a cat", Bucket(32, 48, 5))


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "# nothing\n", "has no prompts, only comments"),
        ("p.txt", "a cat --x 3\n", "p.txt line 1: found --x, expected --w, --h, --f, --i or --ei"),
        ("p.txt", "a cat --w 30 --h 32\n", "width is 30, expected a multiple of 16, e.g. 32"),
        ("p.txt", "a cat --f 6\n", "frames is 6, expected 4n+1, e.g. 5"),
        ("p.txt", "a cat --w 32\n", "one of height and width, expected both or none"),
        ("p.json", '[{"height": 32}]', "p.json[0] has no prompt"),
        ("p.json", '[{"prompt": 3}]', "prompt is a number, expected text"),
        ("p.json", '[{"prompt": "a", "frames": -1}]', "frames is -1, expected a whole number"),
        ("p.json", '[{"prompt": "a", "image": "x.png"}]', "t2v model, which takes none"),
        ("p.json", "{", "--validation-prompts: "),
        ("p.csv", "words\na\n", "has no prompt column"),
        ("p.md", "a", "--validation-prompts: "),
    ],
)
def test_what_is_no_list_is_refused(
    tmp_path: Path, spec: ModelSpec, name: str, text: str, said: str
) -> None:
    with pytest.raises(UserError) as refused:
        read_validation_prompts(write(tmp_path, name, text), spec, RULE)
    assert said in str(refused.value) and "--train-data-meta" not in str(refused.value)


def test_an_i2v_prompt_wants_a_picture_that_can_be_read(tmp_path: Path, tiny_i2v: Path) -> None:
    spec = read_model_spec(tiny_i2v)
    with pytest.raises(UserError, match=r"has no image, and .* is an i2v model"):
        read_validation_prompts(write(tmp_path, "p.txt", "a cat\n"), spec, RULE)
    write(tmp_path, "cat.png", "no picture")
    with pytest.raises(UserError, match=r"line 1: .*cat\.png"):
        read_validation_prompts(write(tmp_path, "p.txt", "a cat --i cat.png\n"), spec, RULE)


def test_the_files_list_is_the_banks(
    data: Path, tiny_t2v: Path, tmp_path: Path, count_calls: Any
) -> None:
    shards = tmp_path / "shards"
    path = write(tmp_path, "p.txt", "a cat --w 48 --h 32\na dog\n")
    assert encode(data, tiny_t2v, shards, path).code == 0
    first = listed(shards)
    assert [(p.prompt, p.bucket) for p in first] == [
        ("a cat", Bucket(32, 48, 9)),
        ("a dog", Bucket(48, 80, 9)),
    ]
    pipeline = WanPipeline.from_pretrained(tiny_t2v, vae=None, transformer=None, transformer_2=None)
    for prompt in first:
        with torch.inference_mode():
            expected, _ = pipeline.encode_prompt(
                prompt.prompt, do_classifier_free_guidance=False, max_sequence_length=512
            )
        assert torch.equal(expected[0, : len(prompt.text)], prompt.text)
        assert not expected[0, len(prompt.text) :].any()

    before = count_calls()
    assert "nothing to do" in encode(data, tiny_t2v, shards, path).out
    assert encode(data, tiny_t2v, shards, None).code == 0  # without a list it stays
    assert listed(shards)[0].key == first[0].key
    path.write_text("a fox\na cat --w 48 --h 32\n")
    ran = encode(data, tiny_t2v, shards, path)
    assert ran.code == 0 and "2 validation prompts in the shards" in ran.out
    after = count_calls()
    assert after["UMT5EncoderModel"] - before["UMT5EncoderModel"] == 1  # the fox alone
    now = listed(shards)
    assert [p.prompt for p in now] == ["a fox", "a cat"]  # the dog is gone
    assert torch.equal(now[1].text, first[0].text)
    for command in ("verify", "index", "compact"):
        ran = wanprep(command, "--shards", shards)
        assert ran.code == 0, ran
    assert [p.key for p in listed(shards)] == [p.key for p in now]

    # Captions beside the cache have the same list, by the same text encoder.
    ran = wanprep(
        *("recaption", "--name", "same", "--same-captions", "--model", tiny_t2v),
        *("--shards", shards, "--device", "cpu"),
    )
    assert ran.code == 0, ran
    beside = listed(captions_of(Store(shards), "same").folder)
    assert [p.key for p in beside] == [p.key for p in now]
    assert all(torch.equal(a.text, b.text) for a, b in zip(beside, now, strict=True))
    assert wanprep("verify", "--shards", shards).code == 0


@pytest.mark.parametrize("kind", ["i2v", "wan21-i2v", "wan21-flf2v"])
def test_a_picture_is_encoded_as_the_pipeline_does(
    kind: str, data: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(f"tiny_{kind.replace('-', '_')}")
    shards, both = tmp_path / "shards", kind == "wan21-flf2v"
    prompt = {"prompt": "a face", "image": "face.png"}
    with Image.open(data / "0-0.png") as image:
        picture = image.convert("RGB").crop((0, 0, 280, 200))
    picture.save(tmp_path / "face.png")
    end = picture.rotate(180)
    end.save(tmp_path / "end.png")
    if both:
        ran = encode(data, model, shards, write(tmp_path, "one.jsonl", json.dumps(prompt)))
        assert "has no last image" in ran.err
        prompt["last_image"] = "end.png"
    path = write(tmp_path, "p.jsonl", json.dumps(prompt))
    ran = encode(data, model, shards, path)
    assert ran.code == 0, ran
    (found,) = listed(shards)
    assert found.bucket == Bucket(48, 64, 9) and found.image is not None

    pipeline = WanImageToVideoPipeline.from_pretrained(model)
    frame, last = fit_to(picture, 48, 64), fit_to(end, 48, 64)
    tensor, last_tensor = (
        pipeline.video_processor.preprocess(one, height=48, width=64) for one in (frame, last)
    )
    with torch.inference_mode():
        _, condition = pipeline.prepare_latents(
            tensor, 1, 16, 48, 64, 9, torch.float32, torch.device("cpu"), torch.Generator(),
            last_image=last_tensor if both else None,
        )  # fmt: skip
    encoded = found.first_last if both else found.cond
    assert encoded is not None and torch.equal(condition[0, 4:], encoded)
    if kind != "i2v":
        assert found.clip is not None
        pictures = [frame, last] if both else frame
        expected = pipeline.encode_image(pictures, torch.device("cpu")).flatten(0, 1)
        assert torch.allclose(expected, found.clip, atol=1e-5)
    assert wanprep("verify", "--shards", shards).code == 0


def test_a_ti2v_prompt_has_its_picture_by_itself(
    data: Path, tiny_ti2v: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    lines = f"a face --i {data / '0-0.png'}\nno face --w 96 --h 64\n"
    ran = encode(data, tiny_ti2v, shards, write(tmp_path, "p.txt", lines))
    assert ran.code == 0, ran
    with_picture, without = listed(shards)
    assert without.cond is None and without.role == VALIDATION
    pipeline = WanPipeline.from_pretrained(tiny_ti2v)
    with Image.open(data / "0-0.png") as image:
        pixels = np.asarray(fit_to(image.convert("RGB"), 64, 64))
    frame = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None, :, None].float() / 255 * 2 - 1
    raw = pipeline.vae.encode(frame).latent_dist.mode()[0]
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (
        pipeline.vae.config.latents_mean, pipeline.vae.config.latents_std))  # fmt: skip
    assert with_picture.cond is not None and with_picture.cond.shape == (48, 1, 4, 4)
    assert torch.allclose(with_picture.cond, ((raw - mean) / std).detach(), atol=1e-5)
    assert wanprep("verify", "--shards", shards).code == 0


def test_verify_names_a_condition_of_another_shape(
    data: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    path = write(tmp_path, "p.txt", f"a face --i {data / '0-0.png'}\n")
    assert encode(data, tiny_i2v, shards, path).code == 0
    (found,) = listed(shards)
    assert found.cond is not None
    broken = Prompt(**(found.__dict__ | {"cond": found.cond[:, :1]}))
    fingerprint = committed_shards(shards)[0].fingerprint
    ShardWriter(Store(shards), fingerprint, shard_bytes=1).add_prompts([broken])
    assert wanprep("index", "--shards", shards).code == 0
    ran = wanprep("verify", "--shards", shards)
    assert ran.code == 1 and "cond-shape" in ran.out + ran.err


def test_a_validation_prompt_without_a_size_is_refused(tmp_path: Path) -> None:
    entry = Prompt(VALIDATION, "a cat", torch.ones(2, 4))
    ShardWriter(Store(tmp_path), {"format": 1}, shard_bytes=1).add_prompts([entry])
    with pytest.raises(UserError, match=r"prompts-w000-00000\.tar is damaged .*bucket None"):
        prompts_by_shard(Store(tmp_path), ("prompts-w000-00000.tar",))

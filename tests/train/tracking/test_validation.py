"""Validation while training: the product's own samples, and no trace in it; decoded after."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline
from diffusers.video_processor import VideoProcessor
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from shared.errors import UserError
from shared.format.cache import MemberReader, open_cache
from shared.format.latent_rgb import latents_to_rgb
from shared.format.prompts import current_validation, prompts_by_shard
from shared.format.schema import CONDITION_MEMBER, LATENTS_MEMBER, TEXT_MEMBER
from shared.io.store import Store
from shared.models.pixels import latents_to_frames
from shared.models.spec import read_model_spec
from tests.models import full_once, one_expert, tiny_model
from tests.train.conftest import encode
from train.cli.app import app as wantrain
from train.data.batches import pad_text
from train.functional.rng import noise
from train.sampling.config import DecodeConfig
from train.sampling.decode import decode_clips, load_vae

STEPS = "1000,600,300"
SMALL = (
    "--rank", "4", "--network-alpha", "3", "--learning-rate", "3e-2", "--learning-rate-critic",
    "2e-3", "--dataloader-num-workers", "0", "--gen-update-interval", "1", "--train-batch-size",
    "2", "--device", "cpu", "--mixed-precision", "no", "--save-precision", "fp32",
    "--denoising-step-indices-list", STEPS, "--target-name", "q,k,v,o,ffn.0,ffn.2",
    "--report-to", "csv,tensorboard",
)  # fmt: skip


def distill(model: Path, shards: Path, out: Path, updates: int, *more: str) -> Path:
    words = ["distill", "--model", str(model), "--shards", str(shards), "--output-dir", str(out)]
    words += one_expert(model)
    wantrain([*words, *SMALL, "--max-train-steps", str(updates), *more], standalone_mode=False)
    return out


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "logs" / "metrics.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def final_bytes(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("lora-*.safetensors"))}


@pytest.fixture(scope="module")
def t2v_prompts(dataset: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with two validation prompts of different sizes."""
    folder = tmp_path_factory.mktemp("t2v-prompts")
    (folder / "p.txt").write_text("waves --w 48 --h 32 --f 5\nno waves --w 32 --h 64 --f 9\n")
    more = ("--validation-prompts", str(folder / "p.txt"), "--dtype", "fp32")
    return encode(dataset, tiny_t2v, folder / "shards", *more)


@pytest.fixture(scope="module")
def i2v_prompts(dataset: Path, tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("i2v-prompts")
    (folder / "p.json").write_text(
        json.dumps([{"prompt": "noise that moves", "image": str(dataset / "noise.png")}])
    )
    more = ("--validation-prompts", str(folder / "p.json"), "--dtype", "fp32")
    return encode(dataset, tiny_i2v, folder / "shards", *more)


@pytest.mark.parametrize("more", [(), ("--ema-decay", "0.5", "--ema-start", "0")])
def test_a_run_with_validation_is_the_run_without(
    more: tuple[str, ...], tiny_t2v: Path, t2v_prompts: Path, tmp_path: Path
) -> None:
    boundary = ("--boundary-type", "full")
    without = distill(tiny_t2v, t2v_prompts, tmp_path / "a", 3, *boundary, *more)
    with_it = distill(
        tiny_t2v, t2v_prompts, tmp_path / "b", 3, *boundary, *more, "--validation-steps", "1"
    )
    assert final_bytes(without) == final_bytes(with_it)
    names = ("loss/generator", "loss/critic", "grad_norm/generator", "grad_norm/critic")
    a, b = (
        [{name: row[name] for name in names} for row in rows(out)] for out in (without, with_it)
    )
    assert a == b and len(a) == 6
    steps = sorted(path.name for path in (with_it / "validation").iterdir())
    assert steps == ["step-0", "step-1", "step-2", "step-3"]
    first, last = (
        load_file(with_it / "validation" / f"step-{n}" / "000.safetensors") for n in (0, 3)
    )
    assert not torch.equal(first["latents"], last["latents"])
    assert not (without / "validation").exists()


def _walk(
    model: Path, out: Path, text: torch.Tensor, shape: tuple[int, ...], number: int, **given: Any
) -> torch.Tensor:
    """x̂0 of the saved LoRA in a diffusers pipeline, step by step."""
    pipeline = WanPipeline.from_pretrained(model, text_encoder=None, vae=None, transformer_2=None)
    pipeline.load_lora_weights(str(out / f"lora-{given['expert']}-diffusers.safetensors"))
    shift, x0 = given["shift"], None
    for step, raw in enumerate([u / 1000 for u in (1000, 600, 300)][: given.get("count", 3)]):
        sigma = shift * raw / (1 + (shift - 1) * raw)
        fresh = noise(shape, 42, f"validation {step}", 0, [number])
        x_t = fresh if x0 is None else (1 - sigma) * x0 + sigma * fresh
        condition = given.get("condition")
        inputs = x_t if condition is None else torch.cat([x_t, condition], dim=1)
        with torch.inference_mode():
            v = pipeline.transformer(
                inputs,
                timestep=torch.tensor([1000 * sigma]),
                encoder_hidden_states=torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[
                    None
                ],
                return_dict=False,
            )[0]
        x0 = x_t - sigma * v
    assert x0 is not None
    return x0[0]


@pytest.mark.parametrize("more", [(), ("--ema-decay", "0.5", "--ema-start", "0")])
def test_the_clips_are_those_of_the_lora_that_would_be_saved(
    more: tuple[str, ...], tiny_t2v: Path, t2v_prompts: Path, tmp_path: Path
) -> None:
    out = distill(
        tiny_t2v, t2v_prompts, tmp_path / "out", 2, "--boundary-type", "full",
        "--validation-steps", "2", "--flow-shift", "7", *more,
    )  # fmt: skip
    index = open_cache(Store(t2v_prompts))
    prompts = current_validation(prompts_by_shard(Store(t2v_prompts), index.prompt_shards))
    folder = out / "validation" / "step-2"
    assert [record["prompt"] for record in json.loads((folder / "clips.json").read_text())] == [
        "waves",
        "no waves",
    ]
    assert index.latent_rgb is not None
    for number, shape in enumerate([(16, 2, 4, 6), (16, 3, 8, 4)]):
        found = load_file(folder / f"{number:03d}.safetensors")["latents"]
        assert found.shape == shape
        expected = _walk(
            tiny_t2v, out, prompts[number].text, shape, number, expert="full", shift=7.0
        )
        assert torch.allclose(found, expected, atol=2e-4)
        assert (folder / f"{number:03d}.mp4").stat().st_size > 0
    with Image.open(folder / "sheet.png") as sheet:
        colours = np.asarray(sheet).reshape(-1, 3)
    cell = latents_to_rgb(load_file(folder / "000.safetensors")["latents"], index.latent_rgb)[
        0, 0, 0
    ]
    assert (colours == cell).all(axis=1).any()  # the map's own colours, untouched


def test_a_plain_lora_is_sampled_as_the_base_model_is(
    tiny_t2v: Path, t2v_prompts: Path, tmp_path: Path
) -> None:
    """20 Euler steps with guidance, against diffusers' scheduler; and no trace in the training."""
    words = (
        "lora", "--model", str(tiny_t2v), "--shards", str(t2v_prompts), "--boundary-type", "full",
        "--rank", "4", "--learning-rate", "3e-2", "--train-batch-size", "2", "--max-train-steps",
        "2", "--device", "cpu", "--mixed-precision", "no", "--save-precision", "fp32",
        "--report-to", "csv", "--dataloader-num-workers", "0",
    )  # fmt: skip
    outs = (tmp_path / "out", tmp_path / "without")
    wantrain(
        [*words, "--output-dir", str(outs[0]), "--validation-steps", "2"], standalone_mode=False
    )
    wantrain([*words, "--output-dir", str(outs[1])], standalone_mode=False)
    assert final_bytes(outs[0]) == final_bytes(outs[1])
    assert [r["loss/lora"] for r in rows(outs[0])] == [r["loss/lora"] for r in rows(outs[1])]

    bank = prompts_by_shard(Store(t2v_prompts), open_cache(Store(t2v_prompts)).prompt_shards)
    text = current_validation(bank)[0].text
    (negative,) = (p.text for shard in bank for p in shard if p.role == "negative")
    pipeline = WanPipeline.from_pretrained(
        tiny_t2v, text_encoder=None, vae=None, transformer_2=None
    )
    pipeline.load_lora_weights(str(outs[0] / "lora-full-diffusers.safetensors"))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=12.0)
    scheduler.set_timesteps(sigmas=[1 - step / 20 for step in range(20)])
    x = noise((16, 2, 4, 6), 42, "validation", 0, [0])
    with torch.inference_mode():
        for t in scheduler.timesteps:
            c, u = (
                pipeline.transformer(
                    x,
                    timestep=t[None],
                    encoder_hidden_states=pad_text(e, 512)[None],
                    return_dict=False,
                )[0]
                for e in (text, negative)
            )
            x = scheduler.step(u + 5 * (c - u), t, x, return_dict=False)[0]
    found = load_file(outs[0] / "validation" / "step-2" / "000.safetensors")["latents"]
    assert torch.allclose(found, x[0], atol=2e-3)


def test_an_i2v_prompt_brings_its_condition(
    tiny_i2v: Path, i2v_prompts: Path, tmp_path: Path
) -> None:
    """The high expert, over its own steps alone."""
    out = distill(
        tiny_i2v, i2v_prompts, tmp_path / "out", 1, "--boundary-type", "high",
        "--validation-steps", "1", "--flow-shift", "5",
    )  # fmt: skip
    index = open_cache(Store(i2v_prompts))
    (prompt,) = current_validation(prompts_by_shard(Store(i2v_prompts), index.prompt_shards))
    assert prompt.cond is not None
    mask = torch.zeros(4, *prompt.cond.shape[1:])
    mask[:, 0] = 1
    condition = torch.cat([mask, prompt.cond])[None]
    shape = tuple(prompt.cond.shape)
    expected = _walk(
        tiny_i2v, out, prompt.text, shape, 0, expert="high", shift=5.0, condition=condition, count=1
    )  # 1000 is the only step above 900
    found = load_file(out / "validation" / "step-1" / "000.safetensors")["latents"]
    assert torch.allclose(found, expected, atol=2e-4)


def test_the_low_expert_begins_from_samples_of_the_cache(
    tiny_i2v: Path, i2v_prompts: Path, tmp_path: Path
) -> None:
    out = distill(tiny_i2v, i2v_prompts, tmp_path / "out", 1, "--validation-steps", "1")
    folder = out / "validation" / "step-0"
    (record,) = json.loads((folder / "clips.json").read_text())  # as many as there are prompts
    assert record["prompt"].startswith("waves of kind")
    index = open_cache(Store(i2v_prompts))
    reader = MemberReader(index)
    (row,) = (r for r in range(len(index)) if reader.info(r)["caption"] == record["prompt"])
    members = [
        reader.read(row, member) for member in (LATENTS_MEMBER, CONDITION_MEMBER, TEXT_MEMBER)
    ]
    reader.close()
    x, cond, text = (
        (found or {})[name].float()
        for found, name in zip(members, ("latents", "cond", "text"), strict=True)
    )
    mask = torch.zeros(4, *cond.shape[1:])
    mask[:, 0] = 1
    pipeline = WanPipeline.from_pretrained(tiny_i2v, text_encoder=None, vae=None, transformer=None)
    x0 = x[None]
    for step, raw in ((1, 0.6), (2, 0.3)):  # its two steps; before training the LoRA is nothing
        sigma = 5 * raw / (1 + 4 * raw)
        fresh = noise(x.shape, 42, f"validation {step}", 0, [0])
        x_t = (1 - sigma) * x0 + sigma * fresh
        with torch.inference_mode():
            v = pipeline.transformer_2(
                torch.cat([x_t, torch.cat([mask, cond])[None]], dim=1),
                timestep=torch.tensor([1000 * sigma]),
                encoder_hidden_states=torch.nn.functional.pad(text, (0, 0, 0, 512 - len(text)))[
                    None
                ],
                return_dict=False,
            )[0]
        x0 = x_t - sigma * v
    assert torch.allclose(load_file(folder / "000.safetensors")["latents"], x0[0], atol=2e-4)


def test_ti2v_keeps_a_prompts_first_frame(dataset: Path, tiny_ti2v: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(
        f"noise --i {dataset / 'noise.png'} --f 9\nnothing --w 64 --h 64 --f 9\n"
    )
    more = ("--validation-prompts", str(tmp_path / "p.txt"), "--dtype", "fp32")
    shards = encode(dataset, tiny_ti2v, tmp_path / "shards", *more)
    out = distill(tiny_ti2v, shards, tmp_path / "out", 1, "--validation-steps", "1")
    prompts = current_validation(
        prompts_by_shard(Store(shards), open_cache(Store(shards)).prompt_shards)
    )
    with_picture, without = (
        load_file(out / "validation" / "step-1" / f"00{n}.safetensors")["latents"] for n in (0, 1)
    )
    assert prompts[0].cond is not None
    assert torch.equal(with_picture[:, :1], prompts[0].cond)
    assert with_picture.shape[1] == without.shape[1] == 3


def test_a_resumed_run_has_no_point_twice(
    tiny_t2v: Path, t2v_prompts: Path, tmp_path: Path
) -> None:
    common = ("--boundary-type", "full", "--checkpointing-steps", "2", "--validation-steps", "2")
    whole = distill(tiny_t2v, t2v_prompts, tmp_path / "whole", 3, *common)
    out = distill(tiny_t2v, t2v_prompts, tmp_path / "out", 3, *common)
    shutil.rmtree(out / "checkpoint-3")  # as after a kill -9: logs are ahead of the checkpoint
    with (out / "logs" / "metrics.csv").open("a") as stream:
        stream.write("7,0.1")  # cut short by it
    distill(tiny_t2v, t2v_prompts, out, 3, *common, "--resume-from-checkpoint", "latest")
    same = ("update", "loss/critic", "loss/generator", "score_sigma/critic")
    assert [[row[name] for name in same] for row in rows(out)] == [
        [row[name] for name in same] for row in rows(whole)
    ]
    events = EventAccumulator(str(out / "logs"))
    events.Reload()
    assert [e.step for e in events.Scalars("loss/critic")] == [1, 3, 5]
    assert [e.step for e in events.Images("validation")] == [0, 4]
    assert {"balance/critic_over_teacher", "speed/samples_per_second", "memory/peak_gib"} <= set(
        events.Tags()["scalars"]
    )


def test_what_cannot_be_sampled_or_reported_is_refused_first(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    full = ("--boundary-type", "full")
    said = r"has no validation prompts.*--validation-prompts FILE"
    in_two = ("--num-processes", "2", "--strategy", "ddp")
    for more in ((), ("--dry-run",), in_two):
        with pytest.raises(UserError, match=said):
            distill(tiny_t2v, t2v_shards, tmp_path, 1, *full, "--validation-steps", "1", *more)
    with pytest.raises(UserError, match=r"--report-to: found 'tensorbord', expected one of tensor"):
        distill(tiny_t2v, t2v_shards, tmp_path, 1, *full, "--report-to", "tensorbord")
    with pytest.raises(
        UserError, match=r"clearml is not installed\. Install it: pip install clearml"
    ):
        distill(tiny_t2v, t2v_shards, tmp_path, 1, *full, "--report-to", "csv,clearml")
    with pytest.raises(UserError, match=r"--validation-steps: found -1, expected 0 or more"):
        distill(tiny_t2v, t2v_shards, tmp_path, 1, *full, "--validation-steps", "-1")
    assert list(tmp_path.iterdir()) == []


def _decode(*words: object) -> subprocess.CompletedProcess[str]:
    command = str(Path(sys.executable).with_name("wantrain"))
    return subprocess.run(
        [command, "decode", *map(str, words), "--device", "cpu"], capture_output=True, text=True
    )


def test_decoded_clips_are_the_pipelines(
    tiny_t2v: Path, tiny_ti2v: Path, t2v_prompts: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = distill(
        tiny_t2v, t2v_prompts, tmp_path / "out", 1, "--boundary-type", "full",
        "--validation-steps", "1",
    )  # fmt: skip
    ran = _decode("--latents", out / "validation", "--model", tiny_t2v, "--output", tmp_path / "d")
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        "sheet.png",
        *(f"step-{step}-00{clip}.mp4" for step in (0, 1) for clip in (0, 1)),
    ]

    latents = load_file(out / "validation" / "step-1" / "001.safetensors")["latents"]
    vae = AutoencoderKLWan.from_pretrained(tiny_t2v / "vae")
    view = (1, 16, 1, 1, 1)
    std = 1.0 / torch.tensor(vae.config.latents_std).view(view)
    with torch.inference_mode():
        raw = latents[None] / std + torch.tensor(vae.config.latents_mean).view(view)
        video = VideoProcessor(vae_scale_factor=8).postprocess_video(vae.decode(raw).sample)[0]
    spec = read_model_spec(tiny_t2v)
    found = latents_to_frames(load_vae(spec, torch.float32), latents, spec)
    assert found.shape == (9, 64, 32, 3)
    assert np.array_equal(found, (video * 255).round().astype(np.uint8))

    full_once(monkeypatch)
    clip = out / "validation" / "step-1" / "001.safetensors"
    config = DecodeConfig(
        latents=[clip], model=str(tiny_t2v), output=tmp_path / "tiles", device="cpu"
    )
    assert len(decode_clips(config, Console(stderr=True))) == 1
    assert capsys.readouterr().err.count("decoded in tiles") == 1

    def refused(path: Path, model: Path) -> str:
        config = DecodeConfig(
            latents=(path,), model=str(model), output=tmp_path / "no", fps=16, dtype="fp32",
            device="cpu",
        )  # fmt: skip
        with pytest.raises(UserError) as error:
            decode_clips(config, Console())
        assert not (tmp_path / "no").exists() or not any((tmp_path / "no").iterdir())
        return str(error.value)

    clip = out / "validation" / "step-1" / "000.safetensors"
    assert "16 channels, the VAE of" in refused(clip, tiny_ti2v)
    other = tiny_model(tmp_path / "other", "t2v", seed=5)
    assert "the latents are of a VAE with digest" in refused(clip, other)
    (tmp_path / "bad.safetensors").write_bytes(clip.read_bytes()[:100])
    assert "cannot use" in refused(tmp_path / "bad.safetensors", tiny_t2v)
    assert "it holds" in refused(out / "lora-full-diffusers.safetensors", tiny_t2v)
    assert "has no .safetensors files" in refused(out / "logs", tiny_t2v)

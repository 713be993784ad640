"""`wantrain synthesize`: clips and states of diffusers' own pipelines, whatever interrupts it."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from safetensors.torch import load_file, save_file

from preprocess.cli.app import app as wanprep
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader, open_cache
from shared.format.prompts import read_prompts
from shared.format.schema import MEMBERS
from shared.io.store import Store
from tests.preprocess.conftest import REPOSITORY, Cache
from tests.train.conftest import encode, transformers_before_each, write_dataset
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.data.batches import pad_text, with_mask
from train.saving.export import lora_path

STEPS, SHIFT, GUIDANCE = 5, 3.0, 4.0
RAW, STUDENT_SHIFT = (1000, 700, 300), 6.0
TEACHER = (
    *("--steps", STEPS, "--flow-shift", SHIFT, "--guidance", GUIDANCE),
    *("--states", " ".join(map(str, RAW)), "--student-shift", STUDENT_SHIFT),
)
Samples = dict[str, dict[str, Any]]


def synthesize(model: Path, shards: Path, output: Path, *more: object) -> Path:
    words = ["synthesize", "--model", model, "--shards", shards, "--output", output, *more]
    wantrain([*map(str, words), "--device", "cpu"], standalone_mode=False)
    return output


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips of two shapes and a picture."""
    return write_dataset(tmp_path_factory.mktemp("small") / "set", clips=2)


@pytest.fixture(scope="module")
def caches(
    small: Path, tiny_t2v: Path, tiny_i2v: Path, tiny_ti2v: Path, tiny_wan21_i2v: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[Path, Path]]:  # fmt: skip
    """Model and cache of each kind; in fp32, so that what is stored is what was computed."""
    models = {"t2v": tiny_t2v, "i2v": tiny_i2v, "ti2v": tiny_ti2v, "wan21-i2v": tiny_wan21_i2v}
    root = tmp_path_factory.mktemp("caches")
    return {
        kind: (model, encode(small, model, root / kind, "--dtype", "fp32"))
        for kind, model in models.items()
    }


def samples(folder: Path) -> Samples:
    """Key → `KEY.json` and the tensors of every live sample."""
    index = open_cache(Store(folder))
    reader, found = MemberReader(index), {}
    for row in range(len(index)):
        found[index.key(row)] = {"json": reader.info(row)}
        for member in MEMBERS[1:]:
            found[index.key(row)] |= reader.read(row, member) or {}
    return found


def shifted(raw: float, shift: float) -> float:
    return shift * raw / (1 + (shift - 1) * raw)


def levels() -> tuple[list[float], list[float]]:
    """σ of all steps, falling, and of the states: re-derived from the options."""
    states = [shifted(raw / 1000, STUDENT_SHIFT) for raw in RAW]
    teacher = [shifted((STEPS - n) / STEPS, SHIFT) for n in range(STEPS)]
    return sorted({*states, *teacher}, reverse=True), states


def pipeline_of(model: Path, kind: str, sigmas: list[float], dtype: torch.dtype) -> Any:
    """diffusers' own, without text encoder."""

    class Steps(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *_: Any, device: Any = None, **__: Any) -> None:
            super().set_timesteps(sigmas=sigmas, device=device)

    index = json.loads((model / "model_index.json").read_text())

    def load(name: str) -> Any:
        if not (model / name).is_dir():
            return None
        return WanTransformer3DModel.from_pretrained(model / name, torch_dtype=dtype)

    pipeline = (WanPipeline if kind == "t2v" else WanImageToVideoPipeline)(
        tokenizer=None, text_encoder=None, vae=AutoencoderKLWan.from_pretrained(model / "vae"),
        scheduler=Steps(shift=1.0), transformer=load("transformer"),
        transformer_2=load("transformer_2"), boundary_ratio=index["boundary_ratio"],
        expand_timesteps=index["expand_timesteps"],
        **({} if kind == "t2v" else {"image_processor": None, "image_encoder": None}),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def reference(
    pipeline: Any, kind: str, sample: dict[str, Any], negative: torch.Tensor, source: dict[str, Any]
) -> list[torch.Tensor]:
    """The latents before each step, and the clip."""
    info, seen = sample["json"], [sample["states"][0][None]]
    more: dict[str, Any] = {}
    if kind != "t2v":
        more["image"] = torch.zeros(1, 3, info["height"], info["width"])  # the VAE's work is done
        if kind == "ti2v":
            first = source["latents"][None, :, :1].float()
            mask = torch.ones(1, 1, *sample["latents"].shape[1:])
            mask[:, :, 0] = 0
            given = (seen[0], first, mask)
        else:
            given = (seen[0], with_mask(source["cond"][None].float(), 4, (0,)))
        pipeline.prepare_latents = lambda *_, **__: given
        if "clip" in source:  # beside an image, which it would take for one too many
            more["image_embeds"], pipeline.check_inputs = source["clip"][None], lambda *_: None

    def keep(_: Any, step: int, timestep: Any, found: dict[str, Any]) -> dict[str, Any]:
        seen.append(found["latents"].clone())
        return {}

    clip = pipeline(
        prompt_embeds=pad_text(sample["text"], 512)[None], negative_prompt_embeds=negative[None],
        height=info["height"], width=info["width"], num_frames=info["frames"],
        num_inference_steps=len(levels()[0]), guidance_scale=GUIDANCE, latents=seen[0],
        output_type="latent", callback_on_step_end=keep, **more,
    ).frames  # fmt: skip
    if kind == "ti2v":
        seen = [(1 - given[2]) * given[1] + given[2] * x for x in seen]
    return [*(x[0] for x in seen[:-1]), clip[0]]


def negative_of(index: CacheIndex) -> torch.Tensor:
    bank = {p.role: p.text for p in read_prompts(index.store, index.prompt_shards)}
    return pad_text(bank["negative"], 512)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("kind", "precision"),
    [*((kind, "no") for kind in ("t2v", "i2v", "ti2v", "wan21-i2v")), ("t2v", "bf16")],
)  # fmt: skip
def test_clips_and_states_are_those_of_the_pipeline(
    kind: str, precision: str, caches: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    model, cache = caches[kind]
    out = synthesize(
        model, cache, tmp_path / "out", *TEACHER, "--mixed-precision", precision,
        "--where", "type=video", "--batch-size", 2,
    )  # fmt: skip
    sigmas, states = levels()
    index, made, sources = open_cache(Store(out)), samples(out), samples(cache)
    synthesis = index.fingerprint["synthesis"]
    assert synthesis["states"]["timesteps"] == pytest.approx([1000 * s for s in states])
    assert len(made) == 2
    dtype = torch.float32 if precision == "no" else torch.bfloat16
    pipeline, negative = pipeline_of(model, kind, sigmas, dtype), negative_of(index)
    for sample in made.values():
        key, ordinal = sample["json"]["source"].rpartition("#")[2].split("/")
        source = sources[key]
        assert ordinal == "0" and sample["json"]["caption"] == source["json"]["caption"]
        for name in ("text", "cond", "clip"):
            assert (name in sample) == (name in source)
            assert name not in source or sample[name].equal(source[name])
        *path, clip = reference(pipeline, kind, sample, negative, source)
        # What fp32 guidance and Euler steps lose; in bf16 the pipeline guides in bf16.
        bound = 3e-5 if precision == "no" else 2e-2
        assert relative(sample["latents"], clip) < bound
        assert relative(clip, sample["states"][0]) > 0.3
        for sigma, state in zip(states, sample["states"], strict=True):
            assert relative(state, path[sigmas.index(sigma)]) < bound
    wanprep(["verify", "--shards", str(out)], standalone_mode=False)


def test_it_is_one_cache_whatever_happens(
    small: Path, caches: dict[str, tuple[Path, Path]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Killed (9) between the experts, on two ranks, after a removal: the same samples and bytes."""
    model, cache = caches["t2v"]
    more = (*TEACHER, "--clips-per-caption", 2, "--batch-size", 2)
    whole = Cache.open(synthesize(model, cache, tmp_path / "whole", *more)).contents()
    assert len(whole) == 6 * len(MEMBERS)

    out = tmp_path / "out"
    command = ["synthesize", "--model", model, "--shards", cache, "--output", out, *more]
    run = subprocess.Popen(
        [sys.executable, "-m", "train.cli.app", *map(str, command), "--device", "cpu"],
        cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not (waiting := list(out.glob(".handover-*/*.safetensors"))) and run.poll() is None:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL and waiting
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        synthesize(model, cache, out, *more)
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    assert Cache.open(out).contents() == whole
    assert not list(out.glob(".handover*"))

    gone = min(whole).partition(".")[0]
    wanprep(["remove", "--shards", str(out), "--sample", gone], standalone_mode=False)
    assert len(Cache.open(out).contents()) == 5 * len(MEMBERS)
    synthesize(model, cache, out, *more)
    assert Cache.open(out).contents() == whole
    capfd.readouterr()
    synthesize(model, cache, out, *more)
    assert "nothing to do" in capfd.readouterr().out
    wanprep(["verify", "--shards", str(out)], standalone_mode=False)

    # What distill makes of it.
    distill(
        model, out, tmp_path / "lora", "--max-train-steps", "1", "--gen-update-interval", "1",
        "--train-batch-size", "2",
    )  # fmt: skip
    with pytest.raises(UserError, match=r"synthesis\.steps: shards have 5, expected 6"):
        synthesize(model, cache, out, *more, "--steps", 6)
    with pytest.raises(UserError, match=r"synthesis\.model"):
        synthesize(model, cache, cache, *more)
    with pytest.raises(UserError, match=r"synthesis\.model"):
        encode(small, model, out, "--dtype", "fp32")


def merged(model: Path, lora: Path, strength: float, folder: Path) -> Path:
    """The model with the high-noise expert's LoRA in its weights: W + X·(alpha/rank)·B·A."""
    shutil.copytree(model, folder)
    (file,) = (folder / "transformer").glob("*.safetensors")
    weights, own = load_file(file), load_file(lora)
    for name, down in own.items():
        if ".lora_A." in name:
            target = name.removeprefix("transformer.").replace(".lora_A", "")
            change = own[name.replace("lora_A", "lora_B")].double() @ down.double()
            weights[target] = (weights[target] + strength * (1 / 4) * change).float()
    save_file(weights, file)
    return folder


@pytest.mark.parametrize("pairing", ["euler", "renoise"])
def test_a_students_own_sampler_with_its_lora(
    pairing: str, caches: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """States where a high-noise student hands over, of few steps without guidance."""
    model, cache = caches["i2v"]
    trained(model, "high", ALL, tmp_path)
    lora = lora_path(tmp_path, "high", "diffusers")
    out = synthesize(
        model, cache, tmp_path / "out", "--high-lora", f"{lora}:0.7", "--guidance", 1,
        "--step-list", "1000 800 400", "--pairing", pairing, "--mixed-precision", "no",
        "--where", "type=video",
    )  # fmt: skip
    sigmas = [shifted(raw / 1000, 5.0) for raw in (1000, 800, 400)]  # 0.952 hands over to 0.769
    pipeline = pipeline_of(
        merged(model, lora, 0.7, tmp_path / "merged"), "i2v", sigmas, torch.float32
    )
    made, sources = samples(out), samples(cache)
    assert len(made) == 2
    for sample in made.values():
        key = sample["json"]["source"].rpartition("#")[2].split("/")[0]
        cond = with_mask(sources[key]["cond"][None], 4, (0,))
        text, states = pad_text(sample["text"], 512)[None], sample["states"]
        following = [*states[1:], sample["latents"]]
        for place, (sigma, x_t, then) in enumerate(zip(sigmas, states, following, strict=True)):
            expert = pipeline.transformer if place < 2 else pipeline.transformer_2
            with torch.no_grad():
                v = expert(
                    torch.cat([x_t[None], cond], dim=1), torch.tensor([1000 * sigma]), text,
                    return_dict=False,
                )[0][0]  # fmt: skip
            low = sigmas[place + 1] if place < 2 else 0
            if pairing == "euler" or not low:
                assert relative(then, x_t + (low - sigma) * v) < 1e-5
                continue
            noise = (then - (1 - low) * (x_t - sigma * v)) / low
            assert abs(noise.mean()) < 0.05 and noise.std() == pytest.approx(1, abs=0.05)
            for other in states[: place + 1]:  # fresh each time
                assert not torch.allclose(noise, other, atol=0.1)


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("t2v", ("--step-list", "1000 500", "--steps", 3), "--steps: found with --step-list"),
        ("t2v", ("--pairing", "euler"), "--pairing: found without --step-list"),
        ("t2v", ("--states", "500 1000"), "--states: found '500 1000', expected numbers falling"),
        ("ti2v", ("--high-lora", "x.safetensors"), "--high-lora: .* no high-noise expert"),
    ],
)
def test_what_is_refused(
    kind: str, options: tuple[object, ...], named: str, caches: dict[str, tuple[Path, Path]],
    tmp_path: Path,
) -> None:  # fmt: skip
    model, cache = caches[kind]
    with pytest.raises(UserError, match=named):
        synthesize(model, cache, tmp_path / "out", *options)
    assert not (tmp_path / "out").exists()


def test_one_expert_is_loaded_at_a_time(
    caches: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = transformers_before_each(monkeypatch)
    synthesize(*caches["t2v"], tmp_path / "out", "--steps", 3, "--count", 1)
    assert len(held) == 2 and held[0] == held[1]


def test_captions_alone_are_enough_for_t2v(
    tiny_t2v: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.txt").write_text("a red ball\na blue kite, rising\n")
    cache = encode(
        tmp_path, tiny_t2v, tmp_path / "cache", "--train-data-meta", str(tmp_path / "list.txt")
    )
    few = ("--steps", 2, "--clips-per-caption", 2, "--count", 1)
    synthesize(tiny_t2v, cache, tmp_path / "out", *few, "--dry-run")
    assert "2 to make in 8 transformer passes" in capfd.readouterr().out
    assert not (tmp_path / "out").exists()
    made = samples(synthesize(tiny_t2v, cache, tmp_path / "out", *few))
    one, other = made.values()
    assert one["json"]["type"] == "video" and "states" not in one
    assert one["json"]["frame_indices"] == list(range(9))
    assert one["text"].equal(other["text"]) and not one["latents"].equal(other["latents"])
    wanprep(["verify", "--shards", str(tmp_path / "out")], standalone_mode=False)
    # More of them leave what is there as it is.
    whole = samples(
        synthesize(tiny_t2v, cache, tmp_path / "out", "--steps", 2, "--clips-per-caption", 2)
    )
    assert len(whole) == 4 and all(
        whole[key]["latents"].equal(made[key]["latents"]) for key in made
    )

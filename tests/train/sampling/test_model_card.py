"""Model cards: their code makes the clip of `wantrain sample`, and nothing private is in them."""

import json
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

import train.sampling.sample
from tests.models import Mode, tiny_model
from tests.train.methods.test_finetune import finetune
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.sampling.test_comfyui import provenance
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.functional.rng import counted_rng
from train.options import Expert
from train.sampling.model_card import CARD, MARKER, Trained, hub_id_of, model_card, write_guides
from train.saving.export import lora_path
from train.saving.provenance import read_provenance

PROMPT = "waves, moving"
SEED = int(counted_rng(42, "sample", PROMPT).integers(2**32))
"""Of the generator that `wantrain sample --seed 42` takes."""
PLAIN = {"method": "lora", "denoising_step_indices_list": (), "pairing": None}
STEP = ("--max-train-steps", "1", "--report-to", "none")


def block(card: Path, language: str) -> str:
    (found,) = re.findall(rf"(?ms)^```{language}\n(.*?)^```", card.read_text())
    return str(found)


def by_the_card(card: Path, model: Path, *, loras: bool = True) -> np.ndarray:
    """Frames of the card's code, run as a script beside it; its first lines are set."""
    code = block(card, "python")
    assert not re.search(r"\b(from|import) (train|shared|preprocess)\b", code)
    for name, value in {"base": str(model), "prompt": PROMPT, "seed": SEED}.items():
        code, found = re.subn(rf"(?m)^{name} = .*$", f"{name} = {value!r}", code)
        assert found == 1
    if not loras:
        code, found = re.subn(r"(?m)^    pipe.load_lora_weights.*$", "    pass", code)
        assert found == 1
    script = card.with_name("usage.py")
    script.write_text(code)
    frames = np.asarray(runpy.run_path(str(script))["frames"])
    assert card.with_name("clip.mp4").stat().st_size > 1000
    return (frames * 255).round()


def by_the_command(card: Path, model: Path, patch: pytest.MonkeyPatch) -> np.ndarray:
    """Frames of the card's `wantrain sample`, before they are compressed."""
    made: list[np.ndarray] = []
    write = train.sampling.sample.write_mp4

    def remembered(path: Path, frames: np.ndarray, fps: int) -> None:
        made.append(frames)
        write(path, frames, fps)

    patch.setattr(train.sampling.sample, "write_mp4", remembered)
    given = {
        "TEXT": PROMPT,
        "FIRST-FRAME": "first-frame.png",
        "LAST-FRAME": "last-frame.png",
        model.name: str(model),
    }
    program, *words = shlex.split(block(card, "sh"))
    assert program == "wantrain"
    words = [given.get(word, word) for word in words]
    wantrain([*words, "--device", "cpu", "--output", "sampled"], standalone_mode=False)
    return made[0].astype(np.float64)


def check_clips(card: Path, model: Path, patch: pytest.MonkeyPatch) -> np.ndarray:
    """The card's code and its command give one clip, of 255 at most 2 apart; its frames."""
    rows, columns = np.mgrid[0:60, 0:90]
    for name, phase in (("first-frame.png", 0), ("last-frame.png", 2)):
        wave = 127 + 120 * np.sin(rows / 7 + columns / 11 + phase)
        Image.fromarray(np.stack([wave] * 3, -1).astype(np.uint8)).save(card.with_name(name))
    patch.chdir(card.parent)
    ours, theirs = by_the_card(card, model), by_the_command(card, model, patch)
    assert ours.shape == theirs.shape and np.abs(ours - theirs).max() <= 2
    return ours


def test_a_student_for_all_steps(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *STEP, "--boundary-type", "full")
    check_clips(out / CARD, tiny_t2v, monkeypatch)


def test_a_student_of_two_experts(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = distill(tiny_i2v, i2v_shards, tmp_path / "out", *STEP, "--boundary-type", "both")
    check_clips(out / CARD, tiny_i2v, monkeypatch)
    for expert in ("high", "low"):
        assert "A student needs both" in (out / expert / CARD).read_text()
    assert "A student needs both" not in (out / CARD).read_text()


def test_a_plain_lora(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = finetune(
        tiny_t2v, t2v_shards, tmp_path / "out", *STEP, "--boundary-type", "low",
        "--holdout", "0.3", "--holdout-steps", "1",
    )  # fmt: skip
    check_clips(out / CARD, tiny_t2v, monkeypatch)
    *_, last = map(json.loads, (out / "holdout.jsonl").read_text().splitlines())
    assert f"| loss on clips kept from training | {last['loss']:.4f} |" in (out / CARD).read_text()


@pytest.mark.parametrize(
    ("mode", "experts", "told"),
    [
        ("t2v", ("high", "low"), {}),
        ("i2v", ("high", "low"), {"pairing": "euler", "flow_shift": 3.0, "mode": "flf2v"}),
        ("ti2v", ("full",), {"boundary": None, "denoising_step_indices_list": (1000, 600.0, 100)}),
        ("wan21-i2v", ("full",), {"boundary": None}),
        ("t2v", ("high",), PLAIN),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_other_models(
    mode: Mode,
    experts: tuple[Expert, ...],
    told: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    two = mode in ("t2v", "i2v")
    model = tiny_model(tmp_path / "model", mode, two_experts=two)
    size = {"cache": {"samples": 1, "buckets": [[64, 96, 9]]}}
    loras = []
    for expert in experts:
        trained(model, expert, ALL, tmp_path, **size | told)
        loras.append(read_provenance(lora_path(tmp_path, expert, "diffusers")))
    write_guides(tmp_path, [Trained(provenance=one) for one in loras], 32, model=str(model))
    frames = check_clips(tmp_path / CARD, model, monkeypatch)
    without = by_the_card(tmp_path / CARD, model, loras=False)
    assert np.abs(frames - without).max() > 5


def test_the_first_lines_are_what_the_hub_reads() -> None:
    one = Trained(provenance=provenance())
    model = "Wan-AI/Wan2.2-I2V-A14B-Diffusers"
    card = ModelCard(model_card([one], 5120, model=model), ignore_metadata_errors=False)
    assert card.data.to_dict() == {
        "base_model": model,
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-video",
        "tags": [
            "lora", "wan2.2", "image-to-video", "few-step", "distillation", "comfyui", "wandistill",
        ],
    }  # fmt: skip
    # Not of the base alone
    card = ModelCard(model_card([one], 5120, model=model, changed="a.safetensors x 1 merged in"))
    assert "base_model" not in card.data.to_dict() and "`a.safetensors x 1 merged in`" in card.text


def test_only_a_certain_base_is_claimed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    assert hub_id_of(published) == hub_id_of("Wan-AI/Wan2.1-T2V-1.3B") == published
    assert hub_id_of("somebody/own-wan") == "somebody/own-wan"
    monkeypatch.chdir(tmp_path)
    cached = tmp_path / "hub" / "models--somebody--own-wan" / "snapshots" / "0f0f"
    for folder in (Path(published), cached):
        folder.mkdir(parents=True)
    assert hub_id_of(str(cached)) == "somebody/own-wan"
    assert hub_id_of(published) is hub_id_of("toy") is hub_id_of(str(tmp_path)) is None


def test_nothing_private_and_every_name_is_text(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home" / "alice-private"
    odd = "a`b``` |<script src=x>\n---\n```\n'\"\\ü"
    model = shutil.copytree(tiny_t2v, home / odd)
    style = home / "my ```style\n---"
    style.mkdir()
    trained(tiny_t2v, "low", ALL, style)
    file = lora_path(style, "low", "diffusers").rename(style / "st|yle`.safetensors")
    shards = shutil.copytree(t2v_shards, home / "secret clips")
    out = distill(
        model, shards, home / "out", *STEP, "--boundary-type", "low", "--base-lora", f"{file}:0.5",
        "--init-lora", str(file), "--where", "source~=clip", "--rank", "4", "--network-alpha", "1",
        "--target-name", "q,k,v,o,ffn.0,ffn.2",
    )  # fmt: skip
    text = (out / CARD).read_text()
    for private in (str(tmp_path), "home", "alice", "secret", "source", "waves", "noise.png"):
        assert private not in text
    card = ModelCard(text, ignore_metadata_errors=False)
    assert "base_model" not in card.data.to_dict()
    assert "st|yle`.safetensors x 0.5 merged in" in text
    fences = [line for line in text.splitlines() if line.startswith("```")]
    assert fences == ["```python", "```", "```sh", "```"]
    assert text.splitlines().count("---") == 2
    code = block(out / CARD, "python")
    compile(code, CARD, "exec")
    name = odd.replace("\n", "�")
    assert f"base = {json.dumps(name, ensure_ascii=False)}" in code
    assert shlex.split(block(out / CARD, "sh"))[3] == name
    assert f"```` {name} ````" in text or f"````{name}````" in text


def test_no_option_with_a_place_or_a_text_is_said() -> None:
    secret = "s3://KEY:SECRET@bucket/home/alice"
    told = dict.fromkeys(("base", "captions", "init_lora", "shards", "where", "unknown"), secret)
    guidance = {"real_guidance_scale": f"table {64 * 'a'}"}
    text = model_card([Trained(provenance=provenance(recipe=told | guidance))], 5120, model="toy")
    assert not re.search("SECRET|bucket|alice|aaaa", text)
    assert "| `real_guidance_scale` | by noise level |" in text


def test_another_s_page_stays(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ("--checkpointing-steps", "1", "--resume-from-checkpoint", "latest")
    finetune(tiny_t2v, t2v_shards, out, *STEP, *words)
    text = (out / CARD).read_text()
    assert "| optimizer steps | 1 |" in text
    finetune(tiny_t2v, t2v_shards, out, "--max-train-steps", "2", "--report-to", "none", *words)
    assert (out / CARD).read_text() == text.replace(
        "| optimizer steps | 1 |", "| optimizer steps | 2 |"
    )
    assert f"card     {out / CARD}\n" in capsys.readouterr().err
    own = text.replace(MARKER, "My LoRA.")
    (out / CARD).write_text(own)
    finetune(tiny_t2v, t2v_shards, out, "--max-train-steps", "3", "--report-to", "none", *words)
    assert (out / CARD).read_text() == own
    assert "README.md is not wandistill's: left as it is" in capsys.readouterr().err


def test_what_was_measured_is_said() -> None:
    gauges = {"contrast": 0.98, "motion": 1.2345, "motion_error": 0.1}
    one, other = provenance(expert="high", gauges=gauges), provenance()
    loras = [Trained(provenance=one, folder="high"), Trained(provenance=other, folder="low")]
    text = model_card(loras, 5120, model="toy")
    assert "| motion, 1: as the teacher | 1.2345 | – |" in text and "variety" not in text[-900:-300]

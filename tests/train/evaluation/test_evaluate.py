"""`wantrain evaluate`: real pipelines and LoRA files, clips of known contrast, one page."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from shared.errors import UserError
from shared.io.mp4 import read_mp4, write_mp4
from tests.html_page import Parsed
from tests.train.evaluation.test_measures import moving
from tests.train.model.test_lora_adapter import ALL, trained
from tests.train.sampling.test_sample import SHAPE, sample
from train.cli.app import app as wantrain
from train.saving.export import lora_path

PROMPTS = ("waves, moving", "<b>a circle</b>")
TEACHER = ("--steps", "2", "--guidance-scale", "3")


def evaluate(out: Path, *words: str | Path) -> dict[str, Any]:
    wantrain(["evaluate", "--output", str(out), *map(str, words)], standalone_mode=False)
    found: dict[str, Any] = json.loads((out / "evaluation.json").read_text())
    return found


@pytest.fixture(scope="module")
def student(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options: the model and the LoRAs of both experts, on a CPU."""
    folder = tmp_path_factory.mktemp("loras")
    words = ["--model", str(tiny_t2v), "--device", "cpu", *SHAPE]
    for expert in ("high", "low"):
        trained(tiny_t2v, expert, ALL, folder)  # type: ignore[arg-type]
        words += ["--lora", str(lora_path(folder, expert, "diffusers"))]  # type: ignore[arg-type]
    return words


@pytest.fixture(scope="module")
def run(student: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The folder of an evaluation of two prompts, two seeds, and what it found."""
    out = tmp_path_factory.mktemp("evaluation")
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    return out, evaluate(out, *student, *prompts, *TEACHER)


def test_clips_are_those_of_sample(
    run: tuple[Path, Any], student: list[str], tiny_t2v: Path, tmp_path: Path
) -> None:
    """To the byte: the teacher without LoRAs, the student at its trained steps."""
    out, _ = run
    loras = student[student.index("--lora") :]
    for side, words in (("teacher", ("--teacher", *TEACHER)), ("student", tuple(loras))):
        assert sorted(file.name for file in (out / side).iterdir()) == [
            f"00{prompt}-seed{seed}.mp4" for prompt in (0, 1) for seed in (42, 43)
        ]
        for seed in (42, 43):
            more = (*words, "--prompt", PROMPTS[1], "--seed", str(seed))
            made = sample(tiny_t2v, tmp_path / f"{side}{seed}", *more)
            for number in (0, 1):
                expected = (made / f"{side}-00{number}.mp4").read_bytes()
                assert (out / side / f"00{number}-seed{seed}.mp4").read_bytes() == expected


def test_numbers_are_means_over_seeds_and_ratios_of_means_over_prompts(
    run: tuple[Path, Any],
) -> None:
    _, found = run
    assert found["settings"]["steps"] == 2 and len(found["settings"]["lora"]) == 2
    assert [of["prompt"] for of in found["prompts"]] == list(PROMPTS)
    assert set(found["measures"]) == {
        *("motion", "dynamic", "contrast", "saturation", "sharpness", "variety")
    }
    for name, measure in found["measures"].items():
        means = {}
        for side in ("teacher", "student"):
            own = [of[side][name] for of in found["prompts"]]
            means[side] = sum(own) / 2
            if name != "variety":
                clips = [clip for clip in found["clips"] if clip["side"] == side]
                assert len(clips) == 4 and {clip["seed"] for clip in clips} == {42, 43}
                assert sum(clip[name] for clip in clips) / 4 == pytest.approx(means[side])
            assert measure[side] == pytest.approx(means[side])
        if means["teacher"]:
            assert measure["ratio"] == pytest.approx(means["student"] / means["teacher"])
    assert found["measures"]["variety"]["teacher"] > 0
    assert found["measures"]["contrast"]["ratio"] != pytest.approx(1)


def test_the_page_holds_all_that_it_shows(run: tuple[Path, Any]) -> None:
    html = (run[0] / "evaluation.html").read_text()
    parsed = Parsed(html)
    videos = [attributes for tag, attributes in parsed.tags if tag == "video"]
    assert len(videos) == 8
    assert all((video["src"] or "").startswith("data:video/mp4;base64,") for video in videos)
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "img", "link", "b"}, "a prompt is text"
    assert PROMPTS[1] in parsed.text and "://" not in html
    assert "motion" in parsed.text and "variety" in parsed.text


@pytest.mark.parametrize(
    "more", [("--low-vram",), pytest.param(("--base-precision", "int8"), marks=pytest.mark.long)]
)
def test_teacher_and_student_are_told_apart_on_a_small_gpu(
    more: tuple[str, ...], run: tuple[Path, Any], student: list[str], tmp_path: Path
) -> None:
    prompt = ("--prompt", PROMPTS[0], "--seeds", "1")
    evaluate(tmp_path / "out", *student, *prompt, *TEACHER, *more)
    clips = {
        side: (tmp_path / "out" / side / "000-seed42.mp4").read_bytes()
        for side in ("teacher", "student")
    }
    for side, made in clips.items():
        same = made == (run[0] / side / "000-seed42.mp4").read_bytes()
        assert same == (more == ("--low-vram",)), side
    assert clips["teacher"] != clips["student"]


def test_clips_that_exist_measure_as_they_did(run: tuple[Path, Any], tmp_path: Path) -> None:
    out, found = run
    folders = ("--teacher-clips", out / "teacher", "--student-clips", out / "student")
    again = evaluate(tmp_path, *folders)
    assert again["measures"] == found["measures"]
    assert [of["prompt"] for of in again["prompts"]] == ["000", "001"]


def test_a_student_of_known_contrast_motion_and_variety(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through files: contrast 1.2, motion a half, no variety; two prompts, two seeds."""
    for prompt in (0, 1):
        for seed in (1, 2):
            name = f"clip {prompt}-seed{seed}.mp4"
            teacher = moving(4, contrast=30, seed=10 * prompt + seed)
            write_mp4(tmp_path / "teacher" / name, teacher, 16)
            write_mp4(tmp_path / "student" / name, moving(2, contrast=36, seed=prompt), 16)
    folders = ("--teacher-clips", tmp_path / "teacher", "--student-clips", tmp_path / "student")
    found = evaluate(tmp_path / "out", *folders)["measures"]
    assert found["contrast"]["ratio"] == pytest.approx(1.2, rel=0.03)
    low, high = found["contrast"]["interval"]
    assert 1.1 < low <= found["contrast"]["ratio"] <= high < 1.3
    assert found["motion"]["ratio"] == pytest.approx(0.5, rel=0.03)
    assert found["motion"]["teacher"] == pytest.approx(4, rel=0.03)
    assert (found["dynamic"]["teacher"], found["dynamic"]["student"]) == (1, 0)
    assert found["variety"]["student"] == 0 and found["variety"]["teacher"] > 5
    printed = capsys.readouterr().out
    assert "Student against teacher, 2 prompts" in printed and "px a frame" in printed


def test_images_of_a_list_begin_the_clips(tiny_i2v: Path, tmp_path: Path) -> None:
    words = ["--model", str(tiny_i2v), "--device", "cpu", *SHAPE, "--seeds", "1"]
    for expert in ("high", "low"):
        trained(tiny_i2v, expert, ALL, tmp_path)  # type: ignore[arg-type]
        words += ["--lora", str(lora_path(tmp_path, expert, "kohya"))]  # type: ignore[arg-type]
    for name, colour in (("red", (250, 0, 0)), ("blue", (0, 0, 250))):
        Image.new("RGB", (90, 60), colour).save(tmp_path / f"{name}.png")
    listed = tmp_path / "prompts.txt"
    listed.write_text("# a comment\nwaves --i red.png\n\nwaves --i blue.png\n")
    found = evaluate(tmp_path / "out", *words, "--prompts", listed, *TEACHER)
    assert [Path(of["image"]).name for of in found["prompts"]] == ["red.png", "blue.png"]
    assert "variety" not in found["measures"]
    clips = [read_mp4(tmp_path / "out" / "teacher" / f"00{n}-seed42.mp4") for n in (0, 1)]
    assert not np.array_equal(*clips)

    listed.write_text("waves --i red.png\nwaves\n")
    with pytest.raises(UserError, match="'waves' has none and others do"):
        evaluate(tmp_path / "other", *words, "--prompts", listed)
    listed.write_text("waves --w 832 --i red.png\n")
    with pytest.raises(UserError, match=r"line 1 of .* ends in '--w 832 --i red.png'"):
        evaluate(tmp_path / "other", *words, "--prompts", listed)


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, and a tokenizer of single letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(97, 123)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=16)
    images = CLIPImageProcessorPil(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    width: dict[str, int] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    text = CLIPTextConfig(
        vocab_size=len(words), num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=words.index("<|startoftext|>"), eos_token_id=words.index("<|endoftext|>"),
        **width,
    )  # fmt: skip
    vision = CLIPVisionConfig(image_size=32, patch_size=16, num_attention_heads=2, **width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = CLIPConfig(
            text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
        )
        CLIPModel(config).save_pretrained(folder)
    return folder


def test_agreement_is_that_of_the_clip_model(
    run: tuple[Path, Any], student: list[str], clip_model: Path, tmp_path: Path
) -> None:
    words = (*student, "--prompt", "a cat", "--seeds", "1", *TEACHER)
    found = evaluate(tmp_path / "out", *words, "--clip-model", clip_model)
    frames = read_mp4(tmp_path / "out" / "student" / "000-seed42.mp4")
    chosen = frames[[0, 1, 2, 3, 5, 6, 7, 8]]  # 8 of 9, spread
    processor: Any = CLIPProcessor.from_pretrained(clip_model)
    inputs = processor(text=["a cat"], images=list(chosen), return_tensors="pt")
    with torch.inference_mode():
        said = CLIPModel.from_pretrained(clip_model)(**inputs)
    cosines = torch.nn.functional.cosine_similarity(said.image_embeds, said.text_embeds)
    expected = pytest.approx(100 * float(cosines.mean()), abs=0.01)
    assert found["measures"]["agreement"]["student"] == expected
    assert found["measures"]["agreement"]["interval"] is None  # of one prompt


def test_a_clip_model_without_all_weights_is_refused(
    student: list[str], clip_model: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "clip"
    shutil.copytree(clip_model, partial)
    config = json.loads((partial / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 3
    (partial / "config.json").write_text(json.dumps(config))
    words = (*student, "--prompt", "a cat")
    with pytest.raises(UserError, match="no fitting weights for 16 tensors of CLIPModel"):
        evaluate(tmp_path / "out", *words, "--clip-model", partial)
    with pytest.raises(UserError, match=r"--clip-model: .*nowhere can't be loaded"):
        evaluate(tmp_path / "out", *words, "--clip-model", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "--lora: found none, expected the LoRA of `wantrain distill`"),
        (("--lora", "x"), "--prompt: found none, expected --prompt TEXT, or --prompts FILE"),
        (("--lora", "x", "--prompt", "cat", "--num-frames", "1"), "motion is between frames"),
        (("--teacher-clips", "x"), "found one, expected both or none"),
        (
            ("--teacher-clips", "x", "--student-clips", "y", "--prompt", "cat"),
            "found with --prompt, which are for clips to be made",
        ),
        (("--lora", "x", "--prompt", "cat", "--prompt", "cat"), "found 'cat' twice"),
        (("--lora", "x", "--prompt", " \u200b"), "found an empty prompt"),
        (("--lora", "x", "--prompts", "nowhere"), "cannot read nowhere as text"),
        (
            ("--lora", "x", "--prompt", "cat", "--image", "i", "--image", "j"),
            "--image: found 2 for 1 --prompt, expected one, or one for each",
        ),
        (("--lora", "x", "--prompt", "cat", "--seeds", "0"), "--seeds: found 0"),
    ],
)
def test_what_is_wrong_is_said_first(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        evaluate(tmp_path / "out", *words)


def test_a_plain_lora_is_no_student(tiny_t2v: Path, tmp_path: Path) -> None:
    plain = {"method": "lora", "denoising_step_indices_list": (), "pairing": None}
    trained(tiny_t2v, "high", ALL, tmp_path, **plain)
    lora = lora_path(tmp_path, "high", "diffusers")
    with pytest.raises(UserError, match="is a plain LoRA of `wantrain lora`, expected"):
        evaluate(tmp_path / "out", "--model", tiny_t2v, "--lora", lora, "--prompt", "cat", *SHAPE)


def test_folders_that_do_not_go_together_are_refused(
    run: tuple[Path, Any], student: list[str], tmp_path: Path
) -> None:
    for side, size, names in (("a", 64, "xy"), ("b", 64, "x"), ("c", 32, "xy")):
        for name in names:
            write_mp4(tmp_path / side / f"{name}.mp4", moving(1, side=size, frames=2), 16)

    def refused(teacher: str, other: str, message: str) -> None:
        folders = ("--teacher-clips", tmp_path / teacher, "--student-clips", tmp_path / other)
        with pytest.raises(UserError, match=message):
            evaluate(tmp_path / "out", *folders)

    refused("a", "b", r"found 2 mp4 files in .*a and 1 in .*b; only one has y\.mp4")
    refused("nowhere", "a", "found 0 mp4 files in")
    refused("a", "c", r"\(2, 32, 32\), the teacher's \(2, 64, 64\)")
    (tmp_path / "b" / "y.mp4").write_text("no video")
    refused("a", "b", "y.mp4 is no video that ffmpeg can read")
    out, _ = run
    with pytest.raises(UserError, match=r"teacher has clips of another run \(001-seed42.mp4"):
        evaluate(out, *student, "--prompt", "one")

"""Gauges: what they read, when they warn, and what is kept of the best; runs by the CLI."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shared.errors import UserError
from tests.train.conftest import encode
from tests.train.tracking.test_validation import distill, final_bytes, rows
from train.cli.app import app as wantrain
from train.functional.contrast import contrast, motion
from train.saving.checkpoint import list_checkpoints
from train.saving.provenance import read_provenance
from train.tracking.gauges import Gauges

RUN = (
    "--boundary-type", "full", "--denoising-step-indices-list", "1000,500", "--gauge-batches", "2",
    "--checkpointing-steps", "2", "--checkpoints-total-limit", "1", "--keep-best", "contrast",
)  # fmt: skip
RESUME = ("--resume-from-checkpoint", "latest")


@pytest.fixture(scope="module")
def prompts(dataset: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gauges")
    (folder / "p.txt").write_text("waves --w 48 --h 32 --f 5\nno waves --w 32 --h 64 --f 9\n")
    return encode(
        dataset, tiny_t2v, folder / "shards", "--validation-prompts", str(folder / "p.txt")
    )


def test_frames_that_a_sample_is_given_count_nowhere() -> None:
    """ti2v: one sample has its first frame, the other none; spread differs in every channel."""
    rng = np.random.default_rng(3)
    clips = rng.normal(size=(2, 6, 4, 5, 7)) * np.arange(1, 7)[:, None, None, None] + 2.5
    clips[0, :, 0] *= 40
    generated = torch.ones(2, 1, 4, 1, 1)
    generated[0, :, 0] = 0
    latents = torch.from_numpy(clips).float()
    parts = [clips[0, :, 1:], clips[1]]
    expected = [np.mean([channel.std() for channel in part]) for part in parts]
    assert contrast(latents, generated).tolist() == pytest.approx(expected, rel=1e-5)
    expected = [np.abs(np.diff(part, axis=1)).mean() for part in parts]
    assert motion(latents, generated).tolist() == pytest.approx(expected, rel=1e-5)
    for measure in (contrast, motion):
        assert torch.allclose(measure(latents), measure(latents, torch.ones(2, 1, 4, 1, 1)))


def test_readings_are_the_recent_means_over_the_teachers() -> None:
    gauges = Gauges({})
    name = "latent/contrast@500"
    gauges.refer_to({"latent/contrast@900": [9.0, 9.5], name: [2.0, 2.2, 1.8, 2.4]})
    values = list(np.random.default_rng(5).normal(2.1, 0.2, size=40))
    for value in values:
        shown = gauges.add({name: value, "latent/motion@500": 3.0}, share=0.1)
    mean = np.mean(values[:10])
    for value in values[10:]:
        mean = 0.9 * mean + 0.1 * value
    reading = gauges.reading("contrast")
    assert reading is not None and reading.value == pytest.approx(mean / 2.1)
    assert shown["gauge/contrast"] == shown["gauge/contrast@500"] == reading.value
    assert "gauge/contrast@900" not in shown and gauges.reading("motion") is None
    # Of 40 values of deviation 0.2 such a mean is worth 19, and the four samples are what they are.
    spread = np.std([2.0, 2.2, 1.8, 2.4], ddof=1) / 2 / 2.1
    assert reading.error == pytest.approx(np.hypot(0.2 / 19**0.5 / 2.1, spread), rel=0.15)


def test_a_warning_for_each_crossing_and_none_between() -> None:
    record: dict[str, object] = {}
    gauges = Gauges(record)
    gauges.refer_to({"latent/contrast@500": [1.0, 1.001, 0.999]})
    said = []
    for number, value in enumerate([0.7] * 15 + [1.0] * 60 + [1.3] * 60 + [1.0] * 60 + [0.7] * 60):
        gauges.add({"latent/contrast@500": value}, share=number / 300)
        said += gauges.warnings()
        gauges = Gauges(json.loads(json.dumps(record)))  # as a run that resumes after each update
        record = gauges._record
    assert len(said) == 2
    assert "above 1.1" in said[0] and "lower or calibrate --real-guidance-scale" in said[0]
    assert "below 0.9" in said[1] and "washed out" in said[1]


def test_a_student_that_never_gets_there_is_named_half_way() -> None:
    gauges = Gauges({})
    gauges.refer_to({"latent/motion@500": [1.0, 1.001, 0.999]})
    said = []
    for number in range(20):
        gauges.add({"latent/motion@500": 0.6}, share=(number + 1) / 20)
        said += [(number, warning) for warning in gauges.warnings()]
    ((number, warning),) = said
    assert number == 9 and "motion is 0.60" in warning and "slow down" in warning


def _without_times(out: Path) -> list[dict[str, str]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(("speed/", "memory/"))}
        for row in rows(out)
    ]


OF_THIS_TIME = ("logs", "run.toml", "index.html", "metrics.jsonl")


def _files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in OF_THIS_TIME
    }


@pytest.fixture(scope="module")
def whole(tiny_t2v: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_t2v, prompts, tmp_path_factory.mktemp("whole") / "out", 10, *RUN)


def test_the_best_is_kept_beside_the_last(whole: Path) -> None:
    assert [path.name for path in list_checkpoints(whole)] == ["checkpoint-10"]
    state = json.loads((whole / "checkpoint-10" / "state.json").read_text())
    best = state["record"]["best"]
    (kept,) = list_checkpoints(whole / "best-contrast")
    assert kept.name == f"checkpoint-{best['updates'] // 2}"
    weights = load_file(kept / "generator_weights.safetensors")
    lora = whole / "best-contrast" / "lora-full-diffusers.safetensors"
    saved = load_file(lora)
    name = next(name for name in weights if "blocks.0.attn1.to_q.lora_A" in name)
    assert torch.equal(saved[f"transformer.{name}"], weights[name])
    provenance = read_provenance(lora)
    assert provenance.updates == best["updates"] // 2 and provenance.gauges is not None
    ratio = provenance.gauges["contrast"]
    assert max(abs(np.log(ratio)), np.log(1.02)) == pytest.approx(best["distance"], abs=1e-4)
    final = read_provenance(whole / "lora-full-diffusers.safetensors")
    assert final.gauges is not None and final.gauges.keys() >= {"contrast", "motion"}
    shown = [float(row["gauge/contrast"]) for row in rows(whole) if row["gauge/contrast"]]
    assert final.gauges["contrast"] == round(shown[-1], 4)


@pytest.mark.parametrize("at", [5, 11, 16])
def test_stopped_and_resumed_it_is_the_run_left_in_peace(
    at: int, whole: Path, tiny_t2v: Path, prompts: Path, tmp_path: Path
) -> None:
    out, real, count = tmp_path / "out", Gauges.add, 0

    def struck(*args: object, **more: object) -> dict[str, float]:
        nonlocal count
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Gauges, "add", struck)
        with pytest.raises(SystemExit):
            distill(tiny_t2v, prompts, out, 10, *RUN)
    distill(tiny_t2v, prompts, out, 10, *RUN, *RESUME)
    assert _without_times(out) == _without_times(whole)
    assert _files(out) == _files(whole)


def test_a_folder_that_a_kill_left_behind_is_made_again(
    whole: Path, tiny_t2v: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the checkpoint, before its folder: nothing there, or between two renames."""
    for number, left in enumerate((None, "best-contrast.replaced")):
        out = Path(shutil.copytree(whole, tmp_path / str(number)))
        best = out / "best-contrast"
        (kept,) = list_checkpoints(best)
        if not (out / kept.name).exists():
            shutil.copytree(kept, out / kept.name)
        if left is None:
            shutil.rmtree(best)
        else:
            best.rename(out / left)
        distill(tiny_t2v, prompts, out, 10, *RUN, *RESUME)
        assert _files(best) == _files(whole / "best-contrast")


def test_resumed_from_the_best_it_leaves_the_later_ones(
    whole: Path, tiny_t2v: Path, prompts: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(whole, tmp_path / "out"))
    (kept,) = list_checkpoints(out / "best-contrast")
    if kept.name == "checkpoint-10":
        pytest.skip("the best is the last")
    distill(tiny_t2v, prompts, out, 10, *RUN, "--resume-from-checkpoint", str(kept))
    assert (out / "checkpoint-10.aside").is_dir()
    assert _files(out / "checkpoint-10") == _files(whole / "checkpoint-10")


def test_variety_is_the_distance_of_clips_over_that_of_the_base(
    tiny_t2v: Path, prompts: Path, tmp_path: Path
) -> None:
    more = (
        "--boundary-type", "full", "--validation-steps", "1", "--validation-seeds", "3",
        "--checkpointing-steps", "1", "--keep-best", "variety",
    )  # fmt: skip
    out = distill(tiny_t2v, prompts, tmp_path / "out", 2, *more)
    distances = []
    for step in (0, 2):
        clips = [
            load_file(out / "validation" / f"step-{step}" / f"{n:03d}.safetensors")["latents"]
            for n in range(6)
        ]
        gaps = []
        for first in (0, 3):
            of_one = [clip.double().numpy() for clip in clips[first : first + 3]]
            pairs = [(0, 1), (0, 2), (1, 2)]
            gaps.append(np.mean([((of_one[a] - of_one[b]) ** 2).mean() ** 0.5 for a, b in pairs]))
        distances.append(np.mean(gaps))
    found = read_provenance(out / "lora-full-kohya.safetensors").gauges
    assert found is not None
    assert found["variety"] == pytest.approx(distances[1] / distances[0], rel=1e-2)
    assert (out / "best-variety" / "lora-full-comfyui.safetensors").exists()

    # Its last cycle is lost, with what validation found in it. (Clips' own metadata has no order.)
    before = {n: data for n, data in _files(out).items() if not n.startswith("validation")}
    shutil.rmtree(out / "checkpoint-2")
    distill(tiny_t2v, prompts, out, 2, *more, *RESUME)
    assert {name: data for name, data in _files(out).items() if name in before} == before


def test_one_seed_is_the_first_of_several(tiny_t2v: Path, prompts: Path, tmp_path: Path) -> None:
    more = ("--boundary-type", "full", "--validation-steps", "1")
    one = distill(tiny_t2v, prompts, tmp_path / "one", 1, *more)
    two = distill(tiny_t2v, prompts, tmp_path / "two", 1, *more, "--validation-seeds", "2")
    for number in (0, 1):
        files = (
            out / "validation" / "step-1" / f"{position:03d}.safetensors"
            for out, position in ((one, number), (two, 2 * number))
        )
        a, b = (load_file(file)["latents"] for file in files)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--gauge-batches", "1"), "--gauge-batches: found 1, expected 0, or 2 or more"),
        (("--keep-best", "motion", "--gauge-batches", "0"), "--keep-best: found motion with"),
        (("--keep-best", "variety"), "--keep-best: found variety, which needs"),
    ],
)
def test_what_cannot_be_is_refused(
    given: tuple[str, ...], named: str, tiny_t2v: Path, prompts: Path, tmp_path: Path
) -> None:
    words = ["distill", "--model", str(tiny_t2v), "--shards", str(prompts)]
    with pytest.raises(UserError, match=named):
        wantrain([*words, "--output-dir", str(tmp_path / "o"), *given], standalone_mode=False)


def test_without_gauges_nothing_is_recorded(tiny_t2v: Path, prompts: Path, tmp_path: Path) -> None:
    out = distill(tiny_t2v, prompts, tmp_path / "out", 2, "--boundary-type", "full")
    (checkpoint,) = list_checkpoints(out)
    assert "record" not in json.loads((checkpoint / "state.json").read_text())
    assert read_provenance(out / "lora-full-kohya.safetensors").gauges is None
    assert final_bytes(out)

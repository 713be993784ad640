"""Guidance by noise level: the table beside numpy's, whole steps beside float64, file and run."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.errors import UserError
from tests.train.methods.test_rollouts import UPDATE, Float64, drawn, recipe_of
from tests.train.model.test_roles import NEGATIVE, build_batch, build_roles
from tests.train.test_distill import distill, final_bytes, losses
from tests.train.test_ti2v import Reference, mixed_batch
from tests.train.test_ti2v import _setup as ti2v_setup
from train.functional.guidance import GuidanceTable
from train.functional.rng import spread
from train.methods.dmd import exit_step, generator_step
from train.methods.flow_matching import guided_velocity, over_frames
from train.methods.guidance_file import Calibration, write_calibration
from train.model.base import base_digest
from train.saving.provenance import read_provenance

# Unevenly far apart, up and down, with scales on both sides of 1.
SIGMAS, SCALES = (0.05, 0.3, 0.55, 0.8, 0.97), (1.57, 4.0, 2.25, 0.75, 1.125)
TABLE = GuidanceTable(sigmas=SIGMAS, scales=SCALES)


@pytest.mark.parametrize("points", [1, 2, 5])
def test_a_table_is_numpys_interpolation_and_constant_beyond_its_ends(points: int) -> None:
    table = GuidanceTable(sigmas=SIGMAS[:points], scales=SCALES[:points])
    sigma = torch.cat([torch.rand(200), torch.tensor([0.0, 1.0, *SIGMAS])])
    expected = np.interp(sigma.double().numpy(), SIGMAS[:points], SCALES[:points])
    np.testing.assert_allclose(table.at(sigma).numpy(), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("sigmas", "scales"),
    [((), ()), ((0.5, 0.5), (1.0, 1.0)), ((0.5, 1.5), (1.0, 1.0)), ((0.5,), (float("nan"),))],
)
def test_what_is_no_table_is_refused(sigmas: tuple[float, ...], scales: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^(sigmas|scales) are"):
        GuidanceTable(sigmas=sigmas, scales=scales)


def _interpolated(sigma: torch.Tensor) -> torch.Tensor:
    """(B, 1, 1, 1, 1) float64, by numpy."""
    scales = np.interp(sigma.flatten().numpy(), SIGMAS, SCALES)
    return torch.from_numpy(scales).view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("expert", ["high", "low"])
def test_each_sample_is_guided_by_its_own_level(tiny_i2v: Path, expert: str, batched: bool) -> None:
    roles, batch = build_roles(tiny_i2v, expert=expert), build_batch("i2v", update=UPDATE)
    recipe = recipe_of(expert, real_guidance_scale=TABLE, batched_guidance=batched, start="noise")
    found = generator_step(roles, recipe, batch, NEGATIVE)

    reference = Float64(tiny_i2v, expert, roles)
    x0 = reference.rollout(batch, list(range(exit_step(recipe, UPDATE) + 1)), "noise", "renoise")
    low, high = (0.9 / 1.4, 0.98) if expert == "high" else (0.0, 0.9 / 1.4)
    u = low + (high - low) * spread(3, "score level", UPDATE, (0, 1), 1).double()
    sigma = (5 * u / (1 + 4 * u)).clamp(min=0.02).view(2, 1, 1, 1, 1)
    x_t = (1 - sigma) * x0 + sigma * drawn(batch, "score noise")
    assert batch.condition is not None
    inputs = torch.cat([x_t, batch.condition.double()], 1)
    fake = x_t - sigma * reference.critic(inputs, sigma, batch.text)
    cond = x_t - sigma * reference.teacher(inputs, sigma, batch.text)
    uncond = x_t - sigma * reference.teacher(inputs, sigma, NEGATIVE.expand(2, -1, -1))
    scales = _interpolated(sigma)
    assert (scales[0] - scales[1]).abs() > 0.01
    real = cond + (scales - 1) * (cond - uncond)
    g = (fake - real) / (x0 - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    assert found.loss.item() == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-4)


def test_a_frame_that_is_kept_clean_has_its_samples_scale(tiny_ti2v: Path) -> None:
    roles, plain, recipe = ti2v_setup(tiny_ti2v, real_guidance_scale=TABLE)
    batch = mixed_batch()
    found = generator_step(roles, recipe, batch, NEGATIVE).loss.item()
    fixed = generator_step(roles, replace(recipe, real_guidance_scale=6.0), batch, NEGATIVE)
    assert found != pytest.approx(fixed.loss.item(), rel=1e-3)

    reference, sigma = Reference(batch), Reference(batch).level()
    x_t = reference.noisy(batch.latents.double(), sigma, "score noise")
    levels, timesteps = over_frames(batch, sigma.flatten().float(), 1000 * sigma.flatten().float())
    v = guided_velocity(roles, x_t.float(), timesteps, batch, NEGATIVE, TABLE)
    with torch.no_grad():
        _, cond = reference.x0(plain, x_t, sigma, batch.text)
        _, uncond = reference.x0(plain, x_t, sigma, NEGATIVE.expand(2, -1, -1))
    expected = cond + (_interpolated(sigma) - 1) * (cond - uncond)
    assert (v.double() - expected).norm() / expected.norm() < 1e-5
    assert torch.count_nonzero(levels == 0) == 1


def test_bf16_and_numbers_as_before(tiny_i2v: Path) -> None:
    """A number's arithmetic to the bit; a table that is everywhere that number, but for rounding.

    In bf16 the passes are those of any other scale: only what is made of them differs.
    """
    roles, batch = build_roles(tiny_i2v, precision="bf16"), build_batch("i2v")
    x_t, t = torch.randn_like(batch.latents), torch.tensor([125.0, 830.0])

    def velocity(text: torch.Tensor) -> torch.Tensor:
        return roles.velocity(x_t, t, text, batch.condition)

    cond, uncond = velocity(batch.text), velocity(NEGATIVE.expand(2, -1, -1))
    number = guided_velocity(roles, x_t, t, batch, NEGATIVE, 6.0)
    assert torch.equal(number, uncond + 6.0 * (cond - uncond))
    constant = GuidanceTable(sigmas=(0.2, 0.9), scales=(6.0, 6.0))
    assert torch.equal(guided_velocity(roles, x_t, t, batch, NEGATIVE, constant), number)
    scales = _interpolated(torch.tensor([0.125, 0.83], dtype=torch.float64))
    found = guided_velocity(roles, x_t, t, batch, NEGATIVE, TABLE).double()
    expected = uncond.double() + scales * (cond.double() - uncond.double())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _calibration(model: Path, component: str, **changes: object) -> Calibration:
    values = {
        "sigmas": SIGMAS, "scales": SCALES, "spread": (0.1,) * 5, "measured": SCALES,
        "model": str(model),
        "base": base_digest(model, component), "clips": 24, "measured_on": {"shards": "ab"},
    }  # fmt: skip
    return Calibration(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture
def file(tiny_t2v: Path, tmp_path: Path) -> Path:
    """Of both experts, with other scales for the high one."""
    path = tmp_path / "w.json"
    high = _calibration(tiny_t2v, "transformer", scales=(2.0,) * 5)
    write_calibration(path, "high", high)
    write_calibration(path, "low", _calibration(tiny_t2v, "transformer_2"))
    return path


RUN = ("--max-train-steps", "2", "--mixed-precision", "no")


def test_a_run_with_a_file_says_so_resumes_and_refuses_another(
    file: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = (*RUN, "--guidance", str(file))
    distill(tiny_t2v, t2v_shards, tmp_path / "dry", *guided, "--dry-run")
    printed = capsys.readouterr().out
    assert f'"real_guidance_scale": "table {TABLE.digest}"' in printed
    assert "guidance of the teacher by noise level, 5 of them: 1.57 at sigma 0.050" in printed

    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", *guided)
    number = distill(tiny_t2v, t2v_shards, tmp_path / "number", *RUN)
    assert losses(whole)["generator"] != losses(number)["generator"]
    assert losses(whole)["critic"][:2] == losses(number)["critic"][:2]
    recipe = read_provenance(whole / "lora-low-diffusers.safetensors").recipe
    assert recipe["real_guidance_scale"] == f"table {TABLE.digest}"
    assert recipe["guidance_table"] == {"sigmas": list(SIGMAS), "scales": list(SCALES)}

    out = tmp_path / "out"
    distill(tiny_t2v, t2v_shards, out, *guided, "--max-train-steps", "1")
    resume = ("--resume-from-checkpoint", "latest")
    refused = rf"real_guidance_scale: checkpoint has 'table {TABLE.digest}', this run 6\.0"
    with pytest.raises(UserError, match=refused):
        distill(tiny_t2v, t2v_shards, out, *RUN, *resume)
    moved = file.rename(tmp_path / "moved.json")  # the same numbers elsewhere are the same run
    distill(tiny_t2v, t2v_shards, out, *RUN, *resume, "--real_guidance_scale", str(moved))
    assert final_bytes(out) == final_bytes(whole)


def test_files_that_do_not_fit_are_refused_with_the_cure(
    file: Path, tiny_t2v: Path, tiny_i2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    def refused(*more: str, match: str) -> None:
        with pytest.raises(UserError, match=match):
            distill(tiny_t2v, t2v_shards, tmp_path / "x", "--dry-run", *more)

    refused(
        "--guidance", str(file), "--boundary-type", "full",
        match="no table for --boundary-type full, only for high and low. Measure it: wantrain cal",
    )  # fmt: skip
    write_calibration(file, "low", _calibration(tiny_i2v, "transformer_2"))
    refused(
        "--guidance", str(file),
        match=rf"other weights \({re.escape(str(tiny_i2v))}.*--boundary-type low --output",
    )  # fmt: skip
    refused("--guidance", "6,0", match="^--real-guidance-scale: cannot read 6,0")
    refused("--guidance", "-1", match="^--real-guidance-scale: found -1, expected 0 or more, or")
    refused("--guidance", "nan", match="^--real-guidance-scale: found nan")
    content = json.loads(file.read_text())
    for broken, found in (
        ({"version": 2}, "has version 2, this wandistill reads 1"),
        ({"experts": {"low": {}}}, "sigmas is missing"),
        ({"experts": {"low": content["experts"]["low"] | {"sigmas": [0.5, 0.1]}}}, "rising"),
    ):
        file.write_text(json.dumps(content | broken))
        refused("--guidance", str(file), match=rf"^--real-guidance-scale: .*{found}")


def test_the_seeds_recipe_refuses_what_the_seed_has_not(
    file: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    for words in (
        ("--score-levels", "exit"),
        ("--exits", "last"),
        ("--critic-warmup", "3"),
        ("--real-guidance-scale", str(file)),
    ):
        with pytest.raises(UserError, match=f"--recipe: found seed with {' '.join(words)}"):
            distill(tiny_t2v, t2v_shards, tmp_path, *words, "--recipe", "seed", "--dry-run")

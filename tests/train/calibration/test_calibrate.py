"""`wantrain calibrate` beside plain diffusers models in float64, and what it refuses."""

import json
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.errors import UserError
from shared.format.cache import MemberReader, open_cache
from shared.format.prompts import read_prompts
from shared.io.store import Store
from tests.train.methods.test_rollouts import NEGATIVE
from tests.train.model.test_roles import build_batch, build_roles
from tests.train.test_distill import distill
from tests.train.test_ti2v import mixed_batch
from train.calibration.measure import inner_products
from train.cli.app import app as wantrain
from train.data.batches import Batch
from train.functional.rng import noise

SYNTHESIS = {
    "model": "m",
    "steps": 40,
    "guidance": 3.0,
    "flow_shift": 5.0,
    "seed": 1,
    "states": None,
}
LEVELS = (0.03, 0.31, 0.66, 0.87, 1.0)
SEED = 11
Velocity = Any


def rows_of(batch: Batch) -> list[Batch]:
    """Each sample alone."""
    names = ("latents", "text", "condition", "image", "noised")

    def of(row: int) -> dict[str, Any]:
        tensors = {name: getattr(batch, name) for name in names}
        return {n: None if t is None else t[row : row + 1] for n, t in tensors.items()}

    return [
        Batch(update=0, samples=(row,), keys=batch.keys[row : row + 1], **of(row))
        for row in range(len(batch.samples))
    ]


def vectors(
    plain: torch.nn.Module,
    clip: Batch,
    negative: torch.Tensor,
    sigma: float,
    level: int,
    number: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 − x̂0_cond and x̂0_cond − x̂0_uncond, written out; of a kept frame nothing is left."""
    x0 = clip.latents.double()
    eps = noise(x0.shape[1:], SEED, "calibrate noise", level, [number]).double()
    x_t, timestep = (1 - sigma) * x0 + sigma * eps, torch.tensor([1000 * sigma])
    kept = clip.noised is not None and clip.noised.min() == 0
    if clip.noised is not None:  # one time for each token, as diffusers' pipeline makes them
        mask = torch.ones(x0.shape[2:], dtype=torch.float64)
        if kept:
            x_t[:, :, 0], mask[0] = x0[:, :, 0], 0
        timestep = (mask[:, ::2, ::2] * 1000 * sigma).flatten()[None]
    inputs = x_t if clip.condition is None else torch.cat([x_t, clip.condition.double()], 1)

    def predicted(text: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            v = plain(inputs, timestep.float(), text.double(), return_dict=False)[0]
        x = x_t - sigma * v
        if kept:
            x[:, :, 0] = x0[:, :, 0]
        return x

    cond, uncond = predicted(clip.text), predicted(negative[None])
    return (x0 - cond).flatten(), (cond - uncond).flatten()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("mode", ["t2v", "i2v", "ti2v"])
def test_inner_products_are_those_of_plain_models(
    mode: str, batch_size: int, request: pytest.FixtureRequest
) -> None:
    """Two clips, not square; of ti2v one keeps its first frame."""
    folder = request.getfixturevalue(f"tiny_{mode}")
    expert, part = ("full", "transformer") if mode == "ti2v" else ("low", "transformer_2")
    roles = build_roles(folder, expert=expert)  # its LoRAs must not show
    plain = WanTransformer3DModel.from_pretrained(folder, subfolder=part).double()
    clips = rows_of(mixed_batch() if mode == "ti2v" else build_batch(mode))
    for number, clip in enumerate(clips):
        found = inner_products(
            roles, clip, NEGATIVE, LEVELS, number=number, batch_size=batch_size, seed=SEED
        )
        for level, sigma in enumerate(LEVELS):
            r, d = vectors(plain, clip, NEGATIVE, sigma, level, number)
            expected = [float(r @ r), float(r @ d), float(d @ d)]
            # ⟨r, d⟩ is small beside |r|·|d|, by which its rounding goes.
            size = [expected[0], (expected[0] * expected[2]) ** 0.5, expected[2]]
            np.testing.assert_allclose(found[level] / size, np.divide(expected, size), atol=2e-5)


def synthesised(shards: Path, folder: Path, **changes: object) -> Path:
    """A copy of a cache that says its clips are the teacher's."""
    shutil.copytree(shards, folder)
    manifest = folder / "manifest.json"
    content = json.loads(manifest.read_text())
    content["fingerprint"]["synthesis"] = SYNTHESIS | changes
    manifest.write_text(json.dumps(content))
    return folder


def calibrate(model: str | Path, shards: Path, out: Path, *more: str) -> dict[str, Any]:
    wantrain(
        [
            "calibrate", "--model", str(model), "--shards", str(shards), "--output", str(out),
            "--device", "cpu", *more,
        ],
        standalone_mode=False,
    )  # fmt: skip
    content: dict[str, Any] = json.loads(out.read_text())["experts"]
    return content


def by_hand(
    model: Path, part: str, shards: Path, sigmas: Sequence[float]
) -> list[tuple[float, float]]:
    """(w*, error at it relative to none) of each level, by least squares over all clips."""
    index = open_cache(Store(shards))
    prompts = {p.role: p.text for p in read_prompts(index.store, index.prompt_shards)}
    reader = MemberReader(index, open_files=2)

    def padded(text: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(text.float(), (0, 0, 0, 512 - len(text)))

    def read(row: int, member: str, name: str) -> torch.Tensor:
        header = reader.header(row, member)
        assert header is not None
        tensor = header.tensors[name]
        target = torch.empty(tensor.shape, dtype=torch.bfloat16)
        reader.read_into(header, name, target)
        return target.float()

    plain = WanTransformer3DModel.from_pretrained(model, subfolder=part).double()
    found = []
    for level, sigma in enumerate(sigmas):
        rs, ds = [], []
        for row in range(len(index)):
            clip = Batch(
                update=0, samples=(row,), keys=("a",), condition=None,
                latents=read(row, "latents.safetensors", "latents")[None],
                text=padded(read(row, "text.safetensors", "text"))[None],
            )  # fmt: skip
            r, d = vectors(plain, clip, padded(prompts["negative"]), sigma, level, row)
            rs.append(r.numpy())
            ds.append(d.numpy())
        r, d = np.concatenate(rs), np.concatenate(ds)
        more = np.linalg.lstsq(d[:, None], r, rcond=None)[0][0]
        found.append((1 + more, ((r - more * d) ** 2).sum() / (r**2).sum()))
    return found


def test_both_experts_in_one_file_that_distill_takes(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Six samples of three shapes; w* and the errors are those of least squares over all."""
    shards, out = synthesised(t2v_shards, tmp_path / "clips"), tmp_path / "w.json"
    fp32 = ("--mixed-precision", "no", "--levels", "3", "--seed", str(SEED))
    high = calibrate(tiny_t2v, shards, out, "--boundary-type", "high", *fp32)
    both = calibrate(tiny_t2v, shards, out, *fp32, "--batch-size", "2", "--low-vram")
    assert both["high"] == high["high"] and sorted(both) == ["high", "low"]
    shown = capfd.readouterr()
    assert "6 clips x 3 levels x 2 = 36 predictions in 36 transformer passes" in shown.err
    assert "= 36 predictions in 24 transformer passes" in shown.err

    for expert, part, low, high_u in (
        ("high", "transformer", 0.875 / (12 - 11 * 0.875), 1.0),
        ("low", "transformer_2", 0.02 / (12 - 11 * 0.02), 0.875 / (12 - 11 * 0.875)),
    ):
        entry = both[expert]
        sigmas = np.array(entry["sigmas"])
        u = sigmas / (12 - 11 * sigmas)
        np.testing.assert_allclose((u[0], u[-1]), (low, high_u), rtol=1e-9)
        middle = (u[1] - low) / (high_u - low) + (sigmas[1] - sigmas[0]) / (sigmas[2] - sigmas[0])
        assert middle == pytest.approx(1, abs=1e-6)  # of 2: halfway on both scales together
        expected = by_hand(tiny_t2v, part, shards, entry["sigmas"])
        np.testing.assert_allclose(entry["measured"], [w for w, _ in expected], atol=2e-4)
        for _, error in expected:
            assert f" {error:.4f} " in shown.out
        assert entry["measured_on"]["synthesis"] == SYNTHESIS and entry["clips"] == 6
    drawing = ElementTree.fromstring(out.with_suffix(".svg").read_text())
    assert sum(part.tag.endswith("polyline") for part in drawing.iter()) == 2

    again = calibrate(tiny_t2v, shards, tmp_path / "again.json", "--boundary-type", "high", *fp32)
    assert again["high"] == high["high"]
    bf16 = calibrate(tiny_t2v, shards, tmp_path / "bf16.json", "--boundary-type", "high", *fp32[2:])
    np.testing.assert_allclose(bf16["high"]["measured"], high["high"]["measured"], atol=0.3)
    int8 = ("--base-precision", "int8")
    eight = calibrate(
        tiny_t2v, shards, tmp_path / "q.json", "--boundary-type", "high", *fp32, *int8
    )
    np.testing.assert_allclose(eight["high"]["measured"], high["high"]["measured"], atol=0.3)

    distill(tiny_t2v, t2v_shards, tmp_path / "lora", "--guidance", str(out), "--dry-run")
    assert '"real_guidance_scale": "table ' in capfd.readouterr().out


def test_fewer_clips_are_drawn_by_the_seed(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    shards = synthesised(t2v_shards, tmp_path / "clips")
    few = ("--clips", "3", "--levels", "2", "--mixed-precision", "no", "--boundary-type", "high")
    one, same, other = (
        calibrate(tiny_t2v, shards, tmp_path / f"{n}.json", *few, "--seed", seed)["high"]
        for n, seed in enumerate(("5", "5", "6"))
    )
    assert one == same and one["clips"] == 3
    assert one["measured"] != other["measured"]


def test_what_it_refuses(tiny_t2v: Path, tiny_i2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    shards, out = synthesised(t2v_shards, tmp_path / "clips"), tmp_path / "w.json"

    def refused(match: str, shards: Path, *more: str, model: Path = tiny_t2v) -> None:
        with pytest.raises(UserError, match=match):
            calibrate(model, shards, out, *more, "--dry-run")

    refused(r"^--shards: .* holds clips of media, .*wantrain synthesize --shards", t2v_shards)
    other = synthesised(t2v_shards, tmp_path / "other", guidance=6.0)
    refused("was synthesised otherwise than", shards, "--shards", str(other))
    refused("without the conditions that an i2v model needs", shards, model=tiny_i2v)
    refused("^--clips: found 1, expected a whole number from 2", shards, "--clips", "1")
    refused("has 1 clips, expected at least 2", shards, "--where", "type=image")
    refused("^--blocks-to-swap: found 1", shards, "--blocks-to-swap", "1")
    refused("^--transformer-path: ", shards, "--transformer-path", "none")
    out.write_text("[]")
    refused(r"^--output: .* holds a list, expected an object", shards)

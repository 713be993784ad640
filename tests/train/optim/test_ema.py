"""The average of the generator's LoRA: a closed form, what is exported, and resume to the bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import UserError
from tests.train.test_distill import distill, final_bytes
from train.optim.ema import Ema

AVERAGED = (
    "--mixed-precision", "no", "--save-precision", "fp32", "--checkpointing-steps", "1",
    "--ema-decay", "0.75", "--ema-start", "2",
)  # fmt: skip


def test_the_average_is_the_weighted_sum() -> None:
    path = [torch.full((2, 3), 1.5 * n * n - 4) for n in range(7)]  # of updates 0 … 6
    ema = Ema.of("generator", {"w": path[0]}, decay=0.75, start=2)
    for number in range(1, 7):
        ema.update({"w": path[number]}, number)
    # From update 2's weights on: 0.75⁴·w₂ + 0.25·Σ 0.75^(6−n)·wₙ
    expected = 0.75**4 * path[2].double() + 0.25 * sum(
        0.75 ** (6 - n) * path[n].double() for n in range(3, 7)
    )
    torch.testing.assert_close(ema.weights["w"].double(), expected, rtol=1e-6, atol=0)
    assert torch.equal(path[0], torch.full((2, 3), -4.0))  # nobody's weights were changed


@pytest.fixture(scope="module")
def averaged(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("averaged") / "out"
    return distill(tiny_t2v, t2v_shards, out, "--max-train-steps", "4", *AVERAGED)


def test_the_average_over_the_checkpoints_is_what_is_exported(averaged: Path) -> None:
    path = [
        load_file(averaged / f"checkpoint-{n}" / "generator_weights.safetensors")
        for n in range(1, 5)
    ]
    exported = load_file(averaged / "lora-low-diffusers.safetensors")
    assert len(exported) == len(path[0])
    for name, value in exported.items():
        w2, w3, w4 = (weights[name.removeprefix("transformer.")].double() for weights in path[1:])
        expected = 0.75 * (0.75 * w2 + 0.25 * w3) + 0.25 * w4
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-9)
        if "lora_B" in name:
            assert not torch.equal(value, path[3][name.removeprefix("transformer.")])


@pytest.mark.parametrize("at", [1, 2, 3])
def test_resumed_on_either_side_of_its_start(
    averaged: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, at: int
) -> None:
    out = tmp_path / "out"
    distill(tiny_t2v, t2v_shards, out, "--max-train-steps", str(at), *AVERAGED)
    distill(
        tiny_t2v, t2v_shards, out, "--max-train-steps", "4", *AVERAGED,
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert final_bytes(out) == final_bytes(averaged)


def test_training_itself_is_not_changed(
    averaged: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "4", *AVERAGED[:6])
    file = Path("checkpoint-4") / "generator_weights.safetensors"
    assert (out / file).read_bytes() == (averaged / file).read_bytes()
    with pytest.raises(UserError, match=r"ema_decay: checkpoint has 0\.0, this run 0\.75"):
        distill(
            tiny_t2v, t2v_shards, out, "--max-train-steps", "5", *AVERAGED,
            "--resume-from-checkpoint", "latest",
        )  # fmt: skip


@pytest.mark.parametrize(("option", "value"), [("--ema-decay", "1"), ("--ema-start", "-1")])
def test_impossible_values(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, option: str, value: str
) -> None:
    with pytest.raises(UserError, match=f"{option}: found {value}"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", option, value)

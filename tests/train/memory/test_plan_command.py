"""`wantrain plan`: published configs in, gibibytes out."""

import json

import pytest

from shared.errors import UserError
from train.cli.app import app as wantrain


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> dict:
    wantrain(["plan", *options, "--json"], standalone_mode=False)
    return json.loads(capsys.readouterr().out)


def test_a_14b_fits_a_small_card_with_its_blocks_in_cpu_memory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = planned(capsys, "--model", "wan2.2-i2v-a14b", "--gpu-memory", "24")
    assert found["tokens"] == 32760
    assert found["fits"] == ["--low-vram", "--activation-offloading"]
    totals = {" ".join(one["options"]): one["total"] for one in found["choices"]}
    # what leaves the GPU: of 40 inputs of 32760 x 5120 in bf16 all but three
    offloaded = totals[""] - totals["--activation-offloading"]
    # (gradients take the place of those three, and are a little more)
    assert offloaded == pytest.approx(37 * 32760 * 5120 * 2, rel=2e-3)
    # 38 of 40 blocks, each of 2 x (4 x 5120^2) + 2 x 5120 x 13824 weights, and a few small ones
    streamed = totals[""] - totals["--low-vram"]
    assert streamed == pytest.approx(38 * 2 * (8 * 5120**2 + 2 * 5120 * 13824), rel=1e-3)


def test_making_clips_needs_the_base_and_a_pass(capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", "wan2.2-t2v-a14b", "--gpu-memory", "24")
    found = planned(capsys, *model, "--method", "synthesize")
    training = planned(capsys, *model)
    assert found["parts"]["base"] == training["parts"]["base"]
    assert not any(found["parts"][name] for name in ("LoRAs", "optimizers", "activations"))
    assert found["fits"] == ["--base-precision int8"] and len(found["choices"]) == 4
    # 40 steps, with and without caption; 16 x 21 x 60 x 104 numbers of 2 bytes
    assert (found["clip_passes"], found["clip_bytes"]) == (80, 4193280)
    wantrain(["plan", *model, "--method", "synthesize"], standalone_mode=False)
    assert "80 transformer passes each" in capsys.readouterr().out


def test_processes_that_cut_the_base_hold_less(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "--num-processes", "8")
    whole, cut = (planned(capsys, *common, "--strategy", name)["parts"] for name in ("ddp", "fsdp"))
    for part in ("base", "LoRAs", "optimizers"):
        assert cut[part] == pytest.approx(whole[part] / 8, abs=8)


def test_layers_without_a_lora_are_not_counted(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--model", "wan2.1-t2v-1.3b", "--rank", "24")
    found = [
        planned(capsys, *common, *more)["parts"]["LoRAs"]
        for more in ((), ("--lora-skip-name", "cross_attn ffn.2"))
    ]
    # of 30 blocks, two roles, fp32: q, k, v of both attentions and both layers of the ffn
    each, inner = 2 * 1536, 1536 + 8960
    assert found == [30 * 2 * 4 * 24 * (6 * each + 2 * inner), 30 * 2 * 4 * 24 * (3 * each + inner)]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (
            ("--model", "wan2.1-t2v-1.3b", "--video-sample-n-frames", "80"),
            "--video-sample-n-frames",
        ),
        (("--model", "wan2.1-t2v-1.3b", "--fix-sample-size", "480", "830"), "--fix-sample-size"),
        (("--model", "wan9"), "wan2.1-t2v-1.3b"),
        (
            ("--low-vram", "--no-gradient-checkpointing"),
            "--low-vram: found with --no-gradient-checkpointing",
        ),
        (("--blocks-to-swap", "41"), "--blocks-to-swap: found 41, expected at most 40"),
        (
            ("--num-processes", "2", "--strategy", "single"),
            "--num-processes: found 2 with --strategy single",
        ),
    ],
)
def test_what_is_wrong_is_named(options: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match=named):
        wantrain(["plan", *options], standalone_mode=False)

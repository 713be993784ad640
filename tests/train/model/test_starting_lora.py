"""`--init-lora`, and learning rates that change nothing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shared.errors import UserError
from shared.models.spec import read_model_spec
from tests.train.model.test_lora_adapter import trained
from tests.train.model.test_roles import CPU, build_batch
from tests.train.test_distill import distill
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.lora_files import read_lora
from train.model.lora_init import start_from
from train.model.lora_names import Form
from train.model.roles import CRITIC, GENERATOR, Roles
from train.optim.lr_checks import FirstSteps, lost_steps, warn_of_file
from train.saving.export import lora_path
from train.saving.provenance import read_provenance

SEED = ("q", "k", "v", "ffn.0", "ffn.2")  # the default of --target-name
RUN = ("--max-train-steps", "1", "--mixed-precision", "no", "--save-precision", "fp32")


@pytest.mark.parametrize("strength", [1.0, -0.4])
@pytest.mark.parametrize("form", ["diffusers", "comfyui", "kohya"])
def test_it_begins_as_the_file_and_all_of_it_learns(
    form: Form, strength: float, tiny_t2v: Path, tmp_path: Path
) -> None:
    """Rank 4, alpha 1 into rank 7, alpha 5: the same velocity as the LoRA's own roles."""
    source = trained(tiny_t2v, "low", ("q", "k", "ffn.2"), tmp_path)
    base = load_base(
        read_model_spec(tiny_t2v), "low", precision="no", device=CPU, gradient_checkpointing=False
    )
    spec = LoraSpec(rank=7, alpha=5, targets=select_targets(base, SEED))
    roles = Roles(base, spec, seed=1)
    file = read_lora(lora_path(tmp_path, "low", form))
    start_from(file, roles.parameters(GENERATOR), spec, strength)
    for name, weight in source.parameters(GENERATOR).items():
        if ".lora_B." in name:
            weight.data *= strength
    batch, t = build_batch("t2v"), torch.tensor([937.5, 300.0])
    with torch.no_grad(), source.generator():
        expected = source.velocity(batch.latents, t, batch.text, batch.condition)
    with torch.no_grad(), roles.teacher():
        plain = roles.velocity(batch.latents, t, batch.text, batch.condition)
    with roles.generator():
        found = roles.velocity(batch.latents, t, batch.text, batch.condition)
        found.square().mean().backward()
    torch.testing.assert_close(found.detach(), expected, rtol=1e-4, atol=1e-5)
    assert (plain - expected).abs().max() > 0.01
    for name, parameter in roles.parameters(GENERATOR).items():
        if ".lora_B." in name:  # the filled-up columns learn at once, and A after them
            assert parameter.grad is not None
            assert (parameter.grad[:, 4:].abs().amax(0) > 0).all(), name
    assert all(not p.any() for n, p in roles.parameters(CRITIC).items() if ".lora_B." in n)


def test_a_run_begins_there_and_resumes(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tiny_t2v, "low", ("q", "ffn.2"), tmp_path)
    file = lora_path(tmp_path, "low", "kohya")
    more = ("--init-lora", f"{file}:0.5", "--learning-rate", "1e-12", "--adam-weight-decay", "0")
    more = (*more, "--where", f"source!={tmp_path / 'none'}")
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN, *more)
    told = read_provenance(lora_path(out, "low", "kohya")).recipe
    assert (told["init_lora"], told["where"]) == (f"{file.name} x 0.5", None)
    assert not [one for one in out.glob("lora-*") if str(tmp_path).encode() in one.read_bytes()]
    held = read_lora(file).lora
    weights = load_file(out / "checkpoint-1" / "generator_weights.safetensors")
    for module in held.modules:
        up, down = (weights[f"{module}.lora_{part}.weight"].double() for part in "BA")
        exact = 0.5 * held.delta(module).double()  # rank 4, alpha 3 in this run
        torch.testing.assert_close(0.75 * (up @ down), exact, rtol=1e-5, atol=1e-6)
    said = " ".join(capsys.readouterr().err.split())
    assert f"start {file} x 0.5: 6 layers, kohya form" in said
    assert "--learning-rate: a step of 1e-12 is rounded away in fp32 at" in said
    assert "--learning-rate-critic" not in said
    more = (*more[:2], *more[-2:], "--resume-from-checkpoint", "latest")
    distill(tiny_t2v, t2v_shards, out, "--max-train-steps", "2", *RUN[2:], *more)
    moved = load_file(out / "checkpoint-2" / "generator_weights.safetensors")
    assert all(not torch.equal(moved[n], weights[n]) for n in weights if ".lora_B." in n)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rank", "3"), r"has rank 4 at blocks\.0\.\S+, --rank is 3\..*--rank 4 or more"),
        (
            ("--target-name", "k"),
            r"adapts (self|cross)_attn\.q, .*attn\.q, ffn\.2, which --target-name k leaves "
            r"out\. Add them: --target-name k,\w+\.q,\w+\.q,ffn\.2$",
        ),
        (("--lora-skip-name", "ffn"), r"adapts ffn\.2, which --lora-skip-name ffn leaves out"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, more: tuple[str, ...], message: str
) -> None:
    trained(tiny_t2v, "low", ("q", "ffn.2"), tmp_path)
    init = ("--init-lora", str(lora_path(tmp_path, "low", "comfyui")))
    with pytest.raises(UserError, match=message):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN, *init, *more)
    assert not (tmp_path / "out").exists()


def test_a_strength_beyond_fp32_is_refused(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    trained(tiny_t2v, "low", ("q",), tmp_path)
    init = ("--init-lora", f"{lora_path(tmp_path, 'low', 'comfyui')}:1e39")
    with pytest.raises(UserError, match=r"at strength 1e\+39 makes blocks\.0\.\S+ infinite"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *RUN, *init)


def test_steps_that_fp32_rounds_away() -> None:
    """fp32 has 24 bits: at 1 the neighbours are 2^-23 above and 2^-24 below."""
    weights = {"a": torch.tensor([1.0, -1.0, 0.0, 1e-3])}
    assert lost_steps(weights, 2.0**-26) == pytest.approx(2 / 3)
    assert lost_steps(weights, 2.0**-22) == 0
    assert lost_steps(weights, 1e-30) == 1
    assert lost_steps({"b": torch.zeros(3)}, 1e-30) == 0


def test_what_did_not_move_is_told_once_by_role() -> None:
    looks, weights = FirstSteps(), lambda: {"a": torch.ones(3)}
    assert looks.before("critic", weights, full_rate=False) is None
    before = looks.before("critic", weights, full_rate=True)
    assert "update of the critic with gradient norm 2" in str(
        looks.after("critic", before, weights, 2.0)
    )
    assert looks.after("critic", before, weights, 0.0) is None
    assert looks.after("critic", before, lambda: {"a": torch.ones(3) + 1e-6}, 2.0) is None
    assert looks.before("critic", weights, full_rate=True) is None


def test_a_file_equal_to_its_start() -> None:
    start = {"x.lora_B.weight": torch.full((2, 2), 0.3).bfloat16()}
    moved = {"x.lora_B.weight": torch.full((2, 2), 0.3 + 1e-5), "x.lora_A.weight": torch.ones(2, 2)}
    assert "is the one of --init-lora" in str(warn_of_file(start, moved, torch.bfloat16))
    assert warn_of_file(start, moved, torch.float32) is None
    assert warn_of_file(None, moved, torch.bfloat16) is None
    zero = {"x.lora_B.weight": torch.zeros(2, 2)}
    assert "is without effect" in str(warn_of_file(None, zero, torch.bfloat16))

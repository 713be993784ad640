"""`--optimizer`: the packages' own steps with our settings, states that resume, what is refused."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save
from torch import nn

from shared.errors import UserError
from tests.train.methods.test_finetune import finetune
from tests.train.test_distill import arguments, distill, final_bytes
from train.cli.app import app as wantrain
from train.optim.lr_checks import warn_of_learning_rate
from train.optim.optimizers import (
    OptimizerSettings,
    check_optimizer,
    make_optimizer,
    state_bytes,
)
from train.options import OptimizerName
from train.strategies.ddp import OptimizerRole

NEW: tuple[OptimizerName, ...] = ("adafactor", "prodigy", "muon")
RATES = {"adafactor": 1e-2, "prodigy": 1.0, "muon": 1e-3}
SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-10, "weight_decay": 0.02}
SHAPES = {"x.lora_A.weight": (6, 96), "x.lora_B.weight": (70, 6)}


def role_of(name: OptimizerName) -> OptimizerRole:
    """A is drawn, B is 0, as a new LoRA's."""
    rng = torch.Generator().manual_seed(3)
    parameters = {
        key: nn.Parameter(torch.randn(shape, generator=rng) * (0.1 if "_A" in key else 0.0))
        for key, shape in SHAPES.items()
    }
    return OptimizerRole(
        parameters, make_optimizer(OptimizerSettings(name=name, **SETTINGS), parameters.values())
    )


def gradient(key: str, step: int) -> torch.Tensor:
    """Small ones, of sizes that differ by row; A's is 0 in the first step, as B is."""
    rng = torch.Generator().manual_seed(17 * step + len(key))
    rows, columns = SHAPES[key]
    sizes = torch.logspace(-2, 0, rows)[:, None]
    drawn = 1e-5 * sizes * (torch.randn(rows, columns, generator=rng) + 0.3)
    return drawn * 0 if step == 0 and "_A" in key else drawn


def walk(
    role: OptimizerRole, name: OptimizerName, steps: range
) -> Iterator[dict[str, torch.Tensor]]:
    for step in steps:
        for key, parameter in role.parameters.items():
            parameter.grad = gradient(key, step)
        role.update(RATES[name] / (1 + step), 0.05)
        yield {key: weight.clone() for key, weight in role.weights().items()}


def through_a_file(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return load(save({name: value.contiguous() for name, value in tensors.items()}))


@pytest.mark.parametrize("name", NEW)
def test_states_go_through_a_checkpoint_to_the_bit(name: OptimizerName) -> None:
    whole, first, second = role_of(name), role_of(name), role_of(name)
    assert not first.moments()
    *_, expected = walk(whole, name, range(6))
    *_, _ = walk(first, name, range(3))
    saved = through_a_file(first.moments())
    second.load(through_a_file(first.weights()), saved)
    for key, value in second.moments().items():
        assert value.dtype == saved[key].dtype and torch.equal(value, saved[key])
    *_, found = walk(second, name, range(3, 6))
    for key, weight in expected.items():
        assert weight.isfinite().all() and torch.equal(found[key], weight)
    for key, value in whole.moments().items():
        assert torch.equal(second.moments()[key], value)


def test_adafactor_scales_rows_and_columns_however_small_gradients_are() -> None:
    """In float64, as of Shazeer & Stern with torch's rate (its documentation)."""
    role, name = role_of("adafactor"), "adafactor"
    w = {key: weight.double() for key, weight in role.weights().items()}
    rows, columns = ({key: 0.0 for key in SHAPES} for _ in range(2))
    for step, found in enumerate(walk(role, name, range(4))):
        grads = {key: gradient(key, step).double() for key in SHAPES}
        rate = RATES[name] / (1 + step)
        for key, g in grads.items():
            share = (step + 1) ** -0.8
            rows[key] = (1 - share) * rows[key] + share * g.square().mean(1, keepdim=True)
            columns[key] = (1 - share) * columns[key] + share * g.square().mean(0, keepdim=True)
            u = torch.zeros_like(g)
            if g.any():
                u = g / (rows[key] @ columns[key] / rows[key].mean()).sqrt()
            u /= max(1.0, float(u.square().mean().sqrt()))
            size = max(1e-3, float(w[key].square().mean().sqrt()))
            w[key] = w[key] * (1 - rate * 0.02) - min(rate, (step + 1) ** -0.5) * size * u
            torch.testing.assert_close(found[key].double(), w[key], rtol=1e-5, atol=1e-9)


def test_muon_moves_by_orthogonal_matrices_of_adamws_size() -> None:
    role = role_of("muon")
    (found,) = walk(role, "muon", range(1))
    step = found["x.lora_B.weight"].double() / -RATES["muon"]
    u, _, v = torch.linalg.svd(gradient("x.lora_B.weight", 0).double(), full_matrices=False)
    exact = 0.2 * 70**0.5 * u @ v
    assert float((step * exact).sum() / (step.norm() * exact.norm())) > 0.95
    assert 0.7 < float(step.norm() / exact.norm()) < 1.3
    assert 0.12 < float(step.square().mean().sqrt()) < 0.28
    drawn = role_of("muon").weights()["x.lora_A.weight"]  # no gradient: only decays
    torch.testing.assert_close(found["x.lora_A.weight"], drawn * (1 - RATES["muon"] * 0.02))


def test_prodigy_finds_a_rate_that_a_checkpoint_keeps(capsys: pytest.CaptureFixture[str]) -> None:
    role = role_of("prodigy")
    for step in range(30):
        for key, parameter in role.parameters.items():
            parameter.grad = gradient(key, step)
        role.update(1.0, 0.05)
    numbers = {n: v for n, v in role.moments().items() if n.startswith("optimizer/")}
    assert int(numbers["optimizer/k"]) == 30
    assert 1e-5 < float(numbers["optimizer/d"]) < 1e-3  # it began with 1e-6
    assert numbers["optimizer/d"].dtype == torch.float64
    assert not capsys.readouterr().out  # where --json and the like are


@pytest.mark.parametrize("name", ("adamw", *NEW))
def test_the_estimate_counts_what_is_kept(name: OptimizerName) -> None:
    role = role_of(name)
    for key, parameter in role.parameters.items():
        parameter.grad = gradient(key, 1)
    role.update(1e-3, 0.05)
    for key, parameter in role.parameters.items():
        held = sum(
            value.nbytes
            for moment, value in role.moments().items()
            if moment.startswith(f"{key}/") and not moment.endswith("/step")
        )
        said = state_bytes(name, parameter.numel(), 6)
        if name == "prodigy" and "_B" in key:  # where it began is one number
            said += 4 - 4 * parameter.numel()
        assert held == said


@pytest.mark.parametrize("name", NEW)
def test_a_run_goes_on_to_the_byte(
    name: OptimizerName, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    given = ("--optimizer", name, "--learning-rate", str(RATES[name]), "--save-precision", "fp32")
    whole = finetune(tiny_t2v, t2v_shards, tmp_path / "whole", *given, "--max-train-steps", "3")
    out = finetune(tiny_t2v, t2v_shards, tmp_path / "out", *given, "--max-train-steps", "2")
    on = ("--max-train-steps", "3", "--resume-from-checkpoint", "latest")
    other = ("--optimizer", "adamw")
    with pytest.raises(UserError, match=rf"optimizer: checkpoint has '{name}', this run 'adamw'"):
        finetune(tiny_t2v, t2v_shards, out, *other, *on)
    finetune(tiny_t2v, t2v_shards, out, *given, *on)
    assert final_bytes(out) == final_bytes(whole)
    for file in ("lora_weights.safetensors", "lora_optimizer.safetensors"):
        one, two = ((run / "checkpoint-3" / file).read_bytes() for run in (out, whole))
        assert one == two
    with safe_open(out / "lora-low-kohya.safetensors", "pt") as opened:
        assert opened.metadata()["ss_optimizer"].lower().endswith(f".{name}")
        moved = [opened.get_tensor(n) for n in opened.keys() if "lora_up" in n]  # noqa: SIM118
    assert all(tensor.abs().max() > 0 for tensor in moved)


def test_adamw8bit_is_use_8bit_adam_and_takes_adamws_states(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    given = ("--rank", "128", "--gen-update-interval", "1", "--max-train-steps", "2")
    by_name = distill(tiny_t2v, t2v_shards, tmp_path / "name", *given, "--optimizer", "adamw8bit")
    alias = distill(tiny_t2v, t2v_shards, tmp_path / "alias", *given, "--use-8bit-adam")
    assert final_bytes(by_name) == final_bytes(alias)
    on = ("--max-train-steps", "3", "--resume-from-checkpoint", "latest")
    distill(tiny_t2v, t2v_shards, by_name, *given, *on)
    assert load_file(by_name / "checkpoint-3" / "generator_optimizer.safetensors")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--optimizer muon --strategy zero2", "found muon with --strategy zero2.*orthogonalizes"),
        ("--optimizer adafactor --strategy fsdp", "found adafactor with --strategy fsdp.*rows"),
        ("--optimizer prodigy --learning-rate 1 --learning-rate-critic 1 --strategy zero3",
         "found prodigy with --strategy zero3.*all weights"),
        ("--optimizer adamw8bit --strategy zero2", "--optimizer: found adamw8bit with --strategy"),
        ("--optimizer muon --use-8bit-adam", "--use-8bit-adam: found with --optimizer muon"),
        ("--optimizer muon --adam-beta1 0.8", "--adam-beta1: found 0.8 with --optimizer muon"),
        ("--optimizer adafactor --adam-epsilon 1e-8", "--adam-epsilon: found 1e-08"),
        ("--optimizer prodigy", "--learning-rate: found 0.001 with --optimizer prodigy"),
        ("--optimizer prodigy --learning-rate 1", "--learning-rate-critic: found 0.002 with"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused(
    given: str, said: str, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    two = ("--num-processes", "2") if "--strategy" in given else ()
    words = arguments(tiny_t2v, t2v_shards, tmp_path, *given.split(), *two)
    with pytest.raises(UserError, match=said):
        wantrain(words, standalone_mode=False)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.optim.optimizers.find_spec", lambda _: None)
    monkeypatch.delattr(torch.optim, "Muon")
    for name, cure in (("prodigy", r"wandistill\[prodigy\]"), ("muon", "torch 2.9")):
        with pytest.raises(UserError, match=cure):
            check_optimizer(name)  # type: ignore[arg-type]
    check_optimizer("adafactor")


def test_a_rate_as_of_adamw_is_warned_of_with_adafactor() -> None:
    weights = {"B": torch.zeros(3, 2)}
    said = warn_of_learning_rate("lora", "--learning-rate", weights, 1e-4, "adafactor")
    assert said and "would move by 1e-07" in said
    assert warn_of_learning_rate("lora", "--learning-rate", weights, 1e-2, "adafactor") is None


@pytest.mark.long
@pytest.mark.parametrize("name", NEW)
def test_two_processes_step_as_one(
    name: OptimizerName, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """ddp: the same weights as alone, but for the order of sums; and resumed to the byte."""
    from tests.train.strategies.test_strategies import command, gone_on, typed

    given = ("--optimizer", name, "--learning-rate", str(RATES[name]))
    given += ("--learning-rate-critic", str(RATES[name]), "--checkpointing-steps", "3")
    whole, out = tmp_path / "whole", tmp_path / "out"
    two = ("--num-processes", "2", "--train-batch-size", "1", *given)
    typed(*command(tiny_t2v, t2v_shards, whole, *two))
    gone_on(whole, out, command(tiny_t2v, t2v_shards, out, *two))

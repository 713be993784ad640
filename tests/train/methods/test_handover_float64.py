"""`--match handover` and `--start states` against a derivation in float64 that shares no code.

The rollout's reference is that of `test_rollouts.py`; the sub-interval's maths is written out here
with variances, as arXiv:2510.27684 has it, not in the factored form of the code.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

from shared.errors import UserError
from tests.train.methods.test_dmd_float64 import _compare_lora_gradients, _merged
from tests.train.methods.test_rollouts import SIGMAS, UPDATE, drawn, recipe_of, score_interval
from tests.train.model.test_roles import NEGATIVE, build_batch, build_roles
from tests.train.test_distill import distill, final_bytes, losses
from train.data.batches import Batch
from train.functional.rng import spread
from train.methods.dmd import critic_step, exit_step, generator_step, rollout
from train.model.roles import CRITIC, GENERATOR

S = SIGMAS[2]  # .8333, the first step of the low expert
Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def velocity_of(model: torch.nn.Module, batch: Batch) -> Velocity:
    def velocity(x: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        assert batch.condition is not None
        t = (1000 * sigma.reshape(-1)).expand(2)
        inputs = torch.cat([x, batch.condition.double()], 1)
        out: torch.Tensor = model(inputs, t.float(), text.double(), return_dict=False)[0]
        return out

    return velocity


def handed_over(student: Velocity, batch: Batch, last: int, pairing: str) -> torch.Tensor:
    """x_s of the high expert that walks from noise to `last`, and from there on to s."""
    x = drawn(batch, "rollout 0")
    for step in range(last + 1):
        sigma = torch.tensor(SIGMAS[step], dtype=torch.float64)
        v = student(x.detach(), sigma, batch.text)
        then, stream = (S, 2) if step == last else (SIGMAS[step + 1], step + 1)
        if pairing == "euler":
            x = x.detach() + (then - sigma) * v
        else:
            fresh = drawn(batch, f"rollout {stream}")
            x = (1 - then) * (x.detach() - sigma * v) + then * fresh
    return x


def level(floor: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """σ_t, a = α_t/α_s and the variance of x_t given x_s, for both samples."""
    low, high = score_interval("high", floor)
    u = low + (high - low) * spread(3, "score level", UPDATE, (0, 1), 1).double()
    t = (5 * u / (1 + 4 * u)).view(2, 1, 1, 1, 1)
    a = (1 - t) / (1 - S)
    return t, a, t**2 - a**2 * S**2


CASES = [("euler", "boundary"), ("euler", "handover"), ("renoise", "handover")]


@pytest.mark.parametrize(("pairing", "floor"), CASES)
def test_generator_and_critic_steps(tiny_i2v: Path, pairing: str, floor: str) -> None:
    roles, batch = build_roles(tiny_i2v, expert="high"), build_batch("i2v", update=UPDATE)
    recipe = recipe_of("high", start="noise", pairing=pairing, score_floor=floor, match="handover")
    plain = WanTransformer3DModel.from_pretrained(tiny_i2v, subfolder="transformer")
    plain = plain.double().requires_grad_(False)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    teacher, fake_of = velocity_of(plain, batch), velocity_of(critic, batch)
    last = exit_step(recipe, UPDATE)
    t, a, variance = level(floor)
    assert variance.min() > 0

    found = generator_step(roles, recipe, batch, NEGATIVE)
    with roles.generator():
        found.loss.backward()
    x_s = handed_over(velocity_of(student, batch), batch, last, pairing)
    with torch.no_grad():
        x_t = a * x_s + variance.sqrt() * drawn(batch, "score noise")

        def state(v: torch.Tensor) -> torch.Tensor:
            """Tweedie: (x_t + b²·score)/a, the score from the velocity."""
            score = -(x_t + (1 - t) * v) / t
            return (x_t + variance * score) / a

        v, other = (teacher(x_t, t, text) for text in (batch.text, NEGATIVE.expand(2, -1, -1)))
        real, fake = state(other + 6.0 * (v - other)), state(fake_of(x_t, t, batch.text))
        g = (fake - real) / (x_s - real).abs().flatten(1).mean(1).view(2, 1, 1, 1, 1)
    x_s.backward(g / g.numel())
    assert found.loss.item() == pytest.approx(0.5 * (g**2).mean().item(), rel=1e-4)
    _compare_lora_gradients(roles, GENERATOR, student)
    errors = [(x_s - one).abs().mean().item() for one in (fake, real)]
    assert list(found.numbers().metrics.values()) == pytest.approx(errors, rel=1e-4)

    found = critic_step(roles, recipe, batch)
    with roles.critic():
        found.loss.backward()
    x_s, eps = x_s.detach(), drawn(batch, "score noise")
    alpha_s, alpha_t = 1 - S, 1 - t
    coefficient = (alpha_s**2 * t + alpha_t * S**2) / (alpha_s**2 * variance.sqrt())
    target = coefficient * eps - x_s / alpha_s
    clamped = (1 / variance).clamp(0, 10)  # the paper's: of the error times b
    v = fake_of(a * x_s + variance.sqrt() * eps, t, batch.text)
    expected = (clamped * (variance.sqrt() * (v - target)) ** 2).mean()
    expected.backward()
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, CRITIC, critic)


@pytest.mark.parametrize("last", [0, 1])
def test_re_noised_hand_over_states_are_noised_clips(tiny_i2v: Path, last: int) -> None:
    """x_s is then (1−s)·x̂0 + s·ε: what phased DMD matches is what DMD matches above s."""
    roles, batch = build_roles(tiny_i2v, expert="high"), build_batch("i2v")
    recipe = recipe_of("high", start="noise", match="handover")
    x0 = rollout(roles, recipe, batch, last=last, with_gradient=False)
    x_s = rollout(roles, recipe, batch, last=last, with_gradient=False, end=S)
    expected = (1 - S) * x0 + S * drawn(batch, "rollout 2").float()
    assert torch.allclose(x_s, expected, atol=1e-5)


@pytest.mark.parametrize("pairing", ["renoise", "euler"])
def test_a_rollout_from_states(tiny_i2v: Path, pairing: str) -> None:
    """It begins with the cached state as it is; the noise of later steps is what it was."""
    roles = build_roles(tiny_i2v, expert="low")
    recipe = recipe_of("low", start="states", pairing=pairing)
    assert list(recipe.walk) == [2, 3]
    batch = build_batch("i2v")
    state = torch.randn(batch.latents.shape, generator=torch.Generator().manual_seed(6))
    batch = replace(batch, states=state[:, None])
    plain = WanTransformer3DModel.from_pretrained(tiny_i2v, subfolder="transformer_2")
    student = velocity_of(_merged(plain.double().requires_grad_(False), roles, GENERATOR), batch)
    x = state.double()
    for step in (2, 3):
        sigma = torch.tensor(SIGMAS[step], dtype=torch.float64)
        with torch.no_grad():
            v = student(x, sigma, batch.text)
        expected = x - sigma * v
        found = rollout(roles, recipe, batch, last=step, with_gradient=False)
        assert (found.double() - expected).norm() / expected.norm() < 1e-5
        then = SIGMAS[3]
        if pairing == "euler":
            x = x + (then - sigma) * v
        else:
            x = (1 - then) * expected + then * drawn(batch, "rollout 3")


HIGH = ("--boundary-type", "high", "--match", "handover", "--pairing", "euler")


def test_a_run_resumes_exactly(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    common = (*HIGH, "--score-floor", "handover", "--gradient-accumulation-steps", "2")
    whole = distill(tiny_t2v, t2v_shards, tmp_path / "whole", "--max-train-steps", "2", *common)
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1", *common)
    more = ("--max-train-steps", "2", "--resume-from-checkpoint", "latest")
    distill(tiny_t2v, t2v_shards, out, *common, *more)
    assert final_bytes(out) == final_bytes(whole) and losses(out) == losses(whole)
    with pytest.raises(UserError, match=r"match: checkpoint has 'handover', this run None"):
        distill(
            tiny_t2v, t2v_shards, out, *common, "--match", "x0", "--max-train-steps", "3",
            "--resume-from-checkpoint", "latest",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--boundary-type", "low"), "--match: found handover with --boundary-type low"),
        (("--boundary-type", "full"), "--match: found handover with --boundary-type full"),
        (
            ("--denoising-step-indices-list", "1000,900"),
            "--match: found handover with --boundary-type high, which hands no state over",
        ),
        (("--recipe", "seed"), "--recipe: found seed with --match handover"),
    ],
)
def test_what_hands_nothing_over_is_refused(
    more: tuple[str, ...], expected: str, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        distill(tiny_t2v, t2v_shards, tmp_path, *HIGH, *more)


def test_the_dry_run_names_the_level(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(tiny_t2v, t2v_shards, tmp_path, *HIGH, "--dry-run")
    printed = capsys.readouterr().out
    assert '"match": "handover"' in printed and "states matched at 800.0" in printed

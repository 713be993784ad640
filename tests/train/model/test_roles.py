"""One base, three roles: who applies which weights, and who moves which."""

from pathlib import Path

import pytest
import torch

from shared.models.spec import read_model_spec
from tests.train.conftest import randomise_lora
from train.data.batches import Batch
from train.functional.schedule import Schedule
from train.methods.dmd import Recipe, critic_step, generator_step
from train.model.base import load_base
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import CRITIC, GENERATOR, Roles

TARGETS = ("q", "k", "v", "ffn.0", "ffn.2")
CPU = torch.device("cpu")


def build_roles(
    model: Path, *, expert: str = "low", precision: str = "no", checkpointing: bool = False
) -> Roles:
    spec = read_model_spec(model)
    base = load_base(
        spec,
        expert,
        precision=precision,
        device=CPU,
        gradient_checkpointing=checkpointing,  # type: ignore[arg-type]
    )
    lora = LoraSpec(rank=4, alpha=3, targets=select_targets(base, TARGETS))
    roles = Roles(base, lora, seed=7)
    randomise_lora(roles.parameters(GENERATOR), 1)
    randomise_lora(roles.parameters(CRITIC), 2)
    return roles


def build_recipe(mode: str, **changes: object) -> Recipe:
    shift, boundary = (5.0, 0.9) if mode == "i2v" else (12.0, 0.875)
    values = {
        "expert": "low",
        "schedule": Schedule(indices=(1000, 750, 500, 250), shift=shift, boundary=boundary),
        "start": "latents",
        "pairing": "renoise",
        "score_floor": "boundary",
        "maths": "corrected",
        "real_guidance_scale": 6.0,
        "fake_guidance_scale": 0.0,
        "fm_loss_weight": 0.0,
        "score_strata": 1,
        "batched_guidance": False,
        "seed": 3,
    }
    return Recipe(**(values | changes))  # type: ignore[arg-type]


def build_batch(mode: str, *, update: int = 5, seed: int = 0) -> Batch:
    rng = torch.Generator().manual_seed(seed)
    latents = torch.randn(2, 16, 3, 6, 10, generator=rng)
    text = torch.randn(2, 512, 32, generator=rng)
    text[0, 9:] = 0
    text[1, 30:] = 0
    condition = torch.randn(2, 20, 3, 6, 10, generator=rng) if mode == "i2v" else None
    if condition is not None:  # the first frame is given
        condition[:, :4] = 0
        condition[:, :4, 0] = 1
    return Batch(
        update=update,
        samples=(0, 1),
        keys=("a", "b"),
        latents=latents,
        text=text,
        condition=condition,
    )


NEGATIVE = torch.randn(512, 32, generator=torch.Generator().manual_seed(99))


@pytest.fixture(params=["t2v", "i2v"])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(mode: str, tiny_t2v: Path, tiny_i2v: Path) -> Path:
    return tiny_i2v if mode == "i2v" else tiny_t2v


def _gradients(roles: Roles, recipe: Recipe, batch: Batch) -> dict[str, torch.Tensor]:
    """Generator gradients; critic and teacher passes lie between forward and backward."""
    loss = generator_step(roles, recipe, batch, NEGATIVE).loss
    with roles.generator():
        loss.backward()
    return {name: p.grad.clone() for name, p in roles.parameters(GENERATOR).items()}  # type: ignore[union-attr]


def test_checkpointing_changes_no_gradient(mode: str, model: Path) -> None:
    recipe, batch = build_recipe(mode), build_batch(mode)
    plain = _gradients(build_roles(model), recipe, batch)
    checkpointed = _gradients(build_roles(model, checkpointing=True), recipe, batch)
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, checkpointed[name]), name


def test_backward_outside_the_role_would_be_wrong(tiny_t2v: Path) -> None:
    """The trap that `roles.generator()` around backward avoids is real in this very setup."""
    recipe, batch = build_recipe("t2v"), build_batch("t2v")
    right = _gradients(build_roles(tiny_t2v), recipe, batch)
    roles = build_roles(tiny_t2v, checkpointing=True)
    loss = generator_step(roles, recipe, batch, NEGATIVE).loss
    with roles.critic():
        loss.backward()
    name = "blocks.0.attn1.to_q.lora_A.weight"
    wrong = roles.parameters(GENERATOR)[name].grad
    assert wrong is None or not torch.allclose(wrong, right[name], rtol=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_grad_steps_before_do_not_swallow_gradients_under_autocast(
    tiny_t2v: Path, checkpointing: bool
) -> None:
    """bf16: the cached casts of a no_grad pass must not reach the pass that trains."""
    roles = build_roles(tiny_t2v, expert="high", precision="bf16", checkpointing=checkpointing)
    recipe = build_recipe("t2v", expert="high", start="noise")
    update = next(u for u in range(50) if _exits_late(recipe, u))
    gradients = _gradients(roles, recipe, build_batch("t2v", update=update))
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.float32
        assert gradient.abs().max() > 0, name


def _exits_late(recipe: Recipe, update: int) -> bool:
    from train.methods.dmd import exit_step

    return exit_step(recipe, update) == recipe.walk[-1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_teacher_is_the_model_that_diffusers_loads(mode: str, model: Path, precision: str) -> None:
    from diffusers import WanTransformer3DModel

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    plain = WanTransformer3DModel.from_pretrained(
        model, subfolder="transformer_2", torch_dtype=dtype
    )
    batch, t = build_batch(mode), torch.tensor([937.5, 41.25])
    inputs = [batch.latents] if batch.condition is None else [batch.latents, batch.condition]
    with torch.no_grad():
        expected = plain(
            torch.cat(inputs, dim=1).to(dtype), t, batch.text.to(dtype), return_dict=False
        )[0]
        roles = build_roles(model, precision=precision)
        with roles.teacher():
            found = roles.velocity(batch.latents, t, batch.text, batch.condition)
    assert torch.equal(found, expected.float())


def test_roles_differ_and_nesting_restores(tiny_t2v: Path) -> None:
    roles, batch, t = build_roles(tiny_t2v), build_batch("t2v"), torch.tensor([800.0, 300.0])

    def velocity() -> torch.Tensor:
        with torch.no_grad():
            return roles.velocity(batch.latents, t, batch.text, None)

    with roles.generator():
        generator = velocity()
        with roles.critic():
            critic = velocity()
            with roles.teacher():
                teacher = velocity()
            assert torch.equal(velocity(), critic)
        assert torch.equal(velocity(), generator)
    for one, other in ((generator, critic), (critic, teacher), (generator, teacher)):
        assert (one - other).norm() / other.norm() > 0.01


def test_switching_leaves_requires_grad_alone(tiny_t2v: Path) -> None:
    roles = build_roles(tiny_t2v)
    trainable = {n for n, p in roles.transformer.named_parameters() if p.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)
    for role in (roles.teacher, roles.critic, roles.generator):
        with role():
            now = {n for n, p in roles.transformer.named_parameters() if p.requires_grad}
            assert now == trainable


def test_roles_share_the_base(tiny_t2v: Path) -> None:
    roles = build_roles(tiny_t2v)
    base = [p for n, p in roles.transformer.named_parameters() if ".lora_" not in n]
    plain = sum(
        p.numel()
        for p in load_base(
            read_model_spec(tiny_t2v),
            "low",
            precision="no",
            device=CPU,
            gradient_checkpointing=False,
        ).parameters()
    )
    assert sum(p.numel() for p in base) == plain
    assert len({p.data_ptr() for p in base}) == len(base)


@pytest.mark.parametrize("role", [GENERATOR, CRITIC])
def test_an_update_moves_its_own_lora_alone(mode: str, model: Path, role: str) -> None:
    roles, recipe, batch = build_roles(model), build_recipe(mode), build_batch(mode)
    before = {n: p.detach().clone() for n, p in roles.transformer.named_parameters()}
    optimizers = {
        name: torch.optim.AdamW(roles.parameters(name).values(), lr=1e-3)
        for name in (GENERATOR, CRITIC)
    }
    if role == GENERATOR:
        loss = generator_step(roles, recipe, batch, NEGATIVE).loss
        with roles.generator():
            loss.backward()
    else:
        loss = critic_step(roles, recipe, batch).loss
        with roles.critic():
            loss.backward()
    for optimizer in optimizers.values():
        optimizer.step()
    moved = {n for n, p in roles.transformer.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if f".{role}." in n}


def test_lora_is_fp32_on_a_bf16_base(tiny_t2v: Path) -> None:
    roles = build_roles(tiny_t2v, precision="bf16")
    for role in (GENERATOR, CRITIC):
        assert {p.dtype for p in roles.parameters(role).values()} == {torch.float32}
    assert roles.transformer.blocks[0].attn1.to_q.base_layer.weight.dtype == torch.bfloat16  # type: ignore[union-attr,index]

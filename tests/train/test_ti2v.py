"""TI2V models: a first latent frame that is kept clean, per-token timesteps, masked losses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image
from safetensors import safe_open

from shared.format.cache import MEDIA_TYPES, open_cache
from shared.io.store import Store
from shared.models.spec import read_model_spec
from tests.train.conftest import encode
from tests.train.data.test_batches import _dataset
from tests.train.methods.test_dmd_float64 import _compare_lora_gradients, _merged
from tests.train.model.test_roles import NEGATIVE, build_recipe, build_roles
from tests.train.test_distill import distill, final_bytes
from train.cli.app import app as wantrain
from train.data.batches import Batch
from train.functional.losses import dmd_gradient, dmd_loss, flow_matching_loss
from train.functional.rng import noise, spread
from train.functional.schedule import Schedule
from train.methods.dmd import critic_step, exit_step, generator_step, rollout
from train.model.roles import CRITIC, GENERATOR, Roles

UPDATE, SHIFT = 5, 5.0
SIGMAS = [SHIFT * u / (1 + (SHIFT - 1) * u) for u in (1, 0.75, 0.5, 0.25)]


@pytest.fixture(scope="module")
def ti2v_shards(dataset: Path, tiny_ti2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(dataset, tiny_ti2v, tmp_path_factory.mktemp("ti2v") / "shards")


def mixed_batch() -> Batch:
    """A sample whose first frame is kept, and one that is text to video this time."""
    rng = torch.Generator().manual_seed(2)
    noised = torch.ones(2, 1, 3, 1, 1)
    noised[0, :, 0] = 0
    return Batch(
        update=UPDATE,
        samples=(0, 1),
        keys=("a", "b"),
        latents=torch.randn(2, 48, 3, 4, 6, generator=rng),
        text=torch.randn(2, 512, 32, generator=rng),
        condition=None,
        noised=noised,
    )


class Reference:
    """The brief's section 5 in float64 for `mixed_batch`, timesteps as diffusers' pipeline has."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.clean = batch.latents[:1, :, :1].double()

    def x0(
        self, model: torch.nn.Module, x_t: torch.Tensor, sigma: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x̂0 and v; sample 0's first frame at t = 0."""
        sigma = torch.as_tensor(sigma, dtype=torch.float64).reshape(-1).expand(2)
        per_token = []
        for sample in range(2):
            # WanImageToVideoPipeline.__call__ with expand_timesteps: the mask of the first frame,
            # every second row and column of it, times t, flattened.
            mask = torch.ones(3, 4, 6, dtype=torch.float64)
            if sample == 0:
                mask[0] = 0
            per_token.append((mask[:, ::2, ::2] * 1000 * sigma[sample]).flatten())
        v = model(x_t, torch.stack(per_token).float(), text.double(), return_dict=False)[0]
        x0 = x_t - sigma.view(2, 1, 1, 1, 1) * v
        return self.kept(x0), v

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """`x` with the condition in its place."""
        first = torch.cat([self.clean, x[:1, :, 1:]], dim=2)
        return torch.cat([first, x[1:]])

    def noisy(self, x0: torch.Tensor, sigma: torch.Tensor | float, purpose: str) -> torch.Tensor:
        eps = noise(x0.shape[1:], 3, purpose, UPDATE, (0, 1)).double()
        return self.kept((1 - sigma) * x0 + sigma * eps)

    def generated(self, student: torch.nn.Module, last: int, pairing: str) -> torch.Tensor:
        x_t = self.noisy(torch.zeros(2, 48, 3, 4, 6, dtype=torch.float64), 1.0, "rollout 0")
        for step in range(last + 1):
            x0, v = self.x0(student, x_t, torch.tensor(SIGMAS[step]), self.batch.text)
            if step == last:
                return x0
            following = SIGMAS[step + 1]
            if pairing == "renoise":
                x_t = self.noisy(x0.detach(), following, f"rollout {step + 1}")
            else:
                x_t = self.kept((x_t + (following - SIGMAS[step]) * v).detach())
        raise AssertionError

    def level(self, purpose: str = "score") -> torch.Tensor:
        u = 0.98 * spread(3, f"{purpose} level", UPDATE, (0, 1), 1).double()
        return (SHIFT * u / (1 + (SHIFT - 1) * u)).clamp_min(0.02).view(2, 1, 1, 1, 1)

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """(2,) over what is noised."""
        return torch.stack([x[0, :, 1:].mean(), x[1].mean()])


def _setup(folder: Path, **changes: object):  # type: ignore[no-untyped-def]
    roles = build_roles(folder, expert="full")
    plain = WanTransformer3DModel.from_pretrained(folder, subfolder="transformer")
    schedule = Schedule(indices=(1000, 750, 500, 250), shift=SHIFT, boundary=None)
    values = {"expert": "full", "start": "noise", "schedule": schedule} | changes
    recipe = build_recipe("ti2v", **values)
    return roles, plain.double().requires_grad_(False), recipe


@pytest.mark.parametrize("pairing", ["renoise", "euler"])
def test_rollouts_keep_the_condition(tiny_ti2v: Path, pairing: str) -> None:
    roles, plain, recipe = _setup(tiny_ti2v, pairing=pairing)
    batch = mixed_batch()
    student = _merged(plain, roles, GENERATOR)
    for last in range(4):
        found = rollout(roles, recipe, batch, last=last, with_gradient=False)
        with torch.no_grad():
            expected = Reference(batch).generated(student, last, pairing)
        assert torch.equal(found[0, :, 0], batch.latents[0, :, 0])
        assert not torch.equal(found[1, :, 0], batch.latents[1, :, 0])
        assert (found.double() - expected).norm() / expected.norm() < 1e-5, last


@pytest.mark.parametrize(("fm_loss_weight", "batched"), [(0.0, True), (0.7, False)])
def test_generator_step(tiny_ti2v: Path, fm_loss_weight: float, batched: bool) -> None:
    roles, plain, recipe = _setup(
        tiny_ti2v, fm_loss_weight=fm_loss_weight, batched_guidance=batched
    )
    batch = mixed_batch()
    loss = generator_step(roles, recipe, batch, NEGATIVE).loss
    with roles.generator():
        loss.backward()

    reference = Reference(batch)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    x0 = reference.generated(student, exit_step(recipe, UPDATE), "renoise")
    sigma = reference.level()
    with torch.no_grad():
        x_t = reference.noisy(x0, sigma, "score noise")
        fake, _ = reference.x0(critic, x_t, sigma, batch.text)
        _, v_cond = reference.x0(plain, x_t, sigma, batch.text)
        _, v_neg = reference.x0(plain, x_t, sigma, NEGATIVE.expand(2, -1, -1))
        real = reference.kept(x_t - sigma * (v_neg + 6.0 * (v_cond - v_neg)))
        scale = reference.mean((x0 - real).abs()).view(2, 1, 1, 1, 1)
        g = (fake - real) / scale
    expected = 0.5 * reference.mean((x0 - (x0 - g).detach()) ** 2).mean()
    if fm_loss_weight:
        cached, sigma = batch.latents.double(), reference.level("real")
        eps = noise(cached.shape[1:], 3, "real noise", UPDATE, (0, 1)).double()
        _, v = reference.x0(
            student, reference.noisy(cached, sigma, "real noise"), sigma, batch.text
        )
        expected = expected + fm_loss_weight * reference.mean((v - (eps - cached)) ** 2).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, GENERATOR, student)


def test_critic_step(tiny_ti2v: Path) -> None:
    roles, plain, recipe = _setup(tiny_ti2v)
    batch = mixed_batch()
    loss = critic_step(roles, recipe, batch).loss
    with roles.critic():
        loss.backward()

    reference = Reference(batch)
    student, critic = _merged(plain, roles, GENERATOR), _merged(plain, roles, CRITIC)
    with torch.no_grad():
        x0 = reference.generated(student, exit_step(recipe, UPDATE), "renoise")
    sigma = reference.level()
    eps = noise(x0.shape[1:], 3, "score noise", UPDATE, (0, 1)).double()
    _, v = reference.x0(critic, reference.noisy(x0, sigma, "score noise"), sigma, batch.text)
    expected = reference.mean((v - (eps - x0)) ** 2).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    _compare_lora_gradients(roles, CRITIC, critic)


def test_a_mask_of_ones_is_no_mask_and_clean_elements_count_nowhere() -> None:
    rng = torch.Generator().manual_seed(0)
    made, real, fake, eps = (torch.randn(2, 5, 3, 4, 6, generator=rng).double() for _ in range(4))
    ones = torch.ones(2, 1, 3, 1, 1, dtype=torch.float64)
    for masked, plain in (
        (dmd_gradient(made, real, fake, ones), dmd_gradient(made, real, fake)),
        (dmd_loss(made, fake, ones), dmd_loss(made, fake)),
        (flow_matching_loss(made, eps, real, ones), flow_matching_loss(made, eps, real)),
    ):
        torch.testing.assert_close(masked, plain, rtol=1e-12, atol=0)
    some = ones.clone()
    some[0, :, 0] = 0
    other = fake.clone()
    other[0, :, 0] = 1e6
    assert dmd_loss(made, other, some) == dmd_loss(made, fake, some)
    assert flow_matching_loss(other, eps, real, some) == flow_matching_loss(fake, eps, real, some)
    other = real.clone()
    other[0, :, 0] = 1e6
    kept = dmd_gradient(made, other, fake, some)
    torch.testing.assert_close(kept[0, :, 1:], dmd_gradient(made, real, fake, some)[0, :, 1:])
    assert torch.equal(kept[1], dmd_gradient(made, real, fake, some)[1])


def test_half_of_the_clips_are_text_only_and_every_image_is(
    ti2v_shards: Path, tiny_ti2v: Path
) -> None:
    whole = list(_dataset(ti2v_shards, tiny_ti2v).ahead(start=0, stop=150, workers=0))
    index = open_cache(Store(ti2v_shards))
    types = {index.key(row): MEDIA_TYPES[int(index.types[row])] for row in range(len(index))}
    kept = []
    for batch in whole:
        assert batch.noised is not None and batch.latents.shape[1] == 48
        for key, mask in zip(batch.keys, batch.noised, strict=True):
            assert mask[:, 1:].all()
            if types[key] == "video":
                kept.append(float(mask[0, 0, 0, 0]) == 0)
            else:
                assert mask.all()
    # A binomial of 250 draws or so lies within 4 standard deviations, 0.127.
    assert len(kept) > 200 and abs(np.mean(kept) - 0.5) < 0.13

    halves = [
        list(
            _dataset(ti2v_shards, tiny_ti2v, data_rank=rank, data_size=2).ahead(
                start=0, stop=20, workers=0
            )
        )
        for rank in (0, 1)
    ]
    for batch, first, second in zip(whole, *halves, strict=False):
        assert torch.equal(batch.noised, torch.cat([first.noised, second.noised]))  # type: ignore[arg-type, list-item]


def test_checkpointing_changes_no_gradient(tiny_ti2v: Path) -> None:
    def gradients(roles: Roles) -> dict[str, torch.Tensor]:
        loss = generator_step(roles, recipe, mixed_batch(), NEGATIVE).loss
        with roles.generator():
            loss.backward()
        return {name: p.grad.clone() for name, p in roles.parameters(GENERATOR).items()}  # type: ignore[union-attr]

    roles, _, recipe = _setup(tiny_ti2v)
    plain = gradients(roles)
    checkpointed = gradients(build_roles(tiny_ti2v, expert="full", checkpointing=True))
    for name, gradient in plain.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradient, checkpointed[name]), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_distilled_resumed_and_sampled_with_and_without_an_image(
    precision: str, ti2v_shards: Path, tiny_ti2v: Path, tmp_path: Path
) -> None:
    more = ("--mixed-precision", precision)
    out = distill(tiny_ti2v, ti2v_shards, tmp_path / "out", "--max-train-steps", "2", *more)
    again = tmp_path / "again"
    distill(tiny_ti2v, ti2v_shards, again, "--max-train-steps", "1", *more)
    distill(
        tiny_ti2v, ti2v_shards, again, "--max-train-steps", "2", *more,
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert final_bytes(again) == final_bytes(out)
    lora = out / "lora-full-diffusers.safetensors"
    with safe_open(lora, framework="pt") as file:
        assert read_model_spec(tiny_ti2v).mode == "ti2v" and "ti2v" in json.dumps(file.metadata())
    if precision == "bf16":
        return
    picture = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 64, 3)).astype(np.uint8)).save(
        picture
    )
    for name, image in (("text", ()), ("image", ("--image", str(picture)))):
        wantrain(
            [
                "sample", "--model", str(tiny_ti2v), "--lora", str(lora), "--prompt", "waves",
                "--height", "64", "--width", "96", "--num-frames", "9", "--device", "cpu",
                "--dtype", "fp32", "--output", str(tmp_path / name), *image,
            ],
            standalone_mode=False,
        )  # fmt: skip
        record = json.loads((tmp_path / name / "student.json").read_text())
        assert record, name

"""First and last frame: from shards to clips, as diffusers' image-to-video pipeline does it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load, load_file

from preprocess.cli.app import app as wanprep
from shared.errors import UserError
from shared.format.cache import open_cache
from shared.io.store import Store
from tests.preprocess.conftest import wanprep as wanprep_ran
from tests.train.conftest import encode
from tests.train.data.test_batches import _dataset, _plain
from tests.train.model.test_roles import build_roles
from tests.train.test_distill import distill, final_bytes
from train.cli.app import app as wantrain
from train.data.batches import with_mask

FLF2V = ("--train-mode", "flf2v")
SHORT = ("--max-train-steps", "1", "--mixed-precision", "no", "--boundary-type")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    files = [folder / "first.png", folder / "last.png"]
    for file in files:
        Image.fromarray(rng.integers(0, 255, (70, 64, 3)).astype(np.uint8)).save(file)
    return files


@pytest.fixture(scope="module")
def wan21_shards(
    dataset: Path,
    tiny_wan21_flf2v: Path,
    pictures: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("wan21-flf2v")
    line = f"waves --w 96 --h 64 --f 9 --i {pictures[0]} --ei {pictures[1]}\n"
    (folder / "prompts.txt").write_text(line)
    prompts = ("--validation-prompts", str(folder / "prompts.txt"))
    return encode(dataset, tiny_wan21_flf2v, folder / "shards", *prompts)


@pytest.fixture(scope="module")
def shards(dataset: Path, tiny_i2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(dataset, tiny_i2v, tmp_path_factory.mktemp("flf2v") / "shards", *FLF2V)


def weights(out: Path) -> dict[str, bytes]:
    """Of the final LoRA; its metadata name the shards."""
    (file,) = out.glob("lora-*-diffusers.safetensors")
    return {name: one.view(torch.uint8).numpy().tobytes() for name, one in load_file(file).items()}


def add_condition(shards: Path, dataset: Path, model: Path, *more: str) -> None:
    wanprep(
        [
            "add-condition", "--shards", str(shards), "--model", str(model),
            "--train-data-dir", str(dataset), "--device", "cpu", *more,
        ],
        standalone_mode=False,
    )  # fmt: skip


def test_the_mask_is_the_pipelines(tiny_i2v: Path) -> None:
    """For every length, also of two latent frames; one frame gives nothing away."""
    pipeline = WanImageToVideoPipeline.from_pretrained(tiny_i2v, text_encoder=None)
    image = torch.rand(1, 3, 32, 48)
    for frames in (5, 9, 13):
        whole = pipeline.prepare_latents(
            image, 2, 16, 32, 48, frames, torch.float32, torch.device("cpu"), torch.Generator(),
            last_image=image.flip(3),
        )[1]  # fmt: skip
        assert torch.equal(with_mask(whole[:, 4:], 4, (0, -1)), whole)
    assert not with_mask(torch.randn(2, 16, 1, 4, 6), 4, (0, -1))[:, :4].any()


def test_batches_bring_what_is_cached(wan21_shards: Path, tiny_wan21_flf2v: Path) -> None:
    plain, kinds = _plain(wan21_shards), set()
    data = _dataset(wan21_shards, tiny_wan21_flf2v)
    for stored in data.ahead(start=0, stop=4, workers=0):
        batch = stored.to(torch.device("cpu"))
        assert batch.condition is not None and batch.image is not None
        mask, encoded = batch.condition[:, :4], batch.condition[:, 4:]
        for row, key in enumerate(batch.keys):
            cached = load(plain[key]["cond.safetensors"])
            assert cached.keys() == {"first_last", "clip"}  # no reader takes it for i2v's
            assert torch.equal(encoded[row], cached["first_last"].float())
            assert torch.equal(batch.image[row], cached["clip"]) and cached["clip"].shape[0] == 20
            frames = json.loads(plain[key]["json"])["frames"]
            assert (mask[row].sum() > 0) == (frames > 1)
            assert (cached["clip"].std() > 0) == (frames > 1)  # a picture's is its own target
            if frames > 1:
                assert mask[row, 3, -1].all() and not mask[row, :3, -1].any()
            kinds.add(frames > 1)
    assert kinds == {True, False}


def test_velocity_is_the_transformers(tiny_wan21_flf2v: Path) -> None:
    """Two samples at once: each as the pipeline passes it, its two embeddings as two images."""
    roles, rng = build_roles(tiny_wan21_flf2v, expert="full"), torch.Generator().manual_seed(1)
    x_t = torch.randn(2, 16, 3, 6, 10, generator=rng)
    condition = torch.randn(2, 20, 3, 6, 10, generator=rng)
    text = torch.randn(2, 512, 32, generator=rng)
    image = torch.randn(2, 20, 32, generator=rng)
    time = torch.tensor([937.5, 312.5])
    model = WanTransformer3DModel.from_pretrained(tiny_wan21_flf2v, subfolder="transformer")
    assert model.condition_embedder.image_embedder.pos_embed.std() > 0.5
    with torch.inference_mode(), roles.teacher():
        found = roles.velocity(x_t, time, text, condition, image)
        for row in range(2):
            expected = model(
                torch.cat([x_t, condition], dim=1)[row : row + 1],
                time[row : row + 1],
                text[row : row + 1],
                torch.stack([image[row, :10], image[row, 10:]]),
                return_dict=False,
            )[0]
            assert torch.allclose(found[row], expected[0], atol=1e-5)
        turned = roles.velocity(x_t, time, text, condition, image.roll(10, 1))
    assert not torch.allclose(found, turned, atol=1e-3)


def test_wan21_distilled_resumed_validated_and_sampled(
    wan21_shards: Path, tiny_wan21_flf2v: Path, pictures: list[Path], tmp_path: Path
) -> None:
    """A run that was resumed ends as one that was not; its clips end at the last picture."""
    validate = ("--validation-steps", "2")
    out = distill(
        tiny_wan21_flf2v, wan21_shards, tmp_path / "out", "--max-train-steps", "2", *validate
    )
    again = distill(
        tiny_wan21_flf2v, wan21_shards, tmp_path / "again", "--max-train-steps", "1", *validate
    )
    distill(
        tiny_wan21_flf2v, wan21_shards, again, "--max-train-steps", "2", *validate,
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    assert final_bytes(again) == final_bytes(out)
    made = load_file(out / "validation" / "step-2" / "000.safetensors")["latents"]
    assert made.shape == (16, 3, 8, 12)

    def sample(name: str, *more: object) -> bytes:
        arguments = (
            "sample", "--model", tiny_wan21_flf2v, "--prompt", "waves", "--device", "cpu",
            "--lora", out / "lora-full-diffusers.safetensors", "--height", 64, "--width", 96,
            "--num-frames", 9, "--dtype", "fp32", "--output", tmp_path / name, *more,
        )  # fmt: skip
        wantrain([str(one) for one in arguments], standalone_mode=False)
        return (tmp_path / name / "student-000.mp4").read_bytes()

    first, last = pictures
    clip = sample("clips", "--image", first, "--last-image", last)
    assert clip != sample("others", "--image", first, "--last-image", first)
    with pytest.raises(UserError, match="first-last-frame model and needs a last frame"):
        sample("none", "--image", first)


def test_wan22_trains_and_its_lora_is_used_as_it_was_trained(
    shards: Path, i2v_shards: Path, tiny_i2v: Path, pictures: list[Path], tmp_path: Path
) -> None:
    refused = {
        ("--train-mode", "i2v"): "with --train-mode flf2v it would take them",
        (*FLF2V, "--random-frame-crop"): "--random-frame-crop: with flf2v a truncated clip",
    }
    for options, message in refused.items():
        with pytest.raises(UserError, match=message):
            distill(tiny_i2v, shards, tmp_path / "refused", *SHORT, "low", *options)
    out = distill(tiny_i2v, shards, tmp_path / "out", *SHORT, "low", *FLF2V)
    i2v = distill(tiny_i2v, i2v_shards, tmp_path / "i2v", *SHORT, "low")
    assert weights(out) != weights(i2v)
    first, last = pictures

    def sample(lora: Path, *more: object) -> None:
        arguments = (
            "sample", "--model", tiny_i2v, "--prompt", "waves", "--device", "cpu", "--lora",
            lora / "lora-low-diffusers.safetensors", "--height", 64, "--width", 96,
            "--num-frames", 9, "--image", first, "--output", tmp_path / "clips", *more,
        )  # fmt: skip
        wantrain([str(one) for one in arguments], standalone_mode=False)

    with pytest.raises(UserError, match=r"trained for flf2v, .* --last-image FILE"):
        sample(out)
    with pytest.raises(UserError, match=r"trained for i2v, .* without --last-image"):
        sample(i2v, "--last-image", last)
    sample(out, "--last-image", last)
    with pytest.raises(UserError, match="evaluate takes no last frames"):
        wantrain(
            [
                "evaluate", "--model", str(tiny_i2v), "--prompt", "waves", "--image", str(first),
                "--lora", str(out / "lora-low-diffusers.safetensors"), "--device", "cpu",
                "--output", str(tmp_path / "evaluation"),
            ],
            standalone_mode=False,
        )  # fmt: skip


@pytest.mark.parametrize("had", ["t2v", "i2v"])
def test_conditions_that_were_added_later(
    had: str,
    dataset: Path,
    shards: Path,
    tiny_i2v: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The same bytes as of a cache encoded for it; the cache serves as before."""
    own = Path(shutil.copytree(request.getfixturevalue(f"{had}_shards"), tmp_path / "shards"))
    lacks = "without the conditions" if had == "t2v" else "needs conditions of first and last"
    with pytest.raises(UserError, match=f"{lacks}.*wanprep add-condition .* --train-mode flf2v"):
        distill(tiny_i2v, own, tmp_path / "refused", *SHORT, "low", *FLF2V)
    add_condition(own, dataset, tiny_i2v, *FLF2V)
    added, direct = _plain(own / "conditions"), _plain(shards)
    assert added.keys() == direct.keys() and len(added) == 6
    for key, members in added.items():
        assert members["cond.safetensors"] == direct[key]["cond.safetensors"]
    assert open_cache(Store(own)).fingerprint["mode"] == had
    assert wanprep_ran("verify", "--shards", own).code == 0
    if had == "i2v":
        later = distill(tiny_i2v, own, tmp_path / "later", *SHORT, "low", *FLF2V)
        assert weights(later) == weights(
            distill(tiny_i2v, shards, tmp_path / "direct", *SHORT, "low", *FLF2V)
        )
        before = request.getfixturevalue("i2v_shards")
        assert weights(distill(tiny_i2v, own, tmp_path / "as-i2v", *SHORT, "low")) == weights(
            distill(tiny_i2v, before, tmp_path / "i2v", *SHORT, "low")
        )
    else:
        with pytest.raises(UserError, match="holds conditions for flf2v, and this run needs"):
            distill(tiny_i2v, own, tmp_path / "as-i2v", *SHORT, "low")


def test_no_condition_passes_for_the_other(
    shards: Path, i2v_shards: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    """A cache that says one and holds the other is named by verify, and not trained on."""
    for number, (source, own, other) in enumerate(
        [(shards, "flf2v", "i2v"), (i2v_shards, "i2v", "flf2v")]
    ):
        lying = Path(shutil.copytree(source, tmp_path / str(number)))
        for file in lying.glob("*.json"):
            text = file.read_text()
            file.write_text(text.replace(f'"mode": "{own}"', f'"mode": "{other}"'))
        found = wanprep_ran("verify", "--shards", lying)
        assert found.code == 1 and "tensor-name" in found.out + found.err
        with pytest.raises(UserError, match=r"cond\.safetensors has no (cond|first_last), exp"):
            distill(
                tiny_i2v, lying, tmp_path / f"out{number}", *SHORT, "low", "--train-mode", other
            )

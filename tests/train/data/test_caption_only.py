"""Training on captions without media: what begins and ends in noise needs no latents."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from preprocess.cli.app import app as wanprep
from shared.errors import UserError
from shared.format.cache import open_cache
from shared.io.store import Store
from tests.train.conftest import encode, write_dataset
from tests.train.data.test_batches import CPU, _dataset
from tests.train.test_distill import distill, final_bytes, losses

HIGH = ("--boundary-type", "high", "--mixed-precision", "no", "--caption-dropout", "0")


def encode_list(
    model: Path, output: Path, entries: Sequence[dict[str, object]], data: Path | None = None
) -> Path:
    listed = output.parent / f"{output.name}.json"
    listed.write_text(json.dumps(entries))
    return encode(data or output.parent, model, output, "--train-data-meta", str(listed))


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One video of 96 x 54, with a caption."""
    return write_dataset(tmp_path_factory.mktemp("clip") / "set", clips=1, image=False)


@pytest.fixture(scope="module")
def alone(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The caption of that video for its bucket, without it."""
    entry = {"text": "waves of kind 0, moving", "width": 96, "height": 54}
    return encode_list(tiny_t2v, tmp_path_factory.mktemp("alone") / "shards", [entry])


@pytest.fixture(scope="module")
def mixed(
    dataset: Path, tiny_t2v: Path, tiny_ti2v: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two videos, and captions for the same buckets and drawn ones; for a t2v and a ti2v model."""
    entries: list[dict[str, object]] = [
        {"file_path": "clip0.mp4", "text": "waves"},
        {"file_path": "clip1.mp4", "text": "tall waves"},
        {"type": "text", "text": "a sea", "width": 96, "height": 54},
        {"type": "text", "text": "a tower", "width": 56, "height": 80},
        {"type": "text", "text": "anything"},
    ]
    folder = tmp_path_factory.mktemp("mixed")
    models = {"t2v": tiny_t2v, "ti2v": tiny_ti2v}
    return {
        mode: encode_list(model, folder / mode, entries, dataset) for mode, model in models.items()
    }


def weights(out: Path) -> dict[str, torch.Tensor]:
    """Both roles' LoRAs, as the last checkpoint has them."""
    (checkpoint,) = out.glob("checkpoint-*")
    return {
        f"{file.stem} {name}": tensor
        for file in sorted(checkpoint.glob("*_weights.safetensors"))
        for name, tensor in load_file(file).items()
    }


def test_the_high_expert_learns_the_same_with_and_without_the_media(
    clip: Path, alone: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    """To the bit: where a walk begins in noise, cached latents have no say."""
    media = encode(clip, tiny_t2v, tmp_path / "media")
    assert open_cache(Store(media)).buckets == open_cache(Store(alone)).buckets
    runs = [
        distill(tiny_t2v, shards, tmp_path / name, "--max-train-steps", "2", *HIGH)
        for name, shards in (("with", media), ("without", alone))
    ]
    first, second = map(weights, runs)
    assert first.keys() == second.keys() and len(first) > 40
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert losses(runs[0]) == losses(runs[1])
    assert all(first[name].abs().max() > 0 for name in first if "lora_B" in name)


def test_a_resumed_run_is_exact(mixed: dict[str, Path], tiny_t2v: Path, tmp_path: Path) -> None:
    """In batches of both kinds, by the low expert from noise."""
    common = ("--start", "noise", "--mixed-precision", "no")
    whole = distill(tiny_t2v, mixed["t2v"], tmp_path / "a", "--max-train-steps", "3", *common)
    out = tmp_path / "b"
    distill(tiny_t2v, mixed["t2v"], out, "--max-train-steps", "1", *common)
    resume = ("--max-train-steps", "3", "--resume-from-checkpoint", "latest")
    distill(tiny_t2v, mixed["t2v"], out, *common, *resume)
    assert final_bytes(out) == final_bytes(whole)
    assert losses(out) == losses(whole)
    assert all(np.isfinite(value) for curve in losses(out).values() for _, value in curve)


def test_batches_of_both_kinds(mixed: dict[str, Path], tiny_t2v: Path, tiny_ti2v: Path) -> None:
    """Zeros in the bucket's shape, and always the own caption: it is all that there is."""
    for mode, model in (("t2v", tiny_t2v), ("ti2v", tiny_ti2v)):
        shards = mixed[mode]
        index = open_cache(Store(shards))
        types = {index.key(row): int(index.types[row]) for row in range(len(index))}
        whole = _dataset(shards, model)
        dropped = _dataset(shards, model, dropout=1.0)
        seen: set[str] = set()
        both = False
        for update in range(8):
            batch, without = (data.load(update, 0).to(CPU) for data in (whole, dropped))
            kinds = {types[key] for key in batch.keys}
            both |= kinds == {0, 2}
            seen |= set(batch.keys)
            for number, key in enumerate(batch.keys):
                alone = types[key] == 2
                assert bool(batch.latents[number].any()) != alone
                assert torch.equal(batch.text[number], without.text[number]) == alone
                if batch.noised is not None and alone:
                    assert bool((batch.noised[number] == 1).all())
        assert both and seen == set(types)


def test_ti2v_trains_on_both_kinds(mixed: dict[str, Path], tiny_ti2v: Path, tmp_path: Path) -> None:
    out = distill(tiny_ti2v, mixed["ti2v"], tmp_path, "--max-train-steps", "2")
    assert all(np.isfinite(value) for curve in losses(out).values() for _, value in curve)


def test_what_needs_latents_is_refused(
    mixed: dict[str, Path], dataset: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    def refused(*more: str, model: Path = tiny_t2v, shards: Path = mixed["t2v"]) -> str:
        with pytest.raises(UserError) as caught:
            distill(model, shards, tmp_path / "out", "--max-train-steps", "1", *more)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    have = "3 of the 5 samples in"
    said = refused()
    assert said.startswith("--start: latents, the default of the low-noise expert, but " + have)
    assert "--start noise" in said
    assert refused("--start", "latents").startswith("--start: latents, but " + have)
    said = refused("--start", "noise", "--fm-loss-weight", "0.5")
    assert said.startswith("--fm-loss-weight: 0.5, but " + have)
    shards = Path(shutil.copytree(mixed["t2v"], tmp_path / "shards"))
    wanprep(
        [
            *("add-condition", "--model", str(tiny_i2v), "--shards", str(shards)),
            *("--train-data-dir", str(dataset), "--device", "cpu"),
        ],
        standalone_mode=False,
    )
    said = refused("--start", "noise", model=tiny_i2v, shards=shards)
    assert have in said and "no first frame for an i2v model" in said

"""Training on captions and conditions that were added later is training on a direct encode."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from preprocess.cli.app import app as wanprep
from shared.errors import UserError
from tests.train.conftest import encode
from tests.train.test_distill import distill, losses

SHORT = ("--max-train-steps", "1", "--mixed-precision", "no")


def final_weights(out: Path) -> dict[str, bytes]:
    """Of the final LoRA; its metadata name the shards."""
    (file,) = out.glob("lora-*-diffusers.safetensors")
    loaded = safetensors.torch.load_file(file)
    return {name: tensor.view(torch.uint8).numpy().tobytes() for name, tensor in loaded.items()}


def prepare(*arguments: object) -> None:
    wanprep([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def recaptioned(dataset: Path, tmp_path: Path) -> Path:
    """The media of `dataset` with other captions."""
    folder = Path(shutil.copytree(dataset, tmp_path / "recaptioned"))
    for path in folder.glob("*.txt"):
        path.write_text(f"rewritten: {path.stem}")
    return folder


def test_distill_with_captions_equals_distill_on_an_encode_of_them(
    recaptioned: Path, t2v_shards: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    shards = Path(shutil.copytree(t2v_shards, tmp_path / "shards"))
    prepare(
        *("recaption", "--name", "new", "--shards", shards, "--train-data-dir", recaptioned),
        *("--model", tiny_t2v, "--device", "cpu", "--negative-prompt", "worse"),
    )
    direct = encode(recaptioned, tiny_t2v, tmp_path / "direct", "--negative-prompt", "worse")
    own = distill(tiny_t2v, shards, tmp_path / "own", *SHORT)
    new = distill(tiny_t2v, shards, tmp_path / "new", *SHORT, "--captions", "new")
    same = distill(tiny_t2v, direct, tmp_path / "same", *SHORT)
    assert final_weights(new) == final_weights(same) != final_weights(own)
    assert losses(new) == losses(same)
    state = json.loads((new / "checkpoint-1" / "state.json").read_text())
    assert state["settings"]["captions"].startswith("new ")


def test_distill_i2v_on_a_t2v_cache_with_conditions(
    dataset: Path,
    t2v_shards: Path,
    i2v_shards: Path,
    tiny_i2v: Path,
    tiny_t2v: Path,
    tmp_path: Path,
) -> None:
    shards = Path(shutil.copytree(t2v_shards, tmp_path / "shards"))
    with pytest.raises(UserError, match="without the conditions that an i2v model needs"):
        distill(tiny_i2v, shards, tmp_path / "none", *SHORT)
    prepare(
        *("add-condition", "--shards", shards, "--train-data-dir", dataset),
        *("--model", tiny_i2v, "--device", "cpu"),
    )
    added = distill(tiny_i2v, shards, tmp_path / "added", *SHORT)
    direct = distill(tiny_i2v, i2v_shards, tmp_path / "direct", *SHORT)
    assert final_weights(added) == final_weights(direct)
    assert losses(added) == losses(direct)
    # And it is a t2v cache as before.
    before = distill(tiny_t2v, t2v_shards, tmp_path / "before", *SHORT)
    assert final_weights(distill(tiny_t2v, shards, tmp_path / "t2v", *SHORT)) == final_weights(
        before
    )


def test_another_text_encoder_is_refused_and_recaption_is_the_cure(
    dataset: Path,
    t2v_shards: Path,
    tiny_t2v: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shards = Path(shutil.copytree(t2v_shards, tmp_path / "shards"))
    model = Path(shutil.copytree(tiny_t2v, tmp_path / "model"))
    file = model / "text_encoder" / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    name = next(name for name in sorted(weights) if name.endswith("wo.weight"))
    weights[name] = weights[name] + 0.5
    safetensors.torch.save_file(weights, file, metadata={"format": "pt"})

    def refused(*more: str) -> str:
        with pytest.raises(UserError) as caught:
            distill(model, shards, tmp_path / "out", *SHORT, *more)
        return str(caught.value)

    said = refused()
    assert "text.encoder: shards have" in said
    assert "To be redone for the expected values: text embeddings only" in said
    assert f"wanprep recaption --name NAME --same-captions --shards {shards}" in said
    recaption: tuple[Any, ...] = ("recaption", "--name", "again", "--shards", shards)
    recaption += ("--model", model, "--device", "cpu")
    assert "has no captions 'again'" in refused("--captions", "again")
    prepare(*recaption, "--same-captions")
    again = distill(model, shards, tmp_path / "again", *SHORT, "--captions", "again")
    direct = encode(dataset, model, tmp_path / "direct")
    same = distill(model, direct, tmp_path / "same", *SHORT)
    assert final_weights(again) == final_weights(same)

    # Some captions only, by another encoder: the others must not be mixed in.
    only = tmp_path / "only.jsonl"
    only.write_text(json.dumps({"file_path": "clip0.mp4", "text": "one"}))
    recaption = (*recaption[:2], "some", *recaption[3:], "--train-data-dir", dataset)
    prepare(*recaption, "--train-data-meta", only)
    said = refused("--captions", "some")
    assert "of the 6 samples" in said and "text.encoder differ" in said
    assert "the 'some'" not in capsys.readouterr().out

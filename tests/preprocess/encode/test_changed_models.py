"""A model or setting that is not the cache's is refused, with what would have to be redone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
from typer.testing import CliRunner

from tests.preprocess.conftest import Cache, wanprep
from train.cli.app import app as wantrain

PIXELS = "latents and conditions; the text embeddings would be the same"
TEXT = "text embeddings only; the latents would be the same"


def weights(component: str) -> Callable[[Path], None]:
    """The last weight, by name, becomes another."""

    def change(model: Path) -> None:
        (file,) = (model / component).glob("*.safetensors")
        tensors = safetensors.torch.load_file(file)
        tensors[max(tensors)] = tensors[max(tensors)] * 1.5 + 0.1
        safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})

    return change


def config(component: str, **fields: object) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        file = model / component / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def tokenizer(model: Path) -> None:
    """A token gets another number."""
    file = model / "tokenizer" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, dict):
        one, two = sorted(vocabulary)[-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    else:
        vocabulary[-1], vocabulary[-2] = vocabulary[-2], vocabulary[-1]
    file.write_text(json.dumps(content))


MEAN = [0.5] * 16
CHANGES = {
    "VAE weights": (weights("vae"), ["latents.vae"], PIXELS),
    "VAE mean": (config("vae", latents_mean=MEAN), ["latents.vae", "latents.mean"], PIXELS),
    "text encoder": (weights("text_encoder"), ["text.encoder"], TEXT),
    "text encoder config": (
        config("text_encoder", layer_norm_epsilon=1e-3),
        ["text.encoder"],
        TEXT,
    ),
    "tokenizer": (tokenizer, ["text.tokenizer"], TEXT),
}


@pytest.fixture(scope="module")
def encoded(pictures: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A t2v cache of three pictures, and their folder as `data` beside it."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "data").mkdir()
    for part in range(3):
        shutil.copy(pictures / f"0-{part}.png", folder / "data")
        (folder / "data" / f"0-{part}.txt").write_text(f"part {part}")
    ran = wanprep(*command(tiny_t2v, folder))
    assert ran.code == 0, ran.err
    return folder


def command(model: Path, folder: Path, output: str = "shards") -> tuple[object, ...]:
    return (
        *("encode", "--model", model, "--train-data-dir", folder / "data"),
        *("--output", folder / output, "--size", 64, "--device", "cpu"),
    )


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_component_is_refused_by_both_stages(
    change: str, encoded: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    apply, fields, redo = CHANGES[change]
    model = Path(shutil.copytree(tiny_t2v, tmp_path / "model"))
    apply(model)
    before = Cache.open(encoded / "shards").contents()
    fingerprint = json.loads((encoded / "shards" / "manifest.json").read_text())["fingerprint"]

    ran = wanprep(*command(model, encoded))
    assert ran.code == 1
    stage_two = CliRunner().invoke(
        wantrain,
        ["distill", "--dry-run", "--model", str(model), "--shards", str(encoded / "shards")],
    )
    assert stage_two.exit_code == 1
    for said in (ran.err, str(stage_two.exception)):
        assert f"To be redone for the expected values: {redo}." in said
        lines = [line.strip() for line in said.splitlines() if ": shards have " in line]
        assert [line.split(":")[0] for line in lines] == fields
        for line, field in zip(lines, fields, strict=True):
            group, _, name = field.partition(".")
            assert line.startswith(f"{field}: shards have {fingerprint[group][name]!r}, expected ")
        assert ("--name NAME --same-captions" in said) == (redo == TEXT)
    assert Cache.open(encoded / "shards").contents() == before


@pytest.mark.parametrize("change", ["text encoder", "text encoder config", "tokenizer"])
def test_recaption_is_the_remedy_where_only_text_differs(
    change: str, encoded: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    """What it writes is what an encode of everything with that model would have written."""
    model = Path(shutil.copytree(tiny_t2v, tmp_path / "model"))
    CHANGES[change][0](model)
    folder = Path(shutil.copytree(encoded, tmp_path / "copy"))
    shards = folder / "shards"
    ran = wanprep(
        *("recaption", "--name", "mended", "--same-captions", "--shards", shards),
        *("--model", model, "--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    assert "3 captions, 3 of them new" in ran.out
    dry = ["distill", "--dry-run", "--model", str(model), "--shards", str(shards)]
    dry_run = CliRunner().invoke(wantrain, [*dry, "--captions", "mended"])
    assert dry_run.exit_code == 0, dry_run.exception
    assert "with the captions 'mended'" in dry_run.output

    assert wanprep(*command(model, folder, "direct")).code == 0
    direct, old = (Cache.open(folder / name).contents() for name in ("direct", "shards"))
    mended = Cache.open(shards / "captions" / "mended").contents()
    text = {name: data for name, data in mended.items() if name.endswith("text.safetensors")}
    assert len(text) == 3 and text.items() <= direct.items()
    if change != "tokenizer":  # the two tokens may not occur
        assert not text.items() & old.items()

    # The old encoder's captions under that name are refused, and so are the shards for the new.
    ran = wanprep(
        *("recaption", "--name", "mended", "--same-captions", "--shards", shards),
        *("--model", tiny_t2v, "--device", "cpu"),
    )
    assert ran.code == 1 and "Give these captions another name (--name)" in ran.err


@pytest.mark.parametrize(
    ("changed", "field", "old", "new", "redo"),
    [
        (("--dtype", "fp32"), "latents.dtype", "'bf16'", "'fp32'", "everything"),
        (("--vae-dtype", "bf16"), "latents.compute", "'fp32'", "'bf16'", PIXELS),
        (("--text-encoder-dtype", "fp32"), "text.compute", "'bf16'", "'fp32'", TEXT),
        (("--image-sample-size", 96), "media.image_sample_size", "64", "96", PIXELS),
        (("--video-sample-n-frames", 9), "media.video_sample_n_frames", "81", "9", PIXELS),
    ],
)
def test_a_changed_setting_says_what_it_costs(
    changed: tuple[object, ...],
    field: str,
    old: str,
    new: str,
    redo: str,
    encoded: Path,
    tiny_t2v: Path,
) -> None:
    ran = wanprep(*command(tiny_t2v, encoded), *changed)
    assert ran.code == 1
    assert f"{field}: shards have {old}, expected {new}" in ran.err
    assert f"To be redone for the expected values: {redo}" in ran.err


def test_an_i2v_cache_serves_a_t2v_model_as_it_is(
    encoded: Path, tiny_t2v: Path, tiny_i2v: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(encoded, tmp_path / "copy"))
    shutil.rmtree(folder / "shards")
    assert wanprep(*command(tiny_i2v, folder)).code == 0
    ran = wanprep(*command(tiny_t2v, folder))
    assert ran.code == 1
    assert "mode: shards have 'i2v', expected 't2v'" in ran.err
    assert "To be redone for the expected values: nothing" in ran.err
    dry = CliRunner().invoke(
        wantrain,
        ["distill", "--dry-run", "--model", str(tiny_t2v), "--shards", str(folder / "shards")],
    )
    assert dry.exit_code == 0, dry.exception

"""`wantrain lora --holdout`: files that are never trained on, and the loss on them."""

import csv
import hashlib
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.format.cache import MemberReader
from shared.models.spec import read_model_spec
from shared.models.wan import WAN
from tests.train.conftest import encode, write_dataset
from tests.train.methods.test_finetune import SMALL, finetune
from tests.train.strategies.test_strategies import typed
from tests.train.test_distill import final_bytes
from train.config import FinetuneConfig
from train.data.batches import load_prompt_bank
from train.data.dataset import Dataset
from train.data.holdout import split_held_out
from train.data.weighted_folder import WeightedFolder
from train.functional.rng import counted_rng, noise
from train.loop import micro_batches
from train.model.base import load_base
from train.prepare import prepare_finetuning

SHARE = 0.4
RUN = ("--max-train-steps", "4", "--checkpointing-steps", "2", "--report-to", "csv")


def held(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "little") < int(SHARE * 2**64)


@pytest.fixture(scope="module")
def two(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders: of two captions for each file and two variants; of the same files and others."""
    folder = tmp_path_factory.mktemp("two")
    first = write_dataset(folder / "first", clips=8)
    for text in first.glob("*.txt"):
        text.unlink()
    records = [
        {"file_path": file.name, "text": [f"one of {file.name}", f"another of {file.name}"]}
        for file in sorted(first.iterdir())
    ]
    (first / "list.json").write_text(json.dumps(records))
    a = encode(
        first, tiny_t2v, folder / "a", "--train-data-meta", str(first / "list.json"),
        "--variants", "2", "--random-ratio-crop",
    )  # fmt: skip
    return a, encode(write_dataset(folder / "second", clips=11), tiny_t2v, folder / "b")


def config_of(model: Path, *shards: Path, **more: object) -> FinetuneConfig:
    given = {"holdout": SHARE, "max_train_steps": 4, "device": "cpu", "mixed_precision": "no"}
    folders = [WeightedFolder(folder) for folder in shards]
    return FinetuneConfig(model=str(model), shards=folders, **(given | more))  # type: ignore[arg-type]


def sources(data: Dataset) -> list[str]:
    found = []
    for part in data.parts:
        reader = MemberReader(part.index)
        found += [str(reader.info(int(row))["source"]) for row in part.rows]
        reader.close()
    return found


def test_files_are_parted_whole_by_a_hash_of_their_name(
    tiny_t2v: Path, two: tuple[Path, Path]
) -> None:
    run = prepare_finetuning(config_of(tiny_t2v, *two, seed=7))
    assert run.held_out is not None
    trained, tested = sources(run.data), sources(run.held_out)
    assert trained and tested and not set(trained) & set(tested)
    names = set(trained + tested)
    assert set(tested) == {name for name in names if held(name)} and len(set(tested)) > 1
    first = set(sources(replace(run.held_out, parts=run.held_out.parts[:1])))
    assert all(tested.count(name) >= 4 for name in first), "two captions, two variants"
    shown = {run.data.key(int(n)) for epoch in range(3) for n in run.plan.epoch(epoch).ravel()}
    assert not shown & {run.held_out.key(n) for n in range(len(run.held_out))}
    assert any(
        re.fullmatch(
            rf"held out {len(set(tested))} of {len(names)} source files .*, "
            rf"{len(tested)} of {len(trained) + len(tested)} samples: not trained on",
            line,
        )
        for line in run.describe()
    )


def test_equal_samples_go_with_one_another_whatever_they_are_called(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """A clip is in both folders, under names of which only one is held out by itself."""
    other = next(f"x{n}.mp4" for n in range(99) if held(f"x{n}.mp4") != held("clip3.mp4"))
    folder = write_dataset(tmp_path / "set", clips=4)
    (folder / "clip3.mp4").rename(folder / other)
    (folder / "clip3.txt").rename((folder / other).with_suffix(".txt"))
    renamed = encode(folder, tiny_t2v, tmp_path / "shards")
    run = prepare_finetuning(config_of(tiny_t2v, t2v_shards, renamed))
    assert run.held_out is not None
    assert {"clip3.mp4", other} <= set(sources(run.held_out))
    assert not {"clip3.mp4", other} & set(sources(run.data))


def test_nothing_and_everything_are_refused_with_a_share_that_works(
    tiny_t2v: Path, t2v_shards: Path
) -> None:
    whole = prepare_finetuning(config_of(tiny_t2v, t2v_shards, holdout=0.0))
    assert whole.held_out is None
    with pytest.raises(UserError, match=r"hold out none of the 6 source files.*--holdout ") as said:
        split_held_out(whole.data, 1e-6)
    least = float(str(said.value).rsplit(" ", 1)[1])
    _, tested, _ = split_held_out(whole.data, least)
    assert len(set(sources(tested))) == 1
    with pytest.raises(UserError, match="all of the 6 source files"):
        split_held_out(whole.data, 0.9999999)
    with pytest.raises(UserError, match="all of one source file"):
        one = config_of(tiny_t2v, t2v_shards, where=["source=clip0.mp4"])
        prepare_finetuning(one)
    with pytest.raises(UserError, match="--holdout-steps: found 3 without --holdout"):
        config_of(tiny_t2v, t2v_shards, holdout=0.0, holdout_steps=3)


def records(out: Path) -> dict[int, float]:
    lines = (out / "holdout.jsonl").read_text().splitlines()
    return {record["step"]: record["loss"] for record in map(json.loads, lines)}


def test_a_run_measures_resumes_and_never_shows_them(
    tiny_t2v: Path, two: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--shards", f"{two[1]}@2", "--holdout", str(SHARE), *RUN, "--holdout-steps", "1")
    given += ("--ema-decay", "0.5", "--ema-start", "0")
    whole = finetune(tiny_t2v, two[0], tmp_path / "whole", *given)
    said = capsys.readouterr().err
    assert "held out loss" in said and "after 4 updates" in said
    found = records(whole)
    assert list(found) == [0, 1, 2, 3, 4] and len(set(found.values())) == 5
    rows = list(csv.DictReader((whole / "logs" / "metrics.csv").open()))
    logged = {int(r["update"]): float(r["loss/held_out"]) for r in rows if r["loss/held_out"]}
    assert logged == found

    plain = finetune(  # the same without measuring: the loss moves no weight
        tiny_t2v, two[0], tmp_path / "plain", *given, "--holdout-steps", "3", "--report-to", "none"
    )
    assert final_bytes(plain) == final_bytes(whole)

    out = tmp_path / "out"
    finetune(tiny_t2v, two[0], out, *given, "--max-train-steps", "2")
    lines = (out / "holdout.jsonl").read_text().splitlines(keepends=True)
    later = json.dumps({"step": 3, "loss": 9.0}) + "\n"  # of a run that was given up
    (out / "holdout.jsonl").write_text("".join(lines[:2]) + later)  # killed before step 2's
    on = ("--resume-from-checkpoint", "latest")
    finetune(tiny_t2v, two[0], out, *given, *on)
    assert records(out) == found
    assert final_bytes(out) == final_bytes(whole)
    with pytest.raises(UserError, match=r"holdout: checkpoint has 0.4, this run 0.0"):
        finetune(tiny_t2v, two[0], out, *RUN, "--shards", f"{two[1]}@2", *on, "--ema-decay", "0.5",
                 "--ema-start", "0")  # fmt: skip


def test_the_loss_is_that_of_the_base_in_float64(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """Before the first update B is 0: diffusers' own transformer gives the velocities."""
    out = finetune(
        tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "1", "--holdout", str(SHARE)
    )
    run = prepare_finetuning(config_of(tiny_t2v, t2v_shards))
    assert run.held_out is not None
    spec = read_model_spec(tiny_t2v)
    base = load_base(
        spec, "low", precision="no", device=torch.device("cpu"), gradient_checkpointing=False
    ).double()
    bank = load_prompt_bank(run.data.first, WAN)
    batches = replace(micro_batches(run, bank), dataset=run.held_out)
    samples = len(run.held_out)
    each = -(-16 // samples)
    number = samples * each
    places = counted_rng(0, "held out").permutation(number)
    total = 0.0
    for one in range(number):
        stored, _ = batches.whole_sample(one % samples, one)
        batch = stored.to(torch.device("cpu"))
        u = (places[one] + 0.5) / number * 0.875 / (12 - 11 * 0.875)  # the low expert's levels
        sigma = 12 * u / (1 + 11 * u)
        x0 = batch.latents.double()
        eps = noise(x0.shape[1:], 0, "held out", 0, [one]).double()
        with torch.no_grad():
            v = base(
                ((1 - sigma) * x0 + sigma * eps), torch.tensor([1000 * sigma]),
                batch.text.double(), return_dict=False,
            )[0]  # fmt: skip
        total += float((v - (eps - x0)).square().mean())
    assert records(out)[0] == pytest.approx(total / number, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero3"])
def test_two_processes_measure_what_one_does(
    strategy: str, tiny_t2v: Path, two: tuple[Path, Path], tmp_path: Path
) -> None:
    given = ("--holdout", str(SHARE), "--max-train-steps", "2", "--holdout-steps", "1")
    one = finetune(tiny_t2v, two[0], tmp_path / "one", *given)
    out = tmp_path / "out"
    small = [word if word != "2" else "1" for word in SMALL]
    typed(
        str(Path(sys.executable).with_name("wantrain")), "lora", "--model", str(tiny_t2v),
        "--shards", str(two[0]), "--output-dir", str(out), *small, *given, "--boundary-type", "low",
        "--num-processes", "2", "--strategy", strategy,
    )  # fmt: skip
    assert records(out) == pytest.approx(records(one), rel=1e-4)

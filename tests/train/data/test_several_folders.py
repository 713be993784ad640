"""`wantrain distill` on several folders of shards, with weights and conditions."""

import itertools
import json
import re
import shutil
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from shared.format.cache import CacheIndex, open_cache
from shared.io.store import Store
from shared.models.spec import read_model_spec
from shared.models.wan import WAN
from tests.train.conftest import encode, write_dataset
from tests.train.methods.test_updates import config_of
from tests.train.test_distill import SMALL, distill, final_bytes, losses
from train.cli.app import app as wantrain
from train.data.batch_plan import BatchPlan
from train.data.batches import Batch, MicroBatches, load_prompt_bank
from train.data.dataset import Dataset, dataset_of
from train.data.weighted_folder import WeightedFolder, weighted_folder
from train.prepare import prepare_distillation

SHORT = ("--max-train-steps", "1", "--mixed-precision", "no")


@pytest.fixture(scope="module")
def others(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A second folder for the same model: three other clips, in the shapes of the first."""
    folder = write_dataset(tmp_path_factory.mktemp("others") / "set", clips=8, image=False)
    for number in range(5):
        (folder / f"clip{number}.mp4").unlink()
        (folder / f"clip{number}.txt").unlink()
    return encode(folder, tiny_t2v, tmp_path_factory.mktemp("others") / "shards")


def keys_of(index: CacheIndex) -> list[str]:
    return index.hex_keys()


def batches_of(
    data: Dataset, model: Path, plan: BatchPlan, *, ranks: int, workers: int, updates: int
) -> list[list[Batch]]:
    """Of each rank, all micro-batches of two accumulation steps."""
    return [
        [
            batch.to(torch.device("cpu"))
            for batch in MicroBatches(
                data,
                plan,
                read_model_spec(model),
                empty_text=load_prompt_bank(data.first, WAN).empty,
                caption_dropout=0.3,
                frame_crop=True,
                accumulation=2,
                data_rank=rank,
                data_size=ranks,
            ).ahead(start=0, stop=updates, workers=workers)
        ]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("weight", [Fraction(1), Fraction(1, 2), Fraction(3)])
def test_ranks_and_workers_show_what_one_process_shows(
    weight: Fraction, t2v_shards: Path, others: Path, tiny_t2v: Path
) -> None:
    data = dataset_of(
        [(open_cache(Store(t2v_shards)), Fraction(1)), (open_cache(Store(others)), weight)]
    )
    repeats, epochs = data.shown(2)
    plan = BatchPlan(data.bucket_ids, repeats, 12, seed=3, epochs=epochs)
    updates = 2 * plan.batches_per_epoch
    (whole,) = batches_of(data, tiny_t2v, plan, ranks=1, workers=0, updates=updates)
    assert len({tuple(batch.keys) for batch in whole}) > 1
    for ranks, workers in itertools.product((1, 2, 3), (0, 2)):
        shares = batches_of(data, tiny_t2v, plan, ranks=ranks, workers=workers, updates=updates)
        assert all(len(share) == 2 * updates for share in shares)
        for at, together in enumerate(zip(*shares, strict=True)):
            assert sum((share.keys for share in together), ()) == whole[at].keys
            assert torch.equal(torch.cat([share.latents for share in together]), whole[at].latents)
            assert torch.equal(torch.cat([share.text for share in together]), whole[at].text)
    # An epoch shows each sample as often as its weight says, beside what fills the last batches.
    keys = [data.key(sample) for sample in range(len(data))]
    for epoch in (0, 1):
        rows = slice(2 * epoch * plan.batches_per_epoch, 2 * (epoch + 1) * plan.batches_per_epoch)
        shown = Counter(key for batch in whole[rows] for key in batch.keys)
        shown -= Counter(keys[sample] for sample in plan.tail(epoch))
        for sample, key in enumerate(keys):
            wanted = (2 if data.types[sample] == 0 else 1) * (
                weight if key in keys_of(open_cache(Store(others))) else 1
            )
            assert shown[key] == wanted


def test_batches_mix_folders_and_read_each_from_its_own(
    t2v_shards: Path, others: Path, tiny_t2v: Path
) -> None:
    caches = [open_cache(Store(t2v_shards)), open_cache(Store(others))]
    mixed = dataset_of([(index, Fraction(1)) for index in caches])
    assert set(mixed.buckets) == {b for index in caches for b in index.buckets}
    plan = BatchPlan(mixed.bucket_ids, mixed.shown(1)[0], 4, seed=1)
    alone: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for index in caches:
        data = dataset_of([(index, Fraction(1))])
        own = BatchPlan(data.bucket_ids, data.shown(1)[0], 1, seed=1)
        batches = MicroBatches(
            data, own, read_model_spec(tiny_t2v), empty_text=load_prompt_bank(index, WAN).empty,
            caption_dropout=0, frame_crop=False, accumulation=1, data_rank=0, data_size=1,
        )  # fmt: skip
        for batch in batches.ahead(start=0, stop=own.batches_per_epoch, workers=0):
            alone[batch.keys[0]] = batch.latents[0], batch.texts[0]
    assert len(alone) == 9
    batches = MicroBatches(
        mixed, plan, read_model_spec(tiny_t2v), empty_text=load_prompt_bank(mixed.first, WAN).empty,
        caption_dropout=0, frame_crop=False, accumulation=1, data_rank=0, data_size=1,
    )  # fmt: skip
    homes = [set(keys_of(index)) for index in caches]
    from_both = False
    for batch in batches.ahead(start=0, stop=plan.batches_per_epoch, workers=0):
        from_both |= all(home & set(batch.keys) for home in homes)
        for row, key in enumerate(batch.keys):
            assert torch.equal(batch.latents[row], alone[key][0])
            assert torch.equal(batch.texts[row], alone[key][1])
    assert from_both


def test_distill_on_two_folders(
    t2v_shards: Path, others: Path, tiny_t2v: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    both = ("--shards", f"{others}@0.5")
    one = distill(tiny_t2v, t2v_shards, tmp_path / "one", *SHORT)
    capsys.readouterr()
    two = distill(tiny_t2v, t2v_shards, tmp_path / "two", *SHORT, *both)
    said = capsys.readouterr().err
    assert f"data     9 samples in 3 bucket(s) of {t2v_shards}, {others};" in said
    assert f"shards   3 of 3 samples of {others}, each 1/2 times an epoch" in said
    assert final_bytes(one) != final_bytes(two)
    first, second = open_cache(Store(t2v_shards)).digest, open_cache(Store(others)).digest
    state = json.loads((two / "checkpoint-1" / "state.json").read_text())
    assert state["settings"]["shards"] == f"{first} {second}@1/2"
    # Interrupted and gone on with, also in the middle of an epoch, it is the same run.
    whole = distill(
        tiny_t2v, t2v_shards, tmp_path / "w", "--max-train-steps", "3", *SHORT[2:], *both
    )
    resumed = ("--max-train-steps", "3", "--resume-from-checkpoint", "latest", *SHORT[2:])
    distill(tiny_t2v, t2v_shards, two, *resumed, *both)
    assert final_bytes(two) == final_bytes(whole) and losses(two) == losses(whole)
    assert (two / "tail.jsonl").read_bytes() == (whole / "tail.jsonl").read_bytes()
    capsys.readouterr()
    distill(tiny_t2v, t2v_shards, two, *resumed, "--where", "frames>1")
    told = capsys.readouterr().err
    assert f"changed since the checkpoint: shards: '{first} {second}@1/2' → '{first}'" in told
    assert "changed since the checkpoint: where: None → 'frames>1'" in told


def test_where_and_its_tail(
    t2v_shards: Path, tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--where", "type=video", "--where", "source!=clip0*")
    out = distill(tiny_t2v, t2v_shards, tmp_path / "out", *SHORT[2:], *where,
                  "--max-train-steps", "2", "--train-batch-size", "3")  # fmt: skip
    said = capsys.readouterr().err
    assert "data     4 samples in 2 bucket(s)" in said
    assert f"shards   4 of 6 samples of {t2v_shards}" in said
    assert f"2 samples shown again to fill batches: their keys go to {out / 'tail.jsonl'}" in said
    lines = [json.loads(line) for line in (out / "tail.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    run = prepare_distillation(
        config_of(tiny_t2v, t2v_shards, tmp_path, *where, "--train-batch-size", "3")
    )
    for line in lines:
        assert line["tail"] == "pad"
        assert line["keys"] == [run.data.key(int(s)) for s in run.plan.tail(line["epoch"])]


def test_refusals(
    t2v_shards: Path, others: Path, tiny_t2v: Path, tmp_path: Path
) -> None:  # fmt: skip
    def refused(*more: str, shards: Path = t2v_shards) -> str:
        with pytest.raises(UserError) as caught:
            distill(tiny_t2v, shards, tmp_path / "out", *SHORT, *more)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    said = refused("--shards", f"{t2v_shards.parent}/./{t2v_shards.name}")
    assert "is given 2 times" in said and "@2" in said
    assert "none of the 6 samples" in refused("--where", "caption=cat")
    assert f"none of the 9 samples in {t2v_shards}, {others}" in refused(
        "--shards", str(others), "--where", "frames>99"
    )
    assert "has no manifest.json" in refused("--shards", str(tmp_path / "nowhere"))
    assert "no full batch of 2" in refused("--where", "source=clip0*", "--tail", "drop")


def test_folders_that_do_not_fit_are_named(
    t2v_shards: Path, dataset: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    other = encode(dataset, tiny_t2v, tmp_path / "fp32", "--dtype", "fp32")
    with pytest.raises(UserError, match=f"latents of {t2v_shards} are bf16, those of {other} fp32"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", *SHORT, "--shards", str(other))


def test_samples_in_two_folders_are_told(
    t2v_shards: Path, tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(t2v_shards, tmp_path / "copy"))
    more = ("--shards", str(copy), "--dry-run")
    distill(tiny_t2v, t2v_shards, tmp_path / "out", *SHORT, *more)
    printed = capsys.readouterr().out
    assert f"6 samples of {copy} are in a folder before it, too" in printed
    assert json.loads(printed[: printed.rindex("}") + 1])["shards"] == [str(t2v_shards), str(copy)]


@pytest.mark.parametrize(
    ("text", "folder", "weight"),
    [
        ("shards", "shards", Fraction(1)),
        ("shards@3", "shards", Fraction(3)),
        ("a/b@0.5", "a/b", Fraction(1, 2)),
        ("a/b@1/3", "a/b", Fraction(1, 3)),
        ("v@2@1", "v@2", Fraction(1)),
        ("me@work/shards", "me@work/shards", Fraction(1)),
        ("C:/data/shards@1.5", "C:/data/shards", Fraction(3, 2)),
        ("file:///data/shards@2", "/data/shards", Fraction(2)),
    ],
)
def test_weights_are_read(text: str, folder: str, weight: Fraction) -> None:
    assert weighted_folder(text) == WeightedFolder(Path(folder), weight)


@pytest.mark.parametrize("weight", ["0", "1001", "0.0001", "1/0", "1.2.3", "1/2001"])
def test_what_is_no_weight_is_refused(weight: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        UserError, match=re.escape(f"'shards@{weight}' ends in the weight '{weight}'")
    ):
        weighted_folder(f"shards@{weight}")
    with pytest.raises(SystemExit) as ended:
        wantrain(["distill", "--shards", f"shards@{weight}", *SMALL])
    assert ended.value.code == 2
    assert f"weight '{weight}'" in " ".join(capsys.readouterr().err.split())

"""Names that globs, weights, strengths and shells take for something else, in what trains."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from preprocess.cli.app import app as wanprep
from shared.cache.index import fresh_index
from shared.cache.writer import ShardWriter
from shared.cli.support import run
from shared.format.cache import CacheIndex, MemberReader, open_cache
from shared.format.schema import Sample, SampleInfo, sample_key
from shared.io.store import Store
from tests.train.methods.test_finetune import SMALL
from train.cli.app import app
from train.data.filters import condition, select
from train.data.weighted_folder import WeightedFolder, weighted_folder
from train.saving.checkpoint import list_checkpoints, remove_oldest

PAIRS = {  # a source → another that it would fit as a pattern
    "a[1].mp4": "a1.mp4",
    "a*b.mp4": "axb.mp4",
    "what?.mp4": "whatx.mp4",
    "[abc].mp4": "b.mp4",
    "{1,2}.mp4": "1.mp4",
    "a b$(x)'\".mp4": "ab.mp4",
    "ü.mp4": "u\u0308.mp4",
    "new\nline.mp4": "new line.mp4",
    "100%.mp4": "100.mp4",
}
NAMES = [*PAIRS, *PAIRS.values()]


def wantrain(*arguments: object) -> None:
    run(lambda: app([str(argument) for argument in arguments], standalone_mode=False))


def write(folder: Path, names: list[str]) -> CacheIndex:
    """A cache with an image of each source; its tag and its caption are the name, too."""
    folder.mkdir()
    writer = ShardWriter(Store(folder), {"format": 1, "mode": "t2v"}, shard_bytes=8_000)
    for name in names:
        info = SampleInfo(
            caption=name, type="image", source=name, width=16, height=16, frames=1,
            frame_indices=[0], fps=None, source_width=16, source_height=16, tags=[name, "every"],
        )  # fmt: skip
        latents, text = torch.ones(2, 1, 2, 2), torch.ones(1, 4)
        writer.add(Sample(key=sample_key(name, {}, 0), info=info, latents=latents, text=text))
    writer.close()
    return fresh_index(Store(folder))


def chosen(indexes: list[CacheIndex], *conditions: str) -> list[set[str]]:
    """Sources of each cache that are selected."""
    found = []
    for index, mask in zip(indexes, select(indexes, list(map(condition, conditions))), strict=True):
        reader = MemberReader(index)
        found.append({reader.info(int(row))["source"] for row in mask.nonzero()[0]})
        reader.close()
    return found


@pytest.mark.parametrize("field", ["source", "caption", "tag"])
def test_where_takes_a_value_that_a_sample_has_as_it_is(field: str, tmp_path: Path) -> None:
    index = write(tmp_path / "shards", NAMES)
    for name in PAIRS:
        assert chosen([index], f"{field}={name}") == [{name}], name
        assert chosen([index], f"{field}!={name}") == [{*NAMES} - {name}], name
        assert chosen([index], f"{field}={name}", f"{field}={name}") == [{name}]
    assert chosen([index], f"{field}=*[1]*") == [{"a[1].mp4"}]
    assert chosen([index], f"{field}!=*.mp4") == [set()]
    assert chosen([index], f"{field}=[ab]*") == [set()]
    assert chosen([index], f"{field}=a?.mp4") == [{"a1.mp4", "ab.mp4"}]
    # A name that another condition leaves out is a name all the same.
    assert chosen([index], f"{field}=a*b.mp4", "frames>1") == [set()]
    assert chosen([index], "tag=every", f"{field}=what?.mp4") == [{"what?.mp4"}]


def test_a_value_that_any_of_several_caches_has_is_no_pattern(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one", ["axb.mp4", "y.mp4"]), write(tmp_path / "two", ["a*b.mp4"])
    assert chosen([one], "source=a*b.mp4") == [{"axb.mp4"}]
    assert chosen([one, two], "source=a*b.mp4") == [set(), {"a*b.mp4"}]
    assert chosen([one, two], "source!=a*b.mp4") == [{"axb.mp4", "y.mp4"}, set()]


def test_a_value_may_begin_as_an_operator_does(tmp_path: Path) -> None:
    names = ["~x.mp4", "=x.mp4", "<x>.mp4", "!x.mp4"]
    index = write(tmp_path / "shards", names)
    for name in names:
        assert chosen([index], f"source= {name}") == [{name}]
        with pytest.raises(ValueError, match=r"has a space before it, as in 'source= ~a'"):
            condition(f"source={name}")


def test_a_folder_that_is_there_has_no_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("shards", "out[1]@2", "set@1/3"):
        Path(name).mkdir(parents=True)
    for text in ("out[1]@2", "set@1/3"):
        assert weighted_folder(text) == WeightedFolder(Path(text))
        assert weighted_folder(str(weighted_folder(text))) == weighted_folder(text)
        assert weighted_folder(f"{text}@3") == WeightedFolder(Path(text), 3)  # type: ignore[arg-type]
    assert weighted_folder("shards@2") == WeightedFolder(Path("shards"), 2)  # type: ignore[arg-type]
    gone = WeightedFolder(Path("gone@2"))
    assert weighted_folder(str(gone)) == gone


def test_only_checkpoints_are_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run [1]*"
    ours = [f"checkpoint-{number}" for number in (1, 2, 3)]
    others = ["checkpoint-mine", "checkpoint-mine.removed", "checkpoint-2.bak"]
    for name in (*ours, *others, "checkpoint-0.removed"):
        (folder / name).mkdir(parents=True)
    remove_oldest(folder, 1)
    assert sorted(path.name for path in folder.iterdir()) == sorted(["checkpoint-3", *others])
    assert list_checkpoints(folder) == [folder / "checkpoint-3"]


def test_a_run_in_folders_of_such_names(
    t2v_shards: Path, tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained, resumed, on a LoRA, exported, decoded: as in folders of plain names."""
    monkeypatch.chdir(tmp_path)
    shards = Path(shutil.copytree(t2v_shards, tmp_path / "-in [1]*{a,b}@2"))

    def train(shards: object, output: str, steps: int, *more: str) -> None:
        wantrain(
            *("lora", "--model", tiny_t2v, "--shards", shards, "--output-dir", output),
            *("--boundary-type", "low", "--max-train-steps", steps, *SMALL, *more),
        )

    def lora(output: str) -> bytes:
        return (Path(output) / "lora-low-diffusers.safetensors").read_bytes()

    train(shards.name, "-run [1]*", 1)
    train(shards.name, "-run [1]*", 2, "--resume-from-checkpoint", "latest")
    train(t2v_shards, "plain", 2)
    assert lora("-run [1]*").split(b"blocks.0", 1)[1] == lora("plain").split(b"blocks.0", 1)[1]
    assert [p.name for p in list_checkpoints(Path("-run [1]*"))] == ["checkpoint-1", "checkpoint-2"]

    shutil.copy("plain/lora-low-diffusers.safetensors", "-l*[0].safetensors")
    watched = ("--base-lora", "-l*[0].safetensors:0.5", "--validation-steps", "1")
    train(shards.name, "%03d -rf", 1, *watched)
    clips = Path("%03d -rf/validation")
    export = ("export", "--checkpoint", "-run [1]*/checkpoint-2", "--to", "kohya")
    wantrain(*export, "--output", "-x[1].safetensors")
    assert Path("-x[1].safetensors").is_file()
    wantrain("decode", "--model", tiny_t2v, "--latents", clips, "--output", "-%d [1]")
    assert len(list(Path("-%d [1]").iterdir())) > 1


def test_a_cure_can_be_pasted(
    t2v_shards: Path, tiny_t2v: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = Path(shutil.copytree(t2v_shards, tmp_path / "in [1]*{a,b} $(x)'"))
    (shards / "manifest.json").unlink()
    command = ("lora", "--model", tiny_t2v, "--shards", shards, "--boundary-type", "low")
    with pytest.raises(SystemExit):
        wantrain(*command, "--output-dir", tmp_path / "out", "--dry-run", *SMALL)
    cure = re.search(r"Rebuild it: wanprep (.*)", capsys.readouterr().err)
    assert cure is not None
    wanprep(shlex.split(cure[1]), standalone_mode=False)
    assert len(open_cache(Store(shards))) == len(open_cache(Store(t2v_shards)))

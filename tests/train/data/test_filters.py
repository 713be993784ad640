"""`--where`: what it chooses, from real shards; what it refuses."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from preprocess.cli.app import app as wanprep
from shared.cache.index import fresh_index
from shared.cache.writer import ShardWriter
from shared.errors import UserError
from shared.format.cache import CacheIndex, MemberReader, open_cache
from shared.format.overlays import with_captions
from shared.format.schema import LATENTS_MEMBER, Sample, SampleInfo, sample_key
from shared.io.store import Store
from train.data.filters import condition, nothing_selected, select

CAPTIONS = ["a cat on a roof", "a dog\nin the rain", "two cats [wet]", "Cat people", "grün, 猫"]
TAGS = [["good", "night"], [], ["good"], ["goodish"], ["bad"]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty samples in three buckets and several shards, written by the real writer."""
    folder = tmp_path_factory.mktemp("where") / "shards"
    folder.mkdir()
    fingerprint = {"format": 1, "mode": "t2v"}
    writer = ShardWriter(Store(folder), fingerprint, shard_bytes=8_000)
    for number in range(30):
        high, wide, frames = ((32, 48, 9), (48, 32, 17), (32, 48, 1))[number % 3]
        image = frames == 1
        info = SampleInfo(
            caption=CAPTIONS[number % 5], type="image" if image else "video",
            source=f"{'clips' if number < 12 else 'drafts'}/{number}.mp4",
            width=wide, height=high, frames=frames, frame_indices=list(range(frames)),
            fps=None if image else 16.0, source_width=wide, source_height=high,
            tags=TAGS[number % 5],
        )  # fmt: skip
        latents = torch.full((2, (frames - 1) // 4 + 1, high // 8, wide // 8), float(number))
        text = torch.zeros(5 + number, 8)
        key = sample_key(str(number), {}, 0)
        writer.add(Sample(key=key, info=info, latents=latents, text=text))
    writer.close()
    assert len(fresh_index(Store(folder)).shards) > 3
    return folder


def chosen(index: CacheIndex, *conditions: str) -> set[int]:
    """Numbers of the samples that are selected, as their latents have them."""
    reader = MemberReader(index)
    (mask,) = select([index], [condition(text) for text in conditions])
    rows = mask.nonzero()[0]
    found = [reader.read(int(row), LATENTS_MEMBER) for row in rows]
    reader.close()
    return {int(tensors["latents"][0, 0, 0, 0]) for tensors in found if tensors}


def these(*remainders: int, of: int = 5) -> set[int]:
    return {number for number in range(30) if number % of in remainders}


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        ((), set(range(30))),
        (("frames>=9",), these(0, 1, of=3)),
        (("frames > 9",), these(1, of=3)),
        (("frames!=9",), these(1, 2, of=3)),
        (("width>height",), these(0, 2, of=3)),
        (("height<=width", "frames=1"), these(2, of=3)),
        (("tokens<8",), {0, 1, 2}),
        (("type=image",), these(2, of=3)),
        (("type!=image",), these(0, 1, of=3)),
        (("bucket=48x32x9",), these(0, of=3)),
        (("bucket=48x*",), these(0, 2, of=3)),
        (("bucket~=x9$",), these(0, of=3)),
        (("caption~=cat",), these(0, 2)),
        (("caption~=(?i)cat|猫",), these(0, 2, 3, 4)),
        (("caption=*cat*",), these(0, 2)),
        (("caption!=*cat*",), these(1, 3, 4)),
        (("caption=a dog*rain",), these(1)),
        (("caption=*[wet]",), these(2)),
        (("caption=Cat people",), these(3)),
        (("caption = Cat people ",), these(3)),
        (("tag=good",), these(0, 2)),
        (("tag=good*",), these(0, 2, 3)),
        (("tag!=good",), these(1, 3, 4)),
        (("tag~=^(bad|night)$",), these(0, 4)),
        (("source=clips/*",), set(range(12))),
        (("source=clips/*", "tag=good", "frames>1"), {0, 7, 10, 12} & set(range(12))),
        (("tag=good", "tag!=night"), these(2)),
    ],
)  # fmt: skip
def test_chooses(cache: Path, conditions: tuple[str, ...], expected: set[int]) -> None:
    index = open_cache(Store(cache))
    assert chosen(index, *conditions) == expected
    assert chosen(index, *conditions) == expected  # remembered


def test_what_is_remembered_is_of_these_shards_and_checked(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDISTILL_CACHE", str(tmp_path))
    index = open_cache(Store(cache))
    assert chosen(index, "tag=good") == these(0, 2)
    (memo,) = (tmp_path / "where").iterdir()
    whole = memo.read_bytes()
    reads: list[int] = []
    monkeypatch.setattr(MemberReader, "info", lambda self, row: reads.append(row))
    assert chosen(index, "tag=good") == these(0, 2) and not reads
    monkeypatch.undo()
    monkeypatch.setenv("WANDISTILL_CACHE", str(tmp_path))
    for damaged in (whole[:-1], whole[:-1] + b"\xff", b""):
        memo.write_bytes(damaged)
        assert chosen(index, "tag=good") == these(0, 2)
        assert memo.read_bytes() == whole
    (mask,) = select([index], [condition("tag=good")])
    first = index.key(int(mask.argmax()))
    copy = tmp_path / "copy"

    shutil.copytree(cache, copy)
    wanprep(["remove", "--sample", first, "--shards", str(copy)], standalone_mode=False)
    assert len(chosen(open_cache(Store(copy)), "tag=good")) == len(these(0, 2)) - 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat", "expected FIELD, an operator and a value"),
        ("", "expected FIELD, an operator and a value"),
        ("captions~=cat", "has the field 'captions'; expected FIELD.*caption, source, tag, type"),
        ("caption>cat", "operator '>'; for caption there are = != ~="),
        ("caption==cat", "operator '=='"),
        ("frames~=9", "operator '~='; for frames there are = != < <= > >="),
        ("frames>many", "compares frames with 'many', expected a whole number or one of height"),
        ("frames>=8.5", "compares frames with '8.5'"),
        ("frames>=", "compares frames with ''"),
        ("width>type", "compares width with 'type'"),
        ("caption~=(cat", r"no regular expression after ~= \(missing \)"),
        ("type=movie", "fits no type; types are video, image, text"),
    ],
)
def test_what_is_no_condition_is_refused_with_what_there_is(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        condition(text)
    assert str(caught.value).startswith("--where: ")


def test_nothing_selected_says_what_there_is(cache: Path) -> None:
    index = open_cache(Store(cache))
    texts = ("tag=good", "caption=cat", "type=text", "frames>=81", "bucket=832x*")
    said = str(nothing_selected([index], [condition(text) for text in texts]))
    assert said.startswith(f"--where: none of the 30 samples in {cache} fulfils all of:")
    assert "tag=good  (fits 12; there are good (12), bad (6), goodish (6), night (6))" in said
    assert "caption=cat  (fits 0; e.g. '" in said and "caption=*cat*" in said
    assert "type=text  (fits 0; there are video (20), image (10))" in said
    assert "frames>=81  (fits 0; frames is 1 … 17)" in said
    assert "48x32x9 (10)" in said


def test_the_caption_that_is_trained_on_is_what_counts(
    dataset: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:

    shards = Path(shutil.copytree(t2v_shards, tmp_path / "shards"))
    listed = tmp_path / "captions.jsonl"
    listed.write_text(json.dumps({"file_path": "clip0.mp4", "text": "the sea"}))
    wanprep(
        [
            *("recaption", "--name", "new", "--shards", str(shards), "--model", str(tiny_t2v)),
            *("--train-data-dir", str(dataset), "--train-data-meta", str(listed)),
            *("--device", "cpu"),
        ],
        standalone_mode=False,
    )
    own = open_cache(Store(shards))
    index = with_captions(own, "new")

    def number(index: CacheIndex, *texts: str) -> int:
        (mask,) = select([index], [condition(text) for text in texts])
        return int(mask.sum())

    assert number(own, "caption~=waves") == 5 and number(own, "caption=the sea") == 0
    assert number(index, "caption~=waves") == 4 and number(index, "caption=the sea") == 1
    assert number(index, "caption=the sea", "source=clip0*") == 1
    assert number(index, "caption=the sea", "source=clip1*") == 0


def test_a_damaged_sample_is_named(cache: Path, tmp_path: Path) -> None:

    copy = Path(shutil.copytree(cache, tmp_path / "copy"))
    index = open_cache(Store(copy))
    shard, offset, _ = index.place(3, "json")
    shard.chmod(0o644)
    data = bytearray(shard.read_bytes())
    data[offset] = ord("[")
    shard.write_bytes(bytes(data))
    with pytest.raises(UserError, match=f"sample {index.key(3)}: json is damaged"):
        select([index], [condition("caption~=damaged, so it is not remembered")])

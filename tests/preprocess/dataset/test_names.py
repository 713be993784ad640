"""Names that shells, globs, markup and terminals take for something else: each is itself, in every
command; patterns are asked for by * and ? alone."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from markupsafe import escape
from PIL import Image

from preprocess.dataset.entries import load_dataset
from preprocess.dataset.toml_config import load_dataset_config
from shared.format.cache import committed_tombstones
from shared.format.overlays import with_captions
from shared.io.names import matcher, on_lines, on_one_line
from tests.object_store import BUCKET, ObjectStore, another_machine
from tests.preprocess.conftest import Cache, Ran, render_clip, wanprep

COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "ü.png") for form in ("NFC", "NFD"))
PAIRS = {  # a name → another that it would fit, taken for a pattern or for markup
    "a[1].png": "a1.png",
    "[abc].png": "b.png",
    "a*b.png": "axb.png",
    "what?.png": "whatx.png",
    "{1,2}.png": "1.png",
    "[!x].png": "y.png",
    COMPOSED: DECOMPOSED,
}
ODD = [
    *("100%.png", "%03d.png", "#1.png", "a b$(x)'\".png", "-rf.png", "[red]x[bold].png", "~x.png"),
    *(
        "~/x.png",
        ":dog:.png",
        "<b>&amp;.png",
        "new\nline.png",
        "esc\x1b[31m.png",
        "back\\slash.png",
    ),
    *(" lead.png", "trail .png", "a;b|c.png", "=x.png", "a@5.png", "deep/[red]x[/red].png"),
]
NAMES = [*PAIRS, *PAIRS.values(), *ODD]
FOLDER = "in [1]*?{a,b} $(x)'"
SHARDS = "out [1]*?{a,b} $(x)'@2"


def command(model: Path, data: object, output: object, *more: object) -> tuple[object, ...]:
    options = ("--model", model, "--train-data-dir", data, "--output", output)
    settings = ("--size", 64, "--dtype", "fp32", "--device", "cpu", "--num-workers", 1)
    return ("encode", *options, *settings, *more)


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), (6 * number, 255 - 6 * number, 90)).save(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("names") / FOLDER
    for number, name in enumerate(NAMES):
        picture(folder / name, number)
        (folder / name).with_suffix(".txt").write_text(f"picture {number}")
    return folder


@pytest.fixture(scope="module")
def encoded(data: Path, tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("encoded") / SHARDS
    ran = wanprep(*command(tiny_t2v, data, output))
    assert ran.code == 0, ran.err
    assert f"next: wantrain distill --shards {shlex.quote(str(output))}\n" in ran.out
    assert sources(output) == sorted(NAMES)
    return output


@pytest.fixture
def shards(encoded: Path, tmp_path: Path) -> Path:
    """A copy that may be changed."""
    return Path(shutil.copytree(encoded, tmp_path / SHARDS))


def sources(folder: Path) -> list[str]:
    cache = Cache.open(folder)
    return sorted(cache.info(row)["source"] for row in range(len(cache.index)))


def key_of(folder: Path, source: str) -> str:
    cache = Cache.open(folder)
    return cache.index.key(cache.row(source=source))


# wanprep remove


def test_remove_takes_a_name_as_it_is(shards: Path) -> None:
    left = sorted(NAMES)
    for name in [*PAIRS, *ODD]:
        key = key_of(shards, name)
        ran = wanprep("remove", "--shards", shards, "--sample", name)
        assert ran.code == 0, (name, ran.err)
        left.remove(name)
        assert sources(shards) == left, name
        listed, *notes, will, done, after = ran.out.splitlines()
        assert listed == f"{key}  {on_one_line(name)}"
        assert will == "1 sample will be removed"
        assert done == f"1 sample removed, {len(left)} left in {shards}"
        assert shlex.split(after)[-7:-5] == ["--shards", f"{shards},"]
        assert [
            note for note in notes if "is the name of a file, so no pattern: " not in note
        ] == []
        assert bool(notes) == (name in ("a*b.png", "what?.png"))
        again = wanprep("remove", "--shards", shards, "--sample", name)  # a retry takes no other
        assert again.code == 1 and "Nothing was removed" in again.err
        assert sources(shards) == left, name
    assert left == sorted(PAIRS.values())


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("a?.png", ["a1.png"]),
        ("a[*", ["a[1].png"]),
        ("[a*", ["[abc].png"]),
        ("*~/*", ["~/x.png"]),
        ("*x.p?g", [n for n in NAMES if n.endswith("x.png")]),
        ("deep*red].png", ["deep/[red]x[/red].png"]),
        ("new?line*", ["new\nline.png"]),
        ("{1,2}*", ["{1,2}.png"]),
        ("back\\*", ["back\\slash.png"]),
        ("*", NAMES),
    ],
)
def test_patterns_of_remove(encoded: Path, pattern: str, fits: list[str]) -> None:
    """* and ? alone are special, and only where no file is named so."""
    ran = wanprep("remove", "--shards", encoded, "--sample", pattern, "--dry-run")
    assert ran.code == 0, ran.err
    *listed, last = ran.out.splitlines()
    assert sorted(line.split("  ", 1)[1] for line in listed) == sorted(map(on_one_line, fits))
    number = "1 sample" if len(fits) == 1 else f"{len(fits)} samples"
    assert last == f"{number} would be removed; nothing was"
    assert not committed_tombstones(encoded)


@pytest.mark.parametrize("name", ["[ab].png", "a[0-9].png", "", "b.pn", "B.png", "zz*", "./b.png"])
def test_where_a_name_fits_nothing_nothing_is_removed(shards: Path, name: str) -> None:
    ran = wanprep("remove", "--shards", shards, "--sample", "b.png", "--sample", name)
    assert ran.code == 1 and ran.out == ""
    assert f"remove: {name!r} is no key and fits no source of the {len(NAMES)} samples" in ran.err
    assert "Nothing was removed" in ran.err
    assert not committed_tombstones(shards)


def test_the_other_form_of_a_letter_is_another_name(shards: Path) -> None:
    assert wanprep("remove", "--shards", shards, "--sample", DECOMPOSED).code == 0
    assert COMPOSED in sources(shards)
    ran = wanprep("remove", "--shards", shards, "--sample", DECOMPOSED)
    assert ran.code == 1
    assert f"Name it by its key: {key_of(shards, COMPOSED)}" in ran.err
    assert r"'\xfc.png', found 'u\u0308.png'" in ran.err


def test_a_file_goes_with_all_of_its_samples(tiny_t2v: Path, tmp_path: Path) -> None:
    captions = ["one", "two", "three"]
    entries = [{"file_path": f"{n}.png", "captions": captions} for n in ("a?", "ab")]
    for number, entry in enumerate(entries):
        picture(tmp_path / "in" / str(entry["file_path"]), number)
    entries.append({"type": "text", "text": "has no name"})  # type: ignore[dict-item]
    (tmp_path / "in" / "metadata.json").write_text(json.dumps(entries))
    assert wanprep(*command(tiny_t2v, tmp_path / "in", tmp_path / "out")).code == 0
    ran = wanprep("remove", "--shards", tmp_path / "out", "--sample", "a?.png")
    assert "'a?.png' has 3 samples: one for each clip, variant and caption\n" in ran.out
    assert (
        "'a?.png' is the name of a file, so no pattern: 1 other file that it fits stay" in ran.out
    )
    assert "3 samples will be removed\n3 samples removed, 4 left" in ran.out
    assert sources(tmp_path / "out") == ["", "ab.png", "ab.png", "ab.png"]
    # A caption alone has no name that a pattern could fit.
    ran = wanprep("remove", "--shards", tmp_path / "out", "--sample", "*")
    assert sources(tmp_path / "out") == [""]
    key = key_of(tmp_path / "out", "")
    assert wanprep("remove", "--shards", tmp_path / "out", "--sample", "*").code == 1
    assert wanprep("remove", "--shards", tmp_path / "out", "--sample", key).code == 0


def test_what_goes_is_printed_before_it_goes(shards: Path) -> None:
    """Where it can't be printed, nothing goes."""
    reading, writing = os.pipe()
    os.close(reading)
    script = Path(sys.executable).with_name("wanprep")
    command = [script, "remove", "--shards", shards, "--sample", "*"]
    ran = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert ran.returncode != 0 and "Traceback" not in ran.stderr
    assert not committed_tombstones(shards)


# encode --prune, recaption --prune


def test_prune_keeps_what_a_list_names_but_cannot_use(tiny_t2v: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = ("a.png", "sub/b.png", "c.png", "d.png", "gone.png")
    for number, name in enumerate(names):
        picture(folder / name, number)
    listed = {"a.png": "./a.png", "sub/b.png": "x/../sub/b.png", "c.png": str(folder / "c.png")}
    (folder / "x").mkdir()

    def encode(captions: str, *more: object) -> Ran:
        entries = [{"file_path": f, "text": captions} for f in listed.values()]
        entries += [{"file_path": n, "text": "fine"} for n in names if n not in listed]
        (folder / "metadata.json").write_text(json.dumps(entries[: 4 if more else 5]))
        return wanprep(*command(tiny_t2v, folder, tmp_path / "out", *more))

    assert encode("whole").code == 0
    assert sources(tmp_path / "out") == sorted(names)
    ran = encode("", "--prune", "--max-bad", 3)
    assert ran.code == 0 and "1 sample removed" in ran.out, ran.err
    assert sources(tmp_path / "out") == sorted(names[:4])


def test_prune_keeps_samples_of_tars_whose_caption_is_gone(tiny_t2v: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("[1]", "1", "2")):
        picture(tmp_path / f"{name}.png", number)
        (tmp_path / f"{name}.txt").write_text("caption")

    def tar(*names: str) -> Path:
        path = tmp_path / "in" / "x[0]*.tar"
        path.parent.mkdir(exist_ok=True)
        with tarfile.open(path, "w") as archive:
            for name in names:
                archive.add(tmp_path / name, arcname=name)
        return path

    every = [f"{name}.{ending}" for name in ("[1]", "1", "2") for ending in ("png", "txt")]
    assert wanprep(*command(tiny_t2v, tar(*every), tmp_path / "out")).code == 0
    assert len(sources(tmp_path / "out")) == 3
    data = tar("[1].png", "1.png", "1.txt")
    ran = wanprep(*command(tiny_t2v, data, tmp_path / "out", "--prune", "--max-bad", 1))
    assert ran.code == 0 and "1 sample removed" in ran.out, ran.err
    assert sources(tmp_path / "out") == ["x[0]*.tar/1.png", "x[0]*.tar/[1].png"]


# Lists, folders, tars, TOML: the same samples, so nothing is left to encode.


def _as_json(folder: Path) -> Path:
    entries = [{"file_path": n, "text": f"picture {i}"} for i, n in enumerate(NAMES)]
    (folder / "list.json").write_text(json.dumps(entries))
    return folder / "list.json"


def _as_json_lines(folder: Path) -> Path:
    lines = [json.dumps({"file_name": n, "text": f"picture {i}"}) for i, n in enumerate(NAMES)]
    (folder / "list.jsonl").write_text("\n".join(lines))
    return folder / "list.jsonl"


def _as_csv(folder: Path) -> Path:
    rows = [f'"{n.replace(chr(34), chr(34) * 2)}",picture {i}' for i, n in enumerate(NAMES)]
    (folder / "list.csv").write_text("\n".join(["file_path,text", *rows]), newline="")
    return folder / "list.csv"


@pytest.mark.parametrize("write", [_as_json, _as_json_lines, _as_csv])
def test_lists(
    write: Callable[[Path], Path], data: Path, encoded: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    listed = write(tmp_path)
    ran = wanprep(*command(tiny_t2v, data, encoded, "--train-data-meta", listed))
    assert ran.code == 0 and "nothing to do" in ran.out and "leftover" not in ran.err, ran.err
    found = load_dataset(data, listed)
    assert [entry.source for entry in found.entries] == NAMES and not found.rejected


def test_tars(data: Path, encoded: Path, tiny_t2v: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tars {a,b} [1]*"
    folder.mkdir()
    tars = ["x[0]*.tar", "x0z.tar", "{1,2}.tar", "1.tar"]
    for number, tar in enumerate(tars):
        with tarfile.open(folder / tar, "w") as archive:
            for name in NAMES[number :: len(tars)]:
                for path in (data / name, (data / name).with_suffix(".txt")):
                    archive.add(path, arcname=path.relative_to(data).as_posix())
    ran = wanprep(*command(tiny_t2v, folder, encoded))
    assert ran.code == 0 and "nothing to do" in ran.out and "leftover" not in ran.err, ran.err

    def named(pattern: str) -> set[str]:
        entries = load_dataset(folder / pattern, None).entries
        return {entry.source.split("/")[0] for entry in entries}

    assert named("x[0]*.tar") == {"x[0]*.tar"}
    assert named("{1,2}.tar") == {"{1,2}.tar"}
    assert named("x*.tar") == {"x[0]*.tar", "x0z.tar"}
    assert named("x?z.tar") == {"x0z.tar"}
    assert named("{x0z,1}.tar") == {"x0z.tar", "1.tar"}
    assert named("{x0z,x[0]*}.tar") == {"x0z.tar", "x[0]*.tar"}
    (folder / "deep").mkdir()
    (folder / "1.tar").rename(folder / "deep" / "1.tar")
    assert named("x**.tar") == {"x[0]*.tar", "x0z.tar"}
    assert named("**/1.tar") == {"deep"}  # `**` is `*`: one folder
    many = ",".join(f"none{number:03d}" for number in range(60))
    assert named(f"{{{many},x0z}}.tar") == {"x0z.tar"}
    assert named(f"{{{many},deep}}/*.tar") == {"deep"}
    gone = load_dataset(folder / "x[0]z.tar", None)  # no class of characters
    assert not gone.entries and gone.rejected[0].source == "x[0]z.tar"


def test_a_toml_file_names_folders_as_they_are(tmp_path: Path) -> None:
    folders = ["a[1]", "a1", "~nobody", "{x,y}*", "-rf"]
    for number, name in enumerate(folders):
        picture(tmp_path / name / "p.png", number)
        (tmp_path / name / "p.txt").write_text(name)
    config = tmp_path / "sets.toml"
    config.write_text("".join(f"[[datasets]]\npath = '{name}'\n" for name in folders))
    found = load_dataset_config(config)
    assert [entry.caption for entry in found.entries] == folders


def test_recaption_finds_each_file_by_its_name(
    data: Path, shards: Path, tiny_t2v: Path, tmp_path: Path
) -> None:
    entries = [{"file_path": name, "text": f"now {name!a}"} for name in reversed(NAMES)]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    run = (
        *("recaption", "--name", "new", "--shards", shards, "--model", tiny_t2v),
        *("--train-data-dir", data, "--train-data-meta", tmp_path / "list.json"),
        *("--device", "cpu"),
    )
    ran = wanprep(*run)
    assert ran.code == 0, ran.err
    assert f"--shards {shlex.quote(str(shards))}\n" in ran.out

    def captions() -> dict[str, str]:
        overlay = with_captions(Cache.open(shards).index, "new").overlays["text.safetensors"]
        there = Cache(overlay.index.folder, overlay.index)
        infos = [there.info(row) for row in range(len(there.index))]
        return {info["source"]: info["caption"] for info in infos}

    assert captions() == {name: f"now {name!a}" for name in NAMES}
    # An entry that can't be used today was not taken out; one that is not there was.
    entries = [{"file_path": f"./{name}", "text": ""} for name in NAMES[:2]] + entries[:-3]
    (tmp_path / "list.json").write_text(json.dumps(entries))
    assert "1 caption removed" in wanprep(*run, "--prune").out
    assert captions().keys() == {*NAMES} - {NAMES[2]}


def test_names_in_a_store(store: ObjectStore, tiny_t2v: Path, tmp_path: Path) -> None:
    """There `?`, `#` and `%` are letters, and a name may begin with ~."""
    folder = tmp_path / "in"
    names = ["#1.mp4", "what?.mp4", "whatx.mp4", "100%41.mp4", "~x.mp4", "~/[1].mp4", "a*b.mp4"]
    (folder / "~").mkdir(parents=True)
    for number, name in enumerate(names):
        render_clip(folder / name, height=64, width=64, frames=5, seed=number)
    entries = [{"file_path": name, "text": name} for name in names]
    (folder / "metadata.json").write_text(json.dumps(entries))
    short = ("--video-sample-n-frames", 5, "--video-sample-stride", 1)
    assert wanprep(*command(tiny_t2v, folder, tmp_path / "local", *short)).code == 0
    with another_machine(tmp_path / "cache", **store.environment):
        url = store.upload(folder, "names/[1]")
        ran = wanprep(*command(tiny_t2v, url, tmp_path / "out", *short))
        assert ran.code == 0, ran.err
        assert sources(tmp_path / "out") == sorted(names)
        assert Cache.open(tmp_path / "out").contents() == Cache.open(tmp_path / "local").contents()
        listed = f"s3://{BUCKET}/names/[1]/metadata.json"
        again = wanprep(
            *command(tiny_t2v, url, tmp_path / "out", *short), "--train-data-meta", listed
        )
        assert "nothing to do" in again.out, again.err


# What is printed.


def test_what_is_printed_are_the_names(encoded: Path, data: Path, tmp_path: Path) -> None:
    ran = wanprep("inspect", "--shards", encoded, "--html", tmp_path / "x.html", "--samples", 99)
    assert ran.code == 0 and ran.out.splitlines()[0] == str(encoded)
    page = (tmp_path / "x.html").read_text()
    assert all(f'<p class="source">{escape(name)}</p>' in page for name in NAMES)
    assert "<b>&amp;" not in page
    ran = wanprep("verify", "--shards", encoded)
    assert ran.code == 0 and f"{encoded}: {len(NAMES)} samples in" in ran.out


def test_progress_and_rejections_show_names_as_they_are(tiny_t2v: Path, tmp_path: Path) -> None:
    folder = tmp_path / ":cat: [red]"
    picture(folder / "good.png", 1)
    (folder / "good.txt").write_text("good")
    for name in ("[red]x[bold].png", ":dog:.png", "e\x1b[31m\u2028\u202e\n.png"):
        (folder / name).write_bytes(b"no picture")
        (folder / name).with_suffix(".txt").write_text("bad")
    ran = wanprep(*command(tiny_t2v, folder, tmp_path / "out"))
    assert ran.code == 1
    assert f"dataset  {folder}: 4 usable\n" in ran.err
    for name in ("[red]x[bold].png", ":dog:.png", "e�[31m���.png"):
        assert f"\n  {name}: {folder}/{name[:4]}" in ran.err
    assert not {"\x1b", "\u2028", "\u202e"} & set(ran.err)
    # For programs, what the file has.
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().split("\n")[:-1]
    assert any(json.loads(line)["source"] == "e\x1b[31m\u2028\u202e\n.png" for line in lines)


def test_a_cure_can_be_pasted(shards: Path) -> None:
    (shards / "manifest.json").unlink()
    ran = wanprep("inspect", "--shards", shards)
    found = re.search(r"Rebuild it: wanprep (.*)", ran.err)
    assert ran.code == 1 and found
    assert wanprep(*shlex.split(found[1])).code == 0
    assert sources(shards) == sorted(NAMES)


def test_patterns_and_what_a_terminal_obeys() -> None:
    assert matcher("a*/[b]?")("a/c/[b]x") and not matcher("a*/[b]?")("a/c/bx")
    assert matcher("*\n?")("a\nb") and not matcher("a")("a\n")
    assert on_lines("a\tb\nc\x00\x9b\ud800") == "a\tb\nc���"
    kept = (
        "naïve 猫 \u3000\u202f👩\u200d👧 [x] :cat:"  # spaces and joiners are no control characters
    )
    assert on_one_line(kept) == on_lines(kept) == kept

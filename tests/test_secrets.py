"""No password, key or token of a user gets into what a command writes or prints."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import s3fs
from PIL import Image

from shared.cli.library_log import LOG_FILE, library_log
from shared.cli.support import run
from shared.io.names import without_secrets
from tests.object_store import BUCKET, ObjectStore, another_machine
from tests.preprocess.conftest import wanprep
from tests.train.conftest import FRAMES, write_dataset
from tests.train.sampling.test_sample import SHAPE
from tests.train.test_distill import SMALL
from train.cli.app import app

KEY, SECRET, TOKEN = (
    "AKIAPLANTEDKEYPLANT1",
    "planted/Secret+0f0f0f0f0f0f0f0f",
    "planted-token-1c1c1c",
)
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET,
    "AWS_SESSION_TOKEN": TOKEN,
    "HF_TOKEN": TOKEN,
    "WANDB_API_KEY": TOKEN,
    "HTTPS_PROXY": f"http://{KEY}:{SECRET}@127.0.0.1:9",
}
LOGIN = f"s3://{KEY}:{SECRET}@bucket/place"
SIGNED = (
    f"https://bucket.example/list.jsonl?X-Amz-Credential={KEY}%2Fs3&X-Amz-Date=1"
    f"&X-Amz-Signature={TOKEN}"
)


def planted(content: bytes) -> list[str]:
    """Those of the secrets that stand there."""
    return [word for word in (KEY, SECRET, TOKEN, "planted") if word.encode() in content]


def leaks(written: Mapping[str, bytes]) -> dict[str, list[str]]:
    return {name: found for name, data in written.items() if (found := planted(data))}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def wantrain(*words: object) -> int:
    """As from a terminal, in this process; the exit code."""
    try:
        run(lambda: app([str(word) for word in words], prog_name="wantrain"))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.fixture
def machine(store: ObjectStore, tmp_path: Path) -> Iterator[ObjectStore]:
    """A machine whose environment holds the secrets."""
    with another_machine(tmp_path / "cache", **(store.environment | ENVIRONMENT)):
        s3fs.S3FileSystem.clear_instance_cache()
        yield store
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.long
def test_credentials_of_the_environment_stay_there(
    machine: ObjectStore, tiny_t2v: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Encode into a bucket, look at it, train from it and judge that; be refused there."""
    dataset, out = write_dataset(tmp_path / "set", clips=2, image=False), tmp_path / "out"
    url = f"s3://{BUCKET}/secrets"
    encode = ("encode", "--model", tiny_t2v, "--train-data-dir", dataset, "--device", "cpu")
    size = ("--size", 64, "--video-sample-n-frames", FRAMES)
    said = [wanprep(*encode, *size, "--output", url)]
    said += [wanprep("inspect", "--shards", url, "--html", tmp_path / "inspect.html")]
    assert [ran.code for ran in said] == [0, 0], said
    train = ("--model", tiny_t2v, "--shards", url, "--output-dir", out, *SMALL)
    train += ("--boundary-type", "low")
    more = ("--max-train-steps", 1, "--validation-prompts", "a cat", "--validation-steps", 1)
    assert wantrain("distill", *train, *more) == 0
    assert wantrain("distill", *train, "--write-config", tmp_path / "written.toml") == 0
    lora = ("--lora", out / "lora-low-diffusers.safetensors", "--prompt", "a cat", "--steps", 1)
    made = ("--output", tmp_path / "evaluated", "--seeds", 1, *SHAPE, "--device", "cpu")
    assert wantrain("evaluate", "--model", tiny_t2v, *lora, *made) == 0
    machine.deny(after=0)
    try:
        said += [wanprep("verify", "--shards", url)]
        assert wantrain("lora", *train, "--output-dir", tmp_path / "other") == 1
    finally:
        machine.deny(after=10**9)
    assert said[-1].code == 1 and "access is denied" in said[-1].err

    printed = "".join(capfd.readouterr())
    assert "access is denied" in printed
    written = files_of(tmp_path)
    names = {
        "run.toml",
        "index.html",
        "metrics.jsonl",
        "written.toml",
        "inspect.html",
        "evaluation.html",
        "state.json",
    }
    assert names <= {Path(name).name for name in written}
    assert {".safetensors", ".mp4"} <= {Path(name).suffix for name in written}
    files = machine.files()
    objects = {path: files.cat_file(path) for path in files.find(f"{BUCKET}/secrets")}
    assert {Path(name).suffix for name in objects} >= {".tar", ".json"}
    texts = {f"output {number}": (ran.out + ran.err).encode() for number, ran in enumerate(said)}
    assert not leaks(written | objects | texts | {"output": printed.encode()})


@pytest.mark.parametrize("url", [LOGIN, SIGNED, f"https://{TOKEN}@host/place"])
@pytest.mark.parametrize(
    "words",
    [
        ("wantrain", "distill", "--shards", "here", "--shards"),
        ("wantrain", "lora", "--output_dir"),
        ("wantrain", "distill", "--write-config", "written.toml", "--shards"),
        ("wantrain", "distill", "--shrads"),
        ("wanprep", "encode", "--train-data-meta"),
        ("wanprep", "encode", "--output"),
        ("wanprep", "verify", "--shards"),
    ],
)
def test_in_a_url_they_are_refused(
    words: tuple[str, ...],
    url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    program, *rest = words
    if program == "wantrain":
        code, err = wantrain(*rest, url), capfd.readouterr().err
    else:
        ran = wanprep(*rest, url)
        code, err = ran.code, ran.out + ran.err
    assert code == 1 and "with a password or signature in its URL" in err
    assert "AWS_ACCESS_KEY_ID" in err and not planted(err.encode())
    assert not list(tmp_path.iterdir())


def test_so_they_are_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In a run file, in the environment, in a file of datasets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.toml").write_text(f'[distill]\nshards = ["shards", "{LOGIN}"]\n')
    (tmp_path / "data.toml").write_text(f'[[datasets]]\nvideo_directory = "{LOGIN}"\n')
    assert wantrain("distill", "--config", "run.toml") == 1
    said = [wanprep("encode", "--dataset-config", "data.toml", "--model", "toy")]
    monkeypatch.setenv("DATASET_NAME", LOGIN)
    said += [wanprep("plan", "--model", "toy")]
    for err in (capfd.readouterr().err, *(ran.err for ran in said)):
        assert "with a password or signature in its URL" in err and not planted(err.encode())
    assert "dataset 1: video_directory: s3://bucket/place" in said[0].err


def test_an_entry_of_a_list_that_holds_some_is_rejected(
    tiny_t2v: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = tmp_path / "list.csv"
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    rows = f"{tmp_path}/red.png,a cat\n{SIGNED},a dog\n{LOGIN}.mp4,a bird\n"
    listed.write_text(f"file_path,text\n{rows}")
    monkeypatch.setenv("WANDISTILL_CACHE", str(tmp_path / "cache"))
    options = ("--model", tiny_t2v, "--train-data-meta", listed, "--size", 64, "--device", "cpu")
    ran = wanprep("encode", *options, "--max-bad", 2, "--output", tmp_path / "shards")
    assert ran.code == 0 and "2 rejected" in ran.out + ran.err, ran.err
    rejected = (tmp_path / "shards" / "rejected.jsonl").read_text()
    assert "https://bucket.example/list.jsonl?X-Amz-Credential=***" in rejected
    assert "its URL holds a password or signature" in rejected
    listed.unlink()
    assert not leaks(files_of(tmp_path)) and not planted((ran.out + ran.err).encode())


def test_what_libraries_log_is_mended(tmp_path: Path) -> None:
    with library_log(tmp_path):
        logging.getLogger("urllib3").warning("no answer of %s", ENVIRONMENT["HTTPS_PROXY"])
    written = (tmp_path / LOG_FILE).read_text()
    assert "no answer of http://127.0.0.1:9" in written and not planted(written.encode())


@pytest.mark.parametrize(
    "text",
    [
        *("s3://bucket/x@1/3", "http://host:8000/x@3", "http://host:8000", "C:\\a", "a@b.c"),
        *("abfs://container@account.dfs.core.windows.net/x", "sftp://user@host/x"),
        *("https://host/a.mp4?v=1&download=true&key=4", "https://host/@user/x", "s3://b/a:b@3"),
        "s3://bucket: no such bucket, ask a@b.c",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize(
    ("text", "without"),
    [
        ("s3://AKIA:a/b+c@bucket/x@3", "s3://bucket/x@3"),
        ("at https://u:p@ss@host:8/x and ftp://u:p@h", "at https://host:8/x and ftp://h"),
        ("https://token@host/x", "https://host/x"),
        ('"http://u:8080@host/b?list=2"', '"http://host/b?list=2"'),
        ("https://h/a?sig=a%2F&se=1#b", "https://h/a?sig=***&se=1#b"),
        ("https://h/?AWSAccessKeyId=A&Signature=b", "https://h/?AWSAccessKeyId=***&Signature=***"),
        ("https://h/a?X-Goog-Signature=b&access_token=c", None),
    ],
)
def test_what_is_one_goes(text: str, without: str | None) -> None:
    expected = without or "https://h/a?X-Goog-Signature=***&access_token=***"
    assert without_secrets(text) == expected

"""`index.html` and `metrics.jsonl` of a run: what they show, when, and what happens to them."""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shared.errors import UserError
from shared.io.toml_file import read_toml
from tests.html_page import Parsed
from tests.train.conftest import encode, write_dataset
from tests.train.methods.test_finetune import finetune
from tests.train.test_distill import arguments, distill, final_bytes
from train.cli.app import app as wantrain
from train.page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, WIDTH, Chart, Curve
from train.tracking.metrics_file import MetricsFile, read_metrics

HOSTILE = '</article><script>alert("x")</script> & <img src=x onerror=alert(1)>'
SECRET = "https://someone:hunter2@host/clip"
RUN = (
    "--boundary-type", "full", "--denoising-step-indices-list", "1000,500", "--report-to", "none",
    "--gauge-batches", "2", "--validation-steps", "2", "--checkpointing-steps", "2",
)  # fmt: skip
RESUME = ("--resume-from-checkpoint", "latest")


@pytest.fixture(scope="module")
def shards(tiny_t2v: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    media = write_dataset(folder / "media", clips=3)
    (media / "clip1.txt").write_text(f"{HOSTILE} {SECRET}")
    (folder / "p.txt").write_text(f"waves --w 48 --h 32 --f 5\n{HOSTILE} --w 32 --h 64 --f 9\n")
    prompts = ("--validation-prompts", str(folder / "p.txt"))
    return encode(media, tiny_t2v, folder / "shards", *prompts)


@pytest.fixture(scope="module")
def whole(tiny_t2v: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    return distill(tiny_t2v, shards, out, "--max-train-steps", "4", *RUN)


def page_of(out: Path) -> str:
    return (out / "index.html").read_text(encoding="utf-8")


def metrics_of(out: Path) -> list[dict[str, float]]:
    return list(map(json.loads, (out / "metrics.jsonl").read_text().splitlines()))


def status_of(out: Path) -> str | None:
    found = re.search(r'<span class="status (\w+)">', page_of(out))
    return found and found[1]


def charts_of(html: str) -> dict[str, list[int]]:
    """Title → points of each curve."""
    figures = re.findall(r"<figure><figcaption>([^<]*)(.*?)</figure>", html, re.DOTALL)
    return {
        title.strip().replace("&#39;", "'"): [
            path.count("M") for path in re.findall(r'class="dots[^"]*" d="([^"]*)"', rest)
        ]
        for title, rest in figures
    }


def test_it_shows_the_run(whole: Path) -> None:
    html, metrics = page_of(whole), metrics_of(whole)
    parsed = Parsed(html)
    assert [record["update"] for record in metrics] == list(range(1, 13))
    assert status_of(whole) == "finished" and 'http-equiv="refresh"' not in html
    assert "4 of 4" in parsed.text and "12 of 12" in parsed.text
    charts = charts_of(html)
    assert charts["Loss: critic"] == [8] and charts["Loss: generator"] == [4]
    assert charts["Learning rate"] == charts["Gradient norm before clipping"] == [8, 4]
    exits = [
        sum(f"gauge/contrast@{t}" in record for record in metrics) for t in ("1000", "833", "923")
    ]
    assert charts["Gauge: contrast"] == [number for number in exits if number]
    tags = [tag for tag, _ in parsed.tags]
    assert tags.count("video") == 2 * 3 and tags.count("article") == tags.count("img") == 4
    options = read_toml(whole / "run.toml")["distill"]
    terms = re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", html)
    assert {name: str(value) for name, value in options.items() if name == "rank"} == {"rank": "4"}
    assert ("rank", "4") in terms and {name for name, _ in terms} >= options.keys()
    for file in (*final_bytes(whole), "checkpoint-2", "checkpoint-4", "metrics.jsonl"):
        assert f"<code>{file}</code>" in html
    assert f"wantrain sample --model {options['model']}" in parsed.text
    assert "to models/loras, then open" in parsed.text


def test_it_needs_nothing_runs_nothing_and_tells_no_secret(whole: Path) -> None:
    html = page_of(whole)
    parsed = Parsed(html)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "form", "a")
        assert not [name for name in attributes if name.startswith("on")]
        assert (attributes.get("src") or "data:").startswith("data:")
    assert "url(" not in html and "@import" not in html and "default-src 'none'" in html
    assert parsed.text.count(HOSTILE) == 2  # a caption and a prompt
    assert "hunter2" not in html and "https://host/clip" in html


def test_resumed_it_shows_each_update_once(
    whole: Path, tiny_t2v: Path, shards: Path, tmp_path: Path
) -> None:
    """What was logged after the checkpoint goes, and so does half a line of a kill."""
    out = tmp_path / "out"
    distill(tiny_t2v, shards, out, "--max-train-steps", "2", *RUN)
    assert status_of(out) == "finished"
    with (out / "metrics.jsonl").open("a") as stream:
        stream.write(json.dumps({"update": 7, "loss/critic": 1e9}) + '\n{"update": 8, "los')
    distill(tiny_t2v, shards, out, "--max-train-steps", "4", *RUN, *RESUME)
    assert final_bytes(out) == final_bytes(whole)
    values = ("update", "loss/critic", "loss/generator", "gauge/contrast")
    assert [[r.get(name) for name in values] for r in metrics_of(out)] == [
        [r.get(name) for name in values] for r in metrics_of(whole)
    ]
    assert charts_of(page_of(out)) == charts_of(page_of(whole))


KILLED = """
import os, signal, sys
import shared.io.durable as durable
real, pages = durable.DurableFile.write, 0

def write(self, data):
    global pages
    pages += self._path.name == "index.html.tmp"
    if pages == 3:
        self._stream.write(data[: len(data) // 2])
        self._stream.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, data)

durable.DurableFile.write = write
import wandistill_cli
wandistill_cli.wantrain()
"""


def test_killed_while_it_is_written_it_is_whole(
    tiny_t2v: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = arguments(tiny_t2v, shards, out, "--max-train-steps", "4", *RUN)
    ran = subprocess.run([sys.executable, "-c", KILLED, *words], capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    html = page_of(out)
    assert html.rstrip().endswith("</html>") and status_of(out) == "training"
    assert 'http-equiv="refresh"' in html and "written when the run ends" in html


def test_a_loss_that_is_no_number(tiny_t2v: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rates = ("--learning-rate", "1e30", "--learning-rate-critic", "1e30")
    with pytest.raises(UserError, match="training stopped before update") as stopped:
        distill(tiny_t2v, shards, out, "--max-train-steps", "4", *RUN, *rates)
    assert status_of(out) == "failed" and str(stopped.value) in Parsed(page_of(out)).text
    done = len(metrics_of(out))
    assert done and sum(map(len, charts_of(page_of(out)).values()))
    assert f"{done} of 12" in page_of(out)


def test_a_page_that_cannot_be_written_ends_no_training(
    whole: Path, tiny_t2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "index.html.tmp").mkdir(parents=True)
    distill(tiny_t2v, shards, out, "--max-train-steps", "4", *RUN)
    assert final_bytes(out) == final_bytes(whole)
    said = capsys.readouterr().err
    assert said.count("warning  index.html can't be written (IsADirectoryError") == 1
    assert len(metrics_of(out)) == 12 and not (out / "index.html").exists()


def test_somebody_else_s_page_stays(
    tiny_t2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "index.html").write_text("<h1>Mine</h1>")
    distill(tiny_t2v, shards, tmp_path, "--max-train-steps", "1", *RUN, "--validation-steps", "0")
    assert page_of(tmp_path) == "<h1>Mine</h1>"
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("somebody else's page is there") == 1


def test_lines_that_a_full_disk_refuses_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, done=0)
    log.log({"loss/lora": 1.0, "grad_norm/lora": float("nan")}, 1)
    path.rename(tmp_path / "kept")
    path.symlink_to("/dev/full")
    log.log({"loss/lora": 2.0}, 2)
    (tmp_path / "kept").replace(path)
    with path.open("a") as stream:
        stream.write('{"update": 2, "lo')  # what a disk that becomes full may leave
    log.log({"loss/lora": 3.0}, 3)
    first = {"update": 1, "loss/lora": 1.0, "grad_norm/lora": None}
    assert read_metrics(path, 9) == [first, {"update": 3, "loss/lora": 3.0}]
    MetricsFile(path, done=1)
    assert metrics_of(tmp_path) == [first]
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match=r"can't write .*there"):
        MetricsFile(tmp_path / "there", done=0)


def test_numbers_of_somebody_else_stay(
    tiny_t2v: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3}\n')
    command = ("--max-train-steps", "1", *RUN, "--validation-steps", "0")
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a run's.* Move it elsewhere"):
        distill(tiny_t2v, shards, tmp_path, *command)
    assert path.read_text() == '{"step": 1, "loss": 3}\n'
    path.unlink()
    (tmp_path / "README.md").mkdir()
    distill(tiny_t2v, shards, tmp_path, *command)
    assert "is not wandistill's: left as it is" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "README.md").is_dir() and metrics_of(tmp_path)


@pytest.mark.parametrize("number", [1, 2, 5000])
def test_a_curve_is_within_its_axes(number: int) -> None:
    rng = np.random.default_rng(number)
    values = [*rng.normal(3e-5, 1e-6, number - 1), 7e-5, float("inf"), None]
    curve = Curve.of("loss", list(enumerate(values, start=1)))
    chart = Chart(title="Loss", curves=[curve], updates=number + 2)
    assert len(curve.values) == number and curve.last == pytest.approx(
        np.mean(curve.values[-curve.window :])
    )
    for drawn, join in ((chart.dots(curve), "h0M"), (chart.path(curve), "L")):
        points = [list(map(float, p.split())) for p in re.sub("^M|h0$", "", drawn).split(join)]
        assert len(points) == min(number, 400)
        assert all(LEFT <= x <= WIDTH - RIGHT and 0 < y < HEIGHT - BOTTOM for x, y in points)
    assert chart.y(7e-5) < chart.y(3e-5) and 2 <= len(chart.y_ticks) <= 6


def test_a_curve_of_one_value_has_axes_too() -> None:
    for value in (0.0, 1.0, -2.5, 1e-12):
        chart = Chart(title="Rate", curves=[Curve.of("rate", [(1, value), (2, value)])], updates=2)
        assert chart.y_ticks and 0 < chart.y(value) <= HEIGHT - BOTTOM


def test_a_plain_lora_shows_what_is_held_out(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    out = finetune(
        tiny_t2v, t2v_shards, tmp_path / "out", "--max-train-steps", "2", "--holdout", "0.4",
        "--holdout-steps", "1", "--report-to", "none",
    )  # fmt: skip
    charts = charts_of(page_of(out))
    assert charts["Loss: lora"] == [2] and charts["Loss: held out"] == [3]
    losses = [json.loads(line)["loss"] for line in (out / "holdout.jsonl").read_text().splitlines()]
    assert f"lowest {min(losses):.4g} after" in page_of(out)


def test_stopped_it_says_how_to_go_on(
    tiny_t2v: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.session import Session

    save = Session.save
    monkeypatch.setattr(Session, "save", lambda self: (save(self), signal.raise_signal(15))[0])
    with pytest.raises(SystemExit):
        wantrain(
            arguments(tiny_t2v, shards, tmp_path / "out", "--max-train-steps", "4", *RUN),
            standalone_mode=False,
        )
    assert status_of(tmp_path / "out") == "stopped"
    assert "--resume-from-checkpoint latest" in page_of(tmp_path / "out")

"""Both experts in one command: the runs of each alone, to the byte, stopped anywhere or not."""

import gc
import json
import os
import signal
import sys
from pathlib import Path

import pytest
from diffusers import WanTransformer3DModel

import train.both
from shared.cli.config_command import configuration
from shared.errors import UserError
from tests.html_page import Parsed
from tests.train.strategies.test_strategies import typed
from tests.train.test_distill import SMALL, arguments, distill, final_bytes
from train.both import configs_of_experts, with_default
from train.cli.app import app as wantrain
from train.loop import train_joined
from train.saving.checkpoint import list_checkpoints
from train.saving.provenance import read_provenance

BOTH = ("--boundary-type", "both")
RESUME = ("--resume-from-checkpoint", "latest")
# Handed over and averaged: what one expert has of its own, and what both have.
RUN = (
    "--max-train-steps", "2", "--match", "handover", "--pairing", "euler", "--ema-decay", "0.5",
    "--ema-start", "0", "--gen-update-interval", "1", "--report-to", "csv",
    "--checkpointing-steps", "1",
)  # fmt: skip
OF_HIGH = ("--match", "handover")
WORKFLOWS = ("workflow-comfyui.json", "workflow-comfyui-api.json")
GUIDES = (*WORKFLOWS, "README.md")


def everything(out: Path) -> dict[str, bytes]:
    """LoRAs, last checkpoint, workflow and card of both experts, and those of the pair."""
    found = {name: (out / name).read_bytes() for name in GUIDES}
    for expert in ("high", "low"):
        folder = out / expert
        last = list_checkpoints(folder)[-1]
        files = [*folder.glob("lora-*"), *(folder / name for name in GUIDES), *last.iterdir()]
        found |= {str(file.relative_to(out)): file.read_bytes() for file in files}
    return found


@pytest.fixture(scope="module")
def whole(tiny_i2v: Path, i2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of both that nothing disturbs."""
    return distill(tiny_i2v, i2v_shards, tmp_path_factory.mktemp("both") / "a out", *RUN, *BOTH)


def test_each_expert_is_as_alone(
    whole: Path, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    """The low-noise expert's command lacks only what it would refuse."""
    of_low = [word for word in RUN if word not in OF_HIGH]
    for expert, words in (("high", RUN), ("low", of_low)):
        out = tmp_path / expert
        distill(tiny_i2v, i2v_shards, out, *words, "--boundary-type", expert)
        assert final_bytes(out) == final_bytes(whole / expert) and final_bytes(out)
        assert {path.name for path in out.iterdir()} == {p.name for p in (whole / expert).iterdir()}
    links = [
        dict(a)["href"] for tag, a in Parsed((whole / "index.html").read_text()).tags if tag == "a"
    ]
    assert links == ["high/index.html", "low/index.html"]
    high, low = (
        read_provenance(whole / e / f"lora-{e}-kohya.safetensors") for e in ("high", "low")
    )
    assert (high.recipe.get("match"), high.recipe["start"]) == ("handover", "noise")
    assert (low.recipe.get("match"), low.recipe["start"]) == (None, "latents")


def test_the_file_that_it_leaves_does_it_again(whole: Path, tmp_path: Path) -> None:
    words = ["distill", "--config", str(whole / "run.toml"), "--output-dir", str(tmp_path / "out")]
    wantrain(words, standalone_mode=False)
    assert everything(tmp_path / "out") == everything(whole)


def test_what_comes_next_is_said_and_works(
    whole: Path, tiny_i2v: Path, i2v_shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run again, it is complete and says so; its words make a clip, its workflow has both."""
    before = everything(whole)
    distill(tiny_i2v, i2v_shards, whole, *RUN, *BOTH, *RESUME)
    said = capsys.readouterr().err
    assert everything(whole) == before
    assert said.count("resume   complete (checkpoint-2)") == 2 and "model    " not in said
    (command,) = (line for line in said.splitlines() if line.startswith("next     wantrain sample"))
    assert f"--lora '{whole}/high/lora-high-diffusers.safetensors'" in command
    assert f"--lora '{whole}/low/lora-low-diffusers.safetensors'" in command
    assert "--num-frames 9 --device cpu --image FIRST-FRAME --prompt TEXT" in command
    assert f"open '{whole}/workflow-comfyui.json'" in said
    page = Parsed((whole / "index.html").read_text()).text
    assert command.split(maxsplit=1)[1] in page and f"open '{whole}/workflow" in page
    graph = json.loads((whole / WORKFLOWS[1]).read_text())
    loras = [n["inputs"]["lora_name"] for n in graph.values() if "Lora" in n["class_type"]]
    assert loras == ["lora-high-comfyui.safetensors", "lora-low-comfyui.safetensors"]


@pytest.mark.parametrize("where", ["in the first", "before its files", "between", "in the second"])
def test_stopped_anywhere_and_gone_on(
    where: str, whole: Path, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "a out"
    words = arguments(tiny_i2v, i2v_shards, out, *RUN, *BOTH)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        if where == "between":
            patch.setattr(train.both, "_free", lambda run: sys.exit(128 + signal.SIGTERM))
        else:
            _stop_in_run(patch, 2 if where == "in the second" else 1)
        wantrain(words, standalone_mode=False)
    assert ended.value.code == 128 + signal.SIGTERM
    assert bool(list_checkpoints(out / "low")) == ("second" in where)
    if where == "before its files":  # what a kill right after the last checkpoint leaves
        distill(tiny_i2v, i2v_shards, out / "high", *RUN, "--boundary-type", "high", *RESUME)
        for file in [*(out / "high").glob("lora-*"), *(out / "high" / name for name in GUIDES)]:
            file.unlink()
    wantrain([*words, *RESUME], standalone_mode=False)
    assert everything(out) == everything(whole)


def _stop_in_run(patch: pytest.MonkeyPatch, number: int) -> None:
    """SIGTERM after the first checkpoint of the `number`-th run."""
    real, runs = train.both.train_joined, 0
    from train.session import Session

    save = Session.save

    def counted(*given: object, **named: object) -> int | None:
        nonlocal runs
        runs += 1
        return real(*given, **named)  # type: ignore[arg-type]

    def struck(session: Session) -> Path:
        path = save(session)
        if runs == number and path.name == "checkpoint-1":
            os.kill(os.getpid(), signal.SIGTERM)
        return path

    patch.setattr(train.both, "train_joined", counted)
    patch.setattr(Session, "save", struck)


def test_the_first_base_is_gone_when_the_second_is_read(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    monkeypatch.setattr(train.both, "train_joined", _counting(left))
    others = _transformers()  # of tests before this one
    words = ("--max-train-steps", "1", "--gen-update-interval", "1", "--report-to", "none")
    distill(tiny_i2v, i2v_shards, tmp_path / "out", *words, *BOTH)
    assert left == [others, others]


def _counting(left: list[int]):  # type: ignore[no-untyped-def]
    def counted(*given: object, **named: object) -> int | None:
        left.append(sum(_is_whole(one) for one in gc.get_objects()))
        return train_joined(*given, **named)  # type: ignore[arg-type]

    return counted


def _transformers() -> int:
    gc.collect()
    return sum(_is_whole(one) for one in gc.get_objects())


def _is_whole(found: object) -> bool:
    return type(found) is WanTransformer3DModel and next(found.parameters()).device.type != "meta"


def test_it_is_the_default_of_two_experts(
    whole: Path, tiny_i2v: Path, tiny_ti2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    """But for VideoX-Fun's recipe, and for a model with one transformer."""
    places = ("--model", str(tiny_i2v), "--shards", str(i2v_shards), "--output-dir")
    words = ["distill", *places, str(tmp_path / "out"), *SMALL, *RUN]
    wantrain(words, standalone_mode=False)
    assert everything(tmp_path / "out") == everything(whole)
    for words, expected in (
        (["distill", "--model", str(tiny_i2v)], "both"),
        (["lora", "--model", str(tiny_i2v)], "both"),
        (["distill", "--model", str(tiny_i2v), "--boundary-type", "high"], "high"),
        (["distill", "--model", str(tiny_i2v), "--recipe", "seed"], None),
        (["distill", "--model", str(tiny_ti2v)], None),
    ):
        assert with_default(configuration(wantrain, words)).boundary_type == expected


def test_a_run_of_one_expert_is_not_passed_over(
    whole: Path, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    """As runs without --boundary-type were before it was the default."""
    out = tmp_path / "out"
    distill(tiny_i2v, i2v_shards, out, "--max-train-steps", "1")
    places = ("--model", str(tiny_i2v), "--shards", str(i2v_shards), "--output-dir", str(out))
    with pytest.raises(UserError, match=r"holds checkpoint-1 of a run of one expert.*type low, or"):
        wantrain(["distill", *places, *SMALL, *RESUME], standalone_mode=False)


def test_plain_loras_of_both(tiny_i2v: Path, i2v_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (
        "lora", "--model", tiny_i2v, "--shards", i2v_shards, "--output-dir", out, "--device", "cpu",
        "--rank", "4", "--max-train-steps", "1", "--report-to", "none", *BOTH,
    )  # fmt: skip
    wantrain([str(word) for word in words], standalone_mode=False)
    graph = json.loads((out / WORKFLOWS[1]).read_text())
    loras = [n["inputs"]["lora_name"] for n in graph.values() if "Lora" in n["class_type"]]
    assert loras == ["lora-high-comfyui.safetensors", "lora-low-comfyui.safetensors"]
    assert "[lora]" in (out / "run.toml").read_text()


def test_a_dry_run_shows_both_plans(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*BOTH, "--score-floor", "handover", "--logging-dir", "logs", "--dry-run")
    distill(tiny_i2v, i2v_shards, tmp_path / "out", *words, "--max-train-steps", "3")
    said = capsys.readouterr().out
    assert said.count("length   --max-train-steps: 3 generator updates") == 2
    assert said.index('"boundary_type": "high"') < said.index('"boundary_type": "low"')
    assert said.index('"score_floor": "handover"') < said.index('"score_floor": "boundary"')
    assert '"logging_dir": "logs/high"' in said and '"logging_dir": "logs/low"' in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "high", "low"),
    [((), None, None), (("noise",), "noise", "noise"), (("states",), None, "states")],
)
def test_start_is_the_low_noise_experts(
    given: tuple[str, ...], high: str | None, low: str | None, tiny_i2v: Path
) -> None:
    start = ("--start", *given) if given else ()
    config = configuration(wantrain, ["distill", "--model", str(tiny_i2v), *BOTH, *start])
    assert [one.start for one in configs_of_experts(config)] == [high, low]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--init-lora", "a.safetensors"),
            r"--init-lora: .* both, the default .*but it is a LoRA of",
        ),
        (
            ("--base-lora", "a.safetensors:0.5"),
            r"--base-lora: .* --boundary-type high --output",
        ),
        (("--transformer-path", "a.safetensors"), r"--transformer-path: .* weights of one expert"),
        (("--resume-from-checkpoint", "checkpoint-1"), r"a checkpoint is of one expert\. Expected"),
    ],
)
def test_files_of_one_expert_are_refused(
    words: tuple[str, ...], message: str, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        distill(tiny_i2v, i2v_shards, tmp_path / "out", *BOTH, *words)


def test_other_models_commands_and_folders_are_refused(
    whole: Path, tiny_ti2v: Path, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"has one transformer\. Use --boundary-type full"):
        distill(tiny_ti2v, i2v_shards, tmp_path, *BOTH)
    with pytest.raises(UserError, match=r"--boundary-type: found both, but bench measures"):
        wantrain(["bench", "--model", str(tiny_i2v), *BOTH], standalone_mode=False)
    with pytest.raises(UserError, match=r"high already holds checkpoint-2 of an earlier run"):
        distill(tiny_i2v, i2v_shards, whole, *RUN, *BOTH)
    with pytest.raises(UserError, match=r"belongs to another run:\n.*lora\.rank: .* 4, .* 6"):
        distill(tiny_i2v, i2v_shards, whole, *RUN, *BOTH, *RESUME, "--rank", "6")


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2", "zero3"])
def test_one_group_of_processes_trains_both(
    strategy: str, tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    """The LoRAs of each expert alone under the same strategy."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed")
    script = str(Path(sys.executable).with_name("wantrain"))
    run = ("--max-train-steps", "2", "--strategy", strategy, "--num-processes", "2")
    for which in ("both", "high", "low"):
        out = tmp_path / which
        words = arguments(tiny_i2v, i2v_shards, out, *run, "--boundary-type", which)
        typed(script, *words)
    for expert in ("high", "low"):
        assert final_bytes(tmp_path / "both" / expert) == final_bytes(tmp_path / expert)

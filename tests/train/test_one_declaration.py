"""An option is declared once: all that has to do with it follows from a configuration's field."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner

from shared.cli.checks import AT_LEAST_1, REMEMBERED
from shared.cli.config_command import add_config_command, configuration
from shared.cli.support import new_app
from shared.cli.videox_fun_command import VideoXFunCommand
from shared.errors import UserError
from train.cli.distill import distill
from train.config import DistillConfig
from train.data.weighted_folder import WeightedFolder
from train.model.lora_adapter import LoraSpec
from train.options import LORA
from train.prepare import prepare_distillation
from train.run import run_identity


@dataclass(frozen=True, kw_only=True)
class Config(DistillConfig):
    """Distil with a number more."""

    # fmt: off
    max_train_samples: Annotated[int, typer.Option(metavar="N", help="A number of ours.", rich_help_panel=LORA), AT_LEAST_1, REMEMBERED] = 3
    # fmt: on


@pytest.fixture
def app() -> typer.Typer:
    made = new_app("A program.", "# one\nprogram distill")
    made.callback()(lambda: None)
    add_config_command(made, Config, distill, cls=VideoXFunCommand)
    return made


def arguments(model: Path, shards: Path, *more: str) -> list[str]:
    return [
        "distill", "--model", str(model), "--shards", str(shards), "--boundary-type", "full",
        "--denoising-step-indices-list", "1000,500", "--train-batch-size", "1", "--rank", "3",
        "--max-train-steps", "1", "--device", "cpu", "--mixed-precision", "no", *more,
    ]  # fmt: skip


def test_a_field_is_on_the_help_page_in_its_group(app: typer.Typer) -> None:
    page = CliRunner().invoke(app, ["distill", "--help"]).output
    section = page.split("LoRA:\n")[1].split("\n\n")[0]
    assert "--max-train-samples N" in section and "A number of ours.  [default: 3]" in section


def test_a_field_is_checked_and_said_by_dry_run(
    app: typer.Typer, tiny_t2v: Path, t2v_shards: Path
) -> None:
    words = arguments(tiny_t2v, t2v_shards, "--dry-run", "--start", "noise")
    wrong = CliRunner().invoke(app, [*words, "--max_train_samples", "0"])
    assert isinstance(wrong.exception, UserError)
    assert str(wrong.exception) == ("--max-train-samples: found 0, expected a whole number from 1.")
    ran = CliRunner().invoke(app, [*words, "--max-train-samples=5"])
    assert ran.exit_code == 0, ran.output
    shown: dict[str, Any] = json.JSONDecoder().raw_decode(ran.stdout)[0]
    assert shown["max_train_samples"] == 5


def test_a_field_is_in_run_files(app: typer.Typer, tmp_path: Path) -> None:
    path = str(tmp_path / "run.toml")
    CliRunner().invoke(app, ["distill", "--max-train-samples", "6", "--write-config", path])
    assert "\n# A number of ours.\nmax_train_samples = 6\n" in Path(path).read_text()
    assert configuration(app, ["distill", "--config", path]).max_train_samples == 6


def test_a_field_of_a_name_of_videox_funs_is_no_flag_that_is_passed_over(
    app: typer.Typer, tiny_t2v: Path, t2v_shards: Path
) -> None:
    """--max_train_samples is one of its flags that do nothing; here it is an option now."""
    words = arguments(tiny_t2v, t2v_shards, "--dry-run", "--start", "noise")
    ran = CliRunner().invoke(app, [*words, "--max_train_samples", "5", "--noise_offset", "1"])
    assert "--noise-offset" in ran.stderr
    assert "--max-train-samples" not in ran.stderr


def test_a_checkpoint_remembers_a_field_that_says_so(tiny_t2v: Path, t2v_shards: Path) -> None:
    config = Config(
        model=str(tiny_t2v),
        shards=[WeightedFolder(t2v_shards)],
        boundary_type="full",
        start="noise",
        device="cpu",
        mixed_precision="no",
        max_train_steps=1,
        max_train_samples=7,
    )
    lora = LoraSpec(rank=3, alpha=2, targets=("blocks.0.attn1.to_q",))
    identity = run_identity(prepare_distillation(config), lora, "digest")
    assert identity.loose["max_train_samples"] == 7
    assert "rank" not in identity.loose

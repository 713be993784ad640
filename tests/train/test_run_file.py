"""Options from a TOML file and back: flags win, nothing is guessed, a run can be done again."""

import subprocess
from pathlib import Path

import pytest

from preprocess.cli.app import app as wanprep
from shared.cli.config_command import configuration
from shared.errors import UserError
from tests.train.test_distill import WANTRAIN, distill, final_bytes
from train.cli.app import app as wantrain

ASKED = (
    *("--model", "toy", "--shards", "one", "--shards", "two@1/3", "--rank", "8"),
    *("--where", 'caption~=a "cat", or ü', "--no-gradient-checkpointing", "--allow_tf32"),
    *("--denoising-step-indices-list", "1000 500", "--learning-rate", "3e-7"),
)


def written(folder: Path, *words: str) -> Path:
    path = folder / "run.toml"
    done = subprocess.run(
        [WANTRAIN, *words, "--write-config", path], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return path


def test_a_written_file_gives_the_same_configuration(tmp_path: Path) -> None:
    path = written(tmp_path, "distill", *ASKED)
    asked = configuration(wantrain, ["distill", *ASKED])
    found = configuration(wantrain, ["distill", "--config", str(path)])
    assert vars(found) == vars(asked)
    text = path.read_text()
    assert "\n# LoRA rank.\nrank = 8\n" in text
    assert (
        "\n# default: 12 for Wan 2.2 A14B t2v, 16 for Wan 2.1 FLF2V, else 5\n# flow_shift =\n"
        in text
    )


def test_flags_win_and_lists_are_not_added_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_NAME", "of-the-environment")
    path = tmp_path / "a.toml"
    path.write_text(
        '\ufeff[distill]\nmodel = "toy"\nshards = ["one", "two"]\nlearning-rate = 1e-4\nrank = 4\n'
        "denoising_step_indices_list = [1000, 250]\nuniform_sampling = false\n[encode]\nsize = 3\n"
    )
    found = configuration(
        wantrain, ["distill", "--config", str(path), "--shards", "three", "--rank", "6"]
    )
    assert [str(one) for one in found.shards] == ["three"]
    assert (found.model, found.rank, found.learning_rate) == ("toy", 6, 1e-4)
    assert found.denoising_step_indices_list == "1000,250" and not found.uniform_sampling


def test_wanprep_reads_them_too(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('[encode]\ntrain_data_dir = "clips"\nfix_sample_size = [480, 832]\n')
    found = configuration(wanprep, ["encode", "--config", str(path)])
    assert found.fix_sample_size == (480, 832)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[distill]\nrnk = 4\n", r"\[distill\] has an unknown key 'rnk'; did you mean rank\?"),
        ("[lora]\nrank = 4\n", r"has \[lora\], expected a table \[distill\]"),
        ("rank = 4\n", r"has \[rank\], expected a table \[distill\]"),
        ("[distill]\nlow_vram = 1\n", r"low_vram is 1, expected true or false"),
        ("[distill\n", r"can't read .* as TOML"),
    ],
)
def test_what_a_file_may_not_say(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--config: .*{message}"):
        configuration(wantrain, ["distill", "--config", str(path)])


def test_a_run_can_be_done_again_from_its_own_file(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    one = distill(tiny_t2v, t2v_shards, tmp_path / "one", "--max-train-steps", "1")
    again = [WANTRAIN, "distill", "--config", one / "run.toml", "--output-dir", tmp_path / "two"]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert final_bytes(tmp_path / "two") == final_bytes(one)

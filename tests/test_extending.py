"""docs/extending.md: each example is applied to a copy of the tree and run, as a newcomer would."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()
MOST_FILES = 4
EXAMPLES = {name: diff for name, diff in re.findall(r"```diff (\S+)\n(.*?)```", PAGE, re.DOTALL)}


def copied(to: Path, example: str) -> Path:
    """Our packages with an example's patch."""
    for name in ("shared", "preprocess", "train"):
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "wandistill_cli.py", to)
    ran = subprocess.run(
        ["git", "apply", "--whitespace=nowarn", "-"],
        cwd=to,
        input=EXAMPLES[example],
        capture_output=True,
        text=True,
        env=os.environ | {"GIT_CEILING_DIRECTORIES": str(to.parent)},
    )
    assert ran.returncode == 0, ran.stderr
    return to


def run(tree: Path, words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A command of a copied tree; a file of its own, since a launcher starts it again."""
    program, *rest = words.split()
    script = cwd / program
    code = f"import sys\nsys.path.insert(0, {str(tree)!r})\nimport wandistill_cli\n"
    script.write_text(f"{code}sys.exit(wandistill_cli.{program}())\n")
    return subprocess.run(
        [sys.executable, script, *rest],
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def done(tree: Path, words: str, cwd: Path) -> str:
    ran = run(tree, words, cwd)
    assert ran.returncode == 0, f"{words}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout + ran.stderr


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_touches_few_files_and_is_understood(example: str, tmp_path: Path) -> None:
    touched = re.findall(r"(?m)^\+\+\+ b/(.*)$", EXAMPLES[example])
    assert 1 <= len(touched) <= MOST_FILES
    section = PAGE.split(f"```diff {example}\n")[0].rsplit("\n## ", 1)[1]
    for file in touched:
        assert f"`{file}`" in section, "the page names the files to touch"
    tree = copied(tmp_path / "tree", example)
    for program in ("wanprep encode", "wantrain distill"):
        done(tree, f"{program} --help", tmp_path)


def test_the_page_has_the_five_examples() -> None:
    assert set(EXAMPLES) == {"loss", "family", "strategy", "format", "optimizer"}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy's shards, made by the tree as it is."""
    folder = tmp_path_factory.mktemp("toy")
    clips = [sys.executable, str(ROOT / "scripts" / "render_clips.py"), "--count", "4"]
    subprocess.run([*clips, "--output", str(folder / "clips")], check=True)
    done(ROOT, f"wanprep encode {TOY} --output shards", folder)
    return folder


TOY = (
    "--model toy --train-data-dir clips --size 64 --video-sample-n-frames 9 "
    "--video-sample-stride 1 --device cpu"
)
RUN = "--model toy --shards shards --boundary-type full --device cpu --rank 4 --max-train-steps 2"


def metrics(folder: Path) -> set[str]:
    return set((folder / "logs" / "metrics.csv").read_text().splitlines()[0].split(","))


@pytest.mark.long
def test_a_loss_term_is_learned_shown_and_kept(toy: Path, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree", "loss")
    words = f"wantrain distill {RUN} --start noise --gen-update-interval 1 --report-to csv"
    plain, with_term = toy / "loss-plain", toy / "loss-term"
    done(tree, f"{words} --output-dir {plain}", toy)
    done(tree, f"{words} --output-dir {with_term} --motion-loss-weight 2", toy)
    assert "loss/motion" in metrics(with_term) - metrics(plain)
    one, other = (load_file(f / "lora-full-diffusers.safetensors") for f in (plain, with_term))
    assert any(not torch.equal(one[name], other[name]) for name in one)
    longer = f"{words} --max-train-steps 3 --resume-from-checkpoint latest"
    refused = run(tree, f"{longer} --output-dir {with_term} --motion-loss-weight 1", toy)
    assert refused.returncode == 1 and "motion_loss_weight" in refused.stderr


@pytest.mark.long
def test_a_family_is_encoded_and_trained(toy: Path, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree", "family")
    network = ROOT / "docs" / "extending" / "pretend_transformer.py"
    shutil.copy(network, tree / "train" / "model")
    model = tmp_path / "model"
    make = (
        "import json, shutil, sys, torch; from pathlib import Path\n"
        "from diffusers import AutoencoderKLWan\n"
        "from shared.models.spec import resolve_model\n"
        "from train.model.pretend_transformer import PretendTransformer3DModel\n"
        "toy, folder = resolve_model('toy', ()), Path(sys.argv[1])\n"
        "for part in ('text_encoder', 'tokenizer', 'scheduler'):\n"
        "    shutil.copytree(toy / part, folder / part)\n"
        "config = json.loads((toy / 'vae' / 'config.json').read_text())\n"
        "config |= {'temperal_downsample': [False, True], 'scale_factor_temporal': 2}\n"
        "torch.manual_seed(1)\n"
        "AutoencoderKLWan.from_config(config).save_pretrained(folder / 'vae')\n"
        "PretendTransformer3DModel().save_pretrained(folder / 'transformer')\n"
        "index = json.loads((toy / 'model_index.json').read_text())\n"
        "index |= {'transformer': [None, 'PretendTransformer3DModel'],\n"
        "          'transformer_2': [None, None], 'boundary_ratio': None}\n"
        "(folder / 'model_index.json').write_text(json.dumps(index))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tree)}
    subprocess.run(
        [sys.executable, "-c", make, str(model)], check=True, env=environment, cwd=tmp_path
    )
    encode = TOY.replace("--model toy", f"--model {model}")
    done(tree, f"wanprep encode {encode} --output other-shards", toy)
    fingerprint = json.loads((toy / "other-shards" / "manifest.json").read_text())["fingerprint"]
    assert fingerprint["latents"]["stride"] == [2, 8, 8]
    assert fingerprint["text"]["max_length"] == 96
    words = RUN.replace("--model toy --shards shards", f"--model {model} --shards other-shards")
    out = toy / "family"
    done(
        tree,
        f"wantrain distill {words} --output-dir {out} --target-name q,k,v,think.0 --low-vram "
        "--gen-update-interval 1 --denoising-step-indices-list 1000,500",
        toy,
    )
    names = set(load_file(out / "lora-full-diffusers.safetensors"))
    assert "transformer.stack.0.look.to_q.lora_A.weight" in names
    refused = run(ROOT, f"wantrain lora {words} --output-dir {toy / 'none'}", toy)
    assert refused.returncode == 1 and "PretendTransformer3DModel" in refused.stderr


@pytest.mark.long
def test_a_strategy_trains_two_processes_and_resumes(toy: Path, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree", "strategy")
    words = f"wantrain lora {RUN} --num-processes 2 --checkpointing-steps 1 --save-precision fp32"
    said = done(tree, f"{words} --strategy ddp-bf16 --output-dir {toy / 'bf16'}", toy)
    assert "gradients are sent in bf16" in said
    done(tree, f"{words} --strategy ddp --output-dir {toy / 'fp32'}", toy)
    file = "lora-full-diffusers.safetensors"
    one, other = (load_file(toy / folder / file) for folder in ("bf16", "fp32"))
    apart = sum((one[n] - other[n]).square().sum() for n in one if "lora_B" in n).sqrt()
    size = sum(other[n].square().sum() for n in other if "lora_B" in n).sqrt()
    assert 0 < apart < 0.2 * size
    more = f"{words} --max-train-steps 3 --resume-from-checkpoint latest --strategy ddp-bf16"
    done(tree, f"{more} --output-dir {toy / 'bf16'}", toy)


@pytest.mark.long
def test_a_format_is_read(toy: Path, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree", "format")
    first, second, *_ = sorted((toy / "clips").glob("*.mp4"))
    listed = "".join(
        f'[[clip]]\nfile_path = "{clip.name}"\ntext = "{caption}"\n'
        for clip, caption in ((first, "one"), (second, "two"))
    )
    (toy / "list.toml").write_text(listed)
    said = done(tree, f"wanprep encode {TOY} --train-data-meta list.toml --output listed", toy)
    assert "2 samples" in said
    refused = run(ROOT, f"wanprep encode {TOY} --train-data-meta list.toml --output no", toy)
    assert refused.returncode == 1 and "'.toml'" in refused.stderr


@pytest.mark.long
def test_an_optimizer_resumes_to_the_byte(toy: Path, tmp_path: Path) -> None:
    tree = copied(tmp_path / "tree", "optimizer")
    words = f"wantrain lora {RUN} --optimizer radam --learning-rate 1e-2 --save-precision fp32"
    three = words.replace("--max-train-steps 2", "--max-train-steps 3")
    done(tree, f"{words} --output-dir {toy / 'parts'}", toy)
    done(tree, f"{three} --output-dir {toy / 'parts'} --resume-from-checkpoint latest", toy)
    done(tree, f"{three} --output-dir {toy / 'whole'}", toy)
    file = "lora-full-diffusers.safetensors"
    one, other = (load_file(toy / folder / file) for folder in ("parts", "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    assert any(value.abs().max() > 0 for name, value in other.items() if "lora_B" in name)

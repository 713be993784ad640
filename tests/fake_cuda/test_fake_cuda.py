"""Training on CUDA as far as it shows without a GPU: updates on fake tensors of that device.

At the sizes of the published models, with one block to four: updates of critic and generator, of
`wantrain lora`, validation clips, EMA, every memory option. Seen are mixed devices, what the CPU
waits for inside of an update, fp32 tensors as large as activations, attention on mixed dtypes; and
FLOPs, bytes and copies within 5% of `table.json`, which `python -m tests.fake_cuda --write` makes.
`tests.fake_cuda.verdict` lists what may be fp32 and what may wait, with reasons.

It can't see: values; whether copies overlap with computing, races, hangs, time; memory of the
allocator and of kernels; which kernels CUDA takes (attention is FlashAttention's here, q's and k's
norms are written out, AdamW goes weight by weight); what depends on CUDA's own libraries: pinned
memory, random numbers, NCCL, --compile, other attention backends.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from tests.fake_cuda.cases import MODELS, cases, short_cases
from tests.fake_cuda.defects import DEFECTS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    torch.version.cuda is not None, reason="the stub of CUDA is for torch's CPU build"
)


def fake_cuda(*words: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """In a process of its own: there is no way back from the stub."""
    return subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda", *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def said(*words: str) -> Mapping[str, Sequence[str]]:
    """Case or defect → what is wrong."""
    ran = fake_cuda(*words)
    assert ran.returncode == 0, ran.stderr
    found: Mapping[str, Sequence[str]] = json.loads(ran.stdout)
    return found


@pytest.fixture(scope="module")
def short() -> Mapping[str, Sequence[str]]:
    return said()


@pytest.fixture(scope="module")
def defects() -> Mapping[str, Sequence[str]]:
    return said("--defects")


@pytest.mark.parametrize("name", [case.name for case in short_cases()])
def test_nothing_is_wrong(short: Mapping[str, Sequence[str]], name: str) -> None:
    assert short[name] == []


@pytest.mark.long
@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_seen(defects: Mapping[str, Sequence[str]], name: str) -> None:
    assert re.search(DEFECTS[name].said, "\n".join(defects[name]))


@pytest.mark.long
def test_nothing_is_wrong_with_any_option() -> None:
    assert said(*MODELS) == {case.name: [] for case in cases(MODELS)}


def test_a_stub_that_does_not_build_is_no_pass(tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    ran = fake_cuda(PATH=str(tmp_path), TMPDIR=str(tmp_path))
    assert ran.returncode != 0
    assert "CalledProcessError" in ran.stderr

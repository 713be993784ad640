"""What every test may use: no network, tiny models."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Set before transformers, diffusers or huggingface_hub are imported, and inherited by the
# command lines that the tests start.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors gain nothing from threads, and on a busy machine OpenMP's barriers cost tenfold.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# On CPUs with AMX, oneDNN's bf16 convolution reads beyond its input where latents of 36 or 48
# channels are 2 wide, as some here are: NaN, or other numbers in each run (torch 2.13).
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
for variable in ("MODEL_NAME", "DATASET_NAME", "DATASET_META_NAME", "DIFFUSERS_ATTN_BACKEND"):
    os.environ.pop(variable, None)  # a developer's shell must not decide what is tested

# No example has a time to keep: machines are busy.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

from tests import object_store  # noqa: E402 - after the environment is set
from tests.models import tiny_model  # noqa: E402 - after the environment is set


@pytest.fixture(scope="session")
def tiny_t2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny two-expert text-to-video model in diffusers layout."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-t2v", "t2v")


@pytest.fixture(scope="session")
def tiny_i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny two-expert image-to-video model in diffusers layout."""
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny-i2v", "i2v")


@pytest.fixture(scope="session")
def tiny_ti2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of TI2V-5B's form: one expert, its own VAE, the first frame kept clean."""
    folder = tmp_path_factory.mktemp("models") / "tiny-ti2v"
    return tiny_model(folder, "ti2v", two_experts=False)


@pytest.fixture(scope="session")
def store() -> Iterator[object_store.ObjectStore]:
    """An S3 server."""
    with object_store.running() as server:
        yield server


@pytest.fixture(scope="session")
def tiny_wan21_i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of Wan 2.1 i2v's form: one expert, CLIP image embeddings."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan21-i2v"
    return tiny_model(folder, "wan21-i2v", two_experts=False)


@pytest.fixture(scope="session")
def tiny_wan21_flf2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of Wan 2.1 FLF2V's form: CLIP embeddings of two frames, with positions."""
    folder = tmp_path_factory.mktemp("models") / "tiny-wan21-flf2v"
    return tiny_model(folder, "wan21-flf2v", two_experts=False)

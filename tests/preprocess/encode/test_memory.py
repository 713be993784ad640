"""One encoder in memory at a time."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from tests.preprocess.conftest import wanprep


def living_encoders() -> list[str]:
    """Class names of the encoders that exist in this process."""
    encoders = (AutoencoderKLWan, UMT5EncoderModel)
    return [type(o).__name__ for o in gc.get_objects() if type(o) in encoders]


@pytest.fixture
def seen_alive() -> Iterator[set[frozenset[str]]]:
    """Every combination of encoders that was alive whenever one of their modules ran."""
    combinations: set[frozenset[str]] = set()

    def look(module: torch.nn.Module, _: object) -> None:
        if type(module).__name__ in {"UMT5EncoderModel", "WanEncoder3d"}:
            combinations.add(frozenset(living_encoders()))

    gc.collect()
    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    yield combinations
    handle.remove()


def test_the_text_encoder_is_gone_before_the_vae_comes(
    pictures: Path, tiny_t2v: Path, tmp_path: Path, seen_alive: set[frozenset[str]]
) -> None:
    ran = wanprep(
        *("encode", "--model", tiny_t2v, "--train-data-dir", pictures, "--output", tmp_path),
        *("--size", 64, "--device", "cpu"),
    )
    assert ran.code == 0, ran.err
    assert seen_alive == {frozenset({"UMT5EncoderModel"}), frozenset({"AutoencoderKLWan"})}
    gc.collect()
    assert living_encoders() == []

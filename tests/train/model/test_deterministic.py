"""`--deterministic`: the same LoRA; kernels whose gradients vary are refused or switched off."""

from pathlib import Path

import pytest
import torch

from shared.errors import UserError
from tests.train.test_distill import distill, final_bytes


def test_it_is_the_same_run_and_switches_torch(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path
) -> None:
    """Every operation of an update has a deterministic form: torch raises for one that has none."""
    more = ("--max-train-steps", "1")
    plain = distill(tiny_i2v, i2v_shards, tmp_path / "plain", *more)
    assert not torch.are_deterministic_algorithms_enabled()
    exact = distill(tiny_i2v, i2v_shards, tmp_path / "exact", *more, "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert [*final_bytes(plain)] == [*final_bytes(exact)]
    for name, found in final_bytes(exact).items():
        size = int.from_bytes(found[:8], "little") + 8  # of the header, where the option stands
        other = final_bytes(plain)[name]
        assert found[size:] == other[int.from_bytes(other[:8], "little") + 8 :]
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["_native_cudnn", "flash", "xformers", "flex"])
def test_backends_that_add_up_in_any_order_are_refused(
    backend: str, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=f"--deterministic: found with --attention-backend {backend}"
    ):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--deterministic",
                "--attention-backend", backend)  # fmt: skip

"""--attention-backend: what computes attention, with the losses of the default; what is refused."""

from pathlib import Path

import diffusers.models.transformers.transformer_wan as wan
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shared.errors import UserError
from tests.train.test_distill import distill, losses
from train.model.attention import check_attention, choice_of_torch, chosen_kernel

RUN = ("--max-train-steps", "1", "--mixed-precision", "no")


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """By which backend each attention was computed, and whether a gradient goes back through it."""
    seen: list[tuple[str, bool]] = []
    dispatch = wan.dispatch_attention_fn

    def watched(*args: torch.Tensor, **named: object) -> torch.Tensor:
        out = dispatch(*args, **named)
        assert named["attn_mask"] is None, "a mask would shut flash attention out"
        seen.append((str(getattr(named["backend"], "value", None)), out.requires_grad))
        return out

    monkeypatch.setattr(wan, "dispatch_attention_fn", watched)
    return seen


@pytest.fixture(scope="module")
def native(tiny_i2v: Path, i2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return distill(tiny_i2v, i2v_shards, tmp_path_factory.mktemp("native") / "out", *RUN)


@pytest.mark.parametrize("backend", ["native", "_native_math", "_native_flash"])
def test_a_backend_gives_the_losses_of_the_default(
    native: Path,
    tiny_i2v: Path,
    i2v_shards: Path,
    tmp_path: Path,
    computed: list[tuple[str, bool]],
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
) -> None:
    """Asked for by option, whatever the environment says, or by the environment alone."""
    asked = ("--attention-backend", backend)
    monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", "sage")
    if backend == "_native_math":
        asked = ()
        monkeypatch.setenv("DIFFUSERS_ATTN_BACKEND", backend)
    out = distill(tiny_i2v, i2v_shards, tmp_path / "out", *RUN, *asked)
    assert {name for name, _ in computed} == {backend}
    assert {gradient for _, gradient in computed} == {True, False}
    expected, found = losses(native), losses(out)
    for role, curve in expected.items():
        assert [loss for _, loss in found[role]] == pytest.approx([x for _, x in curve], rel=1e-5)


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("sage", r"sage is for inference only: it has no gradient. Expected one of flash, .*flex"),
        ("_flash_3", r"_flash_3 is for inference only: .*_flash_3_hub"),
        ("flush", r"unknown attention backend flush. Expected one of flash, "),
        ("flash", r"flash can't train here, on cpu .*install `flash-attn.*These can: native, "),
        ("flex", r"flex can't train here, .*backward on CPU"),
        ("_native_cudnn", r"_native_cudnn can't train here, .*These can: native, _native_flash, "),
    ],
)
def test_what_cannot_train_is_refused_before_weights_are_read(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, backend: str, message: str
) -> None:
    with pytest.raises(UserError, match=rf"^--attention-backend: {message}"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--attention-backend", backend, "--dry-run")


def test_native_is_always_there() -> None:
    check_attention("native", "cpu", "bf16")


def test_the_kernel_is_told_at_the_start(
    tiny_i2v: Path, i2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    distill(tiny_i2v, i2v_shards, tmp_path / "out", *RUN, "--attention-backend", "_native_math")
    said = capsys.readouterr().err
    assert "kernel   attention by _native_math\n" in said and "slow" not in said  # on a CPU


def test_torch_is_asked_what_it_chooses() -> None:
    """On a CPU it has two kernels."""
    one = torch.ones(1, 8, 2, 16, requires_grad=True).transpose(1, 2)
    assert choice_of_torch(one) == "flash"
    with sdpa_kernel(SDPBackend.MATH):
        assert choice_of_torch(one) == "math"


@pytest.mark.parametrize(
    ("name", "slow"), [("_native_math", True), ("_native_efficient", True), ("flash", False)]
)
def test_a_slow_kernel_is_warned_of_on_a_gpu(name: str, slow: bool) -> None:
    """That was asked for by name: torch's own choice needs a GPU."""
    line, warning = chosen_kernel(name, torch.device("cuda:1"), "bf16", (40, 128), 32760)
    assert line == f"attention by {name}" and bool(warning) == slow
    assert not slow or str(warning).startswith("this attention kernel is slow")

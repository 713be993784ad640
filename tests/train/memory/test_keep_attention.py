"""--keep-attention: the gradients of plain checkpointing to the bit, with half of the attention."""

import json
from pathlib import Path

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import UserError
from tests.train.memory.test_block_offload import (
    CPU,
    LAYERS,
    LateStream,
    equal,
    generator_pass,
    left_behind,
    roles_of,
)
from tests.train.model.test_roles import (
    NEGATIVE,
    build_batch,
    build_recipe,
    build_roles,
)
from tests.train.test_distill import distill
from train.cli.app import app as wantrain
from train.memory import activation_offload
from train.memory.activation_offload import ActivationOffloading
from train.memory.keep_attention import keep_attention
from train.methods.dmd import generator_step
from train.model.attention import NATIVE, use_attention
from train.model.roles import Roles


def native() -> Roles:
    """diffusers' own default is what was last chosen for any model."""
    roles = roles_of()
    use_attention(roles.transformer, NATIVE)
    return roles


class _Counting(TorchDispatchMode):
    """How often kernels of attention work, by whether queries and keys are as many."""

    def __init__(self) -> None:
        super().__init__()
        self.found = {True: 0, False: 0}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if "attention" in func.name() and "backward" not in func.name():
            self.found[args[0].shape == args[1].shape] += 1
        return func(*args, **(kwargs or {}))


def test_self_attention_is_not_computed_again() -> None:
    expected = generator_pass(native())
    roles = native()
    roles.transformer.enable_gradient_checkpointing(keep_attention)
    with _Counting() as counting:
        assert equal(generator_pass(roles), expected)
    # a pass without a gradient, two with, computed again: these without self-attention
    assert counting.found == {True: 3 * LAYERS, False: 5 * LAYERS}


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_gradients_in_fp32_are_those_of_plain_checkpointing(
    kind: str, tiny_t2v: Path, tiny_i2v: Path
) -> None:
    model = tiny_i2v if kind == "i2v" else tiny_t2v
    offloading = ActivationOffloading(CPU, keep_attention=True)
    found = []
    for checkpoint in (None, keep_attention, offloading.checkpoint):
        roles = build_roles(model, checkpointing=True)
        use_attention(roles.transformer, NATIVE)
        if checkpoint is not None:
            roles.transformer.enable_gradient_checkpointing(checkpoint)
        loss = generator_step(roles, build_recipe(kind), build_batch(kind), NEGATIVE).loss
        with roles.generator():
            loss.backward()
        found.append([p.grad for p in roles.parameters("generator").values()])
    for others in found[1:]:
        assert equal(found[0], others)


def test_kept_in_cpu_memory_nothing_relies_on_a_copy_before_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(activation_offload, "SideStream", LateStream)
    expected = generator_pass(native())
    roles = native()
    offloading = ActivationOffloading(CPU, keep_attention=True)
    roles.transformer.enable_gradient_checkpointing(offloading.checkpoint)
    for _ in range(3):
        with _Counting() as counting:
            assert equal(generator_pass(roles), expected)
        assert counting.found[True] == 3 * LAYERS
    # of two passes: hidden states and outputs, there and back; CPU memory is used again
    assert isinstance(offloading._side, LateStream)
    assert offloading._side.done == 3 * 2 * 2 * 2 * LAYERS
    assert len(offloading._free) == 2 * 2 * LAYERS


def test_a_run_is_the_same_to_the_byte(tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    more = ("--max-train-steps", "1", "--gen-update-interval", "1")
    outs = [
        distill(tiny_t2v, t2v_shards, tmp_path / str(number), *more, *words)
        for number, words in enumerate(
            ((), ("--keep-attention",), ("--keep-attention", "--activation-offloading"))
        )
    ]
    expected = left_behind(outs[0])
    assert expected and [left_behind(out) for out in outs[1:]] == [expected] * 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--no-gradient-checkpointing",), "found with --no-gradient-checkpointing"),
        (("--compile",), "found with --compile"),
        (("--attention-backend", "_native_math"), "found with --attention-backend _native_math"),
    ],
)
def test_what_cannot_keep_it_is_refused(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError, match=f"^--keep-attention: {said}"):
        distill(tiny_t2v, t2v_shards, tmp_path / "out", "--keep-attention", *words)


def test_the_plan_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    def planned(*words: str) -> dict:
        common = ("plan", "--model", "wan2.2-i2v-a14b", "--method", "lora", "--json")
        wantrain([*common, *words], standalone_mode=False)
        return json.loads(capsys.readouterr().out)["choices"][0]

    tokens, sums = 40 * 32760, 40 * 32760 * 40 * 4
    plain, kept = planned(), planned("--keep-attention")
    assert kept["total"] - plain["total"] == tokens * 5120 * 2 + sums  # 12.7 GiB
    offloading = ("--activation-offloading", "--rank", "4")  # else gradients are more
    plain, kept = planned(*offloading), planned(*offloading, "--keep-attention")
    assert kept["total"] - plain["total"] == 3 * 32760 * 5120 * 2 + sums
    assert kept["host"] - plain["host"] == tokens * 5120 * 2

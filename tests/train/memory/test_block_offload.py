"""Base and activations in CPU memory: the same numbers to the bit, and what the device holds.

On a CPU "the device" is other memory of the same kind; all but the side stream is a GPU's code.
"""

import gc
import json
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from benchmarks import lean_run
from shared.cli.config_command import configuration
from shared.errors import UserError
from tests.models import TEXT_DIM, tiny_model, tiny_transformer
from tests.train.conftest import randomise_lora
from tests.train.methods.test_finetune import finetune
from tests.train.strategies.test_strategies import (
    IN_TWO,
    RUN,
    SINGLE,
    assert_like_alone,
    command,
    typed,
)
from tests.train.test_distill import arguments, distill, losses
from train.cli.app import app as wantrain
from train.memory import activation_offload, block_offload
from train.memory.activation_offload import ActivationOffloading
from train.memory.block_offload import (
    StreamedBlocks,
    blocks_on_device,
    stream_blocks,
    swapped_blocks,
)
from train.memory.copy_stream import Copy, SideStream
from train.memory.quantize import quantise
from train.model.lora_adapter import LoraSpec, select_targets
from train.model.roles import Roles
from train.prepare import prepare_distillation
from train.run import estimate

CPU = torch.device("cpu")
LAYERS = 5
# Two graphs in one backward pass, passes of all roles, clips sampled on the way.
DISTILL = (
    "--gen-update-interval", "1", "--real-guidance-scale", "3", "--fm-loss-weight", "0.5",
    "--validation-steps", "2", "--checkpointing-steps", "1", "--seed", "6",
)  # fmt: skip


@pytest.fixture(scope="module")
def deep_i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model for the shards of `tiny_i2v`, with more blocks."""
    return tiny_model(tmp_path_factory.mktemp("models") / "deep", "i2v", num_layers=LAYERS)


def left_behind(out: Path) -> dict[str, object]:
    """Checkpoints and LoRA files, to the byte; and validation clips."""
    whole = [*out.glob("checkpoint-*/*.safetensors"), *out.glob("*.safetensors")]
    clips = {path: load_file(path)["latents"] for path in out.glob("validation/*/*.safetensors")}
    found: dict[Path, object] = {path: path.read_bytes() for path in whole}
    found |= {path: clip.view(torch.uint8).numpy().tobytes() for path, clip in clips.items()}
    return {str(path.relative_to(out)): content for path, content in found.items()}


@pytest.mark.long
def test_a_distillation_is_the_same_to_the_bit(
    deep_i2v: Path, i2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Begun with all blocks in CPU memory, gone on with three of them."""
    plain = distill(deep_i2v, i2v_shards, tmp_path / "plain", *DISTILL, "--max-train-steps", "2")
    capsys.readouterr()
    out = tmp_path / "out"
    words = (*DISTILL, "--activation-offloading")
    distill(deep_i2v, i2v_shards, out, *words, "--low-vram", "--max-train-steps", "1")
    begun = capsys.readouterr().err
    distill(
        deep_i2v, i2v_shards, out, *words, "--blocks-to-swap", "3", "--max-train-steps", "2",
        "--resume-from-checkpoint", "latest",
    )  # fmt: skip
    gone_on = capsys.readouterr().err
    assert losses(out) == losses(plain)
    expected = left_behind(plain)
    assert {Path(name).parts[0] for name in expected} >= {"checkpoint-2", "validation"}
    assert left_behind(out) == expected

    told = r"stream   (\d) blocks of ([\d.]+) MB in CPU memory; on the device ([\d.]+) MB"
    (all_blocks,), (three,) = (re.findall(told, text) for text in (begun, gone_on))
    assert (all_blocks[0], three[0]) == ("5", "3")
    assert float(all_blocks[1]) == pytest.approx(float(three[1]) * 5 / 3, abs=2e-3)
    assert 1 <= float(all_blocks[2]) / (float(all_blocks[1]) * 2 / 5) < 1.5
    assert three[2] == all_blocks[2]


def test_a_plain_lora_is_the_same_to_the_bit(
    tiny_t2v: Path, t2v_shards: Path, tmp_path: Path
) -> None:
    """fp32, and a model of no more blocks than there are buffers."""
    outs = [
        finetune(tiny_t2v, t2v_shards, tmp_path / name, "--max-train-steps", "3", *more)
        for name, more in (("plain", ()), ("out", ("--low-vram", "--activation-offloading")))
    ]
    assert left_behind(outs[0]) == left_behind(outs[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--low-vram", "--no-gradient-checkpointing"),
            "--low-vram: found with --no-gradient-checkpointing",
        ),
        (
            ("--activation-offloading", "--no-gradient-checkpointing"),
            "--activation-offloading: found with --no-gradient-checkpointing",
        ),
        (
            ("--blocks-to-swap", "2"),
            "--blocks-to-swap: found 2, expected 3 or more: 2 of them are on the device",
        ),
        (
            ("--blocks-to-swap", "6", "--dry-run"),  # before any weight is read
            "--blocks-to-swap: found 6, expected at most 5, which this model has",
        ),
        (
            ("--blocks-to-swap", "4", "--strategy", "fsdp"),
            "--blocks-to-swap: found with --strategy fsdp, which shards the base across ranks "
            "already. Use --strategy ddp or zero2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    deep_i2v: Path, i2v_shards: Path, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError) as refused:
        distill(deep_i2v, i2v_shards, tmp_path / "out", *words)
    assert str(refused.value).startswith(said)


def test_the_estimate_knows_what_lives_where(
    deep_i2v: Path, i2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What --dry-run says, beside what a run says that it does."""
    variants = ((), ("--low-vram",), ("--blocks-to-swap", "3"), ("--activation-offloading",))
    found = []
    for words in variants:
        typed = arguments(deep_i2v, i2v_shards, tmp_path / "out", *words)
        found.append(estimate(prepare_distillation(configuration(wantrain, typed))))
    plain, all_blocks, three, offloaded = (one for one in found if one is not None)
    assert plain.host == 0

    words = ("--blocks-to-swap", "3", "--max-train-steps", "1")
    distill(deep_i2v, i2v_shards, tmp_path / "out", *words)
    ((home, _),) = re.findall(
        r"3 blocks of ([\d.]+) MB in CPU memory; on the device ([\d.]+) MB",
        capsys.readouterr().err,
    )
    assert three.host == pytest.approx(float(home) * 1e6, abs=1e3)
    one_block = three.host // 3
    assert plain.parts["base"] - three.parts["base"] == one_block
    assert (all_blocks.host, plain.parts["base"] - all_blocks.parts["base"]) == (
        5 * one_block,
        3 * one_block,
    )
    assert offloaded.parts["base"] == plain.parts["base"]
    assert offloaded.host > 0


def test_where_the_base_is_cut_low_vram_has_nothing_to_do(
    deep_i2v: Path, i2v_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """VideoX-Fun's shell blocks for FSDP and ZeRO-3 have both."""
    words = ("--low_vram", "--strategy", "zero3", "--dry-run")
    distill(deep_i2v, i2v_shards, tmp_path / "out", *words)
    said = capsys.readouterr().out
    assert "--low-vram has no effect: zero3 shards the base already" in said


@pytest.fixture(scope="module")
def in_one(tiny_t2v: Path, t2v_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes, in one."""
    return distill(tiny_t2v, t2v_shards, tmp_path_factory.mktemp("one") / "out", *RUN, *SINGLE)


@pytest.mark.long
def test_two_processes(in_one: Path, tiny_t2v: Path, t2v_shards: Path, tmp_path: Path) -> None:
    out, more = tmp_path / "out", ("--strategy", "zero2", "--low-vram", "--activation-offloading")
    typed(*command(tiny_t2v, t2v_shards, out, *IN_TWO, *more))
    assert_like_alone(in_one, out)


@pytest.mark.long
def test_what_lives_in_cpu_memory(deep_i2v: Path, i2v_shards: Path, tmp_path: Path) -> None:
    found = {}
    levers = {"plain": (), "streamed": ("--low-vram",), "three": ("--blocks-to-swap", "3")}
    for name, more in levers.items():
        file = tmp_path / f"{name}.json"
        words = ["--model", str(deep_i2v), "--shards", str(i2v_shards), "--device", "cpu"]
        words += ["--gen-update-interval", "1", *more]
        gc.collect()  # what the run before it left in cycles
        lean_run.measure("held", words, file)
        found[name] = json.loads(file.read_text())
    assert found["streamed"]["base"] == found["plain"]["base"]
    assert found["plain"]["streamed"] == 0
    blocks = tiny_transformer("i2v", num_layers=LAYERS).blocks
    kept_fp32 = ("norm2", "scale_shift_table")
    of_block = [
        p.numel() * (4 if any(part in name for part in kept_fp32) else 2)
        for name, p in blocks[0].named_parameters()
    ]
    assert found["streamed"]["streamed"] == LAYERS * sum(of_block)
    assert found["three"]["streamed"] == 3 * sum(of_block)
    aligned = sum(-(-size // 512) * 512 for size in of_block)
    assert found["plain"]["stream_buffers"] == 0
    for name, count in (("streamed", LAYERS), ("three", 3)):
        assert found[name]["stream_buffers"] == 2 * aligned
        padding = count * (aligned - sum(of_block))  # in CPU memory
        others = found["plain"]["others"] + padding
        assert found[name]["others"] == pytest.approx(others, abs=aligned)
    for resident in found.values():
        parts = ("base", "stream_buffers", "loras", "optimizers")
        needed = sum(resident[part] for part in parts)
        assert resident["over_needed"] == pytest.approx(1 + resident["others"] / needed)


# Below the command line: what lies where, and when it is copied


def roles_of(layers: int = LAYERS) -> Roles:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        transformer = tiny_transformer("t2v", num_layers=layers).bfloat16()
    transformer.enable_gradient_checkpointing()
    targets = select_targets(transformer, ("q", "k", "v", "ffn.0", "ffn.2"))
    roles = Roles(transformer, LoraSpec(rank=4, alpha=3, targets=targets), seed=1)
    for seed, role in enumerate(("generator", "critic")):
        randomise_lora(roles.parameters(role), seed)
    return roles


def velocity(roles: Roles, *, seed: int = 0, wide: int = 10) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 16, 3, 4, wide, generator=rng)
    text = torch.randn(2, 7, TEXT_DIM, generator=rng)
    return roles.velocity(x, torch.tensor([812.5, 333.25]), text, None)


def generator_pass(roles: Roles) -> list[torch.Tensor]:
    """Passes as in an update of the generator: with gradients, without, with; then backward through
    both graphs. Velocities and gradients."""
    with roles.generator():
        first = velocity(roles)
    with torch.no_grad(), roles.teacher():
        teacher = velocity(roles, seed=1)
    with roles.generator():
        second = velocity(roles, seed=2, wide=6)
        ((first - teacher).square().mean() + second.square().mean()).backward()
    parameters = roles.parameters("generator").values()
    found = [first, teacher, second, *(p.grad for p in parameters if p.grad is not None)]
    roles.transformer.zero_grad(set_to_none=True)
    return [tensor.detach() for tensor in found]


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def base_weights(block: nn.Module) -> list[torch.Tensor]:
    return [p for p in block.parameters() if not p.requires_grad]


@contextmanager
def watched(blocks: "nn.ModuleList", look: Callable[[int], None]) -> Iterator[None]:
    """Call `look` with the block's number whenever one of its linear layers works."""
    handles = [
        layer.register_forward_hook(lambda *_, number=number: look(number))
        for number, block in enumerate(blocks)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("count", [None, 3])
def test_no_more_than_two_of_the_streamed_blocks_are_there(count: int | None) -> None:
    expected = generator_pass(roles_of())
    roles = roles_of()
    blocks = roles.transformer.blocks
    numbers = swapped_blocks(LAYERS, count)
    size = sum(p.nbytes for p in base_weights(blocks[0]))
    streamed = stream_blocks(roles.transformer, numbers, CPU)
    pieces = len(base_weights(blocks[0]))
    bases = [base_weights(block) for block in blocks]
    assert size * 2 <= streamed.buffer_bytes <= (size + 512 * pieces) * 2  # each aligned for itself
    assert streamed.home_bytes == size * len(numbers)
    most = 0
    storages: set[int] = set()

    def look(number: int) -> None:
        nonlocal most
        shown = [n for n in range(LAYERS) if bases[n][0].numel()]
        assert number in shown
        most = max(most, len([n for n in shown if n in numbers]))
        storages.update(p.untyped_storage().data_ptr() for n in numbers for p in bases[n])

    with watched(blocks, look):
        for _ in range(3):
            assert equal(generator_pass(roles), expected)
    assert most <= 2
    assert len(storages - {0}) == 2, "the same two buffers all along"
    assert blocks_on_device(LAYERS, count) == LAYERS - len(numbers) + 2


def test_the_next_block_is_fetched_while_one_works(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    roles = roles_of()
    streamed = stream_blocks(roles.transformer, range(LAYERS), CPU)
    homes = [block.home.bytes.data_ptr() for block in streamed._blocks]
    copy = streamed._side.copy

    def noted(target: torch.Tensor, source: torch.Tensor) -> object:
        events.append(f"+{homes.index(source.data_ptr())}")
        return copy(target, source)

    monkeypatch.setattr(streamed._side, "copy", noted)
    for number, block in enumerate(roles.transformer.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: events.append(str(number)))

    with torch.no_grad():
        velocity(roles)
        assert " ".join(events) == "+0 +1 0 +2 1 +3 2 +4 3 +0 4"  # ready for the next one
        events.clear()
        velocity(roles)
        assert " ".join(events) == "+1 0 +2 1 +3 2 +4 3 +0 4"
        events.clear()
    with roles.critic():
        loss = velocity(roles).square().mean()
        assert " ".join(events) == "+1 0 +2 1 +3 2 +4 3 4"  # ready for the way back
        events.clear()
        loss.backward()
        assert " ".join(events) == "4 +2 3 +1 2 +0 1 0"  # ready for the next pass
        events.clear()
        velocity(roles)
        assert events[:3] == ["0", "+2", "1"]


class LateStream(SideStream):
    """Copies as late as a GPU may make them: when the compute stream is told to wait for one."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.begun: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.done = 0

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> Copy:
        self.begun.append((target.detach(), source.detach()))
        return Copy(compute=self, done=len(self.begun))

    @torch.no_grad()
    def wait_event(self, number: int) -> None:
        while self.done < number:
            target, source = self.begun[self.done]
            for tensor in (target, source):
                ours = 2  # the view in `begun`, and the storage that is asked
                uses = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
                assert uses > ours, "given back before the copy was waited for"
            target.copy_(source)
            self.begun[self.done] = (torch.empty(0), torch.empty(0))
            self.done += 1


@pytest.mark.parametrize("count", [None, 3])
def test_nothing_relies_on_a_copy_before_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, count: int | None
) -> None:
    monkeypatch.setattr(block_offload, "SideStream", LateStream)
    monkeypatch.setattr(activation_offload, "SideStream", LateStream)
    expected = generator_pass(roles_of())
    roles = roles_of()
    streamed = stream_blocks(roles.transformer, swapped_blocks(LAYERS, count), CPU)
    offloading = ActivationOffloading(CPU)
    roles.transformer.enable_gradient_checkpointing(offloading.checkpoint)
    for _ in range(3):
        assert equal(generator_pass(roles), expected)
    for side in (streamed._side, offloading._side):
        assert isinstance(side, LateStream) and side.done > 2 * LAYERS


def test_quantised_blocks_stream_in_their_few_bits() -> None:
    both = [roles_of(), roles_of()]
    for roles in both:
        quantise(roles.transformer, "int8", CPU)
    plain, roles = both
    bytes_of_blocks = sum(p.nbytes for b in plain.transformer.blocks for p in base_weights(b))
    streamed = stream_blocks(roles.transformer, range(LAYERS), CPU)
    assert streamed.home_bytes == bytes_of_blocks
    expected = generator_pass(plain)
    for _ in range(2):
        assert equal(generator_pass(roles), expected)


def test_a_use_out_of_turn_fails() -> None:
    roles = roles_of()
    stream_blocks(roles.transformer, range(LAYERS), CPU)
    with torch.no_grad():
        velocity(roles)
        with pytest.raises(RuntimeError):
            roles.transformer.blocks[1].ffn.net[2](torch.zeros(1, 48, dtype=torch.bfloat16))


@pytest.mark.parametrize("computing_again", [False, True])
def test_a_pass_that_fails_on_its_way_leaves_all_usable(computing_again: bool) -> None:
    expected = generator_pass(roles_of())
    roles = roles_of()
    stream_blocks(roles.transformer, range(LAYERS), CPU)
    offloading = ActivationOffloading(CPU)
    roles.transformer.enable_gradient_checkpointing(offloading.checkpoint)

    def fail(number: int) -> None:
        backward = torch._C._current_graph_task_id() != -1
        if number == 2 and backward == computing_again:
            raise MemoryError("of the test")

    with watched(roles.transformer.blocks, fail), pytest.raises(MemoryError):
        generator_pass(roles)
    roles.transformer.zero_grad(set_to_none=True)
    for _ in range(2):
        assert equal(generator_pass(roles), expected)


def test_a_buffer_that_autograd_still_reads_is_left_to_it() -> None:
    """Without checkpointing autograd keeps every block; no buffer is overwritten under it."""
    roles = roles_of()
    blocks = roles.transformer.blocks
    layers = [block.ffn.net[2].base_layer for block in blocks]
    x = torch.randn(3, 48, dtype=torch.bfloat16, requires_grad=True)

    def gradient(blocks_begin: bool) -> torch.Tensor:
        total = torch.zeros(())
        for block, layer in zip(blocks, layers, strict=True):
            if blocks_begin:
                for hook in block._forward_pre_hooks.values():
                    hook(block, ())
            total = total + layer(x).float().square().sum()
        (found,) = torch.autograd.grad(total, x)
        return found

    expected = gradient(False)
    StreamedBlocks(list(blocks), CPU)
    assert gradient(True).equal(expected)


# Activations


@pytest.mark.parametrize("offloaded", [False, True])
def test_what_checkpointing_keeps_is_not_on_the_device(offloaded: bool) -> None:
    expected = generator_pass(roles_of())
    roles = roles_of()
    if offloaded:
        roles.transformer.enable_gradient_checkpointing(ActivationOffloading(CPU).checkpoint)
    inputs: list[weakref.ref[torch.UntypedStorage]] = []
    there: list[int] = []

    def look(module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        inputs.append(weakref.ref(given[0].untyped_storage()))
        there.append(sum(one() is not None for one in inputs))

    for block in roles.transformer.blocks:
        block.register_forward_pre_hook(look)
    assert equal(generator_pass(roles), expected)
    forward, backward = there[: 3 * LAYERS], there[3 * LAYERS :]
    assert len(backward) == 2 * LAYERS
    # Of two passes that are kept; else the block's own, and the one before that is on its way out.
    assert max(forward) == (2 if offloaded else 2 * LAYERS)
    if offloaded:
        assert max(backward) <= 3
    assert not any(one() is not None for one in inputs)


def test_hidden_states_go_there_and_back_once_each_before_they_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    roles = roles_of()
    offloading = ActivationOffloading(CPU)
    roles.transformer.enable_gradient_checkpointing(offloading.checkpoint)
    events: list[str] = []
    copied: list[int] = []
    copy = offloading._side.copy

    def noted(target: torch.Tensor, source: torch.Tensor) -> object:
        events.append("+")
        copied.append(source.nbytes)
        return copy(target, source)

    monkeypatch.setattr(offloading._side, "copy", noted)
    for number, block in enumerate(roles.transformer.blocks):
        block.register_forward_pre_hook(lambda *_, number=number: events.append(str(number)))
    with roles.critic():
        velocity(roles, wide=10)
        velocity(roles, wide=6).square().mean().backward()
        events.clear()
        copied.clear()
        loss = velocity(roles, wide=10).square().mean()
        assert " ".join(events) == "+ 0 + 1 + 2 + 3 + 4"
        events.clear()
        loss.backward()
        assert " ".join(events) == "+ + 4 + 3 + 2 + 1 0"  # the first waits, the others are ahead
    tokens, width = 3 * (4 // 2) * (10 // 2), 32
    assert copied == 2 * LAYERS * [2 * tokens * width * 2]

    # What torch's own save_on_cpu would move, around the pass
    others: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        others.append(tensor.nbytes)
        return tensor

    plain = roles_of()
    with plain.critic(), saved_tensors_hooks(pack, lambda tensor: tensor):
        velocity(plain, wide=10)
    assert sum(others) > sum(copied) / 2


def test_cpu_memory_is_used_again() -> None:
    """By passes of other sizes, too: what there is grows to the largest."""
    roles = roles_of()
    offloading = ActivationOffloading(CPU)
    roles.transformer.enable_gradient_checkpointing(offloading.checkpoint)
    for wide in (6, 10, 8, 10):
        with roles.critic():
            velocity(roles, wide=wide).square().mean().backward()
    sizes = [memory.bytes.nbytes for memory in offloading._free]
    assert sizes == LAYERS * [2 * 3 * 2 * 5 * 32 * 2]

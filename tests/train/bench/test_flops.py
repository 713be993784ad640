"""FLOPs are counted as a closed form has them."""

import math
from collections.abc import Sequence
from pathlib import Path

from tests.train.conftest import prepared_run
from tests.train.test_distill import SMALL
from train.bench import flops
from train.data.batches import load_prompt_bank
from train.loop import micro_batches
from train.methods.distillation import Distillation
from train.methods.dmd import exit_step
from train.run import Run

# Of `tests.models.tiny_transformer` for t2v.
RANK, WIDTH, INNER, LAYERS, TEXT_WIDTH, FREQUENCIES, CHANNELS, PATCH = 4, 32, 48, 2, 32, 32, 16, 4
TEXT = 512


def prepared(model: Path, shards: Path, *more: str) -> Run:
    return prepared_run("--model", str(model), "--shards", str(shards), *SMALL, *more)


def counted(run: Run, updates: Sequence[int]) -> dict[int, int]:
    bank = load_prompt_bank(run.data.first, run.spec.family)
    return flops.count(run, micro_batches(run, bank), bank, updates)


def forward_pass(samples: int, tokens: int, *, rank: int = RANK) -> int:
    """A pass with a LoRA on ffn.2: two for each weight and row; two products for attention."""
    n, m, d, f = samples * tokens, samples * TEXT, WIDTH, INNER
    self_attention = 4 * n * d * d + 2 * n * tokens * d
    cross_attention = 2 * (n + m) * d * d + 2 * n * TEXT * d
    feed_forward = 2 * n * d * f + rank * n * (d + f)
    outside = 2 * n * CHANNELS * PATCH * d  # patches in and out
    outside += m * (TEXT_WIDTH + d) * d + samples * (FREQUENCIES + d + 6 * d) * d
    return 2 * (LAYERS * (self_attention + cross_attention + feed_forward) + outside)


def backward_pass(samples: int, tokens: int) -> int:
    """Down to the LoRA of the first block's ffn.2, which is the last of that block."""
    n, d, f = samples * tokens, WIDTH, INNER
    self_attention = 4 * n * d * d + 4 * n * tokens * d
    cross_attention = 2 * n * d * d + 2 * n * TEXT * d  # the text has nothing to learn
    feed_forward = 2 * n * d * f + 2 * RANK * n * (d + f)
    whole_blocks = (LAYERS - 1) * (self_attention + cross_attention + feed_forward)
    return 2 * (whole_blocks + RANK * n * (2 * d + f) + n * CHANNELS * PATCH * d)


def test_a_critic_update_against_a_closed_form(tiny_t2v: Path, t2v_shards: Path) -> None:
    run = prepared(
        tiny_t2v, t2v_shards, "--target-name", "ffn.2", "--gradient-accumulation-steps", "2",
        "--start", "noise", "--gen-update-interval", "9",
    )  # fmt: skip
    assert isinstance(run.objective, Distillation)
    steps = [exit_step(run.objective.recipe, update) for update in range(5)]
    updates = [steps.index(min(steps)), steps.index(max(steps))]
    assert steps[updates[0]] < steps[updates[1]]  # one has more passes than the other
    found = counted(run, updates)
    batches = micro_batches(run, load_prompt_bank(run.data.first, run.spec.family))
    for update in updates:
        expected = 0
        for micro_step in range(2):
            samples, _, *grid = batches.load(update, micro_step).latents.shape
            tokens = math.prod(grid) // PATCH
            assert samples == 2 and tokens > 1
            expected += (steps[update] + 2) * forward_pass(samples, tokens)
            expected += backward_pass(samples, tokens)
        assert found[update] == expected


def test_guidance_is_two_passes_more_in_a_generator_update(
    tiny_t2v: Path, t2v_shards: Path
) -> None:
    found = {}
    for scale in ("1", "3"):
        guidance = ("--real-guidance-scale", scale, "--fake-guidance-scale", scale)
        run = prepared(tiny_t2v, t2v_shards, "--target-name", "ffn.2", *guidance)
        found[scale] = counted(run, [2])[2]
    batch = micro_batches(run, load_prompt_bank(run.data.first, run.spec.family)).load(2, 0)
    tokens = math.prod(batch.latents.shape[2:]) // PATCH
    teacher, critic = forward_pass(2, tokens, rank=0), forward_pass(2, tokens)
    assert found["3"] - found["1"] == teacher + critic


def test_cards() -> None:
    assert flops.bf16_peak("NVIDIA H100 80GB HBM3") == 989.4e12
    assert flops.bf16_peak("2 CPU cores, 1 thread(s)") is None

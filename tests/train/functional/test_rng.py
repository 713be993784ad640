"""Counted randomness: pinned values, and what they may depend on."""

import numpy as np
import pytest
import torch

from train.functional.rng import choice, counted_rng, noise, spread

SHAPE = (2, 3, 4, 4)


def test_values_are_pinned() -> None:
    """Golden: a change would make resumed runs go on with other noise than they began with.

    A new numpy or another machine must not change them either. If a change of the streams is
    wanted, raise the checkpoint's FORMAT_VERSION with it.
    """
    assert noise((3,), 42, "rollout 0", 7, [0, 3]).flatten().tolist() == pytest.approx(
        [0.51180714, 1.20752466, -0.60427731, -3.16145992, 0.57775831, -0.64768207], abs=1e-7
    )
    assert spread(42, "score level", 7, [0, 3], 1).tolist() == pytest.approx(
        [0.63215214, 0.43393695], abs=1e-7
    )
    assert spread(42, "score level", 7, [0, 3], 4).tolist() == pytest.approx(
        [0.90803802, 0.35848424], abs=1e-7
    )
    drawn = [choice(range(4), 42, "exit step", update) for update in range(12)]
    assert drawn == [0, 1, 3, 1, 0, 0, 2, 1, 2, 3, 1, 2]


@pytest.mark.parametrize(
    "other",
    [
        (43, "rollout 0", 7, [0]),
        (42 + 2**40, "rollout 0", 7, [0]),
        (42, "rollout 1", 7, [0]),
        (42, "rollout 0", 8, [0]),
        (42, "rollout 0", 7, [1]),
        (42, "rollout 0", 0, [7]),
    ],
    ids=["seed", "seed's high bits", "purpose", "update", "sample", "update and sample swapped"],
)
def test_everything_that_counts_changes_the_numbers(
    other: tuple[int, str, int, list[int]],
) -> None:
    here = (42, "rollout 0", 7, [0])
    one, two = noise(SHAPE, *here).flatten(), noise(SHAPE, *other).flatten()
    assert not torch.isclose(one, two).any()
    assert spread(*here, 1) != spread(*other, 1)


def test_seeds_far_apart_are_different_seeds() -> None:
    """torch's CPU generator takes 32 bits of a seed: 5 and 5 + 2⁴⁰ would be one."""
    assert not torch.equal(
        noise(SHAPE, 5, "score noise", 0, [0]), noise(SHAPE, 5 + 2**40, "score noise", 0, [0])
    )
    options = range(1000)
    assert choice(options, 5, "exit step", 0) != choice(options, 5 + 2**40, "exit step", 0)


def test_counters_do_not_run_into_each_other() -> None:
    draws = [counted_rng(*key).random() for key in ((1, "a", 1, 11), (1, "a", 11, 1), (11, "a", 1))]
    assert len(set(draws)) == 3


def test_a_row_depends_on_its_sample_alone() -> None:
    """Cut in any way, in any order, the same samples get the same numbers."""
    whole, levels = noise(SHAPE, 1, "p", 2, range(6)), spread(1, "p", 2, range(6), 1)
    for cut in ([0, 1, 2], [3, 4, 5], [5, 0], [4]):
        assert torch.equal(noise(SHAPE, 1, "p", 2, cut), whole[cut])
        assert torch.equal(spread(1, "p", 2, cut, 1), levels[cut])
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6
    assert len(set(levels.tolist())) == 6


def test_no_state_is_kept_and_none_is_touched() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = noise(SHAPE, 1, "p", 2, [0])
    assert torch.equal(noise(SHAPE, 1, "p", 2, [0]), first)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


def test_statistics_are_those_of_the_distributions() -> None:
    """Over updates and samples, not only inside one draw: bounds are 5 standard errors."""
    rows = torch.cat([noise((4, 8), 9, "p", update, range(8)) for update in range(50)]).double()
    n = rows.numel()
    assert rows.dtype == torch.float64 and n == 12800
    assert abs(rows.mean()) < 5 / n**0.5
    assert abs(rows.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((rows**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs(np.corrcoef(rows[0::2].flatten(), rows[1::2].flatten())[0, 1]) < 5 / (n / 2) ** 0.5
    levels = torch.cat([spread(9, "p", update, range(8), 1) for update in range(250)]).double()
    assert 0 <= levels.min() < 0.01 and 0.99 < levels.max() < 1
    assert abs(levels.mean() - 0.5) < 5 * (1 / 12 / 2000) ** 0.5
    counts = np.histogram(levels, bins=10, range=(0, 1))[0]
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # χ², 9 degrees of freedom, 0.1%


@pytest.mark.parametrize("strata", [1, 2, 5, 8])
def test_spread_samples_of_a_step_share_out_the_interval(strata: int) -> None:
    """One in each part, never two; where in it, and whose it is, differs from step to step."""
    steps = np.stack(
        [spread(9, "p", step, range(strata), strata).double().numpy() for step in range(2000)]
    )
    parts = np.floor(steps * strata).astype(int)
    assert (np.sort(parts, axis=1) == np.arange(strata)).all()
    owners = np.stack([np.bincount(parts[:, sample], minlength=strata) for sample in range(strata)])
    fair = 2000 / strata
    assert (((owners - fair) ** 2 / fair).sum(axis=1) < strata + 30).all()
    inside = (steps * strata - parts).ravel()
    counts = np.histogram(inside, bins=10, range=(0, 1))[0]
    assert ((counts - len(inside) / 10) ** 2 / (len(inside) / 10)).sum() < 27.9  # as below


def test_spread_is_uniform_for_each_sample_and_its_mean_varies_less() -> None:
    """The mean of n stratified draws has variance 1/(12·n³); of n independent ones 1/(12·n)."""
    n, steps = 4, 4000
    drawn = np.stack([spread(5, "q", step, range(n), n).double().numpy() for step in range(steps)])
    for sample in range(n):
        counts = np.histogram(drawn[:, sample], bins=10, range=(0, 1))[0]
        assert ((counts - steps / 10) ** 2 / (steps / 10)).sum() < 27.9
    expected = 1 / (12 * n**3)
    assert abs(drawn.mean(axis=1).var() - expected) < 5 * expected * (2 / steps) ** 0.5
    # Two samples of one step: never in one part, so a little apart on average.
    correlation = np.corrcoef(drawn[:, 0], drawn[:, 1])[0, 1]
    assert abs(correlation - (-1 / (n - 1) * (1 - 1 / n**2))) < 5 / steps**0.5


def test_spread_depends_on_the_sample_not_on_the_cut() -> None:
    whole = spread(1, "p", 2, range(6), 6)
    for cut in ([0, 1, 2], [3, 4, 5], [5, 0], [4]):
        assert torch.equal(spread(1, "p", 2, cut, 6), whole[cut])
    alone = [counted_rng(1, "p", 2, sample).random() for sample in (0, 3)]
    assert spread(1, "p", 2, [0, 3], 1).tolist() == pytest.approx(alone, abs=1e-7)


def test_results_are_fp32_in_the_asked_shape() -> None:
    drawn = noise(SHAPE, 1, "p", 2, [0, 1, 2])
    assert drawn.shape == (3, *SHAPE) and drawn.dtype == torch.float32
    assert spread(1, "p", 2, [0, 1], 1).dtype == torch.float32

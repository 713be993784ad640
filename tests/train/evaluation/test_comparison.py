"""Ratios of a student to its teacher, and their bootstrap intervals."""

import numpy as np
import pytest

from train.evaluation.comparison import compare


def test_a_constant_ratio_is_certain() -> None:
    """Both sides of a prompt are drawn together: that prompts differ is no uncertainty."""
    teacher = [1.0, 5.0, 20.0, 3.0]
    found = compare(teacher, [1.2 * value for value in teacher])
    assert found.ratio == pytest.approx(1.2)
    assert found.interval == pytest.approx((1.2, 1.2))
    assert (found.teacher, found.student) == pytest.approx((7.25, 8.7))


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    """Of 200 experiments with 20 prompts; a percentile bootstrap is a little too sure of itself."""
    rng = np.random.default_rng(3)
    held = 0
    for _ in range(200):
        teacher = rng.uniform(1, 3, 20)
        low, high = compare(teacher, 0.8 * teacher * rng.uniform(0.7, 1.3, 20)).interval or (0, 0)
        held += low < 0.8 < high
    assert 0.88 <= held / 200 <= 0.99


def test_the_same_numbers_give_the_same_interval_and_more_prompts_a_shorter_one() -> None:
    rng = np.random.default_rng(1)
    teacher, student = rng.uniform(1, 2, 64), rng.uniform(1, 2, 64)
    few, again, many = (compare(teacher[:n], student[:n]) for n in (8, 8, 64))
    assert few == again
    assert few.interval and many.interval
    assert many.interval[1] - many.interval[0] < few.interval[1] - few.interval[0]


def test_what_cannot_be_said_is_none() -> None:
    assert compare([2.0], [1.0]).interval is None and compare([2.0], [1.0]).ratio == 0.5
    still = compare([0.0, 0.0], [1.0, 2.0])
    assert (still.ratio, still.interval) == (None, None)
    assert still.words() == ("0", "1.5", "–", "–")
    rarely = compare([0.0, 1.0], [1.0, 1.0])  # a quarter of the resamples has a teacher of 0
    assert (rarely.ratio, rarely.interval) == (2.0, None)

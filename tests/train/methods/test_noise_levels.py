"""Which noise levels `wantrain lora` teaches an expert at."""

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from shared.errors import UserError
from tests.train.methods.test_flow_matching_float64 import levels_of

SIDES = {"low": (0.0, 0.875), "high": (0.875, 1.0), "full": (0.0, 1.0)}


def drawn(expert: str, sampling: str, count: int = 4000) -> np.ndarray:
    quantiles = torch.rand(count, generator=torch.Generator().manual_seed(1))
    found = levels_of(expert, 12.0, 0.875, sampling).sigma(quantiles)
    assert found.dtype == torch.float32
    return found.double().numpy()


def whole(sampling: str, count: int) -> np.ndarray:
    """The model's levels, whoever owns them, drawn the long way."""
    rng = np.random.default_rng(2)
    if sampling == "uniform":
        u = rng.uniform(size=count)
    else:
        u = 1 / (1 + np.exp(-rng.normal(0.4, 1.3, size=count)))
    return np.asarray(12 * u / (1 + 11 * u))


@pytest.mark.parametrize("sampling", ["uniform", "logit-normal"])
@pytest.mark.parametrize("expert", SIDES)
def test_an_expert_has_the_models_distribution_given_its_side(expert: str, sampling: str) -> None:
    """As if the levels of the other side had been drawn and thrown away."""
    low, high = SIDES[expert]
    found = drawn(expert, sampling)
    assert found.min() >= low - 1e-7 and found.max() <= high + 1e-7
    everyone = whole(sampling, 40_000)
    kept = everyone[(everyone >= low) & (everyone < high)]
    assert len(kept) > 4000
    # Two samples of one distribution: such a difference has a probability of 1e-3 or more.
    assert kstest(found, kept).pvalue > 1e-3
    if expert != "full":
        assert kstest(found, everyone).pvalue < 1e-20
        cut_off = np.clip(everyone, low, high)
        assert kstest(found, cut_off).pvalue < 1e-20


def test_the_ends_of_a_normal_are_numbers() -> None:
    for expert, (low, high) in SIDES.items():
        ends = levels_of(expert, 12.0, 0.875, "logit-normal").sigma(torch.tensor([0.0, 1.0]))
        assert ends.tolist() == pytest.approx([low, high], abs=1e-6)


def test_a_distribution_that_misses_the_expert_is_refused() -> None:
    from train.methods.flow_matching import NoiseLevels

    with pytest.raises(UserError, match=r"--logit-mean: found -9 .*outside of t 875 to 1000"):
        NoiseLevels(
            expert="high", shift=12.0, boundary=0.875, sampling="logit-normal", mean=-9, std=0.5
        )
    with pytest.raises(UserError, match="one transformer and no boundary"):
        levels_of("low", 5.0, None, "uniform")

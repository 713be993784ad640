"""Sizes with names: whose samples a process computes."""

from datetime import timedelta

import pytest

from train.distributed.mesh import Mesh
from train.distributed.process_group import Ranks


def test_each_process_is_a_data_rank_of_its_own() -> None:
    ranks = Ranks(rank=3, world_size=4, timeout=timedelta(seconds=1))
    assert (ranks.mesh, ranks.mesh.data_rank(ranks.rank)) == (Mesh(data=4, context=1), 3)


def test_samples_are_not_split_among_processes() -> None:
    with pytest.raises(AssertionError, match="context 2"):
        Mesh(data=2, context=2)

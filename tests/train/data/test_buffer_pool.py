"""Memory that is used again: never while anything needs it, always when nothing does."""

import gc
from concurrent.futures import ThreadPoolExecutor

import torch

from train.data.buffer_pool import Buffers


def test_what_was_left_is_used_again() -> None:
    buffers = Buffers()
    first = buffers.empty((3, 5, 7), torch.bfloat16)
    assert first.shape == (3, 5, 7) and first.dtype == torch.bfloat16 and first.is_contiguous()
    place = first.data_ptr()
    assert buffers.empty((3, 5, 7), torch.bfloat16).data_ptr() != place
    del first
    assert buffers.empty((5, 20), torch.bfloat16).data_ptr() == place  # nearly as large: shared


def test_a_view_keeps_it() -> None:
    buffers = Buffers()
    whole = buffers.empty((4, 6), torch.float32)
    whole.fill_(3)
    part, place = whole[:, 2:4].unsqueeze(0), whole.data_ptr()
    del whole
    gc.collect()
    other = buffers.empty((4, 6), torch.float32).fill_(9)
    assert other.data_ptr() != place and bool((part == 3).all())
    del part
    assert buffers.empty((4, 6), torch.float32).data_ptr() == place


def test_threads_share_it() -> None:
    buffers = Buffers()

    def use(number: int) -> tuple[bool, int]:
        tensor = buffers.empty((64, 64), torch.float32).fill_(number)
        return bool((tensor == number).all()), tensor.data_ptr()

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(use, range(500)))
    assert all(right for right, _ in found)
    assert len({place for _, place in found}) <= 8

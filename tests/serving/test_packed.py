"""Keys and values of many sequences, a place for each."""

import torch

from w8a8.serving.packed import Piece, Places, Step


def test_what_is_not_written_is_zero_and_a_place_is_cleared():
    """What is masked is multiplied with nothing, and nothing times garbage of the memory may be a NaN."""
    garbage = [torch.full((1 << 16,), torch.nan) for _ in range(8)]
    del garbage
    store = Places(3, 8)
    for dtype in (torch.float32, torch.bfloat16):
        layer = int(dtype is torch.bfloat16)
        step = Step.of(store, [Piece(1, 0, 2, 0)], torch.device("cpu"))
        new = torch.full((1, 2, 2, 4), torch.nan, dtype=dtype)
        keys, values = store.written(layer, step, new, new)
        for kept in (keys, values):
            assert kept.dtype is dtype
            assert kept[1, :, :2].isnan().all()
            assert not kept[1, :, 2:].any()
            assert not kept[[0, 2]].any()
        store.clear(1)
        assert not keys.any()
        assert not values.any()

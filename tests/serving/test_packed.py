"""A step over several sequences, and what a token of it sees."""

import torch

from w8a8.serving.packed import Piece, Step
from w8a8.serving.places import Places


def test_a_mask_is_made_once_for_all_layers_of_a_window():
    store = Places(1, 40)
    step = Step.of(store, [Piece(0, 0, 3, 10)], torch.device("cpu"))
    mask = step.mask(step.pieces[0], 7, 4, torch.float32)
    assert step.mask(step.pieces[0], 7, 4, torch.float32) is mask
    seen = mask.eq(0)[0, 0].int().tolist()
    assert seen == [[1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]

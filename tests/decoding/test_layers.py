"""The layers beside those of transformers: the same calls, the same bits."""

import inspect

import pytest
import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from w8a8.decoding.layers import BlockLayer, Int8Layer, SlidingBlockLayer, SlidingInt8Layer
from w8a8.decoding.stores import BLOCK
from w8a8.errors import ModelError
from w8a8.kernels import cached

WINDOW = 7
NEWER = "tokens_to_remove" in inspect.signature(DynamicLayer.crop).parameters


def states(batch, tokens):
    return torch.randn(batch, 2, tokens, 8), torch.randn(batch, 2, tokens, 6)


def rounded(keys, values):
    """What int8 keeps of keys and values."""
    codes = cached.empty(*keys.shape[:2], 16 * keys.shape[2], keys.shape[3], values.shape[3], keys.device)
    cached.plain_append(codes, keys, values, 0)
    tokens = keys.shape[2]
    return cached.plain_keys(codes, 0, tokens, keys.dtype), cached.plain_values(codes, 0, tokens, values.dtype)


def crop(layer, tokens):
    """The same of a layer, in whichever way this transformers says it."""
    length = layer.get_seq_length()
    layer.crop(-tokens if NEWER else length - tokens)


def history(seed, *, sliding):
    """Calls as `generate` makes them: a prompt, tokens, and now and then something else."""
    torch.manual_seed(seed)
    batch = 2
    yield "update", states(batch, int(torch.randint(1, 40, ())))
    for _ in range(60):
        match int(torch.randint(0, 8, ())):
            case 0:
                yield "reorder_cache", torch.randint(0, batch, (batch,))
            case 1:
                yield "reorder_cache", torch.arange(batch)
            case 2 if not sliding:
                yield "crop", int(torch.randint(0, 4, ()))
            case 3 if batch < 5:
                batch *= 2
                yield "batch_repeat_interleave", 2
            case 4 if batch > 2:
                batch -= 1
                yield "batch_select_indices", torch.randperm(batch + 1)[:batch]
            case 5:
                yield "update", states(batch, int(torch.randint(1, 2 * BLOCK, ())))
            case _:
                yield "update", states(batch, 1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (BlockLayer, DynamicLayer),
        (Int8Layer, DynamicLayer),
        (lambda: SlidingBlockLayer(WINDOW), lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW)),
        (lambda: SlidingInt8Layer(WINDOW), lambda: DynamicSlidingWindowLayer(sliding_window=WINDOW)),
    ],
    ids=["all", "all, int8", "window", "window, int8"],
)
def test_any_history_gives_the_bits_of_the_layer_of_transformers(ours, theirs, seed):
    ours, theirs = ours(), theirs()
    int8 = isinstance(ours, Int8Layer | SlidingInt8Layer)
    for call, argument in history(seed, sliding=ours.is_sliding):
        assert ours.get_mask_sizes(3) == theirs.get_mask_sizes(3)
        if call == "update":
            found = ours.update(*argument)
            wanted = theirs.update(*(rounded(*argument) if int8 else argument))
            for a, b in zip(found, wanted, strict=True):
                assert torch.equal(a, b)
        elif call == "crop":
            crop(ours, argument)
            crop(theirs, argument)
        else:
            getattr(ours, call)(argument)
            getattr(theirs, call)(argument)
        assert ours.get_seq_length() == theirs.get_seq_length()
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.mark.skipif(not NEWER, reason="before transformers 5.14 what left a window does not come back")
@pytest.mark.parametrize("ours", [SlidingBlockLayer, SlidingInt8Layer], ids=["float", "int8"])
def test_what_left_a_window_comes_back_while_the_past_is_recorded(ours):
    ours, theirs = ours(WINDOW), DynamicSlidingWindowLayer(sliding_window=WINDOW)
    keep = rounded if isinstance(ours, SlidingInt8Layer) else lambda *x: x
    for layer in (ours, theirs):
        layer.activate_past_recording()
    for tokens, gone in [(5, 0), (1, 1), (20, 4), (6, 0), (3, 3), (2 * BLOCK, 5), (1, 0)]:
        new = states(1, tokens)
        for a, b in zip(ours.update(*new), theirs.update(*keep(*new)), strict=True):
            assert torch.equal(a, b)
        for layer in (ours, theirs):
            layer.crop(-gone)
        assert torch.equal(ours.keys, theirs.keys)
        assert ours.get_mask_sizes(2) == theirs.get_mask_sizes(2)


def test_what_left_a_window_is_not_brought_back_otherwise():
    layer = SlidingBlockLayer(WINDOW)
    layer.update(*states(1, WINDOW + 3))
    with pytest.raises((RuntimeError, ValueError), match=f"window of {WINDOW}"):
        crop(layer, 2)


def test_a_token_is_written_into_the_room_that_there_is():
    layer = Int8Layer()
    layer.update(*states(1, BLOCK - 3))
    held = layer.store
    for _ in range(3):
        layer.update(*states(1, 1))
    assert layer.store is held
    layer.update(*states(1, 1))
    assert layer.store is not held
    assert layer.store.room == 2 * BLOCK


def test_a_window_does_not_grow():
    layer = SlidingInt8Layer(WINDOW)
    for _ in range(4 * BLOCK):
        layer.update(*states(1, 1))
    assert layer.store.room == BLOCK


def test_a_layer_that_was_reset_is_as_new():
    layer = SlidingBlockLayer(WINDOW)
    layer.update(*states(2, 30))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.keys is None
    new = states(3, 4)
    assert torch.equal(layer.update(*new)[0], new[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int8_gives_back_the_dtype_that_came(dtype):
    layer = Int8Layer()
    keys, values = layer.update(*(x.to(dtype) for x in states(1, 5)))
    assert keys.dtype == values.dtype == dtype


def test_latents_and_states_of_another_shape_are_refused_in_words():
    layer = BlockLayer()
    layer.declared_heads = 8
    with pytest.raises(ModelError, match="latents"):
        layer.update(torch.randn(1, 1, 3, 16), torch.randn(1, 1, 3, 4))
    with pytest.raises(ModelError, match="which are not"):
        Int8Layer().update(torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    with pytest.raises(ModelError, match="which are no floats"):
        Int8Layer().update(torch.zeros(1, 1, 3, 4, dtype=torch.int8), torch.zeros(1, 1, 3, 4, dtype=torch.int8))


@pytest.mark.parametrize("ours", [BlockLayer, Int8Layer])
@pytest.mark.parametrize("window", [None, WINDOW])
def test_another_batch_than_is_kept_is_refused_before_anything_changes(ours, window):
    kinds = {BlockLayer: SlidingBlockLayer, Int8Layer: SlidingInt8Layer}
    layer, twin = (ours() if window is None else kinds[ours](window) for _ in range(2))
    first, then = states(2, BLOCK), states(2, 1)
    layer.update(*first), twin.update(*first)
    heads = tuple(x.repeat(1, 2, 1, 1) for x in states(2, 1))
    for wrong in (states(1, 1), states(1, BLOCK), states(3, 1), heads, (then[0], states(1, 1)[1])):
        with pytest.raises(ModelError, match=r"a cache of 2 sequences of 2 heads .* begin with a new cache"):
            layer.update(*wrong)
        assert (layer.start, layer.end, layer.get_seq_length()) == (twin.start, twin.end, twin.get_seq_length())
        assert layer.store.room == twin.store.room
    assert all(map(torch.equal, layer.update(*then), twin.update(*then)))


def test_keys_are_not_replaced_from_outside():
    layer = BlockLayer()
    layer.update(*states(1, 3))
    with pytest.raises(ModelError, match="DynamicCache"):
        layer.keys = torch.zeros(1)

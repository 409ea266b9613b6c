"""One query of each of several sequences: over codes what each gets alone, over floats what double precision gives."""

import pytest
import torch

from tests.conftest import needs
from w8a8.kernels import cached, compiled
from w8a8.kernels.cached import Asked
from w8a8.kernels.each import attend_each, deal, ranges_of

pytestmark = [pytest.mark.kernels, needs("native")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SEEN = [(3, 0, 600), (0, 5, 6), (2, 515, 607), (4, 0, 17), (3, 1, 513)]
PLACES, HEADS, ROOM = 5, 2, 608
CPU = torch.device("cpu")


def kept(dims, value_dims, dtype):
    """(keys, values), as they lie in a server."""
    return tuple(torch.randn(PLACES, HEADS, ROOM, width).to(dtype) for width in (dims, value_dims))


def queries(shared, dims, dtype):
    """(B, Hq, 1, D), as a projection leaves them."""
    return torch.randn(len(SEEN), HEADS * shared * dims).to(dtype).view(len(SEEN), HEADS * shared, 1, dims)


ASKED = {"plain": (None, None), "bent": (5.0, None), "sinks": (None, True), "both": (2.0, True)}


@pytest.mark.parametrize(("softcap", "sinks"), ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shared", "dims", "value_dims"), [(1, 64, 64), (13, 33, 17), (4, 1, 96)])
def test_floats_are_attended_as_in_double_precision_with_the_same_bits_everywhere(
    every_isa, shared, dims, value_dims, dtype, softcap, sinks
):
    keys, values = kept(dims, value_dims, dtype)
    q = queries(shared, dims, dtype)
    scores_of_nothing = torch.randn(HEADS * shared) if sinks else None
    ranges = ranges_of(SEEN, CPU)
    found = every_isa(lambda: attend_each(q, (keys, values), ranges, 0.3, softcap, scores_of_nothing))
    assert all(torch.equal(each, found[0]) for each in found)
    assert found[0].dtype is dtype
    assert found[0].is_contiguous()
    for row, (place, start, end) in enumerate(SEEN):
        k = keys[place, :, start:end].double().repeat_interleave(shared, 0)  # (Hq, S, D)
        scores = (k @ q[row, :, 0, :, None].double()).squeeze(-1) * 0.3
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        if scores_of_nothing is not None:
            scores = torch.cat([scores, scores_of_nothing[:, None].double()], 1)
        weights = scores.softmax(-1)[:, : end - start]
        wanted = (weights[:, None] @ values[place, :, start:end].double().repeat_interleave(shared, 0)).squeeze(1)
        most = values[place, :, start:end].abs().max().double()
        bound = 1e-5 if dtype is torch.float32 else 1e-5 + torch.finfo(dtype).eps / 2
        assert ((found[0][row].double() - wanted).abs() <= bound * most).all()


@pytest.mark.parametrize(("shared", "dims", "value_dims"), [(1, 64, 64), (7, 33, 17)])
def test_codes_are_attended_to_the_bit_as_each_sequence_alone(every_isa, shared, dims, value_dims):
    keys, values = kept(dims, value_dims, torch.bfloat16)
    codes = cached.empty(PLACES, HEADS, ROOM, dims, value_dims, CPU)
    cached.append(codes, keys, values, 0)
    q, sinks = queries(shared, dims, torch.bfloat16), torch.randn(HEADS * shared)
    wanted = torch.stack(
        [
            cached.attend(
                q[row, None],
                cached.chosen(codes, slice(place, place + 1)),
                start,
                end,
                Asked(0.3, softcap=9.0, sinks=sinks),
            )[0, 0]
            for row, (place, start, end) in enumerate(SEEN)
        ]
    )
    for found in every_isa(lambda: attend_each(q, codes, ranges_of(SEEN, CPU), 0.3, 9.0, sinks)):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_are_dealt_as_they_are_appended(every_isa, monkeypatch, dtype):
    tokens = [(2, 7), (0, 16), (2, 8), (1, 0), (2, 9)]
    keys, values = (torch.randn(1, len(tokens), HEADS, width).to(dtype).transpose(1, 2) for width in (33, 17))
    where = torch.tensor(tokens, dtype=torch.int32)

    def written():
        codes = cached.empty(3, HEADS, 32, 33, 17, CPU)
        for tensor in codes[:4]:
            tensor.fill_(-77)
        return codes

    wanted = written()
    for token, (place, at) in enumerate(tokens):
        cached.append(
            cached.chosen(wanted, slice(place, place + 1)), keys[:, :, token, None], values[:, :, token, None], at
        )

    def dealt():
        codes = written()
        deal(codes, keys, values, where)
        return codes

    found = every_isa(dealt)
    monkeypatch.setattr("w8a8.kernels.each.library", lambda: "not here")
    for codes in (*found, dealt()):
        assert all(map(torch.equal, codes[:4], wanted[:4]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_outside_of_a_range_is_not_read(dtype):
    keys, values = kept(16, 32, dtype)
    q, ranges = queries(3, 16, dtype), ranges_of(SEEN, CPU)
    wanted = attend_each(q, (keys, values), ranges, 0.3)
    seen = torch.zeros(PLACES, ROOM, dtype=torch.bool)
    for place, start, end in SEEN:
        seen[place, start:end] = True
    own = {}
    for row, (place, start, end) in enumerate(SEEN):  # one at a time: two of them look at one place
        k, v = keys.clone(), values.clone()
        k[:], v[:] = torch.nan, torch.nan
        k[place, :, start:end], v[place, :, start:end] = keys[place, :, start:end], values[place, :, start:end]
        own[row] = attend_each(q[row, None], (k, v), ranges[row, None].clone(), 0.3)[0]
    assert torch.equal(torch.stack(list(own.values())), wanted)


WRONG = {
    "a place that is not there": [(PLACES, 0, 4)],
    "a negative one": [(-1, 0, 4)],
    "nothing": [(0, 4, 4)],
    "more than there is room for": [(0, 0, ROOM + 1)],
    "what lies before the first": [(0, -1, 4)],
}


@pytest.mark.parametrize("seen", WRONG.values(), ids=WRONG)
def test_a_range_that_is_not_there_is_not_looked_at(seen):
    given = kept(16, 16, torch.float32)
    codes = cached.empty(PLACES, HEADS, ROOM, 16, 16, CPU)
    q = queries(1, 16, torch.float32)[:1]
    for held in (given, codes):
        assert attend_each(q, held, ranges_of(seen, CPU), 0.3) is None
    token = torch.randn(1, HEADS, 1, 16)
    where = torch.tensor([(seen[0][0], seen[0][2])], dtype=torch.int32)
    if seen[0][0] in range(PLACES) and seen[0][2] < ROOM:
        return
    assert compiled.loaded().cached_deal(codes, token, token, where) is None


def test_what_is_no_plain_memory_is_left_to_others():
    keys, values = kept(16, 16, torch.float32)
    q, ranges = queries(1, 16, torch.float32), ranges_of(SEEN, CPU)
    assert attend_each(q, (keys, values), ranges, 0.3) is not None
    assert attend_each(q, (keys, values), ranges.long(), 0.3) is None
    assert attend_each(q, (keys, values), ranges[:2], 0.3) is None
    assert attend_each(q.double(), (keys, values), ranges, 0.3) is None
    assert attend_each(q, (keys.bfloat16(), values), ranges, 0.3) is None
    assert attend_each(q, (keys[..., ::2], values), ranges, 0.3) is None
    assert attend_each(q[..., :8], (keys, values), ranges, 0.3) is None

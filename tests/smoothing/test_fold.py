import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.conftest import gpt2, relative_error
from tests.smoothing.conftest import parameters, unchanged
from w8a8.dataflow.groups import Group, Reader, ScaledParameter, Source
from w8a8.dataflow.observing import observe
from w8a8.errors import ModelError, NonFiniteError
from w8a8.smoothing.fold import fold_, reader_scales


class Pair(nn.Module):
    """A norm that stores its gain minus 1, and two readers: one of permuted channels, one a stack of experts."""

    def __init__(self, channels=5, dtype=torch.float32):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.linear = nn.Linear(channels + 1, 3)
        self.experts = nn.Parameter(torch.randn(2, 4, channels))
        with torch.no_grad():
            self.norm.weight.uniform_(-0.5, 0.5)
            self.norm.bias.uniform_(-1, 1)
        self.to(dtype)
        order = torch.cat([torch.randperm(channels), torch.tensor([-1])])
        self.group = Group(
            Source(
                "norm",
                "norm",
                (ScaledParameter("norm.weight", 0, 1.0), ScaledParameter("norm.bias", 0, 0.0)),
                channels,
            ),
            (
                Reader("linear.weight", 1, "linear", order),
                Reader("experts", 2, "", torch.arange(channels)),
            ),
            "",
        )


SCALES = torch.tensor([0.5, 3.0, 1.0, 0.01, 70.0])


def test_sources_are_divided_and_readers_multiplied():
    model = Pair(dtype=torch.float64)
    before = parameters(model)
    fold_(model, model.group, SCALES)
    s = SCALES.double()
    assert torch.equal(model.norm.weight, (before["norm.weight"] + 1) / s - 1)
    assert torch.equal(model.norm.bias, before["norm.bias"] / s)
    along = torch.cat([s[model.group.readers[0].channels[:-1]], torch.ones(1, dtype=torch.float64)])
    assert torch.equal(model.linear.weight, before["linear.weight"] * along)
    assert torch.equal(model.experts, before["experts"] * s)
    assert torch.equal(model.linear.bias, before["linear.bias"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@settings(max_examples=20, deadline=None)
@given(logs=st.lists(st.floats(-6, 6), min_size=5, max_size=5))
def test_undo_restores_every_bit(dtype, logs):
    model = Pair(dtype=dtype)
    before = parameters(model)
    undo = fold_(model, model.group, torch.tensor(logs).exp())
    undo()
    assert unchanged(model, before)
    undo()
    assert unchanged(model, before)


@settings(max_examples=30, deadline=None)
@given(logs=st.lists(st.floats(-6, 6), min_size=5, max_size=5))
def test_a_fold_and_its_inverse_give_the_weights_back_up_to_rounding(logs):
    model = Pair(dtype=torch.float64)
    before = parameters(model)
    scales = torch.tensor(logs, dtype=torch.float64).exp()
    fold_(model, model.group, scales)
    fold_(model, model.group, 1 / scales)
    for name, p in model.named_parameters():
        assert torch.allclose(p, before[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_powers_of_two_are_folded_without_any_rounding(dtype):
    model = Pair(dtype=dtype)
    model.group = dataclasses.replace(
        model.group, source=dataclasses.replace(model.group.source, parameters=(ScaledParameter("norm.bias", 0, 0.0),))
    )
    before = parameters(model)
    scales = torch.tensor([0.5, 4.0, 1.0, 2.0**-7, 64.0])
    fold_(model, model.group, scales)
    assert not torch.equal(model.experts, before["experts"])
    fold_(model, model.group, 1 / scales)
    assert unchanged(model, before)


def test_a_conv1d_is_folded_along_its_first_axis(tokens):
    model = gpt2().double()
    group = next(g for g in observe(model, tokens).groups if g.source.module == "transformer.h.0.ln_2")
    assert group.readers[0].dim == 0
    with torch.no_grad():
        expected = model(tokens).logits
        fold_(model, group, torch.rand(48) + 0.1)
        after = model(tokens).logits
    assert relative_error(after, expected) < 1e-12


def test_one_rounding_is_made_not_two():
    model = Pair(dtype=torch.bfloat16)
    before = parameters(model)
    fold_(model, model.group, SCALES)
    exact = (before["norm.weight"].double() + 1) / SCALES.double() - 1
    assert torch.equal(model.norm.weight, exact.bfloat16())


@pytest.mark.parametrize(
    ("scales", "error", "message"),
    [
        (torch.ones(4), ModelError, r"shape \(4,\) were given to fold norm, which makes 5"),
        (torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0]), NonFiniteError, "the scale 0.0 of channel 1 of norm"),
        (torch.tensor([1.0, 1.0, -2.0, 1.0, 1.0]), NonFiniteError, "the scale -2.0 of channel 2"),
        (torch.tensor([1.0, 1.0, 1.0, float("inf"), 1.0]), NonFiniteError, "the scale inf of channel 3"),
    ],
)
def test_bad_scales_change_nothing(scales, error, message):
    model = Pair()
    before = parameters(model)
    with pytest.raises(error, match=message):
        fold_(model, model.group, scales)
    assert unchanged(model, before)


def test_a_channel_that_nobody_reads_is_not_scaled():
    model = Pair()
    alone = dataclasses.replace(
        model.group, readers=(dataclasses.replace(model.group.readers[1], channels=torch.tensor([0, 1, 2, 3, 3])),)
    )
    before = parameters(model)
    with pytest.raises(ModelError, match=r"the scale 70\.0 was given for channel 4 of norm, which no reader"):
        fold_(model, alone, SCALES)
    assert unchanged(model, before)


def test_an_overflow_in_the_last_reader_changes_nothing():
    model = Pair(dtype=torch.float16)
    before = parameters(model)
    scales = torch.tensor([1.0, 1.0, 1.0, 1.0, 1e9])
    with pytest.raises(NonFiniteError, match=r"leave the range of torch\.float16"):
        fold_(model, model.group, scales)
    assert unchanged(model, before)


def test_a_group_of_another_model_changes_nothing():
    model, other = Pair(), Pair(channels=7)
    before = parameters(other)
    with pytest.raises(ModelError, match="not the one that was observed"):
        fold_(other, model.group, SCALES)
    assert unchanged(other, before)


def test_a_reader_that_reads_no_channel_is_left():
    assert reader_scales(torch.tensor([-1, 1, -1, 0]), torch.tensor([2.0, 3.0])).tolist() == [1.0, 3.0, 1.0, 2.0]


def test_a_parameter_of_two_names_is_folded_once():
    model = Pair()
    twice = dataclasses.replace(model.group, readers=(*model.group.readers, model.group.readers[1]))
    before = parameters(model)
    fold_(model, twice, torch.full((5,), 2.0))
    assert torch.equal(model.experts, before["experts"] * 2)

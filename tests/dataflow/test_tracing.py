"""What is known about memory: parameters through their views, tags through theirs, and when they are gone."""

from typing import Any

import pytest
import torch
from torch import nn

from w8a8.dataflow.commuting import RULES
from w8a8.dataflow.products import blocked
from w8a8.dataflow.tracing import Trace, Watch


class Stack(nn.Module):
    """A stack of matrices (3, 4, 6), a matrix (4, 6) and a vector (6,)."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(3, 4, 6))
        self.matrix = nn.Parameter(torch.randn(4, 6))
        self.vector = nn.Parameter(torch.randn(6))


@pytest.mark.parametrize(
    ("see", "axes", "whole"),
    [
        (lambda m: m.matrix, (0, 1), True),
        (lambda m: m.matrix.t(), (1, 0), True),
        (lambda m: m.matrix.t()[None].expand(5, 6, 4), (None, 1, 0), True),
        (lambda m: m.matrix.view(2, 2, 6), (None, None, 1), True),
        (lambda m: m.matrix.reshape(-1), (None,), True),
        (lambda m: m.matrix[:3], (None, 1), False),
        (lambda m: m.matrix[::2], (None, 1), False),
        (lambda m: m.matrix[:, 1:], (0, None), False),
        (lambda m: m.matrix[2], (1,), False),
        (lambda m: m.stack[1], (1, 2), True),
        (lambda m: m.stack[1].t(), (2, 1), True),
        (lambda m: m.stack[1:], (None, 1, 2), False),
        (lambda m: m.stack[1, :1], (None, 2), False),
        (lambda m: m.stack.transpose(1, 2), (0, 2, 1), True),
        (lambda m: m.vector[:, None, None], (0, None, None), True),
        (lambda m: m.vector.view(torch.int32), (None,), False),
    ],
)
def test_a_view_of_a_parameter_is_told_from_its_strides(see, axes, whole):
    model = Stack()
    view = Trace(model).view(see(model).detach())
    assert view is not None
    assert (view.axes, view.whole) == (axes, whole)


@pytest.mark.not_under("inference", reason="what a test computes under the watch is then made in that mode")
def test_copies_and_shifts_of_a_parameter_are_known_as_it():
    model = Stack()
    trace = Trace(model)
    with torch.no_grad(), Watch(trace, RULES, blocked):
        cast = model.matrix.to(torch.bfloat16).t()
        picked = model.stack[torch.tensor([2, 0, 2, 1])]
        shifted = 1 + model.vector
        changed = model.matrix.clone().mul_(2)
    assert (trace.view(cast).name, trace.view(cast).axes) == ("matrix", (1, 0))
    assert (trace.view(picked).name, trace.view(picked).axes) == ("stack", (None, 1, 2))
    assert (trace.view(shifted).name, trace.view(shifted).offset) == ("vector", 1.0)
    assert trace.view(changed) is None
    assert trace.view(torch.ones(4)) is None
    assert {role.kind for role in trace.roles["matrix"]} == {"other"}  # the product by 2


def test_parameters_in_one_storage_are_told_apart_by_their_places():
    flat = torch.randn(30)
    model = Stack()
    model.matrix = nn.Parameter(flat[:24].view(4, 6))
    model.vector = nn.Parameter(flat[24:])
    trace = Trace(model)
    assert trace.view(model.vector).name == "vector"
    assert trace.view(model.matrix).name == "matrix"
    assert trace.roles == {}


def _with_a_source() -> Trace:
    """Source 0 has six channels."""
    model = Stack()
    trace = Trace(model)
    view = trace.view(model.vector)
    assert view is not None
    assert trace.source("norm", view, 0, 6) == 0
    return trace


def test_tags_lie_with_the_memory_and_every_view_sees_them():
    trace = _with_a_source()
    x = torch.zeros(2, 6)
    trace.write(x, {0: torch.arange(6, dtype=torch.int32).expand(2, 6)})
    assert trace.tags(x.t()[1:3])[0].tolist() == [[1, 1], [2, 2]]
    assert trace.tags(x.view(4, 3)[3])[0].tolist() == [3, 4, 5]
    trace.write(x[0], {})
    assert trace.tags(x)[0].tolist() == [[-1] * 6, [0, 1, 2, 3, 4, 5]]
    assert trace.tags(x[0]) == {}
    assert trace.live_bytes() == 4 * 12
    del x
    assert trace.live_bytes() == 0


def test_the_first_reason_is_kept_for_each_channel():
    trace = _with_a_source()
    trace.block({0: torch.tensor([[1, 2, -1]])}, "one")
    trace.block({0: torch.tensor([2, 3])}, "two")
    trace.block({0: torch.tensor([1, -1])}, "three")
    assert [(mask.nonzero().flatten().tolist(), why) for mask, why in trace.sources[0].blocks] == [
        ([1, 2], "one"),
        ([3], "two"),
    ]


@torch.library.custom_op("w8a8_test::add", mutates_args=())
def times_its_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a * b * b


def test_an_operation_of_another_library_is_not_taken_for_atens():
    model = nn.Sequential(nn.Linear(4, 4))
    trace, x = Trace(model), torch.randn(2, 4)
    with torch.no_grad(), Watch(trace, RULES, blocked):
        y = model(x)
        z = times_its_square(y, y)
    assert trace.tags(z) == {}
    assert [reason for _, reason in trace.sources[0].blocks] == [
        "the operation w8a8_test::add reads it in the model's own forward"
    ]


def test_tags_take_no_more_than_the_live_activations():
    depth, x = 40, torch.randn(4, 64)
    model = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.ReLU())))
    trace, peak = Trace(model), 0

    class Measured(Watch):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            out = super().__torch_dispatch__(func, types, args, kwargs)
            peak = max(peak, trace.live_bytes())
            return out

    with torch.no_grad(), Measured(trace, RULES, blocked):
        model(x)
    activation = 4 * 64 * 4
    assert 0 < peak <= 3 * activation
    assert trace.live_bytes() == 0

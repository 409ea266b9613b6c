"""Which blocks share a graph, and that what differs between them cannot be in it."""

import pytest
import torch
from torch import Tensor, nn

import w8a8
from w8a8.errors import ModelError
from w8a8.fusing.families import Unread, families

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what torch imports to make graphs


class _Block(nn.Module):
    def __init__(self, number: int, *, reads: bool) -> None:
        super().__init__()
        self.number, self.reads = number, reads
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y * (self.number + 1) if self.reads else y


def _model(*, reads: bool) -> nn.Sequential:
    model = nn.Sequential(*[_Block(number, reads=reads) for number in range(3)]).eval()
    w8a8.quantize(model)
    return model


def test_blocks_that_differ_in_a_number_are_alike_and_the_number_is_put_back():
    model = _model(reads=False)
    found = families(list(model))
    assert len({id(family) for _, family in found}) == 1
    block, family = found[1]
    with torch.no_grad():
        family.capture(block, (torch.randn(3, 16),), {})
    assert [each.number for each in model] == [0, 1, 2]


def test_a_graph_that_would_hold_what_differs_is_not_shared():
    model = _model(reads=True)
    block, family = families(list(model))[1]
    with torch.no_grad(), pytest.raises(ModelError, match="other blocks"):
        family.capture(block, (torch.randn(3, 16),), {})
    assert block.number == 1


def test_another_thread_that_calls_the_block_meanwhile_finds_its_number(monkeypatch):
    block, family = families(list(_model(reads=False)))[1]
    seen = []
    monkeypatch.setattr("w8a8.fusing.families.capture", lambda twin, *_: seen.append((block.number, twin)))
    family.capture(block, (torch.randn(3, 16),), {})
    ((number, twin),) = seen
    assert number == 1
    assert isinstance(twin.number, Unread)
    assert twin.up is block.up


def test_blocks_of_other_widths_are_not_alike():
    model = nn.Sequential(_Block(0, reads=False), _Block(1, reads=False)).eval()
    model[1].down = nn.Linear(32, 8)
    w8a8.quantize(model)
    assert len({id(family) for _, family in families(list(model))}) == 2


@pytest.mark.parametrize("use", [bool, int, len, lambda x: x == 1, lambda x: x + 1, lambda x: x.shape, lambda x: x[0]])
def test_what_is_unread_can_be_used_for_nothing(use):
    with pytest.raises(ModelError, match="other blocks"):
        use(Unread())

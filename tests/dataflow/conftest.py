"""Small networks, and groups folded in float64 with random scales."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from tests.conftest import relative_error
from tests.families import InDouble
from w8a8.dataflow.groups import Dataflow, Group

WIDTH = 12


def pairs(flow: Dataflow) -> dict[str, list[str]]:
    return {group.source.module: [reader.module for reader in group.readers] for group in flow.groups}


def reasons(flow: Dataflow) -> dict[str, str]:
    return {refusal.source.module: refusal.reason for refusal in flow.refused}


def fold(model: nn.Module, groups: tuple[Group, ...], *, read: bool = True) -> None:
    """Scale the groups' channels by random numbers in [0.25, 4]; without `read` nobody takes the scale back."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(3)

    def along(values: Tensor, tensor: Tensor, dim: int) -> Tensor:
        return values.to(tensor.dtype).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])

    with torch.no_grad():
        for group in groups:
            scales = 4.0 ** (2 * torch.rand(group.source.channels, dtype=torch.float64, generator=generator) - 1)
            scales[~group.scalable] = 1.0
            for scaled in group.source.parameters:
                p = parameters[scaled.name]
                p.copy_((p + scaled.offset) / along(scales, p, scaled.dim) - scaled.offset)
            for reader in group.readers if read else ():
                p = parameters[reader.parameter]
                columns = torch.where(reader.channels < 0, 1.0, scales[reader.channels.clamp(min=0)])
                p.mul_(along(columns, p, reader.dim))


def run(model: nn.Module, given: Any) -> list[Tensor]:
    """All the floats that the model returns, computed in float64."""
    with torch.no_grad(), InDouble():
        out = model(**given) if isinstance(given, dict) else model(given)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative norm of a change."""
    return max(relative_error(a, b) for b, a in zip(before, after, strict=True))


def assert_folds(model: nn.Module, given: Any, flow: Dataflow) -> None:
    before = run(model, given)
    fold(model, flow.groups)
    assert difference(before, run(model, given)) < 1e-9


class Net(nn.Module):
    """Two norms' worth of building blocks, and a forward that a test gives."""

    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = forward
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def linear(rows: int = WIDTH, columns: int = WIDTH) -> nn.Linear:
    return nn.Linear(columns, rows)


def rows() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64)


class Gain(nn.Module):
    def __init__(self, value: float = 1.0, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight

"""Codes of weights: the C++ kernel and the equation agree to the bit."""

import pytest
import torch

from tests.conftest import needs
from w8a8 import PerChannel, PerGroup, PerTensor, QuantSpec
from w8a8.core.affine import quantize
from w8a8.errors import NonFiniteError
from w8a8.kernels import compiled
from w8a8.kernels.weights import quantize_weight

pytestmark = pytest.mark.kernels
SPECS = [
    QuantSpec(bits, granularity, symmetric)
    for bits in (2, 4, 8)
    for granularity in (PerChannel(), PerTensor(), PerGroup(4))
    for symmetric in (True, False)
]


def same(weight, spec):
    found, wanted = quantize_weight(weight, spec), quantize(weight, spec)
    assert torch.equal(found.codes, wanted.codes)
    assert torch.equal(found.scale, wanted.scale)
    assert (found.zero_point is None) == (wanted.zero_point is None)
    if found.zero_point is not None:
        assert torch.equal(found.zero_point, wanted.zero_point)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_and_scales_are_those_of_the_equation(spec, dtype):
    torch.manual_seed(0)
    for shape in ((1, 4), (17, 100), (33, 64)):
        weight = torch.randn(shape).to(dtype)
        weight[0] = 0
        same(weight, spec)
        same((1e30 * weight) if dtype is not torch.float16 else weight / 1024, spec)
        same(torch.randn(shape[1], shape[0]).to(dtype).t(), spec)  # as Conv1D has it
        same(torch.randn(shape[0], 2 * shape[1]).to(dtype)[:, : shape[1]], spec)


@needs("native")
def test_the_kernel_and_not_the_equation_ran(monkeypatch):
    monkeypatch.setattr("w8a8.kernels.weights.quantize", None)
    for granularity, scales in ((PerChannel(), (5, 1)), (PerTensor(), (1, 1))):
        found = quantize_weight(torch.randn(5, 8), QuantSpec(granularity=granularity))
        assert found.scale.shape == scales


def test_without_the_kernel_the_equation_runs(monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: "not built")
    same(torch.randn(5, 8), QuantSpec(granularity=PerChannel()))


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()])
def test_a_weight_that_is_not_finite_is_refused_with_its_place(granularity):
    weight = torch.randn(5, 8)
    weight[3, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="3, 2"):
        quantize_weight(weight, QuantSpec(granularity=granularity))

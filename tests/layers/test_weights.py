"""Codes of weights: the C++ kernel and the equation agree to the bit."""

import pytest
import torch

from tests.conftest import needs
from w8a8 import PerChannel, PerColumn, PerGroup, PerTensor, QuantSpec
from w8a8.core.affine import QTensor, dequantize, fake_quantize, quantize, sqnr_db
from w8a8.core.row_sample import RowSample
from w8a8.errors import NonFiniteError
from w8a8.kernels import compiled
from w8a8.layers.weights import make_weight, quantize_weight, scale_shape

pytestmark = pytest.mark.kernels
SPECS = [
    QuantSpec(bits, granularity, symmetric)
    for bits in (2, 4, 8)
    for granularity in (PerChannel(), PerTensor(), PerGroup(4))
    for symmetric in (True, False)
]


GRANULARITIES = [(PerChannel(), (17, 1)), (PerTensor(), (1,)), (PerGroup(4), (17, 25)), (PerColumn(), (1, 100))]


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
    monkeypatch.setattr("w8a8.layers.weights.quantize", None)
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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("granularity", "shape"), GRANULARITIES, ids=str)
def test_a_made_weight_has_the_shapes_of_a_file_and_tells_what_it_lost(granularity, shape, symmetric):
    weight, spec = torch.randn(17, 100).to(torch.bfloat16), QuantSpec(8, granularity, symmetric)
    made, wanted = make_weight(weight, spec), quantize(weight, spec)
    assert scale_shape(granularity, 17, 100) == shape == made.scale.shape
    assert torch.equal(made.codes, wanted.codes)
    assert torch.equal(made.scale.view(-1), wanted.scale.view(-1))
    names = ["weight", "weight_scale"] + ["weight_zero_point"] * (not symmetric)
    assert list(made.named()) == names
    if not symmetric:
        assert made.zero_point.shape == shape
        assert torch.equal(made.zero_point.view(-1), wanted.zero_point.view(-1))
    kept = dequantize(QTensor(made.codes, made.scale, made.zero_point))
    assert torch.equal(kept, dequantize(wanted))
    assert made.sqnr_db == pytest.approx(sqnr_db(weight, kept), rel=1e-9)


def test_a_weight_on_a_grid_wider_than_codes_is_its_values():
    weight, spec = torch.randn(17, 100), QuantSpec(12, PerChannel())
    made = make_weight(weight, spec)
    assert list(made.named()) == ["weight"]
    assert torch.equal(made.codes, fake_quantize(weight, spec))
    assert made.sqnr_db == pytest.approx(sqnr_db(weight, made.codes), rel=1e-9)


@pytest.mark.parametrize("piece", [1, 7, 64, 300])
def test_rows_that_come_in_pieces_make_what_the_whole_makes(piece):
    weight, spec = torch.randn(300, 20), QuantSpec(8, PerChannel(), symmetric=False)
    whole, sample = make_weight(weight, spec), RowSample(300)
    parts = [make_weight(part, spec, sample) for part in weight.split(piece)]
    for key, tensor in whole.named().items():
        assert torch.equal(torch.cat([part.named()[key] for part in parts]), tensor)
    assert parts[-1].sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-9)

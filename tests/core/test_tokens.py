import math

import pytest
import torch

from w8a8.core.affine import QParams, dequantize, quantize
from w8a8.core.scheme import Operand, PerChannel, PerTensor, PerToken, QuantSpec
from w8a8.core.tokens import fake_quantize_tokens, quantize_tokens

A = Operand.ACTIVATION


@pytest.mark.parametrize("granularity", [PerToken(), PerTensor()], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_run_time_quantisation_is_the_contract_where_all_is_finite(granularity, symmetric):
    x = torch.randn(7, 16)
    spec = QuantSpec(8, granularity, symmetric)
    tokens, whole = quantize_tokens(x, spec), quantize(x, spec, A)
    assert torch.equal(tokens.codes, whole.codes)
    assert tokens.scale.shape == (7, 1)
    assert torch.equal(dequantize(tokens), dequantize(whole))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("granularity", [PerToken(), PerTensor(), PerChannel()], ids=str)
def test_a_bad_token_spoils_itself_and_no_other(granularity, bad):
    x = torch.randn(5, 16)
    good = torch.tensor([0, 1, 3, 4])
    expected = fake_quantize_tokens(x[good], QuantSpec(8, granularity, symmetric=False))
    x[2, 3] = bad
    y = fake_quantize_tokens(x, QuantSpec(8, granularity, symmetric=False))
    assert torch.equal(y[good], expected)
    assert y[2].isnan().all()


def test_run_time_grid_may_be_fixed():
    x = torch.tensor([[1.0, 100.0], [math.inf, 0.0]])
    spec = QuantSpec(8, PerTensor(), dynamic=False)
    q = quantize_tokens(x, spec, QParams(torch.tensor([0.5]), None))
    assert q.codes[0].tolist() == [2, 127]
    assert q.scale[0].item() == 0.5
    assert q.scale[1].isnan()

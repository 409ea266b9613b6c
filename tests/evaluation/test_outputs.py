"""Outputs of two models on the same inputs: error, cosine, the same label."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, ViTConfig, ViTForImageClassification

import w8a8
from w8a8.errors import CalibrationError, ModelError
from w8a8.evaluation.outputs import compare_outputs

_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}


class _Scaled(nn.Module):
    def __init__(self, factor, offset=0.0):
        super().__init__()
        self.factor, self.offset = factor, offset

    def forward(self, x):
        return x * self.factor + self.offset


def test_a_wrong_scale_shows_in_the_error_and_not_in_the_cosine():
    x = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    found = compare_outputs(_Scaled(1.25), _Scaled(1.0), x)
    assert found.relative_error.mean == pytest.approx(0.25, rel=1e-6)
    assert found.cosine.mean == pytest.approx(1.0)
    assert (found.rows, found.batches, found.agreement) == (13, 2, None)


def test_the_figures_are_those_of_all_rows_together():
    x = [torch.randn(2, 5, 8), torch.randn(1, 3, 8)]
    found = compare_outputs(_Scaled(1.0, 0.3), _Scaled(1.0), x)
    rows = torch.cat([t.reshape(-1, 8) for t in x]).to(torch.float64)
    moved = (torch.cat([t.reshape(-1, 8) for t in x]) + 0.3).to(torch.float64)
    assert found.relative_error.mean == pytest.approx(float((moved - rows).norm() / rows.norm()), rel=1e-6)
    cosines = nn.functional.cosine_similarity(moved, rows, dim=-1)
    assert found.cosine.mean == pytest.approx(float(cosines.mean()), rel=1e-6)
    assert found.cosine_p1.mean == pytest.approx(float(cosines.min()), rel=1e-6)
    assert found.relative_error.low <= found.relative_error.mean <= found.relative_error.high


def test_a_model_is_equal_to_itself():
    found = compare_outputs(_Scaled(1.0), _Scaled(1.0), [torch.randn(4, 8)])
    assert found.relative_error.mean == 0
    nothing = compare_outputs(_Scaled(0.0), _Scaled(0.0), [torch.randn(4, 8)])
    assert nothing.relative_error.mean == 0
    assert compare_outputs(_Scaled(1.0), _Scaled(0.0), [torch.randn(4, 8)]).relative_error.mean == math.inf


def test_an_encoder_and_what_it_was_quantised_to():
    model = BertModel(BertConfig(**_SIZES, vocab_size=96)).eval()
    quantised = w8a8.quantize(copy.deepcopy(model)).model
    batches = [{"input_ids": torch.randint(0, 96, (2, 12))} for _ in range(3)]
    found = compare_outputs(quantised, model, batches)
    assert found.output == "last_hidden_state"
    assert found.rows == 72
    assert 0 < found.relative_error.mean < 0.1
    assert found.agreement is None


def test_a_classifier_of_pictures_keeps_its_labels():
    model = ViTForImageClassification(ViTConfig(**_SIZES, image_size=16, patch_size=4, num_labels=5)).eval()
    quantised = w8a8.quantize(copy.deepcopy(model)).model
    found = compare_outputs(quantised, model, [{"pixel_values": torch.randn(8, 3, 16, 16)}])
    assert found.output == "logits"
    assert found.agreement.mean > 0.8


def test_what_cannot_be_compared_is_told():
    with pytest.raises(ModelError, match="there is no batch"):
        compare_outputs(_Scaled(1.0), _Scaled(1.0), [])
    with pytest.raises(ModelError, match=r"\(2, 3\), that of the reference \(2, 4\)"):
        compare_outputs(nn.Linear(8, 3), nn.Linear(8, 4), [torch.randn(2, 8)])
    with pytest.raises(ModelError, match="not finite"):
        compare_outputs(_Scaled(math.inf), _Scaled(1.0), [torch.randn(2, 8)])
    with pytest.raises(ModelError, match="holds no float tensor"):
        compare_outputs(nn.Identity(), nn.Identity(), [torch.arange(3)])
    with pytest.raises(CalibrationError, match="cannot be called"):
        compare_outputs(nn.Linear(8, 3), nn.Linear(8, 3), [torch.randn(2, 7)])

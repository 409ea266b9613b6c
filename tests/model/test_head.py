"""head="int8": the output head quantised at run time, whatever the file holds."""

import pytest
import torch
from torch import nn

import w8a8
from tests.conftest import llama, opt, relative_error
from w8a8.checkpoint.opening import open_model
from w8a8.errors import ModelError
from w8a8.layers.linear import QuantLinear


@pytest.mark.parametrize("make", [llama, opt])
def test_quantize_takes_the_head_and_the_result_says_so(make, tokens):
    model = make()
    with torch.inference_mode():
        expected = model(tokens).logits
        result = w8a8.quantize(model, head="int8")
        assert relative_error(model(tokens).logits, expected) < 0.03
    assert isinstance(model.lm_head, QuantLinear)
    assert "lm_head" in [m.name for m in result.coverage.quantized]
    assert result.untied == ({"lm_head": "model.decoder.embed_tokens"} if make is opt else {})
    assert sum(result.ledger()["lm_head"].values()) == 1


@pytest.mark.parametrize("make", [llama, opt])
def test_load_quantises_the_head_of_a_file_that_has_it_float(tmp_path, make, tokens):
    model = w8a8.quantize(make()).model
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out", head="int8")
    assert isinstance(loaded.lm_head, QuantLinear)
    assert loaded.config.tie_word_embeddings is False
    with torch.inference_mode():
        assert relative_error(loaded(tokens).logits, model(tokens).logits) < 0.03
    assert not isinstance(w8a8.load(tmp_path / "out").lm_head, QuantLinear)
    assert isinstance(open_model(tmp_path / "out", head="int8").model.lm_head, QuantLinear)


def test_a_file_with_an_int8_head_is_loaded_as_it_is(tmp_path, tokens):
    model = w8a8.quantize(llama(), head="int8").model
    w8a8.save(model, tmp_path / "out")
    for head in ("int8", "float"):
        loaded = w8a8.load(tmp_path / "out", head=head)
        with torch.inference_mode():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_head_that_cannot_be_had_is_refused(tmp_path):
    with pytest.raises(ModelError, match="head='int4' is unknown; use 'float' or 'int8'"):
        w8a8.quantize(llama(), head="int4")
    with pytest.raises(ModelError, match="Sequential has no float output head"):
        w8a8.quantize(nn.Sequential(nn.Linear(4, 4)), head="int8")
    llama().save_pretrained(tmp_path / "float")
    with pytest.raises(ModelError, match="holds a float model; quantise it first"):
        open_model(tmp_path / "float", head="int8")
    for opening in (w8a8.load, open_model):
        with pytest.raises(ModelError, match="head='int4' is unknown"):
            opening(tmp_path / "float", head="int4")

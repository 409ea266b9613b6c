"""Steps as one call: the values of the steps themselves, and padding left out where nobody can tell."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import w8a8
from tests.conftest import every_third, relative_error
from tests.fusing.test_models import _bert, _by_blocks, _text, pytestmark  # noqa: F401 (they hold here too)
from w8a8 import kernels

_UNDER = pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")


def _hidden(model: Any, call: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**call).last_hidden_state


def _fused() -> Any:
    model = _bert()
    w8a8.quantize(model, fuse=True)
    return model


@_UNDER
def test_a_plan_computes_what_its_steps_do_one_by_one(monkeypatch):
    model, call = _fused(), _text(4, 40)
    planned = _hidden(model, call)
    assert any(told.endswith("steps in one call") for told in w8a8.fusions(model).fused)
    monkeypatch.setattr(kernels.fused, "run", lambda *_: None)
    seen = call["attention_mask"].bool()
    assert relative_error(planned[seen], _hidden(model, call)[seen]) < 1e-6


@_UNDER
def test_a_text_beside_a_longer_one_has_the_bits_that_it_has_alone():
    model, call = _fused(), _text(3, 11)
    together = _hidden(model, call)
    with_one_more = {name: torch.cat([tensor[1:2, :5]] * 2) for name, tensor in call.items()}
    assert torch.equal(together[1, :5], _hidden(model, with_one_more)[0])
    assert not together[1, 5:].any()


@pytest.mark.slow
@_UNDER
def test_padding_in_front_is_left_out_too():
    model, call = _fused(), _text(3, 11)
    call["attention_mask"][1] = 1
    call["attention_mask"][1, 1:4] = 0  # the first token is read by the pooler
    seen = call["attention_mask"].bool()
    plain = copy.deepcopy(model)
    w8a8.restore(plain)
    assert relative_error(_hidden(model, call)[seen], _hidden(plain, call)[seen]) < 2e-2
    assert not _hidden(model, call)[~seen].any()


@_UNDER
def test_a_token_that_is_read_by_its_number_is_computed_whatever_it_is():
    model, call = _fused(), _text(3, 11)
    call["attention_mask"][1] = 1
    call["attention_mask"][1, :4] = 0
    plain = copy.deepcopy(model)
    w8a8.restore(plain)
    with torch.no_grad():
        found, wanted = model(**call), plain(**call)
    assert relative_error(found.pooler_output, wanted.pooler_output) < 2e-2
    assert found.last_hidden_state[1, 0].any()


class _Mean(nn.Module):
    """Takes the mean over all tokens, padding too."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = _bert()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.mean(1)


@pytest.mark.slow
@_UNDER
def test_what_mixes_rows_keeps_the_padding():
    model, call = _Mean().eval(), _text(3, 11)
    w8a8.quantize(model)
    with torch.no_grad():
        plain = model(**call)
        w8a8.optimize(model)
        assert relative_error(model(**call), plain) < 2e-2
    told = w8a8.fusions(model)
    assert told.whole
    assert "padding is left out, and its outputs are zero" not in told.fused


@_UNDER
def test_a_text_of_which_no_token_is_seen_is_computed():
    model, call = _by_blocks(_bert()), _text(3, 11)
    w8a8.quantize(model, fuse=True)
    call["attention_mask"][1] = 0
    out = _hidden(model, call)
    assert out.isfinite().all()
    assert out[1].any()


@pytest.mark.slow
@_UNDER
def test_a_length_beyond_what_the_code_asks_is_no_call_of_the_graph():
    model = _fused()
    _hidden(model, _text(2, 11))
    ((captured, *_),) = next(iter(model.forward._graphs.values()))
    assert captured.bounds
    with pytest.raises((IndexError, RuntimeError)), torch.no_grad():  # whichever the code of the model has
        model(input_ids=torch.zeros(2, 600, dtype=torch.long))


@pytest.mark.slow
@_UNDER
def test_a_config_that_is_changed_is_read_at_the_next_call():
    model, call = _fused(), _text()
    _hidden(model, call)
    model.config.output_hidden_states = True
    with torch.no_grad():
        assert model(**call).hidden_states is not None


@pytest.mark.slow
@_UNDER
def test_saving_writes_into_the_config_and_the_model_stays_one_graph(tmp_path):
    model, call = _fused(), _text()
    before, told = _hidden(model, call), w8a8.fusions(model)
    w8a8.save(model, tmp_path / "out")
    assert torch.equal(_hidden(model, call), before)
    assert w8a8.fusions(model) == told


@pytest.mark.slow
def test_a_config_that_is_another_at_every_call_ends_the_making_of_graphs():
    model, call = _fused(), _text()
    for label in range(6):
        model.config.name_of_run = label
        _hidden(model, call)
    assert "changed again and again" in w8a8.fusions(model).refused[""]


class _Asking(_Mean):
    """Asks for a value, so that it is no graph, and reads padding in the way that it is given."""

    def __init__(self, read: Any) -> None:
        super().__init__()
        self.read = read

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.read(states) * (2 if float(states[0, 0, 0]) > 1e9 else 1)


@_UNDER
@pytest.mark.parametrize("read", every_third([lambda h: h.mean(1), lambda h: h[:, -1]]), ids=["mean", "last"])
def test_what_lies_around_a_graph_and_reads_padding_gets_it(read):
    model, call = _Asking(read).eval(), _text(3, 11)
    w8a8.quantize(model)
    with torch.no_grad():
        plain = model(**call)
        w8a8.optimize(model)
        assert relative_error(model(**call), plain) < 2e-2
    assert "padding is left out, and its outputs are zero" not in w8a8.fusions(model).fused
    assert any("steps in one call" in what for what in w8a8.fusions(model).fused)


@pytest.mark.slow
@_UNDER
def test_a_block_with_layers_that_hold_integers_for_memory_alone_runs_as_it_is_and_is_told():
    model, call = _bert(), _text(3, 11)
    w8a8.quantize(model, {"*.attention.*": "w8a8", "*": "w8a16"})
    plain = _hidden(model, call)
    w8a8.optimize(model)
    seen = call["attention_mask"].bool()
    assert relative_error(_hidden(model, call)[seen], plain[seen]) < 2e-2
    assert "its code writes into a tensor" in w8a8.fusions(model).refused["encoder.layer.0"]

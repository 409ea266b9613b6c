import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import conftest
from tests.dataflow.conftest import Gain, Net, linear, pairs, rows
from tests.families import build, inputs
from w8a8.dataflow.observing import observe, probe
from w8a8.errors import ModelError


def test_the_model_is_left_as_it_was():
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    observe(model, inputs("llama"))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_and_flags_are_put_back_after_an_exception():
    def fails(m: Any, x: Tensor) -> Tensor:
        m.norm(x)
        raise KeyError("of the model's own")

    model = Net(fails, norm=Gain(), read=linear()).train()
    with pytest.raises(KeyError, match="of the model's own"):
        observe(model, rows())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_caller_in_inference_mode_sees_the_same():
    with torch.inference_mode():
        flow = observe(build("llama"), inputs("llama"))
    assert pairs(flow) == pairs(observe(build("llama"), inputs("llama")))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("llama", {}, "expected a torch.nn.Module to observe, found str"),
        (linear(), [1, 2], "expected a mapping of the forward's arguments or a tensor, found list"),
        (nn.Linear(2, 2, device="meta"), torch.ones(2), "2 parameters are on the meta device, weight first"),
    ],
)
def test_what_cannot_be_observed_is_told(model, given, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        observe(model, given)


def test_a_probe_fits_the_model_and_others_are_told_to_bring_inputs():
    ids = probe(conftest.llama(), tokens=7)["input_ids"]
    assert ids.shape == (2, 7)
    assert torch.equal(ids, probe(conftest.llama(), tokens=7)["input_ids"])
    assert probe(conftest.llama(max_position_embeddings=16))["input_ids"].shape == (2, 16)
    assert set(probe(build("t5"))) == {"input_ids", "decoder_input_ids"}
    with pytest.raises(ModelError, match="ViTForImageClassification takes pixel_values"):
        probe(build("vit"))
    with pytest.raises(ModelError, match="Linear takes an unknown input"):
        probe(linear())

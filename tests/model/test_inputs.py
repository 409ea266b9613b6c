"""What a model is called with: the same for every call, and an error of ours where it does not fit."""

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn
from transformers import BertConfig, DynamicCache, EncoderDecoderConfig, EncoderDecoderModel
from transformers.modeling_outputs import BaseModelOutput

from tests.conftest import llama
from w8a8.calibration.data import Calibration
from w8a8.errors import CalibrationError
from w8a8.model.inputs import call, check_inputs, copied, seeded

Pair = namedtuple("Pair", "a b")


def test_tensors_are_changed_in_every_kind_of_nest():
    x = torch.ones(2)
    nest = {"a": [x, (x, 3)], "b": OrderedDict(c=x), "d": Pair(x, "s"), "e": BaseModelOutput(last_hidden_state=x)}
    found = copied(nest, lambda t: t + 1)
    assert found["a"][1][1] == 3
    assert type(found["d"]) is Pair
    assert type(found["e"]) is BaseModelOutput
    changed = (found["a"][0], found["a"][1][0], found["b"]["c"], found["d"].a, found["e"].last_hidden_state)
    assert all(torch.equal(t, x + 1) for t in changed)
    assert found["e"]["last_hidden_state"] is found["e"].last_hidden_state
    assert torch.equal(nest["e"].last_hidden_state, torch.ones(2))


def test_one_tensor_in_two_places_stays_one():
    x = torch.ones(2)
    a, b = copied((x, [x]), torch.clone)
    assert a is b[0]
    assert a is not x


def test_a_cache_is_copied_with_what_it_holds():
    cache = DynamicCache()
    cache.update(torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), 0)
    twin = copied({"cache": cache}, lambda t: t)["cache"]
    twin.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4), 0)
    twin.layers[0].keys.zero_()
    assert (cache.get_seq_length(), twin.get_seq_length()) == (3, 5)
    assert bool(cache.layers[0].keys.all())


def test_what_refers_to_itself_is_copied_once():
    class Knot:
        def __init__(self):
            self.me, self.kept = self, torch.ones(2)

    knot = Knot()
    twin = copied(knot, lambda t: t)
    assert twin.me is twin is not knot
    assert twin.kept is not knot.kept


def test_modules_functions_and_plain_values_are_not_copied():
    given = [nn.Linear(2, 2), torch.float32, len, "s", None, nn.Linear]
    assert all(a is b for a, b in zip(copied(given, lambda t: t), given, strict=True))


def test_a_batch_with_a_cache_is_the_same_for_every_pass(tokens):
    cache, model = DynamicCache(), llama()
    data = Calibration.of([{"input_ids": tokens, "past_key_values": cache, "use_cache": True}])
    for _ in range(2):
        data.run(model)
    assert cache.get_seq_length() == 0


def test_a_batch_that_does_not_fit_is_told_with_what_it_holds():
    data = Calibration.of([{"inputs_embeds": torch.ones(2, 5, 3), "colour": 3}])
    with pytest.raises(CalibrationError, match=r"LlamaFor.* cannot be .*\(inputs_embeds \(2, 5, 3\), colour int\): Ru"):
        data.run(llama())


def test_ids_are_held_against_the_vocabulary_of_the_end_that_they_go_to():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    ends = [BertConfig(**small, vocab_size=size) for size in (96, 48)]
    model = EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(*ends)).eval()
    ids = torch.tensor([[3, 95]])
    check_inputs(model, {"input_ids": ids, "decoder_input_ids": ids // 2})
    assert call(model, {"input_ids": ids, "decoder_input_ids": ids // 2}).logits.shape == (1, 2, 48)
    with pytest.raises(CalibrationError, match=r"has the token id 96, EncoderDecoderModel knows 0\.\.95: "):
        check_inputs(model, {"input_ids": ids + 1})


def test_a_state_of_the_generators_lasts_for_the_block_alone():
    model = nn.Linear(1, 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(model):
        first = torch.rand(2)
    with seeded(model):
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.rand(2), expected)


def test_what_a_model_raises_is_kept_as_the_cause():
    class Torn(nn.Module):
        def forward(self, x):
            raise RuntimeError("sizes 3 and 4\nmore")

    with pytest.raises(CalibrationError, match=r"\(2,\)\): RuntimeError: sizes 3 and 4;") as raised:
        call(Torn(), torch.ones(2))
    assert isinstance(raised.value.__cause__, RuntimeError)

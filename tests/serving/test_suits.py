"""Which models are run packed is seen, and told where one is not."""

import pytest
import torch
import transformers as t

from tests.decoding.models import causal, with_own_attention
from w8a8.serving.suits import set_packed


def llama(**options):
    config = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    return t.LlamaForCausalLM(t.LlamaConfig(**config | {"num_hidden_layers": 2} | options)).eval()


def test_a_deep_model_in_16_bits_is_as_far_from_itself_as_from_what_is_packed():
    """It was refused where rounding brought more than a fixed distance: one of two like runs served together."""
    torch.manual_seed(2)
    model = llama(num_hidden_layers=24, initializer_range=0.3).to(torch.bfloat16)
    assert set_packed(model) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_whose_tokens_see_their_neighbours_is_refused_and_stays_as_it_was(dtype):
    model = causal("llama").to(dtype)
    model.model.layers[0].register_forward_hook(lambda _, __, out: out + out.mean(1, keepdim=True))
    before = model.config._attn_implementation
    assert "from those of the model as it is" in set_packed(model)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_a_family_with_one_way_of_attention_is_as_far_from_itself_in_16_bits(name):
    """It was refused: what lies between two ways of transformers' was the measure, and that is nothing with one."""
    torch.manual_seed(2)
    config = causal(name).config
    config.num_hidden_layers, config.initializer_range = 12, 0.3
    config.layer_types = (config.layer_types * 12)[:12]
    model = type(causal(name))(config).eval().to(torch.bfloat16)
    assert set_packed(model) is None


def test_a_model_with_another_attention_than_transformers_is_refused(monkeypatch):
    """What lies between that and the eager one was taken for rounding, and the model was served by the latter."""
    model = with_own_attention("llama", monkeypatch)
    assert "from those of the model as it is" in set_packed(model)
    assert model.config._attn_implementation == "flat"


def test_a_window_that_only_a_mask_knows_is_refused():
    """Llama 4 sees chunks of the past, of which its attention is not told: beyond the first it saw all of it."""
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "head_dim": 8}
    config = t.Llama4TextConfig(
        **sizes,
        num_key_value_heads=2,
        num_hidden_layers=2,
        intermediate_size_mlp=40,
        moe_layers=[],
        attention_chunk_size=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert "which its attention is not told" in set_packed(t.Llama4ForCausalLM(config).eval())
    assert set_packed(causal("mistral")) is None


def test_a_rotary_table_that_follows_the_longest_sequence_is_refused():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "rotary table" in set_packed(llama(rope_parameters=rope))

"""What the files say of a model's layers: what is ignored is float, and what is stacked is told as such."""

import re

import pytest
import torch
import transformers as t

import w8a8
from tests.conftest import mixtral
from w8a8.checkpoint.describe import describe
from w8a8.layers.linear import quant_linears

_TEXT = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 1, "num_attention_heads": 4}
_IMAGE = {"image_size": 16, "patch_size": 4}


def gemma3():
    text = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    vision = {k: v for k, v in _TEXT.items() if k != "vocab_size"} | _IMAGE
    tokens = {"mm_tokens_per_image": 4, "boi_token_index": 90, "eoi_token_index": 91, "image_token_index": 92}
    config = t.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    return t.Gemma3ForConditionalGeneration(config)


def xlnet():
    return t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=96, d_model=32, n_layer=1, n_head=4, d_inner=40))


def funnel():
    config = t.FunnelConfig(vocab_size=96, block_sizes=[1, 1], d_model=32, n_head=4, d_head=8, d_inner=40)
    return t.FunnelForMaskedLM(config)


def vit_mae():
    decoder = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 24}
    config = t.ViTMAEConfig(**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, **_IMAGE, **decoder)
    config.decoder_num_attention_heads = 4
    return t.ViTMAEForPreTraining(config)


def swinv2():
    sizes = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
    return t.Swinv2ForImageClassification(t.Swinv2Config(image_size=16, patch_size=2, **sizes))


def vit():
    config = t.ViTConfig(**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, **_IMAGE)
    return t.ViTForImageClassification(config)


WITH_PARAMETERS_OF_THEIR_OWN = {
    "gemma3": gemma3,
    "xlnet": xlnet,
    "funnel": funnel,
    "vit-mae": vit_mae,
    "swinv2": swinv2,
    "vit": vit,
}


@pytest.mark.parametrize(
    "family",
    ["gemma3", "xlnet", *(pytest.param(f, marks=pytest.mark.slow) for f in ("funnel", "vit-mae", "swinv2", "vit"))],
)
def test_a_parameter_of_three_dimensions_is_no_stack_and_nothing_below_it_is_ignored(family, tmp_path):
    model = WITH_PARAMETERS_OF_THEIR_OWN[family]().eval()
    told = w8a8.quantize(model).coverage
    assert not any("experts" in m.reason for m in told.left)
    ignored = describe(model).ignore
    names = [name for name, _ in quant_linears(model)]
    assert not set(ignored) & set(names)
    assert not [pattern for pattern in ignored if pattern.startswith("re:")]
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out")
    assert [name for name, _ in quant_linears(loaded)] == names
    state = loaded.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_products_of_a_class_of_its_own_are_told_and_counted():
    found = {m.name: m for m in w8a8.quantize(xlnet().eval()).coverage.left}
    attention = found["transformer.layer.0.rel_attn"]
    assert "XLNetRelativeAttention multiplies by k, o, q, r, " in attention.reason
    assert attention.macs >= 5 * 32 * 32


def test_what_is_no_product_counts_for_nothing():
    found = w8a8.quantize(vit().eval()).coverage
    left = {m.name: (m.reason, m.macs) for m in found.left}
    assert left["vit.embeddings"] == ("not a linear layer", 0)
    assert found.totals()["quantized"].macs == found.totals()["all"].macs


def test_stacks_that_stay_float_are_ignored_and_match_no_quantised_layer():
    model = mixtral()
    w8a8.quantize(model, exclude=["*.experts.*"])
    (pattern,) = (each for each in describe(model).ignore if each.startswith("re:"))
    matches = re.compile(pattern.removeprefix("re:")).match
    assert matches("model.layers.0.mlp.experts.0.w1")
    assert not any(matches(name) for name, _ in quant_linears(model))

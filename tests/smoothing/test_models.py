"""Architectures whose caches, ids or logits are not what most have: smoothing runs, and keeps their function."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

from tests.conftest import crossed, named
from tests.families import VOCAB, ids
from tests.smoothing.conftest import parameters
from w8a8.evaluation import context_length
from w8a8.smoothing.smooth import smooth_

_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 40, "num_hidden_layers": 1}
_TEXT = {**_SIZES, "vocab_size": VOCAB, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
_XLM = {"vocab_size": VOCAB, "emb_dim": 32, "n_layers": 1, "n_heads": 4, "max_position_embeddings": 64}
_PICTURE = {**_SIZES, "image_size": 16, "patch_size": 4}


def _blip() -> Any:
    text = {**_TEXT, "encoder_hidden_size": 32, "pad_token_id": 0, "sep_token_id": 2}
    return t.BlipForConditionalGeneration(t.BlipConfig(text_config=text, vision_config=_PICTURE, projection_dim=16))


def _cpmant() -> Any:
    config = t.CpmAntConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_attention_heads=4,
        dim_head=8,
        dim_ff=40,
        num_hidden_layers=1,
        prompt_length=4,
        prompt_types=8,
        segment_types=8,
        position_bias_num_buckets=8,
        position_bias_max_distance=32,
    )
    return t.CpmAntForCausalLM(config)


def _gemma3n() -> Any:
    """The last two layers read the keys and values of the first two."""
    config = t.Gemma3nTextConfig(
        **{**_TEXT, "num_hidden_layers": 4, "intermediate_size": [40] * 4},
        num_key_value_heads=2,
        head_dim=16,
        num_kv_shared_layers=2,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=8,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
        laurel_rank=8,
        pad_token_id=0,
    )
    return t.Gemma3nForCausalLM(config)


def _xlnet() -> Any:
    return t.XLNetLMHeadModel(t.XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=1, n_head=4, d_inner=40))


def _text() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def _picture() -> dict[str, Tensor]:
    return _text() | {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Tensor]], float | str]] = {
    "xlm": (lambda: t.XLMWithLMHeadModel(t.XLMConfig(**_XLM)), _text, 0.5),
    "flaubert": (lambda: t.FlaubertWithLMHeadModel(t.FlaubertConfig(**_XLM)), _text, 0.5),
    "blip": (_blip, _picture, 0.5),
    "gemma3n": (_gemma3n, _text, 0.5),
    "git": (lambda: t.GitForCausalLM(t.GitConfig(**_TEXT, vision_config=_PICTURE)), _picture, "auto"),
    "cpmant": (_cpmant, lambda: {"input_ids": ids().to(torch.int32)}, "auto"),
    "xlnet": (_xlnet, _text, 0.5),
}


@pytest.mark.filterwarnings("ignore")
@crossed("name dtype", list(MODELS), [torch.float32, torch.bfloat16], ids=named)
def test_smoothing_runs_and_keeps_the_function(name, dtype):
    make, inputs, alpha = MODELS[name]
    model = make().eval().to(dtype)
    given = {key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs().items()}
    before = parameters(model)
    report = smooth_(model, [given], alpha=alpha)
    assert report.change <= report.bound
    assert not [group for group in report.groups if group.reason and "cannot be called" in group.reason]
    folded = {group.source for group in report.groups if group.alpha is not None}
    changed = {key for key, p in model.named_parameters() if not torch.equal(p, before[key])}
    assert bool(folded) == bool(changed)
    if alpha != "auto" and name != "xlnet":  # in which no group can be folded: its norms come after the sums
        assert folded


def test_a_context_of_minus_one_is_no_limit():
    assert context_length(_xlnet()) is None

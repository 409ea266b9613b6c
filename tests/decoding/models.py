"""A tiny random model of each family whose cache has something of its own."""

from collections.abc import Callable
from typing import Any

import transformers as t
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

VOCAB = 96
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GROUPED = {**SIZES, "intermediate_size": 40, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_PAIRED = {"encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}


def whisper() -> Any:
    config = t.WhisperConfig(
        **_PAIRED,
        vocab_size=VOCAB,
        d_model=32,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return t.WhisperForConditionalGeneration(config).eval()


CAUSAL: dict[str, Callable[[], Any]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**_GROUPED)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_GROUPED, head_dim=16)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**_GROUPED, sliding_window=8)),
    "gemma2": lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA)),
    "opt": lambda: t.OPTForCausalLM(t.OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=32)),
    "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SIZES, intermediate_size=40)),
    "phi3": lambda: t.Phi3ForCausalLM(t.Phi3Config(**_GROUPED)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**_GROUPED, num_local_experts=4)),
    "stablelm": lambda: t.StableLmForCausalLM(t.StableLmConfig(**_GROUPED)),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(
            **_GROUPED,
            head_dim=16,
            sliding_window=8,
            num_local_experts=4,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ),
}
"""Full attention, windows, both in turn, soft caps, sinks, with and without groups, and attention that is handed no
options of a call, by the type of the model."""


def causal(name: str) -> Any:
    return CAUSAL[name]().eval()


def with_own_attention(name: str, monkeypatch: Any) -> Any:
    """A model with attention from outside, as transformers lets it be registered, whose scores are nearly the same."""

    def flat(module: Any, query: Any, key: Any, value: Any, mask: Any, **how: Any) -> Any:
        return sdpa_attention_forward(module, query, key, value, mask, **how | {"scaling": 0.01})

    monkeypatch.setitem(t.AttentionInterface._global_mapping, "flat", flat)
    monkeypatch.setitem(t.AttentionMaskInterface._global_mapping, "flat", sdpa_mask)
    config = causal(name).config
    config.initializer_range = 0.3
    model = type(causal(name))(config).eval()
    model.set_attn_implementation("flat")
    return model

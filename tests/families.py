"""One tiny random model of each architecture whose data flow has to be understood, with inputs for it.

Norm gains are drawn around their neutral value (1, or 0 where the norm adds the 1 itself) and biases around 0, so that
nothing that should matter is neutral by accident.  Widths differ from one another wherever the architecture lets them.
"""

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

VOCAB = 96
_SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {
    **_SIZES,
    "intermediate_size": 40,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GEMMA = {**_DECODER, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8}
_FALCON = {**_SIZES, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "bias": True}
_NEOX = {**_SIZES, "intermediate_size": 40, "max_position_embeddings": 64, "rotary_pct": 0.5, "eos_token_id": 2}
_OPT = {
    **_SIZES,
    "ffn_dim": 40,
    "max_position_embeddings": 64,
    "dropout": 0.1,
    "tie_word_embeddings": False,
}
_T5 = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 40,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": False,
}


def _opt(**changes: Any) -> nn.Module:
    return t.OPTForCausalLM(t.OPTConfig(**{**_OPT, "word_embed_proj_dim": 32, **changes}))


def _gpt2() -> nn.Module:
    config = t.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=40, tie_word_embeddings=False
    )
    return t.GPT2LMHeadModel(config)


def _bloom() -> nn.Module:
    return t.BloomForCausalLM(t.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4))


def _whisper() -> nn.Module:
    config = t.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=40,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return t.WhisperForConditionalGeneration(config)


def _vit() -> nn.Module:
    config = t.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=40,
        image_size=16,
        patch_size=4,
        num_labels=5,
    )
    return t.ViTForImageClassification(config)


def _bert() -> nn.Module:
    return t.BertForMaskedLM(t.BertConfig(**_SIZES, intermediate_size=40, max_position_embeddings=64))


def ids() -> Tensor:
    """(2, 12) token ids, none of them special."""
    return torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(1))


def _causal() -> dict[str, Tensor]:
    return {"input_ids": ids()}


def _seq2seq() -> dict[str, Tensor]:
    return {"input_ids": ids(), "decoder_input_ids": ids().flip(0)}


def _sound() -> dict[str, Tensor]:
    mel = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(1))
    return {"input_features": mel, "decoder_input_ids": ids()}


def _picture() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))}


Inputs = Callable[[], dict[str, Tensor]]

FAMILIES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "opt": (_opt, _causal),
    "opt-post-norm": (lambda: _opt(do_layer_norm_before=False, word_embed_proj_dim=24), _causal),
    "gpt2": (_gpt2, _causal),
    "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**_DECODER)), _causal),
    "mistral": (lambda: t.MistralForCausalLM(t.MistralConfig(**_DECODER, sliding_window=8)), _causal),
    "qwen2": (lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_DECODER)), _causal),
    "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_DECODER, head_dim=16)), _causal),
    "gemma2": (lambda: t.Gemma2ForCausalLM(t.Gemma2Config(**_GEMMA)), _causal),
    "gemma3": (lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(**_GEMMA)), _causal),
    "phi3": (lambda: t.Phi3ForCausalLM(t.Phi3Config(**_DECODER)), _causal),
    "gpt-neox": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_NEOX, use_parallel_residual=True)), _causal),
    "gpt-neox-serial": (lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**_NEOX, use_parallel_residual=False)), _causal),
    "falcon": (lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON, multi_query=True)), _causal),
    "falcon-new": (
        lambda: t.FalconForCausalLM(t.FalconConfig(**_FALCON, new_decoder_architecture=True, num_kv_heads=2)),
        _causal,
    ),
    "falcon-alibi": (
        lambda: t.FalconForCausalLM(
            t.FalconConfig(
                **_FALCON, multi_query=False, alibi=True, parallel_attn=False, new_decoder_architecture=False
            )
        ),
        _causal,
    ),
    "cohere": (lambda: t.CohereForCausalLM(t.CohereConfig(**_DECODER)), _causal),
    "bloom": (_bloom, _causal),
    "mixtral": (
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**_DECODER, num_local_experts=4, num_experts_per_tok=2)),
        _causal,
    ),
    "bert": (_bert, _causal),
    "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5, feed_forward_proj="relu")), _seq2seq),
    "t5-gated": (lambda: t.T5ForConditionalGeneration(t.T5Config(**_T5, feed_forward_proj="gated-gelu")), _seq2seq),
    "whisper": (_whisper, _sound),
    "vit": (_vit, _picture),
}


def inputs(name: str, *, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Inputs of a family's model, its floats in `dtype`."""
    given = FAMILIES[name][1]()
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in given.items()}


class InDouble(TorchFunctionMode):
    """Float64 throughout: where a model turns to float32 by itself (norms, softmax) it turns to float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        func = Tensor.double if func is Tensor.float else func
        return func(*map(widened, args), **{key: widened(value) for key, value in (kwargs or {}).items()})


def build(name: str, *, dtype: torch.dtype = torch.float64, attention: str | None = None) -> nn.Module:
    """The model of a family, in evaluation mode, its one-dimensional parameters moved off their neutral values.

    Args:
        name: In `FAMILIES`.
        dtype: Of the parameters.
        attention: "eager" or "sdpa"; None leaves the model's choice.
    """
    torch.manual_seed(0)
    model = FAMILIES[name][0]()
    if hasattr(model.config, "num_local_experts") and dtype is torch.float64:
        model.set_experts_implementation("eager")  # torch's grouped product has no float64
    if attention is not None:
        model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.4, 0.4))
            else:
                parameter.mul_(5)  # away from the linear range that an initial deviation of 0.02 keeps to
    return model.eval().to(dtype)

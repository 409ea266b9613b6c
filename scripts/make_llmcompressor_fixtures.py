"""Make the directories of tests/data/llmcompressor: what llm-compressor's own `oneshot` writes, and what it computes.

    HF_HUB_OFFLINE=1 python scripts/make_llmcompressor_fixtures.py tests/data/llmcompressor

It needs `pip install llmcompressor` in an environment of its own, since llm-compressor pins other versions of
transformers and compressed-tensors than the tests use.  The models are tiny and random.  Beside each checkpoint,
which is left as it was written, stand `reference.safetensors` (input ids, the logits of transformers with
compressed-tensors, and the logits with the same weights and float activations) and MADE_WITH.txt.  transformers does
not load quantised experts again, so for mixtures the logits are those of the model before it is saved.
"""

import argparse
import copy
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SEED = 20260
VOCAB = 64
PACKAGES = ("torch", "transformers", "llmcompressor", "compressed-tensors", "safetensors")


def llama() -> PreTrainedModel:
    """Grouped-query attention, an untied head, 52 inner features, biases in the attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=52,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            tie_word_embeddings=False,
            attention_bias=True,
        )
    )


def opt() -> PreTrainedModel:
    """Tied head, biases everywhere, learnt positions."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            word_embed_proj_dim=32,
            ffn_dim=52,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            bos_token_id=2,
            eos_token_id=2,
            pad_token_id=1,
            dropout=0.0,
        )
    )


MIXTURE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def mixtral() -> PreTrainedModel:
    """Three experts, under other names in files than in transformers."""
    return MixtralForCausalLM(MixtralConfig(**MIXTURE, num_local_experts=3))


def qwen3_moe() -> PreTrainedModel:
    """Three experts, under the names that most models have."""
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**MIXTURE, num_experts=3, moe_intermediate_size=20, head_dim=8))


def groups(**activations: Any) -> dict[str, Any]:
    """Per-channel int8 weights with the given input activations."""
    weights = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    inputs = QuantizationArgs(num_bits=8, type="int", **activations)
    return {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)}
    }


@dataclass(frozen=True)
class Fixture:
    """One directory: a model, and the arguments of `QuantizationModifier`."""

    build: Callable[[], PreTrainedModel]
    recipe: dict[str, Any] = field(default_factory=lambda: {"scheme": "W8A8", "targets": "Linear"})
    ignore: tuple[str, ...] = ("lm_head",)
    calibrate: bool = False
    dtype: torch.dtype = torch.float32
    mixture: bool = False


FIXTURES = {
    "llama-w8a8": Fixture(llama),
    "llama-w8a8-bf16": Fixture(llama, dtype=torch.bfloat16),
    "llama-w8a8-head-and-ignored": Fixture(llama, ignore=("re:.*down_proj", "model.layers.0.self_attn.o_proj")),
    "llama-w8a8-asym": Fixture(llama, groups(symmetric=False, strategy="token", dynamic=True)),
    "llama-w8a8-static-asym": Fixture(llama, groups(symmetric=False, strategy="tensor", dynamic=False), calibrate=True),
    "opt-w8a8": Fixture(opt),
    "mixtral-w8a8": Fixture(mixtral, ignore=("lm_head", "re:.*gate$"), mixture=True),
    "qwen3-moe-w8a8": Fixture(qwen3_moe, ignore=("lm_head", "re:.*gate$"), mixture=True),
}


def ids(samples: int, length: int, seed: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (samples, length), generator=torch.Generator().manual_seed(seed))


def calibration() -> dict[str, Any]:
    """Random token ids; oneshot wants some tokenizer with them."""
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids(8, 16, SEED + 1)]
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", pad_token="t0")
    return {"dataset": DataLoader(rows, batch_size=1), "processor": tokenizer}


@torch.no_grad()
def spread(model: PreTrainedModel) -> None:
    """Make rows differ in size, so that a scale of another row would be seen."""
    generator = torch.Generator().manual_seed(SEED + 2)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            rows = torch.randn(*parameter.shape[:-1], 1, generator=generator)
            parameter.mul_(3 * torch.exp(0.7 * rows))
        elif name.endswith("bias"):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def make(fixture: Fixture, target: Path) -> None:
    """Quantise one model and write its directory."""
    torch.manual_seed(SEED)
    dense = fixture.build().eval()
    spread(dense)
    with tempfile.TemporaryDirectory() as source:
        dense.to(fixture.dtype).save_pretrained(source)  # oneshot reads the config from where the model came
        model = AutoModelForCausalLM.from_pretrained(source, dtype=fixture.dtype)
        recipe = QuantizationModifier(**fixture.recipe, ignore=list(fixture.ignore))
        oneshot(model=model, recipe=recipe, **(calibration() if fixture.calibrate else {}))
        seen = reference(copy.deepcopy(model)) if fixture.mixture else None
        model.save_pretrained(target, save_compressed=True)
    (target / "model.safetensors").chmod(0o644)
    (target / "recipe.yaml").unlink()
    if seen is None:
        seen = reference(AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval())
    save_file(seen, target / "reference.safetensors")
    versions = [f"{package} {metadata.version(package)}" for package in PACKAGES]
    (target / "MADE_WITH.txt").write_text("\n".join([*versions, f"seed {SEED}"]) + "\n")


@torch.no_grad()
def reference(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """What transformers and compressed-tensors compute, in float32; activations are then no longer quantised."""
    inputs = ids(2, 8, SEED + 3)
    result = {"input_ids": inputs, "logits": model(inputs, use_cache=False).logits.contiguous()}
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_scheme.input_activations = None
    result["logits_weight_only"] = model(inputs, use_cache=False).logits.contiguous()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    for name, fixture in FIXTURES.items():
        shutil.rmtree(out / name, ignore_errors=True)
        make(fixture, out / name)
        print(name, sum(file.stat().st_size for file in (out / name).iterdir()), "bytes")


if __name__ == "__main__":
    main()

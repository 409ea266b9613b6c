"""What many tests need.  Small models are made here, since no hub is reachable; nothing is downloaded."""

import os
import subprocess

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # the machine may be busy, and the models are tiny

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t  # what it has is imported where it is asked for

from tests.ambient import leave_out
from w8a8.core.scheme import PerToken, QuantSpec
from w8a8.kernels import available

TOKEN = QuantSpec(granularity=PerToken())
"""A scale for each token of the input."""

THEIRS = Path(__file__).parent / "data" / "llmcompressor"
"""Directories that llm-compressor wrote."""


def needs(kernel: str) -> pytest.MarkDecorator:
    """A mark: the test is about this kernel, and skips where it cannot run."""
    reason = available()[kernel]
    return pytest.mark.skipif(reason is not None, reason=f"the kernel {kernel} cannot run here: {reason}")


def crossed(names: str, *values: Sequence[Any], ids: Callable[[Any], str] | None = None) -> pytest.MarkDecorator:
    """`parametrize` over all combinations, of which as few are not slow as show each value once."""
    shown = {tuple(i % len(axis) for axis in values) for i in range(max(map(len, values)))}
    cases = [
        pytest.param(*case, marks=[] if place in shown else pytest.mark.slow)
        for place, case in zip(product(*map(range, map(len, values))), product(*values), strict=True)
    ]
    return pytest.mark.parametrize(names.split(), cases, ids=ids)


def every_third(values: Iterable[Any]) -> list[Any]:
    """The values for `parametrize`; but for one of three they are slow."""
    return [pytest.param(value, marks=pytest.mark.slow if i % 3 else []) for i, value in enumerate(values)]


def named(value: Any) -> str:
    """What a test's name says of a value: the name of a function, and what else prints as."""
    return getattr(value, "__name__", str(value))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    leave_out(items)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """Every test starts from one seed and leaves the number of threads as it was."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


ONE_BLOCK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""The sizes of a small decoder, for configurations that have these names."""


def llama(**changes: Any) -> "t.LlamaForCausalLM":
    """Grouped-query attention, an untied head, K = 100 in the down projection."""
    options = {
        "vocab_size": 96,
        "hidden_size": 64,
        "intermediate_size": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    return t.LlamaForCausalLM(t.LlamaConfig(**{**options, **changes})).eval()


def opt(**changes: Any) -> "t.OPTForCausalLM":
    """Biases everywhere, the head tied to the embedding."""
    options = {
        "vocab_size": 96,
        "hidden_size": 48,
        "ffn_dim": 100,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 48,
        "dropout": 0.0,
    }
    return t.OPTForCausalLM(t.OPTConfig(**{**options, **changes})).eval()


def gpt2() -> "t.GPT2LMHeadModel":
    """Conv1D everywhere, one of them square, the head tied."""
    return t.GPT2LMHeadModel(t.GPT2Config(vocab_size=96, n_embd=48, n_layer=2, n_head=4, n_positions=64)).eval()


def mixtral(**changes: Any) -> "t.MixtralForCausalLM":
    """Mixture of experts, whose weights transformers 5 stacks in 3-D parameters and renames."""
    options = {**ONE_BLOCK, "num_local_experts": 4, "num_experts_per_tok": 2}
    return t.MixtralForCausalLM(t.MixtralConfig(**{**options, **changes})).eval()


_MOE = {
    **ONE_BLOCK,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def qwen3_moe() -> "t.Qwen3MoeForCausalLM":
    """Experts called gate, up and down, in files too."""
    return t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**_MOE, num_experts=4, head_dim=16)).eval()


def qwen2_moe() -> "t.Qwen2MoeForCausalLM":
    """A shared expert, which a linear layer of one row weighs."""
    return t.Qwen2MoeForCausalLM(t.Qwen2MoeConfig(**_MOE, num_experts=4, shared_expert_intermediate_size=24)).eval()


def phimoe() -> "t.PhimoeForCausalLM":
    """Experts called w1, w2 and w3, in files too."""
    return t.PhimoeForCausalLM(t.PhimoeConfig(**_MOE, num_local_experts=4)).eval()


def nemotron_h() -> "t.NemotronHForCausalLM":
    """Experts without a gate, narrower than the model; the files call the whole otherwise."""
    layers = ["full_attention", "moe", "moe", "moe"]
    config = {**_MOE, "num_hidden_layers": len(layers), "head_dim": 8, "n_routed_experts": 4, "moe_latent_size": 16}
    return t.NemotronHForCausalLM(
        t.NemotronHConfig(**config, layers_block_type=layers, moe_shared_expert_intermediate_size=24)
    ).eval()


MODELS: dict[str, Callable[[], Any]] = {"llama": llama, "opt": opt, "gpt2": gpt2, "mixtral": mixtral}


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 96, (2, 24), generator=torch.Generator().manual_seed(1))


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference over the norm of what is wanted."""
    return float(((found - wanted).norm() / wanted.norm()).detach())


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits


def contents(directory: Path) -> dict[str, bytes]:
    """The bytes of every file."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def model_files(directory: Path) -> dict[str, bytes]:
    """`contents` but for the model card, which `w8a8.save` writes and transformers' `save_pretrained` does not."""
    return {name: held for name, held in contents(directory).items() if name != "README.md"}


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place]
    made = subprocess.run(command, capture_output=True, check=False, timeout=30)
    if made.returncode:
        pytest.skip(f"a small file system cannot be mounted: {made.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True, timeout=30)

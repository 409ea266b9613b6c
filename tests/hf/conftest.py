"""Directories of small models, opened by transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import w8a8
from tests.conftest import gpt2, llama, mixtral, qwen3_moe
from w8a8 import hf
from w8a8.demo.run import demo_directory

IDS = torch.arange(3, 20)[None]


@pytest.fixture(autouse=True)
def _theirs_again():
    yield
    hf.disable()


@pytest.fixture(params=["demo", "llama", "gpt2", "mixtral", "qwen3_moe"])
def source(request, tmp_path):
    if request.param == "demo":
        return demo_directory()
    {"llama": llama, "gpt2": gpt2, "mixtral": mixtral, "qwen3_moe": qwen3_moe}[request.param]().save_pretrained(
        tmp_path / "source"
    )
    return tmp_path / "source"


def opened(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, **options)


def quantized(source, scheme="w8a8", *, dtype="auto", **options):
    model = opened(source, dtype=dtype)
    w8a8.quantize(model, scheme, **options)
    return model

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import llama


def tensors(directory):
    """Every tensor of a directory's files, by name."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def partial_of(target):
    """Where a result grows."""
    return target.with_name(f".{target.name}.partial")


def saved(model, directory, *, dtype=torch.bfloat16, shard="40KB", **options):
    """The directory of a model, written."""
    model.to(dtype).save_pretrained(directory, max_shard_size=shard, **options)
    return directory


@pytest.fixture
def source(tmp_path):
    """The directory of a float model."""
    llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"

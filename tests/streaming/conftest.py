import pytest
from safetensors.torch import load_file

from tests.conftest import llama


def tensors(directory):
    """Every tensor of a directory's files, by name."""
    return {name: t for path in sorted(directory.glob("*.safetensors")) for name, t in load_file(path).items()}


def partial_of(target):
    """Where a result grows."""
    return target.with_name(f".{target.name}.partial")


@pytest.fixture
def source(tmp_path):
    """The directory of a float model."""
    llama().save_pretrained(tmp_path / "source")
    return tmp_path / "source"

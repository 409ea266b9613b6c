import subprocess

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

"""Save a quantised model as a compressed-tensors directory, all of it or nothing.

Everything is written into a hidden directory beside the target, which takes the target's name at the end:
a crash leaves no directory that looks complete.  Sharding, tied weights, the generation config and the
names that other software expects are transformers' `save_pretrained`.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from w8a8.checkpoint.describe import describe
from w8a8.checkpoint.files import CONFIG
from w8a8.checkpoint.layout import to_json
from w8a8.checkpoint.names import remember
from w8a8.checkpoint.verify import verify_values
from w8a8.errors import CheckpointError


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    overwrite: bool = False,
    max_shard_size: str = "5GB",
    verify: bool = True,
) -> None:
    """Write a model that transformers, vLLM and `w8a8.load` read.

    Args:
        model: A transformers model with `QuantLinear` layers.  Not modified.  Experts that have layers of their own
            are written one by one, under the names that the files of such models have.
        directory: Where to; made, parents too.
        tokenizer: Saved beside the model where given.
        overwrite: Replace a checkpoint that is there already.
        max_shard_size: Files larger than this are split.
        verify: Read the files again before they get their name, and compare them with the model, bit for bit.

    Raises:
        ModelError: not a transformers model, or nothing in it is quantised.
        SchemeError: the file format has no word for a layer's scheme.
        CheckpointError: the directory exists and may not be overwritten; what was written is not what the model holds.
    """
    target = Path(directory)
    quantization = describe(model)
    check_target(target, overwrite=overwrite)
    with _appearing(target) as partial:
        remember(model)
        model.save_pretrained(partial, max_shard_size=max_shard_size)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        config = json.loads((partial / CONFIG).read_text())
        config["quantization_config"] = to_json(quantization)
        (partial / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        if verify:
            verify_values(partial, model)


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """Raise `CheckpointError` where the target may not be written; never where that would replace the source."""
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(
            f"{target} holds the model that is to be quantised ({source}), which would be lost; choose another name"
        )
    obstacle = next(parent for parent in target.absolute().parents if parent.exists())
    if not obstacle.is_dir() or not os.access(obstacle, os.W_OK):
        kind = "a directory that may not be written" if obstacle.is_dir() else "a file"
        raise CheckpointError(f"{target} cannot be made: {obstacle} is {kind}; choose another place")
    if not target.exists():
        return
    if not target.is_dir():
        raise CheckpointError(f"{target} is a file; give the name of a directory to make")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise CheckpointError(f"{target} exists and is not empty; choose another name, or overwrite it (--force)")
    if not (target / CONFIG).exists():
        raise CheckpointError(
            f"{target} is not a checkpoint (it has no {CONFIG}), so it is not overwritten; choose another name"
        )


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the target's name when the block ends well and vanishes otherwise."""
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        replace_directory(target, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_directory(target: Path, partial: Path) -> None:
    """Give `partial`, synced, the name `target`; what was there is put aside first, and back if that fails."""
    _sync(partial)
    if not target.exists():
        partial.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        partial.rename(target)
    except OSError:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


def _sync(directory: Path) -> None:
    """Have the files on the disk before the name says that they are there."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())

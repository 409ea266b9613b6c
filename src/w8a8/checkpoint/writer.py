"""Save a quantised model as a compressed-tensors directory, all of it or nothing.

Everything is written into a hidden directory beside the target, which takes the target's name at the end:
a crash leaves no directory that looks complete.  Sharding, tied weights, the generation config and the
names that other software expects are transformers' `save_pretrained`.
"""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import nn

from w8a8.checkpoint import hub
from w8a8.checkpoint.about import card_of
from w8a8.checkpoint.beside import README, SOURCE_README, companions, copy_companions
from w8a8.checkpoint.describe import check_storable, describe, transformers_models, write_description
from w8a8.checkpoint.directory import Directory, Tensors
from w8a8.checkpoint.files import CONFIG, GENERATION_CONFIG
from w8a8.checkpoint.verify import verify_values
from w8a8.checkpoint.vllm import foresee_as_it_is
from w8a8.errors import CheckpointError, ModelError, SchemeError, few
from w8a8.layers.buffers import quant_layers
from w8a8.layers.linear import quant_linears
from w8a8.model.coverage import coverage
from w8a8.model.pretrained import Pretrained, Tokenizer
from w8a8.model.roles import heads
from w8a8.records.coverage import Coverage


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    beside: str | os.PathLike[str] | None = None,
    covered: Coverage | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = "5GB",
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool | None = None,
) -> None:
    """Write a model that transformers, vLLM and `w8a8.load` read.

    Args:
        model: A transformers model with `QuantLinear` layers, or a module around one that saves itself, such as a
            `SentenceTransformer`.  Not modified.  Experts that have layers of their own are written one by one, under
            the names that the files of such models have.
        directory: Where to; made, parents too.
        tokenizer: Or a processor: saved beside the model where given.
        beside: The directory that the float model came from: everything in it but weights and config.json is copied,
            as the command does it (`checkpoint.beside` has the rule).
        covered: `Result.coverage`, from which the model card has why each layer stayed float.
        overwrite: Replace a checkpoint that is there already.
        max_shard_size: Files larger than this are split; of a transformers model.
        verify: Read the files again before they get their name, and compare them with the model, bit for bit.
        push_to_hub: A repository, OWNER/NAME, that the directory is uploaded to when it is whole.
        private: Of a new repository, see `w8a8.push_to_hub`.

    Raises:
        ModelError: not a transformers model, and none in it or several; nothing in it is quantised, or something
            around it is; a tensor that safetensors cannot hold.
        SchemeError: the file format has no word for a layer's scheme; `max_shard_size` is no size.
        CheckpointError: the directory exists and may not be overwritten, or cannot be made; what was written is not
            what the model holds; `beside` is not there, or a file of it is a link that leads elsewhere.
        HubError: as `w8a8.push_to_hub`; what needs no network is checked first, and the directory stays.
    """
    target = Path(directory)
    whole: Any = model
    inner = _one_model(whole)
    describe(inner)
    check_storable(inner)
    _check_size(max_shard_size)
    if beside is not None:
        companions(Path(beside))
    check_target(target, overwrite=overwrite)
    if push_to_hub is not None:
        hub.check_push(push_to_hub)
    with _appearing(target) as partial:
        whole.save_pretrained(str(partial), **({"max_shard_size": max_shard_size} if inner is whole else {}))
        if (partial / README).exists():  # sentence-transformers writes one
            (partial / README).rename(partial / SOURCE_README)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if beside is not None:
            (partial / GENERATION_CONFIG).unlink(missing_ok=True)  # made of config.json where the source has none
            copy_companions(Path(beside), partial)
        place = _place_of_the_model(partial)
        write_description(inner, place)
        told = card_of(
            partial,
            Directory.of(place),
            coverage(whole, dict.fromkeys(heads(whole), "an output head")) if covered is None else covered,
            foresee_as_it_is(inner),
            conv1d=any(layer.was_conv1d for _, layer in quant_linears(inner)),
            source=None if beside is None else Tensors(Path(beside)),
            name=getattr(inner, "name_or_path", None),
        )
        (partial / README).write_text(told, encoding="utf-8")
        if verify:
            verify_values(place, inner)
    if push_to_hub is not None:
        hub.push_to_hub(target, push_to_hub, private=private)


def _one_model(model: nn.Module) -> Pretrained:
    """The transformers model that is saved: the model itself, or the one that it holds."""
    found = transformers_models(model) if isinstance(model, nn.Module) else []
    if len(found) != 1 or not hasattr(model, "save_pretrained"):
        raise ModelError(
            f"expected a transformers model with a config, or a module with a save_pretrained around one, found "
            f"{type(model).__name__}, with {len(found)} of them in it; save each by itself"
        )
    inside = {id(module) for module in found[0].modules()}
    outside = [name for name, layer in quant_layers(model) if id(layer) not in inside]
    if outside:
        raise ModelError(
            f"{type(model).__name__} is to be saved, and {few(outside)} in it is quantised and lies outside of its "
            f"{type(found[0]).__name__}: such files hold float weights, and would not be read again; quantise the "
            f"float model with exclude={outside!r}"
        )
    return found[0]


def _check_size(max_shard_size: int | str) -> None:
    """Raise `SchemeError` where this is no size, by cutting one small tensor with it as the files will be cut."""
    try:
        small = torch.zeros(1, dtype=torch.float32, device="cpu")
        split_torch_state_dict_into_shards({"weight": small}, max_shard_size=max_shard_size)
    except (ValueError, TypeError, OverflowError) as error:
        raise SchemeError(
            f"max_shard_size={max_shard_size!r} is not the size of a file ({error}); "
            "give bytes, or a text such as '5GB'"
        ) from error


def _place_of_the_model(partial: Path) -> Path:
    """The folder in which a module around a model saved that: the one with a config.json and weights in its root."""
    if (partial / CONFIG).exists():
        return partial
    weighty = (path.parent for path in sorted(partial.rglob(CONFIG)) if any(path.parent.glob("*.safetensors")))
    place = next(weighty, None)
    if place is None:
        raise CheckpointError(f"save_pretrained wrote no {CONFIG} with weights beside it, so there is no model to read")
    return place


def check_target(target: Path, *, overwrite: bool, source: Path | None = None) -> None:
    """The one judge of where a result goes, asked before any work in every way of making one.

    Args:
        target: A directory to be made, or one to be filled or replaced.
        source: Of the float model, which is never replaced.

    Raises:
        CheckpointError: it is no name that a directory can have there, may not be written, or is in use.
    """
    _check_name(target)
    if source is not None and source.resolve().is_relative_to(target.resolve()):
        raise CheckpointError(
            f"{target} holds the model that is to be quantised ({source}), which would be lost; choose another name"
        )
    obstacle = _nearest(target.absolute())
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


def _nearest(target: Path) -> Path:
    """The closest directory above, or what is in the place of one, that is there."""
    return next((parent for parent in target.parents if parent.exists()), target)


def _check_name(target: Path) -> None:
    """Raise `CheckpointError` where no directory can get this name, by asking the file system for each of its parts."""
    if target.name == "..":
        raise CheckpointError(f"{target} would give a directory the name '..'; give the name of a directory to make")
    target = target.absolute()
    beside = f".{target.name}.rehearsal-{'x' * 8}"  # the longest name that is made beside it
    try:
        here = _nearest(target)
        asked = [here / name for name in (*target.relative_to(here).parts, beside)]
        for path in (*asked, target.parent / beside / "model" / ("x" * 64)):  # and room for a file in there
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path.lstat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        shown = ascii(str(target))
        raise CheckpointError(
            f"{shown if len(shown) < 200 else shown[:200] + '...'} cannot be made: the file system does not take this "
            f"name, or a longer one that is made beside it for a while ({reason}); choose another name"
        ) from error
    for path in (target, *target.parents):
        if path.is_symlink() and not path.exists():
            raise CheckpointError(
                f"{target} cannot be made: {path} is a link to {os.readlink(path)}, which is not there; "
                "make that directory, remove the link, or choose another name"
            )


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the target's name when the block ends well and vanishes otherwise."""
    target = target.absolute()
    made = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes it private
        replace_directory(target, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody has put something in there meanwhile
            for parent in made:
                parent.rmdir()
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

"""A model by name, float or quantised, with its tokenizer."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from torch import nn

from w8a8.checkpoint.directory import Directory
from w8a8.checkpoint.embedder import Behind, open_behind
from w8a8.checkpoint.reader import load, load_float
from w8a8.decoding.models import check_cache, set_cache, set_usual_cache
from w8a8.errors import ModelError
from w8a8.model.kinds import Asked
from w8a8.model.pretrained import Pretrained, Tokenizer
from w8a8.model.roles import Head

AUTO_KV = "auto"
"""Keys and values in blocks where that changes no bit (`set_usual_cache`), as transformers keeps them elsewhere."""


@dataclass(frozen=True)
class OpenedModel:
    """A model by name: itself, its tokenizer, where its files are, and whether they hold codes.

    kv: How it keeps keys and values.
    kv_why: Why that is "dynamic" where "auto" was asked for.
    """

    model: Pretrained
    tokenizer: Tokenizer | None
    directory: Path
    quantized: bool
    kv: str = "dynamic"
    kv_why: str | None = None

    @property
    def behind(self) -> Behind | None:
        """What makes a vector of the last states, where the directory is an embedder's; opened at each look."""
        return open_behind(self.directory)


@dataclass(frozen=True)
class NamedModel:
    """A model by name, and how it is to be opened.

    name: A local directory or a hub id; or one that is open.
    dtype: Of the float tensors: "auto" (the file's), "float32", "bfloat16" or "float16".
    device: Where the model goes.
    head: "int8" quantises the output head of a quantised model at run time, see `w8a8.load`.
    trust_remote_code: Run Python code from the repository where transformers has no class for the model.
    kv: How it keeps keys and values: "dynamic" as transformers does, or what else `w8a8.set_cache` has; "auto": in
        blocks where that is seen to change no bit of a few tokens, which are read and written.
    """

    name: str | os.PathLike[str] | Directory
    dtype: str = "auto"
    device: str = "cpu"
    head: str = "float"
    trust_remote_code: bool = False
    kv: str = "dynamic"

    @classmethod
    def of(cls, model: "Named", **options: Any) -> "NamedModel":
        """The model of a name, opened so; one that says itself how is given back."""
        return model if isinstance(model, NamedModel) else cls(model, **options)

    @property
    def directory(self) -> Directory:
        """Its directory, opened now where it is not open."""
        return Directory.of(self.name, trust_remote_code=self.trust_remote_code)


Named: TypeAlias = str | os.PathLike[str] | Directory | NamedModel


def open_model(source: Named | OpenedModel, asked: Asked | None = None, **options: Any) -> OpenedModel:
    """Open a model, float or quantised, in the class that its config names, from a directory or the hub.

    Args:
        source: Which; one that was opened is given back.
        asked: What is asked of it, for which it must be of the right kind: that is seen before its weights are read.
        options: As for `NamedModel`, where only a name is given.

    Raises:
        CheckpointError: missing, torn, in a format unknown here, or in need of code of its own.
        ModelError: it is not of a kind that this can be asked of; unknown dtype, device, head or cache, or a cache
            that it cannot have; head="int8" for a float model; the float model is not one that transformers can open,
            or its files lack weights.
    """
    if isinstance(source, OpenedModel):
        if asked is not None:
            asked.check_model(source.model)
        return source
    named = NamedModel.of(source, **options)
    directory = named.directory
    if asked is not None:
        asked.check(*directory.architecture)
    if named.kv != AUTO_KV:
        check_cache(*directory.architecture, named.kv, beside=(AUTO_KV,))
    quantized = directory.quantization is not None
    wanted = _dtype(named.dtype)
    if quantized or Head.of(named.head) is Head.INT8:  # which a float model is refused with there
        model = load(directory, head=named.head)
        _move(model, wanted)
    else:
        model = load_float(directory, dtype=named.dtype if wanted is None else wanted)
    _move(model.eval(), named.device)
    kv, why = named.kv, None
    if kv == AUTO_KV:
        why = set_usual_cache(model)
        kv = "block" if why is None else "dynamic"
    elif kv != "dynamic":
        set_cache(model, kv)
    return OpenedModel(model, open_tokenizer(directory), directory.path, quantized, kv, why)


def _move(model: nn.Module, to: str | torch.dtype | None) -> None:
    """To a device or a dtype, in place."""
    try:
        model.to(to)
    except (RuntimeError, AssertionError) as error:  # torch says either for a device it does not have
        raise ModelError(f"device {to!r} cannot be used: {str(error).splitlines()[0]}") from error


def open_tokenizer(directory: Directory) -> Tokenizer | None:
    """The tokenizer, or None where the directory has none."""
    path = directory.path
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=directory.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: transformers cannot read its tokenizer: {error}; copy it again") from error


def _dtype(name: str) -> torch.dtype | None:
    known = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"unknown dtype {name!r}; use one of {', '.join(known)}")
    return known[name]

"""A model's directory, opened once: what config.json says, which files there are, and what lies where in them.

A `Directory` is made at the door (load, open, inspect, the streaming jobs) and handed down.  config.json is read and
judged then.  The files are listed and their headers judged when they are first asked for, once: what needs no weights,
as looking at a float model, does without.
"""

import copy
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from w8a8.checkpoint.architecture import architecture, without_head
from w8a8.checkpoint.beside import class_around
from w8a8.checkpoint.files import CONFIG, INDEX, SINGLE, WEIGHTS, header, inside, read_json
from w8a8.checkpoint.headers import Entry, each_once
from w8a8.checkpoint.layout import QuantizationConfig, from_json
from w8a8.core.plain import Json
from w8a8.errors import CheckpointError
from w8a8.model.pretrained import Config, Pretrained

_MAX_NAME = 255  # bytes, on the file systems there are
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True, eq=False)
class Tensors:
    """The weights in a directory, whatever else is there: the files, their headers, all tensors by name."""

    path: Path

    @cached_property
    def promised(self) -> dict[Path, set[str] | None]:
        """The safetensors files by name, each with the tensors that the index promises (None where there is no index).

        Raises:
            CheckpointError: there are none; the index is torn, points outside the directory or to nothing.
        """
        if (self.path / SINGLE).exists():  # before the index, as in transformers
            return {inside(self.path, self.path / SINGLE): None}
        index = self.path / INDEX
        if not index.exists():
            raise CheckpointError(
                f"{self.path} has neither {SINGLE} nor {INDEX}: there are no weights to load"
                + _how_to_convert(self.path)
            )
        weight_map = read_json(inside(self.path, index)).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map is missing or not a map from tensor to file")
        promises: dict[Path, set[str]] = {}
        for tensor, file in weight_map.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise CheckpointError(
                    f"{index}: {tensor} is said to be in {file!r}, which is not a file of this directory"
                )
            if len(file) > _MAX_NAME or not (self.path / file).is_file():
                raise CheckpointError(
                    f"{index}: {tensor} is said to be in {file[:_MAX_NAME]}, which is missing; download it again"
                )
            promises.setdefault(self.path / file, set()).add(tensor)
        return {inside(self.path, path): promises[path] for path in sorted(promises)}

    @property
    def bytes(self) -> int:
        """Of the files of weights."""
        return sum(path.stat().st_size for path in self.promised)

    @cached_property
    def files(self) -> dict[Path, dict[str, Entry]]:
        """The tensors of each file by name, in the order of their bytes.

        Raises:
            CheckpointError: as `promised`; a file is torn or untruthful, or lacks a tensor that the index promises.
        """
        return {path: header(path, promised) for path, promised in self.promised.items()}

    @cached_property
    def entries(self) -> dict[str, Entry]:
        """All tensors by name, file after file; `CheckpointError` as `files`, or where one is in two of them."""
        return each_once(pair for entries in self.files.values() for pair in entries.items())


@dataclass(frozen=True, eq=False)
class Directory(Tensors):
    """A model on the disk, float or quantised.

    path: Where.
    config: What config.json holds.
    quantization: What that says of the quantisation; None for a float model.
    trust_remote_code: Whether Python code in it may be run, as was said when it was opened.
    """

    config: Json
    quantization: QuantizationConfig | None
    trust_remote_code: bool = False

    @classmethod
    def of(cls, source: "str | os.PathLike[str] | Directory", *, trust_remote_code: bool = False) -> "Directory":
        """Open a directory, or the hub's files, downloaded or from the cache; one that is open is given back.

        Args:
            source: A directory or a hub id.
            trust_remote_code: Have the repository's Python files too, and run them where transformers has no class
                for the model.

        Raises:
            CheckpointError: no such directory, and no such repository within reach; config.json is not readable, or
                describes something unknown here.
        """
        if isinstance(source, Directory):
            if source.trust_remote_code or not trust_remote_code:
                return source
            source = source.path
        path = _found(source, trust_remote_code=trust_remote_code)
        config = read_json(path / CONFIG)
        told = config.get("quantization_config", config.get("compression_config"))  # the second is the older name
        if told is not None and not isinstance(told, dict):
            raise CheckpointError(f"{path / CONFIG}: quantization_config is {told!r}, expected an object")
        quantization = None if told is None else from_json(told, str(path / CONFIG))
        return cls(path, config, quantization, trust_remote_code)

    @property
    def config_file(self) -> Path:
        """For messages."""
        return self.path / CONFIG

    @property
    def architecture(self) -> tuple[type[Pretrained], Config]:
        """The model class that config.json names, and the config as transformers reads it, the caller's own.

        Of a float embedder whose files have no head the class is the one without.
        """
        kind, config = self._architecture
        return kind, copy.deepcopy(config)  # making a model writes into it

    @cached_property
    def _architecture(self) -> tuple[type[Pretrained], Config]:
        kind, config = architecture(self.path, self.config, trust_remote_code=self.trust_remote_code)
        if self.quantization is not None or class_around(self.path) != "SentenceTransformer":
            return kind, config
        bare, prefix = without_head(kind, config), f"{kind.base_model_prefix}."
        # what was written with a head has the model's tensors under its name
        alone = bare is not kind and not any(name.startswith(prefix) for name in self.entries)
        return (bare if alone else kind), config


def _found(source: str | os.PathLike[str], *, trust_remote_code: bool) -> Path:
    """The local directory of a model."""
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise CheckpointError(f"{path} has no {CONFIG}: it is not a model's directory")
        inside(path, path / CONFIG)
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; a model is a directory or a hub id")
    unwanted = [f"*{end}" for end in WEIGHTS if end not in (".safetensors", ".index.json")]
    unwanted += [] if trust_remote_code else ["*.py"]
    try:
        found = Path(snapshot_download(str(source), ignore_patterns=unwanted))
    except (HFValidationError, LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{source}: there is no such directory, and the hub did not give it ({type(error).__name__}: "
            f"{str(error).splitlines()[0]}); check the path or the id"
        ) from error
    return _found(found, trust_remote_code=trust_remote_code)


def _how_to_convert(directory: Path) -> str:
    """What to do about a directory of pickles; empty where there are none."""
    pickles = sorted(path for path in directory.iterdir() if path.suffix in _PICKLES)
    if not pickles:
        return ""
    script = (
        "import torch, safetensors.torch as s; t = torch.load('IN', weights_only=True); "
        "s.save_file({k: v.clone().contiguous() for k, v in t.items()}, 'model.safetensors')"
    )
    return (
        f"; {pickles[0].name} is a pickle, which may hold code and is never read: convert it once, with "
        f'python -c "{script.replace("IN", pickles[0].name)}" in that directory, or with the hub\'s converter, '
        "https://huggingface.co/spaces/safetensors/convert"
    )

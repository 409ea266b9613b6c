"""The facts of a directory that is about to get its name, for its card (`w8a8.checkpoint.card`)."""

from importlib.metadata import version
from pathlib import Path

import transformers
import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from w8a8._version import __version__
from w8a8.checkpoint.beside import README, SOURCE_README, class_around
from w8a8.checkpoint.card import Facts, Measured, Origin, Told, card, with_measured
from w8a8.checkpoint.directory import Directory, Tensors
from w8a8.checkpoint.files import CONFIG, INDEX, SINGLE
from w8a8.checkpoint.vllm import Finding
from w8a8.errors import CheckpointError
from w8a8.records.coverage import Coverage

_RESTS_ON = ("torch", "transformers", "safetensors")
_FENCE = "---"
_LONGEST = 1 << 20
"""Characters of a card in which its front matter is looked for."""


def card_of(
    directory: Path,
    written: Directory,
    coverage: Coverage,
    findings: tuple[Finding, ...],
    *,
    conv1d: bool,
    source: Tensors | None,
    name: str | None = None,
) -> str:
    """The card of a directory.

    Args:
        written: What config.json and the weights in it are.
        source: The weights of the float model, where they are known.
        name: What the float model was loaded by, where that is known.

    Raises:
        CheckpointError: a header cannot be read.
    """
    model = str(next(iter(written.config.get("architectures") or []), written.config.get("model_type")))
    return card(
        Facts(
            coverage=coverage,
            model=model,
            of_transformers=hasattr(transformers, model),
            conv1d=conv1d,
            findings=findings,
            bytes=_tensor_bytes(written) or 0,
            versions={"w8a8": __version__} | {package: version(package) for package in _RESTS_ON},
            origin=_origin(directory, source, name),
            around=class_around(directory),
        )
    )


def add_measured(directory: Path, measured: Measured) -> None:
    """Put what was measured of a saved model into its card; `CheckpointError` where it has none that was made here."""
    path = directory / README
    try:
        text = with_measured(path.read_text(encoding="utf-8"), measured)
        if text is not None:
            path.write_text(text, encoding="utf-8")
            return
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"what was measured was to go into {path}, which cannot be read and written: {error}; "
            "save the model again for a new card"
        ) from error
    raise CheckpointError(
        f"what was measured was to go into {path}, which has no section for it: it was written by hand, or elsewhere; "
        "save the model again for a card of w8a8's"
    )


def _origin(directory: Path, source: Tensors | None, name: str | None) -> Origin:
    readme = directory / SOURCE_README
    told: Told = {}
    unread = None
    if readme.is_file():
        try:
            told = front_matter_of(readme)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            unread = type(error).__name__
    repository, commit = _on_hub(source.path) if source is not None else (None, None)
    if repository is None and name is not None and _is_cached(name):
        repository = name
    size = None if source is None else _tensor_bytes(source)
    return Origin(repository, commit, size, told, readme.is_file(), unread)


def front_matter_of(path: Path) -> Told:
    """The fields of a card that are text, or lists of text; nothing where it has no front matter.

    Everything in it is taken as text: `no` is a language, not a truth value.

    Raises:
        OSError, ValueError, YAMLError, RecursionError: it cannot be read, or is no mapping.
    """
    with path.open(encoding="utf-8") as file:
        first, *rest = file.read(_LONGEST).lstrip("\ufeff").split("\n")
    lines = [line.rstrip() for line in rest]
    if first.rstrip() != _FENCE or _FENCE not in lines:
        return {}
    fields = yaml.load("\n".join(lines[: lines.index(_FENCE)]), Loader=yaml.BaseLoader)  # makes strings only
    if not isinstance(fields, dict):
        raise ValueError(f"front matter is a {type(fields).__name__}, expected a mapping")
    return {
        key: value
        for key, value in fields.items()
        if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value))
    }


def _on_hub(directory: Path) -> tuple[str, str] | tuple[None, None]:
    """Repository and commit of a snapshot in the hub's cache, whose folder has both in its name."""
    path = directory.absolute()
    if path.parent.name != "snapshots" or not path.parents[1].name.startswith("models--"):
        return None, None
    return path.parents[1].name.removeprefix("models--").replace("--", "/"), path.name


def _is_cached(name: str) -> bool:
    """Whether a name is a repository's that was loaded from: a directory may have such a name too."""
    if Path(name).exists():
        return False
    try:
        return isinstance(try_to_load_from_cache(name, CONFIG), str)
    except HFValidationError:
        return False


def _tensor_bytes(weights: Tensors) -> int | None:
    """Of all tensors, whatever files they are in; None where there are no safetensors files."""
    if not any((weights.path / name).exists() for name in (SINGLE, INDEX)):
        return None
    return sum(entry.bytes for entries in weights.files.values() for entry in entries.values())

"""What lies beside the weights of a model, and is kept as it is: one rule for every way of quantising.

Everything in the directory and below it but config.json, which is written anew, the weights themselves, in whatever
format, and hidden files: tokenizers, processors, chat templates, Python files, licences.  A sub-folder that holds
weights is another form of the same model (onnx/, original/) and stays behind, unless modules.json names it:
sentence-transformers keeps the modules that follow the model so, pooling and dense layers.

One file gets another name: the model card, README.md, is that of the float model, and the result has one of its own
(`w8a8.checkpoint.card`).  It is kept beside, to the byte; a section in the new card was the alternative, and would have
mixed two texts, two front matters and what a reader takes for whose word.
"""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from w8a8.checkpoint.files import CONFIG, WEIGHTS, inside, read_json
from w8a8.errors import CheckpointError

README = "README.md"
SOURCE_README = "README.source.md"
"""Where the card of the float model is kept."""

MODULES = "modules.json"
"""Of sentence-transformers: what follows the model, and where it lies."""


def companions(directory: Path) -> list[Path]:
    """The files that are kept, sorted.

    Raises:
        CheckpointError: there is no such directory; one of them is a link that leads elsewhere, or a folder that is
            one; modules.json is torn; the name that the card is kept under is taken.
    """
    if not os.path.isdir(directory):  # False for a name that no directory can have, where Path.is_dir() raises
        raise CheckpointError(
            f"{str(directory)!r} was given as the directory of the float model, and there is no such directory; give "
            "the one whose tokenizer and other files are to be kept"
        )
    if (directory / README).exists() and (directory / SOURCE_README).exists():
        raise CheckpointError(
            f"{directory} has a {README}, which is to be kept as {SOURCE_README}, and that is there too: rename it"
        )
    named = {folder.parts[0] for folder, _ in folders_of(directory)}
    found = [path for path in _visible(directory) if path.is_file() and path.name != CONFIG and not _is_weight(path)]
    for folder in (path for path in _visible(directory) if path.is_dir()):
        below = list(_below(folder))
        if folder.name in named or not any(map(_is_weight, below)):
            found += below
    return sorted(inside(directory, path) for path in found)


def copy_companions(source: Path, target: Path) -> None:
    """Copy the files that are kept into a directory, in which those of the same names are replaced.

    The model card gets the name `SOURCE_README`.

    Raises:
        OSError: one cannot be read or written.
    """
    for path in companions(source):
        name = path.relative_to(source)
        place = target / (SOURCE_README if str(name) == README else name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, place)


def class_around(directory: Path) -> str | None:
    """The class of sentence-transformers that a directory is of, if any; `CheckpointError` where that is torn."""
    if not (directory / MODULES).is_file():
        return None
    path = directory / "config_sentence_transformers.json"
    told = read_json(inside(directory, path)).get("model_type") if path.is_file() else None
    # older versions saved embedders only, and did not say so
    return told if isinstance(told, str) and told.isidentifier() else "SentenceTransformer"


def folders_of(directory: Path) -> list[tuple[Path, str]]:
    """The sub-folders that modules.json names, in its order, and the class of what lies in each.

    Raises:
        CheckpointError: modules.json is torn.
    """
    path = directory / MODULES
    if not path.is_file():
        return []
    try:
        told = json.loads(inside(directory, path).read_text(encoding="utf-8"))
        return [(Path(module["path"]), str(module.get("type", ""))) for module in told if Path(module["path"]).parts]
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a list of modules that each have a path ({type(error).__name__}: {error}): its folders "
            "could not be kept; copy it again"
        ) from error


def _visible(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _below(folder: Path) -> Iterator[Path]:
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a link to a folder: it is not followed; put the folder itself there")
    for path in _visible(folder):
        if path.is_dir():
            yield from _below(path)
        else:
            yield path


def _is_weight(path: Path) -> bool:
    return path.name.endswith(WEIGHTS)

"""What calibration data can be made from: texts, files, token tensors, model inputs, a data set on the hub.

Every source of text ends as windows of token ids, at most `length` tokens each:

    .txt          the whole file is tokenised and cut into windows that do not overlap; `samples` of them are
                  drawn.  What is left at the end is dropped, unless it is all there is.
    texts, .jsonl, a hub data set    `samples` texts are drawn; a text longer than a window gives one window, at a
                  place that is drawn too.  A shorter text is a shorter window: nothing is filled up.
    token ids     one axis is cut as a .txt is; of two axes (n, T) `samples` rows are drawn, as they are.

Drawing is without replacement and with a generator of its own, so the seed alone decides.  No special tokens
are added, as in `w8a8.evaluation`.
"""

import importlib
import json
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from w8a8.errors import CalibrationError, TextError
from w8a8.model.pretrained import Tokenizer

SAMPLES = 128
_HUB_TEXTS = 2000  # of a hub data set that is scored
_SHUFFLED = 1000  # texts of a hub data set among which the next one is drawn


def windows_of_file(path: Path, tokenizer: Tokenizer | None, samples: int, length: int, seed: int) -> list[Tensor]:
    """Windows of token ids (T,) from a .txt or .jsonl file.

    Raises:
        TextError: the file cannot be read, or holds no text.
        CalibrationError: another kind of file; a line of a .jsonl is not an object with a string "text".
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"the calibration file {path} cannot be read as UTF-8 text: {error}") from error
    if path.suffix == ".txt":
        return windows_of_ids(encode(tokenizer, content, str(path)), samples, length, seed)
    if path.suffix == ".jsonl":
        return windows_of_texts(_json_texts(content, path), tokenizer, samples, length, seed)
    raise CalibrationError(
        f"the calibration file {path} ends in {path.suffix!r}: known are .txt (text) and .jsonl "
        '(one object with a "text" in each line); rename or convert it'
    )


def content_of(source: str | Path) -> str:
    """The text of a file (.jsonl: the "text" of its lines, a blank line between), or of a data set on the hub.

    Raises:
        TextError: the file is missing or cannot be read.
        CalibrationError: a line of a .jsonl is not an object with a string "text"; the hub does not give the data set.
    """
    path = Path(source)
    if not path.exists() and not path.suffix and not path.is_absolute() and len(path.parts) == 2:
        return "\n\n".join(hub_texts(str(source), _HUB_TEXTS, 0))
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"the text {path} cannot be read as UTF-8 text: {error}") from error
    return "\n\n".join(_json_texts(content, path)) if path.suffix == ".jsonl" else content


def windows_of_texts(
    texts: Sequence[str], tokenizer: Tokenizer | None, samples: int, length: int, seed: int
) -> list[Tensor]:
    """One window of token ids (T,) from each of `samples` texts, drawn among those that are not empty.

    Raises:
        TextError: no text holds a token.
        CalibrationError: there is no tokenizer; one of them is no text.
    """
    odd = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if odd is not None:
        raise CalibrationError(
            f"text {odd} of the calibration data is of type {type(texts[odd]).__name__}, the others are texts"
        )
    generator = torch.Generator().manual_seed(seed)
    found: list[Tensor] = []
    for i in torch.randperm(len(texts), generator=generator, dtype=torch.int64, device="cpu").tolist():
        ids = encode(tokenizer, texts[i], "a text")
        spare = len(ids) - length
        start = (
            int(torch.randint(spare + 1, (), generator=generator, dtype=torch.int64, device="cpu")) if spare > 0 else 0
        )
        if len(ids):
            found.append(ids[start : start + length])
        if len(found) == samples:
            break
    if not found:
        raise TextError(f"the calibration data has {len(texts)} texts and no token in them; give some text")
    return found


def windows_of_ids(ids: Tensor, samples: int, length: int, seed: int) -> list[Tensor]:
    """`samples` windows drawn from token ids: of one axis cut to `length`, of two axes whole rows.

    Raises:
        CalibrationError: no tokens, or more than two axes.
    """
    if ids.ndim not in (1, 2) or not ids.numel():
        raise CalibrationError(
            f"token ids of shape {tuple(ids.shape)} cannot be used: expected (n, T) or (T,), and at least one token"
        )
    if ids.ndim == 1:
        whole = len(ids) // length
        ids = ids[: whole * length].view(whole, length) if whole else ids[None]
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")
    return list(ids[order[:samples]])


def hub_texts(name: str, samples: int, seed: int) -> list[str]:
    """Texts of a data set on the Hugging Face hub, streamed and shuffled with the seed.

    Args:
        name: "owner/name", or "owner/name:split"; the split is "train" by default.

    Raises:
        CalibrationError: `datasets` is not installed; the data set cannot be opened or has no "text".
    """
    repository, _, split = name.partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise CalibrationError(
            f"the calibration data {name!r} is no file here, and to read it as a data set of the hub takes the "
            f"package 'datasets', which cannot be imported ({error}): pip install datasets, or give the path of a "
            ".txt or .jsonl file"
        ) from error
    try:
        rows = datasets.load_dataset(repository, split=split or "train", streaming=True)
        found = list(islice(rows.shuffle(seed=seed, buffer_size=_SHUFFLED), samples))
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"the calibration data {name!r} is no file here, and the hub did not give it: {error}"
        ) from error
    if found and "text" not in found[0]:
        raise CalibrationError(f'the data set {name!r} has no "text"; it has {", ".join(found[0])}')
    return [row["text"] for row in found]


def encode(tokenizer: Tokenizer | None, text: str, where: str) -> Tensor:
    """Token ids (T,) int64 without special tokens, perhaps none; `CalibrationError` where there is no tokenizer."""
    if tokenizer is None:
        raise CalibrationError(
            f"to calibrate on {where} takes a tokenizer: Calibration.of(source, tokenizer), with that of the model"
        )
    return torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64, device="cpu"
    )


def batched(windows: Iterable[Tensor], batch_size: int) -> list[Tensor]:
    """(B, T) batches of windows in their order; a batch ends where the next window has another length."""
    batches: list[list[Tensor]] = []
    for window in windows:
        if batches and len(batches[-1]) < batch_size and len(batches[-1][0]) == len(window):
            batches[-1].append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]


def _json_texts(content: str, path: Path) -> list[str]:
    texts = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CalibrationError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise CalibrationError(
                f'{path}, line {number} has no string under "text": {line[:60]!r}; each line is {{"text": "..."}}'
            )
        texts.append(row["text"])
    return texts

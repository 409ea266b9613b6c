"""Calibration data: a fixed list of model inputs, or a loop of the user's own, and how it passes through a model.

A `Calibration` is drawn once with a seed, so that several passes see the same batches.  Windows are never padded: texts
are cut, not filled up, and only windows of one length share a batch.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from w8a8.calibration.sources import SAMPLES, batched, hub_texts, windows_of_file, windows_of_ids, windows_of_texts
from w8a8.core.progress import Progress, tell
from w8a8.errors import CalibrationError
from w8a8.model.inputs import ModelInputs, as_inputs, call, check_inputs, evaluating
from w8a8.model.pretrained import Tokenizer


class Calibration:
    """Data to calibrate on, and how to pass it through a model.  Made by `Calibration.of`.

    batches: The model inputs, in their order; empty for a loop of the user's own.
    description: One line that says what was drawn from where, for reports.
    """

    def __init__(
        self, batches: Sequence[ModelInputs], description: str, *, loop: Callable[[nn.Module], object] | None = None
    ) -> None:
        self.batches = tuple(batches)
        self.description = description
        self._loop = loop
        self._first: ModelInputs | None = batches[0] if batches else None

    @classmethod
    def of(
        cls,
        source: object,
        tokenizer: Tokenizer | None = None,
        *,
        samples: int | None = None,
        length: int = 512,
        batch_size: int = 1,
        seed: int = 0,
    ) -> "Calibration":
        """Data of any kind.

        Args:
            source: One of
                - a list of texts, or of mappings with a "text" (rows of a data set); the path of a .txt or .jsonl
                  file; the name of a data set on the hub, with ":split" behind it or not, where `datasets` is
                  installed: these need the tokenizer;
                - token ids, (n, T) or (T,), of an integer dtype;
                - an iterable of model inputs: mappings (keyword arguments), tensors or tuples (positional).
                  They are kept, since they are passed more than once, and neither copied nor changed;
                - a function that is called with the model and makes the forward passes itself;
                - a `Calibration`, which is returned as it is.
            tokenizer: Of the model, for texts.
            samples: How many windows, texts or rows are drawn, 128 by default (see `w8a8.model.sources`); of model
                inputs, how many are taken from the front, all by default.
            length: Tokens in a window that is cut from text.
            batch_size: Windows in a forward pass.
            seed: Of the drawing.  The same seed gives the same batches.

        Raises:
            CalibrationError: the source is of no such kind, empty, or lacks its tokenizer or package.
            TextError: a file that cannot be read, or without text.
        """
        if isinstance(source, Calibration):
            return source
        for name, value in (("samples", samples), ("length", length), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise CalibrationError(f"{name}={value} is out of range: at least 1")
        if isinstance(source, nn.Module | Mapping):
            raise CalibrationError(
                f"calibration data is of an unknown kind: {type(source).__name__}; give batches in a list: [batch]"
            )
        if isinstance(source, str | os.PathLike):
            windows = _windows_of_name(source, tokenizer, samples or SAMPLES, length, seed)
            return cls._of_windows(windows, batch_size, f"{source}, seed {seed}")
        if isinstance(source, Tensor):
            if source.is_floating_point():
                raise CalibrationError(
                    f"token ids are integers, found a tensor of {source.dtype}; give float inputs in a list: [batch]"
                )
            windows = windows_of_ids(source.to(torch.int64), samples or SAMPLES, length, seed)
            return cls._of_windows(windows, batch_size, f"token ids of shape {tuple(source.shape)}, seed {seed}")
        if isinstance(source, Iterable):
            return cls._of_items(iter(source), tokenizer, samples, length, batch_size, seed)
        if callable(source):
            return cls((), f"the loop {getattr(source, '__name__', type(source).__name__)}", loop=source)
        raise CalibrationError(
            f"calibration data is of an unknown kind: {type(source).__name__}; give texts with a tokenizer, a file, "
            "token ids, an iterable of model inputs, or a function of the model"
        )

    @classmethod
    def _of_windows(cls, windows: Sequence[Tensor], batch_size: int, where: str) -> "Calibration":
        tokens = sum(len(window) for window in windows)
        batches = [{"input_ids": ids} for ids in batched(windows, batch_size)]
        return cls(batches, f"{len(windows)} windows, {tokens:,} tokens, of {where}")

    @classmethod
    def _of_items(
        cls, items: Iterator[Any], tokenizer: Tokenizer | None, samples: int | None, length: int, size: int, seed: int
    ) -> "Calibration":
        """Of texts all, to draw among them; of model inputs no more than are asked for."""
        first = next(items, None)
        if first is None:
            raise CalibrationError("the calibration data is empty: it gave no batch; a generator can be read only once")
        rows = tokenizer is not None and isinstance(first, Mapping) and "text" in first
        if rows or isinstance(first, str):
            texts: list[Any] = [
                item.get("text") if rows and isinstance(item, Mapping) else item for item in chain([first], items)
            ]
            windows = windows_of_texts(texts, tokenizer, samples or SAMPLES, length, seed)
            return cls._of_windows(windows, size, f"{len(texts)} texts, seed {seed}")
        batches = list(islice(chain([first], items), samples))
        for i, batch in enumerate(batches):
            if not isinstance(batch, Mapping | Tensor | tuple):
                raise CalibrationError(
                    f"batch {i} of the calibration data is of type {type(batch).__name__}: a batch is a mapping "
                    "(keyword arguments), a tensor or a tuple (positional arguments) for the model"
                )
        return cls(batches, f"{len(batches)} batches of model inputs")

    def __len__(self) -> int:
        """The number of batches; 0 for a loop, whose length only the loop knows."""
        return len(self.batches)

    def first(self, model: nn.Module | None = None) -> ModelInputs:
        """One batch of model inputs: the first.

        Args:
            model: Where the data is a loop that has not run yet: the model to start it on.  The loop is stopped
                at its first call of the model.

        Raises:
            CalibrationError: the data is a loop that has not run, and no model was given; or that makes no call.
        """
        if self._first is None and model is not None:
            with contextlib.suppress(_Stop):
                self._run_loop(model, stop=True)
        if self._first is None:
            raise CalibrationError(
                f"{self.description} has not called the model yet, so there is no batch: give first(model) the model"
            )
        return self._first

    @torch.inference_mode(False)  # which has no versions, by which what readers of a tensor share is told
    @torch.no_grad()  # inside of the line above, which ends it
    def run(self, model: nn.Module, progress: Progress | None = None) -> None:
        """Pass everything through a model: in evaluation mode, without gradients and without a cache.

        Args:
            model: Not modified; training flags and `config.use_cache` are as before at the end.
            progress: Called after each forward pass; not for a loop, whose length is unknown.

        Raises:
            CalibrationError: a token id or a length that the model does not know; a loop that makes no call.
        """
        if self._loop is not None:
            self._run_loop(model, stop=False)
            return
        with evaluating(model):
            for done, inputs in enumerate(self.batches, start=1):
                check_inputs(model, inputs)
                call(model, inputs)
                tell(progress, done, len(self.batches), "calibrating")

    def _run_loop(self, model: nn.Module, *, stop: bool) -> None:
        assert self._loop is not None, "only a loop has no batches"
        calls = 0

        def keep(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            nonlocal calls
            calls += 1
            if self._first is None:
                self._first = as_inputs(module, args, kwargs)
            if stop:
                raise _Stop

        hook = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        with hook, torch.inference_mode(False), torch.no_grad(), evaluating(model):
            self._loop(model)
        if not calls:
            raise CalibrationError(f"{self.description} made no call of the model that it was given: call model(...)")


def _windows_of_name(
    source: str | os.PathLike[str], tokenizer: Tokenizer | None, samples: int, length: int, seed: int
) -> list[Tensor]:
    path = Path(source)
    if path.exists() or path.suffix in (".txt", ".jsonl") or not isinstance(source, str):
        return windows_of_file(path, tokenizer, samples, length, seed)
    return windows_of_texts(hub_texts(source, samples, seed), tokenizer, samples, length, seed)


class _Stop(Exception):  # noqa: N818 - not an error: the loop has shown what was asked for
    """Ends a loop at its first call."""

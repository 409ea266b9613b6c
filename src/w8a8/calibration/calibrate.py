"""Calibration: batches in, statistics out.

A `Calibration` is a fixed list of model inputs (or a loop of the user's own), drawn once with a seed, so that
several passes see the same batches.  `run` makes the forward passes; `collect` makes them with a forward
pre-hook on each named module, which hands the module's input to that module's statistics.  Statistics are
streamed: inputs of the model are kept, activations never are, and memory does not grow with the batches.

What several modules read is measured once.  q, k and v are called with the very same tensor object, so
what one observer measured of it is kept for as long as that tensor lives, and observers of the same kind on
the next module merge the same summary.  A tensor that was changed in between, told by its version counter, is
measured again.

Windows are never padded: texts are cut, not filled up, and only windows of one length share a batch.  Where
the user's own batches carry a 2-D `attention_mask`, the tokens it hides are left out of every statistic.

The alternative, running block after block on stored activations, needs less memory for a model that does not
fit the device, and as much memory for activations as there are batches; whole forward passes need none.
"""

import contextlib
import inspect
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from w8a8.affine import QParams
from w8a8.calibration.model_inputs import ModelInputs, as_inputs, call, check_inputs, evaluating
from w8a8.calibration.observers import Observer, observer_of
from w8a8.calibration.sources import SAMPLES, batched, hub_texts, windows_of_file, windows_of_ids, windows_of_texts
from w8a8.convert import Progress
from w8a8.errors import CalibrationError, W8A8Error
from w8a8.experts import Experts
from w8a8.scheme import QuantSpec

__all__ = ["Calibration", "ModelInputs", "Statistic", "call", "checked_observer", "collect", "static_grids"]


class Statistic(Protocol):
    """Anything that is fed tensor by tensor: an `Observer`, a `Reservoir`."""

    def update(self, x: Tensor) -> None:
        """Take in one (..., K) tensor, which is not to be modified or kept."""
        ...


T = TypeVar("T", bound="Statistic | Sequence[Statistic]")


class Calibration:
    """Data to calibrate on, and how to pass it through a model.  Made by `Calibration.of`.

    batches: The model inputs, in their order; empty for a loop of the user's own.
    description: One line that says what was drawn from where, for reports.
    """

    def __init__(
        self, batches: Sequence[ModelInputs], description: str, *, loop: Callable[[Any], object] | None = None
    ) -> None:
        self.batches = tuple(batches)
        self.description = description
        self._loop = loop
        self._first: ModelInputs | None = batches[0] if batches else None

    @classmethod
    def of(
        cls,
        source: Any,
        tokenizer: Any = None,
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
            samples: How many windows, texts or rows are drawn, 128 by default (see `w8a8.sources`); of model
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
            return cls._of_name(source, tokenizer, samples or SAMPLES, length, batch_size, seed)
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
    def _of_name(
        cls, source: "str | os.PathLike[str]", tokenizer: Any, samples: int, length: int, batch_size: int, seed: int
    ) -> "Calibration":
        path = Path(source)
        if path.exists() or path.suffix in (".txt", ".jsonl") or not isinstance(source, str):
            windows = windows_of_file(path, tokenizer, samples, length, seed)
        else:
            windows = windows_of_texts(hub_texts(source, samples, seed), tokenizer, samples, length, seed)
        return cls._of_windows(windows, batch_size, f"{source}, seed {seed}")

    @classmethod
    def _of_windows(cls, windows: Sequence[Tensor], batch_size: int, where: str) -> "Calibration":
        tokens = sum(len(window) for window in windows)
        batches = [{"input_ids": ids} for ids in batched(windows, batch_size)]
        return cls(batches, f"{len(windows)} windows, {tokens:,} tokens, of {where}")

    @classmethod
    def _of_items(
        cls, items: Iterator[Any], tokenizer: Any, samples: int | None, length: int, batch_size: int, seed: int
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
            return cls._of_windows(windows, batch_size, f"{len(texts)} texts, seed {seed}")
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

    @torch.no_grad()
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
                if progress is not None:
                    progress(done, len(self.batches), "calibrating")

    def _run_loop(self, model: nn.Module, *, stop: bool) -> None:
        assert self._loop is not None, "only a loop has no batches"
        calls = 0

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            calls += 1
            if self._first is None:
                self._first = as_inputs(module, args, kwargs)
            if stop:
                raise _Stop

        handle = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad(), evaluating(model):
                self._loop(model)
        finally:
            handle.remove()
        if not calls:
            raise CalibrationError(f"{self.description} made no call of the model that it was given: call model(...)")


class _Stop(Exception):  # noqa: N818 - not an error: the loop has shown what was asked for
    """Ends a loop at its first call."""


def collect(
    model: nn.Module,
    calibration: Calibration,
    statistics: Mapping[str, T],
    *,
    progress: Progress | None = None,
) -> dict[str, T]:
    """Run the calibration once and feed what the named modules read to their statistics.

    Args:
        model: Not modified; its training flags are as before at the end, and every hook is removed, whatever
            happens.
        calibration: The forward passes.
        statistics: For each module, by its dotted name, one statistic or several.  They are updated.
        progress: Called after each forward pass.

    Returns:
        The statistics, by the same names.  A module that no forward pass reached has seen no token.

    Raises:
        CalibrationError: no module has such a name.
        W8A8Error: as the statistics' `update`, with a note that names the module.

    Example:
        >>> layer = nn.Sequential(nn.Linear(2, 3))
        >>> calibration = Calibration.of([torch.tensor([[1.0, -4.0]])])
        >>> collect(layer, calibration, {"0": AbsMax(PerChannel())})["0"].absmax
        tensor([1., 4.])
    """
    modules = dict(model.named_modules())
    unknown = [name for name in statistics if name not in modules]
    if unknown:
        raise CalibrationError(f"{type(model).__name__} has no module {unknown[0]!r}")
    shared = _Shared()
    handles = []
    try:
        handles.append(model.register_forward_pre_hook(shared.begin, with_kwargs=True))
        experts = [module for module in modules.values() if isinstance(module, Experts)]
        handles += [module.register_forward_pre_hook(shared.route, with_kwargs=True) for module in experts]
        for name, wanted in statistics.items():
            several = wanted if isinstance(wanted, Sequence) else (wanted,)
            handles.append(modules[name].register_forward_pre_hook(_hook(name, several, shared), with_kwargs=True))
        calibration.run(model, progress)
    finally:
        for handle in handles:
            handle.remove()
    return dict(statistics)


def checked_observer(observer: str | Callable[[], Observer], spec: QuantSpec) -> Callable[[], Observer]:
    """What makes the observers; one that has no such grid says so here, before the passes and not after.

    Raises:
        CalibrationError: no observer has this name.
        SchemeError: the observer has no grid for this `spec`.
    """
    make = observer_of(observer)
    trial = make()
    trial.update(torch.zeros(1, 1))
    trial.params(spec)
    return make


def static_grids(
    model: nn.Module,
    names: Sequence[str],
    spec: QuantSpec,
    calibration: Calibration,
    observer: str | Callable[[], Observer] = "absmax",
    *,
    progress: Progress | None = None,
) -> dict[str, QParams]:
    """The static grid of each layer's input.

    Args:
        model: Not modified.
        names: The layers, by their dotted names.
        spec: The grid of the activations: per tensor, not dynamic.
        calibration: The forward passes.
        observer: A name in `OBSERVERS`, or a function that makes an observer per tensor:
            `lambda: Percentile(p=99.9)`.
        progress: Called after each forward pass.

    Returns:
        Grids of one element each.  Layers that read the same tensor get the same grid.

    Raises:
        CalibrationError: no observer has this name; a layer was not reached, or only with no tokens.
        NonFiniteError: a layer read a NaN or an infinity; the layer is named.
    """
    make = checked_observer(observer, spec)
    found = collect(model, calibration, {name: make() for name in names}, progress=progress)
    unreached = [name for name in names if not found[name].tokens]
    if unreached:
        raise CalibrationError(
            f"{len(unreached)} of {len(names)} layers read no token during calibration, so there is no scale for them: "
            + ", ".join(unreached[:3])
            + (", ..." if len(unreached) > 3 else "")
            + f"; calibrated on {calibration.description}; use data that reaches them, exclude them, "
            "or use a dynamic scheme"
        )
    return {name: found[name].params(spec) for name in names}


class _Shared:
    """What was measured of the tensors that are alive, and which tokens of this forward pass count."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._found: dict[int, tuple[weakref.ref[Tensor], int, dict[Any, Any]]] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: nothing is known yet."""
        self._found.clear()
        mask = kwargs.get("attention_mask")
        two_streams = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # the mask is of one only
        self.mask = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and not two_streams and not bool(mask.all()):
            self.mask = mask.to(torch.bool)

    def route(self, experts: Experts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Send tokens that do not count to no expert: behind the router a row says nothing of its place."""
        given = inspect.signature(experts.forward).bind(*args, **kwargs).arguments
        if self.mask is None or len(given["top_k_index"]) != self.mask.numel():
            return None
        hidden = ~self.mask.reshape(-1, 1).to(given["top_k_index"].device)
        given["top_k_index"] = given["top_k_index"].masked_fill(hidden, experts.num_experts)
        return (), given

    def measured(self, x: Tensor) -> dict[Any, Any]:
        """A place for what is measured of this tensor, kept until it dies or changes."""
        if x.is_inference():  # has no version counter
            return {}
        key, version = id(x), x._version
        entry = self._found.get(key)
        if entry is None or entry[0]() is not x or entry[1] != version:
            entry = (weakref.ref(x, lambda _: self._found.pop(key, None)), version, {})
            self._found[key] = entry
        return entry[2]

    def counted(self, x: Tensor) -> Tensor:
        """The tokens that the mask does not hide."""
        mask = self.mask
        if mask is None:
            return x
        if x.shape[:-1] == mask.shape:
            return x[mask.to(x.device)]
        if x.ndim == 2 and len(x) == mask.numel():
            return x[mask.reshape(-1).to(x.device)]
        return x


def _hook(name: str, statistics: Sequence[Statistic], shared: _Shared) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise CalibrationError(f"{name} was called without a tensor: only what reads one can be observed")
        measured = shared.measured(x)
        x = shared.counted(x.detach())
        try:
            for statistic in statistics:
                if not isinstance(statistic, Observer):
                    statistic.update(x)
                    continue
                kind = (type(statistic).measure, statistic.measures, statistic.granularity)
                if kind not in measured:
                    measured[kind] = statistic.measure(x)
                statistic.merge(measured[kind])
        except W8A8Error as error:
            error.add_note(f"while observing what {name} reads")
            raise

    return hook

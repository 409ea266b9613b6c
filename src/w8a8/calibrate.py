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
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from w8a8.convert import Progress
from w8a8.errors import CalibrationError, W8A8Error
from w8a8.observers import Observer

ModelInputs: TypeAlias = Mapping[str, Any] | Tensor | tuple[Any, ...]
"""One call of a model: keyword arguments, one positional argument, or several."""


class Statistic(Protocol):
    """Anything that is fed tensor by tensor: an `Observer`, a `Reservoir`."""

    def update(self, x: Tensor) -> None:
        """Take in one (..., K) tensor, which is not to be modified or kept."""
        ...


T = TypeVar("T", bound="Statistic | Sequence[Statistic]")


class Calibration:
    """Data to calibrate on, and how to pass it through a model.  Made by `Calibration.of`."""

    def __init__(self, batches: Sequence[ModelInputs], description: str) -> None:
        self.batches = batches
        self.description = description

    def __len__(self) -> int:
        """The number of batches."""
        return len(self.batches)

    def first(self) -> ModelInputs:
        """One batch of model inputs, as it was given or made."""
        return self.batches[0]

    @torch.no_grad()
    def run(self, model: nn.Module, progress: Progress | None = None) -> None:
        with _evaluating(model):
            for done, inputs in enumerate(self.batches, start=1):
                call(model, inputs)
                if progress is not None:
                    progress(done, len(self.batches), "calibrating")


def call(model: nn.Module, inputs: ModelInputs) -> Any:
    """Call a model with one batch, moved to the device of its first parameter."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(inputs, Mapping):
        return model(**{key: _moved(value, device) for key, value in inputs.items()})
    if isinstance(inputs, tuple):
        return model(*(_moved(value, device) for value in inputs))
    return model(inputs.to(device))


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
        for name, wanted in statistics.items():
            several = wanted if isinstance(wanted, Sequence) else (wanted,)
            handles.append(modules[name].register_forward_pre_hook(_hook(name, several, shared), with_kwargs=True))
        calibration.run(model, progress)
    finally:
        for handle in handles:
            handle.remove()
    return dict(statistics)


class _Shared:
    """What was measured of the tensors that are alive, and which tokens of this forward pass count."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._found: dict[int, tuple[weakref.ref[Tensor], int, dict[Any, Any]]] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass begins: nothing is known yet."""
        self._found.clear()
        mask = kwargs.get("attention_mask")
        partial = isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())
        self.mask = mask.to(torch.bool) if partial else None  # type: ignore[union-attr]

    def measured(self, x: Tensor) -> dict[Any, Any]:
        """A place for what is measured of this tensor, kept until it dies or changes."""
        if x.is_inference():  # has no version counter
            return {}
        key, version = id(x), x._version
        entry = self._found.get(key)
        if entry is None or entry[0]() is not x or entry[1] != version:
            entry = (weakref.ref(x), version, {})
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
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)).detach()
        measured = shared.measured(args[0] if args else x)
        x = shared.counted(x)
        try:
            for statistic in statistics:
                if not isinstance(statistic, Observer):
                    statistic.update(x)
                    continue
                kind = (statistic.measures, statistic.granularity)
                if kind not in measured:
                    measured[kind] = statistic.measure(x)
                statistic.merge(measured[kind])
        except W8A8Error as error:
            error.add_note(f"while observing what {name} reads")
            raise

    return hook


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no cache of keys and values, for the length of a `with` block."""
    training = {module: module.training for module in model.modules()}
    config: Any = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        model.eval()
        if use_cache is not None:
            config.use_cache = False
        yield
    finally:
        for module, flag in training.items():
            module.training = flag
        if use_cache is not None:
            config.use_cache = use_cache


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value

"""Calibration: batches in, statistics out.

`collect` runs a `Calibration` once, with a forward pre-hook on each named module, which hands the module's input to
that module's statistics.  Statistics are streamed: inputs of the model are kept, activations never are, and memory does
not grow with the batches.

What several modules read is measured once.  q, k and v are called with the very same tensor object, so
what one observer measured of it is kept for as long as that tensor lives, and observers of the same kind on
the next module merge the same summary.  A tensor that was changed in between, told by its version counter, is
measured again.

Where the user's own batches carry a 2-D `attention_mask`, the tokens it hides are left out of every statistic.

The alternative, running block after block on stored activations, needs less memory for a model that does not
fit the device, and as much memory for activations as there are batches; whole forward passes need none.
"""

import contextlib
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer, observer_of
from w8a8.calibration.summaries import Summary
from w8a8.core.affine import QParams
from w8a8.core.progress import Progress
from w8a8.core.scheme import QuantSpec, Scheme
from w8a8.errors import CalibrationError, few, noted
from w8a8.model.experts import Experts


class Statistic(Protocol):
    """Anything that is fed tensor by tensor: an `Observer`, a `Reservoir`."""

    def update(self, x: Tensor) -> None:
        """Take in one (..., K) tensor, which is not to be modified or kept."""
        ...


T = TypeVar("T", bound="Statistic | Sequence[Statistic]")
Measured: TypeAlias = tuple[object, object, object]  # how a summary was made


def collect(
    model: nn.Module, calibration: Calibration, statistics: Mapping[str, T], *, progress: Progress | None = None
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
    with contextlib.ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(shared.begin, with_kwargs=True))
        for module in modules.values():
            if isinstance(module, Experts):
                hooks.enter_context(module.register_forward_pre_hook(shared.route, with_kwargs=True))
        for name, wanted in statistics.items():
            hook = _hook(name, wanted if isinstance(wanted, Sequence) else (wanted,), shared)
            hooks.enter_context(modules[name].register_forward_pre_hook(hook, with_kwargs=True))
        calibration.run(model, progress)
    return dict(statistics)


def checked_observer(observer: str | Callable[[], Observer], spec: QuantSpec) -> Callable[[], Observer]:
    """What makes the observers; one that has no such grid says so here, before the passes and not after.

    Raises:
        CalibrationError: no observer has this name.
        SchemeError: the observer has no grid for this `spec`.
    """
    make = observer_of(observer)
    trial = make()
    trial.update(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))
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
        spec: The grid of the activations: per tensor, not dynamic.
        observer: A name in `OBSERVERS`, or a function that makes an observer per tensor:
            `lambda: Percentile(p=99.9)`.

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
            f"{few(unreached)}; calibrated on {calibration.description}; use data that reaches them, exclude them, "
            "or use a dynamic scheme"
        )
    return {name: found[name].params(spec) for name in names}


def grids_of_schemes(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    calibration: Calibration | None,
    observer: str | Callable[[], Observer] = "absmax",
    *,
    progress: Progress | None = None,
) -> dict[str, QParams]:
    """The static grids of the inputs of those layers whose schemes do not measure each input as it comes.

    Args:
        calibration: The forward passes: one round for each grid that differs.  None where no scheme is static.
        observer, progress: As for `static_grids`.
    """
    grids: dict[str, QParams] = {}
    for spec in dict.fromkeys(measured for scheme in schemes.values() if (measured := scheme.measured) is not None):
        assert calibration is not None, "whoever takes a static scheme has asked for the data"
        names = [name for name, scheme in schemes.items() if scheme.activations == spec]
        grids |= static_grids(model, names, spec, calibration, observer, progress=progress)
    return grids


class _Shared:
    """What was measured of the tensors that are alive, and which tokens of this forward pass count."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self._found: dict[int, tuple[weakref.ref[Tensor], int, dict[Measured, Summary]]] = {}

    def begin(self, model: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """A forward pass begins: nothing is known yet."""
        self._found.clear()
        mask = kwargs.get("attention_mask")
        two_streams = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # the mask is of one only
        self.mask = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and not two_streams and not bool(mask.all()):
            self.mask = mask.to(torch.bool)

    def route(self, experts: Experts, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Send tokens that do not count to no expert: behind the router a row says nothing of its place."""
        given = inspect.signature(experts.forward).bind(*args, **kwargs).arguments
        if self.mask is None or len(given["top_k_index"]) != self.mask.numel():
            return None
        hidden = ~self.mask.reshape(-1, 1).to(given["top_k_index"].device)
        given["top_k_index"] = given["top_k_index"].masked_fill(hidden, experts.num_experts)
        return (), given

    def measured(self, x: Tensor) -> dict[Measured, Summary]:
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
    def hook(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if x is None:
            raise CalibrationError(f"{name} was called without a tensor: only what reads one can be observed")
        measured = shared.measured(x)
        x = shared.counted(x.detach())
        with noted(f"while observing what {name} reads"):
            for statistic in statistics:
                if not isinstance(statistic, Observer):
                    statistic.update(x)
                    continue
                kind = (type(statistic).measure, statistic.measures, statistic.granularity)
                if kind not in measured:
                    measured[kind] = statistic.measure(x)
                statistic.merge(measured[kind])

    return hook

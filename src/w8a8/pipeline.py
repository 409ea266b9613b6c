"""The main jobs, each one call: `quantize` and `simulate`."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from w8a8 import kernels
from w8a8.calibration.calibrate import checked_observer, grids_of_schemes
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import Observer, observer_of
from w8a8.checkpoint.describe import inscribe, inscription
from w8a8.core.progress import Progress
from w8a8.core.scheme import AUTO, Scheme
from w8a8.fusing.models import check_fusible, optimize
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import ledger, uncalled
from w8a8.model.choice import Choice
from w8a8.model.coverage import coverage
from w8a8.model.selection import Schemes
from w8a8.model.swapping import build, swapped
from w8a8.model.tables import build_tables
from w8a8.records.coverage import Coverage
from w8a8.smoothing.smooth import SmoothReport, smooth_undoable
from w8a8.smoothing.way import NONE, Smoothing


@dataclass(frozen=True)
class Result:
    """What `quantize` and `simulate` did.

    model: The model that was given, changed in place.
    scheme: The scheme of the new layers; where they differ, the one that most of them have.
    coverage: What is quantised, what is not, and why not.
    untied: Layers whose weight was shared and is another now, each with a module that it shared with: that one stayed
        float, or got another scheme.  Linear layers tied to one another that get the same scheme are not in here: they
        are taken together, each with codes of its own, which are equal.
    smooth: What smoothing did before; None where it was not asked for.
    schemes: The scheme of each new layer.
    """

    model: nn.Module
    scheme: Scheme
    coverage: Coverage
    untied: dict[str, str]
    smooth: SmoothReport | None = None
    schemes: dict[str, Scheme] = field(default_factory=dict)

    def ledger(self) -> dict[str, dict[str, int]]:
        """How often each kernel has run so far, per layer."""
        return ledger(self.model)

    def uncalled(self) -> list[str]:
        """The integer layers that no forward has called so far."""
        return uncalled(self.model)


def quantize(
    model: nn.Module,
    scheme: Schemes = AUTO,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    head: str = "float",
    embeddings: str = "float",
    kernel: str = kernels.AUTO,
    strict: bool = False,
    calibration: object = None,
    observer: str | Callable[[], Observer] = "absmax",
    smooth: Smoothing | str | float | None = None,
    fuse: bool = False,
    progress: Progress | None = None,
) -> Result:
    """Turn the linear layers of a model into int8 layers, in place; its lookup tables too, where that is asked for.

    `nn.Linear` and transformers' `Conv1D` are taken, and the stacked experts of mixtures: each expert then has linear
    layers of its own, `model.layers.0.mlp.experts.3.down_proj`, if any of them is chosen.  The output head, layers tied
    to something that stays float, and routers are only taken where `include` holds their exact name; a tied head
    becomes a copy of its own, and the config's `tie_word_embeddings` is then set to False.

    Args:
        model: Of any class; changed only if everything succeeds.
        scheme: A scheme that integers can run, a weight-only one, or a preset's name; "auto" is "w8a8-asym" for
            encoders of text and pictures, and "w8a8" else.  Or a mapping from exact names and globs to such schemes, or
            None: the first pattern that matches a layer decides, and what is None or matched by none stays float.
            Smoothing is then for the scheme that most layers have.
        include: Exact names or globs over dotted names.  ("*", "lm_head") is everything and the head.
        exclude: Exact names or globs that stay float.
        head: "int8" takes the output head too, as naming it in `include` does; files are then not what vLLM reads.
        embeddings: "int8" takes the lookup tables too, with a scale for each row (`w8a8.QuantEmbedding`), all but those
            that `exclude` matches; one that is tied to the head only with head="int8", whose codes it shares.
        kernel: The kernel to run, or "auto": the first that can.
        strict: Raise where the kernel that was asked for cannot run, instead of running another.
        calibration: A `Calibration`, or what `Calibration.of` makes one from without a tokenizer.  A static scheme
            needs it, others do not use it.
        observer: How a static grid follows from what was seen: a name in `w8a8.observers.OBSERVERS`, or a function
            that makes an observer per tensor, `lambda: Percentile(p=99.9)`.
        smooth: "auto" (the default where there is a calibration), "searched", an alpha in 0..1, or "none" (the default
            without): scale activations into weights first, see `w8a8.smoothing.smooth`.
        fuse: Whether what lies between the layers runs fused too, `w8a8.optimize`.
        progress: Called as progress(done, total, name).

    Returns:
        The model, and what was done to it.

    Raises:
        SchemeError: the scheme cannot be executed (the message says why and what to use), does not fit a
            layer, or there is nothing to quantise; it is static, or to be smoothed for, and there is no calibration.
        CalibrationError: the calibration data cannot be used, or a layer read none of it.
        PatternError: a pattern matches no linear layer, or one of `scheme` none of the chosen.
        ModelError: `head` or `embeddings` is unknown, or there is none to quantise; with `fuse`, there would be
            nothing to fuse.
        NonFiniteError: a weight holds a NaN or an infinity; layer and index are named.
        KernelError: no kernel has this name.
    """
    choice = Choice.of(model, scheme, include, exclude, head=head, embeddings=embeddings)
    if fuse:
        check_fusible(model, [name for name, each in choice.schemes.items() if each.activations is not None])
    result = carry_out(choice, calibration, observer, smooth, progress, kernel=kernel, strict=strict)
    if fuse:
        optimize(model)
    return result


def simulate(
    model: nn.Module,
    scheme: Schemes = AUTO,
    *,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    calibration: object = None,
    observer: str | Callable[[], Observer] = "absmax",
    smooth: Smoothing | str | float | None = None,
    progress: Progress | None = None,
) -> Result:
    """Show what any scheme costs, in float arithmetic, in place.

    For a scheme that integers can run the outputs are those of `quantize`, bit for bit.

    Args:
        model, include, exclude, calibration, observer, smooth, progress: As for `quantize`.
        scheme: Of any kind, up to 16 bits.

    Returns:
        The model, and what was done to it.

    Raises:
        SchemeError, PatternError, NonFiniteError, CalibrationError: as `quantize`.
    """
    choice = Choice.of(model, scheme, include, exclude)
    return carry_out(choice, calibration, observer, smooth, progress, simulated=True)


def carry_out(
    choice: Choice,
    calibration: object = None,
    observer: str | Callable[[], Observer] = "absmax",
    smooth: Smoothing | str | float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """`quantize`, or `simulate`, of what was chosen, by their arguments; options are those of `build`."""
    kernels.check_name(options.get("kernel", kernels.AUTO))
    model, schemes = choice.model, choice.schemes
    counted = Counter(schemes.values())
    if calibration is not None:
        calibration = Calibration.of(calibration)
    for each in counted:  # what can be known of the static grids before any pass
        if calibration is None:
            each.check_without_data()
        if each.static and each.activations is not None:
            checked_observer(observer, each.activations)
        else:
            observer_of(observer)
    ((scheme, _),) = counted.most_common(1)
    report, undo = smooth_first(model, choice.outside, scheme, calibration, smooth, progress)
    try:
        with choice.unstacked():
            layers: dict[str, QuantLayer] = {}
            layers |= build(
                model,
                schemes,
                input_params=grids_of_schemes(model, schemes, calibration, observer, progress=progress),
                progress=progress,
                **options,
            )
            layers |= build_tables(model, choice.tables.schemes, layers)
            with swapped(model, layers):  # what can fail of telling what was done fails here
                told, inscribed = coverage(model, choice.selection.reasons), inscription(model)
    except BaseException:
        undo()
        raise
    choice.enact(layers)
    inscribe(inscribed)
    return Result(model, scheme, told, choice.copied, report, schemes)


def smooth_first(
    model: nn.Module,
    chosen: Sequence[str],
    scheme: Scheme,
    calibration: Calibration | None,
    smooth: Smoothing | str | float | None,
    progress: Progress | None,
) -> tuple[SmoothReport | None, Callable[[], None]]:
    """Smooth the float weights, in place, where `quantize` is asked to, and say how to take it back."""
    way = Smoothing.asked(smooth, calibrated=calibration is not None)
    if calibration is None or way == NONE:
        return None, lambda: None
    return smooth_undoable(model, calibration, way=way, scheme=scheme, chosen=chosen, progress=progress)

"""What quantising does to each layer by itself, on what the float model feeds it: no KL, two forwards a window.

Readers of one tensor are found by watching which layers are given the same one.  What is summed for a layer is in
`measure`.
"""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from w8a8.analysis.answers import Window
from w8a8.analysis.measure import LayerMeasure
from w8a8.analysis.replay import block_index, blocks_of
from w8a8.analysis.sample import Sample, draw
from w8a8.calibration.calibrate import collect
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import MinMax
from w8a8.core.scheme import PerChannel
from w8a8.errors import ModelError
from w8a8.evaluation.text import Text
from w8a8.layers.linear import QuantLinear, float_operands, is_linear, quant_linears
from w8a8.model.inputs import evaluating, watched
from w8a8.model.pretrained import Pretrained
from w8a8.model.selection import select
from w8a8.records.layers import Channels, LayerErrors, binned

Ranges: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""By layer the smallest and the largest value of each input channel, (K,) each."""


def layer_errors(
    reference: Pretrained,
    model: nn.Module,
    text: Text | Tensor,
    *,
    windows: int = 2,
    seq_len: int | None = None,
    seed: int = 0,
) -> tuple[LayerErrors, ...]:
    """What each quantised layer of a model does to what the float model feeds it.

    Args:
        reference: The float model.  Not modified.
        model: What it was quantised to: its layers are run, as they are.  Where it was smoothed before, its layers
            want other inputs than the float model's, and that is an error.
        text, windows, seq_len, seed: As for `sensitivity`.

    Returns:
        The layers in the model's order that are float linears in the reference.

    Raises:
        ModelError: the models differ beside their quantised layers, or none of those is float in the reference.
        CalibrationError, TextError: as `sensitivity`.
    """
    floats = {name for name, module in reference.named_modules() if is_linear(module)}
    layers = {name: layer for name, layer in quant_linears(model) if name in floats}
    if not layers:
        raise ModelError("no layer is quantised in the one model and float in the other: there is nothing to compare")
    _check_same_beside(reference, model)
    sample = draw(reference, text, windows=windows, seq_len=seq_len, seed=seed)
    return measured_alone(reference, layers, sample)[0]


def measured_alone(
    model: Pretrained, layers: Mapping[str, QuantLinear], sample: Sample
) -> tuple[tuple[LayerErrors, ...], dict[str, LayerMeasure], Ranges]:
    """What some layers of a float model do in other forms: in figures, as it was summed, and the ranges of inputs."""
    ranges = channel_ranges(model, list(layers), sample.calibration())
    measures = {name: LayerMeasure(model.get_submodule(name), layers[name], *ranges[name]) for name in ranges}
    blocks, groups = blocks_of(model), dict(zip(layers, layers, strict=True))
    for window in sample.windows:
        groups |= observe_readers(model, window, list(ranges), measures)
    errors = tuple(
        LayerErrors(
            name=name,
            kind=name.rpartition(".")[2],
            block=block_index(blocks, name),
            group=groups[name],
            shape=list(float_operands(model.get_submodule(name))[0].shape),
            scheme=layer.scheme.name,
            **_figures(measures.get(name), ranges.get(name)),
        )
        for name, layer in layers.items()
    )
    return errors, measures, ranges


def channel_absmax(model: Pretrained, text: Text | Tensor, **options: Any) -> dict[str, Tensor]:
    """The largest magnitude of each input channel of each float linear, (K,), to compare with after smoothing.

    Args:
        options: `windows`, `seq_len` and `seed`, as for `sensitivity`.
    """
    sample = draw(model, text, **options)
    found = channel_ranges(model, select(model).chosen, sample.calibration())
    return {name: torch.maximum(-lo, hi) for name, (lo, hi) in found.items()}


def channel_ranges(model: nn.Module, names: Sequence[str], data: Calibration) -> Ranges:
    """The smallest and largest value of each input channel, (K,) each, of the layers that the data reaches."""
    found = collect(model, data, {name: MinMax(PerChannel()) for name in names})
    return {
        name: (observer.seen().lo.flatten(), observer.seen().hi.flatten())
        for name, observer in found.items()
        if observer.tokens
    }


def observe_readers(
    model: Pretrained,
    window: Window,
    names: Sequence[str],
    measures: Mapping[str, LayerMeasure] | None = None,
) -> dict[str, str]:
    """Who reads the same tensor, seen in one float forward.

    Args:
        measures: Fed with each layer's input and output, where given.

    Returns:
        For each layer the first one with the same parent that read the same tensor: often itself.
    """
    found = dict(zip(names, names, strict=True))
    readers: dict[tuple[str, int], tuple[weakref.ref[Tensor], str]] = {}

    def see(name: str, args: tuple[object, ...], kwargs: dict[str, object], output: Tensor) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        key = name.rpartition(".")[0], id(x)
        if key not in readers or readers[key][0]() is not x:  # the id may be a dead tensor's
            readers[key] = weakref.ref(x), name
        found[name] = readers[key][1]
        if measures is not None:
            measures[name].update(x, output)

    with watched(model, names, see, after=True), evaluating(model):
        window.answer(model)
    return found


def _check_same_beside(reference: nn.Module, model: nn.Module) -> None:
    """Everything but the quantised layers is equal: so a norm that smoothing scaled is seen."""
    quantized = tuple(f"{name}." for name, _ in quant_linears(model))
    theirs = dict(reference.named_parameters())
    for name, value in model.named_parameters():
        if not name.startswith(quantized) and name in theirs and not _equal(value, theirs[name]):
            raise ModelError(
                f"{name} is not what it is in the float model: the model was smoothed, or trained, before it was "
                "quantised, so that its layers read other inputs; compare them with the model that was quantised"
            )


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal in the narrower of the two dtypes."""
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(a.to(narrow), b.to(a.device).to(narrow))


def _figures(measure: LayerMeasure | None, ranges: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """A layer's record: what `LayerMeasure` has, dead channels and outliers; None for what the data did not reach."""
    if measure is None or ranges is None:
        names = ("weight_sqnr_db", "input_sqnr_db", "output_sqnr_db", "cosine", "saturated_share")
        return dict.fromkeys((*names, "dead_share", "outlier_ratio"))
    absmax = torch.maximum(-ranges[0], ranges[1])
    live = absmax[absmax > 0]
    return {
        **measure.figures(),
        "dead_share": 1 - len(live) / len(absmax),
        "outlier_ratio": float(live.max() / live.median()) if len(live) else None,
    }


def channels(ranges: Ranges, before: Mapping[str, Tensor] | None) -> tuple[Channels, ...]:
    """Absmax of the input channels of each layer, for the heat map; beside what it was before smoothing."""
    now = {name: [binned(torch.maximum(-lo, hi).tolist())] for name, (lo, hi) in ranges.items()}
    was = {name: [binned(values.tolist())] for name, values in (before or {}).items()}
    return tuple(Channels(name, *was.get(name, []), *found) for name, found in now.items())

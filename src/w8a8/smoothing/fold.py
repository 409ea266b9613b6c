"""Folding a scale per channel through a tensor: the source makes x / s, every reader's weight takes s.

    source parameter   p -> (p + offset) / s - offset        along its channel axis
    reader weight      w -> w * s[channels]                  along its input axis

The product of the two is what it was, so the model computes the same function, up to one rounding of each parameter
to its own dtype: the arithmetic is float64.  Where s is a power of two and there is no offset, that rounding is
nothing, unless a value leaves the range of normal numbers.

Whether a group may be folded is not decided here: `w8a8.dataflow` proposes, and `w8a8.smoothing.gate` compares outputs.

`Undo` holds copies of the parameters, since (p / s) * s is not p in floating point.  A whole fold is in memory twice
until its `Undo` goes.  The alternative, keeping only s, would be smaller and not exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from w8a8.dataflow.groups import Group
from w8a8.errors import ModelError, NonFiniteError


@dataclass(frozen=True)
class Undo:
    """Copies of the parameters as they were.  Calling it puts back the same bits, as often as it is called."""

    saved: tuple[tuple[nn.Parameter, Tensor], ...]

    @torch.no_grad()
    def __call__(self) -> None:
        for parameter, copy in self.saved:
            parameter.copy_(copy)


@torch.no_grad()
def fold_(model: nn.Module, group: Group, scales: Tensor) -> Undo:
    """Divide the source of a group by a scale per channel, and multiply it into all readers, in place.

    A parameter that has several names is folded once.

    Args:
        model: Holds the group's parameters; changed, in their dtypes, only if everything can be.
        group: Who makes and who reads the tensor.
        scales: (C,) per channel of the source, positive and finite, any float dtype; 1 outside of
            `group.scalable`.

    Returns:
        What puts the very same bits back.

    Raises:
        ModelError: `scales` does not fit the source or scales what nobody reads; a channel map does not fit its
            weight.
        NonFiniteError: a scale is not positive and finite, or a folded weight overflows its dtype.
    """
    scales = _checked(scales, group)
    folded: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for name, parameter, dim, along, offset in _changes(model, group, scales):
        if id(parameter) in folded:
            continue
        along = along.to(parameter.device).view([-1 if d == dim % parameter.ndim else 1 for d in range(parameter.ndim)])
        values = parameter.detach().to(torch.float64)
        values = values * along if offset is None else (values + offset) / along - offset
        values = values.to(parameter.dtype)
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(
                f"folding {group.source.module} would make {name} leave the range of {parameter.dtype} "
                f"(scales {float(scales.min()):.3g} .. {float(scales.max()):.3g}); nothing was changed: use scales "
                "nearer to 1, or a dtype of wider range"
            )
        folded[id(parameter)] = (parameter, values)
    undo = Undo(tuple((parameter, parameter.detach().clone()) for parameter, _ in folded.values()))
    try:
        for parameter, values in folded.values():
            parameter.copy_(values)
    except BaseException:
        undo()
        raise
    return undo


def _checked(scales: Tensor, group: Group) -> Tensor:
    """The scales in float64, of the right shape and usable."""
    source = group.source
    if scales.shape != (source.channels,):
        raise ModelError(
            f"scales of shape {tuple(scales.shape)} were given to fold {source.module}, which makes "
            f"{source.channels} channels: give one scale per channel of the source"
        )
    scales = scales.detach().to(torch.float64)
    bad = ~(torch.isfinite(scales) & (scales > 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"the scale {float(scales[index])} of channel {index} of {source.module} is not positive and finite "
            f"({int(bad.sum())} of {source.channels} are not); a channel that cannot be scaled has the scale 1"
        )
    unread = ~group.scalable & (scales.cpu() != 1)
    if bool(unread.any()):
        index = int(unread.nonzero()[0])
        raise ModelError(
            f"the scale {float(scales[index])} was given for channel {index} of {source.module}, which no reader of "
            f"the group takes ({int(unread.sum())} of {source.channels}, as queries and keys of a fused projection): "
            "its scale must be 1"
        )
    return scales


def _changes(
    model: nn.Module, group: Group, scales: Tensor
) -> Iterator[tuple[str, nn.Parameter, int, Tensor, float | None]]:
    """Name, parameter, axis, the scales along it, and the offset, which is None where they are multiplied."""
    for part in group.source.parameters:
        parameter = model.get_parameter(part.name)
        if parameter.shape[part.dim] != group.source.channels:
            raise ModelError(
                f"{part.name} has {parameter.shape[part.dim]} channels along axis {part.dim}, the group says "
                f"{group.source.channels}: the model is not the one that was observed"
            )
        yield part.name, parameter, part.dim, scales, part.offset
    for reader in group.readers:
        parameter = model.get_parameter(reader.parameter)
        if reader.channels.shape != (parameter.shape[reader.dim],) or int(reader.channels.max()) >= scales.numel():
            raise ModelError(
                f"{reader.parameter} has {parameter.shape[reader.dim]} inputs along axis {reader.dim}, its channel "
                f"map {reader.channels.numel()} entries up to {int(reader.channels.max())} of {scales.numel()} "
                "channels: the model is not the one that was observed"
            )
        yield reader.parameter, parameter, reader.dim, reader_scales(reader.channels, scales), None


def reader_scales(channels: Tensor, scales: Tensor) -> Tensor:
    """The scale of each of a reader's input channels, (C,) -> (K,); 1 where it reads no channel that is scaled."""
    channels = channels.to(scales.device)
    return torch.where(channels < 0, torch.ones((), dtype=scales.dtype, device=scales.device), scales[channels])

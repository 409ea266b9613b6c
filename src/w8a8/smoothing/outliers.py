"""Outliers on demand: give a small model the activation outliers of a large one, and keep its float function.

Activation outliers, a few channels of a norm's output that are tens of times larger than the rest, come with size
(OPT from 6.7 billion parameters up: Dettmers et al. 2022, arXiv:2208.07339), and are what makes W8A8 hard.  A model
small enough to test with has none.  A norm's gain times p and its readers' weights divided by p compute what they
did before, and the tensor between them now has the profile p: smoothing backwards.  The fold and the gate are
those of `w8a8.smoothing.smooth`.

Results on such a model are semi-synthetic, and are called so wherever they are shown: the magnitudes are measured on a
real model, the rest is the small model's.  In particular a smoothing that divides by p alone undoes the injection
exactly, which no large model allows.

A profile of another width is read as a distribution: its quantiles, evenly spaced, smallest and largest kept, are dealt
out to the channels in a random order, the same for every norm of one width, as real outliers sit in the same channels
of all layers.  To interpolate by position would lose them: 64 points of 2048 meet one channel in 32.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn

from w8a8.dataflow.groups import Group
from w8a8.dataflow.observing import observe, probe
from w8a8.errors import ModelError, NonFiniteError, closest
from w8a8.model.inputs import ModelInputs
from w8a8.smoothing.fold import Undo, fold_
from w8a8.smoothing.gate import Gate

Profile: TypeAlias = "Tensor | Mapping[str, Tensor] | str | os.PathLike[str]"


@dataclass(frozen=True)
class Injection:
    """What was done to one norm.

    norm: Its module.
    readers: The modules that read it.
    profile: The name of the profile in a mapping; None where one tensor was given for all.
    largest: The largest factor; the median one is 1.
    change: The relative change of its block's float output.
    """

    norm: str
    readers: tuple[str, ...]
    profile: str | None
    largest: float
    change: float


def inject_(
    model: nn.Module, profile: Profile, *, power: float = 1.0, inputs: ModelInputs | None = None, seed: int = 0
) -> tuple[Injection, ...]:
    """Scale the outputs of norms by a profile, and their readers' weights back, in place.

    Args:
        model: Float; changed only if everything succeeds.  Norms that cannot be folded stay.
        profile: Magnitudes of channels, one of
            - (C',) for all norms;
            - by module name, as act-absmax files have them for the inputs of linears, or the path of such a
              safetensors file.  A norm takes the entry of one of its readers' own name, else the next of the
              same part, attention or feed-forward, in file order.
            Divided by its median and raised to `power`.  A zero, a channel that was never active, counts as the median.
        power: More than 1 exaggerates.
        inputs: What to observe the model with; random tokens by default.
        seed: Of the order in which quantiles are dealt out.

    Returns:
        One record per norm that was scaled.

    Raises:
        ModelError: no norm of the model can be folded; the profile is no such thing, or has no entry for a norm; a fold
            changed the model's float output beyond the gate's bound.
        NonFiniteError: a magnitude is negative or not finite, or a weight would overflow.
    """
    entries = _read(profile)
    inputs = probe(model) if inputs is None else inputs
    assert not isinstance(inputs, tuple), "observe takes mappings and tensors"
    groups = [group for group in observe(model, inputs).groups if group.source.kind == "norm"]
    if not groups:
        raise ModelError(
            f"no norm of this {type(model).__name__} can be scaled without changing its function: "
            "`w8a8 inspect MODEL --pairs` says why"
        )
    gate = Gate(model, groups, inputs)
    done: list[Undo] = []
    records = []
    named = _assigned(groups, entries)
    try:
        for group, name in zip(groups, named, strict=True):
            factors = _fitted(entries[name], group.source.channels, power, seed)
            done.append(fold_(model, group, 1.0 / factors))
            change, bound = gate.change(group), gate.bound(group)
            if change > bound:
                raise ModelError(
                    f"scaling the output of {group.source.module} by a profile of up to {float(factors.max()):.3g} "
                    f"changed the float output of its block by {change:.2e} (relative), over {bound:.2e}; all weights "
                    "are as they were: use a smaller power, or a model in float32"
                )
            readers = tuple(reader.module for reader in group.readers)
            records.append(Injection(group.source.module, readers, name or None, float(factors.max()), change))
    except BaseException:
        for undo in reversed(done):
            undo()
        raise
    return tuple(records)


def _read(profile: Profile) -> dict[str, Tensor]:
    """Profiles by name; a single one under the name ""."""
    if isinstance(profile, str | os.PathLike):
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            entries = dict(load_file(Path(profile)))
        except (OSError, SafetensorError) as error:
            raise ModelError(f"the profile {profile} cannot be read as a safetensors file: {error}") from error
    elif isinstance(profile, Mapping):
        entries = dict(profile)
    else:
        entries = {"": profile}
    if not entries:
        raise ModelError("the profile is an empty mapping: give the magnitudes of at least one linear's inputs")
    for name, values in entries.items():
        if not isinstance(values, Tensor) or values.ndim != 1 or values.numel() == 0:
            found = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise ModelError(f"the profile {name or 'given'} is not a vector of magnitudes: found {found}")
        if not bool((torch.isfinite(values) & (values >= 0)).all()) or not bool((values > 0).any()):
            raise NonFiniteError(
                f"the profile {name or 'given'} holds values that are negative or not finite, or only zeros; "
                "give the largest magnitude of each channel"
            )
    return entries


def _assigned(groups: Sequence[Group], entries: Mapping[str, Tensor]) -> list[str]:
    """The name of each group's profile."""
    if set(entries) == {""}:
        return [""] * len(groups)
    attention = [name for name in entries if _is_attention(name) and _is_input(name)]
    feed_forward = [name for name in entries if not _is_attention(name) and _is_input(name)]
    queues = {True: iter(_by_layer(attention)), False: iter(_by_layer(feed_forward))}
    names = []
    for group in groups:
        readers = [reader.module for reader in group.readers]
        own = next((reader for reader in readers if reader in entries), None)
        name = own or next(queues[any(map(_is_attention, readers))], None)
        if name is None:
            raise ModelError(
                f"the profile has no entry for {group.source.module}, which {', '.join(readers)} read "
                f"({closest(readers[0], entries)}): give a mapping by the names of this model's linears"
            )
        names.append(name)
    return names


def _is_attention(name: str) -> bool:
    return re.search(r"att|\b[qkv]_?proj|qkv|query|key|value", name.rpartition("layers.")[2]) is not None


def _is_input(name: str) -> bool:
    """Whether a linear of this name is known to read a norm: the first of a block's attention or feed-forward."""
    return re.search(r"(q_proj|query|c_attn|qkv\w*|fc1|up_proj|c_fc|dense_h_to_4h)$", name) is not None


def _by_layer(names: Sequence[str]) -> list[str]:
    """Names in the order of the numbers in them: layer 2 before layer 10."""
    return sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)])


def _fitted(magnitudes: Tensor, channels: int, power: float, seed: int) -> Tensor:
    """(C',) magnitudes as (C,) float64 factors of median 1."""
    values = magnitudes.detach().to(torch.float64).cpu()
    values = torch.where(values == 0, values[values > 0].median(), values)
    values = values / values.median()
    if len(values) != channels:
        quantiles = torch.quantile(values, torch.linspace(0, 1, channels, dtype=torch.float64, device="cpu"))
        order = torch.randperm(channels, generator=torch.Generator().manual_seed(seed), dtype=torch.int64, device="cpu")
        values = quantiles[order] / quantiles.median()
    return values**power

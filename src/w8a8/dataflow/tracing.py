"""Watching one forward: which elements of which tensors carry a channel that could be rescaled.

A source is a parameter whose channels are free: the gain of a norm, or the rows of a linear layer.  Divide channel c
of it by s[c] > 0.  An element of an activation is *tagged* with c where the division makes it exactly s[c] times
smaller.  Every operation either keeps that true, and then its result has tags, or it does not, and then the channels
it met are blocked: their scale has to be 1, which makes the statement true again whatever follows.  A matrix product
along the tagged axis with a parameter is where the scale can be taken back; that parameter is a reader.  By induction
over the operations, scaling the channels that were never blocked, and the readers' columns with them, changes nothing.

Tags lie with the memory, not with the tensor object: one int32 per element and source for each storage, read through
the strides of whoever looks.  Views (reshape, transpose, expand, split, select) then need no rule, and a write into a
view is seen through every other view of the same memory.  The alternative, one symbolic axis per tensor as in compiler
passes, needs a rule for each view and fails where one axis holds heads, q, k and v and channels at once, as fused
attention does.  The price is memory: as much again as the live activations, per source they carry.  Tags are held by
weak reference to the storage, and die with it.

This file has the knowledge and its book-keeping; `commuting` has the rule of each operation.
"""

import math
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from w8a8.layers.linear import QuantLinear

Tags = dict[int, Tensor]
"""By the number of a source: the channel of each element, int32 in the tensor's own shape, -1 where there is none."""


@dataclass(frozen=True)
class ParameterView:
    """A tensor that is a parameter seen through views, casts and gathers.

    name: The parameter.
    axes: For each axis of the tensor the parameter's axis that it runs through in full and in order, else None.
    offset: The constant that was added to the parameter.
    whole: Nothing of the parameter is cut off, save that slices of a stack (axis 0 of three) were picked.
    ndim: Of the parameter.
    """

    name: str
    axes: tuple[int | None, ...]
    offset: float
    whole: bool
    ndim: int

    @property
    def channel_axis(self) -> int | None:
        """The only axis, from the right (-1 is the last), that runs through the parameter; None where not one does."""
        found = [i - len(self.axes) for i, axis in enumerate(self.axes) if axis is not None]
        return found[0] if len(found) == 1 and self.whole else None


@dataclass(frozen=True)
class Role:
    """What one operation does with a parameter.

    kind: "rows" (contracted, the other axis `dim` makes the channels of `source`), "vector" (a gain or a bias that
        runs along them), "read" (contracted, its rows go nowhere that could be followed) or "other".
    words: For "other", what and where, for people.
    """

    kind: str
    source: int = -1
    dim: int = -1
    offset: float = 0.0
    words: str = ""


@dataclass
class Made:
    """A source, as it grows: `parameters` are (name, dim, offset), `blocks` pairs of a (C,) mask and a reason.

    `module` is the one that ran when the source was first met.
    """

    module: str
    kind: str
    channels: int
    parameters: list[tuple[str, int, float]]
    blocks: list[tuple[Tensor, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Contraction:
    """One product of an activation with a parameter: `channels` has, per source, that of each of its K columns."""

    module: str
    parameter: str
    dim: int
    channels: Mapping[int, Tensor]


@dataclass(frozen=True)
class _Record:
    """A piece of memory, bytes `start` to `end`, that holds what `view` says in the layout of `strides`."""

    view: ParameterView
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    start: int
    end: int
    dtype: torch.dtype


@dataclass
class _Tagged:
    """The tags of one storage: (elements,) int32 per source, for elements of `itemsize` bytes."""

    itemsize: int
    tags: Tags


class Trace:
    """All that a forward showed.  Filled by a `Watch`, read by `dataflow`."""

    def __init__(self, model: nn.Module) -> None:
        self.sources: list[Made] = []
        self.contractions: list[Contraction] = []
        self.roles: dict[str, set[Role]] = {}
        self.called: set[str] = set()
        self.quantized = {name for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        self._stack: list[str] = []
        self._numbers: dict[tuple[str, int], int] = {}
        self._tagged: weakref.WeakKeyDictionary[torch.UntypedStorage, _Tagged] = weakref.WeakKeyDictionary()
        self._records: weakref.WeakKeyDictionary[torch.UntypedStorage, list[_Record]] = weakref.WeakKeyDictionary()
        for name, parameter in model.named_parameters():
            if type(parameter.data) is Tensor and parameter.is_floating_point():
                axes = tuple(range(parameter.ndim))
                self.record(parameter, ParameterView(name, axes, 0.0, True, parameter.ndim))

    def enter(self, module: str) -> None:
        """A module's forward begins."""
        self._stack.append(module)
        self.called.add(module)

    def leave(self) -> None:
        """The innermost module's forward has ended, however it did."""
        self._stack.pop()

    @property
    def module(self) -> str:
        """The innermost module that is running; "" is the model itself."""
        return self._stack[-1] if self._stack else ""

    def where(self) -> str:
        """Where the forward is now, for people."""
        return f"in {self.module}" if self.module else "in the model's own forward"

    def source(self, kind: str, parameter: ParameterView, dim: int, channels: int) -> int:
        """The number of the source that `parameter` makes along its axis `dim`; the same one on every call."""
        number = self._numbers.get((parameter.name, dim))
        if number is None:
            number = self._numbers[parameter.name, dim] = len(self.sources)
            self.sources.append(Made(self.module, kind, channels, []))
        self.join(number, parameter, dim, "rows" if kind == "linear" else "vector")
        return number

    def join(self, source: int, parameter: ParameterView, dim: int, kind: str = "vector") -> None:
        """`parameter` (the weight, or a bias) is divided with the source."""
        entry = (parameter.name, dim, parameter.offset)
        if entry not in self.sources[source].parameters:
            self.sources[source].parameters.append(entry)
        self.play(parameter.name, Role(kind, source, dim, parameter.offset))

    def play(self, parameter: str, role: Role) -> None:
        """Note what a parameter was used for."""
        self.roles.setdefault(parameter, set()).add(role)

    def block(self, tags: Tags, reason: str) -> None:
        """The channels that occur in `tags` cannot be scaled."""
        for number, channels in tags.items():
            made = self.sources[number]
            mask = torch.zeros(made.channels + 1, dtype=torch.bool, device=channels.device)
            mask[channels.reshape(-1).long()] = True  # -1 marks the extra element
            mask = mask[:-1].cpu()
            for known, _ in made.blocks:
                mask &= ~known  # the first reason is the one that is told
            if mask.any():
                made.blocks.append((mask, reason))

    def tags(self, tensor: Tensor) -> Tags:
        """The tags of a tensor's elements; a source none of whose channels occurs is left out."""
        storage = _storage(tensor)
        known = None if storage is None else self._tagged.get(storage)
        if known is None:
            return {}
        if known.itemsize != tensor.itemsize:
            self.block(known.tags, f"its memory is read as {tensor.dtype} {self.where()}")
            return {}
        seen = {number: _through(flat, tensor) for number, flat in known.tags.items()}
        return {number: tags for number, tags in seen.items() if bool((tags >= 0).any())}

    def write(self, tensor: Tensor, tags: Tags) -> None:
        """From now on the elements of `tensor` carry `tags` and no others."""
        storage = _storage(tensor)
        known = None if storage is None else self._tagged.get(storage)
        if known is not None and known.itemsize != tensor.itemsize:
            self.block(known.tags, f"its memory is written as {tensor.dtype} {self.where()}")
            self.block(tags, f"it is written into memory of another type {self.where()}")
            return
        if known is None:
            if not tags:
                return
            if storage is None:
                self.block(tags, f"it goes into a tensor that is not dense {self.where()}")
                return
            known = self._tagged[storage] = _Tagged(tensor.itemsize, {})
        assert storage is not None
        elements = storage.nbytes() // tensor.itemsize
        for number in {*known.tags, *tags}:
            if number not in known.tags:
                known.tags[number] = torch.full((elements,), -1, dtype=torch.int32, device=tensor.device)
            target = _through(known.tags[number], tensor)
            if number in tags:
                target.copy_(tags[number])
            else:
                target.fill_(-1)

    def alive(self) -> Iterator[Tags]:
        """The tags of every storage that still exists."""
        for known in list(self._tagged.values()):
            yield known.tags

    def live_bytes(self) -> int:
        """What the tags take at this moment."""
        return sum(4 * flat.numel() for tags in self.alive() for flat in tags.values())

    def view(self, tensor: Tensor) -> ParameterView | None:
        """What parameter this tensor is, and how it is turned; None for anything else."""
        storage = _storage(tensor)
        start = tensor.storage_offset() * tensor.itemsize
        for record in () if storage is None else self._records.get(storage, ()):
            if record.start <= start < record.end:
                if record.dtype == tensor.dtype:
                    return _seen(record, tensor)
                return replace(record.view, axes=(None,) * tensor.ndim, offset=0.0, whole=False)
        return None

    def forget(self, tensor: Tensor) -> None:
        """The memory was written to: it is no copy of a parameter any more."""
        storage = _storage(tensor)
        if storage is not None:
            self._records.pop(storage, None)

    def record(self, tensor: Tensor, view: ParameterView) -> None:
        """`tensor` is what `view` says: the parameter itself, or a new copy."""
        storage = _storage(tensor)
        if storage is None or not tensor.numel():
            return
        extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        start = int(tensor.storage_offset()) * tensor.itemsize
        end = start + extent * tensor.itemsize
        entry = _Record(view, tuple(tensor.shape), tensor.stride(), start, end, tensor.dtype)
        others = self._records.setdefault(storage, [])
        for other in others:
            if other.start < end and start < other.end:
                self.play(other.view.name, Role("other", words=f"{view.name}, whose memory it shares"))
                self.play(view.name, Role("other", words=f"{other.view.name}, whose memory it shares"))
        others.append(entry)


@dataclass
class Call:
    """One operation after it ran.  A rule reads it, and returns the tags of each tensor in `out`.

    name: Of the operation, without its overload and the underscore of an in-place one; with its library if not aten.
    mutated: The arguments it wrote to.
    """

    trace: Trace
    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    mutated: list[Tensor]
    used: set[int] = field(default_factory=set)

    def argument(self, index: int, name: str, default: object = None) -> Any:
        """An argument, however it was passed."""
        return self.args[index] if index < len(self.args) else self.kwargs.get(name, default)

    def tags(self, value: object) -> Tags:
        """The tags of an argument; none for what is no tensor."""
        return self.trace.tags(value) if isinstance(value, Tensor) else {}

    def view(self, value: object) -> ParameterView | None:
        """The parameter that an argument is."""
        return self.trace.view(value) if isinstance(value, Tensor) else None

    def use(self, value: Tensor | None) -> None:
        """The rule has noted what the parameter `value` is used for."""
        self.used.add(id(value))

    def block(self, tags: Tags, what: str) -> None:
        """Block the channels in `tags`; `what` is a clause about them, the place is added."""
        self.trace.block(tags, f"{what} {self.trace.where()}")


Rule = Callable[[Call], list[Tags]]


class Watch(TorchDispatchMode):
    """Runs every operation as it is, and tells a trace what happened."""

    def __init__(self, trace: Trace, rules: Mapping[str, Rule], otherwise: Rule) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._trace = trace
        self._rules = rules
        self._otherwise = otherwise

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, then move the tags."""
        kwargs = kwargs or {}
        with self:  # where a weight was made in inference mode, what is composed of others comes here as a whole
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        out = func(*args, **kwargs)
        trace = self._trace
        given = tensors(args, kwargs)
        views = [(tensor, view) for tensor in given if (view := trace.view(tensor)) is not None]
        mutated = tensors(_written(func, args, kwargs))
        memory = [storage for storage in map(_storage, given) if storage is not None]
        results = tensors(out)
        if not mutated and results and all(any(_storage(result) is one for one in memory) for result in results):
            return out  # a view: the tags lie with the memory
        if not views and not any(trace.tags(tensor) for tensor in given):
            return out
        name = func._schema.name.removeprefix("aten::")
        name = name[:-1] if mutated and name.endswith("_") else name
        call = Call(trace, func, name, args, kwargs, out, mutated)
        tags = (self._otherwise if trace.module in trace.quantized else self._rules.get(name, self._otherwise))(call)
        for tensor, view in views:
            if id(tensor) not in call.used:
                trace.play(view.name, Role("other", words=f"{name} {trace.where()}"))
        for tensor in mutated:
            trace.forget(tensor)
        for result, carried in zip(results, tags, strict=True):
            trace.write(result, carried)
        for tensor in mutated:
            if not any(tensor is result for result in results):
                trace.write(tensor, {})
        return out


def tensors(*values: object) -> list[Tensor]:
    """All the tensors in arguments or results."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: Any, args: tuple[object, ...], kwargs: dict[str, object]) -> list[object]:
    """The arguments that the schema says are written to."""
    written = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[index] if index < len(args) else kwargs.get(argument.name))
    return written


def _storage(tensor: Tensor) -> torch.UntypedStorage | None:
    return tensor.untyped_storage() if tensor.layout is torch.strided else None


def _through(flat: Tensor, tensor: Tensor) -> Tensor:
    """The tags of a whole storage, seen as `tensor` sees it."""
    return flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def _seen(record: _Record, tensor: Tensor) -> ParameterView:
    """Which axes of a parameter a view of it runs through, told from the strides."""
    runs = {stride: i for i, (n, stride) in enumerate(zip(record.sizes, record.strides, strict=True)) if n > 1}
    left = {i: n for i, n in enumerate(record.sizes) if n > 1}
    axes: list[int | None] = []
    rest = 1  # elements along the axes that are no single axis of the record
    for n, stride in zip(tensor.shape, tensor.stride(), strict=True):
        i = runs.get(stride)
        if n > 1 and i is not None and left.get(i) == n:
            axes.append(record.view.axes[i])
            del left[i]
        else:
            axes.append(None)
            rest *= n if stride else 1
    picked = record.view.ndim > 2 and rest == 1 and all(record.view.axes[i] in (0, None) for i in left)
    return replace(record.view, axes=tuple(axes), whole=picked or rest == math.prod(left.values()))

"""Which linear layers read the same tensor, and what made it: seen in one forward, not looked up in a table of names.

    W (x / s * s) = (W diag(s)) (x / s)

Scale a channel down where a tensor is made and up where it is read, and the function is the same, if nobody else
reads the tensor.  Who makes and who reads is observed (`tracing`, `commuting`): a *group* is a source, a norm's gain or
a linear layer's rows, and all that reads it.  Where some reader cannot take the scale back (a residual, a GELU, a tied
head), the source is *refused*, with the reason.

The alternative is a table of module names per architecture, as elsewhere.  It is shorter, and for an architecture that
nobody wrote down it is wrong without telling.  What an observation cannot know is what the forward did not do: a branch
that these inputs did not take, an expert that got no token.  Where a matrix was not reached that could have read a
source's channels, the source is refused.  Slices of one stacked parameter (fused experts) stand for each other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from w8a8.dataflow.tracing import Made, Role, Trace
from w8a8.layers.linear import is_linear
from w8a8.model.selection import owners_of

_MAX_REASONS = 3


@dataclass(frozen=True)
class ScaledParameter:
    """A parameter that makes a source's channels.

    name: Dotted, "model.norm.weight".
    dim: Its axis that runs through the channels: 0 for gains, biases and `nn.Linear`, 1 for `Conv1D`'s weight.
    offset: What is used is parameter + offset: 1.0 for norms that store weight - 1.
    """

    name: str
    dim: int
    offset: float


@dataclass(frozen=True)
class Source:
    """What makes a tensor whose channels can be divided by anything positive.

    module: The module that owns the first parameter; where several do, the one that ran.
    kind: "norm" (a gain that is multiplied on) or "linear" (rows of a matrix).
    parameters: All that is divided, the weight first, then biases.
    channels: C.
    """

    module: str
    kind: str
    parameters: tuple[ScaledParameter, ...]
    channels: int


@dataclass(frozen=True, eq=False)
class Reader:
    """A parameter that is contracted with the source's tensor.

    parameter: Dotted name.
    dim: Its input axis: 1 for `nn.Linear`, 0 for `Conv1D`, 2 for most stacks of experts.
    module: The module that owns it.
    channels: (K,) int64 on the CPU: its input column j is the source's channel channels[j]; -1 is none, to be left
        as it is.
    """

    parameter: str
    dim: int
    module: str
    channels: Tensor


@dataclass(frozen=True)
class Group:
    """A source and all its readers.  `block` is the smallest module that ran and holds them; "" is the model.

    Only the channels in `scalable` may be scaled.  Of a fused q, k and v these are v's.
    """

    source: Source
    readers: tuple[Reader, ...]
    block: str

    @property
    def scalable(self) -> Tensor:
        """(C,) bool on the CPU: the source's channels that are read; the scale of the others has to be 1."""
        return _read_by(self.readers, self.source.channels)

    @property
    def parameters(self) -> list[str]:
        """The names of all that a fold changes."""
        return [part.name for part in self.source.parameters] + [reader.parameter for reader in self.readers]


@dataclass(frozen=True)
class Refusal:
    """A source that cannot be folded, the modules of the parameters that read it, and why not."""

    source: Source
    readers: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class Dataflow:
    """What one forward showed.  Every source is in a group or refused, in the order of the forward.

    groups: What can be folded; no parameter is scaled along the same axis by two of them.
    refused: What cannot.
    unread: Linear layers that the forward never reached.
    missed: Matrices with which it did nothing, embeddings apart; with other inputs they might show something else.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    unread: tuple[str, ...]
    missed: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """Plain data, for JSON; of a reader's channels only how many columns it has, and how many have one."""
        groups = [
            {
                "source": asdict(group.source),
                "scalable": int(group.scalable.sum()),
                "readers": [
                    {
                        "parameter": reader.parameter,
                        "dim": reader.dim,
                        "module": reader.module,
                        "columns": len(reader.channels),
                        "scalable": int((reader.channels >= 0).sum()),
                    }
                    for reader in group.readers
                ],
                "block": group.block,
            }
            for group in self.groups
        ]
        return {"groups": groups, "refused": [asdict(refusal) for refusal in self.refused], "unread": self.unread}


def begin_alike(names: Iterable[str]) -> list[str]:
    """The parts that all of some dotted names begin with."""
    alike = []
    for parts in zip(*(name.split(".") if name else [] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        alike.append(parts[0])
    return alike


def _read_by(readers: Sequence[Reader], channels: int) -> Tensor:
    """(C,) bool: the channels that some reader reads."""
    seen = torch.zeros(channels, dtype=torch.bool, device="cpu")
    for reader in readers:
        seen[reader.channels[reader.channels >= 0]] = True
    return seen


class _Conclusion:
    """A trace, asked for groups."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.parameters = dict(model.named_parameters())
        self.modules = dict(model.named_modules())
        owners = owners_of(model)
        self.owners = {name: owners[id(parameter)] for name, parameter in self.parameters.items()}
        self.contracted = {contraction.parameter for contraction in trace.contractions}
        self.missed = tuple(
            name
            for name, parameter in self.parameters.items()
            if parameter.ndim >= 2 and not isinstance(self.modules[self.owners[name][0]], nn.Embedding)
            if name not in self.contracted and name not in trace.roles
        )

    def source(self, made: Made) -> Source:
        parameters = tuple(ScaledParameter(*entry) for entry in made.parameters)
        return Source(self._owner(parameters[0].name, made.module), made.kind, parameters, made.channels)

    def readers(self, number: int) -> list[Reader]:
        """One per parameter that reads the source, as its first product showed."""
        found: dict[str, Reader] = {}
        for c in self.trace.contractions:
            if number in c.channels and c.parameter not in found:
                module = self._owner(c.parameter, c.module)
                found[c.parameter] = Reader(c.parameter, c.dim, module, c.channels[number])
        return list(found.values())

    def block(self, source: Source, readers: list[Reader]) -> str:
        """The smallest module that ran and holds the source and its readers."""
        common = begin_alike((source.module, *(r.module for r in readers)))
        while common and ".".join(common) not in self.trace.called:
            common.pop()
        return ".".join(common)

    def against(self, number: int, source: Source, readers: list[Reader], block: str) -> list[str]:
        """Why the source cannot be folded; nothing if it can."""
        made = self.trace.sources[number]
        seen = _read_by(readers, made.channels)
        reasons = [reason for mask, reason in made.blocks if not readers or bool((mask & seen).any())]
        if not readers and not reasons:
            reasons.append("no linear layer reads it")
        for parameter in source.parameters:
            reasons += self._tied(parameter.name, source.module) or [
                f"its parameter {parameter.name} is also used by {role.words or 'something else'}"
                for role in self._roles(parameter.name)
                if role.kind not in ("rows", "vector")
                or (role.source, role.dim, role.offset) != (number, parameter.dim, parameter.offset)
            ]
        for reader in readers:
            reasons += self._against_reader(number, reader)
        return list(dict.fromkeys(reasons + (self._unreached(source, readers, block) if readers else [])))

    def _against_reader(self, number: int, reader: Reader) -> list[str]:
        reasons = self._tied(reader.parameter, reader.module) or [
            f"the parameter {reader.parameter} that reads it is also used by {role.words or 'something else'}"
            for role in self._roles(reader.parameter)
            if role.kind not in ("rows", "read")
        ]
        for c in self.trace.contractions:
            if c.parameter != reader.parameter:
                continue
            if number not in c.channels:
                reasons.append(f"{reader.module} is called again with something else")
            elif c.dim != reader.dim or not torch.equal(c.channels[number], reader.channels):
                reasons.append(f"{reader.module} is called again with other channels of it")
        return reasons

    def _roles(self, parameter: str) -> list[Role]:
        return sorted(self.trace.roles.get(parameter, ()), key=str)

    def _owner(self, parameter: str, running: str) -> str:
        """The module that owns a parameter; of several the one that was running."""
        owners = self.owners[parameter]
        return running if running in owners else owners[0]

    def _tied(self, parameter: str, module: str) -> list[str]:
        others = [owner for owner in self.owners[parameter] if owner != module]
        return [f"the weight of {module} is tied to {others[0]}"] if others else []

    def _unreached(self, source: Source, readers: list[Reader], block: str) -> list[str]:
        """Matrices in the block that could have read the source, had these inputs led to them."""
        widths = {source.channels, *(len(reader.channels) for reader in readers)}
        inside = f"{block}." if block else ""
        for name in self.missed:
            if name.startswith(inside) and widths & set(self.parameters[name].shape):
                return [
                    f"{name.rpartition('.')[0]} was not reached by this forward and may read it too: "
                    "give inputs with more tokens"
                ]
        return []


def conclude(model: nn.Module, trace: Trace) -> Dataflow:
    """Groups and refusals from what was seen.  Where two sources meet in one reader, the later one is taken.

    Args:
        trace: Of one forward that is over, with outputs and what outlives it blocked.
    """
    seen = _Conclusion(model, trace)
    groups: dict[int, Group] = {}
    refused: dict[int, Refusal] = {}
    taken: dict[str, str] = {}
    for number, made in reversed(list(enumerate(trace.sources))):
        source, readers = seen.source(made), seen.readers(number)
        block = seen.block(source, readers)
        reasons = seen.against(number, source, readers, block) or [
            f"{reader.module} is scaled by {taken[reader.parameter]} already, which is multiplied with it"
            for reader in readers
            if reader.parameter in taken
        ]
        if reasons:
            more = ["and more"] if len(reasons) > _MAX_REASONS else []
            names = tuple(reader.module for reader in readers)
            refused[number] = Refusal(source, names, "; ".join([*reasons[:_MAX_REASONS], *more]))
        else:
            groups[number] = Group(source, tuple(readers), block)
            taken |= {reader.parameter: source.module for reader in readers}
    unread = tuple(
        name
        for name, module in seen.modules.items()
        if is_linear(module)
        and id(module.weight) not in {id(seen.parameters[parameter]) for parameter in seen.contracted}
    )
    refusals = tuple(refused[n] for n in sorted(refused))
    return Dataflow(tuple(groups[n] for n in sorted(groups)), refusals, unread, seen.missed)

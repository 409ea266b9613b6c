"""The gate: a fold stays only where the float outputs on a probe are what they were.

For every group the smallest module is taken that no group of the model crosses: a fold inside of it cannot change what
comes in.  (An attention whose input norm is folded too is not such a module, its layer is.)  Its arguments are
captured in one forward of the probe before any fold, and its outputs kept.  After the folds of its groups it runs again
on these arguments, and the change is the largest, over its output tensors, of

    ||after - before|| / ||before||     (Euclidean norms)

A module is run on copies of what it was given, caches included, from one state of the random generators, so that it is
asked the same each time.  One that keeps state of its own between calls (or fails on a second one) cannot be compared,
which is seen before any fold by running each twice: nothing in it is folded, with that reason.

All folds of a module are compared at once, since what they make together is what will be used; one that is wrong shows
there as it would alone.  To find it, they are made again one by one (`smooth`).  Outputs are kept until a weight
changes, by torch's version counters, so no state of the weights is run twice.

Where a copy of the module in float64 is at most `COPY_BYTES`, and float64 is known to all its operations, the copy
is run, so that what is seen is the fold, not the noise of a float32 forward; else it runs in float32.

The bound is 1e-5 for float32 weights.  A fold rounds each weight once more, and float16 and bfloat16 weights round so
coarsely that this bound would refuse everything, while one scaled in proportion would pass anything.  There two things
are compared: the fold without its rounding, in the copy, against 1e-5, which asks whether the pair is right; and the
rounded weights against 4 eps of their dtype (0.0039 for float16, 0.031 for bfloat16), which asks whether they were
harmed.  Measured (docs/log.md): folding every group moves a block by 0.1 to 0.4 eps.

At the end the whole model is compared in the same way, with a bound that grows by the square root of the number of
blocks, since their roundings are independent.

The alternative, to trust a table of known pairs, is what other tools do; it is wrong where the table is.
"""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from w8a8.dataflow.groups import Group, begin_alike
from w8a8.errors import ModelError
from w8a8.model.experts import OTHER_KIND
from w8a8.model.inputs import ModelInputs, call, copied, evaluating, seeded, tensors_in, watched
from w8a8.smoothing.fold import fold_

TOLERANCE = 1e-5
"""The largest relative change of a block's output, weights in float32."""

COPY_BYTES = 512 * 2**20
"""A block is copied to be compared where the copy is at most this large."""

_HALF_EPS = 4
"""Bound for rounded float16 and bfloat16 weights, in units of the dtype's eps."""


_Given: TypeAlias = tuple[tuple[object, ...], dict[str, object]]
"""What a block was called with, detached copies."""


class Gate:
    """The outputs of a model's blocks on a probe, before any fold.

    Args:
        model: In float.  Not modified; run once, and each block twice.
        groups: All the groups that may be folded.
        probe: Inputs of the model: kept small by the caller, since every comparison runs a block on them.

    Raises:
        ModelError: the model's output on the probe holds no float tensor, or is another one each time.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Group], probe: ModelInputs) -> None:
        self.model = model
        self._blocks = {id(group): block for group, block in zip(groups, closed_blocks(groups), strict=True)}
        self._copy: tuple[str, nn.Module] | None = None
        self._seen: dict[str, tuple[tuple[int, ...], list[Tensor]]] = {}
        names = {*self._blocks.values(), ""}
        self._dtypes = {name: _working_dtype(model.get_submodule(name)) for name in names}
        self._calls = _capture(model, names, probe)
        self._before: dict[str, list[Tensor]] = {}
        self._why_not: dict[str, str] = {}
        for name in sorted(self._calls, reverse=True):
            self._look(name)
        self._copy = None
        if "" in self._why_not:
            raise ModelError(
                f"smoothing was asked for, and the float outputs of {type(model).__name__} cannot be compared, so no "
                f"fold could be checked: {self._why_not['']}; use smooth='none'"
            )

    def why_not(self, group: Group) -> str | None:
        """Why a group cannot be checked, and so not be folded; None where it can."""
        block = self._blocks[id(group)]
        reason = self._why_not.get(block) if block in self._calls else f"{block} did not run on the probe"
        return None if reason is None else f"{reason}, so the fold could not be checked"

    def block(self, group: Group) -> str:
        """Where its fold is compared: the name of a module."""
        return self._blocks[id(group)]

    def unrounded(self, group: Group) -> "Unrounded | None":
        """The group's block as it is now, to be folded without rounding; None where its weights need no such check.

        It is good until the gate compares something else.
        """
        block = self.block(group)
        module = self.model.get_submodule(block)
        if not _is_half(module) or self._dtypes[block] is None:
            return None
        before = self._outputs(block)
        return Unrounded(block, self._copied(block), self._calls[block], before)

    def change(self, group: Group) -> float:
        """The relative change of the group's block from before any fold to now."""
        block = self.block(group)
        return relative_change(self._before[block], self._outputs(block))

    def whole_change(self) -> float:
        """The relative change of the model's output from before any fold to now."""
        return relative_change(self._before[""], self._outputs(""))

    def bound(self, group: Group) -> float:
        """What `change` may be."""
        return self._bound(self.model.get_submodule(self.block(group)))

    def whole_bound(self) -> float:
        """What `whole_change` may be."""
        return self._bound(self.model) * math.sqrt(max(1, len(self._before) - 1))

    def _bound(self, module: nn.Module) -> float:
        eps = max((torch.finfo(p.dtype).eps for p in module.parameters() if p.is_floating_point()), default=0.0)
        return max(TOLERANCE, _HALF_EPS * eps) if eps > torch.finfo(torch.float32).eps else TOLERANCE

    def _look(self, block: str) -> None:
        """Keep the block's outputs, or the reason why it cannot be compared.

        Some operations (torch's grouped product, fused kernels) do not know float64, and some models make tensors of
        their own in float32: then the block is run in float32, or as it is.
        """
        module = self.model.get_submodule(block)
        plain = torch.float32 if _is_half(module) and self._dtypes[block] is not None else None
        for dtype in dict.fromkeys((self._dtypes[block], plain, None)):
            self._copy, self._dtypes[block] = None, dtype
            reason = self._seen_twice(block)
            if reason is None:
                return
        self._why_not[block] = str(reason)

    def _seen_twice(self, block: str) -> str | None:
        """Keep the block's outputs in its dtype of now; why they say nothing of the next ones."""
        what = block or "the model"
        try:
            self._seen.pop(block, None)
            first = self._outputs(block)
            del self._seen[block]
            again = self._outputs(block)
        except OTHER_KIND as error:
            said = str(error).strip().splitlines()[:1]
            return f"{what} cannot be called again with what it was given ({': '.join([type(error).__name__, *said])})"
        if not first:
            return f"{what} returns no float tensor"
        if relative_change(first, again) > self._bound(self.model.get_submodule(block)) / 10:
            return f"{what} does not return the same again for the same input: it keeps state between calls"
        self._before[block] = first
        return None

    def _outputs(self, block: str) -> list[Tensor]:
        """The block's output tensors with the weights of now."""
        module = self.model.get_submodule(block)
        versions = _versions(module)
        if block in self._seen and versions and self._seen[block][0] == versions:
            return self._seen[block][1]
        run = module if self._dtypes[block] is None else self._copied(block)
        outputs = _run(run, self._calls[block])
        self._seen[block] = (versions, outputs)
        return outputs

    def _copied(self, block: str) -> nn.Module:
        """The block in its working dtype with the weights of now."""
        module, dtype = self.model.get_submodule(block), self._dtypes[block]
        assert dtype is not None, "a block that is run as it is has no copy"
        if self._copy is None or self._copy[0] != block:
            self._copy = None  # one copy at a time
            self._copy = (block, copy.deepcopy(module).requires_grad_(False).to(dtype).eval())
        else:
            with torch.no_grad():  # the weights of now into a copy made earlier
                for new, old in zip(self._copy[1].parameters(), module.parameters(), strict=True):
                    new.copy_(old)
        return self._copy[1]


@dataclass(frozen=True)
class Unrounded:
    """A block in a wider dtype, to be folded as the model is, but for the rounding to its own dtype."""

    _block: str
    _module: nn.Module
    _given: _Given
    _before: list[Tensor]

    def fold(self, group: Group, scales: Tensor) -> None:
        """Fold a group of the block."""
        fold_(self._module, _within(group, self._block), scales)

    def change(self) -> float:
        """The relative change of the block's output by the folds."""
        return relative_change(self._before, _run(self._module, self._given))


def closed_blocks(groups: Sequence[Group]) -> list[str]:
    """For each group, the smallest module holding it that no group crosses, by dotted name."""

    def crossing(block: str) -> str | None:
        """The block of a group that is partly inside `block`."""
        for group in groups:
            inside = [_is_within(name, block) for name in group.parameters]
            if any(inside) and not all(inside):
                return group.block
        return None

    closed = []
    for group in groups:
        block = group.block
        while (other := crossing(block)) is not None:
            block = ".".join(begin_alike((block, other)))
        closed.append(block)
    return closed


def relative_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """The largest ||after - before|| / ||before|| over pairs of tensors; infinite where they cannot be compared.

    Entries that were not finite take no part (a masked score is -inf before and after).
    """
    if [t.shape for t in before] != [t.shape for t in after]:
        return math.inf
    worst = 0.0
    for old, new in zip(before, after, strict=True):
        finite = torch.isfinite(old)
        was = torch.where(finite, old, 0.0).to(torch.float64)
        difference = torch.where(finite, new.to(torch.float64) - was, 0.0)
        distance, size = float(torch.linalg.vector_norm(difference)), float(torch.linalg.vector_norm(was))
        if distance == 0.0:
            continue
        change = distance / size if size else math.inf
        worst = max(worst, change if math.isfinite(change) else math.inf)
    return worst


def _capture(model: nn.Module, names: set[str], probe: ModelInputs) -> dict[str, _Given]:
    """The first call of each block in one forward of the probe."""
    calls: dict[str, _Given] = {}

    def keep(name: str, *given: object) -> None:
        if name not in calls:
            calls[name] = copied(given, lambda t: t.detach().clone())

    with watched(model, sorted(names), keep, after=False), evaluating(model), torch.no_grad():
        call(model, _uncached(model, probe))
    return calls


def _uncached(model: nn.Module, probe: ModelInputs) -> ModelInputs:
    """The probe with its caches off: a cache that a block was given would grow each time the block is run."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" not in parameters:
        return probe
    if not isinstance(probe, Mapping):
        given = probe if isinstance(probe, tuple) else (probe,)
        probe = dict(zip(parameters, given, strict=False))
    return {**probe, "use_cache": False}


@torch.no_grad()
def _run(module: nn.Module, given: _Given) -> list[Tensor]:
    """The float tensors that a module returns, in evaluation mode; float arguments take the dtype of its weights."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), None)

    def cast(t: Tensor) -> Tensor:
        return t.to(dtype, copy=True) if dtype is not None and t.is_floating_point() else t.clone()

    args, kwargs = copied(given, cast)
    with evaluating(module), seeded(module):
        return [t for t in tensors_in(module(*args, **kwargs)) if t.is_floating_point()]


def _working_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the copy to compare, or None where the module is run as it is."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    count = sum(p.numel() for p in parameters)
    dtypes = {p.dtype for p in parameters}
    if dtypes <= {torch.float64}:
        return None
    if 8 * count <= COPY_BYTES:
        return torch.float64
    return torch.float32 if dtypes != {torch.float32} and 4 * count <= COPY_BYTES else None


def _is_half(module: nn.Module) -> bool:
    return any(p.dtype in (torch.float16, torch.bfloat16) for p in module.parameters())


def _versions(module: nn.Module) -> tuple[int, ...]:
    """What changes whenever a weight does; nothing where that is not counted."""
    parameters = list(module.parameters())
    return () if any(p.is_inference() for p in parameters) else tuple(p._version for p in parameters)


def _within(group: Group, block: str) -> Group:
    """The group with names as seen from its block."""

    def local(name: str) -> str:
        return name[len(block) + 1 :] if block else name

    return replace(
        group,
        source=replace(
            group.source,
            module=local(group.source.module),
            parameters=tuple(replace(p, name=local(p.name)) for p in group.source.parameters),
        ),
        readers=tuple(replace(r, parameter=local(r.parameter), module=local(r.module)) for r in group.readers),
    )


def _is_within(name: str, block: str) -> bool:
    return not block or name == block or name.startswith(block + ".")

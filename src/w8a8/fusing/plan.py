"""Steps of a fused graph that follow one another, as one call of the native kernel (csrc/plan.cpp).

A plan is for steps over tensors of a row per token, (B, T, K): products, norms, sums, attention by heads within each of
the B sequences.  All that lies between two operations of other kinds is one plan; what the others need is computed
before it, what they make of it after.  For a short text the calls from Python cost more than the products.

Padding is left out of a plan where that is sound: the rows of tokens that no query sees are read by nobody among the
tokens, so all other rows are the same without them.  Who reads rows behind the plan is looked up in the graph: a row
picked by its number is computed whatever it is, what mixes rows ends the attempt, and rows that the whole model returns
are zero where there is padding; a part of a model, which others read behind its graph, returns all rows.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn

from w8a8 import kernels
from w8a8.fusing.capture import exchanged, is_float32, operand, sizes_of
from w8a8.fusing.steps import Attention, Layer, Linears, NormOf, NormStep, Run, item
from w8a8.kernels import fused
from w8a8.layers.linear import Mode, QuantLinear

_ATEN = torch.ops.aten
_VIEWS = (_ATEN.view.default, _ATEN.reshape.default)
_COPIES = (_ATEN.contiguous.default, _ATEN.clone.default)
_ROWS = 3  # (B, T, K)
_NORM, _SUM, _ATTEND = 1, 2, 3  # enum w8a8_step_kind, in which a product is 0


Row: TypeAlias = tuple[object, ...]
"""A step as csrc/python_plan.cpp reads it."""


class LongWay(Exception):  # noqa: N818 (no error: it never leaves `Planned`)
    """A plan could not run on these tensors."""


class Plan:
    """Steps as one call: (inputs, masks) -> outputs."""

    __name__ = "plan"

    def __init__(self, widths: tuple[int, ...], steps: tuple[Row, ...], outputs: tuple[int, ...]) -> None:
        self.widths, self.steps, self.outputs = widths, steps, outputs
        self.read: tuple[int, ...] | None = None  # where padding is left out: the tokens that are read all the same
        self.numbers: list[int] = []

    def __call__(self, inputs: tuple[Tensor, ...], masks: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        whole = tuple([x.contiguous() for x in inputs])
        found = fused.run(self.widths, self.steps, whole, masks, self.outputs, self.read)
        if found is None:
            raise LongWay
        for number in self.numbers:
            kernels.count(number, kernels.native.NATIVE.name)
        return found


class Planned:
    """The function of a graph with plans, and of the one without for tensors that these cannot run on."""

    def __init__(self, fast: Run, plain: Run) -> None:
        self.fast, self.plain = fast, plain

    def __call__(self, *tensors: Tensor) -> list[Tensor | None]:
        try:
            return self.fast(*tensors)
        except LongWay:
            return self.plain(*tensors)


@dataclass
class _Step:
    """What a node asks of a plan.

    reads, writes: Nodes that stand for slots; a node of `writes` may be None, of a slot that nobody asked for.
    """

    kind: int
    reads: list[fx.Node]
    writes: list[fx.Node | None]
    widths: list[int]
    leading: tuple[str, ...]
    mask: fx.Node | None = None
    norm: NormOf | None = None
    linears: Linears | None = None
    adds: bool = False
    attention: tuple[int, int, float, bool] = (0, 0, 0.0, False)  # heads, heads to one of k, scale, causal


@dataclass
class _Part:
    leading: tuple[str, ...]
    steps: list[_Step] = field(default_factory=list)


def plan(graph: fx.Graph, told: Counter[str], *, padding_is_read: bool = True) -> Run:
    """The function of a graph whose steps are put together as far as can be.

    Args:
        graph: Of steps (`w8a8.fusing.matching`).  Not modified.
        padding_is_read: Whether somebody may read the rows of padding in what the graph returns.
    """
    plain: Run = fx.GraphModule(nn.Module(), graph).forward
    parts, level, member = _parts(graph)
    if not any(len(part.steps) > 1 for part in parts):
        return plain
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    plans: list[tuple[fx.Node, Plan]] = []
    for number in range(len(parts) + 1):
        for node in graph.nodes:
            if node not in member and level[node] == number and node.op != "output":
                env[node] = new.node_copy(node, lambda old: env[old])
        if number < len(parts):
            plans.append(_emit(new, parts[number], env))
            told[f"{len(parts[number].steps)} steps in one call"] += 1
    (end,) = (node for node in graph.nodes if node.op == "output")
    new.output(fx.map_arg(end.args[0], lambda old: env[old]))
    new.eliminate_dead_code()
    for node, made in plans:
        _wanted(node, made)
    new.eliminate_dead_code()
    new.lint()
    for node, made in plans:
        made.read = _read(node, made, padding_is_read)
        if made.read is not None:
            told["padding is left out, and its outputs are zero"] += 1
    return Planned(fx.GraphModule(nn.Module(), new).forward, plain)


def _parts(graph: fx.Graph) -> tuple[list[_Part], dict[fx.Node, int], set[fx.Node]]:
    """Which steps are in which plan, how many plans have to be done before each other node, and what is in a plan."""
    parts: list[_Part] = []
    place: dict[fx.Node, int] = {}  # of a slot's node, its plan
    level: dict[fx.Node, int] = {}
    member: set[fx.Node] = set()
    for node in graph.nodes:
        if node in member:  # an item of a step before it
            continue
        step = _step(node)
        if step is not None and step.kind == _SUM and not any(each in place for each in step.reads):
            step = None  # of what no plan makes: it would only be a plan of its own
        if step is None:
            level[node] = max((place[a] + 1 if a in place else level[a] for a in node.all_input_nodes), default=0)
            continue
        least = max(place.get(a, level.get(a, 0)) for a in step.reads)
        if step.mask is not None:  # it is read from outside of a plan
            least = max(least, place[step.mask] + 1 if step.mask in place else level[step.mask])
        if not parts or parts[-1].leading != step.leading or least > len(parts) - 1:
            parts.append(_Part(step.leading))
        parts[-1].steps.append(step)
        member.add(node)
        for slot in step.writes:
            if slot is not None:
                place[slot] = len(parts) - 1
                member.add(slot)
    return parts, level, member


def _step(node: fx.Node) -> _Step | None:
    """What a node asks of a plan; None where it is nothing for one."""
    target = node.target
    if isinstance(target, Attention):
        return _attention(node, target)
    reads = [each for each in node.args if isinstance(each, fx.Node)]
    if target is _ATEN.add.Tensor:
        if not is_sum(node) or not _are_rows(node, *reads):
            return None
        return _Step(_SUM, reads, [node], [_width(node)], sizes_of(node)[:2], adds=True)
    if isinstance(target, Layer):
        layer = target.layer
        if not isinstance(layer, QuantLinear) or not _takes(layer) or not _are_rows(node, *reads):
            return None
        linears = Linears([layer], ["identity"])
        return _Step(0, reads, [None, None, node], [0, 0, _width(node)], sizes_of(node)[:2], linears=linears)
    if not isinstance(target, Linears | NormStep) or not _are_rows(*reads):
        return None
    width, leading = _width(reads[0]), sizes_of(reads[0])[:2]
    items = {user.args[1]: user for user in node.users if user.target is item}
    if len(items) != len(node.users):  # one is read twice, or all of them together
        return None
    if isinstance(target, NormStep):
        return _Step(
            _NORM, reads, [items.get(0), items.get(1)], 2 * [width], leading, norm=target.norm, adds=len(reads) > 1
        )
    if not all(_takes(layer) for layer in target.layers):
        return None
    writes = [items.get(place) for place in range(len(target.layers) + 2)]
    widths = [width, width, *(layer.out_features for layer in target.layers)]
    return _Step(0, reads, writes, widths, leading, norm=target.norm, linears=target, adds=len(reads) > 1)


def _takes(layer: QuantLinear) -> bool:
    """Whether a layer's rows can be computed one without the other, by the native kernel."""
    return layer.mode is Mode.INTEGER and rows_are_alone(layer) and layer._buffers["packed_weight"] is not None


def rows_are_alone(layer: QuantLinear) -> bool:
    """Whether the scale of a row is its own, or given: a row can be quantised as soon as it is there."""
    _, per_token, _ = layer._grid
    return per_token or layer.scheme.static


def is_sum(node: fx.Node) -> bool:
    """Whether this is a + b of two float32 tensors of one shape."""
    if node.target is not _ATEN.add.Tensor or node.kwargs.get("alpha", 1) != 1:
        return False
    a, b = node.args[:2]
    return is_float32(a) and is_float32(b) and sizes_of(a) == sizes_of(b)


def _attention(node: fx.Node, target: Attention) -> _Step | None:
    """Attention whose operands are heads of rows, and whose output is read as rows."""
    mask, found = node.args[3], []
    for heads in node.args[:3]:
        one = _heads_of(operand(heads))
        if one is None:
            return None
        found.append(one)
    (q_rows, heads, factor), (k_rows, shared, k_factor), (v_rows, values, v_factor) = found
    leading = sizes_of(q_rows)[:2]
    if v_factor != 1.0 or shared != values or any(sizes_of(each)[:2] != leading for each in (k_rows, v_rows)):
        return None
    width = _width(q_rows)
    users = list(node.users)
    if any(user.target not in _VIEWS or sizes_of(user) != (*leading, str(width)) for user in users) or len(users) != 1:
        return None
    told = (heads, heads // shared, target.scale * factor * k_factor, target.causal)
    of = None if mask is None else operand(mask)
    return _Step(_ATTEND, [q_rows, k_rows, v_rows], [*users], [width], leading, mask=of, attention=told)


def _heads_of(node: fx.Node) -> tuple[fx.Node, int, float] | None:
    """The rows that heads (B, H, T, D) are a view of, H, and what number they were multiplied with on the way."""
    while node.target in _COPIES:
        node = operand(node.args[0])
    if node.target is not _ATEN.transpose.int or exchanged(node) != {1, 2}:
        return None
    view = operand(node.args[0])
    if view.target not in _VIEWS or len(sizes_of(view)) != _ROWS + 1:
        return None
    rows, factor = operand(view.args[0]), 1.0
    number = rows.args[1] if rows.target is _ATEN.mul.Tensor else None
    if isinstance(number, int | float):
        rows, factor = operand(rows.args[0]), float(number)
    if not _are_rows(rows) or sizes_of(view)[:2] != sizes_of(rows)[:2]:
        return None
    heads, dims = sizes_of(view)[2:]
    if not heads.isdigit() or not dims.isdigit() or int(heads) * int(dims) != _width(rows):
        return None
    return rows, int(heads), factor


def _emit(new: fx.Graph, part: _Part, env: dict[fx.Node, fx.Node]) -> tuple[fx.Node, Plan]:
    """A plan's node, and an item of it for every slot that it writes."""
    written = dict.fromkeys(slot for step in part.steps for slot in step.writes if slot is not None)
    inputs: list[fx.Node] = []
    masks: list[fx.Node] = []
    for step in part.steps:
        inputs += [each for each in step.reads if each not in written and each not in inputs]
        masks += [step.mask] if step.mask is not None and step.mask not in masks else []
    slots = {node: place for place, node in enumerate(inputs)}
    widths = [_width(node) for node in inputs]
    steps, numbers = [], []
    for step in part.steps:
        places: list[int] = []
        for node, width in zip(step.writes, step.widths, strict=True):
            # the outputs of products are made whether anybody reads them or not
            wanted = node is not None or (step.linears is not None and len(places) > 1)
            places.append(len(widths) if wanted else -1)
            if wanted:
                widths.append(width)
            if node is not None:
                slots[node] = places[-1]
        steps.append(_told(step, slots, places, masks))
        if step.linears is not None:
            numbers += step.linears.numbers
    made = Plan(tuple(widths), tuple(steps), ())
    made.numbers = numbers
    node = new.call_function(made, (tuple(env[each] for each in inputs), tuple(env[each] for each in masks)))
    for slot in written:
        env[slot] = new.call_function(item, (node, slots[slot]))
        env[slot].meta["val"] = slot.meta.get("val")
    return node, made


def _told(step: _Step, slots: dict[fx.Node, int], places: list[int], masks: list[fx.Node]) -> Row:
    reads = [slots[each] for each in step.reads]
    if step.kind == _ATTEND:
        heads, shared, scale, causal = step.attention
        mask = -1 if step.mask is None else masks.index(step.mask)
        return (_ATTEND, *reads, heads, shared, mask, scale, causal, places[0])
    x, add = reads[0], reads[1] if step.adds else -1
    if step.kind == _SUM:
        return (_SUM, x, add, places[0], -1, None, (), ())
    norm = None
    if step.norm is not None:
        norm = (step.norm.weight, step.norm.bias, step.norm.eps, step.widths[0])
    layers = () if step.linears is None else step.linears.native
    return (step.kind, x, add, places[0], places[1], norm, layers, tuple(places[2:]))


def _wanted(node: fx.Node, made: Plan) -> None:
    """Only those slots are outputs that somebody reads."""
    users = list(node.users)
    made.outputs = tuple(place for user in users if isinstance(place := user.args[1], int))
    for place, user in enumerate(users):
        user.args = (node, place)


def _read(node: fx.Node, made: Plan, padding_is_read: bool) -> tuple[int, ...] | None:
    """Which tokens are read behind a plan by their numbers; None where padding cannot be left out of it."""
    if not node.args[1] or any(step[0] == _ATTEND and step[6] == -1 for step in made.steps):
        return None
    read: list[int] = []
    readers = [user for each in node.users for user in each.users]
    for reader in readers:
        if reader.op == "output":
            if padding_is_read:
                return None
            continue
        if reader.target is _ATEN.slice.Tensor and sizes_of(reader) == sizes_of(reader.args[0]):
            readers += reader.users
        elif reader.target is _ATEN.select.int and reader.args[1] == 1 and isinstance(reader.args[2], int):
            read.append(reader.args[2])
        else:
            return None
    return tuple(read)


def _are_rows(*nodes: fx.Node) -> bool:
    return all(is_float32(node) and len(sizes_of(node)) == _ROWS and sizes_of(node)[-1].isdigit() for node in nodes)


def _width(node: fx.Node) -> int:
    return int(sizes_of(node)[-1])

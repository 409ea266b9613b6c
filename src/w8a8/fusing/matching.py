"""From the graph of a block to one with fewer passes: a literal walk over what it computes.

    layer_norm(a + b) -> layers that read it    one pass, which hands sum and norm on where others read them
    layers that read the same tensor            quantised once, one product
    layer -> gelu, relu or silu                 in the product's own output, while it is hot
    layer_norm(a + b)                           one pass
    scaled_dot_product_attention                ours

Everything else stays as it is.  A graph has no operation that writes into its input (`capture`).  Float32 only.
"""

from collections.abc import Callable

import torch
from torch import fx, nn
from torch.fx.node import Argument

from w8a8.fusing.capture import Captured, exchanged, is_float32, mask_of, operand, sizes_of
from w8a8.fusing.plan import is_sum, plan, rows_are_alone
from w8a8.fusing.steps import Attention, Held, Layer, Linears, NormOf, NormStep, Place, Run, Told, item
from w8a8.kernels import compiled
from w8a8.layers.linear import Mode, QuantLinear

_ATEN = torch.ops.aten
_LINEAR = torch.ops.w8a8.int8_linear.default
_MOST = 8  # layers of one input
_HEADS = 4  # (B, H, T, D)


def fuse(block: nn.Module, captured: Captured, *, padding_is_read: bool = True) -> tuple[Run, Told]:
    """Make the function of a captured graph, for one block.

    Args:
        block: Whose call it becomes; its layers are kept, what else it holds is looked up at each call.
        captured: Of this block or one that is alike.  Not modified.

    Returns:
        From the tensors among the arguments to a list of outputs, and what was fused.
    """
    walk = _Walk(block, captured.graph)
    return walk.run(padding_is_read), walk.told


class _Walk:
    def __init__(self, block: nn.Module, graph: fx.Graph) -> None:
        self.block, self.graph = block, fx.Graph()
        self.graph.output(self.graph.graph_copy(graph, {}))
        self.told = Told()

    def run(self, padding_is_read: bool) -> Run:
        self.drop_nothings()
        for node in list(self.graph.nodes):
            if node.target is _ATEN.scaled_dot_product_attention.default:
                self.attention(node)
        self.drop_nothings()
        linears = [node for node in self.graph.nodes if node.target is _LINEAR]
        for node in linears:
            self.linears(node, linears)
        for node in list(self.graph.nodes):
            if node.target is _ATEN.layer_norm.default:
                self.norm_alone(node)
        self.hold()
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return plan(self.graph, self.told.fused, padding_is_read=padding_is_read)

    # --- the pieces

    def step(self, before: fx.Node, call: Callable[..., object], *args: Argument) -> fx.Node:
        with self.graph.inserting_before(before):
            return self.graph.call_function(call, args)

    def replace(self, node: fx.Node, new: fx.Node) -> None:
        node.replace_all_uses_with(new)
        self.graph.erase_node(node)

    def item(self, step: fx.Node, place: int, like: fx.Node) -> fx.Node:
        with self.graph.inserting_after(step):
            new = self.graph.call_function(item, (step, place))
        new.meta["val"] = like.meta.get("val")
        return new

    def drop_nothings(self) -> None:
        """Dropout that drops nothing, views that change nothing, transposes of transposes, copies of what is whole."""
        for node in list(self.graph.nodes):
            source = node.args[0] if node.args else None
            if not isinstance(source, fx.Node):
                continue
            drops = False
            if node.target is _ATEN.dropout.default:
                drops = not node.args[2] or node.args[1] == 0.0
            elif node.target in (_ATEN.reshape.default, _ATEN.view.default):
                drops = sizes_of(node) == sizes_of(source)
            elif node.target is _ATEN.contiguous.default:
                drops = bool(source.meta.get("whole"))
            elif node.target is _ATEN.transpose.int and source.target is _ATEN.transpose.int:
                drops = exchanged(node) == exchanged(source)
                source = operand(source.args[0]) if drops else source
            if drops:
                self.replace(node, source)

    def attention(self, node: fx.Node) -> None:
        """Ours, for float32 in four axes; its output lies as the next layer reads it."""
        named = {
            **dict(zip(("query", "key", "value", "attn_mask", "dropout_p", "is_causal"), node.args, strict=False)),
            **node.kwargs,
        }
        q, k, v = (operand(named[name]) for name in ("query", "key", "value"))
        causal = named.get("is_causal", False)
        if not compiled.multiplies_and_adds():
            self.told.left["attention, at which PyTorch is faster without a fused multiply-add"] += 1
            return
        if named.get("dropout_p", 0.0) or not all(map(is_float32, (q, k, v))) or len(sizes_of(q)) != _HEADS:
            self.told.left["attention that is not float32 of four axes"] += 1
            return
        if not isinstance(causal, bool) or sizes_of(q)[-1] != sizes_of(v)[-1]:
            self.told.left["attention whose values are of another width, or that is causal by a size"] += 1
            return
        scale = named.get("scale") or q.meta["val"].shape[-1] ** -0.5
        if not isinstance(scale, float):
            self.told.left["attention with a scale that is no number"] += 1
            return
        new = self.step(node, Attention(scale, causal=causal), q, k, v, mask_of(node))
        new.meta["val"], new.meta["whole"] = node.meta["val"].transpose(1, 2), True
        with self.graph.inserting_after(new):
            heads = self.graph.call_function(_ATEN.transpose.int, (new, 1, 2))
        heads.meta["val"] = node.meta["val"]
        self.replace(node, heads)
        self.told.fused["attention"] += 1

    def layer_of(self, node: fx.Node) -> QuantLinear | None:
        """The layer that a product is of, where it can be in a pass with others."""
        layer = self.block.get_submodule(node.meta["layer"])
        assert isinstance(layer, QuantLinear), "it was one when the graph was made, and no child was exchanged since"
        if layer.mode is not Mode.INTEGER or layer._buffers["packed_weight"] is None:
            return None
        return layer if is_float32(node.args[0]) else None

    def linears(self, node: fx.Node, all_linears: list[fx.Node]) -> None:
        """A product, with those that read the same tensor, what comes before and what comes behind."""
        if node._erased:
            return
        layer = self.layer_of(node)
        if layer is None:
            self.alone(node)
            return
        x = operand(node.args[0])
        together, layers = [node], [layer]
        for other in all_linears:
            if other is node or other._erased or other.args[0] is not x or len(together) == _MOST:
                continue
            same = self.layer_of(other)
            if same is not None and same._call[3:] == layer._call[3:] and _same_grid(same, layer):
                together.append(other)
                layers.append(same)
        activations, ends = [], []
        for each in together:
            name, end = _activation(each)
            activations.append(name)
            ends.append(end)
            if end is not each:
                self.told.fused[f"{name} in the product before it"] += 1
        if len(together) > 1:
            self.told.fused[f"{len(together)} layers quantise their input once"] += 1
        norm = self.norm_of(x) if layer.scheme.activations is not None and rows_are_alone(layer) else None
        if norm is None:
            if len(together) == 1 and ends[0] is node:
                self.alone(node)
                return
            step = self.step(node, Linears(layers, activations), x)
        else:
            step = self.with_norm(x, lambda wanted: Linears(layers, activations, norm, wants_sum=wanted))
            self.told.fused["norm, quantising and product"] += 1
        for place, (each, end) in enumerate(zip(together, ends, strict=True)):
            self.replace(end, self.item(step, place + 2, end))
            if end is not each:
                self.graph.erase_node(each)
        if norm is not None:
            self.graph.eliminate_dead_code()

    def with_norm(self, norm_node: fx.Node, make: Callable[[bool], Callable[..., object]]) -> fx.Node:
        """A step in the place of a norm; what else reads the norm, or the sum before it, reads the step's."""
        total = operand(norm_node.args[0])
        adds = is_sum(total)
        wanted = adds and len(total.users) > 1
        step = self.step(norm_node, make(wanted), *(total.args[:2] if adds else (total,)))
        self.replace(norm_node, self.item(step, 1, norm_node))
        if wanted:
            # what reads the sum before this norm stands in its way
            late = self.item(step, 0, total)
            order = {each: i for i, each in enumerate(self.graph.nodes)}
            for user in list(total.users):
                if user is not step and order[user] > order[step]:
                    user.replace_input_with(total, late)
        return step

    def norm_of(self, node: fx.Node) -> NormOf | None:
        """A LayerNorm over the last axis, with what the block holds or without."""
        if node.target is not _ATEN.layer_norm.default or not is_float32(node):
            return None
        x, sizes, *rest = node.args
        weight, bias, eps = (*rest, *(None, None, 1e-5)[len(rest) :])[:3]
        if not isinstance(sizes, list) or len(sizes) != 1 or not is_float32(x) or not isinstance(eps, float):
            return None
        places = [None if each is None else self.place_of(operand(each)) for each in (weight, bias)]
        for parameter, place in zip((weight, bias), places, strict=True):
            held = None if place is None else place[0][place[1]]
            if parameter is not None and (held is None or held.dtype is not torch.float32):
                return None
        return NormOf(places[0], places[1], eps)

    def norm_alone(self, node: fx.Node) -> None:
        norm = self.norm_of(node)
        if norm is None:
            self.told.left["a norm that is not float32 over the last axis"] += 1
            return
        self.with_norm(node, lambda wanted: NormStep(norm, wants_sum=wanted))
        self.told.fused["sum and norm"] += 1

    def alone(self, node: fx.Node) -> None:
        """A product that nothing stands beside: the layer as it is."""
        layer = self.block.get_submodule(node.meta["layer"])
        new = self.step(node, Layer(layer), node.args[0])
        new.meta["val"] = node.meta["val"]
        self.replace(node, new)

    def place_of(self, node: fx.Node) -> Place | None:
        if node.op != "get_attr":
            return None
        path, kind, name = node.meta["place"]
        return getattr(self.block.get_submodule(path), kind), name

    def hold(self) -> None:
        """What is left of constants is looked up in the block at each call."""
        self.graph.eliminate_dead_code()
        for node in [node for node in self.graph.nodes if node.op == "get_attr"]:
            place = self.place_of(node)
            assert place is not None, "it is a get_attr node"
            self.replace(node, self.step(node, Held(place)))


def _activation(node: fx.Node) -> tuple[str, fx.Node]:
    """The activation that is all that reads a product, or none: its name, and the last node of both."""
    if len(node.users) == 1:
        (user,) = node.users
        if user.target is _ATEN.gelu.default:
            tanh = user.kwargs.get("approximate", (*user.args, "none")[1]) == "tanh"
            return "gelu_tanh" if tanh else "gelu", user
        if user.target is _ATEN.relu.default:
            return "relu", user
        if user.target is _ATEN.silu.default:
            return "silu", user
    return "identity", node


def _same_grid(a: QuantLinear, b: QuantLinear) -> bool:
    """Whether two layers quantise an input alike: with a static grid, where both have the same."""
    pairs = (a.input_scale, b.input_scale), (a.input_zero_point, b.input_zero_point)
    return all(x is y or (x is not None and y is not None and torch.equal(x, y)) for x, y in pairs)

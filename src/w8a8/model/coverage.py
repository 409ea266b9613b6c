"""Coverage: what of a model is quantised, what is not, and why not.  Nothing is left out silently.

Counted per module that holds parameters (or is quantised), each once even where it has several names:

- parameters: elements of weights and biases, as the float model would count them;
- bytes: what they take in memory as they are now (codes, packed or not, scales, sums and biases);
- multiply-adds per token: N * K of a linear layer; of a tied output head too, though the embedding owns the
  parameter; of what another class multiplies by itself, as its code says (`w8a8.model.usage`), the elements; of
  experts, stacked or not, the share that one token passes through (num_experts_per_tok / num_experts, from the
  model's config). Attention's own products between tokens and elementwise work are not counted, nor are convolutions.
"""

from torch import Tensor, nn

from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import Mode, QuantLinear, check_materialised, is_linear
from w8a8.model.experts import CONVOLUTIONS, Experts, stack_names
from w8a8.model.usage import look
from w8a8.records.coverage import Coverage, ModuleCoverage


def coverage(model: nn.Module, reasons: dict[str, str]) -> Coverage:
    """Look at a model as it is.

    Args:
        model: Of any class.  Not modified.
        reasons: Why the selection left a linear layer alone, by its name; other modules give their own.

    Raises:
        ModelError: a parameter has no shape yet.
    """
    check_materialised(model)
    found = []
    seen: set[int] = set()  # tensors counted so far: a tied one belongs to its first owner
    shares = {
        id(layer): _active_share(model, experts.num_experts)
        for experts in model.modules()
        if isinstance(experts, Experts)
        for layer in experts.modules()
    }
    multiplied = look(model).multiplied
    stacked = stack_names(model)
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            held = [b for b in module.buffers() if id(b) not in seen]  # a table may share its head's codes
            seen.update(map(id, held))
            found.append(_quantized(name, module, held, shares.get(id(module), 1.0)))
            continue
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        tied = len(own) < sum(1 for _ in module.parameters(recurse=False))
        if not own and not tied and not is_linear(module):
            continue
        seen.update(map(id, own))
        products = multiplied.get(name, frozenset()) if not isinstance(module, nn.Embedding) else frozenset()
        active = shares.get(id(module), 1.0)
        found.append(_float(name, module, own, model, products, name in stacked, reasons.get(name), active))
    return Coverage(tuple(found))


def _quantized(name: str, layer: QuantLayer, held: list[Tensor], share: float) -> ModuleCoverage:
    weights = layer.out_features * layer.in_features
    linear = isinstance(layer, QuantLinear)
    mode = "" if not linear or layer.mode is Mode.INTEGER else f" ({layer.mode.value})"
    return ModuleCoverage(
        name=name,
        kind=type(layer).__name__ + mode,
        shape=(layer.out_features, layer.in_features),
        parameters=weights + (0 if layer.bias is None else layer.out_features),
        bytes=sum(b.numel() * b.element_size() for b in held),
        macs=round(weights * share) if linear else 0,
        scheme=layer.scheme.name,
        reason=None,
        weight_sqnr_db=layer.weight_sqnr_db,
    )


def _float(
    name: str,
    module: nn.Module,
    own: list[nn.Parameter],
    model: nn.Module,
    multiplied: frozenset[str],
    stacked: bool,
    reason: str | None,
    share: float,
) -> ModuleCoverage:
    weight = getattr(module, "weight", None)
    parameters = dict(module.named_parameters(recurse=False))
    matrices = [parameters[key] for key in sorted(multiplied) if key in parameters]
    if isinstance(module, nn.Linear):  # whose weight may be made of others
        shape: tuple[int, ...] = module.out_features, module.in_features
        matrices = []
    else:
        shown = [weight] if isinstance(weight, nn.Parameter) else [*matrices, *parameters.values()]
        shape = tuple(shown[0].shape)
    macs = sum(matrix.numel() for matrix in matrices)
    if stacked:
        share = _active_share(model, shape[0])
    if is_linear(module):
        macs = shape[0] * shape[1]
    return ModuleCoverage(
        name=name or "(root)",
        kind=type(module).__name__,
        shape=shape,
        parameters=sum(p.numel() for p in own),
        bytes=sum(p.numel() * p.element_size() for p in own),
        macs=round(macs * share),
        scheme=None,
        reason=reason or _why_float(module, multiplied, stacked=stacked),
    )


def _why_float(module: nn.Module, multiplied: frozenset[str], *, stacked: bool) -> str:
    """What kind of module this is, where no linear layer was to be chosen."""
    if stacked:
        return "stacked experts, of which no layer was chosen"
    if isinstance(module, nn.Embedding):
        return "a lookup table, no product"
    if is_linear(module):
        return "not selected"
    if multiplied:
        return f"{type(module).__name__} multiplies by {', '.join(sorted(multiplied))} itself, without an nn.Linear"
    if "norm" in type(module).__name__.lower():
        return "a normalisation, elementwise"
    if isinstance(module, CONVOLUTIONS):
        return "a convolution"
    return "not a linear layer"


def _active_share(model: nn.Module, experts: int) -> float:
    """The share of the experts that one token passes through; all of them where the config does not say."""
    config = getattr(model, "config", None)
    per_token = getattr(config, "num_experts_per_tok", None)
    return per_token / experts if isinstance(per_token, int) else 1.0

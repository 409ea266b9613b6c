"""Lookup tables as int8: which of a model's can be, and how they take their places.

All are taken that the model only looks rows up in, whatever they are for: words, positions, kinds of token.  They are
left float where that would change more than rounding does (`w8a8.model.obstacles`), and

- where a table has less than a thousandth of the model's parameters, output heads aside: nothing is saved by the biases
  of T5's attention, or the two kinds of token of BERT;
- in what lies outside of the model in a module that saves itself around one, whose files have no word for it.

A table that is one tensor with something that stays float, as with the output head of most language models, is an
error that says so: the head would be a float copy of its own, and the model larger than before.

A table that is tied to layers that are quantised too gets their codes, in memory once.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from w8a8.core.scheme import Scheme
from w8a8.errors import ModelError, noted
from w8a8.layers.buffers import QuantLayer, quant_layers
from w8a8.layers.embedding import TABLE, QuantEmbedding
from w8a8.model import ties
from w8a8.model.obstacles import obstacles
from w8a8.model.roles import Embeddings, adapters_of, beside_models, heads
from w8a8.model.selection import matching, owners_of
from w8a8.model.swapping import swap
from w8a8.model.usage import look

_LEAST = 1e-3
"""Of the parameters of a model: a table with fewer stays float."""


@dataclass(frozen=True)
class Tables:
    """The tables of a model that are quantised.

    schemes: Of each, by its name.
    reasons: Why others stay float.
    tied: For those that are one tensor with other modules: these modules' names.
    """

    schemes: dict[str, Scheme] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    tied: dict[str, tuple[str, ...]] = field(default_factory=dict)


def tables_of(model: nn.Module) -> dict[str, nn.Embedding]:
    """The float tables of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def choose_tables(
    model: nn.Module, asked: Embeddings | str, quantized: Collection[str] = (), exclude: Sequence[str] = ()
) -> Tables:
    """Choose the tables that become int8.

    Args:
        model: With or without values.  Not modified.
        asked: Whether any.
        quantized: The linear layers that will be quantised.
        exclude: Exact names or globs of those that stay float.

    Raises:
        ModelError: `asked` is neither "float" nor "int8"; there is no table that could be; one is tied to what stays
            float.
    """
    if Embeddings.of(asked) is Embeddings.FLOAT:
        return Tables()
    tables = tables_of(model)
    never, beside, adapters = obstacles(model, tables, look(model)), beside_models(model), adapters_of(model)
    least = _numbers(model) * _LEAST
    reasons: dict[str, str] = {}
    for name in tables:
        pattern = next((each for each in exclude if name in matching(each, tables)), None)
        if name in never:
            reasons[name] = never[name]
        elif pattern is not None:
            reasons[name] = f"excluded by {pattern!r}"
        elif name in beside:
            reasons[name] = f"it lies outside of the model in this {type(model).__name__}"
        elif name in adapters:
            reasons[name] = "it is an adapter's"
        elif tables[name].weight.numel() < least:
            reasons[name] = "it has less than a thousandth of the parameters"
    owners = owners_of(model)
    chosen = {name: TABLE for name in tables if name not in reasons}
    tied = {name: tuple(o for o in owners[id(tables[name].weight)] if o != name) for name in chosen}
    for name in chosen:
        apart = next((other for other in tied[name] if other not in chosen and other not in quantized), None)
        if apart is not None:
            way = reasons.get(apart, f"{apart!r} in include, by its name, takes it too")
            if apart in heads(model):
                way = "head='int8' takes an output head too"
            raise ModelError(
                f"embeddings='int8' was asked for, and {name} is one tensor with {apart}, which stays float and would "
                f"become a copy of its own, the model larger than before: {way}; or give exclude=[{name!r}]"
            )
    if not chosen:
        name, why = next(iter(reasons.items()), ("", ""))
        raise ModelError(
            f"embeddings='int8' was asked for, and {type(model).__name__} has no table that can be int8"
            + (f" ({name}: {why})" if name else "")
            + "; leave embeddings='float'"
        )
    return Tables(chosen, reasons, {name: tied[name] for name in chosen if tied[name]})


def _numbers(model: nn.Module) -> int:
    """How many parameters the float model has beside output heads, whether or not some of it is quantised by now.

    A head that is one tensor with a table is another once it is quantised.
    """
    output = {id(model.get_submodule(name)) for name in heads(model, quantized=True)}
    parts = [module for module in model.modules() if id(module) not in output]
    held = {id(parameter): parameter.numel() for part in parts for parameter in part.parameters(recurse=False)}
    quantized = [part for part in parts if isinstance(part, QuantLayer)]
    biases = (layer.bias for layer in quantized)
    weights = sum(layer.out_features * layer.in_features for layer in quantized)
    return sum(held.values()) + weights + sum(len(bias) for bias in biases if bias is not None)


def build_tables(
    model: nn.Module, schemes: Mapping[str, Scheme], layers: Mapping[str, QuantLayer]
) -> dict[str, QuantEmbedding]:
    """Make the new tables; the model is not modified.

    Args:
        layers: That were made of the model's, whose codes a table holds where they are its own.

    Raises:
        NonFiniteError, SchemeError: as `QuantEmbedding.from_float`, with a note that names the table.
    """
    made: dict[str, QuantEmbedding] = {}
    for name, scheme in schemes.items():
        with noted(f"while quantising {name}"):
            table = QuantEmbedding.from_float(model.get_submodule(name), scheme)
        any(table.share(other) for other in (*layers.values(), *made.values()))
        made[name] = table
    return made


def quantize_tables(model: nn.Module, asked: Embeddings | str, exclude: Sequence[str] = ()) -> Tables:
    """Quantise the tables of a model whose linear layers are quantised, or stay float; the model is changed.

    Raises:
        ModelError, NonFiniteError: as `choose_tables` and `build_tables`; the model is as it was then.
    """
    chosen = choose_tables(model, asked, (), exclude)
    swap(model, build_tables(model, chosen.schemes, dict(quant_layers(model))))
    ties.untie(model, list(chosen.schemes))
    return chosen

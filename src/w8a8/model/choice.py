"""A choice: what becomes of which layer of a float model, decided once and handed on.

    choice = Choice.of(model, "w8a8", exclude=["*.0.*"], head="int8")
    choice.schemes              the scheme of each layer that is quantised
    choice.selection            why each other layer stays float, and what is tied to what
    choice.outside              the layers that smoothing sees: not those of experts
    with choice.unstacked():    the experts have layers of their own, and at the end lie stacked again
        layers = build(model, choice.schemes)
    choice.enact(layers)        for good

Stacked experts have no layers that could be chosen, so it is made while each stack is taken apart.  All are, where a
layer of any of them is chosen, else none (`taken`).
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from w8a8.core.scheme import AUTO, Scheme
from w8a8.layers.buffers import QuantLayer
from w8a8.layers.linear import check_module
from w8a8.model import ties
from w8a8.model.experts import Experts, own_weights, unstacked
from w8a8.model.roles import Embeddings, Head
from w8a8.model.selection import Schemes, Selection, assign, scheme_of, select, with_head
from w8a8.model.swapping import swap, swapped
from w8a8.model.tables import Tables, choose_tables


@dataclass(frozen=True)
class Choice:
    """What becomes of the layers of a model.

    model: Float, with or without values.  Its stacks are in their places, save in `unstacked` and after `enact`.
    selection: The layers to quantise, and why others, and stacks that are not taken apart, stay float.
    schemes: Of the layers to quantise, in the model's order.
    experts: What can take the places of stacks, by their names, whether or not anything in them is chosen.
    tables: The lookup tables that are quantised.
    """

    model: nn.Module
    selection: Selection
    schemes: dict[str, Scheme]
    experts: dict[str, Experts]
    tables: Tables

    @classmethod
    def of(
        cls,
        model: nn.Module,
        schemes: Schemes = AUTO,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        *,
        head: Head | str = Head.FLOAT,
        embeddings: Embeddings | str = Embeddings.FLOAT,
        stacks: tuple[Mapping[str, Experts], Mapping[str, str]] | None = None,
    ) -> "Choice":
        """Choose.

        Args:
            model: Not modified.
            schemes: One for all layers, or by pattern, as for `assign`; "auto" is what is usual for the model.
            include, exclude: As for `select`.
            head, embeddings: What heads and lookup tables are to be.
            stacks: What can take the places of stacks, and why others stay, where it is not all that can.
        """
        check_module(model)
        include = with_head(model, include, head)
        experts, reasons = unstacked(model) if stacks is None else stacks
        with swapped(model, experts):
            selected = select(model, include, exclude)
            selection, by_layer = assign(selected, scheme_of(model, schemes))
        tables = choose_tables(model, embeddings, by_layer, exclude)
        reasons = {**reasons, **selection.reasons, **tables.reasons}
        return cls(model, replace(selection, reasons=reasons), by_layer, dict(experts), tables)

    def on(self, model: nn.Module) -> "Choice":
        """The same choice of another model of the same modules: one that is empty, or float again."""
        experts, _ = unstacked(model)
        return replace(self, model=model, experts={name: experts[name] for name in self.experts})

    @property
    def taken(self) -> dict[str, Experts]:
        """The experts that get layers of their own."""
        return self.experts if len(self.outside) < len(self.schemes) else {}

    @property
    def outside(self) -> tuple[str, ...]:
        """The layers that are no experts', which smoothing sees stacked: so every expert is in one product."""
        return tuple(name for name in self.schemes if name.rsplit(".", 2)[0] not in self.experts)

    def unstacked(self) -> contextlib.AbstractContextManager[None]:
        """The experts with layers of their own, for the length of a `with` block."""
        return swapped(self.model, self.taken)

    @property
    def copied(self) -> dict[str, str]:
        """Layers that get a weight of their own, each with a module that it shared with, which keeps another."""
        return {name: other for name, other in self.selection.untied.items() if other not in self.tables.schemes}

    def enact(self, layers: Mapping[str, QuantLayer]) -> None:
        """Put the new layers in their places; the model is changed, its config where a tied layer was quantised."""
        swap(self.model, self.taken)
        swap(self.model, layers)
        for parent in dict.fromkeys(name.rsplit(".", 2)[0] for name in layers):
            if isinstance(experts := self.model.get_submodule(parent), Experts):
                own_weights(experts)
        ties.untie(self.model, {**self.selection.untied, **self.tables.schemes})  # or they would be tied again
        ties.forget(self.model, self.selection.together)


def unstack_experts_(model: nn.Module) -> dict[str, str]:
    """Give stacked experts linear layers of their own, in place, so that all that goes by a layer's name reaches them.

    `w8a8.quantize` does this by itself; here it is for what looks at the float model: `sensitivity`, `allocate`,
    `collect`.  The weights are the stacks', not copies.

    Args:
        model: Float.

    Returns:
        Why other stacks stay as they are, by name.

    Raises:
        ModelError: not a module.
    """
    check_module(model)
    experts, reasons = unstacked(model)
    swap(model, experts)
    return reasons

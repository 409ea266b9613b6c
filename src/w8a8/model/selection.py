"""Choosing among the linear layers of a model by names and patterns, and giving each its scheme.

A pattern is the exact name of a layer, or else a glob over the dotted module names; a `*` crosses dots.  A
pattern that matches no linear layer is an error.  Six kinds of layer are not taken by a glob, only by their exact
name in `include`:

- the output head (`lm_head`, or what the model calls its output embedding): files with a float head are
  what vLLM and transformers load;
- a layer whose weight is shared with another module (OPT's head is its embedding): quantising it makes a
  copy, and the two are no longer one;
- a router, which says what experts run, and how much they count (`w8a8.model.roles`): vLLM's are float;
- an adapter, of peft's or made in its way;
- what lies outside of the model in a module that saves itself around one, as the dense layer of a
  `SentenceTransformer`: its files have no word for it.

Layers that are tied to one another, and to nothing else, are taken together, each with codes of its own.

And some are never taken, however they are named: `w8a8.model.obstacles`.  All these are reported with the reason.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from w8a8.core.scheme import AUTO, Scheme
from w8a8.errors import ModelError, PatternError, SchemeError, closest
from w8a8.layers.linear import check_materialised, check_module, is_linear, quant_linears
from w8a8.model.kinds import Kind, kind_of_model, usual_scheme
from w8a8.model.obstacles import obstacles
from w8a8.model.pretrained import is_pretrained
from w8a8.model.roles import Head, adapters_of, beside_models, heads, routers_of
from w8a8.model.usage import look

Schemes: TypeAlias = Scheme | str | Mapping[str, Scheme | str | None]
"""One scheme for all layers; or by pattern, where the first that matches a layer decides, and None is float."""


@dataclass(frozen=True)
class Selection:
    """The outcome of choosing: names to quantise, and why each other linear layer stays float.

    `untied` maps a chosen layer whose weight is shared to the module it shares with, which stays float or gets another
    scheme; `together` one to those that are quantised as it is, each with codes of its own.
    """

    chosen: tuple[str, ...]
    reasons: dict[str, str]
    untied: dict[str, str]
    together: dict[str, tuple[str, ...]] = field(default_factory=dict)


def select(model: nn.Module, include: Sequence[str] = ("*",), exclude: Sequence[str] = ()) -> Selection:
    """Choose the layers to quantise.

    Args:
        model: Of any class.  Not modified.
        include: Exact names or globs; a layer must match one.
        exclude: Exact names or globs; a layer must match none.  They may be for lookup tables alone.

    Raises:
        PatternError: a pattern matches no linear layer, and one of `exclude` no table either; the message lists the
            closest names.
        SchemeError: nothing is left to quantise.
        ModelError: `model` is not a module, or has parameters without a shape.
    """
    check_module(model)
    include, exclude = pattern_list(include, "include"), pattern_list(exclude, "exclude")
    if is_linear(model):
        raise SchemeError(
            "the model is itself one linear layer, which has no place to be swapped in: use QuantLinear.from_float"
        )
    check_materialised(model)
    linears = {name: m for name, m in model.named_modules() if is_linear(m)}
    tables = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding)]
    _check_patterns(model, linears, include, [each for each in exclude if not matching(each, tables)])
    included = set().union(*(matching(pattern, linears) for pattern in include))
    excluded = {name: pattern for pattern in reversed(exclude) for name in matching(pattern, linears)}
    usage = look(model)
    never = obstacles(model, linears, usage)
    output, routers, adapters = set(heads(model)), routers_of(model, linears, usage.choosing), adapters_of(model)
    shared, beside = _shared_weights(model, linears), beside_models(model)
    reasons: dict[str, str] = {}
    for name in linears:
        if name in never:
            reasons[name] = never[name]
        elif name not in included:
            reasons[name] = "not matched by include"
        elif name in excluded:
            reasons[name] = f"excluded by {excluded[name]!r}"
        elif name not in include:
            reason, does = None, "quantises it"
            other = next((other for other in shared.get(name, ()) if other not in linears), None)
            if other is not None:
                reason, does = f"its weight is tied to {other}", "quantises a copy of it"
            elif name in output:
                reason = "the output head stays float by default"
            elif name in routers:
                reason = f"a router stays float by default ({routers[name]})"
            elif name in adapters:
                reason = "an adapter stays float by default"
            elif name in beside:
                reason = f"it lies outside of the model in this {type(model).__name__}, and in files that alone is int8"
            if reason is not None:
                reasons[name] = f"{reason}; {name!r} in include, by its name, {does}"
    untied = _untie_from_float(shared, reasons, include)
    chosen = [name for name in linears if name not in reasons]
    if not chosen:
        raise SchemeError(_nothing_left(model, reasons))
    together = {name: tuple(others) for name, others in shared.items() if name not in reasons and name not in untied}
    return Selection(tuple(chosen), reasons, untied, together)


def scheme_of(model: nn.Module, schemes: Schemes = AUTO) -> Schemes:
    """The schemes that were asked for; in the place of "auto" the one that is usual for what the model is."""
    return usual_of(model) if schemes == AUTO else schemes


def usual_of(model: nn.Module) -> Scheme:
    """The scheme that is usual for what the model is.

    Args:
        model: One of transformers', or any module; with such in it, as a `SentenceTransformer`, it is these that count.

    Raises:
        ModelError: not a module.
    """
    check_module(model)
    kinds: set[Kind | None] = set()
    inside: set[int] = set()
    for module in model.modules():  # what holds another comes before it
        if is_pretrained(module) and id(module) not in inside:
            kinds.add(kind_of_model(module))
            inside |= {id(inner) for inner in module.modules()}
    return usual_scheme(kinds)


def assign(selection: Selection, schemes: Schemes) -> tuple[Selection, dict[str, Scheme]]:
    """Give each chosen layer its scheme.

    Args:
        schemes: One scheme or preset for all; or a mapping from exact names and globs to schemes, presets and None.
            The first pattern that matches a layer decides; layers that none matches stay float.

    Returns:
        The selection without the layers that stay float, and the scheme of each that is left.

    Raises:
        PatternError: a pattern matches none of the chosen layers; the message lists the closest names.
        SchemeError: no preset has this name; every layer is left float.
    """
    if not isinstance(schemes, Mapping):
        return selection, dict.fromkeys(selection.chosen, Scheme.of(schemes))
    decides: dict[str, str] = {}  # the pattern that decides over a layer
    for pattern in _all_strings(schemes, "schemes"):
        matched = matching(pattern, selection.chosen)
        decides = dict.fromkeys(matched, pattern) | decides
        if not matched:
            raise PatternError(
                f"schemes: {pattern!r} matches none of the {len(selection.chosen)} layers to quantise; "
                + closest(pattern, selection.chosen)
            )
    known = {pattern: None if scheme is None else Scheme.of(scheme) for pattern, scheme in schemes.items()}
    found, reasons = {}, dict(selection.reasons)
    for name in selection.chosen:
        match = decides.get(name)
        scheme = None if match is None else known[match]
        if scheme is not None:
            found[name] = scheme
        elif match is None:
            reasons[name] = "no pattern of the schemes matches it"
        else:
            reasons[name] = f"left float by the schemes' {match!r}"
    if not found:
        raise SchemeError(
            f"there is nothing to quantise: the schemes {schemes!r} leave all {len(selection.chosen)} layers float; "
            "give one pattern a scheme"
        )
    untied = {name: other for name, other in selection.untied.items() if name in found}
    together = {}
    for name, others in selection.together.items():
        if name not in found:
            continue
        float_ones = [other for other in others if other not in found]
        if float_ones or any(found[other] != found[name] for other in others):
            untied[name] = (float_ones or list(others))[0]
        else:
            together[name] = others
    return replace(selection, chosen=tuple(found), reasons=reasons, untied=untied, together=together), found


def with_head(model: nn.Module, include: Sequence[str], head: Head | str) -> list[str]:
    """The patterns of `include`, and with head="int8" the names of the model's output heads.

    Raises:
        ModelError: `head` is neither "float" nor "int8", or the model has no head to quantise.
    """
    patterns = pattern_list(include, "include")
    if Head.of(head) is Head.FLOAT:
        return patterns
    names = heads(model)
    if not names:
        raise ModelError(f"head='int8' was asked for, and {type(model).__name__} has no float output head to quantise")
    return [*patterns, *names]


def matching(pattern: str, names: Collection[str]) -> set[str]:
    """The name that the pattern is, where there is one of that name (it may hold brackets); else those it globs."""
    return {pattern} if pattern in names else {name for name in names if fnmatchcase(name, pattern)}


def pattern_list(patterns: Sequence[str], argument: str) -> list[str]:
    """Patterns as they were given for `argument`, checked.

    Raises:
        PatternError: they are no list, or not all of them are strings.
    """
    if isinstance(patterns, str):
        raise PatternError(f"{argument}={patterns!r} is a string; give a list of patterns: [{patterns!r}]")
    if not isinstance(patterns, Iterable):
        raise PatternError(f"{argument}={patterns!r} is no list; give a list of patterns, or leave it out")
    return _all_strings(patterns, argument)


def _all_strings(patterns: Iterable[str], argument: str) -> list[str]:
    found = list(patterns)
    for pattern in found:
        if not isinstance(pattern, str):
            raise PatternError(f"{argument}: a pattern is a string such as '*.fc2', found {pattern!r}; write it as one")
    return found


def _check_patterns(model: nn.Module, linears: dict[str, nn.Module], include: list[str], exclude: list[str]) -> None:
    quantized = {name for name, _ in quant_linears(model)}
    for argument, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if matching(pattern, linears):
                continue
            if matching(pattern, quantized):
                if pattern == "*":
                    raise SchemeError(_nothing_left(model, {}))
                raise PatternError(f"{argument}: {pattern!r} matches only layers that are quantised already")
            if not linears:
                raise SchemeError(_nothing_left(model, {}))
            children = [name for name in linears if name.startswith(pattern + ".")]
            hint = f"it is a module that holds {len(children)} of them: {pattern + '.*'!r}" if children else ""
            raise PatternError(
                f"{argument}: {pattern!r} matches none of the model's {len(linears)} linear layers; "
                + (hint or closest(pattern, linears))
            )


def _nothing_left(model: nn.Module, reasons: dict[str, str]) -> str:
    done = sum(1 for _ in quant_linears(model))
    if done:
        return f"there is nothing to quantise: {done} layers are quantised already, load the float model to start again"
    if not reasons:
        return f"there is nothing to quantise: {type(model).__name__} has no nn.Linear and no Conv1D"
    name, reason = next(iter(reasons.items()))
    return f"there is nothing to quantise: all {len(reasons)} linear layers are left out, {name}: {reason}"


def owners_of(model: nn.Module) -> dict[int, list[str]]:
    """The names of the modules that hold each parameter, by its id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    return owners


def _shared_weights(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, list[str]]:
    """For each linear layer whose weight other modules hold too: these modules' names."""
    owners, shared = owners_of(model), {}
    for name, linear in linears.items():
        others = [owner for owner in owners.get(id(linear._parameters.get("weight")), ()) if owner != name]
        if others:
            shared[name] = others
    return shared


def _untie_from_float(shared: dict[str, list[str]], reasons: dict[str, str], include: list[str]) -> dict[str, str]:
    """Of tied layers: those that are taken though another stays float, each with that one.

    Args:
        reasons: Why layers stay float; gains those that are tied to one and not named in `include`.
    """
    while True:
        untied = {}
        for name in shared.keys() - reasons.keys():
            apart = [other for other in shared[name] if other in reasons or other not in shared]
            if apart:
                untied[name] = apart[0]
        left = untied.keys() - set(include)
        if not left:
            return {name: untied[name] for name in shared if name in untied}
        for name in left:
            how = f"{name!r} in include, by its name, quantises a copy of it"
            reasons[name] = f"its weight is tied to {untied[name]}, which stays float; {how}"

"""What a compressed-tensors directory says of itself: the `quantization_config` of its config.json.

The format is `int-quantized` of the compressed-tensors project (github.com/vllm-project/compressed-tensors):
for each quantised linear layer the tensors `weight` int8 (N, K), `weight_scale`, `weight_zero_point` where
asymmetric, and `input_scale`, `input_zero_point` where activations are static.  `config_groups` holds the
schemes, each with the `targets` it is for; `ignore` takes layers out again.  A target is a module's name,
the name of its class or of a parent class, or "re:" and a regular expression matched from the start of the name.
Where several targets match, names go before expressions, these before classes, each kind in alphabetical order;
of two groups with the same target the later one counts.  So compressed-tensors 0.20 does it (`match_targets`), and
a test compares.

`pack-quantized` has codes side by side in int32 words instead of `weight` (`w8a8.core.packed`): of 8 bits where
weight-only schemes are written, and of 8, 4 or 2 bits where they are read.  Each group says which of the two it is;
where groups differ, the format of the whole is `mixed-precision`, which compressed-tensors 0.20 and vLLM 0.33 take
group by group.

Parsing is strict: a field that would change the numbers and is not understood is an error that names it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from w8a8.checkpoint.expressions import check_length, matching
from w8a8.core.plain import Json
from w8a8.core.scheme import (
    MAX_CODE_BITS,
    Granularity,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
)
from w8a8.errors import CheckpointError, FormatError, SchemeError

FORMAT = "int-quantized"
PACKED = "pack-quantized"
_MIXED = "mixed-precision"
_PACKED_BITS = (8, 4, 2)  # those that fill words: the order of others differs between versions of compressed-tensors
_RE = "re:"
_NAIVE = "naive-quantized"  # the same tensors under an older name


@dataclass(frozen=True)
class Group:
    """A scheme and the targets it is for; `packed`: the codes lie in int32 words in the file."""

    targets: tuple[str, ...]
    scheme: Scheme
    packed: bool = False


@dataclass(frozen=True)
class QuantizationConfig:
    """The groups in their order, and the layers that stay float."""

    groups: tuple[Group, ...]
    ignore: tuple[str, ...]

    def groups_for(
        self, layers: Mapping[str, Collection[str]], where: str, in_files: Mapping[str, str] | None = None
    ) -> dict[str, Group]:
        """The group of each layer that is quantised.

        Args:
            layers: By dotted name, the names of the layer's class and of that one's parents, as far as they are
                modules.
            in_files: The names of layers in the files, where those are others; what matches either name matches the
                layer.

        Raises:
            CheckpointError: a regular expression is none, or takes too long.
        """
        groups = {target: group for group in self.groups for target in group.targets}
        expressions = {target: target[len(_RE) :] for target in (*groups, *self.ignore) if target.startswith(_RE)}
        names = {name: frozenset((name, (in_files or {}).get(name, name))) for name in layers}
        every = list(dict.fromkeys(each for both in names.values() for each in sorted(both)))
        found = matching(list(dict.fromkeys(expressions.values())), every, where)
        matched = {target: found[expression] for target, expression in expressions.items()}
        ignored, order = frozenset(self.ignore), sorted(t for t in groups if t in matched)
        chosen = {}
        for name, classes in layers.items():
            known = {*names[name], *classes}
            if known & ignored or any(names[name] & matched[t] for t in self.ignore if t in matched):
                continue
            first = sorted(each for each in names[name] if each in groups)
            fits = [*first, *(t for t in order if names[name] & matched[t]), *sorted(c for c in classes if c in groups)]
            if fits:
                chosen[name] = groups[fits[0]]
        return chosen


def to_json(config: QuantizationConfig) -> dict[str, object]:
    """The `quantization_config` of config.json; `SchemeError` where the format has no word for a scheme."""
    formats = [PACKED if group.packed else FORMAT for group in config.groups]
    return {
        "quant_method": "compressed-tensors",
        "format": formats[0] if len(set(formats)) == 1 else _MIXED,
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{i}": {
                "targets": list(group.targets),
                "format": formats[i],
                "weights": _args(group.scheme.weights, weight=True),
                "input_activations": _args(group.scheme.activations),
                "output_activations": None,
            }
            for i, group in enumerate(config.groups)
        },
        "ignore": list(config.ignore),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def from_json(data: Json, where: str) -> QuantizationConfig:
    """Read a `quantization_config`.

    Raises:
        FormatError: another method or format, or a scheme that is unknown here; the path in the JSON is named.
        CheckpointError: it makes no sense; likewise.
    """
    method = data.get("quant_method", "compressed-tensors" if "config_groups" in data else None)
    if method != "compressed-tensors":
        raise FormatError(
            f"{where}: quant_method is {method!r}, this version reads 'compressed-tensors'; "
            "load the directory with transformers"
        )
    groups = data.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:  # a quantised cache alone has none
        raise FormatError(f"{where}: quantization_config.config_groups is {groups!r}, expected at least one group")
    if data.get("kv_cache_scheme") is not None:
        raise FormatError(f"{where}: quantization_config.kv_cache_scheme: a quantised cache is unknown here")
    for key, what in (("sparsity_config", "sparse weights are"), ("transform_config", "rotations at run time are")):
        if data.get(key) and data[key] != {"format": "dense"}:
            raise FormatError(f"{where}: quantization_config.{key} is {str(data[key])[:80]}: {what} unknown here")
    known = (FORMAT, _NAIVE, PACKED, _MIXED)
    if data.get("format") not in (*known, "dense", None):
        raise FormatError(
            f"{where}: quantization_config.format is {data['format']!r}, this version reads {FORMAT!r} and {PACKED!r}"
        )
    parsed = []
    for key, group in groups.items():
        path = f"{where}: quantization_config.config_groups.{key}"
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{path} is {group!r}, expected an object")
        if group.get("format") not in (*known, None):
            raise FormatError(f"{path}.format is {group['format']!r}, this version reads {FORMAT!r} and {PACKED!r}")
        if group.get("output_activations") is not None:
            raise FormatError(f"{path}.output_activations: quantised outputs are unknown here")
        weights = _spec(group.get("weights"), f"{path}.weights", weight=True)
        if weights is None:
            raise FormatError(f"{path}.weights is null: a group without quantised weights is unknown here")
        activations = _spec(group.get("input_activations"), f"{path}.input_activations", weight=False)
        packed = (group.get("format") or data.get("format")) == PACKED
        if packed and weights.bits not in _PACKED_BITS:
            raise FormatError(
                f"{path}.weights.num_bits is {weights.bits}, which writers of {PACKED!r} have packed in two ways; "
                f"this version reads {', '.join(map(str, _PACKED_BITS))}"
            )
        targets = _strings(group.get("targets"), f"{path}.targets")
        parsed.append(Group(targets, _scheme(weights, activations, path), packed))
    return QuantizationConfig(tuple(parsed), _strings(data.get("ignore") or [], f"{where}: quantization_config.ignore"))


def runs_here(data: Json) -> bool:
    """Whether a `quantization_config` describes what `load` runs, in integers or weight-only.

    A description that is wrong in itself is not left to others: `from_json` then says what is wrong with it.
    """
    try:
        from_json(data, "quantization_config")
    except CheckpointError as error:
        return not isinstance(error, FormatError)
    return True


def check_writable(scheme: Scheme) -> None:
    """Raise `SchemeError` where compressed-tensors has no word for a scheme."""
    if scheme.weights.bits > MAX_CODE_BITS:
        raise SchemeError(
            f"{scheme}: weights of more than {MAX_CODE_BITS} bits are simulated only and have no file format"
        )
    for spec in (scheme.weights, scheme.activations):
        if spec is not None:
            _strategy(spec.granularity, weight=spec is scheme.weights)


def _args(spec: QuantSpec | None, *, weight: bool = False) -> dict[str, object] | None:
    if spec is None:
        return None
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else None
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": _strategy(spec.granularity, weight=not isinstance(spec.granularity, PerToken)),
        "group_size": group,
        "dynamic": spec.dynamic and not weight,
    }


def _strategy(granularity: Granularity, *, weight: bool) -> str:
    match granularity:
        case PerTensor():
            return "tensor"
        case PerChannel() if weight:
            return "channel"
        case PerGroup():
            return "group"
        case PerToken():
            return "token"
        case PerColumn() | PerChannel():
            operand = "weights" if weight else "activations"
            raise SchemeError(
                f"{granularity!r} {operand} have no place in a compressed-tensors file: they exist in simulation "
                "only; save a model in a scheme that integers can run"
            )


def _spec(args: object, path: str, *, weight: bool) -> QuantSpec | None:
    if args is None:
        return None
    if not isinstance(args, Mapping):
        raise CheckpointError(f"{path} is {args!r}, expected an object")
    if args.get("type", "int") != "int":
        raise FormatError(f"{path}.type is {args['type']!r}, this version runs 'int'")
    bits = args.get("num_bits", 8)
    if not isinstance(bits, int) or not 2 <= bits <= MAX_CODE_BITS:
        raise FormatError(f"{path}.num_bits is {bits!r}, this version runs 2..{MAX_CODE_BITS}")
    if args.get("actorder") not in (None, "weight", "static"):  # those two leave the groups in place
        raise FormatError(f"{path}.actorder is {args['actorder']!r}: reordered groups are unknown here")
    if args.get("block_structure") is not None:
        raise FormatError(f"{path}.block_structure is {args['block_structure']!r}: blocks are unknown here")
    dynamic = args.get("dynamic", False)
    if not isinstance(dynamic, bool):
        raise FormatError(f"{path}.dynamic is {dynamic!r}, this version runs true and false")
    if weight and dynamic:
        raise FormatError(f"{path}.dynamic is true: weights without stored scales are unknown here")
    symmetric = args.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise CheckpointError(f"{path}.symmetric is {symmetric!r}, expected true or false")
    strategy, size = args.get("strategy"), args.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    granularity: Granularity
    if strategy == "tensor":
        granularity = PerTensor()
    elif strategy == "channel" and weight:
        granularity = PerChannel()
    elif strategy == "token" and not weight:
        granularity = PerToken()
    elif strategy == "group" and weight and type(size) is int and size > 0:
        granularity = PerGroup(size)
    else:
        allowed = "'tensor', 'channel' and 'group' with a group_size" if weight else "'tensor' and 'token'"
        raise FormatError(
            f"{path}: strategy {strategy!r} with group_size {size!r} is unknown, this version runs {allowed}"
        )
    return QuantSpec(bits, granularity, symmetric, dynamic=weight or dynamic)


def _scheme(weights: QuantSpec, activations: QuantSpec | None, path: str) -> Scheme:
    try:
        return Scheme(weights, activations)
    except SchemeError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _strings(value: object, path: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str) or not all(isinstance(v, str) for v in value):
        raise CheckpointError(f"{path} is {value!r}, expected a list of strings")
    for target in value:
        if target.startswith(_RE):
            check_length(target[len(_RE) :], path)
    return tuple(value)

"""What vLLM's loader will make of a model, known from its layers and schemes before anything is quantised.

bench/vllm_peer.py has vLLM 0.32.0, built for CPUs, open directories of either kind, and its verdicts are these.  What
that build has no kernel for was read in the source of 0.33.0, `layers/quantization/compressed_tensors/`:

    compressed_tensors.py   _is_dynamic_token_w8a8, _is_static_tensor_w8a8, _quantization_scheme_map_from_config,
                            _is_wNa16_group_channel, _get_scheme_from_parts, CompressedTensorsKVCacheMethod
    utils.py                should_ignore_layer, find_matched_target: the shards of a fused layer
    schemes/                compressed_tensors_wNa16.py: weight-only; compressed_tensors_w8a8_int8.py
    compressed_tensors_embedding.py: CompressedTensorsEmbeddingWNA16Int; its models/bert.py, which hands nothing on
    compressed_tensors_moe/ compressed_tensors_moe_w8a8_int8.py, compressed_tensors_moe_wna16.py

and what its kernels for NVIDIA's GPUs ask of shapes, which are those of a whole layer here, and of each part of it
where vLLM splits it among GPUs: `kernels/linear/mixed_precision/{marlin,machete}.py`, `marlin_padded_nk` of
`layers/quantization/utils/marlin_utils.py`, and `cutlass_scaled_mm`, `cutlass_scaled_mm_azp` of `_custom_ops.py`.

Which layers vLLM fuses into one is in each of its models (`packed_modules_mapping`); `FUSED` has their names.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import nn

from w8a8.checkpoint.names import renamed_stacks
from w8a8.core.packed import in_words
from w8a8.core.scheme import PerChannel, PerGroup, PerTensor, PerToken, QuantSpec, Scheme
from w8a8.layers.embedding import QuantEmbedding
from w8a8.layers.linear import QuantLinear, is_conv1d, is_linear, shape_of
from w8a8.model.choice import Choice
from w8a8.model.roles import ROUTERS
from w8a8.model.roles import heads as heads_of

VERSION = "0.33.0"

FUSED = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linear layers that lie side by side and are one in vLLM, by the last part of their names."""

_GROUPS = (32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES
_TILES = ((64, 128), (128, 64))  # N, K: one of the two, in marlin_padded_nk
_ALIGNED = 16  # N and K, in cutlass_scaled_mm
_VOCABULARY = 64  # the N of a head is filled up to multiples of it: DEFAULT_VOCAB_PADDING_SIZE
_DOWN = ("down_proj", "w2")  # the layers of an expert whose N, and not K, is the model's width
_EXPERT_WIDTH = 128  # of it, in check_moe_marlin_supports_config
_TO_A_WORD = 4  # codes, in marlin_pad_qweight


@dataclass(frozen=True)
class Finding:
    """Something about a model that one wants to know before vLLM gets it.

    refused: vLLM stops while it loads, or at the first forward, or computes something else than the model.
    layers: The names of the layers it is about.
    what, why, instead: What is the matter, where vLLM says so, and the way out.
    """

    refused: bool
    layers: tuple[str, ...]
    what: str
    why: str
    instead: str

    def __str__(self) -> str:
        shown = ", ".join(self.layers[:3]) + (f", ... ({len(self.layers)})" if len(self.layers) > 3 else "")
        verdict = f"not for vLLM {VERSION}" if self.refused else f"vLLM {VERSION}"
        return f"{verdict}: {shown}: {self.what} ({self.why}); {self.instead}"


def schemes_of(model: nn.Module) -> dict[str, Scheme | None]:
    """Every linear layer of a model with its scheme; None for a float one."""
    return {
        name: module.scheme if isinstance(module, QuantLinear) else None
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) or is_linear(module)
    }


def transposed_of(model: nn.Module) -> set[str]:
    """The layers that are or were `Conv1D`."""
    return {
        name
        for name, module in model.named_modules()
        if is_conv1d(module) or (isinstance(module, QuantLinear) and module.was_conv1d)
    }


def shapes_of(model: nn.Module) -> dict[str, tuple[int, int]]:
    """N and K of every linear layer."""
    return {name: shape_of(model.get_submodule(name)) for name in schemes_of(model)}


def findings(
    schemes: Mapping[str, Scheme | None],
    *,
    heads: Iterable[str] = (),
    transposed: Iterable[str] = (),
    renamed: Iterable[str] = (),
    tables: Iterable[str] = (),
    shapes: Mapping[str, tuple[int, int]] | None = None,
    packed: Collection[str] | None = None,
) -> tuple[Finding, ...]:
    """Look at the layers of a model as they are to be.

    Args:
        schemes: Every linear layer, in the model's order; None for one that stays float.
        renamed: Stacks of experts that stay float, and that the hub's files call otherwise.
        tables: The lookup tables that are quantised.
        shapes: (N, K) of the layers, as far as they are known.
        packed: Those whose codes are in int32 words, in a directory that is there; None: as `w8a8.save` writes them.
    """
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    if packed is None:
        packed = {name for name, scheme in quantized.items() if in_words(scheme)}
    told = {name: _refused(scheme, packed=name in packed) for name, scheme in quantized.items()}
    found = [*_by_reason({name: None if why is None else (True, *why) for name, why in told.items()})]
    found += [*_fused(schemes), *_experts(schemes)]
    heads, transposed = set(heads), set(transposed)
    padded = {name: (n + -n % _VOCABULARY if name in heads else n, k) for name, (n, k) in (shapes or {}).items()}
    runs = {name: scheme for name, scheme in quantized.items() if told[name] is None}
    found += _by_shape(runs, padded)
    found += _about(
        [name for name in quantized if name in transposed],
        "quantised Conv1D",
        "its GPT-2 transposes these weights as it loads them, and the file has them row by row",
        "run it here, or leave these layers float",
    )
    found += _about(
        [name for name in quantized if name in heads],
        "an int8 output head",
        "ParallelLMHead takes a scheme that names it; models whose load_weights skips lm_head do not",
        "a float head loads everywhere, and load(..., head='int8') quantises it at run time here",
        refused=False,
    )
    found += _about(
        tables,
        "a lookup table in int8",
        "CompressedTensorsEmbeddingWNA16Int reads words, which transformers does not, and in those models alone that "
        "hand their quantisation on to VocabParallelEmbedding",
        "leave the tables float: embeddings='float'",
    )
    found += _about(
        renamed,
        "experts that stay float, under transformers' names",
        "its models look for those of the hub's files, which transformers cannot read beside int8 layers",
        "quantise the experts too",
    )
    return tuple(found)


def _about(layers: Iterable[str], what: str, why: str, instead: str, *, refused: bool = True) -> list[Finding]:
    """One finding, where there are such layers."""
    names = tuple(layers)
    return [Finding(refused, names, what, why, instead)] if names else []


def foresee(choice: Choice) -> tuple[Finding, ...]:
    """`findings` of what a choice makes of its model."""
    with choice.unstacked():
        return foresee_as_it_is(choice.model, schemes=choice.schemes, tables=choice.tables.schemes)


def foresee_as_it_is(
    model: nn.Module,
    packed: Collection[str] | None = None,
    *,
    schemes: Mapping[str, Scheme] | None = None,
    tables: Collection[str] = (),
) -> tuple[Finding, ...]:
    """`findings` of a model, with or without values; what `schemes` or `tables` name is taken for quantised."""
    known = (name for name, module in model.named_modules() if isinstance(module, QuantEmbedding))
    return findings(
        {**schemes_of(model), **(schemes or {})},
        heads=heads_of(model, quantized=True),
        transposed=transposed_of(model),
        renamed=renamed_stacks(model),
        tables=dict.fromkeys([*known, *tables]),
        shapes=shapes_of(model),
        packed=packed,
    )


def _by_reason(reasons: Mapping[str, tuple[bool, str, str, str] | None]) -> list[Finding]:
    """One finding for each reason, about the layers that have it."""
    layers: dict[tuple[bool, str, str, str], list[str]] = {}
    for name, reason in reasons.items():
        if reason is not None:
            layers.setdefault(reason, []).append(name)
    return [Finding(refused, tuple(names), *reason) for (refused, *reason), names in layers.items()]


def _refused(scheme: Scheme, *, packed: bool) -> tuple[str, str, str] | None:
    """What is the matter with a scheme, where vLLM says so, and what to use."""
    weights, inputs = scheme.weights, scheme.activations
    if inputs is None:
        return _refused_weight_only(weights, packed=packed)
    none = "_get_scheme_from_parts raises NotImplementedError: no compatible scheme"
    if (weights.bits, inputs.bits) == (4, 8):
        return (
            "4-bit weights and 8-bit activations",
            "CompressedTensorsW4A8Int has a kernel for CPUs only",
            "use 8 bits",
        )
    if weights.bits != 8 or inputs.bits != 8:
        return f"{weights.bits}-bit weights and {inputs.bits}-bit activations", none, "use 8 bits for both"
    if not weights.symmetric:
        return "weights with a zero point", none, "use symmetric weights"
    if isinstance(weights.granularity, PerGroup):
        return "weights per group with int8 activations", none, "use PerChannel() for the weights"
    if not isinstance(weights.granularity, PerChannel | PerTensor):
        return f"weights per {weights.granularity}", none, "use PerChannel() for the weights"
    if isinstance(inputs.granularity, PerTensor) and inputs.dynamic:
        return (
            "one activation scale per call",
            "per-tensor activations are static there (_is_static_tensor_w8a8)",
            "use 'w8a8' (per token) or 'w8a8-static'",
        )
    return None


def _refused_weight_only(weights: QuantSpec, *, packed: bool) -> tuple[str, str, str] | None:
    """`_refused` of a scheme whose activations are float."""
    if not packed:
        return (
            f"weight-only int{weights.bits} in the format int-quantized",
            "_quantization_scheme_map_from_config asserts that there are input_activations",
            "use 'w8a16', which is saved as pack-quantized: symmetric, 8 bits, PerChannel() or PerGroup()",
        )
    if isinstance(weights.granularity, PerTensor):
        return "weight-only with one scale", "CompressedTensorsWNA16 raises ValueError", "use PerChannel() or 'w8a16'"
    if weights.bits not in (4, 8) or (weights.bits == 8 and not weights.symmetric):
        zero_points = "" if weights.symmetric else " with zero points"
        return (
            f"weight-only int{weights.bits}{zero_points}",
            "query_marlin_supported_quant_types leaves them out",
            "use 'w8a16', whose weights are symmetric",
        )
    if isinstance(weights.granularity, PerGroup) and weights.granularity.size not in _GROUPS:
        return (
            f"groups of {weights.granularity.size}",
            "MARLIN_SUPPORTED_GROUP_SIZES leaves them out",
            f"use PerChannel(), or groups of {', '.join(map(str, _GROUPS))}",
        )
    return None


def _by_shape(quantized: Mapping[str, Scheme], shapes: Mapping[str, tuple[int, int]]) -> list[Finding]:
    """What the kernels make of the shapes of layers whose schemes they run; shards count as the layer that they are."""
    rows = {name: n for name, (n, _) in shapes.items()}
    for shards in _shards(shapes):
        rows |= dict.fromkeys(shards, sum(rows[name] for name in shards))
    reasons = {}
    for name, scheme in quantized.items():
        if name in shapes:
            n, k = rows[name], shapes[name][1]
            width = n if name.rpartition(".")[2] in _DOWN else k
            reasons[name] = _misfit_expert(scheme, width) if ".experts." in name else _misfit(scheme, n, k)
    return _by_reason(reasons)


def _misfit(scheme: Scheme, n: int, k: int) -> tuple[bool, str, str, str] | None:
    """Whether a shape is refused, or told only, what is the matter, where vLLM says so, and what to do."""
    if scheme.activations is not None:
        if n % _ALIGNED == k % _ALIGNED == 0:
            return None
        what = f"a layer whose N or K is no multiple of {_ALIGNED}"
        if scheme.activations.symmetric:
            return False, what, "cutlass_scaled_mm takes Triton's product instead", "it runs, in another kernel"
        return True, f"{what}, with zero points", "cutlass_scaled_mm_azp asserts it", "use 'w8a8', or leave it float"
    if k % _TO_A_WORD:
        return True, "a K that fills no whole words", "marlin_pad_qweight counts whole words", "leave it float"
    if any(n % tile == k % other == 0 for tile, other in _TILES):
        return None
    why = "marlin_padded_nk: N and K are multiples of 64 and 128, or of 128 and 64"
    return False, "weights that Marlin fills up with zeros", why, "it runs, and copies activations or outputs"


def _misfit_expert(scheme: Scheme, width: int) -> tuple[bool, str, str, str] | None:
    """`_misfit` of an expert's layer, of which the model's width counts where it is weight-only."""
    if scheme.activations is not None or width % _EXPERT_WIDTH == 0:
        return None
    what = f"weight-only experts in a width that is no multiple of {_EXPERT_WIDTH}"
    return True, what, "check_moe_marlin_supports_config", "use 'w8a8' for the experts, or leave them float"


def _shards(names: Collection[str]) -> Iterator[list[str]]:
    """The layers that are one in vLLM, group by group."""
    for lasts in FUSED:
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in names if name.rpartition(".")[2] in lasts):
            shards = [shard for last in lasts if (shard := f"{parent}.{last}" if parent else last) in names]
            if len(shards) > 1:
                yield shards


def _fused(schemes: Mapping[str, Scheme | None]) -> list[Finding]:
    found = []
    for shards in _shards(schemes):
        given = {schemes[shard] for shard in shards}
        if None in given and len(given) > 1:
            told = "layers that are one in vLLM are in part float", "should_ignore_layer raises ValueError"
        else:
            told = "layers that are one in vLLM have different schemes", "it runs all in the scheme of the first"
        found += _about(shards, *told, "quantise all of them alike, or none") if len(given) > 1 else []
    return found


def _experts(schemes: Mapping[str, Scheme | None]) -> list[Finding]:
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    experts = {name: scheme for name, scheme in quantized.items() if ".experts." in name}
    wrong = [
        name
        for name, scheme in experts.items()
        if scheme.activations is not None  # weight-only ones run like any other layer
        and not (
            isinstance(scheme.weights.granularity, PerChannel)
            and isinstance(scheme.activations.granularity, PerToken)
            and scheme.activations.symmetric
        )
    ]
    found = []
    for stack in dict.fromkeys(name.partition(".experts.")[0] for name in experts):
        members = [name for name in schemes if name.startswith(f"{stack}.experts.")]
        found += _about(
            members if len({schemes[name] for name in members}) > 1 else [],
            "experts of one layer have different schemes",
            "they are one RoutedExperts there, with one scheme",
            "quantise all of them, or none",
        )
    found += _about(
        wrong,
        "experts that are not per channel with symmetric per-token activations",
        "CompressedTensorsW8A8Int8MoEMethod raises ValueError",
        "use 'w8a8' for the experts",
    )
    return found + _about(
        [name for name in quantized if set(name.split(".")[-2:]) & set(ROUTERS)],
        "a quantised router",
        "its models make routers without a quantisation config, so a scale has no place",
        "leave it float: exclude it by its name",
    )

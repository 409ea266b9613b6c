"""What vLLM's loader will make of a model, known from its layers and schemes before anything is quantised.

The rules are those of vLLM 0.33.0, read in its source, `vllm/model_executor/layers/quantization/compressed_tensors/`:

    compressed_tensors.py   _is_dynamic_token_w8a8, _is_static_tensor_w8a8, _quantization_scheme_map_from_config,
                            _get_scheme_from_parts, CompressedTensorsKVCacheMethod
    utils.py                should_ignore_layer, find_matched_target: the shards of a fused layer
    compressed_tensors_moe/compressed_tensors_moe_w8a8_int8.py

Which layers vLLM fuses into one is in each of its models (`packed_modules_mapping`); `FUSED` has their names.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from w8a8.convert import ROUTERS
from w8a8.linear import QuantLinear, is_conv1d
from w8a8.scheme import PerChannel, PerGroup, PerTensor, PerToken, Scheme

VERSION = "0.33.0"

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Linear layers that lie side by side and are one in vLLM, by the last part of their names."""


@dataclass(frozen=True)
class Finding:
    """Something that vLLM refuses (`refused`), or does otherwise than one may expect.

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
        verdict = f"vLLM {VERSION} refuses this" if self.refused else f"vLLM {VERSION}"
        return f"{verdict}: {shown}: {self.what} ({self.why}); {self.instead}"


def schemes_of(model: nn.Module) -> dict[str, Scheme | None]:
    """Every linear layer of a model with its scheme; None for a float one."""
    return {
        name: module.scheme if isinstance(module, QuantLinear) else None
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear | nn.Linear) or is_conv1d(module)
    }


def transposed_of(model: nn.Module) -> set[str]:
    """The layers that are or were `Conv1D`."""
    return {
        name
        for name, module in model.named_modules()
        if is_conv1d(module) or (isinstance(module, QuantLinear) and module.was_conv1d)
    }


def findings(
    schemes: Mapping[str, Scheme | None], *, heads: Iterable[str] = (), transposed: Iterable[str] = ()
) -> tuple[Finding, ...]:
    """Look at the layers of a model as they are to be.

    Args:
        schemes: Every linear layer, in the model's order; None for one that stays float.
        heads: Those that are output heads.
        transposed: Those that are transformers' `Conv1D`.
    """
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    found = [*_by_scheme(quantized), *_fused(schemes), *_experts(schemes)]
    conv1d = tuple(name for name in quantized if name in set(transposed))
    if conv1d:
        found.append(
            Finding(
                True,
                conv1d,
                "quantised Conv1D",
                "its GPT-2 transposes these weights as it loads them, and the file has them row by row",
                "run it here, or leave these layers float",
            )
        )
    output = tuple(name for name in quantized if name in set(heads))
    if output:
        found.append(
            Finding(
                False,
                output,
                "an int8 output head",
                "ParallelLMHead takes the scheme of a linear layer; models whose load_weights skips lm_head do not",
                "a float head loads everywhere, and load(..., head='int8') quantises it at run time here",
            )
        )
    return tuple(found)


def foresee_as_it_is(model: nn.Module) -> tuple[Finding, ...]:
    """`findings` of a quantised model, with or without values."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = [
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and (module is output or name.rpartition(".")[2] == "lm_head")
    ]
    return findings(schemes_of(model), heads=heads, transposed=transposed_of(model))


def _by_scheme(quantized: Mapping[str, Scheme]) -> list[Finding]:
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for name, scheme in quantized.items():
        reason = _refused(scheme)
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    return [Finding(True, tuple(names), *reason) for reason, names in reasons.items()]


def _refused(scheme: Scheme) -> tuple[str, str, str] | None:
    """What is the matter with a scheme, where vLLM says so, and what to use."""
    weights, inputs = scheme.weights, scheme.activations
    none = "_get_scheme_from_parts raises NotImplementedError: no compatible scheme"
    if inputs is None:
        return (
            "weight-only int8 in the format int-quantized",
            "_quantization_scheme_map_from_config asserts that there are input_activations",
            "use 'w8a8'; vLLM's own weight-only format is pack-quantized",
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


def _fused(schemes: Mapping[str, Scheme | None]) -> list[Finding]:
    found = []
    for names in FUSED:
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in schemes if name.rpartition(".")[2] in names):
            shards = [shard for last in names if (shard := f"{parent}.{last}" if parent else last) in schemes]
            if len(shards) > 1 and len({schemes[shard] for shard in shards}) > 1:
                found.append(
                    Finding(
                        True,
                        tuple(shards),
                        "layers that are one in vLLM have different schemes",
                        "should_ignore_layer and find_matched_target want all shards alike",
                        "quantise all of them, or none",
                    )
                )
    return found


def _experts(schemes: Mapping[str, Scheme | None]) -> list[Finding]:
    quantized = {name: scheme for name, scheme in schemes.items() if scheme is not None}
    experts = {name: scheme for name, scheme in quantized.items() if ".experts." in name}
    wrong = tuple(
        name
        for name, scheme in experts.items()
        if not isinstance(scheme.weights.granularity, PerChannel)
        or scheme.activations is None
        or not isinstance(scheme.activations.granularity, PerToken)
        or not scheme.activations.symmetric
    )
    found = []
    for stack in dict.fromkeys(name.partition(".experts.")[0] for name in experts):
        members = tuple(name for name in schemes if name.startswith(f"{stack}.experts."))
        if len({schemes[name] for name in members}) > 1:
            found.append(
                Finding(
                    True,
                    members,
                    "experts of one layer have different schemes",
                    "they are one RoutedExperts there, with one scheme",
                    "quantise all of them, or none",
                )
            )
    if wrong:
        found.append(
            Finding(
                True,
                wrong,
                "experts that are not per channel with symmetric per-token activations",
                "CompressedTensorsW8A8Int8MoEMethod raises ValueError",
                "use 'w8a8' for the experts",
            )
        )
    routers = tuple(name for name in quantized if set(name.split(".")[-2:]) & set(ROUTERS))
    if routers:
        found.append(
            Finding(
                True,
                routers,
                "a quantised router",
                "its models make routers without a quantisation config, so a scale has no place",
                "leave it float: exclude it by its name",
            )
        )
    return found

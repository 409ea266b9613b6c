import copy
import itertools
from collections import Counter, OrderedDict
from random import Random

import pytest
from torch import nn

from tests.conftest import TOKEN
from w8a8.checkpoint import layout
from w8a8.checkpoint.expressions import matching
from w8a8.checkpoint.layout import Group, QuantizationConfig, from_json, to_json
from w8a8.core.scheme import (
    PRESETS,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    QuantSpec,
    Scheme,
)
from w8a8.errors import CheckpointError, SchemeError

WRITABLE = [
    *(p.scheme for p in PRESETS.values()),
    Scheme(QuantSpec(4, PerGroup(32)), TOKEN),
    Scheme(QuantSpec(8, PerChannel(), symmetric=False), TOKEN),
    Scheme(QuantSpec(), QuantSpec(8, PerTensor(), symmetric=False, dynamic=False)),
]


def config(scheme=PRESETS["w8a8"].scheme):
    return to_json(QuantizationConfig((Group(("Linear",), scheme),), ("lm_head",)))


@pytest.mark.parametrize("scheme", WRITABLE, ids=str)
def test_what_is_written_is_read_back(scheme):
    wanted = QuantizationConfig((Group(("Linear",), scheme),), ("lm_head", "re:.*gate"))
    assert from_json(to_json(wanted), "config.json") == wanted


@pytest.mark.parametrize("scheme", WRITABLE, ids=str)
def test_compressed_tensors_reads_what_is_written(scheme):
    from compressed_tensors.quantization import QuantizationConfig as Theirs

    data = config(scheme)
    theirs = Theirs.model_validate(
        {k: v for k, v in data.items() if k != "quant_method"} | {"quant_method": "compressed-tensors"}
    )
    group = theirs.config_groups["group_0"]
    assert group.weights.num_bits == scheme.weights.bits
    assert group.weights.symmetric == scheme.weights.symmetric
    assert group.weights.strategy == data["config_groups"]["group_0"]["weights"]["strategy"]
    assert (group.input_activations is None) == (scheme.activations is None)
    assert theirs.ignore == ["lm_head"]


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme(QuantSpec(8, PerColumn()), TOKEN),
        Scheme(QuantSpec(), QuantSpec(8, PerChannel())),
        Scheme(QuantSpec(9), TOKEN),
    ],
    ids=str,
)
def test_what_the_format_has_no_word_for_is_refused(scheme):
    from w8a8.checkpoint.layout import check_writable

    with pytest.raises(SchemeError, match=r"no place in a compressed-tensors file|simulated only"):
        check_writable(scheme)


def test_targets_are_names_expressions_or_classes_and_ignore_wins():
    mlp, rest = PRESETS["w8a8-asym"].scheme, PRESETS["w8a8"].scheme
    parsed = QuantizationConfig(
        (Group(("Linear",), rest), Group(("re:.*mlp", "model.q"), mlp)), ("lm_head", "re:.*router$")
    )
    schemes = {
        (name, kind): group and group.scheme
        for name in ("a.mlp.up", "model.q", "model.k", "lm_head", "a.mlp.router")
        for kind in ("Linear", "Conv1D")
        for group in [parsed.groups_for({name: (kind, "Module")}, "config.json").get(name)]
    }
    assert schemes["a.mlp.up", "Linear"] is mlp
    assert schemes["model.q", "Linear"] is mlp
    assert schemes["model.k", "Linear"] is rest
    assert schemes["model.k", "Conv1D"] is None
    assert schemes["lm_head", "Linear"] is None
    assert schemes["a.mlp.router", "Linear"] is None


NAMES = [
    "lm_head",
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.qkv_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.10.mlp.down_proj",
    "model.layers.1.mlp.gate_up_proj",
    "model.layers.1.block_sparse_moe.experts.3.w2",
    "visual.merger.linear",
]
TARGETS = [
    *NAMES,
    "Linear",
    "Module",
    "NonDynamicallyQuantizableLinear",
    "linear",
    "q_proj",
    "model.layers.1",
    "re:.*",
    "re:lm_head",
    "re:.*lm_head$",
    "re:q_proj",
    "re:.*q_proj",
    "re:.*[qk]_proj$",
    "re:model\\.layers\\.1\\..*",
    "re:model.layers.1",
    "re:.*experts\\.\\d+\\.w[123]",
    "re:visual.*|.*down_proj",
    "re:.*self_attn\\.(q|k|v)_proj$",
    "re:(?!.*mlp).*proj",
    "re:",
]


class NonDynamicallyQuantizableLinear(nn.Linear):
    """As torch's attention has it."""


def test_targets_match_as_compressed_tensors_matches_them(monkeypatch):
    """Which group a layer gets, for a thousand random configurations of three groups and an ignore list.

    All expressions are matched at once: a process for each configuration would take half a minute.
    """
    from compressed_tensors.quantization.lifecycle.apply import _scheme_from_targets
    from compressed_tensors.utils.match import is_match, match_targets

    known = matching([target[3:] for target in TARGETS if target.startswith("re:")], NAMES, "config.json")
    monkeypatch.setattr(layout, "matching", lambda expressions, names, where: {e: known[e] for e in expressions})
    random = Random(0)
    schemes = [PRESETS[name].scheme for name in ("w8a8", "w8a8-asym", "w8a8-tensor")]
    modules = [nn.Linear(1, 1), NonDynamicallyQuantizableLinear(1, 1)]
    seen = Counter()
    for _ in range(1000):
        groups = tuple(Group(tuple(random.sample(TARGETS, random.randint(1, 3))), scheme) for scheme in schemes)
        ours = QuantizationConfig(groups, tuple(random.sample(TARGETS, random.randint(0, 1))))
        by_target = OrderedDict((target, group.scheme) for group in groups for target in group.targets)
        classes = [[cls.__name__ for cls in type(m).__mro__ if issubclass(cls, nn.Module)] for m in modules]
        found = [ours.groups_for(dict.fromkeys(NAMES, names), "config.json") for names in classes]
        for name, (module, groups_found) in itertools.product(NAMES, zip(modules, found, strict=True)):
            theirs = None
            if is_match(name, module, by_target) and not is_match(name, module, ours.ignore):
                theirs = _scheme_from_targets(by_target, match_targets(name, module, by_target), name)
            group = groups_found.get(name)
            assert (group and group.scheme) == theirs, (name, ours)
            seen[theirs] += 1
    assert min(seen[scheme] for scheme in (None, *schemes)) > 500


def changed(path, value):
    data = copy.deepcopy(config())
    *parents, last = path.split(".")
    place = data
    for key in parents:
        place = place[key]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return data


G = "config_groups.group_0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("quant_method", "gptq", "quant_method is 'gptq'"),
        ("format", "marlin-24", "format is 'marlin-24'"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "sparsity_config is .*sparse weights are unknown"),
        ("transform_config", {"config_groups": {"u": 1}}, "transform_config is .*rotations at run time are unknown"),
        ("format", "float-quantized", "format is 'float-quantized'"),
        ("config_groups", {}, "expected at least one group"),
        ("config_groups", KeyError, "expected at least one group"),
        ("config_groups", [1], "expected at least one group"),
        ("kv_cache_scheme", {"num_bits": 8}, "quantised cache is unknown"),
        (G, 3, r"config_groups.group_0 is 3, expected an object"),
        (f"{G}.format", "marlin-24", r"group_0.format is 'marlin-24'"),
        (f"{G}.targets", "Linear", r"targets is 'Linear', expected a list"),
        (f"{G}.targets", ["re:" + "a" * 1001], r"targets: 're:a{80}\.\.\.' has 1,001 characters"),
        ("ignore", ["re:" + "a" * 1001], r"ignore: 're:a{80}\.\.\.' has 1,001 characters"),
        (f"{G}.output_activations", {"num_bits": 8}, "quantised outputs"),
        (f"{G}.weights", None, "weights is null"),
        (f"{G}.weights", "int8", "weights is 'int8', expected an object"),
        (f"{G}.weights.type", "float", r"weights.type is 'float'"),
        (f"{G}.weights.num_bits", 16, r"num_bits is 16, this version runs 2..8"),
        (f"{G}.weights.num_bits", "8", r"num_bits is '8'"),
        (f"{G}.weights.strategy", "block", "strategy 'block' with group_size None is unknown"),
        (f"{G}.weights.strategy", "token", "strategy 'token' .* is unknown"),
        (f"{G}.weights.strategy", "group", "strategy 'group' .* is unknown"),
        (f"{G}.weights.actorder", "group", "reordered groups"),
        (f"{G}.weights.symmetric", "false", "symmetric is 'false', expected true or false"),
        (f"{G}.weights.dynamic", True, "weights.dynamic is true"),
        (f"{G}.weights.block_structure", [128, 128], "blocks are unknown"),
        (f"{G}.input_activations.strategy", "channel", "strategy 'channel' .* is unknown"),
        (f"{G}.input_activations.dynamic", "local", "dynamic is 'local'"),
        (f"{G}.input_activations.dynamic", False, "fixed beforehand is one per tensor"),
        ("ignore", "lm_head", "ignore is 'lm_head', expected a list"),
    ],
)
def test_what_is_not_understood_is_an_error_with_its_path(path, value, message):
    with pytest.raises(CheckpointError, match=message):
        from_json(changed(path, value), "config.json")


@pytest.mark.parametrize(("size", "granularity"), [(None, PerTensor()), (-1, PerChannel()), (16, PerGroup(16))])
def test_a_missing_strategy_follows_from_the_group_size(size, granularity):
    data = changed(f"{G}.weights.strategy", None)
    data["config_groups"]["group_0"]["weights"]["group_size"] = size
    assert from_json(data, "x").groups[0].scheme.weights.granularity == granularity


def test_older_files_without_a_method_or_format_are_read():
    data = changed("quant_method", KeyError)
    del data["format"]
    assert from_json(data, "x").groups[0].scheme == PRESETS["w8a8"].scheme


@pytest.mark.parametrize("place", ["format", f"{G}.format"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_packed_groups_are_known_by_their_format(place, bits):
    data = changed(place, "pack-quantized")
    if place == "format":
        data["config_groups"]["group_0"]["format"] = None
    data["config_groups"]["group_0"]["weights"]["num_bits"] = bits
    assert from_json(data, "x").groups[0].packed


def test_the_format_of_the_whole_is_that_of_its_groups():
    integer, words = Group(("a",), PRESETS["w8a8"].scheme), Group(("b",), PRESETS["w8a16"].scheme, packed=True)
    for groups, whole in (
        ((integer,), "int-quantized"),
        ((words,), "pack-quantized"),
        ((integer, words), "mixed-precision"),
    ):
        written = to_json(QuantizationConfig(groups, ()))
        assert written["format"] == whole
        assert from_json(written, "x").groups == groups
    assert [group["format"] for group in written["config_groups"].values()] == ["int-quantized", "pack-quantized"]


def test_packed_widths_that_versions_order_differently_are_refused():
    data = changed(f"{G}.format", "pack-quantized")
    data["config_groups"]["group_0"]["weights"]["num_bits"] = 3
    with pytest.raises(
        CheckpointError, match="num_bits is 3, which writers of 'pack-quantized' have packed in two ways"
    ):
        from_json(data, "x")

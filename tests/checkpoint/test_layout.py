import copy

import pytest

from w8a8.checkpoint.layout import Group, QuantizationConfig, from_json, to_json
from w8a8.errors import CheckpointError, SchemeError
from w8a8.scheme import (
    PRESETS,
    PerChannel,
    PerColumn,
    PerGroup,
    PerTensor,
    PerToken,
    QuantSpec,
    Scheme,
)

TOKEN = QuantSpec(granularity=PerToken())
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
    assert parsed.scheme_for("a.mlp.up", "Linear") is mlp
    assert parsed.scheme_for("model.q", "Linear") is mlp
    assert parsed.scheme_for("model.k", "Linear") is rest
    assert parsed.scheme_for("model.k", "Conv1D") is None
    assert parsed.scheme_for("lm_head", "Linear") is None
    assert parsed.scheme_for("a.mlp.router", "Linear") is None


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
        ("format", "pack-quantized", "format is 'pack-quantized'"),
        ("format", "float-quantized", "format is 'float-quantized'"),
        ("config_groups", {}, "expected at least one group"),
        ("config_groups", KeyError, "expected at least one group"),
        ("config_groups", [1], "expected at least one group"),
        ("kv_cache_scheme", {"num_bits": 8}, "quantised cache is unknown"),
        (G, 3, r"config_groups.group_0 is 3, expected an object"),
        (f"{G}.format", "marlin-24", r"group_0.format is 'marlin-24'"),
        (f"{G}.targets", "Linear", r"targets is 'Linear', expected a list"),
        (f"{G}.targets", ["re:("], "not a regular expression"),
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

import copy
import itertools
import math
import sys

import pytest
import torch

import w8a8
from tests.analysis.conftest import TWO_BITS
from tests.conftest import llama, opt
from w8a8 import checkpoint
from w8a8.analysis import Budget, allocate
from w8a8.analysis.knapsack import GroupCosts, solve
from w8a8.analysis.sample import draw
from w8a8.calibration.data import Calibration
from w8a8.checkpoint.vllm import foresee
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_model
from w8a8.errors import ModelError, SchemeError
from w8a8.evaluation import encode, perplexity
from w8a8.layers.linear import quant_linears
from w8a8.model.choice import Choice

IDS = torch.randint(0, 96, (600,), generator=torch.Generator().manual_seed(3))
SHORT = {"windows": 1, "seq_len": 32}


def speaking_llama(loud):
    """A Llama of some opinion, (12 x 60) tokens of text that it wrote itself, and outliers of so many times the median.

    On its own text its loss rises by the KL in the mean, whatever changes it.
    """
    model = llama()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
        generator = torch.Generator().manual_seed(7)
        ids = torch.randint(0, 96, (12, 1), generator=generator)
        for _ in range(59):
            p = model(ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=generator)], 1)
    profile = torch.ones(64)
    profile[[3, 40]] = torch.tensor([loud / 3, loud])
    w8a8.outliers.inject_(model, profile)
    return model, ids.flatten()


def left_float(found):
    return [name for name, scheme in found.schemes.items() if scheme is None]


def ruin(up, down):
    """A huge weight in each row, for a channel that is always zero: the float function stays, 8-bit codes are lost."""
    with torch.no_grad():
        up.weight[7] = 0.0
        if up.bias is not None:
            up.bias[7] = 0.0
        down.weight[:, 7] = 1000.0


@pytest.mark.parametrize(("written", "expected"), [
    ("12MB", Budget(bytes=12_000_000)),
    ("1.5 GiB", Budget(bytes=3 * 2**29)),
    ("4096", Budget(bytes=4096)),
    (4096, Budget(bytes=4096)),
    ("0.5%", Budget(percent=0.5)),
])  # fmt: skip
def test_a_budget_is_bytes_or_percent(written, expected):
    assert Budget.of(written) == expected


@pytest.mark.parametrize("written", ["", "12 apples", "-3MB", "0", "half"])
def test_what_is_no_budget_is_told_how_one_is_written(written):
    with pytest.raises(SchemeError, match=r"'0\.5%'"):
        Budget.of(written)


def random_groups(seed):
    draw = torch.Generator().manual_seed(seed)
    groups = []
    for i in range(5):
        size = int(torch.randint(100, 1000, (1,), generator=draw))
        kl = torch.rand(2, generator=draw).mul(1e-3).tolist()
        groups.append(GroupCosts((f"l{i}",), ("a", "b", "float"), (size, size + 40, 4 * size), (*kl, 0.0)))
    return groups


def total(groups, picked):
    places = [g.options.index(option) for g, option in zip(groups, picked, strict=True)]
    bytes_ = sum(g.bytes[i] for g, i in zip(groups, places, strict=True))
    return bytes_, sum(g.kl_nats[i] for g, i in zip(groups, places, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_the_best_of_all_of_them(seed):
    groups = random_groups(seed)
    every = [total(groups, picked) for picked in itertools.product(("a", "b", "float"), repeat=5)]
    limit = sorted(size for size, _ in every)[len(every) // 2]
    size, kl = total(groups, solve(groups, 50, limit=limit + 50))
    assert size <= limit
    assert kl == pytest.approx(min(cost for other, cost in every if other <= limit), rel=1e-6)
    bound = sorted(cost for _, cost in every)[len(every) // 3]
    size, kl = total(groups, solve(groups, kl_bound=bound))
    assert kl <= bound * (1 + 1e-6)
    assert size == min(other for other, cost in every if cost <= bound)


@pytest.mark.slow
def test_a_ruined_layer_of_the_demo_is_left_float_and_nothing_else():
    opened = demo_model()
    block = opened.model.model.decoder.layers[2]
    ruin(block.fc1, block.fc2)
    text = encode(opened.tokenizer, held_out_text())
    found = allocate(opened.model, text, "0.5%", windows=1, seq_len=64)
    assert [name for name, scheme in found.schemes.items() if scheme is None] == ["model.decoder.layers.2.fc2"]
    assert found.perplexity_ratio < 1.005
    assert found.chosen.predicted_kl_nats < 0.005
    limit = found.chosen.bytes
    by_bytes = allocate(opened.model, text, limit, windows=1, seq_len=64)
    assert by_bytes.schemes["model.decoder.layers.2.fc2"] is None
    assert by_bytes.chosen.bytes <= limit


def test_a_layer_of_the_demo_that_can_have_two_bits_only_is_left_float_and_nothing_else():
    opened, bad = demo_model(), "model.decoder.layers.3.fc2"
    text = encode(opened.tokenizer, held_out_text())
    found = allocate(opened.model, text, "0.5%", options=[{bad: TWO_BITS, "*": "w8a8"}], windows=1, seq_len=64)
    assert left_float(found) == [bad]
    (costs,) = [group for group in found.groups if group.layers == (bad,)]
    assert costs.options == (TWO_BITS.name, "float")
    assert costs.kl_nats[0] > math.log1p(0.005)


def test_a_layer_of_a_llama_with_outliers_that_can_have_two_bits_only_is_left_float_and_nothing_else():
    model, ids = speaking_llama(20.0)
    bad = "model.layers.1.mlp.down_proj"
    found = allocate(model, ids, "1%", options=[{bad: TWO_BITS, "*": "w8a8"}], windows=3, seq_len=60)
    assert left_float(found) == [bad]
    assert max(group.kl_nats[0] for group in found.groups) == found.groups[-1].kl_nats[0] > 10 * 0.0005
    assert found.groups[-1].layers == (bad,)


def test_an_option_of_none_is_no_option_and_the_same_scheme_is_one():
    options = [{"*.o_proj": None, "*": "w8a8"}, "w8a8"]
    found = allocate(llama(), IDS, "50%", options=options[:1], include=["*_proj"], **SHORT)
    assert {group.options for group in found.groups if "o_proj" in group.layers[0]} == {("float",)}
    assert {name.rpartition(".")[2] for name in left_float(found)} == {"o_proj"}
    found = allocate(llama(), IDS, "50%", options=options, **SHORT)
    assert {group.options for group in found.groups} == {("w8a8", "float")}


def test_layers_that_move_together_cannot_be_offered_different_schemes():
    with pytest.raises(SchemeError, match=r"move together.*q_proj: w8a8-asym, .*k_proj: w8a8"):
        allocate(llama(), IDS, "1%", options=[{"*q_proj": "w8a8-asym", "*": "w8a8"}], **SHORT)


def test_a_choice_that_fails_when_it_is_run_is_made_again_until_one_holds():
    model, ids = speaking_llama(60.0)
    found = allocate(model, ids, "0.2%", windows=6, seq_len=60)
    assert 1 < found.rounds <= 4
    assert found.perplexity_ratio <= 1.002
    first, tightened = (_run(model, ids, found, bound) for bound in (math.log1p(0.002), None))
    assert first > 1.002
    assert tightened == pytest.approx(found.perplexity_ratio, rel=1e-6)


def _run(model, ids, found, kl_bound):
    """The perplexity ratio, on the windows that the costs were not measured on, of the choice under a bound."""
    schemes = found.schemes
    if kl_bound is not None:
        picked = zip(found.groups, solve(found.groups, kl_bound=kl_bound), strict=True)
        schemes = {name: None if o == "float" else o for group, o in picked for name in group.layers}
    quantized = copy.deepcopy(model)
    w8a8.quantize(quantized, schemes)
    used = {window.start for window in draw(model, ids, windows=6, seq_len=60).windows}
    others = torch.cat([ids[i : i + 60] for i in range(0, len(ids), 60) if i not in used])
    assert len(others) == found.checked_tokens // 59 * 60
    return _perplexity(quantized, others) / _perplexity(model, others)


def _perplexity(model, ids):
    return perplexity(model, ids, seq_len=60).perplexity.mean


@pytest.mark.slow
def test_after_smoothing_fewer_layers_are_left_float_for_the_same_perplexity():
    model, ids = speaking_llama(60.0)
    plain = allocate(model, ids, "0.1%", windows=6, seq_len=60)
    w8a8.smooth_(model, Calibration.of(ids.view(12, 60)), alpha="searched")
    smooth = allocate(model, ids, "0.1%", windows=6, seq_len=60)
    assert len(left_float(smooth)) < len(left_float(plain))
    assert smooth.chosen.bytes < plain.chosen.bytes
    assert smooth.perplexity_ratio <= 1.001


def test_static_options_are_measured_with_the_calibration_that_they_are_quantised_with():
    model, ids = speaking_llama(5.0)
    data = Calibration.of(ids[None, :64])
    options = {"options": ["w8a8-static"], "windows": 12, "seq_len": 60}
    found = allocate(model, ids, "10%", calibration=data, **options)
    assert left_float(found) == []
    quantized = copy.deepcopy(model)
    w8a8.quantize(quantized, found.schemes, calibration=data, smooth="none")
    ratio = _perplexity(quantized, ids) / _perplexity(model, ids)
    assert found.perplexity_ratio == pytest.approx(ratio, rel=1e-6)
    with pytest.raises(SchemeError, match="no calibration data"):
        allocate(model, ids, "10%", **options)


def test_shards_that_vllm_fuses_move_together_and_vllm_takes_the_result(tmp_path):
    model = llama(intermediate_size=112)  # a multiple of 16, as its kernels with zero points want
    layer = model.model.layers[1]
    with torch.no_grad():
        layer.input_layernorm.weight[7] = 0.0
        layer.self_attn.v_proj.weight[:, 7] = 1000.0
    shards = [f"model.layers.1.self_attn.{kind}_proj" for kind in "qkv"]
    spare = sum(3 * model.get_submodule(name).weight.numel() for name in shards)
    least = allocate(model, IDS, "50%", **SHORT).chosen.bytes
    found = allocate(model, IDS, least + spare, **SHORT)
    assert {found.schemes[name] for name in shards} == {None}
    assert any(scheme is not None for scheme in found.schemes.values())
    assert not foresee(Choice.of(model, found.schemes))
    w8a8.quantize(model, found.schemes)
    w8a8.save(model, tmp_path / "out")
    loaded = w8a8.load(tmp_path / "out")
    assert {name for name, _ in quant_linears(loaded)} == {name for name, s in found.schemes.items() if s is not None}
    logits = [each(IDS[None, :16]).logits for each in (model, loaded)]
    assert torch.equal(*logits)


def test_bytes_are_those_of_the_file(tmp_path):
    model = llama()
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    found = allocate(model, IDS, int(0.7 * float_bytes), **SHORT)
    assert found.float_bytes == float_bytes
    assert None in found.schemes.values()
    assert found.chosen.bytes <= 0.7 * float_bytes
    w8a8.quantize(model, found.schemes)
    state = model.state_dict()
    assert sum(t.numel() * t.element_size() for t in state.values()) == found.chosen.bytes


def test_a_tied_head_that_is_quantised_is_paid_for_and_a_float_one_is_not():
    model = opt()
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    found = allocate(model, IDS, 10 * float_bytes, include=["*", "lm_head"], **SHORT)
    assert found.chosen.bytes == float_bytes
    (head,) = [group for group in found.groups if group.layers == ("lm_head",)]
    assert head.bytes[-1] == 0
    assert head.bytes[0] == 96 * 48 + 96 * 4


def test_more_bytes_never_cost_more(tmp_path):
    found = allocate(opt(), IDS, "1%", **SHORT)
    costs = [point.predicted_kl_nats for point in found.curve]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == 0.0
    record = found.record()
    assert record["points"][record["chosen"]]["measured_kl_nats"] == found.chosen.measured_kl_nats
    assert set(record) == {"points", "chosen", "constraint"}
    assert "predicted" in str(found)
    assert found.to_dict()["schemes"]["model.decoder.layers.0.fc1"] in ("w8a8", "w8a8-asym", "float")


def test_a_budget_that_cannot_be_kept_says_what_can():
    model = llama()
    with pytest.raises(SchemeError, match="as small as it gets"):
        allocate(model, IDS, 1000, **SHORT)
    assert not list(quant_linears(model))


def test_an_option_that_cannot_run_is_refused():
    simulated = w8a8.Scheme(w8a8.QuantSpec(8, w8a8.PerColumn()), w8a8.QuantSpec(8, w8a8.PerToken()))
    with pytest.raises(SchemeError, match="cannot run"):
        allocate(llama(), IDS, "1%", options=[simulated], **SHORT)


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModelError, match=r"w8a8\[budget\]"):
        allocate(llama(), IDS, "1%", **SHORT)


def test_compressed_tensors_reads_the_groups_of_a_choice(tmp_path):
    from compressed_tensors.quantization import QuantizationConfig

    model = llama()
    schemes = {"*.mlp.*": None, "*.o_proj": "w8a8-asym", "*": "w8a8"}
    w8a8.quantize(model, schemes)
    config = QuantizationConfig.model_validate(checkpoint.layout.to_json(checkpoint.describe.describe(model)))
    assert len(config.config_groups) == 2
    assert "model.layers.0.mlp.up_proj" in config.ignore


class TestTables:
    """Lookup tables that will be int8: in the bytes and in what is lost, and nothing to choose."""

    def test_a_budget_of_bytes_is_of_the_files_with_tables_in_int8(self):
        model, few = llama(), {"include": ["*.down_proj"], "options": ["w8a8"], **SHORT}
        least = allocate(model, IDS, "50%", **few).chosen.bytes
        limit = least - model.get_input_embeddings().weight.nbytes // 2
        with pytest.raises(SchemeError, match="cannot be kept"):
            allocate(model, IDS, limit, **few)
        found = allocate(model, IDS, limit, embeddings="int8", **few)
        assert found.chosen.bytes <= limit
        result = w8a8.quantize(model, found.schemes, embeddings="int8")
        assert sum(tensor.nbytes for tensor in model.state_dict().values()) == found.chosen.bytes
        assert "model.embed_tokens" in {module.name for module in result.coverage.quantized}

    def test_what_tables_lose_is_measured_and_predicted(self):
        model = llama(tie_word_embeddings=False)
        with torch.no_grad():
            rows = model.get_input_embeddings().weight
            rows[:, 5] = 300 * rows.std()  # which takes the codes of all the others
            model.model.norm.weight *= 30  # so that the model has an opinion
        little = {"model.layers.0.mlp.down_proj": "w8a8"}
        found = allocate(model, IDS, "500%", options=[little], embeddings="int8", **SHORT)
        tables = found.groups[-1]
        assert (tables.layers, tables.options) == (("model.embed_tokens",), ("w8a16",))
        assert tables.kl_nats[0] > 1e-3
        assert found.chosen.predicted_kl_nats >= tables.kl_nats[0]
        assert found.chosen.measured_kl_nats == pytest.approx(tables.kl_nats[0], rel=0.3)
        assert "model.embed_tokens" not in found.schemes

    def test_a_table_that_a_layer_of_the_choice_is_tied_to_is_refused(self):
        model = opt()
        with pytest.raises(ModelError, match="is one tensor with lm_head, which stays float"):
            allocate(model, IDS, "1%", embeddings="int8", **SHORT)
        with pytest.raises(ModelError, match=r"embed_tokens is one tensor with lm_head, which the budget may leave"):
            allocate(model, IDS, "1%", include=["*", "lm_head"], embeddings="int8", **SHORT)

    def test_tables_may_be_excluded(self):
        found = allocate(llama(), IDS, "50%", exclude=["model.embed_tokens", "*.up_proj"], **SHORT)
        assert not any(name.endswith("up_proj") for name in found.schemes)

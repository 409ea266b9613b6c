"""What a model's code does with its layers, read in its source: small models written in many ways, and torch's own."""

import inspect
import linecache
import types
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import transformers as t
from torch import nn

import w8a8
from tests import families
from tests.conftest import relative_error
from w8a8.errors import SchemeError, WeightError
from w8a8.layers.linear import QuantLinear, quant_linears
from w8a8.model.selection import select
from w8a8.model.usage import look


def multiply(x, layer):
    return x @ layer.weight.t()


class Base(nn.Module):
    """`a` is what the subclass reads, `b` is only called."""

    flag = False

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.slow = 0

    def forward(self, x):
        return self.b(x)


class Reads(Base):
    def forward(self, x):
        return F.linear(self.b(x), self.a.weight)


class ByAName(Base):
    def forward(self, x):
        layer = self.a
        weight = layer.weight
        return self.b(x) * weight.sum()


class ByAFunction(Base):
    def forward(self, x):
        return multiply(self.b(x), self.a)


class ByAMethod(Base):
    def forward(self, x):
        return self.project(self.b(x), layer=self.a)

    def project(self, x, layer):
        return torch.cat([x, layer.weight])


class ByAProperty(Base):
    @property
    def matrix(self):
        return self.a.weight

    def forward(self, x):
        return self.b(x) @ self.matrix


class BySuper(Reads):
    def forward(self, x):
        return super().forward(x) + 1


class InALoop(Base):
    def forward(self, x):
        for _, layer in zip(range(1), [self.a], strict=True):
            x = x @ layer.weight
        return self.b(x)


class InAComprehension(Base):
    def forward(self, x):
        return self.b(x) + sum(p.weight.sum() for p in (self.a,))


class InAClosure(Base):
    def forward(self, x):
        def inside(y):
            return y @ self.a.weight

        return inside(self.b(x))


class ByGetattr(Base):
    def forward(self, x):
        return self.b(x) @ getattr(self, "a").weight  # noqa: B009


class Outside(Base):
    def forward(self, x):
        return self.b(x)

    def features(self, x):
        return x @ self.a.weight


class UnderAFlag(Base):
    def forward(self, x):
        if self.training:
            return x @ self.a.weight
        return self.b(x)


class Unpacked(Base):
    def forward(self, x):
        one, other = self.b, self.a
        return one(x) @ other.weight


READS = [
    Reads,
    ByAName,
    ByAFunction,
    ByAMethod,
    ByAProperty,
    BySuper,
    InALoop,
    InAComprehension,
    InAClosure,
    ByGetattr,
    Outside,
    UnderAFlag,
    Unpacked,
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", READS, ids=lambda kind: kind.__name__)
def test_a_weight_that_is_read_is_found(kind, device):
    with torch.device(device):
        model = nn.Sequential(kind(), nn.Linear(16, 16))
    found = select(model)
    assert found.chosen == ("0.b", "0.blocks.0", "0.blocks.1", "1")
    assert found.reasons["0.a"].startswith("it is not only called: ")
    assert found.reasons["0.a"].endswith(" reads its weight")


@pytest.mark.parametrize("kind", [k for k in READS if k not in (Outside, UnderAFlag)], ids=lambda kind: kind.__name__)
def test_the_model_computes_what_it_did_but_for_the_rounding(kind):
    model = kind()
    x = torch.randn(16, 16)
    with torch.no_grad():
        exact = model(x)
        assert w8a8.quantize(model).coverage.quantized
        assert 0 < relative_error(model(x), exact) < 0.1


class Asks(Base):
    def forward(self, x):
        x = x.to(self.a.weight.dtype).to(self.a.weight.device)
        if self.a.weight.shape[0] != self.a.out_features or self.a.bias is None:
            raise AssertionError
        if isinstance(self.a.weight, torch.Tensor) and x.dtype != self.a.weight.dtype:
            x = x.to(self.a.weight.dtype)
        return self.b(self.a(x)) + self.a.bias


class Decided(Base):
    def forward(self, x):
        if self.slow > 1 and self.flag:
            return x @ self.a.weight
        return self.b(self.a(x))


class Makes(Base):
    def reset_parameters(self):
        nn.init.zeros_(self.a.weight)
        self.fill()

    def fill(self):
        self.b.weight.data.zero_()

    def forward(self, x):
        return self.b(self.a(x))


@pytest.mark.parametrize("kind", [Asks, Decided, Makes], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_layer_whose_dtype_or_bias_is_asked_for_is_taken_and_the_answer_is_the_float_layers(kind, dtype):
    model = kind().to(dtype)
    x = torch.randn(3, 16)
    exact = model(x.to(dtype)).float()
    assert set(select(model).chosen) >= {"a", "b"}
    w8a8.quantize(model)
    assert isinstance(model.a, QuantLinear)
    found = model(x if kind is Asks else x.to(dtype))
    assert found.dtype is dtype
    assert relative_error(found.float(), exact) < 0.05


class TakesAParameter(Base):
    def __init__(self):
        super().__init__()
        self.bias_net = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
        self.table()

    def table(self):
        return torch.zeros(1).to(next(self.bias_net.parameters()).dtype)

    def forward(self, x):
        return self.bias_net(self.b(x))


def test_a_module_of_which_a_parameter_is_asked_keeps_one():
    model = TakesAParameter()
    found = w8a8.quantize(model).coverage
    assert {m.name for m in found.left} == {"bias_net.0"}
    assert found.left[0].reason == "it is not only called: TakesAParameter.table takes a parameter of it"
    assert model.table().dtype is torch.float32


class Tied(t.PreTrainedModel):
    """Of linear layers alone, which its config does not tie."""

    config_class = t.PretrainedConfig
    _tied_weights_keys: ClassVar = {"dec.weight": "enc.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.enc, self.dec = nn.Linear(16, 16), nn.Linear(16, 16)
        self.post_init()

    def forward(self, x):
        return self.dec(self.enc(x))


class TiedInItsOwnWay(Tied):
    def post_init(self):
        super().post_init()


class TiedAndAsked(Tied):
    def forward(self, x):
        return super().forward(x.to(self.dtype))


@pytest.mark.parametrize("kind", [Tied, TiedInItsOwnWay], ids=lambda kind: kind.__name__)
def test_what_transformers_does_when_it_makes_a_model_reads_no_layer(kind):
    model = kind(t.PretrainedConfig(tie_word_embeddings=False))
    x = torch.randn(5, 16)
    exact = model(x).detach()
    assert not w8a8.quantize(model).coverage.left
    assert 0 < relative_error(model(x), exact) < 0.1


def test_a_forward_that_asks_a_model_of_linear_layers_for_its_dtype_keeps_one():
    model = TiedAndAsked(t.PretrainedConfig(tie_word_embeddings=False))
    left = w8a8.quantize(model).coverage.left
    assert [(m.name, m.reason) for m in left] == [
        ("enc", "it is not only called: ModuleUtilsMixin.dtype takes a parameter of it")
    ]
    assert model(torch.randn(5, 16)).dtype is torch.float32


class ByParameter(Base):
    def forward(self, x):
        return self.b(x) @ self.get_parameter("a.weight").float().T


class ByItsOwnState(Base):
    def forward(self, x):
        return self.b(x) @ self.state_dict()["a.weight"].float().T


class ByTheStateOfAPart(Base):
    def forward(self, x):
        return self.b(x) @ self.blocks.state_dict()["0.weight"].float().T


class ByAMethodOfAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.part, self.c = ByItsOwnState(), nn.Linear(16, 16)

    def forward(self, x):
        return self.c(self.tensor(self.part, "a.weight") @ x)

    def tensor(self, part, name):
        return part.state_dict()[name].float()


class SavesItsState(Base):
    """No forward comes by here."""

    def checkpoint(self):
        return {**self.state_dict(), "a": self.blocks.state_dict()}


@pytest.mark.parametrize(
    ("kind", "float_ones", "how"),
    [
        (ByParameter, ["a"], "reads its weight"),
        (ByItsOwnState, ["a", "b", "blocks.0", "blocks.1"], "may read its weight by state_dict"),
        (ByTheStateOfAPart, ["blocks.0", "blocks.1"], "may read its weight by state_dict"),
        (ByAMethodOfAPart, [f"part.{name}" for name in ("a", "b", "blocks.0", "blocks.1")], "by state_dict"),
        (SavesItsState, [], ""),
    ],
)
def test_a_weight_that_a_forward_takes_by_name_from_above_is_found(kind, float_ones, how):
    model, x = nn.Sequential(kind(), nn.Linear(16, 16)), torch.randn(16, 16)
    with torch.no_grad():
        exact = model(x)
    left = w8a8.quantize(model).coverage.left
    assert sorted(m.name for m in left) == [f"0.{name}" for name in float_ones]
    assert all(m.reason.startswith("it is not only called: ") and m.reason.endswith(how) for m in left)
    with torch.no_grad():
        assert 0 < relative_error(model(x), exact) < 0.1


def test_a_branch_is_decided_by_each_modules_own_numbers():
    model = nn.Sequential(Decided(), Decided())
    model[1].slow, model[1].flag = 2, True
    assert {name for name in ("0.a", "1.a") if name in select(model).chosen} == {"0.a"}


def test_code_without_source_is_taken_for_the_worst():
    source = "def forward(self, x):\n    return self.b(x) @ self.a.weight\n"
    namespace: dict = {}
    exec(compile(source, "<nowhere>", "exec"), namespace)
    kind = type("Nowhere", (Base,), {"forward": namespace["forward"]})
    assert linecache.getlines("<nowhere>") == []
    found = select(kind())
    assert found.chosen == ("blocks.0", "blocks.1")
    assert "may read its weight (no source to look into)" in found.reasons["a"]


def test_a_forward_that_was_set_on_a_module_is_read():
    model = nn.Sequential(Base(), nn.Linear(16, 16))
    model[0].forward = types.MethodType(Reads.forward, model[0])
    assert "0.a" in select(model).reasons


class WithEmptyPlaces(Base):
    """Informer's last block has nothing behind it, and an absent child may be registered as such."""

    def __init__(self):
        super().__init__()
        self.behind = nn.ModuleList([nn.Linear(16, 16), None])
        self.last = nn.ModuleDict({"none": None, "some": nn.Linear(16, 16)})
        self.register_module("absent", None)

    def forward(self, x):
        for block, behind in zip(self.blocks, self.behind, strict=True):
            x = block(x) if behind is None else behind(block(x))
        for each in self.last.values():
            x = x if each is None else each(x)
        x = x if self.absent is None else self.absent(x)
        return x if self.behind[1] is None else self.behind[1](x)


def test_an_empty_place_among_the_children_is_no_module():
    model = WithEmptyPlaces()
    assert look(model).read == {}
    assert len(w8a8.quantize(model).schemes) == 6


@pytest.mark.parametrize("family", families.FAMILIES)
def test_of_models_that_only_call_their_layers_nothing_is_left(family):
    model = families.FAMILIES[family][0]()
    assert look(model).read == {}


def test_torchs_encoder_layers_compute_what_they_did():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    head = nn.Linear(16, 16)
    both = nn.Sequential(model, head).eval()
    x = torch.randn(1, 5, 16)
    with torch.inference_mode():
        exact = both(x)
        found = w8a8.quantize(both).coverage
        assert relative_error(both(x), exact) < 0.05
    assert [m.name for m in found.quantized] == ["1"]
    reasons = {m.name: m.reason for m in found.left}
    assert "forward reads its weight" in reasons["0.layers.0.linear1"]
    assert "reads its weight" in reasons["0.layers.1.self_attn.out_proj"]
    assert reasons["0.layers.0.self_attn"].startswith("MultiheadAttention multiplies by in_proj_weight itself")
    (attention,) = (m for m in found.left if m.name == "0.layers.0.self_attn")
    assert attention.macs == 3 * 16 * 16


def glm():
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "moe_intermediate_size": 24}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    index = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2}
    experts = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2}
    return t.GlmMoeDsaForCausalLM(t.GlmMoeDsaConfig(**sizes, **latent, **index, **heads, **experts)).eval()


def test_an_indexer_that_asks_for_the_dtype_of_its_weight_is_quantised_and_runs(tokens):
    model = glm()
    with torch.inference_mode():
        exact = model(tokens, use_cache=False).logits
        w8a8.quantize(model)
        assert "model.layers.0.self_attn.indexer.weights_proj" in dict(quant_linears(model))
        assert relative_error(model(tokens, use_cache=False).logits, exact) < 0.2


def test_mamba_leaves_what_its_fused_paths_read(tokens):
    config = t.MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = t.MambaForCausalLM(config).eval()
    with torch.inference_mode():
        exact = model(tokens).logits
        found = w8a8.quantize(model).coverage
        assert 0 < relative_error(model(tokens).logits, exact) < 0.05
    assert {m.name.rpartition(".")[2] for m in found.quantized} == {"in_proj"}
    left = {m.name.rpartition(".")[2] for m in found.left if "reads its weight" in m.reason}
    assert left == {"x_proj", "dt_proj", "out_proj"}


class TestWeightOfAQuantisedLayer:
    @pytest.fixture
    def layer(self):
        return QuantLinear.from_float(nn.Linear(16, 8, dtype=torch.bfloat16))

    def test_it_tells_what_the_float_weight_told(self, layer):
        weight = layer.weight
        assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, torch.device("cpu"), (8, 16))
        assert (weight.ndim, weight.dim(), weight.numel(), weight.size(1), weight.is_meta) == (2, 2, 128, 16, False)
        assert layer.half().weight.dtype is torch.float16
        assert layer.to("meta").weight.is_meta

    @pytest.mark.parametrize(
        "use",
        [
            lambda x, w: F.linear(x, w),
            lambda x, w: x @ w,
            lambda x, w: w @ x,
            lambda x, w: x * w,
            lambda x, w: torch.cat([w, w]),
            lambda x, w: torch.einsum("bk,nk->bn", x, w),
            lambda x, w: w.float(),
            lambda x, w: w.data,
            lambda x, w: w.t(),
            lambda x, w: x.to(w),
        ],
        ids=lambda use: inspect.getsource(use).strip(", \n"),
    )
    def test_whatever_would_multiply_by_it_is_an_error(self, layer, use):
        with pytest.raises((WeightError, TypeError)):
            use(torch.randn(16, 16), layer.weight)

    def test_the_error_says_what_to_do(self, layer):
        with pytest.raises(WeightError, match=r"handed to linear, .* layer\.dequantized_weight\(\); .* exclude="):
            F.linear(torch.randn(3, 16), layer.weight)
        assert getattr(layer.weight, "_is_hf_initialized", None) is None

    def test_the_state_dict_has_the_codes(self, layer):
        assert torch.equal(layer.state_dict()["weight"], layer.codes)
        assert layer.codes.dtype is torch.int8


def test_a_layer_that_no_forward_called_is_told_by_the_ledger():
    model = Base()
    result = w8a8.quantize(model)
    model(torch.randn(3, 16))
    assert result.uncalled() == ["a", "blocks.0", "blocks.1"]


def test_where_every_layer_is_read_there_is_nothing_to_quantise():
    with pytest.raises(SchemeError, match=r"all 3 linear layers are left out, .*: it is not only called"):
        w8a8.quantize(nn.TransformerEncoderLayer(16, 2, 32))


def test_what_was_read_is_read_anew_where_a_class_gets_another_forward(monkeypatch):
    class Changes(Base):
        pass

    assert "a" in select(Changes()).chosen
    monkeypatch.setattr(Changes, "forward", Reads.forward)
    assert "a" in select(Changes()).reasons
    monkeypatch.undo()
    assert "a" in select(Changes()).chosen

import copy

import pytest
import torch
from torch import nn

import w8a8
from tests import families
from tests.conftest import gpt2, llama, mixtral, needs, opt, relative_error
from w8a8 import kernels
from w8a8.core.scheme import Scheme
from w8a8.dataflow.observing import observe
from w8a8.errors import ModelError, PatternError, SchemeError
from w8a8.layers.linear import QuantLinear, quant_linears
from w8a8.model.coverage import coverage
from w8a8.model.selection import assign, select
from w8a8.model.swapping import build

W8A8 = Scheme.of("w8a8")


def test_every_linear_but_the_head_is_chosen_by_default():
    chosen = select(llama())
    assert len(chosen.chosen) == 14
    assert "lm_head" not in chosen.chosen
    assert chosen.reasons == {
        "lm_head": "the output head stays float by default; 'lm_head' in include, by its name, quantises it"
    }


def test_a_glob_never_takes_the_head_and_its_name_does():
    assert "lm_head" not in select(llama(), include=["*"]).chosen
    assert "lm_head" in select(llama(), include=["*", "lm_head"]).chosen
    assert select(llama(), include=["lm_head"]).chosen == ("lm_head",)


def test_a_tied_weight_is_taken_only_by_name_and_then_reported():
    model = opt()
    plain = select(model)
    assert plain.untied == {}
    assert plain.reasons["lm_head"].startswith("its weight is tied to model.decoder.embed_tokens")
    named = select(model, include=["*", "lm_head"])
    assert named.untied == {"lm_head": "model.decoder.embed_tokens"}


def test_two_linears_that_share_a_weight_are_taken_together():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    found = select(model)
    assert found.chosen == ("0", "1", "2")
    assert found.untied == {}
    codes = [layer.codes for layer in build(model, dict.fromkeys(found.chosen, W8A8)).values()]
    assert torch.equal(codes[0], codes[2])


def test_of_two_linears_that_share_a_weight_none_is_taken_where_one_stays_float():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[3].weight = model[2].weight = model[0].weight
    found = select(model, exclude=["3"])
    assert found.chosen == ("1",)
    assert found.reasons["0"].startswith("its weight is tied to 3, which stays float; '0' in include, by its name")
    assert select(model, include=["*", "0"], exclude=["3"]).untied == {"0": "2"}


def test_a_head_of_another_name_is_known_by_the_model():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.embed_out = nn.Linear(8, 8), nn.Linear(8, 9)

        def get_output_embeddings(self):
            return self.embed_out

    assert select(Model()).chosen == ("body",)


def test_exclude_takes_names_and_globs():
    found = select(llama(), exclude=["*.down_proj", "model.layers.0.self_attn.q_proj"])
    assert len(found.chosen) == 14 - 2 - 1
    assert found.reasons["model.layers.1.mlp.down_proj"] == "excluded by '*.down_proj'"


def test_include_narrows_and_says_so():
    found = select(llama(), include=["*.mlp.*"])
    assert len(found.chosen) == 6
    assert found.reasons["model.layers.0.self_attn.q_proj"] == "not matched by include"


def test_exclude_may_be_for_tables_alone_and_for_both():
    assert select(llama(), exclude=["model.embed_tokens"]).chosen == select(llama()).chosen
    assert not any("layers.0" in name for name in select(llama(), exclude=["model.embed*", "model.[le]*.0.*"]).chosen)


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_lists_the_closest(argument):
    with pytest.raises(PatternError, match=rf"{argument}: 'lm_hed' matches none .* closest: lm_head"):
        select(llama(), **{argument: ["lm_hed"]})


def test_the_name_of_a_container_is_answered_with_a_glob():
    with pytest.raises(PatternError, match=r"a module that holds 7 of them: 'model.layers.0.\*'"):
        select(llama(), exclude=["model.layers.0"])


@pytest.mark.parametrize("asked", [{"include": [3]}, {"exclude": [None]}, {"exclude": 3}, {"scheme": {3: "w8a8"}}])
def test_what_is_no_pattern_is_told_and_the_model_is_not_changed(asked):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    with pytest.raises(PatternError, match=r"a pattern is a string|give a list of patterns"):
        w8a8.quantize(model, **asked)
    assert type(model[0]) is torch.nn.Linear


@pytest.mark.parametrize("scheme", [["w8a8"], 3])
def test_what_names_no_scheme_is_told(scheme):
    with pytest.raises(SchemeError, match="unknown scheme"):
        w8a8.quantize(torch.nn.Sequential(torch.nn.Linear(8, 8)), scheme)


def test_a_string_is_not_a_list_of_patterns():
    with pytest.raises(PatternError, match=r"give a list of patterns: \['lm_head'\]"):
        select(llama(), include="lm_head")


def test_subclasses_and_hooked_layers_are_left_with_their_reason():
    class Special(nn.Linear):
        pass

    class Called(nn.Linear):
        def __call__(self, x):
            return 2 * super().__call__(x)

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), Called(4, 4))
    model[1].register_forward_hook(lambda *_: None)
    found = select(model)
    assert found.chosen == ("0", "2")
    assert "hooks" in found.reasons["1"]
    assert found.reasons["3"] == "Called is a subclass of nn.Linear that is called in another way"


class Matmul(nn.Linear):
    """As Falcon's."""

    def forward(self, input):
        out = input @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(Matmul):
    factor = 1.0

    def forward(self, input):
        return super().forward(input) * self.factor


class Pair(nn.Linear):
    def forward(self, first, second):
        return nn.functional.linear(first + second, self.weight, self.bias)


class Asks(Matmul):
    def forward(self, input):
        assert hasattr(self, "prepared")
        return super().forward(input)


class Extra(Matmul):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.shift = nn.Parameter(torch.zeros(()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_subclass_is_taken_where_its_forward_is_that_of_a_linear_layer(device):
    scaled = Scaled(4, 6)
    scaled.factor = 2.0
    layers = [Matmul(4, 6), Matmul(4, 6, bias=False), Scaled(4, 6), scaled, Pair(4, 6), Extra(4, 6), Asks(4, 6)]
    model = nn.ModuleList(layers).to(device)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    with torch.device(device):  # as transformers has it while it makes a model
        found = select(model)
    assert found.chosen == ("0", "1", "2")
    assert found.reasons == {
        "3": "Scaled is a subclass of nn.Linear that computes something else",
        "4": "Pair is a subclass of nn.Linear that is called in another way (TypeError)",
        "5": "it also has shift, which a swap would drop",
        "6": "Asks is a subclass of nn.Linear that is called in another way (AssertionError)",
    }
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model[0].in_features == 4


@pytest.mark.not_under("inference", reason="Falcon adds in place to what a layer returned in that mode")
def test_falcon_is_quantised_saved_and_loaded(tmp_path):
    model = families.build("falcon")
    with torch.no_grad():
        before = model(**families.inputs("falcon")).logits
        result = w8a8.quantize(model)
        after = model(**families.inputs("falcon")).logits
    assert "transformer.h.0.self_attention.query_key_value" in dict(quant_linears(model))
    assert 0 < relative_error(after, before) < 0.05
    w8a8.save(result.model, tmp_path / "out")
    ids = families.inputs("falcon")
    with torch.no_grad():
        assert torch.equal(w8a8.load(tmp_path / "out")(**ids).logits, after)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.LayerNorm(4)), "Sequential has no nn.Linear and no Conv1D"),
        (nn.Linear(4, 4), "itself one linear layer"),
        (nn.Sequential(QuantLinear.from_float(nn.Linear(4, 4))), "1 layers are quantised already"),
    ],
)
def test_nothing_to_quantise_is_an_error(model, message):
    with pytest.raises(SchemeError, match=message):
        select(model)


def test_everything_excluded_is_an_error_that_names_a_reason():
    with pytest.raises(SchemeError, match=r"all 2 linear layers are left out, 0: excluded by '\*'"):
        select(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), exclude=["*"])


def test_a_pattern_for_quantised_layers_says_so():
    model = nn.Sequential(QuantLinear.from_float(nn.Linear(4, 4)), nn.Linear(4, 4))
    with pytest.raises(PatternError, match="'0' matches only layers that are quantised already"):
        select(model, include=["0"])


def test_conv1d_models_are_walked():
    assert len(select(gpt2()).chosen) == 8


def test_the_router_of_a_mixture_of_experts_is_no_linear():
    assert all("self_attn" in name for name in select(mixtral()).chosen)


def _named_with_brackets():
    model = nn.Sequential()
    for name in ("blk[0]", "blk[1]", "blk0", "a*"):
        model.add_module(name, nn.Linear(8, 8))
    return model


def test_a_pattern_that_is_the_name_of_a_layer_means_that_layer_alone():
    model = _named_with_brackets()
    assert select(model, include=["blk[0]"]).chosen == ("blk[0]",)
    assert select(model, include=["a*"]).chosen == ("a*",)
    found = select(model, exclude=["blk[1]"])
    assert found.chosen == ("blk[0]", "blk0", "a*")
    assert found.reasons == {"blk[1]": "excluded by 'blk[1]'"}


def test_a_pattern_that_is_no_name_is_a_glob():
    model = _named_with_brackets()
    assert select(model, include=["blk[01]"]).chosen == ("blk0",)
    assert select(model, include=["blk*"]).chosen == ("blk[0]", "blk[1]", "blk0")


def test_schemes_by_pattern_know_exact_names_with_brackets():
    model = _named_with_brackets()
    found, schemes = assign(select(model), {"blk[0]": "w8a16", "blk[1]": None, "*": "w8a8"})
    assert {name: scheme.name for name, scheme in schemes.items()} == {"blk[0]": "w8a16", "blk0": "w8a8", "a*": "w8a8"}
    assert found.reasons == {"blk[1]": "left float by the schemes' 'blk[1]'"}


@pytest.mark.parametrize("lazy", [nn.LazyLinear(8), nn.LazyConv1d(4, 3)])
@pytest.mark.parametrize("work", [w8a8.quantize, w8a8.simulate, lambda m: coverage(m, {}), lambda m: observe(m, {})])
def test_a_module_without_shapes_is_named_before_anything_is_done(lazy, work):
    model = nn.Sequential(nn.Linear(8, 8), lazy)
    with pytest.raises(ModelError, match=r"^1 \(Lazy.*without a shape.*call the model once"):
        work(model)
    assert type(model[0]) is nn.Linear


def test_a_lazy_layer_that_has_run_is_quantised():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    x = torch.randn(3, 12)
    model(x)
    assert w8a8.quantize(model).model is model
    assert model[0].in_features == 12


class _TiedNest(nn.Module):
    """Blocks within blocks, all with the first one's matrix."""

    def __init__(self, depth, shared=None):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        if shared is not None:
            self.a.weight = shared
        self.inner = _TiedNest(depth - 1, self.a.weight) if depth else nn.Identity()

    def forward(self, x):
        return self.inner(x + self.b(self.a(self.norm(x)).relu()))


def test_a_deep_nest_of_tied_layers_is_smoothed_quantised_and_copied():
    model, x = _TiedNest(40), torch.randn(5, 8)
    w8a8.quantize(model, calibration=[x], smooth=0.5)
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    assert isinstance(twin.inner.inner.b, QuantLinear)


def test_layers_that_are_tied_and_get_different_schemes_are_told_apart():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    chosen = select(model)
    assert chosen.together == {"0": ("1",), "1": ("0",)}
    assert assign(chosen, "w8a8")[0].untied == {}
    assert assign(chosen, {"0": "w8a8", "1": "w8a8-asym"})[0].untied == {"0": "1", "1": "0"}
    apart = assign(chosen, {"0": "w8a8"})[0]
    assert (apart.untied, apart.together) == ({"0": "1"}, {})


class Elsewhere(torch.Tensor):
    """A weight whose values are another tensor's, as those of torchao and of DTensor are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        bare = [a.inner if isinstance(a, Elsewhere) else a for a in args]
        y = func(*bare, **(kwargs or {}))
        return cls(y) if func is torch.ops.aten.detach.default else y


@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_layer_whose_tensors_are_of_a_subclass_stays_float_and_says_of_which(parameter):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    held = getattr(model[0], parameter).detach()
    setattr(model[0], parameter, nn.Parameter(Elsewhere(held), requires_grad=False))
    x = torch.randn(3, 8)
    reason = rf"its {parameter} is a tests\.model\.test_selection\.Elsewhere, a subclass of torch\.Tensor"
    with pytest.raises(SchemeError, match=reason):
        QuantLinear.from_float(model[0])
    with pytest.raises(SchemeError, match=rf"there is nothing to quantise: .* 0: {reason}"):
        w8a8.quantize(model, "w8a8", include=["0"])
    before = model[0](x)
    result = w8a8.quantize(model, "w8a8")
    assert isinstance(model[1], QuantLinear)
    assert f"{parameter} is a tests.model.test_selection.Elsewhere" in str(result.coverage)
    assert torch.equal(model[0](x), before)


@pytest.mark.parametrize("kernel", [pytest.param(name, marks=needs(name)) for name in kernels.KERNELS])
def test_a_buffer_of_a_subclass_goes_through_the_op(kernel):
    q, x = QuantLinear.from_float(nn.Linear(8, 8), kernel=kernel), torch.randn(3, 8)
    expected = q(x)
    q.weight_scale = Elsewhere(q.weight_scale)
    assert torch.equal(q(x), expected)

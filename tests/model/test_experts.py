"""Stacked experts taken apart: the same function, the same memory, and all or nothing."""

import copy
import pickle

import pytest
import torch
import transformers as t
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import w8a8
from tests.conftest import _MOE, crossed, logits, mixtral, nemotron_h, phimoe, qwen2_moe, qwen3_moe, relative_error
from w8a8.checkpoint.vllm import foresee
from w8a8.errors import CalibrationError, NonFiniteError, PatternError, SchemeError
from w8a8.layers.linear import quant_linears
from w8a8.model.choice import Choice
from w8a8.model.experts import Experts, holds_experts, own_weights, stacks, unstacked
from w8a8.model.selection import select
from w8a8.model.swapping import swap, swapped


def deepseek():
    config = {**_MOE, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 2}
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**config, **latent, topk_group=1)).eval()


def olmoe():
    return t.OlmoeForCausalLM(t.OlmoeConfig(**_MOE, num_experts=4)).eval()


def granite():
    return t.GraniteMoeForCausalLM(t.GraniteMoeConfig(**_MOE, num_local_experts=4)).eval()


def lfm2():
    layers = {"layer_types": ["full_attention", "conv"], "num_dense_layers": 1, "num_experts": 4}
    return t.Lfm2MoeForCausalLM(t.Lfm2MoeConfig(**_MOE, **layers)).eval()


TAKEN = {
    "mixtral": (mixtral, ("w1", "w3", "w2")),
    "qwen3": (qwen3_moe, ("gate_proj", "up_proj", "down_proj")),
    "qwen2": (qwen2_moe, ("gate_proj", "up_proj", "down_proj")),
    "deepseek": (deepseek, ("gate_proj", "up_proj", "down_proj")),
    "olmoe": (olmoe, ("gate_proj", "up_proj", "down_proj")),
    "phimoe": (phimoe, ("w1", "w3", "w2")),
    "granite": (granite, ("gate_proj", "up_proj", "down_proj")),
    "nemotron_h": (nemotron_h, ("up_proj", "down_proj")),  # no gate
    "lfm2": (lfm2, ("w1", "w3", "w2")),  # a function for an activation
}


def held(model):
    return {name: (id(module), type(module)) for name, module in model.named_modules()}


class TestTakingApart:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("family", TAKEN)
    def test_the_model_computes_what_it_did(self, family, dtype, tokens):
        model = TAKEN[family][0]().to(dtype)
        model.set_experts_implementation("eager")
        expected = logits(model, tokens)
        experts, reasons = unstacked(model)
        assert experts
        assert reasons == {}
        with swapped(model, experts):
            found = logits(model, tokens)
        assert relative_error(found.float(), expected.float()) < (1e-6 if dtype is torch.float32 else 1e-2)
        assert torch.equal(logits(model, tokens), expected)

    @pytest.mark.parametrize("family", TAKEN)
    def test_layers_have_the_names_of_the_files(self, family):
        for module in unstacked(TAKEN[family][0]())[0].values():
            assert module.names == TAKEN[family][1]
            assert set(module.names) == {name for name, _ in module.get_submodule("0").named_children()}

    def test_weights_are_the_stacks_own_memory(self):
        model = mixtral()
        stack = model.model.layers[0].mlp.experts
        (experts,) = unstacked(model)[0].values()
        for number in range(4):
            layers = experts.get_submodule(str(number))
            assert torch.equal(torch.cat([layers.w1.weight, layers.w3.weight]), stack.gate_up_proj[number])
            assert layers.w3.weight.data_ptr() == stack.gate_up_proj[number, 40:].data_ptr()
            assert layers.w2.weight.data_ptr() == stack.down_proj[number].data_ptr()

    @pytest.mark.parametrize("place", ["a model on meta", "a default of meta"])
    def test_values_are_not_needed(self, place):
        with torch.device("meta"):
            model = mixtral()
            inside = unstacked(model) if place == "a default of meta" else None
        experts, reasons = inside or unstacked(model)
        assert list(experts) == ["model.layers.0.mlp.experts"]
        assert reasons == {}
        assert all(parameter.is_meta for module in experts.values() for parameter in module.parameters())

    def test_stacks_with_more_experts_than_there_can_be_are_left(self):
        assert list(stacks(mixtral())[0]) == ["model.layers.0.mlp.experts"]
        assert unstacked(mixtral(), at_most=3) == ({}, {})
        assert len(unstacked(mixtral(), at_most=4)[0]) == 1

    def test_an_expert_that_no_token_is_sent_to_is_not_called(self):
        (experts,) = unstacked(mixtral())[0].values()
        calls = []
        for number in range(4):
            layer = experts.get_submodule(f"{number}.w2")
            layer.register_forward_hook(lambda *_, number=number: calls.append(number))
        x, weights = torch.randn(3, 32), torch.rand(3, 2)
        experts(x, torch.tensor([[2, 0], [0, 2], [2, 0]]), weights)
        assert calls == [0, 2]

    @torch.no_grad()
    def test_a_number_beyond_the_experts_is_no_expert(self):
        (experts,) = unstacked(mixtral())[0].values()
        x, weights = torch.randn(2, 32), torch.rand(2, 2)
        both = experts(x, torch.tensor([[1, 3], [4, 4]]), weights)
        assert torch.equal(both[1], torch.zeros(32))
        assert relative_error(both[0], experts(x[:1], torch.tensor([[1, 3]]), weights[:1])[0]) < 1e-6
        assert torch.equal(experts(x, torch.full((2, 2), 4), weights), torch.zeros(2, 32))
        assert experts(x[:0], torch.zeros(0, 2, dtype=torch.int64), weights[:0]).shape == (0, 32)

    def test_float_weights_beside_quantised_ones_leave_the_stack(self):
        (experts,) = unstacked(mixtral())[0].values()
        before = experts.get_submodule("0.w1").weight
        own_weights(experts)
        assert experts.get_submodule("0.w1").weight is before
        swap(experts, {"0.w2": w8a8.QuantLinear.from_float(experts.get_submodule("0.w2"))})
        own_weights(experts)
        after = experts.get_submodule("0.w1").weight
        assert torch.equal(after, before)
        assert after.untyped_storage().nbytes() == after.numel() * 4


class Doubled(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return 2 * super().forward(hidden_states, top_k_index, top_k_weights)


class Clamped(MixtralExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(hidden_states.clamp(-50, 50), top_k_index, top_k_weights)


class Weighed(MixtralExperts):
    def _apply_gate(self, gate_up):
        return gate_up.chunk(2, dim=-1)[1] * self.down_proj.mean()


class Looped(MixtralExperts):
    """Token by token, and as its gate says."""

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for token, x in enumerate(hidden_states):
            for number, weight in zip(top_k_index[token].tolist(), top_k_weights[token], strict=True):
                out[token] += weight * self.expert(number, x)
        return out

    def expert(self, number, x):
        return self.down_proj[number] @ self._apply_gate(self.gate_up_proj[number] @ x)


class Clamping(Looped):
    limit = 0.02

    def _apply_gate(self, gate_up):
        gate, up = gate_up.clamp(max=self.limit).chunk(2, dim=-1)
        return (up + 1) * self.act_fn(gate)


class WithoutActivation(Looped):
    def __init__(self, config):
        super().__init__(config)
        del self.act_fn

    def _apply_gate(self, gate_up):
        gate, up = gate_up.chunk(2, dim=-1)
        return up * nn.functional.silu(gate)


class WithAFunction(Looped):
    def __init__(self, config):
        super().__init__(config)
        del self.act_fn
        self.act_fn = nn.functional.gelu


class Turned(Looped):
    """As Aria's."""

    def __init__(self, config):
        super().__init__(config)
        self.gate_up_proj = nn.Parameter(self.gate_up_proj.detach().mT.contiguous())
        self.down_proj = nn.Parameter(self.down_proj.detach().mT.contiguous())

    def expert(self, number, x):
        return self._apply_gate(x @ self.gate_up_proj[number]) @ self.down_proj[number]


def mixtral_with(kind):
    """A Mixtral whose experts are of this class."""
    model = mixtral()
    for layer in model.model.layers:
        stack = kind(model.config).eval()
        for parameter in stack.parameters():
            nn.init.normal_(parameter, std=0.3)
        layer.mlp.experts = stack
    return model


OTHER_STACKS = [Clamping, WithoutActivation, WithAFunction, Turned]


@pytest.mark.parametrize("kind", OTHER_STACKS)
class TestOtherStacksThatAreTaken:
    def test_the_model_computes_what_it_did(self, kind, tokens):
        model = mixtral_with(kind)
        expected = logits(model, tokens)
        experts, reasons = unstacked(model)
        assert reasons == {}
        with swapped(model, experts):
            assert relative_error(logits(model, tokens), expected) < 1e-5
            again = pickle.loads(pickle.dumps(copy.deepcopy(model)))  # noqa: S301 - made here
            assert torch.equal(logits(again, tokens), logits(model, tokens))

    def test_integers_are_the_simulation_and_are_saved(self, kind, tokens, tmp_path):
        model, simulated = mixtral_with(kind), mixtral_with(kind)
        simulated.load_state_dict(model.state_dict())
        before = logits(model, tokens)
        w8a8.quantize(model)
        w8a8.simulate(simulated)
        after = logits(model, tokens)
        assert torch.equal(after, logits(simulated, tokens))
        assert 0 < relative_error(after, before) < 0.1
        again = mixtral_with(kind)
        w8a8.quantize(again)
        again.load_state_dict(model.state_dict())
        assert torch.equal(logits(again, tokens), after)


class Another(MixtralExperts):
    def __init__(self, config):
        super().__init__(config)
        self.norm = nn.Identity()


class Counting(MixtralExperts):
    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("counts", torch.zeros(4), persistent=False)


class CalledOtherwise(MixtralExperts):
    def forward(self, hidden_states):
        return hidden_states


class Normed(NemotronHExperts):
    def forward(self, hidden_states, top_k_index, top_k_weights):
        return super().forward(nn.functional.normalize(hidden_states), top_k_index, top_k_weights)


class TestLeavingAlone:
    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            (Doubled, r"Doubled computes something else \(relative difference 5\.0e-01"),
            (Clamped, "Clamped computes something else"),
            (Weighed, r"Weighed cannot be called as experts are \(AttributeError: 'Weighed' object has no attribute"),
            (CalledOtherwise, r"CalledOtherwise cannot be called as experts are \(TypeError: .*takes 2 positional arg"),
            (Another, "it also has norm, which would be dropped"),
            (Counting, "it also has counts, which would be dropped"),
        ],
    )
    def test_another_forward(self, kind, message, tokens):
        model = mixtral()
        layer = model.model.layers[0].mlp
        stack = kind(model.config)
        stack.load_state_dict(layer.experts.state_dict())
        layer.experts = stack
        experts, reasons = unstacked(model)
        assert experts == {}
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(reasons["model.layers.0.mlp.experts"])
        told = w8a8.quantize(model).coverage
        assert {m.name for m in told.quantized} == {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
        assert reasons["model.layers.0.mlp.experts"] in {m.reason for m in told.left}

    def test_biases_and_transposed_stacks(self):
        config = {**_MOE, "num_local_experts": 4, "head_dim": 8}
        model = t.GptOssForCausalLM(t.GptOssConfig(**config)).eval()
        experts, reasons = unstacked(model)
        assert experts == {}
        assert "its parameters are down_proj, down_proj_bias" in reasons["model.layers.0.mlp.experts"]
        told = w8a8.quantize(model).coverage
        assert any("not taken apart: its parameters are" in m.reason for m in told.left)

    def test_a_stack_without_a_gate_that_does_something_else(self):
        model = nemotron_h()
        layer = model.model.layers[1].mixer
        layer.experts = Normed(model.config)
        experts, reasons = unstacked(model)
        assert list(experts) == ["model.layers.2.mixer.experts", "model.layers.3.mixer.experts"]
        assert "Normed computes something else" in reasons["model.layers.1.mixer.experts"]

    def test_a_stack_without_a_gate_whose_matrices_do_not_follow_one_another(self):
        model = nemotron_h()
        stack = model.model.layers[1].mixer.experts
        stack.up_proj = nn.Parameter(torch.cat([stack.up_proj, stack.up_proj], 1))
        told = unstacked(model)[1]["model.layers.1.mixer.experts"]
        assert r"up_proj (4, 48, 16) and down_proj (4, 16, 24) are not (E, I, H) and (E, H, I)" in told

    def test_a_stack_with_a_hook(self):
        model = mixtral()
        model.model.layers[0].mlp.experts.register_forward_hook(lambda *_: None)
        assert "it has hooks" in unstacked(model)[1]["model.layers.0.mlp.experts"]

    def test_convolutions_are_no_experts(self):
        assert unstacked(nn.Sequential(nn.Conv1d(2, 2, 3))) == ({}, {})


class TestQuantizing:
    @crossed("family scheme", list(TAKEN), ["w8a8", "w8a8-asym", "w8a8-o1"])
    def test_every_expert_runs_in_integers(self, family, scheme, tokens):
        model = TAKEN[family][0]()
        exact = logits(model, tokens)
        found = w8a8.quantize(model, scheme)
        inside = [name for name, _ in quant_linears(model) if ".experts." in name]
        stacks = sum(isinstance(module, Experts) for module in model.modules())
        assert len(inside) == stacks * 4 * len(TAKEN[family][1])
        assert 0 < relative_error(logits(model, tokens), exact) < 0.03
        ran = [name for name, calls in found.ledger().items() if ".experts." in name and sum(calls.values())]
        assert len(ran) == len(inside)  # the tokens reach all of them
        assert found.coverage.totals()["quantized"].parameters > 0.7 * found.coverage.totals()["all"].parameters

    def test_simulated_experts_give_the_same_bits(self, tokens):
        one, other = qwen3_moe(), qwen3_moe()
        other.load_state_dict(one.state_dict())
        w8a8.quantize(one)
        w8a8.simulate(other)
        assert torch.equal(logits(one, tokens), logits(other, tokens))

    def test_patterns_reach_into_experts(self):
        model = qwen3_moe()
        w8a8.quantize(model, include=["model.layers.1.mlp.experts.2.up_proj", "*.o_proj"])
        assert [name for name, _ in quant_linears(model)] == [
            "model.layers.0.self_attn.o_proj",
            "model.layers.1.self_attn.o_proj",
            "model.layers.1.mlp.experts.2.up_proj",
        ]

    def test_each_pattern_has_its_scheme(self):
        model = qwen3_moe()
        found = w8a8.quantize(model, {"*.experts.*.down_proj": "w8a16", "*.experts.*": "w8a8", "*": None})
        assert {name.rpartition(".")[2]: s.name for name, s in found.schemes.items()} == {
            "gate_proj": "w8a8",
            "up_proj": "w8a8",
            "down_proj": "w8a16",
        }
        assert all(".experts." in name for name in found.schemes)

    @pytest.mark.parametrize("options", [{"exclude": ["*.experts.*"]}, {"scheme": {"*.self_attn.*": "w8a8"}}], ids=str)
    def test_where_none_of_their_layers_is_chosen_experts_stay_stacked(self, options, tokens):
        model = mixtral()
        stack = model.model.layers[0].mlp.experts
        w8a8.quantize(model, **options)
        assert model.model.layers[0].mlp.experts is stack

    def test_routers_stay_float_unless_named(self):
        gate = "model.layers.0.mlp.shared_expert_gate"
        model = qwen2_moe()
        told = w8a8.quantize(model).coverage
        assert "a router stays float by default" in next(m.reason for m in told.left if m.name == gate)
        model = qwen2_moe()
        w8a8.quantize(model, include=["*", gate])
        assert gate in dict(quant_linears(model))
        assert gate in select(qwen2_moe()).chosen  # stacked experts say nothing of what weighs them

    def test_what_is_inside_a_router_is_a_router(self):
        model = qwen2_moe()
        model.model.layers[0].mlp.router = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        told = w8a8.quantize(model).coverage
        reasons = {m.name: m.reason for m in told.left if "router stays float" in m.reason}
        assert "model.layers.0.mlp.router.1" in reasons

    def test_a_static_scheme_names_an_expert_that_saw_no_token_and_leaves_the_model(self, tokens):
        model = mixtral()
        with torch.no_grad():
            model.model.layers[0].mlp.gate.weight.zero_()  # a tie goes to the first experts
        before, exact = held(model), logits(model, tokens)
        with pytest.raises(CalibrationError, match=r"layers read no token .*model\.layers\.0\.mlp\.experts\.\d\.w1"):
            w8a8.quantize(model, "w8a8-static", calibration=tokens, smooth="none")
        assert held(model) == before
        assert torch.equal(logits(model, tokens), exact)

    def test_a_weight_that_is_not_finite_names_the_expert_and_leaves_the_model(self):
        model = mixtral()
        model.model.layers[0].mlp.experts.down_proj.data[2, 5, 7] = torch.nan
        before = held(model)
        with pytest.raises(NonFiniteError) as caught:
            w8a8.quantize(model)
        assert "model.layers.0.mlp.experts.2.w2" in caught.value.explain()
        assert held(model) == before

    def test_a_pattern_that_matches_nothing_leaves_the_model(self):
        model = mixtral()
        before = held(model)
        with pytest.raises(PatternError, match=r"closest: .*experts"):
            w8a8.quantize(model, include=["model.layers.0.mlp.experts.0.w4"])
        assert held(model) == before

    def test_nothing_of_a_stack_is_left_in_memory(self):
        model = mixtral()
        w8a8.quantize(model, exclude=["*.experts.1.*"])
        assert holds_experts(model)
        sizes = {p.untyped_storage().nbytes() for name, p in model.named_parameters() if ".experts." in name}
        assert sizes == {32 * 40 * 4}

    def test_nothing_of_a_stack_that_was_taken_apart_before_is_left_in_memory(self):
        model = mixtral()
        w8a8.unstack_experts_(model)
        w8a8.quantize(model, exclude=["*.experts.1.*"])
        sizes = {p.untyped_storage().nbytes() for name, p in model.named_parameters() if ".experts." in name}
        assert sizes == {32 * 40 * 4}

    def test_quantising_again_says_that_it_is_done(self):
        model = w8a8.quantize(mixtral()).model
        with pytest.raises(SchemeError, match="quantised already"):
            w8a8.quantize(model)

    def test_vllm_takes_all_and_refuses_some(self):
        assert foresee(Choice.of(mixtral())) == ()
        found = foresee(Choice.of(mixtral(), exclude=["*.experts.2.*"]))
        assert [finding.what for finding in found] == ["experts of one layer have different schemes"]
        static = foresee(Choice.of(mixtral(), "w8a8-static"))
        assert any("experts that are not per channel" in finding.what for finding in static)

    def test_taken_apart_before_they_are_measured_and_chosen_by_name(self, tokens):
        one, other = qwen3_moe(), qwen3_moe()
        other.load_state_dict(one.state_dict())
        assert w8a8.unstack_experts_(one) == {}
        found = w8a8.sensitivity(one, tokens.flatten(), windows=1, seq_len=24, include=["*.layers.1.mlp.experts.*"])
        assert len(found.layers) == 12
        w8a8.quantize(one)
        w8a8.quantize(other)
        assert torch.equal(logits(one, tokens), logits(other, tokens))

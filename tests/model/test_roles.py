"""Routers, adapters and heads: told by what they do, and float unless they are named."""

import pytest
import torch
import transformers as t
from torch import nn

import w8a8
from tests.conftest import llama, logits, qwen2_moe, relative_error
from w8a8.layers.linear import QuantLinear, quant_linears
from w8a8.model.selection import select

_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 4}


def switch():
    sparse = {"num_experts": 4, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = t.SwitchTransformersConfig(**_T5, **sparse, decoder_start_token_id=0)
    return t.SwitchTransformersForConditionalGeneration(config).eval()


def nllb():
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40}
    depth = {"encoder_layers": 1, "decoder_layers": 1, "encoder_sparse_step": 1, "decoder_sparse_step": 1}
    config = t.NllbMoeConfig(vocab_size=96, d_model=32, num_experts=4, **heads, **depth)
    return t.NllbMoeForConditionalGeneration(config).eval()


def jetmoe():
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_key_value_heads": 2, "kv_channels": 8}
    config = t.JetMoeConfig(**sizes, intermediate_size=40, num_local_experts=4, num_experts_per_tok=2)
    return t.JetMoeForCausalLM(config).eval()


def longcat():
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    experts = {"moe_topk": 2, "n_routed_experts": 4, "zero_expert_num": 2, "expert_ffn_hidden_size": 24}
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_layers": 1, "num_attention_heads": 4, "ffn_hidden_size": 40}
    return t.LongcatFlashForCausalLM(t.LongcatFlashConfig(**sizes, **latent, **experts)).eval()


ROUTERS = {
    "switch": (switch, "router.classifier"),
    "nllb": (nllb, "router.classifier"),
    "jetmoe": (jetmoe, "router.layer"),
    "longcat": (longcat, "router.classifier"),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("family", ROUTERS)
def test_routers_of_mixtures_stay_float(family, device):
    make, ending = ROUTERS[family]
    with torch.device(device):
        model = make()
    found = select(model)
    routers = [
        name for name, module in model.named_modules() if name.endswith(ending) and isinstance(module, nn.Linear)
    ]
    assert routers
    assert not set(routers) & set(found.chosen)
    others = {name for name, reason in found.reasons.items() if "router" in reason.partition(";")[0]} - set(routers)
    assert others == set()


class Mixture(nn.Module):
    """Two experts of a plain model without a config, and a layer that chooses tokens."""

    def __init__(self, experts=3):
        super().__init__()
        self.weigh = nn.Linear(16, 3)
        self.tokens = nn.Linear(16, 1)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(experts))

    def forward(self, x):
        x = x[self.tokens(x).flatten().topk(4).indices]
        best = self.pick(self.weigh(x).softmax(-1))
        return torch.stack([self.experts[int(e)](row) for e, row in zip(best, x, strict=True)])

    @staticmethod
    def pick(scores):
        return scores.argmax(-1)


def test_a_router_is_known_by_what_it_does_and_taken_by_its_name():
    model = nn.Sequential(Mixture())
    found = select(model)
    assert found.chosen == ("0.tokens", "0.experts.0", "0.experts.1", "0.experts.2")
    assert found.reasons["0.weigh"] == (
        "a router stays float by default (argmax in Mixture.pick); '0.weigh' in include, by its name, quantises it"
    )
    assert "0.weigh" in select(model, include=["*", "0.weigh"]).chosen
    assert "0.weigh" in select(nn.Sequential(Mixture(experts=4))).chosen  # it does not choose among four


def test_the_tokens_go_to_the_experts_that_they_went_to():
    model = Mixture()
    x = torch.randn(9, 16)
    exact = model(x)
    w8a8.quantize(model, include=["experts.*"])
    assert 0 < relative_error(model(x), exact) < 0.05


def test_beside_stacked_experts_the_name_says_it():
    gate = "model.layers.0.mlp.shared_expert_gate"
    told = w8a8.quantize(qwen2_moe()).coverage
    assert next(m.reason for m in told.left if m.name == gate).startswith("a router stays float by default (it lies")


class Lora(nn.Module):
    """As peft wraps a layer: the layer, and beside it a product of low rank."""

    adapter_layer_names = ("lora_A", "lora_B")

    def __init__(self, base_layer, rank=4):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base_layer.out_features, bias=False)})

    def forward(self, x):
        result = self.base_layer(x)
        for name in self.lora_A:
            a, b = self.lora_A[name], self.lora_B[name]
            result = result + b(a(x.to(a.weight.dtype)))
        return result

    def merge(self):
        made = torch.eye(self.base_layer.in_features)
        for name in self.lora_A:
            made = self.lora_B[name](self.lora_A[name](made))
        self.get_base_layer().weight.data += made.t()

    def get_base_layer(self):
        return self.base_layer


def check_adapted(model, ids):
    exact = logits(model, ids)
    found = w8a8.quantize(model).coverage
    assert {name.rpartition(".")[2] for name, _ in quant_linears(model)} >= {"base_layer"}
    adapters = [m for m in found.left if "lora_" in m.name]
    assert len(adapters) == 2 * sum(name.endswith("base_layer") for name, _ in quant_linears(model)) > 0
    assert not any("lora_" in name for name, _ in quant_linears(model))
    assert 0 < relative_error(logits(model, ids), exact) < 0.05


def test_a_wrapper_with_adapters_is_quantised_beneath_them(tokens):
    model = llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Lora(layer.self_attn.q_proj)
        layer.mlp.down_proj = Lora(layer.mlp.down_proj)
    check_adapted(model, tokens)
    assert "an adapter stays float by default" in str(w8a8.quantize(model, include=["*", "lm_head"]).coverage)
    lora = model.model.layers[0].self_attn.q_proj
    assert isinstance(lora.base_layer, QuantLinear)
    with pytest.raises(w8a8.errors.WeightError, match="the weight of a quantised layer is no float tensor"):
        lora.merge()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_model_of_pefts_is_quantised_beneath_its_adapters(tokens):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(llama(), config).eval()
    check_adapted(model, tokens)
    with model.disable_adapter():
        assert logits(model, tokens).isfinite().all()

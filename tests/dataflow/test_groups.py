"""Groups of every family, folded in float64 with random scales: the function stays.  And what must be refused, is."""

import re
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from transformers import GPTNeoXForCausalLM

import w8a8
from tests import conftest
from tests.families import FAMILIES, InDouble, build, inputs
from w8a8.dataflow.groups import Dataflow, Group, observe, probe
from w8a8.errors import ModelError

WIDTH = 12


def at(block: str, groups: Mapping[str, str], **others: str) -> dict[str, str]:
    """A table of groups in which ~ stands for a block, and _ for a dot in the names of `others`."""
    table = {source.replace("~", block): readers.replace("~", block) for source, readers in groups.items()}
    return table | {source.replace("__", "."): readers for source, readers in others.items()}


_QKV = "~.self_attn.q_proj ~.self_attn.k_proj ~.self_attn.v_proj"
_GATED = {"~.self_attn.v_proj": "~.self_attn.o_proj", "~.mlp.up_proj": "~.mlp.down_proj"}
_LLAMA = at(
    "model.layers.*",
    {"~.input_layernorm": _QKV, "~.post_attention_layernorm": "~.mlp.gate_proj ~.mlp.up_proj", **_GATED},
    model__norm="lm_head",
)
_GEMMA = at(
    "model.layers.*",
    {"~.input_layernorm": _QKV, "~.pre_feedforward_layernorm": "~.mlp.gate_proj ~.mlp.up_proj", **_GATED},
    model__norm="lm_head",
)
_NEOX_HEAD = next(iter(GPTNeoXForCausalLM._tied_weights_keys)).removesuffix(".weight")  # transformers 5.14 renamed it
_NEOX = at(
    "gpt_neox.layers.*",
    {
        "~.input_layernorm": "~.attention.query_key_value",
        "~.attention.query_key_value": "~.attention.dense",
        "~.post_attention_layernorm": "~.mlp.dense_h_to_4h",
    },
    gpt_neox__final_layer_norm=_NEOX_HEAD,
)
_BLOOM = at(
    "transformer.h.*",
    {
        "~.input_layernorm": "~.self_attention.query_key_value",
        "~.self_attention.query_key_value": "~.self_attention.dense",
        "~.post_attention_layernorm": "~.mlp.dense_h_to_4h",
    },
)
_OPT_LAYER = {"~.self_attn.v_proj": "~.self_attn.out_proj", "~.fc1": "~.fc2"}
_WHISPER_LAYER = {
    "~.self_attn_layer_norm": _QKV,
    "~.self_attn.v_proj": "~.self_attn.out_proj",
    "~.final_layer_norm": "~.fc1",
}
_T5_ATTENTION = {
    "~.layer.0.layer_norm": "~.layer.0.SelfAttention.q ~.layer.0.SelfAttention.k ~.layer.0.SelfAttention.v",
    "~.layer.0.SelfAttention.v": "~.layer.0.SelfAttention.o",
}
_T5_CROSS = {
    "~.layer.1.layer_norm": "~.layer.1.EncDecAttention.q",
    "~.layer.1.EncDecAttention.v": "~.layer.1.EncDecAttention.o",
}


def _t5_mlp(layer: int, readers: str, last: str) -> dict[str, str]:
    mlp = f"~.layer.{layer}.DenseReluDense"
    return {
        f"~.layer.{layer}.layer_norm": " ".join(f"{mlp}.{name}" for name in readers.split()),
        f"{mlp}.{last}": f"{mlp}.wo",
    }


def _t5(readers: str, last: str) -> dict[str, str]:
    encoder = at("encoder.block.*", {**_T5_ATTENTION, **_t5_mlp(1, readers, last)})
    return encoder | at("decoder.block.*", {**_T5_ATTENTION, **_T5_CROSS, **_t5_mlp(2, readers, last)})


GROUPS: dict[str, dict[str, str]] = {
    "opt": at(
        "model.decoder.layers.*",
        {"~.self_attn_layer_norm": _QKV, "~.final_layer_norm": "~.fc1", **_OPT_LAYER},
        model__decoder__final_layer_norm="lm_head",
    ),
    "opt-post-norm": at(
        "model.decoder.layers.*",
        {**_OPT_LAYER, "~.final_layer_norm": "model.decoder.project_out"},
        model__decoder__project_out="lm_head",
    ),
    "gpt2": at(
        "transformer.h.*",
        {"~.ln_1": "~.attn.c_attn", "~.attn.c_attn": "~.attn.c_proj", "~.ln_2": "~.mlp.c_fc"},
        transformer__ln_f="lm_head",
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": at(
        "model.layers.*",
        {
            "~.input_layernorm": "~.self_attn.qkv_proj",
            "~.self_attn.qkv_proj": "~.self_attn.o_proj",
            "~.post_attention_layernorm": "~.mlp.gate_up_proj",
            "~.mlp.gate_up_proj": "~.mlp.down_proj",
        },
        model__norm="lm_head",
    ),
    "gpt-neox": _NEOX,
    "gpt-neox-serial": _NEOX,
    "falcon": at(
        "transformer.h.*",
        {
            "~.input_layernorm": "~.self_attention.query_key_value ~.mlp.dense_h_to_4h",
            "~.self_attention.query_key_value": "~.self_attention.dense",
        },
        transformer__ln_f="lm_head",
    ),
    "falcon-new": at(
        "transformer.h.*",
        {
            "~.ln_attn": "~.self_attention.query_key_value",
            "~.ln_mlp": "~.mlp.dense_h_to_4h",
            "~.self_attention.query_key_value": "~.self_attention.dense",
        },
        transformer__ln_f="lm_head",
    ),
    "falcon-alibi": _BLOOM | {"transformer.ln_f": "lm_head"},
    "cohere": at(
        "model.layers.*",
        {"~.input_layernorm": f"{_QKV} ~.mlp.gate_proj ~.mlp.up_proj", **_GATED},
        model__norm="lm_head",
    ),
    "bloom": _BLOOM,
    "mixtral": at(
        "model.layers.*",
        {
            "~.input_layernorm": _QKV,
            "~.self_attn.v_proj": "~.self_attn.o_proj",
            "~.post_attention_layernorm": "~.mlp.gate ~.mlp.experts",
            "~.mlp.experts": "~.mlp.experts",
        },
        model__norm="lm_head",
    ),
    "bert": at(
        "bert.encoder.layer.*",
        {
            "~.attention.self.value": "~.attention.output.dense",
            "~.output.LayerNorm": "cls.predictions.transform.dense",  # of the last layer, whose output has no residual
        },
    ),
    "t5": _t5("wi", "wi"),
    "t5-gated": _t5("wi_0 wi_1", "wi_1"),
    "whisper": at("model.encoder.layers.*", _WHISPER_LAYER)
    | at(
        "model.decoder.layers.*",
        {
            **_WHISPER_LAYER,
            "~.encoder_attn_layer_norm": "~.encoder_attn.q_proj",
            "~.encoder_attn.v_proj": "~.encoder_attn.out_proj",
        },
    ),
    "vit": at(
        "vit.layers.*",
        {
            "~.layernorm_before": "~.attention.q_proj ~.attention.k_proj ~.attention.v_proj",
            "~.attention.v_proj": "~.attention.o_proj",
            "~.layernorm_after": "~.mlp.fc1",
        },
        vit__layernorm="classifier",
    ),
}
"""What can be folded in each family: source, and its readers in the order of the forward; * is a layer's number."""

_RESIDUAL = "as a residual is"
REASONS: dict[str, dict[str, str]] = {
    "opt": {"model.decoder.layers.*.self_attn.q_proj": "attention scores are made of it"},
    "opt-post-norm": {"model.decoder.layers.*.self_attn_layer_norm": _RESIDUAL},
    "gpt2": {"transformer.h.*.mlp.c_fc": "a power (of a norm or an activation function) reads it"},
    "llama": {
        "model.layers.*.self_attn.q_proj": "rotary embeddings",
        "model.layers.*.mlp.gate_proj": "SiLU reads it in model.layers.*.mlp.act_fn",
        "lm_head": "it is an output of the model",
    },
    "qwen3": {"model.layers.*.self_attn.k_norm": "rotary embeddings"},
    "gemma3": {"model.layers.*.post_attention_layernorm": f"{_RESIDUAL}) in model.layers.*"},
    "gemma2": {"lm_head": "tanh reads it in the model's own forward"},
    "gpt-neox": {"gpt_neox.layers.*.mlp.dense_h_to_4h": "GELU reads it in gpt_neox.layers.*.mlp.act"},
    "bloom": {
        "transformer.h.*.mlp.dense_h_to_4h": "it is multiplied by itself",
        "transformer.ln_f": "the weight of lm_head is tied to transformer.word_embeddings",
        "transformer.word_embeddings_layernorm": "a LayerNorm reads it in transformer.h.*.input_layernorm",
    },
    "mixtral": {"model.layers.*.mlp.gate": "softmax reads it"},
    "bert": {"bert.embeddings.LayerNorm": _RESIDUAL, "bert.encoder.layer.*.attention.output.LayerNorm": _RESIDUAL},
    "t5": {
        "encoder.final_layer_norm": "it is an output of the model",
        "decoder.final_layer_norm": "the weight of lm_head is tied to shared",
    },
    "whisper": {"model.encoder.layers.*.fc1": "GELU", "model.encoder.layer_norm": "it is an output of the model"},
    "vit": {"vit.layers.*.mlp.fc1": "GELU"},
}
"""Who is to blame for what is refused."""


def collapsed(name: str) -> str:
    """The number of the layer as *."""
    return re.sub(r"\.\d+(?=\.|\b)", ".*", name, count=1)


def pairs(flow: Dataflow) -> dict[str, list[str]]:
    return {group.source.module: [reader.module for reader in group.readers] for group in flow.groups}


def reasons(flow: Dataflow) -> dict[str, str]:
    return {refusal.source.module: refusal.reason for refusal in flow.refused}


def fold(model: nn.Module, groups: tuple[Group, ...], *, read: bool = True) -> None:
    """Scale the groups' channels by random numbers in [0.25, 4]; without `read` nobody takes the scale back."""
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(3)

    def along(values: Tensor, tensor: Tensor, dim: int) -> Tensor:
        return values.to(tensor.dtype).reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])

    with torch.no_grad():
        for group in groups:
            scales = 4.0 ** (2 * torch.rand(group.source.channels, dtype=torch.float64, generator=generator) - 1)
            scales[~group.scalable] = 1.0
            for scaled in group.source.parameters:
                p = parameters[scaled.name]
                p.copy_((p + scaled.offset) / along(scales, p, scaled.dim) - scaled.offset)
            for reader in group.readers if read else ():
                p = parameters[reader.parameter]
                columns = torch.where(reader.channels < 0, 1.0, scales[reader.channels.clamp(min=0)])
                p.mul_(along(columns, p, reader.dim))


def run(model: nn.Module, given: Any) -> list[Tensor]:
    """All the floats that the model returns, computed in float64."""
    with torch.no_grad(), InDouble():
        out = model(**given) if isinstance(given, dict) else model(given)
    return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest relative norm of a change."""
    return max(float((a - b).norm() / b.norm()) for b, a in zip(before, after, strict=True))


def assert_folds(model: nn.Module, given: Any, flow: Dataflow) -> None:
    before = run(model, given)
    fold(model, flow.groups)
    assert difference(before, run(model, given)) < 1e-9


def test_every_family_has_its_table():
    assert set(GROUPS) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_every_group_of_a_family_keeps_its_float64_function(name):
    model, given = build(name), inputs(name)
    before, flow = run(model, given), observe(model, given)
    fold(model, flow.groups)
    assert difference(before, run(model, given)) < 1e-9
    assert flow.unread == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_folding_the_sources_alone_changes_it(name):
    model, given = build(name), inputs(name)
    before = run(model, given)
    fold(model, observe(model, given).groups, read=False)
    assert difference(before, run(model, given)) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_the_groups_of_a_family_are_those_of_the_table(name):
    flow = observe(build(name), inputs(name))
    found = {collapsed(source): " ".join(map(collapsed, readers)) for source, readers in pairs(flow).items()}
    assert found == GROUPS[name]
    once = {"lm_head", _NEOX_HEAD, "classifier", "model.decoder.project_out", "cls.predictions.transform.dense"}
    for source, readers in found.items():
        count = sum(collapsed(group.source.module) == source for group in flow.groups)
        assert count == (1 if readers in once else 2), source


@pytest.mark.parametrize("name", REASONS)
def test_a_refusal_names_the_culprit(name):
    told = {
        collapsed(source): collapsed(reason) for source, reason in reasons(observe(build(name), inputs(name))).items()
    }
    for source, reason in REASONS[name].items():
        assert reason in told[source]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_and_linear_that_ran_is_in_a_group_or_refused(name):
    model = build(name)
    flow = observe(model, inputs(name))
    told = {entry.source.module for entry in (*flow.groups, *flow.refused)}
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    norms = {n for n, m in model.named_modules() if "norm" in type(m).__name__.lower()}
    assert linears | norms <= told


@pytest.mark.parametrize("name", ["opt", "gpt2", "llama", "gemma3", "phi3", "falcon-new", "whisper", "bert"])
def test_fused_and_eager_attention_show_the_same_groups(name):
    flows = [observe(build(name, attention=kind), inputs(name)) for kind in ("eager", "sdpa")]
    assert pairs(flows[0]) == pairs(flows[1])
    assert reasons(flows[0]).keys() == reasons(flows[1]).keys()


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "mixtral", "t5"])
def test_a_bfloat16_model_shows_the_groups_of_its_float64_twin(name):
    flow = observe(build(name, dtype=torch.bfloat16), inputs(name, dtype=torch.bfloat16))
    assert pairs(flow) == pairs(observe(build(name), inputs(name)))


@pytest.mark.parametrize("kind", ["eager", "batched_mm", "grouped_mm"])
def test_fused_experts_are_seen_however_they_are_computed(kind):
    model = build("mixtral", dtype=torch.float32)
    model.set_experts_implementation(kind)
    flow = observe(model, inputs("mixtral"))
    assert pairs(flow) == pairs(observe(build("mixtral"), inputs("mixtral")))
    (experts,) = [g for g in flow.groups if g.source.module == "model.layers.1.mlp.experts"]
    assert [(p.name.rpartition(".")[2], p.dim) for p in experts.source.parameters] == [("gate_up_proj", 1)]
    assert [(r.parameter.rpartition(".")[2], r.dim) for r in experts.readers] == [("down_proj", 2)]
    assert experts.readers[0].channels.tolist() == list(range(40, 80))


def test_channels_offsets_and_blocks_are_exact():
    flow = observe(build("llama"), inputs("llama"))
    norm, value, _, up, *_ = flow.groups
    assert (norm.source.kind, norm.source.channels, norm.block) == ("norm", 32, "model.layers.0")
    assert norm.readers[0].parameter == "model.layers.0.self_attn.q_proj.weight"
    assert all(r.dim == 1 and r.channels.tolist() == list(range(32)) for r in norm.readers)
    heads = [list(range(8)), list(range(8, 16))]  # each of the two key-value heads serves two query heads
    assert value.readers[0].channels.tolist() == heads[0] + heads[0] + heads[1] + heads[1]
    assert (value.block, up.block) == ("model.layers.0.self_attn", "model.layers.0.mlp")
    assert flow.groups[-1].block == ""
    gemma = observe(build("gemma3"), inputs("gemma3"))
    assert gemma.groups[0].source.parameters[0].offset == 1.0
    conv1d = observe(build("gpt2"), inputs("gpt2")).groups[1]
    assert [(p.name.rpartition(".")[2], p.dim) for p in conv1d.source.parameters] == [("weight", 1), ("bias", 0)]
    assert conv1d.readers[0].dim == 0
    assert conv1d.readers[0].channels.tolist() == list(range(64, 96))
    assert conv1d.scalable.tolist() == [False] * 64 + [True] * 32


def test_interleaved_heads_are_followed_through_their_views():
    bloom = observe(build("bloom"), inputs("bloom")).groups[1]
    values = [head * 24 + 16 + i for head in range(4) for i in range(8)]  # (head, q k v, 8)
    assert bloom.readers[0].channels.tolist() == values


class Net(nn.Module):
    """Two norms' worth of building blocks, and a forward that a test gives."""

    def __init__(self, forward: Any, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = forward
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def linear(rows: int = WIDTH, columns: int = WIDTH) -> nn.Linear:
    return nn.Linear(columns, rows)


def rows() -> Tensor:
    return torch.randn(2, 5, WIDTH, dtype=torch.float64)


class Gain(nn.Module):
    def __init__(self, value: float = 1.0, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class Normed(nn.Module):
    """A LayerNorm by hand that stores weight - 1, with its bias added afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(WIDTH))
        self.shift = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-5)
        return (1 + self.gain) * x + self.shift


def test_a_sequential_and_a_tensor_are_enough():
    model = nn.Sequential(linear(20), nn.ReLU(), nn.Dropout(0.5), linear(8, 20), nn.GELU(), linear(WIDTH, 8)).double()
    flow = observe(model, rows())
    assert pairs(flow) == {"0": ["3"]}
    assert reasons(flow) == {"3": "GELU reads it in 4", "5": "it is an output of the model"}
    assert_folds(model.eval(), rows(), flow)
    assert flow.groups[0].block == ""


def test_a_hand_made_norm_has_its_offset_and_its_bias():
    model = Net(lambda m, x: m.read(m.norm(x)), norm=Normed(), read=linear())
    flow = observe(model, rows())
    (group,) = flow.groups
    assert [(p.name, p.dim, p.offset) for p in group.source.parameters] == [
        ("norm.gain", 0, 1.0),
        ("norm.shift", 0, 0.0),
    ]
    assert_folds(model, rows(), flow)


@pytest.mark.parametrize("norm", [lambda: nn.RMSNorm(WIDTH), lambda: nn.LayerNorm(WIDTH), lambda: Gain()])
def test_torchs_norms_and_a_plain_gain_are_sources(norm):
    model = Net(lambda m, x: m.read(m.norm(x).transpose(0, 1)), norm=norm(), read=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"norm": ["read"]}
    assert_folds(model, rows(), flow)


def test_torchs_own_encoder_layer_folds():
    model = nn.TransformerEncoderLayer(WIDTH, 3, 20, batch_first=True, norm_first=True).double().eval()
    flow = observe(model, rows())
    assert pairs(flow)["norm2"] == ["linear1"]
    assert pairs(flow)["linear1"] == ["linear2"]
    assert pairs(flow)["norm1"] == ["self_attn"]
    assert pairs(flow)["self_attn"] == ["self_attn.out_proj"]
    assert_folds(model, rows(), flow)


def test_of_two_factors_the_later_one_is_scaled():
    model = Net(lambda m, x: m.down(F.relu(m.gate(x)) * m.up(x)), gate=linear(), up=linear(), down=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"up": ["down"]}
    assert reasons(flow)["gate"] == "down is scaled by up already, which is multiplied with it"
    assert_folds(model, rows(), flow)


def test_a_module_called_twice_alike_is_one_reader_and_one_source():
    model = Net(lambda m, x: m.read(m.norm(x)) + m.read(m.norm(2 * x + 1)), norm=nn.LayerNorm(WIDTH), read=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"norm": ["read"]}
    assert_folds(model, rows(), flow)


def test_a_reader_that_reads_something_else_too_is_refused():
    model = Net(lambda m, x: m.read(m.norm(x)) + m.read(x), norm=nn.LayerNorm(WIDTH), read=linear())
    flow = observe(model, rows())
    assert flow.groups == ()
    assert reasons(flow)["norm"] == "read is called again with something else"
    model = Net(lambda m, x: m.read(m.norm(x)) + m.read(m.norm(x).flip(-1)), norm=nn.LayerNorm(WIDTH), read=linear())
    assert reasons(observe(model, rows()))["norm"] == "read is called again with other channels of it"


def test_a_source_that_goes_on_in_a_second_block_has_both_blocks_readers():
    first, second = (Net(lambda m, x: m.inner(x), inner=linear()) for _ in range(2))
    model = Net(
        lambda m, x: (lambda y: x + m.first(y) + m.second(y))(m.norm(x)),
        norm=nn.LayerNorm(WIDTH),
        first=first,
        second=second,
    )
    flow = observe(model, rows())
    assert pairs(flow) == {"norm": ["first.inner", "second.inner"]}
    assert_folds(model, rows(), flow)


def test_a_tied_head_is_refused():
    model = conftest.llama(tie_word_embeddings=True)
    told = reasons(observe(model, {"input_ids": torch.arange(3, 20)[None]}))
    assert told["model.norm"] == "the weight of lm_head is tied to model.embed_tokens"


def test_a_gain_that_is_used_elsewhere_is_refused():
    model = Net(lambda m, x: m.read(m.norm(x)) * m.norm.weight.sum(), norm=Gain(), read=linear())
    assert reasons(observe(model, rows()))["norm"] == (
        "its parameter norm.weight is also used by sum in the model's own forward"
    )


def test_a_weight_that_is_used_elsewhere_is_refused_as_reader():
    model = Net(lambda m, x: m.read(m.norm(x)) * m.read.weight.norm(), norm=Gain(), read=linear())
    assert "read.weight that reads it is also used by linalg_vector_norm" in reasons(observe(model, rows()))["norm"]


def test_a_part_of_a_weight_is_no_reader():
    model = Net(lambda m, x: F.linear(m.norm(x), m.read.weight[:4]), norm=Gain(), read=linear())
    flow = observe(model, rows())
    assert flow.groups == ()
    assert "the matrix product with another tensor" in reasons(flow)["norm"]


def test_parameters_that_share_memory_are_refused():
    model = Net(lambda m, x: m.b(m.norm(m.a(x))), a=linear(), norm=Gain(), b=linear())
    model.b.weight = nn.Parameter(model.a.weight.data)
    flow = observe(model, rows())
    assert flow.groups == ()
    assert "whose memory it shares" in reasons(flow)["norm"]


class Experts(nn.Module):
    """A mixture of experts as modules, of which each token takes the one that its first feature says."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.experts = nn.ModuleList(linear() for _ in range(3))

    def forward(self, x: Tensor, pick: Tensor) -> Tensor:
        y, out = self.norm(x), torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            if bool((pick == i).any()):
                out[pick == i] = expert(y[pick == i])
        return out


def test_an_expert_that_got_no_token_refuses_what_it_may_read():
    model = Experts().double().eval()
    x = torch.randn(6, WIDTH, dtype=torch.float64)
    flow = observe(model, {"x": x, "pick": torch.tensor([0, 1, 0, 1, 0, 1])})
    assert flow.unread == ("experts.2",)
    assert flow.groups == ()
    assert reasons(flow)["norm"] == (
        "experts.2 was not reached by this forward and may read it too: give inputs with more tokens"
    )
    every = {"x": x, "pick": torch.tensor([0, 1, 2, 2, 1, 0])}
    flow = observe(model, every)
    assert pairs(flow) == {"norm": ["experts.0", "experts.1", "experts.2"]}
    assert_folds(model, every, flow)


def in_place(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x).relu_()
    y *= x.sigmoid()
    return m.read(y)


def written_through_a_view(m: Any, x: Tensor) -> Tensor:
    room = torch.zeros(2, 5, 2 * WIDTH, dtype=x.dtype)
    room[..., :WIDTH] = m.norm(x)
    return m.read(room[..., :WIDTH])


def overwritten(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    head = y[:, :2]
    head += 1
    return m.read(y)


def added_to(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    z = m.read(y)
    y += x
    return z + y


def erased(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    z = m.read(y)
    y.zero_()
    y += x
    return z + y


def viewed_as_complex(m: Any, x: Tensor) -> Tensor:
    y = m.norm(x)
    return m.read(y) + torch.view_as_complex(y.view(2, 5, -1, 2)).abs().sum()


@pytest.mark.parametrize(
    ("forward", "folds"),
    [
        (in_place, True),
        (written_through_a_view, True),
        (erased, True),
        (overwritten, False),
        (added_to, False),
        (viewed_as_complex, False),
        (lambda m, x: m.read(m.norm(x).masked_fill(x > 0, 0.0)), True),
        (lambda m, x: m.read(m.norm(x).masked_fill(x > 0, 0.5)), False),
        (lambda m, x: m.read(torch.where(x > 0, m.norm(x), 0.0)), True),
        (lambda m, x: m.read(torch.where(x > 0, m.norm(x), x)), False),
        (lambda m, x: m.read(F.pad(m.norm(x), (0, 0, 1, 1))[:, 1:-1]), True),
        (lambda m, x: m.read(F.pad(m.norm(x), (0, 0, 1, 1))), False),
        (lambda m, x: m.read(F.leaky_relu(-m.norm(x)).abs() / 3), True),
        (lambda m, x: m.read(torch.div(m.norm(x), 3, rounding_mode="floor")), False),
        (lambda m, x: m.read(m.norm(x).roll(2, -1)), True),
        (lambda m, x: m.read(m.norm(x) + m.norm(x).neg() * 0.5), True),
        (lambda m, x: m.read(m.norm(x) + m.norm(x).roll(1, -1)), False),
        (lambda m, x: m.read(m.norm(x).mean(1)), True),
        (lambda m, x: m.read(m.norm(x).amax(1)), True),
        (lambda m, x: m.read(m.norm(x) - m.norm(x).mean(-1, keepdim=True)), False),
        (lambda m, x: m.read((x @ x.mT).softmax(-1) @ m.norm(x)), True),
        (lambda m, x: m.read((m.norm(x) @ x.mT).softmax(-1) @ m.norm(x)), False),
        (lambda m, x: m.read(torch.stack(m.norm(x).unbind(1), 1).repeat(1, 2, 1)), True),
        (lambda m, x: m.read(m.norm(x)[:, torch.tensor([3, 0, 0])].contiguous()), True),
        (lambda m, x: m.read(m.norm(x).clamp(max=1.0)), False),
        (lambda m, x: m.read(m.norm(x).to(torch.int32).to(x.dtype)), False),
        (lambda m, x: m.read(m.norm(x) * m.norm(x)), False),
        (lambda m, x: m.read(1 / m.norm(x)), False),
        (lambda m, x: m.read(x / m.norm(x)), False),
        (lambda m, x: torch.addmm(m.norm(x)[0], x[0], m.read.weight) + m.read(m.norm(x)[0]), False),
        (lambda m, x: torch.einsum("btk,nk->btn", m.norm(x), m.read.weight), True),
        (lambda m, x: m.read(m.norm(x).view(2, 5, 3, 4).transpose(1, 2).reshape(6, 5, 4).view(2, 3, 5, 4)
                             .transpose(1, 2).reshape(2, 5, WIDTH)), True),
        (lambda m, x: (m.read(m.norm(x)), float(m.norm(x).sum()))[0], False),
        (lambda m, x: m.read(m.norm(x)) * torch.zeros_like(m.norm(x)).cos() * m.norm(x).sign(), True),
    ],
)  # fmt: skip
def test_what_commutes_folds_and_what_does_not_is_refused(forward, folds):
    model = Net(forward, norm=Gain(), read=linear())
    flow = observe(model, rows())
    assert ("norm" in pairs(flow)) == folds
    assert ("norm" in reasons(flow)) == (not folds)
    assert_folds(model, rows(), flow)


STEPS: dict[str, Any] = {
    "read": lambda m, a, b: m.parts["read"](a),
    "make": lambda m, a, b: m.parts["make"](a),
    "norm": lambda m, a, b: m.parts["norm"](a),
    "gain": lambda m, a, b: m.parts["gain"](a),
    "offset": lambda m, a, b: m.parts["offset"](a),
    "relu": lambda m, a, b: F.relu(a),
    "gelu": lambda m, a, b: F.gelu(a),
    "add": lambda m, a, b: a + b,
    "multiply": lambda m, a, b: a * b,
    "gate": lambda m, a, b: a * b.sigmoid(),
    "halves": lambda m, a, b: torch.cat(a.chunk(2, -1)[::-1], -1),
    "splice": lambda m, a, b: torch.cat([a[..., :6], b[..., 6:]], -1),
    "heads": lambda m, a, b: a.view(2, 5, 3, 4).transpose(2, 3).reshape(2, 5, WIDTH),
    "tokens": lambda m, a, b: a.flip(1),
    "attend": lambda m, a, b: (b @ b.mT).softmax(-1) @ a,
    "in place": lambda m, a, b: a.clone().mul_(2).add_(b),
    "through a view": lambda m, a, b: _written(a, b),
    "mean": lambda m, a, b: a.mean(1, keepdim=True).expand_as(a),
    "select": lambda m, a, b: torch.where(b > 0, a, 0.0),
}


def _written(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, :2] = b[:, :2]
    return a


class Program(nn.Module):
    """A random program over tensors of one shape; what nobody reads is read by the head."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        names = [*STEPS, *4 * ("relu", "gate", "halves", "heads", "tokens", "attend", "select", "mean")]

        def draw(n: int) -> int:
            return int(torch.randint(n, (1,), generator=generator))

        first = ("make", "norm", "gain", "offset")[draw(4)]
        self.steps = [(first, 0, 0)] + [(names[draw(len(names))], i + draw(2), draw(i + 2)) for i in range(4)]
        parts = {"norm": nn.LayerNorm(WIDTH), "gain": Gain(), "offset": Normed(), "read": linear(), "make": linear()}
        self.parts = nn.ModuleDict({name: parts[name] for name, _, _ in self.steps if name in parts})
        self.head = linear(4)

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for name, a, b in self.steps:
            values.append(STEPS[name](self, values[a], values[b]))
        return self.head(values[-1])


def test_whatever_a_program_does_its_groups_fold():
    folded = 0
    for seed in range(200):
        model = Net(lambda m, x: m.program(x), program=Program(seed))
        flow = observe(model, rows())
        folded += len(flow.groups)
        assert_folds(model, rows(), flow)
    assert folded > 50


def test_a_layer_scale_takes_the_place_of_its_linear():
    model = Net(lambda m, x: m.read(m.scale(m.make(x))), make=linear(), scale=Gain(0.1), read=linear())
    flow = observe(model, rows())
    assert pairs(flow) == {"scale": ["read"]}
    assert "is scaled by scale already" in reasons(flow)["make"]
    assert_folds(model, rows(), flow)


def test_what_a_hook_keeps_is_refused():
    model = Net(lambda m, x: m.read(m.norm(x)), norm=Gain(), read=linear())
    kept = []
    model.norm.register_forward_hook(lambda _, __, out: kept.append(out))
    assert reasons(observe(model, rows()))["norm"] == "it outlives the forward, in a cache or a hook of the model"


def test_a_quantised_layer_is_no_reader():
    model = nn.Sequential(nn.LayerNorm(WIDTH), linear())
    w8a8.quantize(model)
    for simulated in (False, True):
        if simulated:
            model = nn.Sequential(nn.LayerNorm(WIDTH), linear())
            w8a8.simulate(model)
        told = reasons(observe(model, rows().float()))
        assert "a quantised layer, whose weight cannot be rescaled (fold before quantising), reads it in 1" in told["0"]


def test_the_model_is_left_as_it_was():
    model = build("llama")
    model.train()
    model.model.layers[0].eval()
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    flags = [module.training for module in model.modules()]
    observe(model, inputs("llama"))
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, bits[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_hooks_and_flags_are_put_back_after_an_exception():
    def fails(m: Any, x: Tensor) -> Tensor:
        m.norm(x)
        raise KeyError("of the model's own")

    model = Net(fails, norm=Gain(), read=linear()).train()
    with pytest.raises(KeyError, match="of the model's own"):
        observe(model, rows())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_caller_in_inference_mode_sees_the_same():
    with torch.inference_mode():
        flow = observe(build("llama"), inputs("llama"))
    assert pairs(flow) == pairs(observe(build("llama"), inputs("llama")))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        ("llama", {}, "expected a torch.nn.Module to observe, found str"),
        (linear(), [1, 2], "expected a mapping of the forward's arguments or a tensor, found list"),
        (nn.Linear(2, 2, device="meta"), torch.ones(2), "2 parameters are on the meta device, weight first"),
    ],
)
def test_what_cannot_be_observed_is_told(model, given, message):
    with pytest.raises(ModelError, match=re.escape(message)):
        observe(model, given)


def test_a_probe_fits_the_model_and_others_are_told_to_bring_inputs():
    ids = probe(conftest.llama(), tokens=7)["input_ids"]
    assert ids.shape == (2, 7)
    assert torch.equal(ids, probe(conftest.llama(), tokens=7)["input_ids"])
    assert probe(conftest.llama(max_position_embeddings=16))["input_ids"].shape == (2, 16)
    assert set(probe(build("t5"))) == {"input_ids", "decoder_input_ids"}
    with pytest.raises(ModelError, match="ViTForImageClassification takes pixel_values"):
        probe(build("vit"))
    with pytest.raises(ModelError, match="Linear takes an unknown input"):
        probe(linear())

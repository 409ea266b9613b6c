"""Groups of every family: those of the tables below, and folded with random scales the function stays."""

import re
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from transformers import GPTNeoXForCausalLM

from tests.dataflow.conftest import difference, fold, pairs, reasons, run
from tests.families import FAMILIES, build, inputs
from w8a8.dataflow.observing import observe


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

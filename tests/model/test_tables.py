"""Which lookup tables become int8, which do not and why, and what becomes of ties."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertModel,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

import w8a8
from tests.conftest import llama, opt
from w8a8 import QuantEmbedding
from w8a8.errors import ModelError, NonFiniteError
from w8a8.layers.embedding import TABLE
from w8a8.layers.weights import make_weight

IDS = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def bert(kind=BertModel):
    return kind(BertConfig(**SMALL, max_position_embeddings=16)).eval()


def bart():
    sizes = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    wide = {f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")}
    config = BartConfig(vocab_size=64, d_model=32, max_position_embeddings=16, **sizes, **wide)
    return BartForConditionalGeneration(config).eval()


def t5():
    return T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2))


class Around(nn.Module):
    """A table beside a linear layer."""

    def __init__(self, table):
        super().__init__()
        self.table, self.proj = table, nn.Linear(16, 16)

    def forward(self, ids):
        return self.proj(self.table(ids))


class Plain(nn.Embedding):
    """Another name, and nothing else."""


class Scaled(nn.Embedding):
    """What Gemma and BART do."""

    def forward(self, ids):
        return super().forward(ids) * 4


class Reads(Around):
    """What a model does that ties by itself."""

    def forward(self, ids):
        return super().forward(ids) @ self.table.weight.t()


OTHERS = [lambda: llama(tie_word_embeddings=True), bart, t5, lambda: bert(BertForMaskedLM)]
TIED = [opt, *(pytest.param(make, marks=pytest.mark.slow) for make in OTHERS)]


def tables(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantEmbedding)}


def test_all_tables_of_an_encoder_are_taken_and_told():
    model = bert()
    result = w8a8.quantize(model, "w8a8", embeddings="int8")
    names = [f"embeddings.{what}_embeddings" for what in ("word", "position", "token_type")]
    assert list(tables(model)) == names
    told = {module.name: module for module in result.coverage.quantized}
    word = told["embeddings.word_embeddings"]
    assert (word.kind, word.shape, word.scheme, word.macs) == ("QuantEmbedding", (64, 32), "w8a16", 0)
    assert word.bytes == 64 * 32 + 64 * 4
    assert word.weight_sqnr_db > 35
    assert model.get_input_embeddings().num_embeddings == 64


def test_rows_are_those_of_the_quantised_float_table():
    model = bert()
    exact = model.embeddings.word_embeddings.weight
    w8a8.quantize(model, "w8a8", embeddings="int8")
    looked, made = model.embeddings.word_embeddings, make_weight(exact.detach(), TABLE.weights)
    assert torch.equal(looked.codes, made.codes)
    assert torch.equal(looked(IDS), looked.dequantized_weight()[IDS])


def test_by_default_tables_stay_float():
    model = bert()
    w8a8.quantize(model)
    assert not tables(model)


@pytest.mark.slow
def test_what_is_excluded_stays_float_with_that_reason():
    model = bert()
    result = w8a8.quantize(model, embeddings="int8", exclude=["*position*", "*.query"])
    assert "embeddings.position_embeddings" not in tables(model)
    told = {module.name: module.reason for module in result.coverage.left}
    assert told["embeddings.position_embeddings"] == "excluded by '*position*'"


@pytest.mark.parametrize(
    ("table", "why"),
    [
        (nn.Embedding(64, 16, max_norm=1.0), "rescales its own rows"),
        (nn.Embedding(64, 16, sparse=True), "gradients of a kind of their own"),
        (nn.Embedding(64, 16, scale_grad_by_freq=True), "gradients of a kind of their own"),
        (Scaled(64, 16), "Scaled is a subclass of nn.Embedding that computes something else"),
    ],
)
def test_what_is_more_than_a_table_is_refused_with_the_reason(table, why):
    model = Around(table)
    with pytest.raises(ModelError, match=rf"has no table that can be int8 \(table: .*{why}"):
        w8a8.quantize(model, "w8a8", embeddings="int8")
    assert isinstance(model.proj, nn.Linear)


def test_a_table_whose_weight_is_read_is_refused():
    with pytest.raises(ModelError, match=r"\(table: it is not only called: Reads.forward reads its weight"):
        w8a8.quantize(Reads(nn.Embedding(64, 16)), "w8a8", embeddings="int8")


def test_a_table_with_hooks_is_refused():
    model = Around(nn.Embedding(64, 16))
    model.table.register_forward_hook(lambda *_: None)
    with pytest.raises(ModelError, match="it has hooks"):
        w8a8.quantize(model, "w8a8", embeddings="int8")


def test_a_table_whose_weight_is_made_anew_at_each_call_stays_float_with_that_reason():
    model = nn.Sequential(Around(nn.Embedding(64, 16)), nn.Linear(16, 4))
    nn.utils.parametrize.register_parametrization(model[0].table, "weight", nn.Identity())
    with pytest.raises(ModelError, match=r"\(0.table: its weight is made anew at each call \(Identity\)"):
        w8a8.quantize(model, "w8a8", embeddings="int8")


def test_a_subclass_that_only_looks_up_is_taken():
    model = Around(Plain(64, 16))
    w8a8.quantize(model, "w8a8", embeddings="int8")
    assert tables(model)


def test_a_table_that_saves_nothing_stays_float():
    model = nn.ModuleDict({"big": Around(nn.Embedding(2000, 16)), "small": Around(nn.Embedding(1, 16))})
    result = w8a8.quantize(model, "w8a8", embeddings="int8")
    assert list(tables(model)) == ["big.table"]
    told = {module.name: module.reason for module in result.coverage.left}
    assert told["small.table"] == "it has less than a thousandth of the parameters"


def test_one_table_of_two_modules_stays_one():
    table = nn.Embedding(64, 16)
    model = nn.ModuleDict({"a": Around(table), "b": Around(table)})
    w8a8.quantize(model, "w8a8", embeddings="int8")
    assert model["a"].table is model["b"].table
    assert isinstance(model["a"].table, QuantEmbedding)


def test_a_table_that_is_not_finite_leaves_the_model_as_it_was():
    model = bert()
    with torch.no_grad():
        model.embeddings.word_embeddings.weight[7, 3] = torch.inf
    with pytest.raises(NonFiniteError) as caught:
        w8a8.quantize(model, embeddings="int8")
    assert "while quantising embeddings.word_embeddings" in caught.value.__notes__
    assert not any(isinstance(module, w8a8.QuantLinear) for module in model.modules())


@pytest.mark.parametrize("asked", ["int4", True, None])
def test_another_word_is_refused(asked):
    with pytest.raises(ModelError, match=r"embeddings=.* is unknown; use 'float' or 'int8'"):
        w8a8.quantize(bert(), embeddings=asked)


@pytest.mark.parametrize("make", TIED)
def test_a_table_is_refused_whose_tied_head_stays_float(make):
    model = make()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ModelError, match=r"is one tensor with .* which stays float"):
        w8a8.quantize(model, embeddings="int8")
    assert {name: type(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("make", TIED)
def test_a_tied_head_has_its_codes_in_memory_once(make):
    model = make().eval()
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    exact = model(input_ids=IDS, **more).logits
    result = w8a8.quantize(model, "w8a8", head="int8", embeddings="int8")
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    name = "weight" if head.packed_weight is None else "packed_weight"
    assert table._buffers[name] is head._buffers[name]
    assert not result.untied
    assert model.config.tie_word_embeddings is False
    told = {module.name: module.bytes for module in result.coverage.modules}
    both = sum(told[each] for each, module in model.named_modules() if module in (head, table))
    held = {id(buffer): buffer for module in (head, table) for buffer in module.buffers()}
    assert both == sum(buffer.numel() * buffer.element_size() for buffer in held.values())
    model.tie_weights()
    found = model(input_ids=IDS, **more).logits
    assert (found - exact).norm() < 0.05 * exact.norm()
    again = copy.deepcopy(model)
    assert torch.equal(again(input_ids=IDS, **more).logits, found)


def test_a_table_that_is_tied_to_a_layer_that_is_no_head_is_refused_with_the_way_to_take_that():
    model = nn.ModuleDict({"table": nn.Embedding(64, 16), "scores": nn.Linear(16, 64), "proj": nn.Linear(16, 16)})
    model["scores"].weight = model["table"].weight
    with pytest.raises(ModelError, match=r"is one tensor with scores, .* larger than before: 'scores' in include"):
        w8a8.quantize(model, "w8a8", embeddings="int8")
    w8a8.quantize(model, "w8a8", include=["*", "scores"], embeddings="int8")
    assert isinstance(model["table"], QuantEmbedding)


def test_a_head_with_one_scale_keeps_codes_of_its_own():
    model = opt()
    w8a8.quantize(model, "w8a8-o1", head="int8", embeddings="int8")
    assert model.get_input_embeddings().packed_weight is None


@pytest.mark.slow
def test_factorised_tables_are_taken():
    model = AlbertModel(AlbertConfig(**SMALL, embedding_size=16, max_position_embeddings=16))
    w8a8.quantize(model, embeddings="int8")
    assert model.embeddings.word_embeddings.embedding_dim == 16


def test_a_vocabulary_is_not_resized_in_int8_and_the_model_is_left_as_it_was():
    model = bert()
    w8a8.quantize(model, embeddings="int8")
    before = model(IDS).last_hidden_state
    with pytest.raises(TypeError, match="QuantEmbedding"):
        model.resize_token_embeddings(80)
    assert torch.equal(model(IDS).last_hidden_state, before)
    assert model.resize_token_embeddings(64) is model.get_input_embeddings()  # to what it is
    assert torch.equal(model(IDS).last_hidden_state, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_a_model_of_half_floats_gets_half_floats_from_its_tables(dtype):
    model = bert().to(dtype)
    w8a8.quantize(model, embeddings="int8")
    assert model.embeddings.word_embeddings(IDS).dtype is dtype
    later = bert()
    w8a8.quantize(later, embeddings="int8")
    assert later.to(dtype)(IDS).last_hidden_state.dtype is dtype

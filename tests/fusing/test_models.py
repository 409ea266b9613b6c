"""Whole models, fused: what they compute, what is told, and that nothing of the model is another afterwards."""

import copy
import pickle
import threading
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    ViTConfig,
    ViTModel,
    WhisperConfig,
)
from transformers.models.whisper.modeling_whisper import WhisperEncoder

import w8a8
from tests.conftest import llama, relative_error
from w8a8 import kernels
from w8a8.errors import ModelError
from w8a8.fusing.blocks import Fused
from w8a8.kernels.native import unavailable_because

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel"),
    pytest.mark.skipif(
        kernels.first_choice("auto") != "native", reason="another kernel is preferred: nothing is packed"
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what torch imports to make graphs
]


def _bert() -> Any:
    return BertModel(
        BertConfig(vocab_size=50, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    ).eval()


def _text(rows: int = 3, length: int = 11) -> dict[str, Tensor]:
    mask = torch.ones(rows, length, dtype=torch.long)
    if rows > 1:
        mask[1, length // 2 :] = 0
    return {"input_ids": torch.randint(0, 50, (rows, length)), "attention_mask": mask}


def _vit() -> Any:
    return ViTModel(
        ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=32,
            patch_size=8,
        )
    ).eval()


def _whisper() -> Any:
    return WhisperEncoder(
        WhisperConfig(
            d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, max_source_positions=20
        )
    ).eval()


MODELS = {
    "bert": (_bert, _text),
    "vit": (_vit, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}),
    "whisper": (_whisper, lambda: {"input_features": torch.randn(2, 80, 40)}),
}


def _out(model: Any, call: dict[str, Tensor]) -> Tensor:
    """Of the tokens that are no padding: a fused model has zeros in the place of the others."""
    with torch.no_grad():
        out = model(**call).last_hidden_state
    return out[call["attention_mask"].bool()] if "attention_mask" in call else out


def _by_blocks(model: Any) -> Any:
    """Neither the model nor its encoder is a graph, so that its blocks are."""
    model.encoder.forward = partial(type(model.encoder).forward, model.encoder)
    return model


@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-asym"])
@pytest.mark.parametrize("name", MODELS)
def test_a_fused_model_computes_what_it_did(name, scheme):
    make, inputs = MODELS[name]
    model, call = make(), inputs()
    w8a8.quantize(model, scheme)
    plain, before = _out(model, call), model.state_dict()
    w8a8.optimize(model)
    fused = _out(model, call)
    told = w8a8.fusions(model)
    assert not told.refused
    assert told.whole
    assert told.blocks == model.config.num_hidden_layers
    assert {"attention", "gelu in the product before it", "norm, quantising and product"} <= told.fused.keys()
    assert not told.left
    # a code that moves by one is far above the rounding of floats, and few do
    assert relative_error(fused, plain) < 2e-2
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    w8a8.restore(model)
    assert torch.equal(_out(model, call), plain)


@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_the_fused_kernels_ran_and_blocks_that_are_alike_share_their_graphs(monkeypatch):
    model = _by_blocks(_bert())
    w8a8.quantize(model, fuse=True)
    calls = []
    original = kernels.fused.run
    monkeypatch.setattr(kernels.fused, "run", lambda *a: calls.append(a) or original(*a))
    _out(model, _text())
    assert len(calls) == 3
    assert not w8a8.fusions(model).whole
    families = {id(layer.forward.family) for layer in model.encoder.layer}
    assert len(families) == 1
    assert sum(map(len, model.encoder.layer[0].forward.family.graphs.values())) == 1
    assert all(set(counts) == {"native"} for counts in w8a8.ledger(model).values() if counts)


@pytest.mark.slow
@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_where_the_cpu_has_no_fused_multiply_add_attention_stays_pytorchs_and_it_is_told(monkeypatch):
    model, call = _bert(), _text()
    w8a8.quantize(model)
    plain = _out(model, call)
    monkeypatch.setattr(kernels.compiled, "multiplies_and_adds", lambda: False)
    w8a8.optimize(model)
    assert relative_error(_out(model, call), plain) < 2e-2
    assert any("fused multiply-add" in told for told in w8a8.fusions(model).left)
    assert not any(told.startswith("attention") for told in w8a8.fusions(model).fused)


@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_a_graph_of_a_part_is_not_told_as_one_of_the_model():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = _bert()

        def forward(self, **call):
            return SimpleNamespace(last_hidden_state=self.inner(**call)[0])  # no graph returns this

    model = Around().eval()
    w8a8.quantize(model, fuse=True)
    _out(model, _text())
    told = w8a8.fusions(model)
    assert told.whole == ("inner",)
    assert "inner is one graph with all of them" in str(told)
    assert "the model is one graph" not in str(told)


@pytest.mark.slow
@pytest.mark.not_under("meta", reason="nothing is exported with values on no device")
def test_a_fused_model_is_exported_as_it_was_before():
    model, call = _bert(), _text(1)
    w8a8.quantize(model, fuse=True)
    _out(model, call)
    program = torch.export.export(model, (), call)
    w8a8.restore(model)
    assert torch.equal(_out(program.module(), call), _out(model, call))


@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_one_graph_serves_every_length_and_batch():
    model = _bert()
    w8a8.quantize(model)
    plain = copy.deepcopy(model)
    w8a8.optimize(model)
    for rows, length in ((3, 11), (2, 48), (5, 5), (4, 7)):
        call = _text(rows, length)
        assert relative_error(_out(model, call), _out(plain, call)) < 2e-2
    assert len(model.forward.told) == 1
    assert not model.forward.refused


@pytest.mark.parametrize(
    ("rows", "length"), [(1, 1), *(pytest.param(*how, marks=pytest.mark.slow) for how in ((1, 6), (4, 1)))]
)
def test_one_row_and_one_token_have_graphs_of_their_own(rows, length):
    model = _bert()
    w8a8.quantize(model)
    plain = copy.deepcopy(model)
    w8a8.optimize(model)
    for call in (_text(), _text(rows, length)):
        assert relative_error(_out(model, call), _out(plain, call)) < 2e-2
    assert not w8a8.fusions(model).refused


def test_a_token_of_padding_changes_no_other():
    model = _bert()
    w8a8.quantize(model, fuse=True)
    call = _text()
    first = _out(model, call)
    call["input_ids"][1, 8] = (call["input_ids"][1, 8] + 1) % 50
    second = _out(model, call)
    assert torch.equal(first, second)


_NO_GRADIENT = pytest.mark.not_under("inference", reason="no derivative can be asked for in that mode")


@pytest.mark.parametrize(
    "change",
    [
        "hook",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("child", "forward", "training")),
        pytest.param("gradient", marks=_NO_GRADIENT),
    ],
)
def test_a_block_that_is_not_what_it_was_runs_as_it_is(change):
    model = _bert()
    w8a8.quantize(model, fuse=True)
    call = _text()
    _out(model, call)
    block = model.encoder.layer[1]
    seen: list[object] = []
    if change == "hook":
        block.intermediate.register_forward_hook(lambda *_: seen.append(0))
    elif change == "child":
        block.output.LayerNorm = nn.Identity()
    elif change == "forward":
        block.intermediate.forward = lambda x: seen.append(0) or type(block.intermediate).forward(block.intermediate, x)
    elif change == "training":
        block.output.dropout.train()
    plain = copy.deepcopy(model)
    w8a8.restore(plain)
    torch.manual_seed(0)
    if change == "gradient":
        with pytest.raises(w8a8.W8A8Error, match="gradient"):
            model(**call).last_hidden_state.sum().backward()
        return
    found = _out(model, call)
    torch.manual_seed(0)
    assert relative_error(found, _out(plain, call)) < 2e-2
    if change in ("hook", "forward"):
        assert seen


def test_a_parameter_that_is_replaced_is_read_at_the_next_call():
    model = _bert()
    w8a8.quantize(model, fuse=True)
    call = _text()
    before = _out(model, call)
    norm = model.encoder.layer[2].output.LayerNorm
    norm.weight = nn.Parameter(norm.weight.detach() * 3)
    assert relative_error(_out(model, call), before) > 0.1
    norm.weight = nn.Parameter(norm.weight.detach() / 3)
    assert relative_error(_out(model, call), before) < 1e-6


@pytest.mark.slow
def test_a_copy_and_a_pickle_run_on_their_own_weights():
    model = _bert()
    w8a8.quantize(model, fuse=True)
    call = _text()
    wanted = _out(model, call)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301, its own
        forward = other.encoder.layer[0].forward
        assert isinstance(forward, Fused)
        assert forward.block is other.encoder.layer[0]
        assert torch.equal(_out(other, call), wanted)
        other.encoder.layer[0].output.LayerNorm.weight.data.zero_()
    assert torch.equal(_out(model, call), wanted)


def test_hidden_states_are_those_of_every_block():
    model = _bert()
    w8a8.quantize(model)
    call = _text()
    with torch.no_grad():
        plain = model(**call, output_hidden_states=True).hidden_states
        w8a8.optimize(model)
        fused = model(**call, output_hidden_states=True).hidden_states
    assert len(plain) == len(fused) == 4
    seen = call["attention_mask"].bool()
    assert all(relative_error(a[seen], b[seen]) < 2e-2 for a, b in zip(fused, plain, strict=True))


@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_a_decoder_with_a_cache_runs_as_it_is_and_it_is_told():
    model = llama()
    w8a8.quantize(model)
    ids = torch.randint(0, 50, (1, 5))
    with torch.no_grad():
        plain = model.generate(ids, max_new_tokens=4, do_sample=False)
        w8a8.optimize(model)
        fused = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, fused)
    told = w8a8.fusions(model)
    assert told.refused
    assert "neither a tensor nor a plain value" in str(told)


def test_bfloat16_is_left_as_it_is():
    model = _bert().to(torch.bfloat16)
    w8a8.quantize(model)
    call = _text()
    plain = _out(model, call)
    w8a8.optimize(model)
    assert torch.equal(_out(model, call), plain)


def test_what_cannot_be_optimised_is_an_error_before_anything_is_changed():
    with pytest.raises(ModelError, match=r"w8a8\.quantize"):
        w8a8.optimize(_bert())
    lone = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(ModelError, match="block"):
        w8a8.quantize(lone, fuse=True)
    assert type(lone[0]) is nn.Linear


def test_threads_that_call_a_block_first_at_once_all_compute_and_it_is_fused():
    model, inputs = _bert(), {"input_ids": torch.randint(0, 50, (3, 11))}
    w8a8.quantize(model)
    plain = _out(model, inputs)
    w8a8.optimize(model)
    found, begin = [], threading.Barrier(4)

    def call() -> None:
        begin.wait(30)
        found.append(_out(model, inputs))

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert len(found) == 4
    assert all(relative_error(each, plain) < 1e-2 for each in found)  # a code may be another by one
    _out(model, inputs)
    told = w8a8.fusions(model)
    assert (told.waiting, told.refused) == (0, {})


@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_a_model_with_tables_in_int8_is_one_graph():
    model, call = _bert(), _text()
    w8a8.quantize(model, embeddings="int8")
    plain = _out(model, call)
    w8a8.optimize(model)
    assert relative_error(_out(model, call), plain) < 2e-2
    told = w8a8.fusions(model)
    assert told.whole
    assert not told.refused

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import BatchEncoding

from tests.calibration.conftest import hooks, ids, inputs_of
from tests.conftest import llama, opt
from w8a8.calibration.calibrate import collect
from w8a8.calibration.data import Calibration
from w8a8.calibration.observers import AbsMax
from w8a8.core.scheme import PerChannel
from w8a8.errors import CalibrationError
from w8a8.model.inputs import call


@pytest.mark.parametrize(
    "source",
    [
        ids(),
        (batch for batch in ids()),
        [{"input_ids": batch} for batch in ids()],
        [BatchEncoding({"input_ids": batch}) for batch in ids()],
        [(batch,) for batch in ids()],
        pytest.param(
            torch.utils.data.DataLoader(torch.cat(ids()), batch_size=2),
            marks=pytest.mark.not_under("meta", reason="PyTorch's DataLoader has no values for its own seed there"),
        ),
        lambda model: [model(batch) for batch in ids()],
        lambda model: [model(input_ids=batch) for batch in ids()],
    ],
    ids=["tensors", "generator", "mappings", "BatchEncoding", "tuples", "DataLoader", "loop", "loop by name"],
)
def test_every_kind_of_model_inputs_gives_the_same_statistics_twice(source):
    model = llama()
    name = "model.layers.1.mlp.down_proj"
    calibration = Calibration.of(source)
    expected = inputs_of(model, name, ids()).abs().amax(0)
    for _ in range(2):
        assert torch.equal(collect(model, calibration, {name: AbsMax(PerChannel())})[name].absmax, expected)


def test_token_ids_become_batches_of_rows():
    calibration = Calibration.of(torch.cat(ids()), samples=5, batch_size=2)
    assert [batch["input_ids"].shape for batch in calibration.batches] == [(2, 12), (2, 12), (1, 12)]
    assert len(calibration) == 3
    assert calibration.description == "5 windows, 60 tokens, of token ids of shape (6, 12), seed 0"
    assert calibration.first() is calibration.batches[0]
    assert Calibration.of(calibration) is calibration


def test_the_same_seed_draws_the_same_windows_and_another_does_not():
    stream = torch.arange(1000)
    one, same, other = (Calibration.of(stream, samples=4, length=32, seed=seed) for seed in (3, 3, 4))
    drawn = [[batch["input_ids"][0].tolist() for batch in calibration.batches] for calibration in (one, same, other)]
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_samples_of_model_inputs_are_taken_from_the_front():
    calibration = Calibration.of(ids(), samples=2)
    assert len(calibration) == 2
    assert calibration.first() is calibration.batches[0]
    assert calibration.description == "2 batches of model inputs"
    assert len(Calibration.of(ids(batches=200))) == 200
    assert len(Calibration.of((ids(1)[0] for _ in itertools.count()), samples=5)) == 5


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "is empty: it gave no batch"),
        ([1, 2], "batch 0 .* is of type int"),
        ({"input_ids": torch.ones(1, 2)}, r"give batches in a list: \[batch\]"),
        (nn.Linear(2, 2), r"unknown kind: Linear"),
        (torch.ones(2, 2), r"token ids are integers, found a tensor of torch.float32"),
        (torch.ones(2, 0, dtype=torch.int64), r"token ids of shape \(2, 0\) cannot be used"),
        (5, "unknown kind: int; give texts with a tokenizer, a file"),
        (["a text"], r"takes a tokenizer: Calibration.of\(source, tokenizer\)"),
    ],
)
def test_data_that_cannot_be_used_is_explained(source, message):
    with pytest.raises(CalibrationError, match=message):
        Calibration.of(source)


@pytest.mark.parametrize("option", ["samples", "length", "batch_size"])
def test_counts_are_positive(option):
    with pytest.raises(CalibrationError, match=f"{option}=0 is out of range"):
        Calibration.of(ids(), **{option: 0})


def test_a_loop_shows_its_first_batch_and_is_stopped_there():
    calls = []

    def loop(model):
        for batch in ids():
            calls.append(batch)
            model(batch, use_cache=False)

    model = llama()
    calibration = Calibration.of(loop)
    with pytest.raises(CalibrationError, match=r"the loop loop has not called the model yet"):
        calibration.first()
    first = calibration.first(model)
    assert len(calls) == 1
    assert hooks(model) == 0
    assert set(first) == {"input_ids", "use_cache"}
    assert torch.equal(first["input_ids"], ids()[0])
    assert calibration.first() is first
    assert torch.equal(call(model, first).logits, model(ids()[0]).logits)
    assert len(calibration) == 0


def test_a_loop_that_calls_nothing_is_an_error():
    with pytest.raises(CalibrationError, match="made no call of the model that it was given"):
        Calibration.of(lambda model: None).run(llama())


def test_progress_counts_the_passes():
    seen = []
    Calibration.of(ids()).run(llama(), lambda *step: seen.append(step))
    assert seen == [(1, 3, "calibrating"), (2, 3, "calibrating"), (3, 3, "calibrating")]


def test_foreign_tokens_and_windows_that_are_too_long_are_refused():
    with pytest.raises(CalibrationError, match=r"token id 96, LlamaForCausalLM knows 0..95"):
        Calibration.of(torch.full((1, 4), 96)).run(llama())
    with pytest.raises(CalibrationError, match="a window of 65 tokens, LlamaForCausalLM has places for 64"):
        Calibration.of(torch.zeros(65, dtype=torch.int64)).run(llama())


def test_the_passes_are_in_evaluation_mode_and_everything_is_put_back():
    model = opt(dropout=0.5).train()
    model.model.decoder.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    batches = ids()
    kept = copy.deepcopy(batches)
    modes = []
    watch = model.register_forward_pre_hook(
        lambda module, args: modes.append((module.training, torch.is_grad_enabled(), module.config.use_cache))
    )
    Calibration.of(batches).run(model)
    watch.remove()
    assert modes == [(False, False, False)] * 3
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.config.use_cache is True
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(batches, kept, strict=True))

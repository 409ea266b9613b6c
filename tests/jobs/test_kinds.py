"""A model of another kind than is asked for is refused by every call, by name before its weights are read."""

import copy

import pytest
import torch
import transformers as t

import w8a8
from w8a8.checkpoint.opening import OpenedModel
from w8a8.demo.run import demo_model
from w8a8.errors import ModelError
from w8a8.evaluation import perplexity
from w8a8.evaluation.generation import continue_text
from w8a8.evaluation.harness import run_tasks
from w8a8.jobs.request import BudgetSearch, CalibrationText, Job

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "intermediate_size": 40}
IDS = torch.arange(3, 20)

BY_NAME = {
    "a perplexity": lambda name, text, out: w8a8.score_model(name, text),
    "a study of perplexities": lambda name, text, out: w8a8.study_model(name, text),
    "the sensitivity of layers": lambda name, text, out: w8a8.rank_layers(name, text),
    "going on from a prompt": lambda name, text, out: continue_text(name, "Once"),
    "tasks of the harness": lambda name, text, out: run_tasks(name, ["none"]),
    "a comparison on a text": lambda name, text, out: w8a8.compare_models(w8a8.ModelPair(name, name, text)),
    "a comparison on a text ": lambda name, text, out: w8a8.quantize_to(Job(name, out, eval_text=text)),
    "calibration on a text (--calib)": lambda name, text, out: w8a8.quantize_to(
        Job(name, out, calibration=CalibrationText(text))
    ),
    "--budget, which is spent on what a model tells of a text,": lambda name, text, out: w8a8.quantize_to(
        Job(name, out, search=BudgetSearch("1MB", text))
    ),
}
BY_MODEL = {
    "a perplexity": lambda opened: perplexity(opened.model, IDS, seq_len=8),
    "a study of perplexities": lambda opened: w8a8.study(opened.model, IDS),
    "the sensitivity of layers": lambda opened: w8a8.sensitivity(opened.model, IDS),
    "--budget, which is spent on what a model tells of a text,": lambda opened: w8a8.allocate(opened.model, IDS, "1MB"),
    "going on from a prompt": lambda opened: continue_text(opened, "Once"),
    "tasks of the harness": lambda opened: run_tasks(opened, ["none"]),
}


@pytest.fixture(scope="module")
def pictures():
    return t.ViTForImageClassification(t.ViTConfig(**SIZES, image_size=16, patch_size=4))


@pytest.fixture(scope="module")
def saved(pictures, tmp_path_factory):
    """A directory whose weights cannot be read."""
    place = tmp_path_factory.mktemp("vision")
    copy.deepcopy(pictures).save_pretrained(place)
    (place / "model.safetensors").write_bytes(b"torn")
    return place


@pytest.mark.parametrize("asked", BY_NAME)
def test_a_name_is_refused_before_its_weights_are_read(saved, tmp_path, asked):
    (tmp_path / "text.txt").write_text("Return the first of these.")
    with pytest.raises(ModelError) as refused:
        BY_NAME[asked](str(saved), str(tmp_path / "text.txt"), tmp_path / "out")
    said = f"{asked.strip()} was asked for, and ViTForImageClassification is a model of pictures: that takes "
    assert str(refused.value).startswith(said)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("asked", BY_MODEL)
def test_a_model_that_is_there_is_refused_in_the_same_words(pictures, tmp_path, asked):
    with pytest.raises(ModelError) as refused:
        BY_MODEL[asked](OpenedModel(pictures, demo_model().tokenizer, tmp_path, False))
    said = f"{asked} was asked for, and ViTForImageClassification is a model of pictures: that takes "
    assert str(refused.value).startswith(said)


def test_a_masked_model_is_not_studied():
    masked = t.BertForMaskedLM(t.BertConfig(**SIZES, vocab_size=96, max_position_embeddings=64))
    with pytest.raises(ModelError, match="BertForMaskedLM is a masked language model: that takes a causal"):
        w8a8.study(masked, IDS)

import dataclasses

import pytest
import torch

import w8a8
from w8a8.demo.run import demo_model
from w8a8.errors import ModelError
from w8a8.evaluation.generation import continue_text


@pytest.fixture(scope="module")
def opened():
    return demo_model()


def test_greedy_writing_is_the_models_most_likely_token_each_time(opened):
    result = continue_text(opened, "Return a new", max_new_tokens=6)
    ids = opened.tokenizer("Return a new", return_tensors="pt")["input_ids"]
    prompt = ids.shape[1]
    with torch.inference_mode():
        for _ in range(result.new_tokens):
            ids = torch.cat([ids, opened.model(ids).logits[:, -1:].argmax(-1)], 1)
    assert result.text == opened.tokenizer.decode(ids[0, prompt:], skip_special_tokens=True)
    assert result.tok_per_s > 0


def test_sampling_depends_on_the_seed_alone_and_leaves_the_generator(opened):
    state = torch.random.get_rng_state()
    first = continue_text(opened, "The", max_new_tokens=12, temperature=1.0, seed=1)
    again = continue_text(opened, "The", max_new_tokens=12, temperature=1.0, seed=1)
    other = continue_text(opened, "The", max_new_tokens=12, temperature=1.0, seed=2)
    assert first.text == again.text != other.text
    assert torch.equal(torch.random.get_rng_state(), state)


def test_writing_stops_at_the_end_of_the_context(opened):
    result = continue_text(opened, "x " * 100, max_new_tokens=10_000)
    prompt = len(opened.tokenizer("x " * 100)["input_ids"])
    assert prompt + result.new_tokens <= opened.model.config.max_position_embeddings


def test_the_integer_model_writes_too(opened):
    quantized = dataclasses.replace(opened, model=w8a8.quantize(demo_model().model).model)
    assert continue_text(quantized, "Return", max_new_tokens=4).new_tokens == 4


def test_prompts_that_cannot_be_read_are_refused(opened):
    with pytest.raises(ModelError, match=r"the prompt has 0 tokens; the model takes 1\.\."):
        continue_text(opened, "", max_new_tokens=4)
    with pytest.raises(ModelError, match=r"the prompt has \d+ tokens"):
        continue_text(opened, "word " * 2000, max_new_tokens=4)
    with pytest.raises(ModelError, match="has no tokenizer"):
        continue_text(dataclasses.replace(opened, tokenizer=None), "x", max_new_tokens=4)

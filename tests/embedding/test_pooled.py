"""A plain encoder gives the mean of what it says of a text's tokens, whatever stands beside the text."""

import numpy as np
import pytest
import torch
import transformers as t

from tests.sentences import SENTENCES
from w8a8.checkpoint.directory import Directory
from w8a8.embedding.pooled import open_pooled
from w8a8.errors import ModelError


@pytest.mark.parametrize("name", ["plain", "masked"])
def test_a_vector_is_the_mean_of_the_last_states_of_the_text_alone(encoders, name):
    pooled = open_pooled(Directory.of(encoders / name))
    tokenizer = t.AutoTokenizer.from_pretrained(encoders / name)
    model = t.AutoModel.from_pretrained(encoders / name).eval()
    found = pooled.run(("text",), SENTENCES)
    for text, vector in zip(SENTENCES, found, strict=True):
        with torch.no_grad():
            wanted = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0).numpy()
        assert np.linalg.norm(vector.numpy() - wanted) < 1e-5 * np.linalg.norm(wanted)
    assert pooled.width == len(found[0]) == 32


def test_what_has_no_vectors_of_texts_is_told(encoders):
    with pytest.raises(ModelError, match="vectors of texts was asked for, and Qwen3ForCausalLM is a causal"):
        open_pooled(Directory.of(encoders / "causal"))


def test_a_tokenizer_that_cannot_pad_is_told(encoders, tmp_path):
    t.AutoModel.from_pretrained(encoders / "plain").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="without a tokenizer"):
        open_pooled(Directory.of(tmp_path))
    tokenizer = t.AutoTokenizer.from_pretrained(encoders / "plain")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="names no token to pad with"):
        open_pooled(Directory.of(tmp_path))

"""An embedder and plain encoders, float and int8, made here."""

import pytest
import transformers as t

import w8a8
from tests.sentences import bert, embedder, qwen3, ranker, tokenizer, write


@pytest.fixture(scope="session")
def encoders(tmp_path_factory):
    """Directories: float, int8, and what gives no vectors."""
    place = tmp_path_factory.mktemp("encoders")
    model = embedder(place, pooling="mean")
    model.save_pretrained(str(place / "embedder"))
    w8a8.quantize(model)
    w8a8.save(model, place / "embedder-int8")
    write(place / "plain", t.AutoModel, bert())
    plain = t.AutoModel.from_pretrained(place / "plain")
    w8a8.quantize(plain)
    w8a8.save(plain, place / "plain-int8", tokenizer())
    write(place / "masked", t.AutoModelForMaskedLM, bert())
    write(place / "causal", t.AutoModelForCausalLM, qwen3())
    ranker(place).save_pretrained(str(place / "ranker"))
    return place

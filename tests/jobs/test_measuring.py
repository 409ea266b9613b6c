"""What a command measures, called from Python."""

import pytest

import w8a8
from tests.conftest import llama
from tests.jobs.conftest import Heard
from w8a8.analysis.study import Study
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_directory, demo_model
from w8a8.errors import ModelError, SchemeError, TextError
from w8a8.evaluation import encode, perplexity
from w8a8.jobs.measuring import rank_layers, score_model, study_model, time_models

LAYER = "model.decoder.layers.0.fc1"
SHORT = {"prompt": 4, "new": 1, "seconds": 0.0}


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(held_out_text()[:600])
    return str(path)


def test_a_score_is_that_of_the_opened_model(text, capsys):
    heard, opened = Heard(), demo_model()
    ids = encode(opened.tokenizer, held_out_text()[:600]).first(100)
    wanted = perplexity(opened.model, ids, seq_len=32, stride=16)
    named = w8a8.NamedModel(str(demo_directory()), dtype="float32")
    assert score_model(named, text, seq_len=32, stride=16, max_tokens=100, watcher=heard) == wanted
    assert heard.stages == ["scoring"]
    assert score_model(named, text, max_tokens=40).seq_len == opened.model.config.max_position_embeddings
    assert capsys.readouterr().out == ""


def test_a_text_is_read_before_the_model(tmp_path):
    with pytest.raises(TextError, match="cannot be read"):
        score_model("/no/model", str(tmp_path / "nothing.txt"))


def test_a_study_and_the_sensitivity_of_layers_are_a_call_each(text):
    heard = Heard()
    found = study_model(demo_directory(), text, max_tokens=24, bits=[8], include=[LAYER], watcher=heard)
    assert isinstance(found, Study)
    assert found.float_model.tokens == 23
    ranked = rank_layers(demo_directory(), text, include=[LAYER], windows=1, seq_len=16, watcher=heard)
    assert [layer.name for layer in ranked.layers] == [LAYER]
    assert heard.stages == ["studying", "measuring"]


def test_a_float_model_is_timed_beside_itself_quantised(tmp_path):
    named = w8a8.NamedModel(str(demo_directory()), head="int8")
    assert list(time_models(named, **SHORT)) == [named.name, f"{named.name} in w8a8"]
    llama().save_pretrained(tmp_path / "other")
    assert list(time_models(demo_directory(), [str(tmp_path / "other")], **SHORT)) == [
        str(tmp_path / "other"),
        str(demo_directory()),
    ]
    with pytest.raises(SchemeError, match="the float one as --against"):
        time_models("/no/model", scheme="w8a8-static")


def test_what_is_opened_is_opened_as_the_name_says():
    with pytest.raises(ModelError, match="device 'nowhere' cannot be used"):
        time_models(w8a8.NamedModel(str(demo_directory()), device="nowhere"), **SHORT)

import json

import pytest

import w8a8
from tests.jobs.conftest import Heard
from w8a8.core.plain import plain
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_directory
from w8a8.errors import ModelError
from w8a8.jobs.comparison import ModelPair, compare_models
from w8a8.jobs.quantization import quantize_to
from w8a8.jobs.request import Job

LAYER = "model.decoder.layers.0.fc1"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A quantised directory and a text."""
    place = tmp_path_factory.mktemp("saved")
    (place / "text.txt").write_text(held_out_text()[:500])
    quantize_to(Job(str(demo_directory()), place / "out", include=[LAYER]))
    return place


def pair(saved, dtype="auto", **options):
    return ModelPair(
        w8a8.NamedModel(saved / "out", dtype), str(demo_directory()), str(saved / "text.txt"), max_tokens=64, **options
    )


def test_a_pair_in_memory_tells_what_each_layer_does(saved, capsys):
    heard = Heard()
    found = compare_models(pair(saved), heard)
    assert heard.stages == ["comparing"]
    assert [layer.name for layer in found.layers] == [LAYER]
    assert found.why_not is None
    told = json.loads(json.dumps(found.to_dict()))
    assert told["layers"] == plain(found.layers)
    assert told["verdict"] == found.both.verdict
    assert capsys.readouterr().out == ""


def test_one_at_a_time_the_reference_is_stored_and_used_again(saved, tmp_path):
    cache, first, again = tmp_path / "reference.safetensors", Heard(), Heard()
    found = compare_models(pair(saved, cache=cache), first)
    assert first.stages == ["reference", "comparing"]
    assert found.why_not == "the models were in memory one at a time"
    assert compare_models(pair(saved, cache=cache), again).both.kl_nats == found.both.kl_nats
    assert again.stages == ["comparing"]
    with pytest.raises(ModelError, match="holds the predictions of another model"):
        compare_models(pair(saved, cache=cache, dtype="bfloat16"))


def test_the_calls_are_public_names():
    assert w8a8.compare_models is compare_models
    assert w8a8.quantize_to is quantize_to

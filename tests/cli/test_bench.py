import json

import pytest
from transformers import BertModel

from tests.cli.test_commands import call, demo_dir, quantized  # noqa: F401 - fixtures
from tests.sentences import bert
from w8a8.kernels.native import unavailable_because

SHORT = ("--seconds", "0", "--prompt", "8", "--new", "2")


def test_a_float_model_is_timed_beside_itself_quantised(call, demo_dir):  # noqa: F811
    code, out, _ = call("bench", demo_dir, "--scheme", "w8a8-asym", *SHORT, "--json")
    assert code == 0
    found = json.loads(out)
    assert list(found["models"]) == [str(demo_dir), f"{demo_dir} in w8a8-asym"]
    assert all(each["rounds"] == 3 and each["writing"]["median"] > 0 for each in found["models"].values())


def test_a_quantised_model_is_timed_alone_or_against_others(call, demo_dir, quantized):  # noqa: F811
    code, out, _ = call("bench", quantized, *SHORT, "--head", "int8", "--json")
    assert code == 0
    assert list(json.loads(out)["models"]) == [str(quantized)]
    code, out, _ = call("bench", quantized, "--against", demo_dir, *SHORT)
    assert code == 0
    for words in ("reading, tokens/s", "writing, tokens/s", "1.00", "3 rounds"):
        assert words in out


def test_a_prompt_without_room_is_one_message(call, demo_dir):  # noqa: F811
    code, _, err = call("bench", demo_dir, "--prompt", "100000")
    assert code == 2
    assert "a prompt of 100000 tokens" in err
    assert "--prompt" in err


def test_a_static_scheme_is_refused_with_the_way_to_time_it(call, demo_dir):  # noqa: F811
    code, _, err = call("bench", demo_dir, "--scheme", "w8a8-static", *SHORT)
    assert code == 2
    assert "w8a8 quantize --calib FILE" in err
    assert "--against" in err


def test_writing_is_timed_after_a_context_with_a_cache_in_int8(call, quantized):  # noqa: F811
    code, out, _ = call("bench", quantized, *SHORT, "--context", "20", "--kv", "int8", "--json")
    assert code == 0
    found = json.loads(out)
    assert (found["context"], {model["kv"] for model in found["models"].values()}) == (20, {"int8"})
    code, out, _ = call("bench", quantized, *SHORT, "--context", "20")
    assert "2 new tokens after 20" in out
    assert "block" in out
    code, _, err = call("bench", quantized, *SHORT, "--context", "255")
    assert code == 2
    assert "(--context, --new)" in err


@pytest.mark.slow
@pytest.mark.kernels
@pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel")
@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
def test_an_encoder_is_timed_reading_fused_or_not(call, tmp_path):  # noqa: F811
    BertModel(bert()).save_pretrained(tmp_path)
    code, out, err = call("bench", tmp_path, "--batch", 2, *SHORT)
    assert code == 0, err
    words = " ".join(out.replace("│", " ").split())
    assert "2 blocks run fused" in words
    assert "not fused: it has no integer layers" in words
    assert "writing" not in words
    found = json.loads(call("bench", tmp_path, "--no-fuse", *SHORT, "--json")[1])["models"]
    assert [each["fused"] for each in found.values()] == ["not fused: not asked for"] * 2
    assert all(each["writing"] is None for each in found.values())

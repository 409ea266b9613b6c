"""The commands that measure layers, on a mixture of experts: each expert's layers are among them."""

import json

import pytest

import w8a8
from tests.cli.test_commands import call, text  # noqa: F401 - fixtures
from tests.conftest import mixtral
from w8a8.demo.run import demo_model
from w8a8.model.experts import holds_experts

EXPERT = "model.layers.0.mlp.experts.1.w2"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    """A float directory with a tokenizer."""
    path, tokenizer = tmp_path_factory.mktemp("mixture") / "float", demo_model().tokenizer
    mixtral(vocab_size=len(tokenizer), num_hidden_layers=2).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.mark.slow
def test_sensitivity_measures_every_expert(call, mixture, text):  # noqa: F811
    arguments = ("sensitivity", mixture, "--text", text, "--windows", 1, "--seq-len", 16, "--json")
    found = json.loads(call(*arguments)[1])
    assert len(found["layers"]) == 2 * (4 + 4 * 3)
    code, out, err = call(*arguments, "--include", "*.experts.1.*")
    assert code == 0, err
    assert {layer["name"].split(".experts.")[1] for layer in json.loads(out)["layers"]} == {"1.w1", "1.w2", "1.w3"}


def test_a_budget_is_spent_on_experts_too_and_on_all_of_a_layer(call, mixture, text, tmp_path):  # noqa: F811
    arguments = (
        "quantize",
        mixture,
        "-o",
        tmp_path / "out",
        "--text",
        text,
        "--target",
        "vllm",
        "--option",
        "w8a8",
        "--json",
    )
    code, out, err = call(*arguments, "--budget", "630KB", "--exclude", "*.layers.1.mlp.experts.*")
    assert code == 0, err
    told = json.loads(out)
    schemes = {name: scheme for name, scheme in told["budget"]["schemes"].items() if ".experts." in name}
    assert len(schemes) == 4 * 3
    assert set(schemes.values()) == {"w8a8"}
    assert told["vllm"] == []
    assert holds_experts(w8a8.load(tmp_path / "out"))


@pytest.mark.slow
def test_a_page_has_the_experts_that_were_quantised(call, mixture, text, tmp_path):  # noqa: F811
    pytest.importorskip("vl_convert")
    arguments = ("quantize", mixture, "-o", tmp_path / "out", "--eval-text", text, "--report", tmp_path / "page.html")
    code, _, err = call(*arguments, "--exclude", "*.experts.1.*", "--calib", text, "--smooth", "0.5")
    assert code == 0, err
    page = (tmp_path / "page.html").read_text()
    assert EXPERT.replace(".1.", ".2.") in page


def test_eval_shows_what_each_expert_lost(call, mixture, text, tmp_path):  # noqa: F811
    assert call("quantize", mixture, "-o", tmp_path / "out")[0] == 0
    code, out, err = call("eval", tmp_path / "out", "--text", text, "--against", mixture, "--json")
    assert code == 0, err
    measured = [layer["name"] for layer in json.loads(out)["layers"]]
    assert EXPERT in measured
    assert len(measured) == 2 * (4 + 4 * 3)

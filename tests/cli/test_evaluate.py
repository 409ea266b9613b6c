"""`w8a8 eval`: against a reference in memory or stored, tasks of the harness; and quantize --eval-text."""

import json

import pytest

from tests.cli.test_commands import call, demo_dir, quantized, text  # noqa: F401 - fixtures


def test_two_models_in_memory_and_one_after_the_other_agree(call, tmp_path, demo_dir, text, quantized):  # noqa: F811
    arguments = ("eval", quantized, "--text", text, "--against", demo_dir, "--dtype", "float32", "--json")
    both = json.loads(call(*arguments)[1])
    apart = json.loads(call(*arguments, "--one-at-a-time")[1])
    for name in ("model", "reference", "loss_difference_nats", "perplexity_ratio", "top1_agreement", "verdict"):
        assert apart[name] == both[name]
    assert both["top_k"] is None
    assert apart["top_k"] == 512
    assert 0 < apart["kl_nats"]["mean"] <= both["kl_nats"]["mean"] * 1.001


def test_stored_predictions_are_used_again(call, tmp_path, demo_dir, text, quantized):  # noqa: F811
    cache = tmp_path / "reference.safetensors"
    arguments = ("eval", quantized, "--text", text, "--against", demo_dir, "--cache", cache, "--json")
    first, written = json.loads(call(*arguments)[1]), cache.stat().st_mtime_ns
    again = json.loads(call(*arguments)[1])
    assert first.pop("model_tok_per_s") > 0
    assert again.pop("model_tok_per_s") > 0
    assert again == first
    assert cache.stat().st_mtime_ns == written
    other = ("eval", demo_dir, "--text", text, "--against", quantized, "--cache", cache)
    code, _, err = call(*other)
    assert code == 2
    assert "holds the predictions of another model" in err
    code, _, err = call(*arguments, "--seq-len", "64")
    assert code == 2
    assert "store them again" in err


def test_the_headline_has_the_verdict_and_the_sizes(call, demo_dir, text, quantized):  # noqa: F811
    code, out, _ = call("eval", quantized, "--text", text, "--against", demo_dir)
    assert code == 0
    for words in (
        "bits per byte",
        "of 99 % of the tokens",
        "weights on disk",
        "model reading, tokens/s, floats in",
        "Perplexity: ",
    ):
        assert words in out


@pytest.mark.slow
def test_the_ten_worst_layers_stand_at_the_end(call, demo_dir, text, quantized):  # noqa: F811
    code, out, _ = call("eval", quantized, "--text", text, "--against", demo_dir)
    assert code == 0
    _, _, end = out.partition("Perplexity: ")
    assert end.count("model.decoder.layers.") == 10
    assert "output dB" in end
    found = json.loads(call("eval", quantized, "--text", text, "--against", demo_dir, "--json")[1])
    assert found["layers_not_measured"] is None
    worst = min(found["layers"], key=lambda layer: layer["output_sqnr_db"])
    rows = [line for line in end.splitlines() if "model.decoder.layers." in line]
    assert worst["name"] in rows[0]


@pytest.mark.parametrize(
    ("more", "why"), [(("--one-at-a-time",), "one at a time"), (("--head", "int8"), None), ((), None)]
)
def test_why_layers_were_not_measured_is_told(call, demo_dir, text, quantized, more, why):  # noqa: F811
    code, out, _ = call("eval", quantized, "--text", text, "--against", demo_dir, *more)
    assert code == 0
    assert ("Layers were not measured" in out) == (why is not None)
    assert why is None or why in out


@pytest.mark.slow
def test_quantize_scores_its_result_where_a_text_is_given(call, tmp_path, demo_dir, text):  # noqa: F811
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out", "--eval-text", text)
    assert code == 0
    assert "Perplexity: " in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "on text.txt: " in card
    assert "| KL(float, this), nats per token, mean |" in card
    assert "Not measured" not in card
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "more", "--eval-text", text, "--json")
    assert code == 0
    assert json.loads(out)["evaluation"]["verdict"]


def test_lines_of_json_are_scored(call, tmp_path, demo_dir):  # noqa: F811
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"Return the {word}."}) for word in ("first", "second", "third")))
    code, out, _ = call("eval", demo_dir, "--text", path, "--json")
    assert code == 0
    assert json.loads(out)["tokens"] > 5


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
doc_to_choice: "{{{{choices}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task(tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"question": "Return the", "choices": [" value", " zxqj"], "answer": 0}] * 3
    rows.append({"question": "Return the", "choices": [" value", " zxqj"], "answer": 1})
    data.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=data))
    return tmp_path / "tasks"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_harness_asks_our_model(call, task, quantized, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = ("eval", quantized, "--tasks", "tiny", "--include-path", task, "--num-fewshot", "0")
    code, out, err = call(*arguments, "--json")
    assert code == 0, err
    assert json.loads(out[out.index("{") :])["tasks"]["tiny"]["acc,none"] == 0.75
    code, out, _ = call(*arguments, "--limit", "3")
    assert code == 0
    assert "1.0000" in out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_task_that_is_not_there_is_told(call, quantized):  # noqa: F811
    code, _, err = call("eval", quantized, "--tasks", "arc_eazy")
    assert code == 2
    assert "knows no task 'arc_eazy' (closest: arc_easy" in err


def test_neither_text_nor_tasks_is_told(call, quantized):  # noqa: F811
    code, _, err = call("eval", quantized)
    assert code == 2
    assert "give --text FILE to score, --data PATH to judge an encoder on, or --tasks A,B" in err


def test_without_the_harness_the_way_to_install_it_is_told(call, quantized, monkeypatch):  # noqa: F811
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    code, _, err = call("eval", quantized, "--tasks", "tiny")
    assert code == 2
    assert "pip install 'w8a8[eval]'" in err


def test_what_a_cache_in_int8_costs_is_told_beside_the_model_with_its_own(call, demo_dir, text):  # noqa: F811
    code, out, _ = call("eval", demo_dir, "--text", text, "--against", demo_dir, "--kv", "int8", "--json")
    assert code == 0
    found = json.loads(out)
    assert 0 < found["kl_nats"]["mean"] < 1e-4
    code, out, _ = call("eval", demo_dir, "--text", text, "--against", demo_dir, "--kv", "block", "--json")
    assert json.loads(out)["kl_nats"]["mean"] == 0


def test_a_cache_is_set_where_it_does_something(call, demo_dir, text):  # noqa: F811
    code, _, err = call("eval", demo_dir, "--tasks", "piqa", "--kv", "int8")
    assert code == 2
    assert "give --text FILE" in err
    code, _, err = call("eval", demo_dir, "--text", text, "--kv", "int4")
    assert code == 2
    assert "unknown kind of cache 'int4'" in err


def test_a_model_goes_on_from_a_prompt_with_each_cache(call, demo_dir):  # noqa: F811
    kinds = ("auto", "dynamic", "int8")
    texts = [call("generate", demo_dir, "Return the", "--max-new-tokens", "8", "--kv", kv) for kv in kinds]
    assert [code for code, _, _ in texts] == [0, 0, 0]
    assert texts[0][1] == texts[1][1]
    assert texts[2][1].startswith("Return the")

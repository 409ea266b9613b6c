"""The command as a user calls it: what it prints, what it writes, how it fails."""

import json
import re
import shutil
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel, Dinov2Config, Dinov2Model, PreTrainedTokenizerBase

import w8a8.analysis
from tests.conftest import THEIRS, crossed, llama, mixtral, qwen2_moe
from tests.sentences import bert
from w8a8.cli import main
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_model, time_layer
from w8a8.kernels.native import unavailable_because
from w8a8.layers.linear import quant_linears

WORST = "The worst layers by weights alone; by outputs: --eval-text FILE"


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the command; returns exit code, standard output, standard error."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["w8a8", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture(scope="module")
def demo_dir():
    return demo_model().directory


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(held_out_text()[:3000])
    return path


@pytest.fixture(scope="module")
def quantized(tmp_path_factory, demo_dir):
    """The shipped model, quantised once."""
    path = tmp_path_factory.mktemp("quantized") / "out"
    opened = demo_model()
    w8a8.quantize(opened.model)
    w8a8.save(opened.model, path, opened.tokenizer)
    return path


def test_help_names_every_command_and_the_scoring_rules(call):
    code, out, _ = call("--help")
    assert code == 0
    for command in ("quantize", "eval", "inspect", "study", "generate", "schemes", "doctor", "demo"):
        assert command in out
    _, out, _ = call("eval", "--help")
    assert "first token of a window is not scored" in " ".join(out.split())


def test_quantize_writes_a_directory_that_evaluates(call, tmp_path, demo_dir, text):
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out")
    assert code == 0
    assert "Coverage" in out
    assert "tied to model.decoder.embed_tokens" in out
    assert f" of 2.98 MB; what it lost: w8a8 eval {tmp_path / 'out'} --text FILE --against {demo_dir}" in out
    assert WORST in out
    assert (tmp_path / "out/tokenizer.json").exists()
    code, out, _ = call("eval", tmp_path / "out", "--text", text, "--against", demo_dir, "--dtype", "float32", "--json")
    assert code == 0
    result = json.loads(out)
    assert abs(result["perplexity_ratio"]["mean"] - 1) < 0.01
    assert result["top1_agreement"]["mean"] > 0.95


def test_quantize_tells_json_what_it_did(call, tmp_path, demo_dir):
    arguments = ["--scheme", "w8a8-asym", "--include", "*", "--include", "lm_head", "--exclude", "*.fc2", "--json"]
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out", *arguments)
    assert code == 0
    result = json.loads(out)
    assert result["scheme"] == "w8a8-asym"
    assert result["untied"] == {"lm_head": "model.decoder.embed_tokens"}
    left = {m["name"]: m["reason"] for m in result["coverage"]["modules"] if m["reason"]}
    assert left["model.decoder.layers.0.fc2"] == "excluded by '*.fc2'"
    assert w8a8.load(tmp_path / "out").lm_head.codes.dtype is torch.int8


def worst_of(printed):
    """Layers and cells of the table of weights that lost most."""
    rows = re.findall(r"^│ (\S+) +│ (\S+) +│ +(\S+) +│$", printed.partition(WORST)[2], re.MULTILINE)
    return [(layer, scheme, db) for layer, scheme, db in rows]


@crossed(
    "way scheme",
    [["--no-stream"], ["--stream"], ["--stream", "--calib", "TEXT", "--smooth", "0.5", "--calib-samples", "4"]],
    ["w8a8", "w8a16"],
)
def test_quantize_ends_with_the_ten_worst_weights(call, tmp_path, text, scheme, way):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(demo_model().directory, source)
    held = load_file(source / "model.safetensors")
    (bad,) = (name for name in held if name.endswith("layers.3.self_attn.v_proj.weight"))
    held[bad][:, 0] = 50 * held[bad].std()
    save_file(held, source / "model.safetensors", metadata={"format": "pt"})
    options = [str(text) if each == "TEXT" else each for each in way]
    code, printed, _ = call("quantize", source, "-o", out, "--scheme", scheme, *options)
    assert code == 0
    rows = worst_of(printed)
    assert len(rows) == 10
    assert rows[0][0] == "model.decoder.layers.3.self_attn.v_proj"
    assert {row[1] for row in rows} == {scheme}
    code, printed, _ = call("quantize", source, "-o", out, "--scheme", scheme, *options, "--force", "--json")
    told = json.loads(printed)
    assert [(m["name"], m["scheme"], f"{m['weight_sqnr_db']:.1f}") for m in told["worst_weights"]] == rows
    by_name = {m["name"]: m["weight_sqnr_db"] for m in told["coverage"]["modules"] if m["reason"] is None}
    assert len(by_name) == 36
    assert [m["weight_sqnr_db"] for m in told["worst_weights"]] == sorted(by_name.values())[:10]


def test_a_weight_that_lost_nothing_is_told_as_exact(call, tmp_path):
    model = llama(num_hidden_layers=1)
    for name, layer in model.named_modules():
        if name.endswith("q_proj"):
            torch.nn.init.eye_(layer.weight)
    model.save_pretrained(tmp_path / "source")
    _, printed, _ = call("quantize", tmp_path / "source", "-o", tmp_path / "out")
    assert worst_of(printed)[-1] == ("model.layers.0.self_attn.q_proj", "w8a8", "exact")
    _, printed, _ = call("quantize", tmp_path / "source", "-o", tmp_path / "out", "--force", "--json")
    last = json.loads(printed)["worst_weights"][-1]
    assert (last["name"], last["weight_sqnr_db"]) == ("model.layers.0.self_attn.q_proj", None)


@pytest.mark.slow
def test_where_outputs_are_measured_the_weights_are_told_with_them(call, tmp_path, demo_dir, text):
    fixed = ["quantize", demo_dir, "-o", tmp_path / "out", "--eval-text", text]
    _, printed, _ = call(*fixed)
    assert "Layers by what they do to their own output" in printed
    assert WORST not in printed
    _, printed, _ = call(*fixed, "--force", "--calib", text, "--calib-samples", 4, "--smooth", 0.5)
    assert "Layers were not measured: " in printed
    assert len(worst_of(printed)) == 10


def test_quantize_prints_what_was_untied(call, tmp_path, demo_dir):
    _, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out", "--include", "lm_head")
    assert "lm_head was tied to model.decoder.embed_tokens and is now an int8 copy" in out


@pytest.mark.slow
def test_a_static_scheme_is_calibrated_saved_and_scored(call, tmp_path, demo_dir, text):
    arguments = ["--scheme", "w8a8-static", "--calib", text, "--calib-samples", "4", "--calib-length", "64"]
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out", *arguments, "--observer", "percentile")
    assert code == 0
    assert f"Activation scales by percentile on 4 windows, 256 tokens, of {text}, seed 0." in " ".join(out.split())
    scales = {float(layer.input_scale) for _, layer in quant_linears(w8a8.load(tmp_path / "out"))}
    assert len(scales) > 12
    code, out, _ = call("eval", tmp_path / "out", "--text", text, "--against", demo_dir, "--dtype", "float32", "--json")
    assert code == 0
    assert abs(json.loads(out)["perplexity_ratio"]["mean"] - 1) < 0.05


@pytest.mark.parametrize(
    ("option", "alpha"),
    [
        pytest.param(("--smooth", "searched"), "searched", marks=pytest.mark.slow),
        pytest.param(("--smooth", "0.6"), 0.6, marks=pytest.mark.slow),
        (("--smooth", "none"), None),
    ],
)
def test_smoothing_is_asked_for_told_and_saved(call, tmp_path, demo_dir, text, option, alpha):
    arguments = ["--calib", text, "--calib-samples", "2", "--calib-length", "64", *option]
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out", *arguments)
    assert code == 0
    assert (f"groups for w8a8, alpha {alpha}, on 2 windows" in out) is (alpha is not None)
    code, out, _ = call("quantize", demo_dir, "-o", tmp_path / "out", *arguments, "--force", "--json")
    told = json.loads(out)["smooth"]
    folded = [group["source"] for group in told["groups"] if group["alpha"]] if told else []
    norm = next((f"{name}.weight" for name in folded if "norm" in name), "model.decoder.final_layer_norm.weight")
    same = torch.equal(
        w8a8.load(tmp_path / "out").get_parameter(norm), demo_model().model.get_parameter(norm).to(torch.float16)
    )
    assert same is (alpha is None)
    assert (told is None) if alpha is None else (told["alpha"] == alpha and told["change"] < told["bound"])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # transformers reads it too
    assert theirs.get_parameter(norm).shape == (128,)


@pytest.mark.slow
def test_calibration_streams_block_by_block_what_it_does_in_memory(call, tmp_path, demo_dir, text):
    arguments = ["--scheme", "w8a8-static", "--calib", text, "--calib-samples", "2", "--calib-length", "64"]
    dry = call("quantize", demo_dir, "-o", tmp_path / "out", *arguments, "--stream", "--dry-run")
    assert dry[0] == 0
    assert "".join(f"What {demo_dir} will take".split()) in "".join(dry[1].split())
    assert "memory at the peak" in dry[1]
    assert "Nothing was written." in dry[1]
    assert not (tmp_path / "out").exists()
    code, out, _ = call(
        "quantize", demo_dir, "-o", tmp_path / "out", *arguments, "--stream", "--smooth", "0.5", "--json"
    )
    assert code == 0
    told = json.loads(out)
    assert told["smooth"]["alpha"] == 0.5
    assert told["calibration"] == f"2 windows, 128 tokens, of {text}, seed 0"
    assert call("quantize", demo_dir, "-o", tmp_path / "memory", *arguments, "--smooth", "0.5")[0] == 0
    streamed, memory = (w8a8.load(tmp_path / name).state_dict() for name in ("out", "memory"))
    assert streamed.keys() == memory.keys()
    assert all(torch.equal(streamed[key], memory[key]) for key in memory)


@pytest.mark.slow
def test_the_seed_of_a_calibration_decides(call, tmp_path, demo_dir, text):
    scales = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        arguments = ["--scheme", "w8a8-o3", "--calib", text, "--calib-samples", "2", "--calib-length", "32", "--json"]
        arguments += ["--smooth", "none", "--seed", seed]
        code, out, _ = call("quantize", demo_dir, "-o", tmp_path / name, *arguments)
        assert code == 0
        assert json.loads(out)["calibration"] == f"2 windows, 64 tokens, of {text}, seed {seed}"
        scales.append([float(layer.input_scale) for _, layer in quant_linears(w8a8.load(tmp_path / name))])
    assert scales[0] == scales[1] != scales[2]


def test_an_output_that_exists_needs_force(call, tmp_path, demo_dir):
    out = tmp_path / "out"
    assert call("quantize", demo_dir, "-o", out)[0] == 0
    code, _, err = call("quantize", demo_dir, "-o", out)
    assert code == 2
    assert err.startswith(f"w8a8: {out} exists and is not empty")
    assert call("quantize", demo_dir, "-o", out, "--force", "--scheme", "w8a8-o1")[0] == 0
    assert w8a8.load(out).model.decoder.layers[0].fc1.scheme.name == "w8a8-o1"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quantize", "MODEL", "-o", "OUT", "--scheme", "w8a9"), "unknown scheme 'w8a9' (closest: w8a8"),
        (("quantize", "MODEL", "-o", "OUT", "--include", "*.nothing"), "'*.nothing' matches none"),
        (("quantize", "MODEL", "-o", "OUT", "--dtype", "int4"), "unknown dtype 'int4'"),
        (("quantize", "nobody/nothing", "-o", "OUT"), "the hub did not give it"),
        (
            ("quantize", "MODEL", "-o", "OUT", "--scheme", "w8a8-static"),
            "(--calib FILE), or take a dynamic scheme",
        ),
        (("quantize", "MODEL", "-o", "OUT", "--calib", "/no.txt"), "the calibration file /no.txt cannot be read"),
        (("quantize", "MODEL", "-o", "OUT", "--calib", "MODEL/config.json"), "config.json ends in '.json': known are"),
        (("quantize", "MODEL", "-o", "OUT", "--calib", "TEXT", "--observer", "max"), "unknown observer 'max'"),
        (
            ("quantize", "MODEL", "-o", "OUT", "--calib", "TEXT", "--calib-length", "9999", "--scheme", "w8a8-o3"),
            "a window of",
        ),
        (("quantize", "MODEL", "-o", "OUT", "--calib", "TEXT", "--smooth", "much"), "smooth='much' is unknown"),
        (("quantize", "MODEL", "-o", "OUT", "--calib", "TEXT", "--smooth", "2"), "alpha=2.0 is not a number in 0..1"),
        (("quantize", "MODEL", "-o", "OUT", "--smooth", "0.5"), "which needs calibration data"),
        (("eval", "MODEL", "--text", "/nowhere"), "the text /nowhere cannot be read as UTF-8"),
        (("eval", "MODEL", "--text", "TEXT", "--seq-len", "100000"), "seq_len=100000 is out of range"),
        (("eval", "MODEL", "--text", "TEXT", "--stride", "5000"), "stride=5000 is out of range"),
        (("study", "MODEL", "--text", "TEXT", "--bits", "1"), "bits=1 is out of range"),
        (("generate", "MODEL", ""), "the prompt has 0 tokens"),
        (("inspect", "/nowhere/at/all"), "the hub did not give it"),
        (("eval", "MODEL", "--text", "TEXT", "--device", "nowhere"), "device 'nowhere' cannot be used"),
    ],
)
def test_a_users_mistake_is_one_message_and_exit_code_2(call, tmp_path, demo_dir, text, arguments, message):
    places = {"MODEL": demo_dir, "OUT": tmp_path / "out", "TEXT": text, "MODEL/config.json": demo_dir / "config.json"}
    code, out, err = call(*(places.get(a, a) for a in arguments))
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_usage_errors_exit_with_2_too(call):
    assert call("quantize")[0] == 2
    assert call("nonsense")[0] == 2


def test_a_torn_directory_names_file_and_place(call, tmp_path, text):
    shutil.copytree(THEIRS / "llama-w8a8", tmp_path / "d")
    path = tmp_path / "d/model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    code, _, err = call("eval", tmp_path / "d", "--text", text)
    assert code == 2
    assert f"{path} is torn" in err


def test_eval_alone_prints_a_table_and_json(call, quantized, text):
    code, out, _ = call("eval", quantized, "--text", text, "--seq-len", 64, "--stride", 32, "--max-tokens", 300)
    assert code == 0
    assert "perplexity" in out
    assert "windows of 64, 32 apart" in out
    _, out, _ = call("eval", quantized, "--text", text, "--seq-len", 64, "--max-tokens", 300, "--json")
    assert json.loads(out)["seq_len"] == 64
    assert json.loads(out)["stride"] == 64


def test_eval_against_prints_both(call, quantized, demo_dir, text):
    code, out, _ = call(
        "eval", quantized, "--text", text, "--against", demo_dir, "--max-tokens", 300, "--dtype", "float32"
    )
    assert code == 0
    for line in ("model perplexity", "reference perplexity", "perplexity, model / reference", "same most likely token"):
        assert line in out


def test_one_window_has_null_for_its_interval(call, quantized, text):
    _, out, _ = call("eval", quantized, "--text", text, "--max-tokens", 50, "--json")
    assert json.loads(out)["perplexity"]["low"] is None


def test_inspect_reads_float_and_quantised_models_without_weights(call, demo_dir, quantized, tmp_path):
    for name in ("config.json", "generation_config.json"):
        shutil.copy(demo_dir / name, tmp_path / name)  # no weights at all
    code, out, _ = call("inspect", tmp_path)
    assert code == 0
    assert "`w8a8 quantize` takes it" in out
    found = json.loads(call("inspect", tmp_path, "--json")[1])
    assert found["quantized"] is False
    assert found["totals"]["all"]["bytes"] == 2 * found["totals"]["all"]["parameters"]  # float16, as the config says
    found = json.loads(call("inspect", quantized, "--json")[1])
    assert found["quantized"] is True
    assert found["schemes"][0]["activations"]["granularity"] == "token"
    assert found["totals"]["quantized"]["modules"] > 20
    assert {m["kind"] for m in found["modules"] if m["scheme"]} == {"QuantLinear"}


def test_inspect_shows_what_integers_cannot_run_as_simulated(call, tmp_path):
    w8a8.save(w8a8.quantize(llama()).model, tmp_path / "d")
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    (tmp_path / "d" / "config.json").write_text(json.dumps(config | {"intermediate_size": 133_153}))  # sums overflow
    found = json.loads(call("inspect", tmp_path / "d", "--json")[1])
    assert {m["kind"] for m in found["modules"] if m["scheme"]} == {"QuantLinear (simulated)"}


def test_inspect_says_that_stacked_experts_are_taken(call, tmp_path):
    mixtral().save_pretrained(tmp_path / "float")
    told = json.loads(call("inspect", tmp_path / "float", "--json")[1])
    reasons = {module["name"]: module["reason"] for module in told["modules"]}
    assert reasons["model.layers.0.mlp.experts"] == "float now; `w8a8 quantize` takes it"


@pytest.mark.parametrize("make", [qwen2_moe, mixtral])
def test_inspect_says_of_routers_what_quantize_then_does(call, tmp_path, make):
    make().save_pretrained(tmp_path / "float")
    shown = json.loads(call("inspect", tmp_path / "float", "--json")[1])["modules"]
    told = json.loads(call("quantize", tmp_path / "float", "-o", tmp_path / "out", "--json")[1])["coverage"]["modules"]
    done = {m["name"]: m["reason"] for m in told}
    assert any("gate" in m["name"] for m in shown)
    for module in shown:
        if module["name"] in done:
            expected = done[module["name"]] or "float now; `w8a8 quantize` takes it"
            assert module["reason"] == expected, module["name"]


def test_quantize_goes_on_where_no_stand_in_can_be_made(call, tmp_path):
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 40}
    Dinov2Model(Dinov2Config(**sizes, image_size=16, patch_size=4)).save_pretrained(tmp_path / "float")
    code, _, err = call("quantize", tmp_path / "float", "-o", tmp_path / "out", "--no-stream")
    assert code == 0, err
    assert "saving was not rehearsed: no Dinov2Model of one block can be made (ValueError: out_features" in err
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_cannot_be_saved_is_told_before_a_budget_is_spent(call, demo_dir, text, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise ValueError("this tokenizer has no files")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    monkeypatch.setattr(w8a8.analysis, "allocate", lambda *_, **__: pytest.fail("the search was begun"))
    code, _, err = call("quantize", demo_dir, "-o", tmp_path / "out", "--budget", "1MB", "--text", text)
    assert code == 2
    assert "cannot be saved: a model of one block of it failed with ValueError: this tokenizer has no files" in err


def test_a_model_that_is_not_in_the_files_as_it_is_in_memory_is_not_streamed(call, tmp_path):
    mixtral().save_pretrained(tmp_path / "float")  # its experts stay float, and so stacked
    options = ("--include", "*.q_proj")
    code, _, err = call("quantize", tmp_path / "float", "-o", tmp_path / "out", "--stream", *options)
    assert (code, "Traceback" in err) == (2, False)
    assert "tensors have no place of their own" in err
    assert not (tmp_path / "out").exists()
    code, _, err = call("quantize", tmp_path / "float", "-o", tmp_path / "out", *options)
    assert code == 0, err
    assert "not streamed, but in memory" in err
    assert any(True for _ in quant_linears(w8a8.load(tmp_path / "out")))


def test_inspect_pairs_loads_the_weights_and_says_what_folds_and_why_not(call, tmp_path, demo_dir, quantized):
    code, out, _ = call("inspect", demo_dir, "--pairs")
    assert code == 0
    words = " ".join(out.replace("│", " ").split())
    assert "model.decoder.layers.*.fc1 linear 512 of 512 model.decoder.layers.*.fc2 6" in words
    assert "the weight of lm_head is tied to model.decoder.embed_tokens" in words
    found = json.loads(call("inspect", demo_dir, "--pairs", "--json")[1])
    assert found["unread"] == []
    assert found["groups"][0]["source"]["parameters"][0] == {
        "name": "model.decoder.layers.0.self_attn_layer_norm.weight",
        "dim": 0,
        "offset": 0.0,
    }
    assert [r["module"].rpartition(".")[2] for r in found["groups"][0]["readers"]] == ["q_proj", "k_proj", "v_proj"]
    assert found["groups"][0]["readers"][0]["columns"] == found["groups"][0]["source"]["channels"]
    _, out, _ = call("inspect", quantized, "--pairs")
    assert "a quantised layer, whose weight cannot be rescaled" in " ".join(out.replace("│", " ").split())
    (tmp_path / "config.json").write_text((demo_dir / "config.json").read_text())
    code, _, err = call("inspect", tmp_path, "--pairs")
    assert code == 2
    assert err.startswith("w8a8: ")


@pytest.mark.kernels
@pytest.mark.skipif(unavailable_because() is not None, reason="there is no native kernel")
@pytest.mark.not_under("meta", reason="where a default device is set, blocks run as they are")
@pytest.mark.slow
def test_inspect_fused_says_what_runs_in_fewer_passes_and_what_does_not_and_why(call, tmp_path, demo_dir):
    BertModel(bert()).save_pretrained(tmp_path)
    code, out, _ = call("inspect", tmp_path, "--fused")
    words = " ".join(out.replace("│", " ").split())
    assert code == 0
    assert "2 blocks run fused, the model as one graph" in words
    assert "attention yes" in words
    assert json.loads(call("inspect", tmp_path, "--fused", "--json")[1])["blocks"] == 2
    _, out, _ = call("inspect", demo_dir, "--fused")
    words = " ".join(out.replace("│", " ").split())
    assert "0 blocks run fused, 6 as they are" in words
    assert "model.decoder.layers.*" in words
    code, _, err = call("inspect", tmp_path, "--fused", "--pairs")
    assert code == 2
    assert "ask for one at a time" in err


@pytest.mark.slow
def test_study_prints_the_grid_and_names_the_best(call, demo_dir, text):
    arguments = ("study", demo_dir, "--text", text, "--max-tokens", 64, "--bits", 8, "--include", "*.fc1")
    code, out, _ = call(*arguments)
    assert code == 0
    assert "Best that runs in integers: weights int8" in out
    assert out.count("│ 8 ") == 36
    result = json.loads(call(*arguments, "--json")[1])
    assert len(result["cells"]) == 36
    assert result["best_executable"]["executable"] is True
    assert sum(cell["executable"] for cell in result["cells"]) == 16


def test_generate_goes_on_from_the_prompt(call, quantized):
    code, out, _ = call("generate", quantized, "Return a", "--max-new-tokens", 5)
    assert code == 0
    assert out.startswith("Return a")
    sampled = json.loads(call("generate", quantized, "Return a", "--temperature", 1.0, "--seed", 3, "--json")[1])
    assert sampled["prompt"] == "Return a"
    assert sampled["new_tokens"] > 0


def test_schemes_and_doctor_list_what_there_is(call):
    _, out, _ = call("schemes")
    assert "w8a8-asym" in out
    assert json.loads(call("schemes", "--json")[1])["w8a16"]["not_executable_because"].startswith(
        "the activations stay float"
    )
    _, out, _ = call("doctor")
    assert "reference" in out
    assert {k["name"]: k["available"] for k in json.loads(call("doctor", "--json")[1])["kernels"]}["reference"]


@pytest.fixture
def short_demo(monkeypatch):
    """Two schemes, and a layer that is quickly timed."""
    monkeypatch.setattr("w8a8.demo.run.SCHEMES", ("w8a8", "w8a8-asym"))
    monkeypatch.setattr("w8a8.demo.run.time_layer", partial(time_layer, 64))


@pytest.mark.slow
@pytest.mark.usefixtures("short_demo")
def test_demo_prints_its_table_and_sample(call):
    code, out, err = call("demo", "--max-tokens", 512)
    assert code == 0
    first, rest = out.split("w8a8-asym", 1)
    assert "w8a8" in first  # a table of its own, as soon as there is something to show
    assert "w8a8 goes on from 'Return a new'" in rest
    assert "One layer of 64 x 64" in rest
    assert err.splitlines() == ["demo: float (0/2)", "demo: w8a8 (1/2)", "demo: w8a8-asym (2/2)"]


@pytest.mark.slow
@pytest.mark.usefixtures("short_demo")
def test_the_demo_is_one_json_document_where_that_is_asked_for(call):
    found = json.loads(call("demo", "--max-tokens", 512, "--json")[1])
    assert [row["scheme"] for row in found["rows"]] == ["float", "w8a8", "w8a8-asym"]
    assert [each["rows"] for each in found["speed"]["times"]] == [1, 128]


def test_a_model_without_tokenizer_says_so(call, tmp_path, text):
    llama().save_pretrained(tmp_path / "m")
    code, _, err = call("eval", tmp_path / "m", "--text", text)
    assert code == 2
    assert "has no tokenizer" in err


def test_torchrun_is_refused_where_the_work_is_done_in_memory(call, tmp_path, demo_dir, text, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, out, err = call("quantize", demo_dir, "-o", tmp_path / "out", "--calib", text)
    assert (code, out) == (2, "")
    assert err.startswith("w8a8: torchrun shares the work of streaming, and this is done in memory")
    assert not (tmp_path / "out").exists()


def test_sensitivity_prints_the_ten_worst_layers_or_json(call, demo_dir, text):
    options = ["--text", text, "--windows", 1, "--seq-len", 32, "--include", "*fc*"]
    code, out, _ = call("sensitivity", demo_dir, *options)
    assert code == 0
    assert out.count("model.decoder.layers.") >= 10
    assert "worst layers" in out
    code, out, _ = call("sensitivity", demo_dir, *options, "--json")
    found = json.loads(out)
    assert code == 0
    assert len(found["layers"]) == 12
    assert found["rankings"]["kl_alone"][0] == max(found["layers"], key=lambda each: each["kl_alone"])["name"]


@pytest.mark.slow
def test_a_budget_chooses_a_scheme_for_each_layer_and_says_what_it_measured(call, demo_dir, text, tmp_path):
    half = sum(p.numel() for p in demo_model().model.parameters()) * 3 // 2  # of the float16 file's 2 bytes
    out = tmp_path / "out"
    options = ["--budget", str(half), "--text", text, "--include", "*fc*", "--target", "vllm"]
    code, printed, _ = call("quantize", demo_dir, "-o", out, *options)
    assert code == 0
    assert f"Budget: at most {half:,} bytes." in printed
    assert "measured" in printed
    names = {name for name, _ in quant_linears(w8a8.load(out))}
    assert names
    assert all(".fc" in name for name in names)
    code, printed, _ = call("quantize", demo_dir, "-o", tmp_path / "other", *options, "--json")
    found = json.loads(printed)["budget"]
    assert code == 0
    assert {name for name, scheme in found["schemes"].items() if scheme != "float"} == names
    assert found["chosen"]["bytes"] <= half


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--budget", "1MB"], "--text FILE"),
        (["--budget", "1MB", "--text", "t.txt", "--calib", "c.txt", "--stream"], "leave out --stream"),
        (["--budget", "1MB", "--text", __file__, "--option", "w8a8-static"], "no calibration data"),
        (["--budget", "1MB", "--text", __file__, "--smooth", "0.5"], "which needs calibration data"),
        (["--text", "t.txt"], "no budget was given"),
    ],
)
def test_a_budget_without_what_it_needs_is_refused(call, demo_dir, tmp_path, options, told):
    code, _, err = call("quantize", demo_dir, "-o", tmp_path / "out", *options)
    assert code == 2
    assert told in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("way", [[], ["--no-stream"], ["--stream", "--calib", "TEXT"]])
@pytest.mark.parametrize("place", ["source", "."])
def test_the_float_model_is_never_replaced_by_its_quantised_self(call, tmp_path, demo_dir, text, way, place):
    source = tmp_path / "all" / "source"
    shutil.copytree(demo_dir, source)
    shutil.copy(source / "config.json", tmp_path / "all")  # so that it looks like a checkpoint itself
    before = {path: path.read_bytes() for path in source.iterdir()}
    options = [text if option == "TEXT" else option for option in way]
    code, _, err = call("quantize", source, "-o", tmp_path / "all" / place, "--force", *options)
    assert code == 2
    assert "holds the model that is to be quantised" in err
    assert {path: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--report", "/nowhere/page.html"], "there is no directory /nowhere"),
        (["--eval-text", "/nowhere.txt"], "the text /nowhere.txt cannot be read"),
    ],
)
def test_what_comes_at_the_end_is_looked_at_before_the_work(call, tmp_path, demo_dir, options, message):
    code, _, err = call("quantize", demo_dir, "-o", tmp_path / "out", *options)
    assert code == 2
    assert message in err
    assert not list(tmp_path.iterdir())

import json
import re

import pytest
from typer.testing import CliRunner

import w8a8
from tests.conftest import qwen3_moe
from tests.report.standin import standin
from w8a8.analysis.errors import channel_absmax
from w8a8.analysis.layers import sensitivity
from w8a8.calibration.data import Calibration
from w8a8.checkpoint.opening import open_model
from w8a8.cli import main
from w8a8.cli.commands import app
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_directory
from w8a8.errors import ModelError
from w8a8.evaluation import encode
from w8a8.jobs import comparison
from w8a8.layers.linear import quant_linears


def test_report_writes_the_page_and_says_how_large_it_is(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(standin(1)))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "result.json"), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0
    assert " MB." in done.stdout
    assert "Llama stand-in of 1 blocks" in (tmp_path / "page.html").read_text(encoding="utf-8")


@pytest.fixture
def quantize(monkeypatch, tmp_path, capsys):
    """Run `w8a8 quantize` on the demo with a page; returns the page's HTML, the records in it, and what was printed."""

    def run(*options):
        (tmp_path / "text.txt").write_text(held_out_text()[:1500])
        (tmp_path / "calibration.txt").write_text(held_out_text()[:20000])
        page = tmp_path / "page.html"
        fixed = ["-o", tmp_path / "out", "--report", page, "--eval-text", tmp_path / "text.txt"]
        names = {"TEXT": tmp_path / "text.txt", "CALIB": tmp_path / "calibration.txt"}
        arguments = ["quantize", demo_directory(), *fixed, *(names.get(each, each) for each in options)]
        monkeypatch.setattr("sys.argv", ["w8a8", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        assert not stopped.value.code
        printed = capsys.readouterr().out
        assert f"The page is {page}." in printed
        html = page.read_text()
        assert len(html) < 3_000_000
        return html, json.loads(re.search(r'id="records">(.*?)</script>', html)[1]), printed

    return run


def test_quantize_writes_a_page_about_its_result(quantize):
    html, records, _ = quantize()
    layer = "model.decoder.layers.0.fc1"
    for words in (
        "w8a8 quantize",
        layer,
        "Perplexity: ",
        "Bits per byte",
        "Every layer",
        "KL falls by",
        "smoothing",
        "together with",
    ):
        assert words in html
    assert records["measured_on"].startswith("Measured in the float model, on ")
    assert records["measured_on"] in html
    assert all(row["after"] is None for row in records["channels"])


@pytest.mark.slow
@pytest.mark.parametrize("way", [["--dtype", "float32"], ["--stream"]])
def test_a_page_after_smoothing_has_the_layers_of_the_smoothed_model_under_the_scheme_that_was_saved(
    quantize, tmp_path, way
):
    options = ["--calib", "CALIB", "--calib-samples", 4, "--smooth", "0.5", "--scheme", "w8a8-static"]
    html, records, _ = quantize(*options, "--include", "*fc1", "--include", "*.0.*.q_proj", *way)
    sources = {group["source"] for group in records["smoothing"]["groups"] if group["alpha"] == 0.5}
    assert sources == {f"model.decoder.layers.{i}.final_layer_norm" for i in range(6)} | {
        "model.decoder.layers.0.self_attn_layer_norm"
    }
    assert "Alpha per group" in html
    assert "before smoothing: 6 layers by 128 channels" in html
    assert "after smoothing: 6 layers by 128 channels" in html
    assert "7 groups smoothed" in records["measured_on"]
    assert "static ranges by absmax on 4 " in records["measured_on"]

    opened = open_model(demo_directory(), dtype="auto" if way == ["--stream"] else "float32")
    text = encode(opened.tokenizer, (tmp_path / "text.txt").read_text())
    before = channel_absmax(opened.model, text)
    data = Calibration.of(str(tmp_path / "calibration.txt"), opened.tokenizer, samples=4, length=256, seed=0)
    choice = {"include": ["*fc1", "*.0.*.q_proj"]}
    w8a8.smooth_(opened.model, data, alpha=0.5, scheme="w8a8-static", **choice)
    found = sensitivity(opened.model, text, "w8a8-static", calibration=data, before_smoothing=before, **choice)
    assert records["layers"] == json.loads(json.dumps(found.records()["layers"]))
    assert records["channels"] == json.loads(json.dumps(found.records()["channels"]))
    assert all(max(row["after"]) < max(row["before"]) for row in records["channels"])
    saved = w8a8.load(tmp_path / "out")
    for drawn in records["histograms"]:
        if drawn["what"] == "input":
            assert drawn["scale"] == float(saved.get_submodule(drawn["layer"]).input_scale)


@pytest.mark.slow
def test_a_page_is_not_made_of_another_smoothing(monkeypatch, tmp_path, capsys):
    """The calibration data is changed while the result is compared with the float model."""
    text, data = tmp_path / "text.txt", tmp_path / "calibration.txt"
    text.write_text(held_out_text()[:1500])
    data.write_text(held_out_text()[:20000])
    compare = comparison.compare_models

    def meanwhile(*arguments):
        data.write_text(held_out_text()[30000:50000])
        return compare(*arguments)

    monkeypatch.setattr(comparison, "compare_models", meanwhile)
    arguments = [
        "-o",
        tmp_path / "out",
        "--report",
        tmp_path / "page.html",
        "--eval-text",
        text,
        "--include",
        "*.0.fc1",
    ]
    arguments += ["--calib", data, "--calib-samples", 2, "--smooth", "0.5", "--dtype", "float32"]
    monkeypatch.setattr("sys.argv", ["w8a8", "quantize", str(demo_directory()), *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "was smoothed with alpha 0.5 and error" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()
    assert [name for name, _ in quant_linears(w8a8.load(tmp_path / "out"))] == ["model.decoder.layers.0.fc1"]


@pytest.mark.slow
def test_a_budget_after_smoothing_is_measured_and_saved_with_the_same_calibration(quantize, tmp_path):
    options = ["--budget", "5%", "--text", "TEXT", "--option", "w8a8-static", "--include", "*.layers.0.*"]
    calibration = ["--calib", "CALIB", "--calib-samples", 4, "--smooth", "0.5", "--dtype", "float32"]
    _, records, printed = quantize(*options, *calibration)
    assert "Smoothed " in printed
    assert "Activation scales by absmax on 4 " in printed
    assert records["smoothing"]["groups"][0]["alpha"] == 0.5
    assert records["budget"]["constraint"] == "at most 5 % lost"
    saved = dict(quant_linears(w8a8.load(tmp_path / "out")))
    assert {name: layer.scheme.name for name, layer in saved.items()} == {
        layer["name"]: layer["scheme"] for layer in records["layers"]
    }
    assert {layer["scheme"] for layer in records["layers"]} == {"w8a8-static"}
    assert "groups smoothed" in records["measured_on"]
    for drawn in records["histograms"]:
        if drawn["what"] == "input":
            assert drawn["scale"] == float(saved[drawn["layer"]].input_scale)


def test_without_the_drawing_package_nothing_long_is_started(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["quantize", demo_directory(), "-o", tmp_path / "out", "--report", tmp_path / "page.html"]
    monkeypatch.setattr("sys.argv", ["w8a8", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "pip install 'w8a8[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def fails(monkeypatch, capsys, tmp_path, *options):
    """Run `w8a8 quantize` on the demo, which has to stop; returns what it said."""
    arguments = ["quantize", demo_directory(), "-o", tmp_path / "out", *options]
    monkeypatch.setattr("sys.argv", ["w8a8", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("name", "said"), [("folder", "it is a directory"), ("n" * 252, "File name too long")])
def test_a_page_that_cannot_be_written_is_told_before_the_work(monkeypatch, tmp_path, capsys, name, said):
    (tmp_path / "folder").mkdir()
    assert said in fails(monkeypatch, capsys, tmp_path, "--report", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("content", ["", "a"])
def test_a_text_too_short_to_be_scored_is_told_before_the_work(monkeypatch, tmp_path, capsys, content):
    (tmp_path / "text.txt").write_text(content)
    said = fails(monkeypatch, capsys, tmp_path, "--eval-text", tmp_path / "text.txt")
    assert f"the text has {len(content)} tokens" in said
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_fails_says_that_the_checkpoint_is_whole(monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise ModelError("the logits are not finite")

    monkeypatch.setattr(comparison, "compare_models", broken)
    (tmp_path / "text.txt").write_text(held_out_text()[:500])
    said = fails(monkeypatch, capsys, tmp_path, "--eval-text", tmp_path / "text.txt", "--include", "*.0.fc1")
    assert "the logits are not finite" in said
    assert f"{tmp_path / 'out'} is whole" in said
    assert [name for name, _ in quant_linears(w8a8.load(tmp_path / "out"))] == ["model.decoder.layers.0.fc1"]


def test_a_budget_with_room_for_the_float_model_is_told(monkeypatch, tmp_path, capsys):
    (tmp_path / "text.txt").write_text(held_out_text()[:500])
    options = ["--budget", "100MB", "--text", tmp_path / "text.txt", "--include", "*.0.fc1", "--dtype", "float32"]
    said = fails(monkeypatch, capsys, tmp_path, *options)
    assert "--budget 100MB leaves every layer float" in said
    assert "tighter" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_page_has_the_layers_of_experts(monkeypatch, tmp_path):
    tokenizer = open_model(demo_directory()).tokenizer
    model = qwen3_moe()
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    (tmp_path / "text.txt").write_text(held_out_text()[:600])
    page = tmp_path / "page.html"
    options = ["-o", tmp_path / "out", "--report", page, "--eval-text", tmp_path / "text.txt"]
    monkeypatch.setattr("sys.argv", ["w8a8", "quantize", *map(str, [tmp_path / "moe", *options])])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    data = page.read_text().partition('id="records">')[2].partition("</script>")[0]
    layers = {layer["name"]: layer for layer in json.loads(data)["layers"]}
    experts = [layer for name, layer in layers.items() if ".experts." in name]
    assert len(layers) == 8 + 24
    assert all(layer["weight_sqnr_db"] > 20 for layer in experts if layer["weight_sqnr_db"] is not None)
    assert any(layer["kl_alone"] > 0 for layer in experts)

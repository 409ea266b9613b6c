import json

import pytest
from typer.testing import CliRunner

from tests.report.standin import standin
from w8a8.cli.commands import app


def test_report_writes_the_page_and_says_how_large_it_is(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(standin(1)))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "result.json"), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0
    assert " MB." in done.stdout
    assert "Llama stand-in of 1 blocks" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_quantize_writes_a_page_about_its_result(monkeypatch, tmp_path, capsys):
    from w8a8.cli import main
    from w8a8.corpus import held_out_text
    from w8a8.demo import demo_directory

    (tmp_path / "text.txt").write_text(held_out_text()[:6000])
    page = tmp_path / "page.html"
    arguments = ["quantize", demo_directory(), "-o", tmp_path / "out", "--report", page]
    monkeypatch.setattr("sys.argv", ["w8a8", *map(str, arguments), "--eval-text", str(tmp_path / "text.txt")])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    assert f"The page is {page}." in capsys.readouterr().out
    html = page.read_text()
    assert len(html) < 3_000_000
    layer = "model.decoder.layers.0.fc1"
    for words in ("w8a8 quantize", layer, "Perplexity: ", "Bits per byte", "Every layer", "KL falls by"):
        assert words in html


def test_without_the_drawing_package_nothing_long_is_started(monkeypatch, tmp_path, capsys):
    from w8a8.cli import main
    from w8a8.demo import demo_directory

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    arguments = ["quantize", demo_directory(), "-o", tmp_path / "out", "--report", tmp_path / "page.html"]
    monkeypatch.setattr("sys.argv", ["w8a8", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "pip install 'w8a8[report]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

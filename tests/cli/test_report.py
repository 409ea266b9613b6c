import json

from typer.testing import CliRunner

from tests.report.standin import standin
from w8a8.cli.commands import app


def test_report_writes_the_page_and_says_how_large_it_is(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(standin(1)))
    done = CliRunner().invoke(app, ["report", str(tmp_path / "result.json"), "-o", str(tmp_path / "page.html")])
    assert done.exit_code == 0
    assert " MB." in done.stdout
    assert "Llama stand-in of 1 blocks" in (tmp_path / "page.html").read_text(encoding="utf-8")

from dataclasses import replace

import pytest

from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_directory
from w8a8.errors import ReportError
from w8a8.jobs.page import check_page, measure_layers, page_records
from w8a8.jobs.quantization import quantize_to
from w8a8.jobs.request import Job
from w8a8.report.records import check

LAYER = "model.decoder.layers.0.fc1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    place = tmp_path_factory.mktemp("made") / "out"
    return quantize_to(Job(str(demo_directory()), place, include=[LAYER], seed=3))


def test_a_page_says_how_python_makes_the_result_again(made):
    records = page_records(made)
    check(records)
    again = records["reproduce"]
    assert again["command"] == f"quantize_to({made.job!r})"
    assert again["seed"] == 3
    assert records["headline"]["verdict"] == "Quality was not measured."
    asked = replace(made, job=replace(made.job, command="w8a8 quantize ..."))
    assert page_records(asked)["reproduce"]["command"] == "w8a8 quantize ..."


def test_measured_layers_are_on_the_page(made, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:500])
    layers = measure_layers(made, str(text))
    assert capsys.readouterr().out == ""
    records = page_records(replace(made, layers=layers))
    check(records)
    assert [layer["name"] for layer in records["layers"]] == [LAYER]
    assert records["measured_on"].startswith("Measured in the float model, on ")
    assert records["remedies"]


def test_a_page_that_cannot_be_written_is_told_at_once(tmp_path):
    with pytest.raises(ReportError, match="it is a directory"):
        check_page(tmp_path)

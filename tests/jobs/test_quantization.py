"""What the command does, called from Python."""

import json
import sys

import pytest

from tests.conftest import every_third
from tests.jobs.conftest import Heard
from w8a8.cli import main
from w8a8.core.plain import plain
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_directory
from w8a8.errors import CheckpointError, SchemeError
from w8a8.jobs.quantization import quantize_to
from w8a8.jobs.request import BudgetSearch, CalibrationText, Job, Way

DEMO = str(demo_directory())


@pytest.fixture
def calibration(tmp_path):
    path = tmp_path / "calibration.txt"
    path.write_text(held_out_text()[:20000])
    return CalibrationText(str(path), samples=2, length=32)


@pytest.mark.parametrize("name", ["dangling", "n" * 256, "n\0ul"], ids=["dangling", "long", "NUL"])
@pytest.mark.parametrize("way", Way)
def test_no_way_does_any_work_for_a_name_that_cannot_be_made(tmp_path, calibration, way, name):
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.iterdir())
    asked = {} if way is Way.FILES else {"calibration": calibration, "stream": way is Way.BLOCKS}
    heard = Heard()
    with pytest.raises(CheckpointError, match=r"cannot be made: .*(is a link to nowhere|does not take this name)"):
        quantize_to(Job(DEMO, tmp_path / name, **asked), heard)
    assert not heard.plans
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("way", every_third([Way.MEMORY, Way.BLOCKS, Way.FILES]))
def test_python_writes_the_bytes_that_the_command_writes(monkeypatch, capsys, tmp_path, calibration, way):
    options = ["--calib", calibration.source, "--calib-samples", 2, "--calib-length", 32]
    options += ["--smooth", 0.5, "--scheme", "w8a8-static"]
    asked = {"calibration": calibration, "smooth": 0.5, "scheme": "w8a8-static"}
    if way is Way.FILES:
        options, asked = [], {}
    elif way is Way.BLOCKS:
        options.append("--stream")
        asked["stream"] = True
    arguments = ["w8a8", "quantize", DEMO, "-o", tmp_path / "theirs", "--json", *options]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    told = json.loads(capsys.readouterr().out)
    job = Job(DEMO, tmp_path / "ours", **asked)
    assert job.way is way
    made = quantize_to(job)
    assert capsys.readouterr().out == ""
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    for name in names:
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes(), name
    ours = json.loads(json.dumps(plain(made.to_dict())))
    for changing in ("output", "prediction"):  # the memory of the moment
        told.pop(changing, None)
        ours.pop(changing, None)
    assert ours == told


def test_a_watcher_hears_the_stages_and_the_plan(tmp_path):
    heard = Heard()
    made = quantize_to(Job(DEMO, tmp_path / "out", include=("*.0.fc1",), dry_run=True), heard)
    assert heard.stages == ["quantising"]
    ((plan, prediction),) = heard.plans
    assert made.findings == plan.findings
    assert made.streamed.prediction == prediction
    assert made.notes == ()
    assert heard.told == [("made", True)]
    assert not (tmp_path / "out").exists()


def test_the_comparison_is_part_of_the_job(tmp_path, capsys):
    text, heard = tmp_path / "text.txt", Heard()
    text.write_text(held_out_text()[:500])
    made = quantize_to(Job(DEMO, tmp_path / "out", include=("*.0.fc1",), eval_text=str(text)), heard)
    assert heard.stages == ["quantising", "comparing"]
    assert heard.told == [("made", True), ("compared", False)]
    assert made.to_dict()["evaluation"]["verdict"] == made.compared.both.verdict
    assert "on text.txt: " in (tmp_path / "out" / "README.md").read_text()
    assert "pushed" not in made.to_dict()
    assert capsys.readouterr().out == ""


def test_a_search_is_in_the_result(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:500])
    heard, search = Heard(), BudgetSearch("50%", str(text), ("w8a8",))
    made = quantize_to(Job(DEMO, tmp_path / "out", include=("*.0.fc1",), search=search, dtype="float32"), heard)
    assert made.allocation.schemes["model.decoder.layers.0.fc1"].name == "w8a8"
    assert heard.stages == ["smoothing", "measuring", "quantising"]
    assert made.to_dict()["budget"]["schemes"] == {"model.decoder.layers.0.fc1": "w8a8"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"scheme": "w8a8-static"}, "static activation scales"),
        ({"target": "vlm"}, "--target vlm is unknown"),
        ({"private": True}, "--private is of a new repository on the hub"),
        ({"stream": True, "dtype": "float32"}, "--stream goes from files to files"),
        ({"stream": True, "smooth": 0.5}, "--stream goes from files to files"),
        ({"stream": True, "search": BudgetSearch("1MB", "t.txt")}, "--budget measures a model in memory"),
    ],
)
def test_a_job_that_contradicts_itself_cannot_be_made(tmp_path, asked, message):
    with pytest.raises(SchemeError, match=message):
        Job(DEMO, tmp_path / "out", **asked)


def test_what_is_in_the_way_is_told_before_the_model_is_loaded(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        quantize_to(Job("/no/model", tmp_path / "out", stream=False))


def test_a_dry_run_in_memory_is_refused(tmp_path):
    with pytest.raises(SchemeError, match="--dry-run shows what streaming will take"):
        quantize_to(Job(DEMO, tmp_path / "out", stream=False, dry_run=True))

"""One call for both ways from files to files; what is asked is judged before a file is opened."""

import subprocess
import sys

import pytest
import torch

import w8a8
from tests.conftest import contents, llama
from w8a8.calibration.data import Calibration
from w8a8.directories import quantize_directory
from w8a8.errors import CalibrationError, CheckpointError, ModelError, SchemeError
from w8a8.model.roles import Head
from w8a8.smoothing.way import NONE, SEARCHED, Smoothing

IDS = torch.randint(3, 96, (6, 20), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "w8a8-static"}, "static activation scales, and there is no calibration data"),
        ({"smooth": 0.5}, "smooth=0.5 was asked for, which needs calibration data"),
        ({"smooth": "searched"}, "smooth='searched' was asked for, which needs calibration data"),
        ({"smooth": SEARCHED}, "smooth='searched' was asked for, which needs calibration data"),
        ({"smooth": "loud"}, "smooth='loud' is unknown"),
        ({"calibration": IDS, "smooth": NONE}, "does not use calibration data"),
        ({"calibration": IDS, "smooth": "none"}, "does not use calibration data"),
        ({"calibration": IDS, "smooth": "loud"}, "smooth='loud' is unknown"),
        ({"calibration": IDS, "smooth": 1.5}, "1.5"),
        ({"calibration": IDS, "shard_bytes": 1000}, "shard_bytes=1000 was given with calibration data"),
        ({"calibration": lambda model: None, "scheme": "w8a8-static"}, "is a loop"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_file_is_opened(tmp_path, options, message):
    with pytest.raises(SchemeError, match=message):
        quantize_directory(tmp_path / "nowhere", tmp_path / "out", **options)


def test_an_unknown_observer_is_refused_before_a_file_is_opened(tmp_path):
    with pytest.raises(CalibrationError, match="unknown observer 'most'"):
        quantize_directory(tmp_path / "nowhere", tmp_path / "out", "w8a8-static", calibration=IDS, observer="most")


def test_an_unknown_head_is_refused_before_a_file_is_opened(tmp_path):
    with pytest.raises(ModelError, match="head='float16' is unknown"):
        quantize_directory(tmp_path / "nowhere", tmp_path / "out", head="float16")


@pytest.mark.parametrize(
    "made", [{}, {"calibration": IDS, "scheme": "w8a8-static", "smooth": 0.5}], ids=["without", "with"]
)
def test_an_unfinished_result_is_gone_on_with_whether_modes_are_words_or_types(tmp_path, made):
    llama().save_pretrained(tmp_path / "source")

    def stop(done, total, name):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_directory(tmp_path / "source", tmp_path / "out", **made, head="int8", progress=stop)
    typed = made | ({"smooth": Smoothing.of(0.5)} if made else {"smooth": NONE})
    done = quantize_directory(tmp_path / "source", tmp_path / "out", **typed, head=Head.INT8)
    assert done.resumed == (1 if made else 0)


def test_several_processes_do_not_share_a_job_with_data(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(CheckpointError, match="2 processes were started: run it without torchrun"):
        quantize_directory(tmp_path / "nowhere", tmp_path / "out", "w8a8-static", calibration=IDS)


def test_the_result_of_both_ways_is_told_in_one_form(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    without = w8a8.quantize_directory(tmp_path / "source", tmp_path / "pieces", smooth="none")
    data = w8a8.quantize_directory(tmp_path / "source", tmp_path / "blocks", "w8a8", calibration=IDS, smooth=0.5)
    assert type(without) is type(data)
    assert (without.smooth, without.shards, without.resumed, without.first) == (None, 1, 0, True)
    assert (data.smooth.alpha, data.shards, data.resumed, data.first) == (0.5, 3, 0, True)
    assert [m.name for m in without.coverage.quantized] == [m.name for m in data.coverage.quantized]


def test_calibration_is_what_quantize_takes_it_to_be(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    for name, given in (("ids", IDS), ("calibration", Calibration.of(IDS))):
        quantize_directory(tmp_path / "source", tmp_path / name, "w8a8-static", calibration=given, smooth="none")
    assert contents(tmp_path / "ids") == contents(tmp_path / "calibration")


@pytest.mark.slow
def test_without_data_neither_calibration_nor_smoothing_is_imported(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    code = (
        "import sys; from w8a8.directories import quantize_directory; quantize_directory(*sys.argv[1:]); "
        "print([n for n in sys.modules if n.startswith(('w8a8.calibration', 'w8a8.smoothing', 'w8a8.blockwise'))])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "source"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split("\n")[-2] == "[]"

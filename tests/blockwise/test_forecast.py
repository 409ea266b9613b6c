"""What going block by block will take."""

from dataclasses import replace

import pytest

from tests.blockwise.conftest import data, saved
from tests.conftest import llama
from w8a8.blockwise import forecast
from w8a8.directories import quantize_directory
from w8a8.errors import CheckpointError


def predicted_seconds(source, monkeypatch, scheme, smooth, **changes):
    """What the forecast makes of trials of which each takes a second, and nothing else any time."""
    monkeypatch.setattr(forecast, "_least", lambda work: (1.0, work()))
    monkeypatch.setattr(forecast, "_hashing", lambda: 0.0)
    real = forecast.predict
    monkeypatch.setattr(
        forecast, "predict", lambda *a, **k: replace(real(*a, **k), seconds=0.0, write_seconds=0.0, **changes)
    )
    told = []
    quantize_directory(
        source,
        source.with_name("out"),
        scheme,
        calibration=data(),
        smooth=smooth,
        dry_run=True,
        before=lambda plan, prediction: told.append(prediction.seconds),
    )
    return told[0]


def test_the_forecast_counts_passes_groups_comparisons_and_the_search(tmp_path, monkeypatch):
    source = saved(llama(), tmp_path / "source")
    batches, blocks = 3, 2
    weights = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 100  # all that reads a group, the search is tried on the largest
    pass_, seen = batches, 1
    search = weights / (64 * 100)
    compared = (1 + 2) / 2  # with two states of the weights, of which the first is run twice
    for scheme, smooth, passes in (("w8a8-static", "none", 1), ("w8a8-static", 0.5, 2), ("w8a8", "searched", 1)):
        with monkeypatch.context() as patched:
            found = predicted_seconds(source, patched, scheme, smooth)
        smoothing = 0 if smooth == "none" else seen + compared + search
        assert found == pytest.approx(blocks * (passes * pass_ + smoothing))


def test_no_block_is_loaded_where_memory_will_not_do(tmp_path, monkeypatch):
    source = saved(llama(), tmp_path / "source")
    monkeypatch.setattr(forecast, "load", None)
    with pytest.raises(CheckpointError, match="GB of memory"):
        predicted_seconds(source, monkeypatch, "w8a8-static", 0.5, memory_bytes=1)

"""What is told of single layers, wherever it was measured."""

import subprocess
import sys
from dataclasses import asdict

import pytest

from w8a8.records.layers import MAX_COLUMNS, Rankings, binned
from w8a8.report.records import check


@pytest.mark.parametrize("channels", [1, 100, 128, 129, 1000, 4096])
def test_binning_keeps_every_outlier_and_at_most_the_columns(channels):
    values = [1.0] * channels
    values[channels // 3] = 50.0
    found = binned(values)
    assert len(found) == min(channels, MAX_COLUMNS)
    assert found.count(50.0) == 1


@pytest.mark.parametrize("measured", [{}, {"top": 2, "spearman": 0.5}], ids=str)
def test_the_page_reads_the_rankings_that_are_told_elsewhere(measured):
    told = Rankings(["a", "b"], ["b", "a"], **measured)
    headline = {"model": "m", "scheme": "w8a8", "verdict": "fine"}
    assert check({"schema": 1, "headline": headline, "rankings": asdict(told)}).rankings == told


def test_what_is_told_is_read_without_torch():
    rooms = ", ".join(f"w8a8.records.{name}" for name in ("coverage", "smoothing", "layers", "streaming"))
    code = f"import sys; sys.modules['torch'] = None; import {rooms}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

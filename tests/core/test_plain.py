import math
from pathlib import Path

from w8a8.core.plain import plain
from w8a8.core.scheme import PerGroup, QuantSpec
from w8a8.layers.linear import Mode


def test_plain_values_are_json_values():
    assert plain({"a": (1, math.nan, math.inf, Path("x"), Mode.INTEGER)}) == {"a": [1, None, None, "x", "integer"]}
    assert plain(QuantSpec(4, PerGroup(32)))["granularity"] == "group32"

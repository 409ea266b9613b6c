import json

import pytest

from tests.report.standin import standin
from w8a8.errors import ReportError
from w8a8.report.records import check, read_records

SMALL = {"schema": 1, "headline": {"model": "m", "scheme": "w8a8", "verdict": "fine"}}


def test_a_headline_alone_is_enough():
    read = check(SMALL)
    assert read.headline.model == "m"
    assert read.layers == []
    assert read.coverage is None


def test_every_part_of_the_stand_in_is_read():
    records = standin(2)
    read = check(records)
    assert [layer.name for layer in read.layers] == [layer["name"] for layer in records["layers"]]
    assert read.budget.points[3].bytes == records["budget"]["points"][3]["bytes"]
    assert read.histograms[1].zero_point == -3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, 'need "schema": 1, found 2'),
        ({"layer": []}, "records has the unknown key 'layer'; closest: layers"),
        ({"headline": {"model": "m", "scheme": "s"}}, "records.headline has no 'verdict'"),
        ({"layers": [{"name": "a", "kind": 3}]}, r"records.layers\[0\].kind should be a text, found int 3"),
        ({"layers": {}}, "records.layers should be a list, found dict"),
        ({"layers": [{"name": "a", "kind": "b", "cosine": True}]}, "cosine should be a number, found bool"),
        ({"layers": [{"name": "a", "kind": "b", "cosine": float("nan")}]}, "cosine is nan, which JSON has not"),
        ({"coverage": 1}, "records.coverage should be an object, found int"),
        ({"rankings": {"kl_alone": "abc", "kl_spared": []}}, "kl_alone should be a list, found str"),
        ({"channels": [{"layer": "a", "before": [1.0], "after": [1.0, 2.0]}]}, "1 values before and 2 after"),
        (
            {"channels": [{"layer": "a", "before": [1.0] * 129}]},
            "129 values before and 0 after; they are as many, 1..128",
        ),
        ({"budget": {"points": [], "chosen": 0}}, "chosen is 0; it counts the 0 points"),
    ],
)
def test_what_does_not_follow_the_schema_is_named_with_its_place(change, message):
    with pytest.raises(ReportError, match=message):
        check(SMALL | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [0.0, 1.0]}, "2 edges and 2 counts; n bins have n"),
        ({"edges": [0.0, 2.0, 1.0]}, "edges do not ascend"),
        ({"scale": 0.0}, "scale is 0.0; a grid's scale is positive"),
    ],
)
def test_a_histogram_that_contradicts_itself_is_refused(change, message):
    whole = {"layer": "a", "what": "weight", "edges": [0.0, 1.0, 2.0], "counts": [3, 4], "scale": 0.1, "qmax": 127}
    check(SMALL | {"histograms": [whole]})
    with pytest.raises(ReportError, match=message):
        check(SMALL | {"histograms": [whole | change]})


def test_a_file_that_is_not_json_is_refused_by_its_name(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ReportError, match=r"a\.json cannot be read as a JSON file of records"):
        read_records(tmp_path / "a.json")
    (tmp_path / "b.json").write_text(json.dumps(SMALL | {"seed": 0}))
    with pytest.raises(ReportError, match="unknown key 'seed'") as raised:
        read_records(tmp_path / "b.json")
    assert "b.json" in raised.value.explain()

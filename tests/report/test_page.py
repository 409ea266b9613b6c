import base64
import hashlib
import re
import subprocess
import sys
import zlib

import pytest

from tests.report.standin import standin
from w8a8.errors import ReportError
from w8a8.records.layers import Histogram
from w8a8.report import collect, report, write_report
from w8a8.report.collect import verdict_of
from w8a8.report.markup import embedded
from w8a8.report.plots import shown_codes
from w8a8.report.png import PALETTE, data_uri

RATIO = {"mean": 1.006, "low": 1.004, "high": 1.009}


@pytest.mark.slow
def test_a_page_of_32_blocks_is_below_3_mb_and_names_nothing_outside(tmp_path):
    write_report(tmp_path / "page.html", standin(32))
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 3e6
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    assert set(re.findall(r"https?://[^\s\"'<)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }


def test_the_policy_allows_the_pages_own_script_and_style_by_their_hashes():
    page = report(standin(1))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page).group(1)
    assert policy.startswith("default-src 'none'; ")
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_parts_that_are_absent_leave_their_sections_out():
    page = report(collect(model="m", scheme="w8a8"))
    assert "Quality was not measured." in page
    assert re.findall(r'<h2 id="([^"]+)"', page) == []
    assert re.findall(r'<h2 id="([^"]+)"', report(standin(1))) == [
        "worst", "coverage", "plots", "per-layer", "channels", "histograms", "smoothing", "budget", "reproduce",
    ]  # fmt: skip


def test_a_column_that_was_measured_for_no_layer_is_left_out():
    page = report(collect(model="m", scheme="w8a8", layers=[{"name": "a.fc1", "kind": "fc1", "cosine": 0.5}]))
    assert re.findall(r'<button type="button" data-column="\d">([^<]+)<', page) == ["layer", "kind", "cosine"]


def test_coverage_tells_what_each_weight_lost():
    module = {"kind": "QuantLinear", "shape": [4, 4], "parameters": 16, "bytes": 20, "macs": 16, "scheme": "w8a8"}
    modules = [
        {"name": "a.fc1", **module, "reason": None, "weight_sqnr_db": 41.26},
        {"name": "a.fc2", **module, "reason": None, "weight_sqnr_db": None},
    ]
    page = report(collect(model="m", scheme="w8a8", coverage={"totals": totals_of(modules), "modules": modules}))
    assert "weight SQNR, dB" in page
    assert ">41.3<" in page
    modules[0].pop("weight_sqnr_db")  # as earlier versions wrote it
    page = report(collect(model="m", scheme="w8a8", coverage={"totals": totals_of(modules), "modules": modules}))
    assert ">41.3<" not in page


def totals_of(modules):
    sums = {key: sum(m[key] for m in modules) for key in ("parameters", "bytes", "macs")}
    return {name: {"modules": len(modules), **sums} for name in ("quantized", "all")}


def test_embedded_data_cannot_end_its_element():
    document = embedded({"</script><!--": "\u2028\u2029&"})
    assert re.search("[<>&\u2028\u2029]", document) is None


def test_a_page_that_cannot_be_written_leaves_nothing_behind(tmp_path):
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ReportError, match="cannot be written"):
        write_report(tmp_path / "page.html", standin(1))
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]


def test_without_vl_convert_the_way_out_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ReportError, match=r"pip install 'w8a8\[report\]'"):
        report(standin(1))


def test_the_package_imports_no_torch():
    code = "import sys, w8a8.report; print({'torch', 'vl_convert'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_a_picture_holds_one_palette_index_per_element():
    png = base64.b64decode(data_uri([[0, 1, 255], [7, 8, 9]]).partition(",")[2])
    assert png[16:24] == (3).to_bytes(4, "big") + (2).to_bytes(4, "big")
    start = png.index(b"IDAT")
    length = int.from_bytes(png[start - 4 : start], "big")
    assert zlib.decompress(png[start + 4 : start + 4 + length]) == bytes([0, 0, 1, 255, 0, 7, 8, 9])
    assert (len(PALETTE), PALETTE[:3], PALETTE[-3:]) == (768, b"\x00\x22\x4e", b"\xfe\xe8\x38")


@pytest.mark.parametrize(("qmin", "qmax", "every"), [(None, 1, 1), (-8, 7, 1), (None, 127, 8), (0, 255, 8)])
def test_the_drawn_codes_hold_both_ends_of_the_grid(qmin, qmax, every):
    codes, step = shown_codes(Histogram("a", "weight", [0.0, 1.0], [1], 0.1, qmax, qmin))
    assert (codes[0], codes[-1], step) == (-qmax if qmin is None else qmin, qmax, every)
    assert len(codes) <= 35


def test_the_verdict_is_that_of_the_comparison():
    assert verdict_of({"verdict": "worse by 0.40 % to 0.90 %"}) == "Perplexity: worse by 0.40 % to 0.90 %."
    assert verdict_of(None) == "Quality was not measured."
    outputs = {"output": "last_hidden_state", "relative_error": {"mean": 0.1}, "cosine": {"mean": 0.99875}}
    assert verdict_of(outputs) == "last_hidden_state: a cosine of 0.998750 with the float model's."


def test_collected_smoothing_and_other_parts_reach_the_records():
    group = {"source": "a", "readers": ("b",), "alpha": 0.5, "error_before": 2.0, "error_after": 1.0, "change": 0.0,
             "reason": None}  # fmt: skip
    records = collect(
        model="m", scheme="s", smooth={"groups": [group], "kept": "searched"}, headline={"tok_per_s_after": 3}
    )
    assert records["smoothing"]["groups"][0]["alpha"] == 0.5
    assert records["headline"]["tok_per_s_after"] == 3
    with pytest.raises(ReportError, match="unknown key 'remedy'"):
        collect(model="m", scheme="s", remedy=[])


def test_rates_are_read_without_exponents():
    records = standin(1)
    records["headline"] |= {"tok_per_s_before": 11625.6, "tok_per_s_after": 123456.7}
    assert "11,626 → 123,457 tokens/s" in report(records)


def test_a_kind_looks_alike_in_every_plot():
    """The first layer's effect cannot be drawn on logarithmic axes, so its kind comes later there."""
    records = standin(2)
    records["layers"][0]["kl_spared"] = -1e-6
    figures = [found for found in re.findall("<figure>.*?</figure>", report(records), re.DOTALL) if "q_proj: " in found]
    looks = {
        re.search('aria-label="model.layers.1.self_attn.q_proj: [^"]*"[^>]*fill="([^"]+)"', figure)[1]
        for figure in figures
        if "mark-symbol" in figure and "1.self_attn.q_proj: " in figure
    }
    assert looks == {"var(--s0)"}

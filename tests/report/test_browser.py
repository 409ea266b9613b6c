"""The page in a browser: Chromium, headless, without a network."""

import json
import os
import shutil

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import expect, sync_playwright

from tests.report.standin import COLUMNS, standin
from w8a8.analysis import remedies, sensitivity
from w8a8.analysis.errors import channel_absmax
from w8a8.calibration.data import Calibration
from w8a8.core.plain import plain
from w8a8.demo.corpus import held_out_text
from w8a8.demo.run import demo_model
from w8a8.evaluation import compare, encode
from w8a8.pipeline import quantize
from w8a8.report import collect, report, write_report
from w8a8.smoothing.smooth import smooth_

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="no Chromium: apt-get install chromium, or name its binary in $CHROMIUM"
    ),
]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
BLOCKS = 32
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


def demo_records():
    """A real result: the shipped model, smoothed, measured, quantised and compared with what it was."""
    opened, reference = demo_model(), demo_model()
    before = sum(p.numel() * p.element_size() for p in reference.model.parameters())
    ids = encode(opened.tokenizer, held_out_text()[:12000]).first(1024)
    data, sample = Calibration.of(ids.ids.view(8, 128)), {"windows": 1, "seq_len": 64}
    absmax = channel_absmax(opened.model, ids, **sample)
    smooth = smooth_(opened.model, data, alpha=0.5, scheme="w8a8-static")
    found = sensitivity(opened.model, ids, "w8a8-static", calibration=data, before_smoothing=absmax, **sample)
    made = remedies(opened.model, ids, found, "w8a8-static", calibration=data, count=3)
    measured = found.records()
    measured["histograms"] = measured["histograms"][:4]
    result = quantize(opened.model, "w8a8-static", calibration=data, smooth="none")
    return collect(
        model="demo",
        scheme="w8a8-static",
        bytes_before=before,
        coverage=plain(result.coverage.to_dict()),
        comparison=plain(compare(opened.model, reference.model, ids, seq_len=128)),
        smooth=plain(smooth.to_dict()),
        remedies=plain(made),
        measured_on="Measured in the smoothed model.",
        reproduce={"command": "w8a8 demo", "seed": 0},
        **measured,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    made = {"demo": demo_records(), "standin": standin(BLOCKS)}
    folder = tmp_path_factory.mktemp("pages")
    for name, records in made.items():
        write_report(folder / f"{name}.html", records)
    return made, folder


class Visit:
    """A page with everything that it said and asked for."""

    def __init__(self, browser, uri, **options):
        self.page = browser.new_page(**options)
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.said.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(uri)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.page.close()

    def names(self):
        """Of the visible rows of the table of layers, in order."""
        return self.page.locator("#layers tbody tr:visible th").all_text_contents()

    def marks(self, figure, kind):
        """Labels of a plot's marks."""
        found = self.page.locator("figure", has=self.page.locator("figcaption", has_text=figure)).locator(
            f'svg [aria-roledescription="{kind}"]'
        )
        return found.evaluate_all("marks => marks.map(mark => mark.getAttribute('aria-label'))")


@pytest.fixture
def visit(browser, pages):
    opened = []

    def _visit(name, **options):
        opened.append(Visit(browser, (pages[1] / f"{name}.html").as_uri(), **options))
        return opened[-1]

    yield _visit
    for one in opened:
        one.page.close()


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        *(("demo", width, theme) for width in (400, 1600) for theme in ("light", "dark")),
        ("standin", 400, "light"),
        ("standin", 1600, "dark"),
    ],
)
def test_the_page_is_quiet_accessible_and_as_wide_as_the_window(visit, name, width, theme):
    seen = visit(name, viewport={"width": width, "height": 900}, color_scheme=theme)
    if name == "demo":  # the stand-in's tables are the same ones, thousands of rows long
        seen.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
    serious = [v for v in Axe().run(seen.page).response["violations"] if v["impact"] in ("serious", "critical")]
    assert [(v["id"], [n["html"] for n in v["nodes"][:3]]) for v in serious] == []
    assert seen.page.evaluate("document.documentElement.scrollWidth") == width
    assert seen.said == []
    assert [url for url in seen.asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in seen.asked if url.startswith("file:")]) == 1


def test_the_policy_forbids_what_the_page_does_not_carry(visit):
    seen = visit("demo")
    seen.page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://localhost:9/x.png'}))")
    seen.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.ran = 1'}))"
    )
    seen.page.wait_for_timeout(100)
    assert seen.page.evaluate("window.ran") is None
    assert len([line for line in seen.said if "Content Security Policy" in line]) == 2


def test_headings_sort_up_and_down_with_the_unmeasured_last(visit, pages):
    layers = pages[0]["standin"]["layers"]
    seen = visit("standin")
    heading = seen.page.locator("#layers th[aria-sort]", has_text="KL spared")
    measured = sorted((x["kl_spared"], x["name"]) for x in layers if x["kl_spared"] is not None)
    unmeasured = {x["name"] for x in layers if x["kl_spared"] is None}
    assert unmeasured

    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "ascending"
    assert seen.names()[: len(measured)] == [name for _, name in measured]
    assert set(seen.names()[len(measured) :]) == unmeasured
    heading.get_by_role("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    assert seen.names()[: len(measured)] == [name for _, name in measured[::-1]]
    assert set(seen.names()[len(measured) :]) == unmeasured
    assert seen.page.locator('[aria-sort="ascending"], [aria-sort="descending"]').count() == 1


def test_the_keyboard_sorts(visit):
    seen = visit("standin")
    seen.page.locator("#filter-name").focus()
    for _ in range(4):  # the kinds, the reset, the region that scrolls, the first heading
        seen.page.keyboard.press("Tab")
    seen.page.keyboard.press("Enter")
    seen.page.keyboard.press("Enter")
    heading = seen.page.locator("#layers th[aria-sort]").first
    assert heading.get_attribute("aria-sort") == "descending"
    assert seen.names()[0] == f"model.layers.{BLOCKS - 1}.self_attn.v_proj"


def test_names_and_kinds_filter_together_and_reset(visit):
    seen = visit("standin")
    seen.page.fill("#filter-name", "LAYERS.3.")
    assert len(seen.names()) == 7
    seen.page.select_option("#filter-kind", "down_proj")
    assert seen.names() == ["model.layers.3.mlp.down_proj"]
    assert seen.page.locator("#shown").text_content() == f"1 of {7 * BLOCKS} layers"
    seen.page.get_by_role("button", name="Show all").click()
    expect(seen.page.locator("#shown")).to_have_text(f"{7 * BLOCKS} of {7 * BLOCKS} layers")  # it waits
    assert len(seen.names()) == 7 * BLOCKS


def test_plots_hold_as_many_marks_as_there_are_data(visit, pages):
    records = pages[0]["standin"]
    seen = visit("standin")
    for title in ("Output SQNR", "Weight SQNR", "Input SQNR"):
        assert len(seen.marks(title, "point")) == 7 * BLOCKS
    effects = [x for x in records["layers"] if x["kl_spared"] is not None]
    assert len(seen.marks("Two views", "point")) == len(effects) < 7 * BLOCKS
    groups = records["smoothing"]["groups"]
    assert len(seen.marks("Alpha per group", "point")) == len(groups) == 4 * BLOCKS
    assert len(seen.marks("Error per group", "point")) == 2 * len(groups)
    points = records["budget"]["points"]
    measured = [p for p in points if p["measured_kl_nats"] is not None]
    assert len(seen.marks("KL against bytes", "point")) == len(points) + len(measured)
    assert len(seen.marks("KL against bytes", "rule mark")) == 1


def test_histograms_hold_every_bin_and_the_ends_of_their_grids(visit, pages):
    seen = visit("standin")
    for found in pages[0]["standin"]["histograms"]:
        title = f"{found['layer']}, {found['what']}"
        assert len(seen.marks(title, "bar")) == len(found["counts"])
        ticks = seen.marks(title, "tick")
        low = -found["qmax"] if found["qmin"] is None else found["qmin"]
        assert (ticks[0], ticks[-1]) == (f"code {low}", f"code {found['qmax']}")
        assert len(seen.marks(title, "rule mark")) == 2


def test_heat_maps_hold_a_pixel_per_channel_and_layer(visit):
    seen = visit("standin")
    pictures = seen.page.locator(".heat img").evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    assert pictures == [[COLUMNS, BLOCKS]] * 7  # of four tensors, one of which was not smoothed


def test_every_plot_has_its_table(visit):
    seen = visit("standin")
    tables = seen.page.locator("figure").evaluate_all(
        "all => all.map(f => f.querySelectorAll('details tbody tr').length)"
    )
    assert len(tables) == 4 + 4 + 8 + 2 + 1
    assert min(tables) > 8


def test_a_mark_tells_its_data_under_the_pointer(visit):
    seen = visit("standin", viewport={"width": 1600, "height": 900})
    mark = seen.page.locator('figure svg [aria-label^="model.layers.0.mlp.down_proj: "]').first
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    assert seen.page.locator("#tip").text_content().startswith("model.layers.")


def test_the_theme_can_be_changed(visit):
    seen = visit("demo", color_scheme="light")
    paper = "getComputedStyle(document.body).backgroundColor"
    light = seen.page.evaluate(paper)
    seen.page.get_by_role("button", name="Light or dark").click()
    dark = seen.page.evaluate(paper)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(20, 23, 28)")


def test_the_records_can_be_saved_as_they_were_given(visit, pages):
    seen = visit("standin")
    with seen.page.expect_download() as download:
        seen.page.get_by_role("button", name="Save the records").click()
    assert json.loads(download.value.path().read_text()) == pages[0]["standin"]


def test_the_demos_page_shows_what_was_measured(visit, pages):
    seen = visit("demo")
    assert len(seen.names()) == len(pages[0]["demo"]["layers"])
    shown = seen.page.locator("main").text_content()
    assert f"{pages[0]['demo']['headline']['perplexity_quantized']['mean']:.4f}" in shown
    assert pages[0]["demo"]["headline"]["verdict"] in shown


def test_the_demos_page_shows_channels_before_and_after_smoothing_and_what_was_tried(visit, pages):
    records = pages[0]["demo"]
    seen = visit("demo")
    pictures = seen.page.locator(".heat img").evaluate_all("all => all.map(i => [i.naturalWidth, i.naturalHeight])")
    assert pictures == [[128, 6]] * 8  # of four tensors, before and after
    drawn = seen.page.locator(".heat img").evaluate_all("all => all.map(i => i.src)")
    assert len(set(drawn)) == 8
    groups = records["smoothing"]["groups"]
    assert len(seen.marks("Alpha per group", "point")) == len(groups) == 24
    tried = seen.page.locator("details", has_text="Every remedy that was tried").first
    assert tried.locator("tbody tr").count() == len(records["remedies"])
    seen.page.get_by_text("Every remedy that was tried").first.click()
    smoothing = tried.locator("tbody tr", has_text="smoothing").all_text_contents()
    assert len(smoothing) == 3
    assert "Measured in the smoothed model." in seen.page.locator("main").text_content()


def hostile(value):
    """Every text in some records replaced by a script, save for the schema's own words."""
    if isinstance(value, dict):
        return {k: v if k in ("what", "kept") else hostile(v) for k, v in value.items()}
    if isinstance(value, list):
        return [hostile(v) for v in value]
    return HOSTILE + "\u2028<!--" + value if isinstance(value, str) else value


def test_a_module_named_script_is_text(browser, tmp_path):
    records = hostile(standin(2))
    (tmp_path / "page.html").write_text(report(records), encoding="utf-8")
    with Visit(browser, (tmp_path / "page.html").as_uri()) as seen:
        assert seen.said == []
        assert seen.page.locator("script").count() == 2
        assert seen.names()[0] == records["layers"][0]["name"]
        assert HOSTILE in seen.page.locator("h1").text_content()
        assert any(HOSTILE in label for label in seen.marks("Output SQNR", "point"))
        assert json.loads(seen.page.locator("#records").text_content()) == records

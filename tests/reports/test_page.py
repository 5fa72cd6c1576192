"""The report's page: what is in it, that it loads nothing, and what a browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reports.test_report import CONV, FC, HOSTILE, REPORT
from tetris_onnx.algorithms.heatmap import Heatmap
from tetris_onnx.config import Config
from tetris_onnx.optimize import optimize
from tetris_onnx.reports.page import to_html
from tetris_onnx.reports.report import COLUMNS, cells, sort_keys, summary, to_json, write_report

SAMPLE = Path(__file__).parents[2] / "samples" / "fashion_mnist" / "fashion_mnist.onnx"


class _Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.sources: list[str] = []
        self.alternatives: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        assert not [name for name in values if name == "href" or name.startswith("on")]
        self.sources += [str(values["src"])] if "src" in values else []
        self.alternatives += [str(values["alt"])] if "alt" in values else []

    def handle_data(self, data: str) -> None:
        self.text += data


def test_every_figure_of_the_summary_and_every_cell_is_on_the_page() -> None:
    full = replace(
        CONV, sensitivity=0.5, predicted_loss=0.25, output_error=0.125, predicted_ms=(2, 1), measured_ms=(3, 1)
    )
    report = replace(REPORT, layers=(full, FC), accuracy=(0.9, 0.8), labeled=10)
    page = _Page(to_html(report))
    for column in COLUMNS:
        assert column in page.text
    for row in report.layers:
        for cell in cells(row):
            assert cell in page.text
    for label, text in summary(report):
        assert label in page.text and text in page.text
    assert page.tags.count("svg") == 4, "density, error, measured and predicted times"
    assert page.tags.count("rect") == 2 * (2 + 1 + 1 + 1)
    assert "80.0 %" in page.text and "-10.0 points" in page.text


def test_columns_that_say_nothing_are_left_out() -> None:
    page = _Page(to_html(REPORT))
    assert "measured ms" not in page.text and "loss at half" not in page.text and "status" in page.text


def test_it_loads_nothing() -> None:
    picture = np.array([[0, 1], [128, 255]], np.uint8)
    text = to_html(REPORT, {"conv_out": Heatmap(picture, picture, picture), "y": Heatmap(picture)})
    page = _Page(text)
    assert len(page.sources) == 4 and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert page.alternatives == [f"{n}: weights, {k}" for n, k in _PICTURES]
    assert not re.search(r"https?:|url\(|@import", text)
    assert not {"link", "iframe", "object"} & set(page.tags)


_PICTURES = [
    ("features.3", "original"),
    ("features.3", "reordered"),
    ("features.3", "pruned"),
    ("classifier", "original"),
]


def test_pictures_are_what_they_were_made_of() -> None:
    import base64
    import io

    from PIL import Image

    picture = np.array([[0, 1, 2], [128, 254, 255]], np.uint8)
    source = _Page(to_html(REPORT, {"y": Heatmap(picture)})).sources[0]
    image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert (np.asarray(image) == picture).all()
    shades = np.asarray(image.convert("RGBA")).astype(int)
    assert shades[0, 0, 3] == 0 and (shades.reshape(-1, 4)[1:, 3] == 255).all(), "only what is dropped shows the page"
    assert shades[0, 1, :3].sum() > shades[1, 0, :3].sum() > shades[1, 2, :3].sum(), "darker is more"


def test_names_from_a_model_cannot_become_markup() -> None:
    hostile = replace(CONV, layer="x", node=HOSTILE, op_type=HOSTILE, reason=HOSTILE)
    picture = np.ones((1, 1), np.uint8)
    report = replace(REPORT, model=HOSTILE, layers=(hostile,), notes=(HOSTILE,))
    page = _Page(to_html(report, {"x": Heatmap(picture)}))
    assert page.tags.count("script") == 1, "the page's own"
    assert page.text.count("<script>alert(1)") >= 8  # title, heading, three cells, note, picture's name and caption


def test_unknown_values_sort_last_and_sizes_by_number() -> None:
    keys = sort_keys(FC)
    assert len(keys) == len(COLUMNS) == len(cells(FC))
    assert keys[COLUMNS.index("retained")] == "" and keys[COLUMNS.index("weight")] == 640


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The page of the sample and its report in JSON."""
    folder = tmp_path_factory.mktemp("report")
    result = optimize(SAMPLE, Config(sparsity=0.5), weight_pictures=True)
    assert result.maps.keys() == {row.layer for row in result.report.layers}
    assert sum(m.pruned is not None for m in result.maps.values()) == len(result.plan) > 0
    for plan in result.plan:
        pruned = result.maps[plan.layer].pruned
        assert pruned is not None
        assert (pruned > 0).mean() == pytest.approx(plan.density, abs=1e-9)
    write_report(result.report, folder / "report.html", result.maps)
    return folder / "report.html", json.loads(to_json(result.report))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        pytest.skip("no Chromium here (Debian: apt install chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-background-networking", "no-first-run"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    yield driver
    driver.quit()


def _column(driver: Any, index: int) -> list[str]:
    return driver.execute_script(
        f"return [...document.querySelectorAll('tbody tr')].map(r => r.cells[{index}].innerText)"
    )


def test_in_a_browser_it_renders_and_sorts(browser: Any, written: tuple[Path, dict[str, Any]]) -> None:
    path, report = written
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    loaded = "return [...document.images].map(i => (i.loading = 'eager', i.decode().then(() => i.naturalWidth)))"
    widths = browser.execute_async_script(
        "const done = arguments[0]; Promise.all((() => {" + loaded + "})()).then(done)"
    )
    assert len(widths) == sum(3 if row["status"] == "block-sparse" else 1 for row in report["layers"])
    assert min(widths) > 0
    names = [row["node"] for row in report["layers"]]
    assert [name.replace("\n", "") for name in _column(browser, 0)] == names

    headings = browser.find_elements("css selector", "thead th")
    column = [h.text.split()[0] for h in headings].index("multiplications")
    button = headings[column].find_element("tag name", "button")
    button.send_keys("\n")  # as with a keyboard
    assert headings[column].get_attribute("aria-sort") == "ascending"
    by_macs = sorted(report["layers"], key=lambda row: row["macs"])
    assert [n.replace("\n", "") for n in _column(browser, 0)] == [row["node"] for row in by_macs]
    button.click()
    assert headings[column].get_attribute("aria-sort") == "descending"
    assert [n.replace("\n", "") for n in _column(browser, 0)] == [
        row["node"] for row in sorted(report["layers"], key=lambda row: -row["macs"])
    ]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser_it_fits_the_screen_and_can_be_read(
    browser: Any, written: tuple[Path, dict[str, Any]], width: int, dark: bool
) -> None:
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    screen = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(written[0].as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width, "only the table scrolls"
    for selector in ("body", "dt", ".cards span", "tr.dense td"):
        ink, paper = (
            browser.execute_script(
                "const style = getComputedStyle(document.querySelector(arguments[0]));"
                "return style[arguments[1]].match(/[0-9.]+/g).map(Number)",
                *pair,
            )
            for pair in ((selector, "color"), ("body", "backgroundColor"))
        )
        assert _contrast(ink[:3], paper[:3]) >= 4.5, f"{selector}: WCAG 2 AA"


def _contrast(a: list[float], b: list[float]) -> float:
    """The contrast ratio of two colors (WCAG 2.2)."""

    def luminance(color: list[float]) -> float:
        c = np.array(color) / 255
        return float(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)

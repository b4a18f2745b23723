"""The page that compares runs, as a person with a browser meets it: pictures, charts, slider, schemes, widths."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.browser import chromium, set_scheme
from tests.support.processes import wait_for
from tests.support.report_runs import EVIL, Made, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def driver(made: Made) -> Iterator[Any]:
    with chromium(width=1280) as driver:
        driver.get(made.page.as_uri())
        yield driver


def shown(driver: Any) -> list[int]:
    script = "return [...document.querySelectorAll('.shots figure')].filter(f => f.checkVisibility()).map(f => +f.dataset.nimg)"
    return list(driver.execute_script(script))


def test_the_page_opens_without_a_word_in_the_console(made: Made, driver: Any) -> None:
    set_scheme(driver, "light")
    driver.get_log("browser")
    driver.get(made.page.as_uri())
    assert driver.get_log("browser") == []
    assert driver.title == "Comparison of 3 runs · warm-dist", "the third run's name did nothing"
    assert len(driver.find_elements("css selector", "img[src=x]")) == 0
    assert driver.execute_script("return performance.getEntriesByType('resource').filter(e => !e.name.startsWith('data:')).length") == 0  # fmt: skip


def test_every_picture_decodes_and_has_a_name(driver: Any) -> None:
    script = "return Promise.all([...document.images].map(i => i.decode().then(() => [i.naturalWidth, i.alt])))"
    pictures = driver.execute_script(script)
    assert len(pictures) == 9
    assert all(width == 8 * (8 * 8 + 2) + 2 for width, _ in pictures), "8 digits of 8 px, 8 times as large"
    assert all(re.fullmatch(r"Samples of .+ at nimg \d+", alt) for _, alt in pictures)
    charts = driver.find_elements("css selector", ".chart [role=img]")
    assert all(chart.get_attribute("aria-label") for chart in charts)


def test_charts_have_text_that_can_be_read(driver: Any) -> None:
    script = """return [...document.querySelectorAll('.chart')].map(c => [...c.querySelectorAll('svg text')].map(t => {
        const b = t.getBoundingClientRect(), s = c.querySelector('svg').getBoundingClientRect();
        return [t.textContent, b.width * b.height, b.left >= s.left - 1 && b.right <= s.right + 1]}))"""
    charts = driver.execute_script(script)
    assert len(charts) == 5 + 2 + 2
    for texts in charts:
        assert len(texts) >= 5
        assert all(area > 20 and inside for _, area, inside in texts), texts
        words = " ".join(text for text, _, _ in texts)
        assert "nimg, images trained on" in words or "BNR = α/σ" in words
    assert "floor 14.3" in " ".join(text for text, _, _ in charts[2])


def test_the_table_holds_what_metrics_jsonl_says(driver: Any) -> None:
    rows = {
        row.find_element("css selector", "th").text: [cell.text for cell in row.find_elements("css selector", "td")]
        for row in driver.find_elements("css selector", "section[aria-labelledby=results] tbody tr:has(td)")
    }
    assert {name.split(" ", 1)[1]: cells[3] for name, cells in rows.items()} == {
        "low": "31.25 ± 0.25", "mid best": "26.75 ± 0.25", EVIL: "3.50 ± 0.25",
    }  # fmt: skip
    (cells,) = [cells for name, cells in rows.items() if "low" in name]
    assert cells == ["0.1", "ancestral", "35", "31.25 ± 0.25", "14.26", "0.01250", "0.625", "0.375", "32\u202f000",
                     "2\u202f048", "5bec", "200"]  # fmt: skip


def test_the_slider_shows_the_nearest_grid_of_each_run(made: Made, driver: Any) -> None:
    driver.get(made.page.as_uri())
    assert shown(driver) == [32_000, 32_000, 30_000], "the newest at first"
    slider = driver.find_element("id", "step")
    seen = {}
    for position in range(5):  # 0, 9,000, 16,000, 30,000 and 32,000
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        driver.execute_script(script, slider, position)
        seen[driver.find_element("id", "step-out").text] = shown(driver)
    assert seen == {
        "nimg 0": [0, 0, 0],
        "nimg 9\u202f000": [16_000, 16_000, 9_000],
        "nimg 16\u202f000": [16_000, 16_000, 9_000],
        "nimg 30\u202f000": [32_000, 32_000, 30_000],
        "nimg 32\u202f000": [32_000, 32_000, 30_000],
    }
    slider.send_keys("\ue012")  # the left arrow: it works from the keyboard
    assert driver.find_element("id", "step-out").text == "nimg 30\u202f000"


def test_without_javascript_the_newest_grids_are_there(made: Made, driver: Any) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setScriptExecutionDisabled", {"value": True}
    )  # the page's; the driver's own still run
    try:
        driver.get(made.page.as_uri())
        wait_for("the page", lambda: bool(driver.execute_script("return document.readyState") == "complete"), 60)
        assert shown(driver) == [32_000, 32_000, 30_000]
        assert not driver.execute_script("return document.getElementById('slider').checkVisibility()")
    finally:
        driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_dark_is_dark_and_light_is_light(driver: Any) -> None:
    script = """const t = document.querySelector('.chart svg text');
        return [getComputedStyle(document.body).backgroundColor, getComputedStyle(t).fill]"""
    brightness = {}
    for scheme in ("light", "dark"):
        set_scheme(driver, scheme)
        ground, ink = driver.execute_script(script)
        brightness[scheme] = [sum(map(int, re.findall(r"\d+", colour)[:3])) / 3 for colour in (ground, ink)]
    set_scheme(driver, "light")
    assert brightness["light"][0] > 240
    assert brightness["light"][1] < 60
    assert brightness["dark"][0] < 40
    assert brightness["dark"][1] > 200


@pytest.mark.parametrize("width", [1280, 800, 400])
def test_nothing_is_wider_than_the_page(made: Made, driver: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(made.page.as_uri())
    root = "document.documentElement"
    assert driver.execute_script(f"return {root}.scrollWidth <= {root}.clientWidth")
    if width == 1280:  # a laptop's: not even a table has to be scrolled
        script = "return [...document.querySelectorAll('.wide')].map(w => w.scrollWidth - w.clientWidth)"
        assert max(driver.execute_script(script)) <= 0

"""The report's page in a real browser: it opens from disk without an error, every section is there,
filters and sorting work.
"""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from clsnf.reporting.build import build_report
from clsnf.reporting.compare import build_comparison
from clsnf.reporting.sections import PRODUCT_SECTIONS, STUDY_SECTIONS
from tests.support.browser import browser, errors_of, needs_chromium
from tests.support.made_up_study import change, write_study

pytestmark = needs_chromium

# What a user's folders may be called: markup, attributes' ends, Plotly's own tags, a colour of the
# palette, and a script's end.
EVIL = "<img src=x onerror=\"document.title='owned'\"><b>bold<b> '\" {{ 7 * 7 }} @1"
PRODUCTS = ["alpha", "beta", "gamma", EVIL]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_study(tmp_path_factory.mktemp("runs") / "night", PRODUCTS, trials=12)
    # beta can't promise its rate; gamma has a figure that is not finite
    few = {
        "value": 0.4,
        "false_reject_rate": 0.01,
        "supported_rate": 0.05,
        "normals": 19,
        "interval": [0.001, 0.17],
    }
    change(run, "beta", threshold=few)
    summary = json.loads((run / "summary.json").read_text())
    test = summary["categories"]["gamma"]["test"]
    change(run, "gamma", test=test | {"figures": test["figures"] | {"pixel_ap": float("nan")}})
    return build_report(run).page


@pytest.fixture(scope="module")
def driver(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(autouse=True)
def opened(driver: webdriver.Chrome, page: Path) -> None:
    driver.get("about:blank")
    errors_of(driver)
    driver.get(page.as_uri())
    wait(driver, "return document.documentElement.dataset.ready === 'yes'")


def wait(driver: webdriver.Chrome, script: str) -> None:
    WebDriverWait(driver, 60, 0.05).until(lambda d: d.execute_script(script))


def draw_all(driver: webdriver.Chrome, within: str = "body") -> None:
    """Scroll to each chart that is not drawn yet, as a reader would."""
    wait(
        driver,
        f"const left = [...document.querySelectorAll('{within} .plot')].find((plot) => "
        "plot.clientWidth && !plot.dataset.drawn);"
        "if (left) left.scrollIntoView(); return !left",
    )


def rows(driver: webdriver.Chrome, table: str) -> list[Any]:
    return [
        row
        for row in driver.find_elements(By.CSS_SELECTOR, f"{table} tbody tr")
        if row.is_displayed()
    ]


def names(driver: webdriver.Chrome) -> list[str]:
    return [row.find_element(By.CSS_SELECTOR, "a").text for row in rows(driver, ".verdicts")]


def sort_by(driver: webdriver.Chrome, table: str, title: str) -> None:
    for button in driver.find_elements(By.CSS_SELECTOR, f"{table} thead button"):
        if button.text.split(" ▲")[0].split(" ▼")[0] == title:
            driver.execute_script("arguments[0].click()", button)
            return
    raise AssertionError(f"no column {title}")


def test_it_opens_without_an_error_and_asks_nobody(driver: webdriver.Chrome, page: Path) -> None:
    for picked in Select(driver.find_element(By.ID, "product")).options:
        driver.execute_script(
            "arguments[0].selected = true; arguments[0].parentElement.dispatchEvent(new "
            "Event('change'))",
            picked,
        )
        draw_all(driver, ".product.shown")
    assert errors_of(driver) == []
    asked = driver.execute_script(
        "return performance.getEntriesByType('resource').map((entry) => entry.name)"
    )
    assert [name for name in asked if not name.startswith("data:")] == []


def test_every_section_of_the_registries_is_there_and_holds_something(
    driver: webdriver.Chrome,
) -> None:
    for name in ("verdict", "products", *STUDY_SECTIONS):
        assert driver.find_element(By.ID, name).text.strip(), name
    for article in driver.find_elements(By.CSS_SELECTOR, "article.product"):
        for name, (title, _) in PRODUCT_SECTIONS.items():
            section = article.find_element(By.ID, f"{article.get_attribute('id')}-{name}")
            text = section.get_attribute("textContent")
            assert text is not None
            assert len(text.replace(title, "").strip()) > 20, name


def test_every_chart_draws_points_or_bars(driver: webdriver.Chrome) -> None:
    draw_all(driver)
    empty = driver.execute_script(
        "return [...document.querySelectorAll('.plot')]"
        ".filter((plot) => plot.dataset.drawn && !plot.querySelector('.point, .points path, "
        ".js-line'))"
        ".map((plot) => plot.getAttribute('aria-label'))"
    )
    assert empty == []


def test_the_verdict_sorts_by_name_and_by_figure_and_keeps_what_is_no_number_last(
    driver: webdriver.Chrome,
) -> None:
    sort_by(driver, ".verdicts", "product")
    rising = names(driver)
    sort_by(driver, ".verdicts", "product")
    assert names(driver) == rising[::-1]
    assert set(rising) == set(PRODUCTS)
    for _ in range(2):
        sort_by(driver, ".verdicts", "pixel AP")
        assert names(driver)[-1] == "gamma"
    cell = rows(driver, ".verdicts")[-1].find_element(By.CSS_SELECTOR, "td:nth-child(4)")
    assert "not a number" in cell.text
    assert "0.000" not in cell.text


def test_a_decision_and_a_word_filter_the_verdict(driver: webdriver.Chrome) -> None:
    driver.find_element(By.CSS_SELECTOR, ".chip.normals").click()
    assert names(driver) == ["beta"]
    assert driver.find_element(By.CSS_SELECTOR, "#verdict .count").text == "1 row"
    driver.find_element(By.CSS_SELECTOR, ".chip").click()
    driver.find_element(By.CSS_SELECTOR, "#verdict .find").send_keys("ALPH")
    assert names(driver) == ["alpha"]


def test_the_trials_filter_by_product_and_sort_by_their_objective(driver: webdriver.Chrome) -> None:
    table = "[data-table=trials]"
    assert len(rows(driver, table)) == 12 * len(PRODUCTS)
    Select(driver.find_element(By.CSS_SELECTOR, f"{table} .pick")).select_by_visible_text("beta")
    assert len(rows(driver, table)) == 12
    sort_by(driver, table, "Pixel AP on validation defects")
    values = [float(row.find_elements(By.TAG_NAME, "td")[4].text) for row in rows(driver, table)]
    assert values == sorted(values)
    assert len(set(values)) > 1


def test_one_product_is_shown_at_a_time_and_a_link_opens_it(driver: webdriver.Chrome) -> None:
    link = driver.find_element(By.LINK_TEXT, "beta")
    driver.execute_script("arguments[0].click()", link)
    wait(driver, "return document.querySelector('article.shown').dataset.product === 'beta'")
    shown = [
        a for a in driver.find_elements(By.CSS_SELECTOR, "article.product") if a.is_displayed()
    ]
    assert [a.get_attribute("data-product") for a in shown] == ["beta"]


def test_names_are_text_wherever_they_stand(driver: webdriver.Chrome) -> None:
    assert driver.title != "owned"
    assert driver.find_elements(By.CSS_SELECTOR, "img[src=x]") == []
    assert EVIL in [a.text for a in driver.find_elements(By.CSS_SELECTOR, ".product-link")]
    draw_all(driver, "#overview")
    ticks = driver.execute_script(
        "return [...document.querySelectorAll('#overview .xtick text')].map((text) => "
        "text.textContent)"
    )
    assert any(EVIL in tick for tick in ticks)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_ink_and_paper_follow_the_screen_and_stay_far_apart(
    driver: webdriver.Chrome, scheme: str
) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"features": [{"name": "prefers-color-scheme", "value": scheme}]},
    )
    colours = driver.execute_script(
        "const s = getComputedStyle(document.body); return [s.color, s.backgroundColor]"
    )
    ink, paper = (luminance(colour) for colour in colours)
    assert (ink < paper) == (scheme == "light")
    assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) > 10
    draw_all(driver, "#overview")
    drawn = driver.execute_script(
        "return getComputedStyle(document.querySelector('#overview .plot .xtick text')).fill"
    )
    assert luminance(drawn) == pytest.approx(ink, abs=0.02)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG)."""
    channels = [int(c) / 255 for c in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_prints_every_product_with_its_charts(driver: webdriver.Chrome) -> None:
    printed = driver.execute_cdp_cmd(
        "Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True}
    )
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) > 2 * len(PRODUCTS)
    assert driver.execute_script(
        "return [...document.querySelectorAll('.plot')].every((plot) => plot.dataset.drawn)"
    )
    assert [
        a for a in driver.find_elements(By.CSS_SELECTOR, "article.product") if a.is_displayed()
    ][1:] == []  # the screen is as before
    assert errors_of(driver) == []


def test_a_phone_does_not_scroll_sideways(driver: webdriver.Chrome) -> None:
    driver.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": False},
    )
    try:
        wide = driver.execute_script("return document.documentElement.scrollWidth")
        assert wide <= 390
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_comparison_opens_without_an_error(driver: webdriver.Chrome, tmp_path: Path) -> None:
    before, now = (
        write_study(tmp_path / "before", PRODUCTS[:3]),
        write_study(tmp_path / "now", PRODUCTS[1:], seed=1),
    )
    driver.get(build_comparison([before, now]).page.as_uri())
    wait(driver, "return document.documentElement.dataset.ready === 'yes'")
    draw_all(driver)
    assert len(rows(driver, "[data-table=changes]")) == len(PRODUCTS)
    assert errors_of(driver) == []

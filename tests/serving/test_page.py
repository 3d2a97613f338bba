"""The page for people, in a real browser."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.ui import WebDriverWait

from clsnf.data.images import write_image
from clsnf.detector import Detector
from tests.support.browser import browser, errors_of, needs_chromium
from tests.support.small_data import draw_defect, draw_normal
from tests.support.small_server import TOKEN, http_server, small_settings

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def server(winners: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "token").write_text(TOKEN)
    made = small_settings(
        winners,
        state=str(folder / "state"),
        token_file=str(folder / "token"),
        queue=2,
        images_per_request=2,
    )
    with http_server(made) as address:
        yield address


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("profile")) as driver:
        driver.execute_cdp_cmd(
            "Page.setDownloadBehavior",
            {"behavior": "allow", "downloadPath": str(tmp_path_factory.mktemp("down"))},
        )
        yield driver


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three pictures without and three with a defect, in a folder with a file that is none."""
    folder = tmp_path_factory.mktemp("pictures") / "shift"
    folder.mkdir()
    rng = np.random.default_rng(5)
    for index in range(6):
        image = draw_normal(rng, (64, 80))
        write_image(
            folder / f"{index}.png", draw_defect(rng, image, "spot")[0] if index >= 3 else image
        )
    (folder / "notes.txt").write_text("no picture")
    return sorted(folder.glob("*.png"))


@pytest.fixture
def page(server: str, driver: Any) -> Page:
    driver.get("about:blank")
    errors_of(driver)  # of the test before
    driver.get(f"http://{server}/#plate")
    made = Page(driver)
    made.until(lambda: made.the("facts").text)
    return made


class Page:
    """What a person does and sees."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver

    def the(self, name: str) -> Any:
        return self.driver.find_element(By.ID, name)

    def all(self, css: str) -> list[Any]:
        return list(self.driver.find_elements(By.CSS_SELECTOR, css))

    def until(self, holds: Callable[[], Any]) -> Any:
        return WebDriverWait(self.driver, 60).until(lambda _: holds())

    def give(self, files: list[Path], to: str = "files") -> None:
        self.the(to).send_keys("\n".join(str(f) for f in files))

    def verdicts(self) -> list[str]:
        return [v.text.split()[-1] for v in self.all(".card .verdict")]

    def ended(self, count: int) -> bool:
        return (
            len(self.all(".card .verdict, .card .problem")) == count
            and "to go" not in self.the("summary").text
        )

    def move(self, value: float) -> None:
        script = (
            "const s = arguments[0]; s.value = arguments[1]; s.dispatchEvent(new Event('input'));"
        )
        self.driver.execute_script(script, self.the("threshold"), value)


def test_pictures_get_the_detectors_answer_with_an_overlay(
    page: Page, winners: Path, pictures: list[Path]
) -> None:
    page.give(pictures)
    page.until(lambda: page.ended(6))
    expected = Detector.load(winners / "plate", device="cpu").predict(pictures)
    assert page.verdicts() == ["defect" if v else "good" for v in expected.verdicts]
    assert [s.text for s in page.all(".card .score")] == [f"score {s:.4f}" for s in expected.scores]
    assert f"{int(expected.verdicts.sum())} with a defect" in page.the("summary").text
    assert all(
        image.get_attribute("src").startswith("data:image/png") for image in page.all(".card img")
    )
    assert all(
        page.driver.execute_script("return arguments[0].naturalWidth", image) == 80
        for image in page.all(".card img")
    )
    assert len(page.all("#chart circle")) == 6
    assert page.all("#chart rect.normal")
    # The queue holds two images, so the server refused some requests with 429. Nothing else failed.
    assert [e["message"] for e in errors_of(page.driver) if "429" not in e["message"]] == []


def test_moving_the_threshold_changes_verdicts_at_once(page: Page, pictures: list[Path]) -> None:
    page.give(pictures)
    page.until(lambda: page.ended(6))
    slider = page.the("threshold")
    page.move(float(slider.get_attribute("min")))
    assert page.verdicts() == ["defect"] * 6
    page.move(float(slider.get_attribute("max")))
    assert page.verdicts() == ["good"] * 6
    assert len(page.all("#chart circle.good")) == 6
    page.the("reset").click()
    assert "server's threshold" in page.the("threshold-text").text
    Select(page.the("show")).select_by_value("defect")
    assert set(page.verdicts()) <= {"defect"}


def test_a_folder_is_read_and_what_is_no_picture_is_left_out(
    page: Page, pictures: list[Path]
) -> None:
    page.give([pictures[0].parent], "folder")
    page.until(lambda: page.ended(6))
    assert {name.text for name in page.all(".card span.name")} == {
        f"shift/{p.name}" for p in pictures
    }


def test_a_picture_that_cannot_be_read_says_why_beside_the_others(
    page: Page, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "broken.png").write_bytes(pictures[0].read_bytes()[:-30])
    page.give([tmp_path / "broken.png", pictures[0]])
    page.until(lambda: page.ended(2))
    assert "broken.png is cut short" in page.all(".card .problem")[0].text
    assert "1 can't be read" in page.the("summary").text


def test_everything_can_be_done_with_the_keyboard(page: Page, pictures: list[Path]) -> None:
    def press(*keys: str) -> None:
        ActionChains(page.driver).send_keys(*keys).perform()

    def focused() -> str:
        element = page.driver.switch_to.active_element
        return element.get_attribute("id") or element.get_attribute("aria-label") or ""

    page.give(pictures[:3])
    page.until(lambda: page.ended(3))
    reached = []
    for _ in range(25):
        press(Keys.TAB)
        reached.append(focused())
        if reached[-1].startswith("Enlarge"):
            break
    for name in (
        "category",
        "threshold",
        "keep",
        "files",
        "folder",
        "show",
        "order",
        "table",
        "clear",
    ):
        assert name in reached
    press(Keys.ENTER)
    page.until(lambda: page.the("large-title").text == "0.png")
    press(Keys.ARROW_RIGHT)
    assert page.the("large-title").text == "1.png"
    press(Keys.ESCAPE)
    page.until(lambda: not page.the("large").is_displayed())
    before = page.the("threshold-value").text
    page.driver.execute_script("arguments[0].focus()", page.the("threshold"))
    press(Keys.ARROW_LEFT)
    assert float(page.the("threshold-value").text) < float(before)


def test_a_threshold_is_kept_with_the_token_and_another_category_has_its_own(page: Page) -> None:
    page.move(float(page.the("threshold").get_attribute("max")))
    moved = page.the("threshold-value").text
    page.the("keep").click()
    page.the("token").send_keys("wrong", Keys.ENTER)
    page.until(lambda: "token" in page.the("keeping-problem").text)
    page.the("token").clear()
    page.the("token").send_keys(TOKEN, Keys.ENTER)
    page.until(lambda: not page.the("keeping").is_displayed())
    assert page.the("threshold-value").text == moved
    assert "set by hand" in page.the("threshold-text").text
    Select(page.the("category")).select_by_value("sheet")
    page.until(lambda: "96 × 64" in page.the("facts").text)
    assert "the model's own" in page.the("threshold-text").text
    Select(page.the("category")).select_by_value("plate")
    page.until(lambda: "64 × 64" in page.the("facts").text)
    page.the("keep").click()
    page.the("keeping-own").click()
    page.until(lambda: "the model's own" in page.the("threshold-text").text)


def test_answers_can_be_saved_as_a_table(page: Page, pictures: list[Path], tmp_path: Path) -> None:
    page.driver.execute_cdp_cmd(
        "Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.give(pictures)
    page.until(lambda: page.ended(6))
    page.the("table").click()
    page.until((tmp_path / "plate.csv").is_file)
    content = (tmp_path / "plate.csv").read_text(encoding="utf-8-sig")
    rows = list(csv.DictReader(content.splitlines()))
    assert [row["verdict"] for row in rows] == page.verdicts()
    assert [row["name"] for row in rows] == [p.name for p in pictures]


def overlay_size(page: Page, css: str) -> int:
    """The longest side of a picture that is shown, in its own pixels."""
    script = (
        "const i = document.querySelector(arguments[0]);"
        "return Math.max(i.naturalWidth, i.naturalHeight);"
    )
    return int(page.driver.execute_script(script, css))


def test_overlays_come_as_large_as_the_screen_shows_them(page: Page, tmp_path: Path) -> None:
    write_image(tmp_path / "large.png", draw_normal(np.random.default_rng(1), (1500, 1200)))
    page.give([tmp_path / "large.png"])
    page.until(lambda: page.ended(1))
    assert overlay_size(page, ".card img") in (200, 300)
    page.all(".card button")[0].click()
    page.until(lambda: overlay_size(page, "#large-overlay") > 300)
    assert 500 <= overlay_size(page, "#large-overlay") <= 700
    page.the("close").click()


def shows_scores(page: Page, scores: list[str]) -> bool:
    return [score.text for score in page.all(".card .score")] == scores


def test_another_category_is_asked_about_the_pictures_that_are_there(
    page: Page, winners: Path, pictures: list[Path]
) -> None:
    page.give(pictures)
    page.until(lambda: page.ended(6))
    for category in ("sheet", "plate"):
        Select(page.the("category")).select_by_value(category)
        expected = Detector.load(winners / category, device="cpu").predict(pictures)
        scores = [f"score {s:.4f}" for s in expected.scores]
        page.until(partial(shows_scores, page, scores))
        assert page.verdicts() == ["defect" if v else "good" for v in expected.verdicts]


def test_the_outline_follows_the_threshold_after_a_moment(page: Page, pictures: list[Path]) -> None:
    def cyan() -> int:
        script = """
            const i = document.querySelector(".card img"), c = document.createElement("canvas");
            [c.width, c.height] = [i.naturalWidth, i.naturalHeight];
            const g = c.getContext("2d"); g.drawImage(i, 0, 0);
            const d = g.getImageData(0, 0, c.width, c.height).data; let n = 0;
            for (let k = 0; k < d.length; k += 4)
              n += d[k] === 0 && d[k + 1] === 255 && d[k + 2] === 255;
            return n;"""
        return int(page.driver.execute_script(script))

    page.give(pictures[3:4])
    page.until(lambda: page.ended(1))
    slider = page.the("threshold")
    page.move(float(slider.get_attribute("min")))
    page.until(lambda: cyan() > 0)
    page.move(float(slider.get_attribute("max")))
    page.until(lambda: cyan() == 0)
    page.move(float(slider.get_attribute("min")))
    page.until(lambda: cyan() > 0)


def test_a_picture_of_a_kind_that_is_not_read_gets_the_servers_line(
    page: Page, tmp_path: Path
) -> None:
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic" + b"\0" * 100)
    page.give([tmp_path / "phone.heic"])
    page.until(lambda: page.ended(1))
    assert "phone.heic" in page.all(".card .problem")[0].text
    assert not page.all(".card button")[0].is_displayed(), "there is no picture to enlarge"


def test_a_wrong_token_is_said_as_a_person_would(page: Page) -> None:
    page.the("keep").click()
    page.the("token").send_keys(Keys.ENTER)
    page.until(lambda: "Type the token" in page.the("keeping-problem").text)
    page.the("token").send_keys("wrong", Keys.ENTER)
    page.until(lambda: "does not know this token" in page.the("keeping-problem").text)
    assert "Bearer" not in page.the("keeping-problem").text
    page.the("keeping-cancel").click()


def test_the_table_keeps_texts_texts_and_says_what_was_not_read(
    page: Page, pictures: list[Path], tmp_path: Path
) -> None:
    names = ["=1+2.png", "+a.png", "-b.png", "@c.png", 'a "b", c.png', "Größe π.png"]
    for name in names:
        (tmp_path / name).write_bytes(pictures[0].read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    page.driver.execute_cdp_cmd(
        "Page.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path)}
    )
    page.give([tmp_path / name for name in (*names, "broken.png")])
    page.until(lambda: page.ended(7))
    page.the("table").click()
    page.until((tmp_path / "plate.csv").is_file)
    content = (tmp_path / "plate.csv").read_bytes()
    assert content.startswith(b"\xef\xbb\xbfname,category")
    rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    assert [row["name"] for row in rows] == [f"'{n}" for n in names[:4]] + names[4:] + [
        "broken.png"
    ]
    assert "broken.png starts like no image" in rows[-1]["problem"]
    assert (rows[-1]["score"], rows[-1]["verdict"], rows[0]["problem"]) == ("", "", "")
    assert float(rows[0]["score"]) > 0


def test_on_a_phone_the_place_for_pictures_comes_first_and_all_fits(page: Page) -> None:
    page.driver.set_window_size(500, 900)  # Chromium's windows are no narrower
    try:
        tops = [page.the(name).rect["y"] for name in ("drop", "category", "results")]
        assert tops == sorted(tops)
        assert tops[0] < 150
        script = "return document.documentElement.scrollWidth <= innerWidth"
        assert page.driver.execute_script(script)
    finally:
        page.driver.set_window_size(1280, 900)


def test_a_server_that_needs_a_token_is_asked_with_it(
    driver: Any, winners: Path, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "token").write_text(TOKEN)
    made = small_settings(
        winners, state=str(tmp_path), token_file=str(tmp_path / "token"), ask_token=True
    )
    with http_server(made) as address:
        driver.get(f"http://{address}/#plate")
        page = Page(driver)
        page.until(lambda: page.the("asking").is_displayed())
        page.the("asking-token").send_keys("wrong", Keys.ENTER)
        page.until(lambda: "does not know this token" in page.the("asking-problem").text)
        page.the("asking-token").send_keys(TOKEN, Keys.ENTER)
        page.until(lambda: page.the("facts").text)
        page.give(pictures[:2])
        page.until(lambda: page.ended(2))
        assert len(page.verdicts()) == 2
        driver.refresh()  # the tab keeps the token
        page.until(lambda: page.the("facts").text)
        assert not page.the("asking").is_displayed()
        driver.get("about:blank")


def test_the_page_and_the_documentation_ask_no_other_host(page: Page, server: str) -> None:
    for path in ("", "docs"):
        page.driver.get(f"http://{server}/{path}")
        page.until(lambda: page.driver.execute_script("return document.readyState") == "complete")
        asked = page.driver.execute_script(
            "return performance.getEntriesByType('resource').map((e) => e.name)"
        )
        assert asked
        assert all(name.startswith((f"http://{server}/", "data:", "blob:")) for name in asked), (
            asked
        )
    assert [e["message"] for e in errors_of(page.driver) if "favicon" not in e["message"]] == []

"""How long a large study's report takes to build and to open, and how large it is.

The study is made up; its pictures are real.

    python benchmarks/report_build.py                      # pictures of the demo's products
    python benchmarks/report_build.py --data MVTEC         # pictures of a data set in MVTec AD's
    layout

The bounds are those of 15 products x 40 trials on 2 cores: built in 60 s, 25 MB, first content in
headless Chromium after 2 s. Each opening is measured in a fresh browser, with the file in the file
system's cache.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the made-up study and the browser are the tests'

from clsnf.data.images import IMAGE_SUFFIXES, read_image  # noqa: E402
from clsnf.datasets.demo import write_demo  # noqa: E402
from tests.support.browser import browser  # noqa: E402
from tests.support.made_up_study import write_study  # noqa: E402

SECONDS, MEGABYTES, FIRST_CONTENT = 60, 25, 2.0
_SIDE = 224  # longer side of a study's pictures, in pixels


def read_pictures(data: Path, most: int) -> list[np.ndarray]:
    """Up to `most` pictures, spread over a data set, as small as a study keeps them."""
    files = sorted(
        p
        for p in data.rglob("*")
        if p.suffix.lower() in IMAGE_SUFFIXES and "ground_truth" not in p.parts
    )
    found = []
    for path in files[:: max(1, len(files) // most)][:most]:
        image = read_image(path)
        scale = min(1.0, _SIDE / max(image.shape[:2]))
        size = max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))
        found.append(
            np.ascontiguousarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), np.uint8)
        )
    return found


class PageTimes(NamedTuple):
    """Seconds until the page's first content and until its scripts ended, and to print it."""

    first_content: float
    ready: float
    printing: float


def measure_page(page: Path, profile: Path) -> PageTimes:
    """Open the page in a fresh browser, and print it."""
    with browser(profile) as driver:
        driver.get(page.as_uri())
        paint = driver.execute_script(
            "return new Promise((resolve) => new PerformanceObserver((list) => "
            "resolve(list.getEntries()[0].startTime))"
            ".observe({type: 'paint', buffered: true}))"
        )
        ready = driver.execute_script(
            "return performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd"
        )
        started = time.perf_counter()
        driver.execute_cdp_cmd(
            "Page.printToPDF", {"printBackground": True, "preferCSSPageSize": True}
        )
        return PageTimes(paint / 1000, ready / 1000, time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--products", type=int, default=15)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--data", type=Path, help="a data set to take pictures from")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="a folder to keep the study and its report in")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (given.out or Path(scratch)).absolute()
        data = given.data
        if data is None:
            data = folder / "demo-data"
            write_demo(data)
        names = [f"product-{number:02d}" for number in range(given.products)]
        shown = read_pictures(data, 60)
        run = write_study(
            folder / "run",
            names,
            trials=given.trials,
            normals=60,
            defects=100,
            cases=6,
            pictures=shown,
        )
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, str(ROOT / "reports" / "build.py"), str(run)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        built = time.perf_counter() - started
        page = run / "report" / "report.html"
        size = page.stat().st_size / 1e6
        times = [
            measure_page(page, Path(scratch) / f"profile-{number}")
            for number in range(given.repeats)
        ]
    first, ready, printing = (statistics.median(values) for values in zip(*times, strict=True))
    table = Table(
        title=(
            f"A report of {given.products} products x {given.trials} trials, with {len(shown)} "
            "pictures"
        )
    )
    for column in ("", "measured", "bound"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("built in", f"{built:.1f} s", f"{SECONDS} s")
    table.add_row("size", f"{size:.1f} MB", f"{MEGABYTES} MB")
    table.add_row(
        f"first content, median of {given.repeats}", f"{first:.2f} s", f"{FIRST_CONTENT:g} s"
    )
    table.add_row("all scripts run", f"{ready:.2f} s", "")
    table.add_row("printed to PDF, every chart drawn", f"{printing:.1f} s", "")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()

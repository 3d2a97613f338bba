"""What a report makes of studies as people find them: whole, under way, failed in parts, damaged,
from an earlier version.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from clsnf.cli import main
from clsnf.core.errors import OutputError
from clsnf.core.hashing import sha256_file
from clsnf.reporting.build import build_report, headline
from clsnf.reporting.page import script_json
from clsnf.reporting.pictures import PictureBudget
from clsnf.reporting.study_files import read_study
from clsnf.reporting.tables import TABLES
from clsnf.results import Measurements
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage
from tests.support.made_up_study import change, put, write_study

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_study(tmp_path / "night", ["alpha", "beta"])


class Text(HTMLParser):
    """What of a page a person reads."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)


def read(page: Path) -> str:
    parser = Text()
    parser.feed(page.read_text())
    return " ".join(" ".join(parser.parts).split())


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


# ---- whole ----


def test_a_report_is_one_page_and_every_table_as_csv_and_markdown(run: Path) -> None:
    built = build_report(run)
    assert built.page == run / "report" / "report.html"
    assert built.missing == []
    for name in TABLES:
        lines = (built.tables / f"{name}.md").read_text().splitlines()
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 2 + len(rows(built.tables, name)), name
    verdicts = rows(built.tables, "verdicts")
    assert [row["category"] for row in verdicts] == ["alpha", "beta"]
    metrics = read_study(run).products[0].metrics
    assert float(verdicts[0]["pixel_ap"]) == metrics["pixel_ap"]


def test_the_page_needs_no_outside_host(run: Path) -> None:
    text = build_report(run).page.read_text()
    assert (
        re.search(
            r"""<(?:script|img|link|iframe|source)[^>]*\s(?:src|href|srcset)=["'](?!data:)""", text
        )
        is None
    )
    assert "@import" not in text.split("</style>")[0]
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]+)"', text)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy
    assert "http" not in policy


def test_the_same_study_gives_the_same_report(run: Path, tmp_path: Path) -> None:
    first, second = build_report(run, tmp_path / "one"), build_report(run, tmp_path / "two")
    for path in sorted(first.page.parent.rglob("*")):
        if path.is_file():
            other = second.page.parent / path.relative_to(first.page.parent)
            assert sha256_file(path) == sha256_file(other), path.name


def test_a_study_that_was_moved_is_read_where_it_lies_now(run: Path, tmp_path: Path) -> None:
    shutil.move(run, tmp_path / "moved")
    built = build_report(tmp_path / "moved")
    assert built.missing == []
    assert "data:image/webp;base64," in built.page.read_text()


def test_the_door_and_the_command_write_the_same(run: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["report", str(run), "--out", str(tmp_path / "command")])
    assert told.exit_code == 0, told.output
    assert "alpha" in told.stdout
    assert str(tmp_path / "command" / "report.html") in told.stdout
    door = [
        sys.executable,
        str(ROOT / "reports" / "build.py"),
        str(run),
        "--out",
        str(tmp_path / "door"),
    ]
    subprocess.run(door, check=True, capture_output=True, cwd=tmp_path)
    assert sha256_file(tmp_path / "door" / "report.html") == sha256_file(
        tmp_path / "command" / "report.html"
    )


def test_the_headline_says_in_one_sentence_what_to_do() -> None:
    none = dict.fromkeys(
        ("failed", "unfinished", "weak", "images", "normals", "untested", "ready"), 0
    )
    assert headline(none | {"ready": 2}) == "All 2 products are ready to deploy."
    assert headline(none | {"ready": 1}) == "The product is ready to deploy."
    assert (
        headline(none | {"ready": 1, "normals": 2})
        == "1 of 3 products is ready to deploy: 2 need more normals."
    )
    assert headline(none | {"weak": 1}) == "The product is not good enough yet."


# ---- bad input ----


def test_a_folder_without_a_study_is_refused_in_one_line(tmp_path: Path) -> None:
    told = CliRunner().invoke(main, ["report", str(tmp_path)])
    assert told.exit_code == 2
    assert "holds no study" in told.stderr
    assert len(told.stderr.strip().splitlines()) == 1
    for arguments in (["--compare", str(tmp_path)], [str(tmp_path), str(tmp_path)]):
        assert CliRunner().invoke(main, ["report", *arguments]).exit_code == 2


def test_a_place_that_cant_be_written_is_refused_before_the_work(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file"):
        build_report(run, tmp_path / "file")


def test_metrics_that_are_not_finite_are_shown_as_such_and_never_as_zero(run: Path) -> None:
    strange = {"pixel_ap": float("nan"), "au_pro": float("inf"), "image_auroc": float("-inf")}
    test = json.loads((run / "summary.json").read_text())["categories"]["alpha"]["test"]
    change(run, "alpha", test=test | {"figures": test["figures"] | strange})
    trials = pq.read_table(run / "trials.parquet").to_pylist()
    trials[0]["objective"] = float("nan")
    pq.write_table(pa.Table.from_pylist(trials), run / "trials.parquet")
    built = build_report(run)
    text = read(built.page)
    for words in ("not a number", "infinite", "minus infinite"):
        assert words in text
    (alpha,) = [row for row in rows(built.tables, "verdicts") if row["category"] == "alpha"]
    assert (alpha["pixel_ap"], alpha["au_pro"], alpha["image_auroc"]) == ("nan", "inf", "-inf")
    assert alpha["decision"] == "No winner"
    assert "not a number" in (built.tables / "figures.md").read_text()
    assert "NaN" not in "".join(re.findall(r'class="spec">(.*?)</script>', built.page.read_text()))


def test_a_study_of_an_earlier_version_has_a_report_that_says_what_is_missing(run: Path) -> None:
    shutil.rmtree(run / "evidence")
    summary = json.loads((run / "summary.json").read_text())
    for result in summary["categories"].values():
        del result["evidence"], result["seconds"]
    put(run / "summary.json", summary)
    built = build_report(run)
    assert any("alpha: the study left no evidence" in line for line in built.missing)
    text = read(built.page)
    assert "The study left no pictures of this product." in text
    assert "The baseline was not evaluated." in text


def test_a_study_under_way_is_reported_from_its_journal_as_far_as_it_came(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    storage = open_storage(None, out)
    plan = SearchPlan(Space(DEFAULT_SPACE).distributions(), 4, {"pixel_ap": "maximize"}, 0, True)
    for name in ("alpha", "beta"):
        trials = CategoryTrials(storage, name, name, plan, [])
        for value in (0.4, 0.5):
            number, _ = trials.begin()
            measured = Measurements({"pixel_ap": value}, seconds=3.0, artifacts_reused=1)
            trials.finish(number, measured)
        number, _ = trials.begin()
        trials.fail(number, "TrainingError: the loss is not finite")
        trials.begin()
    done = write_study(tmp_path / "done", ["alpha"])
    result = json.loads((done / "summary.json").read_text())["categories"]["alpha"]
    put(out / "finished" / "alpha.json", {"rests_on": "x", "result": result})
    put(
        out / "study.json",
        {
            "settings": {},
            "space": DEFAULT_SPACE,
            "data": {"alpha": "a", "beta": "b"},
            "objectives": ["pixel_ap"],
        },
    )
    with (out / "optuna.journal").open("ab") as journal:
        journal.write(b'{"op_code":6,"tri')
    built = build_report(out)
    assert built.decisions == {"alpha": "Ready to deploy", "beta": "No winner yet"}
    assert any("The study is not finished" in line for line in built.missing)
    assert any("optuna.journal of out is torn" in line for line in built.missing)
    assert any("last whole record (1 line, 17 bytes)" in line for line in built.missing)
    assert any("beta: no winner yet (2 of its trials finished)" in line for line in built.missing)
    found = [
        (row["category"], row["status"], row["objective"], row["cause"])
        for row in rows(built.tables, "trials")
    ]
    assert found[4:] == [
        ("beta", "finished", "0.4", ""),
        ("beta", "finished", "0.5", ""),
        ("beta", "failed", "", "TrainingError: the loss is not finite"),
        ("beta", "under way", "", ""),
    ]


def test_a_category_that_failed_names_its_cause_and_the_others_are_whole(run: Path) -> None:
    failed = {
        "finished_trials": 0,
        "stopped_trials": 0,
        "failed_trials": [{"trial": 0, "cause": "out of memory"}],
        "error": "a bug",
    }
    summary = json.loads((run / "summary.json").read_text())
    summary["categories"]["beta"] = failed
    put(run / "summary.json", summary)
    built = build_report(run)
    assert built.decisions == {"alpha": "Ready to deploy", "beta": "No winner"}
    assert "beta: no winner, because a bug" in built.missing
    assert "beta: trial 0 failed: out of memory" in built.missing


@pytest.mark.parametrize(
    "name",
    [
        "trials.parquet",
        "ledger.jsonl",
        "study.json",
        "summary.json",
        "evidence/alpha/images.parquet",
        "evidence/alpha/facts.json",
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_reported(run: Path, name: str) -> None:
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole[: len(whole) // 2 - 5])
    built = build_report(run)
    (line,) = [line for line in built.missing if Path(name).name in line]
    assert "can't be read" in line or "is damaged" in line
    assert "beta" in read(built.page)


def test_any_single_file_of_a_study_may_be_gone(run: Path, tmp_path: Path) -> None:
    files = [
        path
        for path in run.rglob("*")
        if path.is_file() and path.suffix != ".webp" and "beta" not in path.parts
    ]
    assert len(files) > 6
    for path in files:
        whole = path.read_bytes()
        path.unlink()
        assert "beta" in read(build_report(run, tmp_path / "report").page), path.name
        path.write_bytes(whole)


def test_a_picture_that_is_gone_is_said_in_its_place(run: Path) -> None:
    next((run / "evidence" / "alpha" / "pictures").iterdir()).unlink()
    assert "the picture is gone" in read(build_report(run).page)


def test_names_that_would_leave_the_studys_folder_get_no_files(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["categories"]["../night/beta"] = summary["categories"].pop("beta")
    put(run / "summary.json", summary)
    study = read_study(run)
    (product,) = [product for product in study.products if product.name == "../night/beta"]
    assert product.facts is None
    assert any("no name of a category" in line for line in study.missing)


def test_text_inside_scripts_cant_end_them() -> None:
    text = script_json({"name": "</script><script>alert(1)</script>", "value": [float("nan"), 1.5]})
    assert "<" not in text
    assert json.loads(text) == {"name": "</script><script>alert(1)</script>", "value": [None, 1.5]}


# ---- the budget of pictures ----


def test_every_product_shows_fewer_cases_where_the_budget_is_short(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)]
    products = read_study(
        write_study(tmp_path / "run", ["a", "b"], cases=4, pictures=pictures)
    ).products
    every = (
        sum(path.stat().st_size for product in products for path in product.pictures.iterdir())
        * 4
        // 3
    )
    assert PictureBudget(products, every + 100).cases_per_kind == 4
    assert PictureBudget(products, every // 2).cases_per_kind == 2
    assert PictureBudget(products, 0).cases_per_kind == 1

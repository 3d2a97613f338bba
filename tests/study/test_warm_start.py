"""Beginning where an earlier study ended."""

import socket
from pathlib import Path

import pyarrow as pa
import pytest

from clsnf.core.errors import DataError, SettingsError
from clsnf.study.callbacks import check_loggers
from clsnf.study.folder import write_table
from clsnf.study.space import Space
from clsnf.study.trials import History, open_storage
from clsnf.study.warm_start import warm_values


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    rows = [
        ("nut", 0.5, 2, "finished"),
        ("nut", 0.9, 0, "finished"),
        ("nut", None, 4, "failed"),
        ("nut", 0.7, 6, "finished"),
    ]
    rows += [("nut", 0.1, 2, "finished"), ("bolt", 0.99, 4, "finished")]
    columns = ("category", "objective", "config/flow_depth", "status")
    (tmp_path / "earlier").mkdir()
    table = pa.table({name: [row[i] for row in rows] for i, name in enumerate(columns)})
    write_table(tmp_path / "earlier" / "trials.parquet", table)
    return tmp_path / "earlier"


def test_the_best_finished_trials_of_the_category_are_tried_first(earlier: Path) -> None:
    assert warm_values(earlier, ["nut"]) == [
        {"flow_depth": 0},
        {"flow_depth": 6},
        {"flow_depth": 2},
    ]
    assert warm_values(earlier, ["screw"]) == []
    assert warm_values(None, ["nut"]) == []


def test_points_that_the_new_space_does_not_have_are_left_out(
    earlier: Path, tmp_path: Path
) -> None:
    space = Space({"flow_depth": {"type": "choice", "values": [0, 2, 4]}})
    first = [
        {"flow_depth": 4},
        *warm_values(earlier, ["nut"]),
        {"fusion_weight": 0.3},
        {"flow_depth": "two"},
    ]
    history = History(
        open_storage(None, tmp_path),
        "nut",
        "nut",
        space.distributions(),
        first,
        9,
        {"objective": "maximize"},
        0,
        in_sequence=True,
    )
    assert [history.begin()[1]["flow_depth"] for _ in range(3)] == [4, 0, 2]


def test_a_folder_without_a_study_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no trials of an earlier study to start from"):
        warm_values(tmp_path, [])
    (tmp_path / "trials.parquet").write_text("no table")
    with pytest.raises(DataError, match=r"no readable trials.parquet"):
        warm_values(tmp_path, ["nut"])


def test_a_logger_that_is_not_installed_is_said_before_the_long_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_loggers(None, None)
    with pytest.raises(
        SettingsError, match=r"--mlflow needs the package mlflow.*pip install 'clsnf\[mlflow\]'"
    ):
        check_loggers("http://localhost:5000", None)
    with pytest.raises(SettingsError, match=r"--wandb needs"):
        check_loggers(None, "project")


def test_a_logging_server_that_does_not_answer_is_said_before_the_long_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises(SettingsError, match=f"No MLflow server answers at {address}"):
            check_loggers(address, None)
        listening.listen()
        check_loggers(address, None)
    check_loggers("sqlite:///runs.db", None)

"""The live table counts the trials of a study."""

from rich.console import Console

from clsnf.cli.study_board import Board
from clsnf.results import Measurements, TrialResult, TrialStatus


def trial(
    category: str,
    number: int,
    objective: float | None,
    reused: int = 0,
    computed: int = 0,
    stream: dict[str, int | float] | None = None,
) -> TrialResult:
    measured = Measurements(
        artifacts_reused=reused, artifacts_computed=computed, stream=stream or {}
    )
    status: TrialStatus = "failed" if objective is None else "finished"
    return TrialResult(category, number, status, objective=objective, measured=measured)


def shown(board: Board) -> str:
    console = Console(width=120, record=True)
    console.print(board)
    return console.export_text()


def test_counts_best_values_and_the_time_to_go() -> None:
    now = 100.0
    board = Board(["nut", "[bold]bolt"], 5, "pixel_ap", clock=lambda: now)
    board.earlier([trial("nut", 0, 0.5, reused=1, computed=5), trial("nut", 1, None)])
    assert board.seconds_to_go() is None
    for category in ("nut", "[bold]bolt"):
        board.begun(category)
    now = 130.0
    stream: dict[str, int | float] = {
        "images": 40,
        "waited": 2.5,
        "decode_images": 40,
        "decode_seconds": 0.5,
    }
    board.trial(trial("nut", 2, 0.4, reused=5, stream=stream))
    assert board.seconds_to_go() == 30 * 7, "one trial took 30 s, seven are left"
    assert (board.ended, board.total, board.rows["nut"].best, board.rows["nut"].running) == (
        3,
        10,
        0.5,
        0,
    )
    text = shown(board)
    assert "3 of 10 trials, at most 4 min to go" in text
    assert "[bold]bolt" in text
    for value in ("3/5", "0/5", "0.5000", "6 of 11", "-, 80, -", "2.5 s"):
        assert value in text


def test_hundreds_of_categories_show_those_that_something_happens_in() -> None:
    board = Board([f"part {n}" for n in range(300)], 5, "pixel_ap")
    board.begun("part 123")
    text = shown(board)
    assert "part 123" in text
    assert "and 280 more" in text
    assert len(text.splitlines()) < 40


def test_a_trial_that_is_told_of_twice_counts_once() -> None:
    board = Board(["nut"], 5, "pixel_ap")
    board.begun("nut")
    for _ in range(2):
        board.trial(trial("nut", 0, 0.5, reused=1, computed=5))
    row = board.rows["nut"]
    assert (row.running, row.ended, row.reused, row.computed) == (0, 1, 1, 5)
    assert board.ended == 1

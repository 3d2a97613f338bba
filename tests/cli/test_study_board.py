"""The live table counts what a study tells."""

from typing import Any

from rich.console import Console

from clsnf.cli.study_board import Board


def record(
    category: str, objective: float | None, status: str = "finished", **figures: Any
) -> dict[str, Any]:
    return {"category": category, "objective": objective, "status": status, "figures": figures}


def shown(board: Board) -> str:
    console = Console(width=120, record=True)
    console.print(board)
    return console.export_text()


def test_counts_best_values_and_the_time_to_go() -> None:
    now = 100.0
    board = Board(["nut", "[bold]bolt"], 5, lambda: now)
    board.earlier(
        [record("nut", 0.5, stages_reused=1, stages_computed=5), record("nut", None, "failed")]
    )
    assert board.seconds_to_go() is None
    for category in ("nut", "[bold]bolt"):
        board.begun(category)
    now = 130.0
    stream: dict[str, Any] = {
        "stream_images": 40,
        "stream_waited": 2.5,
        "stream_decode_images": 40,
        "stream_decode_seconds": 0.5,
    }
    board.trial(record("nut", 0.4, stages_reused=5, stages_computed=0, **stream))
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
    board = Board([f"part {n}" for n in range(300)], 5)
    board.begun("part 123")
    text = shown(board)
    assert "part 123" in text
    assert "and 280 more" in text
    assert len(text.splitlines()) < 40

"""The storage of trials after its process was killed, in files that are torn, locked and moved."""

import subprocess
import sys
from pathlib import Path

import pytest

from clsnf.core.errors import OutputError
from clsnf.study.trials import open_storage

# Finishes three trials; with a limit, the system kills it in the midst of a record of the fourth.
STUDY = """
import resource, signal, sys
from pathlib import Path
from clsnf.core.config import DetectorSettings
from clsnf.results import Measurements
from clsnf.study.space import DEFAULT_SPACE, Space
from clsnf.study.trials import CategoryTrials, SearchPlan, open_storage

out, where, end, kill = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3]), sys.argv[4]
space = Space(DEFAULT_SPACE)
plan = SearchPlan(space.distributions(), 6, {"pixel_ap": "maximize"}, 0, True)
storage = open_storage(where, out, print)
trials = CategoryTrials(storage, "gear", "gear", plan, [space.start(DetectorSettings())])
while trials.begun < end:
    number, values = trials.begin()
    trials.finish(number, Measurements({"pixel_ap": values["flow_depth"] / 9}))
if kill:
    journal = Path(where or out / "optuna.journal")
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    size = journal.stat().st_size + int(kill)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    number, values = trials.begin()
    trials.finish(number, Measurements({"pixel_ap": values["flow_depth"] / 9}))
for trial in trials.results():
    print(trial.number, trial.status, trial.objective, trial.config)
"""


def run_trials(out: Path, end: int, kill: str = "", where: str = "") -> list[str]:
    """What a process says: of the storage, then of its trials."""
    ended = subprocess.run(
        [sys.executable, "-c", STUDY, out, where, str(end), kill],
        timeout=90,  # less would do: a lock that is waited for is waited for without end
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode < 0) == bool(kill), ended.stderr
    return ended.stdout.splitlines()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return run_trials(tmp_path_factory.mktemp("undisturbed"), 5)


def size_of_a_trial(folder: Path) -> int:
    """Bytes of the fourth trial's records."""
    sizes = []
    for trials in (3, 4):
        out = folder / str(trials)
        out.mkdir()
        run_trials(out, trials)
        sizes.append((out / "optuna.journal").stat().st_size)
    return sizes[1] - sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("at_end", [False, True], ids=["as it begins", "as it ends"])
def test_a_study_that_was_killed_while_it_wrote_and_moved_goes_on_as_undisturbed(
    tmp_path: Path, undisturbed: list[str], at_end: bool
) -> None:
    out = tmp_path / "study"
    out.mkdir()
    run_trials(out, 3, kill=str(size_of_a_trial(tmp_path) - 20 if at_end else 20))
    assert not (out / "optuna.journal").read_bytes().endswith(b"\n")
    moved = out.rename(tmp_path / "moved")
    assert (moved / "optuna.journal.lock").is_symlink()
    said = run_trials(moved, 5)
    assert said[0] == "optuna.journal: the lock of a process that was killed is removed"
    assert said[1].startswith(
        "optuna.journal is torn: what follows its last whole record (1 line, "
    )
    assert said[1].endswith(
        "is left out, and kept in optuna.journal.torn; a trial whose end was there runs again"
    )
    assert said[2:] == undisturbed
    assert (moved / "optuna.journal.torn").stat().st_size
    assert run_trials(moved, 5) == undisturbed, "the next one finds it whole"


@pytest.mark.slow
def test_a_moved_journal_outside_the_study_is_mended_too(
    tmp_path: Path, undisturbed: list[str]
) -> None:
    (tmp_path / "one").mkdir()
    run_trials(tmp_path, 3, kill="20", where=str(tmp_path / "one" / "all.journal"))
    (tmp_path / "one").rename(tmp_path / "two")
    said = run_trials(tmp_path, 5, where=str(tmp_path / "two" / "all.journal"))
    assert said[0] == "all.journal: the lock of a process that was killed is removed"
    assert said[1].startswith("all.journal is torn: ")
    assert said[2:] == undisturbed


def test_records_that_contradict_each_other_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "optuna.journal").write_bytes(b'{"op_code":5,"trial":3}\n')
    with pytest.raises(
        OutputError, match=r"optuna\.journal is damaged \(KeyError: .*another --out"
    ):
        open_storage(None, tmp_path)

"""``clsnf clean``: what goes, what stays, and when nothing goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from clsnf.cli import main
from clsnf.results import read_trials
from tests.support.made_up_study import write_study


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A study that ended, with artifacts of 100 bytes each and a draft."""
    out = write_study(tmp_path / "run", ["nut"])
    for kind in ("trunk", "finetuned", "flow_starts", "flows", "density_maps", "latency"):
        for key in ("a", "b"):
            folder = out / "stages" / kind / key
            folder.mkdir(parents=True)
            (folder / "facts.json").write_bytes(b"0" * 40)
            (folder / "tensors.safetensors").write_bytes(b"0" * 60)
    (out / "stages" / "flows" / ".c.0a1b.part").mkdir()
    (out / "stages" / "flows" / ".c.0a1b.part" / "tensors.safetensors").write_bytes(b"0" * 7)
    (out / "stages" / ".leases").mkdir()
    return out


def clean(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["clean", *arguments])


def kinds(out: Path) -> set[str]:
    return {path.parent.name for path in (out / "stages").glob("*/*")}


def test_what_only_new_networks_need_goes_and_nothing_outside_of_stages(run: Path) -> None:
    others = {path for path in run.rglob("*") if "stages" not in path.parts}
    said = clean(str(run), "--dry-run").stdout
    assert said.endswith("607 bytes would be freed\n")
    assert "kept: finetuned, 0.0 MB" in said
    assert len(kinds(run)) == 6

    done = clean(str(run))
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (0, "607 bytes were freed")
    assert kinds(run) == {"finetuned", "density_maps", "latency"}
    assert {path for path in run.rglob("*") if "stages" not in path.parts} - others <= {
        run / ".lock"
    }
    assert read_trials(run / "trials.parquet")
    assert clean(str(run), "--all-stages").stdout.endswith("600 bytes were freed\n")
    assert kinds(run) == set()


def test_of_a_study_that_has_not_ended_only_drafts_go(run: Path) -> None:
    (run / "summary.json").unlink()
    assert clean(str(run)).stdout.endswith("\n7 bytes were freed\n")
    assert len(kinds(run)) == 6


def test_a_study_that_runs_is_left_alone(run: Path) -> None:
    code = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]):\n print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(run / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        done = clean(str(run), "--all-stages")
        holder.communicate(b"\n")
    assert done.exit_code == 2
    assert done.stderr == (
        f"error: {run} is in use by a study right now: clean it when that has ended.\n"
    )
    assert len(kinds(run)) == 6


@pytest.mark.parametrize("place", ["nowhere", "s3://bucket/run"])
def test_what_cannot_be_cleaned_is_one_line(place: str, tmp_path: Path) -> None:
    done = clean(place if "://" in place else str(tmp_path / place))
    assert done.exit_code == 2
    assert done.stderr.count("\n") == 1

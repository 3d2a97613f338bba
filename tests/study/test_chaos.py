"""A study whose processes are killed, files torn and storage locked, by the script that does so for
as long as it is told: ``benchmarks/chaos.py``.
"""

import os
import subprocess
import sys
import tempfile

import pytest

from tests.support.running_study import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="the ports of several nodes on one machine"),
]

FAULTS = ("kill_driver", "kill_worker", "tear_journal", "tear_artifact", "lock_storage")


def test_a_disturbed_study_loses_nothing_and_runs_nothing_twice() -> None:
    with tempfile.TemporaryDirectory(
        prefix="chaos-", dir="/tmp"
    ) as folder:  # sockets: a short path
        command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--out", folder]
        command += ["--minutes", "1", "--seed", "1", "--categories", "2", "--trials", "4"]
        command += ["--gap", "3", "--faults", ",".join(FAULTS)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing was lost" in done.stdout
    assert "all" in done.stdout

"""A real cluster on this machine: a head that computes nothing, two workers, token authentication,
jobs through the job server.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from clsnf.core.remote import RemoteFolder
from clsnf.detector import Detector
from tests.support.object_store import bucket
from tests.support.ray_cluster import RAY, Cluster
from tests.support.running_study import ROOT, Study, wait_for_trial
from tests.support.small_data import write_category

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="the ports of several nodes on one machine"),
]


@pytest.fixture(scope="module")
def end() -> Iterator[str]:
    with bucket() as end:
        yield end


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, resnet18_weights: Path, end: str) -> Study:
    made = Study(
        tmp_path_factory.mktemp("c"), resnet18_weights
    )  # short: paths of sockets have an end
    for seed, category in enumerate(("alpha", "beta", "gamma")):
        write_category(made.data / category, seed=seed)
    return made


@pytest.fixture(scope="module")
def cluster(study: Study) -> Iterator[Cluster]:
    made = Cluster(study.folder, study.python, study.environment)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def test_a_job_runs_on_all_nodes_of_a_cluster_that_has_only_the_dependencies(
    study: Study, cluster: Cluster
) -> None:
    out = study.folder / "job"
    command = [
        "python",
        "tune/run_study.py",
        "--data",
        str(study.data),
        "--out",
        str(out),
        *study.options,
        "--trials",
        "4",
    ]
    job = [
        "job",
        "submit",
        "--address",
        f"http://127.0.0.1:{cluster.dashboard}",
        "--working-dir",
        str(ROOT),
        "--",
        *command,
    ]
    done = cluster.ray(*job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 categories, 4 trials each, 2 at once, 1 CPUs a trial" in done.stdout
    found = study.at(out)
    assert len(found.trials()) == 12
    for category in found.summary()["categories"].values():
        assert (
            Detector.load(category["winner"]).threshold.normals == category["threshold"]["normals"]
        )
    artifacts = [
        path
        for path in (out / "stages").glob("*/*")
        if path.is_dir() and not path.parent.name.startswith(".")
    ]
    ended = sum(t["stages_computed"] for t in found.trials() if t["status"] == "finished")
    assert 0 < ended <= len(artifacts), "two workers never compute the same artifact"
    assert not list((out / "stages" / ".leases").iterdir())


def test_nodes_that_share_no_file_system_share_a_study_in_an_object_store(
    study: Study, cluster: Cluster, end: str
) -> None:
    out = f"s3://bucket/shared{end}"
    process = study.start(
        "--trials", "3", "--address", f"127.0.0.1:{cluster.port}", out=out, RAY_AUTH_MODE="token"
    )
    stdout, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    assert f"s3://bucket/shared/winners{end}" in stdout
    remote = RemoteFolder(out)
    assert not list(study.folder.glob("tmp*/clsnf-*")), "no node keeps its copy"
    for name in ("trials.parquet", "summary.json", "ledger.jsonl"):
        assert remote.pull(name, study.folder / "shared" / name)
    trials = study.at(study.folder / "shared").trials()
    assert len(trials) == 9
    assert len((study.folder / "shared" / "ledger.jsonl").read_text().splitlines()) == 3
    for category, found in study.at(study.folder / "shared").summary()["categories"].items():
        assert remote.pull(f"winners/{category}", study.folder / "shared" / category)
        assert (
            Detector.load(study.folder / "shared" / category).threshold.value
            == found["threshold"]["value"]
        )


def test_without_the_token_the_job_server_says_what_is_missing(
    study: Study, cluster: Cluster
) -> None:
    environment = cluster.environment | {"HOME": str(study.folder), "RAY_AUTH_MODE": "token"}
    address = f"http://127.0.0.1:{cluster.dashboard}"
    command = [study.python, *RAY, "job", "list", "--address", address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "oken" in done.stderr + done.stdout


def test_a_killed_worker_and_a_lost_node_cost_no_trial(study: Study, cluster: Cluster) -> None:
    out = study.folder / "survivor"
    arguments = ["--trials", "5", "--address", f"127.0.0.1:{cluster.port}"]
    process = study.start(*arguments, out=out, RAY_AUTH_MODE="token")
    wait_for_trial(process, 2)
    busy = [
        p
        for number in (1, 2)
        for p in cluster.processes(number)
        if "ImplicitFunc" in " ".join(p.cmdline())
    ]
    assert busy, "Ray names its workers by what they run: a trial is Tune's ImplicitFunc"
    busy[0].kill()
    wait_for_trial(process, 5)
    cluster.remove(2)
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0, stderr
    trials = study.at(out).trials()
    assert len(trials) == 15
    assert all(t["status"] == "finished" or "learning_rate" in t["cause"] for t in trials), [
        t["cause"] for t in trials
    ]
    assert all("winner" in found for found in study.at(out).summary()["categories"].values())
    assert "mean" in stdout


# ---- who may reach a private Ray ----

_PRIVATE_RAY = """
import psutil, ray
from clsnf.study.cluster import ray_session
from tests.support.listeners import beyond_loopback, listeners

with ray_session("local"):
    ray.get(ray.remote(lambda: None).remote())
    family = [psutil.Process(), *psutil.Process().children(recursive=True)]
    print(len(listeners(family)) > 5, beyond_loopback(family))
"""


def test_a_private_ray_listens_on_loopback_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PRIVATE_RAY],
        env=os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "True []", done.stderr

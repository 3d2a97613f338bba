"""Do two checkouts give the same results? For changes that must change none.

    python tools/compare_checkouts.py ../before . --work /tmp/compared
    python tools/compare_checkouts.py ../before . --work /tmp/compared \\
        --data MVTEC --category tire --backbone resnet18 --weights resnet18.safetensors

Each checkout runs, with this interpreter, the demo's study, the trials of
``benchmarks/study_reuse.py``, a training, a prediction and a server. Metrics, settings, scores,
maps and answers are then compared to the last bit; times, versions and paths are left out. The
detector and the study of the first checkout are also given to the second one to read.

What lies in ``--work`` is not made again, so that a second look costs little.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from compare_studies import compare

PREDICT = """
import sys
import numpy as np
from clsnf import Detector
model, out, *pictures = sys.argv[1:]
maps, scores, verdicts = Detector.load(model, device="cpu").predict(pictures)
np.savez(out, maps=maps, scores=scores, verdicts=verdicts)
"""
CLI = "import sys; from clsnf.cli import main; main(prog_name='clsnf')"
# What may differ between two runs of one checkout.
VOLATILE = re.compile(r"^(milliseconds|version|versions|model_version|folder|batch)$")


class Checkout:
    """A checkout and the folder that its results go to."""

    def __init__(self, root: Path, out: Path) -> None:
        self.root, self.out = root.resolve(), out
        out.mkdir(parents=True, exist_ok=True)
        self._environment = os.environ | {"PYTHONPATH": str(self.root), "OMP_NUM_THREADS": "1"}

    def start(self, *command: str | Path) -> subprocess.Popen[bytes]:
        """A process of this checkout's code; what it says goes to ``log.txt``."""
        with (self.out / "log.txt").open("ab") as log:
            words = [sys.executable, *map(str, command)]
            return subprocess.Popen(
                words, cwd=self.root, env=self._environment, stdout=log, stderr=log
            )

    def run(self, made: str, *command: str | Path) -> Path:
        """Run a command unless what it makes is there already; returns the place of that."""
        place = self.out / made
        if not place.exists():
            started = time.perf_counter()
            if self.start(*command).wait() != 0:
                raise SystemExit(f"{self.root}: {command} failed, see {self.out / 'log.txt'}")
            print(f"{self.root.name}: {made} made in {time.perf_counter() - started:.0f} s")
        return place


# ---- what is compared ----


def demo(checkout: Checkout) -> Path:
    """The demo's study."""
    return checkout.run("demo", "tune/run_study.py", "--out", checkout.out / "demo")


def reuse(checkout: Checkout, trials: int) -> Path:
    """The trials of the benchmark of shared artifacts."""
    options = ("--size", "64", "--trials", str(trials), "--out", checkout.out / "reuse-study")
    checkout.run("reuse-study", "benchmarks/study_reuse.py", *options)
    return checkout.out / "reuse-study" / "reuse"


def model(checkout: Checkout, given: argparse.Namespace) -> Path:
    """A detector trained for a few epochs."""
    chosen = ["--data", given.data, "--category", given.category, "--backbone", given.backbone]
    if given.weights:
        chosen += ["--weights", given.weights]
    few = ["finetune.frozen_epochs=1", "finetune.joint_epochs=2", "finetune.decay_epochs=1"]
    options = [word for setting in few for word in ("--set", setting)]
    out = checkout.out / "model"
    return checkout.run("model", "-c", CLI, "train", *chosen, *options, "--out", out)


def maps(checkout: Checkout, folder: Path, pictures: list[Path], name: str) -> Mapping[str, Any]:
    """Maps, scores and verdicts of a saved detector."""
    made = checkout.run(name, "-c", PREDICT, folder, checkout.out / name, *pictures)
    return dict(np.load(made))


@contextmanager
def server(checkout: Checkout, folder: Path) -> Iterator[str]:
    """A server of this checkout; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = checkout.start("-c", CLI, "serve", folder, "--port", str(port), "--device", "cpu")
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            if process.poll() is not None:
                raise SystemExit(f"{checkout.root}: no server, see {checkout.out / 'log.txt'}")
            try:
                urllib.request.urlopen(f"{address}/readyz", timeout=5).close()
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def answers(checkout: Checkout, folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """What a server says about its models and about pictures."""

    def ask(path: str, body: bytes | None = None, kind: str = "") -> Any:
        headers = {"Content-Type": kind} if kind else {}
        request = urllib.request.Request(address + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return without_volatile(json.loads(answer.read()))
        except urllib.error.HTTPError as error:
            return [error.code, without_volatile(json.loads(error.read()))]

    with server(checkout, folder) as address:
        found = {path: ask(path) for path in ("/v1/models", "/v2", "/v1/models/absent")}
        category = found["/v1/models"]["models"][0]["category"]
        one = f"/v1/models/{category}"
        found |= {path: ask(path) for path in (one, f"/v2/models/{category}")}
        for picture in pictures:
            for shown in ("none", "png", "npy", "overlay"):
                path = f"{one}/inspect?map={shown}"
                found[f"{path} {picture.name}"] = ask(path, picture.read_bytes(), "image/png")
        pixels = np.zeros((2, 64, 64, 3), np.uint8)
        pixels[1, 20:30, 20:30] = 255
        inputs = [{"name": "images", "datatype": "UINT8", "shape": list(pixels.shape)}]
        inputs[0]["data"] = pixels.ravel().tolist()
        question = json.dumps({"inputs": inputs}).encode()
        found["v2 infer"] = ask(f"/v2/models/{category}/infer", question, "application/json")
        found["no image"] = ask(f"{one}/inspect", b"no image", "image/png")
        return found


def without_volatile(value: Any) -> Any:
    """An answer without times, versions and folders."""
    if isinstance(value, dict):
        return {k: without_volatile(v) for k, v in value.items() if not VOLATILE.match(k)}
    return [without_volatile(v) for v in value] if isinstance(value, list) else value


# ---- comparing ----


def main() -> None:
    """Compare and say what differs; the exit status is the number of things that do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path)
    parser.add_argument("now", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="default: the demo's products")
    parser.add_argument("--category", default="gear")
    parser.add_argument("--backbone", default="demo")
    parser.add_argument("--weights")
    parser.add_argument("--trials", type=int, default=12, help="of study_reuse")
    given = parser.parse_args()
    work = given.work.resolve()
    before, now = Checkout(given.before, work / "before"), Checkout(given.now, work / "now")
    different = 0

    def tell(what: str, found: list[str]) -> None:
        nonlocal different
        different += bool(found)
        print(f"{what}: {'the same to the last bit' if not found else 'DIFFERENT'}")
        for line in found[:20]:
            print(f"    {line}")

    studies = [demo(checkout) for checkout in (before, now)]
    tell("demo's study", list(compare(*studies)))
    shared = [reuse(checkout, given.trials) for checkout in (before, now)]
    tell("trials of study_reuse", list(compare(*shared)))
    if given.data is None:
        given.data = work / "before" / "demo-data"
    data = given.data = given.data.resolve()
    pictures = sorted((data / given.category / "test").rglob("*.*"))[::5][:10]
    models = [model(checkout, given) for checkout in (before, now)]
    tensors = [(folder / "detector.safetensors").read_bytes() for folder in models]
    tell("trained tensors", [] if tensors[0] == tensors[1] else ["detector.safetensors"])
    first = maps(before, models[0], pictures, "maps.npz")
    for what, folder, name in (
        (f"maps and scores of {len(pictures)} pictures", models[1], "maps.npz"),
        ("the same by the detector made before", models[0], "maps-of-before.npz"),
    ):
        second = maps(now, folder, pictures, name)
        tell(what, [key for key in first if not np.array_equal(first[key], second[key])])
    said = [answers(checkout, models[0], pictures[:3]) for checkout in (before, now)]
    tell("the server's answers", [key for key in said[0] if said[0][key] != said[1].get(key)])
    sys.exit(different)


if __name__ == "__main__":
    main()

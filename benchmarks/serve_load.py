"""``clsnf serve`` under load: its own cost, its images per second, and whether its memory grows.

    # a product of the demo, trained here in a minute
    python benchmarks/serve_load.py
    python benchmarks/serve_load.py --model runs/NAME/winners/screw --pictures MVTEC/screw/test
    # without Ray; a short run
    python benchmarks/serve_load.py --local --requests 500

Everything happens on this machine's loopback, and ends after ``--minutes`` at the latest. Server
and detector take turns in the same run: first a request to the server and the same picture through
the detector in this process, then a round with 32 clients and a round of the detector at its best
batch size. The long run asks with bodies of all sizes, and rolls the models in again ten times.

The *own cost* of a request is the client's time less the times for reading and network in the
server's answer. Beside it stands all that the server costs more than the detector in this process,
picture by picture: decoding in another process, and the wait for it, are in that one.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from clsnf.core.config import (
    BackboneSettings,
    DetectorSettings,
    FinetuneSettings,
    ImageSettings,
    ValidationSettings,
)
from clsnf.data.images import IMAGE_SUFFIXES, decode_image
from clsnf.data.layouts import read_category
from clsnf.data.splits import assign_splits
from clsnf.datasets.demo import write_demo
from clsnf.detector import Detector

CLIENTS = 32
ROLL_INS = 10
SMALL = 25_000  # bytes of a small body
BOUNDS = {
    "own cost, median": 2.5,
    "own cost, p99": 8.0,
    "share of the detector's images/s": 0.95,
    "growth": 0.05,
}
BATCHES = (1, 2, 4, 8, 16)
Row = tuple[str, str, str, bool | None]  # name, value, bound, whether it held


@dataclass
class Client:
    """One connection that is kept open."""

    port: int
    category: str
    seconds: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)  # milliseconds
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)

    def ask(self, body: bytes) -> None:
        started = time.perf_counter()
        try:
            self._connection.request(
                "POST", f"/v1/models/{self.category}/inspect", body, {"Content-Type": "image/png"}
            )
            answer = self._connection.getresponse()
            content = answer.read()
        except (OSError, http.client.HTTPException) as error:
            self.errors.append(repr(error))
            self._connection.close()
            return
        spent = time.perf_counter() - started
        if answer.status != 200:
            self.errors.append(f"{answer.status} {content[:100]!r}")
            return
        said = json.loads(content)["milliseconds"]
        self.seconds.append(spent)
        self.own.append(1000 * spent - said["read"] - said["network"])


@dataclass(frozen=True)
class Server:
    """A running server."""

    port: int
    category: str
    process: subprocess.Popen[bytes]

    def memory(self) -> int:
        """Bytes that the process with the model and its readers hold, shared ones counted once."""
        own = psutil.Process(self.process.pid)
        family = own.children(recursive=True)
        replicas = [p for p in family if "ServeReplica" in " ".join(p.cmdline())] or [own]
        held = 0
        for process in [*replicas, *(c for r in replicas for c in r.children(recursive=True))]:
            with suppress(psutil.NoSuchProcess):
                held += int(process.memory_full_info().pss)
        return held

    def roll_in(self) -> None:
        self.process.send_signal(signal.SIGHUP)


@contextmanager
def server(model: Path, folder: Path, options: Sequence[str]) -> Iterator[Server]:
    """``clsnf serve`` on one detector."""
    (folder / "home").mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {"HOME": str(folder / "home"), "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-c", "from clsnf.cli import main; main()"]
        command += ["serve", str(model), "--port", "0", *options]
        process = subprocess.Popen(
            [*command, "--set", f"state={folder / 'state'}"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        until = time.monotonic() + 180
        while " at http://" not in (text := (folder / "log").read_text()):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"the server did not start:\n{text}")
            time.sleep(0.2)
        port = int(text.partition(" at http://127.0.0.1:")[2].partition("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/v1/models")
        models = json.loads(connection.getresponse().read())["models"]
        yield Server(port, models[0]["category"], process)
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def demo_model(folder: Path) -> tuple[Path, list[bytes]]:
    """A small detector of a product drawn by code, and its test pictures."""
    write_demo(folder / "data")
    settings = DetectorSettings(
        image=ImageSettings(160, 160),
        backbone=BackboneSettings("demo"),
        finetune=FinetuneSettings(frozen_epochs=2, joint_epochs=1, decay_epochs=1),
        validation=ValidationSettings(fraction=0.25),
    )
    table = assign_splits(read_category(folder / "data", "gear"), 0.25, seed=0)
    Detector.fit(table, settings, device="cpu").save(folder / "gear")
    return folder / "gear", bodies(folder / "data" / "gear" / "test")


def smaller(pictures: Sequence[bytes]) -> list[bytes]:
    """The pictures as JPEGs of at most about :data:`SMALL` bytes."""
    found = []
    for body in pictures:
        picture, quality = decode_image(body, "picture"), 95
        while len(body) > SMALL and quality > 5:
            file = io.BytesIO()
            Image.fromarray(picture).save(file, "JPEG", quality=quality)
            body, quality = file.getvalue(), quality - 10
        found.append(body)
    return found


def bodies(folder: Path) -> list[bytes]:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)[:32]
    if not files:
        raise SystemExit(f"{folder} holds no pictures")
    return [p.read_bytes() for p in files]


@dataclass(frozen=True)
class Load:
    """A running server, the same detector in this process, and pictures to ask about."""

    server: Server
    detector: Detector
    pictures: Sequence[bytes]

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def category(self) -> str:
        return self.server.category

    def picture(self, turn: int) -> bytes:
        return self.pictures[turn % len(self.pictures)]


def one_client(load: Load, count: int) -> tuple[Client, list[float]]:
    """Requests of one client, in turns with the detector; gives the client and those seconds."""
    client, alone = Client(load.port, load.category), []
    for index in range(count + 5):
        body = load.picture(index)
        client.ask(body)
        started = time.perf_counter()
        load.detector.predict([decode_image(body, "picture")])
        alone.append(time.perf_counter() - started)
    # The first requests load the model.
    client.seconds, client.own = client.seconds[5:], client.own[5:]
    return client, alone[5:]


def in_process(load: Load, batch: int, seconds: float) -> float:
    """Images per second of the detector, reading included."""
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        some = [decode_image(load.picture(done + i), "picture") for i in range(batch)]
        load.detector.predict(some, batch_size=batch)
        done += batch
    return done / (time.perf_counter() - started)


def many_clients(
    load: Load, *, seconds: float, most: int = sys.maxsize
) -> tuple[float, list[str], int]:
    """Images per second of 32 clients, their errors, and the number of answers."""
    clients = [Client(load.port, load.category) for _ in range(CLIENTS)]
    started, left, lock = time.perf_counter(), [most], threading.Lock()

    def work(number: int, client: Client) -> None:
        turn = number
        while time.perf_counter() - started < seconds:
            with lock:
                if left[0] <= 0:
                    return
                left[0] -= 1
            client.ask(load.picture(turn))
            turn += 1

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answered = sum(len(c.seconds) for c in clients)
    return (
        answered / (time.perf_counter() - started),
        [e for c in clients for e in c.errors],
        answered,
    )


def show(console: Console, rows: Sequence[Row]) -> bool:
    table = Table("", "measured", "bound", "held", box=None)
    for name, value, bound, held in rows:
        table.add_row(name, value, bound, "" if held is None else "yes" if held else "NO")
    console.print(table)
    return all(held is not False for *_, held in rows)


def milliseconds(seconds: Sequence[float]) -> str:
    return (
        f"{1000 * statistics.median(seconds):.1f} / "
        f"{1000 * float(np.quantile(seconds, 0.99)):.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", type=Path, help="a saved detector; default: one trained on the demo"
    )
    parser.add_argument(
        "--pictures", type=Path, help="a folder of pictures for it, folders below it included"
    )
    parser.add_argument(
        "--requests",
        type=int,
        default=60_000,
        help="of the long run; one client makes a twentieth of it, 400 at most",
    )
    parser.add_argument("--minutes", type=float, default=30, help="after which the long run ends")
    parser.add_argument("--local", action="store_true", help="serve without Ray")
    given = parser.parse_args()
    if (given.model is None) != (given.pictures is None):
        parser.error("give --model and --pictures together")
    console = Console(highlight=False, width=110)
    with tempfile.TemporaryDirectory(prefix="load") as name:
        folder = Path(name)
        model, pictures = (
            (given.model, bodies(given.pictures)) if given.model else demo_model(folder)
        )
        detector = Detector.load(model, device="cpu")
        options = ["--local"] if given.local else []
        with server(model.absolute(), folder, options) as running:
            load = Load(running, detector, pictures)
            rows = measure(console, load, given.requests, given.minutes)
    console.print(
        f"{os.cpu_count()} cores, torch {torch.get_num_threads()} threads, {len(pictures)} "
        f"pictures of {len(pictures[0]) / 1e3:.0f} kB"
    )
    raise SystemExit(0 if show(console, rows) else 1)


def measure(console: Console, load: Load, requests: int, minutes: float) -> list[Row]:
    count = max(40, min(400, requests // 20))
    console.print(f"one client, {count} requests ...")
    small = replace(load, pictures=smaller(load.pictures))
    rows, errors = measure_own_cost(load, count)
    if small.pictures != load.pictures:
        more, wrong = measure_own_cost(small, count)
        rows, errors = rows + more, errors + wrong
    console.print(f"{CLIENTS} clients ...")
    more, wrong = measure_throughput(load)
    rows, errors = rows + more, errors + wrong
    console.print(f"{requests} requests, {minutes:g} minutes at most ...")
    mixed = [body for pair in zip(load.pictures, small.pictures, strict=True) for body in pair]
    answered, memory, wrong = long_run(replace(load, pictures=mixed), requests, minutes)
    errors += wrong
    if errors:
        console.print("errors, the first five:", *errors[:5], sep="\n  ")
    rows.append((f"errors in {answered} requests", str(len(errors)), "0", not errors))
    return [*rows, memory_row(memory)]


def measure_own_cost(load: Load, count: int) -> tuple[list[Row], list[str]]:
    """What one client waits beside reading and network; rows and errors."""
    client, alone = one_client(load, count)
    own, p99 = statistics.median(client.own), float(np.quantile(client.own, 0.99))
    median_bound, p99_bound = BOUNDS["own cost, median"], BOUNDS["own cost, p99"]
    kilobytes = statistics.mean(len(body) for body in load.pictures) / 1e3
    more = [s - d for s, d in zip(client.seconds, alone, strict=False)]
    rows: list[Row] = [
        (f"bodies of {kilobytes:.0f} kB", "", "", None),
        ("detector alone, median / p99", milliseconds(alone), "", None),
        ("one client, median / p99", milliseconds(client.seconds), "", None),
        ("own cost, median", f"{own:.1f} ms", f"{median_bound:g} ms", own <= median_bound),
        ("own cost, p99", f"{p99:.1f} ms", f"{p99_bound:g} ms", p99 <= p99_bound),
        ("more than the detector, median", f"{1000 * statistics.median(more):.1f} ms", "", None),
    ]
    return rows, client.errors


def measure_throughput(load: Load) -> tuple[list[Row], list[str]]:
    """Images per second of the detector at its best batch size and of the server; rows, errors."""
    rates = {batch: in_process(load, batch, 2) for batch in BATCHES}
    best = max(rates, key=lambda batch: rates[batch])
    many_clients(load, seconds=2)
    rounds = [(in_process(load, best, 5), many_clients(load, seconds=5)) for _ in range(3)]
    detector = statistics.median(base for base, _ in rounds)
    server = statistics.median(served[0] for _, served in rounds)
    share, bound = server / detector, BOUNDS["share of the detector's images/s"]
    rows: list[Row] = [
        (f"detector alone, batches of {best}", f"{detector:.1f} images/s", "", None),
        (
            f"{CLIENTS} clients",
            f"{server:.1f} images/s, {share:.0%}",
            format(bound, ".0%"),
            share >= bound,
        ),
    ]
    return rows, [error for _, served in rounds for error in served[1]]


def long_run(load: Load, requests: int, minutes: float) -> tuple[int, list[int], list[str]]:
    """Number of answers, the server's memory after each twentieth of the requests, errors."""
    until, answered, memory, errors = time.monotonic() + 60 * minutes, 0, [], []
    rolled = 0
    while answered < requests and time.monotonic() < until:
        part = max(1, min(requests // 20, requests - answered))
        if rolled < ROLL_INS * answered / requests:
            load.server.roll_in()
            rolled += 1
        _, wrong, done = many_clients(load, seconds=until - time.monotonic(), most=part)
        errors += wrong
        answered += done
        memory.append(load.server.memory())
        if wrong and not done:
            break
    return answered, memory, errors


def memory_row(memory: Sequence[int]) -> Row:
    # The allocator's caches fill in the first fifth. Of the rest, the medians of the first and the
    # last quarter are compared.
    settled = memory[len(memory) // 5 :]
    quarter = max(1, len(settled) // 4)
    growth = statistics.median(settled[-quarter:]) / statistics.median(settled[:quarter]) - 1
    first, last, bound = memory[0] / 2**20, memory[-1] / 2**20, BOUNDS["growth"]
    value = f"{first:.0f} to {last:.0f} MiB, {growth:+.1%} once settled"
    return ("memory of replica and readers", value, f"{bound:+.0%}", growth <= bound)


if __name__ == "__main__":
    main()

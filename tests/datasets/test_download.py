"""Downloads from a real server on this machine that breaks off, lies and is hostile.

What stays on the disk is whole, or can be resumed.
"""

import errno
import hashlib
import io
import re
import stat
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from clsnf.cli import main
from clsnf.core.errors import DownloadError, OutputError, SettingsError
from clsnf.datasets import download as module
from clsnf.datasets.download import Archive, Source, download, read_source, sources_file
from clsnf.datasets.unpack import unpack


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_of(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members:
            zipped.writestr(name, content)
    return out.getvalue()


def zip_link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


GOOD = tar_of(
    ("nut/train/good/0.png", bytes(range(256)) * 20_000), ("readme.txt", b"hello")
)  # of several chunks
SHA = hashlib.sha256(GOOD).hexdigest()


@dataclass
class Server:
    """What the server does, and the Range of every request that it got (None: whole file)."""

    url: str = ""
    content: bytes = GOOD
    etag: str | None = '"one"'
    ranges: bool = True
    break_after: list[int] = field(
        default_factory=list
    )  # bytes of each answer's body, one entry for each request
    status: int = 200
    kind: str = "application/x-tar"
    length: int | None = None
    asked: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            state.asked.append(asked)
            body, status = state.content, state.status
            current = self.headers.get("If-Range") in (None, state.etag)
            if asked and state.ranges and current and status == 200:
                start = int(asked.removeprefix("bytes=").removesuffix("-"))
                status = 206 if start < len(body) else 416
                body = body[start:] if status == 206 else b""
            self.send_response(status)
            if status == 206:
                self.send_header(
                    "Content-Range", f"bytes {start}-{len(state.content) - 1}/{len(state.content)}"
                )
            if state.etag:
                self.send_header("ETag", state.etag)
            self.send_header("Content-Type", state.kind)
            self.send_header(
                "Content-Length", str(len(body) if state.length is None else state.length)
            )
            self.end_headers()
            self.wfile.write(body[: state.break_after.pop(0)] if state.break_after else body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/nuts.tar"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def source_of(*urls: str, **changes: Any) -> Source:
    given: dict[str, Any] = {
        "name": "nuts.tar",
        "mirrors": urls,
        "unpacked_limit": 10_000_000,
        "sha256": SHA,
    }
    archive = Archive(**(given | changes))
    return Source("Nuts", "CC0", "http://localhost", "nobody", "nuts", (archive,))


def fetch(source: Source, root: Path, said: list[str] | None = None) -> Path:
    return download(source, root, (said if said is not None else []).append)


def left(root: Path) -> list[str]:
    """What lies in the root, the lock apart."""
    return sorted(path.name for path in root.iterdir() if path.name != ".nuts.lock")


def assert_whole(root: Path) -> None:
    assert (root / "nuts/readme.txt").read_bytes() == b"hello"
    assert (root / "nuts/nut/train/good/0.png").stat().st_size == 256 * 20_000
    assert left(root) == ["nuts"]
    assert sorted(path.name for path in (root / "nuts").iterdir()) == ["nut", "readme.txt"]


def test_a_broken_download_goes_on_where_it_broke_off(server: Server, tmp_path: Path) -> None:
    server.break_after = [2_000_000]
    fetch(source_of(server.url), tmp_path)
    assert_whole(tmp_path)
    assert server.asked[0] is None
    assert server.asked[1] is not None
    assert int(re.sub(r"\D", "", server.asked[1])) > 1_000_000


def test_a_download_that_stopped_goes_on_in_the_next_run(server: Server, tmp_path: Path) -> None:
    server.break_after = [2_000_000, 0]
    with pytest.raises(
        DownloadError, match=r"broke off.*nuts\.tar\.part is kept, give the command again"
    ):
        fetch(source_of(server.url), tmp_path)
    assert left(tmp_path) == ["nuts.tar.part", "nuts.tar.part.json"]
    fetch(source_of(server.url), tmp_path)
    assert_whole(tmp_path)
    assert server.asked[-1] is not None


@pytest.mark.parametrize("sha", [SHA, None])
def test_a_server_without_ranges_gives_all_again(
    server: Server, tmp_path: Path, sha: str | None
) -> None:
    server.break_after, server.ranges = [2_000_000], False
    fetch(source_of(server.url, sha256=sha), tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("etags", [('"one"', '"two"'), (None, None)])
def test_a_file_that_changed_in_between_is_fetched_from_the_start(
    server: Server, tmp_path: Path, etags: tuple[str | None, str | None]
) -> None:
    server.content, server.etag, server.break_after = GOOD[::-1], etags[0], [2_000_000, 0]
    with pytest.raises(DownloadError):
        fetch(source_of(server.url), tmp_path)
    server.content, server.etag = GOOD, etags[1]
    fetch(source_of(server.url), tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("lie", "source", "message"),
    [
        ({"length": len(GOOD) + 10}, {}, "broke off"),
        ({"length": len(GOOD) - 10}, {}, "its sha256 is"),
        ({"length": 100}, {"size": len(GOOD)}, "offers 100 bytes"),
        ({}, {"size": len(GOOD) + 1}, "bytes where"),
        ({"status": 404}, {}, "answers 404"),
        ({"status": 500}, {}, "answers 500"),
        ({"content": b"<html>", "kind": "text/html; charset=utf-8"}, {"sha256": None}, "web page"),
        ({"content": b"<html>"}, {"sha256": None}, "no archive"),
        ({"content": GOOD[:-5000] + b"x" * 5000}, {}, "its sha256 is"),
    ],
)
def test_what_is_not_the_file_is_one_error(
    server: Server, tmp_path: Path, lie: dict[str, Any], source: dict[str, Any], message: str
) -> None:
    for name, value in lie.items():
        setattr(server, name, value)
    with pytest.raises(DownloadError, match=message):
        fetch(source_of(server.url, **source), tmp_path)
    assert not (tmp_path / "nuts").exists()
    assert ("nuts.tar.part" in left(tmp_path)) == (message == "broke off")


def test_the_next_mirror_is_tried(server: Server, tmp_path: Path) -> None:
    fetch(
        source_of(server.url.replace("http://127.0.0.1", "http://nowhere.invalid"), server.url),
        tmp_path,
    )
    assert_whole(tmp_path)


def test_without_a_sha256_the_one_found_is_told(server: Server, tmp_path: Path) -> None:
    said: list[str] = []
    fetch(source_of(server.url, sha256=None), tmp_path, said)
    assert len(said) == 1
    assert "could not be verified" in said[0]
    assert SHA in said[0]


def test_what_is_there_is_left_alone(server: Server, tmp_path: Path) -> None:
    fetch(source_of(server.url), tmp_path)
    (tmp_path / "nuts/readme.txt").write_text("mine")
    fetch(source_of(server.url), tmp_path)
    assert (tmp_path / "nuts/readme.txt").read_text() == "mine"
    assert len(server.asked) == 1


HOSTILE = {
    "parent": tar_of(("good.txt", b"a"), ("../out.txt", b"x")),
    "parent inside": tar_of(("a/../../out.txt", b"x")),
    "absolute": tar_of(("/tmp/out.txt", b"x")),
    "backslash": tar_of(("..\\out.txt", b"x")),
    "drive": tar_of(("C:/out.txt", b"x")),
    "link": tar_of(special("a", tarfile.SYMTYPE, "/etc"), ("a/out.txt", b"x")),
    "hard link": tar_of(("a", b"x"), special("b", tarfile.LNKTYPE, "a")),
    "device": tar_of(special("null", tarfile.CHRTYPE)),
    "pipe": tar_of(special("pipe", tarfile.FIFOTYPE)),
    "bomb": tar_of(("a", bytes(6_000_000)), ("b", bytes(6_000_000))),
    "twice": tar_of(("a", b"1"), ("a", b"2")),
    "twice in another case": tar_of(("a", b"1"), ("A", b"2")),
    "file and folder": tar_of(("a", b"1"), ("a/b", b"2")),
    "zip parent": zip_of(("good.txt", b"a"), ("../out.txt", b"x")),
    "zip absolute": zip_of(("/tmp/out.txt", b"x")),
    "zip link": zip_of((zip_link("a"), b"/etc")),
    "zip bomb": zip_of(("a", bytes(20_000_000))),
    "cut": GOOD[:3_000_000],
    "empty": tar_of(),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_of_a_hostile_archive_nothing_remains(
    server: Server, tmp_path: Path, content: bytes
) -> None:
    server.content = content
    root = tmp_path / "root"
    with pytest.raises(DownloadError):
        fetch(source_of(server.url, sha256=None), root)
    assert left(root) == []
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_zip_is_unpacked_from_the_folder_inside_it(server: Server, tmp_path: Path) -> None:
    server.content = zip_of(("top/", b""), ("top/a/1.png", b"1"), ("__notes", b"x"))
    fetch(source_of(server.url, sha256=None, inside="top"), tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png")] == [
        "nuts/a/1.png"
    ]
    assert not (tmp_path / "nuts/__notes").exists()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.text("ab./\\", min_size=1, max_size=6), st.binary(max_size=3)), max_size=4
    )
)
def test_whatever_the_names_nothing_lies_outside(
    tmp_path_factory: pytest.TempPathFactory, members: list[tuple[str, bytes]]
) -> None:
    base = tmp_path_factory.mktemp("names")
    (base / "x.tar").write_bytes(tar_of(*members))
    try:
        unpack(base / "x.tar", base / "deep" / "folder", 100)
        unpacked = True
    except DownloadError:
        unpacked = False
    assert sorted(p.name for p in base.iterdir()) == ["deep", "x.tar"]
    assert [p.name for p in (base / "deep").iterdir()] == ["folder"]
    if unpacked:
        assert sum(p.is_file() for p in (base / "deep").rglob("*")) == len(members)


class Full:
    """A file on a full disk."""

    def __init__(self, file: Any) -> None:
        self.file, self.left = file, 2

    def __enter__(self) -> "Full":
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def write(self, chunk: bytes) -> None:
        if not self.left:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.left -= 1
        self.file.write(chunk)


def full_for(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[Path, str], bool]) -> None:
    original = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = original(self, mode, *args, **kwargs)
        return Full(file) if chosen(self, mode) else file

    monkeypatch.setattr(Path, "open", opened)


@pytest.mark.parametrize("where", ["part", "unpacking"])
def test_a_disk_that_fills_up_is_one_line_and_keeps_the_part(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with monkeypatch.context() as patch:
        full_for(
            patch,
            lambda path, mode: (
                path.name.endswith(".tar.part") and "b" in mode and mode != "rb"
                if where == "part"
                else mode == "xb"
            ),
        )
        with pytest.raises(OutputError, match="the disk is full: make room"):
            fetch(source_of(server.url), tmp_path)
    assert left(tmp_path) == ["nuts.tar.part", "nuts.tar.part.json"]
    assert (tmp_path / "nuts.tar.part").stat().st_size >= 2_000_000
    fetch(source_of(server.url), tmp_path)
    assert_whole(tmp_path)


def test_ctrl_c_keeps_the_part(server: Server, tmp_path: Path) -> None:
    def interrupt(task: str, done: int, total: int) -> None:
        if done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(source_of(server.url), tmp_path, print, interrupt)
    assert left(tmp_path) == ["nuts.tar.part", "nuts.tar.part.json"]
    fetch(source_of(server.url), tmp_path)
    assert_whole(tmp_path)


def test_too_little_room_is_said_before_anything_is_fetched(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"GB free, Nuts may need 1000000.0 GB"):
        fetch(source_of(server.url, unpacked_limit=10**15), tmp_path)
    assert server.asked == []


# ---- sources and the command ----


@pytest.mark.parametrize("name", ["mvtec", "btad", "visa", "dtd"])
def test_the_sources_that_ship_are_valid(name: str) -> None:
    assert read_source(name).folder == name
    assert sources_file().is_file()


def write_sources(tmp_path: Path, url: str, **changes: str) -> Path:
    archive = {
        "name": "nuts.tar",
        "mirrors": f"[{url}]",
        "unpacked_limit": "10000000",
        "sha256": SHA,
    } | changes
    text = (
        "nuts:\n  title: Nuts\n  licence: CC0\n  homepage: h\n  citation: c\n  folder: nuts\n  "
        "archives:\n    - "
    )
    path = tmp_path / "sources.yaml"
    path.write_text(
        text + "\n      ".join(f"{key}: {value}" for key, value in archive.items()) + "\n"
    )
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "../x"},
        {"mirrors": "[file:///etc]"},
        {"mirrors": "[]"},
        {"sha256": "abc"},
        {"size": "0"},
        {"md5": "1"},
    ],
)
def test_sources_that_make_no_sense_are_refused(tmp_path: Path, changes: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"sources\.yaml"):
        read_source("nuts", write_sources(tmp_path, "http://localhost", **changes))


def test_the_command_asks_fetches_and_is_a_no_op_afterwards(server: Server, tmp_path: Path) -> None:
    given = [
        "data",
        "download",
        "nuts",
        "--root",
        str(tmp_path / "r"),
        "--sources",
        str(write_sources(tmp_path, server.url)),
    ]
    refused = CliRunner().invoke(main, given)
    assert refused.exit_code == 2
    assert "add --yes" in refused.output
    assert not (tmp_path / "r").exists()
    done = CliRunner().invoke(main, [*given, "--yes"])
    assert done.exit_code == 0, done.output
    assert "CC0" in done.output
    assert_whole(tmp_path / "r")
    assert "is there already" in CliRunner().invoke(main, given).output


def test_an_unknown_data_set_names_the_nearest(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["data", "download", "mvtek", "--root", str(tmp_path)])
    assert done.exit_code == 2
    assert "Did you mean 'mvtec'?" in done.output
    assert module.sources_file().name in done.output

"""Fetches public data sets: resumable, verified where a sha256 is known, whole or not at all.

A download that stopped stays as ``ROOT/ARCHIVE.part`` with a note beside it (``.part.json``:
address, size, ETag or date) that says what it is a part of. It is resumed only if the server says
that the file is still the same, or if a sha256 will tell. Called by ``clsnf data download``.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from filelock import FileLock, Timeout
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from clsnf.core.config import from_dict
from clsnf.core.errors import DownloadError, OutputError, SettingsError, nearest
from clsnf.core.files import atomic_write, write_json
from clsnf.core.hashing import sha256_file
from clsnf.core.progress import Progress, silent
from clsnf.core.yaml import read_yaml_mapping
from clsnf.datasets.unpack import is_archive, unpack

_CHUNK = 1 << 20
_TIMEOUT = (20, 60)  # seconds to connect, and between two chunks
_TRIES = 5  # of one mirror; each resumes where the last one broke off
_MB = 1_000_000


@dataclass(frozen=True)
class Archive:
    """One file of a data set; ``datasets/sources.yaml`` says what each entry is."""

    name: str
    mirrors: tuple[str, ...]
    unpacked_limit: int
    inside: str | None = None
    size: int | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if not _is_name(self.name):
            raise SettingsError(f"The archive name {self.name!r} is no plain file name.")
        if self.inside is not None and not _is_name(self.inside):
            raise SettingsError(
                f"{self.name}: inside is {self.inside!r}: give one folder's name, or null."
            )
        if not self.mirrors or any(
            urlsplit(url).scheme not in ("http", "https") for url in self.mirrors
        ):
            raise SettingsError(
                f"{self.name}: mirrors must be one or more addresses that begin with https:// or "
                "http://."
            )
        if self.sha256 is not None and not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise SettingsError(
                f"{self.name}: sha256 is {self.sha256!r}: give 64 hex digits in lower case, or "
                "null."
            )
        if self.unpacked_limit < 1 or (self.size is not None and self.size < 1):
            raise SettingsError(
                f"{self.name}: size and unpacked_limit are numbers of bytes, 1 or more."
            )


@dataclass(frozen=True)
class Source:
    """A public data set."""

    title: str
    licence: str
    homepage: str
    citation: str
    folder: str
    archives: tuple[Archive, ...]

    def __post_init__(self) -> None:
        if not _is_name(self.folder):
            raise SettingsError(f"The folder {self.folder!r} is no plain name.")
        if not self.archives:
            raise SettingsError(f"{self.title} has no archives.")


def _is_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w][\w.+-]*", name))


def sources_file() -> Path:
    """The ``sources.yaml`` that ships with clsnf. Raises DownloadError if there is none.

    It lies in a checkout, or below share/clsnf of an installation.
    """
    import importlib.metadata

    checkout = Path(__file__).parents[2]
    places = (
        [checkout / "datasets" / "sources.yaml"] if (checkout / "pyproject.toml").exists() else []
    )
    try:
        files = importlib.metadata.files("clsnf") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    places += [
        Path(str(file.locate())).resolve()
        for file in files
        if file.as_posix().endswith("share/clsnf/sources.yaml")
    ]
    # After pip install --target the list of installed files lacks this one.
    places.append(checkout / "share" / "clsnf" / "sources.yaml")
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise DownloadError(
            "The list of data sets (sources.yaml) is not installed: name one with --sources, or "
            "install clsnf again."
        )
    return found


def read_source(name: str, path: Path | None = None) -> Source:
    """One data set of a sources file, by default of the one that ships with clsnf.

    Raises:
        SettingsError: the file is no valid sources file, or has no such data set.
    """
    path = path or sources_file()
    content = read_yaml_mapping(path, "mvtec: {title: ...}")
    if name not in content:
        raise SettingsError(f"{path} has no data set {name!r}.{nearest(name, content)}")
    try:
        return from_dict(Source, content[name], name)
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from error


def is_there(source: Source, root: Path) -> bool:
    """Whether the data set's folder stands below ``root`` and holds something."""
    place = root / source.folder
    return place.is_dir() and any(place.iterdir())


def download(
    source: Source, root: Path, say: Callable[[str], None], progress: Progress = silent
) -> Path:
    """Fetch, verify and unpack a data set; return its folder, ``root / source.folder``.

    What was fetched is kept for the next try, unless it proved wrong.

    Args:
        say: called with what the user must know, such as a download that can't be verified.

    Raises:
        DownloadError: no mirror gives what was promised, or an archive is refused.
        OutputError: the disk has too little space or can't be written, or another process is
            downloading the data set.
    """
    place = root / source.folder
    if is_there(source, root):
        return place
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{source.folder}.lock", timeout=0):
            _check_room(source, root)
            parts = [_fetched(archive, root, say, progress) for archive in source.archives]
            _unpacked(source, place, parts, progress)
    except Timeout as error:
        raise OutputError(
            f"{place} is being downloaded by another process: wait for it."
        ) from error
    except OSError as error:
        hint = (
            "the disk is full: make room"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else f"{error.strerror}: mend that"
        )
        raise OutputError(
            f"{root} can't be written, {hint} and give the command again; what was fetched is kept."
        ) from error
    for part in parts:
        part.unlink(missing_ok=True)
        _note_of(part).unlink(missing_ok=True)
    return place


def _check_room(source: Source, root: Path) -> None:
    """Raise OutputError if the disk can't hold the archives and what they unpack to.

    What is there of the archives already counts as fetched.
    """
    needed = 0
    for archive in source.archives:
        part = root / f"{archive.name}.part"
        have = part.stat().st_size if part.exists() else 0
        needed += max(0, (archive.size or 0) - have) + archive.unpacked_limit
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OutputError(
            f"{root} has {free / 1e9:.1f} GB free, {source.title} may need {needed / 1e9:.1f} GB: "
            "make room or choose another --root."
        )


# ---- fetching ----


class _BrokenOffError(Exception):
    """The connection ended early: to resume may help."""


class _WrongFileError(Exception):
    """The server gives another file: only another mirror helps."""


def _fetched(archive: Archive, root: Path, say: Callable[[str], None], progress: Progress) -> Path:
    """Fetch and verify an archive; return its part file. Raises DownloadError, OutputError."""
    part = root / f"{archive.name}.part"
    with requests.Session() as session:
        retry = Retry(
            total=2,
            backoff_factor=0.2,
            status_forcelist=(429, 502, 503, 504),
            raise_on_status=False,
        )
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=retry))
        problems = []
        for url in archive.mirrors:
            for _ in range(_TRIES):
                before = part.stat().st_size if part.exists() else 0
                try:
                    _transfer(session, url, archive, part, progress)
                    _verify(archive, part, say)
                    return part
                except _BrokenOffError as error:
                    problem = str(error)
                    if part.exists() and part.stat().st_size > before:
                        continue  # this try fetched something: resume
                except _WrongFileError as error:
                    problem = str(error)
                    if before and not part.exists():
                        continue  # the part was of another file: fetch it from the start
                break
            problems.append(f"{urlsplit(url).netloc}: {problem}")
    kept = f"; {part} is kept, give the command again to go on" if part.exists() else ""
    raise DownloadError(f"{archive.name} can't be fetched ({'; '.join(problems)}){kept}.")


def _transfer(
    session: requests.Session, url: str, archive: Archive, part: Path, progress: Progress
) -> None:
    """Fetch what is missing of ``part``.

    Raises:
        _BrokenOffError, _WrongFileError: see there.
        OSError, OutputError: the disk can't be written, or is too full.
    """
    note = _read_note(part)
    have = part.stat().st_size if part.exists() else 0
    if have and note.get("whole"):
        return
    headers = _request_headers(url, archive, note, have)
    try:
        response = session.get(url, headers=headers, stream=True, timeout=_TIMEOUT)
    except requests.RequestException as error:
        raise _BrokenOffError(f"no answer ({type(error).__name__})") from error
    with response:
        if response.status_code == 416 or (
            response.status_code == 206 and not _fits(response, have, note)
        ):
            _drop(part)  # it is a part of another file, or has more bytes than the file
            raise _WrongFileError("the file has changed")
        _check_response(response, asked_for_rest="Range" in headers)
        start = have if response.status_code == 206 else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if length.isdecimal() else None
        if archive.size is not None and total is not None and total != archive.size:
            raise _WrongFileError(f"it offers {total} bytes where {archive.size} are expected")
        most = archive.size or total
        if most is not None and shutil.disk_usage(part.parent).free < most - start:
            raise OutputError(
                f"{part.parent} has too little room for {most - start} bytes more: make room."
            )
        noted = {"url": url, "total": total, "validator": _validator(response)}
        write_json(_note_of(part), noted)
        done = _append(
            response, part, start, most, lambda done: _show(archive, done, most, progress)
        )
    progress(f"download {archive.name} (MB)", 1, 1)
    if most is not None and done < most:
        raise _BrokenOffError(f"it ended after {done} of {most} bytes")
    if most is not None and done > most:
        _drop(part)
        raise _WrongFileError(f"it gives more than {most} bytes")
    write_json(_note_of(part), {**noted, "total": done, "whole": True})


def _request_headers(url: str, archive: Archive, note: dict[str, Any], have: int) -> dict[str, str]:
    """The headers of a request, which asks for the rest of a file if that is safe.

    It is safe if the server can tell whether the file is the same, or if the result can be checked.
    """
    headers = {"Accept-Encoding": "identity"}  # otherwise ranges and sizes count compressed bytes
    if have and note.get("validator") and note.get("url") == url:
        headers |= {"Range": f"bytes={have}-", "If-Range": note["validator"]}
    elif have and (archive.sha256 is not None or note.get("url") == url) and note.get("total"):
        headers["Range"] = f"bytes={have}-"
    return headers


def _check_response(response: requests.Response, *, asked_for_rest: bool) -> None:
    """Raise _WrongFileError for an answer that is no file."""
    if response.status_code not in (200, 206) or (
        response.status_code == 206 and not asked_for_rest
    ):
        raise _WrongFileError(f"it answers {response.status_code}")
    if response.headers.get("Content-Type", "").startswith("text/html"):
        raise _WrongFileError("it gives a web page and no archive")


def _validator(response: requests.Response) -> str | None:
    """What tells one version of the file from another: its strong ETag, else its date."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified")


def _append(
    response: requests.Response,
    part: Path,
    start: int,
    most: int | None,
    show: Callable[[int], None],
) -> int:
    """Write the answer to ``part`` from byte ``start`` on; the bytes that ``part`` has then.

    It stops soon after ``most`` bytes. Raises _BrokenOffError, OSError.
    """
    done = start
    with part.open("ab" if start else "wb") as file:
        try:
            for chunk in response.iter_content(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if most is not None and done > most:
                    break
                show(done)
        except requests.RequestException as error:
            raise _BrokenOffError(f"the connection broke off after {done} bytes") from error
    return done


def _show(archive: Archive, done: int, most: int | None, progress: Progress) -> None:
    progress(f"download {archive.name} (MB)", done // _MB, max(done, most or 0) // _MB + 1)


def _fits(response: requests.Response, have: int, note: dict[str, Any]) -> bool:
    """Whether a partial answer continues exactly where the part file ends.

    It must be a part of a file of the size that was noted.
    """
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
    return (
        match is not None
        and int(match[1]) == have
        and match[2] in ("*", str(note.get("total") or match[2]))
    )


def _verify(archive: Archive, part: Path, say: Callable[[str], None]) -> None:
    """Check size, sha256 and kind of a fetched file.

    A wrong one is removed. Raises _WrongFileError.
    """
    found = sha256_file(part)
    if archive.size is not None and part.stat().st_size != archive.size:
        problem = f"it gave {part.stat().st_size} bytes where {archive.size} are expected"
    elif archive.sha256 is not None and found != archive.sha256:
        problem = f"its sha256 is {found}, expected is {archive.sha256}"
    elif not is_archive(part):
        problem = "what it gave is no archive"
    else:
        if archive.sha256 is None:
            say(
                f"{archive.name} could not be verified: no sha256 of it is known. This one has "
                f"{found}"
            )
        return
    _drop(part)
    raise _WrongFileError(problem)


def _note_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_note(part: Path) -> dict[str, Any]:
    try:
        note = json.loads(_note_of(part).read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _drop(part: Path) -> None:
    part.unlink(missing_ok=True)
    _note_of(part).unlink(missing_ok=True)


# ---- unpacking ----


def _unpacked(source: Source, place: Path, parts: list[Path], progress: Progress) -> None:
    """Unpack all archives into a draft, which takes its place when it is whole.

    An archive that is refused is removed. Raises DownloadError.
    """
    # Remove what a killed run left: under the lock, nobody else writes here.
    for beside in place.parent.glob(f".{place.name}.*.part"):
        shutil.rmtree(beside, ignore_errors=True)
    with atomic_write(place) as draft:
        draft.mkdir()
        for number, (archive, part) in enumerate(zip(source.archives, parts, strict=True)):
            opened = draft / f".archive-{number}"
            try:
                unpack(part, opened, archive.unpacked_limit, progress)
                top = opened / archive.inside if archive.inside else opened
                if not top.is_dir() or not any(top.iterdir()):
                    raise DownloadError(
                        f"{archive.name} holds no {archive.inside or 'files'}: it is not the "
                        "expected archive."
                    )
                for entry in top.iterdir():
                    if (draft / entry.name).exists():
                        raise DownloadError(
                            f"{archive.name} holds {entry.name!r}, which another archive holds too."
                        )
                    entry.rename(draft / entry.name)
            except DownloadError:
                _drop(part)
                raise
            shutil.rmtree(opened)

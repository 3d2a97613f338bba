"""Frames of a camera, of a stream (``rtsp://...``), or of a video file, by OpenCV.

Of a camera or stream the newest frame counts: a thread reads all, and frames that come while
another is judged are dropped and counted. When it is away, that is one result, "not ok", and it is
opened again with growing pauses. A video file is a recording: each of its frames is judged.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import cv2
import numpy as np
from numpy.typing import NDArray

from clsnf.core.errors import DataError, OutageError, SettingsError
from clsnf.core.patience import NEVER_TIRED, Patience
from clsnf.core.secrets import read_secret, refuse_password
from clsnf.core.uris import bare_uri
from clsnf.watching.pictures import Frame, MissingPicture, Picture

PASSWORD = "CLSNF_CAMERA_PASSWORD"
_TIMEOUT = 5000  # milliseconds in which a stream must open, and give the next frame
_SILENT = 10.0  # seconds without a frame after which a camera is away


@dataclass(frozen=True)
class CameraSettings:
    """Which frames are judged.

    Attributes:
        every: seconds between two frames that are judged; None for all that can be kept up with.
    """

    every: float | None = None


class CameraSource:
    """The newest frames of a camera; see :class:`clsnf.watching.pictures.Source`.

    Args:
        camera: number of a camera of this machine, or the URL of a stream.
        settings: which frames.
        say: gets lines for people.

    Raises:
        SettingsError: the URL has a password.
    """

    ended, overloaded = False, False

    def __init__(
        self, camera: int | str, settings: CameraSettings, say: Callable[[str], None]
    ) -> None:
        self._camera = camera if isinstance(camera, int) else with_password(camera)
        self.name = f"camera {camera}" if isinstance(camera, int) else bare_uri(camera)
        self._every, self._say = settings.every or 0.0, say
        self.dropped, self.trouble = 0, ""
        self._slot: Picture | None = None
        self._arrived = threading.Condition()
        self._stop = threading.Event()
        self._patience = Patience(NEVER_TIRED, lambda line: None)
        self._thread = threading.Thread(target=self._read_all, daemon=True)
        self._capture: cv2.VideoCapture | None = None
        self._number, self._last_frame, self._due = 0, 0.0, 0.0

    @property
    def waiting(self) -> int:
        """1 where a frame waits to be judged."""
        return int(self._slot is not None)

    def open(self) -> None:
        """Open the camera. Raises DataError where it gives no pictures."""
        try:
            self._capture = self._open()
        except OutageError as error:
            raise DataError(
                f"{self.name} gives no pictures: check its number or address, that it is switched "
                f"on, and that no other program uses it. A stream's password is read from "
                f"{PASSWORD}."
            ) from error
        self._last_frame = time.monotonic()
        self._thread.start()

    def take(self, seconds: float) -> Picture | None:
        """The newest frame; None where none comes within so many seconds."""
        with self._arrived:
            if self._slot is None:
                self._arrived.wait(seconds)
            picture, self._slot = self._slot, None
        if picture is None and time.monotonic() - self._last_frame > _SILENT + self._every:
            return self._away(f"{self.name} has given no frame for {_SILENT:.0f} s")
        return picture

    def postpone(self, picture: Picture) -> None:
        """Frames are never postponed."""

    def close(self) -> None:
        """Read no more frames."""
        self._stop.set()
        self._patience.over.set()
        if self._thread.is_alive():
            self._thread.join(2 * _TIMEOUT / 1000)

    # ---- the thread ----

    def _open(self) -> cv2.VideoCapture:
        """An opened camera. Raises OutageError."""
        capture = open_capture(self._camera)
        if not capture.isOpened():
            capture.release()
            raise OutageError(f"{self.name} can't be opened")
        return capture

    def _read_all(self) -> None:
        capture = self._capture
        while not self._stop.is_set():
            if capture is None:
                try:
                    capture = self._patience.wait_for(self._open)
                except OutageError:
                    break  # the watch ends
            found, image = capture.read()
            if found and image is not None:
                self._arrive(as_rgb(image))
                continue
            capture.release()
            capture = None
            if not self._stop.is_set():
                self._put(self._away(f"{self.name} gives no frames"))
                self._stop.wait(0.5)  # a camera that opens and gives nothing
        if capture is not None:
            capture.release()

    def _arrive(self, image: NDArray[np.uint8]) -> None:
        now = time.monotonic()
        self._last_frame = now
        if self.trouble:
            self._say(f"{self.name} is back")
            self.trouble = ""
        number, self._number = self._number, self._number + 1
        if now < self._due:
            return
        # In rhythm, or from now on where a frame came late.
        in_rhythm = now - self._due < self._every
        self._due = (self._due if in_rhythm else now) + self._every
        self._put(Frame(self.name, number, image))

    def _put(self, picture: Picture | None) -> None:
        if picture is None:
            return
        with self._arrived:
            if isinstance(self._slot, Frame):
                self.dropped += 1
            # That the camera was away must be heard, also where it is back by now.
            if self._slot is None or isinstance(self._slot, Frame):
                self._slot = picture
            else:
                self.dropped += 1
            self._arrived.notify()

    def _away(self, reason: str) -> Picture | None:
        """The result of an outage; None where it is known already."""
        if self.trouble:
            return None
        self.trouble = reason
        self._say(f"{reason}: waiting until it works again")
        return MissingPicture(self.name, f"{reason}.")


class VideoSource:
    """All frames of a video file; see :class:`clsnf.watching.pictures.Source`.

    Args:
        file: of the video.
        settings: which frames; seconds are those of the video.
    """

    overloaded = False

    def __init__(self, file: Path, settings: CameraSettings) -> None:
        self.name, self._file, self._every = str(file), file, settings.every
        self.dropped, self.trouble, self.ended = 0, "", False
        self._number, self._step, self._expected = 0, 1.0, 0
        self._due = 0.0

    @property
    def waiting(self) -> int:
        """Frames wait in the file."""
        return 0

    def open(self) -> None:
        """Open the file. Raises DataError where it is no video."""
        if not self._file.is_file():
            raise DataError(f"There is no video {self.name}: check the path.")
        self._capture = open_capture(str(self._file))
        if not self._capture.isOpened():
            raise DataError(f"{self.name} is no video that OpenCV can read: convert it to mp4.")
        rate = self._capture.get(cv2.CAP_PROP_FPS)
        self._step = max(1.0, (self._every or 0.0) * (rate if rate > 0 else 25.0))
        self._expected = max(1, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))

    def take(self, seconds: float) -> Picture | None:
        """The next frame; None at the end."""
        while not self.ended:
            found, image = self._capture.read()
            number, self._number = self._number, self._number + 1
            if not found:
                self.ended = True
                if number < self._expected:
                    reason = f"{self.name} is damaged: {number} of {self._expected} frames came."
                    return MissingPicture(self.name, reason)
            elif number >= self._due:
                self._due += self._step
                return Frame(self.name, number, as_rgb(image))
        return None

    def postpone(self, picture: Picture) -> None:
        """Frames are never postponed."""

    def close(self) -> None:
        """Close the file."""
        self._capture.release()


def open_capture(source: int | str) -> cv2.VideoCapture:
    """OpenCV's reader, which waits for a stream no longer than a few seconds."""
    cv2.utils.logging.setLogLevel(
        0
    )  # what went wrong is said in one line, not by OpenCV and its codecs
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if isinstance(source, int) or "://" not in source:
        return cv2.VideoCapture(source)
    # UDP, the default, loses packets, and grey blocks would be judged as defects.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_transport;tcp")
    limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _TIMEOUT]
    return cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)


def as_rgb(image: NDArray[Any]) -> NDArray[np.uint8]:
    """OpenCV's frame, BGR or grey, as (h, w, 3) uint8 RGB."""
    code = cv2.COLOR_GRAY2RGB if image.ndim == 2 else cv2.COLOR_BGR2RGB
    return np.asarray(cv2.cvtColor(image, code), np.uint8)


def with_password(url: str) -> str:
    """A stream's URL with the password of the environment.

    Raises:
        SettingsError: it has one, or no host.
    """
    refuse_password(url, "The camera's address", PASSWORD)
    parts, password = urlsplit(url), read_secret(PASSWORD)
    if not parts.hostname:
        raise SettingsError(f"{url} names no host: give rtsp://USER@HOST/PATH.")
    if password is None or parts.username is None:
        return url
    host = parts.netloc.rpartition("@")[2]
    user = f"{parts.username}:{quote(password, safe='')}"
    return urlunsplit(parts._replace(netloc=f"{user}@{host}"))

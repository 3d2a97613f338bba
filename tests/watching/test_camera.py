"""Frames of a video file that OpenCV wrote, and of a real stream that goes away and comes back."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest

from clsnf.core.errors import DataError, SettingsError
from clsnf.watching import camera as camera_module
from clsnf.watching.camera import CameraSettings, CameraSource, VideoSource, with_password
from clsnf.watching.pictures import Frame, MissingPicture, Picture
from tests.support.small_server import encoded, free_port
from tests.support.watching import wait_until


def numbered(number: int) -> np.ndarray:
    """A red picture, brighter with each number."""
    return np.full((48, 64, 3), (10 * number + 5, 0, 0), np.uint8)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "line.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for number in range(20):
        writer.write(numbered(number)[:, :, ::-1])
    writer.release()
    return path


def all_of(source: VideoSource) -> list[Picture]:
    source.open()
    found: list[Picture] = []
    while not source.ended:
        picture = source.take(0)
        if picture is not None:
            found.append(picture)
    source.close()
    return found


def test_each_frame_of_a_video_comes_in_its_colours(video: Path) -> None:
    frames = all_of(VideoSource(video, CameraSettings()))
    assert [frame.frame for frame in frames] == list(range(20))
    for number, frame in enumerate(frames):
        red, green, blue = frame.read().reshape(-1, 3).mean(axis=0)
        assert red == pytest.approx(10 * number + 5, abs=4)
        assert max(green, blue) < 6


def test_of_a_video_one_frame_in_so_many_seconds_comes(video: Path) -> None:
    frames = all_of(VideoSource(video, CameraSettings(every=0.5)))
    assert [frame.frame for frame in frames] == [0, 5, 10, 15]


def test_what_is_no_video_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no video"):
        VideoSource(tmp_path / "no.avi", CameraSettings()).open()
    (tmp_path / "no.avi").write_text("no video")
    with pytest.raises(DataError, match="is no video that OpenCV can read"):
        VideoSource(tmp_path / "no.avi", CameraSettings()).open()


def test_a_video_that_is_cut_short_ends_with_what_is_not_ok(video: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.avi"
    cut.write_bytes(video.read_bytes()[: video.stat().st_size * 4 // 5])
    frames = all_of(VideoSource(cut, CameraSettings()))
    assert isinstance(frames[-1], MissingPicture)
    assert 2 < len(frames) < 20


def test_a_video_without_frames_is_not_ok(tmp_path: Path) -> None:
    path = tmp_path / "empty.avi"
    cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48)).release()
    (missing,) = all_of(VideoSource(path, CameraSettings()))
    assert isinstance(missing, MissingPicture)
    assert "0 of 1 frames" in missing.reason


# ---- streams ----


class MotionJpeg(BaseHTTPRequestHandler):
    """A camera that sends JPEGs for ever, as network cameras do."""

    stopped = threading.Event()

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
        self.end_headers()
        for number in itertools.count():
            if self.stopped.wait(0.02):
                return
            data = encoded(numbered(number % 20), "JPEG")
            head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
            try:
                self.wfile.write(head.encode() + data + b"\r\n")
            except OSError:
                return

    def log_message(self, *_: object) -> None:
        """Nothing is printed."""


@contextmanager
def network_camera(port: int) -> Iterator[str]:
    class OneCamera(MotionJpeg):
        stopped = threading.Event()

    server = ThreadingHTTPServer(("127.0.0.1", port), OneCamera)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{port}/stream.mjpg"
    finally:
        OneCamera.stopped.set()
        server.shutdown()
        server.server_close()


def next_picture(source: CameraSource) -> Picture:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        picture = source.take(1)
        if picture is not None:
            return picture
    raise AssertionError("no picture came")


def test_of_a_stream_the_newest_frame_counts_and_the_others_are_counted() -> None:
    with network_camera(free_port()) as url:
        source = CameraSource(url, CameraSettings(), lambda line: None)
        source.open()
        first = next_picture(source)
        assert isinstance(first, Frame)
        dropped = source.dropped
        wait_until(lambda: source.dropped >= dropped + 5)  # while a picture is judged
        second = next_picture(source)
        assert second.frame is not None
        assert second.frame >= first.frame + 5
        source.close()


def test_a_stream_that_goes_away_is_one_result_and_is_opened_again() -> None:
    port, lines = free_port(), list[str]()
    with network_camera(port) as url:
        source = CameraSource(url, CameraSettings(), lines.append)
        source.open()
        next_picture(source)
    found = next_picture(source)
    while isinstance(found, Frame):
        found = next_picture(source)
    assert isinstance(found, MissingPicture)
    assert source.trouble
    assert source.take(1) is None
    with network_camera(port):
        assert isinstance(next_picture(source), Frame)
        assert not source.trouble
        source.close()
    assert [line.rsplit(" ", 2)[-1] for line in lines] == ["again", "back"]


def test_a_camera_that_is_silent_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(camera_module, "_SILENT", 0.3)
    with network_camera(free_port()) as url:
        source = CameraSource(url, CameraSettings(), lambda line: None)
        source.open()
        monkeypatch.setattr(source, "_arrive", lambda image: None)  # frames that never arrive
        found = next_picture(source)
        while isinstance(found, Frame):
            found = next_picture(source)
        assert isinstance(found, MissingPicture)
        source.close()


def test_seconds_between_frames_are_kept() -> None:
    with network_camera(free_port()) as url:
        source = CameraSource(url, CameraSettings(every=0.4), lambda line: None)
        source.open()
        frames = [next_picture(source) for _ in range(3)]
        source.close()
    numbers = [frame.frame or 0 for frame in frames]
    assert all(later - before >= 5 for before, later in itertools.pairwise(numbers))
    assert source.dropped == 0  # what is not asked for is not dropped


@pytest.mark.parametrize("kind", ["index", "url"])
def test_a_camera_that_is_not_there_is_one_clear_line(kind: str) -> None:
    camera = 77 if kind == "index" else f"rtsp://127.0.0.1:{free_port()}/live"
    with pytest.raises(DataError, match="gives no pictures") as raised:
        CameraSource(camera, CameraSettings(), lambda line: None).open()
    assert "\n" not in str(raised.value)


def test_a_streams_password_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLSNF_CAMERA_PASSWORD", "a/b@c")
    assert with_password("rtsp://me@host:554/live") == "rtsp://me:a%2Fb%40c@host:554/live"
    assert with_password("rtsp://host/live") == "rtsp://host/live"
    with pytest.raises(SettingsError, match="_FILE names") as raised:
        with_password("rtsp://me:hush@host/live")
    assert "hush" not in str(raised.value)
    monkeypatch.setenv("CLSNF_CAMERA_PASSWORD", "hush")
    assert CameraSource("rtsp://me@host/live?x=1", CameraSettings(), print).name == (
        "rtsp://host/live"
    )

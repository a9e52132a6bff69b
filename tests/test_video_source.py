"""Files and streams, whole and broken ones; every stream is made here."""

import itertools
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from densepred.video.source import VideoSource, check_source, open_capture, without_password
from tests.streams import MJPEGServer, jpeg, rtsp_server

FAST = 0.8
"""Seconds of silence that end a stream here."""


def greys(source: VideoSource, count: int | None = None) -> list[int]:
    return [round(float(frame.mean())) for frame in itertools.islice(source, count)]


def near(found: list[int], expected: list[int], tolerance: int = 3) -> bool:
    return len(found) == len(expected) and all(abs(a - b) <= tolerance for a, b in zip(found, expected, strict=True))


def write_avi(path: Path, parts: list[np.ndarray]) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, parts[0].shape[1::-1])
    for part in parts:
        writer.write(part)
    writer.release()
    return path


@pytest.fixture(scope="module")
def avi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    noise = np.random.default_rng(0).integers(0, 40, (20, 48, 64, 3)).astype(np.uint8)
    frames = [part + np.uint8(10 * k) for k, part in enumerate(noise)]
    return write_avi(tmp_path_factory.mktemp("video") / "a.avi", frames)


def test_a_file_yields_every_frame_in_rgb(tmp_path):
    blue = np.zeros((48, 64, 3), np.uint8)
    blue[..., 0] = 200  # OpenCV's order
    source = VideoSource(write_avi(tmp_path / "blue.avi", [blue] * 5))
    frames = list(source)
    assert (len(frames), source.live, source.fps) == (5, False, 10.0)
    assert frames[0].shape == (48, 64, 3)
    assert frames[0][..., 2].mean() > 150 > 50 > frames[0][..., 0].mean()
    assert source.record() | {"source": ""} == dict(
        source="", frames=5, unreadable=0, reconnects=0, size_changes=0, announced=5, last_size=[48, 64]
    )


def test_a_file_with_damaged_frames_goes_on_behind_them(avi, tmp_path):
    data = bytearray(avi.read_bytes())
    starts = [k for k in range(len(data) - 1) if data[k : k + 2] == b"\xff\xd8"]
    for k in (starts[4], starts[9]):
        data[k : k + 400] = bytes(400)
    broken = tmp_path / "broken.avi"
    broken.write_bytes(data)
    source = VideoSource(broken)
    assert len(list(source)) == 18
    assert source.record()["announced"] == 20


def test_a_truncated_file_yields_what_is_there(avi, tmp_path):
    cut = tmp_path / "cut.avi"
    cut.write_bytes(avi.read_bytes()[: avi.stat().st_size // 2])
    assert 5 <= len(list(VideoSource(cut))) <= 12


def test_the_timeout_of_streams_is_none_of_files(avi, monkeypatch):
    limits = {}
    monkeypatch.setattr(cv2, "VideoCapture", lambda name, _, given: limits.update({name: given}))
    open_capture(str(avi), 0.5)
    open_capture("rtsp://nowhere/stream", 0.5)
    assert limits == {
        str(avi): [],
        "rtsp://nowhere/stream": [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 500, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 500],
    }


@pytest.mark.parametrize("name, message", [("nowhere.mp4", "no such video"), ("junk.mp4", "cannot be read as a video")])
def test_unreadable_files_are_refused(tmp_path, name, message, capfd):
    (tmp_path / "junk.mp4").write_bytes(b"junk" * 1000)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        VideoSource(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("name, message", [("97", "camera 97"), ("http://127.0.0.1:9/x", "no answer in time")])
def test_unreachable_sources_are_refused(name, message, capfd):
    with pytest.raises(ValueError, match=message):
        VideoSource(name, timeout=FAST)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("rtsp://eve:secret@camera.local:554/live", "rtsp://eve:***@camera.local:554/live"),
        ("http://:p@ss@host/a:b@c", "http://:***@host/a:b@c"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("a:b@c.webm", "a:b@c.webm"),
    ],
)
def test_a_password_is_not_shown(name, shown):
    assert without_password(name) == shown


def test_an_address_needs_no_file():
    check_source("rtsp://nowhere/stream")
    check_source("0")
    for name in ("stream", "²", "9" * 30):  # digits, but of no camera
        with pytest.raises(FileNotFoundError, match="no such video"):
            check_source(name)


@pytest.mark.parametrize("lengths", [True, False])
def test_a_stream_ends_after_its_silence(lengths):
    values = [0, 40, 80, 120]
    with MJPEGServer([[*map(jpeg, values), 0.05]], lengths) as server:
        source = VideoSource(server.url, timeout=FAST)
        start = time.monotonic()
        found = greys(source)
        assert source.live
        # Without lengths the last picture never ends: no boundary follows it.
        assert near(found, values if lengths else values[:-1])
        assert FAST * 0.5 < time.monotonic() - start < FAST + 2
        assert server.connections > 2  # it was asked again meanwhile


def test_a_stream_is_opened_anew_when_it_ends_or_stalls():
    ended, stalled, third = [jpeg(10), jpeg(20)], [jpeg(30), 10.0], [jpeg(40)] * 2
    with MJPEGServer([ended, stalled, third]) as server:
        source = VideoSource(server.url, timeout=2.0)
        assert near(greys(source, 5), [10, 20, 30, 40, 40])
        assert source.record()["reconnects"] == 2


def test_the_time_before_the_first_frame_is_asked_for_is_no_silence():
    with MJPEGServer([[], [jpeg(70)]]) as server:
        source = VideoSource(server.url, timeout=0.3)
        time.sleep(0.35)  # a model is loaded, and the camera has given up
        assert near(greys(source, 1), [70])


def test_damaged_pictures_of_a_stream_are_left_out_and_counted():
    whole = jpeg(90)
    script = [jpeg(30), b"junk" * 40, whole[: len(whole) // 2], b"", jpeg(60)]
    with MJPEGServer([[*script, 5.0]]) as server:
        source = VideoSource(server.url, timeout=FAST)
        assert near(greys(source, 2), [30, 60])
        record = source.record()
        assert (record["frames"], record["unreadable"], record["reconnects"]) == (2, 3, 0)


def test_a_stream_may_change_its_size():
    with MJPEGServer([[jpeg(30), jpeg(60, (96, 80)), jpeg(90), 5.0]]) as server:
        source = VideoSource(server.url, timeout=FAST)
        assert [frame.shape[:2] for frame in itertools.islice(source, 3)] == [(48, 64), (96, 80), (48, 64)]
        assert source.record()["size_changes"] == 2


def test_closing_ends_a_waiting_source():
    with MJPEGServer([[jpeg(1)]]) as server:
        source = VideoSource(server.url, timeout=30.0)
        found: list[int] = []
        reader = threading.Thread(target=lambda: found.extend(greys(source)))
        reader.start()
        time.sleep(0.3)
        source.close()
        reader.join(3.0)
        assert not reader.is_alive() and len(found) == 1


def test_an_rtsp_stream_is_live_and_ends():
    values = list(range(20, 220, 10))
    with rtsp_server(values) as url:
        source = VideoSource(url, timeout=2.0)
        found = greys(source, len(values))
        assert source.live
    assert near(found, values, tolerance=6)


def test_another_answer_than_motion_jpeg_is_left_to_opencv(avi, monkeypatch):
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    monkeypatch.chdir(avi.parent)
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.avi"
        assert isinstance(open_capture(url, 2.0), cv2.VideoCapture)
        source = VideoSource(url, timeout=2.0)
        assert not source.live and len(list(source)) == 20
        server.shutdown()

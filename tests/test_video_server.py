"""The video demo's web page: what it serves, what it refuses, and the page itself in a headless browser."""

import base64
import configparser
import errno
import hashlib
import http.client
import json
import re
import socket
import time
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import pytest

from densepred.video import server as server_module
from densepred.video.server import PAGE, VideoServer, explain, parse_address, security_policy
from densepred.video.stages import Meter, Packet
from densepred.video.state import FrameHub, OverlayState
from tests.browser import Browser, browser, missing

JSON = {"Content-Type": "application/json"}
RED, GREEN, BLUE = (230, 20, 20), (20, 200, 20), (20, 20, 230)


def picture(color: tuple[int, int, int], size: tuple[int, int] = (48, 64)) -> np.ndarray:
    return np.full((*size, 3), color, np.uint8)


def is_filled(image: np.ndarray, color: tuple[int, int, int]) -> bool:
    return np.abs(image.astype(int) - color).max() < 12  # JPEG loses a little


def record_of(frames: int, live: bool = True) -> dict:
    """Return what the stages tell after so many frames at 25 fps, 7 having been dropped."""
    meter = Meter(live)
    for number in range(1, frames + 1):
        ms = {"decode": 4.0 + number, "model": 31.5, "draw": 12.0}
        meter.add(Packet(number, arrived=number / 25, frame=None, ms=ms), end=number / 25 + 0.051)
    return meter.record(drops=7)


class Site:
    """A running server with its hub and state."""

    def __init__(self, address: str = "0") -> None:
        self.hub, self.state = FrameHub(), OverlayState()
        self.server = VideoServer(address, self.hub, self.state)
        self.server.start()
        self.port = int(re.search(r":(\d+)/", self.server.url)[1])

    def ask(self, path: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple:
        """Return (status, headers, body); a keyword names a header with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, answer.headers, data

    def viewers(self) -> int:
        return json.loads(self.ask("/record.json")[2])["viewers"]

    def stream(self, buffer: int | None = None) -> "Stream":
        return Stream(self.port, buffer)


class Stream:
    """A client of the MJPEG stream."""

    def __init__(self, port: int, buffer: int | None) -> None:
        self.socket = socket.socket()
        if buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        self.socket.settimeout(10)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(b"GET /stream.mjpg HTTP/1.1\r\nHost: localhost\r\n\r\n")
        self.file = self.socket.makefile("rb")
        self.head = self._until(b"\r\n\r\n").decode()
        self._until(server_module.NEXT_PART)

    def _until(self, mark: bytes) -> bytes | None:
        """Return what comes before ``mark``; None if the connection ends first."""
        data = bytearray()
        while not data.endswith(mark):
            line = self.file.readline()
            if not line:
                assert not data or data.endswith(b"--frame--\r\n")
                return None
            data += line
        return bytes(data[: -len(mark)])

    def frame(self) -> np.ndarray | None:
        """Return the next frame (H, W, 3) RGB, once the stream says that it is complete; None at the end."""
        data = self._until(server_module.NEXT_PART)
        return None if data is None else cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@pytest.fixture(scope="module", autouse=True)
def hurry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Let the page ask, and the server wait for it, in shorter intervals."""
    page = PAGE.read_text(encoding="utf-8")
    for usual, short in (("POLL = 500,", "POLL = 100,"), ("RESTART = 2000;", "RESTART = 500;")):
        assert usual in page
        page = page.replace(usual, short)
    path = tmp_path_factory.mktemp("page") / PAGE.name
    path.write_text(page, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_module, "PAGE", path)
        patch.setattr(server_module, "LINGER", 0.6)
        yield


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    yield site
    site.server.stop()


@pytest.fixture(scope="module")
def quiet_site() -> Iterator[Site]:
    """One for tests that change nothing."""
    site = Site()
    yield site
    site.server.stop()


def until(happens: Callable[[], object], seconds: float = 20.0) -> object:
    """Return what ``happens`` returns once that is true; fail after some seconds."""
    end = time.monotonic() + seconds
    while not (result := happens()):
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)
    return result


@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("my-host.lan:0", ("my-host.lan", 0)),
        ("[::1]:9000", ("::1", 9000)),
    ],
)
def test_address(address: str, meant: tuple[str, int]):
    assert parse_address(address) == meant


@pytest.mark.parametrize(
    "address",
    ["", "abc", "host:", ":8080", "::1:8080", "[::1]", "http://localhost:8080", "1 2:80", "-1", "8080\n", "٣"],
)
def test_malformed_address_is_named(address: str):
    with pytest.raises(ValueError, match=r"expected PORT, HOST:PORT or \[IPV6\]:PORT") as error:
        VideoServer(address, FrameHub(), OverlayState())
    assert str(error.value).startswith(f"--serve {address}: ")


def test_port_beyond_the_last_is_named():
    with pytest.raises(ValueError, match="--serve host:70000: ports end at 65535"):
        parse_address("host:70000")


def test_port_in_use_is_one_clear_line(site: Site):
    second = VideoServer(str(site.port), site.hub, site.state)
    with pytest.raises(OSError, match=f"^--serve 127.0.0.1:{site.port}: port {site.port} is in use; .*another port"):
        second.start()
    second.stop()  # never started


def test_foreign_address_and_name_are_clear_lines():
    with pytest.raises(OSError, match=r"^--serve 192.0.2.1:0: 192.0.2.1 is not an address of this machine; use"):
        VideoServer("192.0.2.1:0", FrameHub(), OverlayState()).start()
    with pytest.raises(OSError, match=r"^--serve a..b:0: no machine is named 'a..b'; "):
        VideoServer("a..b:0", FrameHub(), OverlayState()).start()
    assert "choose one from 1024 on" in explain(OSError(errno.EACCES, "denied"), "::1", 80)
    assert explain(OSError(errno.EMFILE, "too many files"), "::1", 80) == "--serve [::1]:80: too many files"


def test_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    site = Site("[::1]:0")
    connection = http.client.HTTPConnection("::1", site.port, timeout=10)
    connection.request("GET", "/overlay")
    assert connection.getresponse().status == 200
    assert site.server.url == f"http://[::1]:{site.port}/"
    site.server.stop()


def test_stop_frees_the_port_and_ends_streams():
    site = Site()
    site.hub.publish(picture(RED), {})
    stream = site.stream()
    assert stream.frame() is not None
    site.server.stop()
    site.server.stop()
    assert stream.frame() is None
    again = Site(str(site.port))
    assert again.ask("/")[0] == 200
    again.server.stop()


def test_page_loads_nothing_from_outside_and_its_policy_allows_just_its_own_blocks(site: Site):
    status, headers, data = site.ask("/")
    page = data.decode()
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert page == server_module.PAGE.read_text(encoding="utf-8")
    assert re.findall(r"https?://[^\"' ]+|(?:src|href)=\"[^\"]*\"|@import|url\(", page) == [
        'href="/stream.mjpg"',
        "http://www.w3.org/2000/svg",  # a name, not an address
    ]
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    script = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert (len(script), policy["default-src"], policy["script-src"]) == (1, "'none'", f"'sha256-{digest}'")
    assert "unsafe" not in headers["Content-Security-Policy"]
    assert policy["frame-ancestors"] == "'none'"
    assert " style=" not in page  # the policy would ignore it
    assert not re.search(r"<[^>]*\son\w+=", page)  # nor handlers in attributes


def test_page_is_part_of_the_package():
    setup = configparser.ConfigParser()
    setup.read(PAGE.parents[2] / "setup.cfg")
    assert setup["options.package_data"]["densepred.video"] == PAGE.name


def test_policy_follows_the_page():
    assert security_policy("<style>a</style><script>b</script>") != security_policy(
        "<style>a</style><script>c</script>"
    )


def test_record_tells_the_figures_and_the_end(site: Site):
    first = json.loads(site.ask("/record.json")[2])
    assert (first["viewers"], first["ended"], "frames" in first) == (0, False, False)
    site.hub.publish(picture(RED), record_of(3))
    site.hub.close()
    status, headers, data = site.ask("/record.json?viewer=x")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert json.loads(data) == record_of(3) | {"viewers": 0, "streaming": False, "run": first["run"], "ended": True}


def test_overlay_is_read_and_set(site: Site):
    before = site.state.snapshot()
    assert json.loads(site.ask("/overlay")[2]) == before
    status, _, data = site.ask("/overlay", "POST", b'{"masks": false, "opacity": 0.25, "paused": true}', **JSON)
    assert status == 200
    assert json.loads(data) == site.state.snapshot() == before | {"masks": False, "opacity": 0.25, "paused": True}


@pytest.mark.parametrize(
    ("body", "headers", "status", "says"),
    [
        (b'{"mask": true}', {}, 400, "unknown switch 'mask'"),
        (b'{"masks": false, "opacity": 1.5}', {}, 400, "opacity is a number in 0..1, not 1.5"),
        (b'{"opacity": NaN}', {}, 400, "not nan"),
        (b'{"paused": 1}', {}, 400, "paused is true or false"),
        (b'{"self": 1}', {}, 400, "self"),
        (b"[1]", {}, 400, "not list"),
        (b"{", {}, 400, "line 1"),
        (b"\xff\xfe{", {}, 400, "utf"),
        (b"[" * 4000, {}, 400, "recursion"),
        (b"", {}, 400, "line 1"),
        (b" " * 4097, {}, 413, "4097 bytes; at most 4096"),
        (b'{"masks": false}', {"Content-Type": "text/plain"}, 415, "not text/plain"),
        (b'{"masks": false}', {"Content-Length": "x"}, 411, "'x'"),
        (b'{"masks": false}', {"Content-Length": "-5"}, 411, "'-5'"),
        (b'{"masks": false}', {"Origin": "http://evil.example"}, 403, "http://evil.example"),
        (b'{"masks": false}', {"Origin": "null"}, 403, "null"),
        (b'{"masks": false}', {"Origin": "http://127.0.0.1:1"}, 403, "127.0.0.1:1"),
        (b'{"masks": false}', {"Sec-Fetch-Site": "cross-site"}, 403, "only this page"),
        (b'{"masks": false}', {"Host": "evil.example"}, 421, "not served as 'evil.example'"),
    ],
)
def test_bad_switches_change_nothing(quiet_site: Site, body: bytes, headers: dict, status: int, says: str):
    before = quiet_site.state.snapshot()
    got, _, data = quiet_site.ask("/overlay", "POST", body, **(JSON | headers))
    assert (got, says in json.loads(data)["error"]) == (status, True), data
    assert quiet_site.state.snapshot() == before


def test_own_origin_may_set_switches_through_a_tunnel_too(site: Site):
    headers = JSON | {"Host": "localhost:9999", "Origin": "http://localhost:9999", "Sec-Fetch-Site": "same-origin"}
    assert site.ask("/overlay", "POST", b'{"masks": false}', **headers)[0] == 200
    assert site.state.snapshot()["masks"] is False


@pytest.mark.parametrize("path", ["/../../etc/passwd", "/page.html", "/server.py", "/%2e%2e/", "/overlay/"])
def test_there_are_no_files(quiet_site: Site, path: str):
    status, _, data = quiet_site.ask(path)
    assert status == 404
    assert set(json.loads(data)) == {"error"}


def test_other_methods_and_hosts_are_refused(quiet_site: Site):
    site = quiet_site
    assert site.ask("/", "POST", b"{}", **JSON)[0] == 405
    assert site.ask("/overlay", "PUT", b"{}", **JSON)[0] == 501
    for path in ("/", "/stream.mjpg", "/record.json", "/overlay"):
        assert site.ask(path, Host="rebound.example")[0] == 421
        assert site.ask(path, Host="[bad")[0] == 421
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:80", "192.168.0.7:8080"):
        assert site.ask("/overlay", Host=host)[0] == 200


def test_new_viewer_gets_the_newest_frame_at_once_although_none_follows(site: Site):
    for color in (RED, GREEN):
        site.hub.publish(picture(color), {})
    stream = site.stream()
    assert stream.head.startswith("HTTP/1.0 200 OK\r\n")
    assert "Content-Type: multipart/x-mixed-replace; boundary=frame\r\n" in stream.head
    assert is_filled(stream.frame(), GREEN)
    site.hub.publish(picture(BLUE), {})
    assert is_filled(stream.frame(), BLUE)
    assert site.viewers() == 1
    stream.close()


def test_stream_waits_for_the_first_frame_and_ends_after_the_last(site: Site):
    stream = site.stream()
    until(site.viewers)
    site.hub.publish(picture(RED), {})
    assert is_filled(stream.frame(), RED)
    site.hub.publish(picture(GREEN), {})
    site.hub.close()
    assert is_filled(stream.frame(), GREEN)
    assert stream.frame() is None
    late = site.stream()
    assert is_filled(late.frame(), GREEN)
    assert late.frame() is None


def test_slow_viewer_skips_frames_and_holds_up_nobody(site: Site):
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)  # JPEGs of about 100 kB

    def numbered(n: int) -> np.ndarray:
        return np.vstack([picture((4 * n, 4 * n, 4 * n), (32, 320)), noise])

    site.hub.publish(numbered(0), {})
    slow, quick = site.stream(buffer=1 << 14), site.stream()
    slow.frame(), quick.frame()
    slowest = 0.0
    for n in range(1, 61):
        start = time.perf_counter()
        site.hub.publish(numbered(n), {})
        slowest = max(slowest, time.perf_counter() - start)
        assert is_filled(quick.frame()[:16], (4 * n, 4 * n, 4 * n))
    assert slowest < 1  # the slow one would hold it up for its whole timeout
    taken = 1
    while not is_filled(slow.frame()[:16], (240, 240, 240)):
        taken += 1
    assert taken < 15  # of 60: what the line's buffers held, then the newest


@pytest.mark.parametrize("frames", [0, 1])
def test_vanished_viewer_is_noticed_without_a_frame(site: Site, frames: int):
    for _ in range(frames):
        site.hub.publish(picture(RED), {})
    stream = site.stream()
    until(lambda: site.viewers() == 1)
    stream.close()
    until(lambda: site.viewers() == 0)


def test_client_that_takes_nothing_is_dropped(site: Site, monkeypatch: pytest.MonkeyPatch):
    assert server_module._Handler.timeout == server_module.CLIENT_TIMEOUT
    monkeypatch.setattr(server_module._Handler, "timeout", 0.3)
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    stream = site.stream(buffer=1 << 14)
    until(site.viewers)

    def gone() -> bool:
        site.hub.publish(noise, {})
        return site.viewers() == 0

    until(gone)
    stream.close()


def test_too_many_viewers_are_refused(site: Site, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_module, "MAX_STREAMS", 2)
    site.hub.publish(picture(RED), {})
    streams = [site.stream() for _ in range(2)]
    until(lambda: site.viewers() == 2)
    status, _, data = site.ask("/stream.mjpg")
    assert (status, json.loads(data)["error"]) == (503, "2 viewers already; close one")
    streams[0].close()
    until(lambda: site.viewers() == 1)
    third = site.stream()
    assert third.frame() is not None


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if reason := missing():
        pytest.skip(reason)
    with browser(tmp_path_factory.mktemp("profile")) as window:
        yield window


@pytest.fixture
def window(site: Site, started: Browser) -> Iterator[Browser]:
    """The browser, which leaves the page before the site ends: it would complain in the next test."""
    yield started
    started.open("about:blank")
    started.complaints()


PIXEL = """
const view = document.getElementById("view"), canvas = document.createElement("canvas");
canvas.width = canvas.height = 1;
const brush = canvas.getContext("2d");
if (view.naturalWidth) brush.drawImage(view, 0, 0, 1, 1);
return [...brush.getImageData(0, 0, 1, 1).data].slice(0, 3);
"""


def shows(window: Browser, color: tuple[int, int, int]) -> bool:
    return is_filled(np.array(window.run(PIXEL)), color)


def test_page_shows_the_frames_the_figures_and_the_chart(site: Site, window: Browser):
    window.open(site.server.url)
    until(lambda: window.text("#status") == "Waiting for the first frame…")
    site.hub.publish(picture(BLUE), record_of(0))  # nothing was measured before the first frame
    until(lambda: window.text("#status") == "Live" and shows(window, BLUE))
    assert "Frames per second\n0.0\nLatency p50\n– ms" in window.text("#figures")
    for number, color in enumerate((RED, GREEN, BLUE), 1):
        site.hub.publish(picture(color, (270, 480)), record_of(number))
        until(lambda color=color: shows(window, color))  # also while no frame follows
        until(lambda number=number: f"Frames\n{number}\n" in window.text("#figures"))
    assert window.text("#status") == "Live"
    assert window.text("#figures").split("\n") == [
        *("Frames per second", "25.0", "Latency p50", "51 ms", "Latency p95", "51 ms"),
        *("Frames", "3", "Dropped", "7", "Viewers", "1"),
    ]
    assert window.text("#stages").split("\n") == ["decode 7.0 6.0 7.0", "model 31.5 31.5 31.5", "draw 12.0 12.0 12.0"]
    lines = window.run("return [...document.querySelectorAll('#chart path')].map(path => path.getAttribute('d'))")
    assert [line.count("M") + line.count("L") for line in lines] == [3, 3, 3]
    axis = window.run("return [...document.querySelectorAll('#chart text')].map(text => text.textContent)")
    assert axis == ["0", "10", "20", "30", "40", "60 s ago", "now"]
    outside = "return [...document.querySelectorAll('#chart text')].filter(text => text.getBBox().x < 0).length"
    slow = Meter(live=True)
    slow.add(Packet(1, arrived=0.0, frame=None, ms={"decode": 4.0, "model": 9123.4, "draw": 99.94}), end=9.3)
    site.hub.publish(picture(RED), slow.record(drops=0) | {"frames": 4})
    until(lambda: window.text("#stages").split("\n")[1] == "model 9123 9123 9123")
    assert window.run(outside) == 0
    assert window.complaints() == []


def test_switches_work_by_mouse_and_keys_and_all_viewers_share_them(site: Site, window: Browser):
    site.hub.publish(picture(RED), record_of(1))
    window.open(site.server.url)
    until(lambda: window.run("return document.querySelector('[name=masks]').checked"))
    window.click("[name=masks]")
    until(lambda: site.state.snapshot()["masks"] is False)
    window.keys("[name=scores]", " ")
    until(lambda: site.state.snapshot()["scores"] is True)
    window.keys("[name=opacity]", "\ue014\ue014")  # the right arrow
    until(lambda: site.state.snapshot()["opacity"] == 0.6)
    assert window.text("#percent") == "60 %"
    window.keys("#pause", " ")
    until(lambda: site.state.snapshot()["paused"] is True)
    until(lambda: (window.text("#pause"), window.text("#status")) == ("Resume", "Paused"))
    site.ask("/overlay", "POST", b'{"paused": false, "masks": true, "opacity": 1}', **JSON)  # another viewer
    until(lambda: (window.text("#pause"), window.text("#percent")) == ("Pause", "100 %"))
    assert window.run("return document.querySelector('[name=masks]').checked") is True
    assert window.complaints() == []


def test_every_control_has_a_name_and_is_reached_by_keys(site: Site, window: Browser):
    window.open(site.server.url)
    reached = []
    for _ in range(7):
        window.press("\ue004")  # tab
        reached.append(window.run("const a = document.activeElement; return [a.name, a.labels?.[0]?.innerText.trim()]"))
    assert [name for name, _ in reached] == ["masks", "polygons", "classes", "scores", "timings", "opacity", ""]
    assert all(label for _, label in reached[:6])


def test_page_fits_a_telephone(site: Site, window: Browser):
    site.hub.publish(picture(RED, (270, 480)), record_of(1))
    window.open(site.server.url)
    window.call("window/rect", {"width": 500, "height": 800})  # the narrowest window Chromium makes
    until(lambda: window.run("return document.querySelectorAll('#stages tr').length"))
    wide, high, top = window.run(
        "const box = document.getElementById('view').getBoundingClientRect(), root = document.documentElement;"
        "return [root.scrollWidth - root.clientWidth, box.height, document.querySelector('aside').offsetTop]"
    )
    window.call("window/rect", {"width": 1280, "height": 800})
    assert wide <= 0
    assert top > high  # the controls stand below the picture


def test_page_tells_of_a_stalled_source_the_end_and_a_lost_connection_and_comes_back(site: Site, window: Browser):
    site.hub.publish(picture(RED), record_of(1))
    window.open(site.server.url)
    until(lambda: window.text("#status") == "Live")
    until(lambda: window.text("#status") == "No new frame: the source or the model keeps it waiting…")
    site.server.stop()  # without an end: as if the program had died
    until(lambda: window.text("#status") == "Connection lost; trying again…")
    again = Site(str(site.port))
    again.hub.publish(picture(BLUE), record_of(1, live=False))
    until(lambda: window.text("#status") == "Playing" and shows(window, BLUE))
    again.hub.publish(picture(GREEN), record_of(2))
    again.hub.close()
    until(lambda: window.text("#status") == "The video has ended.")
    assert shows(window, GREEN)  # the last picture stays
    again.server.stop()
    until(lambda: window.text("#status").startswith("The video has ended and the demo has closed"))
    window.complaints()  # of the lost connection


def test_stop_waits_until_an_open_page_has_learned_of_the_end(window: Browser):
    site = Site()
    site.hub.publish(picture(RED), record_of(1))
    window.open(site.server.url)
    until(lambda: window.text("#status") == "Live")
    site.hub.close()
    site.server.stop()
    until(lambda: window.text("#status").startswith("The video has ended and the demo has closed"))
    window.complaints()


def test_hidden_page_leaves_the_line_and_a_dropped_stream_is_taken_up_again(site: Site, window: Browser):
    site.hub.publish(picture(RED), record_of(1))
    window.open(site.server.url)
    until(lambda: shows(window, RED))
    hide = "Object.defineProperty(document, 'hidden', {value: %s, configurable: true});"
    tell = "document.dispatchEvent(new Event('visibilitychange'))"
    window.run(hide % "true" + tell)
    until(lambda: site.viewers() == 0)
    window.run(hide % "false" + tell)
    until(lambda: site.viewers() == 1)
    window.run("document.getElementById('view').src = '/favicon.ico'")  # as if the stream had broken off
    until(lambda: site.viewers() == 0)
    until(lambda: site.viewers() == 1 and shows(window, RED))

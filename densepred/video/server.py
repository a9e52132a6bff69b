"""The web page of a running video: live view, switches and figures, by the standard library alone.

Four addresses: ``/`` the page (``page.html``), ``/stream.mjpg`` the pictures as MJPEG (``multipart/x-mixed-replace``),
``/record.json`` the stages' figures, ``/overlay`` the switches (GET them, or POST some as JSON). No file is served.

The page has no password, so it defends itself against other sites open in the same browser: requests must name this
machine (no DNS rebinding), switches are set from the page's own origin only, and the page loads nothing from outside.
"""

import base64
import contextlib
import errno
import hashlib
import ipaddress
import json
import re
import select
import socket
import socketserver
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from densepred.video.state import FrameHub, OverlayState

PAGE = Path(__file__).with_name("page.html")
ADDRESS = re.compile(r"(?:(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):)?(?P<port>[0-9]{1,5})")
MAX_BODY = 4096
"""Bytes of a POST."""
MAX_STREAMS = 16
"""Viewers at once; each is a thread and a share of the line."""
CLIENT_TIMEOUT = 10.0
"""Seconds a client may take to send its request or to take one frame."""
HEARTBEAT = 0.5
"""Seconds without a frame after which a stream looks whether its client is still there."""
STREAM_BUFFER = 1 << 17
"""Bytes the kernel may hold for one viewer: a few frames, so that a slow line shows the present and not the past."""
NEXT_PART, LAST_PART = b"\r\n--frame\r\nContent-Type: image/jpeg\r\n\r\n", b"\r\n--frame--\r\n"
"""The head of a frame follows the frame before it at once: Chromium shows a frame when the next one's head is there, and
would always be one frame late. Hence no Content-Length, and the last frame is sent twice."""
LINGER = 1.2
"""Seconds `VideoServer.stop` waits after the end of the video, so that open pages can still learn of it."""


class VideoServer:
    """Shows what a `FrameHub` holds to any number of browsers, which share one `OverlayState`.

    Args:
        address: ``PORT``, ``HOST:PORT`` or ``[IPV6]:PORT``; without a host 127.0.0.1, which only this machine reaches.
            Port 0 takes a free one.
        hub: the frames and the record.
        state: the switches.

    Raises:
        ValueError: a malformed address.
    """

    def __init__(self, address: str, hub: FrameHub, state: OverlayState) -> None:
        self._address = parse_address(address)
        self._hub, self._state = hub, state
        self._listener: _Listener | None = None

    @property
    def url(self) -> str:
        """The page's address for a browser on this machine; only after `start`."""
        host, port = self._listener.server_address[:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def start(self) -> None:
        """Listen, in daemon threads.

        Raises:
            OSError: the port is in use or not permitted, or the host is not this machine's.
        """
        try:
            self._listener = _Listener(*self._address, self._hub, self._state)
        except (OSError, UnicodeError) as error:
            raise OSError(explain(error, *self._address)) from None
        threading.Thread(target=self._listener.serve_forever, args=(0.1,), name="video-server", daemon=True).start()

    def stop(self) -> None:
        """Close the port and all streams; open pages say so and wait for the next start."""
        if self._listener is None:
            return
        if self._hub.closed and time.monotonic() - self._listener.last_poll < 2 * LINGER:
            time.sleep(LINGER)
        self._listener.stopping.set()
        self._listener.shutdown()
        self._listener.server_close()
        self._listener = None


def parse_address(address: str) -> tuple[str, int]:
    """Return (host, port) of ``PORT``, ``HOST:PORT`` or ``[IPV6]:PORT``; the host is 127.0.0.1 if none is named.

    Raises:
        ValueError: anything else, or a port above 65535.
    """
    match = ADDRESS.fullmatch(address)
    if match is None:
        raise ValueError(
            f"--serve {address}: expected PORT, HOST:PORT or [IPV6]:PORT, such as 8080, 0.0.0.0:8080 or [::1]:8080"
        )
    if int(match["port"]) > 65535:
        raise ValueError(f"--serve {address}: ports end at 65535; choose one from 1024 on, or 0 for any free one")
    return (match["host"] or "127.0.0.1").strip("[]"), int(match["port"])


def explain(error: OSError | UnicodeError, host: str, port: int) -> str:
    """Return one line on why the server cannot listen at (host, port), and the remedy."""
    where = f"--serve {f'[{host}]' if ':' in host else host}:{port}"
    if isinstance(error, socket.gaierror | UnicodeError):  # the latter: a label of a name is empty or too long
        return f"{where}: no machine is named {host!r}; 127.0.0.1 is this machine, 0.0.0.0 all its networks"
    reasons = {
        errno.EADDRINUSE: f"port {port} is in use; stop the program there, or choose another port (0: any free one)",
        errno.EACCES: f"no permission to listen on port {port}; choose one from 1024 on",
        errno.EADDRNOTAVAIL: f"{host} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 for all its networks",
    }
    return f"{where}: {reasons.get(error.errno, error.strerror)}"


def security_policy(page: str) -> str:
    """Return a Content-Security-Policy under which ``page`` can do nothing but be itself.

    Its inline scripts and styles are allowed by their hashes, so that text that slipped into it would not run.
    """

    def hashes(tag: str) -> str:
        blocks = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(b.encode()).digest()).decode()}'" for b in blocks)

    return (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def host_of(netloc: str) -> str:
    """Return the host of ``host``, ``host:port`` or ``[ipv6]:port`` in lower case, without brackets; "" if malformed."""
    try:
        return urlsplit(f"//{netloc}").hostname or ""
    except ValueError:
        return ""


def is_ip(host: str) -> bool:
    """Say whether a host is a number and not a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


class _Listener(ThreadingHTTPServer):
    """The socket, and what its requests share."""

    def __init__(self, host: str, port: int, hub: FrameHub, state: OverlayState) -> None:
        self.hub, self.state = hub, state
        self.page = PAGE.read_text(encoding="utf-8")
        self.policy = security_policy(self.page)
        self.run = hex(time.time_ns())  # tells a page that the demo was started anew
        self.names = {host.lower(), "localhost", socket.gethostname().lower()}
        self.stopping = threading.Event()
        self.last_poll = -float("inf")
        self._streams: Counter[str] = Counter()
        self._lock = threading.Lock()
        choices = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, *_, address = min(choices, key=lambda choice: choice[0] != socket.AF_INET)
        self.address_family = family
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind, without asking DNS for the machine's full name, as `HTTPServer` would."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        """Stay silent about clients that vanish: browsers do so all the time."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)

    @contextlib.contextmanager
    def watching(self, viewer: str) -> Iterator[bool]:
        """Count a stream while it runs; yields False if there are too many."""
        with self._lock:
            free = self._streams.total() < MAX_STREAMS
            self._streams[viewer] += free
        try:
            yield free
        finally:
            with self._lock:
                self._streams[viewer] -= free
                self._streams += Counter()  # drops the zeros

    def status(self, viewer: str) -> dict:
        """Return the record with what only the server knows: the run, the viewers, whether this one's stream is on."""
        self.last_poll = time.monotonic()
        with self._lock:
            own = {"viewers": self._streams.total(), "streaming": viewer in self._streams}
        return {**self.hub.record(), **own, "run": self.run, "ended": self.hub.closed}


class _Handler(BaseHTTPRequestHandler):
    """One request. HTTP/1.0: every answer closes its connection, so none outlives the server."""

    server: _Listener
    server_version, sys_version = "densepred", ""
    timeout = CLIENT_TIMEOUT

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        viewer = parse_qs(query).get("viewer", ["-"])[0][:40]
        if not self._named():
            return
        if path == "/":
            self._answer(self.server.page.encode(), "text/html; charset=utf-8")
        elif path == "/stream.mjpg":
            self._stream(viewer)
        elif path == "/record.json":
            self._answer_json(self.server.status(viewer))
        elif path == "/overlay":
            self._answer_json(self.server.state.snapshot())
        elif path == "/favicon.ico":  # browsers ask for it unasked
            self._answer(b"", "image/x-icon", HTTPStatus.NO_CONTENT)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there are /, /stream.mjpg, /record.json and /overlay")

    def do_POST(self) -> None:
        if not self._named():
            return
        body = self._body()
        if body is None:
            return
        try:
            switches = json.loads(body)
            if not isinstance(switches, dict):
                raise ValueError(f'expected an object such as {{"masks": true}}, not {type(switches).__name__}')
            self.server.state.update(**switches)
        except (ValueError, TypeError, RecursionError) as error:  # TypeError: a switch called "self"
            self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        else:
            self._answer_json(self.server.state.snapshot())

    def _named(self) -> bool:
        """Refuse a request for another name than this machine's: a foreign site whose name leads here (rebinding)."""
        host = host_of(self.headers.get("Host", ""))
        if is_ip(host) or host in self.server.names:
            return True
        remedy = "use the machine's IP address, or name the host in --serve HOST:PORT"
        self._refuse(HTTPStatus.MISDIRECTED_REQUEST, f"this page is not served as {host!r}; {remedy}")
        return False

    def _body(self) -> bytes | None:
        """Return the body of a POST of switches; refuse what is not one and return None."""
        length = self.headers.get("Content-Length", "")
        size = int(length) if length.isascii() and length.isdigit() and len(length) < 10 else -1
        body = self.rfile.read(min(size, 16 * MAX_BODY)) if size > 0 else b""  # a client still sending hears no refusal
        kind = self.headers.get_content_type()
        if self.path.partition("?")[0] != "/overlay":
            self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, "only /overlay takes a POST")
        elif self._foreign():
            self._refuse(HTTPStatus.FORBIDDEN, f"only this page sets switches, not {self.headers.get('Origin')}")
        elif size < 0:
            self._refuse(HTTPStatus.LENGTH_REQUIRED, f"Content-Length must be a number, not {length!r}")
        elif size > MAX_BODY:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{size} bytes; at most {MAX_BODY}")
        elif kind != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, f"Content-Type must be application/json, not {kind}")
        else:
            return body
        return None

    def _foreign(self) -> bool:
        """Say whether a page of another origin sent this; programs that are no browsers send neither header."""
        origin = self.headers.get("Origin")
        own = origin is None or origin.lower().partition("://")[2] == self.headers["Host"].lower()
        return not own or self.headers.get("Sec-Fetch-Site", "none") not in ("same-origin", "none")

    def _stream(self, viewer: str) -> None:
        """Send every newest frame until the client, the video or the server ends."""
        with self.server.watching(viewer) as allowed:
            if not allowed:
                self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{MAX_STREAMS} viewers already; close one")
                return
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, STREAM_BUFFER)
            self._head("multipart/x-mixed-replace; boundary=frame")
            self.wfile.write(NEXT_PART)
            jpeg = b""
            for jpeg in self._frames():
                self.wfile.write(jpeg + NEXT_PART)
            self.wfile.write(jpeg + LAST_PART)

    def _frames(self) -> Iterator[bytes]:
        """Yield the newest frame, then each newer one at the pace its taker has; those in between are skipped."""
        number = 0
        while not self.server.stopping.is_set():
            closed = self.server.hub.closed  # asked first: what was published before the end is still sent
            frame = self.server.hub.wait(number, HEARTBEAT)
            if frame is not None:
                number, jpeg = frame
                yield jpeg
            elif closed or self._hung_up():
                return

    def _hung_up(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and self.connection.recv(1, socket.MSG_PEEK) == b""

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._answer_json({"error": message}, status)

    def _answer_json(self, content: dict, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._answer(json.dumps(content).encode(), "application/json", status)

    def _answer(self, body: bytes, content_type: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._head(content_type, status, len(body))
        self.wfile.write(body)

    def _head(self, content_type: str, status: HTTPStatus = HTTPStatus.OK, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Stay silent: the terminal belongs to the demo."""

"""Network streams that a test makes itself: Motion JPEG over HTTP, and over RTSP."""

import contextlib
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import cv2
import numpy as np

Script = Sequence[bytes | float]
"""What one connection brings: pictures, and seconds of silence."""


def jpeg(value: int, size: tuple[int, int] = (48, 64)) -> bytes:
    """Return a grey picture of a size (H, W)."""
    return cv2.imencode(".jpg", np.full((*size, 3), value, np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 80])[1].tobytes()


class MJPEGServer:
    """Serves one script to each connection in turn, then refuses with 503.

    Args:
        scripts: of the connections.
        lengths: announce the length of each picture.
        endless: repeat the last script's pictures until the client goes, and serve it to all further connections.
    """

    def __init__(self, scripts: Sequence[Script], lengths: bool = True, endless: bool = False) -> None:
        self.connections = 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.connections += 1
                if outer.connections > len(scripts) and not endless:
                    self.send_error(503)
                    return
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                script = scripts[min(outer.connections, len(scripts)) - 1]
                with contextlib.suppress(OSError):
                    self._play(script)
                    while endless:
                        self._play(script)

            def _play(self, script: Script) -> None:
                for step in script:
                    if isinstance(step, float):
                        time.sleep(step)
                        continue
                    length = b"Content-Length: %d\r\n" % len(step) if lengths else b""
                    self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\n" + length + b"\r\n" + step + b"\r\n")
                    self.wfile.flush()

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/stream"

    def __enter__(self) -> "MJPEGServer":
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def rtsp_server(values: Sequence[int], size: tuple[int, int] = (48, 64), pause: float = 0.04) -> Iterator[str]:
    """Serve grey pictures as RTP/JPEG (RFC 2435) over RTSP's own connection; yields the address."""

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with contextlib.suppress(OSError):
                while (method := self._request()) is not None and method != "TEARDOWN":
                    if method == "PLAY":
                        for number, value in enumerate(values):
                            packet = rtp_jpeg(jpeg(value, size), number, size)
                            self.wfile.write(b"$\0" + struct.pack(">H", len(packet)) + packet)
                            time.sleep(pause)
                        return

        def _request(self) -> str | None:
            lines = []
            while (line := self.rfile.readline().decode().strip()) or not lines:
                if not line:
                    return None
                lines.append(line)
            fields = dict(line.split(": ", 1) for line in lines[1:])
            method, body = lines[0].split()[0], ""
            extra = {
                "OPTIONS": "Public: DESCRIBE, SETUP, PLAY, TEARDOWN\r\n",
                "SETUP": "Transport: RTP/AVP/TCP;unicast;interleaved=0-1\r\n",
            }.get(method, "")
            if method == "DESCRIBE":
                body = "v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=test\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:0\r\n"
                extra = f"Content-Type: application/sdp\r\nContent-Length: {len(body)}\r\n"
            answer = f"RTSP/1.0 200 OK\r\nCSeq: {fields['CSeq']}\r\nSession: 1\r\n{extra}\r\n{body}"
            self.wfile.write(answer.encode())
            return method

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"rtsp://127.0.0.1:{server.server_address[1]}/stream"
        server.shutdown()


def rtp_jpeg(data: bytes, number: int, size: tuple[int, int]) -> bytes:
    """Wrap a small JPEG of quality 80, 4:2:0, whose sides divide by 8, in one RTP packet."""
    start = data.index(b"\xff\xda")  # the scan: behind its header, before the end marker
    scan = data[start + 2 + struct.unpack(">H", data[start + 2 : start + 4])[0] : -2]
    rtp = struct.pack(">BBHII", 0x80, 0x80 | 26, number, number * 3600, 1)
    return rtp + struct.pack(">IBBBB", 0, 1, 80, size[1] // 8, size[0] // 8) + scan


def wait_until(condition, seconds: float = 20.0) -> None:
    """Wait until a condition holds; fail after some seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]

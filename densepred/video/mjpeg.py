"""Motion JPEG over HTTP, read picture by picture.

OpenCV reads such streams too, but squeezes every picture into the size of the first one and hides which could not be
decoded; here a new size arrives as it is.
"""

import http.client
import re
import urllib.request

import cv2
import numpy as np

MAX_PICTURE = 64 * 2**20
"""Bytes; a part that announces more is damaged."""


class MJPEGCapture:
    """A ``multipart/x-mixed-replace`` answer, with the methods of ``cv2.VideoCapture`` that `VideoSource` calls.

    Args:
        response: the answer, its headers read.
        boundary: what stands between two pictures, without the leading dashes.
    """

    def __init__(self, response: http.client.HTTPResponse, boundary: str) -> None:
        self._response = response
        self._boundary = b"--" + boundary.encode()
        self._open = True
        self._at_boundary = False

    def isOpened(self) -> bool:
        """Whether further pictures may come."""
        return self._open

    def get(self, prop: int) -> float:
        """Return 0: the stream announces neither its rate nor its length."""
        return 0.0

    def read(self) -> tuple[bool, np.ndarray | None]:
        """Return the next picture (H, W, 3) uint8 BGR; false if it cannot be decoded or the connection broke."""
        try:
            data = self._part()
        except (OSError, http.client.HTTPException, ValueError):
            self._open = False
            return False, None
        picture = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if is_whole(data) else None
        return picture is not None, picture

    def release(self) -> None:
        """Close the connection."""
        self._open = False
        self._response.close()

    def _part(self) -> bytes:
        """Return the bytes of the next part."""
        while not self._at_boundary:
            self._at_boundary = self._line().startswith(self._boundary)
        self._at_boundary = False
        length = http.client.parse_headers(self._response).get("Content-Length", "")
        if length.isdigit() and int(length) <= MAX_PICTURE:
            data = self._response.read(int(length))
            if len(data) < int(length):
                raise ConnectionError("the stream ended within a picture")
            return data
        return self._until_boundary()

    def _until_boundary(self) -> bytes:
        lines, size = [], 0
        while not (line := self._line()).startswith(self._boundary) and size <= MAX_PICTURE:
            lines.append(line)
            size += len(line)
        self._at_boundary = line.startswith(self._boundary)
        return b"".join(lines)

    def _line(self) -> bytes:
        line = self._response.readline(MAX_PICTURE)
        if not line:
            raise ConnectionError("the stream ended")
        return line


def is_whole(data: bytes) -> bool:
    """Whether bytes begin and end as a JPEG does: OpenCV decodes half a picture too, the rest grey."""
    return data.startswith(b"\xff\xd8") and b"\xff\xd9" in data[-64:]


def open_mjpeg(url: str, timeout: float) -> MJPEGCapture | None:
    """Open a Motion JPEG stream; ``None`` if the address answers with something else or not at all.

    Args:
        url: ``http://`` or ``https://``.
        timeout: seconds to wait for an answer, and for each piece of it.
    """
    try:
        response = urllib.request.urlopen(url, timeout=timeout)
    except (OSError, http.client.HTTPException, ValueError):
        return None
    kind = response.headers.get("Content-Type", "")
    boundary = re.search(r'boundary="?([^";]+)', kind)
    if not kind.startswith("multipart/x-mixed-replace") or boundary is None:
        response.close()
        return None
    return MJPEGCapture(response, boundary.group(1).strip().removeprefix("--"))

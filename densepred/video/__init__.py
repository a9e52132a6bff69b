"""A model on a video in real time: source, three stages in threads, tracker, overlay, sink and web page."""

import os

# OpenCV reads this once, at its first video: FFmpeg would complain of every damaged frame.
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

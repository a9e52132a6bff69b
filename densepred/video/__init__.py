"""A model on a video in real time: source, three stages in threads, tracker, overlay, sink and web page."""

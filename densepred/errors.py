"""Helpers for messages that name the remedy."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config that cannot be what its author meant."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``name``; when none is near, a short list of all."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(known)}" if 0 < len(known) <= 15 else ""

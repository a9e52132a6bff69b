"""The choice of an op's implementation, one rule for all ops."""

import os
from collections.abc import Iterable

import torch


def backend_name(backends: Iterable[str], device: torch.device) -> str:
    """Return the backend of a device: what the environment says, else the best there is (eager everywhere so far).

    Args:
        backends: the names that an op implements.
        device: where the op's inputs lie.

    Raises:
        ValueError: ``DENSEPRED_OPS_BACKEND`` names a backend that the op does not have.
    """
    name = os.environ.get("DENSEPRED_OPS_BACKEND") or "eager"
    if name not in backends:
        raise ValueError(
            f"DENSEPRED_OPS_BACKEND={name!r}: on {device.type} choose one of {sorted(backends)} or unset it"
        )
    return name


__all__ = ["backend_name"]

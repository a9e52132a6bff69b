"""The choice of an op's implementation, one rule for all ops.

On an NVIDIA GPU an op runs as a Triton kernel, elsewhere in its eager form, in float64 always in its eager form. The
environment variable ``DENSEPRED_OPS`` overrules this: ``eager``, or ``triton``, which fails rather than fall back and
runs on a CPU too under ``TRITON_INTERPRET=1``.
"""

import importlib.util
import logging
import os
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

OLDEST_CAPABILITY = (8, 0)
"""Compute capability from which on bfloat16 and the kernels' tile sizes are there (Ampere)."""


def uses_triton(op: str, tensors: Sequence[Tensor], unfit: str | None = None) -> bool:
    """Return whether an op runs as a Triton kernel on some tensors.

    Args:
        op: its name, for messages.
        tensors: its tensors; the first one's device decides.
        unfit: why this op's kernel does not take these tensors, if it does not.

    Raises:
        ValueError: ``DENSEPRED_OPS`` is neither ``eager`` nor ``triton``, or it is ``triton`` and the kernel cannot run.
    """
    wanted, device = os.environ.get("DENSEPRED_OPS", ""), tensors[0].device
    if wanted not in ("", "eager", "triton"):
        raise ValueError(f"DENSEPRED_OPS={wanted!r}: choose eager or triton, or unset it to let the device decide")
    if wanted == "eager" or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    if not wanted and device.type == "cpu":
        return False
    reason = obstacle(device) or unfit
    if reason is None:
        return True
    if wanted:
        raise ValueError(
            f"DENSEPRED_OPS=triton, but {op} cannot run as a Triton kernel: {reason}; or unset DENSEPRED_OPS"
        )
    _log_once(op, reason)
    return False


@lru_cache
def obstacle(device: torch.device) -> str | None:
    """Return why no Triton kernel runs on a device, with the remedy, or None where it does."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton)"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda" or torch.version.hip:
        return f"the tensors are on {device.type}{' (ROCm)' if torch.version.hip else ''}, kernels run on NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return "the GPU has compute capability {}.{}, kernels need {}.{}".format(*capability, *OLDEST_CAPABILITY)
    return None


@lru_cache
def _log_once(op: str, reason: str) -> None:
    logging.getLogger("densepred").warning("%s runs in its eager form: %s", op, reason)


def check_tensors(op: str, **tensors: Tensor | None) -> None:
    """Check that tensors are floats of one device.

    Raises:
        ValueError: one is not, named with what it is and what the first one is.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, device = next((name, tensor.device) for name, tensor in given.items())
    for name, tensor in given.items():
        if tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, {first} on {device}: move them to one device")
        if not tensor.is_floating_point():
            raise ValueError(f"{op}: {name} is {tensor.dtype}, it must be a float tensor")


__all__ = ["OLDEST_CAPABILITY", "check_tensors", "obstacle", "uses_triton"]

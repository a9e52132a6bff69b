"""Bilinear resizes as weighted sums of rows, then of columns: several in one, and a band of the result at a time."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.ops.precision import upcast

BAND_BYTES = 64 << 20
"""What all temporary tensors of a band may take together on an accelerator (at least one row is done at a time)."""
CPU_BAND_BYTES = 24 << 20
"""The same on the CPU, where a band that stays in the cache is up to twice as fast."""


@dataclass(frozen=True)
class Taps:
    """A resize along one axis: output i is the sum of ``weights[i, t] * input[indices[i, t]]`` over t.

    Attributes:
        indices: (n_out, T) int64.
        weights: (n_out, T), each row sums to 1.
    """

    indices: Tensor
    weights: Tensor

    def __getitem__(self, outputs: slice) -> "Taps":
        return Taps(self.indices[outputs], self.weights[outputs])

    def then(self, second: "Taps") -> "Taps":
        """Return both resizes as one; the second may read the first's beginning only (a crop)."""
        weights = second.weights[:, :, None] * self.weights[second.indices]  # (n_out, T2, T1)
        return Taps(self.indices[second.indices].flatten(1), weights.flatten(1))

    def narrowed(self) -> tuple[slice, "Taps"]:
        """Return the inputs that are needed, and the resize that reads from those alone."""
        first, last = int(self.indices.min()), int(self.indices.max())
        return slice(first, last + 1), Taps(self.indices - first, self.weights)

    def on(self, tensor: Tensor) -> "Taps":
        """Return the resize on a tensor's device and in its type."""
        device = tensor.device
        return Taps(
            self.indices.to(device, non_blocking=True), self.weights.to(device, tensor.dtype, non_blocking=True)
        )

    def apply(self, x: Tensor) -> Tensor:
        """Resize the first axis of (n_in, A, B), contiguous, to (n_out, A, B)."""
        # An embedding bag is a weighted sum of rows in one pass over memory, 4 times faster than gathering and adding.
        flat = F.embedding_bag(self.indices, x.flatten(1), per_sample_weights=self.weights, mode="sum")
        return flat.view(-1, *x.shape[1:])


def linear_taps(n_in: int, n_out: int, align_corners: bool = False) -> Taps:
    """Return the linear resize of one axis, in float64 on the CPU."""
    if n_in == n_out:
        return Taps(torch.arange(n_in)[:, None], torch.ones(n_in, 1, dtype=torch.float64))
    outputs = torch.arange(n_out, dtype=torch.float64)
    if align_corners:
        places = outputs * ((n_in - 1) / max(n_out - 1, 1))
    else:
        places = ((outputs + 0.5) * (n_in / n_out) - 0.5).clamp(min=0)
    low = places.long().clamp(max=n_in - 1)
    high = (low + 1).clamp(max=n_in - 1)
    weight = places - low
    return Taps(torch.stack([low, high], 1), torch.stack([1 - weight, weight], 1))


def logit_bands(logits: Tensor, rows: Taps, columns: Taps, values_per_pixel: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of the file's rows and their logits (W, n, K), which the caller may overwrite.

    Args:
        logits: (K, h, w).
        rows: Resize to H.
        columns: Resize to W.
        values_per_pixel: What the caller holds of a pixel at once, these logits included, in units of a logit.
    """
    maps, h, w = logits.shape
    height, width = len(rows.indices), len(columns.indices)
    item = columns.weights.element_size()
    low = 2 * item * maps * w  # a row of the head's map, and its copy
    per_row = low * (1 + h / height) + item * width * values_per_pixel
    for band in row_bands(height, per_row, 3 * low, logits.device):
        yield band, resized(logits, rows[band], columns)


def row_bands(height: int, per_row: float, fixed: float, device: torch.device) -> Iterator[slice]:
    """Cut rows into bands of ``fixed`` + n ``per_row`` bytes within the bound, n at least 1."""
    bound = CPU_BAND_BYTES if device.type == "cpu" else BAND_BYTES
    step = max(1, int((bound - fixed) / max(per_row, 1)))
    for start in range(0, height, step):
        yield slice(start, min(start + step, height))


def resized(logits: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Return (n_columns, n_rows, K) of (K, h, w): maps last, so that all steps run over contiguous memory."""
    needed, rows = rows.narrowed()
    low = upcast(logits[:, needed].permute(1, 2, 0).contiguous())  # (m, w, K)
    return columns.apply(swapped(rows.on(low).apply(low)))


def swapped(x: Tensor) -> Tensor:
    """Return (B, A, ...) of (A, B, ...), contiguous."""
    return x.transpose(0, 1).contiguous()


__all__ = [
    "BAND_BYTES",
    "CPU_BAND_BYTES",
    "Taps",
    "linear_taps",
    "logit_bands",
    "resized",
    "row_bands",
    "swapped",
]

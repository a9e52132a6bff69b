"""The softmax of the fused form of multi-scale deformable attention, as two small kernels beside the sampling ones.

Tiling. A program owns 1,024 logits, whole bags (the levels * points of a query and head) padded to a power of two, and
reads each once. The first leaves two numbers a bag, so that the sampling kernels make a weight from its logit by one
exponential; the second turns gradients of the weights, which the sampling kernel wrote in float32, into gradients of the
logits. Both move a few megabytes an image where sampling gathers hundreds. No atomics: the same in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
TILE = 1024


@triton.jit
def _bags(tensor, bags, SAMPLES: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    """Pointers to the samples of this program's M bags, and which of them are real."""
    bag = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    sample = tl.arange(0, PADDED)[None, :]
    return tensor + (bag * SAMPLES)[:, None] + sample, (bag < bags)[:, None] & (sample < SAMPLES)


@triton.jit(do_not_specialize=("bags",))
def _sums_kernel(logits, sums, bags, SAMPLES: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    pointers, real = _bags(logits, bags, SAMPLES, PADDED, M)
    x = tl.load(pointers, mask=real, other=float("-inf")).to(tl.float32)
    greatest = tl.max(x, 1)
    total = tl.sum(tl.exp2((x - greatest[:, None]) * LOG2_E), 1)
    bag = tl.program_id(0).to(tl.int64) * M + tl.arange(0, M)
    tl.store(sums + 2 * bag, greatest, mask=bag < bags)
    tl.store(sums + 2 * bag + 1, 1 / total, mask=bag < bags)


@triton.jit(do_not_specialize=("bags",))
def _backward_kernel(logits, slopes, grads, bags, SAMPLES: tl.constexpr, PADDED: tl.constexpr, M: tl.constexpr):
    pointers, real = _bags(logits, bags, SAMPLES, PADDED, M)
    x = tl.load(pointers, mask=real, other=float("-inf")).to(tl.float32)
    share = tl.exp2((x - tl.max(x, 1)[:, None]) * LOG2_E)
    share /= tl.sum(share, 1)[:, None]
    pointers, _ = _bags(slopes, bags, SAMPLES, PADDED, M)
    slope = tl.load(pointers, mask=real, other=0.0)
    slope = share * (slope - tl.sum(share * slope, 1)[:, None])
    pointers, _ = _bags(grads, bags, SAMPLES, PADDED, M)
    tl.store(pointers, slope.to(grads.dtype.element_ty), mask=real)


def softmax_sums(logits: Tensor) -> Tensor:
    """Return (bags, 2) float32: the greatest of the logits (B, Q, heads, L, P) of every bag, and 1 / the sum of exponentials
    relative to it."""
    grid, bags, constants = _launch(logits)
    sums = torch.empty(bags, 2, dtype=torch.float32, device=logits.device)
    _sums_kernel[grid](logits.contiguous(), sums, bags, **constants)
    return sums


def softmax_backward(logits: Tensor, slopes: Tensor) -> Tensor:
    """Return the gradient of the logits (B, Q, heads, L, P) from that of their softmax, in float32."""
    grid, bags, constants = _launch(logits)
    grads = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward_kernel[grid](logits.contiguous(), slopes, grads, bags, **constants)
    return grads


def _launch(logits: Tensor) -> tuple[tuple[int], int, dict[str, int]]:
    samples = logits.shape[3] * logits.shape[4]
    padded, bags = triton.next_power_of_2(samples), logits.numel() // samples
    rows = max(1, TILE // padded)
    return (triton.cdiv(bags, rows),), bags, {"SAMPLES": samples, "PADDED": padded, "M": rows}

"""Criss-cross attention (CCNet, ICCV 2019 and TPAMI 2020, arXiv:1811.11721, section 3.2), in two and three dimensions.

A pixel attends to the pixels of its row and of its column, itself counted once: H + W - 1 keys, unscaled dot products,
one softmax. The three-dimensional form adds the line through time: T + H + W - 2 keys (the official 3-D module counts a
pixel twice and mixes up two axes; it is part of no model).

The axes are taken one after another, a few lines at a time. What earlier axes gave, its log-sum-exp L and its output O,
is merged with a line's weights as in blockwise attention, so that not even the map of H + W weights a pixel exists. The
backward computes the weights again from L. All work is done on pixels (..., C), which channels-last maps are as they lie in
memory; others are copied first.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from densepred.ops.backend import uses_triton
from densepred.ops.precision import sum_dtype

_BLOCK = {"cpu": 1 << 18}
"""Weights held at a time, by device: what a core's cache takes. Elsewhere what keeps the device busy."""
_LARGE_BLOCK = 1 << 24


def _layout(maps: Tensor) -> torch.memory_format:
    return torch.channels_last if maps.dim() == 4 else torch.channels_last_3d


def pixels_last(maps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (B, *axes, C) of maps (B, C, *axes), contiguous: a view of channels-last maps of that type."""
    return maps.to(dtype).contiguous(memory_format=_layout(maps)).movedim(1, -1)


def _lines(pixels: Tensor, axis: int) -> Tensor:
    """Return a view (n, m, length, C) of (B, *axes, C): n times m lines along an axis."""
    outer, inner = pixels.shape[:axis].numel(), pixels.shape[axis + 1 : -1].numel()
    lines = pixels.view(outer, pixels.shape[axis], inner, pixels.shape[-1]).transpose(1, 2)
    return lines.transpose(0, 1) if inner == 1 else lines


def _blocks(*tensors: Tensor) -> Iterator[tuple[bool, tuple[Tensor, ...]]]:
    """Yield all lines of tensors (B, *axes, C) in blocks (lines, length, C), and whether a pixel's own key counts there.

    It counts along the last axis only. Other axes of length 1 hold nothing but the pixel itself and are left out.
    """
    most, last = _BLOCK.get(tensors[0].device.type, _LARGE_BLOCK), tensors[0].dim() - 2
    if 0 in tensors[0].shape[:-1]:
        return
    for axis in range(last, 0, -1):
        length = tensors[0].shape[axis]
        if axis == last or length > 1:
            for parts in zip(*(_lines(tensor, axis) for tensor in tensors), strict=True):
                pieces = [part.split(max(1, most // length**2)) for part in parts]
                yield from ((axis == last, block) for block in zip(*pieces, strict=True))


def _energies(query: Tensor, key: Tensor, own_key: bool) -> Tensor:
    energies = torch.bmm(query, key.transpose(1, 2))  # (lines, length, length)
    if not own_key:
        energies.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    return energies


def _merge_lines(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(q, k, v)
    query, key, value = (pixels_last(maps, dtype) for maps in (q, k, v))
    out, total = torch.empty_like(value), value.new_full((*value.shape[:-1], 1), -torch.inf)
    for own_key, (q_line, k_line, v_line, o_line, l_line) in _blocks(query, key, value, out, total):
        weights = _energies(q_line, k_line, own_key)
        largest = weights.amax(2, keepdim=True)
        line_sum = weights.sub_(largest).exp_().sum(2, keepdim=True).log_().add_(largest)
        merged = torch.logaddexp(l_line, line_sum)
        weights.mul_(largest.sub_(merged).exp_())
        if not own_key:
            o_line.mul_((l_line - merged).exp_())
        o_line.baddbmm_(weights, v_line, beta=0 if own_key else 1)  # the first axis writes, the others add
        l_line.copy_(merged)
    return out.movedim(-1, 1).to(v.dtype), total[..., 0]


def _merge_lines_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    inputs, dtype = (q, k, v), log_sum.dtype
    pixels = [pixels_last(maps, dtype) for maps in (*inputs, grad, out)]
    mean = torch.empty_like(log_sum)[..., None]  # of what each key's weight is worth to the output
    grads = [torch.empty_like(part) for part in pixels[:3]]
    for own_key, lines in _blocks(*pixels, mean, log_sum[..., None], *grads):
        q_line, k_line, v_line, s_line, o_line, m_line, l_line, *grad_lines = lines
        if own_key:
            torch.sum(s_line * o_line, 2, keepdim=True, out=m_line)
        weights = _energies(q_line, k_line, own_key).sub_(l_line).exp_()
        changes = torch.bmm(s_line, v_line.transpose(1, 2)).sub_(m_line).mul_(weights)
        beta = 0 if own_key else 1
        grad_lines[0].baddbmm_(changes, k_line, beta=beta)
        grad_lines[1].baddbmm_(changes.transpose(1, 2), q_line, beta=beta)
        grad_lines[2].baddbmm_(weights.transpose(1, 2), s_line, beta=beta)
    return tuple(part.movedim(-1, 1).to(maps.dtype) for part, maps in zip(grads, inputs, strict=True))


class Backend(NamedTuple):
    """The two halves of one implementation, for maps of two and of three axes; all maps that it returns are channels-last.

    Attributes:
        forward: (q, k, v) -> (out, log_sum); out in the dtype of v, log_sum (B, *axes) in float32 (float64 where an input
            is).
        backward: (gradient of out, q, k, v, out, log_sum) -> the gradients of q, k and v in their dtypes.
    """

    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


_EAGER = Backend(_merge_lines, _merge_lines_backward)


def _implementation(q: Tensor, k: Tensor, v: Tensor) -> Backend:
    wide = torch.float32 in (torch.promote_types(q.dtype, k.dtype), v.dtype)
    channels, most = q.shape[1], 128 if wide else 256  # that a kernel's program holds
    unfit = f"q has {channels} channels, the kernels take {most} at most" if channels > most else None
    if uses_triton("criss_cross_attention", (q, k, v), unfit):
        from densepred.ops.kernels import criss_cross_attention as kernels  # lazily: Triton need not be installed

        return Backend(kernels.forward, kernels.backward)
    return _EAGER


@torch.library.custom_op("densepred::criss_cross_attention", mutates_args=())
def _criss_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(v.device.type, enabled=False):
        return _implementation(q, k, v).forward(q, k, v)


@torch.library.custom_op("densepred::criss_cross_attention_backward", mutates_args=())
def _criss_cross_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(v.device.type, enabled=False):
        return _implementation(q, k, v).backward(grad, q, k, v, out, log_sum)


@_criss_cross_attention.register_fake
def _output_shapes(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=_layout(v)), v.new_empty(
        (v.shape[0], *v.shape[2:]), dtype=sum_dtype(q, k, v)
    )


@_criss_cross_attention_backward.register_fake
def _gradient_shapes(
    _grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _out: Tensor, _log_sum: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(maps, memory_format=_layout(maps)) for maps in (q, k, v))


def _save_for_backward(ctx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    return _criss_cross_attention_backward(grad, *ctx.saved_tensors)


_criss_cross_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def criss_cross_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every pixel attend to its row and its column, itself counted once.

    The softmax over the H + W - 1 unscaled dot products runs in float32 (float64 where an input is). Memory grows with
    the maps, not with H W (H + W). A gradient of a gradient is not implemented.

    Determinism: the kernels use no atomics; forward and backward give the same bits in every run.

    Args:
        q, k: (B, Cq, H, W), any float dtype, any side down to 1.
        v: (B, Cv, H, W).

    Returns:
        (B, Cv, H, W) in the dtype of ``v``, channels-last in memory, without the residual and the factor of CCNet's module.

    Raises:
        ValueError: shapes that disagree.
    """
    _check_shapes("criss_cross_attention", "H, W", q, k, v)
    return _attend(q, k, v)


def criss_cross_attention_3d(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Let every pixel of a clip attend to its three lines through time, height and width, itself counted once.

    Args:
        q, k: (B, Cq, T, H, W), any float dtype, any side down to 1.
        v: (B, Cv, T, H, W).

    Returns:
        (B, Cv, T, H, W); see `criss_cross_attention`, to which it is equal for T = 1.

    Raises:
        ValueError: see `criss_cross_attention`.
    """
    _check_shapes("criss_cross_attention_3d", "T, H, W", q, k, v)
    return _attend(q, k, v)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # Here and not in the op: what is saved for the backward is then channels-last already.
    return _criss_cross_attention(*(maps.contiguous(memory_format=_layout(maps)) for maps in (q, k, v)))[0]


def _check_shapes(name: str, axes: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    dims = 2 + len(axes.split(", "))
    if (
        q.dim() != dims
        or q.shape != k.shape
        or v.dim() != dims
        or (q.shape[0], *q.shape[2:]) != (v.shape[0], *v.shape[2:])
    ):
        raise ValueError(
            f"{name}: q {tuple(q.shape)} and k {tuple(k.shape)} must both be (B, Cq, {axes}) and v {tuple(v.shape)} "
            f"(B, Cv, {axes}) over the same pixels"
        )


__all__ = ["Backend", "criss_cross_attention", "criss_cross_attention_3d"]

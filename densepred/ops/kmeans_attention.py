"""k-means cross attention, the step that gives kMaX-DeepLab its name (ECCV 2022, arXiv:2207.04044, section 3.2).

Every pixel belongs to the query with its largest mask logit; a query's update is the plain sum of the values of its
pixels (textbook k-means takes the mean). The (B, Q, P) one-hot matrix of that assignment is never built.

The gradient of the values is a gather, which writes it once and reads little else (the centre sums' gradient and the
assignment stay in the cache); no kernel is faster than that.

Determinism: the kernel's sums and the gradient are; the eager sums are on a CPU, and on a GPU under
`torch.use_deterministic_algorithms`.
"""

import torch
from torch import Tensor

from densepred.ops.backend import check_tensors, uses_triton
from densepred.ops.precision import sum_dtype


def _assign_and_sum(pixel_value: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    batch, depth = pixel_value.shape[:2]
    # `max` names the first of equal maxima, as `argmax` does, and is twice as fast on the CPU.
    assignment = mask_logits.max(dim=1).indices  # (B, ...)
    index = assignment.flatten(1)[:, None].expand(-1, depth, -1)  # (B, D, P)
    sums = pixel_value.new_zeros((batch, depth, mask_logits.shape[1]), dtype=sum_dtype(pixel_value))
    return sums.scatter_add_(2, index, pixel_value.flatten(2).to(sums.dtype)), assignment  # (B, D, Q)


@torch.library.custom_op("densepred::kmeans_attention", mutates_args=())
def _kmeans_attention(pixel_value: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    if uses_triton("kmeans_attention", (pixel_value, mask_logits), _unfit(pixel_value, mask_logits)):
        from densepred.ops.kernels import kmeans_attention as kernels

        return kernels.forward(pixel_value, mask_logits)
    return _assign_and_sum(pixel_value, mask_logits)


def _unfit(pixel_value: Tensor, mask_logits: Tensor) -> str | None:
    if max(tensor[:1].numel() for tensor in (pixel_value, mask_logits)) >= 2**31:
        return "an image has 2^31 values or more"
    return None


@_kmeans_attention.register_fake
def _shapes(pixel_value: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    batch, depth = pixel_value.shape[:2]
    sums = pixel_value.new_empty((batch, depth, mask_logits.shape[1]), dtype=sum_dtype(pixel_value))
    assignment = mask_logits.new_empty((batch, *mask_logits.shape[2:]), dtype=torch.int64)
    return sums, assignment


def _save_for_backward(ctx, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.pixel_dtype = inputs[0].dtype


def _gather_gradient(ctx, grad_sums: Tensor, _: Tensor | None) -> tuple[Tensor, None]:
    (assignment,) = ctx.saved_tensors
    index = assignment.flatten(1)[:, None].expand(-1, grad_sums.shape[1], -1)  # (B, D, P)
    # Rounded before it is copied to all pixels, which gives the same numbers.
    return grad_sums.to(ctx.pixel_dtype).gather(2, index).unflatten(2, assignment.shape[1:]), None


_kmeans_attention.register_autograd(_gather_gradient, setup_context=_save_for_backward)


def kmeans_attention(pixel_value: Tensor, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Assign every pixel to a query and sum the pixel values of each query.

    Args:
        pixel_value: (B, D, H, W) or (B, D, P), any float dtype.
        mask_logits: (B, Q, H, W) or (B, Q, P), the same pixels. No gradient goes back to them: the assignment is hard.

    Returns:
        The centre sums (B, D, Q), zero for a query without pixels, in float32 (float64 for float64 values), and the
        assignment (B, H, W) or (B, P) int64, the lowest query index where logits tie.

    Raises:
        ValueError: the two are no floats of one device, or do not lie over the same pixels.
    """
    check_tensors("kmeans_attention", pixel_value=pixel_value, mask_logits=mask_logits)
    pixels, logits = tuple(pixel_value.shape), tuple(mask_logits.shape)
    if (pixels[0], *pixels[2:]) != (logits[0], *logits[2:]):
        raise ValueError(
            f"kmeans_attention: pixel_value {pixels} and mask_logits {logits} differ beyond the channel axis"
        )
    return _kmeans_attention(pixel_value, mask_logits)


__all__ = ["kmeans_attention"]

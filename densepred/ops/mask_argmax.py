"""Labels of a file's pixels from small mask logits, without a large map of logits, probabilities or scores.

The masks of a mask classifier go to the file's size by two bilinear resizes (`linear_resize.Taps` holds both in one).
`mask_argmax` then gives each pixel its best class, `mask_owner` its best query; neither has a gradient.

Determinism: both always give the same result; what is added up in any order are whole numbers.

Letters: Q queries, K those that matter, C classes, h w the small map, H W the file's size, n the rows of a band, T taps.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.ops.backend import check_tensors, uses_triton
from densepred.ops.linear_resize import Taps, logit_bands
from densepred.ops.precision import upcast

CLASS_MULTIPLE = 16
"""The matrix product is faster with rows of a multiple of this many classes; those added have probability 0."""


def mask_scores(logits: Tensor, probs: Tensor) -> Tensor:
    """Return the scores (W, n, C) of mask logits (W, n, Q), which are overwritten, also under autocast in full precision."""
    with torch.autocast(logits.device.type, enabled=False):
        return logits.sigmoid_() @ probs


def padded_classes(probs: Tensor) -> Tensor:
    """Return (Q, C), at least in float32, with classes of probability 0 added up to a multiple of `CLASS_MULTIPLE`."""
    return F.pad(upcast(probs), (0, -probs.shape[1] % CLASS_MULTIPLE))


def mask_score_bands(mask_logits: Tensor, probs: Tensor, rows: Taps, columns: Taps) -> Iterator[tuple[slice, Tensor]]:
    """Yield bands of the file's rows and their class scores (W, n, C): class times mask probabilities, over all queries.

    The arguments are those of `mask_argmax`.
    """
    num_classes, probs = probs.shape[1], padded_classes(probs.to(columns.weights.dtype))  # (Q, C'), C' >= C
    values = sum(probs.shape) + max(probs.shape) + 4  # the last band lives until its loop variable is bound anew
    for band, logits in logit_bands(mask_logits, rows, columns, values):
        yield band, mask_scores(logits, probs)[..., :num_classes]


def _labels_by_bands(mask_logits: Tensor, probs: Tensor, rows: Taps, columns: Taps) -> Tensor:
    labels = probs.new_empty((len(rows.indices), len(columns.indices)), dtype=torch.int64)
    for band, scores in mask_score_bands(mask_logits, probs, rows, columns):
        labels[band] = scores.argmax(-1).T
    return labels


def _owners_by_bands(mask_logits: Tensor, scores: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Tensor]:
    queries = len(scores)
    ids = scores.new_empty((len(rows.indices), len(columns.indices)), dtype=torch.int32)
    areas = scores.new_zeros((3, queries), dtype=torch.int64)
    for band, logits in logit_bands(mask_logits, rows, columns, 4 * queries + 8):
        probs = logits.sigmoid_()  # (W, n, K)
        owner = (probs * scores).argmax(-1, keepdim=True)  # (W, n, 1)
        written = torch.where(probs.gather(-1, owner) >= 0.5, owner + 1, 0)[..., 0]  # (W, n), 0 = nobody
        ids[band] = written.T
        areas[0] += owner.flatten().bincount(minlength=queries)
        areas[1] += written.flatten().bincount(minlength=queries + 1)[1:]
        areas[2] += (probs >= 0.5).float().sum((0, 1)).long()  # a band is small enough for float32 to be exact
    return ids, areas.T.contiguous()


def _unfit(mask_logits: Tensor) -> str | None:
    return "there are 2^31 mask logits or more" if mask_logits.numel() >= 2**31 else None


@torch.library.custom_op("densepred::mask_argmax", mutates_args=())
def _mask_argmax(
    mask_logits: Tensor,
    probs: Tensor,
    row_indices: Tensor,
    row_weights: Tensor,
    column_indices: Tensor,
    column_weights: Tensor,
) -> Tensor:
    if uses_triton("mask_argmax", (mask_logits, probs), _unfit(mask_logits)):
        from densepred.ops.kernels import mask_argmax as kernels

        return kernels.argmax(mask_logits, probs, Taps(row_indices, row_weights), Taps(column_indices, column_weights))
    rows = Taps(row_indices.cpu(), row_weights.cpu())  # where bands are cut
    return _labels_by_bands(mask_logits, probs, rows, Taps(column_indices, column_weights))


@_mask_argmax.register_fake
def _label_shape(
    mask_logits: Tensor,
    probs: Tensor,
    row_indices: Tensor,
    row_weights: Tensor,
    column_indices: Tensor,
    column_weights: Tensor,
) -> Tensor:
    return probs.new_empty((row_indices.shape[0], column_indices.shape[0]), dtype=torch.int64)


@torch.library.custom_op("densepred::mask_owner", mutates_args=())
def _mask_owner(
    mask_logits: Tensor,
    scores: Tensor,
    row_indices: Tensor,
    row_weights: Tensor,
    column_indices: Tensor,
    column_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    if uses_triton("mask_owner", (mask_logits, scores), _unfit(mask_logits)):
        from densepred.ops.kernels import mask_argmax as kernels

        return kernels.owner(mask_logits, scores, Taps(row_indices, row_weights), Taps(column_indices, column_weights))
    rows = Taps(row_indices.cpu(), row_weights.cpu())
    return _owners_by_bands(mask_logits, scores, rows, Taps(column_indices, column_weights))


@_mask_owner.register_fake
def _owner_shapes(
    mask_logits: Tensor,
    scores: Tensor,
    row_indices: Tensor,
    row_weights: Tensor,
    column_indices: Tensor,
    column_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    ids = scores.new_empty((row_indices.shape[0], column_indices.shape[0]), dtype=torch.int32)
    return ids, scores.new_empty((scores.shape[0], 3), dtype=torch.int64)


def mask_argmax(mask_logits: Tensor, probs: Tensor, rows: Taps, columns: Taps) -> Tensor:
    """Give each pixel its best class: the arg-max of the sum over queries of class times mask probability.

    Args:
        mask_logits: (Q, h, w), any float dtype, Q at least 1.
        probs: (Q, C) class probabilities, or any other weights of the masks.
        rows: Resize of h to H.
        columns: Resize of w to W.

    Returns:
        (H, W) int64, the first class where scores tie.

    Raises:
        ValueError: the tensors are no floats of one device, or shapes disagree (of resizes on a GPU this is not seen;
            the kernel then reads the nearest row or column).
    """
    return _mask_argmax(mask_logits, probs, *_checked("mask_argmax", mask_logits, "probs", probs, 2, rows, columns))


def mask_owner(mask_logits: Tensor, scores: Tensor, rows: Taps, columns: Taps) -> tuple[Tensor, Tensor]:
    """Give each pixel to the query with the largest product of score and mask probability.

    Args:
        mask_logits: (K, h, w), any float dtype, K at least 1.
        scores: (K,).
        rows: Resize of h to H.
        columns: Resize of w to W.

    Returns:
        (H, W) int32: owner + 1 where the owner's probability is at least a half, else 0; the first query where products
        tie. (K, 3) int64 areas by query: pixels it owns, those of them written, those where it has that probability.

    Raises:
        ValueError: the tensors are no floats of one device, or shapes disagree (of resizes on a GPU this is not seen;
            the kernel then reads the nearest row or column).
    """
    return _mask_owner(mask_logits, scores, *_checked("mask_owner", mask_logits, "scores", scores, 1, rows, columns))


def _checked(
    op: str, mask_logits: Tensor, name: str, factors: Tensor, axes: int, rows: Taps, columns: Taps
) -> tuple[Tensor, ...]:
    """Return the tensors of the resizes on the masks' device, in at least float32."""
    check_tensors(op, mask_logits=mask_logits, **{name: factors})
    shape = tuple(mask_logits.shape)
    if len(shape) != 3 or not shape[0] or factors.ndim != axes or len(factors) != shape[0]:
        raise ValueError(
            f"{op}: mask_logits {shape} and {name} {tuple(factors.shape)} must be (queries, h, w) and "
            f"{('(queries,)', '(queries, classes)')[axes - 1]}, of one query or more"
        )
    if not torch.compiler.is_compiling():
        _check_reach(op, shape, rows, columns)
    rows, columns = (taps.on(upcast(mask_logits[:0])) for taps in (rows, columns))
    return rows.indices, rows.weights, columns.indices, columns.weights


def _check_reach(op: str, shape: tuple[int, ...], rows: Taps, columns: Taps) -> None:
    for axis, taps, size in (("rows", rows, shape[1]), ("columns", columns, shape[2])):
        # Read where this does not wait for a GPU.
        if taps.indices.device.type == "cpu" and taps.indices.numel() and int(taps.indices.max()) >= size:
            raise ValueError(
                f"{op}: {axis} read input {int(taps.indices.max())}, mask_logits {shape} have {size} of them: make them by "
                f"linear_taps({size}, ...)"
            )


__all__ = ["CLASS_MULTIPLE", "mask_argmax", "mask_owner", "mask_score_bands", "mask_scores", "padded_classes"]

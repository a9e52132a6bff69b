"""mask_argmax and mask_owner: what is measured, against which formulation."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.engine.op_cases.case import OpCase
from densepred.ops import Taps, linear_taps, mask_argmax, mask_owner

SIZE = (1024, 2048)


def masks_and_resizes(queries: int, size: tuple[int, int], random: Generator) -> tuple[Tensor, ...]:
    """Return smooth mask logits at a quarter of a size, and what `Taps` holds of the resizes of rows and columns to it."""
    small = torch.Size(side // 4 for side in size)
    masks = 8 * torch.randn(1, queries, small[0] // 16, small[1] // 16, generator=random)
    masks = F.interpolate(masks, small, mode="bilinear")[0]
    rows, columns = (linear_taps(*sides).on(masks) for sides in zip(small, size, strict=True))
    return masks, rows.indices, rows.weights, columns.indices, columns.weights


def argmax_inputs(queries: int, classes: int, size: tuple[int, int], random: Generator) -> tuple[Tensor, ...]:
    """Return mask logits, class probabilities and the resizes."""
    masks, *resizes = masks_and_resizes(queries, size, random)
    return masks, (4 * torch.randn(queries, classes, generator=random)).softmax(1), *resizes


def owner_inputs(queries: int, size: tuple[int, int], random: Generator) -> tuple[Tensor, ...]:
    """Return mask logits, class scores and the resizes."""
    masks, *resizes = masks_and_resizes(queries, size, random)
    # Scores as far apart as they can be, or in half precision the baseline's products tie.
    return masks, torch.linspace(0.1, 1, queries)[torch.randperm(queries, generator=random)], *resizes


def full_size(mask_logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the probabilities (Q, H, W): resized to the padded input, then, here without a change, to the file."""
    logits = F.interpolate(mask_logits[None], size, mode="bilinear")[:, :, : size[0], : size[1]]
    return F.interpolate(logits, size, mode="bilinear")[0].sigmoid()


def argmax_at_full_size(size: tuple[int, int], mask_logits: Tensor, probs: Tensor, *_: Tensor) -> Tensor:
    """Mask2Former's semantic inference."""
    return torch.einsum("qc,qhw->chw", probs, full_size(mask_logits, size)).argmax(0)


def owner_at_full_size(size: tuple[int, int], mask_logits: Tensor, scores: Tensor, *_: Tensor) -> Tensor:
    """The first half of Mask2Former's panoptic inference, with its areas by query."""
    probs = full_size(mask_logits, size)
    owner = (scores[:, None, None] * probs).argmax(0)
    strong = probs >= 0.5
    written = torch.where(strong.gather(0, owner[None])[0], owner + 1, 0)
    for query in range(len(scores)):
        (owner == query).sum(), (written == query + 1).sum(), strong[query].sum()
    return written.int()


def _argmax(mask_logits: Tensor, probs: Tensor, *resizes: Tensor) -> Tensor:
    return mask_argmax(mask_logits, probs, Taps(*resizes[:2]), Taps(*resizes[2:]))


def _owner(mask_logits: Tensor, scores: Tensor, *resizes: Tensor) -> Tensor:
    return mask_owner(mask_logits, scores, Taps(*resizes[:2]), Taps(*resizes[2:]))[0]


def _flops(
    mask_logits: Tensor, probs: Tensor, row_indices: Tensor, _: Tensor, column_indices: Tensor, __: Tensor
) -> tuple[int, int]:
    return 2 * probs.numel() * len(row_indices) * len(column_indices), 0


def _argmax_case(queries: int, classes: int, devices: tuple[str, ...]) -> OpCase:
    return OpCase(
        "mask_argmax",
        f"{queries} queries to {SIZE[0]}x{SIZE[1]}, {classes} classes",
        "full size",
        partial(argmax_inputs, queries, classes, SIZE),
        _argmax,
        partial(argmax_at_full_size, SIZE),
        (),
        _flops,
        devices,
    )


def _owner_case(queries: int, devices: tuple[str, ...]) -> OpCase:
    return OpCase(
        "mask_owner",
        f"{queries} queries to {SIZE[0]}x{SIZE[1]}",
        "full size",
        partial(owner_inputs, queries, SIZE),
        _owner,
        partial(owner_at_full_size, SIZE),
        (),
        devices=devices,
    )


CASES: tuple[OpCase, ...] = (
    _argmax_case(100, 19, ("cpu", "cuda")),
    _argmax_case(100, 133, ("cpu", "cuda")),
    _argmax_case(100, 150, ("cuda",)),
    _argmax_case(250, 150, ("cuda",)),
    _owner_case(20, ("cpu", "cuda")),
    _owner_case(100, ("cuda",)),
)

"""The way of logits from a head's map to the file: to the padded input, cut to the image, to the file's size.

Both resizes are bilinear; together they are one weighted sum of a few rows, then of a few columns, of the head's map, see
`ops.linear_resize`.
"""

import torch.nn.functional as F
from torch import Tensor

from densepred.ops.linear_resize import Taps, linear_taps
from densepred.ops.precision import upcast

Size = tuple[int, int]


def resize(logits: Tensor, size: Size, align_corners: bool = False) -> Tensor:
    """Return (B, C, h, w) at a size (H, W), bilinearly."""
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=align_corners)


def resize_to_file(
    logits: Tensor, pad_shape: Size, img_shape: Size, ori_shape: Size, align_corners: bool = False
) -> tuple[Taps, Taps]:
    """Return the resize of the rows (on the CPU, where bands are cut) and of the columns from (K, h, w) to the file.

    The map goes to the padded input, is cut to the image and goes to the file, in one step.
    """
    rows, columns = (
        linear_taps(small, padded, align_corners).then(linear_taps(image, file, align_corners))
        for small, padded, image, file in zip(logits.shape[-2:], pad_shape, img_shape, ori_shape, strict=True)
    )
    return rows, columns.on(upcast(logits[:0]))

"""The one rule of precision: half precision is computed in float32, float32 and float64 stay."""

import torch
from torch import Tensor


def sum_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype that sums over some tensors run in: float32, float64 where one of them is."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def upcast(x: Tensor) -> Tensor:
    """Return half precision as float32; leave float32 and float64 alone."""
    return x.to(sum_dtype(x))


__all__ = ["sum_dtype", "upcast"]

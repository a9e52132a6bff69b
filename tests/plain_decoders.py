"""The baselines' layers written out: loops and matrices instead of the library's pooling and resizing."""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests import parity

State = Mapping[str, Tensor]


def filled(module: nn.Module) -> nn.Module:
    """Return the module in evaluation and float64, its weights and norms' statistics filled by their names."""
    state = {key: torch.from_numpy(parity.fill(key, value.shape)) for key, value in module.state_dict().items()}
    module.double().eval().load_state_dict(state)
    return module


def maps(channels: Sequence[int], sizes: Sequence[tuple[int, int]], batch: int = 2) -> list[Tensor]:
    """Return random maps of an encoder."""
    return [
        torch.from_numpy(parity.normal_input(i, (batch, c, *size)))
        for i, (c, size) in enumerate(zip(channels, sizes, strict=True))
    ]


def keys_of_units(names: Iterable[str]) -> set[str]:
    """Return the state-dict keys of units, each a convolution without bias and a BatchNorm."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return {f"{name}.{key}" for name in names for key in ("conv.weight", *(f"bn.{part}" for part in norm))}


def unit(state: State, name: str, x: Tensor, dilation: int = 1) -> Tensor:
    """Return convolution, norm of the running statistics, ReLU."""
    weight = state[f"{name}.conv.weight"]
    y = F.conv2d(x, weight, padding=dilation * (weight.shape[-1] // 2), dilation=dilation)
    mean, variance, scale, shift = (
        state[f"{name}.bn.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return ((y - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)


def bin_means(x: Tensor, bins: int) -> Tensor:
    """Return the means (B, C, bins, bins) over rows floor(i H / bins) to ceil((i + 1) H / bins), columns likewise."""
    rows, columns = ([slice(i * n // bins, math.ceil((i + 1) * n / bins)) for i in range(bins)] for n in x.shape[-2:])
    return torch.stack([torch.stack([x[..., r, c].mean((-2, -1)) for c in columns], -1) for r in rows], -2)


def bilinear_weights(old: int, new: int, align_corners: bool) -> Tensor:
    """Return the matrix (new, old) that resizes an axis."""
    weights = np.zeros((new, old))
    for i in range(new):
        if align_corners:
            place = i * (old - 1) / (new - 1) if new > 1 else 0.0
        else:
            place = max((i + 0.5) * old / new - 0.5, 0.0)
        low = min(int(place), old - 1)
        weights[i, low] += 1 - (place - low)
        weights[i, min(low + 1, old - 1)] += place - low
    return torch.from_numpy(weights)


def resized(x: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Return (B, C, *size)."""
    rows, columns = (bilinear_weights(old, new, align_corners) for old, new in zip(x.shape[-2:], size, strict=True))
    return torch.einsum("Hh,bchw,Ww->bcHW", rows, x, columns)


def pooled_branch(state: State, name: str, x: Tensor, bins: int, align_corners: bool) -> Tensor:
    """Return the branch's map at the size of ``x``."""
    return resized(unit(state, f"{name}.1", bin_means(x, bins)), x.shape[-2:], align_corners)


def psp(state: State, x: Tensor, align_corners: bool) -> Tensor:
    """Return pyramid pooling and its bottleneck."""
    branches = [pooled_branch(state, f"psp_modules.{i}", x, bins, align_corners) for i, bins in enumerate((1, 2, 3, 6))]
    return unit(state, "bottleneck", torch.cat([x, *branches], 1))

"""Our operators against the formulations they replace: time, memory and accuracy, in turn, in one process.

Each baseline is written here from the published formula, in plain PyTorch, on the same tensors. Times are CPU seconds of
one thread, which other work on the machine moves little (on a GPU: wall seconds of a synchronised device). Memory is the
peak of what tensors took beyond the arguments, results included; what a library takes inside an operator is not seen.
Errors are L2 norms relative to the baseline in float64. A new operator needs one `OpCase` in `CASES`.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from densepred.errors import nearest
from densepred.evaluation.table import text_table
from densepred.ops import (
    criss_cross_attention,
    kmeans_attention,
    modulated_deform_conv2d,
    ms_deform_attn,
    varying_window_attention,
)

TOLERANCE = 1e-4
"""Largest relative error, ours or theirs, in float32; beyond it times mean nothing."""
COLUMNS = (
    "operator, baseline",
    "direction",
    "ours ms",
    "base ms",
    "ratio",
    "ours MiB",
    "base MiB",
    "ours err",
    "base err",
)


@dataclass(frozen=True)
class OpCase:
    """An operator, the formulation it is held against, and inputs.

    Attributes:
        op: name that ``--op`` takes.
        shape: the inputs in words.
        baseline: the other formulation in words.
        inputs: draws the arguments of both; floats in float32.
        ours, theirs: return one tensor.
        trained: positions of the arguments that get gradients in the backward pass.
    """

    op: str
    shape: str
    baseline: str
    inputs: Callable[[Generator], tuple[Tensor, ...]]
    ours: Callable[..., Tensor]
    theirs: Callable[..., Tensor]
    trained: tuple[int, ...]


@dataclass(frozen=True)
class Measurement:
    """One direction of a case; pairs are (ours, theirs).

    Attributes:
        direction: ``forward`` or ``forward+backward``.
        seconds: medians.
        ratio: median over the rounds of their time / ours.
        memory: peaks in bytes.
        errors: the largest of the results' relative errors.
    """

    direction: str
    seconds: tuple[float, float]
    ratio: float
    memory: tuple[int, int]
    errors: tuple[float, float]


def criss_cross_inputs(
    height: int, width: int, channels: int, layout: torch.memory_format, random: Generator
) -> tuple[Tensor, ...]:
    """Return q, k (an eighth of the channels, as CCNet has it) and v of one image."""
    sizes = (channels // 8, channels // 8, channels)
    return tuple(torch.randn(1, c, height, width, generator=random).contiguous(memory_format=layout) for c in sizes)


def criss_cross_by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """CCNet's formulation: copies with rows and with columns first, batched products, one softmax of H + W energies."""
    batch, _, height, width = v.shape
    columns = [x.permute(0, 3, 2, 1).reshape(batch * width, height, -1) for x in (q, k, v)]
    rows = [x.permute(0, 2, 3, 1).reshape(batch * height, width, -1) for x in (q, k, v)]
    own = torch.zeros(height, height, dtype=q.dtype, device=q.device).fill_diagonal_(-torch.inf)
    by_column = torch.bmm(columns[0], columns[1].transpose(1, 2)) + own
    by_column = by_column.view(batch, width, height, height).transpose(1, 2)  # (B, H, W, H)
    by_row = torch.bmm(rows[0], rows[1].transpose(1, 2)).view(batch, height, width, width)
    weights = torch.cat([by_column, by_row], dim=3).softmax(dim=3)  # (B, H, W, H + W)
    of_column = weights[..., :height].transpose(1, 2).reshape(batch * width, height, height)
    of_row = weights[..., height:].reshape(batch * height, width, width)
    column = torch.bmm(of_column, columns[2]).view(batch, width, height, -1).permute(0, 3, 2, 1)
    return column + torch.bmm(of_row, rows[2]).view(batch, height, width, -1).permute(0, 3, 1, 2)


def criss_cross_by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same in einsum, as later ports have it; the fastest of these on channels-last maps."""
    height = q.shape[2]
    own = torch.eye(height, dtype=torch.bool, device=q.device)[:, None]  # (H, 1, H)
    column = torch.einsum("bchw,bciw->bhwi", q, k).masked_fill(own, -torch.inf)
    weights = torch.cat([column, torch.einsum("bchw,bchj->bhwj", q, k)], dim=3).softmax(dim=3)
    out = torch.einsum("bhwi,bciw->bchw", weights[..., :height], v)
    return out + torch.einsum("bhwj,bchj->bchw", weights[..., height:], v)


def criss_cross_by_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention over all pairs of pixels of which all but the cross are masked."""
    height, width = q.shape[-2:]
    y, x = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, (height, width)), indexing="ij"))
    cross = ((y[:, None] == y) | (x[:, None] == x)).to(q.device)  # (H W, H W)
    energies = q.flatten(2).transpose(1, 2) @ k.flatten(2)
    weights = energies.masked_fill(~cross, -torch.inf).softmax(2)
    return (v.flatten(2) @ weights.transpose(1, 2)).view(v.shape)


def kmeans_inputs(side: int, channels: int, queries: int, random: Generator) -> tuple[Tensor, ...]:
    """Return pixel values and mask logits of one square image."""
    return tuple(torch.randn(1, c, side, side, generator=random) for c in (channels, queries))


def kmeans_by_one_hot(pixel_value: Tensor, mask_logits: Tensor) -> Tensor:
    """kMaX-DeepLab's formulation: the sums are a product with the one-hot assignment."""
    one_hot = F.one_hot(mask_logits.argmax(1), mask_logits.shape[1]).to(pixel_value.dtype)  # (B, H, W, Q)
    return torch.einsum("bdhw,bhwq->bdq", pixel_value, one_hot)


def deformable_inputs(sides: Sequence[int], queries: int, random: Generator) -> tuple[Tensor, ...]:
    """Return the arguments for square levels, 8 heads of 32 channels and 4 points; samples lie anywhere inside."""
    shapes = torch.tensor([(side, side) for side in sides])
    pixels = shapes.prod(1)
    value = torch.randn(1, int(pixels.sum()), 8, 32, generator=random)
    locations = torch.rand(1, queries, 8, len(sides), 4, 2, generator=random)
    weights = torch.randn(1, queries, 8, len(sides) * 4, generator=random).softmax(-1)
    return value, shapes, pixels.cumsum(0) - pixels, locations, weights.unflatten(-1, (len(sides), 4))


def deformable_by_grid_sample(
    value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor
) -> Tensor:
    """Deformable DETR's fallback: one `grid_sample` a level, a stack of all samples, a weighted sum."""
    batch, queries, heads = weights.shape[:3]
    samples = []
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(batch * heads, -1, height, width)
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B * heads, Q, P, 2)
        samples.append(F.grid_sample(maps, grid, align_corners=False))  # (B * heads, D, Q, P)
    factors = weights.flatten(3).transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, Q, L * P)
    out = (torch.stack(samples, dim=-2).flatten(-2) * factors).sum(-1)  # (B * heads, D, Q)
    return out.view(batch, -1, queries).transpose(1, 2)


def deform_conv_inputs(height: int, width: int, channels: int, outputs: int, random: Generator) -> tuple[Tensor, ...]:
    """Return x, offsets around 3 x 3 taps (standard deviation about one pixel), masks, weight and bias of one image.

    No offset lies within 0.01 of a whole number. The slope of the interpolation jumps there, and the float32 coordinates
    of `grid_sample`, scaled to [-1, 1] and back, fall on the other side of it: 4e-4 of its gradients at 128 x 256.
    """
    x = torch.randn(1, channels, height, width, generator=random)
    offset = torch.randn(1, 18, height, width, generator=random).floor_() + 0.01
    offset += 0.98 * torch.rand(offset.shape, generator=random)
    mask = torch.rand(1, 9, height, width, generator=random)
    weight = torch.randn(outputs, channels, 3, 3, generator=random) / (9 * channels) ** 0.5
    return x, offset, mask, weight, torch.randn(outputs, generator=random)


def deform_conv_by_grid_sample(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """DCNv2 in plain PyTorch: one `grid_sample` of all taps, times the masks, one product with the weight."""
    batch, channels, height, width = x.shape
    offset = offset.view(batch, 3, 3, 2, height, width)
    y, x_at = (torch.arange(-1, side - 1, dtype=x.dtype, device=x.device) for side in (height, width))
    tap = torch.arange(3, device=x.device)
    y = (y[:, None] + tap[:, None, None, None] + offset[:, :, :, 0]) * (2 / (height - 1)) - 1
    x_at = (x_at + tap[:, None, None] + offset[:, :, :, 1]) * (2 / (width - 1)) - 1
    grid = torch.stack([x_at, y], -1).view(batch, -1, width, 2)  # (B, 9 H, W, 2)
    columns = F.grid_sample(x, grid, align_corners=True).view(batch, channels, 9, -1) * mask.view(batch, 1, 9, -1)
    out = torch.einsum("oct,bctn->bon", weight.flatten(2), columns)
    return out.view(batch, -1, height, width) + bias[:, None, None]


def varying_window_inputs(height: int, width: int, channels: int, ratio: int, random: Generator) -> tuple[Tensor, ...]:
    """Return the queries, the embedded map, and the projections of keys and values, of one image."""
    maps = (torch.randn(1, c, height, width, generator=random) for c in (channels, channels // ratio**2))
    weight = torch.randn(2 * channels, channels, generator=random) / channels**0.5
    return *maps, weight, torch.randn(2 * channels, generator=random)


def varying_window_by_unfold(
    query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, heads: int, ratio: int
) -> Tensor:
    """VWFormer's formulation: a map padded by copies, 8 x 8 unfolded windows, every token of each projected."""
    batch, channels, *size = query.shape
    side = [length // 8 for length in size]
    for axis, p in zip((3, 2), reversed(side), strict=True):
        near, reach = (ratio + 1) * p // 2, ratio * p
        left, right = (context.narrow(axis, at, reach - near) for at in (near, context.shape[axis] - reach))
        context = torch.cat([left, context, right], dim=axis)
    windows = F.unfold(context, [ratio * p for p in side], stride=side).transpose(1, 2).flatten(0, 1)
    blocks = windows.view(-1, channels // ratio**2, side[0], ratio, side[1], ratio).permute(0, 2, 4, 3, 5, 1)
    tokens = blocks.reshape(-1, side[0] * side[1], channels)  # (B * 64, P, C)
    keys, values = F.linear(tokens, weight, bias).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    shape = (batch, heads, -1, 8, side[0], 8, side[1])
    queries = query.view(shape).permute(0, 3, 5, 1, 4, 6, 2).reshape(keys.shape)  # (B * 64, heads, P, d)
    weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    out = (weights @ values).view(batch, 8, 8, heads, *side, -1)
    return out.permute(0, 3, 6, 1, 4, 2, 5).reshape(query.shape)


def _varying_window_case(height: int, width: int, channels: int, ratio: int, heads: int) -> OpCase:
    return OpCase(
        "varying_window_attention",
        f"{height}x{width}x{channels}, ratio {ratio}, {heads} head{'s'[: heads - 1]}",
        "unfold",
        partial(varying_window_inputs, height, width, channels, ratio),
        lambda *arguments: varying_window_attention(*arguments, heads, (ratio, ratio)),
        lambda *arguments: varying_window_by_unfold(*arguments, heads, ratio),
        (0, 1, 2, 3),
    )


def _criss_cross_case(
    height: int,
    width: int,
    channels: int,
    baseline: str,
    theirs: Callable[..., Tensor],
    layout: torch.memory_format = torch.contiguous_format,
) -> OpCase:
    inputs = partial(criss_cross_inputs, height, width, channels, layout)
    name = f"{height}x{width}x{channels}{', channels last' if layout == torch.channels_last else ''}"
    return OpCase("criss_cross_attention", name, baseline, inputs, criss_cross_attention, theirs, (0, 1, 2))


CASES: tuple[OpCase, ...] = (
    _criss_cross_case(97, 97, 512, "bmm", criss_cross_by_bmm),
    _criss_cross_case(97, 97, 512, "einsum", criss_cross_by_einsum, torch.channels_last),
    _criss_cross_case(45, 60, 512, "bmm", criss_cross_by_bmm),
    _criss_cross_case(45, 60, 512, "(HW)^2, masked", criss_cross_by_mask),
    *(
        OpCase(
            "kmeans_attention",
            f"{side}x{side}, 256 channels, 128 queries",
            "one-hot",
            partial(kmeans_inputs, side, 256, 128),
            lambda pixel_value, mask_logits: kmeans_attention(pixel_value, mask_logits)[0],
            kmeans_by_one_hot,
            (0,),
        )
        for side in (41, 161)
    ),
    *(
        OpCase(
            "ms_deform_attn",
            f"levels 64, 32, 16, {queries} queries",
            "grid_sample",
            partial(deformable_inputs, (64, 32, 16), queries),
            ms_deform_attn,
            deformable_by_grid_sample,
            (0, 3, 4),
        )
        for queries in (5376, 100)
    ),
    *(
        OpCase(
            "modulated_deform_conv2d",
            f"{height}x{width}, {channels} to {outputs} channels",
            "grid_sample",
            partial(deform_conv_inputs, height, width, channels, outputs),
            lambda *arguments: modulated_deform_conv2d(*arguments, padding=1),
            deform_conv_by_grid_sample,
            (0, 1, 2, 3, 4),
        )
        for height, width, channels, outputs in (
            (16, 32, 512, 256),
            (32, 64, 256, 128),
            (64, 128, 128, 64),
            (128, 256, 64, 64),
        )
    ),
    *(_varying_window_case(64, 64, 512, ratio, 1) for ratio in (2, 4, 8)),
    *(_varying_window_case(64, 128, 512, ratio, 16) for ratio in (2, 4, 8)),
    _varying_window_case(80, 80, 512, 4, 1),
)
"""What is measured, in the order of the table."""


def _run(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], trained: Sequence[int], slope: Tensor | None
) -> list[Tensor]:
    """Return the output alone without ``slope``, else the output and the gradients of its product with it."""
    if slope is None:
        with torch.no_grad():
            return [function(*arguments)]
    leaves = [t.detach().requires_grad_() if i in trained else t for i, t in enumerate(arguments)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [leaves[i] for i in trained], slope)]


def _slope(out: Tensor) -> Tensor:
    """Return a gradient of an output, of equal values for equal shapes, in the output's own memory layout."""
    values = torch.randn(out.shape, generator=Generator().manual_seed(1)).to(out)
    return torch.empty_like(out).copy_(values)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return how much tensors hold at the peak of a run, beyond what they held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def _errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(results, exact, strict=True)
    return max(float((found.double() - true).norm() / true.norm()) for found, true in pairs)


def measure(case: OpCase, device: torch.device | str = "cpu", repeats: int = 5) -> list[Measurement]:
    """Compare both formulations of a case, forward alone and with the backward pass.

    Args:
        case: what to measure.
        device: where.
        repeats: alternating runs.

    Raises:
        ValueError: one of the two is further from float64 than `TOLERANCE`.
    """
    device = torch.device(device)
    arguments = [tensor.to(device) for tensor in case.inputs(Generator().manual_seed(0))]
    doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    functions, results = (case.ours, case.theirs), []
    for direction in ("forward", "forward+backward"):
        backward = direction != "forward"
        exact = _run(case.theirs, doubled, case.trained, _slope(case.theirs(*doubled)) if backward else None)
        slopes = [_slope(function(*arguments)) if backward else None for function in functions]
        runs = [partial(_run, f, arguments, case.trained, slope) for f, slope in zip(functions, slopes, strict=True)]
        errors = tuple(_errors(run(), exact) for run in runs)
        if not max(errors) <= TOLERANCE:
            raise ValueError(
                f"{case.op}, {case.shape}, against {case.baseline}: errors {errors} of ours and theirs, "
                f"allowed {TOLERANCE}: times would mean nothing"
            )
        del exact
        order = cycle(((0, 1), (1, 0)))  # nobody always goes first
        rounds = [{side: _seconds(runs[side], device) for side in next(order)} for _ in range(repeats)]
        results.append(
            Measurement(
                direction,
                tuple(statistics.median(r[side] for r in rounds) for side in (0, 1)),
                statistics.median(r[1] / r[0] for r in rounds),
                tuple(peak_bytes(run, device) for run in runs),
                errors,
            )
        )
    return results


def benchmark_ops(device: str = "cpu", ops: Sequence[str] | None = None, repeats: int = 5) -> str:
    """Return the table to print of all cases of some operators.

    Args:
        device: ``cpu`` or ``cuda``.
        ops: names as in `CASES`; None: all.
        repeats: alternating runs; medians are printed.

    Raises:
        ValueError: an unknown operator, or see `measure`.
    """
    known = list(dict.fromkeys(case.op for case in CASES))
    for name in ops or ():
        if name not in known:
            raise ValueError(f"--op {name}: nothing to measure{nearest(name, known)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler else prints two lines a measurement
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for case in CASES if not ops or case.op in ops for row in _rows(case, device, repeats)]
    finally:
        torch.set_num_threads(threads)
    clock = "CPU ms of one thread" if torch.device(device).type == "cpu" else "wall ms"
    title = (
        f"{device}, float32, batch 1, torch {torch.__version__}: {clock}, medians of {repeats} alternating runs; peak MiB "
        "beyond the arguments; relative L2 error against float64"
    )
    return text_table(COLUMNS, rows, title)


def _rows(case: OpCase, device: str, repeats: int) -> list[list[str]]:
    rows = [[f"{case.op} {case.shape}; {case.baseline}"] + [""] * (len(COLUMNS) - 1)]
    for found in measure(case, device, repeats):
        cells = [f"{1e3 * s:.2f}" for s in found.seconds]
        cells += [
            f"{found.ratio:.2f}x",
            *(f"{n / 2**20:.1f}" for n in found.memory),
            *(f"{e:.1e}" for e in found.errors),
        ]
        rows.append(["", found.direction, *cells])
    return rows

"""Varying window attention (VWFormer, ICLR 2024, arXiv:2404.16573): a fixed number of windows, contexts R times as wide.

Official code: yan-hao-tian/VW, which pads a map by copies of itself, unfolds R x R times as many positions, turns blocks
into tokens and projects every token of every window. Here the same contexts come by index arithmetic:

* A token is a block of R positions along each axis. The blocks of window ``k`` start at ``k p`` (p = a window's side), so
  windows whose ``k p`` leaves the same remainder by R, one *phase*, cut the map along the same lines: their tokens are
  one space-to-depth of the map, of as many values as the map. Tokens are projected once a phase instead of once a window:
  R x R times less work where R divides p (R = 8 and windows of 8: 64 times), no less where p is odd.
* The copied borders are blocks of the map too: a window that sticks out sees the first (or last) R p positions in a
  rotated order, which attention does not notice. In the right order of a phase's blocks every context is a plain slice,
  and with as many windows as R all windows of a phase share one context.

No padded map, no unfolded tensor and no attention map outlives a line of windows; the backward computes them again.
"""

import math
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from densepred.ops.backend import check_tensors, uses_triton
from densepred.ops.precision import sum_dtype

MOST_SCORES = {"cpu": 2**18, "cuda": 2**25}
"""Attention scores that are held at a time: what a core's cache holds, and what a GPU does at once."""


class Phase(NamedTuple):
    """The windows along one axis whose blocks start at the same remainder by the ratio."""

    windows: slice
    positions: tuple[int, ...]  # of the blocks, R each; the map's length stands for a zero
    firsts: tuple[int, ...]  # for every window the first of the p blocks that are its context


@lru_cache(maxsize=256)
def phases(side: int, windows: int, ratio: int) -> tuple[Phase, ...]:
    """Return what the windows along an axis see, each position of which is one of the map's.

    Args:
        side: p, a window's positions along the axis.
        windows: their number.
        ratio: R.
    """
    length, reach, near = side * windows, ratio * side, (ratio + 1) * side // 2
    line = list(range(length))
    # A context wider than the map: the borders are taken from the map amid zeros.
    missing = max(reach - length, 0)
    wide = [length] * (missing // 2) + line + [length] * (missing - missing // 2)
    full = wide[near:reach] + line + wide[len(wide) - reach : len(wide) - near]
    starts = range(0, reach, ratio)
    contexts = [[tuple(full[k * side + s :][:ratio]) for s in starts] for k in range(windows)]
    period = ratio // math.gcd(ratio, side)
    return tuple(
        _phase(slice(first, None, period), contexts[first::period], shared=ratio <= windows)
        for first in range(min(period, windows))
    )


def _phase(windows: slice, contexts: list[list[tuple[int, ...]]], shared: bool) -> Phase:
    def place(block: tuple[int, ...]) -> int:  # a block over the seam of a rotation goes to that end of the map
        return block[-1] - len(block) + 1 if 0 in block else block[0]

    if shared:
        order = sorted({block for context in contexts for block in context}, key=place)
        firsts = tuple(order.index(min(context, key=place)) for context in contexts)
    else:
        order = [block for context in contexts for block in context]
        firsts = tuple(i * len(contexts[0]) for i in range(len(contexts)))
    return Phase(windows, tuple(position for block in order for position in block), firsts)


class Layout(NamedTuple):
    """The sizes of one call; (y, x) each."""

    heads: int
    ratio: tuple[int, int]
    windows: tuple[int, int]
    side: tuple[int, int]

    def windowed(self, tokens: Tensor) -> Tensor:
        """Return (B, h, w, C) as a view (B, windows, p, windows, p, heads, d)."""
        (rows, columns), (height, width) = self.windows, self.side
        tokens = tokens.unflatten(3, (self.heads, -1)).unflatten(2, (columns, width))
        return tokens.unflatten(1, (rows, height))

    def phases(self) -> Iterator[tuple[Phase, Phase]]:
        down, across = (phases(*numbers) for numbers in zip(self.side, self.windows, self.ratio, strict=True))
        return ((rows, columns) for rows in down for columns in across)


class _Line(NamedTuple):
    """A line of a phase's windows, which are computed together, in groups of neighbours that share a context."""

    number: int
    first_row: int  # of the contexts' blocks
    first_columns: tuple[int, ...]  # the same, for every group

    def queries(self, windowed: Tensor) -> Tensor:
        """Return the line of a phase's (B, windows, p, windows, p, heads, d) as a view (B, heads, G, p, n, p, d)."""
        line = windowed[:, self.number].unflatten(2, (len(self.first_columns), -1))  # (B, p, G, n, p, heads, d)
        return line.permute(0, 5, 2, 1, 3, 4, 6)

    def contexts(self, grid: Tensor, side: tuple[int, int]) -> list[Tensor]:
        """Return the groups' contexts, views (B, p, p, heads, d) of a phase's tokens (B, Dy, Dx, heads, d)."""
        rows = grid[:, self.first_row : self.first_row + side[0]]
        return [rows[:, :, first : first + side[1]] for first in self.first_columns]


def _lines(rows: Phase, columns: Phase) -> list[_Line]:
    firsts = columns.firsts[:1] if len(set(columns.firsts)) == 1 else columns.firsts
    return [_Line(number, first, firsts) for number, first in enumerate(rows.firsts)]


def _stacked(parts: list[Tensor]) -> Tensor:
    """Stack contexts (B, p, p, heads, d) into (B * heads * G, P, d)."""
    parts = [part.permute(0, 3, 1, 2, 4) for part in parts]
    return torch.stack(parts, 2).flatten(3, 4).flatten(0, 2)


def _chunks(queries: Tensor, keys: Tensor) -> list[tuple[slice, slice]]:
    """Return parts along the first two axes of the queries (N, Q, d).

    The scores of a part against its keys (N, P, d) stay within `MOST_SCORES`, but for those of a single query.
    """
    most = MOST_SCORES.get(queries.device.type, MOST_SCORES["cuda"])
    (number, length, _), count = queries.shape, keys.shape[1]
    # Whole products while they fit: many small ones are slow.
    wide, deep = max(1, most // (length * count)), max(1, min(length, most // count))
    return [(slice(i, i + wide), slice(j, j + deep)) for i in range(0, number, wide) for j in range(0, length, deep)]


def _weights(queries: Tensor, keys: Tensor) -> Tensor:
    scores = torch.bmm(queries, keys.transpose(1, 2))  # (N, Q, P)
    return scores.to(sum_dtype(scores)).softmax(-1)


def _indices(phase: Phase, device: torch.device) -> Tensor:
    return torch.tensor(phase.positions, device=device)


def _tokens(context: Tensor, rows: Tensor, columns: Tensor, ratio: tuple[int, int]) -> Tensor:
    """Return a phase's tokens (B, Dy, Dx, C), channels in the order (row in the block, column in it, channel)."""
    context = functional.pad(context, (0, 1, 0, 1))  # zeros at the positions that stand for one
    lines = context.index_select(2, rows).index_select(3, columns)  # (B, c, Dy * R, Dx * R)
    blocks = lines.unflatten(3, (-1, ratio[1])).unflatten(2, (-1, ratio[0]))  # (B, c, Dy, R, Dx, R)
    return blocks.permute(0, 2, 4, 3, 5, 1).flatten(3)


def _add_tokens(grad: Tensor, tokens: Tensor, rows: Tensor, columns: Tensor, ratio: tuple[int, int]) -> None:
    """Add gradients of `_tokens` to that of the context, (B, c, h + 1, w + 1)."""
    blocks = tokens.unflatten(3, (*ratio, -1)).permute(0, 5, 1, 3, 2, 4)  # (B, c, Dy, R, Dx, R)
    lines = blocks.flatten(4).flatten(2, 3)
    wide = grad.new_zeros(*lines.shape[:3], grad.shape[3]).index_add_(3, columns, lines.to(grad.dtype))
    grad.index_add_(2, rows, wide)


def _project(tokens: Tensor, weight: Tensor, bias: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return keys and values (B, Dy, Dx, heads, d)."""
    return functional.linear(tokens, weight, bias).unflatten(3, (2, heads, -1)).unbind(3)


def _attend(
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    queries, outputs, scale = layout.windowed(query), layout.windowed(out), _scale(query, layout)
    for rows, columns in layout.phases():
        indices = _indices(rows, query.device), _indices(columns, query.device)
        keys, values = _project(_tokens(context, *indices, layout.ratio), weight, bias, layout.heads)
        here = (slice(None), rows.windows, slice(None), columns.windows)
        for line in _lines(rows, columns):
            chosen = line.queries(queries[here])
            q = (chosen * scale).flatten(3, 5).flatten(0, 2)  # (N, Q, d)
            k, v = (_stacked(line.contexts(grid, layout.side)) for grid in (keys, values))  # (N, P, d)
            for n, part in _chunks(q, k):  # the output takes the query's place
                q[n, part] = torch.bmm(_weights(q[n, part], k[n]).to(v.dtype), v[n])
            line.queries(outputs[here]).copy_(q.view(chosen.shape))
    return out, _no_sums(query, layout.heads)


def _no_sums(query: Tensor, heads: int) -> Tensor:
    """Return zeros in the place of the log-sum-exps, which the eager backward forms itself."""
    return query.new_zeros(len(query), heads, *query.shape[1:3], dtype=torch.float32)


def _attend_backward(
    grad: Tensor,
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    _out: Tensor,
    _lse: Tensor,
    layout: Layout,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, scale = sum_dtype(query), _scale(query, layout)
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    grad_context = functional.pad(torch.zeros_like(context, dtype=dtype), (0, 1, 0, 1))
    grad_weight, grad_bias = (torch.zeros_like(tensor, dtype=dtype) for tensor in (weight, bias))
    grads, queries, found = (layout.windowed(tensor) for tensor in (grad, query, grad_query))
    for rows, columns in layout.phases():
        indices = _indices(rows, query.device), _indices(columns, query.device)
        tokens = _tokens(context, *indices, layout.ratio)
        keys, values = _project(tokens, weight, bias, layout.heads)
        summed = tokens.new_zeros(*tokens.shape[:3], 2, layout.heads, keys.shape[-1], dtype=dtype)
        here = (slice(None), rows.windows, slice(None), columns.windows)
        for line in _lines(rows, columns):
            chosen = line.queries(queries[here])
            q, g = (x.flatten(3, 5).flatten(0, 2) for x in (chosen * scale, line.queries(grads[here])))
            k, v = (_stacked(line.contexts(grid, layout.side)) for grid in (keys, values))
            gradients = _softmax_backward(q, k, v, g)
            line.queries(found[here]).copy_(q.mul_(scale).view(chosen.shape))
            for grid, gradient in zip(summed.unbind(3), gradients, strict=True):
                parts = gradient.unflatten(1, layout.side).unflatten(
                    0, (len(query), layout.heads, len(line.first_columns))
                )
                for place, part in zip(line.contexts(grid, layout.side), parts.unbind(2), strict=True):
                    place += part.permute(0, 2, 3, 1, 4)
        del keys, values
        flat, of_tokens = summed.flatten(3).flatten(0, 2), tokens.flatten(0, 2)  # (D, 2C), (D, C)
        grad_bias += flat.sum(0)
        flat = flat.to(tokens.dtype)
        grad_weight += flat.t() @ of_tokens
        _add_tokens(grad_context, (flat @ weight).view(tokens.shape), *indices, layout.ratio)
    gradients = (grad_query, grad_context[:, :, :-1, :-1].contiguous(), grad_weight, grad_bias)
    return tuple(x.to(like.dtype) for x, like in zip(gradients, (query, context, weight, bias), strict=True))


def _softmax_backward(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of keys and values (N, P, d); that of the queries (N, Q, d) takes the queries' place."""
    dtype = sum_dtype(q)
    grad_k, grad_v = (torch.zeros_like(x, dtype=dtype) for x in (k, v))
    for n, part in _chunks(q, k):
        weights, g, queries = _weights(q[n, part], k[n]), grad[n, part], q[n, part]
        grad_v[n] += torch.bmm(weights.to(g.dtype).transpose(1, 2), g)
        slopes = torch.bmm(g, v[n].transpose(1, 2)).to(dtype)
        slopes = slopes.sub_((slopes * weights).sum(-1, keepdim=True)).mul_(weights).to(k.dtype)  # (N, Q, P)
        grad_k[n] += torch.bmm(slopes.transpose(1, 2), queries)
        q[n, part] = torch.bmm(slopes, k[n])
    return grad_k, grad_v


def _scale(query: Tensor, layout: Layout) -> float:
    return (query.shape[-1] // layout.heads) ** -0.5


class Backend(NamedTuple):
    """The two halves of one implementation.

    The forward returns the output and the log-sum-exps of its scores (B, heads, h, w), in whatever unit its backward
    reads; the backward takes the output's gradient, the arguments, both results and the sizes.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, Layout], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


_EAGER = Backend(_attend, _attend_backward)


def _implementation(query: Tensor, *others: Tensor) -> Backend:
    if query.numel() and uses_triton("varying_window_attention", (query, *others)):
        from densepred.ops.kernels import varying_window_attention as kernels  # lazily: Triton need not be installed

        return Backend(kernels.forward, kernels.backward)
    return _EAGER


def _layout(query: Tensor, heads: int, ratio: list[int], windows: list[int]) -> Layout:
    side = (query.shape[1] // windows[0], query.shape[2] // windows[1])
    return Layout(heads, tuple(ratio), tuple(windows), side)


@torch.library.custom_op("densepred::varying_window_attention", mutates_args=())
def _varying_window_attention(
    query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, heads: int, ratio: list[int], windows: list[int]
) -> tuple[Tensor, Tensor]:
    tensors = (query, context, weight, bias)
    with torch.autocast(query.device.type, enabled=False):
        return _implementation(*tensors).forward(*tensors, _layout(query, heads, ratio, windows))


@torch.library.custom_op("densepred::varying_window_attention_backward", mutates_args=())
def _varying_window_attention_backward(
    grad: Tensor,
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    lse: Tensor,
    heads: int,
    ratio: list[int],
    windows: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tensors = (query, context, weight, bias)
    with torch.autocast(query.device.type, enabled=False):
        backward = _implementation(*tensors).backward
        return backward(grad, *tensors, out, lse, _layout(query, heads, ratio, windows))


@_varying_window_attention.register_fake
def _result_shapes(
    query: Tensor, _c: Tensor, _w: Tensor, _b: Tensor, heads: int, _r: list[int], _n: list[int]
) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), _no_sums(query, heads)


@_varying_window_attention_backward.register_fake
def _gradient_shapes(
    _grad: Tensor, query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, *_others: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, context, weight, bias))


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.sizes = inputs[4:]


def _gradients(ctx, grad: Tensor, _grad_lse: Tensor) -> tuple:
    return (*_varying_window_attention_backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None, None)


_varying_window_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def varying_window_attention(
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_heads: int,
    ratio: tuple[int, int],
    windows: tuple[int, int] = (8, 8),
) -> Tensor:
    """Attend from every window of a map to a context R times as high and wide around it.

    Along an axis of length L, with p = L / windows, the context of window k covers R p positions from ``k p`` on of the
    map with a copied border, ``m[(R + 1) p // 2 : R p] + m + m[-R p : -((R + 1) p // 2)]``, and its p tokens are blocks of
    R positions. The scores are scaled by the root of a head's channels. Under autocast everything takes the query's
    dtype; the softmax and the sums over windows run in float32 at least. A gradient of a gradient is not implemented.

    Determinism: every gradient is the same from run to run, bit for bit: nothing is summed by atomics.

    Args:
        query: (B, C, h, w), the projected queries, any float dtype; h and w are multiples of ``windows``.
        context: (B, C / (Ry Rx), h, w), the embedded map that contexts are cut from.
        weight: (2 C, C), the projections of a token to its key and its value, one above the other; the token's channels
            in the order (row in the block, column in the block, channel of the context).
        bias: (2 C,), their biases.
        num_heads: heads; each takes C / heads neighbouring channels.
        ratio: (Ry, Rx).
        windows: number of windows (down, across).

    Returns:
        (B, C, h, w), before any output projection; channels-last in memory.

    Raises:
        ValueError: shapes that disagree.
    """
    check_tensors("varying_window_attention", query=query, context=context, weight=weight, bias=bias)
    _check_shapes(query, context, weight, bias, num_heads, ratio, windows)
    context, weight, bias = (tensor.to(query.dtype) for tensor in (context, weight, bias))
    out, _ = _varying_window_attention(
        query.permute(0, 2, 3, 1), context, weight, bias, num_heads, list(ratio), list(windows)
    )
    return out.permute(0, 3, 1, 2)


def _check_shapes(
    query: Tensor,
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    heads: int,
    ratio: tuple[int, int],
    windows: tuple[int, int],
) -> None:
    if query.dim() != 4:
        raise ValueError(f"varying_window_attention: query {tuple(query.shape)} must be (B, C, h, w)")
    batch, channels, *size = query.shape
    if any(length % number for length, number in zip(size, windows, strict=True)):
        padded = " x ".join(str(-(-length // number) * number) for length, number in zip(size, windows, strict=True))
        raise ValueError(
            f"varying_window_attention: a map of {size[0]} x {size[1]} has no {windows[0]} x {windows[1]} windows of one "
            f"size; pad it to {padded}"
        )
    if channels % heads or channels % (ratio[0] * ratio[1]):
        raise ValueError(
            f"varying_window_attention: {channels} channels must be a multiple of num_heads={heads} and of the "
            f"{ratio[0]} x {ratio[1]} positions of a block"
        )
    wanted = {
        "context": (context, (batch, channels // (ratio[0] * ratio[1]), *size)),
        "weight": (weight, (2 * channels, channels)),
        "bias": (bias, (2 * channels,)),
    }
    for name, (tensor, shape) in wanted.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"varying_window_attention: {name} is {tuple(tensor.shape)}, but {shape} goes with query "
                f"{tuple(query.shape)} and ratio {tuple(ratio)}"
            )


__all__ = ["Backend", "Layout", "phases", "varying_window_attention"]

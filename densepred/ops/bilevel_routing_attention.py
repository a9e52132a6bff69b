"""Bi-level routing attention (BiFormer, CVPR 2023, arXiv:2303.08810, section 3.2): the tokens of a region attend to those of
the K regions that theirs is routed to.

The heads of a region are regions of their own with fewer channels, so all work is attention of rows (T tokens) on K rows
(S tokens each), some rows at a time: neither the K copies of keys and values nor the map of weights ever exist as a whole.
The backward computes the weights again from the log of their sum and adds the copies' gradients up.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from densepred.ops.backend import check_tensors, uses_triton
from densepred.ops.precision import sum_dtype

_BLOCK = {"cpu": 1 << 18}
"""Weights and gathered numbers held at a time, by device: what a core's cache takes. Elsewhere what keeps it busy."""
_LARGE_BLOCK = 1 << 26


def route_regions(q_region: Tensor, k_region: Tensor, topk: int) -> Tensor:
    """Return the ``topk`` regions whose keys fit a region's query best, without a gradient.

    Args:
        q_region, k_region: (B, R, D) one query and one key per region, usually the means over its tokens. Half precision is
            compared in float32.
        topk: 1 to R.

    Returns:
        (B, R, topk) int64, best first; regions that tie stand in any order.

    Raises:
        ValueError: ``topk`` out of range.
    """
    if not 1 <= topk <= k_region.shape[1]:
        raise ValueError(f"topk={topk}: choose 1 to {k_region.shape[1]}, the number of regions")
    dtype = sum_dtype(q_region, k_region)
    with torch.autocast(q_region.device.type, enabled=False):
        logits = q_region.detach().to(dtype) @ k_region.detach().to(dtype).transpose(1, 2)  # (B, R, R)
    return logits.topk(topk, dim=-1).indices


def _rows(tokens: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(B, R, T, C) -> (B * R * heads, T, C / heads), contiguous: a head of a region is a row."""
    rows = tokens.to(dtype).unflatten(-1, (heads, -1)).transpose(2, 3)  # (B, R, heads, T, C / heads)
    return rows.contiguous().flatten(0, 2)


def _tokens(rows: Tensor, like: Tensor, heads: int) -> Tensor:
    """(B * R * heads, T, C / heads) -> (B, R, T, C), contiguous and in the dtype of ``like`` (B, R, *, *)."""
    tokens = rows.unflatten(0, (*like.shape[:2], heads)).transpose(2, 3)
    return torch.empty(
        *like.shape[:2], rows.shape[1], heads * rows.shape[2], dtype=like.dtype, device=like.device
    ).copy_(tokens.flatten(3))


def _routed_rows(regions: Tensor, num_regions: int, heads: int) -> Tensor:
    """(B, R, K) regions -> (B * R * heads, K) rows of the keys."""
    image = torch.arange(len(regions), device=regions.device)[:, None, None] * num_regions
    head = torch.arange(heads, device=regions.device)[:, None]
    return ((regions + image)[:, :, None] * heads + head).flatten(0, 2)


def _blocks(routed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield some query rows at a time: which, their key rows (n * K,), and the keys and values (n, K * S, C) gathered."""
    keys = routed.shape[1] * k.shape[1]
    largest = keys * max(q.shape[1], k.shape[2], v.shape[2])
    step = max(1, _BLOCK.get(q.device.type, _LARGE_BLOCK) // max(1, largest))
    for start in range(0, len(routed), step):
        index = routed[start : start + step].flatten()
        rows = slice(start, start + step)
        yield rows, index, *(part.index_select(0, index).view(-1, keys, part.shape[2]) for part in (k, v))


def _attend(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int, scale: float) -> tuple[Tensor, Tensor]:
    dtype = sum_dtype(q, k, v)
    query, key, value = (_rows(tokens, heads, dtype) for tokens in (q, k, v))
    query = query * scale
    out, log_sum = query.new_empty(*query.shape[:2], value.shape[2]), query.new_empty(query.shape[:2])
    for rows, _, keys, values in _blocks(_routed_rows(regions, k.shape[1], heads), query, key, value):
        weights = torch.bmm(query[rows], keys.transpose(1, 2))  # (n, T, K * S)
        largest = weights.amax(2, keepdim=True)
        total = weights.sub_(largest).exp_().sum(2, keepdim=True)
        torch.bmm(weights, values, out=out[rows]).div_(total)
        log_sum[rows] = total.log_().add_(largest).squeeze(2)
    return _tokens(out, v, heads), log_sum.view(*q.shape[:2], heads, q.shape[2])


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    out: Tensor,
    log_sum: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = log_sum.dtype
    query, key, value, slope = (_rows(tokens, heads, dtype) for tokens in (q, k, v, grad))
    query = query * scale
    mean = (slope * _rows(out, heads, dtype)).sum(2, keepdim=True)  # of what each key's weight is worth to the output
    log_sum = log_sum.flatten(0, 2)[..., None]  # (rows, T, 1)
    grads = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for rows, index, keys, values in _blocks(_routed_rows(regions, k.shape[1], heads), query, key, value):
        weights = torch.bmm(query[rows], keys.transpose(1, 2)).sub_(log_sum[rows]).exp_()  # (n, T, K * S)
        changes = torch.bmm(slope[rows], values.transpose(1, 2)).sub_(mean[rows]).mul_(weights)
        torch.bmm(changes, keys, out=grads[0][rows]).mul_(scale)
        for total, share, tokens in ((grads[1], changes, query), (grads[2], weights, slope)):
            copies = torch.bmm(share.transpose(1, 2), tokens[rows])  # (n, K * S, C / heads)
            total.index_add_(0, index, copies.view(len(index), *total.shape[1:]))
    return tuple(_tokens(rows, tokens, heads) for rows, tokens in zip(grads, (q, k, v), strict=True))


class Backend(NamedTuple):
    """The two halves of one implementation.

    Attributes:
        forward: (q, k, v, regions, heads, scale) -> (out, log_sum); out (B, R, T, C) in the dtype of v, log_sum
            (B, R, heads, T), the log of the sum of the exponentials of the scaled logits, in float32 (float64 where an
            input is). Both contiguous.
        backward: (gradient of out, q, k, v, regions, out, log_sum, heads, scale) -> the gradients of q, k and v in their
            dtypes, contiguous.
    """

    forward: Callable[[Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


_EAGER = Backend(_attend, _attend_backward)


_WIDEST_HEAD = 256
"""Channels of a head that the kernels hold in registers."""


def _implementation(heads: int, *tensors: Tensor) -> Backend:
    widest = max(tensor.shape[-1] // heads for tensor in tensors)
    unfit = f"a head of {widest} channels is wider than {_WIDEST_HEAD}" if widest > _WIDEST_HEAD else None
    if uses_triton("bilevel_routing_attention", tensors, unfit):
        from densepred.ops.kernels import bilevel_routing_attention as kernels  # lazily: Triton need not be installed

        return Backend(kernels.forward, kernels.backward)
    return _EAGER


@torch.library.custom_op("densepred::bilevel_routing_attention", mutates_args=())
def _bilevel_routing_attention(
    q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    _check_range(regions, k.shape[1])
    with torch.autocast(v.device.type, enabled=False):
        return _implementation(heads, q, k, v).forward(q, k, v, regions, heads, scale)


@torch.library.custom_op("densepred::bilevel_routing_attention_backward", mutates_args=())
def _bilevel_routing_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    regions: Tensor,
    out: Tensor,
    log_sum: Tensor,
    heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(v.device.type, enabled=False):
        return _implementation(heads, q, k, v).backward(grad, q, k, v, regions, out, log_sum, heads, scale)


@_bilevel_routing_attention.register_fake
def _output_shapes(
    q: Tensor, k: Tensor, v: Tensor, _regions: Tensor, heads: int, _scale: float
) -> tuple[Tensor, Tensor]:
    batch, regions, tokens, _ = q.shape
    log_sum = v.new_empty((batch, regions, heads, tokens), dtype=sum_dtype(q, k, v))
    return v.new_empty((batch, regions, tokens, v.shape[-1])), log_sum


@_bilevel_routing_attention_backward.register_fake
def _gradient_shapes(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(tokens.new_empty(tokens.shape) for tokens in (q, k, v))


def _save_for_backward(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.numbers = inputs[4:]
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    return *_bilevel_routing_attention_backward(grad, *ctx.saved_tensors, *ctx.numbers), None, None, None


_bilevel_routing_attention.register_autograd(_gradients, setup_context=_save_for_backward)


def bilevel_routing_attention(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int, scale: float) -> Tensor:
    """Let every region's tokens attend, head by head, to all tokens of the regions named for it.

    The softmax runs in float32 (float64 where an input is). Memory grows with the tokens, neither with K nor with the
    number of weights. A gradient of a gradient is not implemented.

    Determinism: the kernels give the same bits in every run; the eager backward adds in the order of the regions on a CPU,
    on a GPU with atomics unless ``torch.use_deterministic_algorithms(True)``.

    Args:
        q: (B, R, T, D) queries region by region, any float dtype.
        k: (B, R, S, D) keys region by region; S need not be T.
        v: (B, R, S, C) values.
        regions: (B, R, K) int64, the regions of k that each region of q attends to, 0 to R - 1; one named twice counts
            twice. The range is checked on a CPU only, as elsewhere it would stop the device.
        heads: consecutive blocks of D / heads and C / heads channels.
        scale: factor on the dot products.

    Returns:
        (B, R, T, C) in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or devices that disagree, channels that ``heads`` does not divide, a region out of range.
    """
    check_tensors("bilevel_routing_attention", q=q, k=k, v=v)
    _check_shapes(q, k, v, regions, heads)
    return _bilevel_routing_attention(q, k, v, regions, heads, scale)[0]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int) -> None:
    if not (
        q.dim() == k.dim() == v.dim() == 4
        and q.shape[:2] == k.shape[:2] == v.shape[:2]
        and q.shape[3] == k.shape[3]
        and k.shape[2] == v.shape[2] > 0
    ):
        raise ValueError(
            f"bilevel_routing_attention: q {tuple(q.shape)} must be (B, R, T, D), k {tuple(k.shape)} (B, R, S, D) and v "
            f"{tuple(v.shape)} (B, R, S, C), S at least 1"
        )
    if (
        regions.dim() != 3
        or regions.shape[:2] != q.shape[:2]
        or not regions.shape[2]
        or regions.dtype != torch.int64
        or regions.device != q.device
    ):
        raise ValueError(
            f"bilevel_routing_attention: regions is {regions.dtype} {tuple(regions.shape)} on {regions.device}, it must be "
            f"int64 (B, R, K) = ({q.shape[0]}, {q.shape[1]}, 1 or more) on {q.device}"
        )
    if heads < 1 or q.shape[3] % heads or v.shape[3] % heads:
        raise ValueError(
            f"bilevel_routing_attention: heads={heads} must divide {q.shape[3]} (queries and keys) and {v.shape[3]} "
            "(values) channels"
        )


def _check_range(regions: Tensor, num_regions: int) -> None:
    if regions.device.type == "cpu" and regions.numel():
        lowest, highest = (int(end) for end in torch.aminmax(regions))
        if lowest < 0 or highest >= num_regions:
            raise ValueError(
                f"bilevel_routing_attention: regions holds {lowest if lowest < 0 else highest}, but regions count from 0 "
                f"to {num_regions - 1}"
            )


__all__ = ["Backend", "bilevel_routing_attention", "route_regions"]

"""What the kernels of varying window attention share: the grid of tokens, who reads which, and products of tiles.

Along each axis the blocks of all phases stand one behind the other, so that the phases' tokens are one grid of Ny x Nx, in
which window (k, l) reads the p x p tokens from ``(firsts[k], firsts[rows + l])`` on. `_cut` copies a line of the map's
positions into tokens, once a value; `_paste` adds up at a position the gradients of the tokens that hold it, from lists
made on the host, so that its sums have one order. Both move each value once: for maps of 128 x 256 x 512 and R = 2 these are
8 MB of bfloat16, which two microseconds of an H200 read and two write, so that nothing would be won by cutting tokens inside
the projection.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from densepred.ops.varying_window_attention import Layout, phases

LOG2E = 1.4426950408889634
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
TOKENS = 64
"""Tokens of the grid that a program of the backward owns."""


@triton.jit
def _high(x):
    """The part of float32 numbers that a tensor core takes: TF32, by truncation."""
    return (x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def add_product(a: tl.tensor, b: tl.tensor, sums: tl.tensor) -> tl.tensor:
    """``sums + a @ b``; float32 as three products of TF32, leaving out that of both low parts."""
    if a.dtype == tl.float32:
        a_high, b_high = _high(a), _high(b)
        sums = tl.dot(a - a_high, b_high, sums, input_precision="tf32")
        sums = tl.dot(a_high, b - b_high, sums, input_precision="tf32")
        sums = tl.dot(a_high, b_high, sums, input_precision="tf32")
    elif INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    else:
        sums = tl.dot(a, b, sums, input_precision="ieee")
    return sums


@triton.jit
def convert(x: tl.tensor, TYPE: tl.constexpr) -> tl.tensor:
    """Round float32 numbers to a type."""
    if INTERPRETED and tl.bfloat16 == TYPE:  # the interpreter truncates
        bits = x.to(tl.int32, bitcast=True)
        x = (bits + 32767 + ((bits >> 16) & 1) & -65536).to(tl.float32, bitcast=True)
    return x.to(TYPE)


@triton.jit
def locate(index: tl.tensor, row: tl.tensor, column: tl.tensor, side: tl.tensor, line: tl.tensor) -> tl.tensor:
    """Return where the elements of a window of ``side`` columns lie in a grid of ``line`` columns."""
    return (row + index // side) * line + column + index % side


@triton.jit
def find_window(
    program: tl.tensor, firsts: tl.tensor, HEADS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tuple:
    """Return the head, the window's place, the image, and the window's first token."""
    head = program % HEADS
    window = program // HEADS
    column = window % COLUMNS
    row = window // COLUMNS % ROWS
    image = (window // (COLUMNS * ROWS)).to(tl.int64)
    return head, row, column, image, tl.load(firsts + row), tl.load(firsts + ROWS + column)


@triton.jit
def find_reader(
    step: tl.tensor,
    tiles: tl.tensor,
    tile_row: tl.tensor,
    tile_column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    most_down: tl.tensor,
    most_across: tl.tensor,
) -> tl.tuple:
    """Return a pair of window and tile of its queries from the lists of the windows that read a tile of tokens."""
    window = step // tiles
    number = tl.load(columns + tile_column * most_across)
    row = tl.load(rows + tile_row * most_down + 1 + window // number)
    column = tl.load(columns + tile_column * most_across + 1 + window % number)
    return row, column, step % tiles


@triton.jit
def share_steps(
    tile_row: tl.tensor,
    tile_column: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    most_down: tl.tensor,
    most_across: tl.tensor,
    tiles: tl.tensor,
    part: tl.tensor,
    parts: tl.tensor,
) -> tl.tuple:
    """Return the first and the last but one step that a program takes out of all that a tile of tokens needs."""
    steps = tl.load(rows + tile_row * most_down) * tl.load(columns + tile_column * most_across) * tiles
    first = tl.cdiv(steps, parts) * part
    return first, tl.minimum(first + tl.cdiv(steps, parts), steps)


@triton.jit(do_not_specialize=["height", "width", "lines", "places"])
def _cut(context, tokens, down, across, image_step, channel_step, row_step, column_step, height, width, lines, places,
         CHANNELS: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Copy a line of positions of a map (B, c, h, w) into tokens (B, Ny, Nx, RY * RX * c)."""
    line, image = tl.program_id(0) % lines, (tl.program_id(0) // lines).to(tl.int64)
    i = tl.program_id(1) * BX + tl.arange(0, BX)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    y = tl.load(down + line + tl.zeros_like(i))
    x = tl.load(across + i, mask=i < places, other=width)
    there = (c < CHANNELS)[:, None] & ((x < width) & (y < height))[None, :]
    source = image * image_step + y[None, :].to(tl.int64) * row_step + c[:, None].to(tl.int64) * channel_step
    values = tl.load(context + source + x[None, :] * column_step, mask=there, other=0.0)
    token = (image * (lines // RY) + line // RY) * (places // RX) + i // RX
    column = (line % RY * RX + i % RX) * CHANNELS
    target = (token * (RY * RX * CHANNELS) + column)[:, None] + c[None, :]
    tl.store(tokens + target, tl.trans(values), mask=(i < places)[:, None] & (c < CHANNELS)[None, :])


@triton.jit(do_not_specialize=["height", "width", "lines", "places", "most_down", "most_across"])
def _paste(tokens, grad, down, across, height, width, lines, places, most_down, most_across,
           CHANNELS: tl.constexpr, RY: tl.constexpr, RX: tl.constexpr, BX: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Add up at every position of a map (B, c, h, w) the gradients of the tokens that hold it."""
    y, image = tl.program_id(0) % height, (tl.program_id(0) // height).to(tl.int64)
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    c = tl.program_id(2) * BC + tl.arange(0, BC)
    total = tl.zeros((BX, BC), tl.float32)
    for j in range(most_down):
        line = tl.load(down + y * most_down + j + tl.zeros_like(x))
        for k in range(most_across):
            i = tl.load(across + x * most_across + k, mask=x < width, other=-1)
            token = (image * (lines // RY) + line // RY) * (places // RX) + i // RX
            column = (line % RY * RX + i % RX) * CHANNELS
            source = (token * (RY * RX * CHANNELS) + column)[:, None] + c[None, :]
            there = ((line >= 0) & (i >= 0))[:, None] & (c < CHANNELS)[None, :]
            total += tl.load(tokens + source, mask=there, other=0.0).to(tl.float32)
    target = ((image * CHANNELS + c[:, None]) * height + y) * width + x[None, :]
    tl.store(
        grad + target,
        tl.trans(convert(total, grad.dtype.element_ty)),
        mask=(c < CHANNELS)[:, None] & (x < width)[None, :],
    )


class _Axis(NamedTuple):
    """What kernels know of one axis; tensors of int32."""

    tokens: int
    positions: Tensor  # of the blocks, R each; the map's length stands for a zero
    firsts: Tensor  # of every window's context
    holders: Tensor  # (length, most): the numbers among the positions that hold one, else -1


@lru_cache(maxsize=256)
def _lines(side: int, windows: int, ratio: int) -> tuple[list[int], list[int]]:
    """Return the positions of all phases' blocks along an axis, and the first block of every window."""
    positions, firsts = [], [0] * windows
    for phase in phases(side, windows, ratio):
        for window, first in zip(range(windows)[phase.windows], phase.firsts, strict=True):
            firsts[window] = len(positions) // ratio + first
        positions += phase.positions
    return positions, firsts


@lru_cache(maxsize=256)
def _axis(side: int, windows: int, ratio: int, device: torch.device) -> _Axis:
    positions, firsts = _lines(side, windows, ratio)
    holders = [[] for _ in range(side * windows + 1)]
    for number, position in enumerate(positions):
        holders[position].append(number)
    held = _rectangle(holders[:-1])
    tensors = (torch.tensor(numbers, dtype=torch.int32, device=device) for numbers in (positions, firsts, held))
    return _Axis(len(positions) // ratio, *tensors)


def _rectangle(lists: list[list[int]]) -> list[list[int]]:
    most = max(map(len, lists))
    return [numbers + [-1] * (most - len(numbers)) for numbers in lists]


@lru_cache(maxsize=1024)
def _readers(side: int, windows: int, ratio: int, tile: int) -> list[list[int]]:
    """Return for every ``tile`` tokens along an axis the windows that read one of them."""
    positions, firsts = _lines(side, windows, ratio)
    starts = range(0, len(positions) // ratio, tile)
    return [[w for w, first in enumerate(firsts) if start - side < first < start + tile] for start in starts]


@lru_cache(maxsize=256)
def _reader_table(side: int, windows: int, ratio: int, tile: int, device: torch.device) -> Tensor:
    """Return (tiles, 1 + most) in int32: how many windows, and which."""
    readers = [[len(numbers), *numbers] for numbers in _readers(side, windows, ratio, tile)]
    return torch.tensor(_rectangle(readers), dtype=torch.int32, device=device)


@lru_cache(maxsize=256)
def _tile_shape(layout: Layout) -> tuple[int, int]:
    """Return the sides of `TOKENS` tokens that the fewest pairs of tile and window come of."""
    axes = list(zip(layout.side, layout.windows, layout.ratio, strict=True))

    def pairs(shape: tuple[int, int]) -> int:
        down, across = (sum(map(len, _readers(*axis, tile))) for axis, tile in zip(axes, shape, strict=True))
        return down * across

    return min(((TOKENS // 2**i, 2**i) for i in range(TOKENS.bit_length())), key=pairs)


class Plan(NamedTuple):
    """All that depends on sizes alone; made once for a size and device."""

    down: _Axis
    across: _Axis
    firsts: Tensor  # of the contexts down, then across
    tile: tuple[int, int]  # of tokens, in the backward
    readers: tuple[Tensor, Tensor]  # of every line of such tiles, down and across

    @property
    def grid(self) -> int:
        return self.down.tokens * self.across.tokens


@lru_cache(maxsize=64)
def make_plan(layout: Layout, device: torch.device) -> Plan:
    sizes = list(zip(layout.side, layout.windows, layout.ratio, strict=True))
    down, across = (_axis(*numbers, device) for numbers in sizes)
    tile = _tile_shape(layout)
    readers = tuple(_reader_table(*numbers, length, device) for numbers, length in zip(sizes, tile, strict=True))
    return Plan(down, across, torch.cat([down.firsts, across.firsts]), tile, readers)


def cut_tokens(context: Tensor, plan: Plan, layout: Layout) -> Tensor:
    """Return all phases' tokens (B, Ny, Nx, C)."""
    batch, channels, height, width = context.shape
    (ry, rx), down, across = layout.ratio, plan.down.tokens, plan.across.tokens
    tokens = torch.empty(batch, down, across, ry * rx * channels, dtype=context.dtype, device=context.device)
    bc = min(64, triton.next_power_of_2(channels))
    bx = min(4096 // bc, 256)
    grid = (batch * down * ry, triton.cdiv(across * rx, bx), triton.cdiv(channels, bc))
    _cut[grid](
        *(context, tokens, plan.down.positions, plan.across.positions, *context.stride()),
        *(height, width, down * ry, across * rx, channels, ry, rx, bx, bc),
    )
    return tokens


def add_tokens(slopes: Tensor, context: Tensor, plan: Plan, layout: Layout) -> Tensor:
    """Return the gradient of the context from that of all tokens (B * Ny * Nx, C)."""
    batch, channels, height, width = context.shape
    grad = torch.empty(context.shape, dtype=context.dtype, device=context.device)
    (ry, rx), (down, across) = layout.ratio, (plan.down, plan.across)
    bc = min(64, triton.next_power_of_2(channels))
    bx = min(2048 // bc, 128)
    grid = (batch * height, triton.cdiv(width, bx), triton.cdiv(channels, bc))
    _paste[grid](
        *(slopes, grad, down.holders, across.holders, height, width, down.tokens * ry, across.tokens * rx),
        *(down.holders.shape[1], across.holders.shape[1], channels, ry, rx, bx, bc),
    )
    return grad


class Call(NamedTuple):
    """One call of attention, without its projections."""

    queries: Tensor  # (B, h, w, C), contiguous
    pairs: Tensor  # (B, Ny, Nx, 2 C), keys and values
    plan: Plan
    layout: Layout

    @property
    def precise(self) -> bool:
        return self.queries.dtype == torch.float32

    @property
    def depth(self) -> int:
        return self.queries.shape[3] // self.layout.heads

    @property
    def count(self) -> int:
        """Queries of a window, and tokens that it reads."""
        return self.layout.side[0] * self.layout.side[1]

    @property
    def windows(self) -> int:
        """Windows of all heads and images."""
        return len(self.queries) * self.layout.windows[0] * self.layout.windows[1] * self.layout.heads

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """A window's sides, tokens in a line, and in all."""
        return (*self.layout.side, self.plan.across.tokens, self.plan.grid)

    @property
    def constants(self) -> dict[str, int]:
        (rows, columns), heads = self.layout.windows, self.layout.heads
        return dict(HEADS=heads, DEPTH=self.depth, ROWS=rows, COLUMNS=columns)

    @property
    def factor(self) -> float:
        return self.depth**-0.5

    @property
    def tiles(self) -> int:
        """Tiles of `TOKENS` tokens, of all heads and images."""
        return len(self.plan.readers[0]) * len(self.plan.readers[1]) * self.layout.heads * len(self.queries)

    def side(self, most: int) -> int:
        """Return the side of a tile of a window's queries or tokens; above 64 only where that pads nothing."""
        while most > 64 and self.count % most:
            most //= 2
        return max(16, min(most, triton.next_power_of_2(self.count)))

    def token_slopes(self, parts: int, tile: int) -> Tensor:
        """Return memory for the gradients of keys and values in ``parts``, no more than pairs of window and tile.

        They are in float32 where they are to be summed, else in the dtype that products by them run in.
        """
        steps = (self.plan.readers[0].shape[1] - 1) * (self.plan.readers[1].shape[1] - 1) * -(-self.count // tile)
        parts = max(1, min(parts, steps))
        dtype = torch.float32 if parts > 1 else self.pairs.dtype
        return torch.empty(parts, *self.pairs.shape, dtype=dtype, device=self.pairs.device)


__all__ = [
    "LOG2E",
    "Call",
    "Plan",
    "add_product",
    "add_tokens",
    "convert",
    "cut_tokens",
    "find_reader",
    "find_window",
    "locate",
    "make_plan",
    "share_steps",
]

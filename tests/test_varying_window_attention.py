"""The op of VWFormer against an unfolded form written here, and against the published code's numbers and gradients."""

import itertools
import random
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.ops import varying_window_attention
from densepred.ops.varying_window_attention import phases
from tests import parity

MODULE = sys.modules[varying_window_attention.__module__]
META, EXPECTED = parity.case(parity.CASES / "varying_window_attention")


def padded(x: Tensor, dim: int, side: int, ratio: int, windows: int) -> Tensor:
    """Copy-shift padding of one axis, as the paper's code does it."""
    near, reach, wide = (ratio + 1) * side // 2, ratio * side, x
    if ratio > windows:
        missing = reach - x.shape[dim]
        wide = F.pad(x, (*[0, 0] * (x.dim() - 1 - dim), missing // 2, missing - missing // 2))
    left = wide.narrow(dim, near, reach - near)
    right = wide.narrow(dim, wide.shape[dim] - reach, reach - near)
    return torch.cat([left, x, right], dim)


def contexts(context: Tensor, ratio, windows) -> Tensor:
    """Return the tokens of every window, (B, windows, windows, p, p, C)."""
    (ry, rx), (rows, columns) = ratio, windows
    py, px = (length // number for length, number in zip(context.shape[-2:], windows, strict=True))
    full = padded(padded(context, 3, px, rx, columns), 2, py, ry, rows)
    down, across = (full.shape[2] - ry * py) // py + 1, (full.shape[3] - rx * px) // px + 1
    unfolded = F.unfold(full, (ry * py, rx * px), stride=(py, px))
    blocks = unfolded.view(len(context), -1, py, ry, px, rx, down, across)[..., :rows, :columns]
    return blocks.permute(0, 6, 7, 2, 4, 3, 5, 1).flatten(5)


def unfolded_form(query: Tensor, context: Tensor, weight: Tensor, bias: Tensor, heads, ratio, windows=(8, 8)) -> Tensor:
    """Attention of every window to its unfolded, projected context."""
    (rows, columns), (batch, _, *size) = windows, query.shape
    py, px = size[0] // rows, size[1] // columns
    projected = F.linear(contexts(context, ratio, windows), weight, bias).flatten(3, 4)  # (B, n, n, P, 2 C)
    keys, values = projected.unflatten(-1, (2, heads, -1)).permute(4, 0, 1, 2, 5, 3, 6)  # (B, n, n, heads, P, d)
    windowed = query.view(batch, heads, -1, rows, py, columns, px).permute(0, 3, 5, 1, 4, 6, 2)
    queries = windowed.flatten(4, 5)  # (B, n, n, heads, P, d)
    weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)
    out = (weights @ values).unflatten(4, (py, px))
    return out.permute(0, 3, 6, 1, 4, 2, 5).reshape(query.shape)


def inputs(ratio, windows, side, heads=1, batch=1, dtype=torch.float64, depth=1):
    """Return the arguments of the op with ``depth`` channels of context a head."""
    channels, size = ratio[0] * ratio[1] * heads * depth, (windows[0] * side[0], windows[1] * side[1])
    shapes = ((batch, channels, *size), (batch, heads * depth, *size), (2 * channels, channels), (2 * channels,))
    tensors = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]
    return *tensors, heads, ratio, windows


def differentiate(function, arguments, grad):
    out = function(*arguments)
    return out, *torch.autograd.grad(out, arguments[:4], grad)


@pytest.mark.parametrize("seed", range(16))
def test_any_size_equals_the_unfolded_form(seed, monkeypatch):
    torch.manual_seed(seed)
    draw = random.Random(seed)
    monkeypatch.setitem(MODULE.MOST_SCORES, "cpu", draw.choice([20_000, 2**20]))
    arguments = inputs(
        ratio=draw.choice([(1, 2), (2, 2), (3, 2), (4, 3), (1, 8), (8, 1), (5, 2), (2, 7)]),
        windows=draw.choice([(8, 8), (3, 8), (8, 5), (4, 6)]),
        side=(draw.randint(1, 5), draw.randint(1, 8)),
        heads=draw.choice([1, 2]),
        batch=draw.choice([1, 2]),
    )
    grad = torch.randn_like(arguments[0])
    found = differentiate(varying_window_attention, arguments, grad)
    for mine, theirs in zip(found, differentiate(unfolded_form, arguments, grad), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11 * max(1.0, theirs.abs().max().item()))


@pytest.mark.parametrize(("side", "ratio"), itertools.product(range(1, 17), (2, 4, 8)))
def test_contexts_are_plain_slices_of_few_tokens(side, ratio):
    """Every window reads blocks in a row; where R divides the side, the map has about as many blocks as it is long by R."""
    line = torch.arange(8.0 * side).expand(1, 1, 8, -1)
    expected = contexts(line, (1, ratio), (8, 8))[0, 0].numpy()  # (windows, 1, p, R)
    found, seen = phases(side, 8, ratio), 0
    for phase in found:
        blocks = np.array(phase.positions).reshape(-1, ratio)
        assert len(np.unique(blocks, axis=0)) == len(blocks)
        for first, window in zip(phase.firsts, range(8)[phase.windows], strict=True):
            part = sorted(map(tuple, blocks[first : first + side]))
            assert part == sorted(map(tuple, expected[window, 0].astype(int)))
            seen += 1
    assert seen == 8
    if side % ratio == 0:
        tokens = sum(len(phase.positions) for phase in found) // ratio
        assert len(found) == 1 and 8 * side // ratio <= tokens <= 8 * side // ratio + 2


def test_with_as_many_windows_as_the_ratio_all_share_one_context():
    (phase,) = phases(8, 8, 8)
    assert set(phase.firsts) == {0} and len(phase.positions) == 64


class Branch(torch.nn.Module):
    """One branch of the published head, around the op."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.weights = torch.nn.ParameterDict()
        for name, shape in case["state_dict"]:
            self.weights[name.replace(".", "/")] = torch.nn.Parameter(torch.from_numpy(parity.fill(name, shape)))

    def get(self, name):
        return self.weights[name.replace(".", "/")]

    def norm(self, x, name):
        mean, var, weight, bias = (self.get(f"{name}.{s}") for s in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, mean.detach(), var.detach(), weight, bias)

    def forward(self, x):
        ry, rx = self.case["ratio"]
        pad = ((rx - 1) // 2, rx // 2, (ry - 1) // 2, ry // 2)
        embedded = F.conv2d(F.pad(x, pad), self.get("ds.0.conv.weight"))
        embedded = self.norm(embedded, "ds.0.bn").relu()
        query = F.conv2d(x, self.get("attn.0.theta.conv.weight"), self.get("attn.0.theta.conv.bias"))
        weight = torch.cat([self.get(f"attn.0.{n}.conv.weight") for n in ("phi", "g")]).flatten(1)
        bias = torch.cat([self.get(f"attn.0.{n}.conv.bias") for n in ("phi", "g")])
        windows = tuple(self.case["windows"])
        y = varying_window_attention(query, embedded, weight, bias, self.case["heads"], (ry, rx), windows)
        y = self.norm(F.conv2d(y, self.get("attn.0.conv_out.conv.weight")), "attn.0.conv_out.bn")
        return {"embedded": embedded, "context": contexts(embedded, (ry, rx), windows), "out": y}


@pytest.mark.parametrize("name", META["input"])
def test_parity_with_gradients(name):
    case = META["input"][name]
    branch = Branch(case)
    x = torch.from_numpy(parity.normal_input(case["x"]["seed"], case["x"]["shape"])).requires_grad_()
    found = branch(x)
    grad_out = torch.from_numpy(parity.normal_input(case["grad_out"]["seed"], case["grad_out"]["shape"]))
    found["out"].backward(grad_out)
    found["context"] = found["context"].flatten(0, 2).permute(0, 3, 1, 2)  # (B * windows, C, p, p)
    found["grad_x"] = x.grad
    found |= {f"grad.{key}": branch.get(key).grad for key, _ in case["state_dict"] if branch.get(key).grad is not None}
    outputs = {key: meta for key, meta in META["outputs"].items() if key.startswith(name + ".")}
    assert {key.removeprefix(name + ".") for key in outputs} <= set(found)
    for key, meta in outputs.items():
        value = parity.thin(found[key.removeprefix(name + ".")].detach().numpy(), meta)
        # The keys' bias moves all scores of a query alike: its gradient is 0 but for rounding.
        scale = max(1.0, np.abs(EXPECTED[key]).max())
        np.testing.assert_allclose(value, EXPECTED[key], rtol=0, atol=1e-11 * scale, err_msg=key)


@pytest.mark.parametrize("ratio", [(2, 2), (1, 4)])
def test_registered_as_an_operator(ratio):
    *tensors, heads, ratio, windows = inputs(ratio, (2, 3), (2, 3), heads=2, dtype=torch.float32)
    arguments = (
        tensors[0].detach().permute(0, 2, 3, 1).requires_grad_(),
        *tensors[1:],
        heads,
        list(ratio),
        list(windows),
    )
    torch.library.opcheck(torch.ops.densepred.varying_window_attention.default, arguments)
    plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    results = torch.ops.densepred.varying_window_attention(*plain)
    grad, tensors = torch.randn(arguments[0].shape), plain[:4]
    arguments = (grad, *tensors, *results, *plain[4:])
    torch.library.opcheck(torch.ops.densepred.varying_window_attention_backward.default, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(dtype):
    torch.manual_seed(0)
    exact = inputs((2, 2), (8, 8), (2, 2), heads=2, depth=4)
    half = [a.detach().to(dtype).requires_grad_() if isinstance(a, Tensor) else a for a in exact]
    grad = torch.randn_like(exact[0])
    found = differentiate(varying_window_attention, half, grad.to(dtype))
    expected = differentiate(
        varying_window_attention,
        [*(a.detach().to(dtype).double().requires_grad_() for a in exact[:4]), *exact[4:]],
        grad,
    )
    for i, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine.dtype == dtype and torch.isfinite(mine).all()
        assert (mine.double() - theirs).abs().max() < 0.05 * theirs.abs().max(), i


def test_autocast_takes_the_query_dtype():
    query, context, weight, bias, *rest = inputs((2, 2), (8, 8), (2, 2), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = varying_window_attention(query.to(torch.bfloat16), context, weight, bias, *rest)
        same = varying_window_attention(query, context, weight, bias, *rest)
    out.sum().backward()
    assert out.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    torch.testing.assert_close(same, varying_window_attention(query, context, weight, bias, *rest))


def test_compiles_and_exports_as_one_node():
    arguments = inputs((2, 2), (8, 8), (2, 2), dtype=torch.float32)

    class Op(torch.nn.Module):
        def forward(self, *tensors):
            return varying_window_attention(*tensors, *arguments[4:])

    program = torch.export.export(Op(), arguments[:4])
    torch.testing.assert_close(program.module()(*arguments[:4]), Op()(*arguments[:4]))
    assert sum("varying_window_attention" in str(node.target) for node in program.graph.nodes) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(query=(1, 4, 16, 20)), "16 x 20 has no 8 x 8 windows.*pad it to 16 x 24"),
        (dict(query=(1, 6, 16, 16)), "6 channels must be a multiple of num_heads=1 and of the 2 x 2"),
        (dict(context=(1, 2, 16, 16)), r"context is \(1, 2, 16, 16\), but \(1, 1, 16, 16\)"),
        (dict(weight=(4, 4)), r"weight is \(4, 4\), but \(8, 4\)"),
        (dict(query=(4, 16, 16)), r"must be \(B, C, h, w\)"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    shapes = dict(query=(1, 4, 16, 16), context=(1, 1, 16, 16), weight=(8, 4), bias=(8,)) | change
    with pytest.raises(ValueError, match=message):
        varying_window_attention(*(torch.zeros(shape) for shape in shapes.values()), 1, (2, 2))

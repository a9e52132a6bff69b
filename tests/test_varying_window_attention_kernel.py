"""The Triton kernels of varying window attention against the eager form in float64."""

import importlib

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from densepred.ops import varying_window_attention
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, poison_new_tensors, results

kernels, maps, tokens = (
    pytest.importorskip("triton") and importlib.import_module(f"densepred.ops.kernels.varying_window_{name}")
    for name in ("attention", "maps", "tokens")
)
TRAINED = (0, 1, 2, 3)


def arguments(ratio, windows, side, heads=1, batch=1, depth=1, channels_last=False, offset=1.0, seed=0):
    """Return the op's arguments with ``depth`` channels of context a head, and biases of size ``offset``."""
    random = torch.Generator().manual_seed(seed)
    narrow, size = heads * depth, (windows[0] * side[0], windows[1] * side[1])
    channels = narrow * ratio[0] * ratio[1]
    query, context = (torch.randn(batch, c, *size, generator=random) for c in (channels, narrow))
    weight = torch.randn(channels, 2 * channels, generator=random).t() / channels**0.5  # not contiguous
    bias = offset * torch.randn(2 * channels, generator=random)
    if channels_last:
        query, context = (x.contiguous(memory_format=torch.channels_last) for x in (query, context))
    return query, context, weight, bias, heads, ratio, windows


@st.composite
def shapes(draw):
    pairs = [(1, 1), (2, 2), (1, 3), (4, 1), (3, 2), (2, 4)]  # wider than the map where they pass the windows
    windows = draw(st.sampled_from([(1, 1), (2, 2), (1, 3), (3, 2), (4, 1)]))
    return dict(
        ratio=draw(st.sampled_from(pairs)),
        windows=windows,
        side=(draw(st.integers(1, 5)), draw(st.integers(1, 7))),
        heads=draw(st.integers(1, 2)),
        batch=draw(st.integers(1, 2 if windows in ((1, 1), (1, 3)) else 1)),
        depth=draw(st.integers(1, 3)),
        channels_last=draw(st.booleans()),
    )


def use_small_tiles(patch: pytest.MonkeyPatch) -> None:
    """Let windows of more than 16 tokens need several tiles."""
    patch.setattr(tokens.Call, "side", lambda call, most: 16)


@given(shapes(), st.booleans(), st.booleans(), st.sampled_from([1, 512]), st.sampled_from(DTYPES))
@example(dict(ratio=(2, 2), windows=(2, 2), side=(4, 5), heads=1, depth=2), True, True, 1, torch.float32)
@example(dict(ratio=(2, 3), windows=(2, 2), side=(3, 3), heads=2, depth=3), False, True, 1, torch.bfloat16)
@settings(RANDOM_SHAPES, max_examples=200 if DEVICE.type == "cuda" else 8)
def test_equals_the_eager_form(shape, wide, small, programs, dtype):
    given_arguments = arguments(**shape)
    before = [x.clone() for x in given_arguments[:4]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "WIDEST_HEAD", 0 if wide else 128)
        for module in (kernels, maps):
            patch.setattr(module, "PROGRAMS", programs)
        if small:
            use_small_tiles(patch)
        check_kernel(varying_window_attention, given_arguments, TRAINED, dtype)
    for now, then in zip(given_arguments, before, strict=False):
        assert torch.equal(now, then)


@pytest.mark.parametrize("wide", [False, True])
def test_keys_and_values_far_from_zero_cost_no_digits(wide, monkeypatch):
    """A softmax leaves out what all keys share, but a gradient from rounded outputs would hold some of it."""
    monkeypatch.setattr(kernels, "WIDEST_HEAD", 0 if wide else 128)
    check_kernel(
        varying_window_attention, arguments((1, 1), (1, 1), (16, 20), depth=16, offset=2.0), TRAINED, torch.bfloat16
    )


@pytest.mark.parametrize("depth", [40, 160])
def test_heads_that_are_no_power_of_two(depth):
    check_kernel(varying_window_attention, arguments((1, 1), (2, 1), (3, 4), depth=depth), TRAINED, torch.float32)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_query_spoils_its_own_output_alone(value, monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    query, *rest = arguments((2, 2), (2, 2), (3, 3), heads=2)
    query[0, :, 1, 2] = value
    out = varying_window_attention(query.to(DEVICE), *(x.to(DEVICE) for x in rest[:3]), *rest[3:])
    spoilt = ~out.isfinite().all(1)[0].cpu()
    assert spoilt[1, 2] and spoilt.sum() == 1


@pytest.mark.parametrize("argument", [0, 1, 2, 3])
def test_numbers_that_are_none_read_nothing_outside(argument, monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    inputs = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments((2, 1), (2, 2), (2, 3))]
    inputs[argument] = torch.full_like(inputs[argument], torch.nan)
    out, *gradients = results(varying_window_attention, inputs, TRAINED, torch.ones(inputs[0].shape))
    assert out.isnan().all() and gradients[0].isnan().all()


def test_no_images_give_empty_results(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    inputs = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments((2, 2), (2, 2), (2, 2), batch=0)]
    out, *gradients = results(varying_window_attention, inputs, TRAINED, torch.ones(inputs[0].shape))
    assert out.shape == inputs[0].shape and not gradients[2].any()


@pytest.mark.parametrize("wide", [False, True])
def test_gradients_are_the_same_from_run_to_run(wide, monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    monkeypatch.setattr(kernels, "WIDEST_HEAD", 0 if wide else 128)
    inputs = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments((2, 2), (2, 2), (4, 4))]
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        first, second = (
            results(varying_window_attention, inputs, TRAINED, torch.ones(inputs[0].shape)) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("sizes", [(8, 8, 2), (16, 8, 4), (10, 8, 4), (5, 8, 8), (3, 2, 4)])
def test_every_tile_knows_the_windows_that_read_it(sizes):
    (side, _, ratio), (positions, firsts) = sizes, tokens._lines(*sizes)
    for tile in (1, 4, 16):
        found = tokens._readers(*sizes, tile)
        read = [{w for w, f in enumerate(firsts) if f <= token < f + side} for token in range(len(positions) // ratio)]
        assert found == [sorted(set().union(*read[i : i + tile])) for i in range(0, len(read), tile)]


def test_registered_as_an_operator(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    *inputs, heads, ratio, windows = arguments((2, 1), (1, 2), (2, 3), heads=2)
    inputs = [x.to(DEVICE) for x in (inputs[0].permute(0, 2, 3, 1), *inputs[1:])]
    sizes = (heads, list(ratio), list(windows))
    out, lse = torch.ops.densepred.varying_window_attention(*inputs, *sizes)
    backward = torch.ops.densepred.varying_window_attention_backward.default
    torch.library.opcheck(backward, (torch.randn_like(out), *inputs, out, lse, *sizes))
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.library.opcheck(torch.ops.densepred.varying_window_attention.default, (*leaves, *sizes))


def test_nothing_unwritten_is_read_where_the_queries_lie_in_the_result(monkeypatch):
    """Half of the channels, and every other image: strides that no copy has."""
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    inputs = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments((2, 2), (2, 2), (2, 2), depth=2)]
    query = torch.cat([inputs[0], inputs[0]], 1).repeat(2, 1, 1, 1)[::2, ::2]
    expected = varying_window_attention(query.contiguous(), *inputs[1:])
    poison_new_tensors(monkeypatch)
    torch.testing.assert_close(varying_window_attention(query, *inputs[1:]), expected)

"""The Triton kernels of multi-scale deformable attention, plain and fused, against the eager forms in float64."""

import importlib
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from densepred.decoders.deformable import DeformablePixelDecoder
from densepred.ops import ms_deform_attn as public
from densepred.ops.ms_deform_attn import ms_deform_attn_fused
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, results

pytest.importorskip("triton")
kernels = importlib.import_module("densepred.ops.kernels.ms_deform_attn")
ops = importlib.import_module("densepred.ops.ms_deform_attn")
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
PLAIN, FUSED = (0, 3, 4), (0, 4, 5)
FEW = settings(RANDOM_SHAPES, max_examples=200 if DEVICE.type == "cuda" else 9)
LONG = (math.isqrt(2**23) // 8 * 8, 2**23 // (math.isqrt(2**23) // 8 * 8) + 2)
"""A level of more than 2^23 pixels, hence with 256 channels more than 2^31 elements."""


def levels(sides) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor(sides, dtype=torch.int64)
    return shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)


def plain_arguments(
    sides, queries=None, batch=1, heads=1, depth=4, points=2, reach=1.5, gap=0, seed=0
) -> tuple[Tensor, ...]:
    """Return the op's arguments; locations in the middle plus or minus ``reach`` / 2, ``gap`` rows behind the levels."""
    random = torch.Generator().manual_seed(seed)
    shapes, starts = levels(sides)
    pixels = int(shapes.prod(1).sum()) + gap
    size = (batch, pixels if queries is None else queries, heads, len(sides), points)
    value = torch.randn(batch, pixels, heads, depth, generator=random)
    locations = 0.5 + reach * (torch.rand(*size, 2, generator=random) - 0.5)
    return value, shapes, starts, locations, torch.randn(size, generator=random)


def fused_arguments(*, shared=False, sharp=2.0, **shape) -> tuple[Tensor, ...]:
    """Return the fused op's arguments; ``shared`` reference points, logits of size ``sharp``."""
    value, shapes, starts, locations, weights = plain_arguments(**shape)
    references = locations[: 1 if shared else None, :, 0, :, 0].contiguous()
    return value, shapes, starts, references, 3 * weights[..., None] * locations, sharp * weights


@st.composite
def problems(draw):
    side = st.tuples(st.integers(1, 9), st.integers(1, 9))
    sides = draw(st.lists(side, min_size=1, max_size=3))
    if len(sides) > 1 and draw(st.booleans()):
        sides[draw(st.integers(0, len(sides) - 1))] = draw(st.sampled_from([(0, 0), (0, 3), (2, 0)]))
    heads = draw(st.integers(1, 2))
    return dict(
        sides=sides,
        queries=draw(st.sampled_from([None, 1, 5])),
        batch=draw(st.integers(1, 3 - heads)),
        heads=heads,
        depth=draw(st.sampled_from([1, 3, 4, 8, 11, 32])),
        points=draw(st.integers(1, 2 if len(sides) > 1 else 4)),
        reach=draw(st.sampled_from([1.0, 1.5, 20.0])),
        seed=draw(st.integers(0, 99)),
    )


@given(problems(), st.booleans(), st.sampled_from(DTYPES))
@example(dict(sides=[(9, 11), (2, 3)], points=1, depth=2), True, torch.float32)  # bands of 8 rows, one of 1
@example(dict(sides=[(3, 5)], gap=9, points=1), False, torch.bfloat16)  # as many queries as rows, which are not pixels
@example(dict(sides=[(4, 3)], queries=3, points=8, depth=5), False, torch.float16)
@FEW
def test_equals_the_eager_form(problem, wide, dtype):
    arguments = plain_arguments(**problem)
    with pytest.MonkeyPatch.context() as patch:
        if wide:
            patch.setattr(kernels, "WIDE_FROM", 0)
        check_kernel(public, arguments, PLAIN, dtype, TOLERANCE[dtype])


@given(problems(), st.booleans(), st.sampled_from(DTYPES))
@example(dict(sides=[(7, 5)], queries=3, points=1, depth=2), True, torch.float32)  # a softmax over one sample
@example(dict(sides=[(7, 5), (3, 2)], queries=3, sharp=3e4), True, torch.float32)  # and over one that outweighs all
@FEW
def test_fused_equals_its_eager_form(problem, shared, dtype):
    check_kernel(ms_deform_attn_fused, fused_arguments(shared=shared, **problem), FUSED, dtype, 2 * TOLERANCE[dtype])


@pytest.mark.parametrize("reach", [0, 1])
def test_slopes_on_whole_pixels_are_those_of_the_eager_form(reach):
    """Rounded, positions on or next to whole numbers fall on either side of them, and their slopes jump."""
    shapes, starts = levels([(7, 11)])
    y, x = torch.meshgrid(torch.arange(7), torch.arange(11), indexing="ij")
    centres = (torch.stack([x, y], -1).flatten(0, 1) + 0.5) / shapes.flip(1)  # (Q, 2), of every pixel
    for _ in range(reach):
        centres = torch.nextafter(centres, torch.ones(()))
    value = torch.randn(1, 77, 1, 4, generator=torch.Generator().manual_seed(0))
    locations = centres[None, :, None, None, None]
    check_kernel(
        public, (value, shapes, starts, locations, torch.ones(locations.shape[:-1])), PLAIN, torch.float32, 1e-6
    )
    references, offsets = locations[:, :, 0, :, 0], torch.zeros(locations.shape)
    arguments = (value, shapes, starts, references, offsets, torch.ones(locations.shape[:-1]))
    check_kernel(ms_deform_attn_fused, arguments, FUSED, torch.float32, 1e-6)


def test_levels_may_share_rows():
    """As many queries as rows, but not a pixel of the levels each."""
    value, _, _, locations, weights = plain_arguments([(2, 4), (1, 4)], points=1)
    shapes, starts = torch.tensor([[2, 4], [3, 4]]), torch.tensor([0, 0])
    check_kernel(public, (value, shapes, starts, locations, weights), PLAIN, torch.float32, 1e-6)


def broken(locations: Tensor) -> Tensor:
    """Put no numbers, infinities and numbers beyond all integers into some queries."""
    locations = locations.clone()
    for query, number in enumerate((math.nan, math.inf, -math.inf, 1e30)):
        locations[:, query, ..., query % 2] = number
    return locations


@pytest.mark.parametrize("fused", [False, True])
def test_broken_locations_do_what_they_do_in_the_eager_form(monkeypatch, fused):
    arguments = list((fused_arguments if fused else plain_arguments)(sides=[(3, 4), (0, 2)], queries=6, points=1))
    at = 4 if fused else 3
    arguments[at] = broken(arguments[at])
    arguments = [x.to(DEVICE) for x in arguments]
    op, trained = (ms_deform_attn_fused, FUSED) if fused else (public, PLAIN)
    slope = torch.ones(1, 6, 4, device=DEVICE)
    monkeypatch.setenv("DENSEPRED_OPS", "eager")
    expected = results(op, arguments, trained, slope)
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    found = results(op, arguments, trained, slope)
    assert expected[0][0, 0].isnan().all() and expected[0][0, 4:].isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_strided_inputs_of_several_types(monkeypatch):
    arguments = plain_arguments([(3, 5), (2, 2)], queries=3, heads=2, depth=8, points=1)
    value, shapes, starts, locations, weights = (x.to(DEVICE) for x in arguments)
    value, weights = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (value.bfloat16(), weights.half()))
    assert not value.is_contiguous() and not weights.is_contiguous()
    slope = torch.ones(1, 3, 16, device=DEVICE)
    mixed = (value, shapes.cpu(), starts.int(), locations, weights)
    monkeypatch.setenv("DENSEPRED_OPS", "eager")
    expected = results(public, mixed, PLAIN, slope)
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    found = results(public, mixed, PLAIN, slope)
    assert [x.dtype for x in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float16]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("queries", [0, 2])
@pytest.mark.parametrize("sides", [[(0, 0)], [(2, 3)]])
def test_nothing_to_sample_is_zero(monkeypatch, sides, queries):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    shape = dict(sides=sides, queries=queries, points=1)
    for op, arguments, trained in (
        (public, plain_arguments(**shape), PLAIN),
        (ms_deform_attn_fused, fused_arguments(**shape), FUSED),
    ):
        arguments = [x.to(DEVICE) for x in arguments]
        found = results(op, arguments, trained, torch.ones(1, queries, 4, device=DEVICE))
        assert [x.shape for x in found] == [(1, queries, 4), *(arguments[i].shape for i in trained)]
        assert any(x.any() for x in found) == (queries > 0 and sides[0][0] > 0)


def test_an_image_of_more_than_2_to_the_31_elements(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    height, width = LONG
    pixels, depth = height * width, 256
    assert 2**31 < pixels * depth < 2**31 * 1.01  # 4.3 GB that nobody touches
    value = torch.empty(1, pixels, 1, depth, dtype=torch.bfloat16, device=DEVICE)
    last = torch.randn(2, 2, depth, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    value[0, [pixels - width - 2, pixels - width - 1, pixels - 2, pixels - 1], 0] = last.flatten(0, 1)
    position = torch.tensor([width - 1.25, height - 1.5])  # between the last four pixels
    locations = ((position + 0.5) / torch.tensor([width, height]))[None, None, None, None, None].to(DEVICE)
    shapes, starts = (x.to(DEVICE) for x in levels([LONG]))
    out = public(value, shapes, starts, locations, torch.ones(1, 1, 1, 1, 1, device=DEVICE))
    expected = (last.float() * torch.tensor([0.25, 0.75], device=DEVICE)[:, None]).sum(1).mean(0)
    torch.testing.assert_close(out[0, 0].float(), expected, rtol=1e-2, atol=1e-2)


def test_too_many_rows_are_refused(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    value = torch.zeros(1, device=DEVICE).expand(1, ops.MAX_ROWS, 1, 1)
    _, shapes, starts, locations, weights = plain_arguments([(2, 2)], queries=1)
    with pytest.raises(ValueError, match=r"ms_deform_attn cannot run as a Triton kernel: value has 16777216 rows"):
        public(value, *(x.to(DEVICE) for x in (shapes, starts, locations, weights)))


@pytest.mark.parametrize("fused", [False, True])
def test_deterministic_algorithms_take_the_eager_backward(monkeypatch, fused):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    make, op, trained = (fused_arguments, ms_deform_attn_fused, FUSED) if fused else (plain_arguments, public, PLAIN)
    arguments = [x.to(DEVICE) for x in make(sides=[(2, 3)], queries=4, points=1)]
    slope = torch.ones(1, 4, 4, device=DEVICE)
    free = results(op, arguments, trained, slope)
    monkeypatch.setattr(kernels, "backward_fused" if fused else "backward", None)
    with pytest.raises(TypeError, match="not callable"):
        results(op, arguments, trained, slope)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (results(op, arguments, trained, slope) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))
    torch.testing.assert_close(first, free)


def test_opcheck(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    for name, arguments, trained in (
        ("ms_deform_attn", plain_arguments([(2, 3)], queries=2, points=1), PLAIN),
        ("ms_deform_attn_fused", fused_arguments(sides=[(2, 3)], queries=2, points=1), FUSED),
    ):
        arguments = [x.to(DEVICE) for x in arguments]
        leaves = [x.requires_grad_() if i in trained else x for i, x in enumerate(arguments)]
        torch.library.opcheck(getattr(torch.ops.densepred, name), tuple(leaves), rtol=1e-4, atol=1e-5)
        backward = (torch.ones(1, 2, 4, device=DEVICE), *(x.detach() for x in leaves))
        torch.library.opcheck(getattr(torch.ops.densepred, f"{name}_backward"), backward, rtol=1e-4, atol=1e-5)


def test_the_pixel_decoder_runs_on_them(monkeypatch):
    random = torch.Generator().manual_seed(0)
    decoder = DeformablePixelDecoder([4] * 4, [4, 8, 16, 32], 32, 32, 1, num_heads=1, num_points=1, ffn_dim=32)
    decoder = decoder.to(DEVICE)
    maps = [torch.randn(1, 4, 64 // s, 64 // s, generator=random).to(DEVICE) for s in (4, 8, 16, 32)]
    outs = {}
    for wanted in ("eager", "triton"):
        monkeypatch.setenv("DENSEPRED_OPS", wanted)
        pixels = decoder(maps).pixels
        outs[wanted] = [pixels, *torch.autograd.grad(pixels.square().mean(), list(decoder.layers.parameters()))]
    torch.testing.assert_close(outs["triton"], outs["eager"], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="nothing to wait for")
def test_the_host_never_waits():
    arguments = [x.cuda() for x in fused_arguments(sides=[(9, 11), (2, 3)], depth=32)]
    slope = torch.ones(1, 105, 32, device=DEVICE)
    results(ms_deform_attn_fused, arguments, FUSED, slope)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(ms_deform_attn_fused, arguments, FUSED, slope)
    finally:
        torch.cuda.set_sync_debug_mode("default")

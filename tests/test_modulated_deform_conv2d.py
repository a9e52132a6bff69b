"""The modulated deformable convolution: the published numbers, the definition by loops, precision, the compilers."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from densepred.ops.modulated_deform_conv2d import _BLOCK, ModulatedDeformConv2d, modulated_deform_conv2d
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "modulated_deform_conv2d")
TOLERANCE = META["tolerance"]["max_abs"]
NAMES = ("x", "offset", "mask", "weight", "bias")


def drawn(recipe: dict) -> Tensor:
    if recipe["recipe"] == "values":
        return torch.tensor(recipe["values"], dtype=torch.float64).view(recipe["shape"])
    values = parity.normal_input(recipe["seed"], recipe["shape"])
    return torch.from_numpy(values * recipe.get("mul", 1.0) + recipe.get("add", 0.0))


def close(found: Tensor, key: str) -> None:
    torch.testing.assert_close(found, torch.from_numpy(EXPECTED[key]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", META["input"]["ops"])
def test_parity(name):
    recipe = META["input"]["ops"][name]
    tensors = {key: drawn(recipe[key]).requires_grad_() for key in NAMES if recipe[key]}
    grid = {key: recipe[key] for key in ("stride", "padding", "dilation", "groups", "deform_groups")}
    out = modulated_deform_conv2d(**tensors, **grid)
    close(out.detach(), f"{name}.out")
    for key, found in zip(tensors, torch.autograd.grad(out, tensors.values(), drawn(recipe["grad_out"])), strict=True):
        close(found, f"{name}.grad_{key}")


@pytest.mark.parametrize("name", META["input"]["modules"])
def test_parity_of_the_module(name):
    recipe = dict(META["input"]["modules"][name])
    x, slope = drawn(recipe.pop("x")).requires_grad_(), drawn(recipe.pop("grad_out"))
    published = {key: torch.from_numpy(np.asarray(parity.fill(key, shape))) for key, shape in recipe.pop("state_dict")}
    module = ModulatedDeformConv2d(**recipe).double()
    module.load_state_dict({key.replace("conv_offset", "conv_offset_mask"): v for key, v in published.items()})
    out = module(x)
    close(out.detach(), f"{name}.out")
    out.backward(slope)
    close(x.grad, f"{name}.grad_x")
    for key, parameter in module.named_parameters():
        close(parameter.grad, f"{name}.grad.{key.replace('conv_offset_mask', 'conv_offset')}")


GRID = dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2, deform_groups=3)


def problem(*, size=(5, 4), batch: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Six channels to four with 3 x 2 taps; samples within and without, none near a kink of the interpolation."""
    generator = torch.Generator().manual_seed(0)
    h, w = (size[0] + 1) // 2, size[1] + 2

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    offset = normal(batch, 36, h, w).mul_(2).floor_() + 0.1
    offset += 0.8 * torch.rand(offset.shape, generator=generator, dtype=torch.float64)
    tensors = (normal(batch, 6, *size), offset, normal(batch, 18, h, w), normal(4, 3, 3, 2), normal(4))
    return dict(zip(NAMES, (tensor.to(dtype) for tensor in tensors), strict=True))


def tap_by_tap(
    x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, deform_groups: int, groups: int, **grid
) -> Tensor:
    """The definition, every number by itself."""
    (batch, channels, *size), (outputs, inner, kh, kw) = x.shape, weight.shape
    out = bias[:, None, None].expand(batch, outputs, *mask.shape[2:]).clone()
    for n, o, y, c, ky, kx in itertools.product(*map(range, (batch, outputs, out.shape[2], inner, kh, kw))):
        for column in range(out.shape[3]):
            channel = o // (outputs // groups) * inner + c
            tap = channel // (channels // deform_groups) * kh * kw + ky * kw + kx
            at = [
                i * s - p + k * d + float(move)
                for i, s, p, k, d, move in zip(
                    (y, column),
                    *(grid[key] for key in ("stride", "padding")),
                    (ky, kx),
                    grid["dilation"],
                    offset[n, 2 * tap : 2 * tap + 2, y, column],
                    strict=True,
                )
            ]
            for corner in itertools.product(*({math.floor(a), math.floor(a) + 1} for a in at)):
                if all(0 <= i < side for i, side in zip(corner, size, strict=True)):
                    share = math.prod(1 - abs(a - i) for a, i in zip(at, corner, strict=True))
                    number = x[(n, channel, *corner)] * share * mask[n, tap, y, column]
                    out[n, o, y, column] += weight[o, c, ky, kx] * number
    return out


def results(tensors: dict[str, Tensor], op=modulated_deform_conv2d, **grid) -> list[Tensor]:
    leaves = {key: tensor.detach().requires_grad_() for key, tensor in tensors.items()}
    out = op(**leaves, **(grid or GRID))
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves.values(), slope)]


@pytest.mark.parametrize("size", [(3, 4), (1, 3), (3, 1), (1, 1)], ids=str)
def test_equals_the_definition(size):
    tensors = problem(size=size, batch=1)
    found = modulated_deform_conv2d(**tensors, **GRID)
    torch.testing.assert_close(found, tap_by_tap(**tensors, **GRID), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(4, 3), (1, 3), (3, 1)], ids=str)
def test_gradcheck(size):
    tensors = [tensor.requires_grad_() for tensor in problem(size=size, batch=1).values()]
    assert torch.autograd.gradcheck(lambda *leaves: modulated_deform_conv2d(*leaves, **GRID), tensors, fast_mode=True)


def test_without_moves_it_is_a_convolution():
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 6, 9, 8, generator=generator), torch.randn(4, 3, 3, 3, generator=generator)
    grid = dict(stride=2, padding=1, dilation=2, groups=2)
    expected = torch.nn.functional.conv2d(x, weight, **grid)
    still, whole = torch.zeros(2, 18, *expected.shape[2:]), torch.ones(2, 9, *expected.shape[2:])
    torch.testing.assert_close(modulated_deform_conv2d(x, still, whole, weight, **grid), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("far", [torch.inf, -torch.inf, torch.nan, 1e30])
@pytest.mark.parametrize("size", [(5, 4), (1, 1)], ids=str)
def test_taps_that_lie_nowhere_do_not_count(far, size):
    tensors = problem(size=size)
    tensors["offset"][:, ::4] = far
    out, grad_x, grad_offset, grad_mask, *_ = results(tensors)
    tensors["offset"][:, ::4] = 100.0
    expected = results(tensors)
    torch.testing.assert_close([out, grad_x, grad_offset, grad_mask], expected[:4], rtol=0, atol=1e-14)
    assert not grad_offset[:, ::4].any() and grad_offset.isfinite().all()


def test_one_tap_and_pixel_of_several_groups():
    """Sides of 1 leave memory layouts ambiguous: a view of the offsets' gradient once failed."""
    tensors = dict(
        x=torch.ones(2, 2, 1, 1),
        offset=torch.full((2, 4, 1, 1), 0.25),
        mask=torch.ones(2, 2, 1, 1),
        weight=torch.ones(2, 1, 1, 1),
        bias=torch.zeros(2),
    )
    out, _, grad_offset, grad_mask, *_ = results(tensors, groups=2, deform_groups=2)
    torch.testing.assert_close(out, torch.full_like(out, 0.5625))
    slope = torch.linspace(-1, 1, 4).view(2, 2, 1, 1)
    torch.testing.assert_close(grad_mask, 0.5625 * slope)
    torch.testing.assert_close(grad_offset, -0.75 * slope.repeat_interleave(2, 1))


def test_layouts_and_blocks_change_nothing(monkeypatch):
    tensors = problem()
    expected = results(tensors)
    maps = [key for key in NAMES if tensors[key].dim() == 4]
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    ):
        got = results(tensors | {key: change(tensors[key]) for key in maps})
        assert got[0].is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)
    monkeypatch.setitem(_BLOCK, "cpu", 1)  # an output pixel at a time
    torch.testing.assert_close(results(tensors), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_works_in_float32(dtype):
    tensors = problem(dtype=dtype)
    got = results(tensors)
    leaves = [tensor.double().requires_grad_() for tensor in tensors.values()]
    out = modulated_deform_conv2d(*leaves, **GRID)
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype).double()
    expected = [out.detach(), *torch.autograd.grad(out, leaves, slope)]
    assert all(tensor.dtype == dtype for tensor in got)
    for mine, truth in zip(got, expected, strict=True):  # rounded once, on the way out
        torch.testing.assert_close(mine.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-5 * truth.abs().max())


def test_autocast_does_not_reach_the_sums():
    tensors = problem(dtype=torch.float32)
    expected = results(tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(results(tensors), expected, rtol=0, atol=0)
        module = ModulatedDeformConv2d(6, 4)
        out = module(tensors["x"])
    out.sum().backward()
    assert out.dtype == torch.float32
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def test_empty_maps():
    tensors = problem(batch=0)
    assert [tensor.shape for tensor in results(tensors)] == [
        (0, 4, 3, 6),
        *(tensor.shape for tensor in tensors.values()),
    ]
    no_pixels = problem() | {"x": torch.zeros(2, 6, 0, 4, dtype=torch.float64)}
    grid = GRID | {"padding": (4, 2)}
    out, *gradients, grad_bias = results(no_pixels, **grid)
    torch.testing.assert_close(out, no_pixels["bias"][:, None, None].expand(2, 4, 3, 6))
    assert not any(gradient.any() for gradient in gradients) and grad_bias.all()


def peak(run) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    held, most = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def test_columns_never_exist_as_a_whole():
    """64 channels at 96 x 96 are 2.4 MB a map and 21 MB of columns, twice with their gradients."""
    maps = torch.randn(1, 64 + 27, 96, 96).split([64, 18, 9], 1)
    tensors = dict(zip(NAMES, (*maps, torch.randn(64, 64, 3, 3), torch.randn(64)), strict=True))
    most = peak(lambda: results(tensors, padding=1))
    size = 64 * 96 * 96 * 4
    assert 4 * size < most < 14 * size  # 26 with all columns at once


@pytest.mark.parametrize(
    ("size", "dtype", "layout", "with_bias"),
    [
        ((5, 4), torch.float32, torch.contiguous_format, True),
        ((5, 4), torch.bfloat16, torch.channels_last, False),
        ((1, 1), torch.float32, torch.contiguous_format, False),
    ],
    ids=str,
)
def test_opcheck(size, dtype, layout, with_bias):
    *maps, bias = problem(size=size, dtype=dtype).values()
    maps, ops = [tensor.contiguous(memory_format=layout) for tensor in maps], torch.ops.densepred
    leaves = [tensor.clone().requires_grad_() for tensor in maps]
    torch.library.opcheck(ops.modulated_deform_conv2d, (*leaves, bias if with_bias else None, *GRID.values()))
    slope = torch.ones_like(ops.modulated_deform_conv2d(*maps, bias, *GRID.values()))
    torch.library.opcheck(ops.modulated_deform_conv2d_backward, (slope, *maps, *GRID.values()))


def small_module() -> ModulatedDeformConv2d:
    module = ModulatedDeformConv2d(
        6, 4, kernel_size=(3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), deform_groups=2
    )
    for key, parameter in module.named_parameters():
        parameter.data = torch.from_numpy(np.asarray(parity.fill(key, parameter.shape)))
    return module


def test_compiles_without_a_graph_break():
    x, module = problem()["x"], small_module()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = []
    for form in (compiled, module):
        leaf = x.clone().requires_grad_()
        out = form(leaf)
        found.append([out.detach(), *torch.autograd.grad(out.square().sum(), [leaf, *module.parameters()])])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_exports_as_one_node_with_free_sizes():
    x, module = problem()["x"], small_module()
    side = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(module, (x,), dynamic_shapes=(side,))
    nodes = [str(node.target) for node in program.graph.nodes if "densepred" in str(node.target)]
    assert nodes == ["densepred.modulated_deform_conv2d.default"]
    other = torch.randn(2, 6, 9, 7, dtype=torch.float64)
    torch.testing.assert_close(program.module()(other), module(other))


def test_the_module_starts_as_half_a_convolution():
    torch.manual_seed(0)
    module, x = ModulatedDeformConv2d(6, 4), torch.randn(2, 6, 5, 4)
    bound = (6 * 9) ** -0.5
    assert 0.9 * bound < module.weight.abs().max() <= bound
    assert not module.bias.any() and not module.conv_offset_mask.weight.any()
    expected = torch.nn.functional.conv2d(x, module.weight / 2, padding=1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)
    assert set(ModulatedDeformConv2d(6, 4, bias=False).state_dict()) == {
        "weight",
        "conv_offset_mask.weight",
        "conv_offset_mask.bias",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 5, 4)}, r"x \(6, 5, 4\) must be \(B, C, H, W\)"),
        ({"offset": torch.zeros(2, 18, 3, 6)}, r"offset is \(2, 18, 3, 6\), but \(2, 36, 3, 6\) goes with"),
        ({"mask": torch.zeros(2, 18, 3, 5)}, r"mask is \(2, 18, 3, 5\), but \(2, 18, 3, 6\)"),
        ({"offset": torch.zeros(2, 36, 3, 6, dtype=torch.long)}, r"offset is torch.int64, it must be a float"),
        ({"mask": torch.zeros(2, 18, 3, 6, device="meta")}, r"mask is on meta, x on cpu: move them"),
        ({"bias": torch.zeros(5)}, r"bias is \(5,\), but \(4,\)"),
        ({"weight": torch.zeros(4, 6, 3, 2)}, r"groups=2 .* weight \(4, 6, 3, 2\) must have 6 / groups"),
        ({"deform_groups": 4}, r"deform_groups=4 must divide the 6 channels"),
        ({"dilation": (5, 1)}, r"x \(2, 6, 5, 4\) is smaller than the kernel"),
        ({"stride": (0, 1)}, r"stride=\(0, 1\)"),
        ({"padding": (1, 2, 3)}, r"\(1, 2, 3\): one number or \(vertical, horizontal\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_errors_name_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        modulated_deform_conv2d(**(problem() | GRID | change))


def test_the_module_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match=r"groups=4 must divide in_channels=6"):
        ModulatedDeformConv2d(6, 8, groups=4)

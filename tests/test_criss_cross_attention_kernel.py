"""The kernels of criss-cross attention against the eager form in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densepred.ops import criss_cross_attention, criss_cross_attention_3d
from tests import parity
from tests.oracle import DEVICE, DTYPES, RANDOM_SHAPES, check_kernel, poison_new_tensors, relative_error, results

kernels = pytest.importorskip("densepred.ops.kernels.criss_cross_attention", exc_type=ImportError)
META, EXPECTED = parity.case(parity.CASES / "criss_cross_attention")


def maps(
    sides: tuple[int, ...], channels: tuple[int, int] = (5, 21), batch: int = 1, times: float = 0.3
) -> list[Tensor]:
    """q, k and v; the weights of no pixel are all but one zero, as gradients of q and k would then be noise."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, c, *sides, generator=rng) for c in (channels[0], *channels))
    return [times * q, k, v]


def op_for(sides: tuple[int, ...]):
    return criss_cross_attention if len(sides) == 2 else criss_cross_attention_3d


def small_tiles(length: int, energy_channels: int, wide: bool) -> dict[str, int]:
    return {"OWNED": 16, "PASSED": 16, "WIDTH": 16, "num_warps": 4, "num_stages": 2 if wide else 3}


@pytest.fixture
def by_kernel(monkeypatch):
    monkeypatch.setenv("DENSEPRED_OPS", "triton")
    return monkeypatch


@RANDOM_SHAPES
@given(
    sides=st.one_of(
        st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 2)] * 3), st.sampled_from([(2, 20), (20, 1)])
    ).filter(lambda sides: max(sides) > 1),
    channels=st.sampled_from([(1, 1), (5, 21), (17, 32)]),  # a kernel is compiled for each
    batch=st.integers(1, 2),
    dtype=st.sampled_from(DTYPES),
    kind=st.sampled_from(["", "transposed", "channels last", "part"]),
    own_tiles=st.booleans(),
)
def test_random_shapes(sides, channels, batch, dtype, kind, own_tiles):
    inputs = maps(sides, channels, batch)
    if kind == "transposed":
        inputs = [tensor.transpose(2, -1) for tensor in inputs]
    elif kind == "channels last":
        inputs = [tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in inputs]
    elif kind == "part":
        inputs = [torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]] for tensor in inputs]
    with pytest.MonkeyPatch.context() as patch:
        if not own_tiles:
            patch.setattr(kernels, "tiles", small_tiles)
        check_kernel(op_for(sides), inputs, (0, 1, 2), dtype)


@pytest.mark.parametrize(
    ("sides", "channels", "dtype"),
    [
        ((1, 150), (8, 16), torch.bfloat16),
        ((1, 70), (8, 130), torch.float16),
        ((1, 140), (64, 72), torch.float32),
        ((1, 70), (100, 24), torch.float32),
        ((1, 70), (200, 24), torch.bfloat16),
    ],
    ids=str,
)
def test_tiles_of_long_lines_and_wide_queries(sides, channels, dtype):
    check_kernel(op_for(sides), maps(sides, channels, times=channels[0] ** -0.5), (0, 1, 2), dtype)


@pytest.mark.parametrize("name", META["input"]["ops"])
def test_parity(name, by_kernel):
    recipes = META["input"]["ops"][name]
    tensors = {
        key: (torch.from_numpy(parity.normal_input(r["seed"], r["shape"])) * r.get("times", 1)).float().to(DEVICE)
        for key, r in recipes.items()
    }
    found = results(criss_cross_attention, [tensors[key] for key in "qkv"], (0, 1, 2), tensors["grad_out"])
    # Energies of some hundreds have lost as many of float32's digits before the softmax.
    allowed = 1e-4 if max(r.get("times", 1) for r in recipes.values()) > 1 else 1e-5
    for key, tensor in zip(["out", "grad_q", "grad_k", "grad_v"], found, strict=True):
        assert relative_error(tensor.cpu(), torch.from_numpy(EXPECTED[f"{name}.{key}"])) <= allowed, key


@pytest.mark.parametrize("shape", [(2, 3, 1, 1), (1, 2, 1, 1, 1)])
def test_one_pixel_is_its_value(shape, by_kernel):
    poison_new_tensors(by_kernel)
    q, k, v, grad = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    out, grad_q, grad_k, grad_v = results(op_for(shape[2:]), [q, k, v], (0, 1, 2), grad)
    torch.testing.assert_close([out, grad_v], [v, grad], rtol=1e-6, atol=0)
    torch.testing.assert_close([grad_q, grad_k], [torch.zeros_like(q)] * 2, rtol=0, atol=1e-6)


def test_empty_maps(by_kernel):
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        inputs = [torch.zeros(shape, device=DEVICE)] * 3
        assert [tensor.shape for tensor in results(criss_cross_attention, inputs, (0, 1, 2), inputs[0])] == [shape] * 4


def test_mixed_types(by_kernel):
    q, k, v = (tensor.to(DEVICE) for tensor in maps((5, 6)))
    mixed = [q, k.half(), v.bfloat16()]
    slope = torch.linspace(-1, 1, v.numel(), device=DEVICE).view(v.shape)
    found = results(criss_cross_attention, mixed, (0, 1, 2), slope)
    expected = results(criss_cross_attention, [tensor.double() for tensor in mixed], (0, 1, 2), slope.bfloat16())
    assert [tensor.dtype for tensor in found] == [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16]
    assert all(relative_error(one, other) < 1e-2 for one, other in zip(found, expected, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_a_broken_pixel_spoils_its_cross_only(which, number, by_kernel):
    inputs = [tensor.to(DEVICE) for tensor in maps((3, 4))]
    sound = criss_cross_attention(*inputs)
    inputs["qkv".index(which)][0, :, 1, 2] = number
    out = criss_cross_attention(*inputs)
    cross = torch.zeros(3, 4, dtype=torch.bool, device=DEVICE)
    cross[1], cross[:, 2] = which != "q", which != "q"
    cross[1, 2] = True
    assert torch.equal(out[..., ~cross], sound[..., ~cross])
    assert not out[..., cross].isfinite().any()


def test_every_run_gives_the_same_bits(by_kernel):
    inputs = [tensor.to(DEVICE, torch.bfloat16) for tensor in maps((2, 6))]
    torch.use_deterministic_algorithms(True)
    try:
        one, other = (results(criss_cross_attention, inputs, (0, 1, 2), inputs[2]) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_memory_holds_no_weights(by_kernel):
    """Beside the output two maps of sums; (H + W) weights a pixel would be 34 maps."""
    inputs = [t.to(DEVICE).contiguous(memory_format=torch.channels_last) for t in maps((2, 32), (4, 8))]
    allocated = []
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)
        by_kernel.setattr(torch, name, lambda *a, make=make, **o: allocated.append(make(*a, **o)) or allocated[-1])
    with torch.no_grad():
        criss_cross_attention(*inputs)
    assert sum(tensor.numel() for tensor in allocated) == (8 + 2) * 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype, by_kernel):
    ops = torch.ops.densepred
    inputs = [tensor.to(DEVICE, dtype) for tensor in maps((2, 2))]
    torch.library.opcheck(ops.criss_cross_attention, tuple(tensor.detach().requires_grad_() for tensor in inputs))
    saved = [*inputs, *ops.criss_cross_attention(*inputs)]
    torch.library.opcheck(ops.criss_cross_attention_backward, (torch.ones_like(saved[2]), *saved))


def test_wide_queries_are_refused(by_kernel):
    with pytest.raises(ValueError, match="q has 130 channels, the kernels take 128 at most"):
        criss_cross_attention(*(tensor.to(DEVICE) for tensor in maps((2, 2), (130, 3))))


def test_offsets_beyond_32_bits():
    """A column of a map of 2.3e9 numbers; only the pages of that column are ever touched."""
    height, width, channels = 17, 1 << 18, 512
    assert (height - 1) * width * channels == 1 << 31
    q, k = torch.zeros(2, 1, height, width, 16, dtype=torch.bfloat16, device=DEVICE)
    v, out = (torch.empty(1, height, width, channels, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    earlier, log_sum = torch.empty(2, 1, height, width, device=DEVICE)
    column = torch.arange(height, device=DEVICE, dtype=torch.float32)
    v[0, :, 0], out[0, :, 0], earlier[0, :, 0] = column[:, None].bfloat16(), 0, 0.0
    kernels._forward[(1,)](
        q, k, v, earlier, out, log_sum, height, width, ENERGY_CHANNELS=16, CHANNELS=channels, ENERGY=16,
        OWN_KEY=False, PARTS=1, OWNED=64, PASSED=32, WIDTH=128,
    )  # fmt: skip
    expected = (column.sum() - column) / height  # equal weights: one of the axis before, whose output is 0, and 16 here
    torch.testing.assert_close(out[0, :, 0, :128].float(), expected[:, None].expand(-1, 128), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(log_sum[0, :, 0].exp(), torch.full_like(column, height))

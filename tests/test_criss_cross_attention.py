"""The criss-cross attention op: the published numbers, softmax over a written-out list of keys, the compilers."""

import itertools

import pytest
import torch
from torch import Tensor

from densepred.ops import criss_cross_attention, criss_cross_attention_3d
from densepred.ops.criss_cross_attention import _BLOCK
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "criss_cross_attention")
TOLERANCE = META["tolerance"]["max_abs"]
SIDES = [(4, 5), (1, 6), (6, 1), (1, 1), (2, 2), (3, 2, 4), (1, 3, 4), (3, 1, 4), (2, 3, 1), (3, 1, 1), (1, 1, 1)]


def key_by_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition: for every pixel the set of pixels that differ from it along one axis at most."""
    sides = q.shape[2:]
    out = torch.empty_like(v)
    for pixel in itertools.product(*map(range, sides)):
        keys = {(*pixel[:a], i, *pixel[a + 1 :]) for a, side in enumerate(sides) for i in range(side)}
        assert len(keys) == sum(sides) - len(sides) + 1
        index = (slice(None), slice(None), *torch.tensor(sorted(keys)).unbind(1))
        here = (slice(None), slice(None), *pixel)
        weights = torch.einsum("bc,bcn->bn", q[here], k[index]).softmax(1)
        out[here] = torch.einsum("bn,bcn->bc", weights, v[index])
    return out


def problem(*sides: int, times: float = 1.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, c, *sides, generator=generator, dtype=torch.float64) for c in (3, 3, 5))
    return (times * q).to(dtype), k.to(dtype), v.to(dtype)


def op_for(maps: tuple[Tensor, ...]):
    return criss_cross_attention if maps[0].dim() == 4 else criss_cross_attention_3d


def results(op, maps, grad: Tensor | None = None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in maps]
    out = op(*leaves)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize("name", META["input"]["ops"])
def test_parity(name):
    tensors = {}
    for key, recipe in META["input"]["ops"][name].items():
        tensors[key] = torch.from_numpy(parity.normal_input(recipe["seed"], recipe["shape"])) * recipe.get("times", 1)
    found = results(criss_cross_attention, [tensors[key] for key in "qkv"], tensors["grad_out"])
    for key, result in zip(["out", "grad_q", "grad_k", "grad_v"], found, strict=True):
        torch.testing.assert_close(result, torch.from_numpy(EXPECTED[f"{name}.{key}"]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_equals_the_definition(sides):
    maps = problem(*sides)
    torch.testing.assert_close(results(op_for(maps), maps), results(key_by_key, maps), rtol=0, atol=1e-13)


def test_large_energies_stay_exact():
    maps = problem(4, 3, 5, times=300.0)
    torch.testing.assert_close(results(op_for(maps), maps), results(key_by_key, maps), rtol=0, atol=1e-10)


def test_one_frame_is_the_flat_form():
    flat = problem(4, 5)
    clip = tuple(tensor[:, :, None] for tensor in flat)
    got, expected = results(criss_cross_attention_3d, clip), results(criss_cross_attention, flat)
    torch.testing.assert_close([tensor[:, :, 0] for tensor in got], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("sides", [(7, 4), (2, 3, 4)])
def test_layouts_and_blocks_change_nothing(sides, monkeypatch):
    maps = problem(*sides)
    expected = results(op_for(maps), maps)
    layout = torch.channels_last if len(sides) == 2 else torch.channels_last_3d
    for strided in (
        [tensor.contiguous(memory_format=layout) for tensor in maps],
        [tensor.transpose(1, -1).contiguous().transpose(1, -1) for tensor in maps],
        [torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]] for tensor in maps],
    ):
        got = results(op_for(maps), strided)
        assert all(tensor.is_contiguous(memory_format=layout) for tensor in got[:1])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    monkeypatch.setitem(_BLOCK, "cpu", 1)  # a line at a time
    torch.testing.assert_close(results(op_for(maps), maps), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_works_in_float32(dtype):
    maps = problem(5, 7, times=3.0, dtype=dtype)
    got = results(criss_cross_attention, maps)
    grad = torch.linspace(-1, 1, got[0].numel(), dtype=dtype).view(got[0].shape).double()
    expected = results(key_by_key, [tensor.double() for tensor in maps], grad)
    assert all(tensor.dtype == dtype for tensor in got)
    torch.testing.assert_close(got[0].double(), expected[0], rtol=torch.finfo(dtype).eps, atol=2e-5)
    # The gradients also hold the rounding of the saved output, which stays in the dtype of v.
    scale = [float(truth.abs().max()) for truth in expected]
    for mine, truth, largest in zip(got, expected, scale, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=4 * torch.finfo(dtype).eps * largest + 2e-5)


def test_autocast_does_not_reach_the_sums():
    maps = problem(5, 7, dtype=torch.float32)
    expected = results(criss_cross_attention, maps)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(criss_cross_attention, maps)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_empty_maps():
    for shape in ((0, 3, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        found = results(criss_cross_attention, [torch.zeros(shape)] * 3, torch.zeros(shape))
        assert [tensor.shape for tensor in found] == [shape] * 4


def test_memory_stays_linear():
    """97 x 97 x 512 holds 19 MB; (H W)^2 weights would be 354 MB, (H + W) weights a pixel another 7 MB."""
    maps = [torch.randn(1, c, 97, 97) for c in (64, 64, 512)]
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        criss_cross_attention(*maps)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    pixels = 97 * 97 * 4
    assert 512 * pixels < peak < 3.5 * 512 * pixels  # v and the output twice each but v itself, q and k, one block


@pytest.mark.parametrize("sides", [(3, 4), (2, 3, 2)])
def test_gradcheck_and_opcheck(sides):
    maps = [tensor.requires_grad_() for tensor in problem(*sides)]
    assert torch.autograd.gradcheck(op_for(maps), maps)
    ops = torch.ops.densepred
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last if len(sides) == 2 else torch.channels_last_3d):
            maps = [t.contiguous(memory_format=layout) for t in problem(*sides, dtype=dtype)]
            torch.library.opcheck(ops.criss_cross_attention, tuple(tensor.requires_grad_() for tensor in maps))
            saved = [t.detach() for t in (*maps, *ops.criss_cross_attention(*maps))]
            torch.library.opcheck(ops.criss_cross_attention_backward, (torch.ones_like(saved[2]), *saved))


class Step(torch.nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return criss_cross_attention(q * 2, k.tanh(), v).relu()


def test_compiles_without_a_graph_break():
    maps = problem(4, 5)
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, maps), results(Step(), maps), rtol=0, atol=1e-13)


def test_exports_as_one_node_with_free_sizes():
    side = {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Step(), problem(4, 5), dynamic_shapes=(side, side, side))
    nodes = [str(node.target) for node in program.graph.nodes if "densepred" in str(node.target)]
    assert nodes == ["densepred.criss_cross_attention.default"]
    other = problem(7, 3)
    torch.testing.assert_close(program.module()(*other), Step()(*other))


def test_errors_name_what_is_wrong(monkeypatch):
    q, k, v = problem(4, 5)
    for op, arguments, message in (
        (
            criss_cross_attention,
            (q, k[:, :2], v),
            r"q \(2, 3, 4, 5\) and k \(2, 2, 4, 5\) must both be \(B, Cq, H, W\)",
        ),
        (criss_cross_attention, (q, k, v[..., :4]), r"v \(2, 5, 4, 4\)"),
        (criss_cross_attention, (q[0], k[0], v[0]), r"q \(3, 4, 5\)"),
        (criss_cross_attention_3d, (q, k, v), r"criss_cross_attention_3d: .*\(B, Cv, T, H, W\)"),
    ):
        with pytest.raises(ValueError, match=message):
            op(*arguments)

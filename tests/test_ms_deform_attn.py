"""Multi-scale deformable attention, plain and fused: the published numbers, a grid_sample loop, autograd, compilers."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from densepred.ops import ms_deform_attn
from densepred.ops.ms_deform_attn import ms_deform_attn_fused
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "ms_deform_attn")
TOLERANCE = META["tolerance"]["max_abs"]
PYRAMID = [(3, 5), (1, 1), (4, 2)]


def levels(sides: list) -> tuple[Tensor, Tensor]:
    shapes = torch.tensor(sides, dtype=torch.int64)
    return shapes, shapes.prod(1).cumsum(0) - shapes.prod(1)


def grid_sample_loop(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The textbook form: one `grid_sample` per level that has pixels, weighted and summed."""
    batch, _, heads, depth = value.shape
    total = value.new_zeros(batch, weights.shape[1], heads, depth)
    for level, ((height, width), start) in enumerate(zip(shapes.tolist(), starts.tolist(), strict=True)):
        if not height * width:
            continue
        maps = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(-1, depth, height, width)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1  # (B * heads, Q, P, 2)
        samples = functional.grid_sample(maps, grid, align_corners=False)  # (B * heads, D, Q, P)
        total = total + torch.einsum("bmdqp,bqmp->bqmd", samples.unflatten(0, (batch, heads)), weights[:, :, :, level])
    return total.flatten(2)


def problem(sides: list, low: float = -0.3, high: float = 1.3, queries: int = 7, heads: int = 2) -> tuple[Tensor, ...]:
    shapes, starts = levels(sides)
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator, "dtype": torch.float64}
    value = torch.randn(2, int(shapes.prod(1).sum()), heads, 4, **draw)
    locations = low + (high - low) * torch.rand(2, queries, heads, len(sides), 3, 2, **draw)
    weights = torch.randn(2, queries, heads, len(sides), 3, **draw)
    return value, shapes, starts, locations, weights


def outputs_and_gradients(op, value, shapes, starts, locations, weights, grad=None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
    output = op(leaves[0], shapes, starts, *leaves[1:])
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape) if grad is None else grad
    return [output, *torch.autograd.grad(output, leaves, grad)]


def attention(seed: int, shape: list) -> Tensor:
    numbers = torch.from_numpy(parity.normal_input(seed, (*shape[:3], shape[3] * shape[4])))
    return numbers.softmax(-1).view(shape)


@pytest.mark.parametrize("name", ["op_standard", "op_odd", "op_far", "op_onelevel"])
def test_parity(name):
    case = META["input"][name]
    seed = case["value"]["seed"]
    low, _, scale = case["sampling_locations"]["recipe"].split()[:3]
    uniform = np.random.RandomState(seed + 100).random_sample(case["sampling_locations"]["shape"])
    results = outputs_and_gradients(
        ms_deform_attn,
        torch.from_numpy(parity.normal_input(seed, case["value"]["shape"])),
        *levels(case["spatial_shapes_h_w"]),
        torch.from_numpy(float(low) + float(scale) * uniform),
        attention(seed + 200, case["attention_weights"]["shape"]),
        torch.from_numpy(parity.normal_input(seed + 300, case["grad_output"]["shape"])),
    )
    for key, result in zip(["output", "grad_value", "grad_locations", "grad_weights"], results, strict=True):
        key = f"{name}_{key}"
        got = parity.thin(result.detach().numpy(), META["outputs"][key])
        np.testing.assert_allclose(got, EXPECTED[key], rtol=0, atol=TOLERANCE, err_msg=key)


def test_parity_on_corners_and_pixel_centres():
    case = META["input"]["op_grid"]
    points = torch.tensor(case["sampling_locations"]["points_x_y"], dtype=torch.float64)
    locations = points[None, :, None, None, None].expand(case["sampling_locations"]["shape"])
    value = torch.from_numpy(parity.normal_input(case["value"]["seed"], case["value"]["shape"]))
    weights = torch.full(locations.shape[:-1], 0.5, dtype=torch.float64)
    output = ms_deform_attn(value, *levels(case["spatial_shapes_h_w"]), locations, weights)
    np.testing.assert_allclose(output.numpy(), EXPECTED["op_grid_output"], rtol=0, atol=TOLERANCE)


def module_weights(name: str) -> dict[str, Tensor]:
    state = parity.filled_state(META)
    return {
        k.removeprefix(f"{name}."): torch.from_numpy(v).requires_grad_()
        for k, v in state.items()
        if k.startswith(f"{name}.")
    }


def attention_module(
    state: dict[str, Tensor], config: dict, query: Tensor, flat: Tensor, reference: Tensor, padding: Tensor
) -> Tensor:
    """The published module around the op."""

    def linear(key: str, tensor: Tensor) -> Tensor:
        return functional.linear(tensor, state[f"{key}.weight"], state[f"{key}.bias"])

    shapes, starts = levels(config["spatial_shapes_h_w"])
    heads, sides, points = config["heads"], config["levels"], config["points"]
    value = linear("value_proj", flat).masked_fill(padding[..., None], 0).unflatten(-1, (heads, -1))
    offsets = linear("sampling_offsets", query).unflatten(-1, (heads, sides, points, 2))
    weights = linear("attention_weights", query).unflatten(-1, (heads, -1)).softmax(-1).unflatten(-1, (sides, points))
    reference = reference[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
    boxes = reference.shape[-1] == 4
    scale = reference[..., 2:] * 0.5 / points if boxes else 1 / shapes.flip(-1)[:, None].double()
    return linear("output_proj", ms_deform_attn(value, shapes, starts, reference[..., :2] + offsets * scale, weights))


@pytest.mark.parametrize("name", ["module_points", "module_boxes_masked"])
def test_parity_inside_the_module(name):
    config, state = META["input"][name], module_weights(name)
    query, flat, grad = (
        torch.from_numpy(parity.normal_input(config[k]["seed"], config[k]["shape"])).requires_grad_()
        for k in ("query", "input_flatten", "grad_output")
    )
    uniform = np.random.RandomState(config["query"]["seed"] + 200).random_sample
    reference = torch.from_numpy(uniform(config["reference_points"]["shape"]))
    padding = torch.zeros(flat.shape[:2], dtype=torch.bool)
    if config["padding_mask"]:
        padding = torch.from_numpy(np.random.RandomState(342).random_sample(tuple(padding.shape)) < 0.2)
    output = attention_module(state, config, query, flat, reference, padding)
    parameters = ["sampling_offsets.weight", "sampling_offsets.bias", "attention_weights.bias"]
    results = [output, *torch.autograd.grad(output, [query, flat, *(state[key] for key in parameters)], grad)]
    keys = ["output", "grad_query", "grad_input", *(f"grad_{key.replace('.', '_')}" for key in parameters)]
    assert {f"{name}_{key}" for key in keys} == {key for key in EXPECTED if key.startswith(name)}
    for key, result in zip(keys, results, strict=True):
        key = f"{name}_{key}"
        got = parity.thin(result.detach().numpy(), META["outputs"][key])
        np.testing.assert_allclose(got, EXPECTED[key], rtol=0, atol=TOLERANCE, err_msg=key)


@pytest.mark.parametrize(
    "sides",
    [PYRAMID, [(7, 3)], [(0, 0), (3, 5)], [(3, 5), (0, 4), (2, 2)], [(2, 2), (5, 0)]],
    ids=["odd", "one", "empty first", "empty within", "empty last"],
)
@pytest.mark.parametrize("reach", [(0.0, 1.0), (-0.5, 1.5), (-30.0, 30.0), (2.0, 3.0)])
def test_equals_grid_sample(sides, reach):
    arguments = problem(sides, *reach)
    got, expected = (outputs_and_gradients(op, *arguments) for op in (ms_deform_attn, grid_sample_loop))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    if reach[0] == 2.0:
        assert not any(tensor.any() for tensor in got), "all samples lie outside"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_sums_in_float32(dtype):
    value, shapes, starts, locations, weights = problem(PYRAMID)
    low = [tensor.to(dtype) for tensor in (value, locations, weights)]
    got = outputs_and_gradients(ms_deform_attn, low[0], shapes, starts, *low[1:])
    exact = [tensor.double() for tensor in low]
    grad = torch.linspace(-1, 1, got[0].numel(), dtype=dtype).view(got[0].shape).double()
    expected = outputs_and_gradients(ms_deform_attn, exact[0], shapes, starts, *exact[1:], grad)
    assert all(tensor.dtype == dtype for tensor in got)
    for mine, truth in zip(got, expected, strict=True):  # one rounding of the result, beside float32's own
        torch.testing.assert_close(mine.double(), truth, rtol=torch.finfo(dtype).eps, atol=2e-5)


def test_heads_apart_in_memory():
    """A tensor whose heads lie far apart, and each with one sample, has no dense view."""
    value, shapes, starts, locations, weights = problem([(3, 5)], queries=1)
    locations, weights = locations[..., :1, :], weights[..., :1]
    apart = weights.transpose(0, 2).contiguous().transpose(0, 2)
    expected, got = (
        outputs_and_gradients(ms_deform_attn, value, shapes, starts, locations, w) for w in (weights, apart)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_strided_inputs_and_levels_out_of_order():
    value, shapes, starts, locations, weights = problem(PYRAMID)
    strided = [tensor.transpose(0, 2).contiguous().transpose(0, 2) for tensor in (value, locations, weights)]
    assert not any(tensor.is_contiguous() for tensor in strided)
    expected = outputs_and_gradients(ms_deform_attn, value, shapes, starts, locations, weights)
    got = outputs_and_gradients(ms_deform_attn, strided[0], shapes, starts, *strided[1:])
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    last_first = torch.cat((value[:, 16:], value[:, :16]), 1)
    moved = ms_deform_attn(last_first, shapes, torch.tensor([8, 23, 0]), locations, weights)
    torch.testing.assert_close(moved, expected[0], rtol=0, atol=0)


@pytest.mark.parametrize("sides", [[(0, 0)], [(2, 3)]])
@pytest.mark.parametrize("queries", [0, 2])
def test_nothing_to_sample_is_zero(sides, queries):
    value, shapes, starts, locations, weights = problem(sides, queries=queries)
    results = outputs_and_gradients(ms_deform_attn, value, shapes, starts, locations, weights)
    assert [r.shape for r in results] == [(2, queries, 8), value.shape, locations.shape, weights.shape]
    assert any(r.any() for r in results) == (queries > 0 and sides[0][0] > 0)


def test_gradcheck():
    shapes, starts = levels([(3, 4), (2, 1)])
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(1, 14, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(1, 3, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True)
    # Where pixel coordinates are whole numbers the slope jumps: keep 0.1 pixels away.
    cells = torch.randint(-1, 4, (*weights.shape, 2), generator=generator)
    inside = 0.1 + 0.8 * torch.rand(cells.shape, generator=generator, dtype=torch.float64)
    locations = ((cells + inside + 0.5) / shapes.flip(-1)[:, None]).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda v, s, w: ms_deform_attn(v, shapes, starts, s, w), (value, locations, weights)
    )


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        value, shapes, starts, locations, weights = problem(PYRAMID)
        value, locations, weights = (t.to(dtype).requires_grad_() for t in (value, locations, weights))
        torch.library.opcheck(torch.ops.densepred.ms_deform_attn, (value, shapes, starts, locations, weights))
        arguments = [t.detach() for t in (torch.ones(2, 7, 8, dtype=dtype), value, shapes, starts, locations, weights)]
        torch.library.opcheck(torch.ops.densepred.ms_deform_attn_backward, tuple(arguments))


class Step(torch.nn.Module):
    def forward(self, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return ms_deform_attn(value * 2, shapes, starts, locations.sigmoid(), weights.softmax(-1)).relu()


def test_compiles_without_a_graph_break():
    arguments = problem(PYRAMID)
    compiled = torch.compile(Step(), fullgraph=True, backend="aot_eager")
    got, expected = (outputs_and_gradients(op, *arguments) for op in (compiled, Step()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_exports_as_one_node_with_free_sizes():
    free = ({1: torch.export.Dim.DYNAMIC}, None, None, {1: torch.export.Dim.DYNAMIC}, {1: torch.export.Dim.DYNAMIC})
    program = torch.export.export(Step(), problem(PYRAMID), dynamic_shapes=free)
    nodes = [str(node.target) for node in program.graph.nodes if "densepred" in str(node.target)]
    assert nodes == ["densepred.ms_deform_attn.default"]
    other = problem([(6, 5), (2, 3), (1, 2)], queries=4)
    torch.testing.assert_close(program.module()(*other), Step()(*other))


def test_errors_name_what_is_wrong():
    value, shapes, starts, locations, weights = problem(PYRAMID)
    for arguments, message in (
        ((value[0], shapes, starts, locations, weights), r"value \(24, 2, 4\) must be \(B, S, heads, D\)"),
        ((value, shapes, starts, locations, weights[:, :5]), r"sampling_locations is \(2, 7, .*\(2, 5, 2, 3, 3, 2\)"),
        ((value[:1], shapes, starts, locations, weights), r"attention_weights is \(2, 7, .*\(1, 7, 2, 3, 3\)"),
        ((value, shapes[:2], starts, locations, weights), r"spatial_shapes is \(2, 2\), but \(3, 2\)"),
        ((value, shapes, starts[:1], locations, weights), r"level_start_index is \(1,\), but \(3,\)"),
        ((value[:, :20], shapes, starts, locations, weights), r"4 x 2 pixels from row 16 .*20 rows"),
        ((value, shapes, starts - 1, locations, weights), r"from row -1"),
        ((value, shapes, starts, locations.int(), weights), r"sampling_locations is torch.int32"),
        ((value, shapes, starts, locations, weights.to("meta")), r"attention_weights is on meta, value on cpu"),
    ):
        with pytest.raises(ValueError, match=message):
            ms_deform_attn(*arguments)


# The fused form -------------------------------------------------------------------------------------------------------


def fused_problem(sides: list, shared: bool = True, **shape) -> tuple[Tensor, ...]:
    value, shapes, starts, locations, weights = problem(sides, **shape)
    references = locations[: 1 if shared else None, :, 0, :, 0].contiguous()
    return value, shapes, starts, references, locations[..., [1, 0]] * 5 - 2, weights * 3


def unfused(value, shapes, starts, references, offsets, logits) -> Tensor:
    """What the fused op stands for, by autograd."""
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    sides = shapes.flip(1)[:, None].clamp(min=1)
    return ms_deform_attn(value, shapes, starts, references[:, :, None, :, None] + offsets / sides, weights)


def fused_results(op, value, shapes, starts, references, offsets, logits, grad=None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in (value, offsets, logits)]
    output = op(leaves[0], shapes, starts, references, *leaves[1:])
    grad = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape) if grad is None else grad
    return [output, *torch.autograd.grad(output, leaves, grad)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("sides", [PYRAMID, [(7, 3)], [(3, 5), (0, 4), (2, 2)]], ids=["odd", "one", "empty within"])
def test_fused_is_softmax_and_sum_around_the_plain_op(sides, shared):
    arguments = fused_problem(sides, shared)
    got, expected = (fused_results(op, *arguments) for op in (ms_deform_attn_fused, unfused))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_fused_reads_half_precision_beside_float32_reference_points():
    value, shapes, starts, references, offsets, logits = fused_problem(PYRAMID)
    low = [tensor.bfloat16() for tensor in (value, offsets, logits)]
    got = fused_results(ms_deform_attn_fused, low[0], shapes, starts, references.float(), *low[1:])
    exact = [tensor.double() for tensor in low]
    grad = torch.linspace(-1, 1, got[0].numel(), dtype=torch.bfloat16).view(got[0].shape).double()
    expected = fused_results(unfused, exact[0], shapes, starts, references.float().double(), *exact[1:], grad)
    assert all(tensor.dtype == torch.bfloat16 for tensor in got)
    for mine, truth in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=torch.finfo(torch.bfloat16).eps, atol=2e-5)


@pytest.mark.parametrize("sides", [[(0, 0)], [(2, 3)]])
@pytest.mark.parametrize("queries", [0, 2])
def test_fused_with_nothing_to_sample_is_zero(sides, queries):
    arguments = fused_problem(sides, queries=queries)
    found = fused_results(ms_deform_attn_fused, *arguments)
    assert [x.shape for x in found] == [(2, queries, 8), *(arguments[i].shape for i in (0, 4, 5))]
    assert any(x.any() for x in found) == (queries > 0 and sides[0][0] > 0)


def test_fused_opcheck():
    value, shapes, starts, references, offsets, logits = fused_problem(PYRAMID)
    leaves = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
    arguments = (leaves[0], shapes, starts, references, *leaves[1:])
    torch.library.opcheck(torch.ops.densepred.ms_deform_attn_fused, arguments)
    backward = (torch.ones(2, 7, 8, dtype=value.dtype), *(tensor.detach() for tensor in arguments))
    torch.library.opcheck(torch.ops.densepred.ms_deform_attn_fused_backward, backward)


class FusedStep(torch.nn.Module):
    def forward(self, value: Tensor, *others: Tensor) -> Tensor:
        return ms_deform_attn_fused(value * 2, *others[:4], others[4] * 3).relu()


def test_fused_compiles_without_a_graph_break_and_exports_as_one_node():
    arguments = fused_problem(PYRAMID)
    compiled = torch.compile(FusedStep(), fullgraph=True, backend="aot_eager")
    got, expected = (fused_results(op, *arguments) for op in (compiled, FusedStep()))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    free = {1: torch.export.Dim.DYNAMIC}
    shapes = {"value": free, "others": (None, None, free, free, free)}
    program = torch.export.export(FusedStep(), arguments, dynamic_shapes=shapes)
    nodes = [str(node.target) for node in program.graph.nodes if "densepred" in str(node.target)]
    assert nodes == ["densepred.ms_deform_attn_fused.default"]
    other = fused_problem([(6, 5), (2, 3), (1, 2)], queries=4)
    torch.testing.assert_close(program.module()(*other), FusedStep()(*other))


def test_fused_errors_name_what_is_wrong():
    value, shapes, starts, references, offsets, logits = fused_problem(PYRAMID)
    for arguments, message in (
        ((value, shapes, starts, references.clone().requires_grad_(), offsets, logits), "call ms_deform_attn with loc"),
        (
            (value, shapes, starts, references[:, :5], offsets, logits),
            r"is \(1, 5, 3, 2\), but \(2, 7, 3, 2\) or \(1, 7",
        ),
        ((value, shapes, starts, references.expand(3, -1, -1, -1), offsets, logits), r"is \(3, 7, 3, 2\)"),
        ((value, shapes, starts, references, offsets[:, :5], logits), r"offsets is \(2, 5, 2, 3, 3, 2\)"),
        ((value, shapes, starts, references, offsets, logits[0]), r"attention_logits \(7, 2, 3, 3\) \(B, Q, heads"),
        ((value, shapes, starts, references, offsets, logits.long()), r"attention_logits is torch.int64"),
        ((value[:, :20], shapes, starts, references, offsets, logits), r"4 x 2 pixels from row 16 .*20 rows"),
    ):
        with pytest.raises(ValueError, match=message):
            ms_deform_attn_fused(*arguments)

"""Bi-level routing attention: the published numbers of both codes, softmax over a written-out list of keys, the compilers."""

import pytest
import torch
from torch import Tensor

from densepred.encoders.biformer import BiLevelRoutingAttention, to_map, to_regions
from densepred.ops import bilevel_routing_attention, route_regions
from densepred.ops.bilevel_routing_attention import _BLOCK
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "bilevel_routing_attention")
TOLERANCE = META["tolerance"]["max_abs"]
OURS = (("qkv.qkv.", "qkv."), ("qkv_linear.", "qkv."), ("output_linear.", "wo."), ("router.emb.", "router."))
SIZES = {  # B, R, T, S, K, D, C, heads
    "plain": (2, 6, 4, 4, 3, 8, 8, 2),
    "odd": (1, 5, 3, 7, 2, 6, 9, 3),
    "one region": (2, 1, 5, 4, 1, 4, 4, 1),
    "one token": (1, 4, 1, 1, 2, 2, 4, 2),
    "one channel a head": (1, 3, 2, 3, 2, 3, 3, 3),
    "all regions, one thrice": (1, 3, 2, 2, 5, 4, 4, 2),
}
EMPTY = {
    "no image": (0, 3, 2, 2, 2, 4, 4, 2),
    "no query": (2, 3, 0, 2, 2, 4, 4, 2),
    "no region": (2, 0, 2, 2, 2, 4, 4, 2),
}


def problem(name: str, dtype: torch.dtype = torch.float64, times: float = 1.0) -> tuple:
    batch, number, tokens, keys, chosen, depth, channels, heads = (SIZES | EMPTY)[name]
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, depth), (keys, depth), (keys, channels)
    q, k, v = (torch.randn(batch, number, *s, generator=generator, dtype=torch.float64) for s in shapes)
    regions = torch.randint(max(number, 1), (batch, number, chosen), generator=generator)
    return (times * q).to(dtype), k.to(dtype), v.to(dtype), regions, heads, depth**-0.5


def token_by_token(q: Tensor, k: Tensor, v: Tensor, regions: Tensor, heads: int, scale: float) -> Tensor:
    """The definition: each query token against the keys of its regions, each head with its block of channels."""
    out = torch.zeros(*q.shape[:3], v.shape[3], dtype=v.dtype)
    for image, region, token in torch.cartesian_prod(*(torch.arange(n) for n in q.shape[:3])).tolist():
        keys, values = (torch.cat([x[image, r] for r in regions[image, region].tolist()]) for x in (k, v))
        query = q[image, region, token].view(heads, -1)
        weights = (scale * torch.einsum("hd,nhd->hn", query, keys.unflatten(1, (heads, -1)))).softmax(1)
        out[image, region, token] = torch.einsum("hn,nhc->hc", weights, values.unflatten(1, (heads, -1))).flatten()
    return out


def results(op, arguments: tuple, grad: Tensor | None = None) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in arguments[:3]]
    out = op(*leaves, *arguments[3:])
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape) if grad is None else grad
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def module_of(case: dict) -> BiLevelRoutingAttention:
    options = case["kwargs"]
    pooling = options.get("kv_downsample_mode", "identity")
    size = options.get("kv_per_win") if pooling.startswith("ada") else options.get("kv_downsample_ratio")
    module = BiLevelRoutingAttention(
        *(options[key] for key in ("dim", "num_heads", "n_win", "topk")),
        qk_channels=options.get("qk_dim"),
        kernel=options["side_dwconv"],
        project=options.get("param_attention", "qkvo") == "qkvo",
        floor_regions=case["variant"] == "nchw",
        kv_pool=None if pooling == "identity" else (pooling, size),
        **{key: options.get(key, False) for key in ("soft_routing", "diff_routing", "param_routing")},
    ).double()
    state = {our_name(key): torch.from_numpy(parity.fill(key, shape)) for key, shape in case["state_dict"]}
    own = module.state_dict()
    module.load_state_dict({key: value.reshape(own[key].shape) for key, value in state.items()})
    return module


def our_name(key: str) -> str:
    for theirs, ours in OURS:
        key = key.replace(theirs, ours)
    return key


def to_nhwc(x: Tensor, case: dict) -> Tensor:
    return x if case["layout"] == "NHWC" else x.permute(0, 2, 3, 1)


def tensor_of(recipe: dict) -> Tensor:
    return torch.from_numpy(parity.normal_input(recipe["seed"], recipe["shape"]))


@pytest.mark.parametrize("name", META["input"]["modules"])
def test_parity(name, monkeypatch):
    case = META["input"]["modules"][name]
    module, x, routed = module_of(case), tensor_of(case["x"]).requires_grad_(), []
    route = module.route
    monkeypatch.setattr(module, "route", lambda *args: routed.append(route(*args)) or routed[-1])
    y = module(to_nhwc(x, case))
    y = y if case["layout"] == "NHWC" else y.permute(0, 3, 1, 2)
    y.backward(tensor_of(case["grad_out"]))
    found = {"out": y.detach(), "grad_x": x.grad}
    gradients = {key: p.grad for key, p in module.named_parameters()}
    for key, shape in case["state_dict"]:
        gradient = gradients[our_name(key)]
        found[f"grad.{key}"] = torch.zeros(shape) if gradient is None else gradient.reshape(shape)
    regions, weights = routed[0]
    if not case["rows_with_a_tie_at_the_cut"]:
        found["routed"] = regions.sort(2).values
    if weights is not None:
        found["routing_weight"] = weights.detach()
    for key, value in found.items():
        output = META["outputs"][f"{name}.{key}"]
        assert list(value.shape) == output["shape"], key
        expected = EXPECTED[f"{name}.{key}"]
        thinned = parity.thin(value.numpy(), output).reshape(expected.shape)
        assert abs(thinned - expected).max() <= TOLERANCE, key


@pytest.mark.parametrize("name", SIZES)
def test_equals_the_definition(name):
    arguments = problem(name)
    found = results(bilevel_routing_attention, arguments)
    assert all(tensor.is_contiguous() for tensor in found)
    torch.testing.assert_close(found, results(token_by_token, arguments), rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", EMPTY)
def test_nothing_gives_nothing(name):
    arguments = problem(name)
    out, *gradients = results(bilevel_routing_attention, arguments)
    assert out.shape == arguments[0].shape
    assert all(
        gradient.shape == x.shape and not gradient.any() for gradient, x in zip(gradients, arguments, strict=False)
    )


def test_large_logits_stay_exact():
    arguments = problem("odd", times=500.0)
    found = results(bilevel_routing_attention, arguments)
    torch.testing.assert_close(found, results(token_by_token, arguments), rtol=0, atol=1e-10)


def test_layouts_and_blocks_change_nothing(monkeypatch):
    q, k, v, *rest = problem("plain")
    expected = results(bilevel_routing_attention, (q, k, v, *rest))
    strided = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in (q, k, v)]
    assert not strided[0].is_contiguous()
    torch.testing.assert_close(results(bilevel_routing_attention, (*strided, *rest)), expected, rtol=0, atol=1e-14)
    monkeypatch.setitem(_BLOCK, "cpu", 1)  # a head of a region at a time
    torch.testing.assert_close(results(bilevel_routing_attention, (q, k, v, *rest)), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_works_in_float32(dtype):
    arguments = problem("plain", dtype)
    found = results(bilevel_routing_attention, arguments)
    grad = torch.linspace(-1, 1, found[0].numel(), dtype=dtype).view(found[0].shape).double()
    expected = results(token_by_token, (*(tensor.double() for tensor in arguments[:3]), *arguments[3:]), grad)
    for mine, truth in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        # The gradients also hold the rounding of the saved output, which stays in the dtype of v.
        allowed = 4 * torch.finfo(dtype).eps * float(truth.abs().max())
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=allowed)


def test_autocast_does_not_reach_the_sums():
    arguments = problem("plain", torch.float32)
    expected = results(bilevel_routing_attention, arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results(bilevel_routing_attention, arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_no_copies_of_keys_exist_as_a_whole():
    q, k, v = (torch.randn(1, 64, 64, 64) for _ in range(3))
    regions = torch.rand(1, 64, 64).topk(16).indices
    with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
        bilevel_routing_attention(q, k, v, regions, 2, 0.1)
    held, peak = 0, 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    tokens = 4 * q.numel()  # bytes; gathered keys and values would be 32 of these, the weights another 32
    assert tokens < peak < 12 * tokens


@pytest.mark.parametrize("name", ["odd", "one channel a head"])
def test_gradcheck_and_opcheck(name):
    *maps, regions, heads, scale = problem(name)
    rest = (regions, heads, scale)
    leaves = [tensor.requires_grad_() for tensor in maps]
    assert torch.autograd.gradcheck(lambda *qkv: bilevel_routing_attention(*qkv, *rest), leaves)
    ops = torch.ops.densepred
    for dtype in (torch.float32, torch.bfloat16):
        arguments = [t.requires_grad_() for t in problem(name, dtype)[:3]]
        torch.library.opcheck(ops.bilevel_routing_attention, (*arguments, *rest))
        maps = [t.detach() for t in arguments]
        out, log_sum = ops.bilevel_routing_attention(*maps, *rest)
        saved = (torch.ones_like(out), *maps, regions, out, log_sum, heads, scale)
        torch.library.opcheck(ops.bilevel_routing_attention_backward, saved)


def test_route_regions_takes_the_best_without_a_gradient():
    q, k = torch.randn(2, 9, 4, requires_grad=True), torch.randn(2, 9, 4)
    regions = route_regions(q, k, 3)
    logits = torch.einsum("brd,bsd->brs", q.detach(), k)
    assert torch.equal(regions, logits.argsort(2, descending=True)[..., :3])
    assert not regions.requires_grad
    # The choice is made in float32: in bfloat16 these two logits are equal.
    close = torch.tensor([[[1.0, 2**-8], [0, 0]]]).bfloat16(), torch.tensor([[[1.0, 0], [1, 1]]]).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert route_regions(*close, 1)[0, 0] == 1
    with pytest.raises(ValueError, match="topk=10: choose 1 to 9"):
        route_regions(q, k, 10)


def test_all_regions_are_full_attention():
    """Every region attends to every other: the ordinary attention of the whole map, LePE added."""
    module = BiLevelRoutingAttention(12, 3, regions_per_side=4, topk=16).double()
    x = torch.randn(2, 8, 12, 12, dtype=torch.float64)
    q, k, v = (part.flatten(1, 2).unflatten(2, (3, 4)).transpose(1, 2) for part in module.qkv(x).chunk(3, dim=3))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=12**-0.5).transpose(1, 2).reshape(x.shape)
    local = module.lepe(module.qkv(x)[..., 24:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(module(x), module.wo(y + local), rtol=0, atol=1e-13)


def test_regions_are_cut_row_by_row_and_joined_again():
    x = torch.arange(2 * 6 * 8 * 3).view(2, 6, 8, 3)
    regions = to_regions(x, 2, 4)
    assert regions.shape == (2, 8, 6, 3)
    assert torch.equal(regions[1, 5], x[1, 3:6, 2:4].reshape(6, 3))
    assert torch.equal(to_map(regions, 4, 2), x)


class Step(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = BiLevelRoutingAttention(8, 2, regions_per_side=2, topk=2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x * 2).relu()


def test_compiles_without_a_graph_break():
    step, x = Step(), torch.randn(1, 5, 7, 8, dtype=torch.float64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = (torch.autograd.grad(f(x).square().sum(), list(step.parameters())) for f in (compiled, step))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_exports_as_one_node_with_free_sizes():
    step, side = Step(), torch.export.Dim.DYNAMIC
    x = torch.randn(1, 6, 10, 8, dtype=torch.float64)
    program = torch.export.export(step, (x,), dynamic_shapes=({1: side, 2: side},), strict=False)
    nodes = [str(node.target) for node in program.graph.nodes if "densepred" in str(node.target)]
    assert nodes == ["densepred.bilevel_routing_attention.default"]
    other = torch.randn(1, 9, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(program.module()(other), step(other))


def test_errors_name_what_is_wrong():
    q, k, v, regions, heads, scale = problem("plain")
    for arguments, message in (
        ((q[0], k, v, regions, heads), r"q \(6, 4, 8\) must be \(B, R, T, D\)"),
        ((q, k[..., :6], v, regions, heads), r"k \(2, 6, 4, 6\) \(B, R, S, D\)"),
        ((q, k, v[:, :, :3], regions, heads), r"v \(2, 6, 3, 8\) \(B, R, S, C\)"),
        ((q, k[:, :, :0], v[:, :, :0], regions, heads), "S at least 1"),
        ((q, k, v, regions.int(), heads), r"regions is torch.int32 \(2, 6, 3\) on cpu, it must be int64"),
        ((q, k, v, regions[:, :5], heads), r"\(B, R, K\) = \(2, 6, 1 or more\)"),
        ((q, k, v, regions[..., :0], heads), "1 or more"),
        ((q, k, v, regions, 3), "heads=3 must divide 8"),
        ((q, k, v, regions - 6, heads), "regions holds -6, but regions count from 0 to 5"),
        ((q, k, v, regions + 6, heads), "regions holds 11"),
        ((q.long(), k, v, regions, heads), "q is torch.int64, it must be a float tensor"),
        ((q.to("meta"), k, v, regions, heads), "move them to one device"),
    ):
        with pytest.raises(ValueError, match=message):
            bilevel_routing_attention(*arguments, scale)
    with pytest.raises(ValueError, match="param_routing needs diff_routing"):
        BiLevelRoutingAttention(8, 2, 4, 4, param_routing=True)
    with pytest.raises(ValueError, match="soft_routing=False, diff_routing=True"):
        BiLevelRoutingAttention(8, 2, 4, 4, diff_routing=True)
    with pytest.raises(ValueError, match=r"unknown pooling.*avgpool"):
        BiLevelRoutingAttention(8, 2, 4, 4, kv_pool=("avg_pool", 2))
    with pytest.raises(ValueError, match="a map of 3x9 tokens has no 4x4 regions"):
        BiLevelRoutingAttention(8, 2, 4, 4, floor_regions=True)(torch.zeros(1, 3, 9, 8))

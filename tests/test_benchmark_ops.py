"""The benchmark of operators: its baselines compute the same, its memory is what tensors take, its table holds all of it."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from densepred.engine import benchmark_ops
from densepred.engine.benchmark_ops import benchmark_ops as table_of
from densepred.engine.benchmark_ops import measure
from densepred.engine.op_cases import CASES, OpCase
from densepred.engine.op_cases.bilevel_routing_attention import routed_inputs
from densepred.engine.op_cases.criss_cross_attention import (
    criss_cross_by_bmm,
    criss_cross_by_einsum,
    criss_cross_by_mask,
    criss_cross_inputs,
)
from densepred.engine.op_cases.kmeans_attention import kmeans_inputs
from densepred.engine.op_cases.modulated_deform_conv2d import deform_conv_inputs
from densepred.engine.op_cases.ms_deform_attn import deformable_inputs
from densepred.engine.op_cases.varying_window_attention import varying_window_inputs
from densepred.engine.timing import peak_bytes

CPU = torch.device("cpu")


def tiny(op: str, inputs) -> OpCase:
    return replace(next(case for case in CASES if case.op == op), inputs=inputs, shape="tiny")


CROSS = partial(criss_cross_inputs, 1, 9, 7, 16, torch.channels_last)
TINY = [
    *(replace(tiny("criss_cross_attention", CROSS), theirs=f) for f in (criss_cross_by_bmm, criss_cross_by_einsum)),
    replace(tiny("criss_cross_attention", CROSS), theirs=criss_cross_by_mask),
    tiny("bilevel_routing_attention", partial(routed_inputs, 1, 9, 64, 2)),
    tiny("kmeans_attention", partial(kmeans_inputs, 6, 8, 5)),
    tiny("modulated_deform_conv2d", partial(deform_conv_inputs, 5, 7, 4, 6)),
    tiny("ms_deform_attn", partial(deformable_inputs, (5, 3), 4)),
    tiny("varying_window_attention", partial(varying_window_inputs, 16, 24, 8, 2)),
]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.theirs.__name__)
def test_both_compute_the_same(case):
    forward, both = measure(case, repeats=1)
    assert (forward.direction, both.direction) == ("forward", "forward+backward")
    for found in (forward, both):
        assert 0 < min(found.errors) <= max(found.errors) < 1e-5
        assert min(found.memory) > 0 and min(found.seconds) > 0 and found.ratio > 0
    assert all(more >= less for more, less in zip(both.memory, forward.memory, strict=True))


def test_another_result_is_no_measurement():
    wrong = replace(TINY[0], ours=lambda q, k, v: criss_cross_by_bmm(2 * q, k, v))
    with pytest.raises(ValueError, match=r"criss_cross_attention, tiny, against bmm.*times would mean nothing"):
        measure(wrong, repeats=1)
    broken = replace(TINY[0], ours=lambda q, k, v: criss_cross_by_bmm(q, k, v) * torch.nan)
    with pytest.raises(ValueError, match="nan"):
        measure(broken, repeats=1)


def test_a_void_row_says_why_in_the_table(monkeypatch):
    wrong = replace(TINY[0], ours=lambda q, k, v: criss_cross_by_bmm(2 * q, k, v))
    monkeypatch.setattr(benchmark_ops, "CASES", [wrong])
    assert "void: criss_cross_attention, tiny, against bmm: errors" in " ".join(table_of("cpu", repeats=1).split())


def test_whole_numbers_without_a_gradient():
    case = OpCase(
        "labels",
        "tiny",
        "argmax",
        lambda random: (torch.randn(5, 8, generator=random),),
        argmax_by_max,
        torch.argmax,
        (),
    )
    (found,) = measure(case, repeats=1)
    assert found.direction == "forward" and found.errors == (0, 0)
    with pytest.raises(ValueError, match=r"allowed 0\.0001"):
        measure(replace(case, ours=torch.argmin), repeats=1)


def argmax_by_max(x: torch.Tensor) -> torch.Tensor:
    return x.flatten().max(0).indices


def test_types_round_the_arguments(monkeypatch):
    seen = []
    case = replace(tiny("kmeans_attention", partial(kmeans_inputs, 6, 8, 5)), trained=())
    case = replace(case, ours=lambda value, logits: seen.append(value.dtype) or case.theirs(value, logits))
    monkeypatch.setattr(benchmark_ops, "CASES", [case])
    text = table_of("cpu", repeats=1, dtypes=["bfloat16", "float32"])
    assert set(seen) == {torch.bfloat16, torch.float32} and text.count("alternating rounds") == 2
    with pytest.raises(ValueError, match="--dtype float8: choose from float32, bfloat16, float16"):
        table_of("cpu", dtypes=["float8"])


def test_memory_is_that_of_the_tensors():
    def run():
        first = torch.ones(1000)  # 4000 bytes
        second = torch.ones(2000)
        del first
        return second + torch.ones(500).sum()  # 8000 held, 2000 and 4, then 8000 more

    assert 16_000 <= peak_bytes(run, CPU) < 18_500


def test_a_map_of_all_pairs_takes_more():
    dense = replace(TINY[2], inputs=partial(criss_cross_inputs, 1, 16, 16, 16, torch.channels_last))
    ours, theirs = measure(dense, repeats=1)[0].memory
    pairs = 4 * 16**4
    assert ours < pairs < theirs


def test_the_table_has_a_row_for_every_direction(monkeypatch):
    monkeypatch.setattr(benchmark_ops, "CASES", TINY)
    text = table_of("cpu", repeats=1)
    assert text.count("forward+backward") == len(TINY) and text.count(" tiny; ") == len(TINY)
    only = table_of("cpu", ["kmeans_attention"], repeats=1)
    assert "one-hot" in only and "criss_cross" not in only
    with pytest.raises(ValueError, match=r"--op kmeans_atention: .*kmeans_attention"):
        table_of("cpu", ["kmeans_atention"])


def test_the_published_sizes_are_measured():
    shapes = {case.shape for case in CASES if case.op == "criss_cross_attention"}
    assert "97x97x512" in shapes
    for case in (case for case in CASES if "cpu" in case.devices):  # the others' inputs take gigabytes
        assert all(case.inputs(torch.Generator())[i].is_floating_point() for i in case.trained)

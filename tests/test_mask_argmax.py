"""Labels from small masks: against the plain form at full size, ties, areas, memory, errors, compilers."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densepred.heads.resizing import resize_to_file
from densepred.ops import Taps, linear_resize, linear_taps, mask_argmax, mask_owner

SHAPES = {
    "enlarged": ((5, 7), (20, 28), (20, 28), (20, 28)),
    "cut": ((5, 7), (20, 28), (17, 25), (17, 25)),
    "cut and resized": ((5, 7), (20, 28), (17, 25), (31, 12)),
    "one row": ((1, 9), (4, 36), (1, 30), (1, 50)),
    "one pixel": ((1, 1), (4, 4), (1, 1), (1, 1)),
}


def masks(queries: int, small: tuple[int, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return (5 * torch.randn(queries, *small, generator=torch.Generator().manual_seed(seed))).to(dtype)


def plain_probabilities(logits: Tensor, pad: tuple, img: tuple, ori: tuple) -> Tensor:
    for size in (pad, ori):
        logits = F.interpolate(logits[None], size, mode="bilinear")[0]
        logits = logits[:, : img[0], : img[1]] if size == pad else logits
    return logits.sigmoid()


@pytest.fixture(params=[1, 24 << 20], ids=["band of one row", "one band"])
def bands(request, monkeypatch):
    monkeypatch.setattr(linear_resize, "CPU_BAND_BYTES", request.param)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("classes", [1, 5, 16])
def test_labels_are_those_of_full_size(shape, classes, bands):
    small, *sizes = shape
    logits = masks(9, small)
    probs = torch.rand(9, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.einsum("qc,qhw->chw", probs, plain_probabilities(logits, *sizes)).argmax(0)
    found = mask_argmax(logits, probs, *resize_to_file(logits, *sizes))
    assert found.dtype == torch.int64 and torch.equal(found, expected)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_owners_and_areas_are_those_of_full_size(shape, bands):
    small, *sizes = shape
    logits = masks(9, small)
    scores = torch.rand(9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    probs = plain_probabilities(logits, *sizes)
    owner = (scores[:, None, None] * probs).argmax(0)
    strong = probs >= 0.5
    written = torch.where(strong.gather(0, owner[None])[0], owner + 1, 0)
    ids, areas = mask_owner(logits, scores, *resize_to_file(logits, *sizes))
    assert ids.dtype == torch.int32 and torch.equal(ids, written.int())
    for query in range(9):
        assert areas[query].tolist() == [
            int((owner == query).sum()),
            int((written == query + 1).sum()),
            int(strong[query].sum()),
        ]
    assert areas[:, 0].sum() == ids.numel() and areas.dtype == torch.int64


def test_ties_go_to_the_first():
    logits = torch.zeros(4, 2, 3)
    same = linear_taps(2, 4), linear_taps(3, 6)
    assert not mask_argmax(logits, torch.full((4, 20), 0.5), *same).any()
    ids, areas = mask_owner(logits, torch.tensor([0.1, 0.7, 0.7, 0.3]), *same)
    assert (ids == 2).all() and areas.tolist() == [[0, 0, 24], [24, 24, 24], [0, 0, 24], [0, 0, 24]]


def test_a_weak_owner_is_not_written():
    ids, areas = mask_owner(torch.full((1, 2, 2), -1.0), torch.ones(1), linear_taps(2, 2), linear_taps(2, 2))
    assert not ids.any() and areas.tolist() == [[4, 0, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_computed_in_full_precision(dtype):
    logits, probs = masks(6, (4, 5), dtype), torch.rand(6, 8).to(dtype)
    resizes = linear_taps(4, 16), linear_taps(5, 20)
    assert torch.equal(mask_argmax(logits, probs, *resizes), mask_argmax(logits.double(), probs.double(), *resizes))
    found, exact = (
        mask_owner(logits, probs[:, 0], *resizes),
        mask_owner(logits.double(), probs[:, 0].double(), *resizes),
    )
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))
    mixed = mask_argmax(logits, probs.double(), *resizes)
    assert torch.equal(mixed, mask_argmax(logits.double(), probs.double(), *resizes))


def test_autocast_changes_nothing():
    logits, probs, resizes = masks(20, (8, 8), torch.float32), torch.rand(20, 6), (linear_taps(8, 32),) * 2
    with torch.autocast("cpu", torch.bfloat16):
        found = mask_argmax(logits, probs, *resizes)
    assert torch.equal(found, mask_argmax(logits, probs, *resizes))


def test_opcheck():
    logits, probs = masks(3, (4, 5), torch.float32), torch.rand(3, 4)
    rows, columns = (taps.on(logits) for taps in (linear_taps(4, 7), linear_taps(5, 9)))
    resizes = (rows.indices, rows.weights, columns.indices, columns.weights)
    torch.library.opcheck(torch.ops.densepred.mask_argmax, (logits, probs, *resizes))
    torch.library.opcheck(torch.ops.densepred.mask_owner, (logits, probs[:, 0].contiguous(), *resizes))


def test_compiles_without_a_graph_break():
    rows, columns = (taps.on(torch.zeros(1)) for taps in (linear_taps(4, 7), linear_taps(5, 9)))

    def labels(logits: Tensor, probs: Tensor, *taps: Tensor) -> tuple[Tensor, ...]:
        resizes = Taps(*taps[:2]), Taps(*taps[2:])
        return mask_argmax(logits.relu(), probs, *resizes) + 1, *mask_owner(logits, probs[:, 0], *resizes)

    arguments = masks(3, (4, 5), torch.float32), torch.rand(3, 4), rows.indices, rows.weights
    arguments += columns.indices, columns.weights
    compiled = torch.compile(labels, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), labels(*arguments), strict=True))


@pytest.mark.parametrize("op, factors", [(mask_argmax, (3, 4)), (mask_owner, (3,))])
def test_errors_name_what_is_wrong(op, factors):
    logits, resizes = torch.randn(3, 4, 5), (linear_taps(4, 8), linear_taps(5, 10))
    with pytest.raises(ValueError, match=r"\(3, 4, 5\).*\(4,"):
        op(logits, torch.rand(4, *factors[1:]), *resizes)
    with pytest.raises(ValueError, match=r"\(0, 4, 5\).*one query or more"):
        op(logits[:0], torch.rand(0, *factors[1:]), *resizes)
    with pytest.raises(ValueError, match="int64"):
        op(logits.long(), torch.rand(factors), *resizes)
    with pytest.raises(ValueError, match=r"rows read input 4, .* have 4"):
        op(logits, torch.rand(factors), linear_taps(5, 8), linear_taps(5, 10))

"""Post-processing of Mask2Former: the official code's results, the plain full-size form, memory, and odd inputs."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from densepred.heads.kmax_inference import mask_boxes
from densepred.heads.mask2former_inference import (
    instance_inference,
    panoptic_inference,
    semantic_inference,
    semantic_scores,
)
from densepred.ops import linear_resize
from tests import parity

META, EXPECTED = parity.case(parity.CASES / "mask2former_r50_coco_panoptic")
SHAPES = dict(pad_shape=(96, 128), img_shape=(90, 120), ori_shape=(117, 156))
THINGS = range(80)


@pytest.fixture(scope="module")
def synthetic():
    """Class logits (Q, C + 1) and mask logits (Q, h, w) of the case."""
    with np.load(parity.CASES / "mask2former_r50_coco_panoptic" / "inputs.npz") as inputs:
        logits = inputs["pp_logits_q"] / 8 + 0.01 * parity.normal_input(907, (100, 134))
        masks = inputs["pp_masks_q"] / 16 + 0.02 * parity.normal_input(908, (100, 24, 32))
    return torch.from_numpy(logits), torch.from_numpy(masks)


@pytest.mark.parametrize("case, thresholds", [("pp", ()), ("pp0", (0.0, 0.0))])
def test_panoptic_of_the_case(synthetic, case, thresholds):
    found = panoptic_inference(*synthetic, *SHAPES.values(), THINGS, *thresholds)
    np.testing.assert_array_equal(found.numpy(), EXPECTED[f"{case}_panoptic_seg"])
    records = [[s["id"], s["isthing"], s["label"]] for s in found.segments]
    np.testing.assert_array_equal(records, EXPECTED[f"{case}_segments_info"])
    assert all(0 < s["score"] < 1 and not s["iscrowd"] for s in found.segments)


def test_semantic_of_the_case(synthetic):
    found, output = semantic_scores(*synthetic, **SHAPES, alone=False), META["outputs"]["pp_sem_seg"]
    assert list(found.shape) == output["shape"]
    np.testing.assert_allclose(parity.thin(found, output), EXPECTED["pp_sem_seg"], rtol=0, atol=1e-12)
    labels = semantic_inference(*synthetic, **SHAPES, alone=False)
    np.testing.assert_array_equal(labels, EXPECTED["pp_sem_seg_argmax"])


def test_instances_of_the_case(synthetic):
    found, output = instance_inference(*synthetic, **SHAPES, thing_classes=THINGS), META["outputs"]["pp_inst_masks"]
    np.testing.assert_allclose(found.scores, EXPECTED["pp_inst_scores"], rtol=1e-12)
    order = np.lexsort([found.labels, -found.scores])  # the case sorts empty masks, all of score 0, by class
    np.testing.assert_array_equal(found.labels[order], EXPECTED["pp_inst_classes"])
    np.testing.assert_array_equal(found.masks.sum((1, 2))[order], EXPECTED["pp_inst_areas"])
    np.testing.assert_array_equal(parity.thin(found.masks[order], output), EXPECTED["pp_inst_masks"])


# The plain form, at full size -----------------------------------------------------------------------------------------


def resize(maps, size):
    return F.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]


def plain_logits(masks, pad, img, ori):
    return resize(resize(masks, pad)[:, : img[0], : img[1]], ori)


def plain_semantic(logits, masks, pad, img, ori, alone):
    probs = logits.softmax(-1)[:, :-1]
    inner = resize(masks, pad) if alone else plain_logits(masks, pad, img, ori)
    scores = torch.einsum("qc,qhw->chw", probs, inner.sigmoid())
    return resize(scores[:, : img[0], : img[1]], ori) if alone else scores


def plain_panoptic(logits, masks, pad, img, ori, things, threshold, overlap):
    scores, labels = logits.softmax(-1).max(-1)
    probs = plain_logits(masks, pad, img, ori).sigmoid()
    kept = [q for q in range(len(logits)) if labels[q] < logits.shape[1] - 1 and scores[q] > threshold]
    ids, segments = torch.zeros(ori, dtype=torch.int32), []
    if not kept:
        return ids, segments
    owner = (scores[kept, None, None] * probs[kept]).argmax(0)
    for k, q in enumerate(kept):
        own, strong, label = owner == k, probs[q] >= 0.5, int(labels[q])
        if not (own & strong).any() or own.sum() / strong.sum() < overlap:
            continue
        same = [number for number, other in segments if other == label and label not in things]
        if not same:
            segments.append((len(segments) + 1, label))
        ids[own & strong] = same[0] if same else len(segments)
    return ids, segments


GEOMETRIES = {
    "larger file": ((96, 128), (90, 120), (117, 156)),
    "smaller file": ((96, 128), (96, 101), (37, 41)),
    "a ninth of the map": ((96, 128), (90, 120), (8, 3)),
    "file as shown": ((64, 96), (61, 90), (61, 90)),
    "nothing padded": ((64, 96), (64, 96), (64, 96)),
    "one pixel": ((32, 32), (1, 1), (1, 1)),
}


@pytest.fixture(params=GEOMETRIES, ids=str)
def made_up(request):
    """Random logits (12, 6), smooth mask logits (12, h, w), and the three sizes."""
    sizes = GEOMETRIES[request.param]
    rng = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(12, 6, generator=rng, dtype=torch.float64)
    masks = resize(6 * torch.randn(12, 4, 5, generator=rng, dtype=torch.float64), (sizes[0][0] // 4, sizes[0][1] // 4))
    return logits, masks, *sizes


@pytest.fixture(params=[1, 100_000], ids=["band of one row", "wider band"])
def bands(request, monkeypatch):
    monkeypatch.setattr(linear_resize, "CPU_BAND_BYTES", request.param)


@pytest.mark.parametrize("alone", [False, True])
def test_semantic_equals_the_plain_form(made_up, bands, alone):
    expected = plain_semantic(*made_up, alone)
    torch.testing.assert_close(semantic_scores(*made_up, alone), expected, rtol=0, atol=1e-12)
    assert torch.equal(semantic_inference(*made_up, alone), expected.argmax(0))


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.9])
def test_panoptic_equals_the_plain_form(made_up, bands, overlap):
    things, threshold = {0, 1}, 0.4
    ids, segments = plain_panoptic(*made_up, things, threshold, overlap)
    found = panoptic_inference(*made_up, things, threshold, overlap)
    assert torch.equal(found.ids, ids) and found.ids.dtype == torch.int32
    assert [(s["id"], s["label"]) for s in found.segments] == segments


def test_instances_equal_the_plain_form(made_up, bands):
    logits, masks, *sizes = made_up
    scores, pairs = logits.softmax(-1)[:, :-1].flatten().topk(20)
    maps = plain_logits(masks, *sizes)[pairs // 5]
    inside = maps > 0
    scores = scores * (maps.sigmoid() * inside).sum((1, 2)) / (inside.sum((1, 2)).double() + 1e-6)
    scores, order = scores.sort(descending=True, stable=True)
    found = instance_inference(*made_up, None, 20)
    torch.testing.assert_close(found.scores, scores, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.labels, (pairs % 5)[order]) and torch.equal(found.masks, inside[order])
    assert torch.equal(found.bboxes, mask_boxes(inside[order]))


def test_alone_gives_other_scores():
    """The two orders agree where nothing is resized after the product, and only there."""
    logits, masks = torch.randn(5, 4), 5 * torch.randn(5, 8, 8)
    for ori, same in (((32, 32), True), ((50, 20), False)):
        both = [semantic_scores(logits, masks, (32, 32), (32, 32), ori, alone) for alone in (False, True)]
        assert torch.allclose(*both, atol=1e-6) is same


# Borders --------------------------------------------------------------------------------------------------------------


def sure(labels, maps, classes=3):
    """Queries that are sure of their class (-1 = void), with mask logits of a 2 x 2 map that is shown as it is."""
    logits = torch.zeros(len(labels), classes + 1)
    for q, label in enumerate(labels):
        logits[q, label] = 9
    return logits, torch.tensor(maps, dtype=torch.float32), (2, 2), (2, 2), (2, 2)


LEFT, RIGHT = [[9, -9], [9, -9]], [[-9, 9], [-9, 9]]


def test_stuff_joins_and_things_do_not():
    joined, apart = (panoptic_inference(*sure([2, 2], [LEFT, RIGHT]), things) for things in ({0}, {2}))
    assert joined.ids.tolist() == [[1, 1]] * 2 and [s["isthing"] for s in joined.segments] == [False]
    assert apart.ids.tolist() == [[1, 2]] * 2 and [s["isthing"] for s in apart.segments] == [True, True]


def test_weak_pixels_count_as_owned_but_stay_void():
    """Query 1 owns the right half at a third of probability: no pixel is strong; query 0 keeps its own."""
    found = panoptic_inference(*sure([0, 1], [LEFT, [[-9, -0.7], [-9, -0.7]]]), {0, 1})
    assert found.ids.tolist() == [[1, 0]] * 2 and [s["label"] for s in found.segments] == [0]
    # Owned: all four pixels, strong: two; so 4 / 2 passes any threshold, though half of them stays void.
    only = panoptic_inference(*sure([0], [[[9, -1], [9, -1]]]), {0}, overlap_threshold=1.5)
    assert only.ids.tolist() == [[1, 0]] * 2


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 48)])
def test_nothing_above_the_threshold(size):
    logits, masks = torch.zeros(4, 6), torch.zeros(4, 8, 8)
    logits[:, -1] = 9
    found = panoptic_inference(logits, masks, (32, 32), (32, 24), size, {0})
    assert found.segments == [] and found.ids.tolist() == torch.zeros(size).tolist()
    none = instance_inference(logits, masks, (32, 32), (32, 24), size, thing_classes=())
    assert none.masks.shape == (0, *size) and none.bboxes.shape == (0, 4) and none.scores.shape == (0,)
    empty = instance_inference(logits, masks - 1, (32, 32), (32, 24), size, None, 3)  # masks without a pixel
    assert empty.scores.tolist() == [0, 0, 0] and not empty.masks.any() and not empty.bboxes.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_in_full_precision_out(dtype):
    logits, masks, *sizes = sure([0, 1, -1], [LEFT, RIGHT, LEFT])
    rows = logits.to(dtype), masks.to(dtype), *sizes
    scores = semantic_scores(*rows, alone=False)
    assert scores.dtype == torch.float32 and scores.isfinite().all()
    assert panoptic_inference(*rows, {0}).ids.tolist() == [[1, 2]] * 2
    assert semantic_inference(*rows, alone=True).tolist() == [[0, 1]] * 2
    instances = instance_inference(*rows, None, 2)
    assert sorted(instances.labels.tolist()) == [0, 1] and instances.scores.min() > 0.99
    assert sorted(instances.bboxes.tolist()) == [[0, 0, 1, 2], [1, 0, 2, 2]]


def test_autocast_does_not_round_the_scores():
    args = torch.randn(20, 6), 3 * torch.randn(20, 8, 8), (32, 32), (32, 32), (32, 32), False
    with torch.autocast("cpu", torch.bfloat16):
        found = semantic_scores(*args)
    assert torch.equal(found, semantic_scores(*args))


def peak_bytes(run):
    """The most bytes of tensors that exist at once while ``run`` runs, its result included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = np.cumsum([event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())])
    assert len(sizes) > 20
    return sizes.max()


@pytest.mark.parametrize("side", [200, 600])
def test_memory_stays_within_the_bound(side, monkeypatch):
    """At 600 x 600 one full-size map of 100 logits would take 137 MiB."""
    bound = 16 << 20
    monkeypatch.setattr(linear_resize, "CPU_BAND_BYTES", bound)
    logits, masks = torch.randn(100, 134), torch.randn(100, 100, 100)
    logits[:, :60] += 12 * (torch.rand(100, 60) > 0.98)
    args, pixels = (logits, masks, (400, 400), (400, 390), (side, side)), side**2
    assert peak_bytes(lambda: panoptic_inference(*args, range(80), 0.1)) < 4 * pixels + bound
    assert peak_bytes(lambda: semantic_inference(*args, alone=False)) < 8 * pixels + bound
    assert peak_bytes(lambda: semantic_inference(*args, alone=True)) < 8 * pixels + bound
    assert peak_bytes(lambda: instance_inference(*args, None, 20)) < 20 * pixels + bound

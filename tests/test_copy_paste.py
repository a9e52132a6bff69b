"""Copy-paste: what is pasted, what is left, and that a position of the training run can be repeated."""

import numpy as np
import pytest
import torch

from densepred.data.copy_paste import CopyPaste, _choose
from densepred.data.preprocessor import SegPreprocessor
from densepred.data.transforms import PackSegInputs
from densepred.registry import TRANSFORMS
from tests.test_transforms import Folder

SIZE = (6, 8)


class OneImage:
    """A data set whose only image comes ready-made."""

    def __init__(self, results):
        self.results = results

    def __len__(self):
        return 1

    def get_data_info(self, i):
        return dict(self.results)


def image(grey, panoptic, segments):
    panoptic = np.array(panoptic, np.uint16)
    records = [dict(id=i, label=label, isthing=thing, iscrowd=crowd) for i, label, thing, crowd in segments]
    img = np.full((*panoptic.shape, 3), grey, np.uint8)
    return dict(img=img, panoptic=panoptic, segments=records, img_path="a", img_id=1, ori_shape=(1, 1))


def paste(base, other, seed=0):
    results = {**base, "rng": np.random.default_rng(seed), "dataset": OneImage(other)}
    return CopyPaste(transforms=[], size=SIZE)(results)


THING, STUFF, CROWD = (True, False), (False, False), (True, True)
BASE = image(50, [[1, 1, 2, 2], [1, 1, 2, 2], [0, 3, 3, 3]], [(1, 4, *THING), (2, 9, *STUFF), (3, 4, *CROWD)])


def summary(results):
    return [(s["id"], s["label"], s["isthing"], s["iscrowd"]) for s in results["segments"]]


def test_things_are_pasted_void_and_crowds_are_not():
    other = image(200, [[1, 0, 2, 2, 2], [1, 0, 2, 2, 2]], [(1, 5, *THING), (2, 5, *CROWD)])
    results = paste(BASE, other)
    assert results["panoptic"][:3, :5].tolist() == [[4, 1, 2, 2, 0], [4, 1, 2, 2, 0], [0, 3, 3, 3, 0]]
    assert summary(results) == [(1, 4, *THING), (2, 9, *STUFF), (3, 4, *CROWD), (4, 5, *THING)]
    assert results["img"][:3, :5, 0].tolist() == [[200, 50, 50, 50, 0]] * 2 + [[50, 50, 50, 50, 0]]


def test_canvas_and_padding():
    other = image(200, [[0] * 8] * 5 + [[0] * 7 + [1]], [(1, 5, *THING)])
    results = paste(BASE, other)
    expected = np.ones(SIZE, bool)
    expected[:3, :4] = False
    expected[5, 7] = False  # pasted beyond the base image
    assert np.array_equal(results["padding"], expected)
    assert not results["img"][expected].any() and not results["panoptic"][expected].any()
    assert results["img_shape"] == SIZE == results["img"].shape[:2] == results["panoptic"].shape


def test_padded_pixels_are_zero_in_the_batch():
    results = paste(BASE, image(200, [[0] * 7 + [1]], [(1, 5, *THING)]))
    packed = PackSegInputs()(results)
    preprocessor = SegPreprocessor(mean=[127.5] * 3, std=[127.5] * 3, size=(8, 8))
    batch = preprocessor(dict(inputs=[packed["inputs"]], data_samples=[packed["data_samples"]]), training=True)
    zero = (batch["inputs"][0] == 0).all(0)
    assert torch.equal(zero[:6, :8], torch.from_numpy(results["padding"])) and zero[6:].all()


def test_hidden_segments_go_and_stuff_merges():
    base = image(50, [[1, 2], [3, 3]], [(1, 4, *THING), (2, 9, *STUFF), (3, 8, *STUFF)])
    other = image(200, [[1, 1], [2, 2], [3, 4]], [(1, 6, *THING), (2, 9, *STUFF), (3, 9, *THING), (4, 7, *STUFF)])
    seen = set()
    for seed in range(30):
        results = paste(base, other, seed)
        seen.add((str(results["panoptic"][:3, :2].tolist()), str([s["label"] for s in results["segments"]])))
    # The base's 4 and 9 are always hidden by thing 6; stuff 9 and 7 of the other come with the random prefix.
    assert seen == {
        ("[[2, 2], [1, 1], [3, 0]]", "[8, 6, 9]"),
        ("[[1, 1], [2, 2], [3, 0]]", "[6, 9, 9]"),
        ("[[2, 2], [1, 1], [3, 4]]", "[8, 6, 9, 7]"),
        ("[[1, 1], [2, 2], [3, 4]]", "[6, 9, 9, 7]"),
    }


def test_same_stuff_becomes_one_segment():
    base = image(50, [[1, 1, 1]], [(1, 9, *STUFF)])
    other = image(200, [[0, 2, 1]], [(1, 9, *STUFF), (2, 3, *THING)])
    for seed in range(20):
        results = paste(base, other, seed)
        assert results["panoptic"][0, :3].tolist() == [1, 2, 1]
        assert summary(results) == [(1, 9, *STUFF), (2, 3, *THING)]
    assert {paste(base, other, s)["img"][0, 2, 0] for s in range(20)} == {50, 200}  # pasted in some draws only


def test_prefix_is_uniform():
    segments = [dict(id=i, isthing=i == 5, iscrowd=i == 6) for i in range(1, 7)]
    chosen = [_choose(segments, np.random.default_rng(seed)) for seed in range(600)]
    assert all(5 in ids and 6 not in ids for ids in chosen)
    shares = [np.mean([i in ids for ids in chosen]) for i in range(1, 5)]
    assert np.allclose(shares, 0.5, atol=0.08)  # E(k) / N
    assert abs(np.mean([ids == [5] for ids in chosen]) - (1 + 1 / 5) / 6) < 0.05  # k = 0, or k = 1 and the thing


def test_nothing_to_paste():
    results = paste(BASE, image(200, [[0, 0]], []))
    assert summary(results) == [(1, 4, *THING), (2, 9, *STUFF), (3, 4, *CROWD)]
    assert paste(image(50, [[0]], []), image(200, [[0, 0]], []))["segments"] == []


def test_refuses_what_it_cannot_keep_right():
    with pytest.raises(ValueError, match=r"got an image of 7 x 2 .* crop to the size before"):
        paste(image(50, [[0, 0]] * 7, []), BASE)
    with pytest.raises(ValueError, match=r"\['semantic'\]; .* derive other label maps .* after it"):
        paste({**BASE, "semantic": np.zeros((3, 4), np.uint8)}, BASE)


def pipeline(ratio_range):
    return [
        dict(type="LoadImage"),
        dict(type="LoadPanoptic"),
        dict(type="ScaleJitter", size=(64, 64), ratio_range=ratio_range),
        dict(type="SSDColorJitter"),
        dict(type="Albumentations", transforms=[dict(type="HorizontalFlip", p=0.5)]),
    ]


def test_the_whole_pipeline_repeats(tmp_path):
    folder = Folder(tmp_path, 5)
    second = dict(type="CopyPaste", transforms=pipeline((0.25, 1.0)), size=(64, 64))
    redraw = TRANSFORMS.build(
        dict(type="Redraw", transforms=[*pipeline((0.5, 2.0)), second], min_labelled=60, max_share=1.0)
    )
    pack = PackSegInputs()

    def sample(visit, i):
        return pack(redraw(folder.start(i, (0, visit, i))))

    differing = 0
    for i in range(5):
        first, again, later = sample(0, i), sample(0, i), sample(1, i)
        ids = first["data_samples"].gt_panoptic.ids
        assert torch.equal(first["inputs"], again["inputs"])
        assert torch.equal(ids, again["data_samples"].gt_panoptic.ids)
        assert first["data_samples"].gt_panoptic.segments == again["data_samples"].gt_panoptic.segments
        assert set(ids.unique().tolist()) - {0} == {s["id"] for s in first["data_samples"].gt_panoptic.segments}
        differing += not torch.equal(first["inputs"], later["inputs"])
    assert differing == 5

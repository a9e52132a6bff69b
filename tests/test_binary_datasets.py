"""The sets with two classes, in their own files: which label is foreground, the splits, and what is amiss named."""

import runpy
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from densepred.data import ISBI2012, DSB2018Nuclei
from densepred.data.errors import DamagedImageError

REAL = Path(__file__).parents[2] / "shared" / "data"
LOAD = [dict(type="LoadImage"), dict(type="LoadSemantic")]


def real(name):
    return pytest.mark.skipif(not (REAL / name).is_dir(), reason="the real set is not there")


def stored(sample):
    return cv2.imread(sample["semantic_path"], cv2.IMREAD_UNCHANGED)


def test_isbi_cells_are_the_foreground(make_shapes):
    root = str(make_shapes("isbi2012"))
    train, val = (ISBI2012(root, split, LOAD) for split in ("train", "val"))
    assert [s["img_id"] for s in train] == [f"{i:02d}" for i in range(24)]
    assert [s["img_id"] for s in val] == [f"{i:02d}" for i in range(24, 30)]
    assert train.metainfo["classes"] == ("membrane", "cell")
    for sample in val:
        assert np.array_equal(sample["semantic"], stored(sample) == 255)
        assert 0.5 < sample["semantic"].mean() < 1  # cells are larger than what parts them
        grey = sample["img"][..., 0]
        assert grey[sample["semantic"] == 0].mean() < grey[sample["semantic"] == 1].mean()


def test_shapes_as_isbi_are_as_many_as_its_slices(tmp_path):
    script = runpy.run_path(str(Path(__file__).parents[1] / "datasets" / "prepare_shapes.py"))
    with pytest.raises(ValueError, match=r"the layout isbi2012 has 24 train images, not 6: --train 24"):
        script["main"](script["make_parser"]().parse_args([str(tmp_path), "--layout", "isbi2012", "--train", "6"]))
    assert not list(tmp_path.iterdir())


def test_isbi_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="split='test'; choose one of train, val"):
        ISBI2012(str(tmp_path), "test")
    with pytest.raises(FileNotFoundError, match=r"12 of 12 image and label files .* the first is \S+images/24\.png"):
        ISBI2012(str(tmp_path), "val")


def test_isbi_masks_of_other_values(tmp_path):
    for part, value in (("images", 90), ("labels", 1)):
        (tmp_path / part).mkdir()
        for number in range(24, 30):
            Image.fromarray(np.full((4, 5), value, np.uint8)).save(tmp_path / part / f"{number}.png")
    with pytest.raises(DamagedImageError, match=r"labels/24\.png holds the labels 1"):
        ISBI2012(str(tmp_path), "val", LOAD)[0]


def test_every_nucleus_is_foreground(make_shapes):
    dataset = DSB2018Nuclei(str(make_shapes("dsb2018")), "train", LOAD)
    assert len(dataset) == 6 and dataset.metainfo["classes"] == ("background", "nucleus")
    for sample in dataset:
        numbers = stored(sample)
        assert numbers.dtype == np.uint16 and numbers.max() > 1
        assert np.array_equal(sample["semantic"], numbers > 0)


def test_more_nuclei_than_a_byte_can_count(tmp_path):
    for part in ("images", "instances"):
        (tmp_path / part / "train").mkdir(parents=True)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(tmp_path / "images/train/a.webp")
    numbers = np.arange(400, dtype=np.uint16).reshape(20, 20)
    numbers[0, 1] = 65535
    cv2.imwrite(str(tmp_path / "instances/train/a.png"), numbers)
    (tmp_path / "train.txt").write_text("a\n")
    semantic = DSB2018Nuclei(str(tmp_path), "train", LOAD)[0]["semantic"]
    assert semantic.dtype == np.uint8 and semantic[0, 0] == 0 and semantic.sum() == 399


@real("isbi2012_membrane")
def test_real_isbi():
    root = str(REAL / "isbi2012_membrane")
    train, val = (ISBI2012(root, split, LOAD) for split in ("train", "val"))
    assert (len(train), len(val)) == (24, 6)
    for sample in val:
        assert np.array_equal(sample["semantic"] * np.uint8(255), stored(sample))
        assert sample["img"].shape == (512, 512, 3) and 0.7 < sample["semantic"].mean() < 0.85
        grey = sample["img"][..., 0]
        assert grey[sample["semantic"] == 0].mean() < grey[sample["semantic"] == 1].mean()  # membranes are dark


@real("dsb2018_nuclei")
def test_real_nuclei():
    root = str(REAL / "dsb2018_nuclei")
    train, val = (DSB2018Nuclei(root, split, LOAD) for split in ("train", "val"))
    assert (len(train), len(val)) == (141, 68)
    nuclei = 0
    for sample in val:
        numbers = stored(sample)
        assert np.array_equal(sample["semantic"], numbers > 0) and sample["img"].shape[:2] == numbers.shape
        nuclei += int(numbers.max())
    assert nuclei == 3277

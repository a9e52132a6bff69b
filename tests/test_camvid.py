"""CamVid's files: labels as they stand there, void ignored, the lists' order, and one clear error for what is amiss."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from densepred.data import CamVid, PackSegInputs
from densepred.data.errors import DamagedImageError

REAL = Path(__file__).parents[2] / "shared" / "data" / "camvid"
LOAD = [dict(type="LoadImage"), dict(type="LoadSemantic")]


@pytest.fixture
def root(tmp_path):
    """Root of three images, one of them a JPEG, listed in another order than the alphabet's."""
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.jpg", "c.png"):
        for part, shape in (("images", (6, 8, 3)), ("labels", (6, 8))):
            path = tmp_path / part / "train" / (name if part == "images" else f"{name[0]}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 12, shape, dtype=np.uint8)).save(path)
    (tmp_path / "train.txt").write_text("c\na\nb\n")
    return tmp_path


def test_labels_are_the_files_and_11_is_ignored(root):
    dataset = CamVid(str(root), "train", LOAD)
    assert [sample["img_id"] for sample in dataset] == ["c", "a", "b"]
    for sample in dataset:
        stored = cv2.imread(sample["semantic_path"], cv2.IMREAD_UNCHANGED)
        assert np.array_equal(sample["semantic"], np.where(stored == 11, 255, stored))
        assert (stored == 11).any()
    packed = PackSegInputs()(dataset[0])["data_samples"]
    assert packed.gt_semantic.max() == 255 and packed.label_path == str(root / "labels" / "train" / "c.png")


def test_shapes_in_this_layout(make_shapes):
    for split, count in (("train", 6), ("val", 3)):
        dataset = CamVid(str(make_shapes("camvid")), split, LOAD)
        found = set(np.concatenate([np.unique(sample["semantic"]) for sample in dataset]).tolist())
        assert len(dataset) == count and len(found) > 5 and found <= {*range(11), 255} - {7}


def test_class_table():
    info = CamVid.METAINFO
    assert len(info["classes"]) == len(set(info["palette"])) == 11
    assert (info["classes"][3], info["palette"][3]) == ("road", (128, 64, 128))
    assert info["category_ids"] == tuple(range(11)) and not any(info["isthing"])


def test_a_subset_of_the_files_may_be_listed(root):
    (root / "train.txt").write_text("b\n\n")
    assert len(CamVid(str(root), "train")) == 1


def test_lists_as_windows_writes_them(root):
    (root / "train.txt").write_bytes("b\r\na\r\n".encode("utf-8-sig"))
    assert [sample["img_id"] for sample in CamVid(str(root), "train", LOAD)] == ["b", "a"]
    (root / "train.txt").write_text("b\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"train\.txt, the list of the split's images, is no UTF-8 text"):
        CamVid(str(root), "train")


def test_bad_lists_and_files(root):
    listing = root / "train.txt"
    for text, message in (
        ("a\nb\na\n", r"train\.txt lists 'a' more than once"),
        ("\n", r"train\.txt lists no image"),
        ("a\nd\n", r"1 of 2 image files that \S+train\.txt names are missing, the first is \S+train/d\{\.jpg,\.png\}"),
        ("a.png\n", "names stand there without suffix"),
    ):
        listing.write_text(text)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            CamVid(str(root), "train")
    listing.write_text("a\n")
    (root / "labels" / "train" / "a.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 1 label files .* the first is \S+labels/train/a\.png; add"):
        CamVid(str(root), "train")
    shutil.copy(root / "images/train/a.png", root / "images/train/a.JPG")
    with pytest.raises(ValueError, match=r"have the same name but for the ending; remove one"):
        CamVid(str(root), "train")
    listing.unlink()
    (root / "images/train/a.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.txt, the list of the split's images, does not exist"):
        CamVid(str(root), "train")
    with pytest.raises(FileNotFoundError, match=r"no images \S+images/test/\*\*/\*\{\.jpg,\.png\}"):
        CamVid(str(root), "test")


def test_a_label_beyond_void(root):
    Image.fromarray(np.full((6, 8), 12, np.uint8)).save(root / "labels/train/c.png")
    with pytest.raises(DamagedImageError, match=r"c\.png holds the labels 12.* from 0 to 11"):
        CamVid(str(root), "train", LOAD)[0]


@pytest.mark.skipif(not REAL.is_dir(), reason="the real set is not there")
def test_real():
    assert len(CamVid(str(REAL), "train")) == 367
    dataset = CamVid(str(REAL), "val", LOAD)
    assert len(dataset) == 101
    counts = np.zeros(256, np.int64)
    for sample in dataset:
        counts += np.bincount(sample["semantic"].ravel(), minlength=256)
    expected = [1601620, 4531180, 98499, 5053176, 1521751, 2851125, 155724, 537197, 304716, 113531, 387010]
    assert counts[:11].tolist() == expected and counts[255] == 297271 and counts.sum() == 101 * 360 * 480


def test_options_that_such_a_set_has_not_are_refused(root):
    with pytest.raises(ValueError, match="split='dev'; choose one of train, val, test"):
        CamVid(str(root), "dev")
    with pytest.raises(ValueError, match="filter_empty=True: CamVid knows the objects"):
        CamVid(str(root), "train", filter_empty=True)

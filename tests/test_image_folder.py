"""People's own data: every way to store masks gives the same classes, and every mistake is one clear error."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from densepred.data import ImageFolderSegmentation
from densepred.data.errors import DamagedImageError
from densepred.data.image_folder import distinct_color

LOAD = [dict(type="LoadImage"), dict(type="LoadSemantic")]
CLASSES = ["soil", "leaf", "stone"]
PALETTE = [[90, 60, 30], [0, 160, 0], [128, 128, 128]]
EXPECTED = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (3, 12, 16))
COLORS = np.zeros((256, 3), np.uint8)
COLORS[:3], COLORS[255] = PALETTE, (255, 255, 255)


@pytest.fixture
def root(tmp_path):
    """Root of three images in JPEG, PNG and TIFF, one in a subfolder, with masks of 0, 1, 2 and 255."""
    for number, name in enumerate(("a.JPG", "b.png", "deep/c.tif")):
        image = tmp_path / "photos" / name
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((12, 16, 3), 80 * number, np.uint8)).save(image)
        write_mask(tmp_path, Path(name).with_suffix(".png"), EXPECTED[number])
    return tmp_path


def write_mask(root, name, pixels, **options):
    path = root / "masks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def folder(root, **options):
    options = dict(classes=CLASSES, ignore=[255], pipeline=LOAD) | options
    return ImageFolderSegmentation(str(root), "photos", "masks", **options)


def test_masks_of_numbers(root):
    dataset = folder(root)
    assert [sample["img_id"] for sample in dataset] == ["a", "b", "c"]
    assert np.array_equal([sample["semantic"] for sample in dataset], EXPECTED)
    assert dataset.metainfo["classes"] == tuple(CLASSES) and len(dataset.metainfo["palette"]) == 3
    assert ImageFolderSegmentation.COMMON == {}  # the tables belong to this data set alone


def test_every_form_of_masks_means_the_same(root):
    for number, name in enumerate(("a", "b", "deep/c")):
        write_mask(root, f"{name}.png", COLORS[EXPECTED[number]])
    colored = folder(root, palette=PALETTE, ignore=[[255, 255, 255]])
    assert np.array_equal([sample["semantic"] for sample in colored], EXPECTED)
    assert colored.metainfo["palette"] == tuple(map(tuple, PALETTE))

    indexed = Image.fromarray(EXPECTED[0])
    indexed.putpalette(COLORS.tobytes())
    indexed.save(root / "masks" / "a.png")
    assert np.array_equal(folder(root)[0]["semantic"], EXPECTED[0])
    assert np.array_equal(colored[0]["semantic"], EXPECTED[0])

    write_mask(root, "a.png", np.array([10, 0, 200] + 253 * [7], np.uint8)[EXPECTED[0]])
    assert np.array_equal(folder(root, label_values=[10, 0, 200], ignore=[7])[0]["semantic"], EXPECTED[0])


def test_black_and_white_masks(root):
    black_and_white = np.where(EXPECTED[0] == 1, 255, 0).astype(np.uint8)
    write_mask(root, "a.png", black_and_white)
    for options in (dict(label_values=[0, 255]), dict(palette=[[0, 0, 0], [255, 255, 255]])):
        dataset = folder(root, classes=["other", "leaf"], ignore=[], **options)
        assert np.array_equal(dataset[0]["semantic"], EXPECTED[0] == 1)
    with pytest.raises(DamagedImageError, match=r"a\.png holds the labels 255 \(\d+ pixels\), .*label_values"):
        folder(root, classes=["other", "leaf"], ignore=[])[0]  # 255 is ignored by nobody's guess


def test_suffixes_and_split_file(root):
    for path in (root / "masks").rglob("*.png"):
        path.rename(path.with_name(f"{path.stem}_gt.png"))
    (root / "lists").mkdir()
    (root / "lists" / "few.txt").write_text("deep/c\na\n")
    dataset = folder(root, label_suffix="_gt.png", split_file="lists/few.txt")
    assert [sample["img_id"] for sample in dataset] == ["c", "a"]
    assert np.array_equal(dataset[0]["semantic"], EXPECTED[2])
    (root / "masks" / "b_gt.png").unlink()
    assert len(folder(root, label_suffix="_gt.png", split_file="lists/few.txt")) == 2  # b is not listed
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images lack their label, the first .*masks/b_gt\.png"):
        folder(root, label_suffix="_gt.png")


def test_labels_out_of_range_are_counted(root):
    pixels = EXPECTED[0].copy()
    pixels[0, :3], pixels[1, :2] = 9, 3
    write_mask(root, "a.png", pixels)
    message = r"masks/a\.png holds the labels 3 \(2 pixels\), 9 \(3 pixels\), .*classes lists .* ignore the values"
    with pytest.raises(DamagedImageError, match=message):
        folder(root)[0]
    assert folder(root, ignore=[255, 9, 3])[0]["semantic"][0, 0] == 255


def test_masks_of_another_kind(root):
    write_mask(root, "a.png", COLORS[EXPECTED[0]])
    with pytest.raises(DamagedImageError, match=r"a\.png has mode RGB; .* give ImageFolderSegmentation their palette"):
        folder(root)[0]
    write_mask(root, "a.png", np.repeat(EXPECTED[0][..., None], 3, 2))
    with pytest.raises(DamagedImageError, match=r"a\.png has mode RGB; .* its channels are equal, so keep one of them"):
        folder(root)[0]
    write_mask(root, "a.png", EXPECTED[0][:, :9])
    with pytest.raises(DamagedImageError, match=r"a\.png is 12 x 9 .* is 12 x 16; the two do not belong together"):
        folder(root)[0]


def test_unknown_colours_name_the_nearest(root):
    pixels = COLORS[EXPECTED[0]]
    pixels[0, :5], pixels[1, 0] = (2, 158, 1), (7, 7, 7)
    write_mask(root, "a.png", pixels)
    options = dict(palette=PALETTE, ignore=[(255, 255, 255)])
    message = (
        r"a\.png holds the colour \(2, 158, 1\) in 5 pixels, which .* \(2 unknown colours in 6 pixels\); the nearest is "
        r"\(0, 160, 0\), 'leaf': add it .* nearest neighbour"
    )
    with pytest.raises(DamagedImageError, match=message):
        folder(root, **options)[0]
    Image.fromarray(COLORS[EXPECTED[0]]).save(root / "masks" / "a.jpg")
    (root / "masks" / "a.png").unlink()
    with pytest.raises(DamagedImageError, match=r"a\.jpg holds the colour .* JPEG blurs colours: save masks as PNG"):
        folder(root, label_suffix=(".png", ".jpg"), **options)[0]


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(classes=["a", "b", "a"]), "classes holds 'a' twice"),
        (dict(classes="soil"), r"classes is 'soil', but it should be a list: \['soil'\]"),
        (dict(ignore=255), r"ignore is 255, but it should be a list: \[255\]"),
        (dict(classes=["a", ""]), "classes holds '', which is no name"),
        (dict(classes=[]), "classes holds 0 names; there may be 1 to 255"),
        (dict(palette=PALETTE[:2], ignore=[]), "palette has 2 entries and classes 3; there should be one for each"),
        (dict(palette=[*PALETTE[:2], PALETTE[0]], ignore=[]), "stands for two classes, 'soil' and 'stone'"),
        (dict(palette=[*PALETTE[:2], [0, 0, 256]], ignore=[]), r"holds \[0, 0, 256\], but .* \[red, green, blue\]"),
        (dict(palette=[*PALETTE[:2], [0.1, 0.2, 0.3]], ignore=[]), r"holds \[0\.1, 0\.2, 0\.3\], but .* of 0\.\.255"),
        (dict(palette=PALETTE), "palette or ignore holds 255, but with a palette both hold RGB colours"),
        (dict(palette=PALETTE, ignore=[PALETTE[1]]), r"ignore holds \(0, 160, 0\), which is also the class 'leaf'"),
        (dict(palette=PALETTE, label_values=[0, 1, 2], ignore=[]), "palette .* or label_values .*, not both"),
        (dict(label_values=[1, 2]), "label_values has 2 entries and classes 3"),
        (dict(label_values=[1, 2, 256]), "holds 256, but masks hold numbers 0..255"),
        (dict(label_values=[1, 2, 2]), "2 stands for two classes, 'leaf' and 'stone'"),
        (dict(ignore=[2]), "ignore holds 2, which is also the class 'stone'; choose one"),
        (dict(ignore=[[0, 0, 0]]), r"holds \[0, 0, 0\], but masks hold numbers"),
    ],
)
def test_options_that_do_not_fit_together(root, options, message):
    with pytest.raises(ValueError, match=message):
        folder(root, **options)


def test_numbers_saved_as_jpeg_are_lost(root):
    Image.fromarray(EXPECTED[0] % 3).save(root / "masks" / "a.jpg")
    (root / "masks" / "a.png").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"masks/a\.png; .* \(\S+masks: it holds 2 files \.png, 1 files \.jpg\)"
    ):
        folder(root)
    with pytest.raises(DamagedImageError, match=r"a\.jpg is a JPEG, which blurs numbers .* save masks as PNG"):
        folder(root, label_suffix=(".jpg", ".png"))[0]


def test_missing_files(root):
    (root / "masks" / "deep" / "c.png").rename(root / "masks" / "c.png")
    with pytest.raises(FileNotFoundError, match=r"1 of 3 images lack their label, the first .*masks/deep/c\.png;"):
        folder(root)
    (root / "photos" / "deep" / "c.tif").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 3 labels lack their image, the first .*photos/c\{\.jpg,\.jpeg,"):
        folder(root)
    with pytest.raises(
        FileNotFoundError, match=r"no images .*/\*\*/\*\.gif; .* \(it holds 1 files \.JPG, 1 files \.png\)"
    ):
        folder(root, image_suffix=".gif")
    with pytest.raises(FileNotFoundError, match=r"no images \S+nowhere/.*\(there is no such folder\)"):
        ImageFolderSegmentation(str(root), "nowhere", "masks", CLASSES)
    with pytest.raises(FileNotFoundError, match=r"few\.txt, the list of the split's images, does not exist"):
        folder(root, split_file="few.txt")


def test_shown_colours_differ():
    colors = np.array([distinct_color(i) for i in range(24)])
    apart = np.abs(colors[:, None] - colors).sum(-1)[~np.eye(24, dtype=bool)]
    assert apart.min() >= 40 and colors.min() >= 0 and colors.max() <= 255


def test_lazy_sets_know_their_classes(tmp_path):
    dataset = ImageFolderSegmentation(str(tmp_path / "absent"), "photos", "masks", CLASSES, lazy_init=True)
    assert dataset.metainfo["classes"] == tuple(CLASSES)

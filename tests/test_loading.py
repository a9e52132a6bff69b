"""Images and label maps of every kind that turns up on disk: the right pixels, or one error that names the file."""

import cv2
import numpy as np
import pytest
from PIL import Image

from densepred.data.errors import DamagedImageError
from densepred.data.loading import LoadImage, LoadPanoptic, read_image, read_panoptic


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)


def write_ids(path, ids):
    rgb = np.stack([ids % 256, ids // 256 % 256, ids // 65536], -1).astype(np.uint8)
    Image.fromarray(rgb).save(path)
    return path


def test_plain_grey_palette_and_alpha(tmp_path, rgb):
    grey, alpha = rgb[..., 0], np.full(rgb.shape[:2], 7, np.uint8)
    palette = Image.fromarray(rgb // 128 * 128).quantize(16)
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(np.dstack([rgb, alpha])).save(tmp_path / "rgba.png")
    palette.save(tmp_path / "palette.png")
    assert np.array_equal(read_image(tmp_path / "rgb.png"), rgb)
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    assert np.array_equal(read_image(tmp_path / "rgba.png"), rgb)
    assert np.array_equal(read_image(tmp_path / "palette.png"), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bits_are_scaled_by_257(tmp_path, channels, suffix):
    wide = np.random.default_rng(1).integers(0, 65536, (10, 12, channels), dtype=np.uint16)
    wide[0, :2] = [[0], [65535]]
    cv2.imwrite(str(tmp_path / f"wide{suffix}"), wide)
    expected = np.round(wide[..., :3][..., ::-1] / 257)
    assert np.array_equal(read_image(tmp_path / f"wide{suffix}"), np.broadcast_to(expected, (10, 12, 3)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, rgb, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    turned = {
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.swapaxes(0, 1),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(rgb),
    }
    assert np.array_equal(read_image(tmp_path / "a.png"), turned[orientation])


def test_32_bits_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(DamagedImageError, match=r"float\.tiff has 32 bits"):
        read_image(tmp_path / "float.tiff")


@pytest.mark.parametrize("read, what", [(read_image, "image"), (read_panoptic, "label map")])
def test_missing_empty_and_no_image(tmp_path, read, what):
    with pytest.raises(FileNotFoundError, match=rf"{what} .*gone\.png does not exist; check the data root"):
        read(tmp_path / "gone.png")
    (tmp_path / "empty.png").touch()
    with pytest.raises(DamagedImageError, match=rf"{what} .*empty\.png is empty \(0 bytes\); fetch it again"):
        read(tmp_path / "empty.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    with pytest.raises(DamagedImageError, match=r"page\.png cannot be decoded \(no known image format"):
        read(tmp_path / "page.png")


@pytest.mark.parametrize("name, options", [("a.jpg", {}), ("b.jpg", dict(progressive=True)), ("c.png", {})])
@pytest.mark.parametrize("kept", [0.01, 0.3, 0.9])
def test_truncated(tmp_path, name, options, kept):
    noise = np.random.default_rng(2).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    path = tmp_path / name
    Image.fromarray(noise).save(path, **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DamagedImageError, match=rf"{name} cannot be decoded .* fetch it again"):
        read_image(path)


def test_a_jpeg_with_bytes_after_its_end_is_fine(tmp_path, rgb):
    Image.fromarray(rgb).save(tmp_path / "a.jpg")
    expected = read_image(tmp_path / "a.jpg")
    with (tmp_path / "a.jpg").open("ab") as file:
        file.write(b"\0" * 100)
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)


def test_panoptic_ids(tmp_path):
    ids = np.array([[0, 1, 255], [256, 65536, 2**24 - 1]])
    assert np.array_equal(read_panoptic(write_ids(tmp_path / "a.png", ids)), ids)
    cv2.imwrite(str(tmp_path / "wide.png"), ids.astype(np.uint16))
    with pytest.raises(DamagedImageError, match=r"wide\.png has mode I;16; a panoptic PNG is RGB"):
        read_panoptic(tmp_path / "wide.png")


def annotated(tmp_path, ids, info_ids, shape=(2, 3)):
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(tmp_path / "photo.png")
    infos = [dict(id=i, label=n, isthing=n % 2, iscrowd=0, area=1) for n, i in enumerate(info_ids)]
    path = str(write_ids(tmp_path / "labels.png", np.array(ids)))
    return dict(img_path=str(tmp_path / "photo.png"), panoptic_path=path, segments_info=infos)


def test_load_panoptic_renumbers_in_file_order(tmp_path):
    results = annotated(tmp_path, [[0, 70000, 5], [5, 5, 70000]], [70000, 9, 5])
    results = LoadPanoptic()(LoadImage()(results))
    assert results["panoptic"].dtype == np.uint16
    assert results["panoptic"].tolist() == [[0, 1, 3], [3, 3, 1]]
    assert results["segments"] == [
        dict(id=1, label=0, isthing=False, iscrowd=False),
        dict(id=2, label=1, isthing=True, iscrowd=False),
        dict(id=3, label=2, isthing=False, iscrowd=False),
    ]
    assert results["ori_shape"] == results["img_shape"] == (2, 3)


def test_load_panoptic_after_a_resize_keeps_the_size_of_the_file(tmp_path):
    results = LoadImage()(annotated(tmp_path, [[1, 1, 0], [0, 0, 0]], [1]))
    results["img"], results["img_shape"] = np.zeros((4, 6, 3), np.uint8), (4, 6)
    assert LoadPanoptic()(results)["panoptic"].shape == (2, 3)


def test_unknown_ids_and_sizes(tmp_path):
    results = LoadImage()(annotated(tmp_path, [[1, 7, 0], [9, 9, 1]], [1]))
    with pytest.raises(DamagedImageError, match=r"labels\.png holds segment ids 7, 9 that its annotation does not"):
        LoadPanoptic()(results)
    results = LoadImage()(annotated(tmp_path, [[1, 1, 0]], [1]))
    with pytest.raises(
        DamagedImageError, match=r"labels\.png is 1 x 3 .*photo\.png is 2 x 3; .*prepare the annotation"
    ):
        LoadPanoptic()(results)


def test_labels_drawn_before_the_exif_rotation(tmp_path):
    results = annotated(tmp_path, [[1, 1, 1], [1, 1, 1]], [1])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((2, 3, 3), np.uint8)).save(results["img_path"], exif=exif)
    results = LoadImage()(results)
    assert results["ori_shape"] == (3, 2)
    with pytest.raises(DamagedImageError, match=r"is 2 x 3 .* is 3 x 2 once its EXIF orientation \(6\) .*exiftool"):
        LoadPanoptic()(results)

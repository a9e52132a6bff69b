"""Reading images and panoptic label maps, with one clear error for every file that cannot be used.

Pillow decodes everything: unlike some OpenCV versions it refuses truncated files instead of filling them with grey, and
it is what the reference mappers use.
"""

import io
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from mmcv.transforms import BaseTransform
from PIL import ExifTags, Image, UnidentifiedImageError

from densepred.data.errors import DamagedImageError
from densepred.registry import TRANSFORMS
from densepred.structures import IGNORE_INDEX

_DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)
OTHER_FILE = "is it a file of another data set, or converted already?"
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> the operation that puts the stored pixels upright."""


def read_image(path: str | Path) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8 RGB.

    Grey, palette and CMYK images become RGB; an alpha channel is dropped (the colour under it stays, nothing is
    composited); 16 bits a channel become 8 by round(x / 257); an EXIF orientation is applied, so that (H, W) is the
    upright size.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: the file is empty, truncated or no image.
    """
    data = _read_bytes(path, "image")
    image, wide = _decode(data, path, "image")
    if wide:
        pixels = Image.fromarray(_decode_16_bit(data, path))
    elif image.mode in ("I", "F"):
        raise DamagedImageError(f"image {path} has 32 bits a channel; save it with 8 or 16 bits")
    else:
        pixels = image.convert("RGB")
    orientation = _orientation(image)
    return np.array(pixels if orientation == 1 else pixels.transpose(_UPRIGHT[orientation]))  # (H, W, 3)


def read_panoptic(path: str | Path) -> np.ndarray:
    """Read the colours of a panoptic PNG or a coloured mask as (H, W) uint32, R + 256 G + 65536 B.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: the file is empty, truncated, no image or not of 8 bits a channel.
    """
    image, wide = _decode(_read_bytes(path, "label map"), path, "label map")
    if wide or image.mode in ("I", "F"):
        raise DamagedImageError(
            f"label map {path} has mode {image.mode}; a panoptic PNG is RGB with 8 bits a channel, "
            "id = R + 256 G + 65536 B, and so is a mask whose colours mean classes: write it again in that form"
        )
    rgb = np.asarray(image.convert("RGB"))  # (H, W, 3)
    padded = np.zeros((*rgb.shape[:2], 4), np.uint8)
    padded[..., :3] = rgb
    return padded.view("<u4")[..., 0]  # (H, W)


def read_label_map(path: str | Path) -> np.ndarray:
    """Read a label map of one channel as (H, W) uint8 or uint16; of a palette image the indices are the labels.

    Raises:
        FileNotFoundError: there is no such file.
        DamagedImageError: the file is empty, truncated, no image, a JPEG or has several channels.
    """
    image, _ = _decode(_read_bytes(path, "label map"), path, "label map")
    if image.format == "JPEG":
        raise DamagedImageError(f"label map {path} is a JPEG, which blurs numbers into other ones: save masks as PNG")
    labels = np.asarray(image)
    if labels.ndim != 2 or labels.dtype not in (bool, np.uint8, np.uint16):
        same = labels.ndim == 3 and (labels[..., :1] == labels[..., :3]).all()
        remedy = "its channels are equal, so keep one of them" if same else "write it again with one channel"
        raise DamagedImageError(
            f"label map {path} has mode {image.mode}; it should hold one label a pixel: {remedy} of 8 or 16 bits, or, if "
            "colours mean classes, give ImageFolderSegmentation their palette"
        )
    return labels.astype(np.uint8) if labels.dtype == bool else labels


def label_table(classes: dict[int, int]) -> np.ndarray:
    """Return (256,) int16: stored label -> class (255 = ignore), -1 for labels that the files may not hold."""
    table = np.full(256, -1, np.int16)
    table[list(classes)] = list(classes.values())
    return table


def look_up(
    labels: np.ndarray, table: np.ndarray, path: str, remedy: str = OTHER_FILE, unit: str = "pixels"
) -> np.ndarray:
    """Return the classes (uint8) of stored labels of any shape by a `label_table`, or by one of 65,536 entries.

    Raises:
        DamagedImageError: a label that the table does not know; the message counts its ``unit`` and ends with ``remedy``.
    """
    if len(table) == 256:
        classes = cv2.LUT(labels.astype(np.uint8), table).reshape(labels.shape)
    else:
        classes = table[labels]
    unknown = labels[(classes < 0) | (labels >= len(table))]
    if len(unknown):
        known, (values, counts) = np.flatnonzero(table >= 0), np.unique(unknown, return_counts=True)
        found = [f"{value} ({count} {unit})" for value, count in zip(values[:5], counts[:5], strict=True)]
        raise DamagedImageError(
            f"label map {path} holds the labels {', '.join(found)}{', ...' if len(values) > 5 else ''}, which the data set "
            f"does not have (it has {len(known)} from {known[0]} to {known[-1]}); {remedy}"
        )
    return classes.astype(np.uint8)


@dataclass(frozen=True)
class ColorTable:
    """Which class the colours of a mask mean.

    Attributes:
        classes: (R, G, B) -> class, 255 = ignore.
        names: of the classes, for messages.
    """

    classes: dict[tuple[int, int, int], int]
    names: tuple[str, ...]

    def look_up(self, colors: np.ndarray, path: str) -> np.ndarray:
        """Return the classes (uint8) of colours (H, W), R + 256 G + 65536 B.

        Raises:
            DamagedImageError: a colour that the table does not know.
        """
        # The pages of this table that no colour touches are never allocated.
        table = np.zeros(1 << 24, np.uint16)
        for (red, green, blue), label in self.classes.items():
            table[red + 256 * green + 65536 * blue] = label + 1
        labels = table[colors]
        if not labels.all():
            raise DamagedImageError(self._unknown(colors[labels == 0], path))
        return (labels - 1).astype(np.uint8)

    def _unknown(self, colors: np.ndarray, path: str) -> str:
        values, counts = np.unique(colors, return_counts=True)
        value = int(values[counts.argmax()])
        color = (value % 256, value // 256 % 256, value // 65536)
        known = np.array(list(self.classes))  # (C, 3)
        nearest = tuple(known[np.abs(known - color).sum(1).argmin()].tolist())
        label = self.classes[nearest]
        name = "ignored" if label == IGNORE_INDEX else repr(self.names[label])
        if str(path).lower().endswith((".jpg", ".jpeg")):
            remedy = "JPEG blurs colours: save masks as PNG"
        else:
            remedy = (
                "add it to palette or ignore; if many are nearly right, the mask was resized or drawn with smoothing: use "
                "the nearest neighbour. A mask of numbers needs no palette"
            )
        return (
            f"label map {path} holds the colour {color} in {counts.max()} pixels, which the palette does not have "
            f"({len(values)} unknown colours in {len(colors)} pixels); the nearest is {nearest}, {name}: {remedy}"
        )


def _read_bytes(path: str | Path, what: str) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{what} {path} does not exist; check the data root and its folders, or fetch the file again"
        ) from None
    if not data:
        raise DamagedImageError(f"{what} {path} is empty (0 bytes); fetch it again")
    return data


def _decode(data: bytes, path: str | Path, what: str) -> tuple[Image.Image, bool]:
    """Return the decoded image and whether the file has 16 bits a channel."""
    try:
        image = Image.open(io.BytesIO(data))
        # Pillow opens 16-bit colour as 8-bit "RGB"; only the decoder's raw mode (RGB;16B), gone after load(), tells.
        wide = ";16" in str(image.tile)
        image.load()
    except (*_DECODE_ERRORS, Image.DecompressionBombError) as error:
        reason = "no known image format" if isinstance(error, UnidentifiedImageError) else error
        raise DamagedImageError(
            f"{what} {path} cannot be decoded ({reason}; {len(data)} bytes): it is truncated or damaged, "
            "fetch it again or take it out of the annotation file"
        ) from error
    return image, wide


def _decode_16_bit(data: bytes, path: str | Path) -> np.ndarray:
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_COLOR_BGR | cv2.IMREAD_IGNORE_ORIENTATION
    bgr = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    if bgr is None or bgr.dtype != np.uint16:
        raise DamagedImageError(f"image {path} has 16 bits a channel in a form OpenCV cannot read; save it with 8 bits")
    rgb = bgr[..., ::-1].astype(np.uint32)
    return ((rgb + 128) // 257).astype(np.uint8)  # (H, W, 3)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 (upright) where there is none or it is out of range."""
    value = image.getexif().get(ExifTags.Base.Orientation, 1)
    return value if value in _UPRIGHT else 1


@TRANSFORMS.register_module()
class LoadImage(BaseTransform):
    """Read ``img_path`` into ``img`` (H, W, 3) uint8 RGB; sets ``ori_shape`` and ``img_shape`` (H, W)."""

    def transform(self, results: dict) -> dict:
        results["img"] = read_image(results["img_path"])
        results["ori_shape"] = results["img_shape"] = results["img"].shape[:2]
        return results


@TRANSFORMS.register_module()
class LoadPanoptic(BaseTransform):
    """Read ``panoptic_path`` into ``panoptic`` (H, W) uint16, the segments renumbered 1..N in JSON order, 0 = void.

    ``segments`` gets the records of ``segments_info`` with the new ids (keys id, label, isthing, iscrowd), those without
    a pixel too. The map has the size of the file, also after a resize of the image: training pipelines load it before.

    Raises:
        DamagedImageError: the PNG holds ids that the annotation does not know, or is not of the photo's size.
    """

    def transform(self, results: dict) -> dict:
        path = results["panoptic_path"]
        ids = read_panoptic(path)
        require_size(ids.shape, path, results)
        # Ids are below 2^24; the pages of this table that no id touches are never allocated.
        table = np.zeros(1 << 24, np.uint16)
        infos = results["segments_info"]
        table[[info["id"] for info in infos]] = np.arange(1, len(infos) + 1)
        panoptic = table[ids]
        unknown = ids[(panoptic == 0) & (ids != 0)]
        if unknown.size:
            raise DamagedImageError(
                f"label map {path} holds segment ids {_listing(np.unique(unknown))} that its annotation does not list "
                f"({len(infos)} segments); the PNG and the JSON do not belong together: prepare both again"
            )
        results["panoptic"] = panoptic  # (H, W)
        results["segments"] = [
            dict(id=number, label=info["label"], isthing=bool(info["isthing"]), iscrowd=bool(info["iscrowd"]))
            for number, info in enumerate(infos, 1)
        ]
        return results


@TRANSFORMS.register_module()
class LoadSemantic(BaseTransform):
    """Read ``semantic_path`` into ``semantic`` (H, W) uint8, contiguous classes, 255 = ignore.

    The data set's ``semantic_table``, a `label_table` or a `ColorTable`, translates what the file stores. The map has the
    size of the file, also after a resize of the image: training pipelines load it before.

    Raises:
        DamagedImageError: the file holds labels that the table does not know, or is not of the photo's size.
    """

    def transform(self, results: dict) -> dict:
        path, table = results["semantic_path"], results["semantic_table"]
        colored = isinstance(table, ColorTable)
        labels = read_panoptic(path) if colored else read_label_map(path)
        require_size(labels.shape, path, results)
        if colored:
            results["semantic"] = table.look_up(labels, path)  # (H, W)
        else:
            results["semantic"] = look_up(labels, table, path, results.get("semantic_remedy", OTHER_FILE))
        return results


def _listing(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:5])) + (", ..." if len(values) > 5 else "")


def require_size(shape: tuple[int, int], source: str, results: dict) -> None:
    """Raise DamagedImageError unless labels of this (H, W), from the file ``source``, are of the photo's size."""
    height, width = results["ori_shape"]
    if tuple(shape) == (height, width):
        return
    message = (
        f"label map {source} is {shape[0]} x {shape[1]} (height x width), but its image {results['img_path']} is "
        f"{height} x {width}"
    )
    orientation = _orientation(Image.open(results["img_path"]))
    if tuple(shape) == (width, height) and orientation >= 5:
        raise DamagedImageError(
            f"{message} once its EXIF orientation ({orientation}) is applied; the labels were drawn on the pixels as "
            "stored: remove the orientation tag from the image (exiftool -Orientation= FILE)"
        )
    raise DamagedImageError(f"{message}; the two do not belong together: prepare the annotation again")

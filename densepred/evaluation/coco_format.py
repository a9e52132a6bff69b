"""COCO's panoptic format: one JSON of segment records and one PNG an image, segment number = R + 256 G + 65536 B.

Format: https://cocodataset.org/#format-results (4. Panoptic Segmentation). Void pixels have number 0.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import cv2
import numpy as np

MAX_ID = 256**3 - 1
"""The largest segment number that three bytes hold."""


def read_id_map(path: str | Path) -> np.ndarray:
    """Return the segment numbers (H, W) uint32 of a panoptic PNG; an alpha channel is dropped.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no image, or not one of three 8-bit channels.
    """
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # (H, W, 3) uint8, B G R
    if image is None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such panoptic PNG; check the folder and `file_name` in the JSON")
        raise ValueError(f"{path}: not a readable PNG (truncated, empty or another format); write it again")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] < 3:
        channels = 1 if image.ndim == 2 else image.shape[2]
        raise ValueError(
            f"{path}: {channels} channel(s) of {image.dtype}; a panoptic PNG has three 8-bit channels, "
            "segment number = R + 256 G + 65536 B"
        )
    code = cv2.COLOR_BGR2RGBA if image.shape[2] == 3 else cv2.COLOR_BGRA2RGBA
    packed = cv2.cvtColor(image, code).view("<u4")[:, :, 0]  # alpha lands in the top byte
    return np.bitwise_and(packed, np.uint32(MAX_ID), out=packed)  # (H, W)


def write_id_map(path: str | Path, ids: np.ndarray) -> None:
    """Write segment numbers (H, W), 0..`MAX_ID`, as a panoptic PNG.

    Raises:
        OSError: The file cannot be written.
    """
    flat = np.ascontiguousarray(ids, dtype="<u4")
    channels = flat.view(np.uint8).reshape(*flat.shape, 4)  # R, G, B, 0
    if not cv2.imwrite(str(path), cv2.cvtColor(channels, cv2.COLOR_RGBA2BGR)):
        raise OSError(f"{path}: cannot be written; does its folder exist and is there space?")


def read_json(path: str | Path, keys: Iterable[str]) -> dict[str, Any]:
    """Return a JSON object of a file that must have the named lists.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON, not an object, or lacks a key.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; a COCO panoptic JSON is expected") from None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); a COCO panoptic JSON is expected") from None
    for key in keys:
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: lacks the list `{key}`; a COCO panoptic JSON is expected")
    return content


def records_by_key(records: Sequence[dict], key: str, needed: Sequence[str], where: str) -> dict[Any, dict]:
    """Index JSON records by one of their keys after checking that each has all it needs.

    Args:
        records: JSON objects; of two with the same key the last counts, as in the official tool.
        key: The key to index by, among ``needed``.
        needed: Keys that each record must have.
        where: File and list, for the error.

    Raises:
        ValueError: A record lacks a key.
    """
    for number, record in enumerate(records):
        if not isinstance(record, dict):
            raise ValueError(f"{where}[{number}]: {record!r} is no object with {', '.join(needed)}")
        missing = [name for name in needed if name not in record]
        if missing:
            raise ValueError(f"{where}[{number}]: lacks {', '.join(f'`{name}`' for name in missing)}")
    return {record[key]: record for record in records}


class PredictionWriter:
    """Writes predictions as they come: PNGs into ``DIR/predictions/`` and records into one JSON-lines file a rank.

    `merge` (rank 0, once every rank has called `close`) turns the lines into ``DIR/predictions.json``. No list of
    predictions is ever held.

    Args:
        out_dir: Output folder, created; shared by all ranks.
        rank: This process's number.
    """

    def __init__(self, out_dir: str | Path, rank: int = 0) -> None:
        self.out_dir = Path(out_dir)
        self.rank = rank
        self._lines: TextIO | None = None

    def write(self, image_id: int | str, stem: str, ids: np.ndarray, segments: list[dict]) -> None:
        """Write one prediction.

        Args:
            image_id: The data set's number or name of the image.
            stem: File name of the PNG without its suffix.
            ids: (H, W) segment numbers, 0 = void.
            segments: Their records: ``id``, ``category_id``, what else the user wants.
        """
        if self._lines is None:
            (self.out_dir / "predictions").mkdir(parents=True, exist_ok=True)
            self._lines = self._lines_path(self.rank).open("w", encoding="utf-8")
        write_id_map(self.out_dir / "predictions" / f"{stem}.png", ids)
        record = {"image_id": image_id, "file_name": f"{stem}.png", "segments_info": segments}
        self._lines.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Flush this rank's lines; the next `write` begins a new file."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def merge(self, world_size: int, num_images: int) -> Path:
        """Join the ranks' lines into ``predictions.json`` and return its path.

        Raises:
            ValueError: Lines are missing (a folder that the ranks do not share), or two images have one file name.
        """
        path, names, written = self.out_dir / "predictions.json", set(), 0
        self.out_dir.mkdir(parents=True, exist_ok=True)
        sources = [source for rank in range(world_size) if (source := self._lines_path(rank)).is_file()]
        with path.open("w", encoding="utf-8") as out:
            out.write('{"annotations": [')
            for source in sources:
                for line in source.open(encoding="utf-8"):
                    out.write(("," if written else "") + "\n" + line.rstrip("\n"))
                    names.add(json.loads(line)["file_name"])
                    written += 1
            out.write("\n]}\n")
        if written != num_images:
            raise ValueError(f"{path}: {written} of {num_images} predictions; give a folder that all processes share")
        if len(names) != written:
            raise ValueError(f"{self.out_dir}: {written} images have {len(names)} file names; names must be unique")
        for source in sources:
            source.unlink()
        return path

    def _lines_path(self, rank: int) -> Path:
        return self.out_dir / f"predictions.rank{rank}.jsonl"

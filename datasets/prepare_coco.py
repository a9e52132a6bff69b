"""Verify a folder in COCO's formats: COCO itself, or data of your own with --classes-from-file.

Of each split, panoptic_SPLIT2017.json and instances_SPLIT2017.json are verified, whichever is there. They are checked as a
whole, and that every image and PNG they name exists. Of a sample of the images (of all with --all) the files are read: a
PNG must hold exactly the segments of the JSON, with the areas it states; every mask must be drawable on its image.
Nothing is written.
"""

import argparse
import os
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from densepred.data.dataset import SegDataset

SAMPLE = 200
"""Images of a split whose pixels are read without --all."""
SHOWN = 10
"""Bad files that are listed."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="datasets/coco", help="folder with annotations/, train2017/, ...")
    parser.add_argument("--split", nargs="+", default=["train", "val"], help="SPLIT in the names of the files")
    parser.add_argument("--classes-from-file", action="store_true", help="the file's own classes instead of COCO's")
    parser.add_argument("--all", action="store_true", help=f"read all files, not {SAMPLE} images of a split")
    parser.add_argument("--workers", type=int, default=1, help="processes that read files")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Print a report a file; ValueError where files do not fit together."""
    from densepred.data.dataset import resolve_data_root

    root = resolve_data_root(arguments.root)
    for split in arguments.split:
        paths = [f"annotations/{kind}_{split}2017.json" for kind in ("panoptic", "instances")]
        found = [path for path in paths if os.path.isfile(os.path.join(root, path))]
        if not found:
            raise FileNotFoundError(f"{root} has neither {' nor '.join(paths)}; see datasets/README.md for the layout")
        for path in found:
            verify(root, path, split, arguments)


def verify(root: str, path: str, split: str, arguments: argparse.Namespace) -> None:
    """Verify one annotation file."""
    from densepred.data import CocoInstances, CocoPanoptic
    from densepred.data.prepare import convert

    kind = CocoPanoptic if "panoptic" in path else CocoInstances
    dataset = kind(root, path, f"{split}2017", classes_from_file=arguments.classes_from_file, test_mode=True)
    records = [dataset.get_data_info(i) for i in range(len(dataset))]
    print(f"{dataset.ann_file}: {summary(records, dataset)}")
    read = records if arguments.all else spread(records, SAMPLE)
    bad = [message for message in convert(check_record, read, f"checking {split}", arguments.workers) if message]
    if bad:
        rest = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listing = "".join(f"\n  {message}" for message in bad[:SHOWN])
        raise ValueError(f"{len(bad)} of {len(read)} images cannot be used:{listing}{rest}")
    print(f"{split}: {len(read)} of {len(records)} images read, all in order")


def summary(records: list[dict], dataset: "SegDataset") -> str:
    """Return a line of counts."""
    isthing = dataset.metainfo["isthing"]
    objects, what = [item for record in records for item in record[dataset.OBJECTS]], dataset.OBJECTS.split("_")[0]
    things, crowds = sum(isthing[item["label"]] for item in objects), sum(item["iscrowd"] for item in objects)
    seen = len({item["label"] for item in objects})
    return (
        f"{sum(bool(record[dataset.OBJECTS]) for record in records)} annotated images, {len(objects)} {what} "
        f"({things} things, {crowds} of them crowds), {seen} of {len(isthing)} classes seen"
    )


def spread(records: list[dict], count: int) -> list[dict]:
    """Return ``count`` records spread over all."""
    positions = np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)
    return [records[i] for i in positions.tolist()]


def check_record(record: dict) -> str | None:
    """Return what is wrong with the files of a record, None when nothing is."""
    from densepred.data.instances import LoadInstances
    from densepred.data.loading import LoadImage, LoadPanoptic

    load = LoadPanoptic() if "panoptic_path" in record else LoadInstances()
    try:
        results = load.transform(LoadImage().transform(record))
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return check_areas(results) if "panoptic_path" in record else None


def check_areas(results: dict) -> str | None:
    """Return the first segment without pixels or with another area than stated."""
    infos = results["segments_info"]
    areas = np.bincount(results["panoptic"].ravel(), minlength=len(infos) + 1)[1:].tolist()
    for info, area in zip(infos, areas, strict=True):
        if area == 0 or info["area"] not in (0, area):
            stated = f"states {info['area']}" if info["area"] else "lists it"
            return f"{results['panoptic_path']}: segment {info['id']} has {area} pixels, but the JSON {stated}"
    return None


if __name__ == "__main__":
    parser = make_parser()
    parser.parse_args()  # answers --help before the slow imports
    from densepred.data.prepare import run_script

    run_script(parser, main)

"""Verify a folder in the COCO panoptic format: COCO itself, or data of your own with --classes-from-file.

The annotation files are checked as a whole, and that every image and PNG they name exists. Of a sample of the images
(of all with --all) both files are read: the PNG must hold exactly the segments of the JSON, with the areas it states.
Nothing is written.
"""

import argparse

import numpy as np

SAMPLE = 200
"""Images of a split whose pixels are read without --all."""
SHOWN = 10
"""Bad files that are listed."""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="datasets/coco", help="folder with annotations/, train2017/, ...")
    parser.add_argument("--split", nargs="+", default=["train", "val"], help="SPLIT as in panoptic_SPLIT2017.json")
    parser.add_argument("--classes-from-file", action="store_true", help="the file's own classes instead of COCO's 133")
    parser.add_argument("--all", action="store_true", help=f"read all files, not {SAMPLE} images of a split")
    parser.add_argument("--workers", type=int, default=1, help="processes that read files")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Print a report a split; ValueError where files do not fit together."""
    from densepred.data.coco import CocoPanoptic
    from densepred.data.prepare import convert

    for split in arguments.split:
        dataset = CocoPanoptic(
            arguments.root,
            ann_file=f"annotations/panoptic_{split}2017.json",
            image_dir=f"{split}2017",
            classes_from_file=arguments.classes_from_file,
            test_mode=True,
        )
        records = [dataset.get_data_info(i) for i in range(len(dataset))]
        print(f"{dataset.ann_file}: {summary(records, len(dataset.metainfo['classes']))}")
        read = records if arguments.all else spread(records, SAMPLE)
        bad = [message for message in convert(check_record, read, f"checking {split}", arguments.workers) if message]
        if bad:
            rest = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
            listing = "".join(f"\n  {message}" for message in bad[:SHOWN])
            raise ValueError(f"{len(bad)} of {len(read)} images cannot be used:{listing}{rest}")
        print(f"{split}: {len(read)} of {len(records)} images read, all in order")


def summary(records: list[dict], num_classes: int) -> str:
    """Return a line of counts."""
    segments = [segment for record in records for segment in record["segments_info"]]
    things, crowds = (sum(segment[key] for segment in segments) for key in ("isthing", "iscrowd"))
    seen = len({segment["label"] for segment in segments})
    return (
        f"{len(records)} annotated images, {len(segments)} segments ({things} things, {crowds} of them crowds), "
        f"{seen} of {num_classes} classes seen"
    )


def spread(records: list[dict], count: int) -> list[dict]:
    """Return ``count`` records spread over all."""
    positions = np.linspace(0, len(records) - 1, min(count, len(records))).astype(int)
    return [records[i] for i in positions.tolist()]


def check_record(record: dict) -> str | None:
    """Return what is wrong with the files of a record, None when nothing is."""
    from densepred.data.loading import LoadImage, LoadPanoptic

    try:
        panoptic = LoadPanoptic().transform(LoadImage().transform(record))["panoptic"]
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    infos = record["segments_info"]
    for info, area in zip(infos, np.bincount(panoptic.ravel(), minlength=len(infos) + 1)[1:].tolist(), strict=True):
        if area == 0 or info["area"] not in (0, area):
            stated = f"states {info['area']}" if info["area"] else "lists it"
            return f"{record['panoptic_path']}: segment {info['id']} has {area} pixels, but the JSON {stated}"
    return None


if __name__ == "__main__":
    parser = make_parser()
    parser.parse_args()  # answers --help before the slow imports
    from densepred.data.prepare import run_script

    run_script(parser, main)

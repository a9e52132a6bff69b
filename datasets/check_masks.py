"""Read every image and mask of a semantic config's data sets: count the classes, list the files that cannot be used.

For data of one's own, before any training. Nothing is written.
"""

import argparse
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from densepred.data.dataset import SegDataset

SHOWN = 10
"""Bad files that are listed."""
NEVER = "   <- never: nothing to learn; in validation its IoU is 0 once it is predicted, else left out of the mean"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--cfg-options", nargs="+", metavar="KEY=VALUE", help="override config values")
    parser.add_argument("--workers", type=int, default=1, help="processes that read files")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Print a table a data set; ValueError where files cannot be used."""
    from densepred.engine.config import load_config, parse_options
    from densepred.registry import DATASETS

    config = load_config(arguments.config, parse_options(arguments.cfg_options))
    for phase in ("train", "val"):
        described = config[f"{phase}_dataloader"]["dataset"]
        check(DATASETS.build({**described, "pipeline": [], "test_mode": True}), phase, arguments.workers)


def check(dataset: "SegDataset", phase: str, workers: int) -> None:
    """Read one data set and print what it holds."""
    from densepred.data.prepare import convert

    records = [dataset.get_data_info(i) for i in range(len(dataset))]
    if "semantic_path" not in records[0]:
        raise ValueError(f"{type(dataset).__name__} has no masks of classes: this script is for semantic data sets")
    found = convert(count_file, records, f"reading {phase}", workers)
    bad = [entry for entry in found if isinstance(entry, str)]
    if bad:
        rest = f"\n  ... and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listing = "".join(f"\n  {message}" for message in bad[:SHOWN])
        raise ValueError(f"{phase}: {len(bad)} of {len(records)} images cannot be used:{listing}{rest}")
    print(f"{phase}: {len(records)} images\n{table(np.array(found), dataset.metainfo['classes'])}")


def count_file(record: dict) -> np.ndarray | str:
    """Return the pixels of each class, (256,), or what is wrong with the files of a record."""
    from densepred.data.loading import LoadImage, LoadSemantic

    try:
        results = LoadSemantic().transform(LoadImage().transform(record))
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return np.bincount(results["semantic"].ravel(), minlength=256)


def table(counts: np.ndarray, classes: tuple[str, ...]) -> str:
    """Return a line a class from the files' counts (N, 256): share of the labelled pixels, images that show it."""
    pixels, images = counts.sum(0), (counts > 0).sum(0)
    labelled = max(pixels[: len(classes)].sum(), 1)
    width = max(len(name) for name in (*classes, "(ignored)"))
    lines = [
        f"  {name:{width}}  {100 * pixels[i] / labelled:6.2f} %  in {images[i]} images" + ("" if images[i] else NEVER)
        for i, name in enumerate(classes)
    ]
    lines.append(f"  {'(ignored)':{width}}  {100 * pixels[255] / pixels.sum():6.2f} % of all pixels")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = make_parser()
    parser.parse_args()  # answers --help before the slow imports
    from densepred.data.prepare import run_script

    run_script(parser, main)

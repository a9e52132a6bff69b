"""Make the panoptic maps of Cityscapes from its *_gtFine_instanceIds.png files, and verify the folder.

Writes OUT/cityscapes_panoptic_SPLIT.json and a folder of that name with PNG files. The JSON is written last: where it
exists, the split is done and not converted again.
"""

import argparse
import os


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="datasets/cityscapes", help="folder with leftImg8bit/ and gtFine/")
    parser.add_argument("--out", help="folder to write to, ROOT/gtFine if not given")
    parser.add_argument(
        "--split", nargs="+", default=["train", "val"], choices=("train", "val"), help="what to convert"
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Convert and verify the splits one after the other."""
    from densepred.data.cityscapes import CityscapesPanoptic, convert_split
    from densepred.data.dataset import resolve_data_root

    root = resolve_data_root(arguments.root)
    out = os.path.abspath(arguments.out or os.path.join(root, "gtFine"))
    for split in arguments.split:
        path = os.path.join(out, f"cityscapes_panoptic_{split}.json")
        if os.path.isfile(path):
            print(f"{path} is there already; delete it to convert anew")
        else:
            convert_split(root, split, out, arguments.workers)
        dataset = CityscapesPanoptic(root, split, ann_file=path, test_mode=True)
        print(f"{split}: {len(dataset)} images, all files there ({path})")


if __name__ == "__main__":
    parser = make_parser()
    parser.parse_args()  # answers --help before the slow imports
    from densepred.data.prepare import run_script

    run_script(parser, main)

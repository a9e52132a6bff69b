"""Make the panoptic maps of ADE20K from its semantic and instance maps, and verify the folder.

Writes OUT/ade20k_panoptic_SPLIT.json and a folder of that name with PNG files. The JSON is written last: where it
exists, the split is done and not converted again.
"""

import argparse
import os


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", default="datasets/ADEChallengeData2016", help="folder with images/, ...")
    parser.add_argument("--out", help="folder to write to, ROOT if not given")
    parser.add_argument(
        "--split", nargs="+", default=["train", "val"], choices=("train", "val"), help="what to convert"
    )
    parser.add_argument(
        "--stuff-only",
        action="store_true",
        help="without annotations_instance/: each class of an image is one segment, things are crowds",
    )
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    return parser


def main(arguments: argparse.Namespace) -> None:
    """Convert and verify the splits one after the other."""
    from densepred.data.ade20k import ADE20KPanoptic, convert_split
    from densepred.data.dataset import resolve_data_root

    root = resolve_data_root(arguments.root)
    out = os.path.abspath(arguments.out or root)
    for split in arguments.split:
        path = os.path.join(out, f"ade20k_panoptic_{split}.json")
        if os.path.isfile(path):
            print(f"{path} is there already; delete it to convert anew")
        else:
            convert_split(root, split, out, arguments.stuff_only, arguments.workers)
        dataset = ADE20KPanoptic(root, split, ann_file=path, test_mode=True)
        print(f"{split}: {len(dataset)} images, all files there ({path})")


if __name__ == "__main__":
    parser = make_parser()
    parser.parse_args()  # answers --help before the slow imports
    from densepred.data.prepare import run_script

    run_script(parser, main)

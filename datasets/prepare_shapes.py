"""Write Shapes, the generated panoptic set, in the layout of another set (COCO, Cityscapes, ADE20K, CamVid, ...).

The same arguments give the same bytes. A set that is there already is left alone; one with other arguments is replaced
(only files that this script wrote). Files of anybody else are never touched.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

VERSION = 1
"""Of the generator and the layouts; a set of another version is written anew."""
KEYS = ("layout", "train", "val", "seed", "height", "width")
LAYOUTS = ("coco", "cityscapes", "idd", "kitti", "ade20k", "camvid", "isbi2012", "dsb2018")
MANIFEST = "manifest.json"
PARTIAL = ".partial"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("root", nargs="?", default="datasets/shapes", help="folder to write")
    parser.add_argument("--layout", choices=LAYOUTS, default="coco", help="whose files it has")
    parser.add_argument("--train", type=int, default=1200, help="training scenes")
    parser.add_argument("--val", type=int, default=100, help="validation scenes, drawn from other seeds")
    parser.add_argument("--seed", type=int, default=0, help="another number gives another set")
    parser.add_argument("--height", type=int, default=128, help="of the scenes in pixels, at least 32")
    parser.add_argument("--width", type=int, default=160, help="of the scenes in pixels, at least 32")
    return parser


def wanted(arguments: argparse.Namespace) -> dict:
    """Return what the manifest of the finished set says about its making."""
    return {"version": VERSION, **{key: getattr(arguments, key) for key in KEYS}}


def read_manifest(root: Path) -> dict:
    """Return the manifest: ``made_with`` (None while a set is being exchanged) and ``files`` that are this script's."""
    path = root / MANIFEST
    if not path.exists():
        return {"made_with": None, "files": []}
    try:
        manifest = json.loads(path.read_bytes())
        return {"made_with": manifest["made_with"], "files": manifest["files"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} was not written by this script; choose another root, or delete {root}") from None


def write_manifest(root: Path, made_with: dict | None, files: list[str]) -> None:
    partial = root / f"{MANIFEST}.partial"
    partial.write_text(json.dumps({"made_with": made_with, "files": files}, indent=0))
    os.replace(partial, root / MANIFEST)


def is_complete(root: Path, made_with: dict) -> bool:
    """Return whether the root holds this very set."""
    manifest = read_manifest(root)
    return manifest["made_with"] == made_with and all((root / name).exists() for name in manifest["files"])


def main(arguments: argparse.Namespace) -> None:
    """Write the set beside what is there, then exchange the files."""
    from densepred.data.shapes_files import FIXED_COUNTS, write_split

    root = Path(arguments.root)
    for key, least in {"train": 1, "val": 1, "seed": 0, "height": 32, "width": 32}.items():
        if getattr(arguments, key) < least:
            raise ValueError(f"--{key} {getattr(arguments, key)} is too small; the least is {least}")
    for key, count in FIXED_COUNTS.get(arguments.layout, {}).items():
        if getattr(arguments, key) != count:
            raise ValueError(
                f"the layout {arguments.layout} has {count} {key} images, not {getattr(arguments, key)}: --{key} {count}"
            )
    old = read_manifest(root)["files"]
    partial = root / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    for split in ("train", "val"):
        count = getattr(arguments, split)
        write_split(str(partial), arguments.layout, split, count, arguments.seed, arguments.height, arguments.width)
    new = sorted(path.relative_to(partial).as_posix() for path in partial.rglob("*") if path.is_file())
    exchange(root, old, new)
    write_manifest(root, wanted(arguments), new)
    print(f"wrote {arguments.train} + {arguments.val} scenes in the layout of {arguments.layout} to {root}")


def exchange(root: Path, old: list[str], new: list[str]) -> None:
    """Delete the old files and move the new ones to their places; after a break-off, the next run does the same."""
    foreign = [name for name in new if name not in set(old) and (root / name).exists()]
    if foreign:
        shutil.rmtree(root / PARTIAL)
        raise ValueError(f"{root / foreign[0]} was not written by this script and would be lost; choose another root")
    write_manifest(root, None, sorted({*old, *new}))
    for name in old:
        (root / name).unlink(missing_ok=True)
    for folder in sorted({parent for name in old for parent in Path(name).parents if parent.name}, reverse=True):
        if (root / folder).is_dir() and not any((root / folder).iterdir()):
            (root / folder).rmdir()
    for name in new:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(root / PARTIAL / name, root / name)
    shutil.rmtree(root / PARTIAL)


def up_to_date(arguments: argparse.Namespace) -> bool:
    """Return whether nothing is to do, without importing anything slow."""
    try:
        return is_complete(Path(arguments.root), wanted(arguments))
    except ValueError:
        return False  # main reports it


if __name__ == "__main__":
    parser = make_parser()
    arguments = parser.parse_args()
    if up_to_date(arguments):
        print(f"{arguments.root} holds this set already")
    else:
        from densepred.data.prepare import run_script

        run_script(parser, main)

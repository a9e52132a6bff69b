"""Finding the files of a data set: everything that a folder's listing alone can tell is checked before any training."""

import os
from collections.abc import Iterable


def require_files(paths: Iterable[str], what: str, named_by: str) -> None:
    """Raise FileNotFoundError naming the first absent file and their number; lists each folder once."""
    paths = list(paths)
    present = {folder: _entries(folder) for folder in {os.path.dirname(path) for path in paths}}
    missing = [path for path in paths if os.path.basename(path) not in present[os.path.dirname(path)]]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(paths)} {what} files that {named_by} names are missing, the first is "
            f"{missing[0]}; see datasets/README.md for the layout"
        )


def paired_files(image_dir: str, image_suffix: str, label_dir: str, label_suffix: str) -> list[tuple[str, str, str]]:
    """Return ``(name, image, label)`` of all images in a folder and the folders in it, sorted by path.

    Args:
        image_dir, label_dir: folders with the same files in the same subfolders.
        image_suffix, label_suffix: what follows the name that an image and its label share.

    Returns:
        The common name without folders, and the two paths.

    Raises:
        FileNotFoundError: there is no image, or an image without label, or a label without image.
    """
    images, labels = _by_stem(image_dir, image_suffix), _by_stem(label_dir, label_suffix)
    if not images:
        raise FileNotFoundError(f"no images {image_dir}/**/*{image_suffix}; see datasets/README.md for the layout")
    for what, have, lack, folder, suffix in (
        ("images lack their label", images, labels, label_dir, label_suffix),
        ("labels lack their image", labels, images, image_dir, image_suffix),
    ):
        missing = sorted(have.keys() - lack.keys())
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(have)} {what}, the first missing file is "
                f"{os.path.join(folder, missing[0] + suffix)}; unpack the download again, or remove what has no partner"
            )
    return [(os.path.basename(stem), images[stem], labels[stem]) for stem in sorted(images)]


def _by_stem(folder: str, suffix: str) -> dict[str, str]:
    found = {}
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            if name.endswith(suffix):
                path = os.path.join(place, name)
                found[os.path.relpath(path, folder).removesuffix(suffix)] = path
    return found


def _entries(folder: str) -> set[str]:
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}

"""Finding the files of a data set: everything that a folder's listing alone can tell is checked before any training."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path


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


def paired_files(
    image_dir: str,
    image_suffix: str | Sequence[str],
    label_dir: str,
    label_suffix: str | Sequence[str],
    split_file: str | None = None,
) -> list[tuple[str, str, str]]:
    """Return ``(name, image, label)`` of all images in a folder and the folders in it, sorted by path.

    Args:
        image_dir, label_dir: folders with the same files in the same subfolders.
        image_suffix, label_suffix: what follows the name that an image and its label share, or several such endings; upper
            and lower case are the same.
        split_file: only the names in this text file, in its order (see `listed_names`), not all that is there.

    Returns:
        The common name without folders, and the two paths.

    Raises:
        FileNotFoundError: there is no image, or an image without label, or (without ``split_file``) a label without image.
        ValueError: two files of a folder have the same name but for the ending.
    """
    images, labels = _by_stem(image_dir, image_suffix), _by_stem(label_dir, label_suffix)
    if not images:
        raise FileNotFoundError(
            f"no images {image_dir}/**/*{_shown(image_suffix)}; see datasets/README.md for the layout ({_found(image_dir)})"
        )
    if split_file is not None:
        names = listed_names(split_file)
        for what, have, folder, suffix in (
            ("image", images, image_dir, image_suffix),
            ("label", labels, label_dir, label_suffix),
        ):
            _require_listed(names, have, what, folder, _shown(suffix), split_file)
        return [(os.path.basename(name), images[name], labels[name]) for name in names]
    for what, have, lack, folder, suffix in (
        ("images lack their label", images, labels, label_dir, label_suffix),
        ("labels lack their image", labels, images, image_dir, image_suffix),
    ):
        missing = sorted(have.keys() - lack.keys())
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(have)} {what}, the first missing file is "
                f"{os.path.join(folder, missing[0] + _shown(suffix))}; add the files, or remove what has no partner "
                f"({folder}: {_found(folder)})"
            )
    return [(os.path.basename(stem), images[stem], labels[stem]) for stem in sorted(images)]


def listed_names(path: str) -> list[str]:
    """Return the names in a text file, one a line, without suffix, relative to the folder of the images; no blanks.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no name, or one twice, or is not UTF-8.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}, the list of the split's images, does not exist; see datasets/README.md")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors put a mark in front
    except UnicodeDecodeError:
        raise ValueError(f"{path}, the list of the split's images, is no UTF-8 text; save it as UTF-8") from None
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names:
        raise ValueError(f"{path} lists no image: it should hold one name a line, without suffix")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ValueError(f"{path} lists {twice[0]!r} more than once; remove the repetition")
    return names


def _require_listed(
    names: list[str], have: dict[str, str], what: str, folder: str, suffix: str, split_file: str
) -> None:
    missing = [name for name in names if name not in have]
    if missing:
        hint = "names stand there without suffix" if os.path.splitext(missing[0])[0] in have else "add the files"
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} {what} files that {split_file} names are missing, the first is "
            f"{os.path.join(folder, missing[0] + suffix)}; {hint}, or take the names out of the list ({folder}: "
            f"{_found(folder)})"
        )


def _by_stem(folder: str, suffix: str | Sequence[str]) -> dict[str, str]:
    """Return relative path without the suffix -> path."""
    endings = [ending.lower() for ending in ([suffix] if isinstance(suffix, str) else suffix)]
    found: dict[str, str] = {}
    for place, _, names in os.walk(folder, followlinks=True):
        for name in names:
            ending = max((e for e in endings if name.lower().endswith(e)), key=len, default=None)
            if ending is None:
                continue
            path = os.path.join(place, name)
            stem = os.path.relpath(path, folder)[: -len(ending) or None]
            if stem in found:
                raise ValueError(
                    f"{found[stem]} and {path} have the same name but for the ending; remove one, or choose the suffixes "
                    f"so that one fits (now {_shown(suffix)})"
                )
            found[stem] = path
    return found


def _found(folder: str) -> str:
    if not os.path.isdir(folder):
        return "there is no such folder"
    endings = Counter(os.path.splitext(name)[1] for _, _, names in os.walk(folder, followlinks=True) for name in names)
    found = [f"{count} files {ending or 'without ending'}" for ending, count in endings.most_common(3)]
    return f"it holds {', '.join(found) or 'no file'}"


def _shown(suffix: str | Sequence[str]) -> str:
    endings = [suffix] if isinstance(suffix, str) else list(suffix)
    return endings[0] if len(endings) == 1 else "{" + ",".join(endings) + "}"


def _entries(folder: str) -> set[str]:
    if not os.path.isdir(folder):
        return set()
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries}

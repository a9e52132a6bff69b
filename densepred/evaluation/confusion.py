"""A confusion matrix for the reader: as a CSV of pixel counts and as a picture of shares."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np

NO_CLASS = "(no class)"
"""Heading of a last column beyond the classes: predicted labels that are none of them."""
CELL_TEXTS = 25
"""Up to so many classes the picture's cells carry their numbers."""


def write_confusion(path: str | Path, confusion: np.ndarray, names: Sequence[str]) -> None:
    """Write a confusion matrix, as the file's ending says, its folder included.

    Args:
        path: ``.csv``: counts of pixels, row = truth, column = prediction, the names in the first row and column; ``.png``:
            each row in percent of its true pixels, grey where there are none.
        confusion: (C, C) or (C, C + 1) int, see `densepred.evaluation.semantic.confusion_matrix`.
        names: Of the C classes.

    Raises:
        ValueError: The ending is another one.
    """
    path = Path(path)
    require_ending(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_csv if path.suffix.lower() == ".csv" else _write_png
    write(path, confusion, names, [*names, NO_CLASS][: confusion.shape[1]])


def require_ending(path: str | Path) -> None:
    """Raise ``ValueError`` unless `write_confusion` knows the file's ending."""
    if Path(path).suffix.lower() not in (".csv", ".png"):
        raise ValueError(f"{path}: a confusion matrix is written as .csv or .png; give a name with that ending")


def row_shares(confusion: np.ndarray) -> np.ndarray:
    """Return each row divided by its sum, NaN where the sum is 0."""
    total = confusion.sum(axis=1, keepdims=True)
    return np.divide(confusion, total, out=np.full(confusion.shape, np.nan), where=total > 0)


def _write_csv(path: Path, confusion: np.ndarray, names: Sequence[str], columns: Sequence[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["truth \\ prediction", *columns])
        writer.writerows([name, *counts] for name, counts in zip(names, confusion.tolist(), strict=True))


def _write_png(path: Path, confusion: np.ndarray, names: Sequence[str], columns: Sequence[str]) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    shares, size = 100 * row_shares(confusion), len(names)
    side = min(3 + 0.45 * size, 24)  # inches
    letters = min(9.0, 36 * side / size)  # points: half a cell's height
    figure = Figure(figsize=(side + 1, side), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap=colormaps["Blues"].with_extremes(bad="0.85"), vmin=0, vmax=100)
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=letters)
    axes.set_yticks(range(size), names, fontsize=letters)
    axes.set(xlabel="prediction", ylabel="truth", title="Where the true pixels of a class went, percent")
    figure.colorbar(picture, shrink=0.8)
    for (row, column), share in np.ndenumerate(shares if size <= CELL_TEXTS else np.empty((0, 0))):
        if share >= 0.5:
            color = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=letters, color=color)
    figure.savefig(path)

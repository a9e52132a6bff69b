"""Metrics as text tables whose width does not depend on the terminal."""

import io
import math
from collections.abc import Mapping, Sequence


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str | int | float]], title: str | None = None) -> str:
    """Return a table as text: the first column left, the others right; floats with two digits, NaN as ``-``.

    Args:
        columns: Headings.
        rows: Cells, as many as there are columns; an empty row draws a line.
        title: Line above the table.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.ASCII2, expand=False)
    for number, heading in enumerate(columns):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        if row:
            table.add_row(*(_cell(value) for value in row))
        else:
            table.add_section()
    # A file object and a generous width: the same text in a pipe, a log file and a narrow terminal.
    console = Console(file=io.StringIO(), width=200, color_system=None, highlight=False, markup=False, emoji=False)
    console.print(table)
    return "\n".join(line.rstrip() for line in console.file.getvalue().rstrip().splitlines())


def panoptic_table(record: Mapping, names: Mapping[str, str] | None = None) -> str:
    """Return the table of a panoptic record, in percent.

    Args:
        record: As `densepred.evaluation.panoptic.evaluate_files` returns it, values 0..1.
        names: Class names by the keys of ``record["per_class"]``; without them the keys are shown.
    """
    names = names or {}
    rows: list[Sequence] = []
    for key, values in record["per_class"].items():
        counted = values["tp"] + values["fp"] + values["fn"] > 0
        scores = [100 * values[score] if counted else math.nan for score in ("pq", "sq", "rq")]
        rows.append([names.get(key, key), *scores, values["tp"], values["fp"], values["fn"]])
    rows.append([])
    for group in ("All", "Things", "Stuff"):
        values = record[group]
        rows.append(
            [f"{group} ({values['n']} classes)", *(100 * values[score] for score in ("pq", "sq", "rq")), *[""] * 3]
        )
    return text_table(["class", "PQ", "SQ", "RQ", "TP", "FP", "FN"], rows, title="Panoptic quality")


def semantic_table(record: Mapping, names: Mapping[str, str] | None = None) -> str:
    """Return the table of a semantic record, in percent.

    Args:
        record: As `densepred.evaluation.semantic_files.evaluate_files` returns it, values 0..1.
        names: Class names by the keys of ``record["per_class"]``; without them the keys are shown.
    """
    names = names or {}
    columns = {"IoU": "iou", "Acc": "acc", "Dice": "dice", "Precision": "precision"}
    means = ["mIoU", "mAcc", "mDice", "mPrecision"]
    if "mBIoU" in record:
        columns["Boundary IoU"] = "boundary_iou"
        means.append("mBIoU")
    rows: list[Sequence] = []
    for key, values in record["per_class"].items():
        rows.append([names.get(key, key), *(100 * values[score] for score in columns.values()), values["pixels"]])
    pixels = sum(values["pixels"] for values in record["per_class"].values())
    rows += [[], ["mean", *(100 * record[mean] for mean in means), pixels]]
    rows.append(["weighted by pixels", 100 * record["fwIoU"], 100 * record["aAcc"], *[""] * (len(means) - 2), pixels])
    table = text_table(["class", *columns, "pixels"], rows, title="Semantic segmentation")
    if not pixels:
        return f"{table}\nNothing was measured: every true pixel is ignored."
    absent = sum(math.isnan(values["iou"]) for values in record["per_class"].values())
    if absent:
        return f"{table}\n- : nothing to measure; {absent} classes are in neither truth nor prediction and in no mean."
    return table


def _cell(value: str | int | float) -> str:
    if isinstance(value, float):
        return "-" if math.isnan(value) else f"{value:.2f}"
    return str(value)

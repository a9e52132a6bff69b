"""The curves of a run as pictures: losses, learning rate and metrics, from the scalars that MMEngine logs."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from mmengine.dist import master_only
from mmengine.hooks import Hook

from densepred.registry import HOOKS
from densepred.visualization import write_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NO_METRICS = ("step", "time", "data_time")
"""What a validation line holds besides its metrics."""


@HOOKS.register_module()
class CurvesHook(Hook):
    """Write ``loss_curve.png`` and ``metric_curve.png`` into the work dir, anew after every validation and at the end."""

    priority = "LOW"  # after the LoggerHook has written what is plotted

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        """Plot what has been logged so far."""
        self.after_train(runner)

    @master_only
    def after_train(self, runner: Any) -> None:
        """Plot the whole run, the parts before a resume included."""
        plot_curves(runner.work_dir, runner.work_dir)


def read_scalars(path: str | Path) -> tuple[list[dict], list[dict]]:
    """Read the scalars of a run as MMEngine's ``LocalVisBackend`` writes them.

    Args:
        path: a ``scalars.json`` (JSON lines), or a work dir: then those of all its runs, ``*/vis_data/scalars.json``. A
            later run replaces what earlier ones wrote from its own first step on: a resumed run continues the curve, one
            begun anew starts it again.

    Returns:
        The training lines (``iter``, ``step``, ``lr``, ``loss``, ...) and the validation lines (``step``, metrics), each by
        ascending step.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    files = sorted(path.glob("*/vis_data/scalars.json")) if path.is_dir() else [path]
    training: dict[int, dict] = {}
    validation: dict[int, dict] = {}
    for file in files:
        lines = [record for text in file.read_text().splitlines() if (record := _decoded(text))]
        steps = [line["step"] for line in lines if "loss" in line]
        if not steps:  # a run that only evaluates is no part of the curve
            continue
        for kept in (training, validation):
            for step in [step for step in kept if step >= min(steps)]:
                del kept[step]
        for line in lines:
            (training if "loss" in line else validation)[line["step"]] = line
    return [training[step] for step in sorted(training)], [validation[step] for step in sorted(validation)]


def sum_over_layers(losses: dict[str, float]) -> dict[str, float]:
    """Sum the loss terms of deep supervision: ``loss_ce``, ``loss_ce_0``, ``d1.loss_ce`` -> ``ce``.

    Args:
        losses: scalars of a training step; those whose name lacks ``loss_`` are left out.
    """
    sums: dict[str, float] = {}
    for name, value in losses.items():
        if found := re.fullmatch(r"(.*\.)?(.*?)loss_(.+?)(_\d+)?", name):
            term = found[2] + found[3]
            sums[term] = sums.get(term, 0.0) + value
    return sums


def plot_curves(scalars: str | Path, out_dir: str | Path) -> list[Path]:
    """Plot the losses and the metrics of a run.

    Args:
        scalars: as for `read_scalars`.
        out_dir: where ``loss_curve.png`` and ``metric_curve.png`` go.

    Returns:
        The files written; none for what the run has not logged yet.
    """
    training, validation = read_scalars(scalars)
    written = []
    if training:
        written.append(_save(_loss_figure(training), Path(out_dir, "loss_curve.png")))
    names = [name for name in dict.fromkeys(name for line in validation for name in line) if name not in NO_METRICS]
    if names:
        written.append(_save(_metric_figure(validation, names), Path(out_dir, "metric_curve.png")))
    return written


def _decoded(text: str) -> dict | None:
    try:
        return json.loads(text)
    except json.JSONDecodeError:  # the last line of a run that was killed while writing it
        return None


def _loss_figure(training: list[dict]) -> "Figure":
    """Draw the total over the terms, faint as logged and strong as a running mean, and the learning rate below."""
    from matplotlib.figure import Figure

    steps = np.array([line["step"] for line in training])
    terms = [sum_over_layers(line) for line in training]
    figure = Figure(figsize=(8, 6), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    curves = {"total": _column(training, "loss")}
    curves |= {name: _column(terms, name) for name in dict.fromkeys(name for term in terms for name in term)}
    for rank, (name, values) in enumerate(curves.items()):
        color = "black" if name == "total" else f"C{rank - 1}"
        losses.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        losses.plot(steps, running_mean(values), color=color, linewidth=2 if name == "total" else 1.4, label=name)
    everything = np.concatenate(list(curves.values()))
    everything = everything[np.isfinite(everything)]
    if everything.size and everything.min() > 0 and everything.max() > 10 * everything.min():
        losses.set_yscale("log")
    losses.set_ylabel("loss")
    losses.legend(ncols=2, frameon=False, fontsize="small")
    rates.plot(steps, _column(training, "base_lr" if "base_lr" in training[0] else "lr"), color="gray")
    rates.set_ylabel("learning rate")
    rates.set_xlabel("iteration")
    for axes in (losses, rates):
        _tidy(axes)
    return figure


def _metric_figure(validation: list[dict], names: list[str]) -> "Figure":
    """Draw one panel a metric; variants of it (``PQ``, ``PQ_th``, ``PQ_st``) share a panel."""
    from matplotlib.figure import Figure

    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(name.split("_")[0], []).append(name)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.remove()
    steps = [line["step"] for line in validation]
    for axes, (title, members) in zip(grid, panels.items(), strict=False):
        for name in members:
            style = dict(color="black", linewidth=2) if name == title else dict(linewidth=1.4)
            axes.plot(steps, _column(validation, name), marker="o", markersize=3, label=name, **style)
        axes.set_title(title)
        axes.set_xlabel("iteration")
        if not any((_column(validation, name) < 0).any() for name in members):
            axes.set_ylim(bottom=0)
        if len(members) > 1:
            axes.legend(frameon=False, fontsize="small")
        _tidy(axes)
    return figure


def _tidy(axes: "Axes") -> None:
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _column(lines: Sequence[dict], name: str) -> np.ndarray:
    """Return one scalar of every line (N,), NaN where it is missing or was none."""
    return np.array([np.nan if line.get(name) is None else line[name] for line in lines], float)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Return the exponential mean (N,) of values (N,) over about N / 40 of them; NaN are stepped over.

    It starts at the first value without a pull towards zero, and a short run is not smoothed.
    """
    weight = 1 - 1 / max(1.0, len(values) / 40)
    mean, total, out = 0.0, 0.0, np.full(len(values), np.nan)
    for i, value in enumerate(values):
        if np.isfinite(value):
            mean, total = weight * mean + (1 - weight) * value, weight * total + 1 - weight
            out[i] = mean / total
    return out


def _save(figure: "Figure", path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(120)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return write_png(path, np.asarray(canvas.buffer_rgba())[..., :3])

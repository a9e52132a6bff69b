"""What a run says while it goes: aligned log lines, and a progress bar below them where there is a terminal."""

import atexit
import logging
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import LogProcessor

from densepred.engine.curves import NO_METRICS, sum_over_layers
from densepred.registry import HOOKS, LOG_PROCESSORS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

REFRESH_SECONDS = 0.1
HEADER_EVERY = 20
"""Lines of the table between two headings."""


@LOG_PROCESSORS.register_module()
class TableLogProcessor(LogProcessor):
    """MMEngine's log processor with one aligned line a training step: a table with its heading every 20 lines.

    Columns: iteration, time left, learning rate, seconds a step and of them waiting for data, memory (MB, on a GPU), total
    loss, each loss term summed over the layers of deep supervision, then every other scalar. What goes to files and
    back ends stays as MMEngine collects it. Arguments are those of MMEngine's class.
    """

    _columns: tuple[str, ...] = ()
    _lines = 0

    def get_log_after_iter(self, runner: Any, batch_idx: int, mode: str) -> tuple[dict, str]:
        """Return the scalars for the back ends and the line for the log; a heading that is due is logged at once."""
        tag, text = super().get_log_after_iter(runner, batch_idx, mode)
        if mode != "train":
            return tag, text
        scalars = {self._remove_prefix(name, "train/"): value for name, value in tag.items()}
        cells = table_cells(scalars, runner.max_iters, runner.message_hub.get_info("eta", None))
        widths = {name: max(len(name), len(cell), 8) for name, cell in cells.items()}
        if tuple(cells) != self._columns or self._lines == HEADER_EVERY:
            self._columns, self._lines = tuple(cells), 0
            runner.logger.info(" ".join(name.rjust(width) for name, width in widths.items()))
        self._lines += 1
        return tag, " ".join(cell.rjust(widths[name]) for name, cell in cells.items())

    def get_log_after_epoch(self, runner: Any, batch_idx: int, mode: str, **kwargs: Any) -> tuple[dict, str]:
        """Return the same, with a validation's metrics in short; the table begins anew after what it prints."""
        self._columns = ()
        tag, text = super().get_log_after_epoch(runner, batch_idx, mode, **kwargs)
        if mode != "val":
            return tag, text
        metrics = {self._remove_prefix(name, "val/"): value for name, value in tag.items()}
        shown = [f"{name} {value:.4g}" for name, value in metrics.items() if name not in NO_METRICS]
        return tag, f"Validation at iteration {runner.iter}: {'  '.join(shown)}"


def table_cells(scalars: dict[str, Any], max_iters: int, eta: float | None) -> dict[str, str]:
    """Return the cells of one line of the table by column.

    Args:
        scalars: of a training step as MMEngine collects them: ``iter``, ``lr``, ``time``, ``data_time``, ``loss``, ...
        max_iters: last iteration.
        eta: seconds left, if known.
    """
    cells = {"iter": f"{scalars['iter']:>{len(str(max_iters))}}/{max_iters}"}
    if eta is not None:
        cells["eta"] = duration(eta)
    # With base_lr, lr is that of the first parameter group only.
    rate = next((scalars[name] for name in ("base_lr", "lr") if name in scalars), None)
    if rate is not None:
        cells["lr"] = f"{rate:.2e}"
    for column, name, form in (("time", "time", ".3f"), ("data", "data_time", ".3f"), ("memory", "memory", ".0f")):
        if name in scalars:
            cells[column] = f"{scalars[name]:{form}}"
    losses = {name: value for name, value in scalars.items() if "loss_" in name}
    shown = ["iter", "epoch", "time", "data_time", "memory", "loss", *losses]
    rest = {name: v for name, v in scalars.items() if name not in shown and not name.endswith("lr")}
    for name, value in {"loss": scalars.get("loss"), **sum_over_layers(losses), **rest}.items():
        if value is not None:
            cells[name] = f"{value:.4f}" if abs(value) < 1000 else f"{value:.3g}"
    return cells


def duration(seconds: float) -> str:
    """Return a time as ``h:mm:ss``, from one day on as ``1d 02:03:04``."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}:{minute:02}:{second:02}"
    return f"{hours // 24}d {hours % 24:02}:{minute:02}:{second:02}"


def terminal_console() -> "Console | None":
    """Return a console on stderr, or ``None`` where nobody could see a bar move."""
    if not sys.stderr.isatty():
        return None
    from rich.console import Console

    console = Console(stderr=True)
    return None if console.is_dumb_terminal else console


@HOOKS.register_module()
class ProgressHook(Hook):
    """On a terminal, a bar with iteration, loss and time left for the training, and one for each evaluation.

    Log lines go on above the bar. Without a terminal there are only the log lines. The bar is redrawn from the training
    loop, by no thread: worker processes that are forked meanwhile inherit no lock of it.
    """

    priority = "LOW"  # after the timer has estimated and the RuntimeInfoHook has noted the loss

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._bars: dict[str, Any] = {}
        self._redirected: list[tuple[logging.StreamHandler, TextIO]] = []
        self._refreshed = 0.0

    def before_train(self, runner: Any) -> None:
        """Show the bar of the training, from the iteration a resumed run begins at."""
        self._begin(runner, "train", runner.max_iters, runner.iter)

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance it."""
        if self._progress is not None:
            losses = runner.message_hub.log_scalars.get("train/loss")
            note = f"loss {losses.mean(10):.4f}  " if losses is not None else ""
            self._advance(runner, "train", runner.iter + 1, note)

    def before_val_epoch(self, runner: Any) -> None:
        """Show a bar for this validation."""
        self._begin(runner, "val", len(runner.val_dataloader))

    def after_val_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance it."""
        self._advance(runner, "val", batch_idx + 1)

    def after_val_epoch(self, runner: Any, metrics: dict | None = None) -> None:
        """Take it away."""
        if self._progress is not None:
            self._progress.remove_task(self._bars.pop("val"))
            self._progress.refresh()

    def before_test_epoch(self, runner: Any) -> None:
        """Show the bar of the test."""
        self._begin(runner, "test", len(runner.test_dataloader))

    def after_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Advance it."""
        self._advance(runner, "test", batch_idx + 1)

    def after_run(self, runner: Any) -> None:
        """Leave the terminal as it was."""
        self.close()

    def close(self) -> None:
        """Stop the display and give the loggers their streams back; also runs when the process ends on an error."""
        if self._progress is None:
            return
        self._progress.stop()
        self._progress, self._bars = None, {}
        for handler, stream in self._redirected:
            handler.setStream(stream)
        self._redirected = []
        atexit.unregister(self.close)

    def _begin(self, runner: Any, name: str, total: int, done: int = 0) -> None:
        if self._progress is None and is_main_process() and (console := terminal_console()) is not None:
            self._start(console, runner.logger)
        if self._progress is not None:
            self._bars[name] = self._progress.add_task(name, total=total, completed=done, note="")
            self._progress.refresh()

    def _start(self, console: "Console", logger: logging.Logger) -> None:
        from rich.file_proxy import FileProxy
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description:>5}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=console,
            auto_refresh=False,
            expand=True,
            redirect_stdout=sys.stdout.isatty(),  # `train.py > log.txt` keeps its file
        )
        self._progress.start()
        atexit.register(self.close)
        for handler in logger.handlers:
            # The handlers hold the stream itself, past rich's redirection of sys.stdout.
            if isinstance(handler, logging.StreamHandler) and handler.stream.isatty():
                self._redirected.append((handler, handler.stream))
                handler.setStream(FileProxy(console, handler.stream))

    def _advance(self, runner: Any, name: str, done: int, note: str = "") -> None:
        if self._progress is None:
            return
        eta = runner.message_hub.get_info("eta", None)
        note += "" if eta is None else f"ETA {duration(eta)}"
        self._progress.update(self._bars[name], completed=done, note=note)
        if time.monotonic() - self._refreshed > REFRESH_SECONDS:
            self._progress.refresh()
            self._refreshed = time.monotonic()

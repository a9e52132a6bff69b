"""The log table, and the bar: that log lines stay whole above it and that it leaves the terminal clean."""

import io
import logging
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
from mmengine.logging import HistoryBuffer, MessageHub

from densepred.engine import progress
from densepred.engine.progress import ProgressHook, TableLogProcessor, duration, table_cells
from tests.conftest import ROOT


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """Return the lines a terminal shows after ``text`` with its cursor movements."""
    lines, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
        if token == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif token == "\r":
            column = 0
        elif token[0] == "\x1b":
            if token.endswith("A"):
                row -= int(re.sub(r"\D", "", token) or 1)
            elif token.endswith("2K"):
                lines[row] = ""
        else:
            line = lines[row].ljust(column)
            lines[row] = line[:column] + token + line[column + len(token) :]
            column += len(token)
    return [line.rstrip() for line in lines]


class FakeRunner:
    def __init__(self, name: str, stream: io.StringIO) -> None:
        self.iter, self.max_iters = 0, 30
        self.val_dataloader = self.test_dataloader = [None] * 5
        self.message_hub = MessageHub.get_instance(name)
        self.message_hub.update_info("eta", 3723)
        self.logger = logging.Logger(name)
        self.logger.addHandler(logging.StreamHandler(stream))

    def step(self, loss: float) -> None:
        self.message_hub.update_scalar("train/loss", loss)


@pytest.fixture
def terminal(monkeypatch) -> FakeTerminal:
    from rich.console import Console

    stream = FakeTerminal()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr(progress, "terminal_console", lambda: console)
    monkeypatch.setattr(progress, "REFRESH_SECONDS", 0)
    return stream


def run_training(runner: FakeRunner, hook: ProgressHook, steps: int) -> None:
    hook.before_train(runner)
    for runner.iter in range(steps):
        runner.step(2.0)
        hook.after_train_iter(runner, runner.iter)
        if runner.iter % 10 == 9:
            runner.logger.info(f"line {runner.iter + 1}")
    runner.iter = steps


def test_log_lines_stay_whole_above_the_bar(terminal):
    runner, hook = FakeRunner("bar", terminal), ProgressHook()
    run_training(runner, hook, 20)
    lines = screen(terminal.getvalue())
    assert lines[:2] == ["line 10", "line 20"]
    assert lines[2].startswith("train ")
    assert lines[2].endswith("20/30 loss 2.0000  ETA 1:02:03")
    hook.close()


def test_validation_has_its_own_bar_while_it_lasts(terminal):
    runner, hook = FakeRunner("val", terminal), ProgressHook()
    run_training(runner, hook, 5)
    hook.before_val_epoch(runner)
    for i in range(3):
        hook.after_val_iter(runner, i)
    train, val = screen(terminal.getvalue())[:2]
    assert "5/30" in train
    assert re.match(r" *val .* 3/5 +ETA 1:02:03$", val)
    hook.after_val_epoch(runner)
    lines = screen(terminal.getvalue())
    assert "5/30" in lines[0]
    assert not any("val" in line for line in lines)
    hook.close()


def test_test_run_shows_a_bar(terminal):
    runner, hook = FakeRunner("test", terminal), ProgressHook()
    hook.before_test_epoch(runner)
    hook.after_test_iter(runner, 1)
    assert "2/5" in screen(terminal.getvalue())[0]
    hook.after_run(runner)


def test_close_gives_streams_and_cursor_back(terminal):
    runner, hook = FakeRunner("close", terminal), ProgressHook()
    streams = sys.stdout, sys.stderr
    run_training(runner, hook, 3)
    (handler,) = runner.logger.handlers
    assert handler.stream is not terminal
    hook.after_run(runner)
    hook.close()  # again is harmless
    assert handler.stream is terminal
    assert (sys.stdout, sys.stderr) == streams
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def test_error_ends_with_a_clean_terminal():
    """What a process prints when it dies stands whole, and the cursor comes back."""
    script = """
import sys, io, logging
from rich.console import Console
from densepred.engine import progress
from tests.test_progress import FakeRunner, run_training
progress.REFRESH_SECONDS = 0
progress.terminal_console = lambda: Console(stderr=True, force_terminal=True, width=100, color_system=None)
run_training(FakeRunner("x", io.StringIO()), progress.ProgressHook(), 3)
raise KeyboardInterrupt("stopped here")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    printed = done.stderr.decode()  # as it is: text=True would turn \r into \n
    assert done.returncode != 0
    lines = screen(printed)
    assert lines[0].startswith("Traceback")
    assert "KeyboardInterrupt: stopped here" in lines
    assert sum("3/30" in line for line in lines) == 1
    assert printed.rindex("\x1b[?25h") > printed.rindex("\x1b[?25l")


def test_without_a_terminal_there_are_only_log_lines(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    runner, hook = FakeRunner("plain", stream), ProgressHook()
    run_training(runner, hook, 20)
    hook.before_val_epoch(runner)
    hook.after_val_iter(runner, 0)
    hook.after_val_epoch(runner)
    hook.after_run(runner)
    assert stream.getvalue() == "line 10\nline 20\n"


def test_other_processes_show_nothing(terminal, monkeypatch):
    monkeypatch.setattr(progress, "is_main_process", lambda: False)
    runner = FakeRunner("rank1", io.StringIO())
    run_training(runner, ProgressHook(), 5)
    assert terminal.getvalue() == ""


def test_a_logger_into_a_file_keeps_its_file(terminal):
    stream = io.StringIO()  # `train.py > log.txt`: the log is no terminal
    runner, hook = FakeRunner("file", stream), ProgressHook()
    run_training(runner, hook, 10)
    hook.close()
    assert stream.getvalue() == "line 10\n"


def log(processor: TableLogProcessor, name: str, steps: int, **terms: float) -> tuple[list[str], dict]:
    """Log training steps as the LoggerHook does; return the lines and the last scalars."""
    lines = []
    hub = MessageHub.get_instance(name)
    hub.update_info("eta", 60)
    logger = SimpleNamespace(info=lines.append)
    runner = SimpleNamespace(message_hub=hub, iter=0, max_iters=700, max_epochs=1, logger=logger, model=None)
    runner._train_loop, runner.train_loop = object(), object()
    for runner.iter in range(steps):
        for key, value in dict(lr=1e-3, time=0.5, data_time=0.01, grad_norm=1234.5, **terms).items():
            hub.log_scalars.setdefault(f"train/{key}", HistoryBuffer()).update(value)
        tag, line = processor.get_log_after_iter(runner, runner.iter, "train")
        logger.info(line)
    return lines, tag


def test_table_is_aligned_and_scalars_stay_complete():
    terms = dict(loss=10.0, loss_ce=1.0, loss_ce_0=2.0, loss_mask=7.0)
    lines, tag = log(TableLogProcessor(by_epoch=False), "table", 21, **terms)
    assert len({len(line) for line in lines}) == 1
    assert lines[0] == lines[21]  # the heading comes back after 20 lines
    row = dict(zip(lines[0].split(), lines[-1].split(), strict=True))
    memory = {"memory": row["memory"]} if "memory" in row else {}  # on a GPU
    figures = dict(iter="21/700", eta="0:01:00", lr="1.00e-03", time="0.500", data="0.010", **memory)
    assert row == dict(**figures, loss="10.0000", ce="3.0000", mask="7.0000", grad_norm="1.23e+03")
    assert {"loss_ce", "loss_ce_0", "data_time", "iter", "lr", "grad_norm"} <= tag.keys()


def test_new_column_brings_a_new_heading():
    processor = TableLogProcessor(by_epoch=False)
    log(processor, "columns", 2, loss=1.0)
    lines, _ = log(processor, "columns", 2, loss=1.0, loss_extra=0.5)
    assert lines[0].split()[-1] == "extra" or "extra" in lines[0].split()
    assert len(lines) == 3


def test_cells_of_unusual_values():
    scalars = dict(iter=7, lr=1e-4, base_lr=1e-3, loss=float("nan"), loss_ce=123456.0, memory=2048)
    cells = table_cells(scalars, 100, None)
    assert cells == dict(iter="  7/100", lr="1.00e-03", memory="2048", loss="nan", ce="1.23e+05")


def test_durations():
    assert duration(59.9) == "0:00:59"
    assert duration(3723) == "1:02:03"
    assert duration(86400 + 7384) == "1d 02:03:04"

"""Our operators against the formulations they replace: time, memory and accuracy, in turn, in one process.

Each baseline is written here from the published formula, in plain PyTorch, on the same tensors. Times are CPU seconds of
one thread, which other work on the machine moves little (on a GPU: wall seconds of a synchronised device). Memory is the
peak of what tensors took beyond the arguments, results included; what a library takes inside an operator is not seen.
Errors are L2 norms relative to the baseline in float64. A new operator needs one `OpCase` in `CASES`.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Generator, Tensor

from densepred.engine.op_cases import CASES, OpCase
from densepred.errors import nearest
from densepred.evaluation.table import text_table

TOLERANCE = 1e-4
"""Largest relative error, ours or theirs, in float32; beyond it times mean nothing."""
COLUMNS = (
    "operator, baseline",
    "direction",
    "ours ms",
    "base ms",
    "ratio",
    "ours MiB",
    "base MiB",
    "ours err",
    "base err",
)


@dataclass(frozen=True)
class Measurement:
    """One direction of a case; pairs are (ours, theirs).

    Attributes:
        direction: ``forward`` or ``forward+backward``.
        seconds: medians.
        ratio: median over the rounds of their time / ours.
        memory: peaks in bytes.
        errors: the largest of the results' relative errors.
    """

    direction: str
    seconds: tuple[float, float]
    ratio: float
    memory: tuple[int, int]
    errors: tuple[float, float]


def run_case(
    function: Callable[..., Tensor], arguments: Sequence[Tensor], trained: Sequence[int], slope: Tensor | None
) -> list[Tensor]:
    """Return the output alone without ``slope``, else the output and the gradients of its product with it."""
    if slope is None:
        with torch.no_grad():
            return [function(*arguments)]
    leaves = [t.detach().requires_grad_() if i in trained else t for i, t in enumerate(arguments)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, [leaves[i] for i in trained], slope)]


def output_slope(out: Tensor) -> Tensor:
    """Return a gradient of an output, of equal values for equal shapes, in the output's own memory layout."""
    values = torch.randn(out.shape, generator=Generator().manual_seed(1)).to(out)
    return torch.empty_like(out).copy_(values)


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    torch.cuda.synchronize(device)
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return how much tensors hold at the peak of a run, beyond what they held before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


def _errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(results, exact, strict=True)
    return max(float((found.double() - true).norm() / true.norm()) for found, true in pairs)


def measure(case: OpCase, device: torch.device | str = "cpu", repeats: int = 5) -> list[Measurement]:
    """Compare both formulations of a case, forward alone and with the backward pass.

    Args:
        case: what to measure.
        device: where.
        repeats: alternating runs.

    Raises:
        ValueError: one of the two is further from float64 than `TOLERANCE`.
    """
    device = torch.device(device)
    arguments = [tensor.to(device) for tensor in case.inputs(Generator().manual_seed(0))]
    doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    functions, results = (case.ours, case.theirs), []
    for direction in ("forward", "forward+backward"):
        backward = direction != "forward"
        exact = run_case(case.theirs, doubled, case.trained, output_slope(case.theirs(*doubled)) if backward else None)
        slopes = [output_slope(function(*arguments)) if backward else None for function in functions]
        runs = [
            partial(run_case, f, arguments, case.trained, slope) for f, slope in zip(functions, slopes, strict=True)
        ]
        errors = tuple(_errors(run(), exact) for run in runs)
        if not max(errors) <= TOLERANCE:
            raise ValueError(
                f"{case.op}, {case.shape}, against {case.baseline}: errors {errors} of ours and theirs, "
                f"allowed {TOLERANCE}: times would mean nothing"
            )
        del exact
        order = cycle(((0, 1), (1, 0)))  # nobody always goes first
        rounds = [{side: _seconds(runs[side], device) for side in next(order)} for _ in range(repeats)]
        results.append(
            Measurement(
                direction,
                tuple(statistics.median(r[side] for r in rounds) for side in (0, 1)),
                statistics.median(r[1] / r[0] for r in rounds),
                tuple(peak_bytes(run, device) for run in runs),
                errors,
            )
        )
    return results


def benchmark_ops(device: str = "cpu", ops: Sequence[str] | None = None, repeats: int = 5) -> str:
    """Return the table to print of all cases of some operators.

    Args:
        device: ``cpu`` or ``cuda``.
        ops: names as in `CASES`; None: all.
        repeats: alternating runs; medians are printed.

    Raises:
        ValueError: an unknown operator, or see `measure`.
    """
    known = list(dict.fromkeys(case.op for case in CASES))
    for name in ops or ():
        if name not in known:
            raise ValueError(f"--op {name}: nothing to measure{nearest(name, known)}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler else prints two lines a measurement
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = [row for case in CASES if not ops or case.op in ops for row in _rows(case, device, repeats)]
    finally:
        torch.set_num_threads(threads)
    clock = "CPU ms of one thread" if torch.device(device).type == "cpu" else "wall ms"
    title = (
        f"{device}, float32, batch 1, torch {torch.__version__}: {clock}, medians of {repeats} alternating runs; peak MiB "
        "beyond the arguments; relative L2 error against float64"
    )
    return text_table(COLUMNS, rows, title)


def _rows(case: OpCase, device: str, repeats: int) -> list[list[str]]:
    rows = [[f"{case.op} {case.shape}; {case.baseline}"] + [""] * (len(COLUMNS) - 1)]
    for found in measure(case, device, repeats):
        cells = [f"{1e3 * s:.2f}" for s in found.seconds]
        cells += [
            f"{found.ratio:.2f}x",
            *(f"{n / 2**20:.1f}" for n in found.memory),
            *(f"{e:.1e}" for e in found.errors),
        ]
        rows.append(["", found.direction, *cells])
    return rows

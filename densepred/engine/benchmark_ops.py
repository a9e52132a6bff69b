"""Our operators against the formulations they replace: time, memory and accuracy, in turn, in one process.

The baselines of `op_cases` are the published formulas in plain PyTorch on the same tensors; on a GPU they are measured as
they stand and through `torch.compile`. Times are CPU seconds of one thread, which other work on the machine moves little,
or those of `timing` on a GPU. Memory is the peak of what tensors took beyond the arguments, results included; what a library
takes inside an operator is not seen. Errors are L2 norms relative to the baseline in float64 on the rounded inputs, of whole
numbers the share that differs. Bytes are every argument and result once, in the backward pass their gradients too; both
they and the FLOPs are set against what a copy and a matrix product reach on the same device.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Generator, Tensor

from densepred.engine.op_cases import CASES, OpCase
from densepred.engine.timing import ceilings, peak_bytes, rotated, timers
from densepred.errors import nearest

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative error, ours or theirs, by type; beyond it times mean nothing."""
COLUMNS = (
    "direction",
    "ours ms",
    "base ms",
    "ratio",
    "A/A",
    "copy %",
    "matmul %",
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
        spread: median over the rounds of how far two times of ours lie apart, relative to the first: a gain below it is
            none.
        memory: peaks in bytes.
        errors: the largest of the results' errors.
        rates: our bytes and FLOPs a second.
    """

    direction: str
    seconds: tuple[float, float]
    ratio: float
    spread: float
    memory: tuple[int, int]
    errors: tuple[float, float]
    rates: tuple[float, float]


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


def _errors(results: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    def error(found: Tensor, true: Tensor) -> float:
        if not found.is_floating_point():
            return float((found != true).double().mean())
        return float((found.double() - true).norm() / true.norm())

    return max(error(found, true) for found, true in zip(results, exact, strict=True))


def measure(
    case: OpCase,
    device: torch.device | str = "cpu",
    repeats: int = 5,
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
) -> list[Measurement]:
    """Compare both formulations of a case, forward alone and, where something is trained, with the backward pass.

    Args:
        case: what to measure.
        device: where.
        repeats: alternating rounds.
        dtype: what the float arguments are rounded to.
        compiled: put the baseline through `torch.compile`.

    Raises:
        ValueError: one of the two is further from float64 than `TOLERANCES` allows.
    """
    device = torch.device(device)
    arguments = [
        tensor.to(device, dtype if tensor.is_floating_point() else None)
        for tensor in case.inputs(Generator().manual_seed(0))
    ]
    copies = rotated(arguments, device)
    directions = ("forward", "forward+backward") if case.trained else ("forward",)
    sides = (case.ours, torch.compile(case.theirs) if compiled else case.theirs)
    return [_measure_direction(case, sides, direction, copies, repeats) for direction in directions]


def _measure_direction(
    case: OpCase, sides: Sequence[Callable[..., Tensor]], direction: str, copies: list[list[Tensor]], repeats: int
) -> Measurement:
    arguments, backward = copies[0], direction != "forward"
    slopes = [output_slope(side(*arguments)) if backward else None for side in sides]
    doubled = [tensor.double() if tensor.is_floating_point() else tensor for tensor in arguments]
    exact = run_case(case.theirs, doubled, case.trained, slopes[1].double() if backward else None)
    found = [run_case(side, arguments, case.trained, slope) for side, slope in zip(sides, slopes, strict=True)]
    errors = tuple(_errors(results, exact) for results in found)
    allowed = TOLERANCES[next(tensor.dtype for tensor in arguments if tensor.is_floating_point())]
    if not max(errors) <= allowed:
        raise ValueError(
            f"{case.op}, {case.shape}, against {case.baseline}: errors {errors} of ours and theirs, "
            f"allowed {allowed}: times would mean nothing"
        )
    moved = sum(tensor.numel() * tensor.element_size() for tensor in [*arguments, *found[0]])
    if backward:
        moved += sum(tensor.numel() * tensor.element_size() for tensor in [*arguments, slopes[0]])
    del doubled, exact, found
    runs = [
        [partial(run_case, side, copy, case.trained, slope) for copy in copies]
        for side, slope in zip(sides, slopes, strict=True)
    ]
    ours, theirs = timers(runs, arguments[0].device)
    order = cycle(((0, 1, 2), (1, 2, 0), (2, 0, 1)))  # nobody always goes first
    rounds = [{turn: (ours, theirs, ours)[turn]() for turn in next(order)} for _ in range(repeats)]
    seconds = tuple(statistics.median(times[side] for times in rounds) for side in (0, 1))
    return Measurement(
        direction,
        seconds,
        ratio=statistics.median(times[1] / times[0] for times in rounds),
        spread=statistics.median(abs(times[2] / times[0] - 1) for times in rounds),
        memory=tuple(peak_bytes(calls[0], arguments[0].device) for calls in runs),
        errors=errors,
        rates=(moved / seconds[0], case.flops(*arguments)[backward] / seconds[0]),
    )


def benchmark_ops(
    device: str = "cpu", ops: Sequence[str] | None = None, repeats: int = 5, dtypes: Sequence[str] = ("float32",)
) -> str:
    """Return the tables to print of all cases of some operators.

    Args:
        device: ``cpu`` or ``cuda``.
        ops: names as in `CASES`; None: all.
        repeats: alternating rounds; medians are printed.
        dtypes: a table each: ``float32``, ``bfloat16`` or ``float16``.

    Raises:
        ValueError: an unknown operator or type.
    """
    known = list(dict.fromkeys(case.op for case in CASES))
    for name in ops or ():
        if name not in known:
            raise ValueError(f"--op {name}: nothing to measure{nearest(name, known)}")
    types = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCES}
    for name in dtypes:
        if name not in types:
            raise ValueError(f"--dtype {name}: choose from {', '.join(types)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return "\n\n".join(_table(device, ops or known, repeats, types[name]) for name in dtypes)
    finally:
        torch.set_num_threads(threads)


def _table(device: str, ops: Sequence[str], repeats: int, dtype: torch.dtype) -> str:
    place = torch.device(device)
    on_gpu = place.type == "cuda"
    cases = [case for case in CASES if case.op in ops and place.type in case.devices]
    rows = [row for case in cases for row in _rows(case, place, repeats, dtype)]
    name = torch.cuda.get_device_name(place) if on_gpu else "one CPU thread"
    copy, product = ceilings(place, dtype)
    title = (
        f"{name}, {dtype}, torch {torch.__version__}: {'' if on_gpu else 'CPU '}ms, medians of {repeats} alternating rounds; "
        f"A/A: ours against itself; shares of a copy's {copy / 1e9:.0f} GB/s and a product's {product / 1e12:.2f} TFLOP/s; "
        "peak MiB beyond the arguments; relative L2 error against float64 (whole numbers: the share that differs)"
    )
    return "\n".join([title, "", _line(COLUMNS), *rows])


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:18s}" + "".join(f"{cell:>10s}" for cell in cells[1:])


def _rows(case: OpCase, device: torch.device, repeats: int, dtype: torch.dtype) -> list[str]:
    rows = []
    for compiled in (False, True) if device.type == "cuda" else (False,):
        what = f"{case.op} {case.shape}; {case.baseline}{', compiled' if compiled else ''}"
        rows.append(what)
        try:
            found = measure(case, device, repeats, dtype, compiled)
        except ValueError as error:
            rows.append(f"void: {error}")
            continue
        rows += [_line(_cells(measurement, device, dtype)) for measurement in found]
    return rows


def _cells(found: Measurement, device: torch.device, dtype: torch.dtype) -> list[str]:
    shares = [rate / ceiling for rate, ceiling in zip(found.rates, ceilings(device, dtype), strict=True)]
    return [
        found.direction,
        *(f"{1e3 * seconds:.3f}" for seconds in found.seconds),
        f"{found.ratio:.2f}x",
        f"{100 * found.spread:.1f}%",
        *(f"{100 * share:.1f}" if share else "-" for share in shares),
        *(f"{size / 2**20:.1f}" for size in found.memory),
        *(f"{error:.1e}" for error in found.errors),
    ]

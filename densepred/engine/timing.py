"""How long a function takes and what it holds: CPU seconds of a process, CUDA graphs or events, peaks of memory, ceilings."""

import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

REPLAYS = 3
"""Replays of a graph in one reading of a GPU's clock."""
CACHE_BYTES = 256 << 20
"""Inputs are copied until they hold so much: several times the L2 of today's GPUs, so that no call finds its own warm."""


def timers(runs: Sequence[Sequence[Callable[[], Any]]], device: torch.device) -> list[Callable[[], float]]:
    """Return a function for each side that measures it once, in seconds a call.

    On a CPU it is the process's CPU time. On a GPU all calls of a side, which differ in the copy of the inputs that they
    read, are captured into one CUDA graph; where one side cannot be captured (it waits for the device), all are timed by
    events around their calls.

    Args:
        runs: for each side the calls; equal work within a side.
        device: where they run.
    """
    if device.type == "cpu":
        return [partial(_cpu_seconds, calls) for calls in runs]
    try:
        graphs = [_captured(calls) for calls in runs]
    except RuntimeError:
        torch.cuda.synchronize(device)
        return [partial(_event_seconds, calls) for calls in runs]
    return [partial(_replay_seconds, graph, len(calls)) for graph, calls in zip(graphs, runs, strict=True)]


def _cpu_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    start = time.process_time()
    for call in calls:
        call()
    return (time.process_time() - start) / len(calls)


def _event_seconds(calls: Sequence[Callable[[], Any]]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for call in calls:
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / len(calls)


def _replay_seconds(graph: torch.cuda.CUDAGraph, calls: int) -> float:
    return _event_seconds([graph.replay] * REPLAYS) / calls


def _captured(calls: Sequence[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def rotated(arguments: Sequence[Tensor], device: torch.device) -> list[list[Tensor]]:
    """Return copies of a call's arguments that together pass a GPU's cache; on a CPU the arguments alone."""
    size = sum(tensor.numel() * tensor.element_size() for tensor in arguments)
    copies = 1 if device.type == "cpu" else min(16, -(-CACHE_BYTES // max(size, 1)) + 1)
    return [list(arguments), *([tensor.clone() for tensor in arguments] for _ in range(copies - 1))]


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return how much tensors hold at the peak of a run, beyond what they held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler else prints two lines a run
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    del result
    held = peak = 0
    changes = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for change in sorted(changes, key=lambda event: event.start_ns()):
        held += change.nbytes()
        peak = max(peak, held)
    return peak


@lru_cache
def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Return the bytes a second that a copy reads and writes, and the FLOPs a second of a matrix product in a type."""
    on_cpu = device.type == "cpu"
    side = 1024 if on_cpu else 8192
    source = torch.randn((64 << 20) if on_cpu else (1 << 30), device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(side, side, device=device).to(dtype)
    calls = (lambda: target.copy_(source), lambda: matrix @ matrix)
    copy, product = (min(timer() for _ in range(4)) for timer in timers([[call] for call in calls], device))
    return 8 * source.numel() / copy, 2 * side**3 / product


__all__ = ["ceilings", "peak_bytes", "rotated", "timers"]

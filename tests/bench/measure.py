"""How things are measured: the machine, alternating runs, tensors' peak memory, slopes."""

from __future__ import annotations

import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


def processor() -> str:
    """The model of the CPU as the system names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _fastest(run: Run, repeats: int) -> float:
    run()
    return min(seconds(run)[0] for _ in range(repeats))


def seconds(run: Run) -> tuple[float, Any]:
    """Wall seconds of one run, and what it returned."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def product_rate(dtype: torch.dtype, size: int, device: str = "cpu", repeats: int = 7) -> float:
    """FLOP/s of the product of two matrices [size, size] into a third: the best of some."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _fastest(lambda: torch.mm(a, b, out=out), repeats)


def bandwidth(numbers: int, device: str = "cpu", repeats: int = 7) -> float:
    """Bytes/s, read and written, of a copy of some float32 numbers: the best of some."""
    a = torch.randn(numbers, device=device)
    out = torch.empty_like(a)
    return 8 * numbers / _fastest(lambda: out.copy_(a), repeats)


def rate(kind: str, quick: bool = False, repeats: int = 2) -> float:
    """What the machine reaches at this moment: FLOP/s of "float32" or "float64", or "memory"."""
    if kind == "memory":
        return bandwidth(1 << (16 if quick else 26), repeats=repeats)
    return product_rate(getattr(torch, kind), 256 if quick else 2048, repeats=repeats)


def machine(quick: bool = False) -> dict[str, Any]:
    """CPU, cores, versions, and the rates that this machine reaches; no name of the host."""
    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **{kind: rate(kind, quick, repeats=7) for kind in ("float32", "float64", "memory")},
    }


def alternate(
    ours: Run, published: Run | None, runs: int, clock: bool = False
) -> tuple[list[float], list[float]]:
    """Seconds of each, in turn, so that what else runs slows both; with `clock` ours says its own.

    None of the published procedure where there is none.
    """
    mine: list[float] = []
    theirs: list[float] = []
    for _ in range(runs):
        mine.append(float(ours()) if clock else seconds(ours)[0])
        if published is not None:
            theirs.append(seconds(published)[0])
    return mine, theirs


def median_ratio(ours: Sequence[float], published: Sequence[float]) -> float:
    """How many times longer the published procedure takes: the median over pairs of runs."""
    return statistics.median(b / a for a, b in zip(ours, published, strict=True))


def peak_bytes(run: Run) -> int:
    """The most that tensors made by `run` hold at one time, in bytes.

    From the profiler's record of every allocation, so it does not depend on the machine; what
    libraries hold besides tensors is not in it.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        kept = run()
    del kept
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Slope of log(values) on log(sizes), by least squares: the exponent of growth."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    centre, level = statistics.fmean(x), statistics.fmean(y)
    across = sum((a - centre) * (b - level) for a, b in zip(x, y, strict=True))
    return across / sum((a - centre) ** 2 for a in x)


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest number that was expected."""
    scale = float(expected.double().abs().max()) or 1.0
    return float((found.double() - expected.double()).abs().max()) / scale

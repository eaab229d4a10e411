"""`python -m tests.bench`: every row on CPUs, a table, and book/results/bench.json."""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.bench import measure
from tests.bench.growth import growth
from tests.bench.rows import ROOT, ROWS, Case, Row

RESULTS = ROOT / "book" / "results" / "bench.json"
FORMAT = "darkmatter-bench/1"


def run_case(
    name: str, row: Row, case: Case, rate: Callable[[str], float], runs: int
) -> dict[str, Any]:
    """Both ways once, to compare them and to warm up; then in turn. One line of the results.

    A share of the machine is of its `rate` just before and after, as other guests of the same
    computer come and go. What takes long is run twice only.
    """
    began = time.perf_counter()
    first = case.ours()
    found = case.check(first, case.published()) if case.published else 0.0
    if not found <= case.tolerance:
        raise AssertionError(f"{name}, {case.size}: the two differ by {found:g}")
    del first
    runs = min(runs, 2) if time.perf_counter() - began > 10 else runs
    has_share = math.isfinite(case.work)
    rates = [rate(case.rate)] if has_share else []
    cpu, wall = time.process_time(), time.perf_counter()
    mine, theirs = measure.alternate(case.ours, case.published, runs, case.clock)
    busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
    theirs = [seconds / case.part for seconds in theirs]
    ours = statistics.median(mine)
    ratio = measure.median_ratio(mine, theirs) if theirs else None
    rates += [rate(case.rate)] if has_share else []
    share = case.work / ours / statistics.mean(rates) if has_share else None
    return {
        "row": name,
        "work": row.work,
        "size": case.size,
        "ours_s": ours,
        "published_s": statistics.median(theirs) if theirs else None,
        "ratio": ratio,
        "runs": runs,
        "cores_busy": busy,
        "difference": found,
        "aim": row.aim,
        "met": case.met(ratio or 0.0, ours, share or 0.0),
        "flop_per_token": row.flop,
        "bytes_per_token": row.bytes,
        "share": share,
        "share_of": case.rate if share is not None else "",
        "note": case.note,
    }


def run(names: Iterable[str], quick: bool, repeats: int) -> Iterator[dict[str, Any]]:
    """The machine first, then every line of these rows as it is measured."""
    machine = measure.machine(quick)
    yield machine
    for name in names:
        for case in ROWS[name].cases(quick):
            yield run_case(name, ROWS[name], case, partial(measure.rate, quick=quick), repeats)


def line(result: dict[str, Any]) -> str:
    """A result as one line of the table."""
    share = "" if result["share"] is None else f"{100 * result['share']:.0f} %"
    published = "" if result["ratio"] is None else f"{result['published_s']:.4f}"
    ratio = "" if result["ratio"] is None else f"{result['ratio']:.2f}"
    return (
        f"{result['row']:11}{result['ours_s']:10.4f}{published:>11}{ratio:>9}"
        f"{'yes' if result['met'] else 'NO':>5}{share:>7} {result['share_of']:8}{result['size']}"
    )


def write(path: Path, results: dict[str, Any]) -> None:
    """Replace the file at once."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--row", action="append", choices=ROWS, help="only this row (repeatable)")
    parser.add_argument("--quick", action="store_true", help="smoke sizes, whose times say nothing")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-growth", action="store_true", help="leave the slopes out")
    parser.add_argument("--out", type=Path, help="where to write; by default the book's results")
    asked = parser.parse_args(arguments)
    torch.manual_seed(0)
    start = time.perf_counter()
    found = run(asked.row or ROWS, asked.quick, asked.repeats)
    machine = next(found)
    print(
        f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}: "
        f"{machine['float32'] / 1e9:.0f} GFLOP/s float32, {machine['float64'] / 1e9:.0f} float64, "
        f"{machine['memory'] / 1e9:.0f} GB/s"
    )
    print(f"{'row':11}{'ours s':>10}{'published':>11}{'ratio':>9}{'met':>5}  share of      size")
    rows: list[dict[str, Any]] = []
    for result in found:
        rows.append(result)
        print(line(result), flush=True)
    slopes: list[dict[str, Any]] = []
    if not asked.row and not asked.no_growth:
        for one in growth(asked.quick):
            slopes.append(one)
            print(
                f"{one['work']:18}{one['of']:7} against {one['against']:8}"
                f"{one['slope']:6.2f} (formula {one['formula']:.2f}) {one['because']}",
                flush=True,
            )
    took = time.perf_counter() - start
    print(f"{took:.0f} s in all")
    results = {
        "format": FORMAT,
        "machine": machine,
        "quick": asked.quick,
        "seconds": took,
        "rows": rows,
        "growth": slopes,
    }
    # A part of the rows, or smoke sizes, would be no table for the book.
    out = asked.out or (None if asked.row or asked.quick else RESULTS)
    if out is not None:
        write(out, results)


if __name__ == "__main__":
    main()

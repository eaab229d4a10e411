"""How time and memory grow with tokens, d, m and k, next to what the formulas say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from darkmatter.geometry import neighbour_cosines
from darkmatter.leastsquares import LinearStatistics
from darkmatter.pursuit import gradient_pursuit
from darkmatter.scaling import NormMoments
from darkmatter.sparse import SparseCode
from tests.bench import measure
from tests.bench.rows import generator, planted, residual_stream

OFF = 0.15
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Work:
    """Something whose cost is `flop` and whose tensors are `held` bytes, at given sizes.

    `make` prepares a run outside of the measurement; `vary` are the sizes of each variable, the
    others as in `base`. `because` explains, by variable, slopes that differ from the formula's.
    """

    name: str
    base: Sizes
    vary: Mapping[str, tuple[int, ...]]
    make: Callable[[Sizes], Callable[[], Any]]
    flop: Callable[[Sizes], float]
    held: Callable[[Sizes], float]
    because: Mapping[tuple[str, str], str]


def _fit(s: Sizes) -> Callable[[], Any]:
    x = residual_stream(s["tokens"], s["d"])

    def run() -> LinearStatistics:
        moments = LinearStatistics(s["d"], s["d"])
        for rows in x.split(2048):
            moments.partial_fit(rows, rows)
        return moments

    return run


def _pursue(s: Sizes) -> Callable[[], Any]:
    x, atoms = planted(s["tokens"], s["m"], s["d"], s["k"])
    return lambda: gradient_pursuit(x, atoms, s["k"])


def _neighbours(s: Sizes) -> Callable[[], Any]:
    directions = torch.randn(s["m"], s["d"], generator=generator())
    return lambda: neighbour_cosines(directions, (1, 10))


def _decode(s: Sizes) -> Callable[[], Any]:
    atoms = torch.randn(s["m"], s["d"], generator=generator())
    shape = (s["tokens"], s["k"])
    code = SparseCode(torch.rand(shape), torch.randint(0, s["m"], shape, generator=generator()))
    return lambda: code.decode(atoms)


def _moments(s: Sizes) -> Callable[[], Any]:
    norms = torch.rand(s["tokens"], s["columns"], generator=generator())

    def run() -> NormMoments:
        moments = NormMoments(s["columns"])
        for rows in norms.split(16384):
            moments.partial_fit(rows)
        return moments

    return run


OVERHEAD = "at the small end calls cost as much as numbers do"
CACHE = "at the small end everything lies in a cache"
BOTH = "the formula counts FLOP, and small products run below the full rate"
CHUNK = "a chunk holds a fixed number of correlations, and here there are fewer"
SUMS = "sums of Gram rows wait for memory, at another rate than products"


WORKS = (
    Work(
        "moments",
        {"tokens": 8192, "d": 256},
        {"tokens": (4096, 8192, 16384, 32768), "d": (128, 256, 512)},
        _fit,
        lambda s: 4.0 * s["tokens"] * s["d"] ** 2,
        lambda s: 2 * 8 * s["d"] ** 2 + 2 * 8 * min(1024, s["tokens"]) * s["d"],
        {("time", "tokens"): OVERHEAD, ("time", "d"): BOTH},
    ),
    Work(
        "gradient pursuit",
        {"tokens": 1024, "d": 256, "m": 2048, "k": 16},
        {
            "tokens": (1024, 2048, 4096, 8192),
            "d": (128, 256, 512),
            "m": (1024, 2048, 4096),
            "k": (8, 16, 32),
        },
        _pursue,
        # The Gram rows of all atoms, the first correlations, then sums of rows.
        lambda s: (
            2.0 * s["m"] ** 2 * s["d"]
            + s["tokens"] * (2.0 * s["m"] * s["d"] + s["m"] * s["k"] ** 2)
        ),
        lambda s: 4.0 * s["m"] ** 2 + 8 * s["m"] * min(s["tokens"], 2048),
        {
            ("time", "tokens"): SUMS,
            ("time", "d"): SUMS,
            ("time", "m"): SUMS,
            ("time", "k"): SUMS,
            ("memory", "tokens"): CHUNK,
            ("memory", "m"): CHUNK,
            ("memory", "k"): "codes and gradients of a chunk, [n, k], come on top",
            ("memory", "d"): "the atoms' part of a step, [n, d], comes on top",
        },
    ),
    Work(
        "neighbour cosines",
        {"m": 4096, "d": 256},
        {"m": (2048, 4096, 8192), "d": (128, 256, 512)},
        _neighbours,
        lambda s: 2.0 * s["m"] ** 2 * s["d"],
        lambda s: 8.0 * s["m"] * s["d"] + 4 * min(s["m"] ** 2, 1 << 23),
        {
            ("time", "d"): "the search for the nearest, 9 m^2, does not depend on d",
            ("time", "m"): CACHE,
            ("memory", "m"): CHUNK,
        },
    ),
    Work(
        "sparse decode",
        {"tokens": 4096, "d": 256, "m": 4096, "k": 32},
        {
            "tokens": (2048, 4096, 8192),
            "d": (128, 256, 512),
            "m": (2048, 4096, 8192),
            "k": (16, 32, 64),
        },
        _decode,
        lambda s: 2.0 * s["tokens"] * s["k"] * s["d"],
        lambda s: 4.0 * s["tokens"] * s["d"],
        {
            ("time", "tokens"): CACHE,
            ("time", "d"): CACHE,
            ("time", "m"): "rows of fewer atoms stay in a cache",
            ("time", "k"): OVERHEAD,
            ("memory", "k"): "offsets and copies of the code come on top",
        },
    ),
    Work(
        "moments of norms",
        {"tokens": 65536, "columns": 14},
        {"tokens": (32768, 65536, 131072), "columns": (14, 28, 56)},
        _moments,
        lambda s: 2.0 * s["tokens"] * s["columns"] ** 2,
        lambda s: 3 * 8.0 * (2048 * s["columns"] + 16384),
        {
            ("time", "tokens"): CACHE,
            (
                "time",
                "columns",
            ): "with few columns reading the norms costs more than the products",
        },
    ),
)


def growth(quick: bool = False, works: Sequence[Work] = WORKS) -> Iterator[dict[str, Any]]:
    """For each work and variable: slopes of time and memory, the formulas', and why they differ."""
    for work in works:
        for variable, values in work.vary.items():
            small = tuple(value // 4 for value in values) if quick else values
            base = {name: v // 4 for name, v in work.base.items()} if quick else work.base
            sizes = [{**base, variable: value} for value in small]
            times: list[float] = []
            peaks: list[float] = []
            for size in sizes:
                run = work.make(size)
                run()
                repeats = 1 if quick else 3
                times.append(statistics.median(measure.seconds(run)[0] for _ in range(repeats)))
                peaks.append(float(measure.peak_bytes(run)))
            for quantity, found, formula in (
                ("time", times, [work.flop(size) for size in sizes]),
                ("memory", peaks, [work.held(size) for size in sizes]),
            ):
                slope, expected = measure.slope(small, found), measure.slope(small, formula)
                off = abs(slope - expected) > OFF
                yield {
                    "work": work.name,
                    "of": quantity,
                    "against": variable,
                    "sizes": list(small),
                    "found": found,
                    "slope": slope,
                    "formula": expected,
                    "because": work.because.get((quantity, variable), "unexplained") if off else "",
                }

"""Streaming least squares against the plain way: `make bench`.

A survey regresses the errors of several SAEs on one activation x. The plain way keeps all rows and
calls `torch.linalg.lstsq` once for each SAE; `LinearStatistics` reads the rows in batches, and
factorises x'x once for all targets. Both run in float64 with an intercept, on the same random rows,
and have to agree. Times are the best of a few repeats; memory is not measured.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from darkmatter.leastsquares import LinearStatistics

BATCH = 4096


def plain(x: Tensor, targets: list[Tensor]) -> Tensor:
    """Weights [d, targets * d], one call of lstsq for each target."""
    design = torch.cat([x, x.new_ones(len(x), 1)], dim=1).double()
    return torch.cat([torch.linalg.lstsq(design, y.double()).solution[:-1] for y in targets], dim=1)


def streaming(x: Tensor, targets: list[Tensor]) -> Tensor:
    """The same weights from moments that were accumulated in batches."""
    statistics = LinearStatistics(x.shape[1], sum(y.shape[1] for y in targets))
    for start in range(0, len(x), BATCH):
        rows = slice(start, start + BATCH)
        statistics.partial_fit(x[rows], torch.cat([y[rows] for y in targets], dim=1))
    return statistics.solve().weight


def best_of(repeats: int, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of the fastest repeat, and what it returned."""
    seconds: list[float] = []
    result = run()
    for _ in range(repeats):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return min(seconds), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, best of {repeats}")
    print(f"{'rows':>7} {'d':>5} {'SAEs':>5} {'lstsq s':>9} {'ours s':>9} {'ratio':>6} {'diff':>8}")
    for n, d, saes in [(16_384, 64, 1), (16_384, 256, 1), (16_384, 256, 5), (32_768, 256, 5)]:
        generator = torch.Generator().manual_seed(0)
        # A mean far from zero, as in a residual stream: this is what breaks naive moments.
        x = torch.randn(n, d, generator=generator) + 10 * torch.randn(d, generator=generator)
        targets = [torch.randn(n, d, generator=generator) + 0.5 * x for _ in range(saes)]
        slow, expected = best_of(repeats, lambda x=x, y=targets: plain(x, y))
        fast, weight = best_of(repeats, lambda x=x, y=targets: streaming(x, y))
        difference = (weight - expected).abs().max().item()
        ratio = slow / fast
        print(f"{n:7} {d:5} {saes:5} {slow:9.3f} {fast:9.3f} {ratio:6.1f} {difference:8.0e}")


if __name__ == "__main__":
    main()

"""Perturbation curves with the prompt cached against full forwards, on the embedded suite.

Prompts of ten tokens, a hundred steps, five directions. Both ways have to agree.
"""

from __future__ import annotations

import argparse
import time

import torch

from darkmatter.sensitivity import curves, relative_path
from darkmatter.suites import load_suite

HOOK, PROMPTS, DIRECTIONS, STEPS = "blocks.1.hook_resid_pre", 2, 5, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    repeats = parser.parse_args().repeats
    suite = load_suite("pydocs")
    tokens = suite.tokens("test").tokens[:PROMPTS, :10]
    base = suite.model.activations(tokens, HOOK)[:, -1:].expand(-1, DIRECTIONS, -1)
    generator = torch.Generator().manual_seed(0)
    target = base + 5 * torch.randn(base.shape, generator=generator)
    paths = relative_path(base, target, STEPS)
    print(f"{'read':>8} {'full s':>8} {'cached s':>9} {'ratio':>6} {'diff':>8}")
    for read in (("l2",), ("l2", "kl")):
        seconds: dict[bool, float] = {}
        found: dict[bool, dict[str, torch.Tensor]] = {}
        for cached in (False, True):
            times: list[float] = []
            for _ in range(repeats):
                start = time.perf_counter()
                found[cached] = curves(suite.model, HOOK, tokens, paths, read, cached=cached)
                times.append(time.perf_counter() - start)
            seconds[cached] = min(times)
        l2 = [found[cached]["l2"] for cached in (False, True)]
        difference = float((l2[0] - l2[1]).abs().max() / l2[0].max())
        assert difference < 1e-5, difference
        ratio = seconds[False] / seconds[True]
        print(
            f"{'+'.join(read):>8} {seconds[False]:8.2f} {seconds[True]:9.2f} {ratio:6.1f} "
            f"{difference:8.1e}"
        )


if __name__ == "__main__":
    main()

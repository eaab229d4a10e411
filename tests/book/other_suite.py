"""Chapters 02 to 05, 09 to 14 and 18 on another suite: `make suites-check` runs all eleven.

The suite is `gpt2-small` as its users load it, by name and through the hub's cache, but the cache
holds the random and reduced stand-in of tests/hub_stand_in.py. So no value means anything; what is
shown is that no cell needs what only `pydocs` has. Each chapter takes about a minute of one core.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book.execution import Execution, execute
from darkmatter.book.paths import open_book
from tests.hub_stand_in import fill_cache

ROOT = Path(__file__).parents[2]
CHAPTERS = ("02", "03", "04", "05", "09", "10", "11", "12", "13", "14", "18")
# How much narrower than GPT-2 small; chapter 14 asks for the 100th neighbour in the narrowest SAE,
# 18 takes 32 components of more dimensions than that.
SMALLER = {"14": 6, "18": 6}


def run_on_stand_in(chapter: str, home: Path, smaller: int) -> Execution:
    """Execute a chapter on a random gpt2-small that is `smaller` times narrower, cached in `home`.

    Raises ChapterFailure for a cell that fails.
    """
    if not (home / "hub").exists():
        fill_cache(home, smaller, steps=100)
    with pytest.MonkeyPatch.context() as patch:
        # For the kernels, which inherit it: this process has read it long ago.
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        given = {"suite": "gpt2-small"}
        (run,) = execute(open_book(ROOT), chapter, given, home / "executed", jobs=1)
    return run


def main(chapters: list[str]) -> int:
    """Run the chapters that are named, or all, one after the other; 1 when a cell failed."""
    failed = 0
    with tempfile.TemporaryDirectory() as homes:
        for chapter in chapters or CHAPTERS:
            smaller = SMALLER.get(chapter, 24)
            try:
                run = run_on_stand_in(chapter, Path(homes, str(smaller)), smaller)
                print(f"{run.path.name}: every cell ran, {run.seconds:.0f} s", flush=True)
            except Refusal as problem:
                failed = 1
                print(problem, file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

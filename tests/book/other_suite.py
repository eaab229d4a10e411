"""Chapters 02 to 05 and 09 to 14 on another suite: `make suites-check` runs all ten.

The suite is `gpt2-small` as its users load it, by name and through the hub's cache, but the cache
holds the random and reduced stand-in of tests/hub_stand_in.py. So no value means anything; what is
shown is that no cell needs what only `pydocs` has. Each chapter takes a minute or several.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book.execution import Execution, execute
from darkmatter.book.paths import open_book
from tests.hub_stand_in import fill_cache

ROOT = Path(__file__).parents[2]
# How much narrower than GPT-2 small; chapter 14 asks for the 100th neighbour in the narrowest SAE.
SMALLER = {"14": 6}
CHAPTERS = ("02", "03", "04", "05", "09", "10", "11", "12", "13", "14")


def run_on_stand_in(chapters: Iterable[str], home: Path, smaller: int) -> Iterable[Execution]:
    """Execute chapters on a random gpt2-small that is `smaller` times narrower, cached in `home`.

    Raises ChapterFailure for a cell that fails, after which the next chapter can be asked for.
    """
    fill_cache(home, smaller, steps=150)
    with pytest.MonkeyPatch.context() as patch:
        # For the kernels, which inherit it: this process has read it long ago.
        patch.setenv("HF_HOME", str(home))
        patch.setenv("HF_HUB_OFFLINE", "1")
        for chapter in chapters:
            given = {"suite": "gpt2-small"}
            yield from execute(open_book(ROOT), chapter, given, home / "executed", jobs=1)


def main(chapters: list[str]) -> int:
    """Run the chapters that are named, or all ten, each by itself; 1 when a cell failed."""
    failed = 0
    for chapter in chapters or CHAPTERS:
        with tempfile.TemporaryDirectory() as home:
            try:
                for run in run_on_stand_in([chapter], Path(home), SMALLER.get(chapter, 24)):
                    print(f"{run.path.name}: every cell ran, {run.seconds:.0f} s", flush=True)
            except Refusal as problem:
                failed = 1
                print(problem, file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

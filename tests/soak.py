"""`python -m tests.soak`: many surveys and chapters in a row in one process leave nothing.

Memory has to be flat over the last two thirds, and open files, threads, children and temporary
files have to be as many at the end as after the first few.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

# What an allocator keeps back varies by a few megabytes.
SLACK_BYTES = 16 << 20


def left(temporary: Path) -> dict[str, int]:
    """What this process holds: resident bytes, open files, threads, children, temporary files."""
    gc.collect()
    process = psutil.Process()
    return {
        "bytes": process.memory_info().rss,
        "files": process.num_fds(),
        "threads": process.num_threads(),
        "children": len(process.children(recursive=True)),
        "temporary": sum(1 for _ in temporary.rglob("*")),
    }


def soak(name: str, once: Callable[[int], None], times: int, temporary: Path) -> None:
    """Run `once` many times; raises AssertionError naming what grew."""
    began = time.monotonic()
    found: list[dict[str, int]] = []
    for i in range(times):
        once(i)
        found.append(left(temporary))
        if i in (0, times // 3, 2 * times // 3, times - 1):
            print(f"{name} {i + 1}: {found[-1]}", flush=True)
    early, late = found[times // 3], found[-1]
    grown = {key: (early[key], late[key]) for key in early if late[key] > early[key]}
    if late["bytes"] - early["bytes"] <= SLACK_BYTES:
        grown.pop("bytes", None)
    assert not grown, f"{name}: grew from run {times // 3 + 1} to run {times}: {grown}"
    print(f"{name}: {times} runs in {time.monotonic() - began:.0f} s left nothing")


def surveys(times: int, folder: Path, temporary: Path) -> None:
    """Surveys of a tiny model, written, reported and read back."""
    import darkmatter as dm
    from tests.conftest import random_saes, write_model
    from tests.surveys import SKIP, documents_of

    model = dm.open_model(write_model(folder / "model"))
    documents = documents_of(model, 60)
    saes = {name: sae for name, sae in random_saes().items() if name in ("jumprelu", "topk")}

    def once(i: int) -> None:
        out = folder / "survey"
        dm.survey(model, saes, documents, skip=SKIP, resamples=20, folder=out, force=i > 0).report()
        assert len(dm.Survey.load(out).table) == len(saes)

    soak("survey", once, times, temporary)


def chapters(times: int, folder: Path, temporary: Path) -> None:
    """A chapter, each time in a kernel of its own."""
    from darkmatter.book.execution import execute
    from tests.book.minibook import write_book
    from tests.book.test_execution import LIGHT

    folder.mkdir()
    book = write_book(folder, LIGHT.replace("SEED", "seed"))
    soak("chapter", lambda _: [*execute(book, force=True)].clear(), times, temporary)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--surveys", type=int, default=200)
    parser.add_argument("--chapters", type=int, default=50)
    asked = parser.parse_args()
    root = Path(tempfile.mkdtemp())
    temporary = root / "temporary"
    temporary.mkdir()
    tempfile.tempdir = str(temporary)
    try:
        surveys(asked.surveys, root / "surveys", temporary)
        chapters(asked.chapters, root / "chapters", temporary)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()

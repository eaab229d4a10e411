"""Run chapters: papermill into _build/book, timed, measured, and only when something changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter._files import sha256_of, writing
from darkmatter._refusal import Refusal
from darkmatter.book import claims as ledger
from darkmatter.book import notebooks
from darkmatter.book.claims import Record
from darkmatter.book.figures import FIGURE_KEY
from darkmatter.book.notebooks import SOLUTION_TAG, tags_of
from darkmatter.book.paths import BOOK_VARIABLE, Book, chapter_of

if TYPE_CHECKING:
    from nbformat import NotebookNode

METADATA_KEY = "darkmatter"
PACKAGE = Path(__file__).parents[1]
# Modules that never run inside a chapter: a change of them does not call for another execution.
_OUTSIDE = frozenset(
    f"book/{name}.py"
    for name in (
        "__main__",
        "atlas",
        "benchmarks",
        "colab",
        "editions",
        "environment",
        "execution",
        "formulas",
        "glossary",
        "links",
        "lint",
        "mending",
        "notebooks",
        "pages",
        "paper",
        "paths",
        "printed",
        "quizzes",
        "rendering",
        "results",
        "slides",
        "staging",
        "tables",
    )
)
_IMAGES = ("image/png", "image/svg+xml", "image/jpeg")


class ChapterFailure(Refusal):
    """A chapter stopped with an error, or its outputs cannot become a page."""


@dataclass(frozen=True)
class Execution:
    """One chapter's run: where it is and what it took; `skipped` when it was up to date."""

    chapter: str
    path: Path
    seconds: float
    peak_bytes: int
    skipped: bool


def execute(
    book: Book,
    only: str | None = None,
    parameters: Mapping[str, object] | None = None,
    out: Path | None = None,
    force: bool = False,
    jobs: int = 1,
) -> Iterator[Execution]:
    """Execute the chapters (or one) in order, yielding each when it is done.

    A chapter whose source, code, suite, published values and parameters are those of its last
    execution is skipped unless `force`. All parameters are checked before the first chapter runs.
    `jobs` chapters run at a time, each on its share of the cores: a third of a chapter's time is
    imports and small steps that keep one core busy.

    Raises `Refusal` for a parameter that a chapter does not have, `ChapterFailure` naming chapter
    and cell where one fails; the failed notebook is kept in _build/failed.
    """
    paths = book.chapters(only)
    chosen = {path: _parameters(path, parameters or {}) for path in paths}
    target = out or book.executed
    given = dict(parameters or {})
    if min(jobs, len(chosen)) < 2:
        for path, all_parameters in chosen.items():
            yield _execute_one(book, path, all_parameters, given, target, force, 1)
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    workers = ProcessPoolExecutor(
        jobs, get_context("spawn"), initializer=_limit_threads, initargs=(threads,)
    )
    try:
        runs = [
            workers.submit(_execute_one, book, path, all_parameters, given, target, force, jobs)
            for path, all_parameters in chosen.items()
        ]
        for run in runs:
            yield run.result()
    finally:
        workers.shutdown(cancel_futures=True)


def _limit_threads(threads: int) -> None:
    """Kernels started by this process compute on so many threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)


def executed_notebooks(folder: Path) -> dict[str, NotebookNode]:
    """The executed chapters of a folder: chapter -> notebook."""
    return {
        chapter: notebooks.read_notebook(path)
        for path in sorted(folder.glob("*.ipynb"))
        if (chapter := chapter_of(path))
    }


def differences(
    book: Book, chapter: str, parameters: Mapping[str, object], work: Path
) -> list[str]:
    """Execute a chapter twice into `work` and compare its records bit for bit.

    Returns a sentence for each record that differs; empty when the runs agree.
    """
    runs: list[list[Record]] = []
    for name in ("first", "second"):
        list(execute(book, chapter, parameters, out=work / name, force=True))
        runs.append(ledger.records_of(executed_notebooks(work / name)[chapter]))
    return compare(*runs)


def compare(first: list[Record], second: list[Record]) -> list[str]:
    """What differs between two runs' records, exactly."""
    ours = {record.id: record for record in first}
    theirs = {record.id: record for record in second}
    return [
        f"{id}: the first run gave {_told(ours.get(id))}, the second {_told(theirs.get(id))}"
        for id in sorted({*ours, *theirs})
        if ours.get(id) != theirs.get(id)
    ]


def seal_of(notebook: NotebookNode) -> str:
    """Digest of the records of an executed notebook: an edit by hand breaks it."""
    records = ledger.records_of(notebook)
    return digest([[one.id, one.value, one.interval, one.suite, one.seed] for one in records])


def digest(content: object) -> str:
    """SHA-256 of JSON data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def content_hash(book: Book, path: Path, parameters: Mapping[str, object]) -> str:
    """Hash of everything that decides what a chapter's execution shows."""
    notebook = notebooks.read_notebook(path)
    chapter = chapter_of(path)
    known = ledger.load_claims(book.claims).values() if book.claims.is_file() else []
    suite = str(parameters.get("suite"))
    parts: dict[str, object] = {
        "cells": [[cell.cell_type, cell.source, tags_of(cell)] for cell in notebook.cells],
        "parameters": {name: repr(value) for name, value in sorted(parameters.items())},
        "published": [[one.id, repr(one.paper)] for one in known if one.chapter == chapter],
        "code": {name: sha256_of(file) for name, file in _code(chapter)},
        "suite": {
            str(file.relative_to(PACKAGE)): sha256_of(file)
            for file in sorted((PACKAGE / "suites" / suite / "data").rglob("*"))
            if file.is_file()
        },
    }
    return digest(parts)


def _execute_one(
    book: Book,
    path: Path,
    parameters: Mapping[str, object],
    given: Mapping[str, object],
    target: Path,
    force: bool,
    jobs: int,
) -> Execution:
    chapter = chapter_of(path) or ""
    output = target / path.name
    fingerprint = content_hash(book, path, parameters)
    if not force and (done := _done(output, fingerprint)):
        return Execution(chapter, output, done["seconds"], done["peak_bytes"], skipped=True)
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp.ipynb")
    try:
        with writing(output), _environment(book), _PeakMemory() as memory:
            begun = time.perf_counter()
            _papermill(path, temporary, given)
            seconds = time.perf_counter() - begun
        notebook = notebooks.read_notebook(temporary)
        finish(notebook, path.name)
    except ChapterFailure as failure:
        if not temporary.is_file():
            raise
        failed = book.root / "_build" / "failed" / path.name
        failed.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(temporary, failed)
        raise ChapterFailure(f"{failure} (kept as {failed})") from failure.__cause__
    finally:
        temporary.unlink(missing_ok=True)
    notebook.metadata[METADATA_KEY] = {
        "chapter": chapter,
        "hash": fingerprint,
        "parameters": dict(parameters),
        "seconds": round(seconds, 1),
        "jobs": jobs,
        "peak_bytes": memory.peak,
        "seal": seal_of(notebook),
        "versions": ledger.versions_of(notebook),
    }
    notebooks.write_notebook(notebook, output)
    return Execution(chapter, output, round(seconds, 1), memory.peak, skipped=False)


def _figure_apart(cell: NotebookNode) -> list[NotebookNode]:
    """The cell, followed by one of its other outputs if it shows a figure.

    myst-nb makes a figure, with caption and label, of every output of such a cell; and what a cell
    prints is never read above its code.
    """
    outputs = cell.get("outputs", [])
    others = [one for one in outputs if FIGURE_KEY not in one.get("metadata", {})]
    if not others or len(others) == len(outputs):
        return [cell]
    from nbformat.v4 import new_code_cell

    cell.outputs = [one for one in outputs if FIGURE_KEY in one.get("metadata", {})]
    # myst-nb leaves out a cell without source, its outputs too.
    source = "# What this cell says beside its figure"
    after = new_code_cell(
        source, id=f"{cell.id}-said", outputs=others, metadata={"tags": ["remove-input"]}
    )
    return [cell, after]


def finish(notebook: NotebookNode, name: str) -> None:
    """Make an executed notebook ready for the page, in place.

    The text and caption of each figure move from its output to the cell's metadata, where myst-nb
    reads them; injected parameters are hidden, solutions and drawing code folded, and times of the
    run removed.

    Raises `ChapterFailure` for an image that has no text alternative, or two figures in a cell.
    """
    for number, cell in enumerate(notebook.cells, start=1):
        cell.metadata.pop("papermill", None)
        cell.metadata.pop("execution", None)
        tags = [tag for tag in tags_of(cell) if tag != "injected-parameters"]
        if len(tags) != len(tags_of(cell)):
            cell.metadata["tags"] = [*tags, "injected-parameters", "remove-cell"]
        elif not tags:
            cell.metadata.pop("tags", None)
        if SOLUTION_TAG in tags and cell.cell_type == "code":
            cell.metadata["tags"] = [*tags, "hide-input"]
            cell.metadata["mystnb"] = {"code_prompt_show": "Show the solution"}
        _join_record_lines(cell)
        _join_streams(cell)
        images = [
            output
            for output in cell.get("outputs", [])
            if any(mime in output.get("data", {}) for mime in _IMAGES)
            or FIGURE_KEY in output.get("metadata", {})
        ]
        described = [one for one in images if FIGURE_KEY in one.metadata]
        if len(described) != len(images):
            raise ChapterFailure(
                f"{name}, cell {number}: expected every image to come from book.show, found one "
                "without a text alternative; use book.show(figure, alt=..., caption=..., name=...)"
            )
        if len(described) > 1:
            raise ChapterFailure(
                f"{name}, cell {number}: expected one figure a cell, found {len(described)}; "
                "give each its cell"
            )
        if any("text/markdown" in one.get("data", {}) for one in cell.get("outputs", [])):
            # Said sentences may hold formulas, which only MyST reads.
            cell.metadata.setdefault("mystnb", {})["markdown_format"] = "myst"
        if described:
            text = described[0].metadata[FIGURE_KEY]
            if ".record(" not in cell.source and SOLUTION_TAG not in tags:
                # A page is read for what its drawing shows; the code is one click away.
                cell.metadata["tags"] = [*tags, "hide-input"]
                shown = {"code_prompt_show": "Show the code of this figure"}
                cell.metadata.setdefault("mystnb", {}).update(shown)
            cell.metadata.setdefault("mystnb", {}).update(
                {
                    "image": {"alt": text["alt"]},
                    "figure": {"caption": text["caption"], "name": text["name"]},
                }
            )
    notebook.cells = [part for cell in notebook.cells for part in _figure_apart(cell)]
    notebook.metadata.pop("papermill", None)


def _join_record_lines(cell: NotebookNode) -> None:
    """One box of "recorded ..." lines a cell; the records themselves stay where they are."""
    data = [output.get("data", {}) for output in cell.get("outputs", [])]
    recorded = [one for one in data if ledger.RECORD_MIME in one and "text/plain" in one]
    if recorded:
        lines = [str(one.pop("text/plain")) for one in recorded]
        recorded[0]["text/plain"] = "\n".join(lines)


def _join_streams(cell: NotebookNode) -> None:
    """One box of printed lines where nothing that is seen stands between them."""
    seen: NotebookNode | None = None
    kept: list[NotebookNode] = []
    for output in cell.get("outputs", []):
        stream = output.output_type == "stream"
        if stream and seen is not None and seen.get("name") == output.name:
            seen["text"] = seen.text + output.text
            continue
        kept.append(output)
        if stream or set(output.get("data", {})) != {ledger.RECORD_MIME}:
            seen = output
    if "outputs" in cell:
        cell["outputs"] = kept


def _parameters(path: Path, given: Mapping[str, object]) -> dict[str, object]:
    """Defaults of the chapter's parameters cell, overridden by the given ones."""
    from papermill import inspect_notebook

    known: dict[str, Any] = {}
    if any("parameters" in tags_of(cell) for cell in notebooks.read_notebook(path).cells):
        known = inspect_notebook(str(path))
    for name in ("suite", "seed"):
        if name not in known:
            raise Refusal(
                f"{path.name}: expected a cell tagged parameters that sets suite and seed, "
                f"found none that sets {name}; add it"
            )
    for name in given:
        if name not in known:
            raise Refusal(
                f"{path.name}: expected one of the parameters {', '.join(sorted(known))}, "
                f"found {name!r}; correct the name or add it to the parameters cell"
            )
    defaults = {name: _literal(str(value["default"])) for name, value in known.items()}
    chosen = {**defaults, **given}
    _check_suite_and_seed(path.name, chosen["suite"], chosen["seed"])
    return chosen


def _check_suite_and_seed(name: str, suite: object, seed: object) -> None:
    """Raise Refusal for a suite that has no name, and a seed that is no whole number from 0."""
    if type(seed) is not int or seed < 0:
        raise Refusal(
            f"{name}: expected a seed that is a whole number of at least 0, found "
            f"{str(seed)[:80]!r}; pass one, such as 0"
        )
    if suite == "pydocs":
        # The names of the others cost an import of torch.
        return
    from darkmatter.suites import EMBEDDED
    from darkmatter.suites.catalogue import DOWNLOADABLE

    if suite not in {*EMBEDDED, *DOWNLOADABLE}:
        raise Refusal(
            f"{name}: expected a suite by its name ({', '.join([*EMBEDDED, *DOWNLOADABLE])}), "
            f"found {str(suite)[:80]!r}; choose one of these"
        )


def _literal(text: str) -> object:
    import ast

    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _papermill(path: Path, output: Path, parameters: Mapping[str, object]) -> None:
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from papermill import execute_notebook
    from papermill.exceptions import PapermillException

    try:
        execute_notebook(
            str(path),
            str(output),
            parameters=dict(parameters),
            kernel_name="python3",
            language="python",
            progress_bar=False,
            start_timeout=300,
            cwd=str(path.parent),
        )
    except (PapermillException, CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        raise ChapterFailure(f"{path.name} failed {_place(output, error)}") from error


def _place(output: Path, error: Exception) -> str:
    """ "in cell 7 (`first line`): ValueError: ..." from the notebook that the run left."""
    if output.is_file():
        for number, cell in enumerate(_without_banner(notebooks.read_notebook(output)), start=1):
            for one in cell.get("outputs", []):
                if one.output_type == "error":
                    first = str(cell.source).split("\n")[0]
                    return f"in cell {number} ({first!r}): {one.ename}: {one.evalue}"
    return f"({type(error).__name__}): {error}"


def _without_banner(notebook: NotebookNode) -> list[NotebookNode]:
    """The author's cells: without the banners and parameters that papermill adds."""
    added = {"papermill-error-cell-tag", "injected-parameters"}
    return [cell for cell in notebook.cells if not added & set(tags_of(cell))]


@contextlib.contextmanager
def _environment(book: Book) -> Generator[None]:
    """What a kernel started inside finds in its environment."""
    # The chapter runs on the package that executes it, installed or not.
    paths = [str(PACKAGE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    wanted = {
        BOOK_VARIABLE: str(book.source),
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "PYTHONHASHSEED": "0",
        # Fixed reductions and scheduling in MKL: the same bits in every run.
        "MKL_CBWR": "AUTO",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class _PeakMemory:
    """Peak resident memory of the processes started inside, sampled five times a second."""

    def __init__(self) -> None:
        self.peak = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _PeakMemory:
        import psutil

        # Looked at here, not in the thread, which may come late: a kernel must not count as old.
        self._me = psutil.Process()
        self._before = set(self._me.children(recursive=True))
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(0.2):
            resident = 0
            for child in self._me.children(recursive=True):
                if child not in self._before:
                    with contextlib.suppress(psutil.Error):
                        resident += int(child.memory_info().rss)
            self.peak = max(self.peak, resident)


def _done(output: Path, fingerprint: str) -> dict[str, Any] | None:
    if not output.is_file():
        return None
    try:
        metadata = notebooks.read_notebook(output).metadata.get(METADATA_KEY, {})
    except Refusal:
        return None
    return metadata if metadata.get("hash") == fingerprint else None


def _code(chapter: str | None) -> Iterator[tuple[str, Path]]:
    """The package's modules that can run inside a chapter; of the checks only the chapter's own."""
    for file in sorted(PACKAGE.rglob("*.py")):
        name = file.relative_to(PACKAGE).as_posix()
        foreign = name.startswith("book/checks/chapter_") and not name.endswith(f"_{chapter}.py")
        if name not in _OUTSIDE and not foreign:
            yield name, file


def _told(record: Record | None) -> str:
    return "nothing" if record is None else f"{record.value!r} {record.interval!r}"

"""Put the book together for Sphinx: static pages beside the executed chapters, generated pages."""

from __future__ import annotations

import shutil
from pathlib import Path

from darkmatter._refusal import Refusal
from darkmatter.book import atlas, benchmarks, pages, quizzes
from darkmatter.book.claims import load_claims
from darkmatter.book.execution import PACKAGE, executed_notebooks
from darkmatter.book.notebooks import write_text
from darkmatter.book.paths import Book, chapter_of
from darkmatter.book.results import all_records
from darkmatter.suites import list_suites

GENERATED = ("claims.md", "run_statistics.md", "suite_card.md", "_config.yml")
# Sources of the machinery, not of the pages.
_NOT_STAGED = ("claims.yml", "results")


def stage(book: Book, suite: str = "pydocs") -> Path:
    """Fill _build/book: executed chapters stay, pages are copied and generated, the rest goes.

    Refuses when a chapter has not been executed, or a static page asks for a number that no
    chapter recorded.
    """
    target = book.executed
    files = {chapter_of(path) or "": path.name for path in book.chapters()}
    executed = executed_notebooks(target)
    if missing := sorted(set(files) - set(executed)):
        raise Refusal(
            f"expected every chapter executed in {target}, found none of {', '.join(missing)}; "
            "run `python -m darkmatter.book execute` first"
        )
    executed = {chapter: executed[chapter] for chapter in files}
    titles = {chapter: pages.title_of(notebook) for chapter, notebook in executed.items()}
    claims = load_claims(book.claims)
    records = all_records(executed)
    written = {target / name for name in files.values()}
    for source in _static(book):
        copy = target / source.relative_to(book.source)
        written.add(copy)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = source.read_text(encoding="utf-8")
            write_text(copy, pages.fill_page(text, records, claims, source.name))
        else:
            shutil.copyfile(source, copy)
    card = PACKAGE / "suites" / suite / "data" / "README.md"
    generated = {
        "claims.md": pages.ledger_page(claims, records, files, suite, titles),
        "run_statistics.md": pages.statistics_page(executed, files),
        "suite_card.md": pages.suite_card_page(card, suite),
        "_config.yml": book.config.read_text(encoding="utf-8"),
    }
    if (bank := book.source / quizzes.SOURCE).is_file():
        page = quizzes.quiz_page(quizzes.load_quizzes(bank), files)
        generated[quizzes.PAGE.as_posix()] = pages.fill_page(page, records, claims, bank.name)
    if entries := atlas.read_entries(book):
        generated["atlas.md"] = atlas.atlas_page(entries, list_suites())
    if (source := book.source / benchmarks.PAGE).is_file():
        text = source.read_text(encoding="utf-8")
        generated[benchmarks.PAGE] = benchmarks.benchmarks_page(text, book.source / "results")
    for name, text in generated.items():
        write_text(target / name, text)
        written.add(target / name)
    for stale in target.rglob("*"):
        if stale.is_file() and stale not in written:
            stale.unlink()
    return target


def _static(book: Book) -> list[Path]:
    """Every file of book/ that is not a notebook and not the machinery's."""
    return [
        path
        for path in sorted(book.source.rglob("*"))
        if path.is_file()
        and path.suffix != ".ipynb"
        and path.relative_to(book.source).parts[0] not in _NOT_STAGED
        and path.relative_to(book.source) != quizzes.SOURCE
        and not any(part.startswith((".", "__pycache__")) for part in path.parts[-2:])
    ]

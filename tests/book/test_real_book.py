"""The real book: its chapters keep the rules, and what they found is what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from darkmatter.book import execution, results
from darkmatter.book.claims import load_claims
from darkmatter.book.execution import METADATA_KEY
from darkmatter.book.lint import lint
from darkmatter.book.notebooks import read_notebook
from darkmatter.book.paths import Book, chapter_of, open_book

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def book() -> Book:
    return open_book(ROOT)


def test_the_ledger_can_be_read(book: Book) -> None:
    load_claims(book.claims)


def test_the_map_of_the_papers_names_claims_that_exist(book: Book) -> None:
    text = (book.source / "reproduction.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|") and "](" in line]
    named = {id for row in rows for id in re.findall(r"`([a-z0-9-]+)`", row)}
    assert len(named) > 40
    assert named - set(load_claims(book.claims)) == set()


def test_every_chapter_keeps_the_rules(book: Book) -> None:
    assert lint(book) == []


def test_every_chapter_was_executed_as_it_stands(book: Book) -> None:
    for path in book.chapters():
        output = book.executed / path.name
        assert output.is_file(), f"{path.name} is not executed: run `make test` or `make book`"
        run = read_notebook(output).metadata[METADATA_KEY]
        assert run["hash"] == execution.content_hash(book, path, run["parameters"]), (
            f"{path.name} changed since it was executed: run `python -m darkmatter.book execute`"
        )


def test_executed_chapters_agree_with_claims_and_reference(book: Book) -> None:
    assert results.check(book) == []


def test_every_chapter_stays_within_memory(book: Book) -> None:
    for path in book.chapters():
        run = read_notebook(book.executed / path.name).metadata[METADATA_KEY]
        # Promise 3: the book runs on 4 GiB. Seconds depend on the machine: see run_statistics.
        assert 0 < run["peak_bytes"] <= 4 * 2**30, f"chapter {chapter_of(path)}"

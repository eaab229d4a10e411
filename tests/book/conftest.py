"""The mini book as fixtures: written, with checks, and executed once for all tests."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from darkmatter.book import results
from darkmatter.book.execution import execute
from darkmatter.book.exercises import exercise
from darkmatter.book.paths import Book
from tests.book.minibook import chapter_text, write_book


@pytest.fixture
def make_book(tmp_path: Path) -> Callable[..., Book]:
    """Write a mini book into the test's folder; see `minibook.write_book`."""
    return lambda chapter=None, **more: write_book(tmp_path, chapter, **more)


@pytest.fixture(scope="session")
def executed_once(tmp_path_factory: pytest.TempPathFactory) -> Book:
    """A mini book, executed, with its reference written. Copy it before changing it."""
    book = write_book(tmp_path_factory.mktemp("executed"), chapter_text(with_checks=False))
    list(execute(book))
    results.update(book, "pydocs")
    return book


@pytest.fixture
def executed_book(executed_once: Book, tmp_path: Path) -> Book:
    """A copy of the executed mini book that a test may change."""
    shutil.copytree(executed_once.root, tmp_path / "copy")
    return Book(tmp_path / "copy")


@pytest.fixture
def checks_99(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module of checks for chapter 99 with three exercises."""
    module = ModuleType("darkmatter.book.checks.chapter_99")

    def check(answer: Callable[[float], float]) -> str | None:
        assert answer(3.0) != 9.0, "That is the square; add the number to itself."
        assert answer(3.0) == 6.0, "Twice three is six."
        return None

    for n in (1, 2, 3):

        def named(answer: Callable[[float], float]) -> str | None:
            return check(answer)

        mark = exercise(f"99.{n}", difficulty=2, minutes=5, teaches="Doubling is adding.")
        setattr(module, f"check_{n}", mark(named))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module

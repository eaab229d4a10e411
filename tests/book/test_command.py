"""The command line: one sentence and status 1 when something is wrong, 0 when all is well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from darkmatter.book.__main__ import main
from darkmatter.book.paths import Book
from tests.book.minibook import chapter_text

MakeBook = Callable[..., Book]


@pytest.mark.usefixtures("checks_99")
def test_lint_student_and_convert(
    make_book: MakeBook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    book = make_book()
    root = ["--root", str(book.root)]
    assert main([*root, "lint"]) == 0
    assert main([*root, "student"]) == 0
    notebook = book.source / "99_mini.ipynb"
    before = notebook.read_bytes()
    text = tmp_path / "99.py"
    assert main([*root, "convert", str(notebook), str(text)]) == 0
    assert main([*root, "convert", str(text), str(notebook)]) == 0
    assert notebook.read_bytes() == before
    text.write_text(chapter_text().replace("- nowhere", "- in 0.5 of cases"))
    assert main([*root, "convert", str(text), str(notebook)]) == 0
    assert main([*root, "build"]) == 1
    assert "'0.5' is typed into prose" in capsys.readouterr().err


def test_execute_check_and_results(executed_book: Book, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(executed_book.root)]
    assert main([*root, "execute", "--chapter", "99"]) == 0
    assert "99_mini.ipynb: up to date, took" in capsys.readouterr().out
    assert main([*root, "check"]) == 0
    assert main([*root, "results"]) == 0
    executed_book.results("pydocs").unlink()
    assert main([*root, "check"]) == 1
    assert main([*root, "results", "--update"]) == 0
    assert main([*root, "check", "--chapter", "99"]) == 0


def test_refusals_are_one_line(
    make_book: MakeBook, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ["--root", str(make_book().root)]
    for arguments, message in [
        ([*root, "execute", "-p", "steps", "50"], "found 'steps'"),
        ([*root, "execute", "--chapter", "01"], "one of the chapters 99, found '01'"),
        ([*root, "check"], "found none of 99"),
        ([*root, "convert", "gone.py", "x.ipynb"], "percent-format text and a notebook"),
        (["--root", str(tmp_path / "empty"), "lint"], "expected a folder book/"),
    ]:
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1

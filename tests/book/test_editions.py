"""The student edition: solutions out, everything else as it was."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book import editions, notebooks
from darkmatter.book.paths import Book, open_book
from tests.book.minibook import REPOSITORY, chapter_text

ROOT = Path(__file__).parents[2]


def test_solution_lines_become_a_stub_at_their_indentation() -> None:
    body = ["# solution begins", "y = x", "return 2 * y", "# solution ends"]
    source = "\n    ".join(["def f(x):", "'Twice x.'", *body])
    stub = editions.stub(source)
    assert "return 2 * y" not in stub
    assert "    raise NotImplementedError(" in stub
    space: dict[str, object] = {}
    exec(stub, space)
    with pytest.raises(NotImplementedError):
        space["f"](1)  # type: ignore[operator]


def test_an_open_solution_is_refused() -> None:
    with pytest.raises(Refusal, match="expected '# solution ends'"):
        editions.stub("def f():\n    # solution begins\n    return 1\n")


def test_student_edition_has_no_solution_and_no_output_and_keeps_the_rest() -> None:
    text = chapter_text() + '\n# %% [markdown] tags=["solution"]\n# Because.\n'
    solved = notebooks.from_percent(text, REPOSITORY)
    solved.cells[2]["execution_count"] = 4
    before = notebooks.to_percent(solved)
    student = editions.student_edition(solved)
    assert notebooks.to_percent(solved) == before
    text = notebooks.to_percent(student)
    assert "return x + x" not in text
    assert "Because" not in text
    assert text.count("raise NotImplementedError") == 3
    assert student.cells[2]["execution_count"] is None
    assert len(student.cells) == len(solved.cells) - 1
    for cell in student.cells:
        assert "jupyter" not in cell.metadata, "a student sees the stub"
        if cell.cell_type == "code" and "%pip" not in cell.source:
            ast.parse(cell.source)


def test_editions_are_written_for_every_chapter(make_book: object) -> None:
    book: Book = make_book()  # type: ignore[operator]
    stale = book.source / "student" / "99_old_name.ipynb"
    stale.parent.mkdir()
    stale.write_text("{}")
    (path,) = editions.write_student_editions(book)
    assert path == book.source / "student" / "99_mini.ipynb"
    assert "NotImplementedError" in path.read_text()
    assert not stale.exists()
    assert [one.name for one in book.chapters()] == ["99_mini.ipynb"]


def test_the_committed_editions_are_those_of_the_chapters(tmp_path: Path) -> None:
    book = open_book(ROOT)
    made = editions.write_student_editions(book, tmp_path)
    committed = book.source / editions.STUDENT
    assert {path.name for path in committed.iterdir()} == {path.name for path in made}
    stale = [
        path.name for path in made if path.read_bytes() != (committed / path.name).read_bytes()
    ]
    assert stale == [], "run `make student`, and commit book/student"

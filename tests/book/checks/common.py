"""What the tests of all chapters' exercises share."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import darkmatter
from darkmatter import book
from darkmatter.book import notebooks
from darkmatter.book.editions import stub
from darkmatter.book.notebooks import tags_of

BOOK = Path(__file__).parents[3] / "book"
CHAPTERS = {path.name[:2]: path for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))}


def trees(cells: list[Any]) -> Iterator[ast.Module]:
    """Code cells as syntax trees, but for the setup cell, which is not plain Python."""
    for cell in cells:
        if cell.cell_type == "code" and "%pip" not in cell.source:
            yield ast.parse(cell.source)


def exercises(chapter: Path) -> dict[str, str]:
    """{exercise: name of the answer} of the calls book.check("03.1", name) in a chapter."""
    found: dict[str, str] = {}
    for tree in trees(notebooks.read_notebook(chapter).cells):
        for node in ast.walk(tree):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name("book"), attr="check"),
                    args=[ast.Constant(str(exercise)), ast.Name(answer)],
                ):
                    found[exercise] = answer
    return found


def answers(chapter: Path, empty: bool) -> dict[str, Any]:
    """What a chapter's solution cells define, whole or as the student gets them."""
    cells = notebooks.read_notebook(chapter).cells
    defined: dict[str, Any] = {"dm": darkmatter, "book": book}
    for tree in trees(cells):
        imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
        exec(compile(ast.Module(imports, []), str(chapter), "exec"), defined)
    for cell in cells:
        if cell.cell_type == "code" and "solution" in tags_of(cell):
            exec(stub(cell.source) if empty else cell.source, defined)
    return defined


def refused(exercise: str, answer: Callable[..., Any], message: str) -> None:
    """The check of an exercise refuses this answer, with words that match `message`."""
    with pytest.raises(book.NotYet, match=message):
        book.check(exercise, answer)

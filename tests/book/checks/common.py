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


def messages_proven(module: Path) -> dict[str, set[str]]:
    """{exercise: messages} of the wrong answers that a module of tests proves to be refused.

    Read off its calls `refused(exercise, answer, message)` and its lists of (answer, message), the
    parameters of a test that writes the exercise out, or of (exercise, answer, message).
    """
    found: dict[str, set[str]] = {}
    tree = ast.parse(module.read_text(encoding="utf-8"))
    for test in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        listed = [row[-1] for one in test.decorator_list for row in _rows(one) if len(row) == 2]
        for node in ast.walk(test):
            match node:
                case ast.Call(
                    func=ast.Name("refused"), args=[ast.Constant(str(exercise)), _, message]
                ):
                    found.setdefault(exercise, set()).update(_texts([message, *listed]))
    for row in _rows(tree):
        if len(row) == 3:
            found.setdefault("".join(_texts(row[:1])), set()).update(_texts(row[-1:]))
    return found


def _rows(tree: ast.AST) -> Iterator[list[ast.expr]]:
    """Tuples that stand in a list."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List):
            yield from (one.elts for one in node.elts if isinstance(one, ast.Tuple))


def _texts(nodes: list[ast.expr]) -> list[str]:
    constants = [one.value for one in nodes if isinstance(one, ast.Constant)]
    return [one for one in constants if isinstance(one, str)]

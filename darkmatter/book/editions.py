"""Editions of a chapter made from its one source: here the student edition, without solutions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from darkmatter._refusal import Refusal
from darkmatter.book import notebooks
from darkmatter.book.notebooks import SOLUTION_TAG, tags_of
from darkmatter.book.paths import Book

if TYPE_CHECKING:
    from nbformat import NotebookNode

STUDENT = "student"
"""Folder beside the chapters that holds their student edition, for Colab."""
BEGINS = "# solution begins"
ENDS = "# solution ends"
_STUB = 'raise NotImplementedError("Write your answer here, in place of this line.")'


def student_edition(notebook: NotebookNode) -> NotebookNode:
    """A copy without outputs and solutions.

    In cells tagged "solution", the lines from `# solution begins` to `# solution ends` become one
    line that raises NotImplementedError, at the same indentation; Markdown cells with that tag are
    left out.
    """
    copy = notebooks.json_copy(notebook)
    kept: list[NotebookNode] = []
    for cell in copy.cells:
        solution = SOLUTION_TAG in tags_of(cell)
        if cell.cell_type == "code":
            cell["outputs"] = []
            cell["execution_count"] = None
            if solution:
                cell["source"] = stub(cell.source)
        elif solution:
            continue
        if solution:
            cell.metadata["tags"] = [tag for tag in tags_of(cell) if tag != SOLUTION_TAG]
            cell.metadata.pop("jupyter", None)
        kept.append(cell)
    copy["cells"] = kept
    return copy


def stub(source: str) -> str:
    """Code with each marked solution replaced by a line that raises NotImplementedError."""
    kept: list[str] = []
    inside = False
    for line in source.split("\n"):
        if line.strip() == BEGINS and not inside:
            inside = True
            kept.append(line[: len(line) - len(line.lstrip())] + _STUB)
        elif line.strip() == ENDS and inside:
            inside = False
        elif not inside:
            kept.append(line)
    if inside:
        raise Refusal(f"expected '{ENDS}' after '{BEGINS}', found the end of the cell; add it")
    return "\n".join(kept)


def write_student_editions(book: Book, folder: Path | None = None) -> list[Path]:
    """Write the student edition of every chapter into book/student; returns the paths.

    The folder is committed, as Colab opens what the repository holds, and it holds nothing else:
    the edition of a chapter that is gone, or has another name now, goes.
    """
    target = folder or book.source / STUDENT
    written: list[Path] = []
    for path in book.chapters():
        edition = student_edition(notebooks.read_notebook(path))
        notebooks.write_notebook(edition, target / path.name)
        written.append(target / path.name)
    for stale in set(target.glob("*.ipynb")) - set(written):
        stale.unlink()
    return written

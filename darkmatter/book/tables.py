"""Tables of Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def row(*cells: object) -> str:
    """One line of a table; bars and new lines inside a cell do not end it."""
    plain = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells)
    return "| " + " | ".join(plain) + " |"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """The lines of a table."""
    return [row(*head), row(*("---" for _ in head)), *(row(*cells) for cells in rows)]

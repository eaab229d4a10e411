"""Pages without scripts, EPUB and PDF: what they leave out, and tables that break over pages.

A Sphinx extension of the printed editions; the web pages are built without it.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils.nodes import document
    from sphinx.application import Sphinx

# Buttons, filters and links into cells that only the web pages have.
_WEB_ONLY = ('<a class="ledger-cell"', "<button", "<fieldset", "<script")
# Letters of a column: at least a short word, at most a long name, or a sentence.
_SHORT_WORD, _LONG_NAME, _SENTENCE = 7, 34, 60


def leave_out(tree: document) -> None:
    """Remove what only a web page can do, with its words."""
    from docutils import nodes

    for raw in list(tree.findall(nodes.raw)):
        parent: Any = raw.parent
        if not raw.astext().lstrip().startswith(_WEB_ONLY):
            continue
        after = parent.index(raw) + 1
        if after < len(parent) and isinstance(parent[after], nodes.Text):
            del parent[after]
        parent.remove(raw)


def lay_out(tree: document) -> None:
    """Let every table break over pages, with columns as wide as their words ask for."""
    from docutils import nodes

    for table in tree.findall(nodes.table):
        classes = [one for one in table["classes"] if one != "colwidths-auto"]
        table["classes"] = [*classes, "longtable", "colwidths-given"]
        rows = list(table.findall(nodes.row))
        for number, column in enumerate(table.findall(nodes.colspec)):
            cells = [row[number].astext() for row in rows if number < len(row)]
            words = max((len(word) for cell in cells for word in cell.split()), default=0)
            mean = sum(map(len, cells)) / max(1, len(cells))
            letters = max(_SHORT_WORD, min(words, _LONG_NAME), min(mean, _SENTENCE))
            # By the root: a sentence breaks into lines, a number does not.
            column["colwidth"] = round(10 * math.sqrt(letters))


def setup(app: Sphinx) -> dict[str, Any]:
    """Leave out and lay out once all references of a page are resolved."""

    def resolved(app: Sphinx, tree: document, name: str) -> None:
        del name
        leave_out(tree)
        if app.builder.format == "latex":
            lay_out(tree)

    app.connect("doctree-resolved", resolved)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

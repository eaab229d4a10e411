"""Glossary terms in the pages explain themselves: a Sphinx extension, so that notebooks stay plain.

On each page the first use of a term becomes a link to the glossary whose title is the definition,
so that keyboard and touch reach it. Its first use in each later section is an `<abbr>` with
the same title. Headings, code, formulas and links are left alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from docutils.nodes import Element, Node, Text, document
    from sphinx.application import Sphinx

PAGE = "glossary"
LINKED = "glossary-term"
# Words of everyday use, of which a page holds more than the term.
_AMBIGUOUS = frozenset({"family", "misses"})
# Tables of numbers, and pages that are lists of terms themselves.
_PAGES_LEFT_OUT = frozenset({PAGE, "bibliography", "claims", "run_statistics", "suite_card"})
_OF_ONE_CHAPTER = re.compile(r"In chapter (\d\d): ")


_PLAIN = (
    (r"\\hat\s*(\w)", "\\1\u0302"),
    (r"\\text\{([^}]*)\}", r"\1"),
    (r"\\[lr]Vert\s*", "\u2016"),
    (r"\^\{?\\top\}?\s*", "\u1d40"),
    (r"\\lambda", "\u03bb"),
    (r"\^2", "\u00b2"),
    (r"\\([a-z]+)", r"\1"),
    (r"[{}]|\\[,;!]", ""),
)


@dataclass(frozen=True)
class Term:
    """A term of the glossary: its name, its definition as plain text, and its place on the page."""

    name: str
    definition: str
    place: str

    @property
    def pattern(self) -> str:
        """The term and its plural, as whole words; letter by letter if it has capitals."""
        words = r"\s+".join(re.escape(word) for word in self.name.split())
        return words if any(letter.isupper() for letter in self.name) else f"(?i:{words})"


def terms_of(glossary: Node) -> list[Term]:
    """The terms of a glossary's document, the longest names first."""
    from docutils import nodes

    found: list[Term] = []
    for item in glossary.findall(nodes.definition_list_item):
        terms = list(item.findall(nodes.term))
        definition = next(iter(item.findall(nodes.definition)), None)
        for term in terms:
            # The index entry stands in the term's node and is no part of its name.
            name = "".join(
                child.astext()
                for child in term.children
                if isinstance(child, (nodes.Text, nodes.Inline))
            ).strip()
            if definition is not None and term.get("ids") and name not in _AMBIGUOUS:
                found.append(Term(name, plain_text(definition), str(term["ids"][0])))
    return sorted(found, key=lambda term: (-len(term.name), term.name))


def plain_text(definition: Node) -> str:
    """A definition as text without markup: no citations, formulas in plain characters."""
    from docutils import nodes

    pieces: list[str] = []
    for node in definition.findall(nodes.Text):
        parent: Any = node.parent
        around = (parent, parent.parent)
        if any(one is not None and one.get("refdomain") in ("cite", "math") for one in around):
            continue
        is_formula = isinstance(parent, nodes.math | nodes.math_block)
        pieces.append(_plain_formula(str(node)) if is_formula else str(node))
    text = " ".join("".join(pieces).split())
    return re.sub(r"(: equation)? ?([.,;])", r"\2", text)


def _plain_formula(tex: str) -> str:
    for pattern, written in _PLAIN:
        tex = re.sub(pattern, written, tex)
    return tex


def mark(tree: document, terms: Iterable[Term], glossary: str, chapter: str | None) -> None:
    """Explain each term at its first use on a page, and at its first use in each section.

    `glossary` is the address of the glossary as seen from the page. A definition that begins with
    "In chapter 05:" belongs to that chapter alone.
    """
    from docutils import nodes

    ours = {
        term.name: term
        for term in terms
        if (only := _OF_ONE_CHAPTER.match(term.definition)) is None or only[1] == chapter
    }
    if not ours:
        return
    alternatives = "|".join(f"(?P<t{n}>{term.pattern})" for n, term in enumerate(ours.values()))
    pattern = re.compile(rf"(?<![\w$\\-])(?:{alternatives})(?P<plural>s)?(?![\w-])")
    names = list(ours)
    on_page: set[str] = set()
    in_section: dict[int, set[str]] = {}
    _join_lines(tree)
    for text in list(tree.findall(nodes.Text)):
        section = _section_of(text)
        if section is None:
            continue
        seen = in_section.setdefault(id(section), set())
        pieces: list[Node] = []
        end = 0
        for match in pattern.finditer(text):
            name = next(names[n] for n in range(len(names)) if match[f"t{n}"] is not None)
            if name in seen:
                continue
            pieces.append(nodes.Text(text[end : match.start()]))
            pieces.append(_explained(match[0], ours[name], glossary, linked=name not in on_page))
            seen.add(name)
            on_page.add(name)
            end = match.end()
        if pieces and text.parent is not None:
            text.parent.replace(text, [*pieces, nodes.Text(text[end:])])


def _join_lines(tree: document) -> None:
    """Make one text of those that follow each other: a line of the source is one of its own."""
    from docutils import nodes

    for text in list(tree.findall(nodes.Text)):
        parent: Any = text.parent
        place = next(n for n, child in enumerate(parent.children) if child is text)
        if place and isinstance(parent[place - 1], nodes.Text):
            parent[place - 1 : place + 1] = [nodes.Text(parent[place - 1] + text)]


def _explained(text: str, term: Term, glossary: str, linked: bool) -> Element:
    from docutils import nodes

    if not linked:
        return nodes.abbreviation(text, text, explanation=term.definition)
    address = f"{glossary}#{term.place}"
    link = nodes.reference(
        "", "", internal=True, refuri=address, reftitle=term.definition, classes=[LINKED]
    )
    link += nodes.inline(text, text)
    return link


def _section_of(text: Text) -> Element | None:
    """The section of the second level that a text stands in; None where terms are not marked."""
    from docutils import nodes

    silent = (
        *(nodes.title, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block),
        *(nodes.reference, nodes.raw, nodes.comment, nodes.abbreviation, nodes.term),
        *(nodes.footnote, nodes.citation, nodes.Invisible),
    )
    sections: list[Element] = []
    node: Any = text.parent
    while node is not None:
        if isinstance(node, silent):
            return None
        if isinstance(node, nodes.section):
            sections.append(node)
        node = node.parent
    return sections[-2] if len(sections) > 1 else sections[-1] if sections else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Mark terms once all references of a page are resolved."""
    found: dict[str, list[Term]] = {}

    def mark_page(app: Sphinx, tree: document, docname: str) -> None:
        # Print has no hover text, and its builder no address of one page from another.
        paper = app.builder.format != "html"
        if paper or docname in _PAGES_LEFT_OUT or PAGE not in app.env.all_docs:
            return
        if PAGE not in found:
            found[PAGE] = terms_of(app.env.get_doctree(PAGE))
        address = app.builder.get_relative_uri(docname, PAGE)
        number = re.match(r"\d\d(?=_)", docname)
        mark(tree, found[PAGE], address, number[0] if number else None)

    app.connect("doctree-resolved", mark_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""Markdown as Colab and Jupyter show it: plain CommonMark with tables and formulas, no MyST.

What those renderers do not know stays on the page as raw characters; `leftovers` finds it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

# What a reader must not see in the text of a rendered cell, and what it is.
_RAW: tuple[tuple[str, str], ...] = (
    (r"\{[a-z][\w:-]*\}(?=\0)", "a role"),
    (r"^\s*:::|:::\s*$", "a directive"),
    (r"\{(?:cite|ref|numref|eq|term|doc)\b", "a role"),
    (r"\[\[[a-z][\w-]*(?::[^\]]*)?\]\]", "a placeholder"),
    (r"(?<![\w\\])\$", "a dollar sign of a formula"),
    (r"\*\*(?=\S)|(?<=\S)\*\*", "bold marks"),
    (r"^\s*\|.*\|\s*$", "a row of a table"),
    (r"^\s*#{1,6} ", "a heading"),
    (r"\]\([^)\s]+\)", "a link"),
    (r"^\([\w-]+\)=\s*$", "a label"),
    (r"\\\(|\\\[|\\begin\{", "LaTeX"),
    (r"\[\^\w+\]", "a footnote"),
    (r"^: \S", "a definition"),
    (r"\{[.#][a-z][\w-]*[^}\n]*\}", "an attribute"),
    (r"`", "a code mark"),
)
_IN_FORMULA = re.compile(r"\\\\(?=[A-Za-z,;!])")
_INLINE = re.compile(r"(?<![\\$])\$(?!\$)([^$\n]+)\$(?!\$)")
_FENCED = re.compile(r"^(```+|~~~+).*?^\1\s*$|(`+)(?!`).*?(?<!`)\2(?!`)", re.DOTALL | re.MULTILINE)


def leftovers(markdown: str) -> Iterator[str]:
    """What of a Markdown cell stays raw in Colab, each as a sentence part."""
    from bs4 import BeautifulSoup

    formulas, html = _rendered(markdown)
    for tex in formulas:
        if found := _IN_FORMULA.search(tex):
            yield f"a doubled backslash in the formula {tex[found.start() : found.start() + 12]!r}"
    for line in _FENCED.sub("", markdown).splitlines():
        for tex in _INLINE.findall(line):
            if tex != tex.strip():
                yield f"a space beside a dollar sign, so the formula stays raw: {tex!r}"
            if line.lstrip().startswith("|") and "|" in tex:
                yield f"a bar in a formula of a table, which ends the cell (\\vert): {tex!r}"
    soup = BeautifulSoup(html, "html.parser")
    for code in soup.find_all(["code", "pre"]):
        code.replace_with("\0")
    text = soup.get_text()
    for pattern, what in _RAW:
        if found := re.search(pattern, text, re.MULTILINE):
            line = text[: found.end()].splitlines()[-1].replace("\0", "`...`").strip()
            yield f"{what}, raw in Colab: {line[-60:]!r}"
    if (opened := markdown.count("<details")) != (closed := markdown.count("</details>")):
        yield f"{opened} folds are opened and {closed} closed"
    if fold := re.search(r"<summary>[^\n]*\n(?=[^\n])", markdown):
        yield f"no empty line after {fold[0].strip()!r}, so the fold stays raw"
    if end := re.search(r"^.*\S.*\n[ \t]*</details>", markdown, re.MULTILINE):
        yield f"no empty line before the end of the fold after {end[0].splitlines()[0][-40:]!r}"


def formulas_of(markdown: str) -> list[str]:
    """The TeX of every formula in a Markdown text, in order; a label after `$$` is none of it."""
    return _rendered(markdown, labels=True)[0]


def _rendered(markdown: str, labels: bool = False) -> tuple[list[str], str]:
    """The formulas of a text, and its HTML in which a zero-width mark stands for each of them."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    formulas: list[str] = []

    def keep(tex: str, options: object) -> str:
        formulas.append(tex)
        return "\u200b"

    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    reader.use(dollarmath_plugin, allow_labels=labels, double_inline=True, renderer=keep)
    return formulas, reader.render(markdown)

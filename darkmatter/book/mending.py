"""What the HTML of Sphinx and its theme leaves undone: mended in the built pages, as text.

Sphinx 7 and sphinx-book-theme 1.1 are pinned (see `pyproject.toml`); a mend whose text is not found
does nothing, and the tests in `tests/browser` say whether the page is whole without it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path

from darkmatter.book.editions import STUDENT
from darkmatter.book.notebooks import write_text

LEDGER = "claims.html"

# Thebe runs cells on a server elsewhere. The book never asks for that, yet its address is declared
# on every page, and twice: the second declaration is an error in the browser.
_THEBE = re.compile(
    r"[ \t]*<(?:script[^>]*>const THEBE_JS_URL.*?</script>"
    r"|script[^>]*sphinx-thebe\.js[^>]*></script>"
    r"|script type=\"text/x-thebe-config\">.*?</script>"
    r"|script>kernelName = .*?</script>"
    r"|link[^>]*sphinx-thebe\.css[^>]*>)\n?",
    re.DOTALL,
)
# Without a word of its own the theme reports an error and then falls back to the same.
_NO_MODE = 'dataset.mode = localStorage.getItem("mode") || ""'
_MODE = 'dataset.mode = localStorage.getItem("mode") || "auto"'
_NO_DEFAULT, _DEFAULT = 'data-default-mode=""', 'data-default-mode="auto"'
_SIDEBAR = '<div class="bd-sidebar-primary bd-sidebar">'
_CARD = re.compile(r'<table class="table">(?=\s*<thead>\s*<tr[^>]*><th[^>]*><p>You will learn</p>)')
# A header that heads nothing is read aloud as an empty one; a corner is a cell.
_CORNER = re.compile(r"<th((?: class=\"head\")?)>(\s*(?:<p>\s*</p>)?\s*)</th>")
# docutils gives lists of citations roles that are deprecated and that no list may hold.
_ROLE = re.compile(r'(<div(?: class="citation"[^>]*)?) role="(?:list|doc-biblioentry)"')
_LEDGER_TABLE = re.compile(
    r'<table class="table">(?=\s*<thead>\s*<tr[^>]*><th[^>]*><p>(?:Claim|Other value)</p>)'
)
_LEDGER_ROW = re.compile(
    r'<tr class="(row-\w+)"><td><p><span id="(claim-[a-z0-9-]+)" class="(ledger-[^"]+)"></span>'
)
# About what fits on a line of 360 pixels; longer formulas scroll there.
_LONG = 26
_INLINE = re.compile(r'<span class="math (notranslate nohighlight">)(?=\\\((.*?)\\\)</span>)', re.S)
# What scrolls sideways must be within reach of the keyboard, in every browser.
_SCROLLING = """<script>
addEventListener("load", function () {
  function reach() {
    document.querySelectorAll(
      ".pst-scrollable-table-container, .highlight > pre, .wide-picture").forEach(function (one) {
        if (one.scrollWidth > one.clientWidth) one.tabIndex = 0;
      });
  }
  reach();
  addEventListener("resize", reach);
});
</script>
</body>"""
_SEARCH_INPUT = re.compile(r'id="search-input"')
_RECORDED = re.compile(r"(^|<span></span>)recorded ([a-z][a-z0-9-]*) = ", re.MULTILINE)
# What is read as sentences: the answer of a check, and recorded values.
_SENTENCES = re.compile(
    r'<pre>(?=(?:<span></span>)?(?:Exercise \d\d\.\d+ |<span class="recorded"))'
)
_PICTURE = re.compile(
    r'(?<=>)(\s*)(<img\b[^>]*\bsrc="[^"]*?([^"/]+\.svg)"[^>]*>)(?=\s*<figcaption)'
)
# Points across above which the words of a picture are too small on a phone.
_WIDE = 560
_POINTS = re.compile(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ')
_COLAB = re.compile(
    r'<li>(<a href="(https://colab[^"]+?/)([^"/]+\.ipynb)"[^>]*>.*?)Colab(</span>\s*</a>\s*)</li>',
    re.DOTALL,
)
_CARD_END = re.compile(r'<table class="table chapter-card">.*?</table>\s*</div>', re.DOTALL)


def mend(html: Path) -> None:
    """Rewrite every page of built HTML in place where `mended` changes it."""
    ledger = LEDGER if (html / LEDGER).is_file() else None
    points = {path.name: _points(path) for path in (html / "_images").glob("*.svg")}
    for page in sorted(html.rglob("*.html")):
        parts = page.relative_to(html).parts
        if parts[0] == "_static":
            continue
        text = page.read_text(encoding="utf-8")
        up = "../" * (len(parts) - 1)
        if (better := mended(text, ledger and up + ledger, points)) != text:
            write_text(page, better)


def mended(
    text: str, ledger: str | None = LEDGER, points: Mapping[str, float] | None = None
) -> str:
    """One page without Thebe, its landmarks and ids whole, each recorded value an anchor.

    A line "recorded fvu-width = 0.2" becomes the place `#value-fvu-width`, which the ledger links
    to; with the address of the `ledger` it links back to the claim's row. `points` is the width of
    each picture: a wide one gets a frame in which it moves on a phone. Below the card of a chapter,
    and in the menu of its launch button, stand both of its editions in Colab.
    """
    text = _THEBE.sub("", text)
    text = text.replace(_NO_MODE, _MODE).replace(_NO_DEFAULT, _DEFAULT)
    text = text.replace(_SIDEBAR, f'{_SIDEBAR[:-1]} role="region" aria-label="The book">')
    text = _CORNER.sub(r"<td\1>\2</td>", text)
    text = _ROLE.sub(r"\1", text)
    text = _LEDGER_TABLE.sub('<table class="table ledger">', text)
    text = _LEDGER_ROW.sub(r'<tr class="\1 \3" id="\2"><td><p>', text)
    text = _INLINE.sub(
        lambda found: f'<span class="math{" math-long" * (_length(found[2]) > _LONG)} {found[1]}',
        text,
    )
    text = text.replace("</body>", _SCROLLING)
    text = _CARD.sub('<table class="table chapter-card">', text)
    text = _with_editions(text)
    text = _PICTURE.sub(lambda found: _framed(found, points or {}), text)
    # The search page repeats the search box of every page.
    number = count(1)
    text = _SEARCH_INPUT.sub(
        lambda found: found[0] if (n := next(number)) == 1 else f'id="search-input-{n}"', text
    )
    seen: set[str] = set()

    def anchor(found: re.Match[str]) -> str:
        before, id = found.groups()
        if id in seen:
            return found[0]
        seen.add(id)
        name = f'<a href="{ledger}#claim-{id}">{id}</a>' if ledger else id
        return f'{before}<span class="recorded" id="value-{id}">recorded {name}</span> = '

    return _SENTENCES.sub('<pre class="sentences">', _RECORDED.sub(anchor, text))


def _with_editions(text: str) -> str:
    """The two editions of a chapter in Colab: in the menu, and as a line below the card."""
    if (found := _COLAB.search(text)) is None:
        return text
    link, folder, name, end = found.groups()
    student = f"{folder}{STUDENT}/{name}"
    ours = link.replace(f"{folder}{name}", student)
    text = text.replace(
        found[0],
        f"<li>{ours}Colab, exercises to do{end}</li>\n<li>{link}Colab, with solutions{end}</li>",
    )
    line = (
        f'\n<p class="chapter-editions">Open it in Colab: <a href="{student}">the exercises to do'
        f'</a>, or <a href="{folder}{name}">the chapter with its solutions</a>.</p>'
    )
    return _CARD_END.sub(lambda card: card[0] + line, text, count=1)


def _framed(picture: re.Match[str], points: Mapping[str, float]) -> str:
    space, image, name = picture.groups()
    if (width := points.get(name, 0)) <= _WIDE:
        return picture[0]
    return f'{space}<div class="wide-picture" style="--points: {width:.0f}">{image}</div>'


def _points(drawing: Path) -> float:
    """How many points across an SVG was drawn; 0 where it does not say."""
    found = _POINTS.search(drawing.read_text(encoding="utf-8", errors="replace")[:2000])
    return float(found[1]) if found else 0


def _length(formula: str) -> int:
    """About how many signs a formula has on the page: a command is one, braces are none."""
    return len(
        re.sub(r"\\[a-zA-Z]+|\\.", "x", re.sub(r"\\(?:text|left|right)\b|[{}^_\s]", "", formula))
    )

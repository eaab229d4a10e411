"""Render the staged book with Jupyter Book, then check the HTML: offline, described, linked."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bs4 import BeautifulSoup, Tag

from darkmatter._refusal import Refusal
from darkmatter.book.editions import STUDENT
from darkmatter.book.links import dead_links
from darkmatter.book.mending import mend
from darkmatter.book.paths import Book

COLAB = "https://colab.research.google.com/"
_OUTSIDE = re.compile(r"^(https?:)?//")
_OUTSIDE_CSS = re.compile(
    r"(?:url\(\s*['\"]?|@import\s+['\"])((?:https?:)?//[^'\")\s]+)", re.IGNORECASE
)
_OUTSIDE_IMPORT = re.compile(r"\b(?:from|import)\s*\(?\s*['\"](https?://[^'\"]+)['\"]")
# Links that make a browser fetch something; others only name an address.
_FETCHING = {"stylesheet", "icon", "preload", "prefetch", "modulepreload", "manifest", "preconnect"}
_WORDS_OF_A_SENTENCE = 4


class RenderFailure(Refusal):
    """Sphinx warned or failed, or the HTML breaks a promise of the book."""


def render(book: Book) -> Path:
    """Build _build/html from the staged pages with every warning an error; returns the folder.

    Raises `RenderFailure` with Sphinx's own warnings, or with what the HTML check found.
    """
    # A page that is gone must not stay, and Sphinx keeps what it built before.
    for old in (book.html, book.root / "_build" / ".doctrees"):
        shutil.rmtree(old, ignore_errors=True)
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        *("build", str(book.executed), "--config", str(book.config)),
        *("--path-output", str(book.root), "-W", "-n", "--keep-going"),
    ]
    build(command, "the book")
    mend(book.html)
    if found := html_problems(book.html, [path.stem for path in book.chapters()]):
        raise RenderFailure("expected HTML that keeps its promises; found:\n" + "\n".join(found))
    return book.html


def build(
    command: Sequence[str], what: str, folder: Path | None = None, must_pass: bool = True
) -> None:
    """Run a program; raises `RenderFailure` with the telling lines of its output if it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode and must_pass:
        output = f"{done.stdout}\n{done.stderr}"
        telling = [line for line in output.splitlines() if re.search("WARNING|ERROR|rror:", line)]
        raise RenderFailure(
            f"expected {what} to build without a warning; found:\n"
            + "\n".join(telling or output.splitlines()[-30:])
        )


def html_problems(html: Path, chapters: Iterable[str]) -> list[str]:
    """What is wrong with built HTML.

    Every image of the text has a sentence as text alternative and a caption that says more; no page
    loads a script, style, font or image from outside; every local one exists; formulas are typeset
    by a local MathJax; each page of `chapters` (names without suffix) offers its notebook and its
    student edition in Colab; each link inside the book leads to a page and a place that are there.
    """
    found: list[str] = []
    pages = [path for path in sorted(html.rglob("*.html")) if "_static" not in path.parts]
    if not pages:
        return [f"no page in {html}"]
    for page in pages:
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        name = page.relative_to(html).as_posix()
        problems = [*_images(soup), *_outside(soup), *_local(soup, page, html), *_formulas(soup)]
        found += [f"{name}: {problem}" for problem in problems]
    for sheet in sorted(html.rglob("*.css")):
        for address in _OUTSIDE_CSS.findall(sheet.read_text(encoding="utf-8", errors="replace")):
            found.append(f"{sheet.relative_to(html).as_posix()}: loads {address} from outside")
    for chapter in chapters:
        page = html / f"{chapter}.html"
        if not page.is_file():
            found.append(f"{chapter}.html: missing; is the chapter in _toc.yml?")
        else:
            for notebook in (f"{chapter}.ipynb", f"{STUDENT}/{chapter}.ipynb"):
                if not _has_colab_link(page, notebook):
                    found.append(f"{chapter}.html: no link that opens {notebook} in Colab")
    return found + dead_links(html)


def _images(soup: BeautifulSoup) -> Iterator[str]:
    # The logo and icons of the theme stand outside the article.
    for article in soup.select("article"):
        for image in article.find_all("img"):
            alt = _attribute(image, "alt")
            if len(alt.split()) < _WORDS_OF_A_SENTENCE:
                yield f"the image {_attribute(image, 'src')} has {alt!r} as text, not a sentence"
            figure = image.find_parent("figure")
            caption = figure.find("figcaption") if figure else None
            words = caption.get_text(" ").split() if caption else []
            if len(words) < _WORDS_OF_A_SENTENCE:
                yield f"the image {_attribute(image, 'src')} has no caption"
            elif " ".join(words).rstrip("#. ").endswith(alt.rstrip(". ")):
                yield f"the caption of {_attribute(image, 'src')} says no more than its text"
        for drawing in article.find_all("svg"):
            hidden = _attribute(drawing, "aria-hidden") == "true"
            if not (hidden or _attribute(drawing, "aria-label") or drawing.find("title")):
                yield "an inline drawing has no title"


def _outside(soup: BeautifulSoup) -> Iterator[str]:
    for tag, address in _fetched(soup):
        if _OUTSIDE.match(address):
            yield f"<{tag.name}> loads {address} from outside"
    for tag in soup.find_all(["script", "style"]):
        for address in [*_OUTSIDE_IMPORT.findall(tag.text), *_OUTSIDE_CSS.findall(tag.text)]:
            yield f"<{tag.name}> imports {address} from outside"


def _local(soup: BeautifulSoup, page: Path, html: Path) -> Iterator[str]:
    for _, address in _fetched(soup):
        parts = urlsplit(address)
        if _OUTSIDE.match(address) or parts.scheme or not parts.path:
            continue
        file = (page.parent / unquote(parts.path)).resolve()
        if parts.path.startswith("/") or not file.is_relative_to(html.resolve()):
            yield f"loads {address}, which is outside the book's folder"
        elif not file.is_file():
            yield f"loads {address}, which does not exist"


def _formulas(soup: BeautifulSoup) -> Iterator[str]:
    for formula in soup.select("article span.math"):
        if "\\\\" in formula.text:
            yield f"a formula in a line of text has a doubled backslash: {formula.text}"
    if not soup.select("article .math"):
        return
    scripts = [address for tag, address in _fetched(soup) if tag.name == "script"]
    if not any("mathjax" in address.lower() for address in scripts):
        yield "has formulas but no MathJax of its own"


def _fetched(soup: BeautifulSoup) -> Iterator[tuple[Tag, str]]:
    """Elements and the addresses a browser fetches for them on its own."""
    for tag in soup.find_all(["script", "img", "iframe", "source", "video", "audio", "embed"]):
        if address := _attribute(tag, "src"):
            yield tag, address
    for tag in soup.find_all("link"):
        if _FETCHING & set(_attribute(tag, "rel").split()):
            yield tag, _attribute(tag, "href")
    for tag in soup.find_all("object"):
        if address := _attribute(tag, "data"):
            yield tag, address


def _attribute(tag: Tag, name: str) -> str:
    value = tag.get(name)
    return " ".join(value) if isinstance(value, list) else str(value or "").strip()


def _has_colab_link(page: Path, notebook: str) -> bool:
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    return any(
        _attribute(link, "href").startswith(COLAB)
        and _attribute(link, "href").endswith(f"/{notebook}")
        for link in soup.find_all("a")
    )

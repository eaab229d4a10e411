"""Editions that Sphinx makes beside the pages: EPUB, PDF, and the check of outside links."""

from __future__ import annotations

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from darkmatter._refusal import Refusal
from darkmatter.book.notebooks import write_text
from darkmatter.book.paths import Book
from darkmatter.book.rendering import RenderFailure, build

NAME = "dark-matter"
# What an EPUB or a PDF has no use for, and says so: pictures in other formats, raw HTML.
_QUIET = ["epub.unknown_project_files", "mystnb.unknown_mime_type", "mystnb.mime_priority"]
# Answer robots with a refusal although a reader sees the page.
_NOT_FOR_ROBOTS = (
    r"https://www\.greaterwrong\.com/.*",
    r"https://www\.lesswrong\.com/.*",
    r"https://www\.alignmentforum\.org/.*",
    r"https://openreview\.net/.*",
    r"https://doi\.org/.*",
    r"https://colab\.research\.google\.com/.*",
)


class MissingProgram(Refusal):
    """An edition needs a program that this machine does not have."""


def write_epub(book: Book) -> Path:
    """Build _build/epub/dark-matter.epub from the staged pages, formulas as MathML."""
    built = _sphinx(book, "epub", {"epub_basename": NAME, "epub_show_urls": "no"})
    make_well_formed(built / f"{NAME}.epub")
    return _moved(built / f"{NAME}.epub", book.root / "_build" / "epub" / f"{NAME}.epub")


def make_well_formed(epub: Path) -> None:
    """Rewrite the pages of an EPUB that are HTML but not XML, as tables from pandas are.

    An EPUB is read as XML: a reader shows nothing of a page with one unquoted attribute.
    """
    from bs4 import BeautifulSoup

    copy = epub.with_suffix(".tmp")
    with zipfile.ZipFile(epub) as old, zipfile.ZipFile(copy, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith(".xhtml") and not _is_xml(content):
                content = str(BeautifulSoup(content, "html.parser")).encode()
                if not _is_xml(content):
                    raise RenderFailure(
                        f"expected {entry.filename} as XML in {epub.name}, found HTML that cannot "
                        "be rewritten; look at the raw HTML of that page"
                    )
            new.writestr(entry, content)
    copy.replace(epub)


def _is_xml(content: bytes) -> bool:
    try:
        ElementTree.fromstring(content)
    except ElementTree.ParseError:
        return False
    return True


def write_pdf(book: Book) -> Path:
    """Build _build/pdf/dark-matter.pdf from the staged pages; refuses a machine without LaTeX."""
    require_latex()
    source = write_tex(book)
    build(["latexmk", "-xelatex", "-interaction=nonstopmode", source.name], "LaTeX", source.parent)
    return _moved(source.with_suffix(".pdf"), book.root / "_build" / "pdf" / f"{NAME}.pdf")


def write_tex(book: Book) -> Path:
    """Write the LaTeX of the staged pages, which needs no LaTeX; returns the .tex file.

    LaTeX has no drawings in SVG: every figure comes as PNG.
    """
    options = {"latex_engine": "xelatex", "latex_use_xindy": False}
    built = _sphinx(book, "latex", options | {"jblatex_load_imgconverter": False})
    # The class of Jupyter Book asks for a font of 500 MB, and no page uses it.
    write_text(built / "bbm.sty", "\\ProvidesPackage{bbm}\n\\providecommand{\\mathbbm}{\\mathbb}\n")
    (source,) = built.glob("*.tex")
    return source


def require_latex() -> None:
    """Refuse in one sentence where latexmk or xelatex is not installed."""
    for program in ("latexmk", "xelatex"):
        if shutil.which(program) is None:
            raise MissingProgram(
                f"expected LaTeX for a PDF, found no program {program}; install it (Debian: "
                "latexmk texlive-xetex texlive-latex-extra fonts-freefont-otf tex-gyre), or make "
                "the EPUB, which needs none"
            )


def broken_links(book: Book) -> list[str]:
    """Outside links of the staged pages that do not answer, as "page:line: address: reason"."""
    options = {
        "linkcheck_ignore": [*_NOT_FOR_ROBOTS, *_own_addresses(book)],
        "linkcheck_anchors": False,
        "linkcheck_timeout": 20,
        "linkcheck_retries": 2,
        "linkcheck_workers": 4,
    }
    built = _sphinx(book, "linkcheck", options, strict=False, must_pass=False)
    report = (built / "output.json").read_text(encoding="utf-8")
    return broken_in(report)


def broken_in(report: str) -> list[str]:
    """The broken links in Sphinx's report, a line of JSON a link; each address once."""
    found: dict[str, str] = {}
    for line in report.splitlines():
        link: dict[str, Any] = json.loads(line)
        if link["status"] in ("broken", "timeout"):
            where = f"{link['filename']}:{link['lineno']}"
            found.setdefault(link["uri"], f"{where}: {link['uri']}: {link['info']}")
    return sorted(found.values())


def printed_config(book: Book, options: dict[str, Any]) -> str:
    """_config.yml for a builder that is no web site: no buttons, no scripts, MathML.

    The theme's launch buttons stop every builder but that of pages.
    """
    import yaml

    config: dict[str, Any] = yaml.safe_load(book.config.read_text(encoding="utf-8"))
    for key in ("repository", "launch_buttons", "html"):
        config.pop(key, None)
    sphinx: dict[str, Any] = config.setdefault("sphinx", {})
    kept = [one for one in sphinx.get("extra_extensions", []) if "mathjax" not in one]
    sphinx["extra_extensions"] = [*kept, "darkmatter.book.formulas", "darkmatter.book.paper"]
    inner: dict[str, Any] = sphinx.setdefault("config", {})
    inner["suppress_warnings"] = [*inner.get("suppress_warnings", []), *_QUIET]
    title = str(config.get("title", "Book"))
    inner |= {"html_math_renderer": "mathml", "project": title, "version": "0", **options}
    return yaml.safe_dump(config, sort_keys=False)


def _sphinx(
    book: Book, builder: str, options: dict[str, Any], strict: bool = True, must_pass: bool = True
) -> Path:
    """Run a builder of Sphinx on the staged pages; returns the folder of its output."""
    work = book.root / "_build" / "editions" / builder
    shutil.rmtree(work, ignore_errors=True)
    config = work / "_config.yml"
    write_text(config, printed_config(book, options))
    command = [
        str(Path(sys.executable).parent / "jupyter-book"),
        *("build", str(book.executed), "--config", str(config), "--path-output", str(work)),
        *("--builder", "custom", "--custom-builder", builder, "--keep-going"),
        *(["-W"] if strict else []),
    ]
    build(command, "jupyter-book", book.root, must_pass)
    return work / "_build" / builder


def _moved(built: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.move(built, target))


def _own_addresses(book: Book) -> list[str]:
    """The repository's own address: what is not pushed yet does not answer."""
    from darkmatter.book.notebooks import repository_of

    return [re.escape(repository_of(book.config)) + ".*"]

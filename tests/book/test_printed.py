"""EPUB, PDF and the link check: built once from the mini book, offline."""

from __future__ import annotations

import json
import os
import shutil
import threading
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from darkmatter.book import printed
from darkmatter.book.__main__ import main
from darkmatter.book.paths import Book
from darkmatter.book.rendering import RenderFailure
from darkmatter.book.staging import stage


@pytest.fixture(scope="module")
def staged(executed_once: Book, tmp_path_factory: pytest.TempPathFactory) -> Book:
    root = tmp_path_factory.mktemp("printed")
    shutil.copytree(executed_once.root, root / "copy")
    stage(Book(root / "copy"))
    return Book(root / "copy")


@pytest.fixture(scope="module")
def epub(staged: Book) -> zipfile.ZipFile:
    path = printed.write_epub(staged)
    assert path == staged.root / "_build" / "epub" / "dark-matter.epub"
    return zipfile.ZipFile(path)


def test_an_epub_is_wellformed_and_says_its_type_first(epub: zipfile.ZipFile) -> None:
    names = epub.namelist()
    assert names[0] == "mimetype"
    assert epub.read("mimetype") == b"application/epub+zip"
    assert epub.infolist()[0].compress_type == zipfile.ZIP_STORED
    pages = [name for name in names if name.endswith(".xhtml")]
    assert {"intro.xhtml", "99_mini.xhtml", "claims.xhtml"} <= set(pages)
    for name in pages:
        ElementTree.fromstring(epub.read(name))


def test_an_epub_has_numbers_figures_and_formulas_and_no_script(epub: zipfile.ZipFile) -> None:
    page = epub.read("99_mini.xhtml").decode()
    assert "It misses 31.1 % (30.5 to 31.7), the paper 0.313" in page
    assert 'alt="Line chart: the error falls steadily with width."' in page
    assert 'xmlns="http://www.w3.org/1998/Math/MathML"' in page
    assert r"\(" not in page
    assert not [name for name in epub.namelist() if name.endswith(".js")]
    ledger = epub.read("claims.xhtml").decode()
    assert "mini-fvu" in ledger
    for left_out in ("<button", "<fieldset", "<script", "ledger-cell"):
        assert left_out not in ledger


def test_html_that_is_no_xml_is_rewritten_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.epub"

    def write(page: str) -> None:
        with zipfile.ZipFile(path, "w") as book:
            book.writestr("mimetype", "application/epub+zip")
            book.writestr("a.xhtml", page)

    write('<html><table border=1 class="x"><tr><td>a<br>b</td></tr></table></html>')
    printed.make_well_formed(path)
    book = zipfile.ZipFile(path)
    root = ElementTree.fromstring(book.read("a.xhtml"))
    assert [cell.tag for cell in root.iter()] == ["html", "table", "tr", "td", "br"]
    assert book.namelist() == ["mimetype", "a.xhtml"]
    write("<html></html><html></html>")
    with pytest.raises(RenderFailure, match=r"a.xhtml as XML"):
        printed.make_well_formed(path)


def test_the_configuration_has_no_buttons_and_keeps_the_rest(staged: Book) -> None:
    config = yaml.safe_load(printed.printed_config(staged, {"epub_basename": "x"}))
    assert config["title"] == "Mini"
    assert {"repository", "launch_buttons", "html"} & set(config) == set()
    extensions = config["sphinx"]["extra_extensions"]
    assert extensions == ["darkmatter.book.formulas", "darkmatter.book.paper"]
    inner = config["sphinx"]["config"]
    assert inner["html_math_renderer"] == "mathml"
    assert inner["epub_basename"] == "x"
    assert "mystnb.unknown_mime_type" in inner["suppress_warnings"]


def test_without_latex_there_is_one_sentence_and_status_2(
    staged: Book, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["--root", str(staged.root), "pdf"]) == 2
    error = capsys.readouterr().err
    assert "found no program latexmk; install it" in error
    assert error.count("\n") == 1


def test_with_latex_the_pdf_is_made_of_the_pages(
    staged: Book, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No LaTeX on the machine that tests: a stand-in keeps what it was given as the "PDF".
    (tmp_path / "latexmk").write_text(
        '#!/bin/sh\nfor last; do :; done\ncp "$last" "${last%.tex}.pdf"\n'
    )
    (tmp_path / "xelatex").write_text("#!/bin/sh\n")
    for name in ("latexmk", "xelatex"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    path = printed.write_pdf(staged)
    assert path == staged.root / "_build" / "pdf" / "dark-matter.pdf"
    text = path.read_text()
    assert r"\chapter{99 · A mini chapter}" in text
    # Of the ledger the claims, without what needs a script; its table breaks over pages.
    assert "mini\\sphinxhyphen{}fvu" in text
    assert "cellcopy" not in text
    assert r"\begin{longtable}" in text
    assert "tabulary" not in text
    assert "mathbbm" in (path.parents[1] / "editions/latex/_build/latex/bbm.sty").read_text()
    assert "31.1" in text
    assert "includegraphics" in text


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def test_links_are_followed_and_the_dead_one_is_named(staged: Book, tmp_path: Path) -> None:
    (tmp_path / "there.html").write_text("<h1>There</h1>")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        site = f"http://127.0.0.1:{server.server_port}"
        page = staged.executed / "intro.md"
        before = page.read_text()
        page.write_text(f"# Mini\n\n[a]({site}/there.html) [b]({site}/gone.html)\n")
        # The mini chapter links to example.org, which only a machine with a network reaches.
        found = [link for link in printed.broken_links(staged) if "127.0.0.1" in link]
        page.write_text(before)
        server.shutdown()
    (dead,) = found
    assert dead.startswith(f"intro.md:3: {site}/gone.html: 404")


def test_broken_links_are_named_once() -> None:
    base = {"filename": "a.md", "lineno": 3, "code": 0, "info": "404"}
    report = [
        {**base, "status": "working", "uri": "https://e.org/1"},
        {**base, "status": "broken", "uri": "https://e.org/2"},
        {**base, "status": "broken", "uri": "https://e.org/2", "lineno": 9},
        {**base, "status": "timeout", "uri": "https://e.org/3", "info": "late"},
        {**base, "status": "ignored", "uri": "https://e.org/4"},
    ]
    assert printed.broken_in("\n".join(json.dumps(line) for line in report)) == [
        "a.md:3: https://e.org/2: 404",
        "a.md:3: https://e.org/3: late",
    ]

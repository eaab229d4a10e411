"""Links inside the book: dead files and places are named, live ones and other sites are not."""

from __future__ import annotations

from pathlib import Path

import pytest

from darkmatter.book.links import dead_links


@pytest.fixture
def html(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "_static").mkdir()
    (tmp_path / "a.html").write_text('<h1 id="top-of-a">A</h1><a name="old"></a>')
    (tmp_path / "part" / "c d.html").write_text('<p id="é">C</p>')
    (tmp_path / "_static" / "t.html").write_text('<a href="gone.html">template</a>')
    (tmp_path / "data.csv").write_text("1")
    return tmp_path


@pytest.mark.parametrize(
    "address",
    [
        "a.html", "a.html#top-of-a", "a.html#old", "#here", "#", "", "part/c%20d.html",
        "part/c%20d.html#%C3%A9", "data.csv", "data.csv#row=2", "https://e.org/gone",
        "//e.org/gone", "mailto:a@e.org", "?highlight=x",
    ],
)  # fmt: skip
def test_links_that_lead_somewhere(html: Path, address: str) -> None:
    (html / "b.html").write_text(f'<p id="here"><a href="{address}">x</a></p>')
    assert dead_links(html) == []


@pytest.mark.parametrize(
    ("address", "problem"),
    [
        ("gone.html", "but there is no such file"),
        ("part", "but there is no such file"),
        ("a.html#gone", "but that page has no such place"),
        ("#gone", "but that page has no such place"),
        ("part/c%20d.html#gone", "but that page has no such place"),
        ("../a.html", "which is outside the book's folder"),
        ("/a.html", "which is outside the book's folder"),
        ("http://[", "which is no address"),
    ],
)
def test_links_that_lead_nowhere(html: Path, address: str, problem: str) -> None:
    (html / "b.html").write_text(f'<p id="here">\n<a href="{address}">x</a></p>')
    assert dead_links(html) == [f"b.html: line 2 links to {address!r}, {problem}"]


def test_links_from_a_folder_are_relative_to_it(html: Path) -> None:
    (html / "part" / "b.html").write_text('<a href="../a.html#old"></a><a href="a.html"></a>')
    (problem,) = dead_links(html)
    assert problem == "part/b.html: line 1 links to 'a.html', but there is no such file"

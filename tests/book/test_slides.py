"""Slides: what of a chapter is on them, and that a deck needs nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from darkmatter.book import notebooks, slides
from darkmatter.book.paths import Book
from darkmatter.book.slides import Slide
from tests.book.minibook import chapter_text

MakeBook = Callable[..., Book]


def deck_of(book: Book, folder: Path) -> BeautifulSoup:
    (path,) = slides.write_decks(book, folder)
    assert path.name == "part-1-chapters.html"
    return BeautifulSoup(path.read_text(), "html.parser")


def headings(deck: BeautifulSoup) -> list[str]:
    return [section.find(["h1", "h2"]).get_text() for section in deck.find_all("section")]


def test_a_deck_has_claim_prediction_figure_verdicts_and_what_to_remember(
    executed_book: Book, tmp_path: Path
) -> None:
    deck = deck_of(executed_book, tmp_path / "slides")
    found = headings(deck)
    assert found[:2] == ["Chapters", "99 · A mini chapter"]
    assert found[-3:] == ["Claims of chapter 99", "What to remember", "Where this can fool you"]
    assert not any("Exercise" in heading for heading in found)
    text = deck.get_text(" ", strip=True)
    assert "A chapter that keeps all rules passes the lint." in text
    assert "The error falls from width to width. holds" in text
    (predict,) = deck.select("section.predict")
    assert predict.find("math") is not None
    assert "$" not in predict.get_text()


def test_figures_lie_beside_the_deck_with_their_text(executed_book: Book, tmp_path: Path) -> None:
    deck = deck_of(executed_book, tmp_path / "slides")
    (image,) = deck.find_all("img")
    assert image["alt"] == "Line chart: the error falls steadily with width."
    assert (tmp_path / "slides" / str(image["src"])).read_text().startswith("<?xml")
    assert "0.311 (0.305 to 0.317) at first" in deck.find("figcaption").get_text()
    notes = [note.get_text() for note in deck.select(".notes")]
    assert any("It misses 31.1 % (30.5 to 31.7)" in note for note in notes)


def test_a_deck_loads_nothing_from_elsewhere(executed_book: Book, tmp_path: Path) -> None:
    deck = deck_of(executed_book, tmp_path / "slides")
    assert not deck.find_all("link")
    assert not [script for script in deck.find_all("script") if script.get("src")]
    assert not re.search(r"url\(|@import", deck.find("style").get_text())
    assert all(str(image["src"]).startswith("figures/") for image in deck.find_all("img"))
    assert deck.html is not None
    assert deck.html["lang"] == "en"


def test_a_chapter_that_was_not_executed_has_words_only(
    make_book: MakeBook, tmp_path: Path
) -> None:
    deck = deck_of(make_book(), tmp_path / "slides")
    assert "Known truth: planted" not in headings(deck)
    assert deck.select("section.predict")
    assert not deck.find_all("img")


def test_the_index_names_every_deck_and_old_decks_go(make_book: MakeBook, tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    (tmp_path / "slides" / "old.html").write_text("old")
    deck_of(make_book(), tmp_path / "slides")
    assert not (tmp_path / "slides" / "old.html").exists()
    index = BeautifulSoup((tmp_path / "slides" / "index.html").read_text(), "html.parser")
    assert [link["href"] for link in index.find_all("a")] == ["part-1-chapters.html"]


def test_parts_come_from_the_table_of_contents(make_book: MakeBook) -> None:
    book = make_book()
    chapters = "[{file: 99_mini}, {file: claims}]"
    (book.source / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nparts:\n"
        f"  - {{caption: 'One, two', chapters: {chapters}}}\n"
        "  - {caption: Reference, chapters: [{file: claims}]}\n"
    )
    (part,) = slides.parts_of(book)
    assert part.file(1) == "part-1-one-two.html"
    assert [path.stem for path in part.chapters] == ["99_mini"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Short.", ["Short."]),
        ("One. Two.\n\nLater prose.\n\n$$\na\n$$", ["One. Two.", "$$\na\n$$"]),
        (f"First. Then {'word ' * 60}end.", ["First."]),
        ("```\ncode\n```\n\n- a\n- b\n\n- c", ["- a\n- b"]),
    ],
)
def test_a_slide_has_the_opening_and_what_is_set_apart(text: str, expected: list[str]) -> None:
    notebook = notebooks.from_percent(
        f'# %% [markdown]\n"""\n# 99 · T\n"""\n\n# %% [markdown]\n"""\n## S\n\n{text}\n"""\n'
    )
    _, slide = slides.chapter_slides(notebook, Path("unused"))
    assert slide.body == slides.markup("\n\n".join(expected))


def test_token_views_are_shown_and_other_outputs_are_not() -> None:
    text = chapter_text(with_checks=False)
    notebook = notebooks.from_percent(text, "https://github.com/somebody/book")
    told = {"alt": "A text.", "caption": "A token view.", "name": "fig-view"}
    code = next(cell for cell in notebook.cells if "import torch" in cell.source)
    code["outputs"] = [
        {"data": {"text/html": "<table>no</table>"}, "metadata": {}},
        {"data": {"text/html": "<b>view</b>"}, "metadata": {"darkmatter": told}},
    ]
    made: list[Slide] = list(slides.chapter_slides(notebook, Path("unused")))
    (view,) = [slide for slide in made if "<b>view</b>" in slide.body]
    assert "A token view." in view.body
    assert not any("<table>no" in slide.body for slide in made)

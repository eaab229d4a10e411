"""The bibliography: each entry can be found, and each paper that a page links to is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from darkmatter.book.notebooks import read_notebook
from darkmatter.book.paths import open_book

ROOT = Path(__file__).parents[2]
BOOK = open_book(ROOT)
TEXT = (BOOK.source / "references.bib").read_text(encoding="utf-8")
ENTRIES = {match[1]: match[0] for match in re.finditer(r"@\w+\{(\w+),.*?\n\}", TEXT, re.DOTALL)}
ARXIV = re.compile(r"arxiv\.org/(?:abs|pdf|html)/(\d{4}\.\d{4,5})")
# Published on the web only, without a DOI or an arXiv number.
ON_THE_WEB = {
    *("bricken2023", "templeton2024", "elhage2021"),  # Transformer Circuits Thread
    *("gurnee2024", "wright2024", "till2024", "linsefors2024", "watkins2023"),  # LessWrong
    *("heimersheim2024plateaus", "shinkle2025"),
    *("smith2024", "jordan2024", "radford2019"),  # Alignment Forum, a blog, OpenAI
}


def field(entry: str, name: str) -> str:
    match = re.search(rf"^\s*{name}\s*=\s*\{{(.*)\}},?$", entry, re.MULTILINE)
    return match[1] if match else ""


def texts() -> dict[str, str]:
    found = {path.name: path.read_text(encoding="utf-8") for path in BOOK.source.rglob("*.md")}
    for path in BOOK.chapters():
        cells = read_notebook(path).cells
        found[path.name] = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return found


@pytest.mark.parametrize("key", ENTRIES)
def test_an_entry_has_a_doi_an_arxiv_number_or_an_address(key: str) -> None:
    entry = ENTRIES[key]
    for name in ("author", "title", "year"):
        assert field(entry, name), name
    address, note = field(entry, "url"), field(entry, "note")
    numbers = re.findall(r"arXiv:(\d{4}\.\d{4,5})", note)
    if linked := ARXIV.search(address):
        assert numbers == [linked[1]], "the note must give the number of the address"
    if key in ON_THE_WEB:
        assert address.startswith("https://")
        assert note or field(entry, "journal"), "say where it was published"
        assert not numbers
        assert not field(entry, "doi")
    else:
        assert numbers or re.fullmatch(r"10\.\d{4,}/\S+", field(entry, "doi"))


def test_keys_and_numbers_are_used_once() -> None:
    assert len(ENTRIES) == TEXT.count("\n}\n")
    numbers = re.findall(r"note\s*=\s*\{arXiv:(\S+?)[;}]", TEXT)
    assert len(numbers) == len(set(numbers))
    assert set(ENTRIES) >= ON_THE_WEB


def test_every_paper_that_a_page_links_to_is_listed() -> None:
    missing = {
        f"{name}: {number}"
        for name, text in texts().items()
        for number in ARXIV.findall(text)
        if number not in TEXT
    }
    assert missing == set()


def test_every_post_that_a_page_links_to_is_listed() -> None:
    missing = {
        f"{name}: {post}"
        for name, text in texts().items()
        for post in re.findall(r"(?:lesswrong|greaterwrong|alignmentforum)\.\w+/posts/(\w+)", text)
        if post not in TEXT
    }
    assert missing == set()


def test_every_citation_has_its_entry() -> None:
    cited = {
        key.strip()
        for text in texts().values()
        for keys in re.findall(r"\{cite(?::\w+)?\}`([^`]+)`", text)
        for key in keys.split(",")
    }
    assert cited
    assert cited <= set(ENTRIES)

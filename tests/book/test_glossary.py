"""Glossary terms: which words of a page are explained, how, and which are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from bs4 import BeautifulSoup

from darkmatter.book.glossary import Term

GLOSSARY = r"""# Glossary

```{glossary}
clue
  In chapter 16: what a head writes.

error
  Activation less reconstruction, $e = x - \hat x$.

L0
  Number of {term}`latents <latent>` that are not zero.

latent
  One entry of a *code*, see {doc}`index`.

linear error
  A part of the {term}`error`.

misses
  Features that are left out.

soft threshold
  $\max(x - \lambda/2, 0)$, twice $\lVert x\rVert^2$.
```
"""
PAGE = r"""# An error in a title

The linear  error is an error, `error` in code, $error$ in a formula, [an error](other.md) linked.
Errors and latents; l0 is no L0. It misses a clue.

| error | of a table |
|---|---|
| latent-like | L0s |

## A section

Errors again, and the Latent, and
LINEAR ERROR in capitals.

### Its part

No second error here.

<details><summary>error</summary>

A soft
threshold.

</details>
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small book of three pages, built by Sphinx with the extension."""
    from sphinx.application import Sphinx

    source = tmp_path_factory.mktemp("source")
    pages = {
        "index": "# Index\n\n```{toctree}\nglossary\nother\n01_page\n16_page\npart/deep\n```\n",
        "glossary": GLOSSARY,
        "other": "# Other\n",
        "01_page": PAGE,
        "16_page": "# Sixteen\n\nA clue.\n",
        "part/deep": "# Deep\n\nAn error.\n",
    }
    (source / "part").mkdir()
    for name, text in pages.items():
        (source / f"{name}.md").write_text(text)
    config = {
        "extensions": ["myst_parser", "darkmatter.book.glossary"],
        "myst_enable_extensions": ["dollarmath"],
        "html_theme": "basic",
    }
    out = source / "out"
    app = Sphinx(
        source, None, out, source / "tree", "html", config, status=None, warningiserror=True
    )
    app.build()
    return out


def page(built: Path, name: str) -> BeautifulSoup:
    return BeautifulSoup((built / f"{name}.html").read_text(), "html.parser")


def test_first_use_is_a_link_with_the_definition(built: Path) -> None:
    found = [
        (link.get_text(), link["href"], link["title"])
        for link in page(built, "01_page").select("a.glossary-term")
    ]
    error = "Activation less reconstruction, e = x - x\u0302."
    assert found == [
        ("linear  error", "glossary.html#term-linear-error", "A part of the error."),
        ("error", "glossary.html#term-error", error),
        ("latents", "glossary.html#term-latent", "One entry of a code, see index."),
        ("L0", "glossary.html#term-L0", "Number of latents that are not zero."),
        ("soft\nthreshold", "glossary.html#term-soft-threshold",
         "max(x - \u03bb/2, 0), twice \u2016x\u2016\u00b2."),
    ]  # fmt: skip


def test_first_use_in_a_later_section_is_an_abbreviation(built: Path) -> None:
    found = [(one.get_text(), one["title"][:10]) for one in page(built, "01_page").select("abbr")]
    assert found == [
        ("Errors", "Activation"),
        ("Latent", "One entry "),
        ("LINEAR ERROR", "A part of "),
    ]


def test_titles_code_formulas_links_and_everyday_words_are_left_alone(built: Path) -> None:
    soup = page(built, "01_page")
    for element in soup.select("h1, h2, h3, code, .math, summary"):
        assert not element.select("abbr, .glossary-term")
    assert "It misses a clue." in soup.get_text()
    assert "latent-like" in [cell.get_text() for cell in soup.find_all("td")]


def test_a_term_of_one_chapter_is_explained_there_alone(built: Path) -> None:
    (clue,) = page(built, "16_page").select("a.glossary-term")
    assert clue.get_text() == "clue"
    assert clue["title"] == "In chapter 16: what a head writes."


def test_links_from_a_folder_lead_back(built: Path) -> None:
    (link,) = page(built, "part/deep").select("a.glossary-term")
    assert link["href"] == "../glossary.html#term-error"
    assert not page(built, "glossary").select("a.glossary-term, abbr")


def test_names_with_capitals_are_matched_letter_by_letter() -> None:
    assert Term("L0", "", "").pattern == "L0"
    assert Term("hook point", "", "").pattern == r"(?i:hook\s+point)"

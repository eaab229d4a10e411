"""From executed chapters to HTML that is read offline: staged, rendered once, then broken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book import claims as ledger
from darkmatter.book import pages, rendering, results
from darkmatter.book.execution import executed_notebooks
from darkmatter.book.paths import Book
from darkmatter.book.staging import stage


@pytest.fixture(scope="module")
def rendered(executed_once: Book, tmp_path_factory: pytest.TempPathFactory) -> Book:
    """The mini book, built by Jupyter Book with every warning an error."""
    root = tmp_path_factory.mktemp("rendered")
    shutil.copytree(executed_once.root, root / "copy")
    book = Book(root / "copy")
    stage(book)
    rendering.render(book)
    return book


@pytest.fixture
def html(rendered: Book, tmp_path: Path) -> Path:
    """A copy of the pages that a test may break; the static files are linked."""
    shutil.copytree(rendered.html, tmp_path / "html", symlinks=True)
    return tmp_path / "html"


def test_staging_copies_generates_and_removes(executed_book: Book) -> None:
    notebooks = executed_notebooks(executed_book.executed)
    (executed_book.executed / "stale.md").write_text("# Old")
    target = stage(executed_book)
    assert {path.name for path in target.iterdir()} == {
        "99_mini.ipynb", "_config.yml", "_toc.yml", "claims.md", "intro.md", "run_statistics.md",
        "suite_card.md",
    }  # fmt: skip
    assert executed_notebooks(target) == notebooks
    assert "Misses 31.1 % (30.5 to 31.7) at first." in (target / "intro.md").read_text()


def test_staging_refuses_numbers_that_nobody_recorded(executed_book: Book) -> None:
    (executed_book.source / "intro.md").write_text("# Mini\n\n[[ghost]]\n")
    with pytest.raises(Refusal, match=r"intro.md: .* found \[\[ghost\]\]"):
        stage(executed_book)
    shutil.rmtree(executed_book.executed)
    with pytest.raises(Refusal, match="found none of 99"):
        stage(executed_book)


def test_the_ledger_shows_claim_paper_run_and_verdict(executed_once: Book) -> None:
    claims = ledger.load_claims(executed_once.claims)
    records = results.all_records(executed_notebooks(executed_once.executed))
    page = pages.ledger_page(claims, records, {"99": "99_mini.ipynb"}, "pydocs")
    assert "what holds (3)</label>" in page
    assert "controls (1)</label>" in page
    assert "0.313 (a large one; read off the figure) | 0.311 (0.305 to 0.317) <a " in page
    assert 'href="99_mini.html#value-mini-fvu"' in page
    assert 'data-clipboard-text="mini-fvu = 0.311 (0.305 to 0.317) (chapter 99' in page
    assert "*Control.* A probe fitted on shuffled rows finds nothing. `mini-shuffled`" in page
    assert "[Read chapter 99](99_mini.ipynb)" in page
    unrun = pages.ledger_page(claims, [], {"99": "99_mini.ipynb"}, "pydocs")
    assert "what was not run (3)</label>" in unrun
    assert "#value-" not in unrun


def test_the_statistics_name_what_is_over_budget(executed_once: Book) -> None:
    executed = executed_notebooks(executed_once.executed)
    page = pages.statistics_page(executed, {"99": "99_mini.ipynb"})
    assert "| [99 · A mini chapter](99_mini.ipynb) |" in page
    assert "| torch |" in page
    executed["99"].metadata["darkmatter"].update(seconds=91.0, peak_bytes=2**30)
    assert "| 91 | 1 | 1.00 | **no** |" in pages.statistics_page(executed, {"99": "99_mini.ipynb"})
    executed["99"].metadata["darkmatter"]["jobs"] = 2
    page = pages.statistics_page(executed, {"99": "99_mini.ipynb"})
    assert "| 91 | 2 | 1.00 | not beside another |" in page
    assert "about 46 seconds" in page
    executed["99"].metadata["darkmatter"]["peak_bytes"] = 5 * 2**30
    page = pages.statistics_page(executed, {"99": "99_mini.ipynb"})
    assert "| 91 | 2 | 5.00 | **no** |" in page


def test_a_suite_card_gets_a_title(tmp_path: Path) -> None:
    assert "has not been built yet" in pages.suite_card_page(tmp_path / "none.md", "pydocs")
    (tmp_path / "card.md").write_text("Trained on docs.\n")
    page = pages.suite_card_page(tmp_path / "card.md", "pydocs")
    assert page == "# The suite `pydocs`\n\nTrained on docs.\n"
    (tmp_path / "card.md").write_text("# Card\n\nText.\n")
    assert pages.suite_card_page(tmp_path / "card.md", "pydocs") == "# Card\n\nText.\n"


def test_the_page_shows_said_numbers_formulas_and_described_figures(rendered: Book) -> None:
    page = (rendered.html / "99_mini.html").read_text()
    assert "It misses 31.1 % (30.5 to 31.7), the paper 0.313" in page
    # A formula in a said sentence is mathematics, not text.
    assert r"\(\|x_{i}\|^2\)" in page
    assert 'alt="Line chart: the error falls steadily with width."' in page
    assert "Error against width, 0.311 (0.305 to 0.317) at first." in page
    assert "Show the solution" in page
    assert "vnd.darkmatter" not in page
    # The four records of one cell stand in one box.
    line = r"""id="value-mini-fvu">recorded <a href="claims.html#claim-mini-fvu">mini-fvu</a>"""
    assert re.search(line + r"</span> = 0.311 \[0.305, 0.317\]\n<span [^>]*mini-random", page)
    assert "unpkg" not in page


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('alt="Line chart: the error falls steadily with width."', "", "not a sentence"),
        ('alt="Line chart: the error falls steadily with width."', 'alt="a.png"', "not a sentence"),
        ("</article>", '<img alt="one two three four" src="99_mini.html"></article>', "no caption"),
        ("Error against width, 0.311 (0.305 to 0.317) at first.",
         "Line chart: the error falls steadily with width.", "says no more than its text"),
        ("/student/99_mini.ipynb", "/pupil/99_mini.ipynb", "opens student/99_mini.ipynb in Colab"),
        ("</article>", "<svg></svg></article>", "an inline drawing has no title"),
        ("</head>", '<script src="https://cdn.org/a.js"></script></head>', "from outside"),
        ("</head>", '<script src="//cdn.org/a.js"></script></head>', "from outside"),
        ("</head>", '<link rel="stylesheet" href="https://a.org/a.css"></head>', "from outside"),
        ("</head>", "<style>@import 'https://a.org/a.css';</style></head>", "from outside"),
        ("</head>", '<script>import a from "https://a.org/a.js"</script></head>', "from outside"),
        ("</article>", '<img alt="one two three four" src="https://a.org/a.png"></article>',
         "from outside"),
        ("</article>", '<img alt="one two three four" src="gone.png"></article>', "not exist"),
        ("</article>", '<img alt="one two three four" src="/a.png"></article>', "outside the book"),
        ("colab.research.google.com", "example.org", "in Colab"),
        ("mathjax", "mathjam", "no MathJax of its own"),
        ("</article>", '<a href="gone.html">x</a></article>', "but there is no such file"),
        ("</article>", '<a href="intro.html#gone">x</a></article>', "that page has no such place"),
    ],
)  # fmt: skip
def test_each_broken_promise_is_named(html: Path, old: str, new: str, message: str) -> None:
    page = html / "99_mini.html"
    text = page.read_text()
    assert old in text
    page.write_text(text.replace(old, new))
    found = rendering.html_problems(html, ["99_mini"])
    assert any(message in problem and "99_mini" in problem for problem in found), found


def test_good_pages_missing_pages_and_style_sheets(html: Path) -> None:
    assert rendering.html_problems(html, ["99_mini"]) == []
    (html / "_static" / "extra.css").write_text("a { background: url(https://a.org/a.png) }")
    (html / "99_mini.html").unlink()
    sheet, chapter, *links = rendering.html_problems(html, ["99_mini"])
    assert sheet == "_static/extra.css: loads https://a.org/a.png from outside"
    assert chapter == "99_mini.html: missing; is the chapter in _toc.yml?"
    assert links
    assert all("99_mini.html" in link and "no such file" in link for link in links)


def test_a_warning_of_sphinx_fails_the_build(executed_book: Book) -> None:
    (executed_book.source / "intro.md").write_text("# Mini\n\n[x](gone.md)\n")
    stage(executed_book)
    with pytest.raises(rendering.RenderFailure, match=r"WARNING.*gone"):
        rendering.render(executed_book)

"""Each page in a real browser: of a small book, or with DARKMATTER_HTML of the book itself."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

import pytest
from playwright.sync_api import Browser

from tests.browser import checks
from tests.browser.browsing import PHONE, visit
from tests.browser.conftest import page_names


def test_the_page_is_whole(browser: Browser, address: str, page_name: str) -> None:
    """One load, many checks: errors, formulas, folds, steppers, names, contrast, phone, keys."""
    with visit(browser, address, page_name) as here:
        page = here.open()
        found = [
            *checks.formulas(page),
            *checks.errors_of_mathematics(page),
            *checks.pictures(page),
            *checks.ids(page),
            *checks.contrasts(page, "light"),
            *checks.contrasts(page, "dark"),
            *checks.keyboard(page),
            *checks.phone(page),
            *checks.folds(page),
            *checks.steppers(page),
            *checks.axe(page),
            *here.problems,
        ]
    assert not found, "\n".join(found)


def _key_pages(html: Path) -> list[str]:
    """The landing page, a page with a token view or figure, the ledger."""
    chapters = sorted(html.glob("[0-9][0-9]_*.html"))
    stepped = [page.name for page in chapters if '-panel"' in page.read_text(encoding="utf-8")]
    return ["intro.html", (stepped or [chapters[0].name])[0]]


def test_keyboard_alone_reaches_everything(browser: Browser, address: str, book_html: Path) -> None:
    for name in _key_pages(book_html):
        with visit(browser, address, name) as here:
            assert checks.tab_walk(here.open()) == [], name


def test_without_scripts(browser: Browser, address: str, book_html: Path) -> None:
    for name in _key_pages(book_html):
        with visit(browser, address, name, scripts=False) as here:
            assert checks.without_scripts(here.open()) == [], name
            assert here.problems == [], name


def test_the_search_finds_a_word(browser: Browser, address: str) -> None:
    with visit(browser, address, "intro.html") as here:
        page = here.open()
        page.keyboard.press("Control+k")
        page.keyboard.type("variance")
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=variance")
        page.locator("#search-results li a").first.wait_for()
        page.locator("#search-results li a").first.click()
        page.wait_for_load_state("load")
        assert "variance" in page.locator("article").inner_text().lower()
        assert here.problems == []


def test_the_theme_is_the_readers_and_can_be_changed(browser: Browser, address: str) -> None:
    with visit(browser, address, "intro.html", theme="dark") as here:
        page = here.open()
        themes = [page.evaluate("() => document.documentElement.dataset.theme")]
        for _ in range(3):
            page.locator("button.theme-switch-button:visible").first.click()
            themes.append(page.evaluate("() => document.documentElement.dataset.theme"))
    assert themes[0] == "dark"
    assert {"light", "dark"} <= set(themes)


def test_the_ledger_filters_and_leads_to_the_cells(browser: Browser, address: str) -> None:
    with visit(browser, address, "claims.html") as here:
        page = here.open()
        rows = page.locator("article tbody tr:visible")
        everything = rows.count()
        page.get_by_role("radio", name=re.compile("what holds")).check()
        held = rows.count()
        assert 0 < held < everything
        assert page.locator("article tbody tr:visible:has(.ledger-value)").count() == 0
        page.get_by_role("radio", name=re.compile("everything")).check()
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.locator(".ledger-copy:visible").first.click()
        copied = page.evaluate("() => navigator.clipboard.readText()")
        assert re.match(r"[a-z0-9-]+ = .+ \(chapter \d\d, suite \w+\)$", copied)
        page.locator(".ledger-cell").first.click()
        page.wait_for_load_state("load")
        target = page.locator(page.evaluate("() => location.hash"))
        assert copied.startswith(target.locator("a").inner_text())
        assert target.is_visible()
        target.locator("a").click()
        page.wait_for_load_state("load")
        assert "claims.html#claim-" in page.url
        assert here.problems == []


@pytest.mark.parametrize("size", [{"width": 1280, "height": 800}, PHONE])
def test_the_landing_page_begins_with_the_finding(
    browser: Browser, address: str, book_html: Path, size: dict[str, int]
) -> None:
    if not (book_html / "_images" / "main-finding.svg").is_file():
        assert book_html.parent.parent != Path.cwd(), "the book has lost its main figure"
        return
    with visit(browser, address, "intro.html", viewport=size) as here:
        page = here.open()
        claim = page.locator("article strong").first.bounding_box()
        figure = page.locator("article figure img").first.bounding_box()
    assert claim is not None
    assert figure is not None
    assert claim["y"] + claim["height"] < size["height"]
    # Four fifths of the figure are enough to see what it says.
    assert figure["y"] + 0.8 * figure["height"] < size["height"]


def test_a_term_says_what_it_means_and_leads_to_the_glossary(
    browser: Browser, address: str, book_html: Path
) -> None:
    pages = sorted(book_html.glob("[0-9][0-9]_*.html"))
    name = next(one.name for one in pages if "glossary-term" in one.read_text(encoding="utf-8"))
    with visit(browser, address, name) as here:
        page = here.open()
        term = page.locator("article a.glossary-term").first
        # What a mouse sees hovering, and a screen reader reads.
        assert len((term.get_attribute("title") or "").split()) >= 4
        word = term.inner_text().lower().rstrip("s")
        term.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/glossary.html#term-*")
        entry = page.locator(f"[id='{page.evaluate('() => location.hash.slice(1)')}']")
        assert entry.is_visible()
        assert word in entry.inner_text().lower()
        assert here.problems == []


def test_next_and_previous_do_what_their_labels_say(browser: Browser, address: str) -> None:
    with visit(browser, address, "intro.html") as here:
        page = here.open()
        first = page.locator("article h1").inner_text()
        for link, back in (("a.right-next", "a.left-prev"), ("a.left-prev", "a.right-next")):
            label = page.locator(f"{link} .prev-next-title").inner_text()
            page.locator(link).click()
            page.wait_for_load_state("load")
            assert page.locator("article h1").inner_text().startswith(label)
            assert page.locator(back).is_visible()
        assert page.locator("article h1").inner_text() == first
        assert here.problems == []


def test_the_exercises_are_one_click_away_in_colab(
    browser: Browser, address: str, book_html: Path
) -> None:
    chapter = min(book_html.glob("[0-9][0-9]_*.html")).stem
    with visit(browser, address, f"{chapter}.html", viewport=PHONE) as here:
        link = here.open().locator("article .chapter-editions a").first
        assert link.is_visible()
        assert (link.get_attribute("href") or "").endswith(f"/book/student/{chapter}.ipynb")


def test_a_phone_shows_words_of_figures_and_answers_of_checks(
    browser: Browser, address: str, book_html: Path
) -> None:
    texts = {page.name: page.read_text() for page in sorted(book_html.glob("[0-9][0-9]_*.html"))}
    wide = [name for name, text in texts.items() if "wide-picture" in text]
    for name in {next(iter(texts)), *wide[:2]}:
        with visit(browser, address, name, viewport=PHONE) as here:
            page = here.open()
            # Pixels for each point that the figure was drawn in: its words have 13 points.
            scales: list[float] = page.evaluate(
                """async () => {
                  const images = [...document.querySelectorAll('article figure img[src$=".svg"]')];
                  for (const one of images) { one.loading = 'eager'; await one.decode(); }
                  return images.map((one) => one.clientWidth / (0.75 * one.naturalWidth));
                }"""
            )
            cut: list[str] = page.evaluate(
                """() => [...document.querySelectorAll('article pre.sentences')]
                  .filter((one) => one.scrollWidth > one.clientWidth)
                  .map((one) => one.textContent.slice(0, 60))"""
            )
        # Eight pixels.
        assert min(scales) >= 0.61, name
        assert cut == [], name


def test_next_leads_through_every_page_and_back(book_html: Path) -> None:
    pages = {name: (book_html / name).read_text(encoding="utf-8") for name in page_names(book_html)}

    def neighbour(name: str, kind: str) -> str | None:
        found = re.search(rf'class="{kind}"\s+href="([^"]+)"', pages[name])
        return (
            posixpath.normpath(posixpath.join(posixpath.dirname(name), found[1])) if found else None
        )

    walked = ["intro.html"]
    while (after := neighbour(walked[-1], "right-next")) is not None:
        assert after not in walked
        assert neighbour(after, "left-prev") == walked[-1]
        walked.append(after)
    assert set(walked) == set(pages) - {"search.html", "genindex.html"}

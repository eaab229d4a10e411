"""Pages for the browser: a small book made here, and the built book where it is named.

`DARKMATTER_HTML` names a folder of built HTML, as `make browser` does for the real book. Without a
browser these tests are not collected, and the summary says so; with `DARKMATTER_BROWSER=require`
they fail instead.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from darkmatter.book import rendering
from darkmatter.book.execution import execute
from darkmatter.book.staging import stage
from tests.book.minibook import CONFIG, chapter_text, write_book
from tests.browser.browsing import NONE_FOUND, REQUIRED, has_browser, launch, serve

_AVAILABLE = has_browser()
_NEED_IT = [
    "test_pages.py",
    "test_checks.py",
    "test_latent_page.py",
    "test_hostile_text.py",
]
collect_ignore_glob = [] if _AVAILABLE or REQUIRED else _NEED_IT

ROOT = Path(__file__).parents[2]
CELLS = """
# %%
book.token_view(
    ["A", " small", " text", ".\\n"],
    {"width 512": [3.0, 1.0, 2.0, 0.5], "width 8192": [0.5, 2.0, 1.0, 3.0]},
    alt="Four tokens; the narrow SAE misses the first most, the wide one the last.",
    caption="The error on each token, at two widths.",
    name="fig-tokens",
    quantity="error norm",
    unit="a.u.",
)
"""

GLOSSARY = """# Glossary

```{glossary}
formula
  A sentence in the letters of mathematics.
```
"""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say that nothing was looked at, where there is no browser."""
    if collect_ignore_glob:
        terminalreporter.write_line(f"tests/browser was NOT run: {NONE_FOUND}", yellow=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Nothing to run for want of a browser is no failure unless one is required."""
    if collect_ignore_glob and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One Chromium for the session."""
    if not _AVAILABLE:
        pytest.fail(NONE_FOUND)
    with sync_playwright() as playwright:
        opened = launch(playwright)
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def mini_html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The HTML of a small book: a formula, folds, tables, a figure, a token view, curves."""
    marker = '\n# %% [markdown]\n"""\n## Known truth'
    text = chapter_text(with_checks=False)
    assert marker in text
    book = write_book(tmp_path_factory.mktemp("pages"), text.replace(marker, CELLS + marker))
    mathjax = "[sphinx-mathjax-offline]"
    assert mathjax in CONFIG
    with_glossary = CONFIG.replace(mathjax, f"{mathjax[:-1]}, darkmatter.book.glossary]")
    book.config.write_text(with_glossary, encoding="utf-8")
    (book.source / "glossary.md").write_text(GLOSSARY, encoding="utf-8")
    contents = book.source / "_toc.yml"
    contents.write_text(contents.read_text() + "  - file: glossary\n", encoding="utf-8")
    (book.source / "_static").mkdir()
    shutil.copy(ROOT / "book" / "_static" / "style.css", book.source / "_static")
    list(execute(book))
    stage(book)
    return rendering.render(book)


@pytest.fixture(scope="session")
def mini(mini_html: Path) -> Iterator[str]:
    """The address of the small book."""
    with serve(mini_html) as address:
        yield address


def real_html() -> Path | None:
    """The folder of built HTML that the environment names."""
    named = os.environ.get("DARKMATTER_HTML")
    if not named:
        return None
    folder = (ROOT / named).resolve()
    if not (folder / "index.html").is_file():
        raise pytest.UsageError(f"expected a built book in {folder}; run make book")
    return folder


@pytest.fixture(scope="session")
def real() -> Iterator[str]:
    """The address of the book that `DARKMATTER_HTML` names."""
    folder = real_html()
    assert folder is not None
    with serve(folder) as address:
        yield address


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`page_name` is every page of the real book, or the pages of the small one."""
    if "page_name" in metafunc.fixturenames:
        folder = real_html()
        metafunc.parametrize("page_name", page_names(folder) if folder else MINI_PAGES)


MINI_PAGES = [
    f"{name}.html"
    for name in ("intro", "99_mini", "claims", "run_statistics", "glossary", "search")
]


def page_names(html: Path) -> list[str]:
    """The addresses of the pages; index.html only sends on to the landing page."""
    found = [path.relative_to(html) for path in sorted(html.rglob("*.html"))]
    return [path.as_posix() for path in found if path.parts[0] not in ("_static", "index.html")]


@pytest.fixture(scope="session")
def address(request: pytest.FixtureRequest) -> str:
    """The book whose pages `page_name` lists."""
    return request.getfixturevalue("real" if real_html() else "mini")


@pytest.fixture(scope="session")
def book_html(request: pytest.FixtureRequest) -> Path:
    """The folder behind `address`."""
    return real_html() or request.getfixturevalue("mini_html")

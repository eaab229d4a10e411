"""Pictures of five key pages, to look at: `python -m tests.browser.screenshots HTML FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.browser import checks
from tests.browser.browsing import DESKTOP, PHONE, launch, serve, visit

# name, page (the first that matches), what to scroll to, viewport, theme
SHOTS = (
    ("landing", "intro.html", None, DESKTOP, "light"),
    ("landing-phone", "intro.html", None, PHONE, "dark"),
    ("figure", "02_*.html", "figure", DESKTOP, "dark"),
    ("token-view", "05_*.html", ".token-view", PHONE, "light"),
    ("ledger", "claims.html", None, DESKTOP, "light"),
)


def take(html: Path, folder: Path) -> list[Path]:
    """Write a PNG of each key page of built HTML into a folder; the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with sync_playwright() as playwright, serve(html) as address:
        browser = launch(playwright)
        for name, pattern, place, viewport, theme in SHOTS:
            file = next(iter(sorted(html.glob(pattern)))).name
            with visit(browser, address, file, theme=theme, viewport=viewport) as here:
                page = here.open()
                checks.formulas(page)
                if place:
                    page.locator(f"article {place}").first.evaluate(
                        "(one) => one.scrollIntoView({block: 'start'}) || window.scrollBy(0, -80)"
                    )
                written.append(folder / f"{name}.png")
                page.screenshot(path=written[-1])
        browser.close()
    return written


if __name__ == "__main__":
    for path in take(Path(sys.argv[1]), Path(sys.argv[2])):
        print(path)

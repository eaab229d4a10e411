"""A real browser on built pages: served on this machine alone, every other address refused."""

from __future__ import annotations

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, Playwright, Route, sync_playwright

REQUIRED = os.environ.get("DARKMATTER_BROWSER") == "require"
NONE_FOUND = (
    "expected Chromium to test the pages with, found none; install it (apt-get install chromium, "
    "or .venv/bin/playwright install chromium)"
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
DESKTOP, PHONE = {"width": 1200, "height": 800}, {"width": 360, "height": 740}


def system_browser() -> str | None:
    """The Chromium of the system, or None."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


def has_browser() -> bool:
    """Whether there is a Chromium: the system's, or one that playwright installed."""
    if system_browser():
        return True
    with sync_playwright() as playwright:
        return Path(playwright.chromium.executable_path).is_file()


def launch(playwright: Playwright) -> Browser:
    """Chromium; the sandbox needs rights that containers do not give."""
    return playwright.chromium.launch(executable_path=system_browser(), args=["--no-sandbox"])


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *arguments: object) -> None:
        del format, arguments


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on a free port of 127.0.0.1; gives its address, which ends in a slash."""
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


@dataclass
class Visit:
    """A page in a context of its own, and what went wrong on it so far."""

    page: Page
    address: str
    name: str
    problems: list[str] = field(default_factory=list[str])

    def open(self, name: str | None = None) -> Page:
        self.page.goto(self.address + (name or self.name), wait_until="load")
        return self.page


@contextmanager
def visit(
    browser: Browser,
    address: str,
    name: str,
    *,
    theme: str = "light",
    scripts: bool = True,
    viewport: dict[str, int] = DESKTOP,
) -> Iterator[Visit]:
    """A context in which only `address` answers; errors and other addresses become problems."""
    context: BrowserContext = browser.new_context(
        viewport=viewport,  # pyright: ignore[reportArgumentType] - a dict with these two keys
        color_scheme=theme,  # pyright: ignore[reportArgumentType] - "light" or "dark"
        java_script_enabled=scripts,
        reduced_motion="reduce",
    )
    context.set_default_timeout(30_000)
    visited = Visit(context.new_page(), address, name)

    def route(request: Route) -> None:
        if request.request.url.startswith((address, "data:", "blob:")):
            request.continue_()
        else:
            visited.problems.append(f"asks for {request.request.url} from outside")
            request.abort()

    context.route("**/*", route)
    tell = visited.problems.append
    page = visited.page
    page.on("console", lambda m: tell(f"console: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: tell(f"script error: {error}"))
    page.on("response", lambda r: tell(f"{r.status} for {r.url}") if r.status >= 400 else None)
    try:
        yield visited
    finally:
        context.close()

"""Links inside the built book: each leads to a page that is there, and to a place on it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Places that a browser knows by itself.
_EVERYWHERE = {"", "top"}


class _Page(HTMLParser):
    """The ids of a page, and the addresses of its links with their lines."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[tuple[str, int]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {one for one in (given.get("id"), tag == "a" and given.get("name")) if one}
        if tag in ("a", "area") and (address := given.get("href")) is not None:
            self.links.append((address.strip(), self.getpos()[0]))


def dead_links(html: Path) -> list[str]:
    """Links of a folder of pages that lead nowhere inside it, as "page: what".

    A link to another site is not followed, and one to a file that is no page only has to exist.
    """
    pages = {
        path.resolve(): _Page(path.read_text(encoding="utf-8"))
        for path in sorted(html.rglob("*.html"))
        if "_static" not in path.relative_to(html).parts
    }
    found: list[str] = []
    for path, page in pages.items():
        name = path.relative_to(html.resolve()).as_posix()
        for address, line in page.links:
            if problem := _problem(address, path, html.resolve(), pages):
                found.append(f"{name}: line {line} links to {address!r}, {problem}")
    return found


def _problem(address: str, path: Path, html: Path, pages: dict[Path, _Page]) -> str | None:
    try:
        parts = urlsplit(address)
    except ValueError:
        return "which is no address"
    if parts.scheme or parts.netloc:
        return None
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if parts.path.startswith("/") or not target.is_relative_to(html):
        return "which is outside the book's folder"
    if not target.is_file():
        return "but there is no such file"
    place = unquote(parts.fragment)
    if target in pages and place not in pages[target].ids and place.lower() not in _EVERYWHERE:
        return "but that page has no such place"
    return None

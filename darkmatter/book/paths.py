"""Where the book's files are."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from darkmatter._refusal import Refusal

BOOK_VARIABLE = "DARKMATTER_BOOK"
_CHAPTER = re.compile(r"(\d\d)_\w+\.ipynb")
_SUITE = re.compile(r"[a-z0-9][a-z0-9._-]*")


@dataclass(frozen=True)
class Book:
    """The folders of one book: `root` holds _config.yml and book/, and receives _build/."""

    root: Path

    @property
    def source(self) -> Path:
        return self.root / "book"

    @property
    def config(self) -> Path:
        return self.root / "_config.yml"

    @property
    def claims(self) -> Path:
        return self.source / "claims.yml"

    @property
    def executed(self) -> Path:
        """Executed chapters and, beside them, the staged pages: what Sphinx reads."""
        return self.root / "_build" / "book"

    @property
    def html(self) -> Path:
        return self.root / "_build" / "html"

    def results(self, suite: str) -> Path:
        """The reference values of a suite. Refuses what is no name, such as a path."""
        if not _SUITE.fullmatch(suite):
            raise Refusal(
                f"expected the name of a suite, such as pydocs, found {suite[:80]!r}; pass a name"
            )
        return self.source / "results" / f"{suite}.json"

    def chapters(self, only: str | None = None) -> list[Path]:
        """The chapter notebooks in order, or the one of chapter `only` ("02")."""
        found = sorted(path for path in self.source.glob("*.ipynb") if chapter_of(path))
        numbers = [chapter_of(path) for path in found]
        if twice := next((one for one in numbers if numbers.count(one) > 1), None):
            raise Refusal(
                f"expected one notebook a chapter in {self.source}, found two of chapter {twice}; "
                "remove one"
            )
        if only is None:
            return found
        chosen = [path for path in found if chapter_of(path) == only]
        if not chosen:
            raise Refusal(
                f"expected one of the chapters {', '.join(map(str, numbers)) or '(none yet)'}, "
                f"found {only!r}; choose one of them"
            )
        return chosen


def open_book(root: Path) -> Book:
    """The book whose root folder is `root`; refuses a folder without book/."""
    if not (root / "book").is_dir():
        raise Refusal(
            f"expected a folder book/ in {root.resolve()}, found none; run from the repository root"
        )
    return Book(root.resolve())


def chapter_of(path: Path) -> str | None:
    """The two digits a chapter's file name begins with; None for other files."""
    match = _CHAPTER.fullmatch(path.name)
    return match[1] if match else None


def find_claims() -> Path | None:
    """claims.yml for a chapter that is being run, or None where the book is not at hand (Colab).

    The executor names the folder in the environment; by hand it is sought upwards from the working
    directory, then beside an editable installation.
    """
    if folder := os.environ.get(BOOK_VARIABLE):
        return Path(folder) / "claims.yml"
    here = Path.cwd()
    candidates = [folder / "book" / "claims.yml" for folder in (here, *here.parents)]
    candidates += [here / "claims.yml", Path(__file__).parents[2] / "book" / "claims.yml"]
    return next((path for path in candidates if path.is_file()), None)

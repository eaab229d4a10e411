"""The book's own machinery. A chapter needs `start`, `show`, `check`, `COLOURS` and `NotYet`."""

from __future__ import annotations

from darkmatter.book.chapter import Chapter, start
from darkmatter.book.exercises import NotYet, check
from darkmatter.book.figures import COLOURS, show

__all__ = ["COLOURS", "Chapter", "NotYet", "check", "show", "start"]

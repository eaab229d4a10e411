"""The book's own machinery: what a chapter needs of it."""

from __future__ import annotations

from darkmatter.book.chapter import Chapter, start
from darkmatter.book.exercises import NotYet, check
from darkmatter.book.explorer import explore
from darkmatter.book.figures import COLOURS, show
from darkmatter.book.views import token_view

__all__ = ["COLOURS", "Chapter", "NotYet", "check", "explore", "show", "start", "token_view"]

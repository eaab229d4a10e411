"""The one error for input that cannot be used."""

from __future__ import annotations


class Refusal(ValueError):
    """An input was refused: the message says what was expected, what came and what to do."""

"""Numbers in prose: which of them were typed by hand, and how a recorded one is written.

A measured number reaches a sentence only through a placeholder such as `{fvu-512}`, which is filled
from a record; a typed decimal or percentage is found by `typed_numbers` and refused by the lint.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from darkmatter._refusal import Refusal
from darkmatter.book.relations import Value

FORMATS = ("", "plain", "%", "plain%", "paper")

# Code, mathematics, links, addresses and names of exercises may hold digits; prose may not.
_MATH = re.compile(r"\$\$.*?\$\$|\$(?=\S)[^$\n]*?(?<=\S)\$", re.DOTALL)
_NOT_PROSE = re.compile(
    r"^(?P<fence>```+|~~~+).*?^(?P=fence)\s*$"  # fenced code
    r"|(?P<ticks>`+)(?!`).*?(?<!`)(?P=ticks)(?!`)"  # code span
    r"|\$\$.*?\$\$|\$(?=\S)[^$\n]*?(?<=\S)\$"  # mathematics
    r"|<!--.*?-->"
    r"|!?\[[^\]\n]*\]\([^)\n]*\)"  # link or image
    r"|<?https?://[^\s>)]+>?"
    r"|<[a-zA-Z/][^>\n]*>"  # HTML tag with its attributes
    r"|\b[Ee]xercises? \d\d\.\d+",
    re.DOTALL | re.MULTILINE,
)
_TYPED = re.compile(r"\d*\.?\d+\s*(?:%|per\s?cent\b)|(?<![\w.])\d*\.\d+", re.IGNORECASE)
_PLACEHOLDER = re.compile(r"\{(?P<id>[a-z][a-z0-9-]*)(?::(?P<format>[^{}]*))?\}")
# What is smaller is the dust that float64 leaves where the answer is zero.
_ROUNDING = 1e-12
_STATIC_PLACEHOLDER = re.compile(r"\[\[(?P<id>[a-z][a-z0-9-]*)(?::(?P<format>[^\[\]]*))?\]\]")


def typed_numbers(text: str) -> list[str]:
    """Decimals and percentages that stand in the prose of a Markdown text."""
    return [match[0] for match in _TYPED.finditer(_NOT_PROSE.sub(" ", text))]


def fill(text: str, write: Callable[[str, str], str], static: bool = False) -> str:
    """Replace each placeholder `{id:format}` outside of `$...$` by `write(id, format)`.

    `static` looks for `[[id:format]]` instead, the form of pages that are not chapters.
    Raises `Refusal` for a format that does not exist.
    """
    pattern = _STATIC_PLACEHOLDER if static else _PLACEHOLDER

    def replace(match: re.Match[str]) -> str:
        form = match["format"] or ""
        if form not in FORMATS:
            raise Refusal(
                f"expected {{{match['id']}}} alone or with one of {', '.join(FORMATS[1:])} after a "
                f"colon, found {match[0]!r}; choose one of them"
            )
        return write(match["id"], form)

    parts: list[str] = []
    position = 0
    for formula in _MATH.finditer(text):
        parts += [pattern.sub(replace, text[position : formula.start()]), formula[0]]
        position = formula.end()
    return "".join([*parts, pattern.sub(replace, text[position:])])


def written(value: Value, interval: object = None, form: str = "") -> str:
    """A recorded value as it stands in a sentence: three digits (a count all), then its interval.

    `0.311 (0.305 to 0.317)`, plain `0.311`, per cent `31.1 % (30.5 to 31.7)`; a list is joined by
    commas, a truth value is "yes" or "no".
    """
    if isinstance(value, bool):
        return "yes" if value else "no"
    percent = form.endswith("%")
    pairs = interval if isinstance(interval, Sequence) and not form.startswith("plain") else None
    if isinstance(value, list):
        each: Sequence[object] = pairs if pairs is not None else [None] * len(value)
        counts = all(float(one).is_integer() for one in value)
        return ", ".join(
            _one(one, pair, percent, counts) for one, pair in zip(value, each, strict=True)
        )
    return _one(float(value), pairs, percent, float(value).is_integer())


def _one(value: float, pair: object, percent: bool, whole: bool) -> str:
    if 0 < abs(value) < _ROUNDING:
        return "0 to rounding"
    scale = 100.0 if percent else 1.0
    low, high = (float(end) * scale for end in pair) if isinstance(pair, Sequence) else (0.0, 0.0)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] - pairs are checked when recorded
    # A count has no decimals.
    count = pair is None and not percent and whole
    digits = 0 if count else _decimals(value * scale, percent)
    text = _number(value * scale, digits) + (" %" if percent else "")
    if pair is None:
        return text
    return f"{text} ({_number(low, digits)} to {_number(high, digits)})"


def _decimals(value: float, percent: bool) -> int:
    """Decimals that leave three digits; at most one in a percentage, three for what is near 0."""
    size = abs(value)
    if percent:
        return 1 if size < 99.95 else 0
    if 0 < size < 0.01:
        return -1
    return 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3


def _number(value: float, decimals: int) -> str:
    if decimals < 0:
        return f"{value:.2g}"
    text = f"{value:,.{decimals}f}"
    return text.lstrip("-") if float(text.replace(",", "")) == 0 else text

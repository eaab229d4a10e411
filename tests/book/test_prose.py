"""Typed numbers are found, recorded numbers are written with their digits and intervals."""

from __future__ import annotations

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book import prose


@pytest.mark.parametrize(
    "text",
    ["about 0.31 of it", "31 % of it", "31% of it", "31 percent", "31 per cent", "a .5 share",
     "2.5x more", "**0.9**", "| 1.5 GiB |", "99.5 %", "- 0.1\n- b", "line\n0.3 again"],
)  # fmt: skip
def test_typed_numbers_are_found(text: str) -> None:
    assert prose.typed_numbers(text)


@pytest.mark.parametrize(
    "text",
    ["width 512", "chapter 02", "`0.31`", "``a ` 0.31``", "```\n0.31\n```", "$0.31$",
     "$$\nx = 0.31\n$$", "[v 0.3](https://e.org/1.5)", "https://e.org/1.5", "Exercise 02.1: do",
     "2024.", "3 to 6", "<a href='1.5'>x</a>", "at 2,048", "a.5b"],
)  # fmt: skip
def test_other_numbers_are_left_alone(text: str) -> None:
    assert prose.typed_numbers(text) == []


@pytest.mark.parametrize(
    ("value", "interval", "form", "expected"),
    [
        (0.31149, (0.3051, 0.3174), "", "0.311 (0.305 to 0.317)"),
        (0.31149, (0.3051, 0.3174), "plain", "0.311"),
        (0.31149, (0.3051, 0.3174), "%", "31.1 % (30.5 to 31.7)"),
        (0.31149, None, "plain%", "31.1 %"),
        (2.904, None, "", "2.90"),
        (2048.0, None, "", "2,048"),
        (19.0, None, "", "19"),
        (19.0, (17.5, 20.5), "", "19.0 (17.5 to 20.5)"),
        (1.0, None, "%", "100 %"),
        (-0.00001, None, "", "-1e-05"),
        (-4.7e-17, None, "plain", "0 to rounding"),
        ([1.0, 1.0, 0.99951], None, "", "1.00, 1.00, 1.000"),
        ([1.0, 2.0], None, "", "1, 2"),
        ([1.0, 0.99961], None, "plain%", "100 %, 100 %"),
        (0.0, (-0.0002, 0.01), "", "0.000 (0.000 to 0.010)"),
        (True, None, "", "yes"),
        ([0.3, 0.25], [(0.2, 0.4), (0.2, 0.3)], "",
         "0.300 (0.200 to 0.400), 0.250 (0.200 to 0.300)"),
        ([0.3, 0.25], None, "", "0.300, 0.250"),
    ],
)  # fmt: skip
def test_written(value: float, interval: object, form: str, expected: str) -> None:
    assert prose.written(value, interval, form) == expected


def test_placeholders_are_filled_outside_formulas_only() -> None:
    filled = prose.fill("{a-1} $x_{i}$ {b:%} {Not}", lambda id, form: f"<{id}|{form}>")
    assert filled == "<a-1|> $x_{i}$ <b|%> {Not}"
    assert prose.fill("{a} [[a:plain]]", lambda id, form: id + form, static=True) == "{a} aplain"
    with pytest.raises(Refusal, match="with one of plain, %"):
        prose.fill("{a:3f}", lambda id, form: "")

"""Signs and colours of the token view; `tests/book/test_views.py` tests the block as shown."""

from __future__ import annotations

import itertools

import pytest

from darkmatter.tokenview import colour, level_of, visible


def luminance(code: str) -> float:
    """Relative luminance of #rrggbb by WCAG 2."""
    channels = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_black_text_is_legible_on_every_level_and_lightness_gives_the_order() -> None:
    light = [luminance(colour(level)) for level in range(10)]
    assert colour(0) == "#ffffff"
    # WCAG AA asks for a contrast of 4.5.
    assert all((one + 0.05) / 0.05 >= 4.5 for one in light)
    assert all(a - b > 0.02 for a, b in itertools.pairwise(light))


@pytest.mark.parametrize(
    ("token", "seen"),
    [
        ("\n\n", "↵\n↵\n"),
        ("\t x", "⇥ x"),
        ("\r", "‹D›"),
        ("\u200b", "‹200B›"),
        ("\ufeffa", "‹FEFF›a"),
        ("", "∅"),
        ("é ☃", "é ☃"),
        ("    ", "    "),
    ],
)
def test_invisible_characters_are_shown_by_signs(token: str, seen: str) -> None:
    assert visible(token) == seen


def test_levels_run_over_the_scale_and_a_scale_without_length_has_one() -> None:
    assert [level_of(value, 1.0, 3.0) for value in (1.0, 1.19, 1.21, 2.99, 3.0)] == [0, 0, 1, 9, 9]
    assert level_of(2.0, 2.0, 2.0) == 0

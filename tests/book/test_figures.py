"""Figures: one look, the same bytes, and a text for who cannot see them."""

from __future__ import annotations

from typing import Any

import matplotlib as mpl
import pytest
from matplotlib import pyplot

from darkmatter import book
from darkmatter._refusal import Refusal
from darkmatter.book.figures import FIGURE_KEY, use_house_style

ALT = "Line chart: the error falls steadily with width."


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, str], dict[str, Any]]]:
    displayed: list[tuple[dict[str, str], dict[str, Any]]] = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda data, raw, metadata: displayed.append((data, metadata)),
    )
    with mpl.rc_context():
        use_house_style()
        yield displayed
    pyplot.close("all")


def draw(points: int = 3) -> Any:
    figure, axes = pyplot.subplots()
    axes.plot(range(points), [(7 * n) % 5 for n in range(points)])
    return figure


def test_show_gives_the_same_bytes_twice_with_text_and_caption(shown: Any) -> None:
    for _ in range(2):
        book.show(draw(), alt=ALT, caption="Error against width.", name="fig-error")
    assert shown[0] == shown[1]
    data, metadata = shown[0]
    assert data["text/plain"] == ALT
    assert {"image/png", "image/svg+xml"} < set(data)
    assert "<dc:date>" not in data["image/svg+xml"]
    assert metadata[FIGURE_KEY] == {
        "alt": ALT, "caption": "Error against width.", "name": "fig-error"
    }  # fmt: skip
    assert pyplot.get_fignums() == []


def test_a_drawing_of_very_many_points_is_left_out(shown: Any) -> None:
    with mpl.rc_context({"path.simplify": False}):
        book.show(draw(60_000), alt=ALT, caption="Error against width.", name="fig-error")
    assert set(shown[0][0]) == {"image/png", "text/plain"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alt": ""}, "expected alt as a sentence"),
        ({"alt": "a chart of it"}, "expected alt as a sentence"),
        ({"caption": " "}, "expected caption as a sentence"),
        ({"name": "Figure 1"}, "kebab-case"),
    ],
)
def test_show_refuses(shown: Any, change: dict[str, str], message: str) -> None:
    words = {"alt": ALT, "caption": "Error against width.", "name": "fig-error"} | change
    with pytest.raises(Refusal, match=message):
        book.show(draw(), **words)
    assert shown == []


def test_roles_have_different_colours_that_cannot_be_changed() -> None:
    assert len(set(book.COLOURS.values())) == len(book.COLOURS)
    assert {"absent", "linear", "nonlinear", "sae", "paper", "control"} <= set(book.COLOURS)
    with pytest.raises(TypeError):
        book.COLOURS["linear"] = "red"  # type: ignore[index]

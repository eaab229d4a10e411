"""A figure with a setting to choose, on the page and live."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from bs4 import BeautifulSoup
from matplotlib import pyplot

from darkmatter import book
from darkmatter._refusal import Refusal
from darkmatter.book.figures import FIGURE_KEY

SETTINGS = {"8": 1.0, "<64>": 2.0}


def draw(slope: float | int) -> tuple[Any, str]:
    """A line of that slope."""
    figure, axes = pyplot.subplots()
    axes.plot([0, 1], [0, slope])
    axes.set_ylim(0, 2)
    return figure, f"A straight line rises to {slope:g} from zero at the left."


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    displayed: list[Any] = []
    monkeypatch.setattr(
        "IPython.display.display", lambda *data, **more: displayed.append((data[0], more))
    )
    return displayed


def explore(**change: Any) -> None:
    words = {"quantity": "L0", "caption": "Lines of two slopes.", "name": "fig-lines"}
    book.explore(draw, **({"settings": SETTINGS} | words | change))


def test_each_setting_has_its_button_and_its_own_described_picture(shown: list[Any]) -> None:
    explore()
    data, more = shown[0]
    page = BeautifulSoup(data["text/html"], "html.parser")
    assert [label.text for label in page.find_all("label")] == ["8", "<64>"]
    assert page.legend is not None
    assert page.legend.text == "L0"
    pictures = page.find_all("img")
    assert [str(one["alt"])[:27] for one in pictures] == [
        "A straight line rises to 1 ", "A straight line rises to 2 "
    ]  # fmt: skip
    drawings = [base64.b64decode(str(one["src"]).partition(",")[2]) for one in pictures]
    assert b"<svg" in drawings[0]
    assert drawings[0] != drawings[1]
    assert [one["id"] for one in page.find_all("input")] == ["fig-lines-set-1", "fig-lines-set-2"]
    assert "script" not in data["text/html"]
    assert more["metadata"][FIGURE_KEY]["alt"] == data["text/plain"]
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert pyplot.get_fignums() == []


def test_it_is_the_same_at_every_run(shown: list[Any]) -> None:
    with pyplot.rc_context():
        book.figures.use_house_style()
        explore()
        explore()
    assert shown[0] == shown[1]


def test_a_drawing_of_very_many_points_is_a_png(shown: list[Any]) -> None:
    def dense(points: int) -> tuple[Any, str]:
        figure, axes = pyplot.subplots()
        axes.scatter(range(points), range(points), c=range(points))
        return figure, "Very many dots lie on the diagonal of the square."

    book.explore(
        dense, {"few": 3, "many": 4000}, quantity="dots", caption="Dots on a line.", name="fig-dots"
    )
    page = BeautifulSoup(shown[0][0]["text/html"], "html.parser")
    kinds = [str(one["src"])[:15] for one in page.find_all("img")]
    assert kinds == ["data:image/svg+", "data:image/png;"]


def test_live_the_slider_draws_the_chosen_picture(shown: list[Any]) -> None:
    explore(live=True)
    slider, picture, caption = shown[0][0].children
    assert caption.value == "Lines of two slopes."
    before = picture.value
    assert "rises to 1 " in before
    slider.value = "<64>"
    assert "rises to 2 " in picture.value
    slider.value = "8"
    assert "rises to 1 " in picture.value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"settings": {"8": 1.0}}, "expected 2 to 12 settings to step through, found 1"),
        ({"quantity": " "}, "expected quantity as a word"),
        ({"caption": "Short."}, "expected caption as a sentence"),
        ({"name": "Fig 1"}, "expected a name in kebab-case"),
        ({"name": "Fig 1", "live": True}, "expected a name in kebab-case"),
    ],
)
def test_refusals(shown: list[Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        explore(**change)
    assert shown == []
    pyplot.close("all")

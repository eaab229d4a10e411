"""The token view: escaped, labelled, legible, and switched without a script."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup

from darkmatter import book
from darkmatter._refusal import Refusal
from darkmatter.book.figures import FIGURE_KEY

WORDS = {
    "alt": "A short text; the tag is marked most at both widths.",
    "caption": "A text with the error of every token.",
    "name": "fig-text",
    "unit": "a.u.",
    "quantity": "error norm",
}
TOKENS = ["def", " <b>", "&amp;", "\n", '"x"']
VALUES = {"width 512": [1.0, 4.0, 2.0, math.nan, 3.0], "width <1024>": [1.0, 2.0, 1.5, 1.0, 1.2]}


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, str], dict[str, Any]]]:
    displayed: list[tuple[dict[str, str], dict[str, Any]]] = []
    monkeypatch.setattr(
        "IPython.display.display",
        lambda data, raw, metadata: displayed.append((data, metadata)),
    )
    return displayed


def page(shown: Any) -> BeautifulSoup:
    book.token_view(TOKENS, VALUES, **WORDS)
    return BeautifulSoup(shown[-1][0]["text/html"], "html.parser")


def test_every_set_shows_the_whole_text_escaped_with_its_values(shown: Any) -> None:
    panels = page(shown).select(".token-panel")
    assert [panel["aria-label"] for panel in panels] == list(VALUES)
    for panel, values in zip(panels, VALUES.values(), strict=True):
        spans = panel.select(".token-text span")
        assert [span.text for span in spans] == ["def", " <b>", "&amp;", "↵\n", '"x"']
        told = ["not measured" if math.isnan(one) else f"{one:.3g} a.u." for one in values]
        assert [span["title"] for span in spans] == told
    # One scale, 1 to 4, for both sets: 2 is a third of the way.
    first = [span["class"][0] for span in panels[0].select("span")]
    assert first == ["token-0", "token-9", "token-3", "token-absent", "token-6"]
    assert panels[1].select("span")[1]["class"] == ["token-3"]
    assert "<b> 4, " in panels[0].select_one(".token-largest").text


def test_it_is_switched_by_labelled_radio_buttons_and_style_alone(shown: Any) -> None:
    soup = page(shown)
    buttons = soup.select("fieldset > input")
    assert [button["type"] for button in buttons] == ["radio", "radio"]
    assert len({button["name"] for button in buttons}) == 1
    assert [button.has_attr("checked") for button in buttons] == [True, False]
    labels = {label["for"]: label.text for label in soup.select("fieldset > label")}
    assert [labels[button["id"]] for button in buttons] == list(VALUES)
    # The panel of a button is a later child of the same parent, and the rule that shows it is
    # for exactly this pair.
    style = soup.select_one("style").text
    for button in buttons:
        panel = soup.select_one(f"fieldset > #{button['id']}-panel")
        assert f"#{button['id']}:checked~#{panel['id']}" in style
        assert panel in button.find_next_siblings()
    assert ".token-panel{display:none}" in style
    assert soup.find("legend").text == "error norm (a.u.)"
    assert not soup.find_all(["script", "img", "link", "iframe"])
    assert "url(" not in style
    assert "@import" not in style


def test_ids_are_unique_and_of_the_name(shown: Any) -> None:
    soup = page(shown)
    book.token_view(TOKENS, VALUES, **{**WORDS, "name": "fig-other"})
    other = BeautifulSoup(shown[-1][0]["text/html"], "html.parser")
    ids = [tag["id"] for one in (soup, other) for tag in one.find_all(id=True)]
    assert len(set(ids)) == len(ids)
    # The label of the figure in the book is the name itself.
    assert "fig-text" not in ids
    assert {button["name"] for button in soup.find_all("input")}.isdisjoint(
        button["name"] for button in other.find_all("input")
    )
    described = soup.fieldset["aria-describedby"]
    assert soup.find(id=described).text == WORDS["alt"]


def test_it_travels_as_a_figure_does_with_a_plain_fallback(shown: Any) -> None:
    book.token_view(TOKENS, VALUES, **WORDS)
    data, metadata = shown[0]
    assert metadata[FIGURE_KEY] == {key: WORDS[key] for key in ("alt", "caption", "name")}
    lines = data["text/plain"].split("\n")
    assert lines[0] == WORDS["alt"]
    assert lines[1:3] == ["def <b>&amp;", '"x"']
    assert lines[3] == 'width 512: largest error norm (a.u.): <b> 4, "x" 3, &amp; 2, def 1'
    book.token_view(TOKENS, VALUES, **WORDS)
    assert shown[0] == shown[1]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_any_array_and_one_value_for_all(shown: Any, kind: Any) -> None:
    book.token_view(["a", "b"], {"all": kind([2.0, 2.0])}, **WORDS)
    soup = BeautifulSoup(shown[0][0]["text/html"], "html.parser")
    assert [span["class"] for span in soup.select(".token-text span")] == [["token-0"]] * 2


@pytest.mark.parametrize(
    ("tokens", "values", "message"),
    [
        ([], {"a": []}, "1 to 2000 tokens as a list of strings, found 0"),
        ("text", {"a": [1.0] * 4}, "found one string"),
        (["a"] * 2001, {"a": [1.0] * 2001}, "found 2001"),
        (["a"], {}, "1 to 8 sets of values, found 0"),
        (["a"], {str(n): [1.0] for n in range(9)}, "found 9"),
        (["a", "b"], {"w": [1.0]}, "one value of 'w' for each of the 2 tokens, found 1"),
        (["a"], {"w": [[1.0]]}, "pass a flat list"),
        (["a", "b"], {"w": [1.0, math.inf]}, "found infinity at token 1"),
        (["a"], {"w": [math.nan]}, "found only NaN"),
    ],
)
def test_refuses(shown: Any, tokens: Any, values: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        book.token_view(tokens, values, **WORDS)
    assert shown == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alt": "a text"}, "expected alt as a sentence"),
        ({"caption": ""}, "expected caption as a sentence"),
        ({"name": "Text 1"}, "kebab-case"),
        ({"unit": " "}, "expected unit as a word"),
        ({"quantity": ""}, "expected quantity as a word"),
    ],
)
def test_refuses_words(shown: Any, change: dict[str, str], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        book.token_view(TOKENS, VALUES, **(WORDS | change))
    assert shown == []

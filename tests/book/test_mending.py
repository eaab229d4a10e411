"""What the pages get beside Sphinx's work: frames, editions in Colab, lines that break."""

from __future__ import annotations

import pytest
from bs4 import BeautifulSoup, Tag

from darkmatter.book.mending import mended

COLAB = "https://colab.research.google.com/github/a/b/blob/main/book/"
LAUNCH = f"""<ul><li><a href="{COLAB}02_width.ipynb" title="Launch on Colab"
>
<span class="btn__text-container">Colab</span>
</a>
</li></ul>
"""
CARD = """<div class="pst-scrollable-table-container"><table class="table">
<thead><tr class="row-odd"><th class="head"><p>You will learn</p></th></tr></thead>
<tbody><tr><td><p>much</p></td></tr></tbody>
</table>
</div>
<p>after</p>
"""


def soup(text: str, points: dict[str, float] | None = None) -> BeautifulSoup:
    return BeautifulSoup(mended(text, points=points), "html.parser")


def one(page: BeautifulSoup, selector: str) -> Tag:
    (found,) = page.select(selector)
    return found


def test_both_editions_are_one_click_away_below_the_card_and_in_the_menu() -> None:
    page = soup(LAUNCH + CARD)
    student, solved = f"{COLAB}student/02_width.ipynb", f"{COLAB}02_width.ipynb"
    line = one(page, "p.chapter-editions")
    assert [link["href"] for link in line.select("a")] == [student, solved]
    assert line.find_previous("table") is one(page, "table.chapter-card")
    assert line.find_next("p").text == "after"
    menu = page.select("li a")
    assert [link["href"] for link in menu] == [student, solved]
    assert [link.text.strip() for link in menu] == [
        "Colab, exercises to do",
        "Colab, with solutions",
    ]


def test_a_page_without_a_notebook_offers_none() -> None:
    assert soup(CARD).select(".chapter-editions") == []


@pytest.mark.parametrize(("width", "framed"), [(461.0, False), (792.0, True)])
def test_only_a_wide_picture_gets_a_frame(width: float, framed: bool) -> None:
    image = '<img alt="A." src="../_images/ab.svg" />'
    figure = f'<figure id="f">\n{image}\n<figcaption><p>Fig</p></figcaption></figure>'
    page = soup(figure, {"ab.svg": width})
    frames = page.select("figure > div.wide-picture > img")
    assert bool(frames) is framed
    assert len(page.select("figure img")) == 1
    if framed:
        assert one(page, ".wide-picture")["style"] == "--points: 792"


def test_answers_and_records_break_and_printed_tables_do_not() -> None:
    texts = ["Exercise 02.1 is right. So.", "recorded fvu = 0.2", "a table  0.2", "Exercise one"]
    page = soup("".join(f"<pre><span></span>{text}\n</pre>" for text in texts))
    assert [pre.get("class") == ["sentences"] for pre in page.select("pre")] == [
        True, True, False, False,
    ]  # fmt: skip

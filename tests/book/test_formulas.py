"""TeX as MathML: what a formula becomes, and what is refused."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book.colab import formulas_of
from darkmatter.book.formulas import mathml
from darkmatter.book.notebooks import read_notebook
from darkmatter.book.paths import open_book

BOOK = open_book(Path(__file__).parents[2])
NAME = "{http://www.w3.org/1998/Math/MathML}"


def tree(tex: str, display: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(mathml(tex, display))


def test_a_fraction_and_a_display() -> None:
    root = tree(r"\frac{a}{b}", display=True)
    assert root.get("display") == "block"
    assert [one.text for one in root.iter() if one.text] == ["a", "b"]
    assert tree("a").get("display") is None


def test_an_index_of_an_accented_letter_stands_beside_it() -> None:
    (index,) = tree(r"\hat x_t")
    assert index.tag == f"{NAME}msub"
    accented, letter = index
    assert accented.tag == f"{NAME}mover"
    assert [one.text for one in accented] == ["x", "ˆ"]
    assert letter.text == "t"


@pytest.mark.parametrize(
    ("tex", "same"),
    [
        (r"-\tfrac12", r"-\tfrac{1}{2}"),
        (r"\tfrac\lambda2", r"\tfrac{\lambda}{2}"),
        (r"\frac1M", r"\frac{1}{M}"),
        (r"p \,\Big\|\, q", r"p \,\|\, q"),
        (r"e_1, \dots, e_5", r"e_1, \ldots, e_5"),
    ],
)
def test_short_forms_are_those_of_the_long_ones(tex: str, same: str) -> None:
    assert mathml(tex) == mathml(same)


def test_named_characters_are_written_out() -> None:
    assert "&" not in mathml(r"\ln m")
    assert tree(r"a < b \;\&\; c") is not None


@pytest.mark.parametrize("tex", [r"\\bar t", r"\nonsense x", r"\frac{a}"])
def test_what_cannot_be_read_is_refused(tex: str) -> None:
    with pytest.raises(Refusal, match="formula that can be written as MathML"):
        mathml(tex)


@pytest.mark.parametrize("path", BOOK.chapters(), ids=lambda path: path.stem[:2])
def test_every_formula_of_the_book_can_be_written(path: Path) -> None:
    for cell in read_notebook(path).cells:
        if cell.cell_type == "markdown":
            for tex in formulas_of(cell.source):
                ElementTree.fromstring(mathml(tex))


def test_every_formula_of_the_pages_can_be_written() -> None:
    for page in BOOK.source.rglob("*.md"):
        for tex in formulas_of(page.read_text(encoding="utf-8")):
            ElementTree.fromstring(mathml(tex))

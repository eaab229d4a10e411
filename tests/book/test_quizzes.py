"""The quiz bank: refused when a piece is missing, dealt alike at every build, all ids real."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from darkmatter._refusal import Refusal
from darkmatter.book import quizzes
from darkmatter.book.lint import lint
from darkmatter.book.paths import Book, chapter_of, open_book
from darkmatter.book.staging import stage

ROOT = Path(__file__).parents[2]
WRONG = [{"option": f"Wrong {n}.", "because": f"Reason {n}."} for n in (1, 2, 3)]
QUESTION = {"ask": "Why [[mini-fvu]]?", "right": "Right.", "because": "It is.", "wrong": WRONG}


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def bank(**changes: object) -> dict[str, list[dict[str, object]]]:
    """Three questions for chapter 99, the first with changes."""
    return {"99": [{**QUESTION, **changes}, QUESTION, QUESTION]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected chapters"),
        ({"99": [QUESTION] * 2}, "3 to 5 questions"),
        ({"99": [QUESTION] * 6}, "3 to 5 questions"),
        ({"99": ["why?"] * 3}, "question 99.1: expected ask"),
        (bank(wrong=WRONG[:1]), "two or three wrong options"),
        (bank(wrong=[*WRONG, WRONG[0]]), "two or three wrong options"),
        (bank(wrong=[{"option": "Wrong."}, WRONG[0]]), "a text under because"),
        (bank(wrong=[WRONG[0], WRONG[0]]), "found two alike"),
        (bank(because=" "), "a text under because"),
        (bank(ask=None), "a text under ask"),
        (bank(hint="x"), "found 'hint' too"),
    ],
)
def test_a_bank_that_lacks_something_is_refused(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        quizzes.load_quizzes(write(tmp_path / "q.yml", content))


def test_problems_name_the_question(tmp_path: Path) -> None:
    content = bank(ask="Why [[ghost]], 0.5 of exercise 99.9?")
    loaded = quizzes.load_quizzes(write(tmp_path / "q.yml", content))
    assert quizzes.problems(loaded, {"98"}, {"mini-fvu"}, {"99.1"}) == []
    assert quizzes.problems(loaded, {"99"}, {"mini-fvu"}, {"99.1"}) == [
        "quizzes.yml: question 99.1: '0.5' is typed by hand",
        "quizzes.yml: question 99.1: no claim ghost",
        "quizzes.yml: question 99.1: no exercise 99.9",
    ]


def test_every_option_is_on_the_page_with_its_reason(tmp_path: Path) -> None:
    loaded = quizzes.load_quizzes(write(tmp_path / "q.yml", bank()))
    page = quizzes.quiz_page(loaded, {"99": "99_mini.ipynb"})
    assert page == quizzes.quiz_page(loaded, {"99": "99_mini.ipynb"})
    assert "Why" not in quizzes.quiz_page(loaded, {"98": "98_mini.ipynb"})
    assert "[Read chapter 99](../99_mini.ipynb)" in page
    for text in ("Right.", "Wrong 1.", "Wrong 2.", "Wrong 3."):
        assert len(re.findall(rf"^- \([abcd]\) {text}$", page, re.MULTILINE)) == 3
    folded = page.split("<details>")[1].split("</details>")[0]
    asked = page.split("<details>")[0]
    (right,) = re.findall(r"\*\*\(([abcd])\) is right\.\*\* It is\.", folded)
    assert f"- ({right}) Right." in asked
    for letter, number in re.findall(r"\*\*\(([abcd])\) is wrong\.\*\* Reason (\d)", folded):
        assert f"- ({letter}) Wrong {number}." in asked


def test_the_page_is_staged_filled_and_linted(executed_book: Book) -> None:
    path = executed_book.source / quizzes.SOURCE
    write(path, bank())
    page = (stage(executed_book) / quizzes.PAGE).read_text()
    assert "Why 0.311 (0.305 to 0.317)?" in page
    assert not (executed_book.executed / quizzes.SOURCE).exists()
    write(path, bank(ask="Why [[ghost]]?"))
    assert "quizzes.yml: question 99.1: no claim ghost" in lint(executed_book)
    with pytest.raises(Refusal, match=r"quizzes.yml: .* found \[\[ghost\]\]"):
        stage(executed_book)


def test_every_chapter_of_the_book_has_questions() -> None:
    book = open_book(ROOT)
    bank = quizzes.load_quizzes(book.source / quizzes.SOURCE)
    assert set(bank) >= {chapter_of(path) for path in book.chapters()}


def test_the_books_answers_cannot_be_guessed_from_their_place_or_length() -> None:
    bank = quizzes.load_quizzes(open_book(ROOT).source / quizzes.SOURCE)
    questions = [question for chapter in bank.values() for question in chapter]
    places = Counter([option.right for option in one.dealt].index(True) for one in questions)
    # Four places: each within a factor of two of its share.
    assert all(len(questions) / 8 < places[place] < len(questions) / 2 for place in range(4))
    longest = sum(max(one.options, key=lambda option: len(option.text)).right for one in questions)
    assert longest < 0.6 * len(questions)

"""Exercises: right, empty and wrong answers are told apart."""

from __future__ import annotations

import pytest

from darkmatter import book
from darkmatter._refusal import Refusal
from darkmatter.book import exercises


def empty(x: float) -> float:
    raise NotImplementedError("Write your answer here.")


@pytest.mark.usefixtures("checks_99")
def test_a_right_answer_prints_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    book.check("99.1", lambda x: x + x)
    assert capsys.readouterr().out == "Exercise 99.1 is right. Doubling is adding.\n"


@pytest.mark.usefixtures("checks_99")
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (empty, "still empty: replace the line"),
        (None, "still empty: give your answer"),
        (..., "still empty: give your answer"),
        (lambda x: x * x, "99.1: That is the square"),
        (lambda x: x, "99.1: Twice three is six"),
        (lambda x: x + "a", "your code stopped with TypeError"),
        (7, "your code stopped with TypeError"),
    ],
)
def test_an_empty_or_wrong_answer_is_not_yet(answer: object, message: str) -> None:
    with pytest.raises(book.NotYet, match=message) as told:
        book.check("99.1", answer)
    assert told.value._render_traceback_() == [f"Not yet. {told.value}"]


@pytest.mark.usefixtures("checks_99")
def test_unknown_exercises_are_refused() -> None:
    with pytest.raises(Refusal, match=r"\(99.1, 99.2, 99.3\), found '99.9'"):
        book.check("99.9", empty)
    with pytest.raises(Refusal, match="it has none"):
        book.check("98.1", empty)


@pytest.mark.parametrize(
    "wrong",
    [
        {"id": "1.1"},
        {"difficulty": 0},
        {"difficulty": 6},
        {"minutes": 0},
        {"teaches": " "},
    ],
)
def test_a_registration_that_says_too_little_is_refused(wrong: dict[str, object]) -> None:
    fields: dict[str, object] = {"id": "99.1", "difficulty": 1, "minutes": 5, "teaches": "It."}
    fields |= wrong
    with pytest.raises(Refusal):
        exercises.exercise(fields.pop("id"), **fields)  # type: ignore[arg-type]

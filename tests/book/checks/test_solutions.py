"""Every exercise of every chapter: the notebook's solution passes, the student's stub is empty."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from darkmatter import book
from tests.book.checks import common

answers = cache(common.answers)
EXERCISES = [
    pytest.param(chapter, exercise, name, id=exercise)
    for chapter in common.CHAPTERS.values()
    for exercise, name in common.exercises(chapter).items()
]


def defined(chapter: Path, name: str, empty: bool) -> Any:
    return answers(chapter, empty=empty)[name]


@pytest.mark.parametrize("chapter", common.CHAPTERS)
def test_two_typical_wrong_answers_of_each_exercise_are_proven_refused(chapter: str) -> None:
    # That each chapter has 3 to 6 exercises, one of them a lie, is a rule of the lint.
    proven = common.messages_proven(Path(__file__).with_name(f"test_chapter_{chapter}.py"))
    asked = common.exercises(common.CHAPTERS[chapter])
    assert {id: len(proven.get(id, ())) >= 2 for id in asked} == dict.fromkeys(asked, True)


def test_what_counts_as_a_proof(tmp_path: Path) -> None:
    module = tmp_path / "test_chapter_99.py"
    module.write_text(
        "MISTAKES = [('99.1', lambda x: (x, 'not said'), 'one'), ('99.1', 2, 'two')]\n"
        "@pytest.mark.parametrize(('answer', 'message'), [(f, 'three'), ((1, 'no'), 'four')])\n"
        "def test_a(answer, message):\n    refused('99.2', answer, message)\n"
        "def test_b():\n    refused('99.3', f, 'five')\n    refused('99.3', g, 'five')\n"
    )
    assert common.messages_proven(module) == {
        "99.1": {"one", "two"},
        "99.2": {"three", "four"},
        "99.3": {"five"},
    }


@pytest.mark.parametrize(("chapter", "exercise", "name"), EXERCISES)
def test_solution_passes(
    chapter: Path, exercise: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    book.check(exercise, defined(chapter, name, empty=False))
    assert f"Exercise {exercise} is right." in capsys.readouterr().out


@pytest.mark.parametrize(("chapter", "exercise", "name"), EXERCISES)
def test_stub_is_empty(chapter: Path, exercise: str, name: str) -> None:
    with pytest.raises(book.NotYet, match=f"Exercise {exercise} is still empty"):
        book.check(exercise, defined(chapter, name, empty=True))

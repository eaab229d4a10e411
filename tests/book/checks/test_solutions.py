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


def test_every_chapter_has_exercises() -> None:
    few = [nn for nn, path in common.CHAPTERS.items() if len(common.exercises(path)) < 3]
    assert few == []


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

"""Exercises: the checks of a chapter, and what a student is told.

The checks of chapter 02 stand in `darkmatter/book/checks/chapter_02.py` as functions marked with
`@exercise("02.1", ...)`. A check takes the student's answer and asserts; the message of a failed
assert names the likely mistake.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from darkmatter._refusal import Refusal

Check = Callable[[Any], "str | None"]
_ID = re.compile(r"(\d\d)\.\d+")
_MARK = "__darkmatter_exercise__"


class NotYet(AssertionError):
    """The answer is empty or wrong; the message says what is wrong and what the mistake may be."""

    def _render_traceback_(self) -> list[str]:
        # A student needs the sentence, not the frames of the check.
        return [f"Not yet. {self}"]


@dataclass(frozen=True)
class Exercise:
    """One exercise: its id, what it asks of the student, and its check."""

    id: str
    difficulty: int
    minutes: int
    teaches: str
    check: Check


def exercise(id: str, *, difficulty: int, minutes: int, teaches: str) -> Callable[[Check], Check]:
    """Mark a function as the check of an exercise.

    `difficulty` runs from 1 to 5, `minutes` is the time it should take, `teaches` one line.
    """
    if not _ID.fullmatch(id):
        raise Refusal(f"expected an exercise id such as '02.1', found {id!r}; rename it")
    if difficulty not in range(1, 6) or minutes < 1 or not teaches.strip():
        raise Refusal(
            f"exercise {id}: expected a difficulty from 1 to 5, at least one minute and what it "
            f"teaches, found {difficulty}, {minutes} and {teaches!r}; correct them"
        )

    def mark(check: Check) -> Check:
        setattr(check, _MARK, Exercise(id, difficulty, minutes, teaches, check))
        return check

    return mark


def exercises_of(chapter: str) -> dict[str, Exercise]:
    """The exercises of a chapter by id; empty where it has none."""
    name = f"darkmatter.book.checks.chapter_{chapter}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return {}
    return exercises_in(module)


def exercises_in(module: ModuleType) -> dict[str, Exercise]:
    """The exercises whose checks a module defines, by id."""
    found: dict[str, Exercise] = {}
    for value in vars(module).values():
        marked = getattr(value, _MARK, None)
        if isinstance(marked, Exercise):
            if marked.id in found:
                raise Refusal(
                    f"expected one check of exercise {marked.id} in {module.__name__}, found two; "
                    "rename one"
                )
            found[marked.id] = marked
    return dict(sorted(found.items()))


def check(id: str, answer: object) -> None:
    """Check the answer to an exercise and print one line when it is right.

    Raises `NotYet` when the answer is empty, fails, or is wrong; `Refusal` for an id that does not
    exist.
    """
    known = exercises_of(id[:2])
    if id not in known:
        raise Refusal(
            f"expected an exercise of chapter {id[:2]} "
            f"({', '.join(known) or 'it has none'}), found {id!r}; correct the id"
        )
    print(run(known[id], answer))


def run(exercise: Exercise, answer: object) -> str:
    """Run one check on one answer: the line for the student, or `NotYet`."""
    if answer is None or answer is ...:
        raise NotYet(f"Exercise {exercise.id} is still empty: give your answer, then check again.")
    try:
        praise = exercise.check(answer)
    except NotImplementedError as error:
        raise NotYet(
            f"Exercise {exercise.id} is still empty: replace the line that raises "
            "NotImplementedError, run that cell, then check again."
        ) from error
    except NotYet as error:
        raise NotYet(f"Exercise {exercise.id}: {error}") from error.__cause__
    except AssertionError as error:
        message = str(error) or "the result is not the expected one"
        raise NotYet(f"Exercise {exercise.id}: {message}") from error
    except Exception as error:
        # Whatever the student's code raises is an answer that does not work yet.
        raise NotYet(
            f"Exercise {exercise.id}: your code stopped with {type(error).__name__}: {error}"
        ) from error
    return f"Exercise {exercise.id} is right. {praise or exercise.teaches}"

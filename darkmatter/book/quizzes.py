"""The quiz bank: book/instructor/quizzes.yml as checked data, and as a page with folded answers.

A question has one right option and two or three wrong ones, each with its reason. The file names
the right one first; the page deals the options by a hash of the question, so that neither their
order nor that of the file tells, and every build deals alike.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkmatter._refusal import Refusal
from darkmatter.book.prose import fill, typed_numbers
from darkmatter.book.yamlfiles import read_yaml, shown

SOURCE = Path("instructor", "quizzes.yml")
PAGE = Path("instructor", "quizzes.md")
LEAST, MOST = 3, 5
_LETTERS = "abcd"
_EXERCISE = re.compile(r"\b[Ee]xercise (\d\d\.\d+)")


@dataclass(frozen=True)
class Option:
    """One answer that a student may choose, and why it is right or wrong."""

    text: str
    because: str
    right: bool


@dataclass(frozen=True)
class Question:
    """A question of a chapter and its options, the right one first."""

    chapter: str
    ask: str
    options: tuple[Option, ...]

    @property
    def dealt(self) -> list[Option]:
        """The options in the order of the page."""
        return sorted(
            self.options,
            key=lambda option: hashlib.sha256(f"{self.ask}\n{option.text}".encode()).digest(),
        )

    @property
    def texts(self) -> Iterator[str]:
        yield self.ask
        for option in self.options:
            yield from (option.text, option.because)


def load_quizzes(path: Path) -> dict[str, list[Question]]:
    """The questions of each chapter, read from quizzes.yml.

    Raises `Refusal` where a chapter has not three to five questions, a question has not two or
    three wrong options, two options are equal, or something lacks its text or its reason.
    """
    content = read_yaml(path, "chapters with lists of questions")
    if not isinstance(content, dict):
        raise Refusal(f"expected chapters with lists of questions in {path}, found none; add them")
    quizzes: dict[str, list[Question]] = {}
    for chapter, entries in content.items():  # pyright: ignore[reportUnknownVariableType] - checked below
        if not isinstance(entries, list) or not LEAST <= len(entries) <= MOST:  # pyright: ignore[reportUnknownArgumentType] - checked here
            raise Refusal(
                f"expected a list of {LEAST} to {MOST} questions for chapter {shown(chapter)} in "
                f"{path.name}; add or remove some"
            )
        quizzes[str(chapter)] = [  # pyright: ignore[reportUnknownArgumentType] - a key of YAML
            _question(str(chapter), number, entry)  # pyright: ignore[reportUnknownArgumentType] - a key of YAML
            for number, entry in enumerate(entries, start=1)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] - entries are checked by _question
        ]
    return quizzes


def problems(
    quizzes: Mapping[str, list[Question]],
    chapters: set[str],
    claims: set[str],
    exercises: set[str],
) -> list[str]:
    """What is wrong with the bank as a part of the book.

    A claim or an exercise that does not exist, and numbers that were typed by hand. Questions of a
    chapter that is not written yet wait.
    """
    found: list[str] = []
    for chapter in chapters & set(quizzes):
        questions = quizzes[chapter]
        for number, question in enumerate(questions, start=1):
            where = f"{SOURCE.name}: question {question.chapter}.{number}"
            for text in question.texts:
                named: list[str] = []
                fill(text, lambda id, form, named=named: named.append(id) or "", static=True)
                found += [f"{where}: no claim {id}" for id in named if id not in claims]
                found += [f"{where}: {typed!r} is typed by hand" for typed in typed_numbers(text)]
                found += [
                    f"{where}: no exercise {id}"
                    for id in _EXERCISE.findall(text)
                    if id not in exercises
                ]
    return sorted(found)


def quiz_page(quizzes: Mapping[str, list[Question]], files: Mapping[str, str]) -> str:
    """The page of all questions; `files` maps chapters to the names of their notebooks.

    Numbers stay as `[[id]]`, for `pages.fill_page`.
    """
    lines = [
        "# Quizzes",
        "",
        "Questions on what each chapter shows, for a break in class or after reading alone. Choose "
        "before you unfold: each fold tells why the right answer is right, and what is wrong with "
        "each of the others. They are made from one file, `book/instructor/quizzes.yml`.",
    ]
    for chapter in sorted(set(quizzes) & set(files)):
        questions = quizzes[chapter]
        lines += ["", f"## Chapter {chapter}", "", f"[Read chapter {chapter}](../{files[chapter]})"]
        for number, question in enumerate(questions, start=1):
            lines += ["", *rendered(number, question)]
    return "\n".join(lines) + "\n"


def rendered(number: int, question: Question) -> Iterator[str]:
    """The lines of a question: what is asked, its options as dealt, the answers folded."""
    yield f"**Question {number}.** {question.ask}"
    yield ""
    dealt = list(zip(_LETTERS, question.dealt, strict=False))
    for letter, option in dealt:
        yield f"- ({letter}) {option.text}"
    yield ""
    yield "<details><summary>Answer</summary>"
    yield ""
    for letter, option in sorted(dealt, key=lambda pair: not pair[1].right):
        verdict = "is right." if option.right else "is wrong."
        yield f"- **({letter}) {verdict}** {option.because}"
    yield ""
    yield "</details>"


def _question(chapter: str, number: int, entry: Any) -> Question:
    where = f"question {chapter}.{number}"
    if not isinstance(entry, dict):
        raise Refusal(
            f"{where}: expected ask, right, because and wrong, found {shown(entry)}; add them"
        )
    given: dict[str, Any] = {str(key): value for key, value in entry.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType] - YAML
    if unknown := sorted(set(given) - {"ask", "right", "because", "wrong"}):
        raise Refusal(
            f"{where}: expected ask, right, because and wrong, found {shown(unknown[0])} too"
        )
    wrong: Any = given.get("wrong")
    if not isinstance(wrong, list) or not 2 <= len(wrong) <= len(_LETTERS) - 1:  # pyright: ignore[reportUnknownArgumentType] - checked here
        raise Refusal(f"{where}: expected two or three wrong options; add or remove some")
    options = [Option(_text(given, "right", where), _text(given, "because", where), True)]
    for one in wrong:  # pyright: ignore[reportUnknownVariableType] - checked by _text
        options.append(Option(_text(one, "option", where), _text(one, "because", where), False))
    if len({option.text for option in options}) < len(options):
        raise Refusal(f"{where}: expected different options, found two alike; change one")
    return Question(chapter, _text(given, "ask", where), tuple(options))


def _text(given: Any, key: str, where: str) -> str:
    value: Any = given.get(key) if isinstance(given, dict) else None  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] - YAML
    if not isinstance(value, str) or not value.strip():
        raise Refusal(f"{where}: expected a text under {key}, found {shown(value)}; write one")
    return value.strip()

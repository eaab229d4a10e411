"""The instructor's guide: every exercise, chapter, minute and command it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from darkmatter.book.exercises import exercises_of
from darkmatter.book.notebooks import read_notebook
from darkmatter.book.paths import chapter_of, open_book

ROOT = Path(__file__).parents[2]
BOOK = open_book(ROOT)
GUIDE = (BOOK.source / "instructor" / "guide.md").read_text(encoding="utf-8")
CHAPTERS = {chapter_of(path) or "": path for path in BOOK.chapters()}


def section(title: str) -> str:
    return GUIDE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-")]


def test_every_exercise_named_exists() -> None:
    named = set(re.findall(r"exercise (\d\d\.\d+)", GUIDE))
    known = {id for chapter in {id[:2] for id in named} for id in exercises_of(chapter)}
    assert len(named) > 20
    assert named <= known, named - known


def test_every_chapter_meets_a_misconception_with_an_exercise() -> None:
    met = [row[2] for row in rows(section("Misconceptions, and what meets them"))[1:]]
    assert all(re.fullmatch(r"exercise \d\d\.\d", cell) for cell in met)
    assert {cell.removeprefix("exercise ")[:2] for cell in met} >= set(CHAPTERS)


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_outcomes_and_minutes_are_those_of_the_chapter(chapter: str) -> None:
    (row,) = [row for row in rows(section("After each chapter")) if row[0] == chapter]
    card = read_notebook(CHAPTERS[chapter]).cells[0].source.splitlines()
    minutes = [line for line in card if line.startswith("|")][2].strip("|").split("|")[2]
    (reading, *_) = re.findall(r"\d+", minutes)
    exercises = sum(one.minutes for one in exercises_of(chapter).values())
    assert row[2:] == [reading, str(exercises)]
    assert len(row[1].split()) >= 8


def test_three_plans_and_their_minutes() -> None:
    plans = section("Three plans").split("\n### ")[1:]
    assert len(plans) == 3
    assert sum(int(row[0]) for row in rows(plans[0])[1:]) == 90
    assert [row[0] for row in rows(plans[2])[1:]] == [str(week) for week in range(1, 9)]


def test_every_command_is_in_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)`", GUIDE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_projects_have_hours_and_a_machine() -> None:
    projects = rows(section("Projects on real models"))[1:]
    assert len(projects) >= 8
    for name, chapters, hours, machine in projects:
        assert hours.isdigit(), name
        assert re.search(r"laptop|GPU", machine), name
        assert chapters == "any" or set(chapters.split(", ")) <= set(CHAPTERS), name

"""The workflows: readable, every command there, write access only where it is needed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS: dict[str, dict[Any, Any]] = {
    path.stem: yaml.safe_load(path.read_text()) for path in FILES
}
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def steps(name: str) -> list[dict[str, Any]]:
    return [step for job in WORKFLOWS[name]["jobs"].values() for step in job["steps"]]


def events(name: str) -> dict[str, Any]:
    # YAML reads the key `on` as the truth value.
    return WORKFLOWS[name][True]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_every_command_is_there(name: str) -> None:
    for step in steps(name):
        for command in step.get("run", "").splitlines():
            if match := re.match(r"\s*make ([a-z -]+)", command):
                for target in match[1].split():
                    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
            elif match := re.match(r"\s*(\.[a-z]+/[\w-]+)", command):
                assert os.access(ROOT / match[1], os.X_OK), match[1]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_actions_name_a_version_and_jobs_end(name: str) -> None:
    for step in steps(name):
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step["uses"]
    for job in WORKFLOWS[name]["jobs"].values():
        assert "timeout-minutes" in job or "environment" in job


def test_the_book_is_tested_on_push_and_published_from_main_alone() -> None:
    jobs = WORKFLOWS["book"]["jobs"]
    assert {"push", "pull_request"} <= set(events("book"))
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert WORKFLOWS["book"]["permissions"] == {"contents": "read"}
    assert jobs["publish"]["needs"] == "test"
    assert "refs/heads/main" in jobs["publish"]["if"]
    assert jobs["publish"]["permissions"] == {"pages": "write", "id-token": "write"}


def test_links_colab_and_suites_are_checked_every_week_and_a_failure_opens_an_issue() -> None:
    (schedule,) = events("weekly")["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])
    checks = {"links": "linkcheck", "colab": "colab-check", "suites": "suites-check"}
    for job, target in checks.items():
        of_job = WORKFLOWS["weekly"]["jobs"][job]["steps"]
        assert any(f"make {target}" in step.get("run", "") for step in of_job)
        (issue,) = [step for step in of_job if "open-issue" in step.get("run", "")]
        assert issue["if"] == "failure()"

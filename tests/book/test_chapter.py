"""What a chapter calls, without a kernel: seeding, recording, saying."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from darkmatter import book
from darkmatter._refusal import Refusal
from darkmatter.book.claims import RECORD_MIME, START_MIME, load_claims
from tests.book.minibook import CLAIMS

Shown = list[dict[str, Any]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Shown:
    """What would be displayed; claims.yml of the mini book is found through the environment."""
    (tmp_path / "claims.yml").write_text(CLAIMS)
    monkeypatch.setenv("DARKMATTER_BOOK", str(tmp_path))
    displayed: Shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, **_: displayed.append(data))
    return displayed


def test_start_seeds_all_three_generators_and_stamps_versions(shown: Shown) -> None:
    drawn: list[tuple[float, float, float]] = []
    for seed in (0, 0, 1):
        book.start("99", suite="pydocs", seed=seed)
        # The global state is what start promises to set.
        drawn.append((torch.rand(()).item(), np.random.rand(), random.random()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert all(a != b for a, b in zip(drawn[1], drawn[2], strict=True))
    stamp = shown[0][START_MIME]
    assert stamp["versions"]["torch"] == torch.__version__
    assert (stamp["chapter"], stamp["suite"], stamp["seed"]) == ("99", "pydocs", 0)


def test_start_refuses_an_unknown_chapter_and_a_seed_that_is_none(shown: Shown) -> None:
    with pytest.raises(Refusal, match="found '98'"):
        book.start("98", suite="pydocs", seed=0)
    for seed in (-1, 0.5, True):
        with pytest.raises((Refusal, TypeError)):
            book.start("99", suite="pydocs", seed=seed)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        book.start("99", suite="pydocs")  # type: ignore[call-arg]


def chapter(tmp_path: Path) -> book.Chapter:
    (tmp_path / "claims.yml").write_text(CLAIMS)
    return book.Chapter("99", "pydocs", 3, load_claims(tmp_path / "claims.yml"))


def test_record_displays_value_interval_suite_and_seed(shown: Shown, tmp_path: Path) -> None:
    one = chapter(tmp_path)
    one.record("mini-fvu", torch.tensor(0.25), (0.3, 0.2, 0.4))
    assert shown == [
        {
            RECORD_MIME: {"id": "mini-fvu", "value": 0.25, "interval": (0.2, 0.4),
                          "suite": "pydocs", "seed": 3, "chapter": "99"},
            "text/plain": "recorded mini-fvu = 0.25 [0.2, 0.4]",
        }
    ]  # fmt: skip
    one.record("mini-fvu", 0.25, (0.2, 0.4))  # the same again is the same record
    with pytest.raises(Refusal, match=r"found 0\.25 and now 0\.26"):
        one.record("mini-fvu", 0.26, (0.2, 0.4))
    one.record("mini-falling", np.array([3, 2]), [(2, 4), (1, 3)])
    assert shown[-1][RECORD_MIME]["value"] == [3.0, 2.0]
    one.record("mini-shuffled", True)
    assert shown[-1][RECORD_MIME]["value"] is True
    thirds = chapter(tmp_path)
    thirds.record("mini-random", 1 / 3, (1 / 7, 2e5 / 3))
    thirds.record("mini-random", 1 / 3 + 1e-15, (1 / 7, 2e5 / 3))
    assert shown[-1][RECORD_MIME]["value"] == 0.3333333333
    assert shown[-1][RECORD_MIME]["interval"] == (0.1428571429, 66666.66667)


@pytest.mark.parametrize(
    ("id", "value", "interval", "message"),
    [
        ("ghost", 1.0, None, "claims.yml gives to chapter 99, found 'ghost'"),
        ("mini-fvu", float("nan"), None, "expected a finite number"),
        ("mini-fvu", "0.3", None, "expected a finite number"),
        ("mini-fvu", [], None, "expected a finite number"),
        ("mini-fvu", [0.1, float("inf")], None, "expected a finite number"),
        ("mini-fvu", 0.3, (0.4, 0.2), "low <= high"),
        ("mini-fvu", 0.3, 0.1, "low <= high"),
        ("mini-fvu", [0.3, 0.2], [(0.1, 0.4)], "one interval for each"),
    ],
)
def test_record_refuses(
    shown: Shown, tmp_path: Path, id: str, value: object, interval: object, message: str
) -> None:
    with pytest.raises(Refusal, match=message):
        chapter(tmp_path).record(id, value, interval)
    assert shown == []


def test_say_fills_recorded_and_published_values(shown: Shown, tmp_path: Path) -> None:
    one = chapter(tmp_path)
    one.record("mini-fvu", 0.311, (0.305, 0.317))
    one.say("Misses {mini-fvu}; {mini-fvu:%}; {mini-fvu:paper}; {mini-random:paper}.")
    assert shown[-1]["text/markdown"] == (
        "Misses 0.311 (0.305 to 0.317); 31.1 % (30.5 to 31.7); 0.313; not published."
    )
    for text, message in [
        ("{mini-random}", "recorded so far: mini-fvu"),
        ("{ghost:paper}", "found 'ghost'"),
        ("It is 0.31.", "found '0.31' typed by hand"),
    ]:
        with pytest.raises(Refusal, match=message):
            one.say(text)


def test_a_notebook_opened_alone_records_without_the_ledger(shown: Shown) -> None:
    one = book.Chapter("99", "pydocs", 0, None)
    one.record("anything", 0.5)
    one.say("{anything:plain} {anything:paper}")
    assert shown[-1]["text/markdown"] == "0.500 (in the ledger)"


def test_a_suite_without_expectations_runs_through(shown: Shown) -> None:
    chapter = book.start("99", suite="gpt2-small", seed=0)
    chapter.record("mini-fvu", 0.9)
    chapter.record("mini-fvu-width-768", 0.8)
    chapter.record("mini-random", float("nan"))
    recorded = [data[RECORD_MIME]["id"] for data in shown if RECORD_MIME in data]
    assert recorded == ["mini-fvu", "mini-fvu-width-768"]
    assert "not recorded on suite gpt2-small" in shown[-1]["text/plain"]
    written = chapter.text(
        "It is {mini-fvu:plain}, then {mini-fvu-width-512:plain} and {mini-random}."
    )
    assert written == (
        "It is 0.900, then (not measured on gpt2-small) and (not measured on gpt2-small)."
    )
    with pytest.raises(Refusal, match="expected a recorded id"):
        book.start("99", suite="pydocs", seed=0).text("It is {mini-fvu}.")

"""The reference values, and the check of an executed book: every change by hand is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from darkmatter._refusal import Refusal
from darkmatter.book import claims as ledger
from darkmatter.book import notebooks, results
from darkmatter.book.paths import Book


def change_record(book: Book, id: str, **changes: Any) -> None:
    """Edit a record in the executed notebook, as by hand."""
    path = book.executed / "99_mini.ipynb"
    notebook = notebooks.read_notebook(path)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {}).get(ledger.RECORD_MIME)
            if data is not None and data["id"] == id:
                data.update(changes)
    notebooks.write_notebook(notebook, path)


def change_reference(book: Book, change: Callable[[dict[str, Any]], None]) -> None:
    path = book.results("pydocs")
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_executed_book_agrees_with_its_reference(executed_book: Book) -> None:
    assert results.check(executed_book) == []
    assert results.check(executed_book, only="99") == []


def test_reference_is_sorted_rounded_stamped_and_stable(executed_book: Book) -> None:
    path = executed_book.results("pydocs")
    text = path.read_text()
    content = json.loads(text)
    assert list(content["records"]) == sorted(content["records"])
    assert content["records"]["mini-fvu"] == {
        "chapter": "99", "value": 0.311, "interval": [0.305, 0.317]
    }  # fmt: skip
    assert len(repr(content["records"]["mini-random"]["value"])) <= len("0.1234567")
    assert content["versions"]["torch"]
    results.update(executed_book, "pydocs")
    assert path.read_text() == text


@pytest.mark.parametrize(
    ("id", "value", "message"),
    [
        ("mini-fvu", 0.35, "over the tolerance 0.01"),
        ("mini-fvu", 0.5, "gives the verdict 'does not hold here'"),
        ("mini-shuffled", 0.4, "gives the verdict 'does not hold here'"),
        # Within the tolerance, and still found.
        ("mini-fvu", 0.3111, "records are not those of its execution"),
    ],
)
def test_a_recorded_value_changed_by_hand_is_found(
    executed_book: Book, id: str, value: float, message: str
) -> None:
    change_record(executed_book, id, value=value)
    found = results.check(executed_book)
    assert any(message in problem for problem in found), found


def test_a_reference_value_changed_by_hand_is_found(executed_book: Book) -> None:
    def change(content: dict[str, Any]) -> None:
        content["records"]["mini-fvu"]["value"] = 0.3111

    change_reference(executed_book, change)
    with pytest.raises(Refusal, match="changed by hand"):
        results.check(executed_book)


def test_another_seed_compares_verdicts_only(executed_book: Book) -> None:
    for id in ("mini-fvu", "mini-random", "mini-shuffled", "mini-falling"):
        change_record(executed_book, id, seed=1)
    change_record(executed_book, "mini-fvu", value=0.35)
    assert [one for one in results.check(executed_book) if "records are not" not in one] == []
    change_record(executed_book, "mini-fvu", value=0.5)
    assert any("verdict" in one for one in results.check(executed_book))
    with pytest.raises(Refusal, match="with seed 1; execute the book again"):
        results.update(executed_book, "pydocs")


def test_what_was_not_executed_or_is_not_there_is_refused(executed_book: Book) -> None:
    executed_book.results("pydocs").write_text("{")
    with pytest.raises(Refusal, match="it cannot be read"):
        results.check(executed_book)
    executed_book.results("pydocs").unlink()
    with pytest.raises(Refusal, match="expected the reference values at"):
        results.check(executed_book)
    (executed_book.executed / "99_mini.ipynb").unlink()
    with pytest.raises(Refusal, match="found none of 99"):
        results.check(executed_book)


def test_a_reference_value_that_nobody_records_is_found(executed_book: Book) -> None:
    def add(content: dict[str, Any]) -> None:
        content["records"]["old"] = {"chapter": "99", "value": 1.0, "interval": None}
        from darkmatter.book.execution import digest

        content["seal"] = digest(content["records"])

    change_reference(executed_book, add)
    assert results.check(executed_book) == [
        "old: in pydocs.json, but no chapter records it; update the results"
    ]

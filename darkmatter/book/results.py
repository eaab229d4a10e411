"""The reference values, book/results/<suite>.json, and the check of a run against them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter._refusal import Refusal
from darkmatter.book import claims as ledger
from darkmatter.book.claims import Interval, Record
from darkmatter.book.execution import METADATA_KEY, digest, executed_notebooks, seal_of
from darkmatter.book.notebooks import write_text
from darkmatter.book.paths import Book, chapter_of
from darkmatter.book.relations import Value
from darkmatter.book.yamlfiles import shown

if TYPE_CHECKING:
    from nbformat import NotebookNode

REFERENCE_SEED = 0


def all_records(executed: Mapping[str, NotebookNode]) -> list[Record]:
    """The records of all executed chapters, in order; refuses an id recorded by two chapters."""
    found: dict[str, Record] = {}
    for chapter, notebook in executed.items():
        for record in ledger.records_of(notebook, f"chapter {chapter}"):
            if record.id in found:
                raise Refusal(
                    f"expected {record.id} from one chapter, found it in "
                    f"{found[record.id].chapter} and {chapter}; record it once"
                )
            found[record.id] = record
    return list(found.values())


def load_reference(book: Book, suite: str) -> dict[str, Value]:
    """The values of the reference run: id -> value."""
    path = book.results(suite)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        values: dict[str, Value] = {id: entry["value"] for id, entry in content["records"].items()}
        sealed = content["seal"] == digest(content["records"])
    except FileNotFoundError as error:
        raise Refusal(
            f"expected the reference values at {path}, found none; execute the book with seed "
            f"{REFERENCE_SEED} and run `python -m darkmatter.book results --update`"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise Refusal(
            f"expected reference values in {path}, but it cannot be read ({shown(error)}); "
            "run `python -m darkmatter.book results --update`"
        ) from error
    if not sealed:
        raise Refusal(
            f"expected {path} as `results --update` wrote it, found values changed by hand; "
            "run `python -m darkmatter.book results --update`"
        )
    return values


def update(book: Book, suite: str) -> Path:
    """Write the records of the executed book as the reference: sorted, seven digits, versions.

    Refuses a book that is not executed in full, with another seed, or on another suite: the
    reference is one run.
    """
    executed = _executed(book, book.executed, None)
    records = all_records(executed)
    for record in records:
        if record.suite != suite or record.seed != REFERENCE_SEED:
            raise Refusal(
                f"expected records of suite {suite} with seed {REFERENCE_SEED}, found {record.id} "
                f"of {record.suite} with seed {record.seed}; execute the book again"
            )
    entries = {
        record.id: {
            "chapter": record.chapter,
            "value": _rounded(record.value),
            "interval": _rounded_interval(record.interval),
        }
        for record in records
    }
    content = {
        "suite": suite,
        "seed": REFERENCE_SEED,
        "versions": versions_of(executed),
        "records": entries,
        "seal": digest(entries),
    }
    path = book.results(suite)
    write_text(path, json.dumps(content, indent=1, sort_keys=True) + "\n")
    return path


def check(
    book: Book, only: str | None = None, out: Path | None = None, suite: str = "pydocs"
) -> list[str]:
    """Everything that is wrong with an executed book: claims, verdicts, reference values.

    With another seed than the reference's, verdicts are compared and values are not.
    """
    claims = ledger.load_claims(book.claims)
    executed = _executed(book, out or book.executed, only)
    # All chapters of the folder: a relation may speak of another chapter's values.
    present = {chapter_of(path) for path in book.chapters()}
    everything = {
        chapter: notebook
        for chapter, notebook in executed_notebooks(out or book.executed).items()
        if chapter in present
    }
    every = all_records(everything)
    seeds = {record.seed for record in every if record.chapter in executed}
    reference = load_reference(book, suite) if seeds <= {REFERENCE_SEED} and seeds else None
    found = ledger.problems(claims, every, executed, reference, suite)
    sealed = [
        f"chapter {chapter}: its records are not those of its execution; execute it again"
        for chapter, notebook in executed.items()
        if notebook.metadata.get(METADATA_KEY, {}).get("seal") != seal_of(notebook)
    ]
    if only is not None:
        ours = {claim.id for claim in claims.values() if claim.chapter == only}
        ours |= {record.id for record in every if record.chapter == only}
        found = [problem for problem in found if problem.split(":")[0] in ours]
    elif reference is not None:
        recorded = {record.id for record in every}
        found += [
            f"{id}: in {book.results(suite).name}, but no chapter records it; update the results"
            for id in sorted(set(reference) - recorded)
        ]
    return sealed + found


def _executed(book: Book, folder: Path, only: str | None) -> dict[str, NotebookNode]:
    """The executed chapters; refuses if one of them has not been executed."""
    executed = executed_notebooks(folder)
    wanted = [chapter_of(path) or "" for path in book.chapters(only)]
    missing = [chapter for chapter in wanted if chapter not in executed]
    if missing:
        raise Refusal(
            f"expected every chapter executed in {folder}, found none of {', '.join(missing)}; "
            "run `python -m darkmatter.book execute` (or `make book`) first"
        )
    return {chapter: executed[chapter] for chapter in wanted}


def versions_of(executed: Mapping[str, NotebookNode]) -> dict[str, str]:
    """The versions that the executed chapters ran with."""
    merged: dict[str, str] = {}
    for notebook in executed.values():
        stamped: dict[str, Any] = notebook.metadata.get(METADATA_KEY, {}).get("versions", {})
        merged.update({name: str(value) for name, value in stamped.items()})
    return merged


def _rounded(value: Value) -> Value:
    """Seven digits: what another run of the same machine repeats, and a diff can be read."""
    if isinstance(value, bool):
        return value
    if isinstance(value, list):
        return [float(f"{one:.7g}") for one in value]
    return float(f"{value:.7g}")


def _rounded_interval(interval: Interval | None) -> object:
    if interval is None:
        return None
    if isinstance(interval, list):
        return [_rounded(list(pair)) for pair in interval]
    return _rounded(list(interval))

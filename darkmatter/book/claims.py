"""The claim ledger: book/claims.yml, the records of executed chapters, and whether they agree.

A claim says what the book finds and within which range on which suite; a chapter records the value;
`problems` compares. The verdict is computed from the value and must equal the declared one, so that
neither a claim nor a control can change its outcome unseen.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from darkmatter._refusal import Refusal
from darkmatter.book import relations
from darkmatter.book.prose import typed_numbers
from darkmatter.book.relations import NotRecorded, Value
from darkmatter.book.yamlfiles import read_yaml, shown

if TYPE_CHECKING:
    from nbformat import NotebookNode

RECORD_MIME = "application/vnd.darkmatter.record+json"
START_MIME = "application/vnd.darkmatter.start+json"
KINDS = ("claim", "control", "known-truth", "value")
HOLDS, WEAKER, FAILS, NOT_RUN = "holds", "weaker here", "does not hold here", "not run"
VERDICTS = (HOLDS, WEAKER, FAILS)
NOT_PUBLISHED = "not published"

_ID = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_FIELDS = {"id", "chapter", "kind", "statement", "source", "paper", "expect", "nothing", "truth"}
_EXPECT_FIELDS = {"holds", "relation", "weaker", "verdict", "tolerance", "because"}

Bounds = tuple[float, float]
Interval = tuple[float, float] | list[tuple[float, float]]


@dataclass(frozen=True)
class Paper:
    """A published value: what, on which model, and how sure we are of it."""

    value: str | float | list[float]
    model: str
    certainty: str


@dataclass(frozen=True)
class Expectation:
    """What a claim must come to on one suite.

    `holds` is a range, a truth value, or (as text) a relation; `weaker` a range or a relation.
    `tolerance` is absolute, against the reference run.
    """

    tolerance: float
    because: str
    holds: Bounds | bool | str | None = None
    weaker: Bounds | str | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class Claim:
    """One entry of claims.yml."""

    id: str
    chapter: str
    kind: str
    statement: str
    source: str
    paper: Paper | None
    expect: Mapping[str, Expectation] = field(default_factory=dict[str, Expectation])
    nothing: float | None = None
    truth: float | None = None


@dataclass(frozen=True)
class Record:
    """One recorded value of an executed chapter."""

    id: str
    value: Value
    interval: Interval | None
    suite: str
    seed: int
    chapter: str


def load_claims(path: Path) -> dict[str, Claim]:
    """Read and validate claims.yml: id -> claim, in the order of the file.

    Raises `Refusal` with one sentence that names the claim and the field.
    """
    content = read_yaml(path, "the claims")
    if content is None:
        content = []
    if not isinstance(content, list):
        raise Refusal(
            f"expected a list of claims in {path}, found {type(content).__name__}; "
            "begin each entry with '- id:'"
        )
    claims: dict[str, Claim] = {}
    for number, entry in enumerate(cast("list[Any]", content), start=1):
        claim = _claim(entry, number)
        if claim.id in claims:
            raise Refusal(
                f"claim {claim.id}, field id: expected a new id, found one used before; rename it"
            )
        claims[claim.id] = claim
    for claim in claims.values():
        _check_relations(claim, claims)
    return claims


def verdict_of(
    claim: Claim, value: Value, values: Mapping[str, Value], suite: str = "pydocs"
) -> str:
    """The verdict that a value gives a claim: `values` are all recorded values, for relations.

    A list keeps a range when every element does. "not run" where a relation needs a value that was
    not recorded, or where the suite is not expected of.
    """
    expectation = claim.expect.get(suite)
    if expectation is None or expectation.holds is None:
        return NOT_RUN
    try:
        if _satisfies(value, expectation.holds, values):
            return HOLDS
        if expectation.weaker is not None and _satisfies(value, expectation.weaker, values):
            return WEAKER
    except NotRecorded:
        return NOT_RUN
    return FAILS


def records_of(notebook: NotebookNode, name: str = "the notebook") -> list[Record]:
    """The records in the outputs of an executed notebook, in order."""
    found: dict[str, Record] = {}
    for data in _displayed(notebook, RECORD_MIME):
        record = Record(
            id=data["id"],
            value=data["value"],
            interval=_pairs(data["interval"]),
            suite=data["suite"],
            seed=data["seed"],
            chapter=data["chapter"],
        )
        if record.id in found and found[record.id] != record:
            raise Refusal(
                f"{name}: expected one value of {record.id}, found {found[record.id].value} and "
                f"{record.value}; record each id once"
            )
        found[record.id] = record
    return list(found.values())


def versions_of(notebook: NotebookNode) -> dict[str, str]:
    """The versions that `book.start` stamped into an executed notebook."""
    for data in _displayed(notebook, START_MIME):
        return dict(data["versions"])
    return {}


def problems(
    claims: Mapping[str, Claim],
    records: Sequence[Record],
    chapters: Iterable[str],
    reference: Mapping[str, Value] | None,
    suite: str = "pydocs",
) -> list[str]:
    """Everything that is wrong between claims and the records of the executed `chapters`.

    `reference` holds the values of the reference run; None compares verdicts only, as for another
    seed. An empty list means that the book says what its chapters found.
    """
    executed = set(chapters)
    values = {record.id: record.value for record in records}
    found: list[str] = []
    for record in records:
        claim = claims.get(record.id)
        if claim is None:
            found.append(f"{record.id}: recorded by chapter {record.chapter} but not in claims.yml")
        elif claim.chapter != record.chapter:
            found.append(
                f"{record.id}: recorded by chapter {record.chapter}, "
                f"but claims.yml gives it to chapter {claim.chapter}"
            )
        else:
            found += _record_problems(claim, record, values, reference, suite)
    found += [
        f"{claim.id}: a claim of chapter {claim.chapter}, which ran without recording it"
        for claim in claims.values()
        if claim.chapter in executed and claim.id not in values and suite in claim.expect
    ]
    return found


def _record_problems(
    claim: Claim,
    record: Record,
    values: Mapping[str, Value],
    reference: Mapping[str, Value] | None,
    suite: str,
) -> list[str]:
    expectation = claim.expect.get(suite)
    if expectation is None:
        return [f"{claim.id}: recorded on suite {suite}, for which claims.yml expects nothing"]
    found: list[str] = []
    if not _finite(record.value):
        found.append(f"{claim.id}: the recorded value {record.value} is not finite")
    if expectation.verdict is not None:
        try:
            verdict = verdict_of(claim, record.value, values, suite)
        except Refusal as error:
            return [*found, f"{claim.id}: {error}"]
        if verdict not in (expectation.verdict, NOT_RUN):
            found.append(
                f"{claim.id}: recorded {_shown(record.value)} gives the verdict {verdict!r}, "
                f"but claims.yml declares {expectation.verdict!r}"
            )
    if reference is not None:
        if claim.id not in reference:
            found.append(
                f"{claim.id}: recorded, but the reference results do not hold it; "
                "run `python -m darkmatter.book results --update`"
            )
        else:
            found += _difference(claim.id, record.value, reference[claim.id], expectation)
    return found


def _difference(name: str, value: Value, reference: Value, expectation: Expectation) -> list[str]:
    ours = value if isinstance(value, list) else [value]
    theirs = reference if isinstance(reference, list) else [reference]
    if len(ours) != len(theirs):
        return [f"{name}: recorded {len(ours)} values, the reference run {len(theirs)}"]
    largest = max((abs(a - b) for a, b in zip(ours, theirs, strict=True)), default=0.0)
    # The reference is stored to 7 digits: rounding may not cost a tolerance of zero its pass.
    rounding = 1e-6 * max((abs(b) for b in theirs), default=0.0)
    if not largest <= expectation.tolerance + rounding:
        return [
            f"{name}: recorded {_shown(value)}, the reference run {_shown(reference)}: "
            f"the difference {largest:.3g} is over the tolerance {expectation.tolerance:g} "
            f"({expectation.because})"
        ]
    return []


def _satisfies(value: Value, condition: Bounds | bool | str, values: Mapping[str, Value]) -> bool:
    if condition in ("falling", "rising"):
        if not isinstance(value, list) or len(value) < 2:
            raise Refusal(
                f"expected a list of at least two values for the relation {condition!r}, "
                f"found {value}; record a list"
            )
        steps = [b - a for a, b in pairwise(value)]
        return all(step < 0 if condition == "falling" else step > 0 for step in steps)
    if isinstance(condition, str):
        return relations.holds(condition, values)
    if isinstance(condition, bool):
        return value is condition
    low, high = condition
    every = value if isinstance(value, list) else [float(value)]
    return all(low <= one <= high for one in every)


def _claim(entry: Any, number: int) -> Claim:
    if not isinstance(entry, dict):
        raise Refusal(
            f"claim {number} of the file: expected a mapping with an id, found {shown(entry)}; "
            "begin it with '- id:'"
        )
    content = cast("dict[str, Any]", entry)
    name = content.get("id")
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise Refusal(
            f"claim {number} of the file, field id: expected kebab-case such as fvu-width-512, "
            f"found {shown(name)}; rename it"
        )
    if unknown := sorted(map(str, set(content) - _FIELDS)):
        raise _refusal(name, unknown[0], f"one of {sorted(_FIELDS)}", "an unknown field")
    chapter = content.get("chapter")
    if not isinstance(chapter, str) or not re.fullmatch(r"\d\d", chapter):
        raise _refusal(name, "chapter", 'two digits in quotes such as "02"', chapter)
    kind = content.get("kind")
    if kind not in KINDS:
        raise _refusal(name, "kind", f"one of {', '.join(KINDS)}", kind)
    statement = _sentence(name, "statement", content.get("statement"))
    if typed := typed_numbers(statement):
        raise _refusal(name, "statement", "no typed decimal or percentage", typed[0])
    expect = content.get("expect")
    if not isinstance(expect, dict) or not expect:
        raise _refusal(name, "expect", "a mapping from suites to expectations", expect)
    expectations = {
        str(suite): _expectation(name, str(suite), kind, value)
        for suite, value in cast("dict[str, Any]", expect).items()
    }
    claim = Claim(
        id=name,
        chapter=chapter,
        kind=kind,
        statement=statement,
        source=_words(name, "source", content.get("source")),
        paper=_paper(name, content.get("paper")),
        expect=expectations,
        nothing=_planted(name, kind, "control", "nothing", content.get("nothing")),
        truth=_planted(name, kind, "known-truth", "truth", content.get("truth")),
    )
    _check_planted(claim)
    return claim


def _planted(name: str, kind: str, wanted: str, key: str, value: Any) -> float | None:
    if kind != wanted:
        if value is not None:
            raise _refusal(name, key, f"it only where kind is {wanted}", value)
        return None
    number = _number(value)
    if number is None:
        meaning = "where there is nothing to find" if key == "nothing" else "that was planted"
        raise _refusal(name, key, f"the number the method should give {meaning}", value)
    return number


def _check_planted(claim: Claim) -> None:
    expected = claim.nothing if claim.kind == "control" else claim.truth
    if expected is None:
        return
    key = "nothing" if claim.kind == "control" else "truth"
    for suite, expectation in claim.expect.items():
        bounds = expectation.holds
        if not isinstance(bounds, tuple) or not bounds[0] <= expected <= bounds[1]:
            raise _refusal(
                claim.id,
                f"expect.{suite}.holds",
                f"a range that contains {key} = {expected:g}, so that passing means that the "
                "method found what is there and no more",
                bounds,
            )
        if claim.kind == "control" and expectation.verdict != HOLDS:
            raise _refusal(
                claim.id, f"expect.{suite}.verdict", "'holds' for a control", expectation.verdict
            )


def _paper(name: str, value: Any) -> Paper | None:
    if value == NOT_PUBLISHED:
        return None
    if not isinstance(value, dict) or set(cast("dict[str, Any]", value)) != {
        "value",
        "model",
        "certainty",
    }:
        raise _refusal(name, "paper", f"value, model and certainty, or {NOT_PUBLISHED!r}", value)
    content = cast("dict[str, Any]", value)
    published: Any = content["value"]
    if isinstance(published, list):
        numbers = [_number(one) for one in cast("list[Any]", published)]
        if not numbers or None in numbers:
            raise _refusal(name, "paper.value", "a number, a text or a list of numbers", published)
        published = [one for one in numbers if one is not None]
    elif not isinstance(published, str):
        published = _number(published)
        if published is None:
            raise _refusal(
                name, "paper.value", "a number, a text or a list of numbers", content["value"]
            )
    return Paper(
        value=published,
        model=_words(name, "paper.model", content["model"]),
        certainty=_words(name, "paper.certainty", content["certainty"]),
    )


def _expectation(name: str, suite: str, kind: str, value: Any) -> Expectation:
    where = f"expect.{suite}"
    if not isinstance(value, dict):
        raise _refusal(name, where, "a mapping with tolerance and because", value)
    content = cast("dict[str, Any]", value)
    if unknown := sorted(map(str, set(content) - _EXPECT_FIELDS)):
        raise _refusal(
            name, f"{where}.{unknown[0]}", f"one of {sorted(_EXPECT_FIELDS)}", "an unknown field"
        )
    tolerance = _number(content.get("tolerance"))
    if tolerance is None or tolerance < 0:
        raise _refusal(
            name, f"{where}.tolerance", "an absolute number of at least 0", content.get("tolerance")
        )
    because = _sentence(name, f"{where}.because", content.get("because"))
    if kind == "value":
        if extra := sorted(map(str, set(content) - {"tolerance", "because"})):
            raise _refusal(
                name,
                f"{where}.{extra[0]}",
                "only tolerance and because where kind is value",
                content[extra[0]],
            )
        return Expectation(tolerance=tolerance, because=because)
    if ("holds" in content) == ("relation" in content):
        raise _refusal(
            name,
            f"{where}.holds",
            "exactly one of holds and relation",
            "both" if "holds" in content else "neither",
        )
    verdict = content.get("verdict")
    if verdict not in VERDICTS:
        raise _refusal(name, f"{where}.verdict", f"one of {', '.join(VERDICTS)}", verdict)
    if verdict == WEAKER and "weaker" not in content:
        raise _refusal(name, f"{where}.weaker", "a range, since the verdict is weaker here", None)
    return Expectation(
        tolerance=tolerance,
        because=because,
        holds=_condition(name, where, "relation", content["relation"])
        if "relation" in content
        else _condition(name, where, "holds", content["holds"]),
        weaker=cast(
            "Bounds | str | None",
            _condition(name, where, "weaker", content["weaker"]) if "weaker" in content else None,
        ),
        verdict=verdict,
    )


def _condition(name: str, where: str, key: str, value: Any) -> Bounds | bool | str:
    if key == "holds" and isinstance(value, bool):
        return value
    if key != "holds" and isinstance(value, str):
        if value not in ("falling", "rising"):
            try:
                relations.validate(value)
            except Refusal as error:
                raise Refusal(f"claim {name}, field {where}.{key}: {error}") from error
        return value
    if key != "relation" and isinstance(value, list):
        numbers = [_number(one) for one in cast("list[Any]", value)]
        if len(numbers) == 2 and numbers[0] is not None and numbers[1] is not None:
            low, high = numbers[0], numbers[1]
            if low <= high:
                return low, high
    expected = {
        "holds": "a range [low, high] with low <= high, or true or false",
        "relation": "a relation such as 'a < b < 0.5', falling or rising",
        "weaker": "a range [low, high] with low <= high, or a relation",
    }[key]
    raise _refusal(name, f"{where}.{key}", expected, value)


def _check_relations(claim: Claim, claims: Mapping[str, Claim]) -> None:
    for suite, expectation in claim.expect.items():
        for key, condition in (("relation", expectation.holds), ("weaker", expectation.weaker)):
            if not isinstance(condition, str) or condition in ("falling", "rising"):
                continue
            for one in relations.ids_of(condition):
                if one not in claims:
                    raise _refusal(claim.id, f"expect.{suite}.{key}", "ids of claims.yml", one)


def _sentence(name: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or len(value.split()) < 4 or value.strip()[-1] not in ".!?":
        raise _refusal(name, key, "a sentence of four words or more, with its full stop", value)
    return " ".join(value.split())


def _words(name: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _refusal(name, key, "a text", value)
    return " ".join(value.split())


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # A whole number may be too large for a float.
    return float(value) if abs(value) <= sys.float_info.max else None


def _refusal(name: str, key: str, expected: str, found: object) -> Refusal:
    return Refusal(
        f"claim {name[:80]}, field {key[:80]}: expected {expected}, found {shown(found)}; correct "
        "book/claims.yml"
    )


def _displayed(notebook: NotebookNode, mime: str) -> Iterable[Any]:
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if mime in output.get("data", {}):
                yield output["data"][mime]


def _pairs(interval: Any) -> Interval | None:
    if interval is None:
        return None
    if interval and isinstance(interval[0], list):
        return [(float(low), float(high)) for low, high in interval]
    return float(interval[0]), float(interval[1])


def _finite(value: Value) -> bool:
    return all(math.isfinite(one) for one in (value if isinstance(value, list) else [value]))


def _shown(value: Value) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(f"{one:.6g}" for one in value) + "]"
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}"

"""The ledger: what its entries must say, the verdicts, and what the check finds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from nbformat import v4

from darkmatter._refusal import Refusal
from darkmatter.book import claims as ledger
from darkmatter.book.claims import Record
from tests.book.minibook import CLAIMS

Entry = dict[str, Any]


def entry(**changes: Any) -> Entry:
    """The first claim of the mini book, changed; a value of ... removes the field."""
    return changed(yaml.safe_load(CLAIMS)[0], changes)


def changed(content: Entry, changes: Entry) -> Entry:
    merged = {**content, **changes}
    return {key: value for key, value in merged.items() if value is not ...}


def expecting(**changes: Any) -> Entry:
    content = entry()["expect"]["pydocs"]
    return {"expect": {"pydocs": changed(content, changes)}}


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., dict[str, ledger.Claim]]:
    def write_and_load(*entries: object) -> dict[str, ledger.Claim]:
        path = tmp_path / "claims.yml"
        path.write_text(yaml.safe_dump(list(entries)))
        return ledger.load_claims(path)

    return write_and_load


def record(id: str, value: ledger.Value, chapter: str = "99", seed: int = 0) -> Record:
    return Record(id, value, None, "pydocs", seed, chapter)


def test_a_good_ledger_loads(tmp_path: Path) -> None:
    path = tmp_path / "claims.yml"
    path.write_text(CLAIMS)
    claims = ledger.load_claims(path)
    assert list(claims) == ["mini-fvu", "mini-random", "mini-shuffled", "mini-falling"]
    assert claims["mini-fvu"].paper == ledger.Paper(0.313, "a large one", "read off the figure")
    assert claims["mini-fvu"].expect["pydocs"].holds == (0.2, 0.4)


CONTROL = {"kind": "control", "nothing": 0.3}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"id": "Mini FVU"}, "claim 1 of the file, field id"),
        ({"chapter": 99}, "claim mini-fvu, field chapter"),
        ({"kind": "finding"}, "claim mini-fvu, field kind"),
        ({"statement": "Too short."}, "claim mini-fvu, field statement"),
        ({"statement": "It misses 31 % of the variance."}, "field statement: expected no typed"),
        ({"statement": "It misses 0.31 of the variance."}, "field statement: expected no typed"),
        ({"source": ...}, "claim mini-fvu, field source"),
        ({"paper": "unknown"}, "claim mini-fvu, field paper"),
        ({"paper": {"value": 1}}, "claim mini-fvu, field paper"),
        ({"paper": {"value": [], "model": "m", "certainty": "c"}}, "field paper.value"),
        ({"expect": {}}, "claim mini-fvu, field expect"),
        ({"surprise": 1}, "claim mini-fvu, field surprise"),
        (expecting(holds=[0.4, 0.2]), "field expect.pydocs.holds"),
        (expecting(holds=[0.4]), "field expect.pydocs.holds"),
        (expecting(holds=...), "exactly one of holds and relation"),
        (expecting(relation="falling"), "exactly one of holds and relation"),
        (expecting(holds=..., relation="mini-fvu <"), "field expect.pydocs.relation"),
        (expecting(holds=..., relation="mini-fvu < ghost"), "ids of claims.yml, found 'ghost'"),
        (expecting(verdict="maybe"), "field expect.pydocs.verdict"),
        (expecting(verdict="weaker here", weaker=...), "field expect.pydocs.weaker"),
        (expecting(tolerance=-1), "field expect.pydocs.tolerance"),
        (expecting(tolerance="5 %"), "field expect.pydocs.tolerance"),
        (expecting(because=...), "field expect.pydocs.because"),
        (expecting(because="luck"), "field expect.pydocs.because"),
        (expecting(color="red"), "field expect.pydocs.color"),
        ({"kind": "value"}, "only tolerance and because"),
        ({"nothing": 0.0}, "field nothing: expected it only where kind is control"),
        ({"kind": "control"}, "field nothing: expected the number"),
        ({"kind": "known-truth"}, "field truth: expected the number"),
        ({"kind": "known-truth", "truth": 0.9}, "contains truth = 0.9"),
        # A control that passes when structure is found where there is none is no control.
        ({"kind": "control", "nothing": 0.0}, "contains nothing = 0"),
        (CONTROL | expecting(holds=..., relation="mini-fvu > 0"), "contains nothing = 0.3"),
        (CONTROL | expecting(verdict="does not hold here"), "'holds' for a control"),
    ],
)
def test_an_entry_that_is_wrong_is_named(
    load: Callable[..., Any], changes: Entry, named: str
) -> None:
    with pytest.raises(Refusal) as refused:
        load(entry(**changes))
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_no_ledger_is_refused(tmp_path: Path, load: Callable[..., Any]) -> None:
    with pytest.raises(Refusal, match="found no file"):
        ledger.load_claims(tmp_path / "none.yml")
    (tmp_path / "broken.yml").write_text("- id: [")
    with pytest.raises(Refusal, match="found an error"):
        ledger.load_claims(tmp_path / "broken.yml")
    (tmp_path / "mapping.yml").write_text("id: x")
    with pytest.raises(Refusal, match="expected a list of claims"):
        ledger.load_claims(tmp_path / "mapping.yml")
    with pytest.raises(Refusal, match="one used before"):
        load(entry(), entry())
    with pytest.raises(Refusal, match="expected a mapping"):
        load("text")


@pytest.mark.parametrize(
    ("changes", "value", "verdict"),
    [
        ({}, 0.3, "holds"),
        ({}, 0.2, "holds"),
        ({}, 0.15, "weaker here"),
        ({}, 0.5, "does not hold here"),
        ({}, [0.3, 0.39], "holds"),
        ({}, [0.3, 0.41], "does not hold here"),
        (expecting(holds=True, weaker=...), True, "holds"),
        (expecting(holds=True, weaker=...), False, "does not hold here"),
        (expecting(holds=..., relation="falling"), [3.0, 2.0, 1.0], "holds"),
        (expecting(holds=..., relation="falling", weaker=...), [3.0, 3.0], "does not hold here"),
        (expecting(holds=..., relation="rising", weaker=...), [1.0, 2.0], "holds"),
        (expecting(holds=..., relation="mini-fvu < 0.4"), 0.39, "holds"),
        (expecting(holds=..., relation="mini-fvu < 0.1", weaker="mini-fvu < 1"), 0.3,
         "weaker here"),
    ],
)  # fmt: skip
def test_verdicts(
    load: Callable[..., Any], changes: Entry, value: ledger.Value, verdict: str
) -> None:
    claim = load(entry(**changes))["mini-fvu"]
    assert ledger.verdict_of(claim, value, {"mini-fvu": value}) == verdict
    assert ledger.verdict_of(claim, value, {}, suite="other") == "not run"


def test_a_relation_over_what_was_not_recorded_is_not_run(load: Callable[..., Any]) -> None:
    claims = load(entry(**expecting(holds=..., relation="mini-fvu < b")), entry(id="b"))
    assert ledger.verdict_of(claims["mini-fvu"], 0.3, {"mini-fvu": 0.3}) == "not run"


def test_the_check_finds_each_disagreement(load: Callable[..., Any]) -> None:
    claims = load(entry(), entry(id="other", chapter="98"))
    good = [record("mini-fvu", 0.311)]

    def found(records: list[Record], reference: dict[str, ledger.Value] | None) -> str:
        return "\n".join(ledger.problems(claims, records, ["99"], reference))

    assert found(good, {"mini-fvu": 0.311}) == ""
    assert found(good, {"mini-fvu": 0.3209}) == ""
    assert "is over the tolerance 0.01" in found(good, {"mini-fvu": 0.3215})
    assert found(good, None) == ""
    assert "the reference results do not hold it" in found(good, {})
    assert "gives the verdict 'weaker here'" in found([record("mini-fvu", 0.15)], None)
    assert "which ran without recording it" in found([], None)
    assert "not in claims.yml" in found([*good, record("ghost", 1.0)], None)
    assert "gives it to chapter 98" in found([*good, record("other", 1.0)], None)
    assert "not finite" in found([record("mini-fvu", float("nan"))], None)
    assert "recorded 2 values" in found([record("mini-fvu", [0.3, 0.3])], {"mini-fvu": 0.3})


def test_a_control_that_finds_structure_fails_the_check(tmp_path: Path) -> None:
    """A probe fitted on shuffled rows that scores above its range is a failure, not a success."""
    path = tmp_path / "claims.yml"
    path.write_text(CLAIMS)
    claims = {"mini-shuffled": ledger.load_claims(path)["mini-shuffled"]}
    found = ledger.problems(claims, [record("mini-shuffled", 0.3)], ["99"], None)
    assert found == [
        "mini-shuffled: recorded 0.3 gives the verdict 'does not hold here', "
        "but claims.yml declares 'holds'"
    ]


def test_records_are_read_from_outputs_and_two_values_refused() -> None:
    def output(value: float) -> Any:
        data = {"id": "a", "value": value, "interval": [0.1, 0.2], "suite": "s", "seed": 0,
                "chapter": "99"}  # fmt: skip
        return v4.new_output("display_data", data={ledger.RECORD_MIME: data})

    notebook = v4.new_notebook(cells=[v4.new_code_cell(outputs=[output(0.15), output(0.15)])])
    assert ledger.records_of(notebook) == [Record("a", 0.15, (0.1, 0.2), "s", 0, "99")]
    notebook.cells[0].outputs.append(output(0.16))
    with pytest.raises(Refusal, match="expected one value of a"):
        ledger.records_of(notebook)

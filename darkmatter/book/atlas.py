"""The atlas: one row for every SAE that was surveyed, from the entries in book/results/atlas."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from darkmatter._refusal import Refusal
from darkmatter.book.notebooks import write_text
from darkmatter.book.paths import Book
from darkmatter.book.tables import table
from darkmatter.book.yamlfiles import shown

if TYPE_CHECKING:
    from darkmatter.survey import Survey

FORMAT = "darkmatter-atlas/1"
_SCORES = (
    "fvu",
    "fvu_nonlinear",
    "r2_vector",
    "r2_norm",
    "cost",
    "recovered_linear",
    "recovered_nonlinear",
)
_HEADINGS = (
    "SAE, hook",
    "d_sae",
    "L0",
    "dead",
    "FVU",
    "nonlinear FVU",
    "R2 vector",
    "R2 norm",
    "cost, nats",
    "taken back, linear",
    "taken back, nonlinear",
)
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")
_LARGEST_ENTRY = 4 << 20
_COUNTS = ("n_fit", "n_test", "documents", "context", "skip", "seed")
# Names stand between backquotes on the page; these end them, or a row.
_OUTSIDE_CODE = re.compile(r"[`\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def entry_of(survey: Survey, name: str, model: str | None = None) -> dict[str, Any]:
    """What the atlas keeps of a survey: its settings and its table; no text, no activation.

    `model` is what to call the model, by default its hub name, or of a folder the last part.
    Numbers have six digits. Raises Refusal for a name that cannot be a file's.
    """
    if not _NAME.fullmatch(name):
        raise Refusal(
            f"The entry's name is {name!r}, expected small letters, digits, dots and hyphens, such "
            "as 'gpt2-small-res-jb'; pass another."
        )
    settings, scores = survey.settings, cast(Any, survey.table)
    opened = Path(str(settings["model"]["name"]))
    rows = [
        {
            "name": str(sae),
            "hook": str(row["hook"]),
            "d_sae": int(row["d_sae"]),
            "l0": _rounded(row["l0"]),
            "dead": _rounded(row["dead"]),
        }
        | {
            score: [_rounded(row[score + end]) for end in ("", "_low", "_high")]
            for score in _SCORES
            if score in scores
        }
        for sae, row in scores.iterrows()
    ]
    return {
        "format": FORMAT,
        "name": name,
        # Of a folder its name, never the path to it.
        "model": model or (opened.name if opened.is_absolute() else opened.as_posix()),
        "n_fit": int(scores["n_fit"].iloc[0]),
        "n_test": int(scores["n_test"].iloc[0]),
        "documents": len(survey.test.document.unique()),
        "context": int(survey.test.tokens.shape[1]),
        "skip": survey.skip,
        "seed": int(settings["settings"]["seed"]),
        "identity": str(settings["identity"]),
        "versions": settings["versions"],
        "rows": rows,
    }


def add_entry(book: Book, survey: Survey, name: str, model: str | None = None) -> Path:
    """Write an entry into book/results/atlas, in place of one of the same name."""
    path = _folder(book) / f"{name}.json"
    entry = entry_of(survey, name, model)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(entry, indent=1) + "\n")
    return path


def read_entries(book: Book) -> list[dict[str, Any]]:
    """All entries by name. Raises Refusal naming the file that is no entry."""
    return [_read(path) for path in sorted(_folder(book).glob("*.json"))]


def atlas_page(entries: Sequence[Mapping[str, Any]], suites: Sequence[Mapping[str, Any]]) -> str:
    """The page: a table for every entry, then what has a name and was not run."""
    saes = sum(len(entry["rows"]) for entry in entries)
    lines = [
        "# Atlas of surveys",
        "",
        f"SAEs: {saes}; surveys: {len(entries)}. One row each, with 95 % intervals over documents. "
        "How to read a row: chapter [18](18_your_model_your_sae). FVU is pooled, about the mean, "
        "on held-out documents.",
        "",
    ]
    for entry in entries:
        lines += [
            f"## {entry['name']}",
            "",
            f"Model `{entry['model']}`; {entry['n_fit']:,} fit and {entry['n_test']:,} test tokens "
            f"of {entry['documents']} test documents; contexts of {entry['context']} tokens, the "
            f"first {entry['skip']} left out; seed {entry['seed']}; identity "
            f"`{entry['identity'][:12]}`.",
            "",
            *table(_HEADINGS, map(_cells, entry["rows"])),
            "",
        ]
    run = {entry["name"] for entry in entries}
    waiting = [suite for suite in suites if suite["name"] not in run]
    if waiting:
        lines += ["## Not run yet", "", "These suites have a name and no survey here:", ""]
        lines += [f"- `{one['name']}`: {one['source']}; {one['saes']} SAEs" for one in waiting]
        lines.append("")
    lines += [
        "## Send yours",
        "",
        "1. `darkmatter survey --model … --sae … --text … --out my-survey`",
        "2. `python -m darkmatter.book atlas my-survey --name my-sae` writes "
        "`book/results/atlas/my-sae.json`: the table and the settings, no text and no activation.",
        "3. Open a pull request with that file. The page is made from it.",
        "",
    ]
    return "\n".join(lines)


def _folder(book: Book) -> Path:
    return book.source / "results" / "atlas"


def _read(path: Path) -> dict[str, Any]:
    problem = f"{path.name} is no entry of the atlas"
    if path.stat().st_size > _LARGEST_ENTRY:
        raise Refusal(f"{problem}: it is larger than {_LARGEST_ENTRY} bytes; write it again.")
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        if entry["format"] != FORMAT or entry["name"] != path.stem:
            raise ValueError(f"format {entry['format']!r}, name {entry['name']!r}")
        _check_words(entry)
        # Whatever the page needs is there.
        atlas_page([entry], [])
    except (
        *(ArithmeticError, AttributeError, LookupError, TypeError, ValueError),
        *(OSError, RecursionError),
    ) as error:
        raise Refusal(
            f"{problem} ({shown(str(error))}); write it with python -m darkmatter.book atlas."
        ) from error
    return entry


def _check_words(entry: Mapping[str, Any]) -> None:
    """Raise ValueError unless words are names and the rest are numbers: others send entries."""
    names = [entry["model"], entry["identity"]]
    names += [row[key] for row in entry["rows"] for key in ("name", "hook")]
    for name in (entry["name"], *names):
        if not isinstance(name, str) or not name or _OUTSIDE_CODE.search(name):
            raise ValueError(f"{shown(name)} is no name")
    if not _NAME.fullmatch(entry["name"]):
        raise ValueError(f"{shown(entry['name'])} is no name of an entry")
    for number in (*(entry[key] for key in _COUNTS), *(row["d_sae"] for row in entry["rows"])):
        if type(number) is not int or not 0 <= number < 1 << 63:
            raise ValueError(f"{shown(number)} is no count")


def _cells(row: Mapping[str, Any]) -> list[str]:
    sae = f"`{row['name']}` `{row['hook']}`"
    sizes = [f"{row['d_sae']:,}", f"{row['l0']:.1f}", f"{row['dead']:.0%}"]
    return [sae, *sizes, *(_written(row.get(score)) for score in _SCORES)]


def _written(score: Sequence[float | None] | None) -> str:
    if score is None or score[0] is None:
        return "not run"
    value, low, high = (math.nan if part is None else float(part) for part in score)
    return f"{value:.3f} ({low:.3f} to {high:.3f})"


def _rounded(value: Any) -> float | None:
    return float(f"{value:.6g}") if math.isfinite(value) else None

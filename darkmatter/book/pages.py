"""Pages of the book that are generated from a run: the ledger, the statistics, the suite's card."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter._refusal import Refusal
from darkmatter.book import prose
from darkmatter.book.chapter import published
from darkmatter.book.claims import (
    FAILS,
    HOLDS,
    NOT_RUN,
    WEAKER,
    Claim,
    Record,
    verdict_of,
)
from darkmatter.book.execution import METADATA_KEY
from darkmatter.book.tables import row

if TYPE_CHECKING:
    from nbformat import NotebookNode

BUDGET_SECONDS = 90
BUDGET_BYTES = 4 * 2**30
_MARKS = {HOLDS: "holds", WEAKER: "weaker", FAILS: "fails", NOT_RUN: "not-run"}
_CHOICES = {
    "holds": "what holds",
    "weaker": "what is weaker here",
    "fails": "what does not hold here",
    "not-run": "what was not run",
    "control": "controls",
    "known-truth": "known truths",
    "value": "other values",
}
# Copying needs a script; without one the buttons stay hidden and nothing is missing.
_COPY = """<script>
document.addEventListener("DOMContentLoaded", () => {
  if (!window.ClipboardJS) return;
  document.querySelectorAll(".ledger-copy").forEach((button) => { button.hidden = false; });
  new ClipboardJS(".ledger-copy").on("success", (event) => {
    event.trigger.textContent = "copied";
    setTimeout(() => { event.trigger.textContent = "copy"; }, 1500);
  });
});
</script>"""
_KIND = {"claim": "Claim", "control": "Control", "known-truth": "Known truth"}


def ledger_page(
    claims: Mapping[str, Claim],
    records: Sequence[Record],
    files: Mapping[str, str],
    suite: str,
    titles: Mapping[str, str] | None = None,
) -> str:
    """The claims ledger as Markdown.

    `files` maps chapters to the names of their notebooks, `titles` to what their sections are
    called.
    """
    recorded = {record.id: record for record in records}
    values = {record.id: record.value for record in records}
    verdicts = {
        claim.id: verdict_of(claim, values[claim.id], values, suite)
        if claim.id in values
        else "not run"
        for claim in claims.values()
        if claim.kind != "value"
    }
    marks = {id: _MARKS[verdict] for id, verdict in verdicts.items()}
    lines = [
        "# Claims ledger",
        "",
        f"Every finding of the book on the suite `{suite}`: what is claimed, what the paper "
        "reports and on which model, what this run found, and whether the claim holds. Brackets "
        "hold the interval from resampling documents. A control passes when the method finds "
        "nothing where there is nothing. *Cell* leads from a number to the cell that made it.",
        "",
        _filter([one for one in claims.values() if one.chapter in files], marks),
    ]
    for chapter, file in sorted(files.items()):
        ours = [claim for claim in claims.values() if claim.chapter == chapter]
        if not ours:
            continue
        page = Path(file).stem
        title = (titles or {}).get(chapter, f"Chapter {chapter}")
        lines += ["", f"## {title}", "", f"[Read chapter {chapter}]({file})"]
        tested = [claim for claim in ours if claim.kind != "value"]
        if tested:
            lines += ["", "| Claim | Paper | This run | Verdict |", "|---|---|---|---|"]
            lines += [
                row(
                    _claimed(claim, marks[claim.id]),
                    _paper(claim),
                    _found(recorded.get(claim.id), page),
                    f"**{verdicts[claim.id]}**",
                )
                for claim in tested
            ]
        others = [claim for claim in ours if claim.kind == "value"]
        if others:
            lines += ["", "| Other value | Paper | This run |", "|---|---|---|"]
            lines += [
                row(_claimed(claim, "value"), _paper(claim), _found(recorded.get(claim.id), page))
                for claim in others
            ]
    return "\n".join([*lines, "", _COPY]) + "\n"


def statistics_page(executed: Mapping[str, NotebookNode], files: Mapping[str, str]) -> str:
    """Seconds, peak memory and versions of each executed chapter against the budget."""
    lines = [
        "# Run statistics",
        "",
        "What this build of the book took. The budget of a chapter is "
        f"{BUDGET_SECONDS} seconds and {BUDGET_BYTES // 2**30} GiB on two CPU cores. Chapters that "
        "run two at a time share the cores, and each takes longer than alone.",
        "",
        "| Chapter | Seconds | At a time | Peak memory, GiB | Within budget |",
        "|---|---|---|---|---|",
    ]
    total = 0.0
    stamped: dict[str, set[str]] = {}
    for chapter, notebook in sorted(executed.items()):
        run: dict[str, Any] = notebook.metadata.get(METADATA_KEY, {})
        seconds, peak = float(run.get("seconds", 0)), int(run.get("peak_bytes", 0))
        jobs = int(run.get("jobs", 1))
        total += seconds / jobs
        if peak > BUDGET_BYTES or (jobs == 1 and seconds > BUDGET_SECONDS):
            within = "**no**"
        else:
            within = "yes" if seconds <= BUDGET_SECONDS else "not beside another"
        lines.append(
            row(
                f"[{title_of(notebook) or chapter}]({files[chapter]})",
                f"{seconds:.0f}",
                str(jobs),
                f"{peak / 2**30:.2f}",
                within,
            )
        )
        for name, number in run.get("versions", {}).items():
            stamped.setdefault(name, set()).add(str(number))
    lines += ["", f"All chapters together: about {total:.0f} seconds.", "", "## Versions", ""]
    lines += ["| Package | Version |", "|---|---|"]
    lines += [row(name, ", ".join(sorted(found))) for name, found in sorted(stamped.items())]
    return "\n".join(lines) + "\n"


def title_of(notebook: NotebookNode) -> str:
    """The first heading of a chapter, such as "02 · SAE error and width"; empty without one."""
    first = str(notebook.cells[0].source) if notebook.cells else ""
    return first.split("\n")[0].removeprefix("# ") if first.startswith("# ") else ""


def suite_card_page(card: Path, suite: str) -> str:
    """The card of a suite, under a title; a sentence where the suite has no card yet."""
    if not card.is_file():
        return f"# The suite `{suite}`\n\nThis suite has not been built yet: it has no card.\n"
    text = card.read_text(encoding="utf-8").strip()
    return text + "\n" if text.startswith("# ") else f"# The suite `{suite}`\n\n{text}\n"


def fill_page(text: str, records: Iterable[Record], claims: Mapping[str, Claim], name: str) -> str:
    """A static page with each `[[id]]`, `[[id:%]]`, `[[id:paper]]` ... replaced by its number."""
    recorded = {record.id: record for record in records}

    def write(id: str, form: str) -> str:
        if form == "paper" and id in claims:
            return published(claims[id])
        if id not in recorded:
            raise Refusal(
                f"{name}: expected the id of a recorded value, found [[{id}]]; record it in a "
                "chapter or correct the id"
            )
        return prose.written(recorded[id].value, recorded[id].interval, form)

    return prose.fill(text, write, static=True)


def _filter(claims: Sequence[Claim], marks: Mapping[str, str]) -> str:
    """Radio buttons that the style sheet reads: what is chosen decides which rows are seen."""
    counts = Counter(marks[claim.id] for claim in claims if claim.id in marks)
    counts["control"] = sum(claim.kind == "control" for claim in claims)
    counts["known-truth"] = sum(claim.kind == "known-truth" for claim in claims)
    counts["value"] = sum(claim.kind == "value" for claim in claims)
    choices = [("all", "everything", len(claims))]
    choices += [(mark, label, counts[mark]) for mark, label in _CHOICES.items() if counts[mark]]
    buttons = "".join(
        f'<span><input type="radio" name="ledger" id="ledger-{mark}"{" checked" * (mark == "all")}>'
        f'<label for="ledger-{mark}">{label} ({number})</label></span>'
        for mark, label, number in choices
    )
    return f'<fieldset class="ledger-filter"><legend>Show</legend>{buttons}</fieldset>'


def _claimed(claim: Claim, mark: str) -> str:
    kind = "" if claim.kind == "value" else f"*{_KIND[claim.kind]}.* "
    marks = f"ledger-{mark} ledger-{claim.kind}" if claim.kind != mark else f"ledger-{mark}"
    place = f'<span id="claim-{claim.id}" class="{marks}"></span>'
    return f"{place}{kind}{claim.statement} `{claim.id}` ({claim.source})"


def _paper(claim: Claim) -> str:
    if claim.paper is None:
        return "not published"
    return f"{published(claim)} ({claim.paper.model}; {claim.paper.certainty})"


def _found(record: Record | None, page: str) -> str:
    if record is None:
        return "not run"
    said = prose.written(record.value, record.interval)
    copied = html.escape(f"{record.id} = {said} (chapter {record.chapter}, suite {record.suite})")
    return (
        f'{said} <a class="ledger-cell" href="{page}.html#value-{record.id}" '
        f'aria-label="the cell that made {record.id}">cell</a>'
        f'<button type="button" class="ledger-copy" data-clipboard-text="{copied}" '
        f'aria-label="copy {record.id}" hidden>copy</button>'
    )

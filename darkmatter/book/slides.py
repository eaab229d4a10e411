"""Slides: a deck for each part of the book, from the chapters' own headings, claims and figures.

A deck is one HTML page with its figures beside it. It loads nothing from elsewhere: formulas are
MathML, the style and the few lines of script stand in the page. With scripts off, or in print, the
slides follow each other down the page.
"""

from __future__ import annotations

import base64
import html
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from darkmatter.book import notebooks, pages, quizzes, results
from darkmatter.book.claims import Claim, Record, load_claims, verdict_of
from darkmatter.book.execution import executed_notebooks
from darkmatter.book.figures import FIGURE_KEY
from darkmatter.book.formulas import mathml
from darkmatter.book.notebooks import tags_of, write_text
from darkmatter.book.paths import Book, chapter_of

if TYPE_CHECKING:
    from nbformat import NotebookNode

_STYLE = Path(__file__).with_name("slides.css")
_HEADING = re.compile(r"^(#{2,3}) (.+)$", re.MULTILINE)
_CLAIM = re.compile(r"^\*\*Claim\.\*\* (.+)$", re.MULTILINE)
_PREDICT = re.compile(r"^> \*\*Predict first\.\*\*.*(?:\n>.*)*", re.MULTILINE)
_FOLD = re.compile(r"<details>.*?</details>", re.DOTALL)
_MOST_CLAIMS = 6
_MOST_WORDS = 50
_CLOSING = ("What to remember", "Where this can fool you")
# The reader reads these at home.
_LEFT_OUT = ("Exercise", "Read on")
_SCRIPT = """
const slides = [...document.querySelectorAll('section')], place = document.querySelector('.place');
let now = 0;
function show(number) {
  now = Math.max(0, Math.min(slides.length - 1, number));
  slides.forEach((slide, i) => slide.classList.toggle('now', i === now));
  place.textContent = (now + 1) + ' / ' + slides.length;
  history.replaceState(null, '', '#' + (now + 1));
  window.scrollTo(0, 0);
}
document.body.classList.add('deck');
document.addEventListener('keydown', event => {
  if (event.target.closest('summary, a') && [' ', 'Enter'].includes(event.key)) return;
  if (event.altKey || event.ctrlKey || event.metaKey || event.target.closest('input')) return;
  if (['ArrowRight', 'PageDown', ' '].includes(event.key)) show(now + 1);
  else if (['ArrowLeft', 'PageUp'].includes(event.key)) show(now - 1);
  else if (event.key === 'Home') show(0);
  else if (event.key === 'End') show(slides.length - 1);
  else if (event.key === 'n') document.body.classList.toggle('speaking');
  else return;
  event.preventDefault();
});
let touched = 0;
document.addEventListener('touchstart', event => { touched = event.touches[0].clientX; });
document.addEventListener('touchend', event => {
  const moved = event.changedTouches[0].clientX - touched;
  if (Math.abs(moved) > 60) show(now + (moved < 0 ? 1 : -1));
});
window.addEventListener('hashchange', () => show(Number(location.hash.slice(1)) - 1 || 0));
show(Number(location.hash.slice(1)) - 1 || 0);
"""


@dataclass
class Slide:
    """One slide: its heading and body as HTML, notes for the speaker, and what kind it is."""

    heading: str
    body: str
    kind: str = "plain"
    notes: str = ""


@dataclass(frozen=True)
class Part:
    """A part of the book: its caption and the notebooks of its chapters, in order."""

    caption: str
    chapters: list[Path]

    def file(self, number: int) -> str:
        words = re.sub(r"[^a-z0-9]+", "-", self.caption.lower()).strip("-")
        return f"part-{number}-{words}.html"


def write_decks(book: Book, folder: Path | None = None, suite: str = "pydocs") -> list[Path]:
    """Write a deck for each part, and an index of them, into _build/slides; returns the decks.

    Figures, numbers and verdicts come from executed chapters; a chapter that was not executed has
    its headings, claim and predictions only.
    """
    target = folder or book.root / "_build" / "slides"
    shutil.rmtree(target, ignore_errors=True)
    executed = executed_notebooks(book.executed) if book.executed.is_dir() else {}
    known = {chapter_of(path) or "" for path in book.chapters()}
    executed = {chapter: executed[chapter] for chapter in known & set(executed)}
    records = results.all_records(executed)
    claims = load_claims(book.claims)
    bank = book.source / quizzes.SOURCE
    questions = quizzes.load_quizzes(bank) if bank.is_file() else {}
    written: list[Path] = []
    parts = parts_of(book)
    for number, part in enumerate(parts, start=1):
        slides = [Slide(part.caption, _list(_title(path) for path in part.chapters), "title")]
        for path in part.chapters:
            chapter = chapter_of(path) or ""
            notebook = executed.get(chapter) or notebooks.read_notebook(path)
            closing = list(_closing(notebook))
            slides += chapter_slides(notebook, target / "figures")
            slides += claim_slides(chapter, claims, records, suite)
            slides += closing
            slides += question_slides(questions.get(chapter, []), records, claims)
        written.append(target / part.file(number))
        write_text(written[-1], page(part.caption, slides))
    links = _list(
        f"[{part.caption}]({path.name})" for part, path in zip(parts, written, strict=True)
    )
    about = Slide("Slides", links, "title")
    write_text(target / "index.html", page("Slides", [about]))
    return written


def parts_of(book: Book) -> list[Part]:
    """The parts of _toc.yml that hold chapters; one part for a book without parts."""
    import yaml

    content: Any = yaml.safe_load((book.source / "_toc.yml").read_text(encoding="utf-8"))
    by_stem = {path.stem: path for path in book.chapters()}
    found: list[Part] = []
    entries: list[dict[str, Any]] = content.get("parts") or [{"caption": "Chapters", **content}]
    for part in entries:
        listed: list[dict[str, str]] = part.get("chapters", [])
        files = [entry["file"] for entry in listed]
        if chapters := [by_stem[file] for file in files if file in by_stem]:
            found.append(Part(str(part["caption"]), chapters))
    return found


def chapter_slides(notebook: NotebookNode, figures: Path) -> Iterator[Slide]:
    """Title and claim, then a slide for each section, prediction and figure.

    Figures are written into the folder `figures`. What the chapter says of its numbers goes into
    the notes of the slide before.
    """
    first = str(notebook.cells[0].source)
    claim = _CLAIM.search(first)
    title = first.splitlines()[0].removeprefix("# ")
    last = Slide(markup(title, inline=True), markup(claim[1] if claim else ""), "title")
    yield last
    section, skipped = title, False
    for cell in notebook.cells[1:]:
        text = str(cell.source)
        if cell.cell_type == "markdown":
            for heading, body in _sections(text):
                if heading is not None:
                    section, skipped = heading, heading.startswith((*_LEFT_OUT, *_CLOSING))
                if skipped:
                    continue
                for made in _section_slides(section, heading is not None, body):
                    last = made
                    yield made
        elif not skipped and "solution" not in tags_of(cell):
            for output in cell.get("outputs", []):
                if made := _figure_slide(section, output, figures):
                    last = made
                    yield made
                elif said := output.get("data", {}).get("text/markdown"):
                    last.notes += markup(_joined(said))


def claim_slides(
    chapter: str, claims: Mapping[str, Claim], records: Sequence[Record], suite: str
) -> Iterator[Slide]:
    """What the ledger says of a chapter: claims, controls, known truth, with this run's verdict."""
    values = {record.id: record.value for record in records}
    rows = [
        f"| {claim.statement} | **{verdict_of(claim, values[claim.id], values, suite)}** |"
        for claim in claims.values()
        if claim.chapter == chapter and claim.kind != "value" and claim.id in values
    ]
    for start in range(0, len(rows), _MOST_CLAIMS):
        some = rows[start : start + _MOST_CLAIMS]
        yield Slide(
            f"Claims of chapter {chapter}", markup("\n".join(["| | |", "|---|---|", *some]))
        )


def question_slides(
    questions: Sequence[quizzes.Question], records: Sequence[Record], claims: Mapping[str, Claim]
) -> Iterator[Slide]:
    """A slide for each question of the quiz bank, the answer folded."""
    for number, question in enumerate(questions, start=1):
        if _ids(question) <= {record.id for record in records}:
            asked = "\n".join(quizzes.rendered(number, question))
            text = pages.fill_page(asked, records, claims, quizzes.SOURCE.name)
            yield Slide(f"Check {question.chapter}.{number}", markup(text), "check")


def page(title: str, slides: Sequence[Slide]) -> str:
    """The deck as one HTML page."""
    bodies = "\n".join(_html(number, slide) for number, slide in enumerate(slides, start=1))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>
{_STYLE.read_text(encoding="utf-8")}</style>
</head>
<body>
<main>
{bodies}
</main>
<p class="keys">arrows: move, n: notes</p>
<p class="place" aria-live="polite"></p>
<script>{_SCRIPT}</script>
</body>
</html>
"""


def markup(text: str, inline: bool = False) -> str:
    """Markdown as HTML, its formulas as MathML."""
    from markdown_it import MarkdownIt
    from mdit_py_plugins.dollarmath import dollarmath_plugin

    reader = MarkdownIt("commonmark", {"html": True}).enable("table")
    reader.use(
        dollarmath_plugin,
        allow_labels=True,
        double_inline=True,
        renderer=_typeset,
    )
    return reader.renderInline(text) if inline else reader.render(text)


def _typeset(tex: str, options: Mapping[str, Any]) -> str:
    return mathml(tex, bool(options["display_mode"]))


def _html(number: int, slide: Slide) -> str:
    level = "h1" if slide.kind == "title" else "h2"
    notes = f'\n<div class="notes">{slide.notes}</div>' if slide.notes else ""
    return (
        f'<section class="{slide.kind}" aria-label="Slide {number}">\n'
        f"<{level}>{slide.heading}</{level}>\n{slide.body}{notes}\n</section>"
    )


def _sections(text: str) -> Iterator[tuple[str | None, str]]:
    """(heading or None, text under it) of a Markdown cell."""
    start, heading = 0, None
    for match in _HEADING.finditer(text):
        if body := text[start : match.start()].strip():
            yield heading, body
        elif heading is not None:
            yield heading, ""
        start, heading = match.end(), match[2]
    if heading is not None or text[start:].strip():
        yield heading, text[start:].strip()


def _section_slides(section: str, opens: bool, body: str) -> Iterator[Slide]:
    """The slide of a section that opens here, and one for each prediction in the text."""
    heading = markup(section, inline=True)
    predictions = list(_PREDICT.finditer(body))
    rest = _FOLD.sub("", _PREDICT.sub("", body)).strip()
    if opens and rest:
        yield Slide(heading, markup(_brief(rest)), notes=markup(rest))
    for match in predictions:
        fold = _FOLD.search(body, match.end())
        asked = re.sub(r"^> ?", "", match[0], flags=re.MULTILINE)
        yield Slide(heading, markup(f"{asked}\n\n{fold[0] if fold else ''}"), "predict")


def _brief(text: str) -> str:
    """The first sentences, and the first formula, list or table: what a slide has room for."""
    found: dict[str, str] = {}
    for block in re.split(r"\n{2,}", text.strip()):
        if re.match(r"\$\$|\||[-*] |\d+\. ", block):
            found.setdefault("set apart", block)
        elif not re.match(r"```|>|#|<", block):
            found.setdefault("prose", _opening(block))
    return "\n\n".join(found.values())


def _opening(paragraph: str) -> str:
    """The leading sentences of a paragraph that fit on a slide; always the first."""
    sentences = re.split(r"(?<=[.?!:]) (?=[A-Z$*])", " ".join(paragraph.split()))
    kept = sentences[:1]
    for sentence in sentences[1:]:
        if len(" ".join([*kept, sentence]).split()) > _MOST_WORDS:
            break
        kept.append(sentence)
    return " ".join(kept)


def _closing(notebook: NotebookNode) -> Iterator[Slide]:
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for heading, body in _sections(str(cell.source)):
                if heading in _CLOSING:
                    yield Slide(heading, markup(body))


def _figure_slide(section: str, output: Mapping[str, Any], figures: Path) -> Slide | None:
    """The slide of an output that book.show or book.token_view made; None for other outputs."""
    data = output.get("data", {})
    told: Mapping[str, str] = output.get("metadata", {}).get(FIGURE_KEY) or {}
    if not {"alt", "caption", "name"} <= set(told):
        return None
    caption = f"<figcaption>{markup(told['caption'], inline=True)}</figcaption>"
    if drawing := data.get("image/svg+xml"):
        name = f"{told['name']}.svg"
        write_text(figures / name, _joined(drawing))
    elif picture := data.get("image/png"):
        name = f"{told['name']}.png"
        figures.mkdir(parents=True, exist_ok=True)
        (figures / name).write_bytes(base64.b64decode(_joined(picture)))
    elif view := data.get("text/html"):
        return Slide(markup(section, inline=True), f"<figure>{_joined(view)}{caption}</figure>")
    else:
        return None
    image = f'<img src="figures/{name}" alt="{html.escape(told["alt"])}">'
    return Slide(markup(section, inline=True), f"<figure>{image}{caption}</figure>", "figure")


def _ids(question: quizzes.Question) -> set[str]:
    return {id for text in question.texts for id in re.findall(r"\[\[([a-z0-9-]+)", text)}


def _title(path: Path) -> str:
    first = str(notebooks.read_notebook(path).cells[0].source)
    return first.splitlines()[0].removeprefix("# ")


def _list(items: Iterator[str]) -> str:
    return markup("\n".join(f"- {item}" for item in items))


def _joined(text: object) -> str:
    return text if isinstance(text, str) else "".join(cast("Sequence[str]", text))

"""Rules for a committed chapter: what makes it clean, readable, honest and complete.

Every rule is a function from a `Source` to sentences; `lint` runs all of them and names the chapter
and the cell. The rules read source only: nothing is executed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from darkmatter._refusal import Refusal
from darkmatter.book import notebooks, quizzes
from darkmatter.book.claims import Claim, load_claims
from darkmatter.book.colab import leftovers
from darkmatter.book.editions import BEGINS, ENDS
from darkmatter.book.exercises import Exercise, exercises_of
from darkmatter.book.notebooks import SOLUTION_TAG, tags_of
from darkmatter.book.paths import Book, chapter_of
from darkmatter.book.prose import typed_numbers

if TYPE_CHECKING:
    from nbformat import NotebookNode

LONGEST_CELL = 25
PARAMETERS = ("suite", "seed")
_CARD = ("You will learn", "You need", "Minutes", "Memory")
_DIRECTIVE = re.compile(r"^\s*(:::|```+\{|~~~+\{)", re.MULTILINE)
_SPAN = "\0"  # stands for a code span
_ROLE = re.compile(r"\{[a-z][a-z:_-]*\}" + _SPAN)
_IMAGE = re.compile(r"<img\b|!\[[^\]]*\]\(", re.IGNORECASE)
_CODE = re.compile(r"^(```+|~~~+)[^\n{]*\n.*?^\1\s*$|(`+)(?!`).*?(?<!`)\2(?!`)", re.DOTALL | re.M)
_HEADING = re.compile(r"^(#{1,6})\s+(.+?)\s*$", re.MULTILINE)
_EXERCISE = re.compile(r"Exercise (\d\d\.\d+)\b")
_LIE = re.compile(r"Exercise \d\d\.\d+: make the method lie\b")
_CARD_MINUTES = re.compile(r"\| (\d+) to read and run, (\d+) for the exercises \|")
_LEAST_READING = 15
_LONGEST_READING = 20
_WORDS_A_MINUTE = 220
_FORMULA = re.compile(r"\$\$.*?\$\$", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """A cell with its number (from 1), and the syntax tree of its code without magics."""

    number: int
    node: NotebookNode
    tree: ast.Module | None

    @property
    def text(self) -> str:
        return str(self.node.source)

    @property
    def is_code(self) -> bool:
        return bool(self.node.cell_type == "code")

    @property
    def calls(self) -> Iterator[ast.Call]:
        """Calls in the order in which they are written."""
        found = ast.walk(self.tree or ast.Module([], []))
        calls = [node for node in found if isinstance(node, ast.Call)]
        return iter(sorted(calls, key=lambda call: (call.lineno, call.col_offset)))

    def calls_of(self, name: str, owner: str | None = None) -> list[ast.Call]:
        """Calls of a method or function by its last name, perhaps of one owner only."""
        found: list[ast.Call] = []
        for call in self.calls:
            function = call.func
            if isinstance(function, ast.Attribute) and function.attr == name:
                value = function.value
                if owner is None or (isinstance(value, ast.Name) and value.id == owner):
                    found.append(call)
        return found


@dataclass(frozen=True)
class Source:
    """What the rules look at: one chapter, its claims and its registered exercises."""

    chapter: str
    notebook: NotebookNode
    cells: list[Cell]
    claims: Mapping[str, Claim]
    exercises: Mapping[str, Exercise]
    repository: str

    @property
    def code(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.is_code]

    @property
    def markdown(self) -> list[Cell]:
        return [cell for cell in self.cells if not cell.is_code]


Rule = Callable[[Source], Iterator[str]]


def lint(book: Book, only: str | None = None) -> list[str]:
    """Everything against the rules in the chapters (or in one of them) and the static pages."""
    claims = load_claims(book.claims)
    repository = notebooks.repository_of(book.config)
    found: list[str] = []
    for path in book.chapters(only):
        chapter = chapter_of(path) or ""
        found += lint_notebook(path, claims, exercises_of(chapter), repository)
    if only is None:
        found += [problem for page in sorted(book.source.rglob("*.md")) for problem in _page(page)]
        known = {chapter_of(path) or "" for path in book.chapters()}
        found += [
            f"claims.yml: {claim.id} belongs to chapter {claim.chapter}, which does not exist"
            for claim in claims.values()
            if claim.chapter not in known
        ]
        if (bank := book.source / quizzes.SOURCE).is_file():
            there = {id for chapter in known for id in exercises_of(chapter)}
            found += quizzes.problems(quizzes.load_quizzes(bank), known, set(claims), there)
    return found


def lint_notebook(
    path: Path, claims: Mapping[str, Claim], exercises: Mapping[str, Exercise], repository: str
) -> list[str]:
    """Everything against the rules in one chapter, each as "file: what"."""
    notebook = notebooks.read_notebook(path)
    cells: list[Cell] = []
    found: list[str] = []
    for number, node in enumerate(notebook.cells, start=1):
        tree: ast.Module | None = None
        if node.cell_type == "code":
            try:
                tree = ast.parse(_without_magics(node.source))
            except SyntaxError as error:
                found.append(f"cell {number}: its code cannot be read: {error.msg}")
        cells.append(Cell(number, node, tree))
    source = Source(chapter_of(path) or "", notebook, cells, claims, exercises, repository)
    for rule in RULES:
        found += rule(source)
    return [f"{path.name}: {problem}" for problem in found]


def no_outputs(source: Source) -> Iterator[str]:
    """A committed notebook holds no outputs and no execution counts."""
    for cell in source.code:
        if cell.node.get("outputs") or cell.node.get("execution_count") is not None:
            yield f"cell {cell.number}: has outputs or an execution count; clear them"


def setup_first(source: Source) -> Iterator[str]:
    """The first code cell is the setup cell made from the address in _config.yml."""
    expected = notebooks.setup_cell(source.repository)
    if not source.code or source.code[0].text != expected:
        yield (
            "the first code cell is not the setup cell made from _config.yml; "
            "write '# %% [setup]' and convert"
        )
    for cell in source.code[1:]:
        if "google.colab" in cell.text or "%pip" in cell.text:
            yield f"cell {cell.number}: installs something; only the setup cell may"


def parameters_and_start(source: Source) -> Iterator[str]:
    """A parameters cell sets suite and seed; then start takes both, and nothing is before it."""
    tagged = [cell for cell in source.code if "parameters" in tags_of(cell.node)]
    if len(tagged) != 1:
        yield f"expected one cell tagged parameters, found {len(tagged)}"
        return
    names = {
        target.id
        for node in (tagged[0].tree.body if tagged[0].tree else [])
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for name in PARAMETERS:
        if name not in names:
            yield f"cell {tagged[0].number}: the parameters cell does not set {name}"
    started = [cell for cell in source.code if cell.calls_of("start", "book")]
    if len(started) != 1 or len(started[0].calls_of("start", "book")) != 1:
        yield "expected one call of book.start(...), found " + str(len(started))
        return
    call = started[0].calls_of("start", "book")[0]
    if [cell.number for cell in source.code[1:3]] != [tagged[0].number, started[0].number]:
        yield "after the setup cell, expected the parameters cell and then the cell with book.start"
    passed = {keyword.arg: keyword.value for keyword in call.keywords}
    for name in PARAMETERS:
        value = passed.get(name)
        if not isinstance(value, ast.Name) or value.id != name:
            yield (
                f"cell {started[0].number}: book.start must be called with {name}={name}, "
                "the parameter"
            )
    if not call.args or _constant(call.args[0]) != source.chapter:
        yield f'cell {started[0].number}: book.start must be given "{source.chapter}" first'


def no_typed_numbers(source: Source) -> Iterator[str]:
    """No decimal or percentage is typed into prose, said text, captions or alternative texts."""
    for cell in source.markdown:
        for typed in typed_numbers(cell.text):
            yield (
                f"cell {cell.number}: {typed!r} is typed into prose; "
                "record the number and use chapter.say"
            )
    for cell in source.code:
        said = [
            (call, "say or text", call.args[0] if call.args else None)
            for call in cell.calls_of("say") + cell.calls_of("text", "chapter")
        ]
        said += [
            (call, keyword.arg or "", keyword.value)
            for call in _figures(cell)
            for keyword in call.keywords
            if keyword.arg in ("alt", "caption")
        ]
        for _, where, value in said:
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                for typed in typed_numbers(value.value):
                    yield (
                        f"cell {cell.number}: {typed!r} is typed into {where}; "
                        "record the number and write {id}"
                    )
            elif where == "say or text" or not _is_text_call(value):
                yield (
                    f"cell {cell.number}: {where} must be a literal string"
                    + ("" if where == "say or text" else " or chapter.text(...)")
                    + ", so that no number slips in unrecorded"
                )


def recorded_ids(source: Source) -> Iterator[str]:
    """Every recorded id is a claim of this chapter, and every claim of it is recorded."""
    ours = {claim.id for claim in source.claims.values() if claim.chapter == source.chapter}
    covered: set[str] = set()
    for cell in source.code:
        for call in cell.calls_of("record"):
            pattern = _pattern(call.args[0]) if call.args else None
            if pattern is None:
                yield f"cell {cell.number}: record needs its id as a string or an f-string"
                continue
            matching = {one for one in ours if re.fullmatch(pattern, one)}
            if not matching:
                yield (
                    f"cell {cell.number}: records {ast.unparse(call.args[0])}, "
                    f"which claims.yml does not give to chapter {source.chapter}"
                )
            covered |= matching
    for missing in sorted(ours - covered):
        yield f"claims.yml gives {missing} to this chapter, but no cell records it"


def said_ids(source: Source) -> Iterator[str]:
    """Every placeholder of say and text names an id of the ledger."""
    from darkmatter.book.prose import fill

    for cell in source.code:
        for call in cell.calls_of("say") + cell.calls_of("text", "chapter"):
            text = _constant(call.args[0]) if call.args else None
            names: list[str] = []
            if isinstance(text, str):
                try:
                    fill(text, lambda id, form, names=names: names.append(id) or "")
                except Refusal as error:
                    yield f"cell {cell.number}: {error}"
            for name in names:
                if name not in source.claims:
                    yield f"cell {cell.number}: says {{{name}}}, which is not in claims.yml"


def template(source: Source) -> Iterator[str]:
    """The sections of a chapter are all there, in order."""
    if not source.cells or source.cells[0].is_code:
        yield "the first cell must be Markdown: title, **Claim.** and card"
        return
    first = source.cells[0].text
    if not re.match(rf"# {source.chapter} · \S", first):
        yield f"cell 1: must begin with the title '# {source.chapter} · ...'"
    if not re.search(r"^\*\*Claim\.\*\* \S.*[.!?]$", first, re.MULTILINE):
        yield "cell 1: needs one line '**Claim.** ...' that ends with a full stop"
    for word in _CARD:
        if word not in first:
            yield f"cell 1: the card lacks '{word}'"
    yield from _order(source)


def _order(source: Source) -> Iterator[str]:
    places: list[tuple[str, int | None]] = [
        ("'**Predict first.**'", _first(source, r"\*\*Predict first\.\*\*")),
        ("a heading 'Known truth'", _first_heading(source, "Known truth")),
        ("a heading 'Control'", _first_heading(source, "Control")),
        ("the heading 'Exercises'", _first_heading(source, "Exercises")),
        ("the heading 'What to remember'", _first_heading(source, "What to remember")),
        (
            "the heading 'Where this can fool you'",
            _first_heading(source, "Where this can fool you"),
        ),
        ("the heading 'Read on'", _first_heading(source, "Read on")),
    ]
    for what, place in places:
        if place is None:
            yield f"lacks {what}"
    order = [place for _, place in places[3:] if place is not None]
    if order != sorted(order):
        yield (
            "the last sections are out of order: Exercises, What to remember, "
            "Where this can fool you, Read on"
        )
    for what, place in places[:3]:
        if place is not None and order and place > order[0]:
            yield f"{what} comes after {places[3][0]}; put it before"


def exercises(source: Source) -> Iterator[str]:
    """Three to six exercises, each with its heading, hint, solution and registered check.

    One of them asks for an input on which the method reports something false.
    """
    headings: dict[str, Cell] = {}
    lies = 0
    for cell in source.markdown:
        for match in _HEADING.finditer(cell.text):
            if named := _EXERCISE.match(match[2]):
                headings[named[1]] = cell
                lies += bool(_LIE.match(match[2]))
    if not 3 <= len(headings) <= 6:
        yield f"expected three to six exercises ('### Exercise 02.1: ...'), found {len(headings)}"
    if lies != 1:
        yield f"expected one exercise '### Exercise 02.1: make the method lie ...', found {lies}"
    checked = {
        str(_constant(call.args[0])): cell
        for cell in source.code
        for call in cell.calls_of("check", "book")
        if call.args
    }
    for id in sorted({*headings, *checked, *source.exercises}):
        lacks = [
            what
            for what, there in (
                ("a heading", id in headings),
                ("a call of book.check", id in checked),
                (f"a check in checks/chapter_{source.chapter}.py", id in source.exercises),
            )
            if not there
        ]
        if lacks:
            yield f"exercise {id} lacks {' and '.join(lacks)}"
            continue
        cell, registered = headings[id], source.exercises[id]
        announced = f"Difficulty {registered.difficulty}, {registered.minutes} minute"
        if announced not in cell.text:
            yield f"cell {cell.number}: exercise {id} must say '{announced}s', as its check does"
        if f"Teaches: {registered.teaches}" not in cell.text:
            yield (
                f"cell {cell.number}: exercise {id} must say what it teaches, as its check does: "
                f"'Teaches: {registered.teaches}'"
            )
        if "<summary>Hint</summary>" not in cell.text:
            yield f"cell {cell.number}: exercise {id} lacks a folded hint (<summary>Hint</summary>)"
        between = [one for one in source.code if cell.number < one.number <= checked[id].number]
        if not any(SOLUTION_TAG in tags_of(one.node) for one in between):
            yield f"exercise {id}: no cell tagged solution between its heading and its check"


def solutions(source: Source) -> Iterator[str]:
    """Solution lines stand inside a function, between their marks, in cells tagged solution.

    They are folded, as what is said about them is, and the function is typed.
    """
    for cell in source.markdown:
        if SOLUTION_TAG in tags_of(cell.node) and "<details>" not in cell.text:
            yield f"cell {cell.number}: what is said about a solution must be folded (<details>)"
    for cell in source.code:
        lines = cell.text.split("\n")
        marks = [line.strip() for line in lines if line.strip() in (BEGINS, ENDS)]
        if SOLUTION_TAG not in tags_of(cell.node):
            if marks:
                yield f"cell {cell.number}: holds solution marks without the tag {SOLUTION_TAG!r}"
            continue
        if not marks or marks != [BEGINS, ENDS] * (len(marks) // 2):
            yield f"cell {cell.number}: expected '{BEGINS}' and '{ENDS}' in pairs"
        elif any(line.strip() == BEGINS and not line.startswith(" ") for line in lines):
            yield f"cell {cell.number}: a solution must stand inside a function, indented"
        if not cell.node.metadata.get("jupyter", {}).get("source_hidden"):
            yield f"cell {cell.number}: a solution must be folded; convert the notebook again"
        for name in _untyped(cell):
            yield f"cell {cell.number}: the stub {name} needs a type for each argument and result"


def minutes_of_exercises(source: Source) -> Iterator[str]:
    """The card gives the minutes to read, and beside them the sum of those of the exercises."""
    total = sum(exercise.minutes for exercise in source.exercises.values())
    said = _CARD_MINUTES.search(source.cells[0].text) if source.cells else None
    if said is None or int(said[2]) != total or int(said[1]) < _LEAST_READING:
        yield (
            f"cell 1: the card's minutes must be '... to read and run, {total} for the exercises', "
            f"with at least {_LEAST_READING} to read and run"
        )


def readable(source: Source) -> Iterator[str]:
    """What is not an exercise takes at most 20 minutes to read, half a minute of each figure."""
    words, in_exercises = 0, False
    for cell in source.cells:
        if not cell.is_code:
            titles = [match[2] for match in _HEADING.finditer(cell.text)]
            in_exercises = titles[-1].startswith("Exercise") if titles else in_exercises
        if not in_exercises and (not cell.is_code or cell.calls_of("say")):
            words += len(_FORMULA.sub(" ", cell.text).split())
    minutes = words / _WORDS_A_MINUTE + 0.5 * sum(len(_figures(cell)) for cell in source.code)
    if minutes > _LONGEST_READING:
        yield f"takes {minutes:.0f} minutes to read, at most {_LONGEST_READING}: say less"


def short_cells(source: Source) -> Iterator[str]:
    """A code cell has at most 25 lines."""
    for cell in source.code:
        length = len(cell.text.split("\n"))
        if length > LONGEST_CELL:
            yield f"cell {cell.number}: {length} lines of code; at most {LONGEST_CELL}"


def plain_markdown(source: Source) -> Iterator[str]:
    """Markdown is readable in Colab: no directives, no roles, no images without a record."""
    for cell in source.markdown:
        prose = _CODE.sub(_SPAN, cell.text)
        if _DIRECTIVE.search(cell.text):
            yield f"cell {cell.number}: a directive, raw in Colab; use a quote or <details>"
        elif _ROLE.search(prose) or "{cite" in prose:
            yield f"cell {cell.number}: a role, raw in Colab; use a link"
        else:
            for problem in leftovers(cell.text):
                yield f"cell {cell.number}: {problem}"
        if _IMAGE.search(prose):
            yield f"cell {cell.number}: an image; make it in a cell and use book.show"


def one_figure(source: Source) -> Iterator[str]:
    """A cell shows at most one figure, and only through book's show, token_view or explore."""
    for cell in source.code:
        if len(_figures(cell)) > 1:
            yield f"cell {cell.number}: shows two figures; give each its cell"
        if cell.calls_of("show", "plt"):
            yield f"cell {cell.number}: plt.show() has no alternative text; use book.show"


RULES: tuple[Rule, ...] = (
    no_outputs,
    setup_first,
    parameters_and_start,
    no_typed_numbers,
    recorded_ids,
    said_ids,
    template,
    exercises,
    solutions,
    minutes_of_exercises,
    readable,
    short_cells,
    plain_markdown,
    one_figure,
)


def _page(path: Path) -> Iterator[str]:
    for typed in typed_numbers(path.read_text(encoding="utf-8")):
        yield f"{path.name}: {typed!r} is typed into prose; write [[id]] and let the build fill it"


def _without_magics(source: str) -> str:
    lines = source.split("\n")
    return "\n".join(re.sub(r"^(\s*)[%!].*$", r"\1pass", line) for line in lines)


def _figures(cell: Cell) -> list[ast.Call]:
    """Calls that show a figure."""
    return [
        call for name in ("show", "token_view", "explore") for call in cell.calls_of(name, "book")
    ]


def _untyped(cell: Cell) -> Iterator[str]:
    """Functions at the top of a cell that lack an annotation."""
    for node in cell.tree.body if cell.tree else []:
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            if node.returns is None or any(one.annotation is None for one in arguments):
                yield node.name


def _constant(node: ast.expr) -> object:
    return node.value if isinstance(node, ast.Constant) else None


def _pattern(node: ast.expr) -> str | None:
    """Regular expression of the ids that a literal or an f-string can give."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.escape(node.value)
    if isinstance(node, ast.JoinedStr):
        parts = [
            re.escape(str(part.value)) if isinstance(part, ast.Constant) else "[a-z0-9-]+"
            for part in node.values
        ]
        return "".join(parts)
    return None


def _is_text_call(node: ast.expr | None) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "text"
    )


def _first(source: Source, pattern: str) -> int | None:
    return next((cell.number for cell in source.markdown if re.search(pattern, cell.text)), None)


def _first_heading(source: Source, start: str) -> int | None:
    for cell in source.markdown:
        for match in _HEADING.finditer(_CODE.sub(" ", cell.text)):
            if match[2].startswith(start):
                return cell.number
    return None

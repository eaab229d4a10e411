"""Each rule for a committed chapter with its violation planted; the mini chapter keeps them all."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from darkmatter.book import notebooks
from darkmatter.book.lint import lint
from darkmatter.book.paths import Book
from tests.book.minibook import CLAIMS, chapter_text

MakeBook = Callable[..., Book]
pytestmark = pytest.mark.usefixtures("checks_99")

START = 'book.start("99", suite=suite, seed=seed)'
HINT = "<summary>Hint</summary>"


def test_a_good_chapter_passes(make_book: MakeBook) -> None:
    assert lint(make_book()) == []


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        # numbers typed into prose
        ("- the rules", "- the rules hold for 0.31", "'0.31' is typed into prose"),
        ("- the rules", "- the rules hold for 31 %", "'31 %' is typed into prose"),
        ("It misses {mini-fvu:%}", "It misses 0.31", "'0.31' is typed into say"),
        ('say("It', 'say(f"It', "must be a literal string"),
        ("Line chart: the", "Line chart from 0.3: the", "'0.3' is typed into alt"),
        ('chapter.text("Error', 'str("Error', "caption must be a literal string or chapter.text"),
        # a removed seed, a removed parameter
        (START, 'book.start("99", suite=suite, seed=0)', "must be called with seed=seed"),
        (START, 'book.start("99", suite=suite)', "must be called with seed=seed"),
        (START, 'book.start("99", suite="pydocs", seed=seed)', "with suite=suite"),
        (START, 'book.start("98", suite=suite, seed=seed)', 'must be given "99" first'),
        (f"chapter = {START}", "pass", "expected one call of book.start"),
        ("seed = 0\n", "", "does not set seed"),
        ('tags=["parameters"]', "", "one cell tagged parameters, found 0"),
        ("# %%\nchapter =", "# %%\n1 + 1\n# %%\nchapter =", "after the setup cell"),
        # setup
        ("# %% [setup]", "# %%\nimport darkmatter as dm", "is not the setup cell"),
        ("import torch\n", "%pip install torch\n", "only the setup cell may"),
        # ids
        ('record("mini-fvu"', 'record("mini-fvo"', "does not give to chapter 99"),
        ('record("mini-fvu"', 'record("mini-fvo"', "gives mini-fvu to this chapter, but no cell"),
        ('record("mini-fvu"', "record(name", "needs its id as a string"),
        ("{mini-fvu:%}", "{mini-fvo:%}", "says {mini-fvo}"),
        ("{mini-fvu:%}", "{mini-fvu:2f}", "with one of plain"),
        # template
        ("# 99 · A mini", "# A mini", "must begin with the title '# 99 · ...'"),
        ("**Claim.** A", "A", "needs one line '**Claim.** ...'"),
        ("You need", "Needs", "the card lacks 'You need'"),
        ("**Predict first.**", "Guess.", "lacks '**Predict first.**'"),
        ("## Known truth", "## Truth", "lacks a heading 'Known truth'"),
        ("## Control", "## Check", "lacks a heading 'Control'"),
        ("## Exercises", "## Tasks", "lacks the heading 'Exercises'"),
        ("## What to remember", "## Remember", "lacks the heading 'What to remember'"),
        ("## Where this can fool you", "## Limits", "lacks the heading 'Where this"),
        ("## Read on", "## More", "lacks the heading 'Read on'"),
        # exercises
        ("### Exercise 99.2", "### Task", "expected three to six exercises"),
        ("### Exercise 99.2", "### Task", "exercise 99.2 lacks a heading"),
        ('book.check("99.2"', 'print("99.2"', "exercise 99.2 lacks a call of book.check"),
        ("Difficulty 2, 5", "Difficulty 2, 9", "must say 'Difficulty 2, 5 minutes'"),
        (HINT, "<summary>H</summary>", "lacks a folded hint"),
        ("Teaches: Doubling is adding.", "", "must say what it teaches, as its check does"),
        ("make the method lie", "and again", "make the method lie ...', found 0"),
        (": double it", ": make the method lie", "make the method lie ...', found 2"),
        ("(x: float) -> float", "(x) -> float", "the stub double_1 needs a type"),
        ("(x: float) -> float", "(x: float)", "the stub double_1 needs a type"),
        ("run, 15 for", "run, 10 for", "must be '... to read and run, 15 for the exercises'"),
        ("| 15 to read", "| 5 to read", "with at least 15 to read and run"),
        ("- the rules", "- the rules" + 4400 * " hold", "minutes to read, at most 20"),
        ('# %% tags=["solution"]', "# %%", "no cell tagged solution"),
        ('# %% tags=["solution"]', "# %%", "solution marks without the tag"),
        ("    # solution ends\n", "", "in pairs"),
        ("    # solution begins\n", "# solution begins\n", "must stand inside a function"),
        # cells
        ("import torch\n", "import torch\n" + "1\n" * 25, "lines of code; at most 25"),
        ("import torch\n", "import torch(\n", "its code cannot be read"),
        ("- nowhere", ":::{note}\nnowhere\n:::", "a directive"),
        ("- nowhere", "```{note}\nnowhere\n```", "a directive"),
        ("- nowhere", "{doc}`intro`", "a role"),
        ("- nowhere", "a **bold", "bold marks, raw in Colab"),
        ("- nowhere", r"$\\hat x$", "a doubled backslash"),
        ("- nowhere", "![a](b.png)", "an image"),
        ("- nowhere", '<img src="b.png">', "an image"),
        ("figure, axes", 'book.show(1, alt="x")\nfigure, axes', "shows two figures"),
        (
            "figure, axes",
            'book.token_view([], {}, alt="x")\nbook.show(1, alt="x")\nfigure, axes',
            "shows two figures",
        ),
        (
            "figure, axes",
            'book.token_view([], {}, caption="It is 0.3.")\nfigure, axes',
            "'0.3' is typed into caption",
        ),
        (
            "figure, axes",
            'book.explore(1, {}, caption="It is 0.3.")\nfigure, axes',
            "'0.3' is typed into caption",
        ),
        ("figure, axes", "plt.show()\nfigure, axes", "plt.show() has no alternative text"),
    ],
)
def test_each_violation_is_named(make_book: MakeBook, old: str, new: str, message: str) -> None:
    text = chapter_text()
    assert old in text
    found = lint(make_book(text.replace(old, new)))
    assert any(message in problem for problem in found), found
    assert all(problem.startswith("99_mini.ipynb: ") for problem in found)


def test_outputs_and_execution_counts_are_refused(make_book: MakeBook) -> None:
    book = make_book()
    path = book.source / "99_mini.ipynb"
    notebook = notebooks.read_notebook(path)
    notebook.cells[1]["execution_count"] = 1
    notebook.cells[2]["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "1"}]
    notebooks.write_notebook(notebook, path)
    assert [problem.split(";")[0] for problem in lint(book)] == [
        "99_mini.ipynb: cell 2: has outputs or an execution count",
        "99_mini.ipynb: cell 3: has outputs or an execution count",
    ]


def test_sections_out_of_order_are_refused(make_book: MakeBook) -> None:
    control = '# %% [markdown]\n"""\n## Control: shuffled rows\n"""\n'
    text = chapter_text()
    found = lint(make_book(text.replace(control, "") + "\n" + control))
    assert any("'Control' comes after the heading 'Exercises'" in problem for problem in found)
    swapped = text.replace("## What to remember", "## X").replace("## Exercises", "## What to")
    swapped = swapped.replace("## What to", "## What to remember").replace("## X", "## Exercises")
    assert any("out of order" in problem for problem in lint(make_book(swapped)))


def test_braces_and_directives_in_code_spans_are_left_alone(make_book: MakeBook) -> None:
    text = chapter_text().replace("- nowhere", "- `{id}`, `a {role}` and `:::` in code")
    assert lint(make_book(text)) == []


def test_static_pages_and_claims_of_no_chapter_are_checked(make_book: MakeBook) -> None:
    book = make_book(claims=CLAIMS.replace('"99"', '"98"', 1))
    (book.source / "intro.md").write_text("# Mini\n\nIt misses 31 % of it.\n")
    found = lint(book)
    assert any("intro.md: '31 %' is typed into prose" in problem for problem in found)
    assert any("mini-fvu belongs to chapter 98, which does not exist" in one for one in found)

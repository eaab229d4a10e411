"""Markdown as Colab shows it: leftovers are found, and the chapters have none, in both editions."""

from __future__ import annotations

from pathlib import Path

import pytest

from darkmatter.book.colab import leftovers
from darkmatter.book.editions import student_edition
from darkmatter.book.notebooks import read_notebook, setup_cell
from darkmatter.book.paths import open_book

ROOT = Path(__file__).parents[2]
BOOK = open_book(ROOT)

GOOD = r"""# Title

Text with $x_{i}$, **bold**, `{term}` in code, `$5` and [a link](https://e.org/a_b).

$$
\hat x = f\, W, \qquad a \\ b
$$

| a | b |
|---|---|
| $\lVert e\rVert$ | `code \| here` |

> **Predict first.** Which?

<details><summary>Hint</summary>

A *hint* with $y$.

</details>

```python
catalogue[0]  # {not} a role
```

- a list
- of **two**
"""


def test_plain_markdown_leaves_nothing_raw() -> None:
    assert list(leftovers(GOOD)) == []


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("See {term}`latent`.", "a role, raw in Colab"),
        ("See {cite:t}`engels2025`.", "a role, raw in Colab"),
        (":::{note}\ntext\n:::", "a directive, raw in Colab"),
        ("It misses [[fvu-512:%]].", "a placeholder, raw in Colab: 'It misses [[fvu-512:%]]'"),
        ("a lonely $x", "a dollar sign of a formula"),
        ("a **bold", "bold marks"),
        ("text\n| a | b |\n| c | d |", "a row of a table"),
        ("<details><summary>Hint</summary>\n\na", "1 folds are opened and 0 closed"),
        ("<details><summary>A</summary>\ntext **b**\n\n</details>", "so the fold stays raw"),
        ("(a-label)=\n# Title", "a label"),
        (r"\\(x\\) is $y$", "LaTeX"),
        (r"$\\hat x$", r"a doubled backslash in the formula"),
        ("a $ x$ in a line", "a space beside a dollar sign"),
        ("| a | b |\n|---|---|\n| $\\|x\\|$ | 1 |", "a bar in a formula of a table"),
        ("a claim[^1]\n", "a footnote"),
        ("a term\n: and what it means", "a definition"),
        ("[text]{.wide}", "an attribute"),
        ("<details><summary>What of `x`?</summary>\n\na\n\n</details>", "a code mark"),
        ("<details><summary>What of $x$?</summary>\n\na\n\n</details>", "a dollar sign"),
        ("<details><summary>A</summary>\n\ntext\n</details>", "before the end of the fold"),
        ("$$\n(t - \\\\bar t)\\\\,\n$$", "a doubled backslash in the formula"),
    ],
)
def test_what_colab_does_not_know_is_named(text: str, what: str) -> None:
    assert any(what in problem for problem in leftovers(text)), list(leftovers(text))


@pytest.mark.parametrize("path", BOOK.chapters(), ids=lambda path: path.stem[:2])
def test_every_cell_of_the_book_reads_well_in_colab(path: Path) -> None:
    solved = read_notebook(path)
    for edition in (solved, student_edition(solved)):
        found = [
            f"cell {number}: {problem}"
            for number, cell in enumerate(edition.cells, start=1)
            if cell.cell_type == "markdown"
            for problem in leftovers(cell.source)
        ]
        assert found == []


def test_the_setup_cell_is_short_and_installs_ranges_only_on_colab() -> None:
    lines = setup_cell("https://github.com/somebody/book").split("\n")
    assert len(lines) <= 6
    (install,) = [line for line in lines if "pip" in line]
    assert lines[lines.index(install) - 1] == 'if "google.colab" in sys.modules:'
    assert "==" not in install
    assert "torch" not in install

"""A book of one small chapter, good in every respect, for the tests to break."""

from __future__ import annotations

from pathlib import Path

from darkmatter.book import notebooks
from darkmatter.book.paths import Book

REPOSITORY = "https://github.com/somebody/book"

CONFIG = f"""
title: Mini
author: Nobody
logo: ""
execute:
  execute_notebooks: "off"
repository:
  url: {REPOSITORY}
  path_to_book: book
  branch: main
launch_buttons:
  notebook_interface: classic
  colab_url: https://colab.research.google.com
html:
  use_repository_button: true
sphinx:
  extra_extensions: [sphinx-mathjax-offline]
  config:
    suppress_warnings: [mystnb.unknown_mime_type]
"""

TOC = """
format: jb-book
root: intro
chapters:
  - file: 99_mini
  - file: claims
  - file: run_statistics
  - file: suite_card
"""

CLAIMS = """
- id: mini-fvu
  chapter: "99"
  kind: claim
  statement: The mini SAE misses some of the variance.
  source: ours
  paper: {value: 0.313, model: a large one, certainty: read off the figure}
  expect:
    pydocs:
      holds: [0.2, 0.4]
      weaker: [0.1, 0.2]
      verdict: holds
      tolerance: 0.01
      because: The value is typed into the mini chapter.
- id: mini-random
  chapter: "99"
  kind: value
  statement: A random number shows whether the seed is set.
  source: ours
  paper: not published
  expect:
    pydocs:
      tolerance: 0.0
      because: The same seed gives the same number.
- id: mini-shuffled
  chapter: "99"
  kind: control
  nothing: 0.0
  statement: A probe fitted on shuffled rows finds nothing.
  source: ours
  paper: not published
  expect:
    pydocs:
      holds: [-0.05, 0.05]
      verdict: holds
      tolerance: 0.01
      because: Nothing can be found in rows that do not belong together.
- id: mini-falling
  chapter: "99"
  kind: claim
  statement: The error falls from width to width.
  source: ours
  paper: not published
  expect:
    pydocs:
      relation: falling
      verdict: holds
      tolerance: 0.01
      because: The values are typed into the mini chapter.
"""

CHAPTER = '''# %% [markdown]
"""
# 99 · A mini chapter

**Claim.** A chapter that keeps all rules passes the lint.

| You will learn | You need | Minutes | Memory |
|---|---|---|---|
| the rules | nothing | 15 to read and run, 15 for the exercises | 1 GiB |
"""

# %% [setup]

# %% tags=["parameters"]
suite = "pydocs"
seed = 0

# %%
chapter = book.start("99", suite=suite, seed=seed)

# %% [markdown]
"""
> **Predict first.** Is $e = x - 0.5 \\hat{x}$ small? See `0.25` and [a page](https://e.org/1.5).
"""

# %%
import torch

chapter.record("mini-fvu", 0.311, (0.305, 0.317))
chapter.record("mini-random", torch.rand(()).item())
for rows, value in [("shuffled", 0.001)]:
    chapter.record(f"mini-shuf{rows[4:]}", value)
chapter.record("mini-falling", [0.3, 0.2, 0.1])

# %% tags=["remove-input"]
chapter.say("It misses {mini-fvu:%}, the paper {mini-fvu:paper}; $\\\\|x_{i}\\\\|^2$ is a formula.")

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots()
axes.plot([1, 2, 3], [3, 2, 1], color=book.COLOURS["linear"])
book.show(
    figure,
    alt="Line chart: the error falls steadily with width.",
    caption=chapter.text("Error against width, {mini-fvu} at first."),
    name="fig-mini",
)

# %% [markdown]
"""
## Known truth: planted
"""

# %% [markdown]
"""
## Control: shuffled rows
"""

# %% [markdown]
"""
## Exercises
"""
'''

EXERCISE = '''
# %% [markdown]
"""
### Exercise 99.{n}: {title}

Difficulty 2, 5 minutes. Teaches: Doubling is adding. Write a function that doubles.

<details><summary>Hint</summary>

Add.

</details>
"""

# %% tags=["solution"]
def double_{n}(x: float) -> float:
    """Twice x."""
    # solution begins
    return x + x
    # solution ends

# %%
{check}
'''

END = '''
# %% [markdown]
"""
## What to remember

- the rules

## Where this can fool you

- nowhere

## Read on

- [a page](https://example.org)
"""
'''


def chapter_text(with_checks: bool = True) -> str:
    """The chapter in percent format; without checks it runs in a kernel that has no chapter_99."""
    return (
        CHAPTER
        + "".join(
            EXERCISE.format(
                n=n,
                title=title,
                check=f'book.check("99.{n}", double_{n})' if with_checks else f"double_{n}(1)",
            )
            for n, title in enumerate(("double it", "again", "make the method lie"), start=1)
        )
        + END
    )


def write_book(root: Path, chapter: str | None = None, claims: str = CLAIMS) -> Book:
    """Write the mini book; `chapter` is the percent-format text of 99_mini.ipynb."""
    book = Book(root)
    notebooks.write_text(book.config, CONFIG)
    notebooks.write_text(book.source / "_toc.yml", TOC)
    notebooks.write_text(book.source / "intro.md", "# Mini\n\nMisses [[mini-fvu:%]] at first.\n")
    notebooks.write_text(book.claims, claims)
    notebook = notebooks.from_percent(chapter or chapter_text(), REPOSITORY)
    notebooks.write_notebook(notebook, book.source / "99_mini.ipynb")
    return book

"""Percent format and notebooks: the same cells both ways, the same bytes every time."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbformat import v4

from darkmatter._refusal import Refusal
from darkmatter.book import notebooks
from tests.book.minibook import REPOSITORY, chapter_text

# Lines that are no headers, without the trailing blank lines that the format does not keep.
LINE = st.text(st.characters(codec="ascii", categories=("L", "N", "P", "S")), max_size=12).filter(
    lambda line: not line.startswith(("# %%", '"""', 'r"""'))
)
BODY = st.lists(LINE, min_size=1, max_size=4).map("\n".join).map(str.strip)
CELL = st.tuples(
    st.sampled_from(["code", "markdown"]), BODY, st.lists(st.sampled_from("ab"), unique=True)
)


@given(st.lists(CELL, min_size=1, max_size=4))
def test_to_percent_and_back_gives_the_same_cells(cells: list[tuple[str, str, list[str]]]) -> None:
    made = [
        (v4.new_code_cell if kind == "code" else v4.new_markdown_cell)(
            text, metadata={"tags": tags} if tags else {}
        )
        for kind, text, tags in cells
    ]
    back = notebooks.from_percent(notebooks.to_percent(v4.new_notebook(cells=made)))
    assert [(c.cell_type, c.source, notebooks.tags_of(c)) for c in back.cells] == cells


def test_the_same_text_gives_the_same_file_and_it_is_valid(tmp_path: Path) -> None:
    for name in ("a", "b"):
        notebook = notebooks.from_percent(chapter_text(), REPOSITORY)
        notebooks.write_notebook(notebook, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    notebooks.write_notebook(notebooks.read_notebook(tmp_path / "a"), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_edit_changes_the_id_of_the_edited_cell_only() -> None:
    before = notebooks.from_percent("# %%\na = 1\n# %%\nb = 2\n# %%\nb = 2\n")
    after = notebooks.from_percent("# %%\na = 3\n# %%\nb = 2\n# %%\nb = 2\n")
    ids = [(one["id"], other["id"]) for one, other in zip(before.cells, after.cells, strict=True)]
    assert ids[0][0] != ids[0][1]
    assert ids[1][0] == ids[1][1]
    assert len({cell["id"] for cell in before.cells}) == 3


def test_markdown_may_stand_between_quotes() -> None:
    notebook = notebooks.from_percent('# %% [markdown]\n"""\n# Title\n\n$x_{i}$\n"""\n')
    assert notebook.cells[0].source == "# Title\n\n$x_{i}$"


def test_setup_cell_comes_from_the_address_in_the_configuration(tmp_path: Path) -> None:
    config = tmp_path / "_config.yml"
    config.write_text(f"repository:\n  url: {REPOSITORY}/\n")
    source = notebooks.setup_cell(notebooks.repository_of(config))
    assert f"git+{REPOSITORY}" in source
    assert len(source.split("\n")) <= 6
    assert notebooks.from_percent("# %% [setup]\n", REPOSITORY).cells[0].source == source


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "line 1: expected a cell header"),
        ("# %% [raw]\n", "line 1: expected"),
        ("# %% tags=[1]\n", "tags as a JSON list"),
        ("# %% tags=[a]\n", "tags as a JSON list"),
        ("# %% [markdown]\nbare\n", 'expected every line to begin with "# "'),
        ("# %% [setup]\nimport sys\n", "filled in from"),
        ("# %% [setup]\n", "repository address"),
        ("", "at least one cell"),
    ],
)
def test_text_that_is_no_chapter_is_refused(text: str, message: str) -> None:
    with pytest.raises(Refusal, match=message.replace("[", r"\[")):
        notebooks.from_percent(text)


def test_a_missing_address_and_a_broken_notebook_are_refused(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="https address under repository"):
        notebooks.repository_of(tmp_path / "_config.yml")
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(Refusal, match="expected a notebook at"):
        notebooks.read_notebook(tmp_path / "x.ipynb")

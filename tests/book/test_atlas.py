"""The atlas: what an entry keeps of a survey, and the page that is made from entries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import darkmatter as dm
from darkmatter.activations import Tokens
from darkmatter.book.atlas import add_entry, atlas_page, entry_of, read_entries
from darkmatter.book.paths import Book
from darkmatter.survey import Survey


def small_survey(model: str = "somebody/model") -> Survey:
    """One SAE, with downstream scores of which one could not be computed."""
    row: dict[str, Any] = {"hook": "blocks.1.hook_resid_post", "d_sae": 96, "dead": 0.25}
    row |= {"n_fit": 1000, "n_test": 500}
    for i, score in enumerate(("l0", "fvu", "fvu_nonlinear", "r2_vector", "r2_norm", "cost")):
        value = 0.1 * (i + 1) + 1e-9
        row |= {score: value, f"{score}_low": value - 0.01, f"{score}_high": value + 0.01}
    for score in ("recovered_linear", "recovered_nonlinear"):
        row |= {score: float("nan"), f"{score}_low": float("nan"), f"{score}_high": float("nan")}
    tokens = Tokens(
        torch.ones(4, 32, dtype=torch.int64), torch.tensor([0, 0, 1, 2]), ("a", "b", "c")
    )
    settings = {
        "model": {"name": model},
        "settings": {"seed": 3},
        "identity": "0123456789abcdef",
        "versions": {"torch": "2"},
    }
    return Survey(
        table=pd.DataFrame([row], index=pd.Index(["one|two"], name="name")),
        per_token={},
        error_maps={},
        norm_maps={},
        statistics={},
        fit=tokens,
        test=tokens,
        skip=4,
        settings=settings,
    )


@pytest.fixture
def book(tmp_path: Path) -> Book:
    (tmp_path / "book").mkdir()
    return Book(tmp_path)


def test_an_entry_holds_the_table_and_the_settings_and_no_text() -> None:
    entry = entry_of(small_survey(), "mine")
    assert entry["rows"][0]["fvu"] == [0.2, 0.19, 0.21]
    assert entry["rows"][0]["recovered_linear"] == [None, None, None]
    assert (entry["documents"], entry["context"], entry["skip"], entry["seed"]) == (3, 32, 4, 3)
    assert "names" not in json.dumps(entry)


def test_of_a_folder_only_its_name_is_kept() -> None:
    assert entry_of(small_survey("/home/somebody/secret/model"), "mine")["model"] == "model"
    assert entry_of(small_survey(), "mine")["model"] == "somebody/model"


def test_written_read_and_shown(book: Book) -> None:
    path = add_entry(book, small_survey(), "mine")
    assert path == book.source / "results" / "atlas" / "mine.json"
    (entry,) = read_entries(book)
    page = atlas_page(
        [entry],
        [
            {"name": "mine", "source": "here", "saes": 1},
            {"name": "other", "source": "the hub", "saes": 7},
        ],
    )
    (row,) = (line for line in page.splitlines() if "one\\|two" in line)
    assert "0.200 (0.190 to 0.210)" in row
    assert row.count("not run") == 2
    assert "- `other`: the hub; 7 SAEs" in page
    assert "- `mine`" not in page


@pytest.mark.parametrize(
    "text",
    [
        "not json",
        "[]",
        '{"format": "darkmatter-atlas/1", "name": "other", "rows": []}',
        '{"format": "darkmatter-atlas/1", "name": "mine", "rows": [{}]}',
    ],
)
def test_a_file_that_is_no_entry_is_named(book: Book, text: str) -> None:
    folder = book.source / "results" / "atlas"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_text(text)
    with pytest.raises(dm.Refusal, match=r"mine\.json is no entry of the atlas"):
        read_entries(book)


@pytest.mark.parametrize("name", ["", "../up", "A B", ".hidden"])
def test_names_that_are_no_file_names_are_refused(name: str) -> None:
    with pytest.raises(dm.Refusal, match="expected small letters"):
        entry_of(small_survey(), name)

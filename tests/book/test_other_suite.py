"""Chapters run on another suite: nothing in their code names what only `pydocs` has.

Executing all takes many minutes (`make suites-check`), so here one is executed, and the code cells
of all are read.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import darkmatter as dm
from darkmatter.book.claims import START_MIME
from darkmatter.book.notebooks import read_notebook
from darkmatter.book.paths import chapter_of, open_book
from darkmatter.suites import HubSuite, Suite
from darkmatter.suites.catalogue import DOWNLOADABLE, listing
from tests.book.other_suite import CHAPTERS, ROOT, run_on_stand_in


def code_of(chapter: str) -> list[ast.Module]:
    (path,) = (path for path in open_book(ROOT).chapters() if chapter_of(path) == chapter)
    sources = [cell.source for cell in read_notebook(path).cells if cell.cell_type == "code"]
    plain = ["\n".join(s for s in source.splitlines() if "%pip" not in s) for source in sources]
    # The first cell installs the package on Colab: without that line its `if` is empty.
    return [
        ast.parse(source.replace("sys.modules:\nimport", "sys.modules: ...\nimport"))
        for source in plain
    ]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_code_names_no_sae_hook_or_widths_of_pydocs(chapter: str) -> None:
    pydocs = dm.load_suite("pydocs")
    rows = pydocs.manifest["saes"]
    # Any model has an entry and an end of block 1.
    ours = {row["name"] for row in rows} | {row["hook"] for row in rows}
    ours -= {"blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"}
    ends = {rows[0]["d_sae"], max(row["d_sae"] for row in rows)}
    for cell in code_of(chapter):
        for node in ast.walk(cell):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                assert not any(name in node.value for name in ours), node.value
            if isinstance(node, ast.List):
                numbers = {one.value for one in node.elts if isinstance(one, ast.Constant)}
                assert not ends <= numbers, f"widths of pydocs, line {node.lineno}: {numbers}"


def hub_suite(name: str) -> Suite:
    """A downloadable suite as far as its catalogue goes, without its model."""
    entry = DOWNLOADABLE[name]
    rows = [dict(row) for row in listing(entry)]
    return HubSuite(name, Path(), {"name": name, "hook": entry.hook, "saes": rows})


def test_roles_of_pydocs() -> None:
    pydocs = dm.load_suite("pydocs")
    assert pydocs.middle == "resid_post.2-2048-l8"
    assert pydocs.second == "resid_post.2-1024-l8"
    assert pydocs.places == {
        "same place": "resid_post.2-2048-l8",
        "block before": "resid_post.1-2048-l8",
        "MLP": "mlp_out.2-2048-l8",
        "heads": "z.2-2048-l8",
        "block 1 entry": "resid_pre.1-2048-l8",
    }
    assert pydocs.studied == list(pydocs.saes)


def test_roles_of_gpt2_small() -> None:
    gpt2 = hub_suite("gpt2-small")
    assert gpt2.middle == "resid_pre.8-24576-l40"
    assert gpt2.second == "resid_pre.8-12288-l43"
    # Its catalogue has no SAE of an MLP or of heads.
    assert gpt2.places == {
        "same place": "resid_pre.8-24576-l40",
        "block before": "resid_pre.7-24576-l54",
        "block 1 entry": "resid_pre.1-24576-l10",
    }
    assert set(gpt2.studied) >= {*gpt2.grid("width"), *gpt2.grid("l0"), *gpt2.places.values()}
    assert len(gpt2.studied) == 11


@pytest.mark.parametrize("name", sorted(DOWNLOADABLE))
def test_every_suite_has_roles_that_exist(name: str) -> None:
    suite = hub_suite(name)
    rows = {row["name"]: row for row in suite.manifest["saes"]}
    assert rows[suite.middle]["hook"] == rows[suite.second]["hook"] == suite.hook
    assert suite.places["same place"] == suite.middle
    hooks = {role: rows[sae]["hook"] for role, sae in suite.places.items()}
    assert len(set(hooks.values())) == len(hooks)
    alone = len(suite.grid("width")) == 1
    assert (suite.second == suite.middle) == alone


def test_a_chapter_runs_on_the_stand_in_of_gpt2_small(tmp_path: Path) -> None:
    # One of eleven, and the cheapest; d_model 16. See `make suites-check`.
    run = run_on_stand_in("13", tmp_path, smaller=48)
    cells = read_notebook(run.path).cells
    started = [
        o.data[START_MIME]
        for c in cells
        for o in c.get("outputs", [])
        if "data" in o and START_MIME in o.data
    ]
    assert [one["suite"] for one in started] == ["gpt2-small"]

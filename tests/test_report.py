"""The report of a survey made by hand: its numbers, its words, its files, what it leaves out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from bs4 import BeautifulSoup

from darkmatter._drawing import inline_svg
from darkmatter._page import number, percent, with_interval
from darkmatter._refusal import Refusal
from darkmatter._survey_figures import short, width_series
from darkmatter.intervals import Interval
from darkmatter.report import caveats, headline, model_name, write_report
from tests.planted_survey import GRID, HOOK, SKIP, planted_survey

ONE = {"lone": (512, 8.0)}


def read(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(), "html.parser")


def plain(sentences: list[str]) -> str:
    """Text of HTML sentences, no-break spaces as spaces."""
    return BeautifulSoup(" ".join(sentences), "html.parser").text.replace("\u00a0", " ")


def self_contained(soup: BeautifulSoup) -> None:
    assert not soup.find_all(["script", "link", "iframe", "object", "embed", "base", "form"])
    for tag in soup.find_all(True):
        for key, value in tag.attrs.items():
            assert not key.startswith("on"), f"{tag.name} has {key}"
            if key in ("src", "href", "xlink:href", "action", "poster", "srcset", "data"):
                assert str(value).startswith(("#", "data:image/")), f"{tag.name} {key}={value}"
    styles = "".join(tag.text for tag in soup.find_all("style"))
    assert "@import" not in styles
    assert all(one.startswith("#") for one in re.findall(r"url\(['\"]?([^)]*)", str(soup)))
    assert "default-src 'none'" in soup.find("meta", {"http-equiv": True})["content"]


@pytest.fixture(scope="module")
def grid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(planted_survey(GRID), tmp_path_factory.mktemp("report") / "new")


def test_the_page_is_whole_accessible_and_needs_nothing_else(grid: Path) -> None:
    soup = read(grid)
    self_contained(soup)
    ids = [tag["id"] for tag in soup.find_all(id=True)]
    assert len(ids) == len(set(ids))
    # What is referred to within the page is there.
    inner = re.findall(r'(?:href="#|url\(#|for="|aria-describedby=")([^")]+)', grid.read_text())
    assert set(inner) <= set(ids)
    assert soup.html["lang"] == "en"
    assert soup.find("meta", {"name": "viewport"})
    assert len(soup.find_all("h1")) == 1
    figures = soup.find_all("figure")
    drawings = [figure.find("svg") for figure in figures]
    assert len(figures) == len(list(grid.parent.glob("figures/*.svg"))) == 7
    for figure, drawing in zip(figures, drawings, strict=True):
        assert drawing["role"] == "img"
        assert len(drawing["aria-label"]) > 40
        assert len(figure.figcaption.text) > 40
        assert drawing["viewbox"]
        assert not drawing.has_attr("width")
        assert not drawing.has_attr("height")


def test_every_figure_is_also_a_file_of_each_kind(grid: Path) -> None:
    names = {path.name for path in (grid.parent / "figures").iterdir()}
    stems = {"breakdown-by-width", "breakdown-by-sae", "contours-1", "recovered", "divergence",
             "norm-prediction", "by-position"}  # fmt: skip
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")}
    assert (grid.parent / "figures" / "recovered.png").read_bytes()[:4] == b"\x89PNG"
    assert "dc:date" not in (grid.parent / "figures" / "recovered.svg").read_text()


def test_equal_surveys_give_equal_bytes_and_leave_no_settings_changed(
    grid: Path, tmp_path: Path
) -> None:
    before = dict(mpl.rcParams)
    again = write_report(planted_survey(GRID), tmp_path)
    assert dict(mpl.rcParams) == before
    for path in sorted(grid.parent.rglob("*.*")):
        other = again.parent / path.relative_to(grid.parent)
        assert path.read_bytes() == other.read_bytes(), path.name


def test_the_headline_of_a_series_is_its_ends_with_intervals() -> None:
    # FVU .18 + 3 width^-.45: at 512 .3611, at 8192 .2320; intervals 3 % either way; nonlinear .14.
    said = plain(headline(planted_survey()))
    assert said.startswith(
        "From 512 to 8,192 latents at L0 about 8, the error falls by 36 %, from 0.361 "
        "[0.350, 0.372] to 0.232 [0.225, 0.239] of the variance (FVU); its nonlinear part does not "
        "change by more than its intervals, from 0.140 [0.136, 0.144] to 0.140 [0.136, 0.144]. The "
        "linear share of the error goes from 61 % [59, 63] to 40 % [38, 41]."
    )
    assert "width 8192 costs the model 0.232 [0.225, 0.239] nats a token" in said
    assert "recovers 40 % [38, 41] of that, the nonlinear error 80 % [78, 82]" in said
    assert "predicts 62 % [60, 64] of the variance of the squared length" in said


def test_the_headline_of_one_and_of_unlike_saes() -> None:
    one = plain(headline(planted_survey(ONE, downstream=False)))
    assert one.startswith(
        "lone misses 36 % [35, 37] of the variance of the activations. Of what it misses, 61 % "
        "[59, 63] is a linear function of the activation; what is not is 14 % [14, 14] of the "
        "variance."
    )
    assert "nats" not in one
    two = plain(headline(planted_survey({"a": (512, 8.0), "b": (8192, 64.0)}, downstream=False)))
    assert two.startswith("The 2 SAEs miss 17 % [17, 18] to 36 % [35, 37] of the variance")


def test_the_table_has_every_number_with_its_interval(grid: Path) -> None:
    survey = planted_survey(GRID)
    tables = read(grid).select("#table .wide table")
    heads = [[cell.text for cell in table.select("thead th")] for table in tables]
    assert heads[0][:6] == ["SAE", "latents", "L0", "FVU", "nonlinear FVU", "linear share"]
    assert heads[1][3:7] == ["CE", "CE with SAE", "cost", "KL"]
    # All NaN: no column.
    assert "floor" not in heads[0]
    for table in tables:
        assert [row.th.text for row in table.select("tbody tr")] == list(GRID)
        assert all(row.th["scope"] == "row" for row in table.select("tbody tr"))
    row = [cell.text for cell in tables[0].select("tbody tr")[0].find_all("td")]
    first = survey.table.iloc[0]
    assert row[0] == "512"
    assert row[1] == "4 [3.88, 4.12]"
    fvu = [f"{first[c]:.3f}" for c in ("fvu", "fvu_low", "fvu_high")]
    assert row[2] == f"{fvu[0]} [{fvu[1]}, {fvu[2]}]"


def test_texts_are_escaped_and_every_token_carries_its_error(grid: Path) -> None:
    survey = planted_survey(GRID)
    soup = read(grid)
    assert "toy/<model>" in soup.h1.text
    assert "<doc & 4>.txt" in soup.select("#tokens h3")[0].text
    views = soup.select("#tokens fieldset")
    assert len(views) == 3
    frame = survey.per_token["8192-l8"]
    # Contexts at 1/6, 3/6 and 5/6 of 24.
    for view, context in zip(views, (4, 12, 20), strict=True):
        spans = view.select(".token-panel")[0].select(".token-text span")
        inside = frame[frame["context"] == context]
        told = [span["title"] for span in spans]
        assert told[:SKIP] == ["not measured"] * SKIP
        assert told[-1] == "not measured"
        assert told[SKIP:-1] == [
            f"{np.sqrt(one):.3g} activation units" for one in inside["error_norm2"]
        ]
        ids = survey.test.tokens[context].tolist()
        assert [span.text for span in spans][:SKIP] == [
            {"\n": "↵\n", "\t": "⇥"}.get(survey.pieces[i], survey.pieces[i]) for i in ids[:SKIP]
        ]
    raw = grid.read_text()
    assert "<script>alert" not in raw
    assert "</textarea>" not in raw
    assert "&lt;script&gt;alert" in raw


def test_a_survey_without_downstream_or_contexts_leaves_them_out(
    grid: Path, tmp_path: Path
) -> None:
    survey = planted_survey({"a & b/$x$": (512, 8.0)}, downstream=False, documents=3)
    frames: Any = {n: f.drop(columns="context") for n, f in survey.per_token.items()}
    object.__setattr__(survey, "per_token", frames)
    folder = tmp_path / "report"
    shutil.copytree(grid.parent, folder)
    soup = read(write_report(survey, folder))
    self_contained(soup)
    sections = [section["id"] for section in soup.find_all("section")]
    assert sections == ["breakdown", "norm", "table", "caveats", "settings"]
    assert [link["href"] for link in soup.select("nav a")] == [f"#{one}" for one in sections]
    # Figures of the survey that was there before are gone, what is not ours stays.
    left = {path.name for path in folder.glob("figures/*.png")}
    assert left == {"breakdown-by-sae.png", "norm-prediction.png", "by-position.png"}
    text = soup.select_one("#caveats").text
    assert "was not measured" in text
    assert "One SAE" in text
    assert "Only 3 test documents" in text


def test_other_files_of_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("survey.json", "figures/mine.svg"):
        (tmp_path / name).write_text("mine")
    write_report(planted_survey(ONE, downstream=False), tmp_path)
    assert (tmp_path / "survey.json").read_text() == "mine"
    assert (tmp_path / "figures" / "mine.svg").read_text() == "mine"
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.suffix]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"skip": 0}, "No position is left out"),
        ({"skip": 8}, "The first 8 positions"),
        ({"n_fit": 30}, "4 inputs and was fitted on only 30 tokens"),
        ({"ridge": 1e-9}, "with a ridge (1e-09"),
        ({"documents": 2}, "Only 2 test documents"),
        ({"hooks": {"width 512": "blocks.1.hook_mlp_out"}}, "different hooks"),
        ({"saes": GRID}, "Between the dots"),
        ({"saes": {"dead": (2, 8.0)}}, "returns nothing has a wholly linear error. dead"),
    ],
)
def test_a_caveat_stands_where_it_applies_and_only_there(change: dict[str, Any], told: str) -> None:
    assert told in plain(caveats(planted_survey(**change)))
    if change != {"skip": 8}:
        assert told not in plain(caveats(planted_survey()))


def test_caveats_of_scores() -> None:
    survey = planted_survey()
    survey.table["dead"] = 0.4
    survey.table["r2_scalar"] = 0.9 * survey.table["r2_vector_pooled"]
    survey.table["r2_vector"] -= 0.2
    survey.table["cost_low"] = -0.1
    survey.table["floor"] = 0.2
    said = plain(caveats(survey))
    for told in ("never active", "One scalar times x gives 90 %", "a mean over dimensions",
                 "a ratio to about", "The floor is an extrapolation", "add up to"):  # fmt: skip
        assert told in said
    calm = plain(caveats(planted_survey(downstream=False)))
    for told in ("never active", "One scalar", "a mean over", "a ratio to", "floor", "add up"):
        assert told not in calm


def test_the_floor_is_drawn_and_told_where_there_is_one(tmp_path: Path) -> None:
    survey = planted_survey(downstream=False)
    survey.table["floor"], survey.table["floor_low"], survey.table["floor_high"] = 0.18, 0.1, 0.2
    soup = read(write_report(survey, tmp_path))
    assert "Dashed: the floor" in soup.find("figcaption").text
    assert "0.180 [0.100, 0.200]" in soup.select_one("#table table").text


def test_settings_of_any_shape_are_told_in_full(tmp_path: Path) -> None:
    survey = planted_survey(ONE, downstream=False)
    survey.settings["inputs"] = {"model": "0" * 64, "SAE '<b>'": "1" * 64}
    survey.settings["documents"] = {"fit": [f"<doc {i}>" for i in range(40)]}
    survey.settings["settings"] |= {
        "under_score": 0.25,
        "paths": ["/home/someone/deep/down/text.txt"],
    }
    text = read(write_report(survey, tmp_path)).select_one("#settings").text
    assert "/home/" not in text
    for told in (
        "under_score",
        "0.25",
        "…/down/text.txt",
        "0" * 64,
        "1" * 64,
        "SAE '<b>'",
        "<doc 39>",
        "40 entries",
        "2.9.1",
        "f" * 64,
    ):
        assert told in text


def test_the_model_is_named_by_what_says_something() -> None:
    survey = planted_survey()
    assert model_name(survey) == "toy/<model>"
    survey.settings["model"] = {"name": "/somewhere/pydocs/data/model"}
    assert model_name(survey) == "pydocs"
    survey.settings.clear()
    assert model_name(survey) == "a language model"


def test_refuses_no_sae_and_a_file(tmp_path: Path) -> None:
    survey = planted_survey()
    (tmp_path / "file").write_text("")
    with pytest.raises(Refusal, match="is a file, expected a folder"):
        write_report(survey, tmp_path / "file")
    object.__setattr__(survey, "table", survey.table.iloc[:0])
    with pytest.raises(Refusal, match="has no SAE"):
        write_report(survey, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_series_over_widths_is_of_one_hook_and_one_l0() -> None:
    saes = {"a": (512, 8.0), "b": (1024, 9.0), "c": (2048, 8.0), "d": (2048, 7.0),
            "e": (4096, 30.0), "f": (512, 30.0), "g": (8192, 8.0)}  # fmt: skip
    table = planted_survey(saes, hooks={"g": "blocks.1.hook_mlp_out"}).table
    assert list(width_series(table).index) == ["a", "b", "c"]
    assert width_series(table.drop(index="b")).empty
    assert HOOK in set(width_series(table)["hook"])


@pytest.mark.parametrize(
    ("value", "as_number", "as_percent"),
    [(0.2222, "0.222", "22 %"), (-0.5, "−0.500", "−50 %"), (0.0, "0.000", "0.0 %"),
     (0.00123, "0.00123", "0.1 %"), (0.00042, "0.00042", "0.042 %"),
     (12345.0, "1.23e+04", "1234500 %"), (float("nan"), "–", "–")],
)  # fmt: skip
def test_numbers(value: float, as_number: str, as_percent: str) -> None:
    assert number(value) == as_number
    assert percent(value).replace("\u00a0", " ") == as_percent


def test_an_interval_follows_its_value_where_there_is_one() -> None:
    assert with_interval(Interval(0.5, 0.4, 0.6)) == '0.500 <span class="ci">[0.400, 0.600]</span>'
    assert with_interval(Interval(0.5, float("nan"), 0.6)) == "0.500"


def test_long_names_are_cut_in_the_middle() -> None:
    assert short("abc") == "abc"
    cut = short("a" * 40 + "b" * 40)
    assert len(cut) <= 46
    assert cut.startswith("aaa")
    assert cut.endswith("bbb")


def test_inlined_drawings_share_no_id_and_take_the_colours_of_the_page() -> None:
    svg = (
        '<?xml version="1.0"?><!DOCTYPE svg><svg width="10pt" height="5pt" viewBox="0 0 10 5">'
        '<metadata>x</metadata><defs><style type="text/css">*{a: b}</style>'
        '<path id="m1" style="fill: #000000"/></defs>'
        '<use xlink:href="#m1" style="fill: #ffffff"/><g clip-path="url(#p2)"/></svg>'
    )
    assert inline_svg(svg, "fig", 'a "b"') == (
        '<svg role="img" aria-label="a &quot;b&quot;" fill="currentColor" stroke-linejoin="round" '
        'viewBox="0 0 10 5"><defs><path id="fig-m1" style="fill: currentColor"/></defs>'
        '<use xlink:href="#fig-m1" style="fill: var(--ground)"/><g clip-path="url(#fig-p2)"/></svg>'
    )

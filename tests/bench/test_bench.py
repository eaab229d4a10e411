"""Both ways of every row agree at smoke size and the table is complete; nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from darkmatter.book.benchmarks import benchmarks_page
from tests.bench import __main__ as bench
from tests.bench import gpu, measure
from tests.bench.growth import WORKS, growth
from tests.bench.rows import ROWS, residual_stream

# A machine that does one of everything a second.
MACHINE = {"float32": 1.0, "float64": 1.0, "memory": 1.0}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [
        bench.run_case(name, row, case, MACHINE.__getitem__, 1)
        for name, row in ROWS.items()
        if name not in ("import", "book")
        for case in row.cases(True)
    ]


def test_both_ways_agree_in_every_row(rows: list[dict[str, Any]]) -> None:
    # run_case refuses a difference beyond the row's tolerance.
    assert [row["row"] for row in rows] == [
        "fit", "fit", "pursuit", "splice", "curves", "curves", "neighbours", "sparse", "sparse",
        "scaling", "law", "collection",
    ]  # fmt: skip
    for row in rows:
        assert row["ours_s"] > 0
        assert row["ratio"] > 0
        assert row["difference"] < 1e-3
        assert row["aim"]
        assert row["flop_per_token"]
        assert row["bytes_per_token"]
        assert isinstance(row["met"], bool)


def test_a_difference_stops_the_benchmark() -> None:
    from dataclasses import replace

    case = replace(next(ROWS["law"].cases(True)), check=lambda _mine, _theirs: 0.5)
    with pytest.raises(AssertionError, match=r"law, 7 points.*differ by 0.5"):
        bench.run_case("law", ROWS["law"], case, MACHINE.__getitem__, 1)


def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    bench.main(["--row", "scaling", "--quick", "--repeats", "1", "--out", str(out)])
    assert "7 widths with helpers" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["format"] == bench.FORMAT
    assert set(found["machine"]) == {
        "cpu", "cores", "threads", "torch", "python", "float32", "float64", "memory",
    }  # fmt: skip
    assert len(found["rows"]) == 1


def test_the_gpu_command_runs_tiny_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "bench_gpu.json"
    gpu.main(["--size", "tiny", "--repeats", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["format"] == gpu.FORMAT
    assert [row["row"] for row in found["rows"]] == [
        "fit", "sparse", "pursuit", "neighbours", "splice",
    ]  # fmt: skip
    page = benchmarks_page("<!-- bench -->\n<!-- gpu -->\n", tmp_path)
    assert "size tiny" in page
    assert "4 variants at the middle" in page


def test_growth_has_a_slope_for_every_variable() -> None:
    work = WORKS[0]
    found = list(growth(True, [work]))
    assert {(one["of"], one["against"]) for one in found} == {
        (quantity, variable) for quantity in ("time", "memory") for variable in work.vary
    }
    memory = {one["against"]: one for one in found if one["of"] == "memory"}
    # The rows fit in a batch of 2048, so only these grow; d^2 takes over at larger d.
    assert abs(memory["d"]["slope"] - memory["d"]["formula"]) < 0.15


def test_memory_of_the_fit_is_flat_in_tokens() -> None:
    make = WORKS[0].make
    few, many = (measure.peak_bytes(make({"tokens": n, "d": 32})) for n in (4096, 16384))
    assert many == few


def test_peak_is_the_most_that_is_held_at_one_time() -> None:
    def run() -> torch.Tensor:
        first = torch.ones(1000, 100)
        second = first + 1
        del first
        return second[:10] * 2

    # Two matrices of 400 kB at once, then one and a tenth of a tenth.
    assert 800_000 <= measure.peak_bytes(run) < 810_000


def test_slope_of_a_power() -> None:
    assert abs(measure.slope([1, 2, 4, 8], [3, 12, 48, 192]) - 2) < 1e-12


def test_ratios_are_of_runs_in_turn() -> None:
    assert measure.median_ratio([1, 2, 4], [3, 8, 4]) == 3


def test_activations_have_a_large_mean_and_dominant_directions() -> None:
    x = residual_stream(4000, 64)
    variance = torch.linalg.eigvalsh(x.double().T.cov()).flip(0)
    assert variance[1] > 1000 * variance[2]
    assert x.mean(0).norm() > 10 * variance[2:].sum().sqrt()


def test_the_page_shows_the_results_or_says_not_run(
    rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = "# B\n\n<!-- bench -->\n\n<!-- gpu -->\n"
    assert benchmarks_page(text, tmp_path).count("Not run.") == 2
    machine = {"cpu": "a CPU", "cores": 2, "threads": 2, "torch": "2", **MACHINE}
    slope = {
        "work": "moments", "of": "time", "against": "d", "sizes": [1, 2], "slope": 1.9,
        "formula": 2.0, "because": "",
    }  # fmt: skip
    results = {"machine": machine, "seconds": 5, "rows": rows, "growth": [slope]}
    (tmp_path / "bench.json").write_text(json.dumps(results))
    page = benchmarks_page(text, tmp_path)
    assert page.count("Not run.") == 1
    assert "Measured on a CPU, 2 threads of 2 cores" in page
    assert "| gradient pursuit | `2 m d + m k^2 (Gram rows)" in page
    assert "| moments | time | d | 1 2 | 1.90 | 2.00 |  |" in page

"""The page of the benchmarks: book/results/bench.json and bench_gpu.json as tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from darkmatter._refusal import Refusal
from darkmatter.book.tables import table

PAGE, MARK = "benchmarks.md", "<!-- {} -->"
_FILES = {"bench": "bench.json", "gpu": "bench_gpu.json"}


def benchmarks_page(text: str, results: Path) -> str:
    """The page with `<!-- bench -->` and `<!-- gpu -->` replaced by the tables; "not run" if none.

    Raises Refusal for a mark that the page lacks.
    """
    for name, file in _FILES.items():
        mark = MARK.format(name)
        if mark not in text:
            raise Refusal(f"expected {mark} in {PAGE}, found none; put it where the table goes")
        path = results / file
        if path.is_file():
            found = json.loads(path.read_text(encoding="utf-8"))
            shown = "\n".join(_bench(found) if name == "bench" else _gpu(found))
        else:
            shown = "Not run."
        text = text.replace(mark, shown)
    return text


def _bench(found: Mapping[str, Any]) -> Iterator[str]:
    machine = found["machine"]
    yield (
        f"Measured on {machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, "
        f"torch {machine['torch']}, in {found['seconds']:.0f} seconds. This machine multiplies "
        f"matrices at {machine['float32'] / 1e9:.0f} GFLOP/s in float32 and "
        f"{machine['float64'] / 1e9:.0f} in float64, and copies at "
        f"{machine['memory'] / 1e9:.0f} GB/s."
    )
    yield ""
    yield from table(
        ("Work", "Size", "Ours, s", "Published, s", "Ratio", "Aim", "Met", "Share of the machine"),
        (
            (
                row["work"],
                row["size"],
                _seconds(row["ours_s"]),
                _seconds(row["published_s"]),
                "-" if row["ratio"] is None else f"{row['ratio']:.1f}",
                row["aim"],
                "yes" if row["met"] else "**no**",
                _share(row),
            )
            for row in found["rows"]
        ),
    )
    yield ""
    yield "Work and traffic of ours, per token:"
    yield ""
    formulas = {
        row["work"]: (row["work"], f"`{row['flop_per_token']}`", f"`{row['bytes_per_token']}`")
        for row in found["rows"]
        if row["flop_per_token"] != "-"
    }
    yield from table(("Work", "FLOP", "Bytes"), formulas.values())
    yield ""
    yield "## Growth"
    yield ""
    yield (
        "Slopes of time and of the largest memory of tensors against sizes, both logarithmic, "
        "beside those of the formulas. A slope further off than 0.15 has its reason."
    )
    yield ""
    yield from table(
        ("Work", "Of", "Against", "Sizes", "Slope", "Formula", "Why it differs"),
        (
            (
                one["work"],
                one["of"],
                one["against"],
                " ".join(str(size) for size in one["sizes"]),
                f"{one['slope']:.2f}",
                f"{one['formula']:.2f}",
                one["because"],
            )
            for one in found["growth"]
        ),
    )


def _gpu(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"Measured on {found['device']}, torch {found['torch']}, size {found['size']}, in "
        f"{found['seconds']:.0f} seconds. It multiplies matrices at "
        f"{found['float32'] / 1e12:.1f} TFLOP/s in float32 and {found['float64'] / 1e12:.1f} in "
        f"float64, and copies at {found['memory'] / 1e12:.2f} TB/s."
    )
    yield ""
    yield from table(
        ("Work", "Size", "Ours, s", "Published, s", "Ratio", "Share of the device"),
        (
            (
                row["work"],
                row["size"],
                _seconds(row["ours_s"]),
                _seconds(row["published_s"]),
                "-" if row["ratio"] is None else f"{row['ratio']:.1f}",
                _share(row),
            )
            for row in found["rows"]
        ),
    )


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3g}"


def _share(row: Mapping[str, Any]) -> str:
    if row["share"] is None:
        return "-"
    of = "memory bandwidth" if row["share_of"] == "memory" else f"{row['share_of']} products"
    return f"{100 * row['share']:.0f} % of {of}"

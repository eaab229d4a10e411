"""The table of a survey, from totals by document, and the rows of its tokens.

Every score is a function of totals, so intervals resample documents without reading tokens again.
`parts` are what `passes.score_part` gave, in memory or in files, for contexts in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.intervals import Interval, Resamples, fvu_from_totals, r2_from_totals
from darkmatter.passes import About
from darkmatter.scaling import fit_power_law

if TYPE_CHECKING:
    import pandas as pd

Part = Mapping[str, Tensor]
Statistic = Callable[[Tensor], Tensor]
_SHARED_ROWS = ("document", "context", "position", "token", "loss")
_ROWS = ("l0", "x_norm2", "error_norm2", "linear_norm2", "nonlinear_norm2", "predicted_norm2")
# SAEs of one hook whose L0 is within this factor count as of one L0.
_SAME_L0 = 1.25
_NOTHING = Interval(float("nan"), float("nan"), float("nan"))


def about_of(description: Mapping[str, Any]) -> dict[str, About]:
    """The SAEs of a survey, in order."""
    return {n: About(one["hook"], int(one["d_sae"])) for n, one in description["saes"].items()}


def rows_of(parts: Sequence[Part], name: str) -> Iterator[Any]:
    """The rows of an SAE, part by part, as tables of pyarrow."""
    import pyarrow as pa

    for part in parts:
        if f"{name}/row/l0" not in part:
            continue
        rows = [*_ROWS]
        rows += [key for key in ("cross_entropy", "kl") if f"{name}/row/{key}" in part]
        columns = {key: part[key] for key in _SHARED_ROWS}
        columns |= {key: part[f"{name}/row/{key}"] for key in rows}
        yield pa.table({key: values.numpy() for key, values in columns.items()})


def score_table(
    description: Mapping[str, Any],
    parts: Sequence[Part],
    fit_active: Mapping[str, Tensor],
    n_fit: Mapping[str, int],
) -> pd.DataFrame:
    """One row an SAE: see `Survey`. `fit_active`: latents active in pass 1; n_fit: its tokens."""
    import pandas as pd

    settings = description["settings"]
    numbers = torch.cat([part["documents"] for part in parts]).unique()
    resamples = Resamples(len(numbers), settings["resamples"], settings["seed"])
    rows: list[dict[str, Any]] = []
    for name, about in about_of(description).items():
        own = [part for part in parts if f"{name}/sum" in part]
        totals = _resampled(name, about, own, numbers, resamples, settings["downstream"])
        active = fit_active[name].cpu()
        for part in own:
            active = active | part[f"{name}/active"]
        row: dict[str, Any] = {"name": name, "hook": about.hook, "d_sae": about.d_sae}
        for score, (statistic, key) in _scores(settings["downstream"]).items():
            undefined = score.startswith("recovered") and not _costs(totals[key])
            interval = _NOTHING if undefined else resamples.interval(statistic, totals[key])
            row |= {score: interval.value, f"{score}_low": interval.low}
            row[f"{score}_high"] = interval.high
        row["dead"] = 1 - active.double().mean().item()
        row |= {"n_fit": n_fit[about.hook], "n_test": int(totals["fvu"][0, 0])}
        rows.append(row)
    table = pd.DataFrame(rows).set_index("name")
    floors = [_floor(table, name) for name in table.index]
    for i, column in enumerate(("floor", "floor_low", "floor_high")):
        table[column] = [floor[i] for floor in floors]
    return table


def _resampled(
    name: str,
    about: About,
    parts: Sequence[Part],
    numbers: Tensor,
    resamples: Resamples,
    downstream: bool,
) -> dict[str, Tensor]:
    """Totals [resamples + 1, k] of the columns that every score is made of."""

    totals: dict[str, Tensor] = {}
    for part in parts:
        x, sums = part[f"x/{about.hook}"], part[f"{name}/sum"]
        one, d = x[:, :1], x.shape[1] - 2
        fvu, split, norm, l0, vector, scalar = sums.split([1, 1, 3, 1, 3 * d, d], dim=1)
        columns = {
            "fvu": [one, fvu, x[:, 1:]],
            "split": [one, split, x[:, 1:]],
            "vector": [one, vector],
            "scalar": [one, scalar, vector[:, d:]],
            "norm": [one, norm],
            "l0": [l0, one],
        }
        if downstream:
            columns["downstream"] = [one, part[f"{name}/downstream"]]
        rows = torch.searchsorted(numbers, part["documents"])
        for key, blocks in columns.items():
            found = resamples.totals([(rows, torch.cat(blocks, 1))])
            totals[key] = totals[key].add_(found) if key in totals else found
    return totals


def _scores(downstream: bool) -> dict[str, tuple[Statistic, str]]:
    """Every score: its statistic, and the totals that it is one of."""
    pooled = partial(r2_from_totals, average="pooled")
    scores: dict[str, tuple[Statistic, str]] = {
        "l0": (lambda t: t[:, 0] / t[:, 1], "l0"),
        "fvu": (fvu_from_totals, "fvu"),
        "fvu_nonlinear": (fvu_from_totals, "split"),
        "r2_vector": (r2_from_totals, "vector"),
        "r2_vector_pooled": (pooled, "vector"),
        "r2_scalar": (pooled, "scalar"),
        "r2_norm": (r2_from_totals, "norm"),
    }
    if downstream:
        # Columns: tokens; cross entropy of the original, SAE, + linear, + nonlinear; three KLs.
        spliced: dict[str, Statistic] = {
            "cross_entropy_original": lambda t: t[:, 1] / t[:, 0],
            "cross_entropy": lambda t: t[:, 2] / t[:, 0],
            "cost": lambda t: (t[:, 2] - t[:, 1]) / t[:, 0],
            "kl": lambda t: t[:, 5] / t[:, 0],
            "kl_linear": lambda t: t[:, 6] / t[:, 0],
            "kl_nonlinear": lambda t: t[:, 7] / t[:, 0],
            "recovered_linear": lambda t: (t[:, 2] - t[:, 3]) / (t[:, 2] - t[:, 1]),
            "recovered_nonlinear": lambda t: (t[:, 2] - t[:, 4]) / (t[:, 2] - t[:, 1]),
        }
        scores |= {score: (statistic, "downstream") for score, statistic in spliced.items()}
    return scores


def _costs(totals: Tensor) -> bool:
    """Whether the SAE harms the model in all documents together, so that shares of it exist."""
    return bool(totals[0, 2] > totals[0, 1])


def _floor(table: pd.DataFrame, name: str) -> Interval:
    """The floor of the power law through this SAE and those of its hook at its L0; NaN for < 4."""
    row = table.loc[name]
    ratio = (table["l0"] / row["l0"]).clip(lower=1e-9)
    near = table[(table["hook"] == row["hook"]) & (ratio <= _SAME_L0) & (1 / ratio <= _SAME_L0)]
    # Of several SAEs of one width, the one whose L0 is nearest.
    distance = (near["l0"] - row["l0"]).abs()
    near = near.loc[distance.sort_values(kind="stable").index].drop_duplicates("d_sae")
    if len(near) < 4:
        return _NOTHING
    near = near.sort_values("d_sae")
    try:
        law = fit_power_law(near["d_sae"].to_numpy(), near["fvu"].to_numpy())
    except Refusal:
        # The error does not fall with width.
        return _NOTHING
    return Interval(law.floor, *law.floor_interval)

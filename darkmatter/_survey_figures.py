"""The figures of a survey's report. Each function draws one, or none where there is nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from darkmatter._drawing import COLOURS, as_png, as_svg, house_style
from darkmatter.intervals import Interval, bootstrap, document_sums

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# L0 within this factor of that of one SAE counts as the same: the published choice, 48 to 64, does.
_SAME_L0 = 1.25
_MOST_BARS = 60
_POSITION_BINS = 16
_RESAMPLES = 200
_NORM_BINS = 48
_COUNTS = [factor * 10**power for power in range(9) for factor in (1, 3)]
# White that stays white on a dark page, unlike the ground of a figure.
_WHITE = "#fefefe"


@dataclass(frozen=True)
class Drawn:
    """A figure as files, with what it shows in words."""

    name: str
    alt: str
    caption: str
    svg: str
    png: bytes


def drawn(
    name: str, alt: str, caption: str, size: tuple[float, float], draw: Callable[[Figure], None]
) -> Drawn:
    """Draw on a figure of that size in inches, in the house's style."""
    from matplotlib.figure import Figure

    with house_style(), warnings.catch_warnings():
        # Names may be in any script; a letter that the font lacks is a box.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        figure = Figure(figsize=size)
        draw(figure)
        svg = as_svg(figure)
        # Laid out once is enough.
        figure.set_layout_engine("none")
        return Drawn(name, alt, caption, svg, as_png(figure))


def scored(row: Any, score: str) -> Interval:
    """A score of a row with its interval; NaN where the table has none."""
    return Interval(*(float(row.get(f"{score}{end}", math.nan)) for end in ("", "_low", "_high")))


def present(table: pd.DataFrame, *scores: str) -> bool:
    """Whether the table has these scores, each for at least one SAE."""
    return all(score in table and bool(table[score].notna().any()) for score in scores)


def hooks(table: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The SAEs of each hook, hooks in the order of the table."""
    for hook in dict.fromkeys(table["hook"].astype(str)):
        yield hook, table.loc[table["hook"] == hook]


def width_series(table: pd.DataFrame) -> pd.DataFrame:
    """The most SAEs of one hook that differ in width at about one L0; none below three widths."""
    best = table.iloc[:0]
    for _, same in hooks(table):
        level = np.log(same["l0"].to_numpy(dtype=float).clip(min=1e-9))
        # Between series of one length, that in the middle of the levels.
        for reference in level[np.argsort(np.abs(level - np.median(level)), kind="stable")]:
            far = np.abs(level - reference)
            near = same.assign(_far=far).loc[far <= math.log(_SAME_L0)]
            one = near.sort_values(["d_sae", "_far"], kind="stable").drop_duplicates("d_sae")
            if len(one) > max(len(best), 2):
                best = one.drop(columns="_far")
    return best


def short(name: str, longest: int = 46) -> str:
    """A name cut in its middle."""
    half = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[:half]}…{name[-half:]}"


def breakdown_by_width(table: pd.DataFrame) -> Drawn | None:
    """Linear and nonlinear error, stacked, over the width of the SAEs."""
    series = width_series(table)
    if series.empty:
        return None
    width = series["d_sae"].to_numpy(dtype=float)
    whole, rest = (series[s].to_numpy(dtype=float) for s in ("fvu", "fvu_nonlinear"))
    floors = series["floor"].to_numpy(dtype=float) if present(series, "floor") else None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.fill_between(width, 0, rest, color=COLOURS["nonlinear"], alpha=0.75, linewidth=0)
        axes.fill_between(width, rest, whole, color=COLOURS["linear"], alpha=0.75, linewidth=0)
        for score, values in (("fvu", whole), ("fvu_nonlinear", rest)):
            axes.errorbar(
                width, values, _ends(series, score), fmt="o-", color=COLOURS["paper"],
                linewidth=1.2, capsize=4, markersize=5,
            )  # fmt: skip
        if floors is not None:
            floor = float(np.nanmean(floors))
            axes.axhline(floor, color=COLOURS["paper"], linestyle="--", linewidth=1.4)
            axes.text(width[0], floor * 0.99, "  fitted floor", ha="left", va="top")
        middle = int(len(width) // 2)
        for low, high, label in ((0 * rest, rest, "nonlinear"), (rest, whole, "linear")):
            at = (low[middle] + high[middle]) / 2
            axes.text(width[middle], at, label, ha="center", va="center", color=_WHITE)
        axes.set_xscale("log", base=2)
        axes.set_xticks(width, [_thousands(one) for one in width])
        axes.minorticks_off()
        axes.set(xlabel="latents in the SAE", ylabel="FVU", ylim=(0, None))
        axes.margins(x=0.02)

    first, last = series.iloc[0], series.iloc[-1]
    floor = (
        " Dashed: the floor of a power law through these points; what lies above it would be"
        " learnt by wider SAEs, if the law goes on."
        if floors is not None
        else ""
    )
    return drawn(
        "breakdown-by-width",
        f"Stacked areas over width. From {width[0]:.0f} to {width[-1]:.0f} latents the FVU goes "
        f"from {first['fvu']:.3f} to {last['fvu']:.3f}, its nonlinear part from "
        f"{first['fvu_nonlinear']:.3f} to {last['fvu_nonlinear']:.3f}.",
        f"What the SAEs of {first['hook']} miss at L0 about {series['l0'].mean():.0f}, split into "
        "the part that is a linear function of the activation and the rest. Bars: 95 % intervals, "
        f"documents resampled.{floor}",
        (5.6, 4.2),
        draw,
    )


def breakdown_by_sae(table: pd.DataFrame) -> Drawn:
    """Linear and nonlinear error, stacked, one bar an SAE."""
    shown = table.iloc[:_MOST_BARS]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        place = np.arange(len(shown), dtype=float)
        rest = shown["fvu_nonlinear"].to_numpy(dtype=float)
        linear = shown["fvu"].to_numpy(dtype=float) - rest
        axes.barh(place, rest, 0.42, color=COLOURS["nonlinear"], label="nonlinear")
        axes.barh(place, linear, 0.42, left=rest, color=COLOURS["linear"], label="linear")
        for score, across in (("fvu_nonlinear", rest), ("fvu", rest + linear)):
            axes.errorbar(
                across, place, xerr=_ends(shown, score), fmt="none",
                ecolor=COLOURS["paper"], elinewidth=1.4, capsize=4,
            )  # fmt: skip
        _named_rows(axes, shown)
        axes.set(xlabel="FVU", xlim=(0, None))
        figure.legend(loc="outside upper left", ncols=2)

    return drawn(
        "breakdown-by-sae",
        "Stacked bars, one an SAE: the nonlinear part of the FVU, then the linear part. "
        + _named(shown, lambda row: f"{row['fvu_nonlinear']:.3f} of {row['fvu']:.3f}"),
        "What each SAE misses of the variance of the activations, split into the part that is a "
        "linear function of the activation and the rest. Bars: 95 % intervals."
        + ("" if len(shown) == len(table) else f" The first {len(shown)} of {len(table)} SAEs."),
        (5.6, 1.5 + 0.62 * len(shown)),
        draw,
    )


def contours(table: pd.DataFrame) -> list[Drawn]:
    """For each hook with SAEs over widths and L0: three scores as colours over both."""
    return [
        _contour(f"contours-{i}", hook, same, where)
        for i, (hook, same, where) in enumerate(planes(table), 1)
    ]


def planes(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame, np.ndarray]]:
    """Hooks whose SAEs spread over widths and L0, with log2 of both [SAEs, 2]."""
    found = [
        (hook, same, np.log2(same[["d_sae", "l0"]].to_numpy(dtype=float).clip(min=1e-9)))
        for hook, same in hooks(table)
    ]
    return [one for one in found if _spread_over_a_plane(one[2])]


def _spread_over_a_plane(where: np.ndarray) -> bool:
    distinct = np.unique(where.round(2), axis=0)
    if len(distinct) < 6 or len(np.unique(where[:, 0])) < 3 or np.ptp(where[:, 1]) < 2:
        return False
    axes = np.linalg.svd(distinct - distinct.mean(0), compute_uv=False)
    return bool(axes[1] > 0.1 * axes[0])


def _contour(name: str, hook: str, table: pd.DataFrame, where: np.ndarray) -> Drawn:
    scores = {
        "r2_norm": "R2 of the norm",
        "r2_vector": "R2 of the vector",
        "fvu_nonlinear": "nonlinear FVU",
    }

    def draw(figure: Figure) -> None:
        panels = figure.subplots(3, 1, sharex=True)
        for axes, (score, label) in zip(panels, scores.items(), strict=True):
            values = table[score].to_numpy(dtype=float)
            filled = axes.tricontourf(where[:, 0], where[:, 1], values, levels=10)
            bar = figure.colorbar(filled, ax=axes, label=label)
            bar.ax.tick_params(labelsize=11)
            axes.plot(where[:, 0], where[:, 1], "o", color=_WHITE, markeredgecolor="black")
            for (across, up), value in zip(where, values, strict=True):
                axes.annotate(
                    f"{value:.2f}".replace("0.", ".", 1), (across, up), xytext=(7, 7),
                    textcoords="offset points", fontsize=11,
                    bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.85,
                          "edgecolor": "none"},
                )  # fmt: skip
            axes.set_ylabel("L0")
            low, high = where.min(0), where.max(0)
            ticks = np.arange(math.ceil(low[1]), math.floor(high[1]) + 1)
            axes.set_yticks(ticks, [f"{2.0**tick:g}" for tick in ticks])
            # Room for the dots and their numbers at the rim.
            axes.set(xlim=(low[0] - 0.4, high[0] + 0.7), ylim=(low[1] - 0.4, high[1] + 0.7))
            axes.grid(visible=False)
        widths = np.unique(where[:, 0])
        panels[-1].set_xticks(widths, [_thousands(2**one) for one in widths])
        panels[-1].set_xlabel("latents in the SAE")

    ranges = "; ".join(
        f"{label} from {table[score].min():.2f} to {table[score].max():.2f}"
        for score, label in scores.items()
    )
    return drawn(
        name,
        f"Three maps over width and L0, one dot an SAE: {ranges}.",
        f"The {len(table)} SAEs of {hook} over width and L0, both axes logarithmic. Only the dots "
        "were measured; the colours between them are interpolated.",
        (5.6, 10.8),
        draw,
    )


def norm_prediction(name: str, row: Any, frame: pd.DataFrame) -> Drawn:
    """Predicted against true squared error norm of the tokens of one SAE."""
    true, predicted = (frame[c].to_numpy(float) for c in ("error_norm2", "predicted_norm2"))
    top = float(np.quantile(np.concatenate([true, predicted]), 0.995))
    low = min(0.0, float(np.quantile(predicted, 0.005)))
    found = scored(row, "r2_norm")

    def draw(figure: Figure) -> None:
        from matplotlib.colors import LogNorm

        axes = figure.subplots()
        counts, across, up = np.histogram2d(
            predicted, true, _NORM_BINS, ((low, top), (min(low, 0.0), top))
        )
        most = max(float(counts.max()), 2.0)
        mesh = axes.imshow(
            np.where(counts > 0, counts, np.nan).T, origin="lower", aspect="auto",
            extent=(across[0], across[-1], up[0], up[-1]), norm=LogNorm(1, most),
            interpolation="nearest",
        )  # fmt: skip
        bar = figure.colorbar(mesh, ax=axes, label="tokens in a cell")
        ticks = [one for one in _COUNTS if one <= most]
        bar.set_ticks(ticks, labels=[str(one) for one in ticks])
        bar.ax.minorticks_off()
        axes.plot([0, top], [0, top], "--", color=COLOURS["control"], linewidth=1.6)
        axes.set(xlabel="predicted squared norm", ylabel="squared norm of the error")
        axes.set(xlim=(low, top), ylim=(min(low, 0.0), top))

    return drawn(
        "norm-prediction",
        f"Density of tokens: squared error norm against its linear prediction from the activation, "
        f"around the diagonal, R2 {found.value:.2f}.",
        f"{name}: squared length of the error of each test token against what a linear probe of "
        "the activation predicts (dashed: a perfect prediction). About one per cent of the tokens "
        "lies outside. In squared units of the activations.",
        (5.6, 4.8),
        draw,
    )


def recovered(table: pd.DataFrame) -> Drawn | None:
    """Share of the cost in cross entropy that each part of the error gives back."""
    if not present(table, "recovered_linear", "recovered_nonlinear"):
        return None
    shown = table.iloc[:_MOST_BARS]
    share = 1 - shown["fvu_nonlinear"].to_numpy(dtype=float) / shown["fvu"].to_numpy(dtype=float)
    parts = (("linear", -0.05, share), ("nonlinear", 0.25, 1 - share))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        place = np.arange(len(shown), dtype=float)
        for part, shift, of_fvu in parts:
            score = f"recovered_{part}"
            across = 100 * shown[score].to_numpy(dtype=float)
            axes.barh(place + shift, across, 0.26, color=COLOURS[part], label=f"+ {part}")
            axes.errorbar(
                across, place + shift, xerr=100 * _ends(shown, score), fmt="none",
                ecolor=COLOURS["paper"], elinewidth=1.4, capsize=3,
            )  # fmt: skip
            axes.plot(
                100 * of_fvu, place + shift, "D", color=_WHITE,
                markeredgecolor=COLOURS["paper"], markersize=5,
                label="share of the FVU" if part == "linear" else None,
            )  # fmt: skip
        _named_rows(axes, shown, shift=-0.35)
        axes.set_xlabel("recovered cross entropy (%)")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1, handletextpad=0.4)

    return drawn(
        "recovered",
        "Two bars an SAE: how much of the cost in cross entropy the linear and the nonlinear error "
        "give back. "
        + _named(
            shown,
            lambda row: (
                f"{100 * row['recovered_linear']:.0f} and {100 * row['recovered_nonlinear']:.0f} %"
            ),
        ),
        "Share of the increase in cross entropy that is undone when one part of the error is "
        "added back to the reconstruction (95 % intervals). Diamonds: that part's share of the "
        "FVU, what it would recover if every unit of variance mattered alike.",
        (5.6, 1.5 + 0.85 * len(shown)),
        draw,
    )


def divergence(table: pd.DataFrame) -> Drawn | None:
    """KL divergence from the model's own predictions, for the SAE alone and with each part."""
    if not present(table, "kl", "kl_linear", "kl_nonlinear"):
        return None
    shown = table.iloc[:_MOST_BARS]
    kinds = (("kl", "sae", "o", "SAE"), ("kl_linear", "linear", "s", "+ linear"),
             ("kl_nonlinear", "nonlinear", "^", "+ nonlinear"))  # fmt: skip

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for score, role, marker, label in kinds:
            axes.errorbar(
                shown[score].to_numpy(dtype=float), np.arange(len(shown)) + 0.1,
                xerr=_ends(shown, score), fmt=marker, color=COLOURS[role], capsize=4,
                markersize=8, label=label,
            )  # fmt: skip
        _named_rows(axes, shown, shift=-0.3)
        axes.set(xlabel="KL from the model (nats a token)", xlim=(0, None))
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1, handletextpad=0.2)

    return drawn(
        "divergence",
        "Three marks an SAE: KL divergence of the SAE, with its linear and with its nonlinear "
        "error added back. "
        + _named(
            shown, lambda row: f"{row['kl']:.3g}, {row['kl_linear']:.3g}, {row['kl_nonlinear']:.3g}"
        ),
        "How far the model's predictions move (95 % intervals): with the SAE in place, and with "
        "one part of its error added back.",
        (5.6, 1.5 + 0.62 * len(shown)),
        draw,
    )


def by_position(name: str, frame: pd.DataFrame, seed: int = 0) -> Drawn | None:
    """Mean squared lengths of the error and its parts, relative to x, over the position."""
    position = frame["position"].to_numpy()
    distinct = np.unique(position)
    if len(distinct) < 4:
        return None
    groups = [g for g in np.array_split(distinct, min(_POSITION_BINS, len(distinct))) if len(g)]
    centre = np.array([float(np.mean(g)) for g in groups])
    columns = ["x_norm2", "error_norm2", "linear_norm2", "nonlinear_norm2"]
    curves: dict[str, list[Interval]] = {column: [] for column in columns[1:]}
    for group in groups:
        inside = frame.loc[(position >= group[0]) & (position <= group[-1])]
        values = torch.from_numpy(inside[columns].to_numpy(float, copy=True))
        sums = document_sums(
            values, torch.from_numpy(inside["document"].to_numpy(np.int64, copy=True))
        )
        for i, column in enumerate(columns[1:], 1):
            curves[column].append(_ratio(sums, i, seed))

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        marks = {
            "error_norm2": ("sae", "o", "whole error"),
            "linear_norm2": ("linear", "s", "linear part"),
            "nonlinear_norm2": ("nonlinear", "^", "nonlinear part"),
        }
        for column, (role, marker, label) in marks.items():
            value, low, high = (100 * np.array(ends) for ends in zip(*curves[column], strict=True))
            axes.fill_between(centre, low, high, color=COLOURS[role], alpha=0.2, linewidth=0)
            axes.plot(centre, value, marker + "-", color=COLOURS[role], label=label)
        axes.set(xlabel="position in the context", ylim=(0, None))
        axes.set_ylabel("squared length (% of x)")
        figure.legend(loc="outside upper left", ncols=3, columnspacing=1, handletextpad=0.4)

    first, last = curves["error_norm2"][0].value, curves["error_norm2"][-1].value
    return drawn(
        "by-position",
        f"Three lines over the position: the squared length of the error goes from "
        f"{100 * first:.1f} to {100 * last:.1f} % of that of the activation, with its linear and "
        "nonlinear part.",
        f"{name}: mean squared length of the error and its parts at a position, in per cent of the "
        "mean squared length of the activations there (the mean is not taken off, so this is not "
        "the FVU). Bands: 95 % intervals.",
        (5.6, 4.4),
        draw,
    )


def _ratio(sums: torch.Tensor, column: int, seed: int) -> Interval:
    whole = sums.sum(0)
    if len(sums) < 2:
        return Interval(float(whole[column] / whole[0]), math.nan, math.nan)
    pair = sums[:, [column, 0]]
    return bootstrap(lambda totals: totals[:, 0] / totals[:, 1], pair, n=_RESAMPLES, seed=seed)


def _ends(table: pd.DataFrame, score: str) -> np.ndarray:
    """Lengths of the two halves of the intervals, zero where there is none."""
    value = table[score].to_numpy(dtype=float)
    ends = [table[f"{score}{end}"].to_numpy(dtype=float) if f"{score}{end}" in table else value
            for end in ("_low", "_high")]  # fmt: skip
    return np.nan_to_num(np.abs(np.stack(ends) - value))


def _named_rows(axes: Axes, table: pd.DataFrame, shift: float = -0.38) -> None:
    """The name of each SAE above its own bars, where a long one has room."""
    for row, name in enumerate(table.index):
        axes.annotate(
            short(str(name)), (0, row + shift), xycoords=("axes fraction", "data"),
            xytext=(4, 0), textcoords="offset points", va="center", fontsize=12,
        )  # fmt: skip
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(table) - 0.4, -0.6)


def _named(table: pd.DataFrame, told: Callable[[Any], str], most: int = 12) -> str:
    listed = "; ".join(f"{name}: {told(row)}" for name, row in table.iloc[:most].iterrows())
    return listed + ("." if len(table) <= most else "; and more, in the table.")


def _thousands(width: float) -> str:
    count = round(width)
    if count >= 1 << 20:
        return f"{count / (1 << 20):.3g}M"
    return f"{count / 1024:.3g}k" if count >= 1024 else str(count)

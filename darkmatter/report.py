"""The report of a survey: figures as files and one page that can be sent to a colleague.

The page holds all it shows: style, figures and texts are within, nothing is fetched and no script
is run. Folders of this machine are left out of its paths. Every number on it comes from the survey,
with its 95 % interval where it has one (whole documents resampled). Equal surveys give equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from darkmatter import _survey_figures as figures
from darkmatter._drawing import inline_svg
from darkmatter._page import escape, number, page, percent, readable_name, with_interval, write
from darkmatter._refusal import Refusal
from darkmatter._survey_figures import Drawn, hooks, present, scored, width_series
from darkmatter.intervals import Interval
from darkmatter.tokenview import checked_sets, html_view

if TYPE_CHECKING:
    import pandas as pd

    from darkmatter.survey import Survey

_SHOWN_CONTEXTS = 3
_SHOWN_TOKENS = 220
# Tokens before the first that was measured, so that a text does not start in the air.
_LEAD = 8
_FEW_DOCUMENTS = 20
_LONG_LIST = 12

# Heading, its explanation, score, and whether it is a share.
_COLUMNS: tuple[tuple[str, str, str, bool], ...] = (
    ("FVU", "share of the variance of x that the reconstruction misses", "fvu", False),
    ("nonlinear FVU", "what is left of it with the linear part of the error added back",
     "fvu_nonlinear", False),
    ("linear share", "share of the error that is linear in x, of sums (pooled R2)",
     "r2_vector_pooled", True),
    ("R2 vector", "the same as a mean over dimensions, as published", "r2_vector", False),
    ("R2 scalar", "of the error from one scalar times x, pooled", "r2_scalar", False),
    ("R2 norm", "of the squared length of the error from x", "r2_norm", False),
    ("dead", "share of latents never active on the surveyed tokens", "dead", True),
    ("floor", "FVU at infinite width by a power law over the widths", "floor", False),
)  # fmt: skip
_DOWNSTREAM: tuple[tuple[str, str, str, bool], ...] = (
    ("CE", "cross entropy of the model, nats a token", "cross_entropy_original", False),
    ("CE with SAE", "cross entropy with the reconstruction in place", "cross_entropy", False),
    ("cost", "the difference of the two, nats a token", "cost", False),
    ("KL", "divergence from the model's predictions, nats a token", "kl", False),
    ("recovered, linear", "share of the cost undone by adding the linear error back",
     "recovered_linear", True),
    ("recovered, nonlinear", "share of the cost undone by adding the nonlinear error back",
     "recovered_nonlinear", True),
    ("KL + linear", "KL with the linear error added back", "kl_linear", False),
    ("KL + nonlinear", "KL with the nonlinear error added back", "kl_nonlinear", False),
)  # fmt: skip


def write_report(survey: Survey, folder: Path) -> Path:
    """Write figures/*.svg, figures/*.png and report.html into `folder`; the page's path.

    The folder is made where it is missing; a report that is there already is replaced, file by
    file, and figures that this survey does not have are taken away. What the survey did not measure
    (its table lacks the columns, or they are NaN) is left out.

    Raises Refusal for a survey without an SAE and for a path that is a file.
    """
    table = survey.table
    if len(table) == 0:
        raise Refusal("The survey's table has no SAE, expected at least one; survey some first.")
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{folder} is a file, expected a folder for the report; pass another path.")
    shown = _shown(table)
    frame = survey.per_token[shown]
    drawings = _drawings(table, shown, frame)
    content = _content(survey, shown, frame, drawings)

    files = folder / "figures"
    files.mkdir(parents=True, exist_ok=True)
    for one in drawings:
        write(files / f"{one.name}.svg", one.svg)
        write(files / f"{one.name}.png", one.png)
    kept = {one.name for one in drawings}
    for old in [*files.glob("*.svg"), *files.glob("*.png")]:
        if old.stem in _known_names(len(table)) - kept:
            old.unlink()
    write(folder / "report.html", content)
    return folder / "report.html"


def _known_names(most: int) -> set[str]:
    names = {"breakdown-by-width", "breakdown-by-sae", "norm-prediction", "recovered"}
    return names | {"divergence", "by-position"} | {f"contours-{i}" for i in range(1, most + 1)}


def _shown(table: pd.DataFrame) -> str:
    """The SAE shown token by token: the widest of the series over widths, else of lowest FVU."""
    series = width_series(table)
    return str(series.index[-1] if len(series) else table["fvu"].astype(float).idxmin())


def _drawings(table: pd.DataFrame, shown: str, frame: pd.DataFrame) -> list[Drawn]:
    by_width = figures.breakdown_by_width(table)
    whole = len(width_series(table)) == len(table)
    made = [
        by_width,
        None if whole else figures.breakdown_by_sae(table),
        *figures.contours(table),
        figures.recovered(table),
        figures.divergence(table),
        figures.norm_prediction(shown, table.loc[shown], frame),
        figures.by_position(shown, frame),
    ]
    return [one for one in made if one is not None]


def _content(survey: Survey, shown: str, frame: pd.DataFrame, drawings: list[Drawn]) -> str:
    table = survey.table
    by_name = {one.name: one for one in drawings}

    def figure(*names: str) -> str:
        chosen = [d for name, d in by_name.items() if name.startswith(names)]
        return "".join(
            f"<figure>{inline_svg(one.svg, one.name, one.alt)}"
            f"<figcaption>{escape(one.caption)}</figcaption></figure>"
            for one in chosen
        )

    sections = {
        "breakdown": ("What the error is made of", figure("breakdown")),
        "contours": ("Over width and L0", figure("contours")),
        "downstream": ("What it costs the model", figure("recovered", "divergence")),
        "norm": ("How long the error is", figure("norm-prediction", "by-position")),
        "tokens": ("Token by token", _token_views(survey, shown, frame)),
        "table": ("All numbers", _tables(table)),
        "caveats": ("What can fool you", _list(caveats(survey))),
        "settings": ("Settings, versions, hashes", _settings(survey.settings)),
    }
    sections = {key: one for key, one in sections.items() if one[1]}
    model = model_name(survey)
    places = ", ".join(dict.fromkeys(table["hook"].astype(str)))
    contents = "".join(f'<li><a href="#{key}">{one[0]}</a></li>' for key, one in sections.items())
    body = "\n".join(
        f'<section id="{key}"><h2>{title}</h2>\n{inner}\n</section>'
        for key, (title, inner) in sections.items()
    )
    plural = "s" if len(table) > 1 else ""
    said = "".join(f"<p>{sentence}</p>" for sentence in headline(survey))
    return page(
        f"Dark matter of {model}",
        f'<header><p class="soft">Dark matter survey</p><h1>{escape(model)}: what {len(table)} '
        f'SAE{plural} miss{"" if plural else "es"}</h1>\n<p class="soft">{escape(places)} · '
        f"{_scored(table, frame)}</p></header>\n"
        f'<div class="headline">{said}</div>\n'
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>\n{body}',
    )


def model_name(survey: Survey) -> str:
    """The model as the settings call it."""
    told: Any = survey.settings.get("model", {})
    return readable_name(str(cast("Mapping[str, Any]", told).get("name", "a language model")))


def _scored(table: pd.DataFrame, frame: pd.DataFrame) -> str:
    documents = frame["document"].nunique()
    said = f"{len(frame):,} test tokens of {documents:,} document{'s' * (documents != 1)}"
    if present(table, "n_fit"):
        said += f", probes fitted on {int(table['n_fit'].to_numpy().max()):,} tokens of others"
    return said


def headline(survey: Survey) -> list[str]:
    """The findings in sentences (HTML), made from the numbers and their intervals."""
    table = survey.table
    series = width_series(table)
    if len(series):
        sentences = [_series_sentence(series)]
    elif len(table) == 1:
        sentences = [_single_sentence(str(table.index[0]), table.iloc[0])]
    else:
        sentences = [_range_sentence(table)]
    shown = _shown(table)
    row = table.loc[shown]
    sentences += _downstream_sentence(shown, row)
    norm = scored(row, "r2_norm")
    if not math.isnan(norm.value):
        sentences.append(
            f"From the activation alone, a linear probe predicts {with_interval(norm, True)} of the"
            " variance of the squared length of the error from token to token"
            f"{_of(shown, table)}."
        )
    return sentences


def _single_sentence(name: str, row: Any) -> str:
    return (
        f"{_strong(name)} misses {with_interval(scored(row, 'fvu'), True)} of the variance of the "
        f"activations. Of what it misses, {with_interval(scored(row, 'r2_vector_pooled'), True)} "
        "is a linear function of the activation; what is not is "
        f"{with_interval(scored(row, 'fvu_nonlinear'), True)} of the variance."
    )


def _series_sentence(series: pd.DataFrame) -> str:
    first, last = series.iloc[0], series.iloc[-1]
    whole, rest, share = (
        (scored(first, s), scored(last, s)) for s in ("fvu", "fvu_nonlinear", "r2_vector_pooled")
    )
    return (
        f"From {_count(first['d_sae'])} to {_count(last['d_sae'])} latents at L0 about "
        f"{series['l0'].mean():.0f}, the error {_change(whole)}, from {with_interval(whole[0])} to "
        f"{with_interval(whole[1])} of the variance (FVU); its nonlinear part {_change(rest)}, "
        f"from {with_interval(rest[0])} to {with_interval(rest[1])}. The linear share of the error "
        f"goes from {with_interval(share[0], True)} to {with_interval(share[1], True)}."
    )


def _change(ends: tuple[Interval, Interval]) -> str:
    first, last = ends
    if first.low <= last.high and last.low <= first.high:
        return "does not change by more than its intervals"
    by = percent(abs(1 - last.value / first.value))
    return f"{'falls' if last.value < first.value else 'rises'} by {by}"


def _range_sentence(table: pd.DataFrame) -> str:
    def ends(score: str, as_percent: bool) -> str:
        order = table[score].to_numpy(dtype=float).argsort()
        low, high = (scored(table.iloc[order[i]], score) for i in (0, -1))
        return f"{with_interval(low, as_percent)} to {with_interval(high, as_percent)}"

    return (
        f"The {len(table)} SAEs miss {ends('fvu', True)} of the variance of the activations. Of "
        f"that error, {ends('r2_vector_pooled', True)} is a linear function of the activation."
    )


def _downstream_sentence(name: str, row: Any) -> list[str]:
    cost = scored(row, "cost")
    linear, rest = scored(row, "recovered_linear"), scored(row, "recovered_nonlinear")
    if math.isnan(cost.value) or math.isnan(linear.value) or math.isnan(rest.value):
        return []
    return [
        f"Put in the place of the activations, {_strong(name)} costs the model "
        f"{with_interval(cost)} nats a token; adding the linear error back recovers "
        f"{with_interval(linear, True)} of that, the nonlinear error {with_interval(rest, True)}."
    ]


def _of(name: str, table: pd.DataFrame) -> str:
    return f" (of {_strong(name)})" if len(table) > 1 else ""


def _strong(name: str) -> str:
    return f'<b class="code">{escape(name)}</b>'


def _count(value: Any) -> str:
    return f"{int(value):,}"


def _token_views(survey: Survey, shown: str, frame: pd.DataFrame) -> str:
    if "context" not in frame:
        return ""
    texts: list[str] = []
    for number_, context in enumerate(_spread(frame), 1):
        inside = frame.loc[frame["context"] == context].sort_values("position")
        position = inside["position"].to_numpy()
        start = max(0, int(position[0]) - _LEAD)
        ids = survey.test.tokens[context].tolist()[start : start + _SHOWN_TOKENS]
        within = inside.loc[position < start + len(ids)]
        at = within["position"].to_numpy() - start
        pieces = [str(survey.pieces.get(int(i), f"‹token {i}›")) for i in ids]

        def spread_out(values: Any, n: int = len(ids), at: Any = at) -> np.ndarray:
            row = np.full(n, np.nan)
            row[at] = np.sqrt(np.clip(values.to_numpy(dtype=float), 0, None))
            return row

        sets = {
            label: spread_out(within[column])
            for label, column in (
                ("whole error", "error_norm2"),
                ("linear part", "linear_norm2"),
                ("nonlinear part", "nonlinear_norm2"),
                ("predicted length", "predicted_norm2"),
            )
        }
        document = _without_folders(survey.test.names[int(survey.test.document[context])])
        view = html_view(
            pieces, checked_sets(pieces, sets), name=f"text-{number_}",
            alt=f"{len(ids)} tokens of {document}, each with the length of its error.",
            quantity="length of the error", unit="activation units",
        )  # fmt: skip
        texts.append(
            f'<h3>Context {context} of <span class="code">{escape(document)}</span></h3>{view}'
        )
    if not texts:
        return ""
    return (
        f"<p>The error of {_strong(shown)} on {len(texts)} test contexts, spread evenly over the "
        "test text rather than chosen. A darker ground is a longer error; grey tokens were not "
        "measured.</p>" + "".join(texts)
    )


def _spread(frame: pd.DataFrame) -> list[int]:
    """Contexts at even distances, so that the choice cannot flatter."""
    every = np.unique(frame["context"].to_numpy())
    places = (np.arange(_SHOWN_CONTEXTS) + 0.5) / _SHOWN_CONTEXTS * len(every)
    return [int(one) for one in dict.fromkeys(every[places.astype(int)])]


def _tables(table: pd.DataFrame) -> str:
    parts: list[str] = []
    for title, columns in (("Split of the error", _COLUMNS), ("Downstream", _DOWNSTREAM)):
        here = [one for one in columns if present(table, one[2])]
        if not here or (columns is _DOWNSTREAM and not present(table, "cost")):
            continue
        for hook, same in hooks(table):
            parts.append(f"<h3>{title} · {escape(hook)}</h3>{_one_table(title, hook, same, here)}")
    meaning = [
        f"<dt>{heading}</dt><dd>{told}</dd>"
        for heading, told, score, _ in (*_COLUMNS, *_DOWNSTREAM)
        if present(table, score)
    ]
    return (
        "<p>Behind every value is its 95 % interval, whole documents resampled. A wide table is "
        f"moved sideways inside its frame.</p>{''.join(parts)}"
        f"<details><summary>What the columns mean</summary><dl>{''.join(meaning)}</dl></details>"
    )


def _one_table(
    title: str, hook: str, table: pd.DataFrame, columns: Sequence[tuple[str, str, str, bool]]
) -> str:
    heads = ["SAE", "latents", "L0", *(heading for heading, *_ in columns)]
    head = "".join(
        f'<th scope="col"{" class=text" if i == 0 else ""}>{one}</th>'
        for i, one in enumerate(heads)
    )
    rows: list[str] = []
    for name, row in table.iterrows():
        cells = [_count(row["d_sae"]), _l0(scored(row, "l0"))]
        cells += [with_interval(scored(row, score), share) for _, _, score, share in columns]
        rows.append(
            f'<tr><th scope="row" class="code">{escape(name)}</th>'
            + "".join(f"<td>{cell}</td>" for cell in cells)
            + "</tr>"
        )
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{title}, {escape(hook)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _l0(found: Interval) -> str:
    low, high = (f"{one:.3g}" for one in (found.low, found.high))
    ends = "" if math.isnan(found.low) else f' <span class="ci">[{low}, {high}]</span>'
    return f"{found.value:.3g}{ends}"


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{one}</li>' for one in sentences)}</ul>"


def caveats(survey: Survey) -> list[str]:
    """What the numbers do not say, in sentences (HTML); each only where it applies."""
    return list(_caveats(survey, survey.table))


def _caveats(survey: Survey, table: pd.DataFrame) -> Iterator[str]:
    if survey.skip:
        yield (
            f"The first {survey.skip} positions of every context are left out, as are special "
            "tokens. Errors there are smaller, so an FVU over all tokens is another number."
        )
    else:
        yield (
            "No position is left out. The first tokens of a context are easier for an SAE and, in "
            "many models, of huge norm, which can rule every sum."
        )
    frame: Any = survey.per_token[_shown(table)]
    documents = int(frame["document"].nunique())
    if documents < _FEW_DOCUMENTS:
        yield (
            f"Only {documents} test document{'s' * (documents != 1)}: intervals from so few are "
            "too narrow to lean on."
        )
    yield from _fitting_caveats(survey, table)
    if len(table) == 1:
        yield (
            "One SAE: nothing here says how the error changes with width or L0, or whether it is "
            "a property of this SAE or of the model."
        )
    if len(set(table["hook"])) > 1:
        yield (
            "SAEs of different hooks miss different activations: their FVU and shares compare, "
            "their lengths in activation units and their costs do not."
        )
    series = width_series(table)
    if len(series):
        yield (
            "Widths are compared as trained: wider SAEs are often trained on other amounts of "
            f"text, and their L0 differs ({series['l0'].min():.3g} to {series['l0'].max():.3g})."
        )
    if present(table, "floor"):
        yield (
            "The floor is an extrapolation over few widths: laws with floors far from it can fit "
            "about as well."
        )
    if figures.planes(table):
        yield "Between the dots of a contour map no SAE was measured; the colour is interpolated."
    yield from _linear_caveats(table)
    yield from _downstream_caveats(table)


def _fitting_caveats(survey: Survey, table: pd.DataFrame) -> Iterator[str]:
    # Each may be read from disk, so of each only what is told is kept.
    maps = [
        (m.ridge, m.n, m.weight.shape[0]) for m in map(survey.error_maps.__getitem__, table.index)
    ]
    if ridged := sorted({ridge for ridge, _, _ in maps if ridge > 0}):
        yield (
            "The activations are nearly collinear in some directions, so the probes were fitted "
            f"with a ridge ({', '.join(f'{one:.0e}' for one in ridged)} of the mean variance); "
            "the linear part is, if anything, too small."
        )
    rows, width = min(((n, d) for _, n, d in maps), key=lambda one: one[0] / one[1])
    if rows < 10 * width:
        yield (
            f"The probe has {width} inputs and was fitted on only {_count(rows)} tokens: on other "
            "documents its linear part is too small, the nonlinear part too large. Fit on at least "
            "ten tokens a dimension."
        )


def _linear_caveats(table: pd.DataFrame) -> Iterator[str]:
    yield (
        "Linear is a statement about prediction, not about causes: shrinkage, neglected directions "
        "and features that a wider SAE would learn are all counted as linear error."
    )
    if (gone := _where(table, "fvu", lambda v: v > 0.9)) is not None:
        yield (
            f"An SAE that returns nothing has a wholly linear error. {gone} misses nearly all of "
            "the variance, so its linear share proves nothing."
        )
    scalar: Any = (
        table["r2_scalar"] / table["r2_vector_pooled"] if present(table, "r2_scalar") else None
    )
    if scalar is not None and bool((scalar > 0.5).any()):
        name = str(scalar.astype(float).idxmax())
        yield (
            f"One scalar times x gives {percent(float(scalar.max()))} of the linear part of "
            f"{_strong(name)}: about the FVU itself is expected by algebra alone, without any "
            "structure in the error."
        )
    both = present(table, "r2_vector", "r2_vector_pooled")
    if both and bool(((table["r2_vector"] - table["r2_vector_pooled"]).abs() > 0.05).any()):
        yield (
            "R2 as a mean over dimensions (the published one) and pooled over them differ here: "
            "the first gives every coordinate one vote, however little it varies. Say which."
        )
    if (dead := _where(table, "dead", lambda v: v > 0.1)) is not None:
        yield (
            f"More than a tenth of the latents of {dead} was never active on these tokens: rare "
            "there, or dead, which makes the SAE narrower than its name."
        )


def _downstream_caveats(table: pd.DataFrame) -> Iterator[str]:
    if not present(table, "cost"):
        yield "The effect on the model's predictions was not measured."
        return
    yield (
        "Errors are spliced in at one hook while the first positions keep their own activations; "
        "a cost in nats depends on the text."
    )
    if _where(table, "cost_low", lambda v: v <= 0) is not None:
        yield (
            "Where the cost is not clearly above zero, a recovered share is a ratio to about "
            "nothing and means little."
        )
    if present(table, "recovered_linear", "recovered_nonlinear"):
        total: Any = table["recovered_linear"] + table["recovered_nonlinear"]
        if bool((total > 1.02).any()):
            yield (
                f"The two recovered shares add up to as much as {percent(float(total.max()))}: "
                "damage is not additive, and the first half of a repair is worth more than the "
                "second."
            )


def _where(table: pd.DataFrame, score: str, holds: Callable[[Any], Any]) -> str | None:
    """The first SAE for which a score is so, or None."""
    if not present(table, score):
        return None
    found = table.index[holds(table[score].astype(float)).to_numpy(dtype=bool)]
    return _strong(str(found[0])) if len(found) else None


def _settings(settings: Mapping[str, Any]) -> str:
    """Every entry of the settings; what holds entries of its own becomes a part of its own."""
    plain = {key: one for key, one in settings.items() if not _nested(one)}
    parts = [_entries(plain)] if plain else []
    for key, one in settings.items():
        if _nested(one):
            open_ = "" if key in ("documents", "names", "inputs", "outputs") else " open"
            parts.append(f"<details{open_}><summary>{escape(key)}</summary>{_value(one)}</details>")
    return "".join(parts)


def _entries(entries: Mapping[str, Any]) -> str:
    rows = (f"<dt>{escape(key)}</dt><dd>{_value(one)}</dd>" for key, one in entries.items())
    return f"<dl>{''.join(rows)}</dl>"


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list | tuple) and len(value) > 1)


def _without_folders(text: object) -> str:
    """A path of this machine by its last two parts, as the page is sent to others."""
    told = str(text)
    path = Path(told)
    return "…/" + "/".join(path.parts[-2:]) if path.is_absolute() else told


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return _entries(cast("Mapping[str, Any]", value))
    if isinstance(value, list | tuple):
        items = cast("Sequence[Any]", value)
        if any(_nested(one) for one in items):
            return _list([_value(one) for one in items])
        text = ", ".join(_without_folders(one) for one in items)
        if len(items) <= _LONG_LIST:
            return f'<span class="code">{escape(text)}</span>'
        return (
            f"<details><summary>{len(items)} entries</summary>"
            f'<span class="code">{escape(text)}</span></details>'
        )
    if isinstance(value, float):
        return escape(number(value)) if not value.is_integer() else str(int(value))
    return f'<span class="code">{escape(_without_folders(value))}</span>'

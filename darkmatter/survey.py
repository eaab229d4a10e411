"""The dark matter of any SAEs of one model, in two passes over tokens.

    pass 1, fit documents:   moments of x with every error e = x - Sae(x), |e|^2 and |x|^2
    pass 2, test documents:  e = linear + nonlinear with the maps of pass 1; scores by document

One run of the model serves every SAE; X'X is accumulated and factorised once for each hook.
Errors are never stored. Source: Engels, Smith and Tegmark (2410.14670), section 3; the intervals
(documents resampled) are ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens, stream
from darkmatter.autoencoders import check_fits, hook_of, sparse_decode, sparse_encode
from darkmatter.intervals import (
    Interval,
    bootstrap,
    fvu_columns,
    fvu_from_totals,
    r2_columns,
    r2_from_totals,
)
from darkmatter.leastsquares import LinearMap, LinearStatistics

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

    from darkmatter.models import Model


@dataclass(frozen=True)
class Survey:
    """What a survey found; `table` has one row an SAE, `per_token` one frame an SAE.

    Columns of `table`, each score with `_low` and `_high` (95 %, documents resampled):
    `fvu` of the reconstruction; `fvu_nonlinear` of reconstruction + linear error; `r2_vector`
    and `r2_vector_pooled`, of e from x, as a mean over dimensions (the paper's) and of sums;
    `r2_scalar`, of e from one scalar times x, of sums; `r2_norm`, of |e|^2 from x; `l0`.

    Columns of `per_token`: document, position, token, loss (nats), l0, and the squared norms
    x_norm2, error_norm2, linear_norm2, nonlinear_norm2 with predicted_norm2, the probe's error
    norm, in the squared units of the activations.
    """

    table: pd.DataFrame
    per_token: dict[str, pd.DataFrame]
    error_maps: dict[str, LinearMap]
    norm_maps: dict[str, LinearMap]
    statistics: dict[str, LinearStatistics]
    fit: Tokens
    test: Tokens
    skip: int

    def interval(self, name: str, score: str) -> Interval:
        """One score of one SAE with its interval."""
        row = self.table.loc[name]
        return Interval(float(row[score]), float(row[f"{score}_low"]), float(row[f"{score}_high"]))


class DocumentTotals:
    """Column totals by document, added to batch by batch."""

    def __init__(self, documents: int):
        self.sums: Tensor | None = None
        self.documents = documents

    def add(self, columns: Tensor, document: Tensor) -> None:
        """Add the rows of `columns` to their documents' totals."""
        if self.sums is None:
            self.sums = torch.zeros(self.documents, columns.shape[1], dtype=torch.float64)
        self.sums.index_add_(0, document, columns)

    def present(self) -> Tensor:
        """Totals of the documents that had any token (first column counts them)."""
        assert self.sums is not None
        return self.sums[self.sums[:, 0] > 0]


@dataclass
class _Surveyed:
    """One SAE on its way through both passes; `scalar` is (s, constant) of e ~ s x + constant."""

    sae: Any
    hook: str
    error_map: LinearMap
    norm_map: LinearMap
    scalar: tuple[Tensor, Tensor]
    totals: dict[str, DocumentTotals]
    rows: list[dict[str, Tensor]]


def reconstruct_sparsely(sae: SAE[Any], x: Tensor) -> tuple[Tensor, Tensor]:
    """(x_hat, L0 of every token)."""
    code = sparse_encode(sae, x)
    return sparse_decode(sae, code), code.l0


def survey(
    model: Model,
    saes: Mapping[str, SAE[Any]],
    tokens: Tokens,
    test: Tokens | None = None,
    skip: int = 32,
    seed: int = 0,
    share: float = 0.6,
    resamples: int = 1000,
) -> Survey:
    """Split the error of every SAE into its linear and nonlinear part and score both.

    `tokens` are the fit documents when `test` is given; otherwise a `share` of their documents,
    drawn with `seed`, is fitted on and the rest scored. Positions before `skip`, special tokens
    and the last position of a context are left out.

    Raises Refusal for no SAE, an SAE that does not fit the model, documents shared by fit and
    test, and fewer fit tokens than d_model + 1.
    """
    if not saes:
        raise Refusal("expected at least one SAE, got an empty mapping; pass {name: sae}")
    fit, test = (tokens, test) if test is not None else tokens.split_documents(share, seed)
    shared = set(fit.document.tolist()) & set(test.document.tolist())
    if shared:
        name = fit.names[min(shared)]
        raise Refusal(
            f"expected fit and test tokens of different documents, got {len(shared)} in both "
            f"(such as {name!r}); split with Tokens.split_documents"
        )
    for sae in saes.values():
        check_fits(sae, model)
    by_hook: dict[str, dict[str, SAE[Any]]] = {}
    for name, sae in saes.items():
        by_hook.setdefault(hook_of(sae), {})[name] = sae
    hooks = list(by_hook)
    usable = fit.n_contexts * (fit.tokens.shape[1] - skip - 1)
    for hook in hooks:
        if usable <= model.width(hook):
            raise Refusal(
                f"expected more fit tokens than the {model.width(hook)} dimensions at {hook}, "
                f"got at most {usable}; pass more documents"
            )
    statistics = _fit(model, by_hook, fit, skip)
    surveyed = _solve(by_hook, statistics, len(test.names))
    _score(model, surveyed, hooks, test, skip)
    return _summarise(surveyed, statistics, fit, test, skip, seed, resamples)


def _fit(
    model: Model, by_hook: Mapping[str, Mapping[str, Any]], fit: Tokens, skip: int
) -> dict[str, LinearStatistics]:
    """Pass 1: for each hook the moments of x with [every e, every |e|^2, |x|^2]."""
    statistics: dict[str, LinearStatistics] = {}
    hooks = list(by_hook)
    for batch in stream(model, hooks, fit, skip):
        at = {hooks[0]: batch.x, **batch.others}
        for hook, saes in by_hook.items():
            x = at[hook]
            errors = [x - reconstruct_sparsely(sae, x)[0] for sae in saes.values()]
            norms = [e.double().square().sum(1, keepdim=True) for e in [*errors, x]]
            y = torch.cat([e.double() for e in errors] + norms, 1)
            if hook not in statistics:
                statistics[hook] = LinearStatistics(x.shape[1], y.shape[1])
            statistics[hook].partial_fit(x, y)
    return statistics


def _solve(
    by_hook: Mapping[str, Mapping[str, Any]],
    statistics: Mapping[str, LinearStatistics],
    documents: int,
) -> dict[str, _Surveyed]:
    """Every probe of every SAE at a hook from one factorisation."""
    surveyed: dict[str, _Surveyed] = {}
    for hook, saes in by_hook.items():
        moments = statistics[hook]
        whole, d = moments.solve(), moments.d_in
        for i, (name, sae) in enumerate(saes.items()):
            columns, norm = slice(i * d, (i + 1) * d), len(saes) * d + i
            # argmin over s of |e - s x|^2, both centred: trace(Sxe) / trace(Sxx).
            scalar = moments.sxy[:, columns].trace() / moments.sxx.trace()
            constant = moments.mean_y[columns] - scalar * moments.mean_x
            surveyed[name] = _Surveyed(
                sae,
                hook,
                _of(whole, columns),
                _of(whole, slice(norm, norm + 1)),
                (scalar, constant),
                {
                    k: DocumentTotals(documents)
                    for k in ("fvu", "split", "vector", "scalar", "norm")
                },
                [],
            )
    return surveyed


def _of(whole: LinearMap, columns: slice) -> LinearMap:
    """The part of a map that predicts some of its targets."""
    return LinearMap(whole.weight[:, columns], whole.bias[columns], whole.ridge, whole.n)


def _score(
    model: Model, surveyed: Mapping[str, _Surveyed], hooks: list[str], test: Tokens, skip: int
) -> None:
    """Pass 2: totals by document of what every score needs, and the per-token table."""
    for batch in stream(model, hooks, test, skip):
        at = {hooks[0]: batch.x, **batch.others}
        for one in surveyed.values():
            x = at[one.hook].double()
            x_hat, l0 = reconstruct_sparsely(one.sae, at[one.hook])
            error = x - x_hat
            linear = one.error_map(x)
            nonlinear = error - linear
            norm = error.square().sum(1, keepdim=True)
            predicted = one.norm_map(x)
            add = {
                "fvu": fvu_columns(x, x_hat.double()),
                "split": fvu_columns(x, x - nonlinear),
                "vector": r2_columns(error, linear),
                "scalar": r2_columns(error, one.scalar[0] * x + one.scalar[1]),
                "norm": r2_columns(norm, predicted),
            }
            for key, columns in add.items():
                one.totals[key].add(columns, batch.document)
            one.rows.append(
                {
                    "document": batch.document,
                    "position": batch.position,
                    "token": batch.token,
                    "loss": batch.loss,
                    "l0": l0,
                    "x_norm2": x.square().sum(1),
                    "error_norm2": norm[:, 0],
                    "linear_norm2": linear.square().sum(1),
                    "nonlinear_norm2": nonlinear.square().sum(1),
                    "predicted_norm2": predicted[:, 0],
                }
            )


def _summarise(
    surveyed: Mapping[str, _Surveyed],
    statistics: dict[str, LinearStatistics],
    fit: Tokens,
    test: Tokens,
    skip: int,
    seed: int,
    resamples: int,
) -> Survey:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    per_token: dict[str, pd.DataFrame] = {}
    for name, one in surveyed.items():
        frame = pd.DataFrame({k: torch.cat([r[k] for r in one.rows]).numpy() for k in one.rows[0]})
        per_token[name] = frame
        pooled = partial(r2_from_totals, average="pooled")
        scores = {
            "fvu": (fvu_from_totals, "fvu"),
            "fvu_nonlinear": (fvu_from_totals, "split"),
            "r2_vector": (r2_from_totals, "vector"),
            "r2_vector_pooled": (pooled, "vector"),
            "r2_scalar": (pooled, "scalar"),
            "r2_norm": (r2_from_totals, "norm"),
        }
        row: dict[str, Any] = {
            "name": name,
            "hook": one.hook,
            "d_sae": int(one.sae.cfg.d_sae),
            "l0": torch.cat([r["l0"] for r in one.rows]).double().mean().item(),
        }
        for score, (statistic, key) in scores.items():
            sums = one.totals[key].present()
            interval = bootstrap(statistic, sums, n=resamples, seed=seed)
            row |= {score: interval.value, f"{score}_low": interval.low}
            row[f"{score}_high"] = interval.high
        rows.append(row)
    return Survey(
        pd.DataFrame(rows).set_index("name"),
        per_token,
        {n: s.error_map for n, s in surveyed.items()},
        {n: s.norm_map for n, s in surveyed.items()},
        statistics,
        fit,
        test,
        skip,
    )

"""Confidence intervals by resampling documents.

Tokens of one document are alike, so tokens resampled one by one pretend to more data than there
is and give intervals that are too narrow.  Here whole documents are drawn with replacement (the
cluster bootstrap).  A score that is a function of totals over tokens needs no token twice:

    columns  =  fvu_columns(x, x_hat)               # [n, k], what the score needs of each token
    sums     =  document_sums(columns, document)    # [documents, k]
    bootstrap(fvu_from_totals, sums)                # value, low, high

as a resample is  weights @ sums,  where weights counts how often each document was drawn.
Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), sections 8.5 and 13.3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import Average, finite_rows, paired_rows

# Resamples drawn at a time hold about this many drawn documents (2 MB of indices).
_DRAWS_AT_A_TIME = 250_000


class Interval(NamedTuple):
    """A value and its confidence interval."""

    value: float
    low: float
    high: float


def document_sums(
    values: Float[Tensor, "n k"], document: Int[Tensor, "n"]
) -> Float64[Tensor, "documents k"]:
    """Column sums of the tokens of each document, documents in ascending order of their number.

    Raises Refusal for NaN or infinity, or when there is not one document number for each row.
    """
    values = finite_rows("values", values)
    if document.shape != values.shape[:1] or document.is_floating_point():
        raise Refusal(
            f"document is {document.dtype} {list(document.shape)}, expected integers "
            f"[{len(values)}]; pass the document number of every row of values."
        )
    documents, row = document.unique(return_inverse=True)
    sums = torch.zeros(len(documents), values.shape[1], dtype=torch.float64, device=values.device)
    return sums.index_add_(0, row.to(values.device), values.to(torch.float64))


def bootstrap(
    statistic: Callable[[Float64[Tensor, "b k"]], Float64[Tensor, "b"]],
    sums: Float[Tensor, "documents k"],
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Percentile interval of statistic(column totals) over n resamples of the documents.

    `statistic` maps totals [b, k], one row a resample, to [b] values; `value` is that of the data
    as they are.  A mean over tokens is a ratio of two totals, as documents differ in length.
    Same seed, same interval.  Raises Refusal for fewer than two documents, n < 1, a level outside
    (0, 1), or a statistic of another shape or not finite.
    """
    if sums.ndim != 2 or len(sums) < 2:
        raise Refusal(
            f"sums is {list(sums.shape)}, expected [documents, k] with at least 2 documents to "
            "resample; pass document_sums of tokens from several documents."
        )
    if n < 1 or not 0 < level < 1:
        raise Refusal(
            f"n={n} and level={level}, expected at least one resample and a level between 0 and 1; "
            "1000 and 0.95 are usual."
        )
    sums = finite_rows("sums", sums).cpu().to(torch.float64)
    resamples = Resamples(len(sums), n, seed)
    return resamples.interval(statistic, resamples.totals([(slice(None), sums)]), level)


class Resamples:
    """The n draws of `bootstrap`, for sums that come in blocks of documents.

        resamples = Resamples(documents, n, seed)
        resamples.interval(statistic, resamples.totals([(rows, sums), ...]))

    Each block is sums [b, k] of the documents `rows` (indices from 0, or a slice); a document may
    be in several, as sums add. One byte for each draw and document is held.
    """

    def __init__(self, documents: int, n: int = 1000, seed: int = 0) -> None:
        self.n, self.documents = n, documents
        # How often each was drawn; 255 times has a probability below 1e-500.
        self.weights = torch.empty(n, documents, dtype=torch.uint8)
        generator = np.random.default_rng(seed)
        at_a_time = max(1, _DRAWS_AT_A_TIME // documents)
        for start in range(0, n, at_a_time):
            b = min(at_a_time, n - start)
            drawn = generator.integers(documents, size=(b, documents))
            # Offset by resample, so that one bincount counts every resample apart.
            drawn += documents * np.arange(b)[:, None]
            counts = np.bincount(drawn.ravel(), minlength=b * documents).reshape(b, documents)
            self.weights[start : start + b] = torch.from_numpy(counts)

    def totals(
        self, blocks: Iterable[tuple[Int64[Tensor, " b"] | slice, Float[Tensor, "b k"]]]
    ) -> Float64[Tensor, "n_plus_1 k"]:
        """Totals of all documents as they are, then of every resample."""
        whole: Tensor | None = None
        for rows, sums in blocks:
            sums = sums.cpu().to(torch.float64)
            drawn = self.weights[:, rows].to(torch.float64) @ sums
            found = torch.cat([sums.sum(0, keepdim=True), drawn])
            whole = found if whole is None else whole.add_(found)
        if whole is None:
            raise Refusal("There are no sums of documents, expected at least one block of them.")
        return whole

    def interval(
        self,
        statistic: Callable[[Float64[Tensor, "b k"]], Float64[Tensor, "b"]],
        totals: Float64[Tensor, "n_plus_1 k"],
        level: float = 0.95,
    ) -> Interval:
        """The statistic of the documents as they are, and its percentiles over resamples."""
        values = statistic(totals)
        if values.shape != (self.n + 1,) or not values.isfinite().all():
            raise Refusal(
                f"the statistic gave {list(values.shape)} values of which "
                f"{int(values.isfinite().logical_not().sum())} are not finite, expected "
                f"[{self.n + 1}] finite ones; make it work on rows of totals, all of which need "
                "some variance."
            )
        tail = (1 - level) / 2
        tails = torch.tensor([tail, 1 - tail], dtype=values.dtype)
        low, high = values[1:].quantile(tails).tolist()
        return Interval(float(values[0]), low, high)


def fvu_columns(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]
) -> Float64[Tensor, "n d_plus_3"]:
    """What FVU needs of each token: 1, |x - x_hat|^2, |x|^2, x.

    x itself is among them so that the mean is resampled with the rest.  The columns of several
    batches can be summed.  Raises Refusal for shapes that differ, NaN or infinity.
    """
    x, x_hat = _float64_pair("x", x, "x_hat", x_hat)
    one = torch.ones_like(x[:, :1])
    squares = [(x - x_hat).square().sum(1, keepdim=True), x.square().sum(1, keepdim=True)]
    return torch.cat([one, *squares, x], dim=1)


def fvu_from_totals(totals: Float64[Tensor, "b d_plus_3"]) -> Float64[Tensor, "b"]:
    """FVU of each row of totals of `fvu_columns`:  sum|e|^2 / (sum|x|^2 - |sum x|^2 / n).

    NaN for totals without variance.
    """
    n, rss, square, total = totals[:, 0], totals[:, 1], totals[:, 2], totals[:, 3:]
    return rss / _tss(n, square, total.square().sum(1))


def r2_columns(
    y: Float[Tensor, "n d"] | Float[Tensor, "n"], y_hat: Float[Tensor, "n d"] | Float[Tensor, "n"]
) -> Float64[Tensor, "n three_d_plus_1"]:
    """What R2 needs of each token: 1, then (y - y_hat)^2, y^2 and y of each dimension.

    Raises Refusal for shapes that differ, NaN or infinity.
    """
    y, y_hat = _float64_pair("y", y, "y_hat", y_hat)
    return torch.cat([torch.ones_like(y[:, :1]), (y - y_hat).square(), y.square(), y], dim=1)


def r2_from_totals(
    totals: Float64[Tensor, "b three_d_plus_1"], average: Average = "dims"
) -> Float64[Tensor, "b"]:
    """R2 of each row of totals of `r2_columns`, averaged as in `leastsquares.r2`.

    NaN for totals in which a dimension has no variance.  Raises Refusal for an unknown average.
    """
    if average not in ("dims", "pooled"):
        raise Refusal(f'average is {average!r}, expected "dims" or "pooled"; choose one.')
    rss, square, total = totals[:, 1:].tensor_split(3, dim=1)
    tss = _tss(totals[:, :1], square, total.square())
    return 1 - (rss.sum(1) / tss.sum(1) if average == "pooled" else (rss / tss).mean(1))


def _tss(n: Tensor, sum_of_squares: Tensor, square_of_sum: Tensor) -> Tensor:
    """Sum of squares about the mean; NaN where it is not above the rounding of the sums."""
    tss = sum_of_squares - square_of_sum / n
    return torch.where(tss > 1e-12 * sum_of_squares, tss, torch.nan)


def _float64_pair(name: str, y: Any, other_name: str, y_hat: Any) -> tuple[Tensor, Tensor]:
    y, y_hat = paired_rows(name, y, other_name, y_hat)
    return y.to(torch.float64), y_hat.to(torch.float64)

"""How the error falls with the width of the SAE: as a whole, and token by token.

`fit_power_law`, of the whole error:

    FVU(width)  ~  floor + scale * width^-exponent,        all three >= 0

The floor is what no width would learn; with FVU_nonlinear it gives the breakdown in figure 1 of
Engels, Smith and Tegmark, "Decomposing the Dark Matter of Sparse Autoencoders", TMLR 2025: absent
features FVU - floor, linear error floor - FVU_nonlinear, nonlinear error FVU_nonlinear.  They fit
by 50,000 steps of Adam.  Here: for a fixed exponent the other two are linear and have a closed
form, which leaves an exact search in one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from jaxtyping import Float, Float64, Int, Int64
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import f as f_distribution
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.intervals import Interval, bootstrap
from darkmatter.leastsquares import finite_rows, is_constant

# Below these the law is a straight line in log width; above, a step at the smallest width.
_EXPONENTS = np.geomspace(1e-4, 20, 120)
_WIDEST, _LARGEST_LOG = 1e12, math.log(np.finfo(np.float64).max)
# Residuals below this share of the FVU are float64 rounding: the points lie on the law.
_EXACT = 1e-13
# Below this determinant of their correlations, two columns of norms are one.
_COLLINEAR = 1e-10
# So many rows of norms stay in a core's cache from their conversion to their product.
_ROWS = 4096
# A share of the variance below this is float64 rounding of sums: nothing is left to explain.
_NOTHING_LEFT = 1e-12


@dataclass(frozen=True)
class PowerLaw:
    """floor + scale * width^-exponent; `law(width)` evaluates it.

    Each interval is (low, high); an end at 0 or inf says that the data do not bound it there.
    `residuals` are fvu - law(width), in the order of the points fitted.
    """

    floor: float
    scale: float
    exponent: float
    floor_interval: tuple[float, float]
    scale_interval: tuple[float, float]
    exponent_interval: tuple[float, float]
    residuals: tuple[float, ...]

    def __call__(self, width: ArrayLike | int) -> Any:
        """The law at these widths: a float for a number, else a float64 numpy array."""
        values = self.floor + self.scale * np.asarray(width, dtype=np.float64) ** -self.exponent
        return float(values) if values.ndim == 0 else values


def fit_power_law(width: ArrayLike, fvu: ArrayLike, level: float = 0.95) -> PowerLaw:
    """Least squares fit of fvu ~ floor + scale * width^-exponent to at least four points.

    The exponent is searched in [1e-4, 20] to 1e-12.  Intervals are by profile: those values c of a
    parameter for which the best fit with it held at c has

        RSS(c)  <=  RSS_min (1 + F / (n - 3)),        F the `level` quantile of F(1, n - 3)

    which for Gaussian residuals of unknown size is the likelihood ratio interval in its F form.
    (Its chi2 form, n log(RSS(c) / RSS_min) <= chi2(1), holds for many points; with the usual 7, of
    which 3 are spent, it covers less than `level`.)  It need not be symmetric, and a floor that the
    data cannot tell from zero gives (0, high).  Points exactly on a law give intervals of no
    length.

    Raises Refusal for fewer than four points, lengths that differ, widths that repeat, values not
    finite and positive, a level outside (0, 1), or an fvu that does not fall with width.
    """
    widths, values = _checked(width, fvu)
    n = len(widths)
    if not 0 < level < 1:
        raise Refusal(f"level={level}, expected a number between 0 and 1; 0.95 is usual.")
    points = _Points(np.log(widths), values)
    best = points.minimise()
    if best.log_scale == -math.inf:
        raise Refusal(
            f"fvu goes from {values[widths.argmin()]:g} at the smallest width to "
            f"{values[widths.argmax()]:g} at the largest, expected it to fall with width; "
            "a law that does not fall has no exponent, report the mean instead."
        )
    floor, scale, exponent = best.floor, math.exp(best.log_scale), best.exponent
    residuals = tuple((values - floor - scale * widths**-exponent).tolist())
    if best.rss <= n * (_EXACT * values.max()) ** 2:
        pairs = [(value, value) for value in (floor, scale, exponent)]
        return PowerLaw(floor, scale, exponent, pairs[0], pairs[1], pairs[2], residuals)

    limit = best.rss * (1 + float(f_distribution.ppf(level, 1, n - 3)) / (n - 3))
    floor_interval = _interval(
        lambda floor: points.minimise(floor=floor).rss - limit,
        best.floor,
        step=0.1 * float(np.ptp(values)),
        bounds=(0.0, math.inf),
    )
    log_exponents = (math.log(_EXPONENTS[0]), math.log(_EXPONENTS[-1]))
    exponent_interval = _from_log(
        _interval(
            lambda log_exponent: float(points.at(np.exp([log_exponent])).rss[0]) - limit,
            math.log(exponent),
            step=0.1,
            bounds=log_exponents,
        ),
        log_exponents,
    )
    # A scale below the first adds nothing at any width.  If no exponent is too large, no scale is.
    steep = math.isinf(exponent_interval[1])
    log_scales = (math.log(values.max()) - 30, best.log_scale if steep else math.inf)
    scale_interval = _from_log(
        _interval(
            lambda log_scale: points.minimise(log_scale=log_scale).rss - limit,
            best.log_scale,
            step=0.1,
            bounds=log_scales,
        ),
        log_scales,
    )
    return PowerLaw(
        floor, scale, exponent, floor_interval, scale_interval, exponent_interval, residuals
    )


class _Fit(NamedTuple):
    floor: float
    log_scale: float
    exponent: float
    rss: float


class _Fits(NamedTuple):
    """The best law at each of some exponents; slope is d rss / d exponent along these laws."""

    floor: NDArray[np.float64]
    height: NDArray[np.float64]
    rss: NDArray[np.float64]
    slope: NDArray[np.float64]


class _Points:
    """The points of a fit; `at` is called hundreds of times on them, so what it repeats is kept."""

    def __init__(self, log_width: NDArray[np.float64], fvu: NDArray[np.float64]) -> None:
        self.log_width, self.fvu = log_width, fvu
        self.smallest = float(log_width.min())
        self.above = log_width - self.smallest
        self.mean = float(fvu.mean())
        self.centred = fvu - self.mean

    def at(
        self,
        exponents: NDArray[np.float64],
        floor: float | None = None,
        log_scale: float | None = None,
    ) -> _Fits:
        """Non-negative least squares in (floor, scale) at each exponent, one of them held if given.

        In terms of height = scale * (smallest width)^-exponent, so that the regressor is in (0, 1].
        If the free solution has one parameter negative, the constrained one has it at 0.
        """
        regressor = np.exp(-(exponents[:, None] * self.above))
        if log_scale is not None:
            height = np.exp(log_scale - exponents * self.smallest)
            missing = self.fvu - height[:, None] * regressor
            floors = np.maximum(missing.sum(1) / len(self.fvu), 0)
        elif floor is not None:
            floors = np.full(len(exponents), floor)
            height = np.maximum(regressor @ (self.fvu - floor) / (regressor**2).sum(1), 0)
        else:
            level = regressor.sum(1) / len(self.fvu)
            centred = regressor - level[:, None]
            height = np.maximum(centred @ self.centred / (centred**2).sum(1), 0)
            floors = self.mean - height * level
            through_zero = regressor @ self.fvu / (regressor**2).sum(1)
            height = np.where(floors < 0, through_zero, height)
            floors = np.maximum(floors, 0)
        residuals = self.fvu - floors[:, None] - height[:, None] * regressor
        # The free parameters are at their optimum, so rss moves with the exponent only directly.
        slope = 2 * height * ((residuals * regressor) @ self.log_width)
        return _Fits(floors, height, (residuals**2).sum(1), slope)

    def minimise(self, floor: float | None = None, log_scale: float | None = None) -> _Fit:
        """The best law, with floor or log scale held if given: a grid, then the root of the slope.

        The root, because rss itself is flat to rounding over 1e-8 of the exponent.
        """
        grid = self.at(_EXPONENTS, floor, log_scale)
        i = int(grid.rss.argmin())
        low, high = max(i - 1, 0), min(i + 1, len(_EXPONENTS) - 1)
        exponent = float(_EXPONENTS[i])
        if grid.slope[low] < 0 < grid.slope[high]:
            exponent = _root(
                lambda exponent: float(self.at(np.array([exponent]), floor, log_scale).slope[0]),
                float(_EXPONENTS[low]),
                float(_EXPONENTS[high]),
            )
        fit = self.at(np.array([exponent]), floor, log_scale)
        height = float(fit.height[0])
        falls = height > _EXACT * self.fvu.max()
        log_height = math.log(height) if falls else -math.inf
        return _Fit(
            float(fit.floor[0]),
            log_height + exponent * self.smallest,
            exponent,
            float(fit.rss[0]),
        )


def _interval(
    excess: Callable[[float], float], best: float, step: float, bounds: tuple[float, float]
) -> tuple[float, float]:
    """Where excess crosses zero on each side of best; the bound where it does not."""
    return _crossing(excess, best, -step, bounds[0]), _crossing(excess, best, step, bounds[1])


def _crossing(excess: Callable[[float], float], best: float, step: float, bound: float) -> float:
    """The first zero of excess beyond best, met by steps that double; or the bound."""
    inside, outside = best, best
    while inside != bound:
        outside += step
        if (outside - bound) * step > 0:
            outside = bound
        if excess(outside) > 0:
            # An end of an interval needs fewer digits than the fit.
            return _root(excess, inside, outside, 1e-9)
        inside, step = outside, 2 * step
    return bound


def _root(
    function: Callable[[float], float], start: float, stop: float, precision: float = 1e-12
) -> float:
    return cast(float, brentq(function, start, stop, xtol=precision))


def _from_log(interval: tuple[float, float], bounds: tuple[float, float]) -> tuple[float, float]:
    """exp of both ends; an end at its bound is not bounded by the data."""
    low, high = interval
    return (
        0.0 if low <= bounds[0] else math.exp(low),
        math.inf if high >= min(bounds[1], _LARGEST_LOG) else math.exp(high),
    )


def _checked(width: ArrayLike, fvu: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    widths, values = np.asarray(width, dtype=np.float64), np.asarray(fvu, dtype=np.float64)
    if widths.ndim != 1 or widths.shape != values.shape or len(widths) < 4:
        raise Refusal(
            f"width is {list(widths.shape)} and fvu is {list(values.shape)}, expected two lists of "
            "the same length, at least 4; a law of 3 parameters needs 4 points."
        )
    for name, array in (("width", widths), ("fvu", values)):
        bad = ~(np.isfinite(array) & (array > 0))
        if bad.any():
            raise Refusal(
                f"{name}[{bad.argmax()}] is {array[bad.argmax()]}, expected finite positive "
                "numbers; leave that point out."
            )
    if widths.max() > _WIDEST or widths.min() < 1 / _WIDEST or not 1e-50 < values.max() < 1e50:
        raise Refusal(
            f"widths go up to {widths.max():g} and fvu to {values.max():g}, expected sizes and "
            "shares, whose powers stay in the range of float64; divide all by one number."
        )
    if len(np.unique(widths)) < len(widths):
        raise Refusal(
            f"the widths {widths.tolist()} repeat, expected each once; "
            "average the fvu of SAEs of one width, or keep one."
        )
    return widths, values


Score = Literal["r2", "r2_with", "helped"]


class NormMoments:
    """What every regression among k columns of per-token norms needs, summed by document.

        sums[document]  =  ( n,  sum z,  sum z z^T ),        z = norms - shift

    Public and readable at any time: `document` [documents] (int64, ascending), `shift` [k] (the
    mean of the first rows added) and `sums` [documents, 1 + k + k^2], both float64.  Rows come in
    any number of batches, documents in any order, and parts merge.
    """

    def __init__(self, columns: int) -> None:
        if columns < 1:
            raise Refusal(
                f"columns={columns}, expected at least 1; pass the number of columns of norms."
            )
        self.columns = columns
        self.shift: Float64[Tensor, "k"] = torch.zeros(columns, dtype=torch.float64)
        self.document: Int64[Tensor, "documents"] = torch.zeros(0, dtype=torch.int64)
        self.sums: Float64[Tensor, "documents m"] = torch.zeros(
            0, 1 + columns + columns**2, dtype=torch.float64
        )

    @property
    def n(self) -> int:
        """Number of tokens seen."""
        return int(self.sums[:, 0].sum())

    def partial_fit(
        self, norms: Float[Tensor, "n k"], document: Int[Tensor, "n"] | None = None
    ) -> NormMoments:
        """Add tokens, of any float dtype; without `document` they count as one.  Returns self.

        Raises Refusal for another number of columns, NaN or infinity, or when there is not one
        document number for each row; nothing has been added then.
        """
        norms = finite_rows("norms", norms)
        if norms.shape[1] != self.columns:
            raise Refusal(
                f"norms is {list(norms.shape)}, expected [n, {self.columns}]; pass one column for "
                "each norm, or make the moments for this number of columns."
            )
        if document is None:
            document = torch.zeros(len(norms), dtype=torch.int64)
        if document.shape != norms.shape[:1] or document.is_floating_point():
            raise Refusal(
                f"document is {document.dtype} {list(document.shape)}, expected integers "
                f"[{len(norms)}]; pass the document number of every row of norms."
            )
        if len(norms) == 0:
            return self
        norms, document = norms.detach().cpu(), document.cpu().to(torch.int64)
        if self.n == 0:
            self.shift = norms[:_ROWS].to(torch.float64).mean(0)
        if bool((document.diff() < 0).any()):
            order = document.argsort(stable=True)
            norms, document = norms[order], document[order]
        present, counts = document.unique_consecutive(return_counts=True)
        # Rows as columns, and a last row of ones, whose products are the sums.
        k = self.columns
        ones = torch.ones(k + 1, min(_ROWS, len(norms)), dtype=torch.float64)
        products = torch.zeros(len(present), k + 1, k + 1, dtype=torch.float64)
        parts = norms.split(cast("list[int]", counts.tolist()))
        for part, product in zip(parts, products, strict=True):
            for block in part.split(_ROWS):
                z = ones[:, : len(block)]
                torch.sub(block.T, self.shift[:, None], out=z[:k])
                product.addmm_(z, z.T)
        totals, products = products[:, k, :k], products[:, :k, :k].flatten(1)
        self._add(present, torch.cat([counts[:, None].to(torch.float64), totals, products], 1))
        return self

    def merge(self, other: NormMoments) -> NormMoments:
        """Add the tokens that `other` has seen; `other` is unchanged.  Returns self.

        Raises Refusal if the columns differ in number.
        """
        if other.columns != self.columns:
            raise Refusal(
                f"cannot merge moments of {other.columns} columns into those of {self.columns}, "
                "expected the same number; merge moments of the same norms."
            )
        if self.n == 0:
            self.shift = other.shift
        self._add(other.document, other.about(self.shift))
        return self

    def about(self, centre: Float64[Tensor, "k"]) -> Float64[Tensor, "documents m"]:
        """`sums` as they would be with `centre` [k] for shift."""
        delta = self.shift - centre
        n, total, product = _unpacked(self.sums, self.columns)
        cross = total[:, :, None] * delta
        product = product + cross + cross.mT + n[:, :, None] * torch.outer(delta, delta)
        return torch.cat([n, total + n * delta, product.flatten(1)], 1)

    def _add(self, document: Tensor, sums: Tensor) -> None:
        both = torch.cat([self.document, document]).unique()
        grown = torch.zeros(len(both), self.sums.shape[1], dtype=torch.float64)
        grown[torch.searchsorted(both, self.document)] = self.sums
        grown[torch.searchsorted(both, document)] += sums
        self.document, self.sums = both, grown


@dataclass(frozen=True, eq=False)
class PerTokenScaling:
    """How well the norm of one SAE predicts that of another, token by token.

    Row i is predictor i, column j target j.  `r2` of target j regressed on [predictor i, 1];
    `r2_with` with helper i as a further regressor; and

        helped  =  (r2_with - r2) / (1 - r2),

    the share of the remaining variance that the helper explains: NaN where none remains (i = j),
    below 0 where on the scored tokens it harms.  The last two are None without a helper.
    """

    r2: Float64[Tensor, "predictors targets"]
    r2_with: Float64[Tensor, "predictors targets"] | None
    helped: Float64[Tensor, "predictors targets"] | None
    _sums: Float64[Tensor, "documents predictors targets 5"]

    def interval(
        self,
        i: int,
        j: int,
        score: Score = "r2",
        n: int = 1000,
        seed: int = 0,
        level: float = 0.95,
    ) -> Interval:
        """One entry of `r2`, `r2_with` or `helped` with its interval, documents resampled.

        The scored documents are drawn with replacement; the regressions stay as fitted.
        Raises Refusal for an unknown score, one that needs a helper, an entry that is NaN, or
        fewer than two documents.
        """
        if score not in ("r2", "r2_with", "helped"):
            raise Refusal(f'score is {score!r}, expected "r2", "r2_with" or "helped"; choose one.')
        if score != "r2" and self.helped is None:
            raise Refusal(
                f"{score!r} needs a helper, but there was none; call per_token_scaling with helper."
            )
        scores: Tensor = getattr(self, score)
        if not scores[i, j].isfinite():
            raise Refusal(
                f"{score!r} of predictor {i} and target {j} is undefined, as nothing remains to be "
                "explained; take another pair."
            )
        sums = self._sums[:, i, j]
        return bootstrap(lambda totals: _scores(totals)[score], sums, n, seed, level)


def per_token_scaling(
    fit: NormMoments | Float[Tensor, "n_fit k"],
    test: NormMoments | Float[Tensor, "n_test k"],
    predictor: Sequence[int] | None = None,
    target: Sequence[int] | None = None,
    helper: Sequence[int] | None = None,
) -> PerTokenScaling:
    """R2 of every column of per-token norms regressed on every other, all from one moment matrix.

        norm_j  ~  a norm_i + b,            with a helper   norm_j  ~  a norm_i + c helper_i + b

    fitted on the moments of `fit`, scored on those of `test`; take them from different documents.
    Both are `NormMoments` of the same columns, or the columns themselves [n, k] (then of one
    document, without intervals).  `predictor`, `target` and `helper` choose columns by number; by
    default every column predicts every column, and nothing helps.  Norms, not their squares: the
    paper's choice.  Cost: one product n k^2 and a 2 x 2 system for each pair, no row twice.

    Source: Engels, Smith and Tegmark (2410.14670), per-token scaling; the helper is of version 1,
    where it is the norm of the nonlinear error of SAE i.

    Raises Refusal for columns that differ or do not exist, a helper for some predictors only, a
    column that does not vary, a predictor and its helper that are one column in two scales, or too
    few fitting tokens.
    """
    fit, test = _moments("fit", fit), _moments("test", test)
    k = fit.columns
    if test.columns != k:
        raise Refusal(
            f"fit has {k} columns and test {test.columns}, expected the same; pass the same norms."
        )
    predictors = _chosen("predictor", range(k) if predictor is None else predictor, k)
    targets = _chosen("target", predictors if target is None else target, k)
    helpers = None if helper is None else _chosen("helper", helper, k)
    if helpers is not None and len(helpers) != len(predictors):
        raise Refusal(
            f"there are {len(helpers)} helpers for {len(predictors)} predictors, expected one for "
            "each; repeat a helper that serves several."
        )
    mean, covariance = _centred("fit", fit)
    _centred("test", test)
    alone = _residual_weights(covariance, [[one] for one in predictors], targets)
    pairs = (
        None if helpers is None else [list(two) for two in zip(predictors, helpers, strict=True)]
    )
    together = None if pairs is None else _residual_weights(covariance, pairs, targets)

    # About the mean of fit the intercepts are zero, so each RSS is a quadratic form.
    n, total, product = _unpacked(test.about(mean), k)
    rss = _quadratic(alone, product)
    rss_with = rss if together is None else _quadratic(together, product)
    square = product[:, targets, targets]
    columns = (n[:, :, None], total[:, None, targets], square[:, None], rss, rss_with)
    sums = torch.stack(torch.broadcast_tensors(*columns), -1)
    found = _scores(sums.sum(0))
    if helpers is None:
        return PerTokenScaling(found["r2"], None, None, sums)
    return PerTokenScaling(found["r2"], found["r2_with"], found["helped"], sums)


def _scores(totals: Tensor) -> dict[str, Tensor]:
    """r2, r2_with and helped of totals [..., 5]: n, sum y, sum y^2, RSS without and with helper."""
    n, y, square, rss, rss_with = totals.unbind(-1)
    tss = square - y.square() / n
    remains = torch.where(rss > _NOTHING_LEFT * tss, rss, torch.nan)
    return {"r2": 1 - rss / tss, "r2_with": 1 - rss_with / tss, "helped": 1 - rss_with / remains}


def _residual_weights(
    covariance: Tensor, regressors: Sequence[Sequence[int]], targets: Sequence[int]
) -> Tensor:
    """c [predictors, targets, k] with residual = z c, for z about the mean of the fitted rows."""
    chosen = torch.tensor(regressors)
    scale = covariance.diagonal().sqrt()
    correlation = covariance / torch.outer(scale, scale)
    gram = correlation[chosen[:, :, None], chosen[:, None, :]]
    if (alike := gram.det() < _COLLINEAR).any():
        pair = regressors[int(alike.nonzero()[0])]
        raise Refusal(
            f"columns {list(pair)} are one column in two scales, expected a helper that is not a "
            "copy of its predictor; choose another helper."
        )
    weight = torch.linalg.solve(gram, correlation[chosen][:, :, list(targets)])
    weight = weight * scale[list(targets)] / scale[chosen][:, :, None]
    residual = torch.zeros(len(regressors), len(targets), len(scale), dtype=torch.float64)
    residual[:, torch.arange(len(targets)), list(targets)] = 1
    rows = torch.arange(len(regressors))
    for r in range(chosen.shape[1]):
        residual[rows, :, chosen[:, r]] -= weight[:, r]
    return residual


def _quadratic(weights: Tensor, product: Tensor) -> Tensor:
    """c^T P c of every pair and document [documents, predictors, targets]; never negative."""
    p, t, k = weights.shape
    forms = (weights[..., :, None] * weights[..., None, :]).reshape(p * t, k * k)
    return (product.flatten(1) @ forms.T).reshape(-1, p, t).clamp(min=0)


def _unpacked(sums: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """n [documents, 1], sum z [documents, k] and sum z z^T [documents, k, k]."""
    n, total, product = sums.split([1, k, k * k], dim=1)
    return n, total, product.reshape(-1, k, k)


def _moments(name: str, norms: Any) -> NormMoments:
    if isinstance(norms, NormMoments):
        return norms
    norms = finite_rows(name, norms)
    return NormMoments(norms.shape[1]).partial_fit(norms)


def _chosen(name: str, columns: Sequence[int], k: int) -> list[int]:
    chosen = [int(one) for one in columns]
    if not chosen or min(chosen) < 0 or max(chosen) >= k:
        raise Refusal(
            f"{name} is {chosen}, expected at least one column, each from 0 to {k - 1}; count the "
            "columns of the norms."
        )
    return chosen


def _centred(name: str, moments: NormMoments) -> tuple[Tensor, Tensor]:
    """Mean [k] and summed products about it [k, k]; Refusal if they allow no regression."""
    if moments.n < 4:
        raise Refusal(
            f"{name} has {moments.n} tokens, expected at least 4, as two slopes and an intercept "
            "are fitted; add tokens."
        )
    n, total, _ = _unpacked(moments.sums.sum(0, keepdim=True), moments.columns)
    mean = moments.shift + total[0] / n[0]
    product = _unpacked(moments.about(mean).sum(0, keepdim=True), moments.columns)[2][0]
    constant = is_constant(product.diagonal(), mean, moments.n)
    if constant.any():
        raise Refusal(
            f"column {int(constant.nonzero()[0])} of {name} is the same for all {moments.n} "
            "tokens, expected every column to vary, as R2 is a share of the variance; drop it."
        )
    return mean, product

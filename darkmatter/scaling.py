"""How the error falls with the width of the SAE: a power law with a floor.

    FVU(width)  ~  floor + scale * width^-exponent,        all three >= 0

The floor is what no width would learn; with FVU_nonlinear it gives the breakdown in figure 1 of
Engels, Smith and Tegmark, "Decomposing the Dark Matter of Sparse Autoencoders", TMLR 2025: absent
features FVU - floor, linear error floor - FVU_nonlinear, nonlinear error FVU_nonlinear.  They fit
by 50,000 steps of Adam.  Here: for a fixed exponent the other two are linear and have a closed
form, which leaves an exact search in one dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.stats import f as f_distribution

from darkmatter._refusal import Refusal

# Below these the law is a straight line in log width; above, a step at the smallest width.
_EXPONENTS = np.geomspace(1e-4, 20, 240)
# Residuals below this share of the FVU are float64 rounding: the points lie on the law.
_EXACT = 1e-13


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


class _Points(NamedTuple):
    log_width: NDArray[np.float64]
    fvu: NDArray[np.float64]

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
        smallest = self.log_width.min()
        regressor = np.exp(-np.outer(exponents, self.log_width - smallest))
        if log_scale is not None:
            height = np.exp(log_scale - exponents * smallest)
            floors = (self.fvu - height[:, None] * regressor).mean(1).clip(min=0)
        elif floor is not None:
            floors = np.full(len(exponents), floor)
            height = (regressor @ (self.fvu - floor) / (regressor**2).sum(1)).clip(min=0)
        else:
            centred = regressor - regressor.mean(1, keepdims=True)
            height = (centred @ (self.fvu - self.fvu.mean()) / (centred**2).sum(1)).clip(min=0)
            floors = self.fvu.mean() - height * regressor.mean(1)
            through_zero = regressor @ self.fvu / (regressor**2).sum(1)
            height = np.where(floors < 0, through_zero, height)
            floors = floors.clip(min=0)
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
            log_height + exponent * float(self.log_width.min()),
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
            return _root(excess, inside, outside)
        inside, step = outside, 2 * step
    return bound


def _root(function: Callable[[float], float], start: float, stop: float) -> float:
    return cast(float, brentq(function, start, stop, xtol=1e-12))


def _from_log(interval: tuple[float, float], bounds: tuple[float, float]) -> tuple[float, float]:
    """exp of both ends; an end at its bound is not bounded by the data."""
    low, high = interval
    return (
        0.0 if low <= bounds[0] else math.exp(low),
        math.inf if high >= bounds[1] else math.exp(high),
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
    if len(np.unique(widths)) < len(widths):
        raise Refusal(
            f"the widths {widths.tolist()} repeat, expected each once; "
            "average the fvu of SAEs of one width, or keep one."
        )
    return widths, values

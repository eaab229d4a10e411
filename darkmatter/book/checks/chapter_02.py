"""Checks of chapter 02, SAE error and width."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from darkmatter._refusal import Refusal
from darkmatter.book.exercises import NotYet, exercise
from darkmatter.scaling import PowerLaw, fit_power_law

Floats = NDArray[np.float64]

_WIDTHS: Floats = np.array([512.0, 1024.0, 2048.0, 4096.0, 8192.0])
# What an honest fit of points on a law without a floor may report: rounding, amplified.
_NO_FLOOR = 1e-3


@exercise(
    "02.1",
    difficulty=1,
    minutes=8,
    teaches="The map at one width predicts absent and linear error together; the floor parts them.",
)
def breakdown(answer: Callable[[float, float, float], tuple[float, float, float]]) -> None:
    """Three parts of one error, by hand: 0.25 - 0.19, 0.19 - 0.15, 0.15."""
    found = answer(0.25, 0.15, 0.19)
    assert np.shape(found) == (3,), "Return three numbers: absent, linear, nonlinear."
    absent, linear, nonlinear = found
    assert not np.isclose(linear, 0.10), (
        "That linear part is all that the map predicts at this width: absent and linear error "
        "together. Take off what a wider SAE would learn."
    )
    assert not np.allclose(found, [0.04, 0.06, 0.15]), (
        "Absent and linear are exchanged: absent is what lies above the floor."
    )
    assert np.isclose(nonlinear, 0.15), "The nonlinear part is what the linear map leaves."
    assert np.isclose(absent + linear + nonlinear, 0.25), "The three parts must add up to the FVU."
    assert np.allclose(found, [0.06, 0.04, 0.15]), (
        "Absent is the FVU less the floor, linear the floor less the nonlinear part."
    )


@exercise(
    "02.2",
    difficulty=3,
    minutes=15,
    teaches="At a fixed exponent the law is a simple regression with a bound on each coefficient.",
)
def floor_and_scale(answer: Callable[[Floats, Floats, float], tuple[float, float]]) -> None:
    """Noise-free and noisy points, a floor that would be negative, and points that rise."""
    exact = 0.2 + 2.5 * _WIDTHS**-0.5
    found = answer(_WIDTHS, exact, 0.5)
    assert np.shape(found) == (2,), "Return two numbers: floor, scale."
    assert not np.allclose(found, [2.5, 0.2]), "Floor and scale are exchanged."
    assert not np.allclose(found, [0.0, float((_WIDTHS**-0.5 @ exact) / (1 / _WIDTHS).sum())]), (
        "That is the fit through zero: the law needs an intercept, its floor."
    )
    assert np.allclose(found, [0.2, 2.5]), (
        "Points exactly on a law are not recovered. Regress the FVU on width**-exponent with an "
        "intercept: slope = covariance / variance."
    )

    # This law lies below zero at infinite width: the free floor is -0.02.
    r = _WIDTHS**-0.3
    low = 2 * r - 0.02
    floor, scale = answer(_WIDTHS, low, 0.3)
    assert floor >= 0, "The floor came out negative, but no FVU is: hold it at zero."
    assert not np.isclose(scale, 2.0), (
        "You set the negative floor to zero but kept the scale that belonged to it. Fit the scale "
        "again, without an intercept."
    )
    assert np.allclose([floor, scale], [0.0, float((r @ low) / (r @ r))]), (
        "With the floor held at zero the scale is sum(r * fvu) / sum(r * r)."
    )
    rising = answer(_WIDTHS, exact[::-1].copy(), 0.5)
    assert rising[1] >= 0, (
        "For points that rise the scale came out negative: hold it at zero; the floor is the mean."
    )
    assert np.allclose(rising, [exact.mean(), 0]), (
        "For points that rise the best scale is zero, and the best floor is then the mean."
    )


@exercise(
    "02.3",
    difficulty=4,
    minutes=20,
    teaches="Range, not the number of points, identifies a floor.",
)
def floor_error(answer: Callable[[Floats, float, float, float], float]) -> str:
    """Against the formula, and against its two likely mistakes."""

    def expected(width: Floats, known: int) -> float:
        falls = width**-0.5
        columns = np.stack([np.ones(len(width)), falls, -2.5 * falls * np.log(width)], 1)
        columns = columns[:, : 3 - known]
        return float(1e-3 * np.sqrt(np.linalg.inv(columns.T @ columns)[0, 0]))

    found = float(answer(_WIDTHS, 2.5, 0.5, 1e-3))
    right = expected(_WIDTHS, 0)
    assert not np.isclose(found, expected(_WIDTHS, 1)), (
        "That takes the exponent as known. It is fitted too: add its column to J, and see how much "
        "larger the error gets."
    )
    assert not np.isclose(found, right**2, rtol=1e-4, atol=0), (
        "That is the variance of the floor; the standard error is its root."
    )
    assert not np.isclose(found, right / 1e-3, rtol=1e-4), (
        "That is for noise of size one: multiply by noise."
    )
    assert np.isclose(found, right, rtol=1e-4), (
        "The standard error is noise * sqrt of the first diagonal element of inv(J.T @ J), with "
        "the three derivatives as the columns of J, the floor's first."
    )
    wide = 512.0 * 2.0 ** np.linspace(0, 10, 5)
    again = float(answer(wide, 2.5, 0.5, 1e-3))
    assert np.isclose(again, expected(wide, 0), rtol=1e-4), (
        "It is right for the five widths of the suite but not for others; use the argument width."
    )
    return (
        f"Five points over 4 doublings: {found:.4f}; five points over 10 doublings: {again:.4f}. "
        "Range, not the number of points, identifies a floor."
    )


@exercise(
    "02.4",
    difficulty=3,
    minutes=15,
    teaches="Scores on the fitted rows flatter, and new rows pay for it too.",
)
def expected_on_new_rows(answer: Callable[[float, int, int], float]) -> None:
    """(n + p) / (n - p) with p = d + 1; to second order in p / n other forms are right too."""
    n, d, in_sample = 2_000, 59, 0.25
    p = d + 1
    found = float(answer(in_sample, n, d))
    assert not np.isclose(found, in_sample), (
        "That is the in-sample share itself; the map has fitted some of the noise of its rows."
    )
    assert found > in_sample, "New rows are harder than those the map was fitted on, not easier."
    assert not np.isclose(found, in_sample * n / (n - p), rtol=5e-3), (
        "That undoes the optimism on the rows it was fitted on and gives the residual variance. "
        "New rows also pay for the error of the map."
    )
    assert not np.isclose(found, in_sample + p / n, rtol=2e-3), (
        "The optimism is a share of what is left unexplained, not of the whole error: multiply."
    )
    right = in_sample * (n + p) / (n - p)
    # p / n is 0.03, so expansions that differ in its square differ by 0.001.
    assert np.isclose(found, right, rtol=2.5e-3), (
        f"Expected about {right:.4f} for n={n}, d={d} and {in_sample} in sample, found "
        f"{found:.4f}: divide by (n - d - 1) / n, multiply by (n + d + 1) / n."
    )


def simulated_fvu(width: ArrayLike, lengths: ArrayLike | float) -> Floats:
    """FVU of SAEs without a floor that are worse when trained on few activations per latent.

    `lengths` are millions of activations, one for each width:
    0.31 (m / 512)^-0.12 (1 + 0.02 / T * m / 512).  Raises Refusal for other shapes, or a length
    outside of 1 to 1000.
    """
    times = np.asarray(width, dtype=np.float64) / 512
    millions = np.asarray(lengths, dtype=np.float64)
    if millions.shape != times.shape or not ((millions >= 1) & (millions <= 1000)).all():
        raise Refusal(
            f"expected one length from 1 to 1000 for each of {times.size} widths, found "
            f"{lengths!r}; return an array as long as width"
        )
    return 0.31 * times**-0.12 * (1 + 0.02 * times / millions)


@exercise(
    "02.5",
    difficulty=3,
    minutes=20,
    teaches="What looks like a floor need not be one.",
)
def training_lengths(answer: Callable[[Floats, bool], Floats]) -> str:
    """The honest choice gives no floor, the other a floor that its interval believes."""
    honest, false = (_fitted(answer, is_honest) for is_honest in (True, False))
    assert honest.floor < _NO_FLOOR, (
        f"Your honest lengths give a floor of {honest.floor:.3f}, but there is none. Give each "
        "latent the same number of activations: lengths in proportion to width."
    )
    assert false.floor_interval[0] > 0, (
        f"Your misleading lengths give a floor of {false.floor:.3f} with an interval that still "
        "allows zero. Leave the widest SAEs with fewer activations per latent."
    )
    assert false.floor_interval[0] > 0.05, (
        f"The interval of your false floor begins at {false.floor_interval[0]:.3f}; make it begin "
        "above 0.05: train all widths equally, and shorter."
    )
    low, high = false.floor_interval
    return (
        f"You made a floor of {false.floor:.3f} ({low:.3f} to {high:.3f}) where there is none, "
        "by nothing but training lengths."
    )


def _fitted(answer: Callable[[Floats, bool], Floats], honest: bool) -> PowerLaw:
    fvu = simulated_fvu(_WIDTHS, answer(_WIDTHS, honest))
    if not (np.diff(fvu) < 0).all():
        raise NotYet(
            f"The FVU of your {'honest' if honest else 'misleading'} SAEs does not fall at each "
            f"step: {fvu.round(3).tolist()}. Train the wide ones a little longer."
        )
    return fit_power_law(_WIDTHS, fvu)

"""scaling: planted laws, the published points, scipy as second method, and coverage."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import curve_fit, minimize

from darkmatter._refusal import Refusal
from darkmatter.scaling import PowerLaw, fit_power_law

WIDTHS = [512.0 * 2**k for k in range(7)]
# Engels et al., figure 1: Gemma 2 9B, layer 20, L0 about 60 (read off the figure).
PUBLISHED_WIDTHS = [16384.0 * 2**k for k in range(7)]
PUBLISHED_FVU = [0.313, 0.286, 0.265, 0.249, 0.242, 0.232, 0.215]


def law(width: np.ndarray, floor: float, scale: float, exponent: float) -> np.ndarray:
    return floor + scale * width**-exponent


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Annotations are checked in the other tests; hundreds of fits would be mostly that."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def rss(fitted: PowerLaw) -> float:
    return sum(residual**2 for residual in fitted.residuals)


class TestPlanted:
    @settings(deadline=None, max_examples=40)
    @given(st.floats(0, 0.4), st.floats(0.1, 2), st.floats(0.05, 0.5))
    def test_noise_free_law_is_recovered(self, floor: float, exponent: float, top: float) -> None:
        scale = top * WIDTHS[0] ** exponent
        fitted = fit_power_law(WIDTHS, law(np.array(WIDTHS), floor, scale, exponent))
        # At the smallest exponent and floor 1e-16 of rounding is amplified by about 1e6.
        assert fitted.floor == pytest.approx(floor, abs=1e-6)
        assert fitted.exponent == pytest.approx(exponent, rel=1e-6)
        assert fitted.scale == pytest.approx(scale, rel=1e-5)
        assert max(map(abs, fitted.residuals)) < 1e-12

    def test_noise_free_intervals_have_no_length(self) -> None:
        fitted = fit_power_law(WIDTHS, law(np.array(WIDTHS), 0.2, 3, 0.5))
        assert fitted.floor_interval == (fitted.floor, fitted.floor)
        assert fitted.exponent_interval == (fitted.exponent, fitted.exponent)
        assert fitted.scale_interval == (fitted.scale, fitted.scale)

    def test_a_floor_below_zero_is_held_at_zero(self) -> None:
        values = law(np.array(WIDTHS), -0.02, 1, 0.3)
        fitted = fit_power_law(WIDTHS, values)
        assert fitted.floor == 0
        assert fitted.floor_interval[0] == 0 < fitted.floor_interval[1]

        def pure(parameters: np.ndarray) -> float:
            return float(((values - parameters[0] * WIDTHS ** -parameters[1]) ** 2).sum())

        second = minimize(pure, [1, 0.3], method="Nelder-Mead", options={"xatol": 1e-10})
        assert rss(fitted) <= second.fun * (1 + 1e-9)

    def test_a_step_is_fitted_by_the_steepest_law(self) -> None:
        fitted = fit_power_law(WIDTHS, [0.5, *[0.2, 0.2001] * 3])
        # The other six do not fall: the law is their mean, and no exponent is too large.
        assert fitted.floor == pytest.approx(0.20005, abs=1e-6)
        assert fitted.exponent_interval[1] == math.inf
        assert fitted.scale_interval[1] == math.inf

    def test_order_of_points_and_unit_of_fvu_do_not_matter(self) -> None:
        order = [3, 0, 6, 2, 5, 1, 4]
        straight = fit_power_law(PUBLISHED_WIDTHS, PUBLISHED_FVU)
        mixed = fit_power_law(
            torch.tensor([PUBLISHED_WIDTHS[i] for i in order]),
            torch.tensor([PUBLISHED_FVU[i] for i in order], dtype=torch.float64) * 100,
        )
        assert mixed.floor == pytest.approx(100 * straight.floor, rel=1e-8)
        assert mixed.exponent_interval == pytest.approx(straight.exponent_interval, rel=1e-8)
        expected = [100 * straight.residuals[i] for i in order]
        assert mixed.residuals == pytest.approx(expected, abs=1e-9)


class TestPublished:
    def test_does_at_least_as_well_as_the_published_constants(self) -> None:
        widths, values = np.array(PUBLISHED_WIDTHS), np.array(PUBLISHED_FVU)
        fitted = fit_power_law(widths, values)
        published = ((values - law(widths, 0.186, 2.708, 0.317)) ** 2).sum()
        assert rss(fitted) <= published
        # The figure gives three digits, and the points are read off it.
        assert fitted.floor == pytest.approx(0.186, abs=0.005)
        assert fitted.exponent == pytest.approx(0.317, abs=0.01)

    def test_against_curve_fit(self) -> None:
        widths, values = np.array(PUBLISHED_WIDTHS), np.array(PUBLISHED_FVU)
        fitted = fit_power_law(widths, values)
        second, _ = curve_fit(law, widths, values, p0=[0.18, 2.7, 0.3], ftol=1e-14, xtol=1e-14)
        ours = [fitted.floor, fitted.scale, fitted.exponent]
        # A trust-region search stops where rss is flat to rounding: half the digits.
        assert ours == pytest.approx(second.tolist(), rel=1e-5)
        assert rss(fitted) <= float(((values - law(widths, *second)) ** 2).sum()) * (1 + 1e-12)

    def test_the_published_points_do_not_exclude_a_floor_of_zero(self) -> None:
        fitted = fit_power_law(PUBLISHED_WIDTHS, PUBLISHED_FVU)
        assert fitted.floor_interval[0] == 0
        assert fitted.floor < fitted.floor_interval[1] < min(PUBLISHED_FVU) + 0.01

    def test_floor_interval_ends_where_the_profile_says(self) -> None:
        values = law(np.array(WIDTHS), 0.2, 3, 0.5) + 1e-3 * np.array([1, -1, 0, 1, -1, 1, -1])
        fitted = fit_power_law(WIDTHS, values)
        # Second method: hold the floor at each end and let a general optimiser fit the rest.
        # F(1, 4) at .95 is 7.7086, the square of Student's t(4) at .975, 2.7764.
        limit = rss(fitted) * (1 + 2.7764451**2 / 4)
        for end in fitted.floor_interval:

            def profile(parameters: np.ndarray, end: float = end) -> float:
                scale, exponent = np.exp(parameters)
                return 1e6 * float(
                    ((values - law(np.array(WIDTHS), end, scale, exponent)) ** 2).sum()
                )

            start = np.log([fitted.scale, fitted.exponent])
            found = minimize(
                profile, start, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12}
            )
            assert found.fun / 1e6 == pytest.approx(limit, rel=1e-5)

    def test_a_higher_level_is_wider(self) -> None:
        narrow, wide = (
            fit_power_law(PUBLISHED_WIDTHS, PUBLISHED_FVU, level) for level in (0.5, 0.95)
        )
        for name in ("floor_interval", "scale_interval", "exponent_interval"):
            (a, b), (c, d) = getattr(wide, name), getattr(narrow, name)
            assert a <= c < d <= b


@pytest.mark.usefixtures("unchecked")
def test_intervals_cover_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    truth = law(np.array(WIDTHS), 0.2, 3, 0.5)
    runs, hits = 200, np.zeros(3)
    for _ in range(runs):
        fitted = fit_power_law(WIDTHS, truth + generator.normal(0, 5e-4, 7))
        found = (fitted.floor_interval, fitted.scale_interval, fitted.exponent_interval)
        planted = (0.2, 3, 0.5)
        hits += [low <= value <= high for (low, high), value in zip(found, planted, strict=True)]
    # Binomial standard error sqrt(.95 * .05 / 200) = .0154, three of them each way.
    assert ((hits / runs > 0.904) & (hits / runs < 0.997)).all(), hits / runs


class TestCall:
    def test_numbers_and_arrays(self) -> None:
        fitted = fit_power_law(WIDTHS, law(np.array(WIDTHS), 0.2, 3, 0.5))
        # 0.2 + 3 / sqrt(900) = 0.3
        assert fitted(900) == pytest.approx(0.3, abs=1e-12)
        assert isinstance(fitted(900), float)
        assert fitted([900, 3600]) == pytest.approx([0.3, 0.25], abs=1e-12)


class TestRefusals:
    @pytest.mark.parametrize(
        ("width", "fvu", "message"),
        [
            ([1, 2, 4], [3, 2, 1], "width is [3] and fvu is [3], expected two lists"),
            ([1, 2, 4, 8], [3, 2, 1], "width is [4] and fvu is [3]"),
            ([[1, 2, 4, 8]], [[4, 3, 2, 1]], "width is [1, 4]"),
            ([1, 2, 4, math.inf], [4, 3, 2, 1], "width[3] is inf"),
            ([1, 2, 4, 8], [4, math.nan, 2, 1], "fvu[1] is nan"),
            ([1, 2, 4, 8], [4, 3, 2, 0], "fvu[3] is 0.0, expected finite positive"),
            ([0, 2, 4, 8], [4, 3, 2, 1], "width[0] is 0.0"),
            ([1, 2, 4, 4], [4, 3, 2, 1], "repeat, expected each once"),
            ([1, 2, 4, 8], [1, 2, 3, 4], "fvu goes from 1 at the smallest width to 4"),
            ([1, 2, 4, 8], [0.1] * 4, "expected it to fall with width"),
        ],
    )
    def test_points(self, width: list[float], fvu: list[float], message: str) -> None:
        with pytest.raises(Refusal, match=re.escape(message)):
            fit_power_law(width, fvu)

    @pytest.mark.parametrize("level", [0.0, 1.0, 95.0])
    def test_level(self, level: float) -> None:
        with pytest.raises(Refusal, match="expected a number between 0 and 1"):
            fit_power_law(WIDTHS, PUBLISHED_FVU, level)

"""scaling: planted laws and planted norms, published points, second methods, and coverage."""

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
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import r2
from darkmatter.scaling import NormMoments, PowerLaw, fit_power_law, per_token_scaling
from tests.common import normal, refused

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


def norms(seed: int, n: int = 400, k: int = 4) -> Tensor:
    """Correlated positive columns of different size, as error norms of several widths are."""
    shared, own = normal(seed, n, 1), normal(seed + 1, n, k)
    size = torch.linspace(8, 5, k, dtype=torch.float64)
    return size * (3 + 0.6 * shared + torch.linspace(0.2, 0.8, k, dtype=torch.float64) * own)


def naive(fit: Tensor, test: Tensor, regressors: list[int], target: int) -> float:
    """One regression by lstsq on all rows, scored on all rows."""

    def design(rows: Tensor) -> Tensor:
        return torch.cat([rows[:, regressors], rows.new_ones(len(rows), 1)], 1)

    weight = torch.linalg.lstsq(design(fit), fit[:, target]).solution
    return r2(test[:, target], design(test) @ weight)


class TestPerToken:
    def test_every_pair_against_lstsq(self) -> None:
        fit, test = norms(0), norms(9, 150)
        found = per_token_scaling(fit, test, predictor=[0, 1], target=[0, 1, 2], helper=[2, 3])
        assert found.r2_with is not None
        assert found.helped is not None
        for i in range(2):
            for j in range(3):
                alone, both = naive(fit, test, [i], j), naive(fit, test, [i, i + 2], j)
                # Moments square the norms: about 1e-16 times (mean / deviation)^2 remain.
                assert float(found.r2[i, j]) == pytest.approx(alone, abs=1e-12)
                assert float(found.r2_with[i, j]) == pytest.approx(both, abs=1e-12)
                if i != j:
                    helped = (both - alone) / (1 - alone)
                    assert float(found.helped[i, j]) == pytest.approx(helped, abs=1e-11)

    def test_two_columns_by_hand(self) -> None:
        # x = 0, 1, 2, 3 and y = 0, 1, 1, 2: slope 3/5, RSS 0.2, TSS 2, so R2 = 0.9 both ways.
        rows = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 1.0], [3.0, 2.0]])
        found = per_token_scaling(rows, rows).r2
        assert found.flatten().tolist() == pytest.approx([1, 0.9, 0.9, 1], abs=1e-12)

    def test_planted_shared_share(self) -> None:
        # Norms of which a share of the variance is common: R2 is the square of that share.
        share, n = 0.8, 200_000
        common, own = normal(3, n, 1), normal(4, n, 3)
        rows = 10 + share**0.5 * common + (1 - share) ** 0.5 * own
        found = per_token_scaling(rows[: n // 2], rows[n // 2 :]).r2
        # Standard error of a squared correlation: 2 r (1 - r^2) / sqrt(n) = .0018; five of them.
        assert found[0, 1].item() == pytest.approx(share**2, abs=0.009)
        assert found[2, 0].item() == pytest.approx(share**2, abs=0.009)

    def test_planted_help(self) -> None:
        # y = u + v; predictor u + noise, helper v + noise, all independent of unit variance:
        # R2 alone (1/2)^2 / (1/2) / 2 = 1/4, with the helper 1/2, so it helps by 1/3.
        n = 200_000
        u, v, a, b = normal(5, n, 4).unbind(1)
        rows = torch.stack([u + v, u + a, v + b], 1)
        found = per_token_scaling(rows, rows, predictor=[1], target=[0], helper=[2])
        assert found.r2_with is not None
        assert found.helped is not None
        # As above: standard errors below .002.
        assert found.r2.item() == pytest.approx(1 / 4, abs=0.009)
        assert found.r2_with.item() == pytest.approx(1 / 2, abs=0.009)
        assert found.helped.item() == pytest.approx(1 / 3, abs=0.009)

    def test_norms_of_nothing_in_common_predict_nothing(self) -> None:
        fit, test = (
            torch.stack([rows[:, 0], rows[:, 1].roll(7)], 1)
            for rows in (norms(0, 20_000), norms(5, 20_000))
        )
        # A fit that knows nothing predicts the mean: R2 of about 1 / n, here below 1e-3.
        assert abs(per_token_scaling(fit, test).r2[0, 1].item()) < 1e-3

    @settings(deadline=None, max_examples=40)
    @given(
        st.integers(0, 1000),
        st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
        st.lists(st.floats(-100, 100), min_size=4, max_size=4),
    )
    def test_scale_and_offset_of_a_column_do_not_matter(
        self, seed: int, scale: list[float], offset: list[float]
    ) -> None:
        fit, test = norms(seed, 60), norms(seed + 500, 40)
        factor, shift = torch.tensor(scale), torch.tensor(offset)
        straight = per_token_scaling(fit, test, predictor=[0, 1], helper=[2, 3])
        scaled = per_token_scaling(
            fit * factor + shift, test * factor + shift, predictor=[0, 1], helper=[2, 3]
        )
        # An offset 1e5 deviations away costs ten of sixteen digits of a square.
        assert torch.allclose(straight.r2, scaled.r2, atol=1e-5)
        assert straight.r2_with is not None
        assert scaled.r2_with is not None
        assert torch.allclose(straight.r2_with, scaled.r2_with, atol=1e-5)

    @settings(deadline=None, max_examples=40)
    @given(st.integers(0, 1000), st.integers(8, 60))
    def test_in_sample_it_is_a_squared_correlation(self, seed: int, n: int) -> None:
        rows = norms(seed, n)
        found = per_token_scaling(rows, rows, predictor=[0, 1], helper=[2, 3])
        everything = per_token_scaling(rows, rows).r2
        # Rounding of float64 sums of at most 60 rows.
        assert torch.allclose(everything, everything.T, atol=1e-10)
        assert torch.allclose(everything, torch.corrcoef(rows.T).square(), atol=1e-10)
        assert torch.allclose(everything.diagonal(), torch.ones(4, dtype=torch.float64), atol=1e-12)
        assert found.helped is not None
        assert float(found.helped.nan_to_num(0).min()) >= -1e-10
        assert float(everything.max()) <= 1

    @settings(deadline=None, max_examples=25)
    @given(st.integers(0, 1000), st.integers(1, 59), st.randoms())
    def test_batches_merges_and_order_do_not_matter(
        self, seed: int, cut: int, random: object
    ) -> None:
        rows = norms(seed, 60)
        generator = torch.Generator().manual_seed(seed)
        document = torch.randint(0, 5, (60,), generator=generator)
        whole = NormMoments(4).partial_fit(rows, document)
        late = NormMoments(4).partial_fit(rows[cut:], document[cut:])
        merged = NormMoments(4).partial_fit(rows[:cut], document[:cut]).merge(late)
        centre = rows.mean(0)
        assert whole.n == merged.n == 60
        assert torch.equal(whole.document, merged.document)
        # Both are the same sums of at most 60 rows, in another order.
        assert torch.allclose(whole.about(centre), merged.about(centre), atol=1e-8)

    def test_a_mean_of_a_million_deviations(self) -> None:
        rows = norms(2)
        far = rows + 1e6 * rows.std(0)
        near = per_token_scaling(rows, rows).r2
        # float64 holds the rows themselves to 1e-10 of a deviation.
        assert torch.allclose(per_token_scaling(far, far).r2, near, atol=1e-6)

    def test_the_interval_is_that_of_resampled_documents(self) -> None:
        test, document = norms(7, 300), torch.arange(300) // 10
        fit = NormMoments(4).partial_fit(norms(0))
        scored = NormMoments(4).partial_fit(test, document)
        found = per_token_scaling(fit, scored, predictor=[0, 1], helper=[2, 3])
        # Second method: resample the rows of documents, and score the same fit on them.
        draws = np.random.default_rng(0).integers(30, size=(200, 30))
        scores = {"r2": list[float](), "helped": list[float]()}
        for draw in draws:
            rows = torch.cat([test[document == one] for one in draw])
            again = per_token_scaling(fit, NormMoments(4).partial_fit(rows), [0, 1], None, [2, 3])
            assert again.helped is not None
            scores["r2"].append(again.r2[0, 1].item())
            scores["helped"].append(again.helped[0, 1].item())
        for score, drawn in scores.items():
            interval = found.interval(0, 1, score, n=200, seed=0)
            # The same draws from the same generator: the same quantiles to rounding.
            expected = np.quantile(drawn, [0.025, 0.975])
            assert [interval.low, interval.high] == pytest.approx(expected.tolist(), abs=1e-9)
            assert interval.low < interval.value < interval.high
        assert found.helped is not None
        assert found.interval(0, 1, "helped").value == pytest.approx(found.helped[0, 1].item())

    def test_float32_rows_and_no_rows(self) -> None:
        rows = norms(0).float()
        moments = NormMoments(4).partial_fit(rows[:0]).partial_fit(rows).merge(NormMoments(4))
        expected = per_token_scaling(rows.double(), rows.double()).r2
        assert torch.allclose(per_token_scaling(moments, moments).r2, expected, atol=1e-12)
        assert torch.equal(NormMoments(4).merge(moments).sums, moments.sums)


class TestPerTokenRefusals:
    def test_columns(self) -> None:
        rows = norms(0)
        with refused("fit has 4 columns and test 3, expected the same"):
            per_token_scaling(rows, rows[:, :3])
        with refused(r"predictor is \[4\], expected .* from 0 to 3"):
            per_token_scaling(rows, rows, predictor=[4])
        with refused(r"target is \[-1\]"):
            per_token_scaling(rows, rows, target=[-1])
        with refused(r"predictor is \[\], expected at least one"):
            per_token_scaling(rows, rows, predictor=[])
        with refused("1 helpers for 4 predictors"):
            per_token_scaling(rows, rows, helper=[0])
        with refused("are one column in two scales"):
            per_token_scaling(rows, rows, predictor=[1], helper=[1])

    def test_rows(self) -> None:
        rows = norms(0)
        flat = rows.clone()
        flat[:, 2] = 7
        with refused("column 2 of fit is the same for all 400 tokens"):
            per_token_scaling(flat, rows)
        with refused("column 2 of test is the same"):
            per_token_scaling(rows, flat)
        with refused("fit has 3 tokens, expected at least 4"):
            per_token_scaling(rows[:3], rows)
        rows[5, 1] = math.nan
        with refused("norms holds NaN or infinity, first in row 5"):
            NormMoments(4).partial_fit(rows)

    def test_moments(self) -> None:
        with refused("columns=0, expected at least 1"):
            NormMoments(0)
        with refused(r"norms is \[400, 4\], expected \[n, 3\]"):
            NormMoments(3).partial_fit(norms(0))
        with refused(r"document is torch.int64 \[3\], expected integers \[400\]"):
            NormMoments(4).partial_fit(norms(0), torch.arange(3))
        with refused("cannot merge moments of 3 columns into those of 4"):
            NormMoments(4).merge(NormMoments(3))

    def test_intervals(self) -> None:
        rows, document = norms(0), torch.arange(400) // 100
        moments = NormMoments(4).partial_fit(rows, document)
        alone = per_token_scaling(moments, moments)
        with refused("'helped' needs a helper"):
            alone.interval(0, 1, "helped")
        with refused("score is 'fvu', expected"):
            alone.interval(0, 1, "fvu")  # type: ignore[arg-type]
        with refused("nothing remains to be explained"):
            per_token_scaling(moments, moments, [0], [0], [1]).interval(0, 0, "helped")
        with refused("at least 2 documents"):
            per_token_scaling(rows, rows).interval(0, 1)

"""synthetic, planted features: shares by formula, by hand and by counting; refusals."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from darkmatter.errors import split_error
from darkmatter.intervals import bootstrap, document_sums, fvu_columns, fvu_from_totals
from darkmatter.leastsquares import LinearStatistics, fvu, r2
from darkmatter.synthetic import (
    PlantedRecipe,
    Values,
    norm_predictability,
    norm_predictability_of,
    value_moments,
)
from tests.common import normal, refused

mathematics = settings(deadline=None, max_examples=20)
SOURCES = ("absent", "dense", "shrinkage", "introduced")

# Every knob at once, in the three geometries; the small d keeps the probe's own loss small.
EVERYTHING: dict[str, Any] = {
    "zipf": 0.5,
    "learned": 14,
    "shrinkage": 0.15,
    "weight_noise": 0.4,
    "misses": 0.2,
    "false_positives": 0.3,
    "dense_rank": 4,
    "dense_share": 0.1,
}
RECIPES = {
    "orthonormal": PlantedRecipe(n_features=20, d_model=24, l0=3, dense_apart=True, **EVERYTHING),
    "random": PlantedRecipe(
        n_features=60, d_model=16, l0=4, geometry="random", values="half-normal", **EVERYTHING
    ),
    "correlated": PlantedRecipe(
        n_features=40, d_model=16, l0=4, geometry="correlated", values="exponential", **EVERYTHING
    ),
}


class TestValues:
    @pytest.mark.parametrize(
        ("values", "sigma", "distribution"),
        [
            ("uniform", 1.0, stats.uniform()),
            ("half-normal", 1.0, stats.halfnorm()),
            ("exponential", 1.0, stats.expon()),
            ("lognormal", 0.5, stats.lognorm(s=0.5)),
            ("lognormal", 1.0, stats.lognorm(s=1.0)),
        ],
    )
    def test_moments_are_those_of_scipy(
        self, values: Values, sigma: float, distribution: Any
    ) -> None:
        expected = [float(distribution.moment(k)) for k in range(1, 5)]
        # scipy integrates numerically: eight digits.
        assert value_moments(values, sigma).tolist() == pytest.approx(expected, rel=1e-8)

    @pytest.mark.parametrize("values", ["constant", "uniform", "half-normal", "exponential"])
    def test_what_is_drawn_has_these_moments(self, values: Values) -> None:
        recipe = PlantedRecipe(n_features=8, d_model=8, frequencies=(0.5,) * 8, values=values)
        w = recipe.draw(40_000).weights
        drawn = torch.stack([w.pow(k).mean() for k in range(1, 5)])
        # 320 000 draws; the fourth power of an exponential has relative deviation 12 each.
        torch.testing.assert_close(drawn, recipe.moments[0], rtol=0.1, atol=0)
        torch.testing.assert_close(drawn[:2], recipe.moments[0, :2], rtol=0.02, atol=0)

    def test_unknown_values_and_sigma_are_refused(self) -> None:
        with refused("values='normal', expected one of constant, uniform"):
            value_moments("normal")  # pyright: ignore[reportArgumentType]
        with refused("sigma=0, expected a positive"):
            value_moments("lognormal", 0)


class TestNormPredictability:
    @pytest.mark.parametrize(
        ("values", "p", "sigma", "expected"),
        [
            ("constant", 0.0, 1.0, 1.0),
            ("constant", 0.4, 1.0, 1.0),
            ("uniform", 0.0, 1.0, 15 / 16),
            # Moments sqrt(2 / pi), 1, 2 sqrt(2 / pi), 3.
            ("half-normal", 0.0, 1.0, 8 / (3 * math.pi)),
            ("half-normal", 1.0, 1.0, (2 / math.pi) / ((1 - 2 / math.pi) * 2)),
            ("exponential", 0.0, 1.0, 3 / 4),
            ("exponential", 1.0, 1.0, 4 / 5),
            ("lognormal", 0.0, 0.5, math.exp(-0.25)),
            ("lognormal", 0.0, 1.0, math.exp(-1)),
        ],
    )
    def test_closed_forms_by_hand(
        self, values: Values, p: float, sigma: float, expected: float
    ) -> None:
        # Six operations in float64.
        assert norm_predictability(values, p, sigma) == pytest.approx(expected, rel=1e-12)

    def test_the_limit_is_continuous(self) -> None:
        # The next term is of order p.
        assert norm_predictability("uniform", 1e-9) == pytest.approx(
            norm_predictability("uniform"), abs=1e-8
        )

    @mathematics
    @given(st.floats(0.01, 0.99), st.floats(0.1, 1.5))
    def test_alike_features_have_the_r2_of_one(self, p: float, sigma: float) -> None:
        moments = (p * value_moments("lognormal", sigma)).repeat(7, 1)
        # Differences of moments up to exp(18) lose a few digits.
        assert norm_predictability_of(moments) == pytest.approx(
            norm_predictability("lognormal", p, sigma), rel=1e-7
        )

    def test_features_that_differ_against_least_squares(self) -> None:
        w = normal(0, 50_000, 3).abs() * torch.tensor([1.0, 2.0, 0.5])
        w[:, 1] *= w[:, 1] > 2
        moments = torch.stack([w.pow(k).mean(0) for k in range(1, 5)], 1)
        norm2 = w.square().sum(1)
        fitted = LinearStatistics(3, 1).partial_fit(w, norm2).solve()
        in_sample = r2(norm2, fitted(w)[:, 0])
        # Same rows: the formula leaves out only sample correlations of independent columns, of
        # size 1 / sqrt(50 000).
        assert norm_predictability_of(moments) == pytest.approx(in_sample, abs=0.01)

    def test_a_gaussian_part_adds_what_cannot_be_predicted(self) -> None:
        feature = 0.1 * value_moments("constant")
        variance_of_square = 0.1 - 0.01
        s = 0.7
        moments = torch.stack([feature, torch.tensor([0, s, 0, 3 * s**2], dtype=torch.float64)])
        expected = variance_of_square / (variance_of_square + 2 * s**2)
        assert norm_predictability_of(moments) == pytest.approx(expected, rel=1e-12)

    def test_refusals(self) -> None:
        with refused("p=1.5, expected a number between 0 and 1"):
            norm_predictability("uniform", 1.5)
        with refused("do not vary"):
            norm_predictability("constant", 1.0)
        with refused(r"moments is \[3\], expected finite \[m, 4\]"):
            norm_predictability_of(torch.ones(3))
        with refused("belong to no variable"):
            norm_predictability_of(torch.tensor([[0.1, 0.2, 9.0, 0.3]]))
        with refused("no feature varies"):
            norm_predictability_of(torch.ones(2, 4))


class TestRecipe:
    def test_zipf(self) -> None:
        p = PlantedRecipe(n_features=10, d_model=10, l0=2, zipf=1).p
        # Sums of ten numbers.
        assert float(p.sum()) == pytest.approx(2, rel=1e-12)
        assert float(p[0] / p[4]) == pytest.approx(5, rel=1e-12)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_features": 65}, "65 features in 64 dimensions, expected at most 64"),
            ({"n_features": 0}, "n_features=0, expected at least 1"),
            ({"geometry": "round"}, "geometry='round', expected one of orthonormal"),
            ({"l0": 65}, "expected 64 probabilities between 0 and 1"),
            ({"l0": -1.0}, "expected 64 probabilities between 0 and 1"),
            ({"l0": math.nan}, "expected 64 probabilities between 0 and 1"),
            ({"frequencies": (0.1, 0.2)}, "the 2 frequencies run from 0.1 to 0.2, expected 64"),
            ({"frequencies": (0.1,) * 63 + (0.2,)}, "most common feature first"),
            ({"values": "constant", "l0": 64}, "no feature varies"),
            ({"dense_share": 1.0, "dense_rank": 3}, "dense_share=1.0, expected at least 0 and"),
            ({"dense_share": 0.1}, "expected both zero or neither"),
            ({"dense_rank": 3}, "expected both zero or neither"),
            ({"dense_rank": 65, "dense_share": 0.1}, "expected 0 to 64, the number of d_model"),
            (
                {"dense_rank": 1, "dense_share": 0.1, "dense_apart": True},
                "expected 0 to 0, the number of dimensions that no feature uses",
            ),
            ({"learned": 65}, "learned=65, expected 0 to n_features=64"),
            ({"misses": 1.1}, "misses=1.1, expected a number between 0 and 1"),
            ({"shrinkage": -0.1}, "shrinkage=-0.1, expected a number between 0 and 1"),
            ({"overlap": 2}, "overlap=2, expected a number between 0 and 1"),
            ({"weight_noise": -1}, "weight_noise=-1, expected a finite number of at least 0"),
            ({"false_positives": math.inf}, "false_positives=inf, expected a finite"),
            ({"false_positives": 20.0}, "more than its inactive tokens"),
        ],
    )
    def test_impossible_recipes_are_refused(self, change: dict[str, Any], message: str) -> None:
        with refused(message):
            PlantedRecipe(**change)

    def test_no_tokens_are_refused(self) -> None:
        with refused("n=0, expected at least 1 token"):
            PlantedRecipe().draw(0)

    def test_too_few_tokens_to_measure_are_refused(self) -> None:
        with refused("expected more than d_model=64 to fit on"):
            PlantedRecipe().draw(100).measured()

    @pytest.mark.parametrize("geometry", ["orthonormal", "random", "correlated"])
    def test_directions_have_length_one(self, geometry: Any) -> None:
        recipe = PlantedRecipe(n_features=40, d_model=64, geometry=geometry, overlap=0.3)
        y = recipe.draw(1).directions
        cosines = y @ y.T
        torch.testing.assert_close(cosines.diagonal(), torch.ones(40, dtype=torch.float64))
        off = (cosines.sum() - 40) / (40 * 39)
        expected = 0.3 if geometry == "correlated" else 0.0
        # The mean of 780 cosines of deviation 1 / 8.
        assert float(off) == pytest.approx(expected, abs=0.03)

    def test_the_dense_part_stands_apart(self) -> None:
        sample = RECIPES["orthonormal"].draw(50)
        # Products of unit vectors, to rounding.
        assert float((sample.dense_basis @ sample.directions.T).abs().max()) < 1e-12
        assert float((sample.dense @ sample.directions.T).abs().max()) < 1e-12


@pytest.mark.parametrize("geometry", RECIPES)
class TestPlanted:
    def test_parts_add_up(self, geometry: str) -> None:
        sample = RECIPES[geometry].draw(300, seed=3)
        # Sums of some dozens of numbers of size 1.
        close: dict[str, float] = {"rtol": 0, "atol": 1e-12}
        whole = sample.mean + sample.learned + sample.absent + sample.dense
        torch.testing.assert_close(sample.x, whole, **close)
        torch.testing.assert_close(sample.x - sample.x_hat, sample.error, **close)

    def test_the_seed_fixes_everything(self, geometry: str) -> None:
        first, again, other = (RECIPES[geometry].draw(20, seed) for seed in (1, 1, 2))
        assert torch.equal(first.x_hat, again.x_hat)
        assert not torch.equal(first.x, other.x)

    def test_formulas_agree_with_many_tokens(self, geometry: str) -> None:
        sample = RECIPES[geometry].draw(60_000, seed=4)
        total = float(sample.x.var(0).sum())
        for part in SOURCES:
            counted = float((getattr(sample, part) * sample.error).sum()) / len(sample.x) / total
            # Relative standard error of a variance of rarely active, heavy-tailed weights:
            # about 0.01 with 60 000 tokens.
            assert counted == pytest.approx(getattr(sample.shares, part), rel=0.05, abs=1e-4)
            mean = getattr(sample, part).mean(0)
            # Expectation zero: the mean of 60 000 rows, whose total standard deviation is below 1.
            assert float(mean.norm()) < 0.03

    def test_linear_share_agrees_with_a_probe_on_its_own_rows(self, geometry: str) -> None:
        sample = RECIPES[geometry].draw(60_000, seed=5)
        split = split_error(sample.x, sample.x_hat, sample.x, sample.x_hat)
        in_sample = fvu(sample.x, sample.x_hat + split.linear)
        # The probe's luck on its own rows is d / n = 0.0003; variance moves it by about 0.01.
        assert in_sample == pytest.approx(sample.shares.nonlinear, rel=0.04)

    def test_shares_add_up(self, geometry: str) -> None:
        for shares in (RECIPES[geometry].draw(2).shares, RECIPES[geometry].draw(2000).measured()):
            # One rounding a part; measured parts hold the products with the error itself.
            assert shares.fvu == pytest.approx(shares.linear + shares.nonlinear, rel=1e-6)

    def test_planted_shares_are_recovered_over_five_seeds(self, geometry: str) -> None:
        """The nonlinear share lies in its interval, and every source near its measured value."""
        for seed in range(5):
            sample = RECIPES[geometry].draw(20_000, seed)
            truth = sample.shares
            half = 10_000
            x, x_hat = sample.x[half:], sample.x_hat[half:]
            split = split_error(sample.x[:half], sample.x_hat[:half], x, x_hat)
            columns = fvu_columns(x, x_hat + split.linear)
            # Tokens are independent here; a hundred at a time stand for documents.
            sums = document_sums(columns, torch.arange(half) // 100)
            found = bootstrap(fvu_from_totals, sums, seed=seed, level=0.999)
            # On rows it was not fitted on the probe loses d / n_fit, here 0.0024 at most.
            loss = 1 + sample.recipe.d_model / half
            assert found.low <= truth.nonlinear * loss <= found.high
            measured = asdict(sample.measured())
            for part in (*SOURCES, "linear", "nonlinear"):
                # Ten thousand tokens; the relative error of heavy-tailed parts is about 0.03.
                assert measured[part] == pytest.approx(getattr(truth, part), rel=0.12, abs=2e-3)


class TestSharesByHand:
    def test_constant_features_orthonormal(self) -> None:
        """Two features of value 1: one learned, missed half the time, one absent."""
        recipe = PlantedRecipe(
            n_features=2,
            d_model=2,
            frequencies=(0.5, 0.1),
            values="constant",
            learned=1,
            misses=0.5,
        )
        shares = recipe.draw(1).shares
        total = 0.25 + 0.09
        # introduced: on in a quarter of the tokens; its slope on w is 1/2.
        assert shares.introduced == pytest.approx(0.25 * 0.75 / total)
        assert shares.absent == pytest.approx(0.09 / total)
        assert shares.linear == pytest.approx((0.09 + 0.5**2 * 0.25) / total)
        assert shares.dense == shares.shrinkage == 0

    def test_false_positives_are_linear_in_part(self) -> None:
        """One feature, on half the time; where it is off, it is turned on half the time."""
        recipe = PlantedRecipe(
            n_features=1, d_model=1, frequencies=(0.5,), values="constant", false_positives=0.5
        )
        shares = recipe.draw(1).shares
        # error = -1 in a quarter of the tokens, all of them with w = 0: slope 1/2 on w.
        assert shares.introduced == pytest.approx(0.25 * 0.75 / 0.25)
        assert shares.linear == pytest.approx(0.5**2)

    def test_a_perfect_sae_has_no_error(self) -> None:
        sample = PlantedRecipe().draw(10)
        assert sample.shares.fvu == 0
        # Rounding of sums of 64 numbers.
        assert float((sample.x - sample.x_hat).abs().max()) < 1e-12

    def test_an_sae_that_knows_nothing_has_a_linear_error(self) -> None:
        sample = PlantedRecipe(learned=0, dense_rank=3, dense_share=0.2).draw(10)
        assert sample.shares.fvu == pytest.approx(1)
        # A solve of 64 dimensions.
        assert sample.shares.linear == pytest.approx(1, rel=1e-9)
        assert sample.shares.nonlinear == pytest.approx(0, abs=1e-9)

    def test_absent_is_linear_only_as_far_as_dimensions_allow(self) -> None:
        """Equally common features in random directions: about d / m of the absent is linear."""
        recipe = PlantedRecipe(n_features=400, d_model=40, geometry="random", learned=200)
        shares = recipe.draw(1).shares
        assert shares.absent == pytest.approx(0.5)
        # Random projections: absent (share + (1 - share) d / m); 400 directions are not many.
        assert shares.linear == pytest.approx(0.5 * (0.5 + 0.5 * 40 / 400), rel=0.05)
        roomy = replace(recipe, n_features=40, learned=20, geometry="orthonormal").draw(1).shares
        assert roomy.linear == pytest.approx(0.5)

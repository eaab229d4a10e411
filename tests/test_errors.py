"""errors: planted linear and nonlinear errors, and the two SAEs whose error is wholly linear."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter.errors import scalar_share, split_error
from darkmatter.leastsquares import LinearStatistics, fvu, r2
from tests.common import normal, refused

mathematics = settings(deadline=None, max_examples=30)


class TestSplitError:
    @mathematics
    @given(st.integers(0, 2**31 - 1), st.sampled_from([torch.float32, torch.float64]))
    def test_the_parts_add_up_to_the_error(self, seed: int, dtype: torch.dtype) -> None:
        x, x_hat = (normal(seed + i, 60, 4).to(dtype) * 10 + 30 for i in range(2))
        parts = split_error(x[:40], x_hat[:40], x[40:], x_hat[40:])
        assert parts.linear.dtype == parts.nonlinear.dtype == dtype
        # Each part is rounded once: a few last digits of numbers of size 100.
        tolerance = 100 * 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(
            parts.error.double(),
            x[40:].double() - x_hat[40:].double(),
            rtol=0,
            atol=tolerance,
        )

    @mathematics
    @given(st.integers(0, 2**31 - 1))
    def test_on_the_fitting_rows_the_parts_are_uncorrelated(self, seed: int) -> None:
        x, x_hat = normal(seed, 80, 4) + 3, normal(seed + 1, 80, 4)
        parts = split_error(x, x_hat, x, x_hat)
        centred = parts.linear - parts.linear.mean(0)
        # Orthogonal to x, hence to all that is linear in it: rounding of sums of 80 terms.
        assert (centred.T @ parts.nonlinear).abs().max() < 1e-9
        assert (x.T @ parts.nonlinear).abs().max() < 1e-9
        assert parts.nonlinear.mean(0).abs().max() < 1e-12

    def test_planted_parts_are_found(self) -> None:
        x = normal(0, 6000, 5) + 2
        weight = 0.2 * normal(1, 5, 5)
        # Even in each independent, symmetric coordinate: uncorrelated with all that is linear.
        nonlinear = 0.1 * ((x - 2).square() - 1)
        x_hat = x - x @ weight - nonlinear
        parts = split_error(x[:4000], x_hat[:4000], x[4000:], x_hat[4000:])
        # Standard error of a weight: .1 sqrt(E z^2 (z^2 - 1)^2 / 4000) = .1 sqrt(10 / 4000) = .005.
        torch.testing.assert_close(parts.map.weight, weight, rtol=0, atol=0.02)
        assert fvu(nonlinear[4000:], parts.nonlinear) < 0.01
        assert parts.map.n == 4000

    def test_is_the_map_applied_in_more_rows_than_a_block(self) -> None:
        x = normal(0, 9000, 3)
        x_hat = x.sin()
        parts = split_error(x, x_hat, x, x_hat)
        map = LinearStatistics(3, 3).partial_fit(x, x - x_hat).solve()
        torch.testing.assert_close(parts.linear, map(x), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(parts.nonlinear, x - x_hat - map(x), rtol=1e-10, atol=1e-12)

    def test_dead_autoencoder_has_a_wholly_linear_error(self) -> None:
        x = normal(0, 300, 6) @ normal(1, 6, 6)
        x = x - x.mean(0)
        parts = split_error(x[:200], torch.zeros(200, 6).double(), x[200:], 0 * x[200:])
        assert r2(parts.error, parts.linear) == pytest.approx(1, abs=1e-12)
        assert scalar_share(x, x) == pytest.approx(1, abs=1e-12)

    def test_shrinkage_is_one_scalar(self) -> None:
        x = normal(0, 300, 6) @ normal(1, 6, 6) + 4
        parts = split_error(x[:200], 0.9 * x[:200], x[200:], 0.9 * x[200:])
        identity = 0.1 * torch.eye(6, dtype=torch.float64)
        torch.testing.assert_close(parts.map.weight, identity, rtol=0, atol=1e-11)
        assert parts.nonlinear.abs().max() < 1e-10
        assert scalar_share(x[200:], parts.error) == pytest.approx(1, abs=1e-12)

    def test_half_precision_gives_float32_parts(self) -> None:
        x = normal(0, 100, 3).bfloat16()
        parts = split_error(x[:60], x[:60] / 2, x[60:], x[60:] / 2)
        assert parts.linear.dtype == torch.float32
        torch.testing.assert_close(parts.error, x[60:].float() - (x[60:] / 2).float())

    def test_ridge_is_passed_on(self) -> None:
        x = normal(0, 100, 3)
        assert split_error(x, x.sin(), x, x.sin(), ridge=0.5).map.ridge == 0.5

    def test_refusals(self) -> None:
        x = normal(0, 50, 4)
        with refused(r"x_fit is \[50, 4\] and xhat_fit is \[49, 4\]"):
            split_error(x, x[1:], x, x)
        with refused(r"x is \[50, 4\] and xhat is \[50, 3\]"):
            split_error(x, x, x, x[:, 1:])
        with refused("x_fit has 3 columns and x has 4"):
            split_error(x[:, 1:], x[:, 1:], x, x)
        with refused("xhat holds NaN or infinity, first in row 2"):
            split_error(x, x, x, x.index_fill(0, torch.tensor([2]), math.nan))
        with refused("too few rows to solve"):
            split_error(x[:4], x[:4], x, x)


class TestScalarShare:
    def test_three_tokens_by_hand(self) -> None:
        # x about its mean: (-1, 0), (0, 0), (1, 0); error: (-1, 0), (0, 2), (1, -2).
        # <x, e> = 2, |x|^2 = 2, |e|^2 = 1 + 4 + 5 = 10: share 4 / 20.
        x = torch.tensor([[4.0, 7], [5, 7], [6, 7]])
        error = torch.tensor([[-1.0, 0], [0, 2], [1, -2]])
        assert scalar_share(x, error) == pytest.approx(0.2, abs=1e-15)

    @mathematics
    @given(st.integers(0, 2**31 - 1))
    def test_is_the_r2_of_its_regression(self, seed: int) -> None:
        x, error = normal(seed, 40, 3) + 5, normal(seed + 1, 40, 3)
        # Second method: one regressor, all dimensions of all tokens as rows, after centring.
        flat = LinearStatistics(1, 1).partial_fit(
            (x - x.mean(0)).flatten()[:, None], (error - error.mean(0)).flatten()
        )
        assert scalar_share(x, error) == pytest.approx(flat.r2(flat.solve()), abs=1e-12)
        # A scalar is a special map, so on the same rows the full map explains at least as much.
        full = LinearStatistics(3, 3).partial_fit(x, error)
        assert scalar_share(x, error) <= full.r2(full.solve(), "pooled") + 1e-12

    def test_refusals(self) -> None:
        x = normal(0, 11, 2)
        with refused("x is the same in all 11 rows"):
            scalar_share(torch.full_like(x, 0.1), x)
        with refused("error is the same in all 11 rows"):
            scalar_share(x, torch.zeros_like(x))
        with refused(r"x is \[11, 2\] and error is \[11, 1\]"):
            scalar_share(x, x[:, :1])

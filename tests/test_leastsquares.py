"""leastsquares: against hand-worked numbers, a float64 lstsq oracle, and its own invariances."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from darkmatter.leastsquares import LinearMap, LinearStatistics, RidgeUsedWarning, fvu, r2
from tests.common import normal, refused

# Sums of at most a few thousand float64 terms, of well-conditioned data: 1e-16 times some hundreds.
EXACT = 1e-12

seeds = st.integers(0, 2**31 - 1)
mathematics = settings(deadline=None, max_examples=40)


def rows(seed: int, n: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """x with a mean and unequal scales, y linear in it with noise."""
    x = normal(seed, n, d_in) * torch.linspace(0.1, 3, d_in) + 5 * normal(seed + 1, d_in)
    y = x @ normal(seed + 2, d_in, d_out) + normal(seed + 3, n, d_out) + 2
    return x, y


def lstsq(x: Tensor, y: Tensor) -> Tensor:
    """[d_in + 1, d_out] weights and, last, bias, by SVD of the rows: no normal equations."""
    centred = x.double() - x.double().mean(0)
    weight = torch.linalg.lstsq(centred, y.double() - y.double().mean(0), driver="gelsd").solution
    bias = y.double().mean(0) - x.double().mean(0) @ weight
    return torch.cat([weight, bias[None]])


def same(a: LinearStatistics, b: LinearStatistics, tolerance: float = EXACT) -> None:
    assert a.n == b.n
    for name in ("mean_x", "mean_y", "sxx", "sxy", "syy"):
        ours, theirs = getattr(a, name), getattr(b, name)
        scale = float(theirs.abs().max()) if theirs.numel() else 0.0
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * (1 + scale), msg=name)


class TestFvu:
    def test_two_tokens_by_hand(self) -> None:
        # Tokens (0, 0) and (2, 4): mean (1, 2), so the total is 2 (1 + 4) = 10.
        # Reconstructed as (1, 0) and (2, 2): the residual is 1 + 4 = 5.  FVU = 5 / 10.
        x, x_hat = torch.tensor([[0.0, 0], [2, 4]]), torch.tensor([[1.0, 0], [2, 2]])
        assert fvu(x, x_hat) == 0.5
        # By dimension: 1 - 1/2 = .5 and 1 - 4/8 = .5.
        assert r2(x, x_hat) == 0.5

    def test_pooled_and_dims_weigh_differently(self) -> None:
        # Totals 2 and 8, residuals 1 and 0: dims (1/2 + 1) / 2 = .75, pooled 1 - 1/10 = .9.
        y, y_hat = torch.tensor([[0.0, 0], [2, 4]]), torch.tensor([[1.0, 0], [2, 4]])
        assert r2(y, y_hat, "dims") == 0.75
        assert r2(y, y_hat, average="pooled") == pytest.approx(0.9, abs=1e-15)

    def test_predicting_the_mean_is_one_and_perfect_is_zero(self) -> None:
        x = normal(0, 50, 4)
        assert fvu(x, x.mean(0).expand_as(x)) == pytest.approx(1, abs=EXACT)
        assert fvu(x, x) == 0
        assert r2(x, x) == 1

    @mathematics
    @given(seeds, st.floats(-6, 6), st.floats(-1e3, 1e3))
    def test_does_not_see_rotation_shift_and_scale(
        self, seed: int, log10: float, shift: float
    ) -> None:
        x, x_hat = normal(seed, 30, 5), normal(seed + 1, 30, 5)
        rotation = torch.linalg.qr(normal(seed + 2, 5, 5)).Q
        moved, moved_hat = ((10**log10 * a) @ rotation + shift for a in (x, x_hat))
        # The shift leaves 16 digits less those of shift / scale (at most 9) to the signal.
        assert fvu(moved, moved_hat) == pytest.approx(fvu(x, x_hat), rel=1e-6)

    @mathematics
    @given(seeds)
    def test_r2_is_at_most_one_and_pooled_is_one_minus_fvu(self, seed: int) -> None:
        y, y_hat = normal(seed, 20, 3), normal(seed + 1, 20, 3)
        assert r2(y, y_hat) <= 1
        assert r2(y, y_hat, "pooled") == pytest.approx(1 - fvu(y, y_hat), abs=EXACT)

    def test_more_rows_than_a_block(self) -> None:
        x, x_hat = normal(0, 20_000, 2), normal(1, 20_000, 2)
        naive = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
        assert fvu(x, x_hat) == pytest.approx(float(naive), rel=EXACT)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_half_precision_input_is_scored_in_float64(self, dtype: torch.dtype) -> None:
        x, x_hat = normal(0, 40, 3).to(dtype), normal(1, 40, 3).to(dtype)
        assert fvu(x, x_hat) == fvu(x.double(), x_hat.double())

    def test_vectors_are_one_column(self) -> None:
        y, y_hat = normal(0, 30), normal(1, 30)
        assert r2(y, y_hat) == r2(y[:, None], y_hat[:, None])
        assert r2(y, y_hat[:, None]) == r2(y, y_hat)  # and never broadcast to [30, 30]

    def test_refusals(self) -> None:
        x = normal(0, 6, 2)
        with refused(r"x is \[6, 2\] and x_hat is \[6, 1\], expected the same"):
            fvu(x, x[:, :1])
        with refused(r"x is \[0, 2\]"):
            fvu(x[:0], x[:0])
        with refused(r"x has shape \[1, 6, 2\], expected \[n, d\]"):
            fvu(x[None], x[None])
        with refused("x is torch.int64, expected a float tensor"):
            fvu(torch.ones(2, 2, dtype=torch.int64), x[:2])
        with refused("y_hat is list, expected a float tensor"):
            r2(x, [[1.0, 2.0]])  # pyright: ignore[reportArgumentType]  # what is refused
        with refused("x_hat holds NaN or infinity, first in row 3"):
            fvu(x, x.index_fill(0, torch.tensor([3, 5]), math.inf))
        with refused('average is \'mean\', expected "dims" or "pooled"'):
            r2(x, x, "mean")  # pyright: ignore[reportArgumentType]  # what is refused

    # 0.1 is no binary fraction: its mean is off by rounding and the sum of squares is not quite 0.
    @pytest.mark.parametrize("constant", [0.0, 0.1, -1234.567])
    def test_constants_are_refused(self, constant: float) -> None:
        x = normal(0, 1001, 3)
        x[:, 1] = constant
        with refused("dimension 1 of y is the same in all 1001 rows"):
            r2(x, x + 1)
        assert math.isfinite(r2(x, x + 1, "pooled"))
        with refused("x is the same in all 1001 rows"):
            fvu(x[:, 1:2], x[:, :1])


class TestLinearMap:
    def test_computes_in_the_dtype_of_x(self) -> None:
        map = LinearMap(normal(0, 3, 2), normal(1, 2), 0.0, 9)
        x = normal(2, 4, 5, 3)
        torch.testing.assert_close(map(x), x @ map.weight + map.bias, rtol=0, atol=0)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            found = map(x.to(dtype))
            assert found.dtype == dtype
            expected = x.to(dtype).float() @ map.weight.float() + map.bias.float()
            assert torch.equal(found, expected.to(dtype))

    def test_refuses_another_width(self) -> None:
        map = LinearMap(normal(0, 3, 2), normal(1, 2), 0.0, 9)
        with refused(r"x has shape \(4, 2\), expected \[..., 3\]"):
            map(normal(0, 4, 2))


class TestMoments:
    def test_three_rows_by_hand(self) -> None:
        # x = 1, 2, 6 about 3: -2, -1, 3.  y = 2, 2, 5 about 3: -1, -1, 2.
        # Sxx = 4 + 1 + 9 = 14, Sxy = 2 + 1 + 6 = 9, Syy = 1 + 1 + 4 = 6.
        statistics = LinearStatistics(1, 1)
        for x, y in ((1.0, 2.0), (2.0, 2.0), (6.0, 5.0)):
            statistics.partial_fit(torch.tensor([[x]]), torch.tensor([y]))
        found = [float(m) for m in (statistics.sxx, statistics.sxy, statistics.syy)]
        # One row at a time the means are thirds: rounding of the last digit.
        assert found == pytest.approx([14, 9, 6], rel=1e-15)
        map = statistics.solve()
        # Slope 9/14, intercept 3 - 3 * 9/14; RSS = 6 - 81/14 = 3/14, so FVU = 1/28.
        assert float(map.weight) == pytest.approx(9 / 14, rel=1e-15)
        assert float(map.bias) == pytest.approx(3 - 27 / 14, rel=1e-15)
        assert statistics.fvu(map) == pytest.approx(1 / 28, rel=1e-13)

    @mathematics
    @given(seeds, st.lists(st.integers(0, 40), min_size=1, max_size=6))
    def test_the_cut_into_batches_does_not_matter(self, seed: int, cuts: list[int]) -> None:
        x, y = rows(seed, 40, 4, 3)
        whole = LinearStatistics(4, 3).partial_fit(x, y)
        edges = [0, *sorted(cuts), 40]
        parts = LinearStatistics(4, 3)
        for start, stop in pairwise(edges):
            parts.partial_fit(x[start:stop], y[start:stop])
        same(parts, whole)

    @mathematics
    @given(seeds, st.permutations(range(5)))
    def test_the_order_of_merging_does_not_matter(self, seed: int, order: list[int]) -> None:
        x, y = rows(seed, 60, 4, 2)
        sizes = [0, 1, 7, 20, 32]
        parts = [
            LinearStatistics(4, 2).partial_fit(a, b)
            for a, b in zip(x.split(sizes), y.split(sizes), strict=True)
        ]
        merged = LinearStatistics(4, 2)
        for i in order:
            merged.merge(parts[i])
        same(merged, LinearStatistics(4, 2).partial_fit(x, y))
        pairs = parts[order[0]].merge(parts[order[1]])
        tree = pairs.merge(parts[order[2]].merge(parts[order[3]]).merge(parts[order[4]]))
        same(tree, merged)

    def test_merging_leaves_the_other_alone_and_nothing_is_neutral(self) -> None:
        x, y = rows(0, 20, 3, 2)
        statistics = LinearStatistics(3, 2).partial_fit(x, y)
        before = LinearStatistics(3, 2).partial_fit(x, y)
        empty = LinearStatistics(3, 2).partial_fit(x[:0], y[:0])
        assert empty.n == 0
        same(statistics.merge(empty), before)
        same(empty.merge(statistics), before)
        empty.partial_fit(x, y)
        same(statistics, before)
        same(statistics.merge(statistics), LinearStatistics(3, 2).partial_fit(x, y).merge(before))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_strides_and_gradients(self, dtype: torch.dtype) -> None:
        wide = normal(0, 8, 60).to(dtype).requires_grad_()
        x, y = wide.T[::2, :3], wide.T[::2, 3:5]
        assert not x.is_contiguous()
        plain = LinearStatistics(3, 2).partial_fit(x.detach().double(), y.detach().double())
        same(LinearStatistics(3, 2).partial_fit(x, y), plain, tolerance=0)

    def test_inputs_are_not_changed(self) -> None:
        x, y = rows(0, 20, 3, 1)
        kept = x.clone(), y.clone()
        LinearStatistics(3, 1).partial_fit(x, y).partial_fit(x, y).solve()
        assert torch.equal(x, kept[0])
        assert torch.equal(y, kept[1])

    def test_inference_mode_may_begin_and_end_anywhere(self) -> None:
        x, y = rows(0, 40, 3, 1)
        with torch.inference_mode():
            statistics = LinearStatistics(3, 1).partial_fit(x[:20].clone(), y[:20].clone())
        statistics.partial_fit(x[20:], y[20:])
        same(statistics, LinearStatistics(3, 1).partial_fit(x, y))

    def test_refused_rows_leave_no_trace(self) -> None:
        x, y = rows(0, 20, 3, 2)
        statistics = LinearStatistics(3, 2).partial_fit(x, y)
        bad = y.clone()
        bad[7, 1] = math.nan
        with refused("y holds NaN or infinity, first in row 7"):
            statistics.partial_fit(x, bad)
        with refused("x holds NaN or infinity, first in row 0"):
            statistics.partial_fit((x.abs() + 1e5).half(), y)  # overflows float16
        with refused(r"x is \[20, 2\] and y is \[20, 2\], expected \[n, 3\] and \[n, 2\]"):
            statistics.partial_fit(x[:, :2], y)
        with refused(r"x is \[20, 3\] and y is \[19, 2\]"):
            statistics.partial_fit(x, y[1:])
        with refused(r"y is \[20, 1\]"):
            statistics.partial_fit(x, y[:, 0])
        same(statistics, LinearStatistics(3, 2).partial_fit(x, y), tolerance=0)

    @mathematics
    @given(
        seeds,
        st.integers(1, 60),
        st.integers(1, 30),
        st.integers(1, 4),
        st.sampled_from([1e-30, 1e-18, 1e-4, 1.0, 1e4, 1e18]),
    )
    def test_float32_products(self, seed: int, n: int, d_in: int, d_out: int, size: float) -> None:
        """Each moment to float32 rounding of its own row and column, at any scale."""
        x, y = rows(seed, n, d_in, d_out)
        scale = size * 10 ** (2 * normal(seed + 1, d_in))
        x, y = ((x + 3) * scale).float(), (y + (x * scale).sum(1, keepdim=True) / size).float()
        plain = LinearStatistics(d_in, d_out).partial_fit(x, y)
        fast = LinearStatistics(d_in, d_out).partial_fit(x, y, "float32")
        of_x, of_y = plain.sxx.diagonal().sqrt(), plain.syy.sqrt()
        # Leading directions mix columns, so the largest of x takes the place of each.
        largest = float(of_x.max())
        bound = 2e-6
        assert ((fast.sxx - plain.sxx).abs() <= bound * largest * of_x.max()).all()
        assert ((fast.sxy - plain.sxy).abs() <= bound * largest * of_y).all()
        assert ((fast.syy - plain.syy).abs() <= bound * plain.syy).all()
        assert ((fast.mean_x - plain.mean_x).abs() <= 1e-6 * x.abs().max()).all()
        assert ((fast.mean_y - plain.mean_y).abs() <= 1e-6 * y.abs().max()).all()

    def test_float32_products_keep_a_small_residual(self) -> None:
        # y is linear in x but for one part in 1e4 of its length; x has a direction a thousandfold.
        x = normal(0, 3000, 20) @ torch.diag(torch.tensor([1000.0] + [1.0] * 19).double())
        x = x @ torch.linalg.qr(normal(1, 20, 20)).Q + 50
        y = x @ normal(2, 20, 5)
        y = y + 1e-4 * y.std() * normal(3, 3000, 5)
        x, y = x.float(), y.float()
        fast, plain, naive = (LinearStatistics(20, 5) for _ in range(3))
        for part_x, part_y in zip(x.split(700), y.split(700), strict=True):
            plain.partial_fit(part_x, part_y)
            fast.partial_fit(part_x, part_y, "float32")
        expected = plain.fvu(plain.solve())
        assert expected < 1e-7
        assert fast.fvu(fast.solve()) == pytest.approx(expected, rel=1e-5)
        assert plain.fvu(fast.solve()) == pytest.approx(expected, rel=1e-6)
        # Float32 sums of the centred rows, as they are, lose it.
        centred_x, centred_y = x - x.mean(0), y - y.mean(0)
        naive.partial_fit(x, y)
        naive.sxx = (centred_x.T @ centred_x).double()
        naive.sxy = (centred_x.T @ centred_y).double()
        naive.syy = centred_y.square().sum(0).double()
        assert abs(naive.fvu(naive.solve()) / expected - 1) > 1e-2

    def test_refused_widths(self) -> None:
        with refused('precision is \'float16\', expected "float64" or "float32"'):
            LinearStatistics(1, 1).partial_fit(*rows(0, 5, 1, 1), "float16")  # pyright: ignore
        with refused("d_in=0 and d_out=2"):
            LinearStatistics(0, 2)
        with refused(r"cannot merge LinearStatistics\(d_in=3, d_out=1, n=0\) into"):
            LinearStatistics(3, 2).merge(LinearStatistics(3, 1))


class TestSolve:
    @mathematics
    @given(seeds, st.integers(1, 6), st.integers(1, 4), st.integers(10, 60))
    def test_against_lstsq(self, seed: int, d_in: int, d_out: int, n: int) -> None:
        x, y = rows(seed, n, d_in, d_out)
        map = LinearStatistics(d_in, d_out).partial_fit(x, y).solve()
        # Normal equations square a condition number of at most about 1e2 here.
        torch.testing.assert_close(
            torch.cat([map.weight, map.bias[None]]), lstsq(x, y), rtol=1e-9, atol=1e-9
        )
        assert (map.ridge, map.n) == (0.0, n)

    def test_float32_sums_fail_where_these_do_not(self) -> None:
        # A residual stream: large common mean, a few rogue dimensions, float32 values.
        n, d = 4000, 24
        scale = torch.ones(d, dtype=torch.float64)
        scale[:3] = 300
        x = (normal(0, n, d) @ (torch.eye(d) + 0.3 * normal(1, d, d)) * scale + 800).float()
        y = (x.double() @ normal(2, d, 2) + normal(3, n, 2)).float()
        oracle = lstsq(x, y)[:-1]

        naive_mean, naive_y = x.mean(0), y.mean(0)
        naive_xx = x.T @ x - n * torch.outer(naive_mean, naive_mean)
        naive_xy = x.T @ y - n * torch.outer(naive_mean, naive_y)
        naive = torch.linalg.lstsq(naive_xx, naive_xy).solution.double()
        statistics = LinearStatistics(d, 2)
        for part_x, part_y in zip(x.split(300), y.split(300), strict=True):
            statistics.partial_fit(part_x, part_y)
        ours = statistics.solve().weight

        def worst(weight: Tensor) -> float:
            return float((weight - oracle).norm() / oracle.norm())

        assert worst(ours) < 1e-9
        assert worst(naive) > 1e-3  # wrong in the third digit or before

    def test_large_first_outlier_does_no_harm(self) -> None:
        # The first token of a context is huge; statistics begun on it alone must not lose digits.
        x, y = rows(0, 400, 5, 2)
        x[0] *= 1e5
        statistics = LinearStatistics(5, 2)
        statistics.partial_fit(x[:1], y[:1]).partial_fit(x[1:], y[1:])
        map = statistics.solve()
        # The outlier's square is 1e10 times the rest, of 16 digits.
        torch.testing.assert_close(map.weight, lstsq(x, y)[:-1], rtol=1e-5, atol=1e-5)

    def test_exactly_enough_rows_interpolate(self) -> None:
        x, y = rows(0, 5, 4, 2)
        statistics = LinearStatistics(4, 2).partial_fit(x, y)
        map = statistics.solve()
        torch.testing.assert_close(map(x), y, rtol=1e-8, atol=1e-8)
        assert statistics.r2(map) == pytest.approx(1, abs=1e-9)

    def test_ridge_against_stacked_rows(self) -> None:
        # Ridge is least squares on further rows sqrt(lambda) e_j with target 0.
        x, y = rows(0, 50, 4, 2)
        centred = x - x.mean(0)
        strength = 0.3 * 50 * centred.square().mean(0).mean()
        stacked = torch.cat([centred, strength.sqrt() * torch.eye(4, dtype=torch.float64)])
        targets = torch.cat([y - y.mean(0), torch.zeros(4, 2, dtype=torch.float64)])
        oracle = torch.linalg.lstsq(stacked, targets, driver="gelsd").solution
        map = LinearStatistics(4, 2).partial_fit(x, y).solve(ridge=0.3)
        assert map.ridge == 0.3
        torch.testing.assert_close(map.weight, oracle, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(map(x).mean(0), y.mean(0))  # the intercept is not penalised

    def test_constant_columns_get_weight_zero_without_ridge(self) -> None:
        x, y = rows(0, 301, 5, 2)
        x[:, 1], x[:, 3] = 0.1, 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            map = LinearStatistics(5, 2).partial_fit(x, y).solve()
        assert map.weight[[1, 3]].abs().max() == 0
        rest = [0, 2, 4]
        torch.testing.assert_close(map.weight[rest], lstsq(x[:, rest], y)[:-1])
        only = LinearStatistics(1, 2).partial_fit(x[:, 1:2], y).solve()
        torch.testing.assert_close(only(x[:, 1:2]), y.mean(0).expand_as(y))

    @pytest.mark.parametrize("copies", [1, 3])
    def test_collinear_columns_use_the_smallest_ridge_and_say_so(self, copies: int) -> None:
        base, y = rows(0, 200, 3, 2)
        x = torch.cat([base, *[2 * base[:, :1] - base[:, 1:2]] * copies], dim=1)
        statistics = LinearStatistics(x.shape[1], 2).partial_fit(x, y)
        with pytest.warns(RidgeUsedWarning, match="columns of x are collinear: ridge"):
            map = statistics.solve()
        assert 0 < map.ridge <= 1e-8
        # The fit is that of the columns without the copies, to the bias of that ridge.
        oracle = lstsq(base, y)
        torch.testing.assert_close(map(x), base @ oracle[:-1] + oracle[-1])
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # asked for, it is no surprise
            again = statistics.solve(ridge=map.ridge)
        assert torch.equal(again.weight, map.weight)

    def test_fewer_varying_directions_than_columns(self) -> None:
        x = normal(0, 100, 3) @ normal(1, 3, 8)
        y = x @ normal(2, 8, 2)
        statistics = LinearStatistics(8, 2).partial_fit(x, y)
        with pytest.warns(RidgeUsedWarning):
            map = statistics.solve()
        assert statistics.r2(map) == pytest.approx(1, abs=1e-8)

    def test_scale_of_the_columns_is_no_collinearity(self) -> None:
        x, y = rows(0, 100, 4, 1)
        scale = torch.tensor([1e-9, 1, 1e6, 1e9], dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            map = LinearStatistics(4, 1).partial_fit(x * scale, y).solve()
        torch.testing.assert_close(map.weight * scale[:, None], lstsq(x, y)[:-1])

    def test_refusals(self) -> None:
        x, y = rows(0, 4, 4, 1)
        statistics = LinearStatistics(4, 1).partial_fit(x, y)
        with refused(r"n=4\) has too few rows to solve, expected at least d_in \+ 1 = 5"):
            statistics.solve()
        for ridge in (-1.0, math.nan, math.inf):
            with refused("expected a finite number of at least 0"):
                statistics.solve(ridge)


class TestScores:
    @mathematics
    @given(seeds, st.booleans())
    def test_moments_score_as_rows_do(self, seed: int, held_out: bool) -> None:
        x_fit, y_fit = rows(seed, 30, 4, 3)
        x, y = (normal(seed + 9, 25, 4) * 2 + 1, normal(seed + 8, 25, 3))
        map = LinearStatistics(4, 3).partial_fit(x_fit, y_fit).solve()
        x, y = (x, y) if held_out else (x_fit, y_fit)
        scored = LinearStatistics(4, 3).partial_fit(x[:10], y[:10]).partial_fit(x[10:], y[10:])
        # Far off the fitting rows RSS is many times TSS: relative to the larger of both.
        assert scored.fvu(map) == pytest.approx(fvu(y, map(x)), rel=1e-9)
        for average in ("dims", "pooled"):
            assert scored.r2(map, average) == pytest.approx(r2(y, map(x), average), rel=1e-9)
        torch.testing.assert_close(scored.rss(map), (y - map(x)).square().sum(0))

    @mathematics
    @given(seeds)
    def test_fitted_r2_is_not_negative_and_no_map_does_better(self, seed: int) -> None:
        x, y = normal(seed, 20, 3), normal(seed + 1, 20, 2)
        statistics = LinearStatistics(3, 2).partial_fit(x, y)
        map = statistics.solve()
        best = statistics.fvu(map)
        assert -EXACT <= statistics.r2(map, "pooled") <= 1
        assert -EXACT <= statistics.r2(map, "dims") <= 1
        nearby = LinearMap(map.weight + 0.01 * normal(seed + 2, 3, 2), map.bias, 0.0, 20)
        assert best <= statistics.fvu(nearby)
        shifted = LinearMap(map.weight, map.bias + 0.01, 0.0, 20)
        # The mean residual alone: n * .01^2 for each target.
        more = (statistics.rss(shifted) - statistics.rss(map)).tolist()
        assert more == pytest.approx([20 * 1e-4] * 2, rel=1e-8)

    def test_refusals(self) -> None:
        x, y = rows(0, 20, 3, 2)
        map = LinearStatistics(3, 2).partial_fit(x, y).solve()
        empty = LinearStatistics(3, 2)
        with refused("n=0.* has no rows to score"):
            empty.fvu(map)
        with refused("n=0.* has no rows to score"):
            empty.r2(map)
        with refused(r"the map is \[3, 2\], expected \[3, 1\]"):
            LinearStatistics(3, 1).partial_fit(x, y[:, 0]).fvu(map)
        y[:, 1] = 0.1
        scored = LinearStatistics(3, 2).partial_fit(x[:7], y[:7]).partial_fit(x[7:], y[7:])
        with refused("dimension 1 of y is the same in all 20 rows"):
            scored.r2(map)
        y[:, 0] = -7.3
        with refused("y is the same in all 20 rows"):
            LinearStatistics(3, 2).partial_fit(x[:7], y[:7]).partial_fit(x[7:], y[7:]).fvu(map)


class TestFile:
    def test_round_trip_goes_on_where_it_was(self, tmp_path: Path) -> None:
        x, y = rows(0, 40, 4, 3)
        statistics = LinearStatistics(4, 3).partial_fit(x[:15], y[:15])
        path = tmp_path / "statistics.safetensors"
        statistics.save(path)
        loaded = LinearStatistics.load(str(path))
        same(loaded, statistics, tolerance=0)
        loaded.partial_fit(x[15:], y[15:]).save(path)
        same(LinearStatistics.load(path), LinearStatistics(4, 3).partial_fit(x, y))
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_a_failed_write_keeps_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, y = rows(0, 20, 2, 1)
        path = tmp_path / "statistics.safetensors"
        LinearStatistics(2, 1).partial_fit(x, y).save(path)

        def disk_full(tensors: object, filename: Path, metadata: object) -> None:
            filename.write_bytes(b"half")
            raise OSError("no space left on device")

        monkeypatch.setattr("darkmatter.leastsquares.save_file", disk_full)
        with pytest.raises(OSError, match="no space left"):
            LinearStatistics(2, 1).save(path)
        assert LinearStatistics.load(path).n == 20
        assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def test_refuses_files_that_it_did_not_write(self, tmp_path: Path) -> None:
        path = tmp_path / "statistics.safetensors"
        with refused("is not a file written by LinearStatistics.save"):
            LinearStatistics.load(path)
        LinearStatistics(3, 2).partial_fit(*rows(0, 9, 3, 2)).save(path)
        whole = path.read_bytes()
        for length in (0, 4, 100, len(whole) - 1):
            path.write_bytes(whole[:length])
            with refused("is not a file written by LinearStatistics.save"):
                LinearStatistics.load(path)
        last = len(whole) - 20
        path.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
        with refused("its numbers were altered after they were written"):
            LinearStatistics.load(path)
        path.write_bytes(b"not safetensors at all, but long enough to have a header")
        with refused("is not a file written by LinearStatistics.save"):
            LinearStatistics.load(path)
        save_file({"weight": torch.ones(2)}, path)
        with refused("its format is None"):
            LinearStatistics.load(path)
        ours = {"format": "darkmatter.LinearStatistics/1"}
        save_file({"weight": torch.ones(2)}, path, metadata=ours)
        with refused(r"tensors found: \['weight'\]"):
            LinearStatistics.load(path)
        save_file({"sxy": torch.ones(3)}, path, metadata=ours)
        with refused(r"tensors found: \['sxy'\]"):
            LinearStatistics.load(path)
        pieces = {"sxy": torch.ones(3, 2), "n": torch.tensor(5), "mean_x": torch.ones(3)}
        save_file(pieces, path, metadata=ours)
        with refused("mean_x is torch.float32"):
            LinearStatistics.load(path)


def test_tensors_are_all_of_it() -> None:
    statistics = LinearStatistics(3, 2).partial_fit(*rows(0, 9, 3, 2))
    again = LinearStatistics.from_tensors(statistics.tensors()).to("cpu")
    more = rows(1, 9, 3, 2)
    assert again.partial_fit(*more).n == statistics.partial_fit(*more).n == 18
    for key, tensor in statistics.tensors().items():
        assert torch.equal(again.tensors()[key], tensor)

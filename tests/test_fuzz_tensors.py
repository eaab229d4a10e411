"""Rows as they should not be: every dtype and layout, no rows, equal and zero rows, any scale.

What a function gives is finite and has the properties that it promises, or it is one Refusal; it
depends on the numbers alone, not on how they are stored; and its input is as it was. What it gives
on ordinary rows is tested beside each module.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter import geometry, intervals, pursuit, scaling, sensitivity, synthetic
from darkmatter._refusal import Refusal
from darkmatter.errors import scalar_share, split_error
from darkmatter.leastsquares import LinearStatistics, fvu, r2
from darkmatter.sparse import SparseCode
from tests.common import normal

TIMES = int(os.environ.get("DARKMATTER_FUZZ", "1"))
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bounded(examples: int = 60) -> settings:
    return settings(
        deadline=None,
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def _unchecked(unchecked: None) -> None: ...


KINDS = ("normal", "zero rows", "equal rows", "rank one", "constant column", "far", "one row apart")


ROWS, COLUMNS = st.integers(0, 14), st.integers(1, 5)
POWERS = st.integers(-12, 12) | st.integers(-40, 40) | st.sampled_from([-300, -160, 160, 300])


@st.composite
def rows(
    draw: Any, n: Any = ROWS, d: Any = COLUMNS, powers: Any = POWERS, dtypes: Any = DTYPES
) -> Tensor:
    n, d = (size if isinstance(size, int) else draw(size) for size in (n, d))
    x = normal(draw(st.integers(0, 2**31)), n, d)
    if n:
        match draw(st.sampled_from(KINDS)):
            case "zero rows":
                x[::2] = 0
            case "equal rows":
                x = x[:1].repeat(n, 1)
            case "rank one":
                x = x[:, :1] @ x[:1]
            case "constant column":
                x[:, 0] = 3.0
            case "far":
                x += 1e4
            case "one row apart":
                x[-1] *= 1e6
            case _:
                pass
    x = (x * 10.0 ** draw(powers)).to(draw(st.sampled_from(dtypes)))
    match draw(st.sampled_from(["plain", "transposed", "strided", "reversed"])):
        case "transposed":
            return x.T.contiguous().T
        case "strided":
            wide = x.new_full((2 * n, 3 * d), 7)
            wide[::2, 1::3] = x
            return wide[::2, 1::3]
        case "reversed":
            return x.flip(0).clone().flip(0)
        case _:
            return x


@st.composite
def pairs(draw: Any, count: int = 2, **given: Any) -> list[Tensor]:
    n, d = draw(given.pop("n", ROWS)), draw(given.pop("d", COLUMNS))
    return [draw(rows(n, d, **given)) for _ in range(count)]


def refused(said: str) -> None:
    assert "\n" not in said
    assert len(said) < 1000


def answer(function: Callable[..., Any], *given: Any, **more: Any) -> Any:
    """What it gives, or None for a Refusal of one line; tensors that came are as they were."""
    kept = [one.clone() if isinstance(one, Tensor) else one for one in given]
    try:
        found = function(*given, **more)
    except Refusal as error:
        return refused(str(error))
    for one, before in zip(given, kept, strict=True):
        if isinstance(one, Tensor):
            assert torch.equal(one.nan_to_num(), before.nan_to_num())
    return found


def wide(x: Tensor) -> Tensor:
    return x.double().contiguous()


# leastsquares and errors


@bounded(150)
@given(pairs())
def test_scores_depend_on_the_numbers_alone(given_rows: list[Tensor]) -> None:
    x, x_hat = given_rows
    for score in (fvu, r2, lambda a, b: r2(a, b, "pooled"), scalar_share):
        found, again = answer(score, x, x_hat), answer(score, wide(x), wide(x_hat))
        assert (found is None) == (again is None)
        if found is None:
            continue
        # Sums of the same numbers in another order.
        assert found == pytest.approx(again, rel=1e-9, abs=1e-9)
        assert math.isfinite(found)
        if score is fvu:
            assert found >= 0
            exact = [one.double().numpy().astype(np.longdouble) for one in (x, x_hat)]
            total = ((exact[0] - exact[0].mean(0)) ** 2).sum()
            # A variance of 1e-13 of the mean is what float64 still resolves to a few digits.
            if total > 1e-16 * (exact[0] ** 2).sum() and 1e-280 < total < 1e280:
                naive = float(((exact[0] - exact[1]) ** 2).sum() / total)
                assert found == pytest.approx(naive, rel=1e-6)
        elif score is scalar_share:
            # Squares of smaller numbers lose digits to the end of the range.
            assert 0 <= found <= 1 + (1e-9 if float(wide(x).abs().max()) > 1e-140 else 1)
        else:
            assert found <= 1


@bounded(150)
@given(pairs(n=st.integers(0, 24)), st.lists(st.integers(0, 24), max_size=8), st.randoms())
def test_moments_of_parts_are_those_of_the_whole(
    given_rows: list[Tensor], cuts: list[int], by: Any
) -> None:
    x, y = given_rows
    d = x.shape[1]
    whole = LinearStatistics(d, d)
    if answer(whole.partial_fit, x, y) is None:
        return
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    parts = [LinearStatistics(d, d).partial_fit(x[a:b], y[a:b]) for a, b in pairwise(edges)]
    by.shuffle(parts)
    merged = LinearStatistics(d, d)
    for part in parts:
        merged.merge(part)
    assert merged.n == whole.n == len(x)
    for name in ("sxx", "sxy", "syy") if len(x) else ():
        ours, theirs = getattr(merged, name), getattr(whole, name)
        if not (ours.isfinite().all() and theirs.isfinite().all()):
            continue
        # Rounding is that of the products of rows about their means.
        size = (x.double().abs().amax() + 0) * ((x if name == "sxx" else y).double().abs().amax())
        size = y.double().abs().amax() ** 2 if name == "syy" else size
        assert float((ours - theirs).abs().max()) <= 1e-11 * float(size) * len(x) + 1e-300
    fitted = answer(merged.solve)
    if fitted is None:
        return
    assert len(x) >= d + 1
    assert fitted.weight.isfinite().all()
    assert fitted.bias.isfinite().all()
    left = answer(merged.rss, fitted)
    # A fit is no worse than the mean, up to the rounding of the moments and of a mean far away.
    slack = 1e-9 * merged.syy + 1e-18 * len(x) * y.double().square().amax(0)
    assert bool((left <= merged.syy + slack).all())


@bounded(80)
@given(pairs(count=4, n=st.integers(0, 12), d=st.integers(1, 4)), st.sampled_from([0.0, 1e-6, 1.0]))
def test_the_parts_of_an_error_are_finite_and_add_up(several: list[Tensor], ridge: float) -> None:
    parts = answer(split_error, *several, ridge=ridge)
    if parts is None:
        return
    x, x_hat = several[2:]
    size = max(float(one.double().abs().max()) for one in (*several, parts.linear))
    assert parts.linear.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    limit = torch.finfo(parts.linear.dtype).max
    # A map times a larger row may leave the range.
    if size < limit / 10 and float(x.double().abs().max()) < 1e150:
        assert parts.error.isfinite().all()
        off = (parts.error.double() - (x.double() - x_hat.double())).abs().max()
        assert float(off) <= 8 * torch.finfo(parts.linear.dtype).eps * size + 1e-44


# intervals


@bounded(20)
@given(rows(), st.lists(st.integers(-3, 3), min_size=14, max_size=14), st.integers(0, 9))
def test_sums_of_documents_are_those_of_a_loop(x: Tensor, numbers: list[int], seed: int) -> None:
    document = torch.tensor(numbers[: len(x)], dtype=torch.int64)
    sums = answer(intervals.document_sums, x, document)
    if sums is None:
        return
    order = sorted(set(numbers[: len(x)]))
    assert sums.shape == (len(order), x.shape[1])
    for row, number in zip(sums, order, strict=True):
        naive = x.double()[document == number].sum(0)
        size = float(x.double().abs().max())
        assert float((row - naive).abs().max()) <= 1e-14 * size * len(x)
    found = answer(intervals.bootstrap, lambda totals: totals[:, 0], sums, n=20, seed=seed)
    if found is not None:
        assert found.low <= found.high
        columns = sums[:, 0].tolist()
        bound = len(columns) * max(abs(one) for one in columns)
        assert abs(found.low) <= bound * 1.001
        assert abs(found.high) <= bound * 1.001
    resamples = intervals.Resamples(max(1, len(order)), 5, seed)
    if len(order) > 1:
        blocks = [(torch.tensor([i]), sums[i : i + 1]) for i in range(len(order))]
        whole, cut = resamples.totals([(slice(None), sums)]), resamples.totals(blocks)
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12 * float(sums.abs().max()))


@bounded(100)
@given(pairs(n=st.integers(0, 30)), st.integers(1, 6))
def test_totals_of_columns_score_as_rows_do(given_rows: list[Tensor], documents: int) -> None:
    x, x_hat = given_rows
    columns = answer(intervals.fvu_columns, x, x_hat)
    if columns is None:
        return
    assert columns.dtype == torch.float64
    total = columns.sum(0, keepdim=True)
    found, direct = float(intervals.fvu_from_totals(total)), answer(fvu, x, x_hat)
    # A sum of squares about zero holds the variance to 1e-16 of itself.
    exact = float((x.double() - x.double().mean(0)).square().sum() / total[0, 2].clamp(min=1e-300))
    if direct is not None and exact > 1e-4:
        assert found == pytest.approx(direct, rel=1e-6)
    document = torch.arange(len(x)) % documents
    answer(intervals.bootstrap, intervals.fvu_from_totals,
           answer(intervals.document_sums, columns, document)
           if total.isfinite().all() else columns[:0], n=10)  # fmt: skip
    of_dimensions = answer(intervals.r2_columns, x, x_hat)
    for average in ("dims", "pooled"):
        r2_found = float(intervals.r2_from_totals(of_dimensions.sum(0, keepdim=True), average))
        assert math.isnan(r2_found) or r2_found <= 1


# scaling

positive = st.floats(1e-3, 1) | st.floats(1e-300, 1e300) | st.sampled_from([1.0, 0.5, 0.5000001])


@bounded(150)
@given(
    st.lists(
        st.tuples(st.integers(1, 2**24) | st.floats(1e-300, 1e300), positive),
        min_size=3,
        max_size=9,
        unique_by=lambda point: point[0],
    ),
    st.booleans(),
)
def test_a_power_law_of_any_points_is_one_or_none(
    points: list[tuple[float, float]], falling: bool
) -> None:
    width = [point[0] for point in points]
    values = [point[1] for point in points]
    if falling:
        width, values = sorted(width), sorted(values, reverse=True)
    law = answer(scaling.fit_power_law, width, values)
    if law is None:
        return
    assert law.floor >= 0
    assert law.scale >= 0
    assert law.exponent > 0
    mean = sum(values) / len(values)
    if max(values) < 1e150:
        residuals = sum(one**2 for one in law.residuals)
        assert residuals <= sum((one - mean) ** 2 for one in values) * (1 + 1e-6) + 1e-24 * mean**2
    for one, (low, high) in (
        (law.floor, law.floor_interval),
        (law.exponent, law.exponent_interval),
        (law.scale, law.scale_interval),
    ):
        assert low <= one * (1 + 1e-6) + 1e-12
        assert one <= high * (1 + 1e-6) + 1e-12 or math.isinf(high)


@bounded(100)
@given(
    rows(n=st.integers(0, 30), d=st.integers(1, 4)),
    st.lists(st.integers(0, 30), max_size=6),
    st.booleans(),
)
def test_norm_moments_of_uneven_parts(x: Tensor, cuts: list[int], helped: bool) -> None:
    k = x.shape[1]
    document = torch.arange(len(x)) // 3 - 2
    whole = scaling.NormMoments(k)
    if answer(whole.partial_fit, x, document) is None:
        return
    edges = [0, *sorted(min(cut, len(x)) for cut in cuts), len(x)]
    merged = scaling.NormMoments(k)
    for a, b in pairwise(edges):
        merged.merge(scaling.NormMoments(k).partial_fit(x[a:b], document[a:b]))
    assert merged.n == whole.n == len(x)
    assert torch.equal(merged.document, whole.document)
    found = answer(
        scaling.per_token_scaling, merged, whole,
        predictor=[0], helper=[k - 1] if helped else None,
    )  # fmt: skip
    if found is not None:
        assert (found.r2.isnan() | (found.r2 <= 1 + 1e-9)).all()


# sparse and pursuit


@bounded()
@given(
    rows(n=st.integers(1, 6), powers=st.integers(-2, 2)), st.integers(0, 6), st.integers(0, 5),
    st.sampled_from(DTYPES), st.integers(0, 2**31),
)  # fmt: skip
def test_codes_of_any_dtype_decode_as_dense_products(
    dictionary: Tensor, n: int, k: int, dtype: torch.dtype, seed: int
) -> None:
    m = len(dictionary)
    by = torch.Generator().manual_seed(seed)
    indices = torch.randint(0, m, (k, n), generator=by).T
    values = normal(seed, k, n).T.to(dtype)
    code = SparseCode(values, indices)
    decoded = answer(code.decode, dictionary)
    assert decoded.dtype == dictionary.dtype
    dense = code.dense(m)
    assert dense.shape == (n, m)
    if not dictionary.isfinite().all():
        return
    naive = torch.zeros(n, m, dtype=torch.float64)
    naive.scatter_add_(1, indices, values.to(dictionary.dtype).double())
    naive = naive @ dictionary.double()
    size = float(values.abs().sum(1).max() if n and k else 0) * float(dictionary.abs().max())
    eps = torch.finfo(dictionary.dtype).eps
    assert float((decoded.double() - naive).abs().max() if n else 0) <= 4 * (k + 1) * eps * size
    assert int(code.l0.max() if n and k else 0) <= k


PURSUITS = (pursuit.gradient_pursuit, pursuit.matching_pursuit)


@bounded(120)
@given(
    st.sampled_from(PURSUITS), rows(d=3), rows(n=st.integers(1, 9), d=3), st.integers(0, 4),
    st.booleans(),
)  # fmt: skip
def test_pursuits_give_codes_or_refuse(
    function: Any, x: Tensor, dictionary: Tensor, l0: int, biased: bool
) -> None:
    bias = x[0].clone() if biased and len(x) else None
    code = answer(function, x, dictionary, l0, bias)
    if code is None:
        return
    assert code.values.shape == (len(x), l0 if len(x) else 0)
    assert code.values.isfinite().all()
    assert (code.values >= 0).all()
    assert (code.l0 <= l0).all()
    assert ((code.indices >= 0) & (code.indices < len(dictionary))).all()
    # Half precision is computed in float32.
    if x.dtype in DTYPES[:2]:
        again = function(x.float(), dictionary, l0, None if bias is None else bias.float())
        assert torch.equal(again.values, code.values)
    refitted = answer(pursuit.nonnegative_refit, x, dictionary, code, bias)
    if refitted is not None:
        assert refitted.values.isfinite().all()
        assert (refitted.values >= 0).all()


@bounded(100)
@given(st.sampled_from(PURSUITS), st.integers(0, 10**6), st.integers(-150, 150), st.integers(1, 4))
def test_a_scale_of_the_activations_is_one_of_the_weights(
    function: Any, seed: int, power: int, l0: int
) -> None:
    x, dictionary = normal(seed, 5, 4).float(), normal(seed + 1, 7, 4).float()
    # Powers of two change no digit of a product, so that every choice is the same.
    scaled = (x.double() * 2.0**power).float()
    assume(scaled.isfinite().all())
    code, found = function(x, dictionary, l0), answer(function, scaled, dictionary, l0)
    if found is None:
        # 2^60 squared and squared again is out of float32.
        assert power > 25
    elif power > -40:
        assert torch.equal(found.indices, code.indices)
        assert torch.equal(found.values.double(), code.values.double() * 2.0**power)
    else:
        assert found.values.isfinite().all()


# geometry


@bounded(120)
@given(rows(n=st.integers(0, 12), d=st.integers(1, 5)), st.integers(1, 4), st.integers(-120, 120))
def test_directions_of_any_length(directions: Tensor, rank: int, power: int) -> None:
    found = answer(geometry.neighbour_cosines, directions, (rank,))
    if found is not None:
        assert found.isfinite().all()
        assert float(found.abs().max()) <= 1
        if directions.dtype in DTYPES[:2]:
            assert torch.equal(found, geometry.neighbour_cosines(directions.float(), (rank,)))
        plain = directions.to(found.dtype)
        scaled = (plain.double() * 2.0**power).to(plain.dtype)
        tiny = torch.finfo(plain.dtype).tiny
        if scaled.isfinite().all() and float(scaled.abs()[plain != 0].min()) > tiny:
            again = geometry.neighbour_cosines(scaled, (rank,))
            torch.testing.assert_close(again, found, rtol=0, atol=2e-6)
    for function in (geometry.rms_cosine, geometry.effective_dimension):
        value = answer(function, directions)
        assert value is None or math.isfinite(value)
    matched = answer(geometry.covariance_matched, directions)
    assert matched is None or matched.isfinite().all()
    families = answer(geometry.splitting_families, [directions, directions])
    if families is not None:
        # Each direction is its own parent, or that of its twin.
        assert all((one > 1 - 1e-5).all() for one in families.cosine)
        assert int(families.size.sum()) == 2 * len(directions)
    code = SparseCode(torch.ones(2, 1), torch.zeros(2, 1, dtype=torch.int64))
    silent = answer(geometry.silent_readout, code, directions)
    if silent is not None and float(directions.double().abs().max()) < 1e15:
        assert silent.rms.isfinite().all()


@bounded(80)
@given(
    st.lists(st.floats(-1, 1), max_size=30),
    st.none() | st.floats(0, 1.5),
    st.floats(-0.5, 1.5),
    st.sampled_from(DTYPES),
)
def test_peaks_of_any_values(
    values: list[float], bandwidth: float | None, prominence: float, dtype: torch.dtype
) -> None:
    found = answer(
        geometry.histogram_peaks, torch.tensor(values, dtype=dtype), bandwidth, prominence
    )
    if found is not None:
        assert found.isfinite().all()
        assert bool((found.diff() > 0).all())


@bounded(60)
@given(st.integers(-1, 40), st.integers(-1, 40), st.integers(-1, 40))
def test_sizes_of_random_directions(m: int, d: int, rank: int) -> None:
    for function, given_sizes in (
        (geometry.welch_bound, (m, d)), (geometry.random_neighbour_cosine, (m, d, rank)),
        (geometry.random_largest_cosine, (m, d)), (geometry.interference, (m, d)),
        (geometry.active_limit, (m, d, "worst")),
    ):  # fmt: skip
        found = answer(function, *given_sizes)
        assert found is None or math.isfinite(found)
        assert (found is None) == (min(m, d) < 2) or function is geometry.random_neighbour_cosine


# synthetic

number = st.floats(allow_nan=True, allow_infinity=True) | st.floats(-0.1, 1.1) | st.integers(-1, 20)
share = st.sampled_from([0.0, 0.1, 0.5]) | number


@bounded(200)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "n_features": st.integers(-1, 6), "d_model": st.integers(-1, 6), "l0": share,
            "zipf": share, "values": st.sampled_from(["constant", "uniform", "half-normal",
                                                      "exponential", "lognormal", "none"]),
            "sigma": number, "overlap": share, "dense_rank": st.integers(-1, 4),
            "geometry": st.sampled_from(["orthonormal", "random", "correlated"]),
            "dense_share": share, "dense_apart": st.booleans(), "shrinkage": share,
            "learned": st.none() | st.integers(-1, 7), "weight_noise": share, "misses": share,
            "false_positives": share,
            "frequencies": st.none() | st.lists(share, max_size=4).map(tuple),
        },
    )
)  # fmt: skip
def test_a_recipe_is_refused_or_drawn(options: dict[str, Any]) -> None:
    options = {"n_features": 4, "d_model": 5, "l0": 1.0, **options}
    recipe = answer(synthetic.PlantedRecipe, **options)
    if recipe is None:
        return
    planted = recipe.draw(20)
    assert planted.x.isfinite().all()
    off = (planted.x - planted.x_hat - planted.error).abs().max()
    size = max(1.0, float(planted.x.abs().max()), float(planted.x_hat.abs().max()))
    assert float(off) <= 1e-9 * size
    shares = planted.shares
    assert math.isfinite(shares.fvu)
    # Of the pseudo-inverse, which the variances of rare features square.
    assert shares.linear + shares.nonlinear >= shares.fvu - 1e-6 * max(1, shares.fvu)
    answer(planted.measured)


@bounded(80)
@given(rows(), st.sampled_from(["isotropic", "covariance", "multiplicative", "x"]), number, number)
def test_noise_for_any_rows(x: Tensor, kind: Any, level: float, unit: float) -> None:
    noise = answer(synthetic.planted_noise, x, level, kind, unit)
    if noise is not None:
        assert noise.shape == x.shape
        assert noise.dtype == x.dtype
    if len(x) > 1 and x.isfinite().all() and float(x.double().abs().max()) < 1e100:
        covariance = wide(x).T.cov().reshape(x.shape[1], x.shape[1])
        root = answer(synthetic.covariance_root, covariance)
        if root is not None and float(covariance.abs().max()) > 1e-280:
            torch.testing.assert_close(
                root.T @ root, covariance, rtol=1e-6, atol=1e-9 * float(covariance.abs().max())
            )
        found = answer(synthetic.expected_shares, covariance, covariance, covariance)
        if found is not None:
            assert all(math.isfinite(one) for one in found)
            own = torch.linalg.eigvalsh(covariance)
            if float(own[0]) < 1e-9 * float(own[-1]):
                # Rounding of the inverse is that of the variances' ratio.
                return
            # The noise is half of the variance of x, and half of it can be told.
            assert found.linear == pytest.approx(0.25, abs=1e-4)


@bounded(60)
@given(
    st.sampled_from(["constant", "uniform", "half-normal", "exponential", "lognormal"]),
    number,
    number,
)
def test_predictability_of_any_values(values: Any, p: float, sigma: float) -> None:
    found = answer(synthetic.norm_predictability, values, p, sigma)
    assert found is None or 0 <= found <= 1 + 1e-9


# sensitivity


@bounded(100)
@given(pairs(), st.integers(-1, 6), number)
def test_paths_between_any_rows(given_rows: list[Tensor], n: int, number_: float) -> None:
    base, target = given_rows
    d = base.shape[1]
    for path in (
        answer(sensitivity.absolute_path, base, target, None, n),
        answer(sensitivity.absolute_path, base, target, min(number_, 1e3), n),
        answer(sensitivity.relative_path, base, target, n),
        answer(sensitivity.rotation_path, base, target, n),
    ):
        if path is not None:
            assert path.shape == (len(base), n + 1, d)
            # `curves` refuses paths that are not finite, as those between larger ones may be.
            if len(base) and all(float(one.double().abs().max()) < 1e150 for one in given_rows):
                assert torch.equal(path[:, 0].double(), base.double() + 0)
    distance = answer(sensitivity.mean_distance, base, target)
    assert distance is None or 0 < distance < math.inf
    drawn = answer(sensitivity.covariance_matched, base, 3)
    assert drawn is None or drawn.shape == (3, d)


@bounded(120)
@given(rows(n=st.integers(0, 4), d=st.integers(1, 14)), st.integers(-1, 14), number)
def test_scalars_of_any_curves(curve: Tensor, at: int, number_: float) -> None:
    curve = curve.abs()
    s = curve.shape[1]
    for step in (
        answer(sensitivity.max_slope_step, curve), answer(sensitivity.end_of_linearity, curve, at),
        answer(sensitivity.area_ratio_step, curve, at),
        answer(sensitivity.area_ratio_step, curve, at, True),
        answer(sensitivity.plateau_length, curve, number_),
    ):  # fmt: skip
        if step is not None:
            assert step.shape == curve.shape[:1]
            assert ((step >= 0) & (step < s)).all()
    slope = answer(sensitivity.max_slope, curve)
    if slope is not None and len(slope) and float(curve.double().max()) < 1e150:
        # Mean slope is that of the straight line between the ends, at least where it starts at 0.
        started = curve.double() - 0
        assert (slope >= (1 - started[:, 0] / started[:, -1]) - 1e-6).all()
    one, other = curve.flatten(), curve.flatten()[: max(1, curve.numel() // 2)]
    found = answer(sensitivity.ks_distance, one, other)
    assert found is None or 0 <= found <= 1


@bounded(60)
@given(pairs(d=st.integers(2, 6), powers=st.integers(-3, 3)))
def test_divergences_of_any_logits(given_rows: list[Tensor]) -> None:
    assume(all(one.isfinite().all() for one in given_rows))
    log_p, log_q = (one.float().log_softmax(-1) for one in given_rows)
    kl, js = sensitivity.kl_divergence(log_p, log_q), sensitivity.root_js(log_p, log_q)
    assert (kl >= 0).all()
    assert ((js >= 0) & (js <= 1)).all()
    assert (sensitivity.kl_divergence(log_p, log_p) == 0).all()


def test_warnings_are_those_of_ridges() -> None:
    """Nothing above relied on a warning of another kind: equal rows give the one that is named."""
    x = torch.ones(9, 3).double() * torch.arange(9)[:, None]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        LinearStatistics(3, 3).partial_fit(x, x).solve()
    assert [one.category.__name__ for one in said] == ["RidgeUsedWarning"]

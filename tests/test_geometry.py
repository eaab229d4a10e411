"""Geometry against naive loops, closed forms, simulation, and arrangements known by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from darkmatter import geometry
from darkmatter.geometry import (
    active_limit,
    covariance_matched,
    effective_dimension,
    histogram_peaks,
    in_degree,
    interference,
    nearest_neighbours,
    neighbour_cosines,
    random_cosine_survival,
    random_directions,
    random_largest_cosine,
    random_neighbour_cosine,
    random_neighbour_survival,
    rms_cosine,
    silent_readout,
    splitting_families,
    unit_rows,
    welch_bound,
)
from darkmatter.sparse import SparseCode
from tests.common import normal, refused

# float64 products of some dozens of terms of order 1.
CLOSE: dict[str, Any] = {"rtol": 0.0, "atol": 1e-12}


def naive(directions: Tensor, ranks: tuple[int, ...]) -> Tensor:
    """All cosines, sorted, the one with itself taken out."""
    units = directions / directions.norm(dim=1, keepdim=True)
    rows: list[Tensor] = []
    for i in range(len(units)):
        others = torch.cat([units[:i], units[i + 1 :]]) @ units[i]
        rows.append(others.sort(descending=True).values[[rank - 1 for rank in ranks]])
    return torch.stack(rows)


def simplex(d: int) -> Tensor:
    """d + 1 unit directions in d dimensions, every pair at cosine -1 / d."""
    corners = torch.eye(d + 1, dtype=torch.float64) - 1 / (d + 1)
    basis = torch.linalg.svd(corners).Vh[:d]
    return normalize(corners @ basis.T, dim=1)


def rotation(seed: int, d: int) -> Tensor:
    return torch.linalg.qr(normal(seed, d, d)).Q


# Neighbours


@pytest.mark.parametrize("chunk", [200, 3000, 1 << 23])
def test_neighbours_are_those_of_the_naive_loop(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(geometry, "_CHUNK", chunk)
    directions = normal(0, 90, 7) * normal(1, 90, 1).exp()
    expected = naive(directions, (3, 1, 89))
    torch.testing.assert_close(neighbour_cosines(directions, (3, 1, 89)), expected, **CLOSE)
    found = nearest_neighbours(directions, 5)
    units = normalize(directions, dim=1)
    torch.testing.assert_close(found.cosines, naive(directions, (1, 2, 3, 4, 5)), **CLOSE)
    read = torch.einsum("md,mkd->mk", units, units[found.indices])
    torch.testing.assert_close(read, found.cosines, **CLOSE)
    assert (found.indices != torch.arange(90)[:, None]).all()


def test_neighbours_among_others_keep_equal_rows() -> None:
    narrow, wide = normal(2, 20, 6), normal(3, 50, 6)
    wide[7] = 3 * narrow[4]
    found = nearest_neighbours(wide, 2, among=narrow)
    cosines = normalize(wide, dim=1) @ normalize(narrow, dim=1).T
    torch.testing.assert_close(found.cosines, cosines.topk(2, dim=1).values, **CLOSE)
    assert int(found.indices[7, 0]) == 4
    assert abs(float(found.cosines[7, 0]) - 1) < 1e-12


def test_known_arrangements() -> None:
    orthonormal = neighbour_cosines(rotation(4, 12), (1, 11))
    torch.testing.assert_close(orthonormal, torch.zeros(12, 2, dtype=torch.float64), **CLOSE)
    corners = neighbour_cosines(simplex(5), (1, 5))
    torch.testing.assert_close(corners, torch.full((6, 2), -0.2, dtype=torch.float64), **CLOSE)
    twice = torch.cat([rotation(5, 6), 2 * rotation(5, 6)])
    found = neighbour_cosines(twice, (1, 2))
    torch.testing.assert_close(found[:, 0], torch.ones(12, dtype=torch.float64), **CLOSE)
    assert found.max() <= 1
    torch.testing.assert_close(found[:, 1], torch.zeros(12, dtype=torch.float64), **CLOSE)
    # Signed: an opposite direction is the farthest, not the nearest.
    opposite = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert neighbour_cosines(opposite, (1, 2))[0].tolist() == [0.0, -1.0]


@given(seed=st.integers(0, 1000), m=st.integers(4, 30), d=st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_neighbours_do_not_depend_on_axes_lengths_or_order(seed: int, m: int, d: int) -> None:
    directions = normal(seed, m, d)
    ranks = (1, m - 1)
    expected = neighbour_cosines(directions, ranks)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    turned = directions @ rotation(seed + 1, d)
    scaled = directions * (3 * normal(seed + 2, m, 1)).exp()
    torch.testing.assert_close(neighbour_cosines(turned, ranks), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(neighbour_cosines(scaled, ranks), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(neighbour_cosines(directions[order], ranks), expected[order])


@given(seed=st.integers(0, 1000), m=st.integers(2, 30), d=st.integers(2, 9))
@settings(max_examples=40, deadline=None)
def test_welch_bounds_rms_and_largest_cosine(seed: int, m: int, d: int) -> None:
    units = normalize(normal(seed, m, d), dim=1)
    cosines = (units @ units.T)[~torch.eye(m, dtype=torch.bool)]
    rms = rms_cosine(units)
    # float64 rounding of a root of a difference near zero.
    assert abs(rms - float(cosines.square().mean().sqrt())) < 1e-7
    assert welch_bound(m, d) <= rms + 1e-9
    assert rms <= float(cosines.abs().max()) + 1e-9


def test_welch_is_reached_by_the_simplex_and_known_sizes() -> None:
    assert abs(welch_bound(6, 5) - 0.2) < 1e-12
    assert abs(rms_cosine(simplex(5)) - 0.2) < 1e-9
    assert welch_bound(5, 5) == welch_bound(3, 5) == 0
    assert abs(welch_bound(8192, 512) - 0.0428) < 5e-5
    assert abs(welch_bound(24_576, 768) - 0.0355) < 5e-5


def test_effective_dimension_counts_the_axes_in_use() -> None:
    assert abs(effective_dimension(rotation(6, 9)) - 9) < 1e-9
    flat = torch.cat([normal(7, 4000, 3), torch.zeros(4000, 5, dtype=torch.float64)], dim=1)
    # 4000 random rows of 3 axes: eigenvalues off by 2 %, the ratio by its square.
    assert abs(effective_dimension(flat) - 3) < 0.01


def test_half_precision_is_computed_in_float32() -> None:
    directions = normal(8, 40, 6).half()
    found = neighbour_cosines(directions, (1,))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, naive(directions.float(), (1,)), rtol=0, atol=1e-6)
    tiny = torch.full((3, 2), 1e-30)
    assert torch.allclose(neighbour_cosines(tiny, (1,)), torch.ones(3, 1))


# Random directions


@pytest.mark.parametrize(
    ("m", "d", "expected"),
    [
        (24_576, 768, (0.147, 0.121, 0.096)),
        (16_384, 2304, (0.083, 0.068, 0.052)),
        (16_384, 3584, (0.067, 0.054, 0.042)),
        (131_072, 3584, (0.074, 0.063, 0.053)),
    ],
)
def test_random_neighbours_of_known_decoders(m: int, d: int, expected: tuple[float, ...]) -> None:
    for rank, value in zip((1, 10, 100), expected, strict=True):
        # The published predictions are quantiles, this is the mean, and they have three digits.
        assert abs(random_neighbour_cosine(m, d, rank) - value) < 1e-3


@pytest.mark.parametrize("rank", [1, 7, 60])
def test_random_neighbours_in_three_dimensions(rank: int) -> None:
    # There a cosine is uniform on -1 to 1, and the k-th largest of N has mean 1 - 2 k / (N + 1).
    # The trapezoidal rule with steps of 1e-4 is good to 1e-8.
    assert abs(random_neighbour_cosine(61, 3, rank) - (1 - 2 * rank / 61)) < 1e-7


@pytest.mark.parametrize("d", [2, 3, 8, 300])
def test_cosine_of_random_directions_is_beta(d: int) -> None:
    t = np.linspace(-1, 1, 41)
    beta = scipy.stats.beta((d - 1) / 2, (d - 1) / 2).sf((1 + t) / 2)
    np.testing.assert_allclose(random_cosine_survival(t, d), beta, atol=1e-12)
    binomial = scipy.stats.binom(99, beta).sf(3 - 1)
    np.testing.assert_allclose(random_neighbour_survival(t, 100, d, 3), binomial, atol=1e-10)


def test_random_neighbours_agree_with_simulation() -> None:
    drawn = random_directions(1500, 40, seed=3)
    found = neighbour_cosines(drawn, (1, 10, 100)).double()
    for column, rank in enumerate((1, 10, 100)):
        # 1500 nearly independent draws of deviation 0.04, 0.02 and 0.02; four standard errors.
        expected = random_neighbour_cosine(1500, 40, rank)
        assert abs(float(found[:, column].mean()) - expected) < 0.004
    median = float(found[:, 0].median())
    below = 1 - random_neighbour_survival(np.array([median]), 1500, 40)[0]
    # Median of 1500: standard error 0.013 of the distribution function; four of them.
    assert abs(below - 0.5) < 0.052
    # Relative to sqrt(1 / d), 1500 rows of 40 have an rms within a hundredth.
    assert abs(rms_cosine(drawn) - 40**-0.5) < 0.01 * 40**-0.5
    largest = [
        float(neighbour_cosines(random_directions(300, 40, seed), (1,)).max()) for seed in range(40)
    ]
    # Deviation of the largest 0.025, of the mean of 40 of them 0.004; the pairs' dependence costs
    # less.
    assert abs(float(np.mean(largest)) - random_largest_cosine(300, 40)) < 0.015


def test_covariance_matched_has_the_spread_and_nothing_else() -> None:
    stretch = torch.linspace(0.05, 1, 30, dtype=torch.float64)
    decoder = normal(9, 3000, 30) * stretch
    decoder[1::2] = decoder[::2] + 0.02 * normal(10, 1500, 30)
    drawn = covariance_matched(decoder, seed=1)
    assert drawn.shape == decoder.shape
    # Calibrated to three steps of a factor of ten.
    assert abs(rms_cosine(drawn) / rms_cosine(decoder) - 1) < 1e-3
    # Twins are gone: their cosine is 0.99, that of random neighbours of this spread 0.7.
    assert float(neighbour_cosines(decoder, (1,)).median()) > 0.98
    assert float(neighbour_cosines(drawn, (1,)).median()) < 0.85
    assert torch.equal(drawn, covariance_matched(decoder, seed=1))
    assert not torch.equal(drawn, covariance_matched(decoder, seed=2))
    assert covariance_matched(decoder, m=10).shape == (10, 30)


@pytest.mark.parametrize("flattest", [0.1, 1.0])
def test_random_directions_of_any_spread_are_like_their_control(flattest: float) -> None:
    spread = torch.linspace(flattest, 1, 60, dtype=torch.float64)
    directions = normal(18, 900, 60) * spread
    ranks = (1, 10, 100)
    found = neighbour_cosines(directions, ranks).mean(0)
    control = neighbour_cosines(covariance_matched(directions, seed=2), ranks).mean(0)
    # Two draws, each with standard errors of 0.0015 at most; four of their difference.
    assert float((found - control).abs().max()) < 0.009
    naive_moment = directions / directions.norm(dim=1, keepdim=True)
    variances, axes = torch.linalg.eigh(naive_moment.T @ naive_moment / 900)
    naive = (normal(19, 900, 60) * variances.clamp(min=0).sqrt()) @ axes.T
    # The moment of the sample itself adds 1 / 900 to the mean square cosine, to a third of that.
    added = rms_cosine(naive) ** 2 - rms_cosine(directions) ** 2
    assert abs(added - 1 / 900) < 1 / 2700


def test_no_spread_is_drawn_for_orthonormal_directions() -> None:
    drawn = covariance_matched(rotation(20, 40), m=4000)
    # 4000 random rows of 40: rms cosine within a hundredth.
    assert abs(rms_cosine(drawn) - 40**-0.5) < 0.01 * 40**-0.5


# Hubs and peaks


def test_a_hub_is_the_neighbour_of_many() -> None:
    hub = torch.zeros(1, 40, dtype=torch.float64)
    hub[0, 0] = 1.0
    around = 0.5 * hub + math.sqrt(0.75) * torch.eye(40, dtype=torch.float64)[1:]
    degree = in_degree(nearest_neighbours(torch.cat([hub, around])).indices)
    assert int(degree[0]) == 39
    assert int(degree.sum()) == 40


def test_peaks_where_they_were_planted() -> None:
    values = torch.cat([0.05 + 0.02 * normal(11, 3000), 0.30 + 0.02 * normal(12, 1000)])
    found = histogram_peaks(values)
    # 1000 draws of deviation 0.02, smoothed by about as much: the mode is within 0.006.
    torch.testing.assert_close(
        found, torch.tensor([0.05, 0.30], dtype=torch.float64), rtol=0, atol=0.006
    )
    assert len(histogram_peaks(0.2 + 0.05 * normal(13, 2000))) == 1
    ends = histogram_peaks(torch.tensor([1.0, 1.0, -1.0]), bandwidth=0.02)
    # The middle of a bin of a tenth of the bandwidth.
    torch.testing.assert_close(
        ends, torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=0, atol=0.0011
    )


# Interference


def test_interference_of_the_published_sizes() -> None:
    assert abs(interference(24_576, 768, "worst") - 0.325) < 1e-3
    assert abs(interference(24_576, 768) - 0.0361) < 5e-5
    assert abs(active_limit(24_576, 768, "worst") - 9.5) < 0.05
    assert abs(active_limit(8192, 512, "worst") - 7.1) < 0.05
    assert abs(active_limit(24_576, 768) - 768) < 1e-9


def test_silent_readout_of_the_simplex() -> None:
    # Every silent corner reads -1 / d from each active one.
    code = SparseCode(
        torch.tensor([[3.0, 2.0], [4.0, 0.0], [0.0, 0.0]], dtype=torch.float64),
        torch.tensor([[1, 4], [5, 0], [0, 0]]),
    )
    found = silent_readout(code, simplex(5))
    for column, expected in {
        found.rms: [1.0, 0.8, 0.0],
        found.largest: [1.0, 0.8, 0.0],
        found.expected: [0.2 * math.sqrt(13), 0.8, 0.0],
        found.size: [math.sqrt(6.5), 4.0, 0.0],
    }.items():
        torch.testing.assert_close(column, torch.tensor(expected, dtype=torch.float64), **CLOSE)
    assert found.l0.tolist() == [2, 1, 0]


def test_silent_readout_is_the_naive_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_CHUNK", 100)
    directions = normal(14, 30, 6)
    indices = torch.stack([torch.randperm(30)[:4] for _ in range(11)])
    code = SparseCode(normal(15, 11, 4).abs(), indices)
    found = silent_readout(code, directions)
    for token in range(11):
        written = code.decode(directions)[token]
        silent = [j for j in range(30) if j not in indices[token].tolist()]
        read = torch.stack([directions[j] @ written / directions[j].norm() for j in silent])
        torch.testing.assert_close(found.rms[token], read.square().mean().sqrt(), **CLOSE)
        torch.testing.assert_close(found.largest[token], read.abs().max(), **CLOSE)


def test_random_choices_read_what_is_expected() -> None:
    directions = random_directions(800, 50, seed=4)
    generator = torch.Generator().manual_seed(5)
    indices = torch.rand(500, 800, generator=generator).argsort(1)[:, :6]
    code = SparseCode(torch.rand(500, 6, generator=generator) + 0.5, indices)
    found = silent_readout(code, directions)
    # Squares of 500 tokens of deviation 0.6 of themselves, so the root of their mean is within 5 %.
    ratio = found.rms.square().mean().sqrt() / found.expected.square().mean().sqrt()
    assert abs(float(ratio) - 1) < 0.05


# Families


def test_families_by_hand() -> None:
    axes = torch.eye(6, dtype=torch.float64)
    near = normalize(axes[0] + 0.2 * axes[4], dim=0)
    nearer = normalize(axes[0] - 0.2 * axes[4], dim=0)
    narrow = torch.stack([2 * axes[0], axes[1], axes[2]])
    middle = torch.stack([near, nearer, axes[1], axes[3]])
    wide = torch.stack([axes[3], axes[5], near])
    found = splitting_families([narrow, middle, wide], threshold=0.9)
    assert found.parent[0][:3].tolist() == [0, 0, 1]
    assert [flags.tolist() for flags in found.has_parent] == [
        [True, True, True, False],
        [True, False, True],
    ]
    # near and nearer have cosine 0.92, so the last wide latent has two parents.
    assert found.edges[0].tolist() == [[0, 0], [0, 1], [1, 2]]
    assert sorted(found.edges[1].tolist()) == [[0, 2], [1, 2], [3, 0]]
    first, second, third = (labels.tolist() for labels in found.family)
    assert first[0] == second[0] == second[1] == third[2]
    assert first[1] == second[2]
    assert second[3] == third[0]
    assert len({first[0], first[1], first[2], second[3], third[1]}) == 5
    assert sorted(found.size.tolist()) == [1, 1, 2, 2, 4]
    assert int(found.size[first[0]]) == 4


@given(seed=st.integers(0, 500), threshold=st.floats(0.05, 0.95))
@settings(max_examples=20, deadline=None)
def test_families_do_not_depend_on_axes_or_order(seed: int, threshold: float) -> None:
    levels = [normal(seed, 5, 4), normal(seed + 1, 9, 4)]
    turn = rotation(seed + 2, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    found = splitting_families(levels, threshold)
    other = splitting_families([levels[0] @ turn, 2 * levels[1][order] @ turn], threshold)
    assert sorted(found.size.tolist()) == sorted(other.size.tolist())
    torch.testing.assert_close(found.cosine[0][order], other.cosine[0], rtol=0, atol=1e-11)
    assert set(found.edges[0][:, 1].tolist()) == set(found.has_parent[0].nonzero()[:, 0].tolist())


# Refusals


def holed(value: float) -> Tensor:
    rows = normal(16, 5, 3)
    rows[2] = value
    return rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: neighbour_cosines(holed(math.nan), (1,)), "NaN or infinity, first in row 2"),
        (lambda: neighbour_cosines(holed(0.0), (1,)), "zero row, first row 2"),
        (lambda: neighbour_cosines(normal(0, 5, 3)), "is 10, expected an integer from 1 to 4"),
        (lambda: neighbour_cosines(normal(0, 5, 3), (5,)), "from 1 to 4"),
        (lambda: neighbour_cosines(normal(0, 5, 3), (0,)), "from 1 to 4"),
        (lambda: neighbour_cosines(normal(0, 5, 3), ()), "ranks is empty"),
        (lambda: neighbour_cosines(normal(0, 5), (1,)), r"shape \[5\], expected \[m, d\]"),
        (lambda: neighbour_cosines(normal(0, 5, 3).long(), (1,)), "expected a float tensor"),
        (lambda: neighbour_cosines(normal(0, 0, 3), (1,)), "no rows"),
        (lambda: nearest_neighbours(normal(0, 5, 3), 1, normal(0, 5, 4)), "the same width"),
        (lambda: nearest_neighbours(normal(0, 5, 3), 6, normal(0, 5, 3)), "from 1 to 5"),
        (lambda: rms_cosine(normal(0, 1, 3)), "at least 2"),
        (lambda: covariance_matched(normal(0, 5, 3), m=1), "m is 1"),
        (lambda: welch_bound(1, 3), "m is 1"),
        (lambda: random_neighbour_cosine(5, 1), "d is 1"),
        (lambda: random_neighbour_cosine(5, 3, 5), "from 1 to 4"),
        (lambda: random_cosine_survival(np.array([1.1]), 3), "outside -1 to 1"),
        (lambda: in_degree(torch.tensor([[2], [0]])), "expected 0 to 1"),
        (lambda: histogram_peaks(torch.tensor([2.0])), "cosines from -1 to 1"),
        (lambda: histogram_peaks(torch.tensor([0.5]), bandwidth=0), "between 0 and 1"),
        (lambda: interference(10, 5, "best"), 'expected "worst" or "typical"'),
        (
            lambda: silent_readout(SparseCode(torch.ones(1, 5), torch.arange(5)[None]), holed(1.0)),
            "all 5 latents active",
        ),
        (
            lambda: silent_readout(
                SparseCode(torch.ones(0, 2), torch.zeros(0, 2).long()), holed(1.0)
            ),
            "no tokens",
        ),
        (lambda: splitting_families([normal(0, 5, 3)]), "at least 2 decoders"),
        (lambda: splitting_families([normal(0, 5, 3)] * 2, 0.0), "above 0"),
        (lambda: splitting_families([normal(0, 5, 3), normal(0, 5, 4)]), "expected one d"),
    ],
)
def test_what_cannot_be_used_is_refused(call: Any, message: str) -> None:
    with refused(message):
        call()


def test_unit_rows_leave_what_they_are_given() -> None:
    rows = normal(17, 4, 3)
    kept = rows.clone()
    assert torch.allclose(unit_rows("rows", rows).norm(dim=1), torch.ones(4, dtype=torch.float64))
    assert torch.equal(rows, kept)

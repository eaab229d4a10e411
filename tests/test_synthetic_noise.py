"""Rare latents, planted noise and its split: by hand, by closed form and by a naive loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter.sparse import SparseCode
from darkmatter.synthetic import (
    ablate,
    estimated_shares,
    expected_shares,
    noise_covariance,
    planted_noise,
    rare_latents,
)
from tests.common import normal, refused

# Latent 0 is frequent and weak, 1 rare and strong, 2 rare and weak, 3 dead.
CODE = SparseCode(
    torch.tensor([[0.1, 9.0], [0.1, 0.2], [0.1, 0.0], [0.1, 0.0]]),
    torch.tensor([[0, 1], [0, 2], [0, 0], [0, 0]]),
)


def mixed(seed: int, n: int, d: int = 4) -> Tensor:
    """Correlated rows with unequal variances, not about zero."""
    return normal(seed, n, d) * torch.linspace(0.3, 2, d) @ normal(1, d, d) + 3


def covariance(*seeds: int, d: int = 4) -> Tensor:
    root = normal(seeds[0], d, d)
    return root @ root.T


# -------------------------------------------------------------------------------- rare latents


def test_rarest_by_hand() -> None:
    # Means are 0.1, 2.25, 0.05, 0; frequencies 4, 1, 1, 0 (ties by index).
    for share, by_value, by_frequency in [
        (0.0, [], []),
        (0.25, [3], [3]),
        (0.5, [2, 3], [1, 3]),
        (0.75, [0, 2, 3], [1, 2, 3]),
        (1.0, [0, 1, 2, 3], [0, 1, 2, 3]),
    ]:
        assert rare_latents(CODE, 4, share).nonzero()[:, 0].tolist() == by_value
        assert rare_latents(CODE, 4, share, "frequency").nonzero()[:, 0].tolist() == by_frequency


def test_padding_is_no_activity() -> None:
    # Latent 0 is only padding here.
    code = SparseCode(torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([[1, 0], [2, 0]]))
    for by in ("value", "frequency"):
        assert rare_latents(code, 3, 1 / 3, by).tolist() == [True, False, False]


def test_ablating_is_masking_the_dense_code() -> None:
    mask = torch.tensor([True, False, True, False])
    assert torch.equal(ablate(CODE, mask).dense(4), CODE.dense(4) * ~mask)


def test_ablating_no_latent_changes_nothing_and_all_leave_the_bias() -> None:
    dictionary, bias = normal(3, 4, 5), normal(4, 5)
    none, every = torch.zeros(4, dtype=torch.bool), torch.ones(4, dtype=torch.bool)
    assert torch.equal(ablate(CODE, none).decode(dictionary, bias), CODE.decode(dictionary, bias))
    assert torch.equal(ablate(CODE, every).decode(dictionary, bias), bias.expand(4, 5))


def test_refusals_of_latents() -> None:
    with refused("share=1.5, expected a number between 0 and 1"):
        rare_latents(CODE, 4, 1.5)
    with refused("by='norm', expected one of value, frequency"):
        rare_latents(CODE, 4, 0.5, "norm")  # pyright: ignore[reportArgumentType]
    with refused("d_sae=2 does not hold the indices of the code"):
        rare_latents(CODE, 2, 0.5)
    with refused("latents is torch.int64"):
        ablate(CODE, torch.tensor([1, 2]))
    with refused("latents has 2 entries and the code an index 2"):
        ablate(CODE, torch.tensor([True, False]))


# --------------------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", ["isotropic", "covariance", "multiplicative"])
@pytest.mark.parametrize("level_is", ["std", "variance"])
def test_noise_has_its_covariance_and_none_with_the_activation(kind: str, level_is: str) -> None:
    n, x = 100_000, mixed(0, 100_000)
    noise = planted_noise(x, 0.6, kind, 0.5, level_is, seed=3)  # pyright: ignore
    expected = noise_covariance(torch.cov(x.T), 0.6, kind, 0.5, level_is)  # pyright: ignore
    scale = float(expected.trace())
    # Sampling error of a second moment is about sqrt(kurtosis / n) of it; the multiplicative noise
    # has a kurtosis of up to 9 or so: five of its standard errors.
    assert torch.allclose(torch.cov(noise.T), expected, rtol=0, atol=5 * 3 / math.sqrt(n) * scale)
    joint = torch.cov(torch.cat([x, noise], 1).T)[:4, 4:]
    size = math.sqrt(scale * float(torch.cov(x.T).trace()))
    assert float(joint.abs().max()) < 5 * 3 / math.sqrt(n) * size


def test_levels_as_variance_and_as_standard_deviation() -> None:
    signal = covariance(5)
    for kind in ("isotropic", "covariance", "multiplicative"):
        as_std = noise_covariance(signal, 0.6, kind, 2.0)
        assert float(as_std.trace()) == pytest.approx(4 * (0.6 * 2) ** 2, rel=1e-12)
        as_variance = noise_covariance(signal, 0.36, kind, 2.0, "variance")
        assert torch.allclose(as_std, as_variance, rtol=1e-12)
        one = noise_covariance(signal, 1, kind), noise_covariance(signal, 1, kind, 1, "variance")
        assert torch.equal(*one)


def test_no_level_is_no_noise_and_seeds_repeat() -> None:
    x = mixed(1, 50)
    for kind in ("isotropic", "covariance", "multiplicative"):
        assert float(planted_noise(x, 0, kind).abs().max()) == 0
        assert torch.equal(planted_noise(x, 1, kind, seed=4), planted_noise(x, 1, kind, seed=4))
        assert not torch.equal(planted_noise(x, 1, kind, seed=4), planted_noise(x, 1, kind, seed=5))
        assert planted_noise(x.float(), 1, kind).dtype == torch.float32


def test_multiplicative_noise_lies_along_each_centred_row() -> None:
    x = mixed(2, 30)
    noise = planted_noise(x, 1, "multiplicative")
    cosine = torch.cosine_similarity(noise, x - x.mean(0))
    assert torch.allclose(cosine.abs(), torch.ones(30, dtype=torch.float64), atol=1e-12)


def test_refusals_of_noise() -> None:
    x = mixed(3, 10)
    with refused("level=-1, expected a finite number of at least 0"):
        planted_noise(x, -1)
    with refused("unit=inf"):
        planted_noise(x, 1, unit=math.inf)
    with refused("kind='pink', expected one of isotropic, covariance, multiplicative"):
        planted_noise(x, 1, "pink")  # pyright: ignore[reportArgumentType]
    with refused("level_is='power', expected one of std, variance"):
        planted_noise(x, 1, level_is="power")  # pyright: ignore[reportArgumentType]
    with refused("x is .* and does not vary"):
        planted_noise(torch.ones(5, 3), 1)
    with refused("x holds NaN or infinity, first in row 0"):
        planted_noise(torch.full((5, 3), math.nan), 1)
    with refused("signal is .3, 4."):
        noise_covariance(normal(0, 3, 4), 1)


# -------------------------------------------------------------------------------------- shares


def test_estimated_shares_by_hand() -> None:
    # The error is half of x: wholly linear, and its FVU is a quarter.
    x = mixed(4, 200)
    linear, nonlinear = estimated_shares(x, 0.5 * (x + x.mean(0)), x, 0.5 * (x + x.mean(0)))
    assert linear == pytest.approx(0.25, rel=1e-9)
    assert nonlinear == pytest.approx(0, abs=1e-12)


def test_estimated_shares_add_up_to_the_fvu_and_match_a_naive_fit() -> None:
    x_fit, x = mixed(5, 300), mixed(6, 200)
    xhat_fit, xhat = x_fit + normal(7, 300, 4), x + normal(8, 200, 4)
    found = estimated_shares(x_fit, xhat_fit, x, xhat)
    ones_fit, ones = torch.ones(300, 1).double(), torch.ones(200, 1).double()
    weights = torch.linalg.lstsq(torch.cat([x_fit, ones_fit], 1), x_fit - xhat_fit).solution
    left = x - xhat - torch.cat([x, ones], 1) @ weights
    total = (x - x.mean(0)).square().sum()
    assert found.nonlinear == pytest.approx(float(left.square().sum() / total), rel=1e-9)
    fvu = float((x - xhat).square().sum() / total)
    assert found.linear + found.nonlinear == pytest.approx(fvu, rel=1e-12)


def test_one_dimension_by_hand() -> None:
    # Signal variance 3, activation noise 1: one quarter of the noise is read as noise.
    one = torch.ones(1, 1, dtype=torch.float64)
    linear, nonlinear = expected_shares(3 * one, one, 2 * one)
    assert linear == pytest.approx((1 * 1 / 4) / 4)
    assert nonlinear == pytest.approx((1 * 3 / 4 + 2) / 4)
    # A tenth of the signal absent and nothing else: all linear.
    absent, cross = 0.01 * 3 * one, 0.1 * 3 * one
    assert expected_shares(3 * one, 0 * one, 0 * one, absent, cross) == pytest.approx((0.01, 0))
    # A constant offset is linear, as the map has an intercept.
    offset = torch.tensor([3.0])
    assert expected_shares(3 * one, 0 * one, 0 * one, offset=offset) == pytest.approx((3, 0))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.01, 4), st.floats(0, 4))
def test_expected_shares_obey_their_sum_and_bounds(seed: int, act: float, rec: float) -> None:
    signal = covariance(seed) + 0.1 * torch.eye(4)
    a, r = noise_covariance(signal, act), noise_covariance(signal, rec)
    found = expected_shares(signal, a, r)
    total = float((signal + a).trace())
    # Rounding of the inverse, of a condition number of a few thousands.
    assert sum(found) == pytest.approx(float(a.trace() + r.trace()) / total, rel=1e-9)
    # Never more than the activation noise itself is linear, never less than the other is not.
    assert 0 < found.linear < float(a.trace()) / total
    assert found.nonlinear > float(r.trace()) / total
    # With the covariance of the signal the whole split is one dimension, as often as there are.
    matched = expected_shares(signal, noise_covariance(signal, act, "covariance"), r)
    ratio = 4 * act**2 / float(signal.trace())
    assert matched.linear == pytest.approx((ratio / (1 + ratio)) ** 2, rel=1e-6)
    # Of equal size, isotropic noise can be told from the signal best.
    assert found.linear >= matched.linear - 1e-12


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_expected_shares_are_those_of_least_squares_on_the_rows(seed: int) -> None:
    # The formula with the sample's own covariances is the split in-sample, exactly, if the noises
    # are made uncorrelated in the sample.
    d, n = 3, 400
    drawn = normal(seed, n, 3 * d)
    drawn = torch.linalg.qr(drawn - drawn.mean(0)).Q * math.sqrt(n)
    s = drawn[:, :d] @ normal(seed + 1, d, d)
    u = 0.3 * torch.relu(s) + 0.2
    rest = torch.linalg.qr(torch.cat([s - s.mean(0), u - u.mean(0), drawn[:, d:]], 1)).Q
    a, r = (math.sqrt(n) * part for part in rest[:, 2 * d : 4 * d].split(d, 1))
    found = estimated_shares(s + a, s - u + r, s + a, s - u + r)
    joint = torch.cov(torch.cat([s, u, a, r], 1).T, correction=0)
    signal, noise, other = (joint[i * d : i * d + d, i * d : i * d + d] for i in (0, 2, 3))
    expected = expected_shares(
        signal, noise, other, joint[d : 2 * d, d : 2 * d], joint[:d, d : 2 * d], u.mean(0)
    )
    # The ten thousandth part of a thousandth: rounding through a QR of nearly collinear columns.
    assert found == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("kind", ["isotropic", "covariance", "multiplicative"])
def test_simulation_agrees_with_the_formula(kind: str) -> None:
    n = 40_000
    s = torch.relu(mixed(9, n) - 3)
    u = torch.where(normal(10, n, 1) > 0, s * 0.2, 0.0)
    a = planted_noise(s, 1, kind, 0.4, seed=1)  # pyright: ignore[reportArgumentType]
    r = planted_noise(s, 0.6, kind, 0.4, seed=2)  # pyright: ignore[reportArgumentType]
    x, xhat = s + a, s - u + r
    half = n // 2
    found = estimated_shares(x[:half], xhat[:half], x[half:], xhat[half:])
    joint = torch.cov(torch.cat([s, u], 1).T)
    signal = joint[:4, :4]
    expected = expected_shares(
        signal,
        noise_covariance(signal, 1, kind, 0.4),  # pyright: ignore[reportArgumentType]
        noise_covariance(signal, 0.6, kind, 0.4),  # pyright: ignore[reportArgumentType]
        joint[4:, 4:],
        joint[:4, 4:],
        u.mean(0),
    )
    # A share has a relative sampling error of about sqrt(kurtosis / n_fit), one to three hundredths
    # for multiplicative noise.
    assert found == pytest.approx(expected, rel=0.08)


def test_directions_without_variance_are_left_alone() -> None:
    signal = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    found = expected_shares(signal, 0 * signal, 0.5 * signal)
    assert found == pytest.approx((0, 0.5))


def test_refusals_of_shares() -> None:
    good = covariance(1)
    with refused("activation_noise is .3, 3. or not symmetric, expected a covariance .4, 4."):
        expected_shares(good, covariance(1, d=3), good)
    with refused("signal is .4, 4. or not symmetric"):
        expected_shares(normal(2, 4, 4), good, good)
    with refused("reconstruction_noise has a negative variance"):
        expected_shares(good, good, -good)
    with refused("cross is .4, 3."):
        expected_shares(good, good, good, cross=normal(3, 4, 3))
    with refused("signal and noise do not vary"):
        expected_shares(0 * good, 0 * good, good)

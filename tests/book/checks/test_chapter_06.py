"""Exercises of chapter 06: typical wrong answers are refused with the right words."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter.leastsquares import LinearStatistics, r2
from darkmatter.synthetic import PlantedRecipe
from tests.book.checks.common import refused


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda p, q: (p * q, 0.1), "mean square of the error"),
        (lambda p, q: (q * (1 - q), 0.1), "always active"),
        (lambda p, q: (0.5, 0.1), "yours is 0.5"),
        (lambda p, q: (p * q * (1 - p * q), q * p * (1 - p)), "not q times that of w"),
        (lambda p, q: (p * q * (1 - p * q), 0.0), "correlated with x"),
        (lambda p, q: (p * q * (1 - p * q), 0.3), "the best line in w is q w"),
        (lambda p, q: p * q * (1 - p * q), "Return a pair"),
    ],
)
def test_misses(answer: Callable[..., Any], message: str) -> None:
    refused("06.1", answer, message)


def moments_of(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    square = w.square()
    covariance = (w * square).mean(0) - w.mean(0) * square.mean(0)
    return covariance, w.var(0, correction=0), square.var(0, correction=0)


def mean_of_each(w: Tensor) -> float:
    covariance, variance, of_square = moments_of(w)
    return float((covariance**2 / (variance * of_square)).mean())


def one_slope(w: Tensor) -> float:
    covariance, variance, of_square = moments_of(w)
    return float(covariance.sum() ** 2 / (variance.sum() * of_square.sum()))


def flat(w: Tensor) -> float:
    both = torch.stack([w.flatten(), w.square().flatten()])
    return float(torch.corrcoef(both)[0, 1] ** 2)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (mean_of_each, "mean of each feature's own R2"),
        (one_slope, "before squaring"),
        (flat, "one line for all features"),
        (lambda w: 1.0, "add var"),
        (lambda w: w.mean(0), "one number"),
    ],
)
def test_unlike(answer: Callable[..., Any], message: str) -> None:
    refused("06.2", answer, message)


def recipe(**knobs: Any) -> PlantedRecipe:
    return PlantedRecipe(**{"d_model": 32, "values": "constant", "n_features": 24, "l0": 3} | knobs)


ABSENT = recipe(n_features=32, l0=4, learned=24, weight_noise=0.5)
DENSE = recipe(dense_rank=8, dense_share=0.25, dense_apart=True, weight_noise=0.5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: (DENSE, ABSENT), "other way"),
        (lambda: (DENSE, DENSE), "first recipe has a dense part"),
        (lambda: (ABSENT, ABSENT), "has not learned everything"),
        (lambda: (recipe(), DENSE), "Nothing is absent"),
        (lambda: (ABSENT, recipe()), "no dense part"),
        (
            lambda: (
                recipe(n_features=32, l0=4, learned=24),
                recipe(dense_rank=8, dense_share=0.25, dense_apart=True),
            ),
            "noise in the weights",
        ),
        (
            lambda: (
                ABSENT,
                recipe(dense_rank=8, dense_share=0.4, dense_apart=True, weight_noise=0.6),
            ),
            "tells them apart",
        ),
        (lambda: (ABSENT.draw(1), DENSE.draw(1)), "two PlantedRecipes"),
        (lambda: ABSENT, "a pair"),
    ],
)
def test_twins(answer: Callable[..., Any], message: str) -> None:
    refused("06.3", answer, message)


def score(x: Tensor, v: Tensor) -> float:
    half, norm2 = len(x) // 2, v.square().sum(1)
    probe = LinearStatistics(x.shape[1], 1).partial_fit(x[:half], norm2[:half]).solve()
    return r2(norm2[half:], probe(x[half:])[:, 0])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, v: "absent" if score(x, v) > 0.4 else "dense", "is v centred"),
        (lambda x, v: "dense" if score(x, v - v.mean(0)) > 0.4 else "absent", "wrong way round"),
        (lambda x, v: score(x, v), "Return the string"),
    ],
)
def test_absent_or_dense(answer: Callable[..., Any], message: str) -> None:
    refused("06.4", answer, message)


def unsquared(target: float) -> int:
    return next(k for k in range(2, 10_000) if 1 - k / math.pi * math.sin(math.pi / k) <= target)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (unsquared, "leaves out the square"),
        (lambda target: math.pi / math.sqrt(3 * target), "whole number"),
        (lambda target: 3, "above the target"),
        (lambda target: 5000, "are enough"),
    ],
)
def test_arcs(answer: Callable[..., Any], message: str) -> None:
    refused("06.5", answer, message)

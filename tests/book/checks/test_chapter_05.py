"""Exercises of chapter 05: typical mistakes are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter.book.checks.chapter_05 import fitted, r2_of
from tests.book.checks.common import refused


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b, c, d: r2_of(d, fitted(d, c)), "fitted on the test tokens"),
        (lambda a, b, c, d: r2_of(b, fitted(b, a)), "score on the fit tokens"),
        (lambda a, b, c, d: r2_of(d, c * (a @ b) / (a @ a)), "offset is missing"),
        (lambda a, b, c, d: 1.0, "the regression gives"),
    ],
)
def test_one_norm_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("05.1", answer, message)


def about_fit_mean(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> float:
    slope = ((a - a.mean()) * b).sum() / (a - a.mean()).square().sum()
    rest = d - b.mean() - slope * (c - a.mean())
    return float(1 - rest.square().sum() / (d - b.mean()).square().sum())


def test_total_about_the_wrong_mean() -> None:
    refused("05.1", about_fit_mean, "mean of the test tokens")


def covariance(n: int, total: Tensor, product: Tensor) -> Tensor:
    return product - torch.outer(total, total) / n


def correlation(n: int, total: Tensor, product: Tensor) -> Tensor:
    centred = covariance(n, total, product)
    return centred.abs() / torch.outer(centred.diagonal(), centred.diagonal()).sqrt()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, t, p: p.square() / torch.outer(p.diagonal(), p.diagonal()), "means are still"),
        (correlation, "R2 is its square"),
        (lambda n, t, p: covariance(n, t, p) / covariance(n, t, p).diagonal()[:, None], "slope"),
        (lambda n, t, p: torch.eye(3), "not the R2"),
        (lambda n, t, p: 0.5, r"a tensor \[k, k\]"),
    ],
)
def test_matrix_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("05.2", answer, message)


def both(a: Tensor, b: Tensor, x: Tensor) -> float:
    return r2_of(b, fitted(b, a, x))


def one(a: Tensor, b: Tensor) -> float:
    return r2_of(b, fitted(b, a))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b, x: one(a, b), "plain R2"),
        (both, "length explains as well"),
        (lambda a, b, x: both(a, b, x) - one(x, b), "divide by what the length leaves"),
        (lambda a, b, x: (both(a, b, x) - one(a, b)) / (1 - one(a, b)), "other way round"),
        (lambda a, b, x: one(a, b - fitted(b, x)), "narrow norm too"),
        (lambda a, b, x: one(a / x, b / x), "goes by regression"),
        (lambda a, b, x: 0.0, "You return 0.0000"),
    ],
)
def test_beyond_length_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("05.3", answer, message)


def same_draw(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    scaled = 0.1 * torch.rand(len(x), 1, generator=generator, dtype=x.dtype) * x
    return scaled, 1.01 * scaled


def too_much(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first, second = (torch.rand(len(x), 1, generator=generator, dtype=x.dtype) for _ in range(2))
    return first * x, second * x


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, g: (0 * x, 0 * x), "does not vary"),
        (same_draw, "draw apart for each"),
        (too_much, "make what is drawn smaller"),
        (lambda x, g: x, "a pair"),
        (lambda x, g: (x[:5], x[:5]), "the shape of x"),
    ],
)
def test_lie_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("05.4", answer, message)

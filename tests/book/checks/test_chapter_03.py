"""Exercises of chapter 03: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.book.checks.common import refused


def each_r2(y: Tensor, y_hat: Tensor) -> Tensor:
    return 1 - (y - y_hat).square().sum(0) / (y - y.mean(0)).square().sum(0)


def pooled_r2(y: Tensor, y_hat: Tensor) -> float:
    return float(1 - (y - y_hat).square().sum() / (y - y.mean(0)).square().sum())


def about_zero(y: Tensor, y_hat: Tensor) -> tuple[float, float]:
    share = (y - y_hat).square().sum(0) / y.square().sum(0)
    return float((1 - share).mean()), pooled_r2(y, y_hat)


def about_one_mean(y: Tensor, y_hat: Tensor) -> tuple[float, float]:
    total = (y - y.mean()).square().sum()
    return float(each_r2(y, y_hat).mean()), float(1 - (y - y_hat).square().sum() / total)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda y, h: (pooled_r2(y, h), float(each_r2(y, h).mean())), "swapped"),
        (about_zero, "about zero"),
        (about_one_mean, "a mean of its own"),
        (lambda y, h: (pooled_r2(y, h), pooled_r2(y, h)), "not the mean over dimensions"),
        (lambda y, h: (float(each_r2(y, h).mean()),) * 2, "before dividing"),
        (lambda y, h: pooled_r2(y, h), "a pair"),
    ],
)
def test_averages_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("03.1", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: (torch.zeros(6, 6), x.mean(0)), "map of the SAE"),
        (lambda x: (torch.eye(6), torch.zeros(6)), "returns zero; this one returns the mean"),
        (lambda x: (torch.eye(6), x.mean(0)), "sign of the bias"),
        (lambda x: (-torch.eye(6), x.mean(0)), "sign is wrong"),
        (lambda x: (torch.eye(len(x)), -x.mean(0)), r"must be \[6, 6\]"),
        (lambda x: torch.eye(6), "a pair"),
    ],
)
def test_dead_probe_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("03.2", answer, message)


def gamma(x: Tensor, x_hat: Tensor) -> float:
    return float(((x_hat * x).sum(1) / x.square().sum(1)).mean())


def centred(x: Tensor, x_hat: Tensor) -> tuple[Tensor, Tensor]:
    return x - x.mean(0), x_hat - x_hat.mean(0)


def stretch(x: Tensor, x_hat: Tensor) -> float:
    x, x_hat = centred(x, x_hat)
    return float((x * x_hat).sum() / x_hat.square().sum())


def gamma_of_sums(x: Tensor, x_hat: Tensor) -> float:
    x, x_hat = centred(x, x_hat)
    return float((x * x_hat).sum() / x.square().sum())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (gamma, "That is gamma: it also counts"),
        (stretch, "its inverse"),
        (gamma_of_sums, "gamma of the sums"),
        (lambda x, h: float(h.square().sum() / (x * h).sum()), "Centre both"),
        (lambda x, h: 0.9, "was planted"),
    ],
)
def test_shrinkage_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("03.3", answer, message)


def between(factor: Callable[[int, int], float]) -> Callable[..., Tensor]:
    def merged(
        n_a: int, mean_a: Tensor, s_a: Tensor, n_b: int, mean_b: Tensor, s_b: Tensor
    ) -> Tensor:
        return s_a + s_b + factor(n_a, n_b) * torch.outer(mean_a - mean_b, mean_a - mean_b)

    return merged


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (between(lambda a, b: 0), "forgets that the two means differ"),
        (between(lambda a, b: 1), "not once"),
        (between(lambda a, b: a * b), "Divide n_a n_b"),
        (between(lambda a, b: a + b), r"not n_a \+ n_b times"),
        (between(lambda a, b: 2.0), "not the moment of all rows"),
        (lambda *parts: 1.0, r"a tensor \[d, d\]"),
    ],
)
def test_merge_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("03.4", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda d, wanted: round(d * wanted), "fewer rows than inputs"),
        (lambda d, wanted: round(d / (1 - wanted)), "That gives 1 - R2"),
        (lambda d, wanted: d, "d \\+ 1 is the least"),
        (lambda d, wanted: 10 * d, "scores"),
        (lambda d, wanted: d / wanted, "a whole number"),
    ],
)
def test_lie_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("03.5", answer, message)

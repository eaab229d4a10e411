"""Exercises of chapter 12: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.book.checks.common import refused


def steps(n: int) -> Tensor:
    return torch.arange(n + 1)[:, None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b, step, n: a + step * steps(n) * (b - a), "divide the direction"),
        (lambda a, b, step, n: a + steps(n) / n * (b - a), "ends on the target"),
        (lambda a, b, step, n: a + step * steps(n) * b / b.norm(), "take it from the base"),
        (lambda a, b, step, n: a + step * steps(n - 1) * (b - a) / (b - a).norm(), "six points"),
        (lambda a, b, step, n: a + step * steps(n) * (a - b) / (b - a).norm(), "Point i should be"),
        (lambda a, b, step, n: 0.5, r"shape \[6, 3\]"),
    ],
)
def test_equal_steps_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("12.1", answer, message)


def weights(count: int, x: Tensor) -> Tensor:
    return torch.randn(count, len(x), dtype=x.dtype)


def isotropic(x: Tensor, count: int) -> Tensor:
    return x.mean(0) + x.var(0).mean().sqrt() * torch.randn(count, x.shape[1], dtype=x.dtype)


def independent(x: Tensor, count: int) -> Tensor:
    return x.mean(0) + x.std(0) * torch.randn(count, x.shape[1], dtype=x.dtype)


def without_mean(x: Tensor, count: int) -> Tensor:
    return weights(count, x) @ (x - x.mean(0)) / len(x) ** 0.5


def undivided(x: Tensor, count: int) -> Tensor:
    return x.mean(0) + weights(count, x) @ (x - x.mean(0))


def uncentred(x: Tensor, count: int) -> Tensor:
    return weights(count, x) @ x / len(x) ** 0.5


def inverse_root(x: Tensor, count: int) -> Tensor:
    root = torch.linalg.cholesky(torch.cov(x.T) + 1e-9 * torch.eye(x.shape[1], dtype=x.dtype))
    return x.mean(0) + torch.randn(count, x.shape[1], dtype=x.dtype) @ root


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (isotropic, "isotropic, not matched"),
        (independent, "dimensions are independent"),
        (without_mean, "about the mean"),
        (undivided, "square root of n - 1"),
        (uncentred, "variance of x|about the mean"),
        (inverse_root, "another covariance|variance of x"),
        (lambda x, count: x, r"expected \[20000, 5\]"),
    ],
)
def test_matched_draws_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("12.2", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c: float(c.diff().max() * (len(c) - 1)), "units of distance; divide"),
        (lambda c: float((c / c[-1]).diff().max()), "per step; t runs"),
        (lambda c: float((c / c[-1]).diff().max() * len(c)), "50 steps"),
        (lambda c: float(c.diff().max()), "per step and in units"),
        (lambda c: 1.0, "A straight line must give 1"),
    ],
)
def test_steepest_relative_slope_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("12.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda c: float(c[2] / c[1]) if c[2] != 2 * c[1] else 1.0, "ratio 2"),
        (lambda c: float((c[1] / c[2]).log2()), "should give 1"),
        (lambda c: float((c[2] / c[1]).log()), "should give 1"),
        (lambda c: float(c[2] / c[1]) - 1, "should give 2"),
    ],
)
def test_starting_power_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("12.4", answer, message)


def jumps(at: Tensor, steps: int) -> Tensor:
    return (torch.arange(steps + 1) >= at[:, None]).double()


def at_random(n: int, steps: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return jumps(1 + torch.randint(steps, (n,), generator=generator), steps)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda n, s: torch.linspace(0, 1, s + 1).expand(n, -1), "no plateau that"),
        (lambda n, s: jumps(torch.full((n,), s // 2), s), "at the same step"),
        (at_random, "equally often"),
        (lambda n, s: jumps(torch.arange(n) % s, s), "zero at step 0"),
        (lambda n, s: 0 * jumps(torch.ones(n), s), "ends at zero"),
        (lambda n, s: jumps(1 + torch.arange(n) % s, s).mean(0), "a row is a curve"),
    ],
)
def test_hidden_plateaus_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("12.5", answer, message)

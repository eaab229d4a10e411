"""Exercises of chapter 15: the usual mistakes are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.book.checks.common import refused


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, s: x - s / 2, "cannot be negative"),
        (lambda x, s: (x - s).relu(), "the whole penalty"),
        (lambda x, s: x.sign() * (x.abs() - s / 2).relu(), "two-sided"),
        (lambda x, s: x * (x > s / 2), "hard threshold"),
        (lambda x, s: 0.9 * x.relu(), "finds a lower loss"),
        (lambda x, s: float(x.sum()), "tensor of the shape"),
    ],
)
def test_soft_threshold_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("15.1", answer, message)


def squares(residual: Tensor) -> Tensor:
    return residual.square().sum(1).mean()


def loss(first: Tensor, second: Tensor, z: Tensor, penalty: Tensor) -> Tensor:
    return squares(z - first) + squares(z - second) + penalty.sum(1).mean()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda z, f, W, p, s: loss(f @ W, (p * f) @ W, z, s * f), "still learns"),
        (lambda z, f, W, p, s: loss(f.detach() @ W, (p * f) @ W, z, s * f), "not the codes"),
        (lambda z, f, W, p, s: loss(f @ W.detach(), (p * f) @ W, z, 0 * f), "is missing"),
        (lambda z, f, W, p, s: loss(f @ W.detach(), (p * f) @ W, z, s * p * f), "penalise p"),
        (lambda z, f, W, p, s: loss(f @ W.detach(), f @ W, z, s * f), "each a mean"),
        (lambda z, f, W, p, s: loss(f @ W, (p * f) @ W, z, s * f).detach(), "No gradient"),
        (lambda z, f, W, p, s: loss(f @ W.detach(), (p.detach() * f) @ W, z, s * f), "The gains"),
        (lambda z, f, W, p, s: 1.0, "one number as a tensor"),
    ],
)
def test_expanded_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("15.2", answer, message)


def saved(sparsity: float) -> float:
    return (2 - math.sqrt(2)) * sparsity - sparsity**2 / 4


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, t: saved(s) / math.sqrt(0.5), "weigh it with their"),
        (lambda s, t: t * saved(s), "which is not one"),
        (lambda s, t: t * (2 - math.sqrt(2)) * s / math.sqrt(0.5), "exact codes"),
        (lambda s, t: t * saved(s) / (4 * math.sqrt(2) / 3), "largest cosine alone"),
        (lambda s, t: s * t, "do not cost the same"),
    ],
)
def test_flip_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("15.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda low, high: -1.0, "alone excites"),
        (lambda low, high: 1.5, "is negative"),
        (lambda low, high: -2 * low, "do not excite"),
        (lambda low, high: -high, "Return None"),
        (lambda low, high: None, "There is a bias"),
    ],
)
def test_bias_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("15.4", answer, message)


def halved(x: Tensor) -> Tensor:
    return x.mean(0) + 0.5 * (x - x.mean(0))


def few_left_out(x: Tensor) -> Tensor:
    kept = x.clone()
    kept[:, 0] = x[:, 0].mean()
    return kept


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x: x, "x itself"),
        (halved, "length really is wrong"),
        (lambda x: torch.cat([x[:, :4], 0 * x[:, 4:]], 1), "at their mean"),
        (few_left_out, "leave more of x out"),
        (lambda x: x.mean(0).expand_as(x), "cannot be stretched"),
        (lambda x: x[:, 0], "one reconstruction for each row"),
    ],
)
def test_falsely_shrunken_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("15.5", answer, message)

"""Exercises of chapter 01: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter.leastsquares import fvu
from tests.book.checks.common import refused


def best_constant(x: Tensor) -> tuple[Tensor, float]:
    return x.mean(0), fvu(x, x.mean(0).expand_as(x))


def with_token(x: Tensor, x_hat: Tensor, new: Tensor, new_hat: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x, new]), torch.cat([x_hat, new_hat])


def ones(x: Tensor, size: float) -> Tensor:
    return size * torch.ones_like(x[:1])


MISTAKES: list[tuple[str, Callable[..., Any], str]] = [
    ("01.1", lambda x, y: (x - y).square().sum() / x.square().sum(), "about zero"),
    ("01.1", lambda x, y: ((x - y).square().mean(0) / x.var(0, correction=0)).mean(), "dimensions"),
    (
        "01.1",
        lambda x, y: ((x - y).square().sum(1) / (x - x.mean(0)).square().sum(1)).mean(),
        "mean over tokens of a ratio",
    ),
    ("01.1", lambda x, y: 1 - fvu(x, y), "share that is explained"),
    ("01.1", lambda x, y: (x - y).square().sum() / (x - x.mean()).square().sum(), "one mean over"),
    ("01.1", lambda x, y: fvu(x, y) ** 0.5, "divided lengths"),
    ("01.1", lambda x, y: (x - y).square().mean(), "divide the sum"),
    ("01.1", lambda x, y: (x - y).square(), "expected one number"),
    ("01.1", lambda x, y: None, "returns nothing"),
    ("01.2", lambda f: f.sum(1).mean(), "L1 norm"),
    ("01.2", lambda f: (f > 0).float().mean(), "share of latents"),
    ("01.2", lambda f: (f > 0).sum(), "over all tokens"),
    ("01.2", lambda f: (f > 0).sum(0).float().mean(), "averaged over latents"),
    ("01.2", lambda f: (f > 0).sum(1), "expected one number"),
    ("01.2", lambda f: 3.0, "on a small code"),
    ("01.3", lambda x: x.mean(0), "return two things"),
    ("01.3", lambda x: (x.mean(), 1.0), "one number a dimension"),
    ("01.3", lambda x: (torch.zeros(4), 1.0), "zero vector"),
    ("01.3", lambda x: (x.median(0).values, 1.0), "median"),
    ("01.3", lambda x: (x[0], 1.0), "a smaller one exists"),
    ("01.3", lambda x: (x.mean(0), 0.0), "predict it for every row"),
    ("01.4", lambda x, y: (x * y).sum() / (x.norm() * y.norm()), "all numbers together"),
    ("01.4", lambda x, y: torch.cosine_similarity(x, y, dim=0).mean(), "each dimension"),
    ("01.4", lambda x, y: (x * y).sum(1).mean(), "mean dot product"),
    ("01.4", lambda x, y: torch.cosine_similarity(x, y), "expected one number"),
    (
        "01.4",
        lambda x, y: (x * y).sum(1).mean() / (x.norm(dim=1) * y.norm(dim=1)).mean(),
        "token by token",
    ),
    (
        "01.4",
        lambda x, y: torch.cosine_similarity(x - x.mean(0), y - y.mean(0)).mean(),
        "took the means off",
    ),
    ("01.4", lambda x, y: 0.5, "on the planted rows"),
    ("01.5", lambda x, y: x, "return two things"),
    ("01.5", lambda x, y: (x, x), "one row more"),
    ("01.5", lambda x, y: with_token(x, x, ones(x, 1e4), ones(x, 1e4)), "must stay as they are"),
    ("01.5", lambda x, y: with_token(x, y, ones(x, 10), ones(x, 10)), "too close to the others"),
    ("01.5", lambda x, y: with_token(x, y, ones(x, 1e4), ones(x, 0)), "error of its own"),
]


@pytest.mark.parametrize(("id", "answer", "message"), MISTAKES)
def test_a_usual_mistake_is_named(id: str, answer: Callable[..., Any], message: str) -> None:
    refused(id, answer, message)


def test_a_score_that_notices_a_halved_x_hat_is_no_cosine() -> None:
    asked: list[float] = []

    def changing(x: Tensor, x_hat: Tensor) -> float:
        asked.append(float(torch.nn.functional.cosine_similarity(x, x_hat).mean()))
        return asked[-1] / len(asked)

    refused("01.4", changing, "halving x_hat changes")

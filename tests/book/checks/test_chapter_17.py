"""Exercises of chapter 17: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.book.checks.common import refused


def kept(flat: Tensor, k: int) -> Tensor:
    best = flat.topk(k, dim=-1)
    return torch.zeros_like(flat).scatter(-1, best.indices, best.values)


def of_batch(pre: Tensor, count: int) -> Tensor:
    return kept(pre.flatten(), count).view_as(pre)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda pre, k: kept(pre.relu(), k), "which is TopK"),
        (lambda pre, k: of_batch(pre.relu(), k), "for each of the n tokens"),
        (lambda pre, k: (of_batch(pre.relu(), k * len(pre)) > 0).double(), "not ones"),
        (lambda pre, k: of_batch(pre, k * len(pre)), "codes are at least 0"),
        (lambda pre, k: pre.relu(), "not the k n largest"),
        (lambda pre, k: 3.0, "tensor of the shape"),
    ],
)
def test_batch_topk_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("17.1", answer, message)


def loss(x: Tensor, f: Tensor, W: Tensor, b: Tensor | float, low: int, high: int) -> Tensor:
    return (x - f[:, low:high] @ W[low:high] - b).square().sum(1).mean()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, f, W, b, widths: loss(x, f, W, b, 0, 8), "full width alone"),
        (
            lambda x, f, W, b, widths: sum(loss(x, f, W, b, 0, w) for w in widths) / 3,
            "mean over widths",
        ),
        (lambda x, f, W, b, widths: sum(loss(x, f, W, 0.0, 0, w) for w in widths), "bias"),
        (
            lambda x, f, W, b, widths: sum(
                loss(x, f, W, b, a, w) for a, w in zip([0, *widths], widths, strict=False)
            ),
            "slices",
        ),
        (
            lambda x, f, W, b, widths: sum(loss(x, f, W, b, 0, w) for w in widths) / 5,
            "sum over dimensions",
        ),
        (lambda x, f, W, b, widths: 0.0, "sum over widths"),
    ],
)
def test_matryoshka_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("17.2", answer, message)


def pursued(x: Tensor, W: Tensor, k: int, add: bool, positive: bool) -> Tensor:
    rest, code, rows = x.clone(), x.new_zeros(len(x), len(W)), torch.arange(len(x))
    for _ in range(k):
        products = rest @ W.T
        value, latent = products.max(1) if positive else (None, products.abs().argmax(1))
        value = products[rows, latent] if value is None else value.relu()
        code[rows, latent] = value + (code[rows, latent] if add else 0.0)
        rest = rest - value[:, None] * W[latent]
    return code


def in_place(x: Tensor, W: Tensor, k: int) -> Tensor:
    x -= x @ W.T @ W
    return x @ W.T


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda x, W, k: kept((x @ W.T).relu(), k), "look at what is left"),
        (lambda x, W, k: pursued(x, W, k, add=False, positive=True), "add to its code"),
        (lambda x, W, k: pursued(x, W, k, add=True, positive=False), "below zero adds nothing"),
        (lambda x, W, k: pursued(x, W, k - 1, add=True, positive=True), "matching pursuit"),
        (in_place, "changes x itself"),
        (lambda x, W, k: x, "codes, one row"),
    ],
)
def test_pursuit_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("17.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda a, b: torch.nn.functional.cosine_similarity(a, b, dim=1).mean(),
            "mean of the tokens' cosines",
        ),
        (
            lambda a, b: (a * b).sum(),
            "product of the two lengths",
        ),
        (lambda a, b: (a * b).sum() / (a.norm() * b.norm()) ** 2, "not by their squares"),
        (
            lambda a, b: (
                ((a - a.mean(0)) * (b - b.mean(0))).sum()
                / ((a - a.mean(0)).norm() * (b - b.mean(0)).norm())
            ),
            "means are not removed",
        ),
    ],
)
def test_cosine_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("17.4", answer, message)


def shared(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return noise, noise.clone()


def apart(x: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    first, second = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for _ in range(2))
    return x + first, x + second


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (apart, "the same constant vector"),
        (shared, "apart"),
        (lambda x, g: (0 * x, 0 * x), "do miss the same"),
        (lambda x, g: (x - x.mean(0), x - x.mean(0)), "the same for every token"),
        (lambda x, g: x, "a pair of reconstructions"),
        (lambda x, g: (x[:3], x[:3]), "the shape of x"),
    ],
)
def test_seemingly_alike_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("17.5", answer, message)

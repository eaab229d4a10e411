"""Exercises of chapter 14: the usual mistakes are named."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.book.checks.common import refused


def cosines(directions: Tensor) -> Tensor:
    units = normalize(directions, dim=1)
    return units @ units.T


def kth(values: Tensor, k: int) -> Tensor:
    return values.topk(k, dim=1).values[:, -1]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, k: kth(cosines(w), k), "its own nearest"),
        (lambda w, k: kth(cosines(w).abs().fill_diagonal_(-1), k), "absolute cosines"),
        (lambda w, k: kth((w @ w.T).fill_diagonal_(-torch.inf), k), "unit length first"),
        (lambda w, k: -kth((-cosines(w)).fill_diagonal_(-2), k), "the farthest"),
        (lambda w, k: kth(cosines(w).fill_diagonal_(-1), k + 1), "of rank 1"),
        (lambda w, k: cosines(w), r"a tensor \[m\]"),
    ],
)
def test_neighbour_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("14.1", answer, message)


def squares(u: Tensor) -> float:
    return float((u.T @ u).square().sum())


def all_pairs(u: Tensor) -> float:
    off = (u @ u.T).fill_diagonal_(0)
    return float((off.square().sum() / (len(u) * (len(u) - 1))).sqrt())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda u: math.sqrt(squares(u) / len(u) ** 2), "pairs of a row with itself in"),
        (lambda u: math.sqrt((squares(u) - len(u)) / len(u) ** 2), "still in the count"),
        (lambda u: math.sqrt(squares(u) / (len(u) * (len(u) - 1))), "still in the sum"),
        (lambda u: (squares(u) - len(u)) / (len(u) * (len(u) - 1)), "take the root"),
        (lambda u: float((u @ u.T).fill_diagonal_(0).abs().sum()) / 42, "mean absolute"),
        (lambda u: 0.5, "not the root mean square"),
    ],
)
def test_pairs_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("14.2", answer, message)


def test_pairs_in_one_matrix_run_out_of_memory() -> None:
    def greedy(u: Tensor) -> float:
        # What torch says of 500,000 x 500,000 numbers, without asking a machine for them.
        if len(u) > 10_000:
            raise RuntimeError("not enough memory: you tried to allocate 2000000000000 bytes.")
        return all_pairs(u)

    refused("14.2", greedy, "out of memory")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m, d, s: (math.floor(s**2 * d), math.floor(s**2 * d / 8 / math.log(m))), "swapped"),
        (
            lambda m, d, s: (math.floor(s**2 * d / 8 / math.log(m)), math.floor(s * d)),
            "must be squared",
        ),
        (lambda m, d, s: (math.floor(d / 8 / math.log(m)), d), "left out the margin"),
        (
            lambda m, d, s: (math.floor(s**2 * d / 8 / math.log10(m)), math.floor(s**2 * d)),
            "natural one",
        ),
        (
            lambda m, d, s: (math.ceil(s**2 * d / 8 / math.log(m)), math.floor(s**2 * d)),
            "Round down",
        ),
        (
            lambda m, d, s: (math.floor((s**2 * d / 8 / math.log(m)) ** 0.5), math.floor(s**2 * d)),
            "not for its root",
        ),
        (lambda m, d, s: (s**2 * d / 8 / math.log(m), s**2 * d), "whole numbers"),
        (lambda m, d, s: 9, "a pair"),
    ],
)
def test_active_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("14.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, b, t: (b @ a.T).amax(1) >= t, "have a parent"),
        (lambda a, b, t: (b @ a.T).abs().amax(1) < t, "opposite"),
        (lambda a, b, t: ((b @ a.T) < t).any(1), "far from every"),
        (lambda a, b, t: (b @ a.T).amax(0) < t, "each narrow latent"),
        (lambda a, b, t: (b @ a.T).amax(1), "boolean"),
        (lambda a, b, t: torch.zeros(3, dtype=torch.bool), r"expected \[13\]"),
        (lambda a, b, t: torch.zeros(13, dtype=torch.bool), "without a parent"),
    ],
)
def test_new_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("14.4", answer, message)


def twins(m: int, d: int, generator: torch.Generator) -> Tensor:
    first = torch.randn(m // 2, d, generator=generator)
    return torch.cat([first, first + 0.1 * torch.randn(m // 2, d, generator=generator)])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda m, d, g: torch.randn(m, d, generator=g), "more variance"),
        (lambda m, d, g: 7 * torch.randn(m, d, generator=g), "a third more is asked for"),
        (twins, "really are crowded"),
        (lambda m, d, g: torch.zeros(m, d), "zero or not finite"),
        (lambda m, d, g: torch.randn(d, m, generator=g), r"a tensor \[m, d\]"),
    ],
)
def test_seemingly_crowded_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("14.5", answer, message)

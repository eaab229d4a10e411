"""Exercises of chapter 08: typical mistakes are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.book.checks.common import refused


def centred(t: Tensor) -> Tensor:
    return t - t.mean(0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda t: t / t.norm(dim=1, keepdim=True), "mean is not zero"),
        (lambda t: centred(t) / t.std(0), "every dimension by itself"),
        (lambda t: centred(t) / centred(t).square().sum(1).mean().sqrt(), "it should be d"),
        (lambda t: centred(t) * 3, "not d = 4"),
        (lambda t: t.mean(0), "a tensor of shape"),
    ],
)
def test_equal_size_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("08.1", answer, message)


def noise(t: Tensor, generator: torch.Generator, factor: Tensor) -> Tensor:
    draws = torch.randn(t.shape, generator=generator, dtype=t.dtype)
    return t.mean(0) + draws @ factor


def lower(t: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.cov(t.T))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda t, g: noise(t, g, torch.diag(t.std(0))), "independent"),
        (lambda t, g: noise(t, g, lower(t)), "wrong way round"),
        (lambda t, g: noise(t, g, torch.cov(t.T)), "covariance itself"),
        (lambda t, g: noise(t, g, lower(t).T) - t.mean(0), "mean is zero"),
        (lambda t, g: t[torch.randperm(len(t), generator=g)], "another order"),
        (lambda t, g: noise(t, torch.Generator().manual_seed(0), lower(t).T), "is passed"),
    ],
)
def test_matched_noise_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("08.2", answer, message)


def by_value(activation: Tensor) -> Tensor:
    group = (1 + 10 * activation / activation.max()).clamp(max=10).long()
    return torch.where(activation > 0, group, 0)


def once_sorted(activation: Tensor) -> Tensor:
    group = torch.zeros(len(activation), dtype=torch.int64)
    active = activation > 0
    group[active] = 1 + activation[active].argsort() // 4
    return group


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a: 1 + a.argsort().argsort() // 10, "active rows only"),
        (by_value, "cut by value"),
        (once_sorted, "not in order|should hold the strongest"),
        (lambda a: [1, 2, 3], "one group for each row"),
    ],
)
def test_decile_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("08.3", answer, message)


def shares(said: list[Any], group: list[int], drop: bool = False, guess: Any = None) -> list[float]:
    """Share right in groups 0 to 10; None dropped, or taken for `guess`."""
    found: list[float] = []
    for wanted in range(11):
        mine = [s for s, g in zip(said, group, strict=True) if g == wanted]
        mine = [s for s in mine if s is not None or not drop]
        mine = [guess if s is None else s for s in mine]
        found.append(sum(s is not None and s == (wanted > 0) for s in mine) / len(mine))
    return found


def balanced(found: list[float]) -> float:
    return (sum(found[1:]) / 10 + found[0]) / 2


def accuracy(said: list[Any], group: list[int]) -> float:
    right = [s is not None and s == (g > 0) for s, g in zip(said, group, strict=True)]
    return sum(right) / len(right)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (accuracy, "over all questions"),
        (lambda s, g: sum(shares(s, g)) / 11, "eleven groups"),
        (lambda s, g: balanced(shares(s, g, drop=True)), "left the unusable"),
        (lambda s, g: balanced(shares(s, g, guess=False)), "None for silent"),
        (lambda s, g: sum(shares(s, g)[1:]) / 10, "are missing"),
        (lambda s, g: 0.7, "It is not the mean"),
    ],
)
def test_balanced_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("08.4", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda said, group: said, "Nothing was withdrawn"),
        (lambda said, group: [g > 0 for g in group], "may only decline"),
        (lambda said, group: [None] * len(said), "No usable answer is left in group 1"),
        (lambda said, group: [s if s else None for s in said], "left in group 0|withdraw those"),
        (lambda said, group: [None, *said[1:]], "withdraw those that are wrong"),
        (lambda said, group: said[:5], "each of the 400"),
    ],
)
def test_silenced_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("08.5", answer, message)

"""Typical wrong answers to the exercises of chapter 13."""

# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.book.checks.common import refused


def picked(active: list[int], f: Tensor, itself: bool, dead: bool, twice: bool) -> list[int]:
    used: list[int] = []
    for i in active:
        order = (f - f[i]).abs().argsort(stable=True).tolist()
        used.append(
            next(
                j
                for j in order
                if (itself or j != i) and (dead or f[j] > 0) and (twice or j not in used)
            )
        )
    return used


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda active, f: picked(active, f, True, False, False), "stands for itself"),
        (lambda active, f: picked(active, f, False, True, False), "never fires"),
        (lambda active, f: picked(active, f, False, False, True), "used twice"),
        (lambda active, f: [4, 3, 6], "not the nearest in frequency"),
        (lambda active, f: 3, "a list of 3"),
    ],
)
def test_stand_ins_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("13.1", answer, message)


def matched(active: list[int], top: int, c: int, rows: Tensor, sign: bool = True) -> list[int]:
    used: list[int] = []
    for i in active:
        have, want = rows @ rows[c], rows[top] @ rows[i]
        off = (have - want).abs() if sign else (have.abs() - want.abs()).abs()
        used.append(next(j for j in off.argsort().tolist() if j not in used))
    return used


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, top, c, w: matched(a, top, top, unit(w)), "about top itself"),
        (lambda a, top, c, w: matched(a, top, c, w), "inner products"),
        (lambda a, top, c, w: matched(a, top, c, unit(w), sign=False), "with their sign"),
        (lambda a, top, c, w: [c] * 4, "used twice"),
        (lambda a, top, c, w: matched(a[::-1], top, c, unit(w)), "in order"),
    ],
)
def test_match_cosines_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("13.2", answer, message)


def signed(a: list[float], b: list[float]) -> float:
    at = sorted({*a, *b})
    return max(sum(v <= x for v in a) / len(a) - sum(v <= x for v in b) / len(b) for x in at)


def at_first_only(a: list[float], b: list[float]) -> float:
    at = sorted({*a, *b})[:2]
    return max(abs(sum(v < x for v in a) / len(a) - sum(v < x for v in b) / len(b)) for x in at)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (signed, "absolute difference"),
        (lambda a, b: abs(sum(a) / len(a) - sum(b) / len(b)), "difference of the means"),
        (at_first_only, "at most x"),
    ],
)
def test_ks_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("13.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda code, w: (unit(w[code != 0]) @ unit(w[code != 0]).T).mean(), "no pair"),
        (lambda code, w: ((unit(w) @ unit(w).T).sum() - 40) / (40 * 39), "active ones only"),
        (
            lambda code, w: ((g := w[code != 0] @ w[code != 0].T).sum() - g.trace()) / 12,
            "inner products",
        ),
        (lambda code, w: torch.tensor(0.5), "over pairs"),
    ],
)
def test_pairwise_cosine_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("13.4", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda real, g: real, "in their own places"),
        (lambda real, g: real.mean() + 0 * real, "same values in any order"),
        (lambda real, g: torch.randn(300, generator=g), "same values in any order"),
        (lambda real, g: real + 0.1, "knows something"),
        (lambda real, g: real[:10], "one value for each prompt"),
    ],
)
def test_perfect_by_ks_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("13.5", answer, message)

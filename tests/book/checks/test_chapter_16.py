"""Exercises of chapter 16: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter.book.checks.chapter_16 import first_order, vectors
from tests.book.checks.common import refused


def layer_norm(x: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=0.0)


def test_first_order_is_the_derivative_of_layer_norm() -> None:
    # A difference quotient, of which the next order is 1e-5 of the first.
    e, c = vectors()
    quotient = layer_norm(1e5 * e + c) - layer_norm(e)
    expected = first_order(e, c, 1e5)
    assert float((quotient - expected).norm()) < 1e-4 * float(expected.norm())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda e, c, _s: first_order(e, c, 1.0), "does not depend on s"),
        (lambda e, c, s: first_order(e, c, s) / 8**0.5, r"sqrt\(d\) is missing"),
        (lambda e, c, s: first_order(e, c, s, across=False), "along e must go"),
        (lambda e, c, s: first_order(e, c, s, centre=False), "centre both"),
        (lambda e, c, s: c / s, "This is not"),
        (lambda e, c, s: c.norm(dim=1), "shape"),
    ],
)
def test_squeezing_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("16.1", answer, message)


def divided(residual: Tensor, at: Tensor, _vector: Tensor, s: float) -> Tensor:
    out = residual.clone()
    out[torch.arange(len(out)), at] /= s
    return out


def emptied(residual: Tensor, at: Tensor, vector: Tensor, s: float) -> Tensor:
    out = residual.clone()
    out[torch.arange(len(out)), at] -= s * vector
    return out


def in_place(residual: Tensor, at: Tensor, vector: Tensor, s: float) -> Tensor:
    residual[torch.arange(len(residual)), at] -= (s - 1) * vector
    return residual


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (divided, "divide the whole residual"),
        (emptied, "nothing of the token is left"),
        (lambda r, at, v, s: r - (s - 1) * v[:, None], "every position"),
        (in_place, "The argument was changed"),
        (lambda r, at, v, s: r, "not that of a factor of one"),
    ],
)
def test_rescue_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("16.2", answer, message)


def divergences(log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_p.exp().mean(1, keepdim=True).log())).sum(-1)


def of_logs(log_p: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_p.mean(1, keepdim=True))).sum(-1).mean(1)


def backwards(log_p: Tensor) -> Tensor:
    mixture = log_p.exp().mean(1, keepdim=True)
    return (mixture * (mixture.log() - log_p)).sum(-1).mean(1)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (of_logs, "averaged log-probabilities"),
        (lambda p: divergences(p).sum(1), "take the mean"),
        (lambda p: divergences(p).mean(1) / torch.tensor(2.0).log(), "bits"),
        (backwards, "wrong way round"),
        (lambda p: divergences(p).mean(), "shape"),
    ],
)
def test_nats_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("16.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda a, t: "not found" if a < 0.5 else "intact", "Ask for told first"),
        (lambda a, t: "intact" if t > 0.5 else "not read", "One half"),
        (lambda a, t: "intact" if t >= 0.5 else "not found", "looks at the token as before"),
        (lambda a, t: "intact" if t >= 0.5 else "not read", "Neither"),
        (
            lambda a, t: "intact" if t >= 0.5 else "not found" if a <= 0.5 else "not read",
            "not below one half",
        ),
    ],
)
def test_diagnosis_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("16.4", answer, message)


def certain(vocabulary: int, token: int, size: float = 20.0) -> Tensor:
    return size * (torch.arange(vocabulary) == token).double()


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda v: (certain(v, 1), certain(v, 1)), "the same token"),
        (lambda v: (certain(v, 1), certain(v, 2)), "what softmax cannot see"),
        (lambda v: (1000 + certain(v, 1, 1.0), 1000 + certain(v, 2, 1.0)), "more certain"),
        (lambda v: (certain(v, 1, torch.inf), certain(v, 2)), "finite"),
        (lambda v: certain(v, 1), "a pair of logits"),
    ],
)
def test_cosine_of_logits_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("16.5", answer, message)

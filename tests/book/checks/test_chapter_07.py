"""Exercises of chapter 07: typical wrong answers are refused with what is wrong about them."""

# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# The answers are callables of any signature, so a lambda has nothing to be inferred from.
from __future__ import annotations

import torch
from torch import Tensor

from tests.book.checks.common import refused


def test_planted_share() -> None:
    def shares(level: float, unit: float, d: int, variance: float) -> tuple[float, float]:
        noises = d * (level * unit) ** 2, d * level * unit**2
        return noises[0] / (variance + noises[0]), noises[1] / (variance + noises[1])

    refused("07.1", lambda *given: shares(*given)[::-1], "The two are swapped")
    refused(
        "07.1",
        lambda level, unit, d, v: (d * (level * unit) ** 2 / v, d * level * unit**2 / v),
        "add the noise to it",
    )
    refused("07.1", lambda level, unit, d, v: shares(level, unit, 1, v), "noise comes in d times")
    refused(
        "07.1",
        lambda level, unit, d, v: (shares(level, unit, d, v)[0], shares(level, unit**0.5, d, v)[1]),
        "The unit is a standard deviation under both",
    )
    refused("07.1", lambda *given: shares(*given)[0], "Return a pair")


def test_recognised() -> None:
    refused("07.2", lambda s, n: (n / (s + n)).mean(), "That is the mean over dimensions")
    refused("07.2", lambda s, n: n.sum() / (s + n).sum(), "total variances only")
    refused("07.2", lambda s, n: (n * s / (s + n)).sum() / n.sum(), "what is not recognised")
    refused(
        "07.2",
        lambda s, n: ((n / (s + n)).square() * n).sum() / n.sum(),
        "so its variance has both",
    )


def mask(latents: Tensor, m: int) -> Tensor:
    chosen = torch.zeros(m, dtype=torch.bool)
    chosen[latents] = True
    return chosen


def test_rarest() -> None:
    def by_count(codes: Tensor, k: int) -> Tensor:
        return mask((codes > 0).sum(0).argsort(stable=True)[:k], codes.shape[1])

    def where_active(codes: Tensor, k: int) -> Tensor:
        mean = codes.sum(0) / (codes > 0).sum(0).clamp(min=1)
        return mask(mean.argsort(stable=True)[:k], codes.shape[1])

    def largest(codes: Tensor, k: int) -> Tensor:
        return mask(codes.mean(0).argsort(descending=True)[:k], codes.shape[1])

    refused("07.3", by_count, "Those are the least frequent")
    refused("07.3", where_active, "the mean where a latent is active")
    refused("07.3", largest, "Those are the largest means")
    refused("07.3", lambda codes, k: codes.mean(0).argsort()[:k], "Return a bool tensor")


def test_hidden_noise() -> None:
    def drawn(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=x.dtype)

    def isotropic(x: Tensor) -> Tensor:
        return drawn(x) * (0.05 * x.var(0).mean()).sqrt()

    refused("07.4", isotropic, "is recognised where x is small")
    refused("07.4", lambda x: 0.05**0.5 * (x - x.mean(0)), "it must be uncorrelated with x")
    refused(
        "07.4",
        lambda x: 0.05 * drawn(x)[:, :1] * (x - x.mean(0)),
        "a twentieth is asked for",
    )
    refused("07.4", lambda x: x[:, 0], "Return noise of the shape of x")

"""Exercises of chapter 19: typical wrong answers are refused with what is wrong about them."""

# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# The answers are callables of any signature, so a lambda has nothing to be inferred from.
from __future__ import annotations

import torch
from torch import Tensor

from tests.book.checks.common import refused


def test_fvu_from_sums() -> None:
    refused("19.1", lambda n, s, x2, e2: e2 / x2, "about zero")
    refused("19.1", lambda n, s, x2, e2: e2 / (x2 - s.square().sum()), "divide it by n")
    refused("19.1", lambda n, s, x2, e2: e2 / (x2 - (s / n).square().sum()), "from every token")
    refused("19.1", lambda n, s, x2, e2: e2 / (x2 - s.sum() ** 2 / n), "you added first")
    refused("19.1", lambda n, s, x2, e2: 1 - e2 / (x2 - s.square().sum() / n), "share explained")


def test_without_flattery() -> None:
    refused("19.2", lambda r, n, d: 1 - (1 - r) * (n - d - 1) / (n - 1), "flatters twice")
    refused("19.2", lambda r, n, d: r - d / (n - 1), "where there is nothing to find")
    refused("19.2", lambda r, n, d: 1 - (1 - r) * n / (n - d), "the intercept takes a row")


def test_fair_split() -> None:
    def tokens(document: Tensor, generator: torch.Generator) -> Tensor:
        return torch.rand(len(document), generator=generator) < 0.6

    def smallest(document: Tensor, generator: torch.Generator) -> Tensor:
        return document < 42

    def threshold(document: Tensor, generator: torch.Generator) -> Tensor:
        return document < 0.6 * document.max() + 20

    refused("19.3", tokens, "you dealt tokens, not documents")
    refused("19.3", smallest, "Every generator gives the same split")
    refused("19.3", threshold, "expected about six")
    refused("19.3", lambda document, generator: document, "Return a boolean tensor")


def test_looks_better() -> None:
    def about_mean(gain: float, x_hat: Tensor) -> Tensor:
        return x_hat.mean(0) + gain * (x_hat - x_hat.mean(0))

    refused("19.4", lambda x_hat: x_hat, "as it was")
    refused("19.4", lambda x_hat: about_mean(0.5, x_hat), "the square of the gain")
    refused("19.4", lambda x_hat: about_mean(0.9, x_hat), "not 0.5")
    refused("19.4", lambda x_hat: 0.5**0.5 * x_hat, "The mean moved")
    refused("19.4", lambda x_hat: about_mean(0.0, x_hat), "Nearly nothing is left")

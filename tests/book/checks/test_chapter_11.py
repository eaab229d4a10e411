"""Exercises of chapter 11: typical wrong answers are refused with what is wrong about them."""

# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# The answers are callables of any signature, so a lambda has nothing to be inferred from.
from __future__ import annotations

import torch
from torch import Tensor

from tests.book.checks.common import refused


def test_share_gone() -> None:
    def ratio(a: Tensor, b: Tensor) -> float:
        return float(b.square().sum() / a.square().sum())

    refused("11.1", ratio, "That is the share that is left")
    refused("11.1", lambda a, b: 1 - ratio(a, b) ** 0.5, "That compares lengths")
    refused("11.1", lambda a, b: (1 - (b**2).sum(1) / (a**2).sum(1)).mean(), "averages over tokens")
    refused("11.1", lambda a, b: 1 / ratio(a, b) - 1, "Divide by what is left after x alone")


def test_bar_of_its_own() -> None:
    def explained(n: Tensor, s: Tensor) -> Tensor:
        return n @ torch.linalg.solve(s, n)

    def dims(n: Tensor, s: Tensor) -> float:
        return float((explained(n, s).diagonal() / n.diagonal()).mean())

    refused("11.2", lambda n, s: n.trace() / s.trace(), "That is the size of the nonlinear error")
    refused("11.2", dims, "That is the mean over dimensions")
    refused("11.2", lambda n, s: explained(n, s).trace(), "divide by the trace of N")
    refused(
        "11.2",
        lambda n, s: 1 - explained(n, s).trace() / n.trace(),
        "That is the share that is left",
    )


def test_other_documents() -> None:
    def random(document: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randperm(len(document), generator=generator)

    def rolled(document: Tensor) -> Tensor:
        return torch.arange(len(document)).roll(len(document) // 2)

    refused("11.3", random, "rows have a partner of their own document")
    refused("11.3", rolled, "rows have a partner of their own document")
    refused("11.3", lambda document: document.argsort() * 0, "Every row must be a partner exactly")
    refused("11.3", lambda document: document[:3], "Return an int tensor")


def test_perfect_help() -> None:
    refused("11.4", lambda x, x_hat: x - x_hat, "That is the error itself")
    refused("11.4", lambda x, x_hat: x, "x alone predicts nothing")
    refused("11.4", lambda x, x_hat: x_hat, "the nonlinear error is a part of it")
    refused("11.4", lambda x, x_hat: x[:, 0], "Return a tensor")
    refused(
        "11.4", lambda x, x_hat: torch.cat([x, x_hat[:, :2]], 1), "Held out your regressors score"
    )

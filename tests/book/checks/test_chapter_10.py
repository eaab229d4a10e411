"""Exercises of chapter 10: typical mistakes are told apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from darkmatter.errors import split_error
from darkmatter.leastsquares import fvu
from darkmatter.sparse import SparseCode
from tests.book.checks.common import refused


def step(length: str, active: str, clip: bool) -> Callable[..., Tensor]:
    """One step of gradient pursuit, with a mistake in it."""

    def answer(signal: Tensor, weights: Tensor, atoms: Tensor) -> Tensor:
        residual = signal - weights @ atoms
        correlation = residual @ atoms.T
        new = torch.zeros_like(weights, dtype=torch.bool)
        new[torch.arange(len(signal)), correlation.argmax(1)] = True
        of = {"right": new | (weights != 0), "new": new, "all": torch.ones_like(new)}[active]
        gradient = correlation * of
        along = gradient @ atoms
        exact = (along * residual).sum(1, keepdim=True) / along.square().sum(1, keepdim=True)
        moved = weights + (exact if length == "exact" else 1.0) * gradient
        return moved.clamp(min=0) if clip else moved

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (step("exact", "all", True), "gradient counts on the active atoms only"),
        (step("exact", "new", True), "that is matching pursuit"),
        (step("one", "right", True), "step has length one"),
        (step("exact", "right", False), "A weight is negative"),
        (lambda signal, weights, atoms: weights + 0 * atoms[:, 0], "differ from the rule"),
        (lambda signal, weights, atoms: weights[:1], r"Return the new weights, \[n, m\]"),
    ],
)
def test_step_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("10.1", answer, message)


def error(sign: int = 1, linear: bool = True, own_map: bool = True, fit: bool = True) -> Any:
    """The encoder error, with a mistake in it."""

    def answer(
        x_fit: Tensor, sae_fit: Tensor, pursuit_fit: Tensor, x: Tensor, sae: Tensor, pursuit: Tensor
    ) -> float:
        left = []
        for hat_fit, hat in ((sae_fit, sae), (pursuit_fit if own_map else sae_fit, pursuit)):
            source = sae if not own_map else hat
            parts = split_error(x_fit if fit else x, hat_fit if fit else hat, x, source)
            left.append(fvu(x, hat + parts.linear if linear else hat))
        return sign * (left[0] - left[1])

    return answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (error(linear=False), "difference of the whole FVUs"),
        (error(own_map=False), "It has another error: fit its own"),
        (error(fit=False), "fitted on the rows they are scored on"),
        (error(sign=-1), "sign is turned round"),
    ],
)
def test_encoder_error_typical_mistakes(answer: Any, message: str) -> None:
    refused("10.2", answer, message)


def padded(code: SparseCode, other: SparseCode) -> float:
    same = (code.indices[:, :, None] == other.indices[:, None, :]).any(2)
    return float(same.float().mean())


def by_row(code: SparseCode, other: SparseCode) -> float:
    dense, more = code.dense(8) != 0, other.dense(8) != 0
    return float(((dense & more).sum(1) / dense.sum(1)).mean())


def jaccard(code: SparseCode, other: SparseCode) -> float:
    dense, more = code.dense(8) != 0, other.dense(8) != 0
    return float((dense & more).sum() / (dense | more).sum())


def without_latent_zero(code: SparseCode, other: SparseCode) -> float:
    dense, more = code.dense(8) != 0, other.dense(8) != 0
    both = dense & more
    both[:, 0] = False
    return float(both.sum() / dense.sum())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (padded, "You counted padding"),
        (by_row, "mean over rows"),
        (jaccard, "share of all latents that either uses"),
        (without_latent_zero, "Latent 0 is a latent like others"),
    ],
)
def test_agreement_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("10.3", answer, message)


def free(s: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    sa, sb, ab = float(s @ a), float(s @ b), float(a @ b)
    return (sa - ab * sb) / (1 - ab**2), (sb - ab * sa) / (1 - ab**2)


def clipped(s: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    wa, wb = free(s, a, b)
    return max(wa, 0.0), max(wb, 0.0)


def one_side(s: Tensor, a: Tensor, b: Tensor) -> tuple[float, float]:
    wa, wb = free(s, a, b)
    return (max(wa, 0.0), wb) if wb >= 0 else (max(float(s @ a), 0.0), 0.0)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda s, a, b: (float(s @ a), float(s @ b)), "projections on each atom alone"),
        (free, "A weight is negative"),
        (clipped, "kept the other one that belonged to it"),
        (one_side, "not when a does"),
    ],
)
def test_two_weights_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("10.4", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (torch.eye, "Your 12 atoms explain"),
        (lambda d: torch.randn(100, d), "Not every atom has length one"),
        (lambda d: normalize(torch.randn(5001, d), dim=1), "at most 5000"),
        (lambda d: torch.eye(d)[:, :5], r"Return atoms \[m, 12\]"),
    ],
)
def test_noise_typical_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("10.5", answer, message)

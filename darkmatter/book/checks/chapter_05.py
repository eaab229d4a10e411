"""Exercises of chapter 05: error norms of one SAE from those of another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.scaling import per_token_scaling


def norms(seed: int, n: int = 400) -> Tensor:
    """Three columns: two error norms and the length, which is in both."""
    drawn = torch.randn(
        n, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).unbind(1)
    length = 60 + 8 * drawn[0]
    common = drawn[1]
    narrow = 0.6 * length + 5 * common + 3 * drawn[2]
    wide = 0.4 * length + 4 * common + 4 * drawn[3]
    return torch.stack([narrow, wide, length], 1)


def near(a: float, b: float, tolerance: float = 1e-6) -> bool:
    """Whether two numbers agree to an absolute tolerance."""
    return abs(float(a) - b) <= tolerance


def fitted(y: Tensor, *regressors: Tensor) -> Tensor:
    """In-sample least squares prediction of y from regressors and an offset."""
    design = torch.stack([*regressors, torch.ones_like(y)], 1)
    return design @ torch.linalg.lstsq(design, y[:, None]).solution[:, 0]


def r2_of(y: Tensor, y_hat: Tensor) -> float:
    """1 - RSS / TSS, TSS about the mean."""
    return float(1 - (y - y_hat).square().sum() / (y - y.mean()).square().sum())


@exercise(
    "05.1", difficulty=1, minutes=8, teaches="Fit on one pile of documents, score on another."
)
def norm_from_norm(answer: Callable[..., Any]) -> str:
    """Fit and test differ in slope and mean, so each mistake gives another number."""
    fit, test = norms(1)[:, :2], norms(2, 150)[:, :2]
    # Other documents: longer errors, and a wide SAE that follows less closely.
    test = test + torch.tensor([3.0, 5.0], dtype=torch.float64)
    (a, b), (c, d) = fit.unbind(1), test.unbind(1)
    given = float(answer(a, b, c, d))
    assert not near(given, r2_of(d, fitted(d, c))), (
        "That is fitted on the test tokens too; the slope and offset must come from the fit tokens."
    )
    assert not near(given, r2_of(b, fitted(b, a))), (
        "That is the score on the fit tokens; score on the test tokens."
    )
    slope = (a * b).sum() / a.square().sum()
    assert not near(given, r2_of(d, slope * c)), "The offset is missing from the regression."
    right = float(per_token_scaling(fit, test).r2[0, 1])
    about_fit = 1 - (1 - right) * float(
        (d - d.mean()).square().sum() / (d - b.mean()).square().sum()
    )
    assert not near(given, about_fit), (
        "The total sum of squares is about the mean of the test tokens, not of the fit tokens."
    )
    assert near(given, right), f"You return {given:.4f}; the regression gives {right:.4f}."
    return f"R2 {right:.2f}, as dm.per_token_scaling says."


@exercise("05.2", difficulty=2, minutes=12, teaches="All pairs are in one moment matrix.")
def matrix_from_sums(answer: Callable[..., Any]) -> str:
    """Columns with a large mean, so that a forgotten mean shows."""
    rows = norms(3)
    product, total = rows.T @ rows, rows.sum(0)
    given = answer(len(rows), total, product)
    if not isinstance(given, Tensor) or tuple(given.shape) != (3, 3):
        raise NotYet("Return a tensor [k, k], here [3, 3].")
    given = given.double()
    right = per_token_scaling(rows, rows).r2
    uncentred = product.square() / torch.outer(product.diagonal(), product.diagonal())
    assert not torch.allclose(given, uncentred), (
        "The means are still in: take total total^T / n away from product."
    )
    assert not torch.allclose(given, right.sqrt()), "That is the correlation; R2 is its square."
    covariance = (product - torch.outer(total, total) / len(rows)) / len(rows)
    slope = covariance / covariance.diagonal()[:, None]
    assert not torch.allclose(given, slope), (
        "That is the slope of the regression; R2 is the slope times the slope the other way."
    )
    assert torch.allclose(given, right, atol=1e-9), "It is not the R2 of column j on column i."
    return "No token was read twice, nor even once: three sums are enough."


@exercise("05.3", difficulty=3, minutes=15, teaches="Agreement beyond a shared yardstick.")
def beyond_length(answer: Callable[..., Any]) -> str:
    """The length is in both norms."""
    narrow, wide, length = norms(4).unbind(1)
    given = float(answer(narrow, wide, length))
    alone, by_length = r2_of(wide, fitted(wide, narrow)), r2_of(wide, fitted(wide, length))
    both = r2_of(wide, fitted(wide, narrow, length))
    assert not near(given, alone), "That is the plain R2; the length has not been taken out."
    assert not near(given, both), "That counts what the length explains as well."
    assert not near(given, both - by_length), (
        "That is a share of all variance; divide by what the length leaves, 1 - R2 of the length."
    )
    assert not near(given, (both - alone) / (1 - alone)), (
        "The other way round: that is what the length explains beyond the narrow SAE."
    )
    left = wide - fitted(wide, length)
    assert not near(given, r2_of(left, fitted(left, narrow))), (
        "Take the length out of the narrow norm too, not only out of the wide one."
    )
    scaled = torch.stack([narrow / length, wide / length], 1)
    assert not near(given, float(per_token_scaling(scaled, scaled).r2[0, 1])), (
        "Dividing by the length is another way to take it out; here it goes by regression."
    )
    right = (both - by_length) / (1 - by_length)
    assert near(given, right), f"You return {given:.4f}; it is {right:.4f}."
    return f"Plain R2 {alone:.2f}; beyond the length {right:.2f}."


@exercise(
    "05.4", difficulty=3, minutes=12, teaches="Raw norms agree for SAEs that learned nothing."
)
def two_worthless(answer: Callable[..., Any]) -> str:
    """Raw norms must agree, relative errors must vary and must not."""
    x = norms(5, 4000)[:, 2:] * torch.randn(
        4000, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64
    )
    given = answer(x, torch.Generator().manual_seed(7))
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet("Return a pair of reconstructions.")
    if any(getattr(one, "shape", None) != x.shape for one in cast("list[Any]", given)):
        raise NotYet(f"Both reconstructions must have the shape of x, {list(x.shape)}.")
    missed = torch.stack([(x - one).norm(dim=1) for one in cast("list[Tensor]", given)], 1)
    length = x.norm(dim=1, keepdim=True)
    share = missed / length
    assert not bool((share.std(0) < 1e-6).any()), (
        "The relative error does not vary, so there is nothing to compare: give each token a "
        "little of its own."
    )
    raw = float(per_token_scaling(missed, missed).r2[0, 1])
    relative = float(per_token_scaling(share, share).r2[0, 1])
    assert relative < 0.02, (
        f"The relative errors agree, R2 {relative:.2f}: draw apart for each of the two."
    )
    assert raw > 0.9, f"The norms agree only with R2 {raw:.2f}: make what is drawn smaller."
    return f"R2 {raw:.2f} between two SAEs that know nothing of each other, or of x."

"""Checks of chapter 19: an FVU from sums, adjusted R2, a split by document, a flattering gain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter.book.checks.common import alike, normal, refuse_mistakes
from darkmatter.book.exercises import NotYet, exercise
from darkmatter.errors import split_error
from darkmatter.leastsquares import fvu


@exercise("19.1", difficulty=2, minutes=8, teaches="A pooled FVU needs four sums, and no tokens.")
def fvu_from_sums(answer: Callable[..., Any]) -> str:
    """Against the FVU of the rows that the sums came from."""
    x = normal(1, 300, 6) * torch.linspace(0.5, 2, 6) + torch.linspace(-3, 3, 6)
    e = 0.4 * normal(2, 300, 6)
    n, sum_x, sum_x2, sum_e2 = len(x), x.sum(0), x.square().sum(), e.square().sum()
    given = float(answer(n, sum_x.clone(), sum_x2.clone(), sum_e2.clone()))
    right = fvu(x, x - e)
    wrong = {
        float(sum_e2 / sum_x2): "That is about zero: an SAE that returns the mean would look good.",
        float(sum_e2 / (sum_x2 - sum_x.square().sum())): (
            "The square of the sum over all tokens is n times too large; divide it by n."
        ),
        float(sum_e2 / (sum_x2 - sum_x.square().sum() / n**2)): (
            "The squared mean must be taken away from every token: n times, so divide by n once."
        ),
        float(sum_e2 / (sum_x2 - sum_x.sum() ** 2 / n)): (
            "Square each dimension's sum, then add; you added first."
        ),
        1 - right: "That is the share explained; FVU is what is left.",
    }
    refuse_mistakes(given, wrong)
    assert abs(given - right) < 1e-9, "sum_e2 / (sum_x2 - |sum_x|^2 / n)."
    return f"FVU {given:.3f}, and a billion tokens would need no more memory."


@exercise("19.2", difficulty=2, minutes=8, teaches="What chance adds can be taken away.")
def without_flattery(answer: Callable[..., Any]) -> str:
    """1 - (1 - r2)(n - 1)/(n - d - 1)."""
    r2, n, d = 0.7, 512, 256
    given, right = float(answer(r2, n, d)), 1 - 0.3 * 511 / 255
    assert abs(given - (1 - 0.3 * 255 / 511)) > 1e-9, (
        "That flatters twice: solve the formula for rho, so the ratio is turned over."
    )
    assert abs(given - (r2 - d / (n - 1))) > 1e-9, (
        "d / (n - 1) is what chance adds where there is nothing to find; here there is something."
    )
    assert abs(given - (1 - 0.3 * n / (n - d))) > 1e-9, (
        "Almost: the intercept takes a row as well, n - 1 and n - d - 1."
    )
    assert abs(given - right) < 1e-9, "1 - (1 - r2) (n - 1) / (n - d - 1)."
    return f"An R2 of {r2} on twice as many rows as inputs is {given:.2f} in truth."


@exercise("19.3", difficulty=3, minutes=12, teaches="Documents are dealt, not tokens.")
def fair_split(answer: Callable[..., Any]) -> str:
    """A mask that no document crosses, of 60 % of the documents, different for each generator."""
    lengths = torch.tensor([3, 40, 8, 90, 1, 25, 60, 12, 5, 33])
    document = (torch.arange(10) * 7).repeat_interleave(lengths)
    document = document[torch.randperm(len(document), generator=torch.Generator().manual_seed(1))]
    seen: set[tuple[int, ...]] = set()
    for seed in range(6):
        mask: Any = answer(document.clone(), torch.Generator().manual_seed(seed))
        if not isinstance(mask, Tensor) or mask.shape != document.shape or mask.dtype != torch.bool:
            raise NotYet("Return a boolean tensor with one entry a token.")
        inside, outside = set(document[mask].tolist()), set(document[~mask].tolist())
        both = inside & outside
        assert not both, (
            f"{len(both)} of 10 documents are on both sides: you dealt tokens, not documents."
        )
        assert len(inside) in (5, 6, 7), (
            f"{len(inside)} of 10 documents are fitted on, expected about six: take 60 % of the "
            "documents, whatever their lengths and numbers."
        )
        seen.add(tuple(sorted(inside)))
    assert len(seen) > 1, "Every generator gives the same split: draw the order from the generator."
    return "No document on both sides, another deal for another generator."


@exercise("19.4", difficulty=3, minutes=12, teaches="A score that can be bought with a gain.")
def looks_better(answer: Callable[..., Any]) -> str:
    """Half the nonlinear FVU, at a larger FVU."""
    x = normal(3, 4000, 8) * torch.linspace(0.5, 2, 8) + 3
    x_hat = 0.8 * x + 0.3 * torch.sin(2 * x) + 0.2 * normal(4, 4000, 8)
    given: Any = answer(x_hat.clone())
    if not isinstance(given, Tensor) or given.shape != x_hat.shape:
        raise NotYet("Return a tensor of the same shape as x_hat.")

    def nonlinear(reconstruction: Tensor) -> float:
        return fvu(x, x - split_error(x, reconstruction, x, reconstruction).nonlinear)

    ratio = nonlinear(given) / nonlinear(x_hat)
    assert not alike(given, x_hat), "That is the reconstruction as it was."
    assert abs(ratio - 0.25) > 0.01, (
        "A quarter: the nonlinear FVU falls with the square of the gain, so half needs its root."
    )
    assert ratio > 0.01, "Nearly nothing is left of the SAE; half was asked for."
    assert abs(ratio - 0.5) < 0.01, f"Your nonlinear FVU is {ratio:.2f} times the old one, not 0.5."
    assert abs(float((given.mean(0) - x_hat.mean(0)).abs().max())) < 0.05, (
        "The mean moved: shrink about the mean of x_hat, or anybody sees the offset."
    )
    return f"FVU rose from {fvu(x, x_hat):.2f} to {fvu(x, given):.2f}; nobody was told."

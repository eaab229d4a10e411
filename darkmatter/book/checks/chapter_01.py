"""Checks of chapter 01: FVU, L0, the best constant, the cosine, and a score that lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.leastsquares import fvu

# Answers may be computed in float32, whose sums over these few numbers round near 1e-6.
_TOLERANCE = 1e-4


def _planted() -> tuple[Tensor, Tensor]:
    """x with a large mean and unequal variances, and an x_hat that misses some of each."""
    generator = torch.Generator().manual_seed(1)
    scale = torch.tensor([3.0, 1.0, 0.3, 0.1])
    x = torch.randn(40, 4, generator=generator) * scale + torch.tensor([5.0, -2.0, 0.0, 1.0])
    return x, x + 0.5 * torch.randn(40, 4, generator=generator)


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= _TOLERANCE * max(1.0, abs(other))


def _number(value: Any, what: str) -> float:
    """The answer as one number; NotYet for nothing, or for several numbers."""
    if value is None:
        raise NotYet(f"your function returns nothing; return {what}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise NotYet(f"you return shape {list(value.shape)}, expected one number: {what}")
    return float(value)


@exercise("01.1", difficulty=1, minutes=10, teaches="FVU is pooled: sum first, divide once.")
def fvu_of(answer: Callable[[Tensor, Tensor], Any]) -> str:
    """The pooled FVU, against the usual other ratios."""
    x, x_hat = _planted()
    value = _number(answer(x, x_hat), "the FVU")
    missed, centred = (x - x_hat).square(), (x - x.mean(0)).square()
    mistakes = {
        "you took the spread about zero: take the mean over tokens off x first": (
            missed.sum() / x.square().sum()
        ),
        "that is the mean over dimensions of a ratio each: sum over dimensions before dividing": (
            (missed.sum(0) / centred.sum(0)).mean()
        ),
        "that is the mean over tokens of a ratio each: sum over tokens before dividing": (
            (missed.sum(1) / centred.sum(1)).mean()
        ),
        "that is the share that is explained: FVU is what is left, one less that": (
            1 - missed.sum() / centred.sum()
        ),
        "you took one mean over all numbers: the mean is a vector, one number a dimension": (
            missed.sum() / (x - x.mean()).square().sum()
        ),
        "you divided lengths: FVU divides their squares": (missed.sum() / centred.sum()).sqrt(),
    }
    _name_mistake(value, mistakes)
    assert _near(value, fvu(x, x_hat)), (
        f"expected {fvu(x, x_hat):.4f} on the planted rows, got {value:.4f}; "
        "divide the sum of squared errors by the sum of squared distances to the mean"
    )
    return "Your FVU agrees with dm.fvu."


@exercise("01.2", difficulty=1, minutes=5, teaches="L0 counts latents, however strong they are.")
def mean_l0_of(answer: Callable[[Tensor], Any]) -> str:
    """Mean L0 of a small dense code with rows of different L0."""
    f = torch.tensor([[0.0, 2.0, 0.0, 0.5, 0.0], [1.5, 0, 0, 0, 0], [0.1, 0.2, 0.3, 0, 7.0]])
    value = _number(answer(f), "the mean L0")
    active = (f != 0).double()
    mistakes = {
        "you summed the strengths, which is the L1 norm: count entries instead": f.sum(1).mean(),
        "that is the share of latents that are active: count them, do not average over latents": (
            active.mean()
        ),
        "that is the number over all tokens: divide by the number of tokens": active.sum(),
        "you averaged over latents: count in each row (dim 1), then average over rows": (
            active.sum(0).mean()
        ),
    }
    _name_mistake(value, mistakes)
    expected = float(active.sum(1).mean())
    assert _near(value, expected), f"expected {expected:.4f} on a small code, got {value:.4f}"
    return "Rows with 2, 1 and 4 active latents have a mean L0 of 7/3."


@exercise(
    "01.3", difficulty=2, minutes=10, teaches="What a reconstruction that ignores its input scores."
)
def best_constant(answer: Callable[[Tensor], Any]) -> str:
    """The mean and the FVU of predicting it."""
    x, _ = _planted()
    result = answer(x)
    if not isinstance(result, tuple | list) or len(result) != 2:  # pyright: ignore[reportUnknownArgumentType] - a student's answer can be anything
        raise NotYet("return two things: the constant vector, and its FVU")
    constant, value = torch.as_tensor(result[0]).float(), _number(result[1], "the FVU")
    if constant.shape != x.shape[1:]:
        raise NotYet(
            f"the constant has shape {list(constant.shape)}, expected [{x.shape[1]}]: "
            "one number a dimension"
        )
    score = fvu(x, constant.expand_as(x))
    assert not torch.allclose(constant, torch.zeros(4)), (
        "that is the zero vector: it misses the mean of x as well as its spread"
    )
    assert not torch.allclose(constant, x.median(0).values), (
        "that is the median, which has the smallest absolute error: FVU squares the error"
    )
    assert torch.allclose(constant, x.mean(0), atol=1e-3), (
        f"your constant has an FVU of {score:.4f}, and a smaller one exists: set the derivative "
        "of the sum of squared errors to zero"
    )
    assert _near(value, score), (
        f"the constant is right, but its FVU is {score:.4f}, not {value:.4f}: predict it for "
        "every row"
    )
    return "The best constant is the mean, and its FVU is 1: that is where the scale comes from."


@exercise("01.4", difficulty=2, minutes=10, teaches="The cosine cannot see shrinkage; FVU can.")
def mean_cosine(answer: Callable[[Tensor, Tensor], Any]) -> str:
    """Mean over tokens of the cosine, which does not change when x_hat is halved."""
    x, x_hat = _planted()
    value = _number(answer(x, x_hat), "the mean cosine")
    products, lengths = (x * x_hat).sum(1), x.norm(dim=1) * x_hat.norm(dim=1)
    centred, centred_hat = x - x.mean(0), x_hat - x_hat.mean(0)
    mistakes = {
        "that is one cosine of all numbers together: take one a token, then average": (
            (x * x_hat).sum() / (x.norm() * x_hat.norm())
        ),
        "that is a cosine for each dimension: sum over dimensions (dim 1), not over tokens": (
            torch.nn.functional.cosine_similarity(x, x_hat, dim=0).mean()
        ),
        "that is the mean dot product: divide each by the two norms": products.mean(),
        "you divided the mean product by the mean length: divide token by token": (
            products.mean() / lengths.mean()
        ),
        "you took the means off first: take the cosine of x and x_hat as they are": (
            torch.nn.functional.cosine_similarity(centred, centred_hat, dim=1).mean()
        ),
    }
    _name_mistake(value, mistakes)
    expected = float((products / lengths).mean())
    assert _near(value, expected), f"expected {expected:.4f} on the planted rows, got {value:.4f}"
    halved = _number(answer(x, x_hat / 2), "the mean cosine")
    assert _near(halved, value), "halving x_hat changes your score, but no cosine: divide by norms"
    return (
        f"Halving x_hat leaves the cosine at {halved:.3f} and takes the FVU from "
        f"{fvu(x, x_hat):.3f} to {fvu(x, x_hat / 2):.3f}: the cosine cannot see shrinkage."
    )


@exercise("01.5", difficulty=3, minutes=15, teaches="What one token can do to a pooled score.")
def flatter(answer: Callable[[Tensor, Tensor], Any]) -> str:
    """One row more, the others as they were, and an FVU below 1/100."""
    x, _ = _planted()
    x_hat = x.flip(0)
    before = fvu(x, x_hat)
    result = answer(x.clone(), x_hat.clone())
    if not isinstance(result, tuple | list) or len(result) != 2:  # pyright: ignore[reportUnknownArgumentType] - a student's answer can be anything
        raise NotYet("return two things: the longer x and the longer x_hat")
    new_x, new_x_hat = (torch.as_tensor(one) for one in result)
    expected = [len(x) + 1, x.shape[1]]
    for name, new in (("x", new_x), ("x_hat", new_x_hat)):
        if list(new.shape) != expected:
            raise NotYet(f"{name} has shape {list(new.shape)}, expected {expected}: one row more")
    unchanged = torch.equal(new_x[:-1], x) and torch.equal(new_x_hat[:-1], x_hat)
    assert unchanged, (
        "the tokens that were there must stay as they are, in x and in x_hat: append one row to "
        "each with torch.cat"
    )
    after = fvu(new_x, new_x_hat)
    error, length = float((new_x[-1] - new_x_hat[-1]).norm()), float(new_x[-1].norm())
    assert after < 0.01 or error <= 0.1 * length, (
        f"the FVU is {after:.3f}: your token has a large error of its own; reconstruct it well"
    )
    assert after < 0.01, (
        f"the FVU fell from {before:.3f} to {after:.3f} only: your token is too close to the "
        "others to matter; make its norm far larger"
    )
    return f"The FVU fell from {before:.2f} to {after:.1e}, and no token is explained any better."


def _name_mistake(value: float, mistakes: dict[str, Any]) -> None:
    """NotYet with the mistake whose result the value is."""
    for message, wrong in mistakes.items():
        if _near(value, float(wrong)):
            raise NotYet(message)

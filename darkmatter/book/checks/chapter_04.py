"""Checks of chapter 04, its norm is predictable."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter.book.exercises import exercise
from darkmatter.leastsquares import LinearStatistics, r2

# Answers are compared after float64 arithmetic in another order: far above its rounding.
_CLOSE = 1e-6


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _held_out(x_fit: Tensor, y_fit: Tensor, x: Tensor, y: Tensor) -> float:
    probe = LinearStatistics(x_fit.shape[1], 1).partial_fit(x_fit, y_fit).solve()
    return r2(y, probe(x.double())[:, 0])


@exercise(
    "04.1",
    difficulty=2,
    minutes=10,
    teaches="The best line explains corr(w, w^2)^2 of the square, and it has a constant.",
)
def line_through_square(answer: Callable[..., Any]) -> str:
    w = torch.rand(4000, generator=_generator(1), dtype=torch.float64)
    square = w.square()
    design = torch.stack([w, torch.ones_like(w)], 1)
    slope, constant = torch.linalg.lstsq(design, square[:, None]).solution[:, 0].tolist()
    share = r2(square, slope * w + constant)
    got = answer(w)
    three = isinstance(got, tuple) and len(got) == 3
    assert three, "Return three numbers: slope, constant, R2."
    their_slope, their_constant, their_share = (float(one) for one in got)
    through_origin = float((w * square).mean() / square.mean())
    assert abs(their_slope - through_origin) > 1e-3, (
        "That is the slope of a line through the origin; the probe has a constant, so take the "
        "covariance of w and w^2 over the variance of w."
    )
    assert abs(their_slope - slope) < _CLOSE, (
        f"For uniform w the slope is about {slope:.2f}, yours is {their_slope:.3f}: covariance of "
        "w and w^2 over the variance of w, both with the same divisor."
    )
    assert abs(their_constant - constant) < _CLOSE, (
        "The slope is right, the constant is not: the line passes through (mean of w, mean of w^2)."
    )
    assert abs(their_share - share**0.5) > 1e-3, "That is the correlation; R2 is its square."
    assert abs(their_share - share) < _CLOSE, (
        "Slope and constant are right, R2 is not: squared covariance over the product of the "
        "variances of w and of w^2."
    )
    on_off = 3.0 * (torch.rand(4000, generator=_generator(2), dtype=torch.float64) < 0.1)
    assert abs(float(answer(on_off)[2]) - 1) < _CLOSE, (
        "A feature that is off or on at one value has two points, and a line passes through both: "
        "R2 should be 1 there."
    )
    return f"For uniform w: slope {slope:.2f}, constant {constant:.2f}, R2 {share:.2f}."


def _active_features(seed: int, n: int) -> Tensor:
    return (torch.rand(n, 12, generator=_generator(seed)) < 0.1).double() * torch.arange(1, 13.0)


@exercise(
    "04.2",
    difficulty=2,
    minutes=10,
    teaches="The squared norm and the plain norm are two targets.",
)
def squared_and_plain(
    answer: Callable[..., Any],
) -> str:
    x_fit, x_test = _active_features(3, 3000), _active_features(4, 2000)
    squared = _held_out(x_fit, x_fit.square().sum(1), x_test, x_test.square().sum(1))
    plain = _held_out(x_fit, x_fit.norm(dim=1), x_test, x_test.norm(dim=1))
    got = answer(x_fit, x_fit, x_test, x_test)
    two = isinstance(got, tuple) and len(got) == 2
    assert two, "Return two numbers: squared first, then plain."
    first, second = (float(one) for one in got)
    assert not (abs(first - plain) < 1e-4 and abs(second - squared) < 1e-4), (
        "The two scores are swapped: return that of the squared norm first."
    )
    assert abs(first - squared) < 1e-4, (
        f"For features of constant value the squared norm scores {squared:.3f}, yours is "
        f"{first:.3f}: fit |v|^2 on the fit rows, and score on the test rows."
    )
    assert abs(second - first) > 1e-4, (
        "Both scores are the same: the plain norm needs a probe of its own, neither that of the "
        "squared norm nor the root of what it predicts."
    )
    assert abs(second - plain) < 1e-4, (
        f"The plain norm scores {plain:.3f} on the test rows, yours is {second:.3f}: fit |v| on "
        "the fit rows with its own weights, and do not fit on the test rows."
    )
    v = x_fit[:, :5]
    other = answer(x_fit, v, x_test, x_test[:, :5])
    expected = _held_out(x_fit, v.norm(dim=1), x_test, x_test[:, :5].norm(dim=1))
    assert abs(float(other[1]) - expected) < 1e-4, "Take the norm of v, and predict it from x."
    return f"Squared {squared:.2f}, plain {plain:.2f} for planted features of constant value."


def _tokens() -> tuple[Tensor, Tensor, Tensor]:
    generator = _generator(5)
    token = (20 * torch.rand(300, generator=generator).square()).long()
    norm2 = token.double() + torch.rand(300, generator=generator, dtype=torch.float64)
    is_fit = torch.rand(300, generator=generator) < 0.6
    # Two tokens that stand in test rows only, one of them the largest id.
    token[~is_fit] = torch.where(torch.arange(int((~is_fit).sum())) % 17 == 0, 31, token[~is_fit])
    token[int((~is_fit).nonzero()[-1])] = 40
    return token, norm2, is_fit


@exercise(
    "04.3",
    difficulty=3,
    minutes=15,
    teaches="A table of token means must not have seen the rows it is scored on.",
)
def honest_token_mean(answer: Callable[..., Any]) -> str:
    token, norm2, is_fit = _tokens()

    def means(rows: Tensor, fallback: float) -> Tensor:
        found = [norm2[rows & (token == one)] for one in token[~is_fit].tolist()]
        return torch.tensor([float(v.mean()) if len(v) else fallback for v in found])

    overall = float(norm2[is_fit].mean())
    got = answer(token.clone(), norm2.clone(), is_fit.clone())
    fits = isinstance(got, Tensor) and got.shape == (int((~is_fit).sum()),)
    assert fits, "Return one prediction for each test row, a tensor as long as (~is_fit).sum()."
    got = got.double()
    assert not torch.allclose(got, means(torch.ones_like(is_fit), 0.0).double(), atol=1e-4), (
        "These means contain the test rows, as the published baseline's did: a token that occurs "
        "once predicts itself. Use fit rows only."
    )
    unseen = torch.tensor([not bool((token[is_fit] == one).any()) for one in token[~is_fit]])
    assert bool(got.isfinite().all()), (
        "Some predictions are NaN: a token that fit rows lack has no mean; use that of all fit "
        "rows."
    )
    assert not bool((got[unseen] == 0).all()), (
        "Unseen tokens get 0, which is far below any norm; use the mean of all fit rows."
    )
    kinds = token[is_fit].unique()
    entries = float(torch.stack([norm2[is_fit & (token == one)].mean() for one in kinds]).mean())
    assert not bool(((got[unseen] - entries).abs() < 1e-4).all()), (
        "Unseen tokens get the mean of the table's entries, in which a rare token counts as much "
        "as a frequent one; use the mean of the fit rows."
    )
    assert not bool(((got[unseen] - float(norm2.mean())).abs() < 1e-4).all()), (
        "The fallback is the mean of all rows, test rows included; use the mean of the fit rows."
    )
    assert torch.allclose(got, means(is_fit, overall).double(), atol=1e-4), (
        "Some predictions differ from the mean of their token over fit rows; check the order of "
        "the test rows."
    )
    return "No test row is in any mean, and unseen tokens get the mean of the fit rows."


@exercise(
    "04.4",
    difficulty=4,
    minutes=20,
    teaches="One row in a hundred can carry a held-out R2 from zero to nearly one.",
)
def lying_rows(answer: Callable[..., Any]) -> str:
    generator = _generator(6)
    x = torch.randn(4000, 16, generator=generator, dtype=torch.float64)
    norm2 = torch.randn(4000, 40, generator=generator, dtype=torch.float64).square().sum(1)

    def score(x: Tensor, norm2: Tensor) -> float:
        order = torch.randperm(len(x), generator=_generator(7))
        one, other = order[::2], order[1::2]
        return _held_out(x[one], norm2[one], x[other], norm2[other])

    honest = score(x, norm2)
    got = answer(x.clone(), norm2.clone())
    two = isinstance(got, tuple) and len(got) == 2
    assert two, "Return the pair (x, norm2)."
    new_x, new_norm2 = got
    fits = new_x.ndim == 2 and new_x.shape[1] == 16 and new_norm2.shape == (len(new_x),)
    assert fits, "Return x as [rows, d] and norm2 as [rows], with the same number of rows."
    assert len(new_x) > len(x), "No rows were appended; the lie is in the rows you add."
    assert len(new_x) - len(x) <= len(x) // 100, (
        f"You appended {len(new_x) - len(x)} rows, {len(x) // 100} are allowed: one in a hundred."
    )
    same = torch.equal(new_x[: len(x)], x) and torch.equal(new_norm2[: len(x)], norm2)
    assert same, "The given rows changed; they must stay as they are, first and in order."
    assert bool((new_norm2 >= 0).all()), "A squared norm is never negative."
    lie = score(new_x, new_norm2)
    alike = float(new_x[len(x) :].abs().max()) < 2 * float(x.abs().max())
    assert lie > 0.9 or not alike, (
        f"Held-out R2 is {lie:.2f}: your rows look like the others in x, so the probe cannot "
        "single them out; give them a direction of their own, much larger than the rest."
    )
    assert lie > 0.9, (
        f"Held-out R2 is {lie:.2f}: the probe can find your rows, but their norms are not large "
        "enough to be most of the variance, or differ too much among each other."
    )
    return f"Held-out R2 went from {honest:.2f} to {lie:.2f}."


@exercise(
    "04.5",
    difficulty=3,
    minutes=15,
    teaches="Levelling off means to stay near the late level, not to cross it once.",
)
def levels_off(answer: Callable[..., Any]) -> str:
    position = [1, 2, 4, 8, 16, 32, 64, 128]
    overshoot = [0.1, 0.3, 0.5, 0.7, 0.6, 0.51, 0.5, 0.5]
    found = answer(position, overshoot, 0.05)
    assert found != 4, (
        "At position 4 the curve only crosses its late level and then overshoots; return the first "
        "position from which it stays near."
    )
    assert found != 5, "That is the index of the bin; return its position."
    assert found is not None, "The curve levels off, but None came; its late level is about a half."
    assert found == 32, f"The curve stays near its late level from position 32, not from {found}."
    rising = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9]
    assert answer(position, rising, 0.05) is None, (
        "A curve that still rises at the end has not levelled off; return None."
    )
    assert answer(position, [0.5] * 8, 0.05) == 1, "A flat curve is level from its first position."
    small = [one / 1000 for one in overshoot]
    assert answer(position, small, 0.05) == 32, (
        "The tolerance is relative to the late level; a curve a thousand times smaller levels off "
        "at the same position."
    )
    return "The overshooting curve stays near its level from position 32 on."

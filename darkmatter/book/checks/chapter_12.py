"""Checks of chapter 12: equal steps, matched draws, a slope without a unit, the starting power."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.sensitivity import absolute_path, max_slope


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors have one shape and agree to an absolute tolerance."""
    return a.shape == b.shape and bool((a.double() - b.double()).abs().max() <= tolerance)


def tensor(answer: object, shape: tuple[int, ...]) -> Tensor:
    """The answer as a tensor of this shape, or what is expected."""
    if not isinstance(answer, Tensor):
        raise NotYet(f"Return a tensor of shape {list(shape)}.")
    if tuple(answer.shape) != shape:
        raise NotYet(f"Your tensor is {list(answer.shape)}, expected {list(shape)}.")
    return answer


@exercise("12.1", difficulty=1, minutes=8, teaches="A direction has length one; a step has a unit.")
def equal_steps(answer: Callable[..., Any]) -> str:
    """A path of five steps of 0.5 towards a target at distance 5."""
    base, target = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([4.0, 5.0, 2.0])
    given = answer(base, target, 0.5, 5)
    if isinstance(given, Tensor) and len(given) == 5:
        raise NotYet("Five steps have six points: the base itself is the first.")
    given = tensor(given, (6, 3))
    away = target - base
    n = torch.arange(6)[:, None]
    assert not close(given, base + 0.5 * n * away), (
        "Your steps are half of the whole way each; divide the direction by its length first."
    )
    assert not close(given, base + n / 5 * away), (
        "Your path ends on the target, whatever `step` is; here all steps have one length."
    )
    assert not close(given, base + 0.5 * n * target / target.norm()), (
        "Your direction is that of the target from zero; take it from the base."
    )
    assert close(given, absolute_path(base, target, 0.5, 5)), (
        "Point i should be base + i * step * (target - base) / |target - base|."
    )
    return "Now a step means the same for every pair of base and target."


@exercise("12.2", difficulty=3, minutes=12, teaches="What a fair random activation is.")
def matched_draws(answer: Callable[..., Any]) -> str:
    """Draws from a covariance of low rank, with unequal variances and a mean."""
    generator = torch.Generator().manual_seed(7)
    few = torch.randn(400, 3, generator=generator, dtype=torch.float64)
    mix = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    x = few @ mix * torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5], dtype=torch.float64) + 3
    count = 20_000
    with torch.random.fork_rng():
        torch.manual_seed(0)
        given = tensor(answer(x, count), (count, 5)).double()
    wanted, came = torch.cov(x.T), torch.cov(given.T)
    if bool((wanted.diagonal() - came.diagonal()).abs().max() > 1e6):
        raise NotYet("Your draws are huge; did you divide by the square root of n - 1?")
    size = float(wanted.diagonal().max())
    off = float((came - came.diagonal().diag()).abs().max())
    spread = float(came.diagonal().max() / came.diagonal().min())
    assert not (off < 0.05 * size and spread < 1.2), (
        "Your draws have the same variance in all dimensions: that is isotropic, not matched."
    )
    assert not (off < 0.05 * size), (
        "Your variances may be right but your dimensions are independent; those of x are not."
    )
    # Draws of 20,000 know a variance to 1 %, and the mean to less than a hundredth of its size.
    scale = float(came.diagonal().sum() / wanted.diagonal().sum())
    assert 0.6 < scale < 1.5, (
        f"Your draws have {scale:.3g} times the variance of x; divide the weighted sum by the "
        "square root of n - 1."
    )
    assert float((given.mean(0) - x.mean(0)).abs().max()) < 0.1 * size**0.5, (
        "The covariance is right, but your draws are not about the mean of x; add it."
    )
    assert float((came - wanted).abs().max()) < 0.06 * size, (
        "Your draws have another covariance than x."
    )
    return "They lie in the span of the data, so nothing about them is trivially odd."


@exercise("12.3", difficulty=2, minutes=8, teaches="A slope that can be compared between models.")
def steepest_relative_slope(answer: Callable[..., Any]) -> str:
    """A bent curve of 51 points that ends at 200."""
    t = torch.linspace(0, 1, 51, dtype=torch.float64)
    curve = 200 * (3 * t**2 - 2 * t**3)
    given = float(answer(curve))
    right = float(max_slope(curve))
    near = 1e-6 * right
    assert abs(given - 200 * right) > 200 * near, (
        "Your slope is in units of distance; divide the curve by its end first."
    )
    assert abs(given - right / 50) > near, (
        "Your slope is per step; t runs from 0 to 1, so a step is one fiftieth of it."
    )
    assert abs(given - right / 50 * 51) > near, (
        "There are 51 points but 50 steps from 0 to 1; multiply by the number of steps."
    )
    assert abs(given - float(curve.diff().max())) > near, (
        "Your slope is per step and in units of distance; a straight line must give 1."
    )
    assert abs(given - right) <= near, "A straight line must give 1; try yours on one."
    return f"This curve is at most {right:.2f} times as steep as a straight line."


@exercise("12.4", difficulty=3, minutes=10, teaches="Divergences start flat for any smooth model.")
def starting_power(answer: Callable[..., Any]) -> str:
    """Curves that start as t, t^2 and t^1.5."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for power in (1.0, 2.0, 1.5):
        curve = 7 * t**power
        given = float(answer(curve))
        ratio = float(curve[2] / curve[1])
        if power != 1.0:
            assert abs(given - ratio) > 1e-6, "That is the ratio 2^k; take its logarithm to base 2."
            assert abs(given + power) > 1e-6, "Your sign is turned: divide d(2) by d(1)."
            natural = power * float(torch.tensor(2.0).log())
            assert abs(given - natural) > 1e-6, (
                "That is the natural logarithm; a doubled way asks for the logarithm to base 2."
            )
        assert abs(given - power) <= 1e-6, (
            f"A curve that starts as t^{power:g} should give {power}."
        )
    return "An L2 curve has 1 and a KL curve 2, with or without a plateau."


@exercise(
    "12.5", difficulty=2, minutes=10, teaches="A mean of curves has the shape of none of them."
)
def hidden_plateaus(answer: Callable[[int, int], Any]) -> str:
    """Every curve jumps at least half its height in one step; their mean is a straight line."""
    for n, steps in ((100, 50), (60, 20)):
        given = answer(n, steps)
        if not isinstance(given, Tensor) or given.shape != (n, steps + 1):
            raise NotYet(f"Return a tensor [{n}, {steps + 1}]: a row is a curve from step 0 on.")
        curves = given.double()
        assert bool((curves[:, 0] == 0).all()), "A distance from the base is zero at step 0."
        assert bool((curves[:, -1] > 0).all()), (
            "A curve ends at zero, and a relative curve is divided by its end."
        )
        assert bool((curves >= 0).all()), "A distance is never negative."
        steepest, of_mean = max_slope(curves), float(max_slope(curves.mean(0)))
        assert float(steepest.min()) >= steps / 2, (
            f"A curve has a steepest slope of {float(steepest.min()):.1f}: it has no plateau that "
            f"the mean could hide. A jump in one step has {steps}."
        )
        assert of_mean < steps / 2, (
            "The mean jumps as its curves do: they all jump at the same step. Spread the jumps."
        )
        assert of_mean <= 1.1, (
            f"The mean's steepest slope is {of_mean:.1f}, and a straight line has one: jump at "
            "every step equally often, and equally high."
        )
    return "No plateau, says the mean. Every single curve is one."

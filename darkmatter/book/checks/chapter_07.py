"""Checks of chapter 07: levels, what is recognised of noise, rare latents, and noise that hides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.checks.common import normal
from darkmatter.book.exercises import NotYet, exercise
from darkmatter.synthetic import estimated_shares


def near(a: float, b: float, tolerance: float = 1e-9) -> bool:
    """Whether two numbers agree to an absolute tolerance."""
    return abs(float(a) - b) <= tolerance


@exercise("07.1", difficulty=2, minutes=8, teaches="A standard deviation is not a variance.")
def planted_share(answer: Callable[..., Any]) -> str:
    """Both readings of a level, in shares of the noised activation."""
    level, unit, d, variance = 0.6, 0.5, 8, 10.0
    given = answer(level, unit, d, variance)
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet("Return a pair of numbers: (as a standard deviation, as a variance).")
    pair = [float(one) for one in given]
    noise = d * (level * unit) ** 2, d * level * unit**2
    right = [one / (variance + one) for one in noise]
    assert not (near(pair[0], right[1]) and near(pair[1], right[0])), (
        "The two are swapped: the level as a standard deviation comes first."
    )
    assert not any(near(a, one / variance) for a, one in zip(pair, noise, strict=True)), (
        "The denominator is the variance of the noised activation: add the noise to it."
    )
    assert not any(
        near(a, one / d / (variance + one / d)) for a, one in zip(pair, noise, strict=True)
    ), "The total variance is summed over dimensions, so noise comes in d times."
    wrong = d * level * unit / (variance + d * level * unit)
    assert not near(pair[1], wrong), (
        "The unit is a standard deviation under both readings: square it."
    )
    assert near(pair[0], right[0]), (
        "As a standard deviation the noise has variance (level * unit)^2 in each dimension."
    )
    assert near(pair[1], right[1]), (
        "As a variance the noise has variance level * unit^2 in each dimension."
    )
    return f"{pair[0]:.3f} and {pair[1]:.3f}: the reading decides."


@exercise(
    "07.2", difficulty=3, minutes=12, teaches="Noise is recognised where the signal is small."
)
def recognised(answer: Callable[..., Any]) -> str:
    """sum n^2 / (s + n) / sum n on uneven variances."""
    signal = torch.tensor([9.0, 3.0, 0.5, 0.0], dtype=torch.float64)
    noise = torch.tensor([1.0, 2.0, 1.0, 0.5], dtype=torch.float64)
    given = float(answer(signal.clone(), noise.clone()))
    right = float((noise.square() / (signal + noise)).sum() / noise.sum())
    assert not near(given, float((noise / (signal + noise)).mean())), (
        "That is the mean over dimensions; weigh each by its share of the noise."
    )
    assert not near(given, float(noise.sum() / (signal + noise).sum())), (
        "That uses total variances only; what is recognised is decided dimension by dimension."
    )
    assert not near(given, 1 - right), "That is what is not recognised, and is called nonlinear."
    guess = (noise / (signal + noise)).square()
    assert not near(given, float((guess * noise).sum() / noise.sum())), (
        "The guess is a multiple of the sum of signal and noise, so its variance has both."
    )
    assert near(given, right), (
        "In one dimension the guess is n / (s + n) times the sum, with variance n^2 / (s + n)."
    )
    return f"{given:.0%} of this noise is recognised, all of it where there is no signal."


@exercise("07.3", difficulty=2, minutes=8, teaches="Rarest by mean value is not rarest by count.")
def rarest(answer: Callable[..., Any]) -> str:
    """The latents of lowest mean value, zeros included."""
    # Means .4, .5, .25, .1, 0; counts 4, 1, 1, 2, 0; means where active .4, 2, 1, .2.
    codes = torch.tensor(
        [
            [0.4, 2.0, 1.0, 0.2, 0.0],
            [0.4, 0.0, 0.0, 0.2, 0.0],
            [0.4, 0.0, 0.0, 0.0, 0.0],
            [0.4, 0.0, 0.0, 0.0, 0.0],
        ]
    )
    mask: Any = answer(codes.clone(), 3)
    if not isinstance(mask, Tensor) or mask.shape != (5,) or mask.dtype != torch.bool:
        raise NotYet("Return a bool tensor [m]: one truth value for every latent.")
    assert int(mask.sum()) == 3, f"The mask holds {int(mask.sum())} latents; k is 3."
    chosen = mask.nonzero()[:, 0].tolist()
    assert chosen != [1, 2, 4], (
        "Those are the least frequent; latent 1 is rare but strong and has the highest mean."
    )
    assert chosen != [0, 3, 4], (
        "That is the mean where a latent is active; the released code averages over all tokens."
    )
    assert chosen != [0, 1, 2], "Those are the largest means; the rarest are the smallest."
    assert chosen == [2, 3, 4], "Take the three lowest of codes.mean(0)."
    return "Lowest mean value, the dead latent first."


@exercise("07.4", difficulty=3, minutes=15, teaches="Not all noise is recognised as noise.")
def hidden_noise(answer: Callable[..., Any]) -> str:
    """Noise of a twentieth of the variance that the split calls nonlinear."""
    d, n = 12, 12_000
    x = normal(1, n, d) * torch.logspace(0.5, -1.5, d, dtype=torch.float64) @ normal(2, d, d) + 1
    noise: Any = answer(x.clone())
    if not isinstance(noise, Tensor) or noise.shape != x.shape:
        raise NotYet(f"Return noise of the shape of x, {list(x.shape)}.")
    noise = noise.double()
    centred = x - x.mean(0)
    size = float(noise.var(0).sum() / x.var(0).sum())
    weights = torch.linalg.lstsq(centred, noise - noise.mean(0)).solution
    shared = float((centred @ weights).square().sum() / (noise - noise.mean(0)).square().sum())
    # Chance explains d / n, a thousandth; multiplicative noise a few times that.
    assert shared < 0.02, (
        f"A linear map of x predicts {shared:.0%} of your noise: it must be uncorrelated with x. "
        "Multiply by a random number of mean zero, or draw anew."
    )
    assert 0.04 < size < 0.06, (
        f"Your noise has {size:.3f} of the variance of x; a twentieth is asked for (the variance, "
        "not the standard deviation)."
    )
    half = n // 2
    found = estimated_shares((x + noise)[:half], x[:half], (x + noise)[half:], x[half:])
    called = found.linear / (found.linear + found.nonlinear)
    assert called < 0.1, (
        f"The split calls {called:.0%} of your noise linear. Noise that is the same in every "
        "direction is recognised where x is small; give it the covariance of x."
    )
    return f"Only {called:.0%} of your noise is called linear; the rest passes for nonlinear error."

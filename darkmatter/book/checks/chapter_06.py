"""Checks of chapter 06, models of activations."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.synthetic import PlantedRecipe, norm_predictability_of

# Answers are compared after float64 arithmetic in another order: far above its rounding.
_CLOSE = 1e-6


def _pair(given: Any, what: str) -> tuple[Any, Any]:
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet(f"Return a pair: {what}.")
    first, second = cast("list[Any]", given)
    return first, second


def _near(value: float, other: float) -> bool:
    return abs(value - other) <= _CLOSE * max(1.0, abs(other))


@exercise(
    "06.1",
    difficulty=2,
    minutes=10,
    teaches="Introduced error may be linear in part: misses follow their feature.",
)
def cost_of_misses(answer: Callable[[float, float], Any]) -> str:
    """Against the exact shares of a recipe with one feature."""
    for p, q in ((0.1, 0.3), (0.5, 0.5)):
        given = _pair(answer(p, q), "(variance of the introduced error, its linear part)")
        variance, linear = (float(one) for one in given)
        recipe = PlantedRecipe(
            n_features=1, d_model=1, frequencies=(p,), values="constant", misses=q
        )
        shares, unit = recipe.draw(1).shares, float(recipe.variances.sum())
        introduced, predicted = shares.introduced * unit, shares.linear * unit
        assert not _near(variance, p * q), (
            "That is the mean square of the error; take the square of its mean away."
        )
        assert not _near(variance, q * (1 - q)), (
            "That is for a feature that is always active; it is missed on a share p q of tokens."
        )
        assert _near(variance, introduced), (
            f"For p={p}, q={q} the error is one on a share {p * q:.3g} of the tokens, so its "
            f"variance is {introduced:.4g}; yours is {variance:.4g}."
        )
        assert not _near(linear, q * unit), (
            "q w is the best guess, and the variance of q w is not q times that of w."
        )
        assert not _near(linear, q * p * (1 - p) / variance), (
            "That is a share of the error's variance; return the variance itself."
        )
        assert not _near(linear, 0.0), (
            "A miss happens only where the feature is active, so it is correlated with x."
        )
        assert _near(linear, predicted), (
            f"For p={p}, q={q} the best line in w is q w, of variance {predicted:.4g}; yours is "
            f"{linear:.4g}."
        )
    return "Misses are introduced error, and a share of them passes for linear error."


@exercise(
    "06.2",
    difficulty=3,
    minutes=15,
    teaches="Sums before the ratio: features count by their variance.",
)
def norm_of_unlike(answer: Callable[[Tensor], Any]) -> str:
    """Features of three sizes, frequencies and shapes."""
    generator = torch.Generator().manual_seed(1)
    w = torch.rand(5000, 3, generator=generator, dtype=torch.float64)
    w[:, 1] = 1.5 * (w[:, 1] < 0.1)
    w[:, 2] = 0.6 * torch.randn(5000, generator=generator, dtype=torch.float64)
    given = answer(w)
    if isinstance(given, Tensor) and given.numel() != 1:
        raise NotYet(f"Return one number, not shape {list(given.shape)}.")
    value = float(given)
    square = w.square()
    covariance = (w * square).mean(0) - w.mean(0) * square.mean(0)
    variance, of_square = w.var(0, correction=0), square.var(0, correction=0)
    each = covariance**2 / (variance * of_square)
    assert not _near(value, float(each.mean())), (
        "That is the mean of each feature's own R2; add up predicted and total variance first."
    )
    flat = torch.stack([w.flatten(), square.flatten()])
    assert not _near(value, float(torch.corrcoef(flat)[0, 1] ** 2)), (
        "That is one line for all features together; each feature has a slope of its own."
    )
    assert not _near(value, float(covariance.sum() ** 2 / (variance.sum() * of_square.sum()))), (
        "You added covariances before squaring: that is one slope for all features."
    )
    moments = torch.stack([w.pow(k).mean(0) for k in range(1, 5)], 1)
    expected = norm_predictability_of(moments)
    assert abs(value - expected) < 1e-3, (
        f"Here it is {expected:.3f} and yours is {value:.3f}: add cov(w, w^2)^2 / var(w) over "
        "features, add var(w^2), divide."
    )
    return f"{value:.2f}, although one of the three features predicts next to nothing."


@exercise(
    "06.3",
    difficulty=3,
    minutes=20,
    teaches="Absent features and a dense part are one thing to a linear probe of the vector.",
)
def twins_of_yours(answer: Callable[[], Any]) -> str:
    """Exact shares of the two recipes."""
    first, second = _pair(answer(), "(recipe with absent features, recipe with a dense part)")
    if not isinstance(first, PlantedRecipe) or not isinstance(second, PlantedRecipe):
        raise NotYet("Return two PlantedRecipes, not what was drawn from them.")
    one, two = first.draw(1).shares, second.draw(1).shares
    assert not (one.dense > 0 and two.absent > 0), (
        "The order is the other way: first the recipe with absent features."
    )
    assert one.dense == 0, "The first recipe has a dense part; leave dense_rank and dense_share 0."
    assert two.absent == 0, (
        "The second SAE has not learned everything; leave `learned` out, so nothing is absent."
    )
    assert one.absent > 0, "Nothing is absent in the first recipe; give `learned`."
    assert two.dense > 0, "The second recipe has no dense part; give dense_rank and dense_share."
    for name in ("linear", "nonlinear"):
        shares = getattr(one, name), getattr(two, name)
        assert min(shares) >= 0.1, (
            f"The {name} shares are {shares[0]:.3f} and {shares[1]:.3f}, expected at least a "
            "tenth: a larger absent or dense part, and noise in the weights."
        )
        assert abs(shares[0] - shares[1]) <= 0.01, (
            f"A probe tells them apart: the {name} shares are {shares[0]:.3f} and {shares[1]:.3f}."
        )
    return "No linear probe of the vector tells these two apart."


def _linear_error(kind: str, seed: int) -> tuple[Tensor, Tensor]:
    """x and a linear error that is absent features or a dense part, in a roomy world."""
    plain: dict[str, Any] = {"d_model": 24, "weight_noise": 0.2}
    if kind == "absent":
        recipe = PlantedRecipe(n_features=24, l0=3, learned=16, values="uniform", **plain)
    else:
        recipe = PlantedRecipe(
            n_features=16, l0=2, dense_rank=8, dense_share=0.3, dense_apart=True, **plain
        )
    sample = recipe.draw(6000, seed)
    # Not centred, as in life: the SAE may not know the mean of what it lacks.
    return sample.x, sample.absent + sample.dense + 3.0


@exercise(
    "06.4",
    difficulty=4,
    minutes=20,
    teaches="Fourth moments tell absent features from a dense part where second moments cannot.",
)
def absent_or_dense(answer: Callable[[Tensor, Tensor], Any]) -> str:
    """Three worlds of each kind."""
    verdicts: list[tuple[str, Any]] = []
    for seed in range(3):
        for kind in ("absent", "dense"):
            given = answer(*_linear_error(kind, seed))
            if given not in ("absent", "dense"):
                raise NotYet(f'Return the string "absent" or "dense", not {given!r}.')
            verdicts.append((kind, given))
    wrong = [kind for kind, given in verdicts if given != kind]
    assert len({given for _, given in verdicts}) == 2, (
        f"You call all six {verdicts[0][1]!r}: is v centred, and is the threshold between the two?"
    )
    assert len(wrong) < 6, "All six are the wrong way round: a high score means sparse features."
    assert not wrong, f"{len(wrong)} of six are wrong, first one that is {wrong[0]}."
    return "Six of six, from the fourth moment alone."


@exercise(
    "06.5",
    difficulty=2,
    minutes=10,
    teaches="A curve is never finished: its error falls as one over the square of the latents.",
)
def arcs_needed(answer: Callable[[float], Any]) -> str:
    """Against a search of the closed form."""

    def missed(arcs: int) -> float:
        return 1 - (arcs / math.pi * math.sin(math.pi / arcs)) ** 2

    for target in (0.5, 0.1, 0.01, 0.001):
        given = answer(target)
        if isinstance(given, bool) or int(given) != given:
            raise NotYet(f"Return a whole number of arcs, not {given!r}.")
        arcs = int(given)
        unsquared = next(
            k for k in range(2, 10_000) if 1 - k / math.pi * math.sin(math.pi / k) <= target
        )
        expected = next(k for k in range(2, 10_000) if missed(k) <= target)
        assert arcs == expected or arcs != unsquared, (
            "That leaves out the square: FVU is one less the squared length of the mean."
        )
        assert arcs >= 2, "Take at least two arcs."
        assert missed(arcs) <= target, (
            f"With {arcs} arcs the FVU is {missed(arcs):.4f}, above the target {target}."
        )
        assert arcs == expected, f"{expected} arcs are enough for {target}; you take {arcs}."
    return f"A thousandth needs {expected} latents, for one circle in a plane."

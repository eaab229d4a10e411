"""Checks of chapter 14: neighbours, all pairs at once, how many may be active, new latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import normalize

from darkmatter.book.checks.common import alike, normal
from darkmatter.book.exercises import NotYet, exercise
from darkmatter.geometry import (
    covariance_matched,
    nearest_neighbours,
    neighbour_cosines,
    random_neighbour_cosine,
    rms_cosine,
)


@exercise(
    "14.1", difficulty=1, minutes=8, teaches="A neighbour is another row, and the sign counts."
)
def kth_neighbour(answer: Callable[..., Any]) -> str:
    """Rows of different lengths, some nearly opposite to others."""
    directions = normal(0, 12, 4)
    directions[1], directions[3] = -directions[0] + 0.1 * directions[1], -directions[2]
    directions *= (1 + torch.arange(12, dtype=torch.float64))[:, None]
    units = normalize(directions, dim=1)
    cosines = units @ units.T
    for k in (1, 3):
        given = answer(directions.clone(), k)
        if not isinstance(given, Tensor) or given.shape != (12,):
            raise NotYet("Return a tensor [m], one cosine for each row.")
        right = neighbour_cosines(directions, (k,))[:, 0]
        with_self = cosines.topk(k, dim=1).values[:, -1]
        assert not alike(given, with_self), (
            "Each row counts as its own nearest neighbour; forbid it before you rank."
        )
        absolute = cosines.abs().fill_diagonal_(-1).topk(k, dim=1).values[:, -1]
        assert not alike(given, absolute), (
            "That ranks absolute cosines; an opposite direction is far, not near."
        )
        raw = (directions @ directions.T).fill_diagonal_(-torch.inf).topk(k, dim=1).values[:, -1]
        assert not alike(given, raw), "Those are dot products; scale the rows to unit length first."
        lowest = cosines.clone().fill_diagonal_(2).topk(k, dim=1, largest=False).values[:, -1]
        assert not alike(given, lowest), "Those are the farthest; sort in descending order."
        assert alike(given, right), f"These are not the cosines with neighbours of rank {k}."
    return "Your neighbours agree with dm.neighbour_cosines."


@exercise(
    "14.2",
    difficulty=3,
    minutes=12,
    teaches="The sum over all pairs needs only the d x d second moment.",
)
def rms_of_pairs(answer: Callable[[Tensor], float]) -> str:
    """A few rows first, then so many that their pairs would take a terabyte."""
    few = normalize(normal(1, 7, 3), dim=1)
    given = float(answer(few))
    moment = few.T @ few
    wrong = {
        "You left the pairs of a row with itself in; take m away from the sum.": math.sqrt(
            float(moment.square().sum()) / 49
        ),
        "The pairs of a row with itself are out of the sum, but still in the count: "
        "m (m - 1).": math.sqrt((float(moment.square().sum()) - 7) / 49),
        "The pairs of a row with itself are out of the count, but still in the sum: take m "
        "away.": math.sqrt(float(moment.square().sum()) / 42),
        "That is the mean square; take the root.": rms_cosine(few) ** 2,
        "That is the mean absolute cosine; square, average, then take the root.": (
            float((few @ few.T).fill_diagonal_(0).abs().sum()) / 42
        ),
    }
    for message, value in wrong.items():
        assert abs(given - value) > 1e-6, message
    assert abs(given - rms_cosine(few)) < 1e-6, (
        "That is not the root mean square of u_i . u_j over i != j."
    )
    many = normalize(normal(2, 500_000, 2), dim=1)
    try:
        large = float(answer(many))
    except (RuntimeError, MemoryError) as error:
        raise NotYet(
            "With 500,000 rows your answer runs out of memory; U'U [d, d] is all you need."
        ) from error
    # Rounding of a float64 sum of 500,000 squares.
    assert abs(large - rms_cosine(many)) < 1e-6, "It goes wrong for many rows."
    return "All pairs of half a million directions, from a matrix of two by two."


@exercise(
    "14.3", difficulty=2, minutes=10, teaches="Worst and typical case differ a hundredfold in l."
)
def most_active(answer: Callable[..., Any]) -> str:
    """Sizes of real SAEs, and a margin below one."""
    for m, d, margin in ((24_576, 768, 1.0), (16_384, 2304, 0.5), (131_072, 3584, 0.8)):
        given = answer(m, d, margin)
        if not isinstance(given, tuple | list) or len(cast("tuple[Any, ...]", given)) != 2:
            raise NotYet("Return a pair of whole numbers: (worst, typical).")
        worst, typical = given
        exact = margin**2 * d / (8 * math.log(m)), margin**2 * d
        right = math.floor(exact[0]), math.floor(exact[1] + 1e-9)
        assert (worst, typical) != right[::-1], "The two are swapped: the worst case comes first."
        assert margin == 1 or typical != math.floor(margin * d), (
            "The margin must be squared: noise grows like the root of l."
        )
        assert margin == 1 or typical != d, "You left out the margin."
        assert worst != math.floor(margin**2 * d / (8 * math.log10(m))), (
            "That is with the logarithm to base ten; take the natural one."
        )
        assert worst != math.floor(margin * math.sqrt(d / (8 * math.log(m)))), (
            "Solve for l, not for its root."
        )
        assert worst != math.ceil(exact[0]), "Round down: one more is already too many."
        if int(worst) != worst or int(typical) != typical:
            raise NotYet("Return whole numbers: the largest l that is still allowed.")
        assert worst == right[0], f"The worst case allows {right[0]} of {m} in {d}, not {worst}."
        assert typical == right[1], f"The typical case allows {right[1]}, not {typical}."
    return "One formula says ten, the other hundreds; real SAEs lie between."


@exercise("14.4", difficulty=2, minutes=10, teaches="New is what no narrow latent is near.")
def new_latents(answer: Callable[..., Any]) -> str:
    """Children, opposites of narrow latents, and strangers."""
    narrow = normalize(normal(3, 8, 6), dim=1)
    wide = torch.cat([narrow[:4] + 0.1 * normal(4, 4, 6), -narrow[4:6], normal(5, 7, 6)])
    wide = normalize(wide, dim=1)
    given = answer(narrow.clone(), wide.clone(), 0.85)
    if not isinstance(given, Tensor) or given.dtype != torch.bool:
        raise NotYet("Return a boolean tensor: True where a wide latent is new.")
    assert given.shape != (8,), (
        "That is one answer for each narrow latent; the wide ones are asked for."
    )
    if given.shape != (13,):
        raise NotYet(
            f"Your answer has shape {list(given.shape)}, expected [13], one a wide latent."
        )
    best = nearest_neighbours(wide, 1, among=narrow).cosines[:, 0]
    right = best < 0.85
    assert not torch.equal(given, ~right), "Those are the latents that have a parent; invert."
    absolute = (wide @ narrow.T).abs().amax(1) < 0.85
    assert not torch.equal(given, absolute), (
        "You took an opposite direction for a parent; the sign counts."
    )
    some = ((wide @ narrow.T) < 0.85).any(1)
    assert not torch.equal(given, some), (
        "New means far from every narrow latent, not from some: take the best cosine."
    )
    assert torch.equal(given, right), "These are not the wide latents without a parent."
    return "Four children found, and an opposite is no child."


@exercise("14.5", difficulty=3, minutes=12, teaches="Chance depends on the spread, not on d alone.")
def seemingly_crowded(answer: Callable[..., Any]) -> str:
    """Directions that look crowded beside isotropic chance, and not beside their own spread."""
    m, d = 400, 32
    given = answer(m, d, torch.Generator().manual_seed(0))
    if not isinstance(given, Tensor) or given.shape != (m, d):
        raise NotYet(f"Return a tensor [m, d], here [{m}, {d}].")
    rows = normalize(given.double(), dim=1)
    assert bool((rows.norm(dim=1) > 0).all()), "A direction is zero or not finite."

    def nearest(directions: Tensor) -> float:
        return float(nearest_neighbours(directions, 1).cosines.mean())

    looks, chance = nearest(rows), random_neighbour_cosine(m, d)
    assert looks >= 1.3 * chance, (
        f"The nearest neighbour has a cosine of {looks:.2f}; the formula for random directions "
        f"says {chance:.2f}, and a third more is asked for. Give some dimensions more variance."
    )
    control = nearest(covariance_matched(rows, 5))
    # Two draws of 400 directions of one spread differ by two hundredths here.
    assert looks < 1.08 * control, (
        f"Directions of the same spread have {control:.2f}, you have {looks:.2f}: yours really are "
        "crowded. Draw each one without a look at the others."
    )
    return f"{looks:.2f} against a chance of {chance:.2f}. With the same spread: {control:.2f}."

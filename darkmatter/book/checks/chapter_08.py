"""Checks of chapter 08: targets of equal size, matched noise, deciles, and the balanced score."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise


def skewed(n: int) -> Tensor:
    """Correlated rows of unequal variances about a mean far from zero."""
    generator = torch.Generator().manual_seed(8)
    mix = torch.tensor(
        [[3.0, 1.0, 0.0, 0.5], [0.0, 1.0, -0.8, 0.0], [0.0, 0.0, 0.4, 0.3], [0.0, 0.0, 0.0, 0.2]],
        dtype=torch.float64,
    )
    draws = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return draws @ mix + torch.tensor([5.0, -2.0, 0.0, 1.0], dtype=torch.float64)


def rows_like(given: Any, t: Tensor) -> Tensor:
    """The answer as float64 rows of the shape of t."""
    if not isinstance(given, Tensor) or given.shape != t.shape:
        came = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise NotYet(f"Return a tensor of shape {list(t.shape)}, not {came}.")
    return given.double()


@exercise(
    "08.1", difficulty=1, minutes=8, teaches="One scale for all dimensions leaves the FVU alone."
)
def equal_size(answer: Callable[[Tensor], Any]) -> str:
    """Mean zero, mean squared length d, and the shape of the covariance kept."""
    t = skewed(500)
    z = rows_like(answer(t.clone()), t)
    centred = t - t.mean(0)
    assert float(z.mean(0).abs().max()) < 1e-6, (
        "The mean is not zero in every dimension: subtract t.mean(0), a vector."
    )
    assert not torch.allclose(z.var(0, unbiased=False), torch.ones(4).double(), atol=0.02), (
        "You scaled every dimension by itself; that changes the covariance. Use one number for all."
    )
    size = float(z.square().sum(1).mean())
    assert abs(size - 1) > 1e-6, "The mean squared length is 1; it should be d."
    assert not torch.allclose(z.norm(dim=1), z.norm(dim=1)[0].expand(500)), (
        "You gave every row the same length; use one number for all rows."
    )
    assert abs(size - 4) < 0.02, (
        f"The mean squared length of a row is {size:.3f}, not d = 4: divide by the root of the "
        "mean squared length of the centred rows, times the root of d."
    )
    assert torch.allclose(z / z.norm(), centred / centred.norm(), atol=1e-6), (
        "The rows are no longer the centred rows times one number."
    )
    return "Now one learning rate serves every target, and the FVU is what it was."


@exercise("08.2", difficulty=3, minutes=12, teaches="Noise is matched by a root of the covariance.")
def matched_noise(answer: Callable[[Tensor, torch.Generator], Any]) -> str:
    """Mean, variances and correlations of the noise, and that it is Gaussian and fresh."""
    t = skewed(40_000)
    noise = rows_like(answer(t.clone(), torch.Generator().manual_seed(9)), t)
    covariance, given = torch.cov(t.T), torch.cov(noise.T)
    off = covariance - torch.diag(covariance.diagonal())

    def equal(other: Tensor) -> bool:
        # 40 000 rows: a correlation is known to 0.005, a variance to 0.7 %; ten times that.
        scale = other.diagonal().sqrt()
        return bool(((given - other).abs() < 0.05 * torch.outer(scale, scale)).all())

    lower = torch.linalg.cholesky(covariance)
    assert not torch.allclose(noise.mean(0), torch.zeros(4).double(), atol=0.05), (
        "The mean is zero; add that of t."
    )
    assert not equal(torch.diag(covariance.diagonal())) or float(off.abs().max()) == 0, (
        "The variances match, but the dimensions are independent: the covariance has more in it."
    )
    assert not equal(lower.T @ lower), (
        "The factor is the wrong way round: for draws g of unit covariance, g A has covariance "
        "A.T @ A, and cholesky gives L with L @ L.T."
    )
    assert not equal(covariance @ covariance), (
        "You multiplied by the covariance itself; multiply by a root of it."
    )
    assert equal(covariance), "The covariance is not that of t."
    assert torch.allclose(noise.mean(0), t.mean(0), atol=0.05), "The mean is not that of t."
    assert not torch.equal(noise.sort(0).values, t.sort(0).values), (
        "Those are the rows of t in another order: they keep every structure of t. Draw new ones."
    )
    again = rows_like(answer(t.clone(), torch.Generator().manual_seed(10)), t)
    assert not torch.equal(noise, again), "Draw with the generator that is passed."
    return "Every linear statistic is that of t; what an SAE finds beyond it is structure."


@exercise("08.3", difficulty=2, minutes=10, teaches="Deciles are by rank among active rows.")
def decile_of(answer: Callable[[Tensor], Any]) -> str:
    """Forty active rows of skewed strength among silent ones."""
    generator = torch.Generator().manual_seed(11)
    activation = torch.zeros(100)
    active = torch.randperm(100, generator=generator)[:40]
    activation[active] = torch.rand(40, generator=generator).square() * 9 + 0.01
    group = answer(activation.clone())
    if not isinstance(group, Tensor) or tuple(group.shape) != (100,):
        raise NotYet("Return a tensor with one group for each row, [n].")
    group = group.long()
    silent = activation == 0
    assert not bool((group[silent] > 0).any()), (
        "Silent rows belong to group 0; rank the active rows only."
    )
    counts = torch.bincount(group[~silent].clamp(0, 12), minlength=11).tolist()
    assert counts[0] == 0, "A row that is active got group 0; the weakest group is 1."
    assert len(set(counts[1:11])) == 1, (
        f"The groups hold {counts[1:11]} rows: they are cut by value. Cut by rank, so that each "
        "holds as many."
    )
    weakest = activation[group == 1].mean()
    assert weakest < activation[group == 10].mean(), "Group 10 should hold the strongest."
    rank = activation[~silent].argsort().argsort()
    assert torch.equal(group[~silent], 1 + rank // 4), (
        "The groups are of equal size but not in order of activation; argsort gives the order, "
        "argsort of that the rank."
    )
    return "Every decile holds as many contexts, however skewed the activations."


@exercise("08.4", difficulty=2, minutes=10, teaches="Balanced means that no constant answer pays.")
def balanced_score(answer: Callable[[list[bool | None], list[int]], Any]) -> str:
    """Answers with faults, unequal groups, and the two constant judges."""
    group = [g for g in range(1, 11) for _ in range(2 + g % 3)] + [0] * 30
    said = [None if i % 6 == 5 else i % 7 not in (1, 2) for i in range(len(group))]

    def right(g: int, drop: bool) -> float:
        mine = [s for s, of in zip(said, group, strict=True) if of == g]
        mine = [s for s in mine if not drop or s is not None]
        return sum(s is not None and s == (g > 0) for s in mine) / max(len(mine), 1)

    def balanced(drop: bool) -> float:
        return (sum(right(g, drop) for g in range(1, 11)) / 10 + right(0, drop)) / 2

    value = float(answer(said, group))
    correct = [s is not None and s == (g > 0) for s, g in zip(said, group, strict=True)]
    as_silent = [bool(s) == (g > 0) for s, g in zip(said, group, strict=True)]
    shares = [
        sum(c for c, of in zip(as_silent, group, strict=True) if of == g) / group.count(g)
        for g in range(11)
    ]
    mistakes = {
        sum(correct) / len(correct): (
            "That is the share of right answers over all questions: whoever always says silent "
            "scores well, as most contexts are silent."
        ),
        sum(right(g, False) for g in range(11)) / 11: (
            "That is the mean over eleven groups: then always saying active pays. Group 0 weighs "
            "one half."
        ),
        balanced(True): "You left the unusable answers out; here they count as wrong.",
        (sum(shares[1:]) / 10 + shares[0]) / 2: (
            "You took None for silent, which rewards a judge that says nothing; it is wrong in "
            "every group."
        ),
        sum(right(g, False) for g in range(1, 11))
        / 10: "The silent contexts, group 0, are missing.",
    }
    for mistake, message in mistakes.items():
        assert abs(value - mistake) > 1e-9, message
    assert abs(value - balanced(False)) < 1e-9, (
        "It is not the mean of (mean share right over groups 1 to 10) and (share right in group 0)."
    )
    for constant in (True, False):
        assert abs(float(answer([constant] * len(group), group)) - 0.5) < 1e-9, (
            f"A judge that always says {constant} should score one half."
        )
    return "A judge that gives the same answer always scores one half."


@exercise(
    "08.5",
    difficulty=2,
    minutes=10,
    teaches="A judge that may decline can look as good as it likes.",
)
def silenced(answer: Callable[[list[bool], list[int]], Any]) -> str:
    """Answers of a coin, some withdrawn: usable ones nearly all right, all counted no better."""
    generator = torch.Generator().manual_seed(12)
    group = [g for g in range(1, 11) for _ in range(20)] + [0] * 200
    said = (torch.rand(400, generator=generator) < 0.5).tolist()
    given = answer(list(said), list(group))
    if not isinstance(given, list) or len(cast("list[Any]", given)) != 400:
        raise NotYet("Return a list with True, False or None for each of the 400 questions.")
    kept = cast("list[bool | None]", given)
    assert all(k is None or k == s for k, s in zip(kept, said, strict=True)), (
        "An answer was changed. The judge may only decline: put None in its place."
    )

    def share(wanted: int, usable: bool) -> float:
        mine = [k for k, g in zip(kept, group, strict=True) if g == wanted]
        right = sum(k == (wanted > 0) for k in mine if k is not None)
        asked = len([k for k in mine if k is not None]) if usable else len(mine)
        assert asked, f"No usable answer is left in group {wanted}, so it has no score: keep some."
        return right / asked

    def score(usable: bool) -> float:
        return (sum(share(g, usable) for g in range(1, 11)) / 10 + share(0, usable)) / 2

    reported, counted = score(usable=True), score(usable=False)
    assert any(k is None for k in kept), (
        "Nothing was withdrawn, so the score is that of a coin. Which answers would you drop?"
    )
    assert reported > 0.9, (
        f"The usable answers score {reported:.2f}, and more than nine tenths are asked for: "
        "withdraw those that are wrong."
    )
    assert counted < 0.6, f"With all questions counted the score is {counted:.2f}: that is no coin."
    return f"Reported: {reported:.2f}. With every question counted, the coin has {counted:.2f}."

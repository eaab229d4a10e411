"""Checks of chapter 03: averages of R2, dead and shrunken SAEs, merging, and an R2 of noise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.leastsquares import LinearStatistics, r2


def uneven() -> tuple[Tensor, Tensor]:
    """A target of one large dimension predicted well and two small ones predicted badly."""
    generator = torch.Generator().manual_seed(3)
    size = torch.tensor([10.0, 0.5, 0.1], dtype=torch.float64)
    miss = torch.tensor([0.3, 0.9, 0.95], dtype=torch.float64)
    y = size * torch.randn(500, 3, generator=generator, dtype=torch.float64)
    residual = size * miss * torch.randn(500, 3, generator=generator, dtype=torch.float64)
    # Away from zero, so that squares about zero are not squares about the mean.
    offset = torch.tensor([4.0, -2.0, 1.0], dtype=torch.float64)
    return y + offset, y + offset - residual


def near(a: float, b: float, tolerance: float = 1e-6) -> bool:
    """Whether two numbers agree to an absolute tolerance."""
    return abs(float(a) - b) <= tolerance


@exercise(
    "03.1", difficulty=1, minutes=8, teaches="The two averages weigh the dimensions differently."
)
def two_averages(answer: Callable[..., Any]) -> str:
    """Both averages on a target whose dimensions differ a hundredfold in size."""
    y, y_hat = uneven()
    given = answer(y, y_hat)
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet("Return a pair of numbers: (dims, pooled).")
    dims, pooled = (float(one) for one in given)
    right = r2(y, y_hat, "dims"), r2(y, y_hat, "pooled")
    assert not (near(dims, right[1]) and near(pooled, right[0])), (
        "The two are swapped: dims, the mean over dimensions, comes first."
    )
    about_zero = 1 - (y - y_hat).square().sum(0) / y.square().sum(0)
    assert not near(dims, float(about_zero.mean())), (
        "Your total sum of squares is about zero; take it about the mean of each dimension."
    )
    total = (y - y.mean()).square().sum()
    assert not near(pooled, float(1 - (y - y_hat).square().sum() / total)), (
        "Your pooled total is about one mean of all entries; each dimension has a mean of its own."
    )
    assert near(dims, right[0]), "dims is not the mean over dimensions of 1 - RSS_j / TSS_j."
    assert near(pooled, right[1]), (
        "pooled is not 1 - RSS / TSS with both summed over dimensions before dividing."
    )
    return (
        f"Here they are {dims:.2f} and {pooled:.2f}: two of three dimensions are predicted badly, "
        "but they hold next to none of the variance."
    )


@exercise(
    "03.2", difficulty=2, minutes=8, teaches="What a linear probe finds in the error of a dead SAE."
)
def dead_probe(answer: Callable[..., Any]) -> str:
    """The map that predicts x - mean(x) from x."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(400, 6, generator=generator, dtype=torch.float64) + 3.0
    given = answer(x)
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet("Return a pair of tensors: (weight, bias).")
    weight, bias = given
    if tuple(weight.shape) != (6, 6) or tuple(bias.shape) != (6,):
        raise NotYet(
            f"weight is {list(weight.shape)} and bias {list(bias.shape)}; for x of 6 columns they "
            "must be [6, 6] and [6]."
        )
    weight, bias = weight.double(), bias.double()
    identity = torch.eye(6, dtype=torch.float64)
    assert not torch.allclose(weight, torch.zeros_like(weight)), (
        "A weight of zero is the map of the SAE, which returns the mean; its error is the rest."
    )
    assert not torch.allclose(weight, -identity), "The sign is wrong: the error is x - x_hat."
    assert torch.allclose(weight, identity), (
        "The error is x less a constant: which weight copies x?"
    )
    assert not torch.allclose(bias, torch.zeros_like(bias)), (
        "With bias zero this is the map for the SAE that returns zero; this one returns the mean."
    )
    assert not torch.allclose(bias, x.mean(0)), (
        "The sign of the bias is wrong: x_hat is subtracted."
    )
    assert torch.allclose(bias, -x.mean(0)), "The bias must take the mean of x away."
    return "R2 is one for an SAE without a single feature: R2 is no grade."


def shortened(factor: float) -> tuple[Tensor, Tensor]:
    """A sparse part returned too short by `factor`, a missed part, and a mean that is returned."""
    generator = torch.Generator().manual_seed(5)
    found = torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    missed = 0.8 * torch.randn(20_000, 8, generator=generator, dtype=torch.float64)
    offset = torch.full((8,), 5.0, dtype=torch.float64)
    return offset + found + missed, offset + factor * found


@exercise("03.3", difficulty=3, minutes=12, teaches="Too short is not the same as incomplete.")
def shrinkage_factor(answer: Callable[[Tensor, Tensor], float]) -> str:
    """Planted factors, with a missed part that makes gamma too small."""
    for factor in (0.9, 0.6):
        x, x_hat = shortened(factor)
        given = float(answer(x, x_hat))
        gamma = float(((x_hat * x).sum(1) / x.square().sum(1)).mean())
        x_c, hat_c = x - x.mean(0), x_hat - x_hat.mean(0)
        products = {
            "xx": float(x_c.square().sum()),
            "xh": float((x_c * hat_c).sum()),
            "hh": float(hat_c.square().sum()),
        }
        assert not near(given, gamma), (
            "That is gamma: it also counts what the SAE misses. Ask how x_hat should be stretched."
        )
        assert not near(given, products["xh"] / products["hh"], 1e-3), (
            "That is the stretch; the factor by which x_hat is too short is its inverse."
        )
        assert not near(given, products["xh"] / products["xx"], 1e-3), (
            "That is gamma of the sums: it also counts what the SAE misses. Divide by x_hat . x, "
            "not by x . x."
        )
        uncentred = float(x_hat.square().sum() / (x * x_hat).sum())
        assert not near(given, uncentred), "Centre both first: the mean is returned in full length."
        # 20 000 rows of 8: the cross term of found and missed parts moves the ratio by about 0.002.
        assert near(given, factor, 0.01), (
            f"{factor} was planted and you return {given:.3f}: compare |x_hat|^2 with x_hat . x."
        )
    return "You tell a short reconstruction from one that lacks something."


@exercise("03.4", difficulty=3, minutes=15, teaches="Moments merge exactly, if the means are kept.")
def merged_moment(answer: Callable[..., Any]) -> str:
    """Two parts of unequal size and mean, against the moment of all rows."""
    generator = torch.Generator().manual_seed(6)
    rows = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    rows[:120] += torch.tensor([3.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    a, b = (LinearStatistics(4, 1).partial_fit(p, p[:, 0]) for p in (rows[:120], rows[120:]))
    whole = LinearStatistics(4, 1).partial_fit(rows, rows[:, 0]).sxx
    given = answer(a.n, a.mean_x, a.sxx, b.n, b.mean_x, b.sxx)
    if not isinstance(given, Tensor) or tuple(given.shape) != (4, 4):
        raise NotYet("Return a tensor [d, d], here [4, 4].")
    apart = torch.outer(a.mean_x - b.mean_x, a.mean_x - b.mean_x)
    both = a.sxx + b.sxx
    assert not torch.allclose(given, both), (
        "That is the sum of the two moments; it forgets that the two means differ."
    )
    assert not torch.allclose(given, both + apart), (
        "The distance of the means counts n_a n_b / (n_a + n_b) times, not once."
    )
    assert not torch.allclose(given, both + a.n * b.n * apart), "Divide n_a n_b by n_a + n_b."
    assert not torch.allclose(given, both + (a.n + b.n) * apart), (
        "The distance of the means counts n_a n_b / (n_a + n_b) times, not n_a + n_b times."
    )
    assert torch.allclose(given, whole, rtol=1e-9), (
        "It is not the moment of all rows about their common mean."
    )
    return "The merged moment is exact, whatever the cut."


@exercise(
    "03.5", difficulty=2, minutes=10, teaches="What noise scores on the rows it was fitted on."
)
def rows_for_a_lie(answer: Callable[[int, float], int]) -> str:
    """The in-sample R2 of noise at the number of rows given."""
    generator = torch.Generator().manual_seed(7)
    for d, wanted in ((40, 0.9), (40, 0.5), (60, 0.2)):
        n = answer(d, wanted)
        if isinstance(n, bool) or int(n) != n:
            raise NotYet(f"Return a whole number of rows, not {n!r}.")
        n = int(n)
        assert n != round(d * wanted), (
            "That is fewer rows than inputs: no fit at all. Divide by R2."
        )
        assert wanted == 0.5 or abs(n - d / (1 - wanted)) > 1.5, (
            "That gives 1 - R2: chance scores d / (n - 1) in-sample, not 1 - d / n."
        )
        assert n > d, f"{n} rows cannot fit {d} inputs and an offset; d + 1 is the least."
        x = torch.randn(n, d, generator=generator, dtype=torch.float64)
        e = torch.randn(n, 60, generator=generator, dtype=torch.float64)
        noise = LinearStatistics(d, 60).partial_fit(x, e)
        scored = noise.r2(noise.solve(), "pooled")
        # 60 targets: the mean of 60 beta variables of deviation below 0.08 is within 0.03.
        assert abs(scored - wanted) < 0.04, (
            f"With {n} rows, noise of {d} inputs scores {scored:.2f}, not {wanted}."
        )
    return "Any R2 can be had from noise, on the rows it was fitted on. Hold documents out."

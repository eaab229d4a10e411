"""Checks of chapter 11: what a helper removes, a bar by arithmetic, shuffling, a perfect lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter.book.checks.common import normal
from darkmatter.book.exercises import NotYet, exercise
from darkmatter.leastsquares import LinearStatistics, r2


def near(a: float, b: float, tolerance: float = 1e-6) -> bool:
    """Whether two numbers agree to an absolute tolerance."""
    return abs(float(a) - b) <= tolerance


@exercise("11.1", difficulty=1, minutes=6, teaches="FVUs on the same rows compare by squares.")
def share_gone(answer: Callable[..., Any]) -> str:
    """One less the ratio of two sums of squares."""
    left_x = normal(1, 60, 5) * torch.linspace(0.2, 3, 60)[:, None]
    left_both = 0.8 * left_x + 0.1
    given = float(answer(left_x, left_both))
    ratio = float(left_both.square().sum() / left_x.square().sum())
    assert not near(given, ratio), "That is the share that is left; one minus it is gone."
    assert not near(given, 1 - ratio**0.5), (
        "That compares lengths; an FVU is made of squares, without a root."
    )
    each = 1 - left_both.square().sum(1) / left_x.square().sum(1)
    assert not near(given, float(each.mean())), (
        "That averages over tokens; sum the squares of all tokens first, as the FVU does."
    )
    assert not near(given, 1 / ratio - 1), (
        "Divide by what is left after x alone: it is the nonlinear FVU that shrinks."
    )
    assert near(given, 1 - ratio), "Return 1 - (sum of squares of left_both) / (that of left_x)."
    return f"{given:.0%} of the nonlinear FVU is gone here."


@exercise(
    "11.2", difficulty=3, minutes=12, teaches="The nonlinear error is a part of the reconstruction."
)
def bar_of_its_own(answer: Callable[..., Any]) -> str:
    """trace(N S^-1 N) / trace(N), compared with the regression on rows."""
    x = normal(2, 800, 6) * torch.linspace(0.5, 3, 6)
    error = 0.3 * x + 0.6 * torch.relu(normal(3, 800, 6)) * torch.linspace(1, 0.2, 6)
    centred = x - x.mean(0)
    e = error - error.mean(0)
    nonlinear = e - centred @ torch.linalg.lstsq(centred, e).solution
    x_hat = centred - e
    given_n, given_s = torch.cov(nonlinear.T), torch.cov(x_hat.T)
    given = float(answer(given_n.clone(), given_s.clone()))
    weights = torch.linalg.lstsq(x_hat, nonlinear).solution
    right = r2(nonlinear, x_hat @ weights, "pooled")
    assert not near(given, float(given_n.trace() / given_s.trace())), (
        "That is the size of the nonlinear error in the reconstruction; directions differ, so the "
        "inverse of the whole covariance is needed, not its trace."
    )
    dims = r2(nonlinear, x_hat @ weights, "dims")
    assert not near(given, dims), (
        "That is the mean over dimensions; pooled is one trace divided by another."
    )
    assert not near(given, 1 - right), "That is the share that is left; one minus it is explained."
    assert not near(given, float((given_n @ torch.linalg.solve(given_s, given_n)).trace())), (
        "That is the explained variance; divide by the trace of N to get a share."
    )
    assert near(given, right), "It is trace(N S^-1 N) / trace(N), with S that of x_hat."
    return f"{given:.2f}, and no regression was run."


@exercise(
    "11.3", difficulty=3, minutes=12, teaches="A shuffled control must cross document borders."
)
def other_documents(answer: Callable[..., Any]) -> str:
    """A permutation without any row of the same document."""
    generator = torch.Generator().manual_seed(5)
    sizes = torch.tensor([1, 30, 7, 50, 2, 12])
    document = torch.arange(6).repeat_interleave(sizes)
    for case in (document, document[torch.randperm(len(document), generator=generator)]):
        partner: Any = answer(case.clone())
        if not isinstance(partner, Tensor) or partner.shape != case.shape:
            raise NotYet(f"Return an int tensor of shape {list(case.shape)}: a partner a row.")
        if partner.is_floating_point() or sorted(partner.tolist()) != list(range(len(case))):
            raise NotYet(
                "Every row must be a partner exactly once: return a permutation of 0 to n - 1."
            )
        same = int((case == case[partner]).sum())
        assert same == 0, (
            f"{same} rows have a partner of their own document. A random permutation leaves such "
            "rows, and so does a roll of rows that are not sorted by document."
        )
    return "No row has a partner of its own document, in any order of the rows."


@exercise("11.4", difficulty=2, minutes=8, teaches="A perfect score can be arithmetic.")
def perfect_help(answer: Callable[..., Any]) -> str:
    """Regressors that explain the nonlinear error of two different SAEs on unseen rows."""
    for seed in (6, 7):
        x = normal(seed, 900, 5)
        # Of changing size, so that the error is no linear map of x_hat alone.
        x_hat = 0.8 * x + 0.5 * torch.sin(2 * x) + 0.3 * normal(seed + 10, 900, 5)
        regressors: Any = answer(x.clone(), x_hat.clone())
        if not isinstance(regressors, Tensor) or regressors.ndim != 2 or len(regressors) != 900:
            raise NotYet("Return a tensor [n, k]: k columns for each of the n rows of x.")
        fitted, scored = slice(0, 600), slice(600, 900)
        error = x - x_hat
        map = LinearStatistics(5, 5).partial_fit(x[fitted], error[fitted]).solve()
        nonlinear = error - map(x)
        helper = LinearStatistics(regressors.shape[1], 5)
        helper.partial_fit(regressors[fitted], nonlinear[fitted])
        found = r2(nonlinear[scored], helper.solve()(regressors[scored]), "pooled")
        assert regressors.shape[1] != 5 or not torch.allclose(regressors, error), (
            "That is the error itself, which you may not use; which honest blocks determine it?"
        )
        assert not torch.equal(regressors, x), (
            "x alone predicts nothing of the nonlinear error: what it can predict was taken out."
        )
        assert not torch.equal(regressors, x_hat), (
            f"x_hat alone gets {found:.2f}: the nonlinear error is a part of it, but not all of it."
        )
        assert found > 0.999, f"Held out your regressors score {found:.2f}; one is possible."
    return "R2 one on every SAE, and nothing was learnt about any."

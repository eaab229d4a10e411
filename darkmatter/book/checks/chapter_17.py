"""Checks of chapter 17: a budget shared by a batch, nested losses, a pursuit, a pooled cosine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.checks.common import alike, normal
from darkmatter.book.exercises import NotYet, exercise


def _kept(flat: Tensor, k: int) -> Tensor:
    best = flat.topk(k, dim=-1)
    return torch.zeros_like(flat).scatter(-1, best.indices, best.values)


@exercise(
    "17.1", difficulty=2, minutes=10, teaches="BatchTopK counts over a batch, not over a token."
)
def batch_topk(answer: Callable[..., Any]) -> str:
    """Tokens of unlike sizes, of which one takes most of the budget; a batch mostly below 0."""
    pre = normal(1, 6, 9) * torch.tensor([[0.2], [3.0], [1.0], [0.5], [2.0], [0.1]]).double()
    given = answer(pre.clone(), 2)
    if not isinstance(given, Tensor) or given.shape != pre.shape:
        raise NotYet("Return a tensor of the shape of pre: zeros where a latent is off.")
    f = pre.relu()
    assert not alike(given, _kept(f, 2)), (
        "That keeps k latents of every token, which is TopK; the budget is k times n for the batch."
    )
    assert not alike(given, _kept(f.flatten(), 2).view_as(f)), (
        "That keeps k entries of the whole batch; there are k for each of the n tokens."
    )
    right = _kept(f.flatten(), 12).view_as(f)
    assert not alike(given, (right > 0).double()), "Keep the values of the entries, not ones."
    assert alike(given, right), "These are not the k n largest entries of the batch."
    below = pre - 2.5
    expected = _kept(below.relu().flatten(), 12).view_as(f)
    assert alike(answer(below.clone(), 2), expected), (
        "Where too few entries are positive, negative ones must not be kept: codes are at least 0."
    )
    return "Loud tokens take more of the budget than soft ones."


@exercise("17.2", difficulty=3, minutes=12, teaches="Early latents learn from every nested loss.")
def matryoshka(answer: Callable[..., Any]) -> str:
    """Planted codes, a bias that matters, three widths."""
    x, f, W, b = normal(1, 20, 5), normal(2, 20, 8).relu(), normal(3, 8, 5), 2 + normal(4, 5)
    widths = [2, 4, 8]
    given = answer(x, f, W, b, widths)
    if given is None:
        raise NotYet("Return the loss, one number.")
    value = float(given)

    def loss(low: int, high: int, bias: Tensor | float = b) -> float:
        return float((x - f[:, low:high] @ W[low:high] - bias).square().sum(1).mean())

    right = sum(loss(0, w) for w in widths)
    assert abs(value - loss(0, 8)) > 1e-6, "That is the loss of the full width alone."
    assert abs(value - right / 3) > 1e-6, "That is the mean over widths; the losses are summed."
    assert abs(value - sum(loss(0, w, 0.0) for w in widths)) > 1e-6, "The bias is missing."
    slices = sum(loss(low, high) for low, high in ((0, 2), (2, 4), (4, 8)))
    assert abs(value - slices) > 1e-6, (
        "Those are slices; widths are nested, so each takes all latents from the first on."
    )
    assert abs(value - right / 5) > 1e-6, (
        "That is a mean over dimensions; sum over dimensions, then take the mean over tokens."
    )
    assert abs(value - right) < 1e-6, (
        "The loss is the sum over widths of the mean over tokens of |x - f[:, :w] W[:w] - b|^2."
    )
    return "The first latents have to do well alone, and with all others."


def _pursued(x: Tensor, W: Tensor, k: int, accumulate: bool = True) -> Tensor:
    rest, code, rows = x.clone(), x.new_zeros(len(x), len(W)), torch.arange(len(x))
    for _ in range(k):
        value, latent = (rest @ W.T).max(1)
        value = value.relu()
        code[rows, latent] = value + (code[rows, latent] if accumulate else 0.0)
        rest = rest - value[:, None] * W[latent]
    return code


@exercise(
    "17.3", difficulty=3, minutes=15, teaches="A pursuit looks again at what is left after a step."
)
def pursue(answer: Callable[..., Any]) -> str:
    """Directions that overlap, so that what is chosen first changes what is chosen next."""
    W = torch.nn.functional.normalize(normal(1, 7, 4), dim=1)
    x = normal(2, 30, 4)
    before = x.clone()
    given = answer(x, W, 5)
    if not isinstance(given, Tensor) or given.shape != (30, 7):
        raise NotYet("Return the codes, one row for each row of x and one column for each latent.")
    assert torch.equal(x, before), "Your function changes x itself; subtract from a copy."
    assert not alike(given, _kept((x @ W.T).relu(), 5)), (
        "That takes the largest products with x at once. After each step, look at what is left."
    )
    right = _pursued(x, W, 5)
    assert not alike(given, _pursued(x, W, 5, accumulate=False)), (
        "A latent that is chosen again must add to its code, not replace it."
    )
    assert bool((given >= 0).all()), "A product below zero adds nothing: codes are at least 0."
    assert alike(given, right), (
        "These are not the codes of matching pursuit: choose by the largest product, add, subtract."
    )
    return "Each step looks for what the last ones left."


@exercise("17.4", difficulty=2, minutes=8, teaches="A mean of ratios is not a ratio of sums.")
def pooled_cosine(answer: Callable[..., Any]) -> str:
    """Errors of very unlike sizes, with a mean that is not zero."""
    size = torch.linspace(0.1, 5, 40, dtype=torch.float64)[:, None]
    first = size * (normal(1, 40, 6) + 0.5)
    second = 0.3 * first + size.flip(0) * normal(2, 40, 6)
    given = answer(first, second)
    if given is None:
        raise NotYet("Return the cosine, one number.")
    value = float(given)
    by_token = torch.nn.functional.cosine_similarity(first, second, dim=1).mean()
    assert abs(value - float(by_token)) > 1e-6, (
        "That is the mean of the tokens' cosines, in which small errors count as much as large "
        "ones; sum first, then divide."
    )
    a, b = first - first.mean(0), second - second.mean(0)
    centred = float((a * b).sum() / (a.norm() * b.norm()))
    assert abs(value - centred) > 1e-6, "That is a correlation; here the means are not removed."
    right = float((first * second).sum() / (first.norm() * second.norm()))
    squared = float((first * second).sum() / (first.norm() * second.norm()) ** 2)
    assert abs(value - squared) > 1e-6, "Divide by the lengths, not by their squares."
    assert abs(value - right) < 1e-6, "Sum of all products over the product of the two lengths."
    return "Tokens with large errors decide, as they do in the FVU."


@exercise(
    "17.5", difficulty=3, minutes=10, teaches="Errors may agree on what neither SAE tried to learn."
)
def seemingly_alike(answer: Callable[..., Any]) -> str:
    """Errors at a cosine near one that are independent once their common mean is gone."""
    x = normal(5, 500, 8) + torch.linspace(-4, 4, 8, dtype=torch.float64)
    given = answer(x.clone(), torch.Generator().manual_seed(1))
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet("Return a pair of reconstructions, each [n, d].")
    errors: list[Tensor] = []
    for made in cast("list[Any]", given):
        if not isinstance(made, Tensor) or made.shape != x.shape:
            raise NotYet("Both reconstructions must have the shape of x, [n, d].")
        errors.append(x - made.double())

    def cosine(first: Tensor, second: Tensor) -> float:
        return float((first * second).sum() / (first.norm() * second.norm()))

    assert all(float(one.var(0).sum()) > 1e-6 for one in errors), (
        "An error is the same for every token; two SAEs miss at least something of their own."
    )
    together = cosine(*errors)
    alone = cosine(*(one - one.mean(0) for one in errors))
    assert together > 0.9, (
        f"The errors have a cosine of {together:.2f}, and more than nine tenths are asked for: let "
        "both miss the same constant vector."
    )
    assert abs(alone) < 0.1, (
        f"Without their means the errors have a cosine of {alone:.2f}: they do miss the same of "
        "each token. Draw what varies for each of them apart."
    )
    return f"A cosine of {together:.2f}; without the means {alone:.2f}."

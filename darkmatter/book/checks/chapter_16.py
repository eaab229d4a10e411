"""Checks of chapter 16: squeezing by LayerNorm, the rescue, nats about a token, and a diagnosis."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise


def vectors() -> tuple[Tensor, Tensor]:
    """What is scaled and what stands beside it: neither without mean, nor at a right angle."""
    generator = torch.Generator().manual_seed(16)
    e = torch.randn(5, 8, generator=generator, dtype=torch.float64) + 0.7
    c = torch.randn(5, 8, generator=generator, dtype=torch.float64) - 0.4 + 0.5 * e
    return e, c


def first_order(e: Tensor, c: Tensor, s: float, centre: bool = True, across: bool = True) -> Tensor:
    """sqrt(d) P c / (s |e|), with centring or the part along e left out at will."""
    if centre:
        e, c = e - e.mean(1, keepdim=True), c - c.mean(1, keepdim=True)
    length = e.norm(dim=1, keepdim=True)
    if across:
        c = c - (c * e).sum(1, keepdim=True) * e / length.square()
    return math.sqrt(e.shape[1]) * c / (s * length)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree to a millionth of the second's size."""
    return torch.allclose(a.double(), b, rtol=1e-6, atol=1e-6 * float(b.abs().max()))


def tensor_of(given: Any, shape: tuple[int, ...]) -> Tensor:
    """The answer, if it is a tensor of this shape; refused otherwise."""
    if not isinstance(given, Tensor) or given.shape != shape:
        came = list(given.shape) if isinstance(given, Tensor) else type(given).__name__
        raise NotYet(f"Return a tensor of shape {list(shape)}; yours is {came}.")
    return given


@exercise(
    "16.1", difficulty=2, minutes=12, teaches="LayerNorm leaves one over s of what stands beside."
)
def left_of_clue(answer: Callable[..., Any]) -> str:
    """The first-order term on vectors with mean that are not at a right angle."""
    e, c = vectors()
    s = 50.0
    given = tensor_of(answer(e.clone(), c.clone(), s), (5, 8))
    right = first_order(e, c, s)
    assert not same(given, s * right), (
        "Yours does not depend on s; what is left of c falls as 1 / s."
    )
    assert not same(given, right / math.sqrt(8)), (
        "The factor sqrt(d) is missing: LayerNorm's output has length sqrt(d), not one."
    )
    assert not same(given, first_order(e, c, s, across=False)), (
        "The part of c along e must go: it only makes the long vector longer."
    )
    assert not same(given, first_order(e, c, s, centre=False)), (
        "LayerNorm takes the mean of the entries away first; centre both e and c."
    )
    assert same(given, right), (
        "This is not sqrt(d) / (s |e|) times the part of c that has no mean and is across e, "
        "with e centred."
    )
    return "At fifty times e, LayerNorm leaves what your formula says, to first order."


@exercise("16.2", difficulty=2, minutes=10, teaches="The residual stream is a sum: subtract.")
def take_away(answer: Callable[..., Any]) -> str:
    """A residual to which other parts were written beside the scaled vector."""
    generator = torch.Generator().manual_seed(17)
    others = torch.randn(3, 6, 4, generator=generator, dtype=torch.float64)
    vector = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    at, s, row = torch.tensor([1, 4, 2]), 20.0, torch.arange(3)
    residual, right = others.clone(), others.clone()
    residual[row, at] += s * vector
    right[row, at] += vector
    passed = residual.clone()
    given = tensor_of(answer(passed, at.clone(), vector.clone(), s), (3, 6, 4))
    divided = residual.clone()
    divided[row, at] /= s
    assert not same(given, divided), (
        "You divide the whole residual by s; that shrinks what others wrote there, too. Subtract."
    )
    assert not same(given, others), (
        "You took s * vector away, so that nothing of the token is left; take (s - 1) * vector."
    )
    assert not same(given, residual - (s - 1) * vector[:, None]), (
        "You changed every position; change only position at[i] of row i."
    )
    assert same(given, right), "The residual is not that of a factor of one at those positions."
    assert torch.equal(passed, residual), "The argument was changed; clone it first."
    return "What others wrote is still there, and the token has its old size."


@exercise("16.3", difficulty=3, minutes=12, teaches="Mix probabilities, not their logarithms.")
def nats_told(answer: Callable[..., Any]) -> str:
    """Mutual information on random predictions, on equal ones and on certain ones."""
    generator = torch.Generator().manual_seed(18)
    log_p = (2 * torch.randn(4, 3, 6, generator=generator, dtype=torch.float64)).log_softmax(-1)
    p = log_p.exp()
    each = (p * (log_p - p.mean(1, keepdim=True).log())).sum(-1)
    given = tensor_of(answer(log_p.clone()), (4,))
    of_logs = (p * (log_p - log_p.mean(1, keepdim=True))).sum(-1).mean(1)
    assert not same(given, of_logs), (
        "You averaged log-probabilities; the mixture is the mean of the probabilities."
    )
    assert not same(given, each.sum(1)), (
        "You summed over the tokens; each of them has probability one in m, so take the mean."
    )
    assert not same(given, each.mean(1) / math.log(2)), "That is in bits; use nats."
    mixture = p.mean(1, keepdim=True)
    backwards = (mixture * (mixture.log() - log_p)).sum(-1).mean(1)
    assert not same(given, backwards), (
        "The divergence is the wrong way round; it starts from each prediction: KL(p_m || mixture)."
    )
    assert same(given, each.mean(1)), (
        "This is not the mean over the tokens of KL(p_m || mean of p), one value a prompt."
    )
    return f"The first prompt's prediction tells {float(given[0]):.2f} of {math.log(3):.2f} nats."


@exercise("16.4", difficulty=2, minutes=10, teaches="Attention is a reason, not the result.")
def diagnosis(answer: Callable[..., Any]) -> str:
    """Pairs of attention and nats told in all four corners."""
    assert answer(0.1, 0.9) == "intact", (
        "Attention of one head fell, but the prediction still knows the token: another head reads "
        "it, so it is intact. Ask for told first."
    )
    assert answer(1.0, 0.5) == "intact", "One half of the nats counts as intact."
    assert answer(1.1, 0.1) == "not read", (
        "The head looks at the token as before and the prediction does not know it: not read."
    )
    assert answer(0.2, 0.1) == "not found", (
        "Neither attention nor knowledge: the head does not find the token."
    )
    assert answer(0.5, 0.1) == "not read", "Attention of one half is not below one half."
    return "Large tokens are not found, small ones are not read."


@exercise("16.5", difficulty=2, minutes=8, teaches="A cosine of logits sees what softmax does not.")
def alike_by_cosine(answer: Callable[[int], Any]) -> str:
    """Two rows of logits at a cosine near one whose predictions have nothing in common."""
    vocabulary = 50
    given = answer(vocabulary)
    if not isinstance(given, tuple | list) or len(cast("list[Any]", given)) != 2:
        raise NotYet("Return a pair of logits, each [v].")
    one, two = (tensor_of(row, (vocabulary,)).double() for row in cast("list[Any]", given))
    assert bool((one.isfinite() & two.isfinite()).all()), "Keep every logit finite."
    p, q = one.log_softmax(0), two.log_softmax(0)
    apart = float((p.exp() * (p - q)).sum())
    assert int(one.argmax()) != int(two.argmax()), (
        "Both predict the same token: there is no harm that the cosine could hide."
    )
    assert apart >= 5, (
        f"The predictions are {apart:.2f} nats apart, and five are asked for: be more certain of "
        "two different tokens."
    )
    cosine = float(torch.nn.functional.cosine_similarity(one, two, dim=0))
    assert cosine > 0.99, (
        f"The cosine is {cosine:.3f}, and 0.99 is asked for: add to both what softmax cannot see."
    )
    return f"A cosine of {cosine:.4f}, and {apart:.0f} nats between the predictions."

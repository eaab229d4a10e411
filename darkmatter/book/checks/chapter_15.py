"""Checks of chapter 15: the soft threshold, a stopped gradient, a flip of the optimum, a bias,
and a reconstruction that is incomplete and not short."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from darkmatter.book.checks.common import alike, normal
from darkmatter.book.exercises import NotYet, exercise
from darkmatter.objectives import shrinkage


@exercise("15.1", difficulty=2, minutes=8, teaches="What an L1 penalty does to the size of a code.")
def best_code(answer: Callable[..., Any]) -> str:
    """Codes of one latent whose decoder has unit norm, against a fine search."""
    x = torch.tensor([-1.0, 0.1, 0.35, 0.8, 2.0], dtype=torch.float64)
    for sparsity in (0.4, 1.0):
        given = answer(x.clone(), sparsity)
        if not isinstance(given, Tensor) or given.shape != x.shape:
            raise NotYet("Return a tensor of the shape of x: one code for each value.")
        assert not alike(given, x - sparsity / 2), (
            "Codes cannot be negative: what is below the threshold becomes zero."
        )
        assert not alike(given, (x - sparsity).relu()), (
            "That takes the whole penalty away; differentiate the square: its factor 2 halves it."
        )
        assert not alike(given, x.sign() * (x.abs() - sparsity / 2).relu()), (
            "That is the threshold of two-sided codes; a latent of a ReLU SAE is never negative."
        )
        assert not alike(given, x * (x > sparsity / 2)), (
            "That is a hard threshold: it silences small values, but the penalty also shortens "
            "large ones."
        )
        grid = torch.linspace(0, 2.5, 25_001, dtype=torch.float64)
        loss = (x[:, None] - grid).square() + sparsity * grid
        best = grid[loss.argmin(1)]
        # The grid's step is 1e-4.
        assert torch.allclose(given.double(), best, atol=2e-4), (
            "A search over all codes finds a lower loss; set the derivative to zero."
        )
    return "Every value above the threshold is short by the same amount."


def _planted() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(15)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = {"z": draw(40, 5), "f": draw(40, 7).relu(), "W_dec": draw(7, 5), "p": 1 + 0.2 * draw(7)}
    for name in ("f", "W_dec", "p"):
        made[name].requires_grad_()
    return made


@exercise("15.2", difficulty=3, minutes=12, teaches="Where a gradient stops is part of a loss.")
def expanded_loss(answer: Callable[..., Any]) -> str:
    """The value, and the gradients of codes, decoder and gains, on planted tensors."""
    sparsity = 0.3
    ours, theirs = _planted(), _planted()
    z, f, W_dec, p = (ours[name] for name in ("z", "f", "W_dec", "p"))
    first = (z - f @ W_dec.detach()).square().sum(1).mean()
    second = (z - (p * f) @ W_dec).square().sum(1).mean()
    whole = first + second + sparsity * f.sum(1).mean()
    whole.backward()
    right = whole.item()
    given = answer(theirs["z"], theirs["f"], theirs["W_dec"], theirs["p"], sparsity)
    if not isinstance(given, Tensor) or given.ndim != 0:
        raise NotYet("Return one number as a tensor, the mean loss over tokens.")
    value = given.item()
    assert abs(value - (first + second).item()) > 1e-9, "The L1 penalty of the codes is missing."
    scaled = first + second + sparsity * (p * f).sum(1).mean()
    assert abs(value - scaled.item()) > 1e-9, (
        "You penalise p * f. Then p is shortened, too; the penalty is on f alone."
    )
    assert abs(value - right) < 1e-9, (
        "The value is not |z - f W|^2 + |z - (p f) W|^2 + sparsity |f|_1, each a mean over tokens."
    )
    if not given.requires_grad:
        raise NotYet("No gradient comes back: detach the decoder in one term, not everything.")
    given.backward()

    def agrees(name: str) -> bool:
        learned, expected = theirs[name].grad, ours[name].grad
        return learned is not None and expected is not None and alike(learned, expected)

    assert agrees("f"), (
        "The gradient of the codes is wrong: the stopped tensor is the decoder, not the codes."
    )
    assert agrees("W_dec"), (
        "The value is right, but the decoder still learns from the first term: detach it there."
    )
    assert agrees("p"), "The gains do not learn as they should from the second term."
    return "The decoder learns from codes of full length only."


@exercise("15.3", difficulty=3, minutes=15, teaches="The optimum jumps; there is no compromise.")
def flip(answer: Callable[[float, float], float]) -> str:
    """The strength of a penalty on the largest cosine at which both dictionaries cost the same."""
    for sparsity, together in ((0.2, 0.3), (0.6, 0.05)):
        given = float(answer(sparsity, together))
        saved = (2 - math.sqrt(2)) * sparsity - sparsity**2 / 4
        right = together * saved / math.sqrt(0.5)
        assert abs(given - saved / math.sqrt(0.5)) > 1e-9, (
            "The saving is made only by tokens in which both features are on: weigh it with their "
            "share."
        )
        assert abs(given - together * saved) > 1e-9, (
            "The composed dictionary pays the strength times its largest cosine, which is not one."
        )
        naive = together * (2 - math.sqrt(2)) * sparsity / math.sqrt(0.5)
        assert abs(given - naive) > 1e-9, (
            "That compares the L1 of exact codes. The best codes are short, and their squared "
            "error differs, too."
        )
        bussmann = together * saved / (4 * math.sqrt(2) / 3)
        assert abs(given - bussmann) > 1e-9, (
            "That is for the sum of three cosines in the text; here the penalty is the largest "
            "cosine alone."
        )
        assert abs(given - right) < 1e-6, (
            "At this strength the two dictionaries do not cost the same; write down both costs."
        )
    return "Below it the composed latent wins, above it the true pair."


@exercise("15.4", difficulty=2, minutes=10, teaches="A bias cannot tell one loud from two soft.")
def safe_bias(answer: Callable[[float, float], float | None]) -> str:
    """relu(x1 + x2 + bias) silent for one feature, on for two, at all strengths low to high."""
    for low, high in ((1.0, 1.0), (0.8, 1.2), (2.0, 3.9), (0.5, 1.1), (1.0, 2.0)):
        given = answer(low, high)
        if 2 * low <= high:
            assert given is None, (
                f"With strengths from {low} to {high} one loud feature sums to as much as two "
                "soft ones: no bias can do it. Return None."
            )
            continue
        if given is None:
            raise NotYet(f"There is a bias for strengths from {low} to {high}.")
        bias = float(given)
        assert bias <= 0, "A bias that makes the latent harder to excite is negative."
        assert high + bias <= 1e-9, (
            f"At bias {bias:g} one feature of strength {high} alone excites the latent."
        )
        assert 2 * low + bias > 1e-9, (
            f"At bias {bias:g} two features of strength {low} do not excite the latent."
        )
    return "The composed latent needs a bias between minus twice the softest and minus the loudest."


@exercise("15.5", difficulty=3, minutes=12, teaches="Short is not the same as incomplete.")
def falsely_shrunken(answer: Callable[[Tensor], Any]) -> str:
    """gamma calls it shrunken by a third or more, though no stretch would make it better."""
    x = normal(5, 2000, 8) + 3
    given = answer(x.clone())
    if not isinstance(given, Tensor) or given.shape != x.shape:
        raise NotYet("Return one reconstruction for each row, a tensor [n, d].")
    assert not alike(given, x), "That is x itself: gamma is one, and nothing is missing."
    assert float(given.double().var(0).sum()) > 1e-9, (
        "A reconstruction that is the same for every token cannot be stretched; keep part of x."
    )
    found = shrinkage(x, given.double())
    assert found.gamma <= 2 / 3, (
        f"gamma is {found.gamma:.2f}, so at most two thirds is not reached: leave more of x out."
    )
    assert abs(found.stretch - 1) < 0.01, (
        f"The best stretch is {found.stretch:.2f}, so its length really is wrong, and gamma is "
        "right. Leave whole directions out, at their mean, and keep the others as they are."
    )
    return (
        f"gamma says {found.gamma:.2f}, and stretching would not help: half is missing, not short."
    )

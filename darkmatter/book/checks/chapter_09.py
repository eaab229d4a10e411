"""Checks of chapter 09: shares recovered, KL, same-angle noise, and labels that moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise


def losses() -> tuple[Tensor, Tensor, Tensor]:
    """Losses of the original, the SAE and a variant; at some tokens the SAE does no harm."""
    generator = torch.Generator().manual_seed(9)
    original = 3 + torch.rand(400, generator=generator, dtype=torch.float64)
    harm = torch.randn(400, generator=generator, dtype=torch.float64) + 0.5
    kept = 0.3 + 0.2 * torch.rand(400, generator=generator, dtype=torch.float64)
    return original, original + harm, original + kept * harm.clamp_min(0.1)


@exercise(
    "09.1", difficulty=1, minutes=8, teaches="A share of harm is a ratio of sums, not their mean."
)
def share_recovered(answer: Callable[..., Any]) -> str:
    """The share on losses of which some get better with the SAE."""
    original, sae, variant = losses()
    given = answer(original, sae, variant)
    if given is None or (isinstance(given, Tensor) and given.numel() != 1):
        raise NotYet("Return one number for all tokens together.")
    share = float(given)
    right = float((sae - variant).sum() / (sae - original).sum())

    def near(other: Tensor) -> bool:
        return abs(share - float(other)) < 1e-6

    assert not near(((sae - variant) / (sae - original)).mean()), (
        "That is the mean of the shares of single tokens, which explodes where the SAE does "
        "little harm; sum above and below first."
    )
    assert not near((variant - original).sum() / (sae - original).sum()), (
        "That is the share of the harm that stays; what is recovered is one minus it."
    )
    assert not near((variant - sae).sum() / (sae - original).sum()), (
        "The sign is wrong: a variant that is better than the SAE recovers more than nothing."
    )
    assert not near((sae - variant).sum() / sae.sum()), (
        "Below the line stands the harm of the SAE, its loss less that of the original."
    )
    assert abs(share - right) < 1e-6, (
        "It is (CE of the SAE less CE of the variant) over (CE of the SAE less CE of the original)."
    )
    return f"The variant takes back {share:.2f} of the harm."


@exercise(
    "09.2", difficulty=2, minutes=10, teaches="KL weighs by the original's probabilities, in nats."
)
def kl_of_logits(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """KL on small logits, in both directions, then on logits that overflow exp."""
    generator = torch.Generator().manual_seed(2)
    original, spliced = (
        2 * torch.randn(30, 7, generator=generator, dtype=torch.float64) for _ in range(2)
    )
    given = answer(original, spliced)
    if not isinstance(cast(Any, given), Tensor) or given.shape != (30,):
        raise NotYet("Return one KL for each row, a tensor [n].")

    def kl(a: Tensor, b: Tensor) -> Tensor:
        log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    right = kl(original, spliced)
    assert not torch.allclose(given, kl(spliced, original)), (
        "That is KL(spliced || original): the weights must be the original's probabilities."
    )
    assert not torch.allclose(given, right / torch.log(torch.tensor(2.0, dtype=torch.float64))), (
        "That is in bits; use the natural logarithm for nats."
    )
    assert not torch.allclose(given, right / 7), (
        "You averaged over the vocabulary; KL is a sum over it."
    )
    assert not torch.allclose(given, -right), "The sign is wrong: KL is never below zero."
    assert torch.allclose(given, right), "It is the sum of p (log p - log q) over the vocabulary."
    large = answer(original * 500, spliced * 500)
    assert bool(large.isfinite().all()), (
        "With large logits a probability rounds to zero and its logarithm is infinite; use "
        "log_softmax rather than the logarithm of softmax."
    )
    return "It is right, and stays finite for large logits."


@exercise("09.3", difficulty=3, minutes=15, teaches="A fair control matches both angle and length.")
def at_the_same_angle(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> str:
    """Cosines, lengths, and that the directions come from the noise."""
    generator = torch.Generator().manual_seed(3)
    x, noise, miss = (
        torch.randn(50, 8, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    x = 4 * x + 2
    x_hat = 0.8 * x + miss
    given = answer(x, x_hat, noise)
    if not isinstance(cast(Any, given), Tensor) or given.shape != x.shape:
        raise NotYet("Return one vector for each row, a tensor [n, d].")
    assert not torch.allclose(given, x_hat), "That is x_hat itself; take the direction from noise."
    length = given.norm(dim=1)
    assert not torch.allclose(length, x.norm(dim=1)), (
        "Your vectors have the length of x; the reconstruction's is asked for."
    )
    assert torch.allclose(length, x_hat.norm(dim=1)), (
        "The length is not that of x_hat: the noise must be of length one before it is mixed, "
        "without its part along x."
    )
    cosine = torch.cosine_similarity(x, given)
    assert torch.allclose(cosine, torch.cosine_similarity(x, x_hat)), (
        "The angle is not that of x_hat: take the part of the noise along x away before mixing."
    )
    across = noise - (noise * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    assert bool(((given * across).sum(1) > 0).all()), (
        "The direction must be that of the noise, without its part along x."
    )
    return "Same angle, same length, another direction."


LISTED = [16, 32, 4, 64, 8]


@exercise("09.4", difficulty=2, minutes=10, teaches="Two lists in two orders give wrong labels.")
def drawn_at(answer: Callable[[list[int], list[int]], Sequence[int]]) -> str:
    """The mistake on our grid and on the paper's catalogue."""
    paper = [11, 138, 20, 310, 36, 393, 408, 427, 57, 58, 68]
    for listed, labels in ((LISTED, sorted(LISTED)), (paper, [11, 20, 36, 68, 138, 310, 427])):
        given = answer(list(listed), list(labels))
        if not isinstance(cast(Any, given), list | tuple) or len(given) != len(labels):
            raise NotYet("Return a list with one L0 for each label.")
        by_l0 = sorted(listed)
        right = [by_l0[listed.index(label)] for label in labels]
        assert list(given) != list(labels), (
            "Those are the labels; every bar would be right. Look up in the list that is sorted."
        )
        assert list(given) != [listed[by_l0.index(label)] for label in labels], (
            "The two lists are swapped: positions come from the unsorted list, values from the "
            "sorted one."
        )
        assert list(given) == right, (
            "Take the position of the label in `listed`, and the value there in the sorted list."
        )
    return "That is the figure as it was printed: the bar over 36 is that of L0 58."


@exercise("09.5", difficulty=2, minutes=10, teaches="A value that stands twice must stand alike.")
def panels_agree(answer: Callable[..., Any]) -> str:
    """The shared SAE under its own label, under another one, and with rounding."""
    right, value = [90.0, 80.0, 70.0, 60.0, 50.0], 80.0
    labels = sorted(LISTED)
    moved = [right[labels.index(sorted(LISTED)[LISTED.index(label)])] for label in labels]
    if answer(8, value, labels, right) is None:
        raise NotYet("Return True or False.")
    assert answer(8, value, labels, right), "The right panel is right here: 80 stands over 8."
    assert answer(8, value, labels, [v + 1e-9 for v in right]), (
        "Rounding is no contradiction: allow for a small difference."
    )
    assert not answer(8, value, labels, moved), (
        "Here another value stands over 8, though 80 stands somewhere in the panel: compare it "
        "with the value over its own label."
    )
    return "One shared SAE is enough to catch it."


@exercise(
    "09.6", difficulty=3, minutes=12, teaches="Cross entropy asks only for the token that came."
)
def same_cost(answer: Callable[[Tensor, Tensor], Any]) -> str:
    """Logits with the mean cross entropy of the original and a KL of at least one nat."""
    generator = torch.Generator().manual_seed(6)
    original = 3 * torch.randn(200, 12, generator=generator, dtype=torch.float64)
    target = torch.multinomial(original.softmax(-1), 1, generator=generator)[:, 0]
    given = answer(original.clone(), target.clone())
    if not isinstance(given, Tensor) or given.shape != original.shape:
        raise NotYet("Return logits of the shape of the original's, [n, v].")
    log_p, log_q = original.log_softmax(-1), given.double().log_softmax(-1)
    assert bool(log_q.isfinite().all()), (
        "A probability is zero, so a KL is infinite; keep every logit finite."
    )
    harm = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    before, after = (float(-one.gather(1, target[:, None]).mean()) for one in (log_p, log_q))
    assert harm > 1e-9, (
        "Those are the original's predictions: a constant added to the logits of a row changes "
        "nothing. Move probability between tokens."
    )
    assert abs(after - before) < 1e-6, (
        f"The cross entropy is {after:.4f} nats and the original's {before:.4f}: the token that "
        "came must keep its probability."
    )
    assert harm >= 1, (
        f"The KL is {harm:.2f} nats, and one is asked for: deal the probabilities of all the "
        "tokens that did not come out anew."
    )
    return f"The whole loss is recovered, and the predictions are {harm:.1f} nats away."

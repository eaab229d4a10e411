"""Checks of chapter 13: stand-ins, matched cosines, the KS distance, pairwise cosines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.sensitivity import ks_distance


def listed(given: Any, length: int) -> list[int]:
    """A list of latents, from whatever came."""
    given = given.tolist() if isinstance(given, Tensor) else given
    if not isinstance(given, list | tuple) or len(cast("list[Any]", given)) != length:
        raise NotYet(f"Return a list of {length} latents, one for each active one.")
    return [int(one) for one in cast("list[Any]", given)]


def cosines() -> Tensor:
    """Directions of very different lengths, [40, 6]."""
    generator = torch.Generator().manual_seed(13)
    directions = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    return directions * torch.linspace(0.2, 5, 40, dtype=torch.float64)[:, None]


@exercise(
    "13.1",
    difficulty=2,
    minutes=12,
    teaches="What the baseline recipe keeps, and what it excludes.",
)
def stand_ins(answer: Callable[..., Any]) -> str:
    """A dead latent next to a rare one, and two active latents that want the same stand-in."""
    frequencies = torch.tensor([0.30, 0.0, 0.01, 0.305, 0.05, 0.31, 0.028], dtype=torch.float64)
    given = listed(answer([0, 5, 2], frequencies), 3)
    assert not any(a == b for a, b in zip(given, [0, 5, 2], strict=True)), (
        "A latent stands for itself; take the nearest other one."
    )
    assert 1 not in given, "Latent 1 never fires; leave latents of frequency 0 out."
    assert len(set(given)) == 3, "A latent is used twice in one token; take the next unused one."
    assert given == [3, 0, 6], (
        f"{given} are not the nearest in frequency; compare |f_j - f_i|, not the index or f_j."
    )
    return "Each keeps its rarity and its value, and nothing of its direction."


@exercise(
    "13.2", difficulty=3, minutes=15, teaches="The structured recipe matches cosines to one latent."
)
def match_cosines(answer: Callable[..., Any]) -> str:
    """Random directions; the right answer by a loop."""
    directions, active, top, c = cosines(), [3, 9, 17, 30], 17, 22
    unit = directions / directions.norm(dim=1, keepdim=True)

    def matched(rows: Tensor, to: int, absolute: bool = False, reuse: bool = False) -> list[int]:
        used: list[int] = []
        for latent in active:
            have, want = rows @ rows[to], rows[top] @ rows[latent]
            off = (have.abs() - want.abs()).abs() if absolute else (have - want).abs()
            order = [int(j) for j in off.argsort()]
            used.append(next(j for j in order if reuse or j not in used))
        return used

    given = listed(answer(active, top, c, directions), 4)
    right = matched(unit, c)
    assert given != matched(unit, top), (
        "Those are latents about top itself; the candidates' cosines are to c."
    )
    assert given == right or given != matched(unit, c, absolute=True), (
        "A cosine of the other sign is another angle; compare cosines with their sign."
    )
    assert given == right or given != matched(directions, c), (
        "Those are inner products; divide the directions by their lengths first."
    )
    assert len(set(given)) == 4, "A latent is used twice; each may stand for one only."
    assert given == right, "Not the nearest cosines to c; go through the active latents in order."
    assert given[2] == c
    return "c stands for top by itself: its cosine to c is one."


@exercise("13.3", difficulty=2, minutes=10, teaches="KS is the largest gap of two step functions.")
def ks(answer: Callable[..., Any]) -> str:
    """Samples with ties, once with either above."""
    a, b = [1.0, 2.0, 2.0, 5.0], [2.0, 3.0, 4.0, 6.0, 7.0]
    right = ks_distance(torch.tensor(a), torch.tensor(b))
    given, turned = float(answer(a, b)), float(answer(b, a))
    # 1e-6: ks_distance is a float64 of shares, the answer may be float32.
    assert abs(given - turned) < 1e-6, (
        "It changes when the lists are exchanged; take the absolute difference."
    )
    assert abs(given - abs(sum(a) / 4 - sum(b) / 5)) > 1e-6, (
        "That is the difference of the means; KS compares distribution functions."
    )
    assert abs(given - right) < 1e-6, (
        f"It is {given:.3f}, not {right:.3f}; count values at most x, at every data point of both."
    )
    return "Two identical lists have zero, two that do not overlap have one."


@exercise("13.4", difficulty=2, minutes=10, teaches="Check what a recipe controls before using it.")
def pairwise_cosine(answer: Callable[..., Any]) -> str:
    """A sparse code over directions of different lengths."""
    directions = cosines()
    code = torch.zeros(40, dtype=torch.float64)
    code[[4, 11, 25, 38]] = torch.tensor([1.0, 3.0, 0.5, 2.0], dtype=torch.float64)
    given = float(answer(code, directions))

    def mean(rows: Tensor, diagonal: bool) -> float:
        gram, k = rows @ rows.T, len(rows)
        return float(gram.mean() if diagonal else (gram.sum() - gram.trace()) / (k * (k - 1)))

    unit = directions / directions.norm(dim=1, keepdim=True)
    on = code != 0
    assert abs(given - mean(unit[on], True)) > 1e-6, (
        "The diagonal is in it: a latent and itself are no pair."
    )
    assert abs(given - mean(unit, False)) > 1e-6, (
        "All latents of the SAE are in it; take the active ones only."
    )
    assert abs(given - mean(directions[on], False)) > 1e-6, (
        "Those are inner products; divide the directions by their lengths first."
    )
    assert abs(given - mean(unit[on], False)) < 1e-6, (
        "Not the mean over pairs: sum the cosines off the diagonal, divide by k (k - 1)."
    )
    return "One number a token, and a recipe that does not control it shows."


@exercise("13.5", difficulty=2, minutes=8, teaches="Equal distributions do not mean equal prompts.")
def perfect_by_ks(answer: Callable[..., Any]) -> str:
    """Values with a KS distance of nearly zero to the real ones, and no correlation with them."""
    draws = torch.randn(300, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    real = 30 + 12 * draws
    given = answer(real.clone(), torch.Generator().manual_seed(0))
    if not isinstance(given, Tensor) or given.shape != real.shape:
        raise NotYet("Return one value for each prompt, a tensor [n].")
    made = given.double()
    assert not torch.equal(made, real), (
        "Those are the real values in their own places: the recipe would be right, and no lie."
    )
    distance = float(ks_distance(real, made))
    assert distance < 0.05, (
        f"The KS distance is {distance:.2f}, and less than a twentieth is asked for: it is zero "
        "for the same values in any order."
    )
    correlation = float(torch.corrcoef(torch.stack([real, made]))[0, 1])
    assert abs(correlation) < 0.2, (
        f"Prompt by prompt they correlate by {correlation:.2f}, so the recipe knows something: "
        "deal the values out at random."
    )
    return f"KS {distance:.2f}, as good as real; correlation with the real ones {correlation:.2f}."

"""Activations composed of SAE latents: which of them a model takes for its own.

A token's code has active latents i with values f_i. A sampler puts other latents j(i) in their
places, each at the value of the one it stands for:

    x_hat = sum_i f_i w_i + b    ->    composed = sum_i f_i w_j(i) + b

    baseline        j(i) one of the 10 latents nearest to i in firing frequency
    structured      c like the top latent in frequency, at a set cosine to it; then
                    cos(c, j(i)) as near as can be to cos(top, i)
    uniform_live    any latents that fire at all
    single_latent   one latent alone, at a set value and about a set distance from a base

No latent comes twice in a token, and latents that never fire are left out. Decode with
`SparseCode.decode(directions, bias)`; with j(i) = i that is the reconstruction. Source: Giglemiani
et al. (2409.15019, "Evaluating synthetic activations composed of SAE latents in GPT-2"), as their
released code has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.sparse import SparseCode

# Published: a log10 frequency of -10 or less is a dead latent.
_DEAD = 1e-10


def firing_frequencies(code: SparseCode, d_sae: int) -> Float64[Tensor, " {d_sae}"]:
    """Share of tokens on which each latent is active. Raises Refusal for no tokens."""
    if len(code) == 0:
        raise Refusal("The code has no tokens, expected some thousands; encode activations first.")
    on = code.values != 0
    if bool((code.indices[on] >= d_sae).any()):
        raise Refusal(
            f"The code has index {int(code.indices[on].max())}, expected below d_sae={d_sae}; use "
            "the d_sae of the SAE that made it."
        )
    return torch.bincount(code.indices[on], minlength=d_sae).double() / len(code)


def nearest_in_frequency(
    frequencies: Float[Tensor, " m"], latent: int, pool: int, itself: bool = False
) -> list[int]:
    """The `pool` live latents whose frequency is nearest to that of `latent`, nearest first.

    Ties by index; `latent` is among them only with `itself`.
    """
    return _nearest(frequencies, _live(frequencies), latent, itself)[:pool].tolist()


def baseline(
    code: SparseCode,
    frequencies: Float[Tensor, " m"],
    pool: int = 10,
    itself: bool = False,
    generator: torch.Generator | None = None,
) -> SparseCode:
    """Each active latent gives way to one of the `pool` nearest to it in firing frequency.

    Drawn uniformly from those not used before in the token; where all are, the nearest unused one.
    Keeps the number of active latents, their values and about their frequencies, and nothing else.
    `itself` lets a latent stand for itself; with pool=1 the code comes back. Raises Refusal for a
    pool below 1 or a token with more active latents than are live.
    """
    _check_pool(pool)
    live = _live(frequencies)

    def replace(active: list[int], _values: Tensor) -> list[int]:
        chosen: list[int] = []
        for latent in active:
            order = _nearest(frequencies, live, latent, itself)
            free = [j for j in order[: pool + len(active)].tolist() if j not in chosen]
            near = [j for j in order[:pool].tolist() if j not in chosen] or free[:1]
            chosen.append(near[_draw(len(near), generator)])
        return chosen

    return _recomposed(code, live, replace)


def structured(
    code: SparseCode,
    directions: Float[Tensor, "m d"],
    frequencies: Float[Tensor, " m"],
    similarity: float | int,
    pool: int = 100,
) -> SparseCode:
    """The cosines of a token's latents to its top latent, about another latent.

    top is the latent of largest value, c the one of the `pool` nearest to it in frequency whose
    cosine to it is nearest to `similarity`. Then, in order of index, every active latent i gives
    way to the unused live latent j with cos(c, j) nearest to cos(top, i). Published similarity:
    0.42, the mean cosine of the top latents of two tokens; measure it with `top_similarity`.
    Nothing is drawn. The frequencies of the others and the cosines among them are free. Raises
    Refusal for a similarity outside -1 to 1, a pool below 1, or too few live latents.
    """
    _check_pool(pool)
    if not -1 <= similarity <= 1:
        raise Refusal(f"similarity is {similarity}, expected a cosine, -1 to 1; measure one.")
    live = _live(frequencies)
    unit = _unit(directions, len(frequencies))
    live_unit = unit[live]

    def replace(active: list[int], values: Tensor) -> list[int]:
        top = active[int(values.argmax())]
        near = _nearest(frequencies, live, top, False)[:pool]
        c = near[(unit[near] @ unit[top] - similarity).abs().argmin()]
        to_c = live_unit @ unit[c]
        chosen: list[int] = []
        for latent in active:
            off = (to_c - unit[top] @ unit[latent]).abs()
            # Itself first: rounding must not hand c's place to a twin.
            off[live == c] -= 1e-6
            off[torch.isin(live, torch.tensor(chosen, dtype=torch.int64))] = math.inf
            chosen.append(int(live[off.argmin()]))
        return chosen

    return _recomposed(code, live, replace)


def uniform_live(
    code: SparseCode, frequencies: Float[Tensor, " m"], generator: torch.Generator | None = None
) -> SparseCode:
    """Each active latent gives way to any live latent: only the number and the values are kept."""
    live = _live(frequencies)

    def replace(active: list[int], _values: Tensor) -> list[int]:
        return live[torch.randperm(len(live), generator=generator)[: len(active)]].tolist()

    return _recomposed(code, live, replace)


def single_latent(
    base: Float[Tensor, "n d"],
    directions: Float[Tensor, "m d"],
    bias: Float[Tensor, " d"],
    frequencies: Float[Tensor, " m"],
    value: float | int,
    distance: float | int,
    tolerance: float | int,
    generator: torch.Generator | None = None,
) -> SparseCode:
    """One random live latent a token at `value`, `distance` from its base to within `tolerance`.

    Published for GPT-2 small: value 37, tolerance 3 about the mean distance of two real
    activations, about 50. Where no latent is within the tolerance, the one nearest to the distance.
    Raises Refusal unless value, distance and tolerance are positive and finite.
    """
    for name, given in (("value", value), ("distance", distance), ("tolerance", tolerance)):
        if not 0 < given < math.inf:
            raise Refusal(f"{name} is {given}, expected above 0, in units of the activations.")
    live = _live(frequencies)
    _unit(directions, len(frequencies))
    off = (torch.cdist(base, value * directions[live] + bias) - distance).abs()
    # A draw of 0 to 1 for those that may be chosen; others rank behind by how far off they are.
    rank = torch.rand(off.shape, generator=generator, dtype=off.dtype).to(off.device)
    rank = torch.where(off <= tolerance, rank, 1 + off)
    chosen = live.to(rank.device)[rank.argmin(1)]
    return SparseCode(torch.full_like(off[:, :1], value), chosen[:, None])


class CodeStatistics(NamedTuple):
    """What a composed activation should share with real ones; float64, one number a token.

    Cosines are of decoder directions of active latents; NaN for a token with one latent only.
    """

    l0: Float64[Tensor, " n"]
    top_share: Float64[Tensor, " n"]
    """Value of the largest latent over the sum of all."""
    cosine_to_top: Float64[Tensor, " n"]
    """Mean over the other active latents of their cosine to the largest."""
    pairwise_cosine: Float64[Tensor, " n"]
    """Mean over all pairs of different active latents."""
    frequency: Float64[Tensor, " n"]
    """Mean log10 firing frequency of the active latents; dead ones count as 1e-10."""


def code_statistics(
    code: SparseCode, directions: Float[Tensor, "m d"], frequencies: Float[Tensor, " m"]
) -> CodeStatistics:
    """Statistics of every token's code. Raises Refusal for a token without active latents."""
    unit = _unit(directions, len(frequencies))
    log = frequencies.double().clamp(min=_DEAD).log10()
    rows: list[list[float]] = []
    for active, values in _tokens(code):
        cosines = unit[active] @ unit[active].T
        k, top = len(active), int(values.argmax())
        rest = float(cosines[top].sum() - cosines[top, top]) / (k - 1) if k > 1 else math.nan
        pairs = float(cosines.sum() - cosines.trace()) / (k * (k - 1)) if k > 1 else math.nan
        share = float(values[top] / values.sum())
        rows.append([k, share, rest, pairs, float(log[active].mean())])
    return CodeStatistics(*torch.tensor(rows, dtype=torch.float64).T)


def top_similarity(
    code: SparseCode, other: SparseCode, directions: Float[Tensor, "m d"]
) -> Float64[Tensor, " n"]:
    """Cosine of the top latents of token i of two codes; 1 where they are the same latent.

    Its mean over pairs of unrelated tokens is what `structured` takes as similarity (published:
    0.42 for block 1 of GPT-2 small). Raises Refusal for codes of different lengths.
    """
    if len(code) != len(other):
        raise Refusal(
            f"The codes have {len(code)} and {len(other)} tokens, expected pairs; pass as many of "
            "both."
        )
    unit = _unit(directions, len(directions))
    tops = [
        one.indices.gather(1, one.values.argmax(1, keepdim=True))[:, 0] for one in (code, other)
    ]
    return (unit[tops[0]] * unit[tops[1]]).sum(1)


# ---- pieces


def _live(frequencies: Tensor) -> Tensor:
    if frequencies.ndim != 1 or not bool(((frequencies >= 0) & (frequencies <= 1)).all()):
        raise Refusal(
            f"frequencies is {list(frequencies.shape)}, expected [m] shares of tokens from 0 to 1; "
            "pass what firing_frequencies gives."
        )
    return (frequencies > _DEAD).nonzero()[:, 0]


def _nearest(frequencies: Tensor, live: Tensor, latent: int, itself: bool) -> Tensor:
    """Live latents by distance in frequency; itself, if at all, first."""
    off = (frequencies[live] - frequencies[latent]).abs()
    off[live == latent] = -1.0
    order = live[off.argsort(stable=True)]
    return order if itself else order[order != latent]


def _unit(directions: Tensor, latents: int) -> Tensor:
    if directions.ndim != 2 or len(directions) != latents:
        raise Refusal(
            f"directions is {list(directions.shape)} for {latents} latents, expected a decoder "
            "direction for each; pass W_dec of the SAE that the frequencies are of."
        )
    directions = directions.double()
    return directions / directions.norm(dim=1, keepdim=True)


def _tokens(code: SparseCode) -> list[tuple[list[int], Tensor]]:
    """Active latents in order of index, and their values, of every token."""
    tokens: list[tuple[list[int], Tensor]] = []
    for values, indices in zip(code.values, code.indices, strict=True):
        on: Bool[Tensor, " k"] = values != 0
        latents, order = indices[on].sort()
        if len(latents) == 0 or len(latents.unique()) < len(latents):
            raise Refusal(
                f"A token has active latents {latents.tolist()}, expected one or more and each "
                "once; leave tokens without latents out."
            )
        tokens.append((latents.tolist(), values[on][order]))
    return tokens


def _recomposed(
    code: SparseCode, live: Tensor, replace: Callable[[list[int], Tensor], list[int]]
) -> SparseCode:
    tokens = _tokens(code)
    longest = max((len(active) for active, _ in tokens), default=0)
    # One more, as a latent may be kept from standing for itself.
    if longest + 1 > len(live):
        raise Refusal(
            f"A token has {longest} active latents and {len(live)} latents are live, expected "
            "more to choose from; measure frequencies on more tokens."
        )
    new_values = code.values.new_zeros(len(tokens), longest)
    new_indices = code.indices.new_zeros(len(tokens), longest)
    for row, (active, values) in enumerate(tokens):
        new_values[row, : len(active)] = values
        new_indices[row, : len(active)] = torch.tensor(replace(active, values))
    return SparseCode(new_values, new_indices)


def _draw(n: int, generator: torch.Generator | None) -> int:
    return int(torch.randint(n, (1,), generator=generator))


def _check_pool(pool: int) -> None:
    if pool < 1:
        raise Refusal(f"pool is {pool}, expected 1 latent or more; 10 and 100 are published.")

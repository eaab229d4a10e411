"""Pages of single latents: when they are active, what they write, what lies along them.

    activations f_i(x)      of every measured token of a text, in one pass over it
    raised, lowered         u_i W_U, the direction's effect on the logits (without the final norm)
    neighbours              signed cosine u_i . u_j of decoder directions
    linear, nonlinear       d u_i' C u_i / trace(C),   C the covariance of that part of the error

u_i is the decoder direction at unit length. The last says how much more of the linear (nonlinear)
error lies along u_i than along an average direction, which has 1. Decoder directions lie where
activations vary much, so the same number of the activations themselves is given beside it.
Sources: Neuronpedia (what is on a page); Engels, Smith and Tegmark, 2410.14670 (the parts of the
error); putting the two together is ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from darkmatter._page import write
from darkmatter._refusal import Refusal
from darkmatter.activations import Batch, Tokens, stream
from darkmatter.autoencoders import (
    Autoencoder,
    check_fits,
    decoder_of,
    hook_of,
    reconstruct,
    sparse_encode,
)
from darkmatter.geometry import nearest_neighbours
from darkmatter.leastsquares import LinearMap
from darkmatter.models import RESID_MID, RESID_POST, Model, Z

# Tokens shown before and after the one that counts.
_BEFORE, _AFTER = 20, 8
# Drawn at random from the active tokens of a latent, for the bands below the top.
_SAMPLE = 64
_BANDS = {"75 to 90 %": (0.75, 0.90), "median": (0.45, 0.55)}
_IN_A_BAND = 5
# Quarter octaves of activation, from 2^-12 to 2^12.
_OCTAVES, _PER_OCTAVE = 12, 4
_NEIGHBOURS, _LOGITS = 8, 10
# Without a list of latents: so many, evenly over the order of their frequency in so many contexts.
_CHOSEN, _CHOICE_CONTEXTS = 64, 32
_LOGITS_AT_A_TIME = 1 << 24
_HOST = "https://www.neuronpedia.org/"
_FILE = re.compile(r"index\.html|latent-\d+\.html")
_ID = re.compile(r"[A-Za-z0-9._-]+/[A-Za-z0-9._-]+")


@dataclass(frozen=True)
class Example:
    """A token where a latent is active, with the text around it.

    activations has one number a token, NaN where none was measured (a skipped or special token);
    tokens[peak] is the token itself, at `position` of row `context` of the tokens.
    """

    document: str
    context: int
    position: int
    activation: float
    tokens: tuple[str, ...]
    activations: tuple[float, ...]
    peak: int


@dataclass(frozen=True)
class LatentPage:
    """What `latent_page` found of one latent; in a notebook it shows itself.

    frequency: share of the n_tokens measured tokens with f != 0. largest and mean: of |f| where
    active. histogram: (low, high, tokens) of |f| in quarter octaves. bands: examples at the "top"
    (the largest of each context), and from a random sample of the active tokens. raised, lowered:
    next tokens with the change of their logit for f = 1, about the mean of all; None where the way
    from the hook to the residual stream is not linear. neighbours: (latent, signed cosine), nearest
    first. linear, nonlinear, activation: variance of that part of the error, and of x itself, along
    the direction, relative to an average direction; None without an error map. neuronpedia: the
    address of its page there, or None.
    """

    latent: int
    hook: str
    n_tokens: int
    frequency: float
    largest: float
    mean: float
    histogram: tuple[tuple[float, float, int], ...]
    bands: Mapping[str, tuple[Example, ...]]
    raised: tuple[tuple[str, float], ...] | None
    lowered: tuple[tuple[str, float], ...] | None
    neighbours: tuple[tuple[int, float], ...]
    linear: float | None
    nonlinear: float | None
    activation: float | None
    neuronpedia: str | None

    def _repr_html_(self) -> str:
        from darkmatter import _latent_html

        return _latent_html.fragment(self)


def latent_page(
    model: Model,
    sae: Autoencoder,
    tokens: Tokens,
    latent: int,
    skip: int = 32,
    contexts: int = 20,
    error_map: LinearMap | None = None,
) -> LatentPage:
    """Everything on the page of one latent; arguments and refusals as `latent_pages`."""
    return latent_pages(model, sae, tokens, [latent], skip, contexts, error_map)[latent]


@torch.no_grad()
def latent_pages(
    model: Model,
    sae: Autoencoder,
    tokens: Tokens,
    latents: Sequence[int] | None = None,
    skip: int = 32,
    contexts: int = 20,
    error_map: LinearMap | None = None,
) -> dict[int, LatentPage]:
    """What these latents do on the tokens, which are run once; about 12 kB of memory a latent.

    Without `latents`, 64 of them evenly over the order of frequency, from most to least active in
    the first contexts. `contexts`: how many are shown at the top. `error_map`, of a survey of this
    SAE on other tokens, is needed for the linear and nonlinear error.

    Raises Refusal for an SAE that does not fit the model, latents that it does not have or none,
    contexts below 1, a map of another width, and tokens as `stream`.
    """
    check_fits(sae, model)
    if contexts < 1:
        raise Refusal(f"contexts is {contexts}, expected 1 or more; 20 are usual.")
    d = int(sae.cfg.d_in)
    if error_map is not None and tuple(error_map.weight.shape) != (d, sae.W_dec.shape[1]):
        raise Refusal(
            f"The error map is {list(error_map.weight.shape)}, expected {[d, sae.W_dec.shape[1]]} "
            "for this SAE; pass survey.error_maps[name] of a survey of it."
        )
    special = tuple(model.tokenizer.all_special_ids)
    chosen = _chosen(model, sae, tokens, latents, skip, special)
    directions, bias = _decoder(sae)
    units = directions[chosen] / directions[chosen].norm(dim=1, keepdim=True).clamp(min=1e-30)
    gathered = _Gathered(chosen, tokens, int(sae.cfg.d_sae), contexts)
    along = None if error_map is None else _Along(units, error_map)
    for batch in stream(model, hook_of(sae), tokens, skip, special):
        code = sparse_encode(sae, batch.x)
        gathered.add(batch, code.values.cpu(), code.indices.cpu())
        if along is not None:
            here = code.values.device
            decoded = (
                reconstruct(sae, batch.x)
                if bias is None
                else code.decode(directions.to(here), bias.to(here))
            )
            along.add(batch.x, batch.x - decoded.to(batch.x))
    return _pages(model, sae, tokens, skip, special, chosen, directions, units, gathered, along)


def write_latents(
    model: Model,
    sae: Autoencoder,
    tokens: Tokens,
    folder: str | Path,
    latents: Sequence[int] | None = None,
    skip: int = 32,
    contexts: int = 20,
    error_map: LinearMap | None = None,
) -> Path:
    """Write a page for each latent and index.html into `folder`; the path of the index.

    Arguments as `latent_pages`. Pages need nothing beside them but one another, and are replaced
    where they are there already. Raises Refusal as `latent_pages`, and for a folder with anything
    else in it.
    """
    from darkmatter import _latent_html

    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise Refusal(f"{target} is a file, expected a folder for the pages; pass another path.")
    others = [one.name for one in target.glob("*") if not _FILE.fullmatch(one.name)]
    if others:
        raise Refusal(
            f"{target} has other things in it, such as {sorted(others)[0]}; pass a new folder, or "
            "one with pages of latents only."
        )
    pages = latent_pages(model, sae, tokens, latents, skip, contexts, error_map)
    target.mkdir(parents=True, exist_ok=True)
    files = _latent_html.pages(pages)
    for name, content in files.items():
        write(target / name, content)
    for old in target.glob("latent-*.html"):
        if old.name not in files:
            old.unlink()
    index = _latent_html.index(pages, model.name, int(sae.cfg.d_sae), latents is None)
    write(target / "index.html", index)
    return target / "index.html"


# What is gathered from the stream


def _chosen(
    model: Model,
    sae: Autoencoder,
    tokens: Tokens,
    latents: Sequence[int] | None,
    skip: int,
    special: tuple[int, ...],
) -> Int64[Tensor, " m"]:
    d_sae = int(sae.cfg.d_sae)
    if latents is not None:
        chosen = torch.tensor(list(dict.fromkeys(int(one) for one in latents)), dtype=torch.int64)
        if len(chosen) == 0 or int(chosen.min()) < 0 or int(chosen.max()) >= d_sae:
            raise Refusal(
                f"The latents are {list(latents)[:8]}, expected some of 0 to {d_sae - 1}, those of "
                "this SAE."
            )
        return chosen
    first = tokens.select(torch.arange(min(_CHOICE_CONTEXTS, tokens.n_contexts)))
    count = torch.zeros(d_sae, dtype=torch.int64)
    for batch in stream(model, hook_of(sae), first, skip, special):
        code = sparse_encode(sae, batch.x)
        count += torch.bincount(code.indices[code.values != 0].cpu(), minlength=d_sae)
    order = count.argsort(descending=True, stable=True)[: max(1, int((count > 0).sum()))]
    places = torch.linspace(0, len(order) - 1, min(_CHOSEN, len(order))).round().long()
    return order[places]


def _decoder(sae: Autoencoder) -> tuple[Tensor, Tensor | None]:
    """Directions, and the bias where decoding is the sum of both."""
    try:
        return decoder_of(sae)
    except Refusal:
        return sae.W_dec.detach(), None


class _Best:
    """For each of m latents the k events of largest key: where, how active, and what is around."""

    def __init__(self, m: int, k: int) -> None:
        self.k = k
        self.key = torch.full((m, k), -torch.inf, dtype=torch.float64)
        self.place = torch.zeros(m, k, dtype=torch.int64)
        self.value = torch.zeros(m, k)
        self.around = torch.zeros(m, k, _BEFORE + 1 + _AFTER)

    def add(self, row: Tensor, key: Tensor, place: Tensor, value: Tensor, look: Any) -> None:
        """Events in any order; look(row, place) reads the activations around some of them."""
        late = key > self.key[row, -1]
        row, key, place, value = row[late], key[late], place[late], value[late]
        order = key.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        row = row[order]
        rank = torch.arange(len(row)) - torch.searchsorted(row, row)
        order, row, rank = order[rank < self.k], row[rank < self.k], rank[rank < self.k]
        if len(row) == 0:
            return
        touched, at = row.unique(return_inverse=True)
        new = _Best(len(touched), self.k)
        new.key[at, rank], new.place[at, rank] = key[order], place[order]
        new.value[at, rank] = value[order]
        new.around[at, rank] = look(row, place[order])
        best = torch.cat([self.key[touched], new.key], 1).topk(self.k, dim=1).indices
        for name in ("key", "place", "value"):
            both = torch.cat([getattr(self, name)[touched], getattr(new, name)], 1)
            getattr(self, name)[touched] = both.gather(1, best)
        both = torch.cat([self.around[touched], new.around], 1)
        self.around[touched] = both.gather(1, best[:, :, None].expand(-1, -1, both.shape[2]))


class _Gathered:
    """Counts, histogram, largest events and a random sample of events of the chosen latents.

    An event is a token where a latent is active; its place is context * length + position.
    """

    def __init__(self, chosen: Tensor, tokens: Tokens, d_sae: int, contexts: int) -> None:
        m = len(chosen)
        self.row = torch.full((d_sae,), -1, dtype=torch.int64)
        self.row[chosen] = torch.arange(m)
        self.length, self.places = tokens.tokens.shape[1], tokens.n_tokens
        self.n = 0
        self.count = torch.zeros(m, dtype=torch.int64)
        self.total = torch.zeros(m, dtype=torch.float64)
        self.histogram = torch.zeros(m, 2 * _OCTAVES * _PER_OCTAVE, dtype=torch.int64)
        self.top, self.sample = _Best(m, contexts), _Best(m, _SAMPLE)

    def add(self, batch: Batch, values: Tensor, indices: Tensor) -> None:
        """One batch of whole contexts with its code."""
        self.n += len(batch)
        token, slot = ((values != 0) & (self.row[indices] >= 0)).nonzero(as_tuple=True)
        row, value = self.row[indices[token, slot]], values[token, slot].float()
        place = (batch.context.cpu() * self.length + batch.position.cpu())[token]
        size = value.abs().double()
        self.count += torch.bincount(row, minlength=len(self.count))
        self.total.index_add_(0, row, size)
        octave = (size.log2() + _OCTAVES).clamp(0, 2 * _OCTAVES - 1e-9)
        bin = row * self.histogram.shape[1] + (octave * _PER_OCTAVE).long()
        self.histogram += torch.bincount(bin, minlength=self.histogram.numel()).view_as(
            self.histogram
        )
        event, order = (row * self.places + place).sort()
        ordered = value[order]

        def look(row: Tensor, place: Tensor) -> Tensor:
            shift = torch.arange(-_BEFORE, _AFTER + 1)
            wanted = (row * self.places + place)[:, None] + shift
            at = torch.searchsorted(event, wanted).clamp(max=len(event) - 1)
            position = (place % self.length)[:, None] + shift
            there = (event[at] == wanted) & (position >= 0) & (position < self.length)
            return torch.where(there, ordered[at], 0.0)

        # Of the top only the largest of each context.
        by_size = size.argsort(descending=True, stable=True)
        group = (row * self.places + place.div(self.length, rounding_mode="floor"))[by_size]
        group, back = group.sort(stable=True)
        first = torch.ones_like(group, dtype=torch.bool)
        first[1:] = group[1:] != group[:-1]
        best = by_size[back[first]]
        self.top.add(row[best], size[best], place[best], value[best], look)
        self.sample.add(row, _lottery(row, place), place, value, look)


def _lottery(row: Tensor, place: Tensor) -> Tensor:
    """A number for each event that depends on nothing else, spread evenly over [0, 1).

    Keeping those of largest number is drawing at random, the same in every order and batch size.
    Rounds of multiplication and shift, as in splitmix64, on 40 bits so that nothing overflows.
    """
    mask = (1 << 40) - 1
    mixed = (row * 0x9E3779B1 + place * 0x85EBCA6B + 0x27D4EB2F) & mask
    for factor in (0x2C1B3C, 0x297A2D):
        mixed = ((mixed ^ (mixed >> 17)) * factor) & mask
    return (mixed ^ (mixed >> 20)).double() / (1 << 40)


class _Along:
    """Variances of both parts of the error and of x, along unit directions and in all."""

    def __init__(self, units: Tensor, error_map: LinearMap) -> None:
        self.units, self.error_map, self.n = units, error_map, 0
        self.shift: list[Tensor] = []
        self.sums: list[list[Tensor]] = []

    def add(self, x: Float[Tensor, "n d"], error: Float[Tensor, "n d"]) -> None:
        """Rows of activations and errors."""
        linear = self.error_map(x)
        parts = [linear, error - linear, x]
        if not self.shift:
            # About the first mean, as sums of squares about zero would lose their digits.
            self.shift = [part.mean(0) for part in parts]
            self.sums = [[torch.zeros((), dtype=torch.float64)] * 4 for _ in parts]
        self.n += len(x)
        for i, part in enumerate(parts):
            part = part - self.shift[i]
            along = (part @ self.units.to(part).T).double()
            part = part.double()
            added = (along.square().sum(0), along.sum(0), part.square().sum(0), part.sum(0))
            self.sums[i] = [old.to(new) + new for old, new in zip(self.sums[i], added, strict=True)]

    def relative(self) -> list[Tensor]:
        """d u' C u / trace(C) of every direction, for the linear part, the nonlinear part and x."""
        found: list[Tensor] = []
        for square, total, squares, totals in self.sums:
            variance = square - total.square() / self.n
            trace = (squares - totals.square() / self.n).sum()
            found.append((len(squares) * variance / trace).cpu())
        return found


# From what was gathered to pages


def _pages(
    model: Model,
    sae: Autoencoder,
    tokens: Tokens,
    skip: int,
    special: tuple[int, ...],
    chosen: Tensor,
    directions: Tensor,
    units: Tensor,
    gathered: _Gathered,
    along: _Along | None,
) -> dict[int, LatentPage]:
    hook = hook_of(sae)
    logits = _logit_ends(model, hook, units)
    neighbours = _neighbours(directions, chosen)
    shares = None if along is None else along.relative()
    shown = _Shown(model, tokens, skip, special, gathered)
    identity = getattr(sae.cfg.metadata, "neuronpedia_id", None)
    hosted = isinstance(identity, str) and _ID.fullmatch(identity)
    pages: dict[int, LatentPage] = {}
    for row, latent in enumerate(chosen.tolist()):
        count = int(gathered.count[row])
        bands = shown.bands(row)
        pages[latent] = LatentPage(
            latent=latent,
            hook=hook,
            n_tokens=gathered.n,
            frequency=count / gathered.n,
            largest=abs(bands["top"][0].activation) if bands["top"] else 0.0,
            mean=float(gathered.total[row]) / count if count else 0.0,
            histogram=_bins(gathered.histogram[row]),
            bands=bands,
            raised=None if logits is None else logits[row][0],
            lowered=None if logits is None else logits[row][1],
            neighbours=neighbours[row],
            linear=None if shares is None else float(shares[0][row]),
            nonlinear=None if shares is None else float(shares[1][row]),
            activation=None if shares is None else float(shares[2][row]),
            neuronpedia=f"{_HOST}{identity}/{latent}" if hosted else None,
        )
    return pages


class _Shown:
    """From places to examples with their text."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        skip: int,
        special: tuple[int, ...],
        gathered: _Gathered,
    ) -> None:
        self.tokens, self.skip, self.special, self.gathered = tokens, skip, set(special), gathered
        self.model, self.pieces = model, dict[int, str]()

    def bands(self, row: int) -> dict[str, tuple[Example, ...]]:
        """The top, and what the random sample has in each band below it."""
        top, sample = self.gathered.top, self.gathered.sample
        kept = [i for i in range(top.k) if top.key[row, i] > -torch.inf]
        bands = {"top": tuple(self._example(top, row, i) for i in kept)}
        drawn = [i for i in range(sample.k) if sample.key[row, i] > -torch.inf]
        drawn.sort(key=lambda i: abs(float(sample.value[row, i])))
        for band, (low, high) in _BANDS.items():
            inside = drawn[math.floor(low * len(drawn)) : math.ceil(high * len(drawn))]
            # One of a context is enough; in the order of the lottery, so that none is preferred.
            by_context = {
                int(sample.place[row, i]) // self.gathered.length: i
                for i in sorted(inside, reverse=True)
            }
            some = sorted(by_context.values())[:_IN_A_BAND]
            bands[band] = tuple(self._example(sample, row, i) for i in some)
        return bands

    def _example(self, best: _Best, row: int, i: int) -> Example:
        length = self.gathered.length
        context, position = divmod(int(best.place[row, i]), length)
        start, stop = max(0, position - _BEFORE), min(length, position + _AFTER + 1)
        ids: list[int] = self.tokens.tokens[context, start:stop].tolist()
        around = best.around[row, i, start - position + _BEFORE : stop - position + _BEFORE]
        measured = [
            value if self._counts(start + j, token, length) else math.nan
            for j, (value, token) in enumerate(zip(around.tolist(), ids, strict=True))
        ]
        return Example(
            document=self.tokens.names[int(self.tokens.document[context])],
            context=context,
            position=position,
            activation=float(best.value[row, i]),
            tokens=tuple(self._piece(token) for token in ids),
            activations=tuple(measured),
            peak=position - start,
        )

    def _counts(self, position: int, token: int, length: int) -> bool:
        return self.skip <= position < length - 1 and token not in self.special

    def _piece(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = piece_of(self.model, token)
        return self.pieces[token]


def piece_of(model: Model, token: int) -> str:
    """The text of one token id, with the space that sentencepiece tokenizers drop."""
    text = str(model.tokenizer.decode([token]))
    raw = str(model.tokenizer.convert_ids_to_tokens(token))
    return f" {text}" if raw.startswith("\u2581") and not text.startswith(" ") else text


def _bins(counts: Tensor) -> tuple[tuple[float, float, int], ...]:
    """From the first to the last bin with a token."""
    some = counts.nonzero()[:, 0]
    if len(some) == 0:
        return ()
    found: list[tuple[float, float, int]] = []
    for i in range(int(some[0]), int(some[-1]) + 1):
        low, high = (2.0 ** (j / _PER_OCTAVE - _OCTAVES) for j in (i, i + 1))
        found.append((low, high, int(counts[i])))
    return tuple(found)


def _neighbours(directions: Tensor, chosen: Tensor) -> list[tuple[tuple[int, float], ...]]:
    """The nearest other directions of each; none for a direction of zeros."""
    alive = (directions != 0).any(1).nonzero()[:, 0]
    k = min(_NEIGHBOURS + 1, len(alive))
    asked = torch.isin(chosen.to(alive.device), alive).nonzero()[:, 0]
    found: list[tuple[tuple[int, float], ...]] = [()] * len(chosen)
    if len(asked) == 0:
        return found
    near = nearest_neighbours(directions[chosen[asked.cpu()]], k, among=directions[alive])
    for row, cosines, indices in zip(
        asked.tolist(), near.cosines.tolist(), alive[near.indices].tolist(), strict=True
    ):
        own = int(chosen[row])
        others = [(j, c) for j, c in zip(indices, cosines, strict=True) if j != own]
        found[row] = tuple(others[:_NEIGHBOURS])
    return found


Ends = tuple[tuple[tuple[str, float], ...], tuple[tuple[str, float], ...]]


def _logit_ends(model: Model, hook: str, units: Tensor) -> list[Ends] | None:
    """For each direction the next tokens that it raises and lowers most; None if not linear."""
    written = residual_directions(model, hook, units)
    if written is None:
        return None
    unembedding = model.network.get_output_embeddings().weight.detach().float()
    k = min(_LOGITS, len(unembedding))
    found: list[Ends] = []
    rows = max(1, _LOGITS_AT_A_TIME // len(unembedding))
    for part in written.to(unembedding).split(rows):
        logits = part @ unembedding.T
        logits -= logits.mean(1, keepdim=True)
        ends = [logits.topk(k, largest=largest) for largest in (True, False)]
        for row in range(len(part)):
            raised, lowered = (
                tuple(
                    (piece_of(model, token), value)
                    for token, value in zip(
                        end.indices[row].tolist(), end.values[row].tolist(), strict=True
                    )
                )
                for end in ends
            )
            found.append((raised, lowered))
    return found


def residual_directions(
    model: Model, hook: str, directions: Float[Tensor, "m d"]
) -> Float[Tensor, "m d_model"] | None:
    """What directions at a hook add to the residual stream.

    Themselves, but for the heads' z: there what stands after the attention with z = u, less with
    z = 0, at a token of its own for each. None where that is not linear in u (a norm follows the
    output matrix, as in Gemma 2).
    """
    if not hook.endswith(Z):
        return directions
    after = [hook.replace(Z, stage) for stage in (RESID_MID, RESID_POST)]
    reader = next(name for name in after if name in model.hooks)
    length = min(64, model.n_context)
    parts: list[Tensor] = []
    for part in directions.split(length):
        x = torch.zeros(1, length, directions.shape[1], dtype=model.dtype, device=model.device)
        x[0, : len(part)] = part.to(x)
        ids = torch.zeros(1, length, dtype=torch.int64)
        none, once, twice = (
            model.read(ids, [reader], {hook: lambda _, scale=scale, x=x: scale * x})[0][reader][0]
            for scale in (0.0, 1.0, 2.0)
        )
        added = (once - none).float()
        doubled = (twice - none).float()
        if float((doubled - 2 * added).norm()) > 0.05 * float(doubled.norm()):
            return None
        parts.append(added[: len(part)])
    return torch.cat(parts)

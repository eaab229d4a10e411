"""Pursuit: sparse non-negative codes of activations on a given dictionary, one atom a step.

An SAE's encoder computes its code in one product and a threshold.  A pursuit looks for a code of
the same sparsity on the same directions by search: with s = x - bias, residual r = s - w D and
correlations c = D r,

    select       the atom of largest c
    re-weight    the weights w of the active atoms, never below 0
    repeat       l0 times

so what a pursuit gains over the encoder bounds from below what the encoder loses (Engels, Smith and
Tegmark 2025 call it encoder error).  `gradient_pursuit` takes one gradient step on all active
weights, `matching_pursuit` sets only the new one, `nonnegative_refit` solves for all weights of a
given support exactly.

Sources: Blumensath and Davies, "Gradient pursuits", IEEE Transactions on Signal Processing 56
(2008) 2370-2382; Mallat and Zhang, IEEE Transactions on Signal Processing 41 (1993) 3397-3415
(matching pursuit); Smith, "Replacing SAE encoders with inference-time optimisation" (Progress
update 1 of the Google DeepMind mechanistic interpretability team, April 2024); Engels, Smith and
Tegmark, "Decomposing the Dark Matter of Sparse Autoencoders", TMLR 2025 (non-negative gradient
pursuit at each token's own L0); Lawson and Hanson, Solving Least Squares Problems (1974), chapter
23 (non-negative least squares).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import finite_rows
from darkmatter.sparse import SparseCode

# Correlations of one chunk of tokens with all atoms: at most this many numbers (64 MB of float32),
# twice; more on a GPU, so that products have enough rows to be fast. And at most so many tokens:
# with more, what belongs to a chunk leaves a core's cache.
_CHUNK, _GPU_CHUNK, _TOKENS = 1 << 24, 1 << 27, 2048
# Gram rows are kept for dictionaries up to this many atoms: 1 GiB of float32 if all become active.
_GRAM_ATOMS = 1 << 14
# Correlations with so many atoms at a time, where Gram rows are summed: these columns of all rows
# stay in a cache for all tokens of a chunk, and so do the sums while the largest is sought.
_COLUMNS = 128
# Below this share of the largest diagonal a pivot of a Gram block is rounding: directions repeat.
_PIVOT = 1e-11


@torch.no_grad()
def gradient_pursuit(
    x: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "m d"],
    l0: int | Int[Tensor, "n"],
    bias: Float[Tensor, "d"] | None = None,
) -> SparseCode:
    """Non-negative gradient pursuit as published: code w of every row of x, after l0 steps.

        r  =  x - bias - w D                      (residual)
        j  =  argmax_i  D_i r                     (any atom; the first of equals)
        A  =  {i: w_i > 0} and j                  (active set)
        g  =  D r  on A, 0 elsewhere              (steepest descent of |r|^2 / 2)
        t  =  <g D, r> / |g D|^2                  (exact line search along g)
        w  <- max(w + t g, 0)

    `dictionary` [m, d] holds one atom a row, `bias` [d] is what the decoder adds; `l0` is one
    number of steps for all rows or one for each.  values [n, k] >= 0 and indices [n, k],
    k = max(l0), in the order of selection; unused places are value 0, index 0; no atom comes twice
    in a row.  float64 if x is, else float32.  At the edges:

    - A step may select an active atom (then it only re-weights) and may clip a weight to 0, whose
      atom leaves and can return; so l0 bounds the number of active atoms and need not be reached.
    - No atom with a positive correlation: the largest enters the gradient, gets a weight below 0
      and is clipped at once.
    - No residual, or one orthogonal to all atoms to rounding (0 / 0 in t), or a gradient whose
      atoms cancel (t = 1 / 0): nothing changes any more.  The published loop returns NaN there.
    - Atoms are not normalised: a longer atom of the same direction is preferred.  Scaling the whole
      dictionary by a scales w by 1 / a.
    - l0 = 0 is a row of zeros.

    |r| falls in every step that clips no weight, by |g|^4 / |g D|^2 in its square.  A step that
    clips can raise it: t is exact for the step before clipping only (tests/test_pursuit.py keeps
    an example in two dimensions).  On an orthogonal dictionary |r| never grows.

    Raises Refusal for shapes that do not match, no atoms, NaN or infinity, values that are not
    float, l0 that is not an integer, negative or above m.
    """
    signal, atoms = _signal(x, dictionary, bias)
    return _by_chunks(_gradient_chunk, signal, atoms, _steps(l0, len(signal), len(atoms)))


@torch.no_grad()
def matching_pursuit(
    x: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "m d"],
    l0: int | Int[Tensor, "n"],
    bias: Float[Tensor, "d"] | None = None,
) -> SparseCode:
    """Non-negative matching pursuit: each of l0 steps adds one atom's projection to the code.

        j  =  argmax_i  D_i r / |D_i|,     w_j  <-  w_j + D_j r / |D_j|^2

    The selection is by the correlation with the direction of an atom, so that its length does not
    matter; this is the step that takes most off |r|^2.  Weights only grow.  The same atom may be
    selected again, which then raises its weight; where no atom has a positive correlation the row
    is finished.  |r| never grows.  An atom of length 0 is never selected.  Arguments, result and
    refusals are those of `gradient_pursuit`.  With unit atoms this is the encoder of
    sae_lens.MatchingPursuitSAE.
    """
    signal, atoms = _signal(x, dictionary, bias)
    length = atoms.norm(dim=1, keepdim=True)
    unit = torch.where(length > 0, atoms / length, 0)
    steps = _steps(l0, len(signal), len(atoms))
    code = _by_chunks(_matching_chunk, signal, unit, steps)
    scale = torch.where(length > 0, 1 / length, 0)[:, 0]
    return SparseCode(code.values * scale[code.indices], code.indices)


def _signal(
    x: Any, dictionary: Any, bias: Any
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
    """x - bias and the dictionary in one float dtype on the device of x, or a Refusal."""
    x, atoms = finite_rows("x", x), finite_rows("dictionary", dictionary)
    if x.shape[1] != atoms.shape[1] or len(atoms) == 0:
        raise Refusal(
            f"x is {list(x.shape)} and dictionary is {list(atoms.shape)}, expected [n, d] and "
            "[m, d] with the same d and m of at least 1; pass one atom a row, as in W_dec."
        )
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    signal, atoms = x.to(dtype), atoms.to(x.device, dtype)
    if bias is not None:
        offset = finite_rows("bias", bias)
        if bias.ndim != 1 or len(offset) != x.shape[1]:
            raise Refusal(
                f"bias has shape {list(bias.shape)}, expected [{x.shape[1]}], the width of x; pass "
                "what the decoder adds, such as b_dec."
            )
        signal = signal - offset[:, 0].to(signal)
    # |g D| of a step is as large as |x| |D|^2, and is squared.
    longest = [float(rows.norm(dim=1).amax()) if len(rows) else 0.0 for rows in (signal, atoms)]
    if not longest[0] * longest[1] * longest[1] < torch.finfo(dtype).max ** 0.5 / len(atoms):
        raise Refusal(
            f"rows of x are up to {longest[0]:.2g} long and atoms up to {longest[1]:.2g}, whose "
            f"products overflow {dtype}; divide x or the dictionary by a number, or pass float64."
        )
    return signal, atoms


def _steps(l0: Any, n: int, m: int) -> Int64[Tensor, "n"]:
    """l0 as one number of steps a row, on the CPU, or a Refusal."""
    if isinstance(l0, int) and not isinstance(l0, bool):
        steps = torch.full((n,), l0)
    elif not isinstance(l0, Tensor):
        raise Refusal(
            f"l0 is {type(l0).__name__}, expected an int or a tensor of integers [n]; pass a "
            "number of atoms."
        )
    elif l0.dtype == torch.bool or l0.is_floating_point() or l0.is_complex():
        raise Refusal(f"l0 is {l0.dtype}, expected integers; count atoms, e.g. with code.l0.")
    elif l0.shape != (n,):
        raise Refusal(
            f"l0 has shape {list(l0.shape)}, expected [{n}], one number for each row of x; pass an "
            "int for the same everywhere."
        )
    else:
        steps = l0.cpu().to(torch.int64)
    if n and not (0 <= int(steps.min()) <= int(steps.max()) <= m):
        raise Refusal(
            f"l0 runs from {int(steps.min())} to {int(steps.max())}, expected 0 to {m}, the number "
            "of atoms in the dictionary; clamp it."
        )
    return steps


_Chunk = Callable[[Tensor, Tensor, "_Gram", list[int]], tuple[Tensor, Tensor]]


def _by_chunks(pursue: _Chunk, signal: Tensor, atoms: Tensor, steps: Tensor) -> SparseCode:
    """Run `pursue` on chunks of rows that need about equally many steps, most steps first."""
    n, k = len(signal), int(steps.max()) if len(steps) else 0
    values = signal.new_zeros(n, k)
    indices = torch.zeros(n, k, dtype=torch.int64, device=signal.device)
    gram = _Gram(atoms)
    order = steps.argsort(descending=True, stable=True)
    on_cpu = atoms.device.type == "cpu"
    at_a_time = min(_TOKENS, _CHUNK // len(atoms)) if on_cpu else _GPU_CHUNK // len(atoms)
    for rows in order.split(max(32, at_a_time)):
        own = steps[rows]
        width = int(own[0]) if len(own) else 0
        if width == 0:
            break
        # live[i]: how many rows of the chunk are still to do step i; they are its first rows.
        live = (own[:, None] > torch.arange(width)).sum(0).tolist()
        here = rows.to(signal.device)
        w, j = pursue(signal[here], atoms, gram, live)
        values[here, :width] = w
        indices[here, :width] = torch.where(w != 0, j, 0)
    return SparseCode(values, indices)


class _Gram:
    """Rows of the Gram matrix D D^T, each computed when its atom first becomes active.

    Correlations after a step follow from the first ones, D s - sum_j w_j (D D^T)_j: that reads m
    numbers for each active atom and needs no product with the dictionary.  The rows are kept in
    pieces of some columns.
    """

    def __init__(self, atoms: Tensor) -> None:
        m, d = atoms.shape
        self.atoms = atoms
        self.known = torch.zeros(m, dtype=torch.bool, device=atoms.device)
        # A product costs d multiplications an atom, the sum of k rows k reads: measured equal at
        # about k = d / 4 on CPUs.  GPUs are so much better at products that they always win.
        self.limit = d // 4 if m <= _GRAM_ATOMS and atoms.device.type == "cpu" else 0
        self.columns = min(m, _COLUMNS) if self.limit else m
        self.pieces = [
            atoms.new_empty(m if self.limit else 0, len(part)) for part in atoms.split(self.columns)
        ]

    def learn(self, indices: Tensor) -> None:
        new = indices.unique()
        new = new[~self.known[new]]
        if self.limit and len(new):
            rows = self.atoms[new] @ self.atoms.T
            for piece, part in zip(self.pieces, rows.split(self.columns, dim=1), strict=True):
                piece[new] = part
            self.known[new] = True

    def rows(self, indices: Tensor) -> Float[Tensor, "n m"]:
        """Gram rows of some atoms, which must have been learned."""
        return torch.cat([piece[indices] for piece in self.pieces], dim=1)


class _Correlations:
    """D r of every row of a chunk, in pieces of some atoms: [pieces, n, columns]."""

    def __init__(self, signal: Tensor, gram: _Gram) -> None:
        self.signal, self.gram = signal, gram
        shape = (len(gram.pieces), len(signal), gram.columns)
        # -inf behind the last atom, where the last piece is narrower.
        self.first, self.now = (signal.new_full(shape, -torch.inf) for _ in range(2))
        self._spread(signal, self.first)
        self._entries = self.now.view(-1)
        self._row = torch.arange(len(signal), device=signal.device)

    def _spread(self, residual: Tensor, out: Tensor) -> None:
        """D residual into the pieces `out`."""
        if len(out) == 1:
            torch.mm(residual, self.gram.atoms.T, out=out[0])
            return
        products = (residual @ self.gram.atoms.T).split(self.gram.columns, dim=1)
        for piece, part in zip(out, products, strict=True):
            piece[:, : part.shape[1]] = part

    def update(self, values: Tensor, indices: Tensor) -> Int64[Tensor, "n"]:
        """Correlations with signal - values D in the first rows; the atom of the largest of each.

        Of equals the first.
        """
        n, k = values.shape
        gram, now = self.gram, self.now[:, :n]
        if k > gram.limit:
            explained = embedding_bag(indices, gram.atoms, per_sample_weights=values, mode="sum")
            self._spread(self.signal[:n] - explained, now)
        largest = now.new_empty(len(now), n)
        for first, rows, piece, out in zip(
            self.first[:, :n], gram.pieces, now, largest, strict=True
        ):
            width = rows.shape[1]
            if k == 0:
                piece.copy_(first)
            elif k <= gram.limit:
                explained = embedding_bag(indices, rows, per_sample_weights=values, mode="sum")
                torch.sub(first[:, :width], explained, out=piece[:, :width])
            if len(now) > 1:
                torch.amax(piece, dim=1, out=out)
        if len(now) == 1:
            return _argmax(now[0])
        best = largest.argmax(0)
        winners = self._entries.view(-1, gram.columns)[best * len(self.signal) + self._row[:n]]
        return best * gram.columns + winners.argmax(1)

    def at(self, indices: Tensor) -> Float[Tensor, "n k"]:
        """Correlations with these atoms of the first rows."""
        columns, row = self.gram.columns, self._row[: len(indices), None]
        # Place in [pieces, n, columns], as piece * columns is in the index already.
        place = indices + columns * (indices // columns * (len(self.signal) - 1) + row)
        return self._entries.index_select(0, place.flatten()).view_as(place)


def _gradient_chunk(
    signal: Tensor, atoms: Tensor, gram: _Gram, live: list[int]
) -> tuple[Tensor, Tensor]:
    correlations = _Correlations(signal, gram)
    # A gradient this small is the rounding of the correlations; along it t may be anything.
    rounding = torch.finfo(signal.dtype).eps * atoms.norm(dim=1).max()
    nothing = (rounding * signal.norm(dim=1)).square()
    values = signal.new_zeros(len(signal), len(live))
    indices = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for step, n in enumerate(live):
        past, w = indices[:n, :step], values[:n, : step + 1]
        best = correlations.update(w[:, :step], past)
        # Later steps read no Gram rows, and there is none after the last.
        if step < min(gram.limit, len(live) - 1):
            gram.learn(best)
        indices[:n, step] = best
        active = w != 0
        # An atom that is active already keeps its place; one that was clipped gets a new one.
        active[:, step] = ~(active[:, :step] & (past == best[:, None])).any(1)
        g = correlations.at(indices[:n, : step + 1]) * active
        along = embedding_bag(
            indices[:n, : step + 1], atoms, per_sample_weights=g, mode="sum"
        ).square()
        # <g D, r> is |g|^2, as g is D r on the active set.
        steepness = g.square().sum(1)
        length = torch.where(steepness > nothing[:n], steepness / along.sum(1), 0)
        values[:n, : step + 1] = (w + length.nan_to_num_(0, 0, 0)[:, None] * g).relu_()
    return values, indices


def _matching_chunk(
    signal: Tensor, unit: Tensor, gram: _Gram, live: list[int]
) -> tuple[Tensor, Tensor]:
    correlation = signal @ unit.T
    values = signal.new_zeros(len(signal), len(live))
    indices = torch.zeros(values.shape, dtype=torch.int64, device=values.device)
    for step, n in enumerate(live):
        best = _argmax(correlation[:n])
        gram.learn(best)
        gain = correlation[:n].gather(1, best[:, None])[:, 0].relu()
        correlation[:n] -= gain[:, None] * (gram.rows(best) if gram.limit else unit[best] @ unit.T)
        indices[:n, step] = best
        # Where the atom has been selected before, its first place takes the weight.
        place = (indices[:n, : step + 1] == best[:, None]).to(torch.int8).argmax(1, keepdim=True)
        values[:n].scatter_add_(1, place, gain[:, None])
    return values, indices


def _argmax(correlation: Tensor) -> Int64[Tensor, "n"]:
    """Index of the largest entry of each row, the first of equals.

    max of blocks, then argmax in the winning block: max is vectorised on CPUs and argmax is not.
    """
    n, m = correlation.shape
    size = 128
    if m % size or m <= size:
        return correlation.argmax(1)
    blocks = correlation.view(n, m // size, size)
    block = blocks.amax(2).argmax(1)
    inside = blocks[torch.arange(n, device=block.device), block].argmax(1)
    return block * size + inside


@torch.no_grad()
def nonnegative_refit(
    x: Float[Tensor, "n d"],
    dictionary: Float[Tensor, "m d"],
    code: SparseCode,
    bias: Float[Tensor, "d"] | None = None,
) -> SparseCode:
    """The best non-negative weights on the atoms that each row of `code` uses.

        argmin over w >= 0, w_i = 0 where code_i = 0,  of  | x - bias - w D |^2

    Exact non-negative least squares in float64 (batched active-set method of Lawson and Hanson,
    begun at the code's own support), so no code on the same atoms has a smaller residual.  Places
    and dtype are as in the code; weights that end at 0 give up their place (value 0, index 0); of
    an index that comes twice in a row the first place takes all.  Where directions repeat, the
    weights are one of several best answers.  Raises Refusal as `gradient_pursuit` does, and for a
    code with another number of rows or an index outside of the dictionary.
    """
    signal, atoms = _signal(x, dictionary, bias)
    if len(code) != len(signal):
        raise Refusal(
            f"the code has {len(code)} rows and x has {len(signal)}, expected as many; pass the "
            "code of these rows."
        )
    used = _used(code)
    indices = torch.where(used, code.indices, 0)
    if indices.numel() and not (0 <= int(indices.min()) <= int(indices.max()) < len(atoms)):
        raise Refusal(
            f"the code has indices from {int(indices.min())} to {int(indices.max())}, expected 0 "
            f"to {len(atoms) - 1}; pass the dictionary it was encoded with."
        )
    values = torch.zeros_like(code.values)
    # Rows of about equally many atoms together, as a batch pays for its largest; active first.
    count, place = used.sum(1), (~used).to(torch.int8).argsort(dim=1, stable=True)
    for rows in count.argsort(stable=True).split(512):
        width = int(count[rows].max()) if len(rows) else 0
        at = (rows[:, None], place[rows, :width])
        # float64, as the product of atoms squares how nearly parallel they are.
        block = atoms[indices[at]].double() * used[at][..., None]
        target = (block @ signal[rows].double()[..., None])[..., 0]
        values[at] = _nonnegative(block @ block.mT, target, used[at]).to(values.dtype)
    return SparseCode(values, torch.where(values != 0, indices, 0))


def _used(code: SparseCode) -> Bool[Tensor, "n k"]:
    """Places that hold a weight, only the first of those with the same index."""
    used = code.values != 0
    same = (code.indices[:, :, None] == code.indices[:, None, :]) & used[:, None, :]
    return used & ~same.tril(-1).any(2)


def _nonnegative(
    gram: Float64[Tensor, "b k k"], target: Float64[Tensor, "b k"], allowed: Bool[Tensor, "b k"]
) -> Float64[Tensor, "b k"]:
    """argmin over w >= 0 of  w G w / 2 - w target,  w = 0 where not allowed."""
    w = torch.zeros_like(target)
    # Begun with all atoms: with the codes of SAEs most rows are solved by that.
    passive, done = allowed.clone(), ~allowed.any(1)
    start = _solve(gram, target, passive)
    inside = (start >= 0).all(1)
    w[inside], done = start[inside], done | inside
    passive[~inside] = False
    enough = 1e-12 * target.abs().amax(1, keepdim=True) if target.shape[1] else target
    # Lawson and Hanson end after finitely many solves, in practice after about as many as atoms.
    for _ in range(10 * target.shape[1]):
        todo = (~done).nonzero()[:, 0]
        if not len(todo):
            break
        slack = target[todo] - (gram[todo] @ w[todo][..., None])[..., 0]
        slack[passive[todo] | ~allowed[todo]] = -torch.inf
        gain, entering = slack.max(1)
        better = gain > enough[todo, 0]
        done[todo[~better]] = True
        todo, entering = todo[better], entering[better]
        passive[todo, entering] = True
        _descend(w, passive, gram, target, todo)
    return w


def _descend(w: Tensor, passive: Tensor, gram: Tensor, target: Tensor, rows: Tensor) -> None:
    """Solve on the passive set; while a weight turns negative, stop at its zero and drop it."""
    while len(rows):
        solved = _solve(gram[rows], target[rows], passive[rows])
        negative = passive[rows] & (solved <= 0)
        crossing = torch.where(negative, w[rows] / (w[rows] - solved), torch.inf)
        share = crossing.amin(1, keepdim=True).clamp(max=1)
        moved = w[rows] + share * (solved - w[rows])
        leaving = negative & (crossing <= share)
        w[rows] = torch.where(leaving, 0, moved)
        passive[rows] &= ~leaving
        rows = rows[negative.any(1)]


def _solve(gram: Tensor, target: Tensor, passive: Tensor) -> Tensor:
    """Least squares on the passive places, 0 elsewhere; of several answers the shortest."""
    both = passive[:, :, None] & passive[:, None, :]
    inner, right = torch.where(both, gram, 0), torch.where(passive, target, 0)
    size = inner.diagonal(dim1=1, dim2=2)
    filled = inner + torch.diag_embed((~passive).to(inner))
    factor, info = torch.linalg.cholesky_ex(filled)
    solved = torch.cholesky_solve(right[..., None], factor)[..., 0]
    pivot = torch.where(passive, factor.diagonal(dim1=1, dim2=2).square() - _PIVOT * size, 1)
    flat = (info != 0) | (pivot <= 0).any(1)
    if flat.any():
        inverse = torch.linalg.pinv(inner[flat], rtol=_PIVOT, hermitian=True)
        solved[flat] = (inverse @ right[flat][..., None])[..., 0]
    return torch.where(passive, solved, 0)

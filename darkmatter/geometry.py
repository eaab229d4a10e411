"""Geometry of decoder directions: neighbours, interference and families.

Directions are the rows of a decoder, taken at unit length: u_i = W_i / |W_i|.  The questions here
are how close together m directions stand in d dimensions, against three yardsticks

    Welch           max_ij |u_i u_j|  >=  rms_ij (u_i u_j)  >=  sqrt((m - d) / (d (m - 1)))
    random          (1 + u_i u_j) / 2  is  Beta((d - 1) / 2, (d - 1) / 2)
    same spread     random directions with the second moment of the decoder's own

and what it costs: a silent latent still reads  u_j . sum_i f_i u_i  from those that are active.

Sources: Welch, IEEE Transactions on Information Theory 20 (1974) 397-399 (the bound);
"Some costs of superposition" (Linsefors, LessWrong, March 2024) and the comment there on typical
against worst inner products; comments under "Do sparse autoencoders find 'true features'?" (Till,
LessWrong, February 2024) on neighbour cosines, their peaks and random directions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import finite_rows
from darkmatter.sparse import SparseCode

Case = Literal["worst", "typical"]

# Cosines of one chunk of rows with all directions: this many numbers (128 MB of float32). On a GPU
# more, so that products have enough rows to be fast.
_CHUNK, _GPU_CHUNK = 1 << 25, 1 << 27
# Step of the integral over cosines; its integrand is a smooth step, wider than this below d = 10^6.
_STEP = 1e-4
# Each brings the rms cosine of a drawn control some ten times closer to that asked for.
_CALIBRATIONS = 3
# Of a histogram: ten bins in each, so that there are at most 200,000.
_NARROWEST = 1e-4


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The k nearest of every direction, nearest first: cosines [m, k] and their indices [m, k]."""

    cosines: Float[Tensor, "m k"]
    indices: Int64[Tensor, "m k"]


@torch.no_grad()
def neighbour_cosines(
    directions: Float[Tensor, "m d"], ranks: Sequence[int] = (1, 10, 100)
) -> Float[Tensor, "m ranks"]:
    """Signed cosine of every direction with its k-th nearest other direction, for k in `ranks`.

        c_ik  =  k-th largest of  u_i . u_j  over  j != i,     u_i = W_i / |W_i|

    Rows need not have unit length; equal rows are neighbours with cosine 1.  float64 if directions
    are, else float32.  The m x m cosines exist a chunk of rows at a time only.  Raises Refusal when
    directions are not finite [m, d], a row is zero, or a rank is not an integer from 1 to m - 1.
    """
    units = unit_rows("directions", directions)
    columns = [_checked_rank(rank, len(units)) - 1 for rank in ranks]
    if not columns:
        raise Refusal("ranks is empty, expected at least one; (1, 10, 100) are usual.")
    found = [part.cosines[:, columns] for part in _nearest(units, None, max(columns) + 1)]
    return torch.cat(found)


@torch.no_grad()
def nearest_neighbours(
    directions: Float[Tensor, "m d"], k: int = 1, among: Float[Tensor, "others d"] | None = None
) -> Neighbours:
    """The k nearest other directions of each, or with `among` the k nearest rows of that.

    Cosines are signed.  Raises Refusal as `neighbour_cosines`, or when the widths differ.
    """
    units = unit_rows("directions", directions)
    others = None if among is None else unit_rows("among", among)
    if others is not None and others.shape[1] != units.shape[1]:
        raise Refusal(
            f"directions are [m, {units.shape[1]}] and among is [m, {others.shape[1]}], expected "
            "the same width; compare decoders of one hook point."
        )
    _checked_rank(k, len(units) if others is None else len(others) + 1)
    parts = list(_nearest(units, others, k))
    return Neighbours(
        torch.cat([part.cosines for part in parts]), torch.cat([part.indices for part in parts])
    )


def _nearest(units: Tensor, others: Tensor | None, k: int) -> Iterator[Neighbours]:
    """The k nearest of the rows of units, chunk by chunk; of one another if others is None."""
    targets = (units if others is None else others.to(units)).T
    m = targets.shape[1]
    chunk = _CHUNK if units.device.type == "cpu" else _GPU_CHUNK
    rows = max(1, min(len(units), chunk // m))
    buffer = units.new_empty(rows, m)
    for start in range(0, len(units), rows):
        part = units[start : start + rows]
        cosines = torch.mm(part, targets, out=buffer[: len(part)])
        if others is None:
            own = torch.arange(len(part), device=units.device)
            cosines[own, start + own] = -torch.inf
        # At 24,576 directions in 768 dimensions topk costs a seventh of the product; selecting by
        # maxima of groups of columns first saved too little to keep.
        top = cosines.topk(k, dim=1)
        yield Neighbours(top.values.clamp_(-1, 1), top.indices)


def unit_rows(name: str, directions: Any) -> Float[Tensor, "m d"]:
    """The rows at unit length, float64 if they were, else float32.

    Raises Refusal for anything but finite rows [m, d] with at least two columns, none of them zero.
    """
    if isinstance(directions, Tensor) and (directions.ndim != 2 or directions.shape[1] < 2):
        raise Refusal(
            f"{name} has shape {list(directions.shape)}, expected [m, d] with d of at least 2; "
            "pass one direction a row, such as sae.W_dec."
        )
    rows = finite_rows(name, directions)
    if len(rows) == 0:
        raise Refusal(f"{name} has no rows, expected at least one direction; pass sae.W_dec.")
    if rows.dtype is not torch.float64:
        rows = rows.float()
    # Divided by the largest entry first, as squares of tiny or huge entries would leave the range.
    largest = rows.abs().amax(1, keepdim=True)
    if not largest.all():
        first = int((largest[:, 0] == 0).nonzero()[0])
        raise Refusal(
            f"{name} has a zero row, first row {first}, expected a direction in every row; "
            "drop such latents."
        )
    rows = rows / largest
    return rows / rows.norm(dim=1, keepdim=True)


def _checked_rank(rank: Any, m: int) -> int:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank < m:
        raise Refusal(
            f"the rank of a neighbour is {rank!r}, expected an integer from 1 to {m - 1}, as there "
            f"are {m - 1} others; ask for fewer neighbours."
        )
    return rank


# All pairs at once


def rms_cosine(directions: Float[Tensor, "m d"]) -> float:
    """Root mean square cosine over all pairs i != j, without forming the pairs.

        rms^2  =  (|U'U|_F^2 - m) / (m (m - 1)),      U [m, d] the unit rows

    For random directions it is 1 / sqrt(d).  Never below `welch_bound(m, d)`.  Raises Refusal as
    `unit_rows`, or for fewer than two directions.
    """
    m = len(directions)
    if m < 2:
        raise Refusal(f"there are {m} directions, expected at least 2 to have a pair; pass more.")
    return math.sqrt(max(0.0, (_spread(directions) - m) / (m * (m - 1))))


def effective_dimension(directions: Float[Tensor, "m d"]) -> float:
    """In how many dimensions the directions spread, m^2 / |U'U|_F^2, from 1 to d.

    It is the participation ratio (sum l)^2 / sum l^2 of the eigenvalues l of their second moment.
    As many random directions have rms cosine near one over its root.  Raises Refusal as
    `unit_rows`.
    """
    return len(directions) ** 2 / _spread(directions)


def _spread(directions: Tensor) -> float:
    units = unit_rows("directions", directions).double()
    return float((units.T @ units).square().sum())


def welch_bound(m: int, d: int) -> float:
    """The least possible rms, hence largest, |cosine| of m directions in d dimensions.

        sqrt((m - d) / (d (m - 1))),     0 for m <= d

    Reached exactly when the directions are a tight frame (rms) of equal angles (largest).  Raises
    Refusal unless m and d are integers of at least 2.
    """
    _checked_size(m, d)
    return math.sqrt(max(0, m - d) / (d * (m - 1)))


def _checked_size(m: Any, d: Any) -> None:
    for name, value in (("m", m), ("d", d)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise Refusal(f"{name} is {value!r}, expected an integer of at least 2; pass a size.")


# Random directions in closed form


def random_cosine_survival(cosine: Float[np.ndarray, " t"], d: int) -> Float[np.ndarray, " t"]:
    """P(u . v > t) for independent random directions in d dimensions, at every t of `cosine`.

        P  =  I_{1 - t^2}((d - 1) / 2, 1 / 2) / 2   for t >= 0,     1 - P(-t)   for t < 0

    with I the regularised incomplete beta function, as the squared cosine is
    Beta(1 / 2, (d - 1) / 2).  Raises Refusal for d below 2 or cosines outside [-1, 1].
    """
    from scipy.special import betainc

    _checked_size(2, d)
    t = np.asarray(cosine, dtype=np.float64)
    if not (np.abs(t) <= 1).all():
        raise Refusal("a cosine lies outside -1 to 1 or is NaN, expected cosines; divide by norms.")
    upper = betainc((d - 1) / 2, 0.5, 1 - np.square(t)) / 2
    return np.where(t < 0, 1 - upper, upper)


def random_neighbour_survival(
    cosine: Float[np.ndarray, " t"], m: int, d: int, rank: int = 1
) -> Float[np.ndarray, " t"]:
    """P(cosine with the rank-th nearest of m - 1 other random directions > t), exactly.

        P  =  P(Binomial(m - 1, q) >= rank)  =  I_q(rank, m - rank),      q = P(u . v > t)

    Raises Refusal for sizes below 2, a rank outside 1 to m - 1, or cosines outside [-1, 1].
    """
    _checked_size(m, d)
    return _order_survival(cosine, m - 1, d, _checked_rank(rank, m))


def random_neighbour_cosine(m: int, d: int, rank: int = 1) -> float:
    """Expected cosine with the rank-th nearest of m - 1 other random directions in d dimensions.

        E  =  -1 + integral from -1 to 1 of  P(c > t) dt

    Exact but for the quadrature (about 10^-6).  24,576 directions in 768 dimensions give 0.146,
    0.121 and 0.095 at ranks 1, 10 and 100.  Raises Refusal as `random_neighbour_survival`.
    """
    _checked_size(m, d)
    return _order_mean(m - 1, d, _checked_rank(rank, m))


def random_largest_cosine(m: int, d: int) -> float:
    """Expected largest cosine over all m (m - 1) / 2 pairs of random directions in d dimensions.

    Pairs are taken as independent, though they are so only two at a time.  Raises Refusal for sizes
    below 2.
    """
    _checked_size(m, d)
    return _order_mean(m * (m - 1) // 2, d, 1)


def _order_survival(
    cosine: Float[np.ndarray, " t"], draws: int, d: int, rank: int
) -> Float[np.ndarray, " t"]:
    from scipy.special import betainc

    return betainc(rank, draws - rank + 1, random_cosine_survival(cosine, d))


def _order_mean(draws: int, d: int, rank: int) -> float:
    t = np.linspace(-1, 1, round(2 / _STEP) + 1)
    survival = _order_survival(t, draws, d, rank)
    # The trapezoidal rule, whose ends are P(c > -1) = 1 and P(c > 1) = 0.
    return float((survival.sum() - 0.5) * (t[1] - t[0])) - 1


def random_directions(m: int, d: int, seed: int = 0) -> Float[Tensor, "m d"]:
    """m independent directions [m, d], uniform on the sphere, float32.  Refuses sizes below 2."""
    _checked_size(m, d)
    generator = torch.Generator().manual_seed(seed)
    return unit_rows("drawn rows", torch.randn(m, d, generator=generator))


@torch.no_grad()
def covariance_matched(
    directions: Float[Tensor, "m d"], seed: int = 0, m: int | None = None
) -> Float[Tensor, "m_drawn d"]:
    """Random directions of the decoder's own spread, with its rms cosine over all pairs.

        rows of N(0, S) at unit length,     S = a M + (1 - a) I / d,     M = U'U / m
        a such that the rms cosine of what was drawn is rms_cosine(U)

    The control that separates "these directions fill few dimensions" from "these two directions
    are alike".  M itself would not do: it is the moment of a sample, |M|_F^2 is rms^2 plus about
    1 / m, and directions drawn from it stand closer than the random directions it was measured on.
    No spread, a = 0, where the rms cosine is no larger than that of random directions.  The moment
    is about zero, as cosines are.  As many as `directions` unless m is given.  Raises Refusal as
    `rms_cosine`, or for m below 2.
    """
    target = rms_cosine(directions)
    units = unit_rows("directions", directions)
    d = units.shape[1]
    drawn = len(units) if m is None else m
    _checked_size(drawn, d)
    moment = units.double().T @ units.double() / len(units)
    own, axes = torch.linalg.eigh(moment)
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(drawn, d, generator=generator, dtype=torch.float64).to(units.device)
    excess = target**2 - 1 / d
    share = math.sqrt(excess / (float(moment.square().sum()) - 1 / d)) if excess > 0 else 0.0
    rows = _spread_out(normal, own, share)
    # Unit length takes a hundredth off the spread, which a slightly larger share gives back.
    for _ in range(_CALIBRATIONS if excess > 0 else 0):
        found = rms_cosine(rows) ** 2 - 1 / d
        if found <= 0:
            break
        share *= math.sqrt(excess / found)
        rows = _spread_out(normal, own, share)
    return unit_rows("drawn rows", (rows @ axes.T).to(units))


def _spread_out(normal: Tensor, own: Tensor, share: float) -> Tensor:
    """Normal rows with variances of a share of a decoder's own and the rest alike in all axes."""
    return normal * (share * own + (1 - share) / len(own)).clamp(min=0).sqrt()


# Neighbours as a graph, and their histogram


def in_degree(indices: Int[Tensor, "m k"]) -> Int64[Tensor, " m"]:
    """Of how many others each direction is among the k nearest; their mean is k.

    `indices` [m, k] as `nearest_neighbours` of m directions among one another gives them.  A hub is
    the neighbour of many.  Raises Refusal when an index is not one of 0 to m - 1.
    """
    m = len(indices)
    low, high = (int(end) for end in indices.aminmax()) if indices.numel() else (0, 0)
    if low < 0 or high >= max(m, 1):
        raise Refusal(
            f"indices run from {low} to {high}, expected 0 to {m - 1} for neighbours of {m} "
            "directions among themselves; look for neighbours without `among`."
        )
    return torch.bincount(indices.flatten(), minlength=m)


def histogram_peaks(
    values: Float[Tensor, " n"],
    bandwidth: float | int | None = None,
    prominence: float | int = 0.05,
) -> Float[Tensor, " peaks"]:
    """Where the smoothed density of cosines has peaks, ascending.

    A Gaussian kernel of standard deviation `bandwidth` smooths; without one it is Silverman's
    0.9 min(s, IQR / 1.34) n^(-1/5), at least 0.005.  A peak counts when one has to go down by at
    least `prominence` times the highest peak to reach a higher one.  Raises Refusal for values
    outside [-1, 1], none at all, a bandwidth below 1e-4, or one of the two not in (0, 1).
    """
    if not (0 < prominence < 1 and (bandwidth is None or _NARROWEST <= bandwidth < 1)):
        raise Refusal(
            f"bandwidth is {bandwidth} and prominence {prominence}, expected both between 0 and 1 "
            f"and the bandwidth at least {_NARROWEST}; 0.015 and 0.05 suit cosines of decoders."
        )
    cosines = finite_rows("values", values)
    if cosines.numel() == 0 or cosines.shape[1] != 1 or float(cosines.abs().max()) > 1:
        raise Refusal(
            f"values is {list(values.shape)}, expected [n] cosines from -1 to 1, at least one."
        )
    from scipy.ndimage import gaussian_filter1d
    from scipy.signal import find_peaks

    data = cosines[:, 0].double().cpu().numpy()
    if bandwidth is None:
        low, high = np.quantile(data, [0.25, 0.75])
        bandwidth = max(0.005, 0.9 * min(data.std(), (high - low) / 1.34) * len(data) ** -0.2)
    step = bandwidth / 10
    # Beyond 1 by four bandwidths, so that a peak at the end has two sides.
    bins = math.ceil((1 + 4 * bandwidth) / step)
    count, edges = np.histogram(data, np.arange(-bins, bins + 1) * step)
    density = gaussian_filter1d(count.astype(np.float64), 10, mode="constant")
    found, _ = find_peaks(density, prominence=prominence * density.max())
    return torch.from_numpy((edges[found] + step / 2).astype(np.float64))


# Interference


def interference(m: int, d: int, case: Case = "typical") -> float:
    """Inner product of two directions that superposition must live with, in one of two senses.

        worst     sqrt(8 ln m / d)     m directions exist in d dimensions with no |cosine| above it
                                       (Johnson and Lindenstrauss)
        typical   1 / sqrt(d)          root mean square cosine of random directions

    With l active latents of size 1 a silent one reads noise of sqrt(l) times that.  Sources:
    "Some costs of superposition" (worst) and the comment under it (typical).  Raises Refusal for
    sizes below 2 or another case.
    """
    _checked_size(m, d)
    if case == "worst":
        return math.sqrt(8 * math.log(m) / d)
    if case == "typical":
        return d**-0.5
    raise Refusal(f'case is {case!r}, expected "worst" or "typical"; choose one.')


def active_limit(m: int, d: int, case: Case = "typical") -> float:
    """How many latents may be active before noise reaches the signal: 1 / interference^2.

    d / (8 ln m) in the worst case, d in the typical one.  Raises Refusal as `interference`.
    """
    return interference(m, d, case) ** -2


@dataclass(frozen=True, eq=False)
class SilentReadout:
    """What silent latents read on each of n tokens, in the unit of the activations.

    rms [n] and largest [n] are over the silent latents of a token, largest in absolute value.
    expected [n] is sqrt(sum_i f_i^2) times the rms cosine of the directions: the rms if active
    latents were a random choice.  size [n] is the root mean square of the active f_i, l0 [n] their
    number; tokens without active latents have zeros.
    """

    rms: Float[Tensor, " n"]
    largest: Float[Tensor, " n"]
    expected: Float[Tensor, " n"]
    size: Float[Tensor, " n"]
    l0: Int64[Tensor, " n"]


@torch.no_grad()
def silent_readout(code: SparseCode, directions: Float[Tensor, "m d"]) -> SilentReadout:
    """Read every silent direction j of a token: u_j . sum over active i of f_i W_i.

    No decoder bias, as that is the same on every token.  Directions that are not unit length count
    as longer f_i.  Raises Refusal as `unit_rows`, for codes of other directions, or when a token
    has no silent latent.
    """
    units = unit_rows("directions", directions)
    length = directions.detach().to(units).norm(dim=1)
    expected = rms_cosine(units)
    parts: list[tuple[Tensor, ...]] = []
    rows = max(1, _CHUNK // len(units))
    for values, indices in zip(code.values.split(rows), code.indices.split(rows), strict=True):
        f = SparseCode(values.to(units), indices).dense(len(units)) * length
        silent: Bool[Tensor, "rows m"] = f == 0
        l0 = len(units) - silent.sum(1)
        if bool((l0 == len(units)).any()):
            raise Refusal(
                f"a token has all {len(units)} latents active, expected some silent ones to read; "
                "pass a sparse code."
            )
        read = ((f @ units) @ units.T).mul_(silent)
        energy = f.square().sum(1)
        rms = (read.square().sum(1) / (len(units) - l0)).sqrt()
        size = (energy / l0.clamp(min=1)).sqrt()
        parts.append((rms, read.abs().amax(1), energy.sqrt() * expected, size, l0))
    if not parts or len(code) == 0:
        raise Refusal("the code has no tokens, expected at least one; encode some activations.")
    return SilentReadout(*(torch.cat(column) for column in zip(*parts, strict=True)))


# Families


@dataclass(frozen=True, eq=False)
class Families:
    """Latents of SAEs of growing width, joined where their directions are alike.

    For each level but the first, parent [m] is the nearest latent one level narrower and cosine [m]
    its cosine, whatever that is.  edges [e, 2] are the pairs (narrow, wide) at or above the
    threshold.  family [m] numbers the connected component of every latent of every level, and size
    [families] counts its latents over all levels.
    """

    threshold: float
    parent: tuple[Int64[Tensor, " _"], ...]
    cosine: tuple[Float[Tensor, " _"], ...]
    edges: tuple[Int64[Tensor, "_ 2"], ...]
    family: tuple[Int64[Tensor, " _"], ...]
    size: Int64[Tensor, " families"]

    @property
    def has_parent(self) -> tuple[Bool[Tensor, " _"], ...]:
        """For each level but the first: whether a latent has a parent, or is new."""
        return tuple(cosine >= self.threshold for cosine in self.cosine)


@torch.no_grad()
def splitting_families(levels: Sequence[Float[Tensor, "_ d"]], threshold: float = 0.7) -> Families:
    """The graph of latents over SAEs of growing width, and its connected components.

    A latent of one level and one of the next are joined when their directions have a signed cosine
    of at least `threshold`.  A wide latent without an edge to the narrower level is new; several
    with an edge to the same one are what it split into.  Memory is that of the edges and of one
    chunk of cosines.  Raises Refusal for fewer than two levels, rows as `unit_rows`, widths that
    differ, or a threshold outside (0, 1].
    """
    if len(levels) < 2 or not 0 < threshold <= 1:
        raise Refusal(
            f"there are {len(levels)} levels and the threshold is {threshold}, expected at least 2 "
            "decoders and a cosine above 0 and up to 1; 0.7 is usual."
        )
    units = [unit_rows(f"level {i}", level) for i, level in enumerate(levels)]
    if len({level.shape[1] for level in units}) > 1:
        raise Refusal(
            f"the levels have widths {[level.shape[1] for level in units]}, expected one d; "
            "compare decoders of one hook point."
        )
    steps = [_step_up(narrow, wide, threshold) for narrow, wide in pairwise(units)]
    edges = tuple(pairs for _, pairs in steps)
    family = _components([len(level) for level in units], edges)
    return Families(
        threshold,
        tuple(best.indices[:, 0] for best, _ in steps),
        tuple(best.cosines[:, 0] for best, _ in steps),
        edges,
        family,
        torch.cat(family).bincount(),
    )


def _step_up(narrow: Tensor, wide: Tensor, threshold: float) -> tuple[Neighbours, Tensor]:
    """The parent of every wide direction, and all pairs (narrow, wide) [e, 2] that are joined."""
    cosines: list[Tensor] = []
    parents: list[Tensor] = []
    edges: list[Tensor] = []
    rows = max(1, _CHUNK // len(narrow))
    for start in range(0, len(wide), rows):
        chunk = (wide[start : start + rows] @ narrow.to(wide).T).clamp_(-1, 1)
        best = chunk.max(dim=1, keepdim=True)
        cosines.append(best.values)
        parents.append(best.indices)
        child, parent = (chunk >= threshold).nonzero(as_tuple=True)
        edges.append(torch.stack([parent, child + start], dim=1))
    return Neighbours(torch.cat(cosines), torch.cat(parents)), torch.cat(edges)


def _components(sizes: list[int], edges: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The number of the connected component of each latent, level by level."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    offset = np.cumsum([0, *sizes])
    ends = np.concatenate(
        [pair.cpu().numpy() + offset[i : i + 2] for i, pair in enumerate(edges)], dtype=np.int64
    )
    ones = np.ones(len(ends), dtype=np.int8)
    total = int(offset[-1])
    graph = coo_array((ones, (ends[:, 0], ends[:, 1])), shape=(total, total))
    _, label = connected_components(graph, directed=False)
    return torch.from_numpy(label.astype(np.int64)).split(sizes)

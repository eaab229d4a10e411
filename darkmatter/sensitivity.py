"""How much the end of a model moves when one activation near its start is moved.

An activation x stands at a hook, at the last position of a prompt. F(x) is what the model makes of
it at its end, with the rest of the prompt as it is. Along a path x(0) = A, x(1), ... away from a
base A, a curve is the distance of F(x(n)) from F(A):

    absolute step     x(n) = A + n step D,                  D = (T - A) / |T - A|
    relative step     x(n) = A (1 - t) + T t,               t = n / N
    rotation          x(n) = A cos w + |A| U sin w,         w = angle n / N, U the part of D off A

    l2                |F(x(n)) - F(A)|      activation units, F the final residual stream
    kl                KL( p(A) || p(x(n)) ) nats, p the next-token probabilities
    root_js           square root of the Jensen-Shannon divergence to base 2, from 0 to 1
    relative          d(n) / d(N), of any of them

A plateau is a curve that starts flat; where it is steep, the model tells things apart. Scalars of
curves are functions of bare tensors. Sources: Giglemiani et al. (2409.15019, "Evaluating synthetic
activations composed of SAE latents in GPT-2") and its authors' code; Heimersheim and Mendel (2024,
"Activation plateaus & sensitive directions in GPT2"); Janiak et al. (2409.17113, "Characterizing
stable regions in the residual stream of LLMs").
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Float64, Int, Int64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.intervals import Interval, bootstrap, document_sums

if TYPE_CHECKING:
    from darkmatter.models import LastPosition, Model

L2, KL, ROOT_JS = "l2", "kl", "root_js"
# Rows of activations run at a time, and logits held at a time (64 MiB in float32).
_ROWS_AT_A_TIME, _LOGITS_AT_A_TIME = 1024, 1 << 24


# ---- paths


def mean_distance(base: Float[Tensor, "*b d"], target: Float[Tensor, "*b d"]) -> float:
    """Mean of |T - A|, in activation units. Raises Refusal when shapes differ or all are equal."""
    distance = float(_difference(base, target).norm(dim=-1).mean())
    if not 0 < distance < math.inf:
        raise Refusal(
            f"The targets are {distance} from their bases on average, expected a finite distance "
            "above zero; pass other activations as targets."
        )
    return distance


def absolute_path(
    base: Float[Tensor, "*b d"],
    target: Float[Tensor, "*b d"],
    step: float | int | None = None,
    n: int = 100,
) -> Float[Tensor, "*b n_plus_1 d"]:
    """A + i step (T - A) / |T - A| for i from 0 to n: every path has steps of the same length.

    `step` in activation units. By default a hundredth of the mean |T - A|, which is what 0.5 is to
    block 1 of GPT-2 small, the published setting. Raises Refusal for a step that is not above zero,
    n < 1, or a target on its base (it gives no direction).
    """
    step = 0.01 * mean_distance(base, target) if step is None else step
    _positive("step", step)
    away = _difference(base, target)
    length = away.norm(dim=-1, keepdim=True)
    if not bool((length > 0).all()):
        raise Refusal(
            f"{int((length == 0).sum())} targets are equal to their base, expected a direction to "
            "go in; leave those pairs out."
        )
    return base[..., None, :] + step * _steps(n, base)[:, None] * (away / length)[..., None, :]


def relative_path(
    base: Float[Tensor, "*b d"], target: Float[Tensor, "*b d"], n: int = 100
) -> Float[Tensor, "*b n_plus_1 d"]:
    """A (1 - t) + T t for t = 0, 1/n, ..., 1: every path ends on its target.

    The published curves have 100 points, which is n = 99. Raises Refusal when shapes differ or
    n < 1.
    """
    away = _difference(base, target)
    return base[..., None, :] + (_steps(n, base) / n)[:, None] * away[..., None, :]


def rotation_path(
    base: Float[Tensor, "*b d"],
    target: Float[Tensor, "*b d"],
    n: int = 100,
    angle: float | int = math.pi,
) -> Float[Tensor, "*b n_plus_1 d"]:
    """A cos w + |A| U sin w for w from 0 to `angle` (radians): the norm of A is kept.

    U is the unit vector in the plane of A and T, at a right angle to A, on the side of T. To rotate
    about a centre, subtract it from base and target before and add it after. Raises Refusal when T
    is parallel to A, or for n < 1.
    """
    _difference(base, target)
    size = base.norm(dim=-1, keepdim=True)
    unit = base / size
    off = target - (target * unit).sum(-1, keepdim=True) * unit
    length = off.norm(dim=-1, keepdim=True)
    # Rounding leaves about 1e-7 of a parallel target.
    if not bool((length > 1e-5 * target.norm(dim=-1, keepdim=True)).all()):
        raise Refusal(
            "A target is parallel to its base (or one of them is zero), expected two directions, "
            "which span a plane to rotate in; leave that pair out."
        )
    w = (angle * _steps(n, base) / n)[:, None]
    turned = base[..., None, :] * w.cos() + (size * off / length)[..., None, :] * w.sin()
    turned[..., 0, :] = base
    return turned


def plane(
    a: Float[Tensor, " d"],
    b: Float[Tensor, " d"],
    c: Float[Tensor, " d"],
    along: Float[Tensor, " m"],
    across: Float[Tensor, " k"],
) -> Float[Tensor, "m k d"]:
    """A + alpha (B - A) + beta (C - P): the plane through three activations.

    alpha in `along`, beta in `across`; P is the projection of C on the line through A and B, so
    the axes are at a right angle. A is (0, 0), B is (1, 0). Source: Janiak et al. (2409.17113).
    Raises Refusal when two of the three are equal or all lie on a line.
    """
    first = _difference(a, b)
    up = c - a
    square = float(first @ first)
    share = float(up @ first) / square if square else 0.0
    up = up - share * first
    if not square or float(up.norm()) <= 1e-5 * float((c - a).norm()):
        raise Refusal(
            "The three activations lie on a line, expected three that span a plane; choose others."
        )
    return a + along[:, None, None] * first + across[None, :, None] * up


# ---- targets and bases that are not real


def covariance_matched(
    x: Float[Tensor, "n d"], count: int, generator: torch.Generator | None = None
) -> Float[Tensor, "count d"]:
    """`count` draws of N(mean, covariance) of the rows of x.

    mean + sum_i g_i (x_i - mean) / sqrt(n - 1) with g_i standard normal has exactly the sample
    covariance, so no matrix is factorised and none can fail to be positive. With n <= d rows the
    draws lie in the span of the rows. Raises Refusal for fewer than 2 rows.
    """
    if x.ndim != 2 or len(x) < 2:
        raise Refusal(
            f"x is {list(x.shape)}, expected [n, d] with 2 rows or more, which have a covariance; "
            "pass activations of many tokens."
        )
    mean = x.mean(0)
    g = torch.randn(count, len(x), generator=generator, dtype=x.dtype).to(x.device)
    return mean + g @ (x - mean) / math.sqrt(len(x) - 1)


def isotropic(
    base: Float[Tensor, "n d"],
    distance: Float[Tensor, " n"],
    generator: torch.Generator | None = None,
) -> Float[Tensor, "n d"]:
    """Targets at these distances from their bases, in directions uniform on the sphere."""
    u = torch.randn(base.shape, generator=generator, dtype=base.dtype).to(base.device)
    return base + distance[:, None] * u / u.norm(dim=1, keepdim=True)


# ---- distances and curves


def kl_divergence(
    log_p: Float[Tensor, "*#b v"], log_q: Float[Tensor, "*#b v"]
) -> Float[Tensor, "*#b"]:
    """KL( p || q ) in nats, from log-probabilities."""
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)


def root_js(log_p: Float[Tensor, "*#b v"], log_q: Float[Tensor, "*#b v"]) -> Float[Tensor, "*#b"]:
    """Square root of the Jensen-Shannon divergence to base 2: a metric, from 0 to 1."""
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    nats = 0.5 * (kl_divergence(log_p, log_m) + kl_divergence(log_q, log_m))
    return (nats / math.log(2)).clamp(max=1).sqrt()


def curves(
    model: Model,
    hook: str,
    tokens: Int[Tensor, "b p"],
    paths: Float[Tensor, "b k s d"],
    read: Sequence[str] = (L2,),
    cached: bool = True,
) -> dict[str, Float[Tensor, "b k s"]]:
    """Distances of what the model makes of every point of every path from that of its first point.

    paths[i, j] stands at `hook`, at the last position of prompt i; its first point is the base A,
    real or not. For each of `read` a curve:

        "l2"            L2 distance at the residual stream that the last block leaves
        a hook's name   L2 distance at that hook, which comes after `hook`
        "kl"            KL( p_base || p_point ) of the next token, nats
        "root_js"       square root of the Jensen-Shannon divergence, base 2

    All from one run of all points. With `cached` only the last position is computed
    (`Model.last_position`), else whole prompts, which gives the same to rounding. Curves are
    float32, on the model's device, and start with an exact 0. Raises Refusal for shapes that do not
    fit, NaN or infinity in paths, or an unknown name in `read`.
    """
    _check_paths(model, hook, tokens, paths)
    if not read:
        raise Refusal(f"Nothing is to be read; name hooks, {L2!r}, {KL!r} or {ROOT_JS!r}.")
    final = f"blocks.{model.n_layer - 1}.hook_resid_post"
    hooks = {name: final if name == L2 else name for name in read if name not in (KL, ROOT_JS)}
    logits = len(hooks) < len(set(read))
    read_at = tuple(dict.fromkeys(hooks.values()))
    run = model.last_position(tokens, hook, read_at, with_logits=logits, cached=cached)
    b, k, s, d = paths.shape
    found = {name: torch.zeros(b * k, s, device=model.device) for name in read}
    flat, prompt = paths.reshape(b * k, s, d), torch.arange(b).repeat_interleave(k)
    at_a_time = min(_ROWS_AT_A_TIME, max(1, _LOGITS_AT_A_TIME // model.vocabulary))
    group = max(1, at_a_time // max(1, s - 1))
    for start in range(0, b * k, group):
        chosen = slice(start, start + group)
        rows, path = flat[chosen], prompt[chosen].to(model.device)
        base = _response(run, rows[:, 0], path)
        # Rows of the group, one path after another, a piece at a time.
        owner = torch.arange(len(rows), device=model.device).repeat_interleave(s - 1)
        points = rows[:, 1:].reshape(-1, d)
        pieces = {name: list[Tensor]() for name in read}
        for first in range(0, len(points), at_a_time):
            piece = slice(first, first + at_a_time)
            response = _response(run, points[piece], path[owner[piece]])
            # One path at a time: its base is one row then, not a copy of it for each point.
            for i, points_of in _runs(first, min(first + at_a_time, len(points)), s - 1):
                for name in read:
                    measure = _MEASURES.get(name, _l2)
                    of = hooks.get(name, KL)
                    pieces[name].append(measure(base[of][i], response[of][points_of]))
        for name in read:
            found[name][chosen, 1:] = torch.cat(pieces[name]).reshape(len(rows), s - 1)
    return {name: curve.reshape(b, k, s) for name, curve in found.items()}


def _runs(start: int, stop: int, length: int) -> Iterator[tuple[int, slice]]:
    """Paths of some length that points start to stop belong to, and which of these points those."""
    for path in range(start // length, -(-stop // length)):
        rows = max(start, path * length), min(stop, (path + 1) * length)
        yield path, slice(rows[0] - start, rows[1] - start)


def _response(run: LastPosition, x: Tensor, prompt: Tensor) -> dict[str, Tensor]:
    """Activations by hook, and log-probabilities under the name of "kl"."""
    found, logits = run(x, prompt)
    response = {name: value.float() for name, value in found.items()}
    return response if logits is None else {**response, KL: logits.float().log_softmax(-1)}


def _l2(base: Tensor, response: Tensor) -> Tensor:
    return (response - base).norm(dim=-1)


_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {KL: kl_divergence, ROOT_JS: root_js}


def _check_paths(model: Model, hook: str, tokens: Tensor, paths: Tensor) -> None:
    width = model.width(hook)
    fits = paths.ndim == 4 and paths.shape[0] == len(tokens) and paths.shape[3] == width
    if not fits or paths.shape[1] < 1 or paths.shape[2] < 2:
        raise Refusal(
            f"paths is {list(paths.shape)} for {len(tokens)} prompts, expected [prompts, paths, "
            f"points, {width}] with 2 points or more; give each prompt its own paths at {hook}."
        )
    if not bool(paths.isfinite().all()):
        bad = (~paths.isfinite().all(3)).nonzero()[0].tolist()
        raise Refusal(
            f"paths is NaN or infinite at [prompt, path, point] {bad}, expected finite "
            "activations; check base and target of that path."
        )


# ---- scalars of curves


def relative_curve(curve: Float[Tensor, "*b s"]) -> Float[Tensor, "*b s"]:
    """d(n) / d(N): from 0 to 1 at the end. Raises Refusal when a curve ends at 0."""
    curve = _curve(curve)
    end = curve[..., -1:]
    if not bool((end > 0).all()):
        raise Refusal(
            f"{int((end <= 0).sum())} curves end at distance 0, expected ends away from the base; "
            "leave pairs of equal activations out."
        )
    return curve / end


def max_slope(curve: Float[Tensor, "*b s"]) -> Float64[Tensor, "*b"]:
    """Largest slope of the relative curve, d(d(t)/d(1)) / dt with t from 0 to 1 over the path.

    A straight line has 1, a step s - 1, the most that s points can show. Needs no unit, so models
    can be compared. Source: Janiak et al. (2409.17113). Raises Refusal when a curve ends at 0.
    """
    curve = relative_curve(curve.double())
    return curve.diff(dim=-1).amax(-1) * (curve.shape[-1] - 1)


def max_slope_step(curve: Float[Tensor, "*b s"], floor: float | int = 0.0) -> Int64[Tensor, "*b"]:
    """The step that the steepest rise leads to; the last step when no rise is above `floor`.

    The first of several that are equally steep; where that is the first rise, 0 (the first slope
    stands for step 0 too, as in the authors' code). Published: floor 0.02 for L2 of GPT-2 small.
    """
    curve = _curve(curve)
    slope = curve.diff(dim=-1)
    slope = torch.cat([slope[..., :1], slope], dim=-1)
    return torch.where(slope.amax(-1) > floor, _first_largest(slope), curve.shape[-1] - 1)


def end_of_linearity(
    curve: Float[Tensor, "*b s"], at: int = 9, tolerance: float | int = 0.2
) -> Int64[Tensor, "*b"]:
    """The last step before the curve leaves the line through its points at steps 0 and `at`.

    One less than the first step after `at` where it is off the line by more than `tolerance` of
    the line's value; the last step when it never leaves. Raises Refusal for curves that are not
    longer than at + 1.
    """
    curve = _curve(curve)
    s = curve.shape[-1]
    if not 0 < at < s - 1:
        raise Refusal(
            f"The line goes through step {at} of curves with {s} points, expected a step from 1 to "
            f"{s - 2}; pass a smaller one, or longer curves."
        )
    n = torch.arange(s, dtype=curve.dtype, device=curve.device)
    line = curve[..., :1] + (curve[..., at : at + 1] - curve[..., :1]) / at * n
    off = (curve - line).abs() > tolerance * line.abs()
    off[..., : at + 1] = False
    return _first(off, otherwise=s) - 1


def area_ratio_step(
    curve: Float[Tensor, "*b s"], first: int = 5, published: bool = False
) -> Int64[Tensor, "*b"]:
    """The step i >= `first` where the chord's triangle is largest over the area under the curve.

        argmax_i  ( i d(i) / 2 ) / trapezium(d, 0 to i)

    A flat start and a jump have it at the jump; a straight line has 1 everywhere, and the first
    step. `published`: the authors' code leaves the last trapezium out of the area, which pulls the
    step to where the curve is steep or short. The last step where the curve is 0 throughout.
    """
    curve = _curve(curve).double()
    s = curve.shape[-1]
    if not 0 < first < s:
        raise Refusal(
            f"Steps are compared from {first} on, but curves have {s} points; pass a smaller "
            "`first`, or longer curves."
        )
    area = torch.nn.functional.pad(torch.cumulative_trapezoid(curve, dim=-1), (1, 0))
    if published:
        area = torch.nn.functional.pad(area[..., :-1], (1, 0))
    triangle = torch.arange(s, device=curve.device) * curve / 2
    # Infinite where the published area is 0 and the curve is not: the first point of a jump.
    ratio = torch.where(triangle > 0, triangle / area, 0.0)
    ratio = ratio[..., first:]
    # Rounding must not choose between the steps of a straight line.
    step = first + _first(ratio >= (1 - 1e-6) * ratio.amax(-1, keepdim=True), otherwise=0)
    return torch.where(ratio.amax(-1) > 0, step, s - 1)


def plateau_length(curve: Float[Tensor, "*b s"], threshold: float | int) -> Int64[Tensor, "*b"]:
    """The first step at distance `threshold` or more; the last step when there is none.

    Published: 20 for L2 of GPT-2 small, a twelfth of the mean distance at the end (about 240). For
    another model pass such a share of its own, e.g. `curve[..., -1].mean() / 12`.
    """
    _positive("threshold", threshold)
    curve = _curve(curve)
    return _first(curve >= threshold, otherwise=curve.shape[-1] - 1)


# ---- comparison of two sets of scalars


def ks_distance(a: Float[Tensor, " n"], b: Float[Tensor, " m"]) -> float:
    """Kolmogorov-Smirnov distance: sup |F_a - F_b| of the empirical distribution functions."""
    a, b = _values("a", a), _values("b", b)
    at = torch.cat([a, b]).unique()
    return float((_cdf(a, at) - _cdf(b, at)).abs().max())


def ks_interval(
    a: Float[Tensor, " n"],
    b: Float[Tensor, " n"],
    document: Int[Tensor, " n"],
    n: int = 1000,
    seed: int = 0,
) -> Interval:
    """`ks_distance` with a 95 % interval: documents are resampled, a[i] and b[i] stay together.

    A distance is never below 0 and every resample adds its own noise, so the interval leans up:
    two samples of one distribution have about 1.2 / sqrt(n), not 0, and the interval of their
    distance lies above it. Raises Refusal for fewer than 2 documents, NaN, or lengths that differ.
    """
    a, b = _values("a", a), _values("b", b)
    if len(a) != len(b):
        raise Refusal(
            f"a has {len(a)} values and b {len(b)}, expected one of each for every prompt; use "
            "ks_distance for samples that are not paired."
        )
    at = torch.cat([a, b]).unique()
    below = [(values[:, None] <= at).double() for values in (a, b)]
    columns = torch.cat([torch.ones(len(a), 1, dtype=torch.float64), *below], dim=1)

    def statistic(totals: Float64[Tensor, "r c"]) -> Float64[Tensor, " r"]:
        first, second = (totals[:, 1:] / totals[:, :1]).tensor_split(2, dim=1)
        return (first - second).abs().amax(1)

    return bootstrap(statistic, document_sums(columns, document.cpu()), n=n, seed=seed)


# ---- pieces


def _difference(base: Tensor, target: Tensor) -> Tensor:
    if base.shape != target.shape:
        raise Refusal(
            f"base is {list(base.shape)} and target {list(target.shape)}, expected a target for "
            "every base; expand one of them."
        )
    return target - base


def _steps(n: int, like: Tensor) -> Tensor:
    if n < 1:
        raise Refusal(f"n is {n}, expected 1 step or more; 100 is usual.")
    return torch.arange(n + 1, dtype=like.dtype, device=like.device)


def _positive(name: str, value: float | int) -> None:
    if not 0 < value < math.inf:
        raise Refusal(f"{name} is {value}, expected a finite number above 0, in activation units.")


def _curve(curve: Tensor) -> Tensor:
    if curve.ndim < 1 or curve.shape[-1] < 2 or not bool(curve.isfinite().all()):
        raise Refusal(
            f"The curves are {list(curve.shape)}, {int((~curve.isfinite()).sum())} values of which "
            "are not finite, expected [..., points] of finite distances, 2 points or more; pass "
            "what `curves` gives."
        )
    return curve


def _values(name: str, values: Tensor) -> Tensor:
    if values.ndim != 1 or len(values) == 0 or not bool(values.isfinite().all()):
        raise Refusal(
            f"{name} is {list(values.shape)}, expected [n] finite numbers, at least one; pass one "
            "scalar for each prompt."
        )
    return values.detach().cpu().double()


def _first(hit: Tensor, otherwise: int) -> Tensor:
    """Index of the first True of each row."""
    return torch.where(hit.any(-1), hit.int().argmax(-1), otherwise)


def _first_largest(values: Tensor) -> Tensor:
    return (values == values.amax(-1, keepdim=True)).int().argmax(-1)


def _cdf(values: Tensor, at: Tensor) -> Tensor:
    return torch.searchsorted(values.sort().values, at, right=True) / len(values)

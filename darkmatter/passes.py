"""The two passes of a survey over tokens, batch by batch, from anywhere to anywhere.

    fit_pass:     moments of x with every error e = x - Sae(x), |e|^2 and |x|^2    -> FitState
    score_part:   totals by document and one row a token, for some test contexts   -> tensors

Batches are cut at multiples of 16 contexts of the whole text, whoever reads them: a model's
rounding depends on which contexts share a batch, so all shards compute the same activations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.activations import Batch, Tokens, stream
from darkmatter.autoencoders import reconstruct, sparse_decode, sparse_encode
from darkmatter.intervals import fvu_columns, r2_columns
from darkmatter.leastsquares import LinearMap, LinearStatistics, Precision
from darkmatter.splicing import ORIGINAL, remembered, splice

if TYPE_CHECKING:
    from darkmatter.models import Model

BATCH = 16
# Between two checkpoints of the first pass, at least.
SECONDS = 30.0
# Dense codes of this many numbers at a time: 256 MB.
_CODES_AT_A_TIME = 1 << 26
# Logits that a splice holds of a batch: 2 GB.
_LOGITS = 1 << 28


@dataclass(frozen=True)
class About:
    """What is known of an SAE when it is not loaded; `sha256` is its `shards.fingerprint`."""

    hook: str
    d_sae: int
    sha256: str = ""


@dataclass(frozen=True)
class Work:
    """What a survey is to do. `rounds`: the SAEs that share a run of the model, by hook."""

    model: Model
    saes: Mapping[str, Any]
    about: dict[str, About]
    fit: Tokens
    test: Tokens
    skip: int
    special: tuple[int, ...]
    downstream: bool
    checkpoint_tokens: int
    one_at_a_time: bool
    precision: Precision = "float64"

    @property
    def rounds(self) -> list[dict[str, list[str]]]:
        if self.one_at_a_time:
            return [{about.hook: [name]} for name, about in self.about.items()]
        return [by_hook(self.about)]

    def share(self, tokens: Tokens, shard: int, of: int) -> range:
        """The contexts of one of `of` equal runs of whole batches."""
        batches = -(-tokens.n_contexts // BATCH)
        start, stop = batches * shard // of, batches * (shard + 1) // of
        return range(start * BATCH, min(stop * BATCH, tokens.n_contexts))

    def parts(self, tokens: Tokens, share: range) -> list[range]:
        """A share cut where the work is saved, every `checkpoint_tokens` tokens."""
        step = max(1, self.checkpoint_tokens // (BATCH * tokens.tokens.shape[1])) * BATCH
        return [range(i, min(i + step, share.stop)) for i in range(share.start, share.stop, step)]

    def read(
        self, hooks: list[str], tokens: Tokens, share: range, begin: int
    ) -> Iterator[tuple[range, Iterator[Batch]]]:
        """The parts of a share that start at `begin` or later, each with its batches."""
        batches = stream(
            self.model,
            hooks,
            tokens,
            self.skip,
            self.special,
            batch_contexts=BATCH,
            start=begin,
            stop=share.stop,
        )
        ahead = next(batches, None)

        def before(stop: int) -> Iterator[Batch]:
            nonlocal ahead
            while ahead is not None and int(ahead.context[0]) < stop:
                yield ahead
                ahead = next(batches, None)

        for part in self.parts(tokens, share):
            if part.start >= begin:
                yield part, before(part.stop)


def by_hook(about: Mapping[str, About]) -> dict[str, list[str]]:
    """Names at every hook, both in the order in which they came."""
    found: dict[str, list[str]] = {}
    for name, one in about.items():
        found.setdefault(one.hook, []).append(name)
    return found


@dataclass
class FitState:
    """How far the first pass is: moments by (round, hook), which latents were active, where next.

    At a hook y is [every e, every |e|^2, |x|^2] of the SAEs of the round.
    """

    statistics: dict[tuple[int, str], LinearStatistics]
    active: dict[str, Tensor]
    position: tuple[int, int]
    finished: bool = False

    @classmethod
    def empty(cls, work: Work, share: range) -> FitState:
        statistics = {
            (i, hook): LinearStatistics(d, len(names) * (d + 1) + 1)
            for i, hooks in enumerate(work.rounds)
            for hook, names in hooks.items()
            for d in [work.model.width(hook)]
        }
        active = {n: torch.zeros(one.d_sae, dtype=torch.bool) for n, one in work.about.items()}
        return cls(statistics, active, (0, share.start))

    def rounds(
        self, work: Work, share: range, save: Callable[[FitState], None]
    ) -> Iterator[tuple[int, dict[str, list[str]], int]]:
        """Rounds that are left: number, hooks, first context; each is noted and saved when done."""
        for i, hooks in enumerate(work.rounds):
            if i < self.position[0]:
                continue
            yield i, hooks, self.position[1] if i == self.position[0] else share.start
            self.position = (i + 1, share.start)
            self.finished = i + 1 == len(work.rounds)
            save(self)

    def merge(self, other: FitState) -> None:
        """Add what another run of the pass saw."""
        for key, statistics in other.statistics.items():
            self.statistics[key].merge(statistics)
        for name, active in other.active.items():
            self.active[name] = self.active[name].to(active.device) | active

    def by_hook(self) -> dict[str, LinearStatistics]:
        """The moments of all SAEs of a hook in one, rounds joined."""
        found: dict[str, list[LinearStatistics]] = {}
        for (_, hook), statistics in self.statistics.items():
            found.setdefault(hook, []).append(statistics)
        return {hook: _joined(parts) for hook, parts in found.items()}


def _joined(parts: list[LinearStatistics]) -> LinearStatistics:
    """Moments of one SAE each, of the same rows of x, as those of all together."""
    if len(parts) == 1:
        return parts[0]
    first, d = parts[0], parts[0].d_in
    # Errors, then their norms, then |x|^2, which every part has last.
    order = torch.cat(
        [torch.arange(d) + i * (d + 2) for i in range(len(parts))]
        + [torch.tensor([i * (d + 2) + d for i in range(len(parts))]), torch.tensor([d + 1])]
    ).to(first.sxx.device)
    together = LinearStatistics(d, len(order)).to(first.sxx.device)
    together.n, together.mean_x, together.sxx = first.n, first.mean_x, first.sxx
    together.mean_y = torch.cat([part.mean_y for part in parts])[order]
    together.sxy = torch.cat([part.sxy for part in parts], 1)[:, order]
    together.syy = torch.cat([part.syy for part in parts])[order]
    return together


def reconstructed(sae: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(x_hat, L0 of every token, the latents that were active)."""
    code = sparse_encode(sae, x, batch=min(2048, max(1, _CODES_AT_A_TIME // int(sae.cfg.d_sae))))
    try:
        x_hat = sparse_decode(sae, code)
    except Refusal:
        # A decoder that also needs the input.
        x_hat = reconstruct(sae, x)
    # Not what an SAE of processed activations carries from its input to its output.
    latents = int(sae.cfg.d_sae) - getattr(sae, "carried", 0)
    own = (code.values != 0) & (code.indices < latents)
    return x_hat, own.sum(1), code.indices[own]


def _check_finite(name: str, norm2: Tensor, batch: Batch, tokens: Tokens) -> None:
    """Refusal for an SAE whose error is not finite at some token, naming the first."""
    bad = norm2.isfinite().logical_not().flatten().nonzero()
    if len(bad):
        row = int(bad[0])
        raise Refusal(
            f"{name!r} reconstructs NaN or infinity at position {int(batch.position[row])} of "
            f"context {int(batch.context[row])} (document "
            f"{tokens.names[int(batch.document[row])]!r}), {len(bad)} of {len(batch)} tokens of "
            "its batch; load it in float32 or leave the document out."
        )


def fit_pass(
    work: Work,
    share: range,
    state: FitState,
    save: Callable[[FitState], None],
    tick: Callable[[int], None],
) -> None:
    """Pass 1 over a share of the fit contexts, on from where `state` is; `save` now and then."""
    saved, patience = time.monotonic(), SECONDS
    for i, hooks, begin in state.rounds(work, share, save):
        saes = {name: work.saes[name] for names in hooks.values() for name in names}
        for part, batches in work.read(list(hooks), work.fit, share, begin):
            for batch in batches:
                at = {next(iter(hooks)): batch.x, **batch.others}
                for hook, names in hooks.items():
                    x = at[hook]
                    errors: list[Tensor] = []
                    for name in names:
                        x_hat, _, latents = reconstructed(saes[name], x)
                        errors.append(x - x_hat)
                        state.active[name][latents.to(state.active[name].device)] = True
                    norms = [e.double().square().sum(1, keepdim=True) for e in [*errors, x]]
                    for name, norm2 in zip(names, norms, strict=False):
                        _check_finite(name, norm2, batch, work.fit)
                    wide = torch.float64 if work.precision == "float64" else torch.float32
                    y = torch.cat([column.to(wide) for column in [*errors, *norms]], 1)
                    state.statistics[i, hook].partial_fit(x, y, work.precision)
                tick(len(batch))
            if part.stop < share.stop:
                state.position = (i, part.stop)
                if time.monotonic() - saved >= patience:
                    before = time.monotonic()
                    save(state)
                    saved = time.monotonic()
                    # Moments of many wide SAEs are gigabytes: writing them is to cost a tenth.
                    patience = max(SECONDS, 10 * (saved - before))


@dataclass(frozen=True)
class Fitted:
    """The maps of one SAE; `scalar` is (s, constant) of e ~ s x + constant."""

    error_map: LinearMap
    norm_map: LinearMap
    scalar: tuple[Tensor, Tensor]


def solve(work_about: Mapping[str, About], state: FitState) -> dict[str, Fitted]:
    """Every probe of every SAE at a hook from one factorisation."""
    fitted: dict[str, Fitted] = {}
    statistics = state.by_hook()
    for hook, names in by_hook(work_about).items():
        moments = statistics[hook]
        whole, d = moments.solve(), moments.d_in
        for i, name in enumerate(names):
            columns, norm = slice(i * d, (i + 1) * d), len(names) * d + i
            # argmin over s of |e - s x|^2, both centred: trace(Sxe) / trace(Sxx).
            scalar = moments.sxy[:, columns].trace() / moments.sxx.trace()
            constant = moments.mean_y[columns] - scalar * moments.mean_x
            fitted[name] = Fitted(
                _of(whole, columns), _of(whole, slice(norm, norm + 1)), (scalar, constant)
            )
    return fitted


def _of(whole: LinearMap, columns: slice) -> LinearMap:
    """The part of a map that predicts some of its targets."""
    return LinearMap(whole.weight[:, columns], whole.bias[columns], whole.ridge, whole.n)


@dataclass
class _Totals:
    """Column totals of the documents of a part, and rows, both added to batch by batch."""

    documents: Tensor
    sums: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    rows: dict[str, list[Tensor]] = field(default_factory=dict[str, list[Tensor]])

    def add(self, key: str, columns: Tensor, document: Tensor) -> None:
        """Add the rows of `columns` to their documents' totals."""
        slot = torch.searchsorted(self.documents, document.cpu())
        if key not in self.sums:
            self.sums[key] = columns.new_zeros(len(self.documents), columns.shape[1])
        if columns.is_cuda:
            # index_add_ on a GPU adds in any order, so that no two runs are alike.
            self.sums[key] += (
                torch.nn.functional.one_hot(slot, len(self.documents)).to(columns).T @ columns
            )
        else:
            self.sums[key].index_add_(0, slot, columns)

    def append(self, key: str, values: Tensor) -> None:
        self.rows.setdefault(key, []).append(values.cpu())


def score_part(
    work: Work,
    fitted: Mapping[str, Fitted],
    saes: Mapping[str, Any],
    part: range,
    batches: Iterable[Batch],
    tick: Callable[[int], None],
) -> dict[str, Tensor]:
    """Pass 2 over the test contexts of a part, for SAEs that share a run of the model.

    One row a token: document, context, position, token, loss and, by SAE, NAME/row/COLUMN. Totals
    of each of `documents`: x/HOOK [1, |x|^2, x], NAME/sum (see `scores_of`) and with `downstream`
    NAME/downstream. NAME/active: which latents were.
    """
    hooks = by_hook({name: work.about[name] for name in saes})
    totals = _Totals(work.test.document[part.start : part.stop].unique())
    active = {n: torch.zeros(work.about[n].d_sae, dtype=torch.bool) for n in saes}
    for batch in batches:
        at = {next(iter(hooks)): batch.x, **batch.others}
        for key in ("document", "context", "position", "token", "loss"):
            totals.append(key, getattr(batch, key))
        for hook, names in hooks.items():
            x = at[hook].double()
            x_norm2 = x.square().sum(1)
            ones = torch.ones_like(x_norm2)
            totals.add(
                f"x/{hook}", torch.cat([ones[:, None], x_norm2[:, None], x], 1), batch.document
            )
            for name in names:
                x_hat, l0, latents = reconstructed(saes[name], at[hook])
                active[name][latents.cpu()] = True
                one = fitted[name]
                error = x - x_hat
                linear = one.error_map(x)
                nonlinear = error - linear
                norm2 = error.square().sum(1, keepdim=True)
                _check_finite(name, norm2, batch, work.test)
                predicted = one.norm_map(x)
                scalar = one.scalar[0].to(x) * x + one.scalar[1].to(x)
                d = x.shape[1]
                columns = [
                    fvu_columns(x, x_hat.double())[:, 1:2],
                    fvu_columns(x, x - nonlinear)[:, 1:2],
                    r2_columns(norm2, predicted)[:, 1:],
                    l0[:, None].double(),
                    r2_columns(error, linear)[:, 1:],
                    r2_columns(error, scalar)[:, 1 : d + 1],
                ]
                totals.add(f"{name}/sum", torch.cat(columns, 1), batch.document)
                row = {
                    "l0": l0,
                    "x_norm2": x_norm2,
                    "error_norm2": norm2[:, 0],
                    "linear_norm2": linear.square().sum(1),
                    "nonlinear_norm2": nonlinear.square().sum(1),
                    "predicted_norm2": predicted[:, 0],
                }
                for key, values in row.items():
                    totals.append(f"{name}/row/{key}", values)
            if work.downstream:
                start = int(batch.context[0]) // BATCH * BATCH
                contexts = torch.arange(start, min(start + BATCH, part.stop))
                _downstream(work, hook, {n: saes[n] for n in names}, fitted, contexts, totals)
        tick(len(batch))
    if not totals.rows:
        return {"documents": totals.documents[:0]}
    rows = {key: torch.cat(values) for key, values in totals.rows.items()}
    present = totals.sums[f"x/{next(iter(hooks))}"][:, 0].cpu() > 0
    return {
        **rows,
        **{key: sums.cpu()[present] for key, sums in totals.sums.items()},
        **{f"{name}/active": latents for name, latents in active.items()},
        "documents": totals.documents[present],
    }


def _downstream(
    work: Work,
    hook: str,
    saes: Mapping[str, Any],
    fitted: Mapping[str, Fitted],
    contexts: Tensor,
    totals: _Totals,
) -> None:
    """Splices of every SAE, alone and with each part of its error, into some test contexts."""
    variants: dict[str, Callable[[Tensor], Tensor]] = {}
    bases: dict[str, str] = {}
    for name, sae in saes.items():
        x_hat = remembered(partial(_x_hat, sae))
        linear = remembered(fitted[name].error_map)
        # Names that no SAE has: the variants of one must not be those of another.
        variants |= {
            f"sae/{name}": x_hat,
            f"linear/{name}": partial(_sum, x_hat, linear),
            f"nonlinear/{name}": partial(_without, linear),
        }
        bases |= {f"{kind}/{name}": f"sae/{name}" for kind in ("sae", "linear", "nonlinear")}
    per_context = work.test.tokens.shape[1] * work.model.vocabulary
    run = splice(
        work.model,
        work.test.select(contexts),
        hook,
        variants,
        skip=work.skip,
        base=bases,
        special=work.special,
        batch_contexts=max(1, min(8, _LOGITS // per_context)),
    )
    for name in saes:
        kinds = [f"{kind}/{name}" for kind in ("sae", "linear", "nonlinear")]
        columns = [run.cross_entropy[key] for key in (ORIGINAL, *kinds)]
        columns += [run.kl[key] for key in kinds]
        totals.add(f"{name}/downstream", torch.stack(columns, 1).double(), run.document)
        totals.append(f"{name}/row/cross_entropy", run.cross_entropy[kinds[0]])
        totals.append(f"{name}/row/kl", run.kl[kinds[0]])


def _x_hat(sae: Any, x: Tensor) -> Tensor:
    return reconstructed(sae, x)[0]


def _sum(
    x_hat: Callable[[Tensor], Tensor], linear: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    return x_hat(x) + linear(x)


def _without(linear: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return x - linear(x)

"""Put something else in the place of activations, and see what it costs the model downstream.

    cost(v)       =  CE(v) - CE(original)                                    nats a token
    KL(v)         =  mean over tokens of  KL( p_original || p_v )            nats a token
    recovered(v)  =  ( CE(base) - CE(v) ) / ( CE(base) - CE(original) )

A variant v is a function of activations at one hook; the base, usually the SAE, is the variant
that v is to improve. Every score is kept token by token, so that variants are compared on the same
tokens and documents are resampled once for all of them. Source: Engels, Smith and Tegmark
(2410.14670), section on the downstream effect. The controls, which do harm of the same size in
other directions, are Gurnee's (2024, "SAE reconstruction errors are (empirically) pathological")
and Lee and Heimersheim's (2410.12555).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Any, Literal
from zlib import crc32

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.activations import Halves, Tokens, measured
from darkmatter.intervals import Interval, bootstrap, document_sums, fvu_from_totals
from darkmatter.models import Model

if TYPE_CHECKING:
    import pandas as pd

ORIGINAL = "original"
Score = Literal["cross_entropy", "kl", "agreement"]
# Scores are made for about this many logits at a time: 4 MiB, which a core's cache can hold.
_LOGITS_AT_A_TIME = 1 << 20


@dataclass(frozen=True)
class Randomised:
    """A variant that draws: function(x [n, d], generator) -> [n, d].

    `splice` gives each its own generator, made from its seed and the variant's name, so that what
    one draws does not depend on which others there are.
    """

    function: Callable[[Tensor, torch.Generator], Tensor]


Variant = Callable[[Tensor], Tensor] | Randomised


def remembered(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The same function, which keeps its answer for the tensor that it was given last.

    `splice` hands the same tensor to all variants, so an SAE behind several of them encodes once.
    """
    last: list[Tensor] = []

    @wraps(function)
    def answer(x: Tensor) -> Tensor:
        if not last or last[0] is not x:
            last[:] = [x, function(x)]
        return last[1]

    return answer


@dataclass(frozen=True, eq=False)
class Splice:
    """What every variant did to every token that counts. Made by `splice`.

    Rows are tokens, in order: document, context, position and token [n]. By variant: cross_entropy
    of the next token in nats (also of "original"), kl in nats, agreement (whether the most likely
    next token stayed), error_norm2 = |x - v(x)|^2 and added_norm2 = |v(x) - base(x)|^2 in squared
    units of x. base: the variant each is compared with. moments: totals of 1, |x|^2 and x of each
    document, documents ascending, for the FVU. Intervals are at 95 %, documents resampled.
    """

    hook: str
    skip: int
    base: dict[str, str]
    document: Int64[Tensor, " n"]
    context: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    token: Int64[Tensor, " n"]
    cross_entropy: dict[str, Float[Tensor, " n"]]
    kl: dict[str, Float[Tensor, " n"]]
    agreement: dict[str, Bool[Tensor, " n"]]
    error_norm2: dict[str, Float[Tensor, " n"]]
    added_norm2: dict[str, Float[Tensor, " n"]]
    moments: Float64[Tensor, "documents d_plus_2"]
    seed: int = 0
    resamples: int = field(default=1000)

    @property
    def variants(self) -> tuple[str, ...]:
        return tuple(self.base)

    def __len__(self) -> int:
        return len(self.document)

    def mean(self, variant: str, score: Score = "cross_entropy") -> Interval:
        """Mean of a score over tokens: nats for cross_entropy and kl, a share for agreement."""
        if score not in ("cross_entropy", "kl", "agreement"):
            raise Refusal(f"There is no score {score!r}; choose cross_entropy, kl or agreement.")
        self._known(variant, original=score == "cross_entropy")
        values: Tensor = getattr(self, score)[variant]
        return self._interval(lambda t: t[:, 0] / t[:, 1], values, torch.ones_like(self.document))

    def cost(self, variant: str) -> Interval:
        """CE(variant) - CE(original), nats a token, paired token by token."""
        return self._interval(
            lambda t: t[:, 0] / t[:, 1], self._cost(variant), torch.ones_like(self.document)
        )

    def ratio(self, variant: str, other: str, score: Literal["kl", "cost"] = "kl") -> Interval:
        """How many times the KL, or the cost in cross entropy, of `other` that of `variant` is.

        Of totals over the same tokens. Raises Refusal when that of `other` is not above zero.
        """
        if score not in ("kl", "cost"):
            raise Refusal(f"There is no ratio of {score!r}; choose kl or cost.")
        self._known(variant)
        self._known(other)
        above, below = (
            self.kl[name] if score == "kl" else self._cost(name) for name in (variant, other)
        )
        self._positive(below, f"the {score} of {other!r}")
        return self._interval(lambda t: t[:, 0] / t[:, 1], above, below)

    def recovered(self, variant: str | Sequence[str], base: str | None = None) -> Interval:
        """Share of the base's cost that a variant takes back; for several, the sum of shares.

            ( CE(base) - CE(variant) ) / ( CE(base) - CE(original) )

        of totals over tokens. 0 is the base, 1 the original model. Raises Refusal when the base
        costs nothing or the variants have different bases.
        """
        variants, base = self._of_one_base(variant, base)
        gap = self._cost(base)
        self._positive(gap, f"the cost of the base {base!r}")
        gained = sum((gap - self._cost(name) for name in variants), torch.zeros_like(gap))
        return self._interval(lambda t: t[:, 0] / t[:, 1], gained, gap)

    def fvu(self, variant: str) -> Interval:
        """FVU of a variant as a model of x, pooled, on the spliced tokens."""
        self._known(variant)
        errors = document_sums(self.error_norm2[variant][:, None], self.document)
        count, square, total = self.moments.tensor_split((1, 2), dim=1)
        sums = torch.cat([count, errors, square, total], 1)
        return bootstrap(fvu_from_totals, sums, n=self.resamples, seed=self.seed)

    def fvu_share(self, variant: str | Sequence[str], base: str | None = None) -> Interval:
        """Share of the base's FVU that a variant removes: 1 - FVU(variant) / FVU(base).

        The paper's "R2 recovered". For several variants, the sum of their shares.
        """
        variants, base = self._of_one_base(variant, base)
        whole = self.error_norm2[base]
        self._positive(whole, f"the error of the base {base!r}")
        gained = sum((whole - self.error_norm2[name] for name in variants), 0 * whole)
        return self._interval(lambda t: t[:, 0] / t[:, 1], gained, whole)

    def norm_share(self, variant: str) -> Interval:
        """Length of what a variant adds to its base over that of the base's error.

            sqrt( sum |variant - base|^2 / sum |x - base|^2 )

        Squares of the shares of two orthogonal parts add to one.
        """
        variants, base = self._of_one_base(variant, None)
        whole = self.error_norm2[base]
        self._positive(whole, f"the error of the base {base!r}")
        return self._interval(
            lambda t: (t[:, 0] / t[:, 1]).sqrt(), self.added_norm2[variants[0]], whole
        )

    @property
    def per_token(self) -> pd.DataFrame:
        """One row a token; columns document, context, position, token, then score/variant."""
        import pandas as pd

        columns = {
            name: getattr(self, name) for name in ("document", "context", "position", "token")
        }
        for score in ("cross_entropy", "kl", "agreement", "error_norm2"):
            columns |= {f"{score}/{name}": v for name, v in getattr(self, score).items()}
        return pd.DataFrame({name: values.numpy() for name, values in columns.items()})

    @property
    def table(self) -> pd.DataFrame:
        """One row a variant and one for the original; scores with `_low` and `_high`.

        cross_entropy, cost, kl, agreement, fvu and, against the base, recovered, fvu_share and
        norm_share; NaN where there is no such score (a base against itself, or no cost).
        """
        import pandas as pd

        rows: list[dict[str, Any]] = []
        for name in (ORIGINAL, *self.variants):
            scores = {"cross_entropy": self.mean(name)}
            if name != ORIGINAL:
                scores |= {"cost": self.cost(name), "kl": self.mean(name, "kl")}
                scores |= {"agreement": self.mean(name, "agreement"), "fvu": self.fvu(name)}
                base = self.base[name]
                if name != base and float(self._cost(base).sum()) > 0:
                    scores["recovered"] = self.recovered(name)
                if name != base and float(self.error_norm2[base].sum()) > 0:
                    scores |= {"fvu_share": self.fvu_share(name)}
                    scores |= {"norm_share": self.norm_share(name)}
            row: dict[str, Any] = {"variant": name, "base": self.base.get(name)}
            for score, interval in scores.items():
                row |= {score: interval.value, f"{score}_low": interval.low}
                row[f"{score}_high"] = interval.high
            rows.append(row)
        return pd.DataFrame(rows).set_index("variant")

    def _known(self, variant: str, original: bool = False) -> None:
        if variant not in self.base and not (original and variant == ORIGINAL):
            raise Refusal(
                f"There is no variant {variant!r}; this splice has {', '.join(self.variants)}."
            )

    def _cost(self, variant: str) -> Tensor:
        self._known(variant)
        return self.cross_entropy[variant].double() - self.cross_entropy[ORIGINAL].double()

    def _of_one_base(
        self, variant: str | Sequence[str], base: str | None
    ) -> tuple[tuple[str, ...], str]:
        variants = (variant,) if isinstance(variant, str) else tuple(variant)
        for name in variants:
            self._known(name)
        bases = {self.base[name] for name in variants} if base is None else {base}
        if len(bases) != 1:
            raise Refusal(
                f"The variants {list(variants)} have the bases {sorted(bases)}, expected one; "
                "name it, or ask for variants of one base."
            )
        self._known(base := bases.pop())
        return variants, base

    def _positive(self, values: Tensor, what: str) -> None:
        if not float(values.sum()) > 0:
            raise Refusal(
                f"In total {what} is {float(values.double().sum()):.3g}, expected above zero, as "
                "a share is taken of it; choose a variant that harms the model."
            )

    def _interval(self, statistic: Callable[[Tensor], Tensor], *columns: Tensor) -> Interval:
        values = torch.stack([column.double() for column in columns], 1)
        sums = document_sums(values, self.document)
        return bootstrap(statistic, sums, n=self.resamples, seed=self.seed)


def splice(
    model: Model,
    tokens: Tokens,
    hook: str,
    variants: Mapping[str, Variant],
    skip: int = 32,
    base: str | Mapping[str, str] | None = None,
    special: Sequence[int] = (),
    seed: int = 0,
    batch_contexts: int = 8,
    resamples: int = 1000,
) -> Splice:
    """Replace activations at a hook by every variant in turn, and score the model's predictions.

    Variants are functions of flat rows x [n, d] that return rows to stand in their place
    (`Randomised` ones also get a generator). They see, and replace, positions >= `skip` but the
    last of a context, whose next token is unknown; the first `skip` positions and `special` tokens
    stay as they are, as published. These are also the tokens that are scored. `base` is the variant
    that others are compared with in `recovered` and the shares: one name, or one for each variant;
    by default the first.

    Each batch of contexts is read once for all variants. A variant at a residual stream then runs
    only the blocks after it (`Model.resume`); at other hooks it runs the whole model. Log
    probabilities of the original are held for one batch, 8 * batch_contexts * positions *
    vocabulary bytes: lower `batch_contexts` for large vocabularies. A batch for which the device
    has no memory is run in halves, as are those that follow, which a RuntimeWarning says.

    Raises Refusal for an unknown hook or base, no variants, a variant called "original", tokens
    the model cannot read, or a mask that leaves none; and while running for a variant that returns
    another shape, NaN or infinity (naming it and the first token) or works on x in place.
    """
    model.width(hook)
    bases = _bases(variants, base)
    length = tokens.tokens.shape[1]
    if not 0 <= skip < length - 1:
        raise Refusal(
            f"skip is {skip} and contexts have {length} tokens, expected 0 to {length - 2}: the "
            "last position has no next token; skip fewer or read longer contexts."
        )
    if batch_contexts < 1:
        raise Refusal(f"batch_contexts is {batch_contexts}, expected 1 or more.")
    counts = measured(tokens.tokens, skip, special)
    if not bool(counts.any()):
        raise Refusal(
            f"No token is left: of {tokens.n_tokens}, all are special {list(special)} or among the "
            f"first {skip} positions; pass at least one document with more text."
        )
    run = _Run(model, tokens, hook, dict(variants), bases, skip, counts, seed)
    halves = Halves(model, length)
    with torch.no_grad():
        for start in range(0, tokens.n_contexts, batch_contexts):
            part = slice(start, min(start + batch_contexts, tokens.n_contexts))
            run.add(halves(part, run.batch))
    return run.result(resamples)


def _bases(variants: Mapping[str, Variant], base: str | Mapping[str, str] | None) -> dict[str, str]:
    if not variants:
        raise Refusal("There are no variants, expected at least one; pass {name: function}.")
    if ORIGINAL in variants:
        raise Refusal(
            f"A variant is called {ORIGINAL!r}, which is the model as it is; give it another name."
        )
    if base is None:
        base = next(iter(variants))
    bases = dict.fromkeys(variants, base) if isinstance(base, str) else dict(base)
    for name in variants:
        if bases.setdefault(name, name) not in variants:
            raise Refusal(
                f"The base of {name!r} is {bases[name]!r}, which is no variant; choose one of "
                f"{', '.join(variants)}."
            )
    if unknown := sorted(set(bases) - set(variants)):
        raise Refusal(
            f"A base is given for {unknown[0]!r}, which is no variant; choose from "
            f"{', '.join(variants)}."
        )
    return bases


@dataclass(frozen=True)
class _Scores:
    """What was found of a batch: values by (score, variant), and moments of x with documents."""

    values: dict[tuple[str, str], Tensor]
    document: Tensor
    rows: Tensor


class _Run:
    """One splice on its way through the batches."""

    def __init__(
        self,
        model: Model,
        tokens: Tokens,
        hook: str,
        variants: dict[str, Variant],
        bases: dict[str, str],
        skip: int,
        counts: Tensor,
        seed: int,
    ) -> None:
        self.model, self.tokens, self.hook = model, tokens, hook
        self.variants, self.bases, self.skip, self.seed = variants, bases, skip, seed
        self.counts = counts
        self.resumes = model.resumes_at(hook)
        self.positions = slice(skip, tokens.tokens.shape[1] - 1)
        self.generators = {
            name: torch.Generator().manual_seed(crc32(f"{seed}/{name}".encode()))
            for name in variants
        }
        self.context, self.position = counts.nonzero(as_tuple=True)
        self.document = tokens.document[self.context]
        self.parts: dict[tuple[str, str], list[Tensor]] = {}
        documents = len(tokens.names)
        self.moments = torch.zeros(documents, model.width(hook) + 2, dtype=torch.float64)

    def batch(self, part: slice) -> _Scores:
        """The clean forward of a batch, then every variant of it."""
        drawn = {name: generator.get_state() for name, generator in self.generators.items()}
        try:
            return self._batch(part)
        except RuntimeError:
            # One that did not fit is begun again.
            for name, state in drawn.items():
                self.generators[name].set_state(state)
            raise

    def add(self, batches: list[_Scores]) -> None:
        """Keep what was found of batches."""
        for batch in batches:
            for key, values in batch.values.items():
                self.parts.setdefault(key, []).append(values)
            self.moments.index_add_(0, batch.document, batch.rows)

    def _batch(self, part: slice) -> _Scores:
        ids = self.tokens.tokens[part]
        chosen = self.counts[part, self.positions].flatten()
        seen: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            seen.append(x)
            return x

        clean = self.model.logits(ids, {self.hook: keep})[:, self.positions]
        whole = seen[0]
        x = whole[:, self.positions].flatten(0, 1)[chosen.to(whole.device)]
        here = slice(int(self.counts[: part.start].sum()), int(self.counts[: part.stop].sum()))
        target = ids[:, self.skip + 1 :].flatten().to(clean.device)
        reference = _Reference(clean.flatten(0, 1), target)
        found = {("cross_entropy", ORIGINAL): reference.loss.cpu()[chosen]}
        self._finite("the original model", found["cross_entropy", ORIGINAL], here)
        square = x.double().square().sum(1, keepdim=True)
        rows = torch.cat([torch.ones_like(square), square, x.double()], 1).cpu()
        put: dict[str, Tensor] = {}
        for name in self.variants:
            put[name] = self._replacement(name, x, here)
            logits = self._logits(ids, whole, chosen, put[name])
            for score, values in reference.score(logits.flatten(0, 1)).items():
                found[score, name] = values.cpu()[chosen]
            found["error_norm2", name] = (x - put[name]).double().square().sum(1).cpu()
        for name, x_hat in put.items():
            added = x_hat - put[self.bases[name]]
            found["added_norm2", name] = added.double().square().sum(1).cpu()
        return _Scores(found, self.document[here], rows)

    def _replacement(self, name: str, x: Tensor, here: slice) -> Tensor:
        variant, version = self.variants[name], x._version
        new: Any = (
            variant.function(x, self.generators[name])
            if isinstance(variant, Randomised)
            else variant(x)
        )
        if x._version != version:
            raise Refusal(
                f"The variant {name!r} changed its input in place, which the others also get; "
                "work on a copy (x.clone())."
            )
        if not isinstance(new, Tensor) or new.shape != x.shape:
            came = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise Refusal(
                f"The variant {name!r} returned {came}, expected a tensor of the shape it was "
                f"given, {tuple(x.shape)}: one row for each row."
            )
        self._finite(f"the variant {name!r}", new, here)
        return new.detach().to(x)

    def _finite(self, what: str, values: Tensor, here: slice) -> None:
        bad = values.isfinite().logical_not()
        if bool(bad.any()):
            row = int(bad.flatten(1).any(1).nonzero()[0] if bad.ndim > 1 else bad.nonzero()[0])
            i = here.start + row
            raise Refusal(
                f"{what[0].upper()}{what[1:]} gave NaN or infinity, first at position "
                f"{int(self.position[i])} of context {int(self.context[i])} (document "
                f"{self.tokens.names[int(self.document[i])]!r}), expected finite numbers; mend it "
                "or leave the document out."
            )

    def _logits(self, ids: Tensor, whole: Tensor, chosen: Tensor, x_hat: Tensor) -> Tensor:
        """Logits at the scored positions with x_hat in the place of the chosen rows."""
        new = whole.clone()
        rows = whole[:, self.positions].flatten(0, 1).clone()
        rows[chosen.to(rows.device)] = x_hat
        new[:, self.positions] = rows.unflatten(0, (len(ids), -1))
        if self.resumes:
            return self.model.resume(ids, self.hook, new, self.positions)
        return self.model.logits(ids, {self.hook: lambda _: new})[:, self.positions]

    def result(self, resamples: int) -> Splice:
        """All batches as one."""
        scores: dict[str, dict[str, Tensor]] = {}
        for (score, name), values in self.parts.items():
            scores.setdefault(score, {})[name] = torch.cat(values)
        return Splice(
            hook=self.hook,
            skip=self.skip,
            base={name: self.bases[name] for name in self.variants},
            document=self.document,
            context=self.context,
            position=self.position,
            token=self.tokens.tokens[self.context, self.position],
            cross_entropy=scores["cross_entropy"],
            kl=scores["kl"],
            agreement=scores["agreement"],
            error_norm2=scores["error_norm2"],
            added_norm2=scores["added_norm2"],
            moments=self.moments[self.moments[:, 0] > 0],
            seed=self.seed,
            resamples=resamples,
        )


class _Reference:
    """Log probabilities of the original at n rows, against which others are scored."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        self.rows = max(1, _LOGITS_AT_A_TIME // logits.shape[1])
        self.target = target[:, None]
        self.log_p = logits.float().log_softmax(1)
        self.p = self.log_p.exp()
        self.top = self.log_p.argmax(1, keepdim=True)
        self.loss = -self.log_p.gather(1, self.target)[:, 0]

    def score(self, logits: Tensor) -> dict[str, Tensor]:
        """Cross entropy, KL(original || this) and top-1 agreement of every row."""
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, len(logits), self.rows):
            rows = slice(start, start + self.rows)
            log_q = logits[rows].float().log_softmax(1)
            loss = -log_q.gather(1, self.target[rows])[:, 0]
            same = log_q.gather(1, self.top[rows])[:, 0] == log_q.amax(1)
            # The difference first: both sums alone are large, and equal rows give exactly zero.
            difference = torch.sub(self.log_p[rows], log_q, out=log_q)
            parts.append((loss, torch.linalg.vecdot(self.p[rows], difference), same))
        loss, kl, same = (torch.cat(part) for part in zip(*parts, strict=True))
        return {"cross_entropy": loss, "kl": kl, "agreement": same}


# Controls: harm of the size of the SAE's error in other directions. Rows are tokens.


def isotropic_noise(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """x + |x - x_hat| u, with u uniform on the sphere. Gurnee's epsilon-random."""
    _same_rows(x, x_hat)
    return x + _of_length(_normal(x, generator), (x - x_hat).norm(dim=1))


def same_angle(
    x: Float[Tensor, "n d"],
    x_hat: Float[Tensor, "n d"],
    generator: torch.Generator,
    norm: Literal["x_hat", "x"] = "x_hat",
) -> Float[Tensor, "n d"]:
    """A random vector at the angle of x_hat to x, of length |x_hat|. Gurnee's theta-random.

        |x_hat| ( cos x/|x| + sin v ),  v a random unit vector orthogonal to x

    With norm="x" of length |x|, his other form. Raises Refusal for another norm.
    """
    _same_rows(x, x_hat)
    if norm not in ("x_hat", "x"):
        raise Refusal(f"norm is {norm!r}, expected 'x_hat' or 'x'; choose one.")
    along = _of_length(x, torch.ones_like(x[:, 0]))
    cosine = torch.cosine_similarity(x, x_hat, dim=1)[:, None].clamp(-1, 1)
    across = _normal(x, generator)
    across = across - (across * along).sum(1, keepdim=True) * along
    sine = (1 - cosine.square()).sqrt()
    across = _of_length(across, torch.ones_like(x[:, 0]))
    length = (x_hat if norm == "x_hat" else x).norm(dim=1, keepdim=True)
    return length * (cosine * along + sine * across)


def covariance_matched(
    x: Float[Tensor, "n d"],
    x_hat: Float[Tensor, "n d"],
    root: Float[Tensor, "k d"],
    generator: torch.Generator,
) -> Float[Tensor, "n d"]:
    """x + |x - x_hat| g/|g|, with g normal of covariance root' root. Lee and Heimersheim's.

    The root is `synthetic.covariance_root` of the activations' covariance: the noise prefers the
    directions in which activations differ from each other.
    """
    _same_rows(x, x_hat)
    if root.ndim != 2 or root.shape[1] != x.shape[1]:
        raise Refusal(
            f"root is {list(root.shape)}, expected [k, {x.shape[1]}]; pass covariance_root of the "
            "covariance of the activations."
        )
    draws = torch.randn(len(x), len(root), generator=generator).to(x) @ root.to(x)
    return x + _of_length(draws, (x - x_hat).norm(dim=1))


def shuffled_error(
    x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"], generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """x minus another token's error, brought to the length of this token's error.

    Tokens stand in a random circle and each gets the error of its neighbour, never its own.
    Raises Refusal for a single row.
    """
    _same_rows(x, x_hat)
    if len(x) < 2:
        raise Refusal(f"x has {len(x)} row, expected 2 or more: nobody else has an error.")
    error = x - x_hat
    circle = torch.randperm(len(x), generator=generator).to(x.device)
    others = torch.empty_like(error)
    others[circle] = error[circle.roll(1)]
    return x - _of_length(others, error.norm(dim=1))


def sae_norm(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """x at the length of x_hat: what shrinkage alone would cost. Gurnee's SAE-norm."""
    _same_rows(x, x_hat)
    return _of_length(x, x_hat.norm(dim=1))


def _same_rows(x: Tensor, x_hat: Tensor) -> None:
    if x.ndim != 2 or x.shape != x_hat.shape:
        raise Refusal(
            f"x is {list(x.shape)} and x_hat {list(x_hat.shape)}, expected both [n, d]; pass an "
            "activation and its reconstruction in each row."
        )


def _normal(x: Tensor, generator: torch.Generator) -> Tensor:
    # Drawn where the generator is, so that devices draw the same.
    return torch.randn(x.shape, generator=generator).to(x)


def _of_length(directions: Tensor, length: Tensor) -> Tensor:
    """Rows brought to a length; rows of zero stay zero."""
    tiny = torch.finfo(directions.dtype).tiny
    return directions * (length / directions.norm(dim=1).clamp_min(tiny))[:, None]

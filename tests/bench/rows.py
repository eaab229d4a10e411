"""The rows of the benchmark: two ways to one result each, the work they do, and the aim."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from darkmatter.activations import stream
from darkmatter.autoencoders import decoder_of, reconstruct, sparse_encode
from darkmatter.book.execution import METADATA_KEY, executed_notebooks
from darkmatter.book.pages import BUDGET_BYTES
from darkmatter.book.paths import open_book
from darkmatter.geometry import neighbour_cosines
from darkmatter.leastsquares import LinearStatistics, Precision
from darkmatter.pursuit import gradient_pursuit
from darkmatter.scaling import NormMoments, fit_power_law, per_token_scaling
from darkmatter.sensitivity import curves, relative_path
from darkmatter.sparse import SparseCode
from darkmatter.splicing import splice
from darkmatter.suites import Suite, load_suite
from tests.bench import measure, published

ROOT = Path(__file__).parents[2]
SAES = 7


@dataclass(frozen=True)
class Case:
    """One line of the table.

    `ours` and `published` are timed in turn. `part` is the share of our work that `published` does;
    its seconds are divided by it, which `size` says. `check` compares what both return, once, and
    gives the largest difference; more than `tolerance` stops the benchmark. `work` is what ours
    needs in FLOP (or, for rate "memory", in bytes). `met` says whether the aim is reached. With
    `clock`, ours returns the seconds that count; `published` may be None.
    """

    size: str
    ours: Callable[[], Any]
    published: Callable[[], Any] | None
    met: Callable[[float, float, float], bool]
    check: Callable[[Any, Any], float] = lambda _mine, _theirs: 0.0
    tolerance: float = 0.0
    clock: bool = False
    part: float = 1.0
    work: float = math.nan
    rate: Literal["float32", "float64", "memory"] = "float32"
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A kind of work: its aim, its FLOP and bytes per token as formulas, and its cases."""

    work: str
    aim: str
    flop: str
    bytes: str
    cases: Callable[[bool], Iterator[Case]]


def at_least(ratio: float) -> Callable[[float, float, float], bool]:
    """The aim that the published procedure takes so many times as long."""
    return lambda found, _seconds, _share: found >= ratio


@cache
def suite() -> Suite:
    return load_suite("pydocs")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def residual_stream(n: int, d: int, seed: int = 0) -> Tensor:
    """Rows as in a residual stream: a mean far from zero, a power-law spectrum, mixed dimensions.

    Two directions are a hundred times the others', as the outlying dimensions of real models are.
    """
    random = generator(seed)
    scale = torch.arange(1, d + 1) ** -0.5
    scale[:2] *= 100
    x = torch.randn(n, d, generator=random) * scale
    mean = 30 * torch.randn(d, generator=random) / math.sqrt(d)
    axis = torch.randn(d, generator=random)
    axis /= axis.norm()
    # A reflection mixes the dimensions at the cost of one vector.
    return x - 2 * (x @ axis)[:, None] * axis + mean


def planted(n: int, m: int, d: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows made of k atoms each and noise, and the m unit atoms, as a trained SAE's decoder is."""
    random = generator(seed)
    atoms = torch.randn(m, d, generator=random)
    atoms /= atoms.norm(dim=1, keepdim=True)
    code = SparseCode(
        torch.rand(n, k, generator=random) + 0.3, torch.randint(0, m, (n, k), generator=random)
    )
    return code.decode(atoms) + 0.05 * torch.randn(n, d, generator=random), atoms


# ---- fit


def survey_fit(quick: bool) -> Iterator[Case]:
    """14 regressions on the same x, from one pass of moments."""
    tiles, n = (1, 600) if quick else (5, 30_000)
    for d in (16,) if quick else (256, 768):
        x = residual_stream(n, d)
        error = [0.1 * x + 0.3 * residual_stream(n, d, seed) for seed in range(1, 1 + SAES)]
        norms = torch.stack([e.square().sum(1) for e in error], 1)
        stored = x.repeat(tiles, 1), error[0].repeat(tiles, 1), norms[:, :1].repeat(tiles, 1)

        def ours(
            precision: Precision,
            x: Tensor = x,
            error: list[Tensor] = error,
            norms: Tensor = norms,
        ) -> Tensor:
            moments = LinearStatistics(x.shape[1], SAES * x.shape[1] + SAES)
            for _ in range(tiles):
                for start in range(0, len(x), 4096):
                    rows = slice(start, start + 4096)
                    targets = torch.cat([*(e[rows] for e in error), norms[rows]], 1)
                    moments.partial_fit(x[rows], targets, precision)
            return moments.solve().weight

        def theirs(stored: tuple[Tensor, ...] = stored) -> tuple[Tensor, Tensor]:
            x, error, norm = stored
            return published.least_squares(x, error), published.least_squares(x, norm)

        def check(
            weight: Tensor, solutions: tuple[Tensor, Tensor], x: Tensor = x, d: int = d
        ) -> float:
            # What both predict, about the mean; float32 leaves less of single weights.
            rows = (x[:1000] - x.mean(0)).double()
            ours = weight[:, :d], weight[:, SAES * d : SAES * d + 1]
            return max(
                measure.difference(rows @ solution[:-1].double(), rows @ mine)
                for solution, mine in zip(solutions, ours, strict=True)
            )

        for precision in get_args(Precision):
            yield Case(
                size=f"d = {d}, {tiles * n:,} tokens, {SAES} SAEs, {precision} products; "
                f"published: 1 of {SAES} SAEs",
                ours=partial(ours, precision),
                published=theirs,
                check=check,
                tolerance=1e-3,
                met=lambda ratio, _seconds, share: ratio >= 5 and share >= 0.5,
                part=1 / SAES,
                work=tiles * n * (2.0 * d * d * (1 + SAES) + 2 * d * SAES),
                rate=precision,
            )


# ---- pursuit


def pursuit(quick: bool) -> Iterator[Case]:
    """Gradient pursuit against the dense loop, on planted codes and on the suite."""
    shapes = [(64, 32, 160, 24, 4)] if quick else [
        (8192, 256, 8192, 768, 32),
        (2048, 128, 16384, 768, 60),
    ]  # fmt: skip
    for n, first, m, d, k in shapes:
        x, atoms = planted(n, m, d, k)
        yield _pursuit_case(
            f"d = {d}, m = {m}, k = {k}, {n} tokens", x, atoms, torch.full((n,), k), first
        )
    if quick:
        return
    batch = _suite_activations(16)
    for name, first in (("resid_post.2-2048-l32", 1024), ("resid_post.2-8192-l8", 1024)):
        sae = suite().saes[name]
        code = sparse_encode(sae, batch)
        atoms, bias = decoder_of(sae)
        yield _pursuit_case(
            f"suite, {name}, {len(batch)} tokens", batch - bias, atoms, code.l0, first
        )


def same_atoms(code: SparseCode, dense: Tensor, least: float) -> float:
    """Difference of the values where a code has the atoms of dense codes of its first rows.

    Refuses when fewer than a share of `least` rows have them.
    """
    first, m = dense.shape
    mine = SparseCode(code.values[:first], code.indices[:first]).dense(m)
    same = ((mine != 0) == (dense != 0)).all(1)
    # Sums in another order exchange two atoms of nearly equal correlation, seldom.
    assert float(same.float().mean()) > least, f"other atoms in {int((~same).sum())} of {first}"
    return measure.difference(mine[same], dense[same])


def _pursuit_case(size: str, x: Tensor, atoms: Tensor, l0: Tensor, first: int) -> Case:
    m, d, k = len(atoms), atoms.shape[1], int(l0.max())
    return Case(
        size=f"{size}; published: the first {first}",
        ours=lambda: gradient_pursuit(x, atoms, l0),
        published=lambda: published.gradient_pursuit(x[:first], atoms, l0[:first]),
        check=lambda code, dense: same_atoms(code, dense, 0.98),
        tolerance=1e-3,
        met=at_least(8),
        part=first / len(x),
        work=float((4.0 * m * l0 * (l0 - 1) / 2).sum()),
        rate="memory",
        note=f"largest l0 {k}, d = {d}, m = {m}; bytes of Gram rows of active atoms only",
    )


def _suite_activations(contexts: int) -> Tensor:
    tokens = suite().tokens("test")
    chosen = tokens.select(torch.arange(contexts))
    return torch.cat([b.x for b in stream(suite().model, suite().hook, chosen, suite().skip)])


# ---- model


def splices(quick: bool) -> Iterator[Case]:
    """Four variants at the suite's hook."""
    contexts = 2 if quick else 48
    model, hook, skip = suite().model, suite().hook, suite().skip
    every = suite().tokens("test")
    tokens = every.select(torch.arange(contexts))
    sae = suite().saes["resid_post.2-2048-l8"]
    mean = _suite_activations(2).mean(0)
    variants = {
        "sae": partial(reconstruct, sae),
        "half": lambda x: 0.5 * (x + reconstruct(sae, x)),
        "mean": lambda x: mean.expand_as(x),
        "shrunk": lambda x: 0.9 * x,
    }

    def check(found: Any, expected: dict[str, tuple[Tensor, Tensor]]) -> float:
        return max(
            measure.difference(mine[name], expected[name][which])
            for which, mine in enumerate((found.cross_entropy, found.kl))
            for name in variants
        )

    yield Case(
        size=f"suite, {contexts} of {every.n_contexts} contexts, 1 of 4 blocks left",
        ours=lambda: splice(model, tokens, hook, variants, skip),
        published=lambda: published.splice(model, tokens, hook, variants, skip),
        check=check,
        tolerance=1e-4,
        met=at_least(1.6),
        work=tokens.n_tokens * _forward_flop(1.0 + 4 * 0.25, 5),
    )


def _forward_flop(blocks: float, unembeddings: float) -> float:
    """FLOP a token of some forwards' blocks and unembeddings in the suite's model."""
    model = suite().model
    block = 24.0 * model.d_model**2 + 4 * model.n_context * model.d_model
    return blocks * model.n_layer * block + unembeddings * 2 * model.d_model * model.vocabulary


def sensitivity(quick: bool) -> Iterator[Case]:
    """Curves of five directions from prompts of ten tokens."""
    prompts, directions, steps = (1, 2, 5) if quick else (2, 5, 100)
    hook, model = "blocks.1.hook_resid_pre", suite().model
    tokens = suite().tokens("test").tokens[:prompts, :10]
    base = model.activations(tokens, hook)[:, -1:].expand(-1, directions, -1)
    target = base + 5 * torch.randn(base.shape, generator=generator())
    paths = relative_path(base, target, steps)
    points = prompts * directions * (steps + 1)
    for read in (("l2",), ("l2", "kl")):

        def check(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
            return max(measure.difference(mine[name], theirs[name]) for name in mine)

        yield Case(
            size=f"{prompts} prompts of 10 tokens, {directions} directions, {steps} steps, "
            + " + ".join(read),
            ours=partial(curves, model, hook, tokens, paths, read),
            published=partial(published.curves, model, hook, tokens, paths, "kl" in read),
            check=check,
            tolerance=1e-4,
            met=at_least(4),
            work=points * _forward_flop(0.75, len(read) - 1),
        )


def collection(quick: bool) -> Iterator[Case]:
    """Activations with token, position, document and loss, against the bare forward."""
    contexts = 4 if quick else 64
    tokens = suite().tokens("test").select(torch.arange(contexts))

    def ours() -> int:
        return sum(len(b) for b in stream(suite().model, suite().hook, tokens, suite().skip))

    yield Case(
        size=f"suite, {contexts} contexts, 16 at a time",
        ours=ours,
        published=lambda: published.forward(suite().model, tokens.tokens, 16),
        met=at_least(0.8),
        work=tokens.n_tokens * _forward_flop(1, 1),
        note="the bare forward gives logits only, and no loss",
    )


# ---- geometry and codes


def neighbours(quick: bool) -> Iterator[Case]:
    """Cosines with the 1st, 10th and 100th neighbour."""
    m, d, ranks = (200, 24, (1, 10)) if quick else (24576, 768, (1, 10, 100))
    directions = torch.randn(m, d, generator=generator())
    yield Case(
        size=f"m = {m}, d = {d}; published: all rows, by 100",
        ours=lambda: neighbour_cosines(directions, ranks),
        published=lambda: published.neighbour_cosines(directions, ranks),
        check=measure.difference,
        tolerance=1e-5,
        met=lambda _ratio, _seconds, share: share >= 0.7,
        work=2.0 * m * m * d,
    )


def sparse_codes(quick: bool) -> Iterator[Case]:
    """Decode and encode of JumpReLU codes at m = 16384."""
    m, d, k, n = (128, 16, 4, 64) if quick else (16384, 768, 32, 2048)
    random = generator()
    atoms = torch.randn(m, d, generator=random)
    bias = torch.randn(d, generator=random)
    values = torch.rand(n, k, generator=random) + 0.1
    code = SparseCode(values, torch.rand(n, m, generator=random).topk(k).indices)
    dense = code.dense(m)
    yield Case(
        size=f"decode: m = {m}, d = {d}, L0 {k}, {n} tokens",
        ours=lambda: code.decode(atoms, bias),
        published=lambda: dense @ atoms + bias,
        check=measure.difference,
        tolerance=1e-5,
        met=at_least(10),
        work=4.0 * n * k * d,
        rate="memory",
    )
    sae = jump_relu(atoms, bias, k)
    x = torch.randn(n, d, generator=random)
    yield Case(
        size=f"encode: m = {m}, d = {d}, L0 about {k}, {n} tokens",
        ours=lambda: sparse_encode(sae, x),
        published=lambda: sae.encode(x),
        check=lambda mine, theirs: measure.difference(mine.dense(m), theirs),
        tolerance=1e-5,
        met=at_least(1),
        work=2.0 * n * m * d,
        note="no aim of its own in time; no dense codes are kept",
    )


def jump_relu(atoms: Tensor, bias: Tensor, k: int) -> Any:
    """A JumpReLU SAE of these directions that activates about k of them on normal rows."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    m, d = atoms.shape
    sae: Any = JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=m))
    unit = atoms / atoms.norm(dim=1, keepdim=True)
    # Correlations with x of normal entries are normal: this share is above the threshold.
    threshold = math.sqrt(2) * torch.erfinv(torch.tensor(1 - 2 * k / m))
    state = {
        "W_enc": unit.T.contiguous(), "W_dec": unit, "b_enc": torch.zeros(m),
        "b_dec": torch.zeros_like(bias), "threshold": threshold.expand(m).clone(),
    }  # fmt: skip
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False)


# ---- scaling


def scaling(quick: bool) -> Iterator[Case]:
    """R2 among seven widths with helpers, from one moment matrix."""
    n = 1000 if quick else 250_000
    random = generator()
    common = torch.randn(n, 1, generator=random)
    norms = 20 + 2 * common + torch.randn(n, 2 * SAES, generator=random)
    fit, test = norms.split([n * 3 // 5, n - n * 3 // 5])
    helper = range(SAES, 2 * SAES)

    def ours() -> Any:
        moments = [NormMoments(2 * SAES).partial_fit(part) for part in (fit, test)]
        return per_token_scaling(*moments, range(SAES), range(SAES), helper)

    def check(found: Any, theirs: tuple[Tensor, Tensor]) -> float:
        return max(
            float((theirs[0] - found.r2).abs().max()),
            float((theirs[1] - found.r2_with).abs().max()),
        )

    yield Case(
        size=f"{SAES} widths with helpers, {n:,} tokens",
        ours=ours,
        published=lambda: published.per_token_scaling(fit, test, helper),
        check=check,
        # R2 of float32 sums over 1e5 rows.
        tolerance=1e-3,
        met=at_least(20),
        work=4.0 * n * 2 * SAES,
        rate="memory",
    )


def power_law(quick: bool) -> Iterator[Case]:
    """Seven points of a law with scatter."""
    width = [2.0**power for power in range(10, 17)]
    scatter = torch.randn(7, generator=generator()) * 2e-3
    fvu = [0.11 + 2.0 * w**-0.4 + float(s) for w, s in zip(width, scatter, strict=True)]
    steps = 20 if quick else 50_000

    def check(law: Any, rss: float) -> float:
        mine = sum(r * r for r in law.residuals)
        assert mine <= rss * (1 + 1e-9), f"Adam has RSS {rss}, below ours, {mine}"
        return 0.0

    yield Case(
        size=f"7 points; published: {steps:,} steps of Adam",
        ours=lambda: fit_power_law(width, fvu),
        published=lambda: published.power_law(width, fvu, steps),
        check=check,
        tolerance=0.0,
        met=lambda _ratio, seconds, _share: seconds < 0.01,
        note="ours has the larger likelihood and gives the intervals too",
    )


# ---- the package and the book


def imports(_quick: bool) -> Iterator[Case]:
    """Beyond torch: seconds of `import darkmatter` in a process of its own."""
    code = (
        "import time, torch\n"
        "start = time.perf_counter()\n"
        "import darkmatter\n"
        "print(time.perf_counter() - start)\n"
        "import sys\n"
        "heavy = {'transformers', 'transformer_lens', 'sae_lens', 'nnsight', 'pandas'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )

    def ours() -> float:
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
        )
        return float(run.stdout)

    yield Case(
        size="in a process of its own; no heavy library may be loaded",
        ours=ours,
        published=None,
        met=lambda _ratio, seconds, _share: seconds < 0.3,
        clock=True,
    )


def book(_quick: bool) -> Iterator[Case]:
    """What the last build of the book took; no line where there was none."""
    executed = executed_notebooks(open_book(ROOT).executed)
    stamps = [notebook.metadata.get(METADATA_KEY, {}) for notebook in executed.values()]
    if not stamps:
        return
    seconds = sum(float(one.get("seconds", 0)) / int(one.get("jobs", 1)) for one in stamps)
    peak = max(int(one.get("peak_bytes", 0)) for one in stamps)
    yield Case(
        size=f"{len(stamps)} chapters, as last built; largest chapter {peak / 2**30:.2f} GiB",
        ours=lambda: seconds,
        published=None,
        met=lambda _ratio, seconds, _share: seconds < 720 and peak <= BUDGET_BYTES,
        clock=True,
    )


ROWS: dict[str, Row] = {
    "fit": Row(
        "survey fit, 7 SAEs, vector and norm targets",
        "5 times less than 14 solves; within 2 times of the product time",
        "2 d^2 (1 + S) + 2 d S",
        "4 d (1 + S) read once; 8 d^2 (1 + S) held",
        survey_fit,
    ),
    "pursuit": Row(
        "gradient pursuit",
        "8 times less than the dense loop",
        "2 m d + m k^2 (Gram rows), 2 m d k beyond k = d / 4",
        "4 m k (k - 1) / 2 of Gram rows",
        pursuit,
    ),
    "splice": Row(
        "splice of 4 variants",
        "1.6 times less than full forwards",
        "2 P (1 + V (1 - l / L)) + 2 d v (1 + V)",
        "8 v (1 + V)",
        splices,
    ),
    "curves": Row(
        "sensitivity curves",
        "4 times less than full forwards",
        "2 P (1 - l / L) a point, + 2 d v with KL",
        "4 P a batch of points, + 12 v a point with KL",
        sensitivity,
    ),
    "neighbours": Row(
        "neighbour cosines",
        "70 % of the matrix-product rate, never m x m",
        "2 m d a direction",
        "4 d, 8 m in a chunk",
        neighbours,
    ),
    "sparse": Row(
        "sparse encode and decode",
        "decode 10 times less than dense",
        "decode 2 k d; encode 2 m d",
        "decode 4 k d; encode 9 m in a chunk, 12 k kept",
        sparse_codes,
    ),
    "scaling": Row(
        "per-token scaling, 7 widths",
        "20 times less than pairwise solves",
        "2 (2 W)^2",
        "4 (2 W) read once",
        scaling,
    ),
    "law": Row(
        "power law",
        "under 10 ms, better likelihood than 50,000 steps",
        "about 240 exponents x 7 points x 3 parameters x 10",
        "-",
        power_law,
    ),
    "collection": Row(
        "activation collection",
        "80 % of the bare forward's speed",
        "2 P + 4 c d L + 2 d v",
        "4 d kept",
        collection,
    ),
    "import": Row("import darkmatter", "under 0.3 s beyond torch", "-", "-", imports),
    "book": Row("the book", "12 minutes, 4 GiB", "-", "-", book),
}

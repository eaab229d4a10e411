"""The dark matter of any SAEs of one model, in two passes over tokens.

    pass 1, fit documents:   moments of x with every error e = x - Sae(x), |e|^2 and |x|^2
    pass 2, test documents:  e = linear + nonlinear with the maps of pass 1; scores by document

One run of the model serves every SAE; X'X is accumulated and factorised once for each hook.
Errors are never stored. Source: Engels, Smith and Tegmark (2410.14670), section 3; the intervals
(documents resampled) are ours.

With a folder the work is saved as it goes (see `shards`), so that it can be resumed, divided
between processes or machines, and takes the same memory for any number of tokens.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from torch import Tensor

from darkmatter import remote
from darkmatter._files import replacing, sha256_of, understood, verify_sha256
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.folders import begin, compare, entered, file_of, read_description
from darkmatter.intervals import Interval
from darkmatter.leastsquares import LinearMap, LinearStatistics, Precision
from darkmatter.passes import FitState, Fitted, Work, fit_pass, score_part, solve
from darkmatter.plans import described, pieces_of, planned
from darkmatter.ranks import Ranks
from darkmatter.scores import about_of, rows_of, score_table
from darkmatter.shards import (
    FORMAT,
    Share,
    TensorFile,
    collect_parts,
    description_in,
    hash_tensors,
    locked,
    merge_fits,
    merged_fit,
    otherwise_divided,
    read_fit,
    read_json,
    read_pieces,
    read_tokens,
    write_json,
    write_tensors,
    write_tokens,
)

if TYPE_CHECKING:
    import pandas as pd

    from darkmatter.models import Model

Value = TypeVar("Value")


class Lazy(Mapping[str, Value]):
    """A mapping that reads its values when they are asked for, and keeps none."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Value]) -> None:
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Value:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True)
class Survey:
    """What a survey found; `table` has one row an SAE, `per_token` one frame an SAE.

    Columns of `table`, each score with `_low` and `_high` (95 %, documents resampled):
    `fvu` of the reconstruction; `fvu_nonlinear` of reconstruction + linear error; `r2_vector`
    and `r2_vector_pooled`, of e from x, as a mean over dimensions (the paper's) and of sums;
    `r2_scalar`, of e from one scalar times x, of sums; `r2_norm`, of |e|^2 from x; `l0`. Spliced
    into the model, in nats a token: `cross_entropy_original`, `cross_entropy` with the SAE, `cost`
    (their difference), `kl` (from the original), `kl_linear` and `kl_nonlinear` with that part of
    the error given back, `recovered_linear` and `recovered_nonlinear`, the share of the cost that
    this takes back (NaN when there is no cost). `floor` of the power law of FVU over the widths
    of four or more SAEs of one hook and about one L0, with its own interval, else NaN. Without
    interval: `hook`, `d_sae`, `dead` (share of latents that no fit or test token activates),
    `n_fit` and `n_test` (tokens).

    Columns of `per_token`: document, context, position, token, loss (nats), l0, and the squared
    norms x_norm2, error_norm2, linear_norm2, nonlinear_norm2 with predicted_norm2, the probe's
    error norm, in the squared units of the activations; spliced also cross_entropy and kl, nats.

    `statistics`, by hook: moments of x with [every e, every |e|^2, |x|^2]. `pieces`: the text of
    every token id that occurs in `test`. `settings`: what was computed on what, as in survey.json.
    What lies in a `folder` is read when it is asked for, and not kept.
    """

    table: pd.DataFrame
    per_token: Mapping[str, pd.DataFrame]
    error_maps: Mapping[str, LinearMap]
    norm_maps: Mapping[str, LinearMap]
    statistics: Mapping[str, LinearStatistics]
    fit: Tokens
    test: Tokens
    skip: int
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    pieces: dict[int, str] = field(default_factory=dict[int, str])
    folder: Path | None = None

    def interval(self, name: str, score: str) -> Interval:
        """One score of one SAE with its interval."""
        row = self.table.loc[name]
        return Interval(float(row[score]), float(row[f"{score}_low"]), float(row[f"{score}_high"]))

    def save(self, folder: str | Path, force: bool = False) -> Path:
        """Write everything into a folder, survey.json last; returns the folder.

        Raises Refusal when something is there already, unless it is a survey and `force` is given.
        """
        target = Path(folder)
        if self.folder is not None and target.resolve() == self.folder.resolve():
            return self.folder
        with entered(target, None, resume=False, force=force):
            # So that what a kill leaves is known for a survey's.
            (target / "state").mkdir(exist_ok=True)
            _write(target, self, self._tables)
            shutil.rmtree(target / "state")
        return target

    def _tables(self, name: str) -> list[Any]:
        import pyarrow as pa

        return [pa.Table.from_pandas(self.per_token[name], preserve_index=False)]

    @classmethod
    def load(cls, folder: str | Path) -> Survey:
        """Read what `save` or `survey(folder=...)` wrote.

        Raises Refusal when there is no finished survey, CorruptFile for a file that was altered.
        """
        folder = Path(folder)
        if not (folder / "survey.json").is_file():
            raise Refusal(
                f"There is no finished survey in {folder} (no survey.json); pass the folder of "
                "one, or finish it with resume=True."
            )
        settings = read_json(folder / "survey.json")
        if settings.get("format") != FORMAT:
            told = repr(settings.get("format"))[:40]
            raise Refusal(
                f"{folder} holds a survey of format {told}, expected {FORMAT!r}; run it again with "
                "this version."
            )

        def checked(relative: str) -> Path:
            with understood(folder / "survey.json", "what a survey wrote"):
                verify_sha256(folder / relative, settings["outputs"][relative])
            return folder / relative

        def one_map(kind: str, name: str) -> LinearMap:
            file = TensorFile(checked(file_of("maps", name, "safetensors")))
            with understood(file.path, "a map of a survey"):
                told, weight, bias = file.metadata, file[f"{kind}/weight"], file[f"{kind}/bias"]
                return LinearMap(weight, bias, float(told["ridge"]), int(told["n"]))

        with understood(folder / "survey.json", "what a survey wrote"):
            names = [str(name) for name in settings["saes"]]
            hooks = dict.fromkeys(str(one["hook"]) for one in settings["saes"].values())
            documents, skip = dict(settings["documents"]), int(settings["settings"]["skip"])
            "\n".join([*names, *hooks]).encode()
        fit, test = read_tokens(checked("tokens.safetensors"), documents)
        pieces = read_pieces(checked("pieces.json"))
        return cls(
            table=_frame(checked("table.parquet"), len(names)),
            per_token=Lazy(
                names,
                lambda name: _frame(checked(file_of("per_token", name, "parquet")), test.n_tokens),
            ),
            error_maps=Lazy(names, partial(one_map, "error")),
            norm_maps=Lazy(names, partial(one_map, "norm")),
            statistics=Lazy(
                hooks,
                lambda hook: LinearStatistics.load(
                    checked(file_of("statistics", hook, "safetensors"))
                ),
            ),
            fit=fit,
            test=test,
            skip=skip,
            settings=settings,
            pieces=pieces,
            folder=folder,
        )

    def report(self, folder: str | Path | None = None) -> Path:
        """Write report.html, one page that needs nothing else, and return its path.

        Into the survey's own folder, or `folder`. Raises Refusal when there is neither.
        """
        from darkmatter.report import write_report

        target = self.folder if folder is None else Path(folder)
        if target is None:
            raise Refusal(
                "This survey lies in memory, expected a folder to write the report into; pass "
                "report(folder)."
            )
        return write_report(self, target)


def _frame(path: Path, most: int) -> pd.DataFrame:
    """A table of a survey, of at most so many rows: packed, a small file holds any number."""
    import pandas as pd
    import pyarrow.parquet as pq

    with understood(path, "a table of a survey"):
        if (rows := pq.read_metadata(path).num_rows) > most:
            raise ValueError(f"it has {rows} rows, expected at most {most}")
        return pd.read_parquet(path)


@overload
def survey(
    model: Model,
    saes: Mapping[str, Any],
    tokens: Tokens,
    test: Tokens | None = None,
    skip: int = 32,
    seed: int = 0,
    share: float = 0.6,
    resamples: int = 1000,
    special: Sequence[int] | None = None,
    downstream: bool = True,
    folder: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    *,
    shard: tuple[int, int],
    one_at_a_time: bool = False,
    checkpoint_tokens: int | None = None,
    precision: Precision = "float64",
) -> Path: ...
@overload
def survey(
    model: Model,
    saes: Mapping[str, Any],
    tokens: Tokens,
    test: Tokens | None = None,
    skip: int = 32,
    seed: int = 0,
    share: float = 0.6,
    resamples: int = 1000,
    special: Sequence[int] | None = None,
    downstream: bool = True,
    folder: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    shard: None = None,
    one_at_a_time: bool = False,
    checkpoint_tokens: int | None = None,
    precision: Precision = "float64",
) -> Survey: ...
def survey(
    model: Model,
    saes: Mapping[str, Any],
    tokens: Tokens,
    test: Tokens | None = None,
    skip: int = 32,
    seed: int = 0,
    share: float = 0.6,
    resamples: int = 1000,
    special: Sequence[int] | None = None,
    downstream: bool = True,
    folder: str | Path | None = None,
    resume: bool = False,
    force: bool = False,
    progress: bool = False,
    shard: tuple[int, int] | None = None,
    one_at_a_time: bool = False,
    checkpoint_tokens: int | None = None,
    precision: Precision = "float64",
) -> Survey | Path:
    """Split the error of every SAE into its linear and nonlinear part and score both.

    `tokens` are the fit documents when `test` is given; otherwise a `share` of their documents,
    drawn with `seed`, is fitted on and the rest scored. Positions before `skip`, `special` tokens
    (by default those of the tokenizer) and the last position of a context are left out.
    `downstream` also splices the SAEs into the model, which is most of the work then.

    `folder`: everything is written there, the work so far every `checkpoint_tokens` tokens (32768;
    the moments of the first pass, which are large, at most twice a minute). A run that was killed
    goes on with `resume` and gives the same bytes; `force` replaces a survey that is there. Memory
    does not grow with the tokens, except by the tokens themselves.
    `one_at_a_time`: SAEs are taken from `saes`, which may load them, when their turn comes, and the
    model is run once for each. `progress`: a bar on stderr. `precision` "float32": the products of
    the fit are taken in float32, for devices that are slow at float64 (`LinearStatistics`).

    `shard=(i, n)`: run share i of n only, and return its file in folder/shards. First all shares of
    the fit pass, then `merge`, then all shares of the test pass, then `merge`, which returns the
    Survey. Under torchrun (RANK and WORLD_SIZE are set) the processes do this by themselves in a
    folder that all can reach. Numbers agree with those of one process to 1e-10.

    A model that runs elsewhere (`open_model(..., remote=True)`) sums up there and sends no
    activations, `checkpoint_tokens` (262144) tokens a request; see `remote`.

    Raises Refusal for no SAE, an SAE that does not fit the model, documents shared by fit and
    test, fewer fit tokens than d_model + 1, a folder that is in use, that has something else in it
    or that was begun with other inputs (naming them), and a shard that does not exist.
    """
    if checkpoint_tokens is None:
        checkpoint_tokens = remote.TOKENS if model.remote else 1 << 15
    work = planned(
        model, saes, tokens, test, skip, seed, share, special, downstream, one_at_a_time,
        checkpoint_tokens, precision,
    )  # fmt: skip
    if resamples < 1:
        raise Refusal(f"resamples is {resamples}, expected at least 1; 1000 are usual.")
    if resume and force:
        raise Refusal("resume goes on and force begins anew, expected at most one; choose.")
    ranks = None if shard is not None else Ranks.from_environment(model.device)
    if folder is None and (resume or force or shard is not None or ranks is not None):
        raise Refusal(
            "There is no folder, expected one with resume, force, shard or several processes; pass "
            "folder=."
        )
    description = described(work, seed, resamples)
    if folder is None:
        return _in_memory(work, description, progress)
    if shard is not None:
        return _one_shard(work, description, Path(folder), shard, resume, force, progress)
    if ranks is not None:
        try:
            return _among(ranks, work, description, Path(folder), resume, force, progress)
        finally:
            ranks.close()
    with entered(Path(folder), description, resume, force) as finished:
        if not finished:
            state = Path(folder) / "state"
            begin(state, work, description)
            own = Share(state, description["identity"])
            fit = _run_fit(work, own, progress)
            content = hash_tensors(_moments(fit))
            fitted = solve(work.about, fit)
            _run_test(work, own, fitted, content, progress)
            parts = [TensorFile(own.part_path(i)) for i in range(len(own.parts_done(content)))]
            _finish(Path(folder), fit, fitted, parts, state)
            shutil.rmtree(state)
    return Survey.load(folder)


def merge(
    source: str | Path | Sequence[str | Path],
    folder: str | Path | None = None,
    force: bool = False,
) -> Survey | Path:
    """Add the shards that `survey(..., shard=(i, n))` wrote.

    `source`: the survey's folder, or the files of the shards (fit-*.safetensors or test-*.json, the
    latter with the parts that they name beside them). Of the fit pass: writes fit.safetensors
    beside them and returns its path; the test pass then goes on from it. Of the test pass: writes
    the survey into `folder` (by default the survey's folder) and returns it.

    Raises Refusal, naming the file, for a shard of another survey, one that was altered or
    interrupted, one that comes twice, one of another division, and for those that are missing.
    """
    if isinstance(source, str | Path):
        base = Path(source) / "shards" if (Path(source) / "shards").is_dir() else Path(source)
        fits, tests = sorted(base.glob("fit-*")), sorted(base.glob("test-*.json"))
        testing = (base / "fit.safetensors").exists() and any(base.glob("test-*"))
    else:
        files = [Path(path) for path in source]
        if not files:
            raise Refusal("There are no shards, expected at least one file; pass them.")
        base = files[0].parent
        fits = tests = files
        testing = all(file.suffix == ".json" for file in files)
    if not (base / "description.json").is_file():
        raise Refusal(
            f"There are no shards in {base} (no description.json); pass the folder given to "
            "survey(..., folder=..., shard=(i, n))."
        )
    description = description_in(base / "description.json")
    merged, identity = base / "fit.safetensors", str(description["identity"])
    if not testing:
        merge_fits(fits, identity, merged, torch.device("cpu"))
        return merged
    target = Path(folder) if folder is not None else base.parent if base.name == "shards" else base
    file = merged_fit(merged, identity)
    parts = collect_parts(tests, identity, file.content)
    home = target.resolve() in (base.resolve(), base.resolve().parent)
    # `entered` would clear the shards themselves away.
    with locked(target / "lock") if home else entered(target, None, resume=False, force=force):
        if (target / "survey.json").exists() and not force:
            raise Refusal(f"There is a survey in {target} already; pass force=True to replace it.")
        (target / "survey.json").unlink(missing_ok=True)
        fit = read_fit(file, torch.device("cpu"))
        _finish(target, fit, solve(about_of(description), fit), parts, base)
    return Survey.load(target)


# The passes, in memory, in a folder, in shards and among processes.


@contextmanager
def _bar(
    progress: bool, what: str, tokens: Tokens, share: range, work: Work, done: int = 0
) -> Generator[Callable[[int], None], None, None]:
    """A bar of tokens, tokens a second and the time left, on stderr; `done` contexts are read."""
    from tqdm import tqdm

    each = tokens.tokens.shape[1] - work.skip - 1
    with tqdm(
        total=len(share) * each * len(work.rounds),
        initial=done * each,
        desc=what,
        unit=" tokens",
        unit_scale=True,
        disable=not progress,
    ) as bar:

        def tick(n: int) -> None:
            bar.update(n)

        yield tick


def _fit(
    work: Work,
    share: range,
    state: FitState,
    save: Callable[[FitState], None],
    progress: bool,
) -> None:
    """Pass 1 over a share, where the model is, on from where `state` is."""
    run = remote.fit_pass if work.model.remote else fit_pass
    done = state.position[0] * len(share) + state.position[1] - share.start
    with _bar(progress, "fit", work.fit, share, work, done) as tick:
        run(work, share, state, save, tick)


def _scored(
    work: Work,
    fitted: Mapping[str, Fitted],
    share: range,
    done: int,
    tick: Callable[[int], None],
) -> Iterator[dict[str, Tensor]]:
    """The parts of pass 2 over a share, from part number `done` on."""
    cut = work.parts(work.test, share)
    for i, hooks in enumerate(work.rounds):
        first = max(0, done - i * len(cut))
        if first >= len(cut):
            continue
        saes = {name: work.saes[name] for names in hooks.values() for name in names}
        if work.model.remote:
            yield from (remote.score_part(work, fitted, saes, part, tick) for part in cut[first:])
            continue
        for part, batches in work.read(list(hooks), work.test, share, cut[first].start):
            yield score_part(work, fitted, saes, part, batches, tick)


def _in_memory(work: Work, description: dict[str, Any], progress: bool) -> Survey:
    import pyarrow as pa

    if not work.model.remote:
        # Nothing is saved, so nothing is cut.
        work = replace(work, checkpoint_tokens=1 << 62)
    fit_share, test_share = work.share(work.fit, 0, 1), work.share(work.test, 0, 1)
    state = FitState.empty(work, fit_share)
    _fit(work, fit_share, state, lambda _: None, progress)
    fitted = solve(work.about, state)
    with _bar(progress, "score", work.test, test_share, work) as tick:
        parts = list(_scored(work, fitted, test_share, 0, tick))
    pieces = pieces_of(work.model, work.test)
    frames = {name: pa.concat_tables(rows_of(parts, name)).to_pandas() for name in work.about}
    return _summarise(description, state, fitted, parts, work.fit, work.test, pieces, frames)


def _summarise(
    description: dict[str, Any],
    state: FitState,
    fitted: Mapping[str, Fitted],
    parts: Sequence[Mapping[str, Tensor]],
    fit: Tokens,
    test: Tokens,
    pieces: dict[int, str],
    per_token: Mapping[str, pd.DataFrame],
) -> Survey:
    statistics = state.by_hook()
    n_fit = {hook: moments.n for hook, moments in statistics.items()}
    return Survey(
        table=score_table(description, parts, state.active, n_fit),
        per_token=per_token,
        error_maps={name: one.error_map for name, one in fitted.items()},
        norm_maps={name: one.norm_map for name, one in fitted.items()},
        statistics=statistics,
        fit=fit,
        test=test,
        skip=int(description["settings"]["skip"]),
        settings=description,
        pieces=pieces,
    )


def _run_fit(work: Work, own: Share, progress: bool) -> FitState:
    """Pass 1 over a share, on from its checkpoint."""
    share = work.share(work.fit, own.shard, own.of)
    state = own.load_fit(work.model.device) or FitState.empty(work, share)
    if not state.finished:
        _fit(work, share, state, own.save_fit, progress)
    return state


def _run_test(
    work: Work, own: Share, fitted: Mapping[str, Fitted], content: str, progress: bool
) -> Path:
    """Pass 2 over a share, on from its last part; the path of its manifest."""
    share = work.share(work.test, own.shard, own.of)
    done = own.parts_done(content)
    read = sum(len(part) for part in (work.parts(work.test, share) * len(work.rounds))[: len(done)])
    with _bar(progress, "score", work.test, share, work, read) as tick:
        for tensors in _scored(work, fitted, share, len(done), tick):
            done.append(own.save_part(len(done), tensors, content))
    return own.finish(done, content)


def _moments(state: FitState) -> dict[str, Tensor]:
    return {
        f"{i}/{hook}/{key}": tensor
        for (i, hook), statistics in state.statistics.items()
        for key, tensor in statistics.tensors().items()
    }


def _one_shard(
    work: Work,
    description: dict[str, Any],
    folder: Path,
    shard: tuple[int, int],
    resume: bool,
    force: bool,
    progress: bool,
) -> Path:
    number, of = shard
    if not 0 <= number < of:
        raise Refusal(
            f"shard is {shard}, expected (i, n) with i from 0 to n - 1; the first of 4 is (0, 4)."
        )
    base = folder / "shards"
    if not base.exists() and folder.exists() and any(folder.iterdir()):
        raise Refusal(f"{folder} has other things in it; pass a new folder, or one of shards.")
    if (base / "description.json").exists():
        compare(folder, description, read_json(base / "description.json"))
    begin(base, work, description)
    if others := otherwise_divided(base, of):
        raise Refusal(
            f"{base} has shards of another number than {of} (such as {min(others)}); run all with "
            "the same number, or use another folder."
        )
    own = Share(base, description["identity"], number, of)
    merged = base / "fit.safetensors"
    stage = "test" if merged.exists() else "fit"
    with locked(own.lock_path):
        begun = own.part_path(0).exists() if stage == "test" else own.fit_path.exists()
        if begun and not (resume or force):
            raise Refusal(
                f"Shard {number} of {of} of the {stage} pass is in {base} already; pass "
                "resume=True to go on with it or force=True to run it again."
            )
        if force:
            own.remove(stage)
        if stage == "fit":
            _run_fit(work, own, progress)
            return own.fit_path
        file = merged_fit(merged, description["identity"])
        fitted = solve(work.about, read_fit(file, work.model.device))
        return _run_test(work, own, fitted, file.content, progress)


def _among(
    ranks: Ranks,
    work: Work,
    description: dict[str, Any],
    folder: Path,
    resume: bool,
    force: bool,
    progress: bool,
) -> Survey:
    """One of several processes; the first also prepares the folder and writes the result."""
    state = folder / "state"
    progress = progress and ranks.rank == 0
    if ranks.rank > 0:
        ranks.agree(None)
        own = Share(state, description["identity"], ranks.rank, ranks.world)
        if not (folder / "survey.json").exists():
            _share_of_rank(ranks, work, own, progress)
        ranks.agree(None)
        return Survey.load(folder)
    with ExitStack() as stack:
        try:
            entering = entered(folder, description, resume, force, ranks.world)
            finished = stack.enter_context(entering)
            if not finished:
                begin(state, work, description)
        except Refusal as refusal:
            ranks.agree(refusal)
            raise
        ranks.agree(None)
        own = Share(state, description["identity"], 0, ranks.world)
        if not finished:
            fit, fitted, content = _share_of_rank(ranks, work, own, progress)
            manifests = state.glob("test-*.json")
            parts = collect_parts(manifests, description["identity"], content)
            _finish(folder, fit, fitted, parts, state)
            shutil.rmtree(state)
    ranks.agree(None)
    return Survey.load(folder)


def _share_of_rank(
    ranks: Ranks, work: Work, own: Share, progress: bool
) -> tuple[FitState, dict[str, Fitted], str]:
    """Both passes over this process' share, the moments of all added in between."""
    fit = ranks.merge(_run_fit(work, own, progress))
    content = hash_tensors(_moments(fit))
    fitted = solve(work.about, fit)
    _run_test(work, own, fitted, content, progress)
    # All parts are there when all processes have come here.
    ranks.agree(None)
    return fit, fitted, content


def _finish(
    folder: Path,
    state: FitState,
    fitted: Mapping[str, Fitted],
    parts: Sequence[Mapping[str, Tensor]],
    base: Path,
) -> None:
    """The survey of all parts, written into its folder."""
    # Versions and names are those of the run that began.
    description = read_description(base)
    fit, test = read_tokens(base / "tokens.safetensors", description["documents"])
    pieces = read_pieces(base / "pieces.json")
    found = _summarise(description, state, fitted, parts, fit, test, pieces, {})
    _write(folder, found, lambda name: rows_of(parts, name))


def _write(folder: Path, found: Survey, rows: Callable[[str], Iterable[Any]]) -> None:
    """Every file of a survey, survey.json last; `rows` gives tables of an SAE's tokens."""
    import pyarrow.parquet as pq

    outputs: list[str] = ["table.parquet", "table.csv", "tokens.safetensors", "pieces.json"]
    for kind in ("per_token", "statistics", "maps"):
        (folder / kind).mkdir(exist_ok=True)
    for name in found.table.index:
        outputs.append(file_of("per_token", name, "parquet"))
        with replacing(folder / outputs[-1]) as temporary:
            tables = iter(rows(name))
            first = next(tables)
            with pq.ParquetWriter(temporary, first.schema) as writer:
                writer.write_table(first)
                for table in tables:
                    writer.write_table(table)
        outputs.append(file_of("maps", name, "safetensors"))
        error_map, norm_map = found.error_maps[name], found.norm_maps[name]
        tensors = {
            f"{kind}/{key}": getattr(one, key)
            for kind, one in (("error", error_map), ("norm", norm_map))
            for key in ("weight", "bias")
        }
        told = {"format": FORMAT, "ridge": error_map.ridge, "n": error_map.n}
        write_tensors(folder / outputs[-1], tensors, told)
    for hook, statistics in found.statistics.items():
        outputs.append(file_of("statistics", hook, "safetensors"))
        statistics.save(folder / outputs[-1])
    write_tokens(folder / "tokens.safetensors", found.fit, found.test)
    write_json(folder / "pieces.json", {str(t): piece for t, piece in found.pieces.items()})
    with replacing(folder / "table.csv") as temporary:
        found.table.to_csv(temporary)
    with replacing(folder / "table.parquet") as temporary:
        found.table.to_parquet(temporary)
    hashes = {relative: sha256_of(folder / relative) for relative in outputs}
    write_json(folder / "survey.json", {**found.settings, "outputs": hashes})

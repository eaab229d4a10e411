"""The command `darkmatter`: survey a model's SAEs, merge shards, write reports and latent pages.

Exit status: 0; 2 with one sentence on stderr for input that cannot be used; 130 when interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from darkmatter._refusal import Refusal

# Everything else is imported where it is used: --help takes a fraction of a second.
if TYPE_CHECKING:
    from darkmatter.activations import Tokens
    from darkmatter.documents import Document
    from darkmatter.models import Model
    from darkmatter.suites import Suite

_TOKENS = 1_000_000
_DTYPES = ("float32", "bfloat16", "float16", "float64")
# SAEs that together take more than this, in float32, are surveyed one at a time.
_TOGETHER = 8 << 30
_COLUMNS = ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm", "l0", "dead", "cost", "kl")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, see `darkmatter --help`; returns the exit status."""
    options = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], Iterable[str]] = options.run
    try:
        _check_letters(sys.argv[1:] if arguments is None else arguments)
        for line in run(options):
            print(line, flush=True)
    except Refusal as refusal:
        _say(str(refusal))
        return 2
    except RuntimeError as error:
        # Here, without an import of torch for --help.
        from darkmatter.activations import lacks_memory

        if not lacks_memory(error):
            raise
        _say(
            "the device has no memory for this; pass --one-at-a-time, a shorter --context, --dtype "
            "bfloat16 or another --device, and --resume to go on."
        )
        return 2
    except KeyboardInterrupt:
        _say("interrupted; a survey goes on where it was with --resume.")
        return 130
    return 0


def _check_letters(arguments: Sequence[str]) -> None:
    """Names that Python could not decode are those that the libraries cannot open."""
    for argument in arguments:
        if any("\udc80" <= letter <= "\udcff" for letter in argument):
            raise Refusal(
                f"The locale of this shell has no letters for {argument!a}, expected UTF-8; set "
                "PYTHONUTF8=1 and run it again."
            )


def _say(sentence: str) -> None:
    print(f"darkmatter: {sentence}", file=sys.stderr, flush=True)


def _is_first() -> bool:
    """Whether this is the process of `torchrun` that writes and talks."""
    return int(os.environ.get("RANK", "0")) == 0


# What is done: each yields the lines to print


def _survey(options: argparse.Namespace) -> Iterator[str]:
    import darkmatter as dm

    _check_out(options, going_on=options.resume or options.force or options.shard is not None)
    given = _inputs(options)
    found: Any = dm.survey(
        given.model,
        given.saes,
        given.fit,
        given.test,
        skip=given.skip,
        seed=options.seed,
        share=options.share,
        resamples=options.resamples,
        downstream=options.downstream,
        folder=options.out,
        resume=options.resume,
        force=options.force,
        progress=True,
        shard=options.shard,
        one_at_a_time=given.one_at_a_time,
        precision=options.precision,
    )
    if isinstance(found, Path):
        yield f"When all shards of this pass are there: darkmatter merge {options.out}"
        yield f"Shard: {found}"
    elif _is_first():
        yield from _told(found, options.report)


def _told(survey: Any, report: bool) -> Iterator[str]:
    shown = [column for column in _COLUMNS if column in survey.table]
    yield survey.table[shown].round(4).to_string()
    yield f"Table: {survey.folder / 'table.csv'}"
    if report:
        yield f"Report: {survey.report()}"


def _merge(options: argparse.Namespace) -> Iterator[str]:
    import darkmatter as dm

    found: Any = dm.merge(options.folder, options.out, options.force)
    if isinstance(found, Path):
        yield "Now run every shard again, for the test pass, and merge again."
        yield f"Fit pass: {found}"
    else:
        yield from _told(found, options.report)


def _report(options: argparse.Namespace) -> Iterator[str]:
    import darkmatter as dm

    yield f"Report: {dm.Survey.load(options.folder).report(options.out)}"


def _suites(_: argparse.Namespace) -> Iterator[str]:
    from darkmatter.suites import list_suites

    table = [("suite", "download", "memory", "SAEs", "here", "licence to accept", "from")]
    for row in list_suites():
        some = f"{row['saes_cached']} SAEs" if row["saes_cached"] else "no"
        table.append(
            (
                row["name"],
                "none" if row["source"] == "embedded" else f"{row['mebibytes'] / 1024:.1f} GiB",
                f"{row['memory_gib']} GiB",
                str(row["saes"]),
                "yes" if row["cached"] else some,
                row["licence"] or "none",
                row["source"],
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _latents(options: argparse.Namespace) -> Iterator[str]:
    import darkmatter as dm

    _check_out(options, going_on=options.force)
    given = _inputs(options)
    if len(given.saes) != 1:
        raise Refusal(
            f"Pages of latents are of one SAE, but these are {len(given.saes)} "
            f"({', '.join(given.saes)}); name one with --sae."
        )
    (name,) = given.saes
    error_map: Any = None
    if options.survey is not None:
        maps = dm.Survey.load(options.survey).error_maps
        if name not in maps:
            raise Refusal(
                f"The survey in {options.survey} has no SAE {name!r}, but {', '.join(maps)}; pass "
                "one that has it."
            )
        error_map = maps[name]

    from darkmatter.latents import write_latents

    page = write_latents(
        given.model,
        given.saes[name],
        given.test or given.fit,
        options.out,
        options.latent,
        given.skip,
        options.contexts,
        error_map,
    )
    yield f"Pages: {page}"


# From options to arguments


@dataclass(frozen=True)
class _Inputs:
    """The arguments of `dm.survey`; without `test`, fit holds all documents."""

    model: Model
    saes: Mapping[str, Any]
    fit: Tokens
    test: Tokens | None
    skip: int
    one_at_a_time: bool


def _check_out(options: argparse.Namespace, going_on: bool) -> None:
    """What a survey would refuse after minutes of opening models is refused at once."""
    out: Path = options.out
    if out.exists() and not out.is_dir():
        raise Refusal(f"{out} is a file, expected a folder for the result; pass another --out.")
    if _is_first() and not going_on and out.exists() and {path.name for path in out.iterdir()}:
        go_on = "--resume to go on with what is in it, " if hasattr(options, "resume") else ""
        raise Refusal(
            f"{out} is not empty, expected a new folder; pass {go_on}--force to replace it, or "
            "another --out."
        )


def _inputs(options: argparse.Namespace) -> _Inputs:
    import torch

    documents = _documents(options)
    given = [documents is not None, options.tokens_file is not None]
    if all(given):
        raise Refusal("Text was named twice; choose one of --text, --dataset and --tokens-file.")
    if options.suite is not None and getattr(options, "remote", False):
        raise Refusal("A suite is opened here; name its model with --model to survey it --remote.")
    if options.suite is None and not options.sae:
        raise Refusal("No SAE was named; name one or more with --sae, or a --suite.")
    if options.suite is None and not any(given):
        raise Refusal(
            "No text was named; name some with --text FILES, --dataset NAME or --tokens-file FILE."
        )
    device, dtype = _device(options.device), getattr(torch, options.dtype)
    fit: Tokens | None = None
    test: Tokens | None = None
    if options.suite is None:
        from darkmatter.autoencoders import open_autoencoders
        from darkmatter.models import open_model

        remote = getattr(options, "remote", False)
        model = open_model(options.model, options.backend, device, dtype, remote=remote)
        saes: Any = open_autoencoders(options.sae, model, options.hook)
        hooks, widths, skip = saes.hooks, saes.widths, 32
    else:
        from darkmatter.suites import load_suite
        from darkmatter.survey import Lazy

        suite = load_suite(options.suite, device, dtype, options.suite_text)
        rows = _chosen(suite, options.sae, options.hook)
        model = suite.model if options.backend == "bridge" else suite.open_model(options.backend)
        saes = Lazy(rows, lambda name: suite.saes[name])
        hooks = {name: row["hook"] for name, row in rows.items()}
        widths = {name: int(row["d_sae"]) for name, row in rows.items()}
        skip = suite.skip
        if not any(given):
            fit, test = (suite.tokens(split, options.seed) for split in ("fit", "test"))
            if options.tokens is not None:
                most = options.tokens // fit.tokens.shape[1]
                fit = _first(fit, options.share * most)
                test = _first(test, (1 - options.share) * most)
    if documents is not None:
        fit = _tokenised(options, model, saes, documents)
    elif options.tokens_file is not None:
        from darkmatter.documents import read_tokens

        fit = read_tokens(options.tokens_file)
        if options.tokens is not None:
            fit = _first(fit, options.tokens / fit.tokens.shape[1])
    assert fit is not None
    size = sum(8 * model.width(hooks[name]) * widths[name] for name in saes)
    return _Inputs(
        model,
        saes,
        fit,
        test,
        skip if options.skip is None else options.skip,
        getattr(options, "one_at_a_time", False) or size > _TOGETHER,
    )


def _device(name: str) -> str:
    """The device that was named, under torchrun the GPU of this process."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if name == "cuda" else name


def _chosen(
    suite: Suite, patterns: Sequence[str] | None, hook: str | None
) -> dict[str, dict[str, Any]]:
    """What the suite says of the SAEs that were asked for; else all, or those of the width grid."""
    from darkmatter.suites import HubSuite

    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in suite.manifest["saes"]}
    if patterns:
        names = [n for n in rows if any(fnmatchcase(n, pattern) for pattern in patterns)]
    else:
        names = suite.grid("width") if isinstance(suite, HubSuite) and hook is None else list(rows)
    found = {name: rows[name] for name in names if hook in (None, rows[name]["hook"])}
    if not found:
        raise Refusal(
            f"Suite {suite.name!r} has no SAE {' or '.join(patterns or ['at all'])}"
            f"{f' at {hook}' if hook else ''}; it has {len(rows)}, such as "
            f"{', '.join(list(rows)[:3])}."
        )
    return found


def _first(tokens: Tokens, contexts: float) -> Tokens:
    """As many contexts, one at least."""
    import torch

    return tokens.select(torch.arange(min(tokens.n_contexts, max(1, int(contexts)))))


def _documents(options: argparse.Namespace) -> Iterator[Document] | None:
    """The text that was named, if any, before a model is opened."""
    from darkmatter.documents import read_dataset, read_documents

    seed = options.seed if options.shuffle else None
    if options.text and options.dataset is not None:
        raise Refusal("Text was named twice; choose one of --text, --dataset and --tokens-file.")
    if options.text:
        separator: str | None = options.separator
        if separator is not None:
            separator = separator.replace("\\n", "\n").replace("\\t", "\t")
        files = [file for several in options.text for file in several]
        return read_documents(files, options.column, separator, seed)
    if options.dataset is not None:
        return read_dataset(options.dataset, options.column, options.subset, options.split, seed)
    return None


def _tokenised(
    options: argparse.Namespace,
    model: Model,
    saes: Mapping[str, Any],
    documents: Iterator[Document],
) -> Tokens:
    from darkmatter.documents import tokenise
    from darkmatter.suites.processing import processing_of

    bos: bool | None = options.bos
    if bos is None and not processing_of(next(iter(saes.values()))).prepend_bos:
        bos = False
    tokens = tokenise(
        model,
        documents,
        options.context,
        _TOKENS if options.tokens is None else options.tokens,
        bos,
        options.per_document,
    )
    if len(tokens.names) < 4:
        raise Refusal(
            f"The first {tokens.n_tokens} tokens are of {len(tokens.names)} documents, expected at "
            "least 4, as no document is both fitted and scored; name more files, cut them up with "
            "--separator, or take fewer contexts of each with --per-document."
        )
    if _is_first():
        _say(
            f"{tokens.n_tokens} tokens in {tokens.n_contexts} contexts of {len(tokens.names)} "
            f"documents; {tokens.short_documents} documents were shorter than a context, "
            f"{tokens.dropped_tokens} tokens were left over."
        )
    return tokens


# Options


def _count(text: str) -> int:
    """1000000, 1_000_000, 1e6, 250k or 1.5M."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    value = float(number) * unit
    if value < 1 or value != int(value):
        raise ValueError
    return int(value)


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    return int(number), int(of)


# What argparse calls them when they fail: "invalid number of tokens value: 'x'".
_count.__name__, _shard.__name__ = "number of tokens (1000000, 250k, 1.5M)", "I/N (such as 0/4)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="darkmatter",
        description="What sparse autoencoders miss in a language model's activations.",
        epilog="darkmatter survey --suite pydocs --out DIR needs no network and takes minutes.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(
        name: str, run: Callable[[argparse.Namespace], Iterator[str]], help: str, more: str = ""
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=help,
            description=f"{help[0].upper()}{help[1:]}.",
            epilog=more,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    survey = command("survey", _survey, "split the error of SAEs and score both parts", _EXAMPLES)
    _add_inputs(survey)
    _add_output(survey, "folder for the survey (new, or with --resume or --force)")
    work = survey.add_argument_group("work")
    work.add_argument("--resume", action="store_true", help="go on with what is in --out")
    work.add_argument(
        "--share",
        type=float,
        default=0.6,
        metavar="S",
        help="share of the documents to fit on, the rest is scored (0.6)",
    )
    work.add_argument(
        "--resamples",
        type=int,
        default=1000,
        metavar="N",
        help="resamples of the test documents, for 95%% intervals (1000)",
    )
    work.add_argument(
        "--no-downstream",
        dest="downstream",
        action="store_false",
        help="no cross entropy and KL of the spliced model, most of the time taken",
    )
    work.add_argument(
        "--remote",
        action="store_true",
        help="sum up on NDIF, which runs --model (--backend nnsight, a key in NDIF_API_KEY)",
    )
    work.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="one run of the model for each SAE (where together they exceed 8 GiB)",
    )
    work.add_argument(
        "--precision",
        choices=("float64", "float32"),
        default="float64",
        help="products of the fit; float32 for devices that are slow at float64 (default: float64)",
    )
    work.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="only share I (from 0) of N of a pass; first all of the fit pass, then "
        "`darkmatter merge`, all of the test pass, `darkmatter merge`",
    )
    _add_no_report(work)

    merge = command("merge", _merge, "add the shards of a survey, after each of its two passes")
    merge.add_argument("folder", type=Path, metavar="DIR", help="the --out of the shards")
    merge.add_argument("--out", type=Path, metavar="DIR", help="folder for the survey (DIR)")
    merge.add_argument("--force", action="store_true", help="replace a survey that is there")
    _add_no_report(merge)

    report = command("report", _report, "make the figures and report.html of a survey again")
    report.add_argument("folder", type=Path, metavar="DIR", help="folder of the survey")
    report.add_argument("--out", type=Path, metavar="DIR", help="folder for the report (DIR)")

    command("suites", _suites, "list models with SAEs that can be named, and what is here of them")

    latents = command("latents", _latents, "write a page for each latent of one SAE, and an index")
    _add_inputs(latents)
    _add_output(latents, "folder for the pages (new, or with --force)")
    pages = latents.add_argument_group("pages")
    pages.add_argument(
        "--latent",
        type=int,
        nargs="+",
        metavar="I",
        help="numbers of latents, from 0 (a choice over frequencies)",
    )
    pages.add_argument(
        "--contexts", type=int, default=20, metavar="N", help="contexts shown on a page (20)"
    )
    pages.add_argument(
        "--survey",
        type=Path,
        metavar="DIR",
        help="a survey of this SAE, for how much of a direction is linear error",
    )
    return parser


_EXAMPLES = """examples:
  darkmatter survey --suite pydocs --out pydocs-survey
  darkmatter survey --model openai-community/gpt2 \\
      --sae gpt2-small-res-jb/blocks.8.hook_resid_pre \\
      --dataset NeelNanda/pile-10k --context 128 --tokens 2M --out survey
  darkmatter survey --model FOLDER --sae SAE_FOLDER --text corpus/*.jsonl.gz --out survey
  darkmatter survey --model google/gemma-2-2b --sae params.npz --hook blocks.20.hook_resid_post \\
      --text texts/ --dtype bfloat16 --out survey
  torchrun --nproc-per-node 8 -m darkmatter survey ... --out survey"""


def _add_no_report(parser: Any) -> None:
    parser.add_argument(
        "--no-report",
        dest="report",
        action="store_false",
        help="tables without figures and report.html",
    )


def _add_inputs(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("model and SAEs")
    which = what.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--suite",
        metavar="NAME",
        help="model, SAEs and text by one name, or a suite's folder; see `darkmatter suites`",
    )
    which.add_argument(
        "--model",
        metavar="NAME",
        help="hub name or folder of a causal language model in safetensors",
    )
    what.add_argument(
        "--sae",
        action="append",
        metavar="SPEC",
        help="RELEASE/ID of sae-lens (* and ? in ID match several), a folder of one "
        "or more SAEs, or a Gemma Scope .npz; may be repeated. With --suite: "
        "names of its SAEs (all, or the width grid of those on the hub)",
    )
    what.add_argument(
        "--hook",
        metavar="NAME",
        help="hook point, where an SAE does not say it "
        "(blocks.8.hook_resid_post); with --suite: only SAEs of this one",
    )
    what.add_argument(
        "--backend",
        choices=("bridge", "nnsight"),
        default="bridge",
        help="library that runs the model: transformer-lens' bridge or nnsight (bridge)",
    )
    what.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1 or mps (cuda where there is one)"
    )
    what.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="float32",
        help="of the model's weights; moments are always float64 (float32)",
    )

    text = parser.add_argument_group("text")
    text.add_argument(
        "--text",
        action="append",
        nargs="+",
        metavar="FILE",
        help="files or folders, plain or .gz, .jsonl or .parquet; a document is a "
        "plain file, a line or a row",
    )
    text.add_argument("--dataset", metavar="NAME", help="data set of the hub, streamed")
    text.add_argument(
        "--tokens-file",
        type=Path,
        metavar="FILE",
        help="safetensors with tokens [contexts, positions] and document [contexts]",
    )
    text.add_argument(
        "--column", default="text", metavar="NAME", help="field or column of the text (text)"
    )
    text.add_argument(
        "--separator",
        metavar="TEXT",
        help="what parts the documents of plain files, \\n for a new line (none)",
    )
    text.add_argument("--subset", metavar="NAME", help="configuration of the data set (its own)")
    text.add_argument("--split", default="train", metavar="NAME", help="of the data set (train)")
    text.add_argument(
        "--suite-text",
        choices=("pydocs", "own"),
        default="pydocs",
        help="text of a hub's suite: the embedded one, or the data set of the paper (pydocs)",
    )
    text.add_argument(
        "--shuffle",
        action="store_true",
        help="read files, or rows of a data set, in an order drawn with --seed",
    )
    text.add_argument(
        "--tokens",
        type=_count,
        metavar="N",
        help="tokens at most, such as 250k or 2M (1M; all of a suite or token file)",
    )
    text.add_argument(
        "--context",
        type=int,
        metavar="P",
        help="tokens in a context, BOS included (256, or the model's longest)",
    )
    text.add_argument(
        "--per-document", type=int, metavar="N", help="contexts of one document at most (no limit)"
    )
    text.add_argument(
        "--bos",
        action=argparse.BooleanOptionalAction,
        help="whether contexts begin with BOS (as the first SAE was trained)",
    )
    text.add_argument(
        "--skip",
        type=int,
        metavar="P",
        help="tokens at the start of a context that are not measured (32; a suite's own)",
    )


def _add_output(parser: argparse.ArgumentParser, out: str) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, required=True, metavar="DIR", help=out)
    output.add_argument("--force", action="store_true", help="replace what is there")
    output.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of the split of documents, the resampling and --shuffle (0)",
    )


if __name__ == "__main__":
    sys.exit(main())

"""`python -m darkmatter.book`: lint, execute, check and build the book, and convert chapters."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from darkmatter._refusal import Refusal
from darkmatter.book import editions, lint, notebooks, printed, results, slides
from darkmatter.book.execution import differences, execute
from darkmatter.book.paths import Book, open_book


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when all is well, 1 with sentences on stderr when something is wrong.

    2 when the machine lacks a program that the command needs.
    """
    options = _parser().parse_args(arguments)
    try:
        found = _run(options)
    except printed.MissingProgram as error:
        print(error, file=sys.stderr)
        return 2
    except Refusal as error:
        found = [str(error)]
    for problem in found:
        print(problem, file=sys.stderr)
    return 1 if found else 0


def _run(options: argparse.Namespace) -> list[str]:
    if options.command == "convert":
        _convert(options.source, options.target, options.root)
        return []
    book = open_book(options.root)
    chosen: str | None = getattr(options, "chapter", None)
    match options.command:
        case "lint":
            return lint.lint(book, chosen)
        case "execute":
            _execute(book, options, chosen, _parameters(options), options.out)
        case "check":
            return results.check(book, chosen, options.out, options.suite)
        case "build":
            return _build(book, options)
        case "render":
            _render(book)
        case "student":
            for path in editions.write_student_editions(book):
                print(path)
        case "slides":
            for path in slides.write_decks(book):
                print(path)
        case "epub" | "pdf" | "linkcheck":
            return _printed(book, options)
        case "atlas":
            from darkmatter.book.atlas import add_entry
            from darkmatter.survey import Survey

            print(add_entry(book, Survey.load(options.survey), options.name, options.model))
        case "results":
            if not options.update:
                return results.check(book, suite=options.suite)
            print(results.update(book, options.suite))
        case _:
            with tempfile.TemporaryDirectory() as work:
                return differences(book, options.chapter, _parameters(options), Path(work))
    return []


def _build(book: Book, options: argparse.Namespace) -> list[str]:
    if found := lint.lint(book):
        return found
    _execute(book, options)
    if found := results.check(book):
        return found
    _render(book)
    return []


def _render(book: Book) -> None:
    from darkmatter.book.rendering import render
    from darkmatter.book.staging import stage

    stage(book)
    print(f"The book is at {render(book) / 'index.html'}")


def _printed(book: Book, options: argparse.Namespace) -> list[str]:
    from darkmatter.book.staging import stage

    if options.command == "pdf":
        printed.require_latex()
    _execute(book, options)
    stage(book)
    if options.command == "linkcheck":
        return printed.broken_links(book)
    print(printed.write_pdf(book) if options.command == "pdf" else printed.write_epub(book))
    return []


def _execute(
    book: Book,
    options: argparse.Namespace,
    only: str | None = None,
    parameters: dict[str, object] | None = None,
    out: Path | None = None,
) -> None:
    for run in execute(book, only, parameters, out, options.force, options.jobs):
        took = f"{run.seconds:.0f} s, {run.peak_bytes / 2**30:.2f} GiB"
        print(f"{run.path.name}: {'up to date, took ' if run.skipped else ''}{took}", flush=True)


def _convert(source: Path, target: Path, root: Path) -> None:
    if source.suffix == ".ipynb":
        notebooks.write_text(target, notebooks.to_percent(notebooks.read_notebook(source)))
        return
    if not source.is_file() or target.suffix != ".ipynb":
        raise Refusal(
            f"expected a percent-format text and a notebook to write, or the other way round, "
            f"found {source} and {target}; give the source first"
        )
    text = source.read_text(encoding="utf-8")
    repository = notebooks.repository_of(root / "_config.yml")
    notebooks.write_notebook(notebooks.from_percent(text, repository), target)


def _parameters(options: argparse.Namespace) -> dict[str, object]:
    """Parameters given on the command line: `--seed`, and any `-p name value`."""
    given: dict[str, object] = {name: _number(value) for name, value in options.parameter}
    if options.seed is not None:
        given["seed"] = options.seed
    return given


def _number(text: str) -> object:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m darkmatter.book", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path(), help="folder that holds book/")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help)

    def with_chapter(one: argparse.ArgumentParser, required: bool = False) -> None:
        one.add_argument("--chapter", required=required, help='two digits, such as "02"')

    def with_force_and_jobs(one: argparse.ArgumentParser) -> None:
        one.add_argument("--force", action="store_true", help="execute even when up to date")
        one.add_argument(
            "--jobs", type=int, default=2, help="chapters to run at a time (2; each takes 2 GiB)"
        )

    def with_parameters(one: argparse.ArgumentParser) -> None:
        one.add_argument("--seed", type=int, default=None)
        one.add_argument(
            *("-p", "--parameter"), nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
        )

    with_chapter(command("lint", "check the rules for committed chapters"))
    run = command("execute", "execute chapters into _build/book, skipping what is up to date")
    with_chapter(run)
    with_parameters(run)
    with_force_and_jobs(run)
    run.add_argument("--out", type=Path, default=None, help="another folder, for another seed")
    checked = command("check", "compare executed chapters with claims.yml and the reference")
    with_chapter(checked)
    checked.add_argument("--out", type=Path, default=None)
    checked.add_argument("--suite", default="pydocs")
    with_force_and_jobs(command("build", "lint, execute, check, stage and render into _build/html"))
    command("render", "stage and render the chapters as they were executed last")
    command("student", "write the student edition into book/student")
    command("slides", "write a deck of slides for each part into _build/slides")
    with_force_and_jobs(command("epub", "execute, stage and write _build/epub"))
    with_force_and_jobs(command("pdf", "the same as a PDF, where LaTeX is installed"))
    with_force_and_jobs(command("linkcheck", "name the links to other sites that are dead"))
    entry = command("atlas", "write the atlas entry of a survey's folder")
    entry.add_argument("survey", type=Path, help="the folder of a finished survey")
    entry.add_argument("--name", required=True, help="of the entry, such as gpt2-small-res-jb")
    entry.add_argument("--model", help="what to call the model (its hub name or last folder)")
    written = command("results", "compare the executed book with the reference, or update it")
    written.add_argument("--update", action="store_true", help="write book/results")
    written.add_argument("--suite", default="pydocs")
    again = command("reproduce", "execute a chapter twice and compare its records bit for bit")
    with_chapter(again, required=True)
    with_parameters(again)
    turned = command("convert", "percent-format text to a notebook, or a notebook to text")
    turned.add_argument("source", type=Path)
    turned.add_argument("target", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())

"""python -m darkmatter.suites.pydocs: rebuild the embedded suite from the installed packages."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from darkmatter._refusal import Refusal
from darkmatter.suites.pydocs.recipe import SuiteRecipe, build


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and build; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m darkmatter.suites.pydocs",
        description="Rebuild the suite pydocs: corpus, tokenizer, model, SAEs, tokens, card. "
        "A rebuild that was interrupted goes on where it was when given the same --work.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the finished suite")
    parser.add_argument("--work", type=Path, required=True, help="folder for the stages")
    parser.add_argument(
        "--toy", action="store_true", help="the same recipe at a size of seconds, to try it"
    )
    options = parser.parse_args(arguments)
    recipe = SuiteRecipe.toy() if options.toy else SuiteRecipe()

    def log(line: str) -> None:
        sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")

    try:
        build(recipe, options.work, options.out, log)
    except Refusal as refusal:
        sys.stderr.write(f"{refusal}\n")
        return 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

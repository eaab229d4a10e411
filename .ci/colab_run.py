"""Run a student and a solved chapter with the installed wheel, in a folder without the repository.

The solved chapter must run through. In the student edition every exercise must say that it is still
empty, and nothing else may fail. Called by `.ci/colab-check`.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

SECONDS_A_CELL = 600
EMPTY = "is still empty"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--solved", type=Path, required=True)
    options = parser.parse_args()
    import darkmatter

    place = Path(darkmatter.__file__).resolve()
    if "site-packages" not in place.parts:
        return told([f"expected the installed wheel, found darkmatter at {place}"])
    from darkmatter.book import editions, notebooks

    student = Path("student") / options.student.name
    made = editions.student_edition(notebooks.read_notebook(options.student))
    notebooks.write_notebook(made, student)
    found = [f"{options.solved.name}: {one}" for one in failures(options.solved, solved=True)]
    found += [f"{student.name} (student): {one}" for one in failures(student, solved=False)]
    return told(found)


def failures(path: Path, solved: bool) -> list[str]:
    """Cells that failed although they should not, and exercises that did not fail though empty."""
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    client = NotebookClient(
        notebook, timeout=SECONDS_A_CELL, allow_errors=True, resources={"metadata": {"path": "."}}
    )
    client.execute()
    found: list[str] = []
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type != "code":
            continue
        errors = [one for one in cell.outputs if one.output_type == "error"]
        is_check = cell.source.startswith("book.check(")
        if is_check and not solved:
            if not errors or EMPTY not in errors[0].evalue:
                told_instead = errors[0].evalue if errors else "nothing"
                found.append(f"cell {number}: an empty exercise says {told_instead!r}")
        elif errors and (solved or errors[0].ename != "NotImplementedError"):
            found.append(f"cell {number}: {errors[0].ename}: {errors[0].evalue[:300]}")
    print(f"{path}: {time.monotonic() - start:.0f} s, {len(found)} problems", flush=True)
    return found


def told(problems: list[str]) -> int:
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())

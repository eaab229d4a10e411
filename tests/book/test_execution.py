"""Executing chapters: in a kernel, once, measured; what is wrong is refused before or named."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nbformat import v4

from darkmatter._refusal import Refusal
from darkmatter.book import claims as ledger
from darkmatter.book import execution, notebooks
from darkmatter.book.claims import Record
from darkmatter.book.execution import ChapterFailure, execute
from darkmatter.book.notebooks import tags_of
from darkmatter.book.paths import Book
from tests.book.minibook import CLAIMS, chapter_text
from tests.surveys import ended, forked

MakeBook = Callable[..., Book]

# A chapter that records without importing torch: a kernel of one second instead of several.
LIGHT = """# %% tags=["parameters"]
suite = "pydocs"
seed = 0

# %%
import random
from IPython.display import display
generator = random.Random(SEED)
mime = "application/vnd.darkmatter.record+json"
record = {"id": "a", "value": generator.random(), "interval": None, "suite": suite, "seed": seed,
          "chapter": "99"}
display({mime: record}, raw=True)
"""


def only_execution(*arguments: Any, **named: Any) -> execution.Execution:
    (run,) = execute(*arguments, **named)
    return run


def test_an_executed_chapter_is_measured_and_ready_for_the_page(executed_once: Book) -> None:
    (path,) = executed_once.executed.glob("*.ipynb")
    notebook = notebooks.read_notebook(path)
    records = {record.id: record for record in ledger.records_of(notebook)}
    assert records["mini-fvu"] == Record("mini-fvu", 0.311, (0.305, 0.317), "pydocs", 0, "99")
    assert set(records) == {"mini-fvu", "mini-random", "mini-shuffled", "mini-falling"}
    run = notebook.metadata["darkmatter"]
    assert run["parameters"] == {"suite": "pydocs", "seed": 0}
    # A kernel that imports torch takes at least a tenth of a second and 50 MB.
    assert run["seconds"] > 0.1
    assert run["peak_bytes"] > 50e6
    assert run["versions"]["torch"]
    figures = [cell.metadata.mystnb for cell in notebook.cells if "image" in
               cell.metadata.get("mystnb", {})]  # fmt: skip
    assert figures == [
        {
            "code_prompt_show": "Show the code of this figure",
            "image": {"alt": "Line chart: the error falls steadily with width."},
            "figure": {
                "caption": "Error against width, 0.311 (0.305 to 0.317) at first.",
                "name": "fig-mini",
            },
        }
    ]
    assert "papermill" not in json.dumps(notebook.metadata)
    solutions = [cell for cell in notebook.cells if "solution" in tags_of(cell)]
    assert all("hide-input" in tags_of(cell) for cell in solutions)


def test_a_chapter_that_is_up_to_date_is_skipped_until_something_changes(
    executed_book: Book,
) -> None:
    before = (executed_book.executed / "99_mini.ipynb").stat().st_mtime_ns
    run = only_execution(executed_book)
    assert run.skipped
    assert run.seconds > 0
    assert (executed_book.executed / "99_mini.ipynb").stat().st_mtime_ns == before
    path = executed_book.source / "99_mini.ipynb"
    parameters = {"suite": "pydocs", "seed": 0}
    hashes = {execution.content_hash(executed_book, path, parameters)}
    hashes.add(execution.content_hash(executed_book, path, parameters | {"seed": 1}))
    notebooks.write_text(executed_book.claims, CLAIMS.replace("0.313", "0.314"))
    hashes.add(execution.content_hash(executed_book, path, parameters))
    notebooks.write_text(executed_book.claims, CLAIMS.replace("0.01", "0.02"))
    assert execution.content_hash(executed_book, path, parameters) in hashes
    text = chapter_text(with_checks=False).replace("0.311", "0.312")
    notebook = notebooks.from_percent(text, "https://github.com/somebody/book")
    notebooks.write_notebook(notebook, path)
    hashes.add(execution.content_hash(executed_book, path, parameters))
    assert len(hashes) == 4


def test_an_unknown_parameter_is_refused_before_anything_runs(make_book: MakeBook) -> None:
    book = make_book()
    with pytest.raises(Refusal, match="parameters seed, suite, found 'sed'"):
        list(execute(book, parameters={"sed": 1}))
    assert not book.executed.exists()


@pytest.mark.parametrize("line", ['suite = "pydocs"\n', "seed = 0\n"])
def test_a_removed_parameter_is_refused_before_anything_runs(
    make_book: MakeBook, line: str
) -> None:
    with pytest.raises(Refusal, match="found none that sets " + line.split()[0]):
        list(execute(make_book(chapter_text().replace(line, ""))))
    untagged = chapter_text().replace('tags=["parameters"]', "")
    with pytest.raises(Refusal, match="found none that sets suite"):
        list(execute(make_book(untagged)))


def test_a_failing_chapter_names_its_cell_and_is_kept(make_book: MakeBook) -> None:
    book = make_book(LIGHT.replace("SEED", "1 / 0"))
    with pytest.raises(ChapterFailure, match=r"99_mini.ipynb failed in cell 2 .*ZeroDivisionErr"):
        list(execute(book, parameters={"seed": 7}))
    kept = notebooks.read_notebook(book.root / "_build" / "failed" / "99_mini.ipynb")
    assert any("ZeroDivisionError" in str(cell.get("outputs")) for cell in kept.cells)
    assert list(book.executed.iterdir()) == []


def test_a_killed_execution_leaves_no_half_chapter_under_its_name(make_book: MakeBook) -> None:
    """Nor does a surrounding that has no home, no UTF-8 and another country's habits."""
    waiting = "import time, pathlib; time.sleep(0 if pathlib.Path('go').exists() else 60)\n"
    text = LIGHT.replace("SEED", "seed").replace("import random\n", f"import random\n{waiting}")
    book = make_book(text)
    command = [sys.executable, "-m", "darkmatter.book", "--root", str(book.root), "execute"]
    odd = {
        "HOME": "/proc/nowhere", "LC_ALL": "tr_TR.UTF-8", "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(execution.PACKAGE.parent),
    }  # fmt: skip
    run = subprocess.Popen([*command, "--jobs", "1"], env={**os.environ, **odd})
    until = time.monotonic() + 60
    while not list(book.executed.glob(".*")) and time.monotonic() < until:
        time.sleep(0.05)
    run.kill()
    run.wait()
    assert execution.executed_notebooks(book.executed) == {}
    assert not list(book.executed.glob("[0-9]*"))
    (book.source / "go").touch()
    done = subprocess.run(
        [*command, "--jobs", "1"], env={**os.environ, **odd}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (record,) = ledger.records_of(execution.executed_notebooks(book.executed)["99"])
    assert record.value == random.Random(0).random()


def test_a_full_disk_is_one_sentence_and_leaves_nothing(make_book: MakeBook) -> None:
    book = make_book(LIGHT.replace("SEED", "seed"))

    def full() -> None:
        # No file may be longer than this, which is the same error in writing.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2500, 2500))
        try:
            list(execute(book))
        except Refusal as refusal:
            (book.root / "said").write_text(str(refusal))

    assert ended(forked(full)) == 0
    said = (book.root / "said").read_text()
    assert re.search(r"99_mini\.ipynb cannot be written \(.*too large.*make room", said)
    assert list(book.executed.iterdir()) == []


def test_two_chapters_at_a_time_end_as_one_after_the_other(make_book: MakeBook) -> None:
    book = make_book(LIGHT.replace("SEED", "seed"))
    light = book.source / "99_mini.ipynb"
    shutil.copyfile(light, book.source / "97_mini.ipynb")
    broken = notebooks.read_notebook(light)
    broken.cells[1].source = "1 / 0"
    notebooks.write_notebook(broken, book.source / "98_mini.ipynb")
    runs = execute(book, jobs=2)
    assert next(runs).chapter == "97"
    with pytest.raises(ChapterFailure, match=r"98_mini\.ipynb failed in cell 2"):
        next(runs)
    (book.source / "98_mini.ipynb").unlink()
    assert next(execute(book, jobs=2)).skipped
    alone = only_execution(book, "99", out=book.root / "alone")
    together = [notebooks.read_notebook(p) for p in (alone.path, book.executed / "99_mini.ipynb")]
    assert ledger.records_of(together[0]) == ledger.records_of(together[1])


def test_the_same_seed_gives_the_same_records_and_no_seed_does_not(
    make_book: MakeBook, tmp_path: Path
) -> None:
    seeded = make_book(LIGHT.replace("SEED", "seed"))
    assert execution.differences(seeded, "99", {"seed": 3}, tmp_path / "seeded") == []
    first = execution.executed_notebooks(tmp_path / "seeded" / "first")["99"]
    assert ledger.records_of(first)[0].seed == 3
    injected = [cell for cell in first.cells if "remove-cell" in tags_of(cell)]
    assert [cell.source.strip().split("\n")[-1] for cell in injected] == ["seed = 3"]
    unseeded = make_book(LIGHT.replace("SEED", ""))
    (difference,) = execution.differences(unseeded, "99", {}, tmp_path / "unseeded")
    assert difference.startswith("a: the first run gave 0.")


def test_compare_names_what_is_missing_and_what_differs() -> None:
    ours = [Record("a", 0.1, None, "s", 0, "99"), Record("b", 1.0, None, "s", 0, "99")]
    theirs = [Record("a", 0.1 + 1e-16, None, "s", 0, "99"), ours[1]]
    assert execution.compare(ours, ours) == []
    # One part in 10^16 is a difference when bits are compared (and 0.1 + 1e-16 is another float).
    assert execution.compare(ours, theirs) == [
        f"a: the first run gave 0.1 None, the second {0.1 + 1e-16!r} None"
    ]
    assert execution.compare(ours, ours[:1]) == [
        "b: the first run gave 1.0 None, the second nothing"
    ]


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([{}], "every image to come from book.show"),
        ([{"darkmatter": {"alt": "a", "caption": "c", "name": "n"}}] * 2, "one figure a cell"),
    ],
)
def test_images_without_text_or_in_pairs_are_refused(outputs: list[Any], message: str) -> None:
    made = [
        v4.new_output("display_data", data={"image/png": ""}, metadata=metadata)
        for metadata in outputs
    ]
    notebook = v4.new_notebook(cells=[v4.new_code_cell("draw()", outputs=made)])
    with pytest.raises(ChapterFailure, match=message):
        execution.finish(notebook, "99_mini.ipynb")


def test_a_view_of_text_is_a_figure_of_its_cell() -> None:
    words = {"alt": "A text with marks.", "caption": "A text.", "name": "fig-text"}
    made = v4.new_output(
        "display_data",
        data={"text/html": "<fieldset></fieldset>", "text/plain": "a text"},
        metadata={"darkmatter": words},
    )
    notebook = v4.new_notebook(cells=[v4.new_code_cell("view()", outputs=[made])])
    execution.finish(notebook, "99_mini.ipynb")
    figure = notebook.cells[0].metadata["mystnb"]["figure"]
    assert figure == {"caption": "A text.", "name": "fig-text"}


def test_what_a_cell_prints_stands_in_one_box_and_never_above_its_figure() -> None:
    def printed(text: str) -> Any:
        return v4.new_output("stream", name="stdout", text=text)

    def recorded(id: str) -> Any:
        data = {ledger.RECORD_MIME: {"id": id}, "text/plain": f"recorded {id} = 1"}
        return v4.new_output("display_data", data=data)

    words = {"alt": "A text with marks.", "caption": "A text.", "name": "fig-text"}
    figure = v4.new_output("display_data", data={"image/png": ""}, metadata={"darkmatter": words})
    outputs = [recorded("a"), printed("1\n"), recorded("b"), printed("2\n"), figure, printed("3\n")]
    notebook = v4.new_notebook(cells=[v4.new_code_cell("both()", outputs=outputs)])
    execution.finish(notebook, "99_mini.ipynb")
    shown, after = notebook.cells
    assert shown.source == "both()"
    assert [one.metadata["darkmatter"] for one in shown.outputs] == [words]
    assert "remove-input" in tags_of(after)
    texts = [one.get("text") or one.data.get("text/plain") for one in after.outputs]
    assert texts == ["recorded a = 1\nrecorded b = 1", "1\n2\n", None, "3\n"]

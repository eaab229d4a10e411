"""What goes wrong around a computation, done to it: the rows of book/faults.md."""

from __future__ import annotations

import ast
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import pandas as pd
import pytest
import torch
import yaml
from torch import Tensor

import darkmatter as dm
from darkmatter import passes
from darkmatter.__main__ import main
from darkmatter.activations import lacks_memory, stream
from darkmatter.splicing import Randomised, splice
from tests.conftest import HOOK
from tests.surveys import SKIP, documents_of, ended, forked

ROOT = Path(__file__).parent.parent
KEYS = {"skip": SKIP, "resamples": 20, "checkpoint_tokens": 16 * 32, "downstream": False}
NOBODY = 65534


# The page and its tests


def rows_of_page() -> list[str]:
    """The first cell of every row of the tables of faults.md."""
    text = (ROOT / "book" / "faults.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| .+ \| .+ \|$", text, re.MULTILINE)
    return [row for row in rows if row != "What happens" and set(row) != {"-"}]


def functions_of(file: Path) -> dict[str, ast.FunctionDef]:
    """The tests of a file as pytest names them: f, or Class::f."""
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        before = f"{node.name}::" if isinstance(node, ast.ClassDef) else ""
        found |= {f"{before}{one.name}": one for one in inside if isinstance(one, ast.FunctionDef)}
    return found


def test_every_row_of_the_page_names_tests_that_exist_and_run() -> None:
    tested = yaml.safe_load((ROOT / "tests" / "faults.yml").read_text(encoding="utf-8"))
    assert rows_of_page() == list(tested)
    for row, names in tested.items():
        assert names, row
        for name in names:
            file, _, function = name.partition("::")
            found = functions_of(ROOT / "tests" / file).get(function)
            assert found is not None, f"{row}: {name}"
            assert function.rpartition("::")[2].startswith("test_")
            # Neither skipped nor expected to fail.
            assert not re.search(
                r"\b(mark|pytest)\.(skip|xfail|importorskip)", ast.unparse(found)
            ), name


# Surveys


@pytest.fixture(scope="module")
def saes(tiny_saes: dict[str, Any]) -> dict[str, Any]:
    return {"topk": tiny_saes["topk"]}


Surveyed = Callable[..., dm.Survey]


@pytest.fixture(scope="module")
def surveyed(tiny_model: Any, saes: dict[str, Any]) -> Surveyed:
    """Survey the documents of a seed in a folder, on from what is there."""

    def run(folder: Path, seed: int = 4) -> dm.Survey:
        documents = documents_of(tiny_model, 100, seed)
        return dm.survey(tiny_model, saes, documents, folder=folder, resume=True, **KEYS)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def refused(work: Callable[[], object]) -> str:
    """What a refusal said, or nothing."""
    try:
        work()
    except dm.Refusal as refusal:
        return str(refusal)
    return ""


def read_whole(folder: Path) -> None:
    found = dm.Survey.load(folder)
    for part in (found.per_token, found.error_maps, found.norm_maps, found.statistics):
        list(part.values())


@contextmanager
def stopping_after(batches: int) -> Iterator[None]:
    left, whole = batches, passes.reconstructed

    def counted(*given: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return whole(*given)

    with (
        mock.patch.object(passes, "reconstructed", counted),
        mock.patch.object(passes, "SECONDS", 0.0),
    ):
        yield


@pytest.fixture(scope="module")
def folders(surveyed: Surveyed, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two surveys of different documents: stopped in pass 2, and finished."""
    base = tmp_path_factory.mktemp("folders")
    for seed in (4, 9):
        # Four batches of fit documents, and one of three of test documents.
        with stopping_after(5), pytest.raises(KeyboardInterrupt):
            surveyed(base / f"stopped {seed}", seed)
        shutil.copytree(base / f"stopped {seed}", base / f"finished {seed}")
        surveyed(base / f"finished {seed}", seed)
    return {path.name: path for path in base.iterdir()}


def damaged(path: Path, how: str, other: Path) -> bytes | None:
    """What a damaged file holds; None where it cannot be damaged so."""
    whole = path.read_bytes()
    if how == "cut":
        return whole[: len(whole) // 2]
    if how == "swapped":
        return other.read_bytes()
    if how == "older":
        older = whole.replace(b"darkmatter-survey/1", b"darkmatter-survey/0")
        return None if older == whole else older
    # One bit, among the numbers. Text is not watched bit by bit.
    middle = len(whole) * 3 // 4
    bit = bytes([whole[middle] ^ 1])
    binary = path.suffix in (".safetensors", ".parquet")
    return whole[:middle] + bit + whole[middle + 1 :] if binary else None


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", ["cut", "altered", "swapped", "older"])
def test_no_damaged_file_of_a_stopped_survey_reaches_its_result(
    folders: dict[str, Path], surveyed: Surveyed, tmp_path: Path, how: str
) -> None:
    whole = files_of(folders["finished 4"])
    for name in files_of(folders["stopped 4"]):
        copy = shutil.copytree(folders["stopped 4"], tmp_path / name.replace("/", "-"))
        content = damaged(copy / name, how, folders["stopped 9"] / name)
        if content is None:
            continue
        (copy / name).write_bytes(content)
        said = refused(lambda copy=copy: surveyed(copy))
        # What cannot be used is refused by name, or computed again.
        if said:
            assert str(copy) in said
        else:
            assert files_of(copy) == whole, name


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("how", ["cut", "altered", "swapped", "older"])
def test_no_damaged_file_of_a_finished_survey_is_read(
    folders: dict[str, Path], tmp_path: Path, how: str
) -> None:
    for name in files_of(folders["finished 4"]):
        copy = shutil.copytree(folders["finished 4"], tmp_path / name.replace("/", "-"))
        content = damaged(copy / name, how, folders["finished 9"] / name)
        # table.csv is for people; nothing reads it.
        if content is None or name == "table.csv":
            continue
        (copy / name).write_bytes(content)
        assert str(copy) in refused(lambda copy=copy: read_whole(copy)), name


@pytest.mark.usefixtures("unchecked")
def test_interrupted_at_any_moment_a_process_goes_on(
    folders: dict[str, Path], surveyed: Surveyed, tmp_path: Path
) -> None:
    """As Ctrl-C in a notebook: the same process, model and SAEs try again."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    start = time.monotonic()
    surveyed(tmp_path / "whole")
    took = time.monotonic() - start
    before = signal.signal(signal.SIGALRM, interrupt)
    stopped = 0
    try:
        for share in torch.linspace(0.05, 0.7, 8).tolist():
            try:
                signal.setitimer(signal.ITIMER_REAL, share * took)
                surveyed(tmp_path / "cut")
            except KeyboardInterrupt:
                stopped += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert stopped > 0
    surveyed(tmp_path / "cut")
    assert files_of(tmp_path / "cut") == files_of(folders["finished 4"])


def test_a_full_disk_is_one_sentence_and_the_survey_goes_on(
    folders: dict[str, Path], surveyed: Surveyed, tmp_path: Path
) -> None:
    """No file may grow beyond some size, which is the same error in writing."""
    folder = tmp_path / "found"

    def survey(limit: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        (tmp_path / "said").write_text(refused(lambda: surveyed(folder)))

    # The first file, and one of the second pass: 30 kB hold all of the first.
    for limit, at in ((1000, "tokens.safetensors"), (30_000, "test-0000-of-0001-00000.safeten")):
        assert ended(forked(partial(survey, limit))) == 0
        said = (tmp_path / "said").read_text()
        assert re.search(rf"{at}\S* cannot be written \(.*too large.*make room.*resume=True", said)
        assert "\n" not in said
        assert not [name for name in files_of(folder) if name.endswith(".tmp")]
    surveyed(folder)
    assert files_of(folder) == files_of(folders["finished 4"])


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_read_only_is_one_sentence(surveyed: Surveyed, there: bool) -> None:
    # Not in pytest's own folders, which nobody else may enter.
    with TemporaryDirectory() as base, TemporaryDirectory() as said:
        Path(base).chmod(0o555)
        Path(said).chmod(0o777)
        folder = Path(base) if there else Path(base) / "new"

        def survey() -> None:
            if os.getuid() == 0:
                # Root may write anywhere.
                os.setuid(NOBODY)
            (Path(said) / "said").write_text(refused(lambda: surveyed(folder)))

        assert ended(forked(survey)) == 0
        sentence = (Path(said) / "said").read_text()
        Path(base).chmod(0o755)
    assert sentence.startswith(f"{folder} cannot be written ([Errno 13] Permission denied")


def test_an_sae_that_gives_nan_at_one_token_is_named_with_document_and_position(
    tiny_model: Any, saes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = documents_of(tiny_model, 64)
    halves = documents.select(torch.arange(32)), documents.select(torch.arange(32, 64))
    whole, calls = passes.reconstructed, list[int]()
    for bad, tokens in zip((1, 3), halves, strict=True):
        # Two batches of each half; the second of them, row 37.
        (_, batch) = stream(tiny_model, HOOK, tokens, SKIP)
        calls.clear()

        def broken(sae: Any, x: Tensor, bad: int = bad) -> tuple[Tensor, Tensor, Tensor]:
            x_hat, l0, latents = whole(sae, x)
            if len(calls) == bad:
                x_hat = x_hat.clone()
                x_hat[37, 5] = float("nan")
            calls.append(len(x))
            return x_hat, l0, latents

        monkeypatch.setattr(passes, "reconstructed", broken)
        context, position = int(batch.context[37]), int(batch.position[37])
        name = tokens.names[int(batch.document[37])]
        place = rf"position {position} of context {context} \(document '{name}'\), 1 of "
        with pytest.raises(dm.Refusal, match=f"'topk' reconstructs NaN or infinity at {place}"):
            dm.survey(tiny_model, saes, *halves, **KEYS)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2 GiB."),
        (RuntimeError, "MPS backend out of memory (MPS allocated: 8 GB)"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_splices_that_do_not_fit_are_halved(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch, error: type[RuntimeError], message: str
) -> None:
    tokens = documents_of(tiny_model, 8)

    def noisy(x: Tensor, generator: torch.Generator) -> Tensor:
        return x + torch.randn(x.shape, generator=generator)

    def run(batch_contexts: int) -> pd.DataFrame:
        variants = {"half": lambda x: x / 2, "noisy": Randomised(noisy)}
        found = splice(tiny_model, tokens, HOOK, variants, SKIP, batch_contexts=batch_contexts)
        return found.per_token

    expected = run(2)
    whole, asked = tiny_model.resume, list[int]()

    def crowded(ids: Tensor, *given: Any) -> Tensor:
        asked.append(len(ids))
        # Also in the middle of a batch, when something was drawn for it.
        if len(ids) > 2 and len(asked) % 2 == 0:
            raise error(message)
        return whole(ids, *given)

    monkeypatch.setattr(tiny_model, "resume", crowded)
    with pytest.warns(RuntimeWarning, match="no memory for 4 contexts at a time.* goes on with 2"):
        halved = run(4)
    # The batches of two are those of the other run, so nothing differs.
    pd.testing.assert_frame_equal(halved, expected, check_exact=True)
    assert asked == [4, 4, *[2] * 8]
    assert not lacks_memory(RuntimeError("a bug"))


# The command in odd surroundings


@pytest.fixture
def named(tiny_model_folder: Path, tiny_saes: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """Arguments of a survey of files in a folder of the test."""

    def arguments(folder: str, letter: str) -> list[str]:
        base = tmp_path / folder
        shutil.copytree(tiny_model_folder, base / f"a mod{letter}l")
        tiny_saes["topk"].save_model(base / f"an SA{letter}")
        lines = [f"das {a}äß sat on the {b}, für {a}" for a in "abcd" for b in "efghij"]
        texts = ["\n".join(lines[i:] + lines[:i]) for i in range(10)]
        (base / f"t{letter}xt.txt").write_text("\n\n".join(texts), encoding="utf-8")
        files = {"model": f"a mod{letter}l", "sae": f"an SA{letter}", "text": f"t{letter}xt.txt"}
        paths = [one for key, file in files.items() for one in (f"--{key}", str(base / file))]
        more = ["--separator", r"\n\n", "--skip", "4", "--resamples", "20", "--device", "cpu"]
        return ["survey", *paths, *more, "--no-downstream", "--out", str(base / f"r{letter}sult")]

    return arguments


def test_paths_locale_home_and_clock_do_not_matter(
    named: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A locale without UTF-8, no home, no cache, a nonsensical zone, and files of the year 1970;
    beside it, here, a path of spaces and umlauts. Both give the same table and report."""
    odd = {
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HOME": str(tmp_path / "no home"),
        "XDG_CACHE_HOME": "/proc/nowhere",
        "TZ": "Nowhere/Nothing",
    }
    command = named("with spaces", "e")
    for path in (tmp_path / "with spaces").rglob("*"):
        os.utime(path, (0, 0))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **odd}
    there = subprocess.run(
        [sys.executable, "-m", "darkmatter", *command],
        env=environment, cwd=tmp_path, capture_output=True, check=False,
    )  # fmt: skip
    assert there.returncode == 0, there.stderr.decode(errors="replace")
    assert main(named("schön, mit Leerzeichen", "é")) == 0
    (first, second) = (tmp_path / "with spaces/result", tmp_path / "schön, mit Leerzeichen/résult")
    tables = [dm.Survey.load(folder).table.reset_index(drop=True) for folder in (first, second)]
    pd.testing.assert_frame_equal(*tables)
    assert (first / "report.html").read_text(encoding="utf-8").endswith("</html>\n")


def test_names_that_the_locale_has_no_letters_for_are_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What Python makes of "ü" without UTF-8.
    argument = "ü".encode().decode("ascii", "surrogateescape")
    assert main(["survey", "--model", argument, "--out", "x"]) == 2
    assert "set PYTHONUTF8=1" in capsys.readouterr().err

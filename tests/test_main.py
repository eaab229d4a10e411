"""The command against the functions that it stands for."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

import darkmatter as dm
from darkmatter.__main__ import main
from darkmatter.models import Model
from tests.conftest import D_MODEL, HOOK, N_CONTEXT

ROOT = Path(__file__).parent.parent
LINES = [f"the {a} sat on the {b}, and {a} and {b} on the log" for a in "abcd" for b in "efghij"]
DOCUMENTS = ["\n".join(LINES[i:] + LINES[:i]) for i in range(10)]
QUICK = ["--skip", "4", "--resamples", "20", "--device", "cpu"]
ALONE = [*QUICK, "--no-downstream", "--no-report"]


@pytest.fixture(scope="module")
def sae_folder(tiny_saes: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saes") / "topk"
    tiny_saes["topk"].save_model(folder)
    return folder


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    draw = np.random.default_rng(5)
    shapes = {"W_enc": (D_MODEL, 64), "b_enc": 64, "W_dec": (64, D_MODEL), "b_dec": D_MODEL}
    arrays = {key: draw.normal(size=shape, scale=0.3) for key, shape in shapes.items()}
    arrays["threshold"] = np.ones(64)
    file = tmp_path_factory.mktemp("npz") / "scope.npz"
    np.savez(file, **{key: array.astype(np.float32) for key, array in arrays.items()})
    return file


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    file.write_text("\n\n".join(DOCUMENTS))
    return file


@pytest.fixture
def opened(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The tiny model in place of opening one; what it was asked for."""
    asked: list[Any] = []

    def open_model(*args: Any, remote: bool = False) -> Model:
        asked.append(args)
        return tiny_model

    monkeypatch.setattr("darkmatter.models.open_model", open_model)
    return asked


@pytest.fixture
def named(sae_folder: Path, text: Path) -> list[str]:
    """Model, SAE and text."""
    given = ["--model", "tiny", "--sae", str(sae_folder), "--text", str(text)]
    return [*given, "--separator", r"\n\n"]


def test_from_the_shell(
    tiny_model_folder: Path, sae_folder: Path, npz: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "survey"
    command = [sys.executable, "-m", "darkmatter", "survey", "--model", str(tiny_model_folder)]
    command += ["--sae", str(sae_folder), "--sae", str(npz), "--hook", HOOK, "--text", str(text)]
    command += ["--separator", r"\n\n", "--context", str(N_CONTEXT), *QUICK, "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "Traceback" not in run.stderr
    assert "fit: 100%" in run.stderr
    assert "10 documents; 0 documents were shorter" in run.stderr
    assert run.stdout.splitlines()[-1] == f"Report: {out / 'report.html'}"
    assert (out / "report.html").is_file()
    table = pd.read_csv(out / "table.csv", index_col=0)
    assert list(table.index) == ["topk", "scope"]
    assert table["d_sae"].tolist() == [96, 64]
    assert table["cost"].notna().all()
    # A refusal is one sentence.
    again = subprocess.run([*command[:-1], str(text)], cwd=ROOT, capture_output=True, check=False)
    assert again.returncode == 2
    assert again.stderr.decode().splitlines() == [
        f"darkmatter: {text} is a file, expected a folder for the result; pass another --out."
    ]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from darkmatter.__main__ import _parser; _parser().format_help();"
        "print(*{'torch', 'numpy', 'pandas', 'transformers', 'sae_lens'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert run.stdout.strip() == b""


def test_the_command_is_the_function(
    opened: list[Any],
    named: list[str],
    tiny_model: Model,
    tiny_saes: dict[str, Any],
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--seed", "3", "--share", "0.5", "--tokens", "0.9k", "--per-document", "9"]
    assert main(["survey", *named, *ALONE, *options, "--dtype", "float16", "--out", str(out)]) == 0
    assert opened == [("tiny", "bridge", "cpu", torch.float16)]
    told = capsys.readouterr().out
    documents = dm.read_documents(text, separator="\n\n")
    tokens = dm.tokenise(tiny_model, documents, tokens=900, per_document=9)
    expected = dm.survey(
        tiny_model, {"topk": tiny_saes["topk"]}, tokens, skip=4, seed=3, share=0.5, resamples=20,
        downstream=False,
    )  # fmt: skip
    found = dm.Survey.load(out)
    pd.testing.assert_frame_equal(found.table, expected.table)
    assert f"{found.table.loc['topk', 'fvu']:.4f}" in told
    assert told.splitlines()[-1] == f"Table: {out / 'table.csv'}"
    assert not (out / "report.html").exists()
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {out / 'report.html'}"


@pytest.mark.usefixtures("opened")
def test_text_of_every_kind_is_the_same_survey(
    named: list[str], sae_folder: Path, tiny_model: Model, tmp_path: Path
) -> None:
    (tmp_path / "t").mkdir()
    rows = [json.dumps({"body": document}) for document in DOCUMENTS]
    (tmp_path / "t" / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "train.jsonl").write_text("\n".join(rows))
    tokens = dm.tokenise(tiny_model, ((str(i), text) for i, text in enumerate(DOCUMENTS)))
    dm.save_tokens(tokens, tmp_path / "tokens.safetensors")
    ways = {
        "plain": named[4:],
        "jsonl": ["--text", str(tmp_path / "t"), "--column", "body"],
        "dataset": ["--dataset", str(hub), "--column", "body"],
        "tokens": ["--tokens-file", str(tmp_path / "tokens.safetensors")],
    }
    tables: list[pd.DataFrame] = []
    for way, given in ways.items():
        out = str(tmp_path / way)
        common = ["--model", "tiny", "--sae", str(sae_folder), *ALONE]
        assert main(["survey", *common, *given, "--out", out]) == 0
        tables.append(dm.Survey.load(out).table)
    for table in tables[1:]:
        pd.testing.assert_frame_equal(table, tables[0])


@pytest.mark.usefixtures("opened")
def test_going_on_and_beginning_anew(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["survey", *named, *ALONE, "--out", str(out)]
    assert main(command) == 0
    table = (out / "table.csv").read_bytes()
    capsys.readouterr()
    assert main(command) == 2
    assert "is not empty, expected a new folder; pass --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert (out / "table.csv").read_bytes() == table
    assert main([*command, "--force", "--seed", "1"]) == 0
    assert (out / "table.csv").read_bytes() != table


@pytest.mark.usefixtures("opened")
def test_shards_merged_are_the_survey(
    named: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    command = ["survey", *named, *ALONE, "--out"]
    assert main([*command, str(whole)]) == 0
    for _ in range(2):
        for shard in ("1/2", "0/2"):
            assert main([*command, str(out), "--shard", shard]) == 0
            assert "Shard: " in capsys.readouterr().out
        assert main(["merge", str(out), "--no-report"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Table: {out / 'table.csv'}"
    found, expected = (dm.Survey.load(folder).table for folder in (out, whole))
    # Moments are added in another order.
    pd.testing.assert_frame_equal(found, expected, rtol=1e-10)


@pytest.mark.usefixtures("opened")
def test_contexts_begin_as_the_sae_was_trained(
    named: list[str], tiny_saes: dict[str, Any], tmp_path: Path
) -> None:
    import copy

    sae = copy.deepcopy(tiny_saes["topk"])
    sae.cfg.metadata.prepend_bos = False
    sae.save_model(tmp_path / "sae")
    named[3] = str(tmp_path / "sae")
    for more, begins in (([], False), (["--bos"], True)):
        out = str(tmp_path / f"out{len(more)}")
        assert main(["survey", *named, *ALONE, *more, "--out", out]) == 0
        assert bool((dm.Survey.load(out).test.tokens[:, 0] == 0).all()) is begins


@pytest.fixture
def suite(tiny_model_folder: Path, tiny_saes: dict[str, Any], tmp_path: Path) -> Path:
    """A suite's folder with two SAEs and twelve documents."""
    folder = tmp_path / "suite"
    folder.mkdir()
    (folder / "model").symlink_to(tiny_model_folder)
    rows: list[dict[str, Any]] = []
    for name in ("topk", "jumprelu"):
        tiny_saes[name].save_model(folder / "saes" / name)
        rows.append({"name": name, "hook": HOOK, "d_sae": 96, "aim_l0": 5})
    manifest = {"format": "darkmatter-suite/1", "name": "toy", "hook": HOOK, "skip": 4}
    (folder / "suite.json").write_text(json.dumps({**manifest, "saes": rows, "files": {}}))
    (folder / "documents.json").write_text(json.dumps([f"d{i}" for i in range(12)]))
    ids = torch.randint(1, 300, (24, N_CONTEXT), dtype=torch.int32)
    parts = {"fit": slice(0, 12), "test": slice(12, 24)}
    save_file(
        {f"{part}/tokens": ids[rows].clone() for part, rows in parts.items()}
        | {
            f"{part}/document": (torch.arange(24)[rows] // 2).int().clone()
            for part, rows in parts.items()
        },
        folder / "tokens.safetensors",
    )
    return folder


def test_a_suite_brings_everything(
    suite: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["survey", "--suite", str(suite), *ALONE[2:]]
    assert main([*common, "--out", str(tmp_path / "all")]) == 0
    found = dm.Survey.load(tmp_path / "all")
    assert list(found.table.index) == ["topk", "jumprelu"]
    assert (found.skip, found.fit.n_contexts, found.test.n_contexts) == (4, 12, 12)
    few = [*common, "--sae", "jump*", "--tokens", str(10 * N_CONTEXT), "--hook", HOOK]
    assert main([*few, "--out", str(tmp_path / "few")]) == 0
    found = dm.Survey.load(tmp_path / "few")
    assert list(found.table.index) == ["jumprelu"]
    assert (found.fit.n_contexts, found.test.n_contexts) == (6, 4)
    own = [*common, "--sae", "topk", "--text", str(text), "--separator", r"\n\n"]
    assert main([*own, "--out", str(tmp_path / "own")]) == 0
    assert dm.Survey.load(tmp_path / "own").test.names[0].startswith(str(text))
    capsys.readouterr()
    out = ["--out", str(tmp_path / "none")]
    assert main([*common, "--sae", "gated", *out]) == 2
    assert main([*common, "--hook", "blocks.0.hook_mlp_out", *out]) == 2
    told = capsys.readouterr().err
    assert "has no SAE gated; it has 2, such as topk, jumprelu." in told
    assert "has no SAE at all at blocks.0.hook_mlp_out" in told


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--sae": None}, "No SAE was named"),
        ({"--text": None}, "No text was named"),
        ({"--dataset": "x"}, "Text was named twice"),
        ({"--tokens-file": "x"}, "Text was named twice"),
        ({"--text": "nowhere.txt"}, "no file or folder nowhere.txt"),
        ({"--text": None, "--tokens-file": "nowhere"}, "There is no file nowhere"),
        ({"--text": None, "--dataset": "nobody/nothing"}, "HF_HUB_OFFLINE is set"),
        ({"--sae": "nothing"}, "There is no SAE 'nothing'"),
        ({"--sae": "no-release/x"}, "knows no release 'no-release'"),
        ({"--hook": "blocks.0.hook_mlp_out"}, "was trained at blocks.1.hook_resid_post, not at"),
        ({"--separator": "never"}, "are of 1 documents, expected at least 4"),
        ({"--separator": None}, "are of 1 documents, expected at least 4"),
        ({"--tokens": "31"}, "At most 31 tokens were asked for"),
        ({"--context": "33"}, "expected 2 to 32"),
        ({"--skip": "31"}, "got at most 0; pass more"),
        ({"--skip": "28", "--per-document": "1"}, "more fit tokens than the 32 dimensions"),
        ({"--share": "1.5"}, "share of 1.5"),
        ({"--shard": "2/2"}, "shard is (2, 2)"),
        ({"--resamples": "0"}, "resamples is 0"),
    ],
)
def test_input_that_cannot_be_used_is_one_sentence(
    opened: list[Any],
    named: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str | None],
    message: str,
) -> None:
    pairs = [*named, *QUICK]
    options: dict[str, str | None] = dict(zip(pairs[::2], pairs[1::2], strict=True))
    options |= change
    given = [part for pair in options.items() if pair[1] is not None for part in pair if part]
    out = tmp_path / "out"
    assert main(["survey", *given, "--no-downstream", "--out", str(out)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    last = told.err.splitlines()[-1]
    assert last.startswith("darkmatter: ")
    assert message in last
    assert "Traceback" not in told.err
    if "named" in message or "no file" in message.lower() or "OFFLINE" in message:
        assert len(told.err.splitlines()) == 1
    if "named" in message:
        assert opened == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [("1000000", 10**6), ("1_000", 1000), ("1e6", 10**6), ("250k", 250_000), ("1.5M", 1_500_000)],
)
def test_numbers_of_tokens(given: str, expected: int) -> None:
    from darkmatter.__main__ import _count

    assert _count(given) == expected


@pytest.mark.parametrize("given", ["0", "x", "1.5", "-3", "", "k"])
def test_what_is_no_number_of_tokens(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["survey", "--suite", "pydocs", f"--tokens={given}", "--out", "x"])
    assert refused.value.code == 2
    assert "invalid number of tokens (1000000, 250k, 1.5M) value" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt, 130, "goes on where it was with --resume"),
        (torch.OutOfMemoryError, 2, "has no memory for this; pass --one-at-a-time"),
    ],
)
def test_a_run_that_ends_early_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
    status: int,
    message: str,
) -> None:
    def ends() -> None:
        raise error

    monkeypatch.setattr("darkmatter.suites.list_suites", ends)
    assert main(["suites"]) == status
    assert message in capsys.readouterr().err


def test_errors_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("darkmatter.suites.list_suites", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["suites"])


@pytest.mark.usefixtures("opened")
def test_only_the_first_process_talks(
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert main(["survey", *named, *ALONE, "--out", str(tmp_path / "out")]) == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert "documents;" not in told.err


def test_the_gpu_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    from darkmatter.__main__ import _device

    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [_device(name) for name in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert _device("auto") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert _device("auto") == "cuda:3"


def test_suites_are_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["suites"]) == 0
    header, first, *_ = lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(dm.list_suites())
    assert first.startswith("pydocs")
    assert first[header.index("here") :].startswith("yes")
    assert first[header.index("download") :].startswith("none")
    assert all(line == line.rstrip() for line in lines)


@pytest.mark.usefixtures("opened")
def test_pages_of_latents(named: list[str], tmp_path: Path) -> None:
    out = tmp_path / "pages"
    command = ["latents", *named, "--latent", "3", "5", "--skip", "4", "--out", str(out)]
    assert main(command) == 0
    assert {path.name for path in out.glob("*.html")} >= {"index.html"}
    assert len(list(out.glob("*.html"))) == 3
    assert main(command) == 2
    assert main([*command, "--force"]) == 0


@pytest.mark.usefixtures("opened")
def test_latents_are_of_one_sae(
    named: list[str],
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls: list[Any] = []

    def write_latents(*args: Any) -> Path:
        calls.append(args)
        return args[3] / "index.html"

    monkeypatch.setitem(
        sys.modules, "darkmatter.latents", SimpleNamespace(write_latents=write_latents)
    )
    survey, out = tmp_path / "survey", tmp_path / "pages"
    assert main(["survey", *named, *ALONE, "--out", str(survey)]) == 0
    more = ["--latent", "3", "5", "--contexts", "7", "--survey", str(survey), "--skip", "4"]
    assert main(["latents", *named, *more, "--out", str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Pages: {out / 'index.html'}"
    (model, sae, tokens, folder, latents, skip, contexts, maps) = calls[0]
    assert (model, sae.cfg.d_sae, folder) == (tiny_model, 96, out)
    assert (latents, skip, contexts) == ([3, 5], 4, 7)
    assert tokens.names[0].endswith("corpus.txt#1")
    assert torch.equal(maps.weight, dm.Survey.load(survey).error_maps["topk"].weight)
    twice = [*named, "--sae", f"{named[3]}/../topk/../topk"]
    assert main(["latents", *twice, "--out", str(out)]) == 2
    assert "are of one SAE, but these are 2" in capsys.readouterr().err

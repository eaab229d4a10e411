"""A survey in a folder: the same numbers and bytes after kills, one owner, nothing overwritten."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import darkmatter as dm
from darkmatter import splicing
from darkmatter.shards import locked
from tests.common import refused
from tests.surveys import SKIP, documents_of, ended, forked, killed_after

KEYS = {"skip": SKIP, "resamples": 50, "checkpoint_tokens": 16 * 32}


@pytest.fixture(scope="module")
def documents(tiny_model: Any) -> dm.Tokens:
    return documents_of(tiny_model, contexts=100)


@pytest.fixture(scope="module")
def saes(tiny_saes: dict[str, Any]) -> dict[str, Any]:
    """A name with a slash, as RELEASE/ID has, and one whose decoder needs the input."""
    return {"jump/relu": tiny_saes["jumprelu"], "normalised": tiny_saes["normalised"]}


@pytest.fixture(scope="module")
def in_memory(tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any]) -> dm.Survey:
    return dm.survey(tiny_model, saes, documents, **KEYS)


@pytest.fixture(scope="module")
def folder(
    tiny_model: Any,
    documents: dm.Tokens,
    saes: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("survey") / "found"
    dm.survey(tiny_model, saes, documents, folder=folder, **KEYS)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file by its place."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_folder_holds_what_a_survey_in_memory_finds(in_memory: Any, folder: Path) -> None:
    found = dm.Survey.load(folder)
    # Totals of documents are cut where parts are.
    pd.testing.assert_frame_equal(found.table, in_memory.table, rtol=1e-11, atol=0)
    assert list(found.per_token) == list(in_memory.per_token) == ["jump/relu", "normalised"]
    for name in found.per_token:
        pd.testing.assert_frame_equal(found.per_token[name], in_memory.per_token[name])
        assert torch.equal(found.error_maps[name].weight, in_memory.error_maps[name].weight)
        assert found.norm_maps[name].n == in_memory.norm_maps[name].n
    for hook, statistics in in_memory.statistics.items():
        assert torch.equal(found.statistics[hook].sxy, statistics.sxy)
    assert torch.equal(found.test.tokens, in_memory.test.tokens)
    assert found.fit.names == in_memory.fit.names
    assert found.pieces == in_memory.pieces
    assert found.settings["settings"] == in_memory.settings["settings"]
    assert sorted(path.name for path in folder.iterdir()) == [
        "maps",
        "per_token",
        "pieces.json",
        "statistics",
        "survey.json",
        "table.csv",
        "table.parquet",
        "tokens.safetensors",
    ]
    with (folder / "table.csv").open(newline="") as file:
        text = [float(line["fvu"]) for line in csv.DictReader(file)]
    assert text == found.table["fvu"].tolist()


def test_saved_and_loaded_is_the_same(
    in_memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory.save(tmp_path / "saved")
    found = dm.Survey.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(found.table, in_memory.table, check_exact=True)
    with pytest.raises(dm.Refusal, match="is not empty, expected a new folder"):
        in_memory.save(tmp_path / "saved")
    assert in_memory.save(tmp_path / "saved", force=True) == tmp_path / "saved"
    altered = tmp_path / "saved" / "per_token" / "normalised.parquet"
    altered.write_bytes(altered.read_bytes()[:-1])
    with pytest.raises(dm.Refusal, match=r"normalised\.parquet has SHA-256"):
        dm.Survey.load(tmp_path / "saved").per_token["normalised"]
    with pytest.raises(dm.Refusal, match="no finished survey"):
        dm.Survey.load(tmp_path)
    with pytest.raises(dm.Refusal, match="lies in memory"):
        in_memory.report()
    monkeypatch.setattr("darkmatter.report.write_report", lambda survey, folder: folder / "page")
    assert in_memory.report(tmp_path) == tmp_path / "page"
    assert dm.Survey.load(tmp_path / "saved").report() == tmp_path / "saved" / "page"


def test_pieces_are_the_text_of_ids(in_memory: Any, tiny_model: Any) -> None:
    ids = in_memory.test.tokens.unique().tolist()
    assert sorted(in_memory.pieces) == ids
    word = tiny_model.tokenizer.encode(" the")
    assert len(word) == 1
    assert in_memory.pieces[word[0]] == " the"


def test_dead_share_by_hand(in_memory: Any, tiny_model: Any, saes: dict[str, Any]) -> None:
    for name, sae in saes.items():
        seen = torch.zeros(96, dtype=torch.bool)
        for tokens in (in_memory.fit, in_memory.test):
            x = tiny_model.activations(tokens.tokens, sae.cfg.metadata.hook_name)[:, SKIP:-1]
            counts = tokens.tokens[:, SKIP:-1] != 0
            seen |= (sae.encode(x[counts]) != 0).any(0)
        assert in_memory.table.loc[name, "dead"] == pytest.approx(1 - float(seen.double().mean()))
    assert (
        in_memory.table["n_test"].tolist()
        == [int((in_memory.test.tokens[:, SKIP:-1] != 0).sum())] * 2
    )


def test_downstream_columns_equal_a_splice(
    in_memory: Any, tiny_model: Any, saes: dict[str, Any]
) -> None:
    for name, sae in saes.items():
        linear = in_memory.error_maps[name]

        def x_hat(x: torch.Tensor, sae: Any = sae) -> torch.Tensor:
            return dm.reconstruct(sae, x)

        variants: dict[str, Any] = {
            "sae": x_hat,
            "linear": lambda x, linear=linear, x_hat=x_hat: x_hat(x) + linear(x),
            "nonlinear": lambda x, linear=linear: x - linear(x),
        }
        run = splicing.splice(
            tiny_model,
            in_memory.test,
            sae.cfg.metadata.hook_name,
            variants,
            skip=SKIP,
            special=(0,),
            resamples=50,
        )
        expected = {
            "cross_entropy_original": run.mean("original"),
            "cross_entropy": run.mean("sae"),
            "cost": run.cost("sae"),
            "kl": run.mean("sae", "kl"),
            "kl_linear": run.mean("linear", "kl"),
            "kl_nonlinear": run.mean("nonlinear", "kl"),
        }
        if run.cost("sae").value > 0:
            for part in ("linear", "nonlinear"):
                expected[f"recovered_{part}"] = run.recovered(part)
        else:
            assert in_memory.table.loc[name].filter(like="recovered").isna().all()
        for score, interval in expected.items():
            # The same float32 scores of tokens, summed in float64 in another order.
            assert in_memory.interval(name, score) == pytest.approx(interval, rel=1e-9), score
        frame = in_memory.per_token[name]
        np.testing.assert_array_equal(frame["kl"], run.kl["sae"].numpy())
        np.testing.assert_array_equal(frame["context"], run.context.numpy())


def test_floor_of_a_planted_law() -> None:
    from darkmatter.scores import _floor  # type: ignore[reportPrivateUsage]

    widths = [64, 128, 256, 512, 2048, 256]
    table = pd.DataFrame(
        {
            "hook": "a",
            "d_sae": widths,
            "l0": [8.0, 8.1, 7.9, 8.0, 8.0, 30.0],
            "fvu": [0.2 + 3 * width**-0.7 for width in widths],
        },
        index=list("uvwxyz"),
    )
    # Points on a law: found to the precision of the search.
    assert _floor(table, "u").value == pytest.approx(0.2, abs=1e-6)
    assert np.isnan(_floor(table, "z").value)
    assert np.isnan(_floor(table.iloc[:3], "u").value)
    assert np.isnan(_floor(table.assign(fvu=[0.2, 0.3, 0.4, 0.5, 0.6, 0.1]), "u").value)


def test_saes_one_at_a_time(
    in_memory: Any, tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], tmp_path: Path
) -> None:
    found = dm.survey(
        tiny_model, saes, documents, folder=tmp_path / "one", one_at_a_time=True, **KEYS
    )
    # The same products with fewer columns round differently.
    pd.testing.assert_frame_equal(found.table, in_memory.table, rtol=1e-9)
    (hook,) = in_memory.statistics
    torch.testing.assert_close(
        found.statistics[hook].sxy, in_memory.statistics[hook].sxy, rtol=1e-9, atol=1e-9
    )
    assert found.statistics[hook].syy.shape == in_memory.statistics[hook].syy.shape


def test_float32_products(
    in_memory: Any, tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any]
) -> None:
    found = dm.survey(tiny_model, saes, documents, precision="float32", **KEYS)
    # Float32 products: FVU and R2 to 1e-6, which the share of FVU recovered multiplies.
    pd.testing.assert_frame_equal(found.table, in_memory.table, rtol=1e-4, atol=1e-5)
    assert not found.table.equals(in_memory.table)
    assert found.settings["settings"]["precision"] == "float32"
    with refused("precision is 'float16', expected \"float64\" or"):
        dm.survey(tiny_model, saes, documents, precision="float16", **KEYS)


@pytest.mark.parametrize("other", ["nnsight", "bfloat16"])
def test_other_backends_and_dtypes(
    in_memory: Any,
    tiny_model_folder: Path,
    nnsight_model: Any,
    documents: dm.Tokens,
    saes: dict[str, Any],
    other: str,
) -> None:
    half = dm.open_model(tiny_model_folder, dtype=torch.bfloat16) if other == "bfloat16" else None
    found = dm.survey(half or nnsight_model, saes, documents, **KEYS)
    # bfloat16 has three digits, and thresholds turn that into other active latents.
    tolerance = 0.05 if half else 1e-4
    for score in ("fvu", "fvu_nonlinear", "cross_entropy", "l0"):
        assert found.table[score].tolist() == pytest.approx(
            in_memory.table[score].tolist(), rel=tolerance
        )


def test_nothing_is_overwritten_unasked(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    def again(where: Path, **keys: Any) -> dm.Survey:
        return dm.survey(tiny_model, saes, documents, folder=where, **{**KEYS, **keys})

    copy = shutil.copytree(folder, tmp_path / "copy")
    before = files_of(copy)
    with pytest.raises(dm.Refusal, match="is not empty, expected a new folder"):
        again(copy)
    again(copy, resume=True)
    assert files_of(copy) == before
    halves = dm.Survey.load(copy)
    with pytest.raises(dm.Refusal, match=r"what differs: seed \(0, not 1\);"):
        dm.survey(
            tiny_model,
            saes,
            halves.fit,
            halves.test,
            folder=copy,
            resume=True,
            **(KEYS | {"seed": 1}),
        )
    (copy / "notes.txt").write_text("mine")
    again(copy, force=True, seed=1, downstream=False)
    assert (copy / "notes.txt").read_text() == "mine"
    assert "kl" not in dm.Survey.load(copy).table
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("x")
    for keys in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(dm.Refusal, match=r"is not empty|holds no survey"):
            again(other, **keys)
    assert files_of(other) == {"thesis.tex": b"x"}
    with pytest.raises(dm.Refusal, match="is a file"):
        again(other / "thesis.tex")
    with pytest.raises(dm.Refusal, match="resume goes on and force begins anew"):
        again(copy, resume=True, force=True)
    with pytest.raises(dm.Refusal, match="There is no folder"):
        dm.survey(tiny_model, saes, documents, resume=True, **KEYS)


def test_resuming_with_other_inputs_names_them(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], folder: Path
) -> None:
    import copy

    changed = copy.deepcopy(saes["jump/relu"])
    changed.W_dec.data[3, 4] += 1e-6
    mended = {**saes, "jump/relu": changed}
    with pytest.raises(dm.Refusal, match=r"what differs: the SAE 'jump/relu'; pass"):
        dm.survey(tiny_model, mended, documents, folder=folder, resume=True, **KEYS)
    fewer = documents.select(torch.arange(99))
    with pytest.raises(dm.Refusal, match=r"differs: the fit tokens|differs: the test tokens"):
        dm.survey(tiny_model, saes, fewer, folder=folder, resume=True, **KEYS)
    weights = tiny_model.network.state_dict()
    first = next(key for key, tensor in weights.items() if tensor.is_floating_point())
    weights[first].view(-1)[0] += 1
    try:
        with pytest.raises(dm.Refusal, match="what differs: the model; pass"):
            dm.survey(tiny_model, saes, documents, folder=folder, resume=True, **KEYS)
    finally:
        weights[first].view(-1)[0] -= 1


def test_one_run_in_a_folder_at_a_time(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    where = shutil.copytree(folder, tmp_path / "copy")
    with (
        locked(where / "lock"),
        pytest.raises(dm.Refusal, match=rf"is in use by process {os.getpid()} on"),
    ):
        dm.survey(tiny_model, saes, documents, folder=where, force=True, **KEYS)
    assert not (where / "lock").exists()
    # A process that was killed: its lock is there, nobody holds it.
    (where / "lock").write_text(f"999999 {os.uname().nodename}\n")
    dm.survey(tiny_model, saes, documents, folder=where, resume=True, **KEYS)
    assert not (where / "lock").exists()
    (where / "lock").write_text("1 elsewhere\n")
    with pytest.raises(dm.Refusal, match="process 1 on elsewhere"):
        dm.survey(tiny_model, saes, documents, folder=where, resume=True, **KEYS)


def test_a_bar_tells_tokens_and_time_left(
    tiny_model: Any,
    documents: dm.Tokens,
    saes: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    dm.survey(tiny_model, saes, documents, progress=True, downstream=False, **KEYS)
    told = capsys.readouterr()
    assert told.out == ""
    assert "fit:" in told.err
    assert "score:" in told.err
    assert " tokens/s" in told.err


def test_refusals_before_any_work(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], tmp_path: Path
) -> None:
    one = documents.select(documents.document == 0)
    rest = documents.select(documents.document != 0)
    with pytest.raises(dm.Refusal, match="are of one document"):
        dm.survey(tiny_model, saes, rest, one, **KEYS)
    outside = dm.Tokens(one.tokens + tiny_model.vocabulary, one.document, one.names)
    two = dm.Tokens(
        torch.cat([outside.tokens, one.tokens]),
        torch.tensor([0] * len(one.tokens) + [1] * len(one.tokens)),
        one.names,
    )
    later = documents.select(documents.document > 1)
    with pytest.raises(dm.Refusal, match="outside the vocabulary"):
        dm.survey(tiny_model, saes, later, two, folder=tmp_path / "never", **KEYS)
    assert not (tmp_path / "never").exists()


def test_killed_at_any_moment_and_resumed_gives_the_same_bytes(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], tmp_path: Path
) -> None:
    """A fork kills itself, with SIGKILL, some reconstructions and written files further on."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"

    def survey(folder: Path) -> None:
        dm.survey(tiny_model, saes, documents, folder=folder, resume=True, **KEYS)

    def killed(after: int) -> None:
        with killed_after(after):
            survey(cut)

    assert ended(forked(lambda: survey(whole))) == 0
    calls = np.random.default_rng(0).integers(3, 22, 10).tolist()
    ends = [ended(forked(partial(killed, after))) for after in calls]
    # Some may come after the end.
    assert ends.count(-signal.SIGKILL) >= 8
    assert ended(forked(lambda: survey(cut))) == 0
    assert files_of(cut) == files_of(whole)


def test_killed_from_outside_and_resumed(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    where = tmp_path / "found"

    def survey() -> dm.Survey:
        return dm.survey(tiny_model, saes, documents, folder=where, resume=True, **KEYS)

    process = forked(survey)
    until = time.monotonic() + 60
    while not list(where.glob("state/test-*")) and time.monotonic() < until:
        time.sleep(0.001)
    os.kill(process, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    with pytest.raises(dm.Refusal, match="no finished survey"):
        dm.Survey.load(where)
    resumed = survey()
    pd.testing.assert_frame_equal(resumed.table, dm.Survey.load(folder).table, rtol=1e-10)


def test_memory_does_not_grow_with_tokens(tiny_model: Any, saes: dict[str, Any]) -> None:
    """Peak resident size of a fork: ten times the tokens, at most a tenth more."""

    def peak(contexts: int, folder: Path) -> float:
        def survey() -> None:
            documents = documents_of(tiny_model, contexts)
            keys = {**KEYS, "checkpoint_tokens": 64 * 32, "downstream": False}
            dm.survey(tiny_model, saes, documents, folder=folder, **keys)

        # What the fork shares with this process is in both peaks.
        process = forked(survey)
        _, status, usage = os.wait4(process, 0)
        assert status == 0
        return usage.ru_maxrss

    with TemporaryDirectory() as folder:
        small, large = peak(160, Path(folder) / "small"), peak(1600, Path(folder) / "large")
    assert large < 1.1 * small

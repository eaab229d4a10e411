"""Shares of a survey, in files and among processes: added up they are the one survey."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import darkmatter as dm
from darkmatter.autoencoders import LinearlyCorrected
from darkmatter.leastsquares import LinearMap
from darkmatter.shards import TensorFile, fingerprint, hash_tensors, write_tensors
from tests.surveys import SKIP, documents_of, ended, forked, killed_after

KEYS = {"skip": SKIP, "resamples": 50, "checkpoint_tokens": 16 * 32}
# Activations are the same whoever reads them; sums of them in float64 differ by their order.
SAME = {"rtol": 1e-10, "atol": 0}


@pytest.fixture(scope="module")
def documents(tiny_model: Any) -> dm.Tokens:
    """Documents of 3 contexts, which batches of 16 cut."""
    tokens = documents_of(tiny_model, contexts=130)
    return dm.Tokens(tokens.tokens, torch.arange(130) // 3, tokens.names[:44])


@pytest.fixture(scope="module")
def saes(tiny_saes: dict[str, Any]) -> dict[str, Any]:
    return {name: tiny_saes[name] for name in ("jumprelu", "topk")}


@pytest.fixture(scope="module")
def whole(tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any]) -> dm.Survey:
    return dm.survey(tiny_model, saes, documents, **KEYS)


def assert_same(found: Any, whole: Any) -> None:
    pd.testing.assert_frame_equal(found.table, whole.table, **SAME)
    for name, frame in whole.per_token.items():
        pd.testing.assert_frame_equal(found.per_token[name], frame, **SAME)


class Sharded:
    """Shards of one survey in one folder, run by name."""

    def __init__(self, model: Any, saes: dict[str, Any], tokens: dm.Tokens, folder: Path) -> None:
        self.model, self.saes, self.tokens, self.folder = model, saes, tokens, folder

    def run(self, i: int, n: int, **keys: Any) -> Path:
        keys = {**KEYS, "folder": self.folder, **keys}
        return dm.survey(self.model, self.saes, self.tokens, shard=(i, n), **keys)


@pytest.fixture(scope="module")
def fitted(
    tiny_model: Any,
    documents: dm.Tokens,
    saes: dict[str, Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with three shards of the fit pass."""
    shards = Sharded(tiny_model, saes, documents, tmp_path_factory.mktemp("sharded") / "found")
    for i in (2, 0, 1):
        shards.run(i, 3)
    return shards.folder


@pytest.fixture
def shards(
    fitted: Path, tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], tmp_path: Path
) -> Sharded:
    """A copy of it, to go on with."""
    folder = shutil.copytree(fitted, tmp_path / "found")
    return Sharded(tiny_model, saes, documents, folder)


@pytest.mark.parametrize("n", [2, 7])
def test_shards_in_any_order_are_the_whole(
    tiny_model: Any,
    documents: dm.Tokens,
    saes: dict[str, Any],
    whole: Any,
    tmp_path: Path,
    n: int,
) -> None:
    shards = Sharded(tiny_model, saes, documents, tmp_path / "found")
    order = random.Random(n)
    files = [shards.run(i, n) for i in order.sample(range(n), n)]
    assert dm.merge(files) == tmp_path / "found" / "shards" / "fit.safetensors"
    files = [shards.run(i, n) for i in order.sample(range(n), n)]
    order.shuffle(files)
    assert_same(dm.merge(files), whole)
    assert_same(dm.Survey.load(tmp_path / "found"), whole)
    with pytest.raises(dm.Refusal, match="There is a survey in"):
        dm.merge(tmp_path / "found")
    assert_same(dm.merge(tmp_path / "found", force=True), whole)
    assert_same(dm.merge(files, folder=tmp_path / "elsewhere"), whole)
    with pytest.raises(dm.Refusal, match="is not empty"):
        dm.merge(files, folder=tmp_path / "elsewhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(dm.Refusal, match="holds no survey but other things"):
        dm.merge(files, folder=tmp_path / "mine", force=True)


def test_wrong_shards_are_named(shards: Sharded, tmp_path: Path) -> None:
    base = shards.folder / "shards"
    third = base / "fit-0002-of-0003.safetensors"
    shutil.copy(third, base / "fit-0002-of-0003-copy.safetensors")
    with pytest.raises(dm.Refusal, match=r"0003\.safetensors and .*copy.* are both shard 2 of 3"):
        dm.merge(shards.folder)
    (base / "fit-0002-of-0003-copy.safetensors").unlink()

    third.rename(tmp_path / "third")
    with pytest.raises(dm.Refusal, match=r"1 of 3 shards .* missing \(fit-0002-of-0003\)"):
        dm.merge(shards.folder)
    other = Sharded(shards.model, shards.saes, shards.tokens, tmp_path / "other")
    shutil.copy(other.run(2, 3, skip=5), third)
    with pytest.raises(dm.Refusal, match=r"fit-0002-of-0003\.safetensors is a shard of another"):
        dm.merge(shards.folder)
    added = Sharded(shards.model, shards.saes, shards.tokens, tmp_path / "added").run(3, 4)
    shutil.copy((tmp_path / "third"), third)
    shutil.copy(added, base)
    with pytest.raises(dm.Refusal, match=r"fit-0003-of-0004\.safetensors is shard 3 of 4"):
        dm.merge(shards.folder)
    (base / added.name).unlink()

    whole = third.read_bytes()
    third.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(dm.Refusal, match=r"fit-0002-of-0003\.safetensors was altered"):
        dm.merge(shards.folder)
    third.write_bytes(whole[:-8])
    with pytest.raises(dm.Refusal, match=r"0002-of-0003\.safetensors is not a whole file"):
        dm.merge(shards.folder)
    third.write_bytes(whole)
    (base / "fit-notes.txt").write_text("mine")
    with pytest.raises(dm.Refusal, match=r"fit-notes\.txt is not a whole file of a survey"):
        dm.merge(shards.folder)
    with pytest.raises(dm.Refusal, match=r"no description\.json"):
        dm.merge(tmp_path)
    with pytest.raises(dm.Refusal, match="There are no shards"):
        dm.merge([])


def test_wrong_shards_of_the_test_pass_are_named(shards: Sharded) -> None:
    base = shards.folder / "shards"
    dm.merge(shards.folder)
    shards.run(0, 3)
    with pytest.raises(dm.Refusal, match=r"2 of 3 shards .* missing \(test-0001-of-0003, test"):
        dm.merge(shards.folder)
    for i in (1, 2):
        shards.run(i, 3)
    part = base / "test-0001-of-0003-00000.safetensors"
    part.rename(base / "away")
    with pytest.raises(dm.Refusal, match=r"part 0 of shard 1 of 3, is missing"):
        dm.merge(shards.folder)
    shutil.copy(base / "test-0002-of-0003-00000.safetensors", part)
    with pytest.raises(dm.Refusal, match=r"00000\.safetensors is not the part that shard 1 of 3"):
        dm.merge(shards.folder)
    (base / "away").rename(part)
    file = TensorFile(base / "fit.safetensors")
    write_tensors(file.path, dict(file), {**file.metadata, "sources": []})
    with pytest.raises(dm.Refusal, match=r"json was scored with maps of another merge"):
        dm.merge(shards.folder)


def test_a_shard_is_run_once_and_goes_on(shards: Sharded, tmp_path: Path) -> None:
    first = shards.folder / "shards" / "fit-0000-of-0003.safetensors"
    before = first.read_bytes()
    with pytest.raises(dm.Refusal, match="Shard 0 of 3 of the fit pass is in"):
        shards.run(0, 3)
    assert shards.run(0, 3, resume=True) == first
    shards.run(0, 3, force=True)
    assert first.read_bytes() == before
    with pytest.raises(dm.Refusal, match=r"what differs: skip \(4, not 5\); pass"):
        shards.run(0, 3, resume=True, skip=5)
    with pytest.raises(dm.Refusal, match=r"has shards of another number than 4"):
        shards.run(0, 4)
    with pytest.raises(dm.Refusal, match="expected \\(i, n\\)"):
        shards.run(3, 3)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(dm.Refusal, match="has other things in it"):
        shards.run(0, 3, folder=tmp_path / "full")
    with pytest.raises(dm.Refusal, match="There is no folder"):
        shards.run(0, 3, folder=None)


def test_an_interrupted_shard_is_not_merged(shards: Sharded) -> None:
    second = shards.folder / "shards" / "fit-0001-of-0003.safetensors"
    whole = second.read_bytes()

    def killed() -> None:
        # Of two batches with two SAEs each: both of the first, its checkpoint, then no more.
        with killed_after(4):
            shards.run(1, 3, force=True)

    assert ended(forked(killed)) == -signal.SIGKILL
    with pytest.raises(
        dm.Refusal, match=r"0001-of-0003\.safetensors is a shard that was interrupt"
    ):
        dm.merge(shards.folder)
    shards.run(1, 3, resume=True)
    assert second.read_bytes() == whole
    assert dm.merge(shards.folder).name == "fit.safetensors"


def free_port() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def launched(world: int, work: Any) -> list[int]:
    """Forks as torchrun starts them."""
    keys = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world)}
    return [forked(partial(work, rank), **keys, RANK=str(rank)) for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_agree_with_one(
    tiny_model: Any,
    documents: dm.Tokens,
    saes: dict[str, Any],
    whole: Any,
    tmp_path: Path,
    world: int,
) -> None:
    where = tmp_path / "found"

    def work(rank: int) -> None:
        found = dm.survey(tiny_model, saes, documents, folder=where, resume=True, **KEYS)
        assert_same(found, whole)

    assert [ended(process) for process in launched(world, work)] == [0] * world
    assert_same(dm.Survey.load(where), whole)
    assert not (where / "state").exists()


def test_a_killed_process_and_a_restart(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], whole: Any, tmp_path: Path
) -> None:
    where = tmp_path / "found"

    def work(rank: int) -> None:
        dm.survey(tiny_model, saes, documents, folder=where, resume=True, **KEYS)

    processes = launched(2, work)
    until = time.monotonic() + 60
    while not list(where.glob("state/fit-*")) and time.monotonic() < until:
        time.sleep(0.001)
    # As torchrun does when one of its processes dies.
    for process in reversed(processes):
        os.kill(process, signal.SIGKILL)
    assert [ended(process) for process in processes] == [-signal.SIGKILL] * 2
    with pytest.raises(dm.Refusal, match="begun by another number of processes than 1"):
        work(0)
    assert [ended(process) for process in launched(2, work)] == [0, 0]
    assert_same(dm.Survey.load(where), whole)


def test_all_processes_end_when_one_refuses(
    tiny_model: Any, documents: dm.Tokens, saes: dict[str, Any], tmp_path: Path
) -> None:
    where = tmp_path / "found"
    where.mkdir()
    (where / "thesis.tex").write_text("x")

    def work(rank: int) -> None:
        expected = "is not empty" if rank == 0 else "Another process of this run refused"
        with pytest.raises(dm.Refusal, match=expected):
            dm.survey(tiny_model, saes, documents, folder=where, **KEYS)

    assert [ended(process) for process in launched(2, work)] == [0, 0]


def test_hashes_see_every_number_and_setting(tiny_saes: dict[str, Any]) -> None:
    x = torch.arange(6.0)
    assert hash_tensors({"a": x, "b": x}) == hash_tensors({"b": x.clone(), "a": x})
    others = [{"a": x.reshape(2, 3)}, {"b": x}, {"a": x.double()}, {"a": x + 1e-6}]
    assert hash_tensors({"a": x}) not in [hash_tensors(other) for other in others]
    topk, rescaled = tiny_saes["topk"], tiny_saes["topk_rescaled"]
    assert fingerprint(topk) == fingerprint(topk)
    rescaled_as_topk = dict(topk.state_dict())
    rescaled_before = dict(rescaled.state_dict())
    rescaled.load_state_dict(rescaled_as_topk)
    assert fingerprint(topk) != fingerprint(rescaled)
    rescaled.load_state_dict(rescaled_before)
    zero = LinearMap(torch.zeros(32, 32).double(), torch.zeros(32).double(), 0.0, 5)
    one = LinearMap(torch.zeros(32, 32).double(), torch.ones(32).double(), 0.0, 5)
    assert fingerprint(LinearlyCorrected(topk, zero)) != fingerprint(LinearlyCorrected(topk, one))

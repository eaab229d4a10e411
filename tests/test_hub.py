"""Whatever can be wrong with a hub, met by a stand-in of it on this machine."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

import darkmatter as dm
from darkmatter._files import CorruptFile
from darkmatter._hub import cached_file, cached_revision, fetch, from_cache_only, locate
from darkmatter._refusal import Refusal
from tests.hub_stand_in import REVISION, Fault, HubStandIn

REPOSITORY, FILE = "some-owner/some-model", "weights.safetensors"
BODY = bytes(range(256)) * 400


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    """The hub is the stand-in, the cache is empty, nobody is logged in."""
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / FILE).write_bytes(BODY)
    with HubStandIn() as stand_in:
        stand_in.add(REPOSITORY, tmp_path / "served")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        point_at(monkeypatch, stand_in.endpoint)
        yield stand_in


def point_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    resolve = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + resolve)


def files_of_cache() -> list[Path]:
    return [
        p for p in Path(constants.HF_HUB_CACHE).rglob("*") if p.is_file() and p.suffix != ".lock"
    ]


def test_a_file_is_fetched_once_and_its_revision_is_known(hub: HubStandIn) -> None:
    path = fetch(REPOSITORY, FILE)
    assert path is not None
    assert path.read_bytes() == BODY
    assert cached_file(REPOSITORY, FILE) == path
    assert cached_revision(REPOSITORY) == REVISION
    asked = len(hub.requests)
    assert fetch(REPOSITORY, FILE) == path
    assert fetch(REPOSITORY, FILE, REVISION) == path
    assert len(hub.requests) == asked
    assert fetch(REPOSITORY, "other.json") is None
    assert cached_revision("some-owner/other") is None


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(401, "GatedRepo"), r"\(401\), whose licence .* log in \(hf auth login, or HF_TOKEN"),
        (Fault(403, "GatedRepo"), r"\(403\), whose licence .* accept it at .*/some-owner/some-mod"),
        (Fault(401, "RepoNotFound"), "has no model .* that you may read; check the name"),
        (Fault(404, "RepoNotFound"), "has no model .* that you may read; check the name"),
        (Fault(404, "RevisionNotFound"), "has no such revision; see .*/commits"),
        (Fault(429), r"too many requests .* \(429\); wait a few hundred seconds"),
        (Fault(500), "answers 500 for .*; try again later"),
        (Fault(503), "answers 503 for .*; try again later"),
        (Fault(slow=6.0), "does not answer"),
    ],
    ids=lambda value: f"{value.status}{value.code}" if isinstance(value, Fault) else "",
)
def test_a_refusing_hub_is_one_sentence_at_once(hub: HubStandIn, fault: Fault, said: str) -> None:
    hub.faults[REPOSITORY, "*"] = fault
    start = time.monotonic()
    with pytest.raises(Refusal, match=said) as caught:
        fetch(REPOSITORY, FILE)
    assert time.monotonic() - start < 5
    assert REPOSITORY in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_of_cache() == []


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_without_network_the_repository_is_named_within_5_seconds(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    point_at(monkeypatch, endpoint)
    start = time.monotonic()
    with pytest.raises(Refusal, match=f"{FILE} of '{REPOSITORY}' .* {endpoint} does not answer"):
        fetch(REPOSITORY, FILE)
    with pytest.raises(Refusal, match=f"'{REPOSITORY}' .* {endpoint} does not answer"):
        locate(REPOSITORY)
    with pytest.raises(Refusal, match=f"'openai-community/gpt2' .* {endpoint} does not answer"):
        dm.load_suite("gpt2-small")
    # Three refusals.
    assert time.monotonic() - start < 3 * 5


def test_a_download_cut_in_the_middle_goes_on_where_it_was(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What the client keeps is whole chunks, of 10 MB otherwise.
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.faults[REPOSITORY, FILE] = Fault(cut=60_000, times=1)
    path = fetch(REPOSITORY, FILE)
    assert path is not None
    assert path.read_bytes() == BODY
    assert hub.requests[-1] == ("GET", REPOSITORY, FILE, "bytes=60000-")


def test_a_download_that_is_cut_for_good_leaves_nothing_and_works_later(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pause(_: float) -> None: ...

    # The client tries six times, a second apart.
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", no_pause)
    hub.faults[REPOSITORY, FILE] = Fault(cut=1)
    with pytest.raises(Refusal, match=f"download of {FILE} of '{REPOSITORY}' broke off; run it"):
        fetch(REPOSITORY, FILE)
    assert cached_file(REPOSITORY, FILE) is None
    assert not [file for file in files_of_cache() if file.stat().st_size > 1000]
    hub.faults.clear()
    path = fetch(REPOSITORY, FILE)
    assert path is not None
    assert path.read_bytes() == BODY


def test_a_download_that_stalls_goes_on_and_one_that_always_does_breaks_off(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pause(_: float) -> None: ...

    # The client waits ten seconds for a byte, and tries six times, a second apart.
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", no_pause)
    hub.faults[REPOSITORY, FILE] = Fault(stall=2.0)
    with pytest.raises(Refusal, match=f"download of {FILE} of '{REPOSITORY}' broke off; run it"):
        fetch(REPOSITORY, FILE)
    assert cached_file(REPOSITORY, FILE) is None
    hub.faults[REPOSITORY, FILE] = Fault(stall=2.0, times=1)
    path = fetch(REPOSITORY, FILE)
    assert path is not None
    assert path.read_bytes() == BODY


@pytest.mark.parametrize("longer", [5, -5])
def test_a_hub_that_lies_about_the_length(hub: HubStandIn, longer: int) -> None:
    hub.faults[REPOSITORY, FILE] = Fault(longer=longer)
    with pytest.raises(CorruptFile, match=f"{FILE} of '{REPOSITORY}' arrived with another length"):
        fetch(REPOSITORY, FILE)
    assert cached_file(REPOSITORY, FILE) is None


def test_another_sha256_than_announced_is_deleted(hub: HubStandIn) -> None:
    hub.faults[REPOSITORY, FILE] = Fault(other=True)
    with pytest.raises(CorruptFile, match="another SHA-256 than the hub announced; it was deleted"):
        fetch(REPOSITORY, FILE)
    assert cached_file(REPOSITORY, FILE) is None
    hub.faults.clear()
    path = fetch(REPOSITORY, FILE)
    assert path is not None
    assert path.read_bytes() == BODY


def test_a_disk_that_is_too_small_is_refused_before_and_one_that_fills_up_while_downloading(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.faults[REPOSITORY, FILE] = Fault(longer=2**60)
    with pytest.raises(Refusal, match=rf"'{REPOSITORY}' takes 107374\d+.\d GiB .* set HF_HOME"):
        fetch(REPOSITORY, FILE)
    hub.faults.clear()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(Refusal, match=f"is full, so {FILE} of '{REPOSITORY}' cannot be downloaded"):
        fetch(REPOSITORY, FILE)


def test_a_cache_that_cannot_be_written_is_named(
    hub: HubStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("huggingface_hub.file_download.http_get", denied)
    with pytest.raises(Refusal, match=r"cannot be written to .* \(Permission denied\); check"):
        fetch(REPOSITORY, FILE)


def test_a_model_and_a_release_name_what_is_wrong_with_theirs(hub: HubStandIn) -> None:
    """The same care for the model of a suite and for the files of its SAEs."""
    from darkmatter.suites.releases import open_release

    hub.faults["google/gemma-2-2b", "*"] = Fault(403, "GatedRepo")
    with pytest.raises(Refusal, match=r"'google/gemma-2-2b' \(403\).*accept it at .*gemma-2-2b "):
        dm.load_suite("gemma-2-2b")
    hub.faults["jbloom/GPT2-Small-SAEs-Reformatted", "*"] = Fault(500)
    with pytest.raises(Refusal, match="answers 500 for 'jbloom/GPT2-Small-SAEs-Reformatted'"):
        open_release("gpt2-small-res-jb", "blocks.0.hook_resid_pre")
    # A release whose repository lost a file.
    hub.faults.clear()
    hub.add("jbloom/GPT2-Small-SAEs-Reformatted", hub.folders[REPOSITORY])
    with pytest.raises(Refusal, match=r"has no blocks.*cfg.json, which SAE 'blocks"):
        open_release("gpt2-small-res-jb", "blocks.0.hook_resid_pre")


def test_from_cache_only_ends_with_its_block(hub: HubStandIn) -> None:
    with from_cache_only():
        assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HUB_OFFLINE is False

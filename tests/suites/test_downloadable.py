"""Suites from the hub, opened from a stand-in of the hub's cache; nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import darkmatter as dm
from darkmatter.suites import DOWNLOADABLE, HubSuite
from darkmatter.suites.releases import open_release
from tests.common import refused
from tests.conftest import write_model
from tests.hub_stand_in import (
    REVISION,
    TOPK_OF_LAYER_NORM,
    add_to_cache,
    random_weights,
    residual_moments,
    write_language_model,
    write_sae_lens,
)

PRE, POST = "resid_pre.8-24576-l40", "resid_post.8-32768-l32"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache with a model of 9 blocks under GPT-2 small's name, and folders of two SAEs."""
    home = tmp_path_factory.mktemp("gpt2")
    entry = DOWNLOADABLE["gpt2-small"]
    assert entry.revision is not None
    model = write_language_model(home / "model", "gpt2", 32, 9)
    at = residual_moments(model)
    hook = "blocks.8.hook_resid_pre"
    write_sae_lens(home / "pre" / f"{hook}_24576", random_weights(at[8], 96, 8, 0), hook)
    # Half of its latents are positive without a threshold, so that the top 32 are.
    weights, hook = random_weights(at[9], 96, 48, 1), "blocks.8.hook_resid_post"
    write_sae_lens(home / "post" / "v5_32k_layer_8.pt", weights, hook, **TOPK_OF_LAYER_NORM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
        add_to_cache(home / "hub", entry.model, model, entry.revision)
        yield home


@pytest.fixture(scope="module")
def suite(home: Path) -> HubSuite:
    suite = dm.load_suite("gpt2-small")
    assert isinstance(suite, HubSuite)
    return suite


@pytest.mark.parametrize("name", sorted(DOWNLOADABLE))
def test_without_network_or_cache_the_repository_is_named(cache: Path, name: str) -> None:
    with refused(f"'{DOWNLOADABLE[name].model}'.*HF_HUB_OFFLINE is set"):
        dm.load_suite(name)


def test_a_suite_reads_like_the_embedded_one(suite: HubSuite) -> None:
    # Loading fetched no SAE: there is none to be had.
    with refused("cfg.json of 'jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8' is not in"):
        suite.saes[PRE]
    with refused("expected the name of an SAE of suite 'gpt2-small', got 'resid_pre.8'"):
        suite.saes["resid_pre.8"]
    assert suite.hook == "blocks.8.hook_resid_pre"
    assert suite.skip == 10
    assert len(suite.grid("width")) == 8
    assert suite.grid("l0") == [PRE, "resid_pre.8-24576-l60"]
    assert set(suite.grid("width")) <= set(suite.saes) == set(suite.catalogue["name"])
    embedded = dm.load_suite("pydocs").catalogue
    assert {"name", "hook", "d_sae", "aim_l0"} <= {*suite.catalogue} & {*embedded}
    for bad in (suite.grid, suite.tokens):
        with refused("expected (kind|split)"):
            bad("depth")

    for seed in (0, 1):
        fit, test = suite.tokens("fit", seed), suite.tokens("test", seed)
        assert not set(fit.document.tolist()) & set(test.document.tolist())
        assert int(fit.tokens.max()) < suite.model.vocabulary
        assert set(fit.tokens[:, 0].tolist()) == {suite.model.tokenizer.bos_token_id}
        assert fit.names == suite.documents
    assert suite.revisions == {"openai-community/gpt2": DOWNLOADABLE["gpt2-small"].revision}


def test_its_saes_read_the_activations_of_its_model(suite: HubSuite, home: Path) -> None:
    """Trained on centred activations or behind a layer norm, which are undone."""
    first = suite.entry.repositories[0]
    add_to_cache(home / "hub", first, home / "pre")
    add_to_cache(home / "hub", "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", home / "post")
    assert suite.revisions[first] == REVISION
    (row,) = (row for row in dm.list_suites() if row["name"] == "gpt2-small")
    assert (row["cached"], row["saes_cached"]) == (False, 2)

    few = suite.tokens("test").select(torch.arange(12))
    both = [suite.hook, "blocks.8.hook_resid_post"]
    batch = dm.collect(dm.stream(suite.model, both, few, skip=suite.skip))
    normalised: Any = suite.saes[POST]
    centred: Any = suite.saes[PRE]
    assert centred is suite.saes[PRE]
    mean = batch.x.mean(1, keepdim=True)
    expected = centred.sae(batch.x - mean) + mean
    torch.testing.assert_close(dm.reconstruct(centred, batch.x), expected, rtol=1e-4, atol=1e-4)
    # The layer-norm SAE is one of 32 latents and two that undo the norm; sae-lens' own forward does
    # the same, in float32 sums of order 10.
    x = batch.others[both[1]]
    code = dm.sparse_encode(normalised, x)
    assert set(code.l0.tolist()) == {32 + 2}
    expected = normalised.sae(x)
    torch.testing.assert_close(dm.sparse_decode(normalised, code), expected, rtol=1e-4, atol=1e-4)


def test_its_own_text_is_the_papers_amount_of_its_data_set(
    suite: HubSuite, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def read_dataset(name: str, seed: int) -> Any:
        asked.append((name, seed))
        return ((f"{name}#{row}", "the cat sat on the mat " * (10 + row % 7)) for row in range(999))

    own = replace(suite, text="own")
    vars(own)["model"] = suite.model
    with refused("'Skylion007/openwebtext'"):
        own.tokens("fit")
    monkeypatch.setattr("darkmatter.documents.read_dataset", read_dataset)
    fit, test = own.tokens("fit"), own.tokens("test")
    assert asked == [("Skylion007/openwebtext", 42)]
    # 300 documents with one context each, of the model's 64 tokens, 60 % to fit.
    assert (fit.n_contexts, test.n_contexts) == (180, 120)
    assert fit.tokens.shape[1] == 64
    assert len(set(fit.document.tolist()) | set(test.document.tolist())) == 300
    assert own.skip == own.entry.skip
    assert own.documents == fit.names


def test_a_file_cut_short_in_the_cache_is_named(cache: Path, tmp_path: Path) -> None:
    folder = tmp_path / "layer_5/width_16k/average_l0_68"
    folder.mkdir(parents=True)
    (folder / "params.npz").write_bytes(b"PK half of a file")
    add_to_cache(cache, "google/gemma-scope-2b-pt-res", tmp_path)
    with refused("l0_68' of 'google/gemma-scope-2b-pt-res' cannot be read .*; delete .*params.npz"):
        open_release("gemma-scope-2b-pt-res", "layer_5/width_16k/average_l0_68")


def test_a_cached_suite_is_surveyed(cache: Path, tmp_path: Path) -> None:
    """pythia-70m, whose architecture is another."""
    entry = DOWNLOADABLE["pythia-70m"]
    model = write_model(tmp_path / "model", "gpt_neox")
    add_to_cache(cache, entry.model, model)
    suite = dm.load_suite("pythia-70m")
    weights = random_weights(residual_moments(model)[1], 64, 8, 0)
    hook, name = "blocks.0.hook_resid_post", "resid_post.0-32768"
    write_sae_lens(tmp_path / "saes" / "0-res-sm", weights, hook, model_name="pythia-70m-deduped")
    add_to_cache(cache, entry.repositories[0], tmp_path / "saes")
    few = [suite.tokens(split).select(torch.arange(60)) for split in ("fit", "test")]
    found = dm.survey(suite.model, {name: suite.saes[name]}, *few, skip=4, resamples=10)
    assert 0 < found.table.loc[name, "fvu_nonlinear"] <= found.table.loc[name, "fvu"]

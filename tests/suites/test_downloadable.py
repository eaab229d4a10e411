"""A suite from the hub, opened from a stand-in of the hub's cache; nothing is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import darkmatter as dm
from darkmatter.suites import DOWNLOADABLE
from tests.conftest import write_model


def add_to_cache(cache: Path, repository: str, source: Path) -> None:
    """What the hub's client leaves behind: refs/main and a snapshot folder."""
    revision = "c0ffee" + "0" * 34
    folder = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / revision)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def test_without_network_or_cache_the_repository_is_named(cache: Path) -> None:
    with pytest.raises(dm.Refusal, match="EleutherAI/pythia-70m-deduped"):
        dm.load_suite("pythia-70m")
    (row,) = (r for r in dm.list_suites() if r["name"] == "pythia-70m")
    assert row["cached"] is False


def test_a_cached_suite_is_surveyed(cache: Path, tmp_path: Path) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    entry = DOWNLOADABLE["pythia-70m"]
    add_to_cache(cache, entry.model, write_model(tmp_path / "model", "gpt_neox"))
    suite = dm.load_suite("pythia-70m")
    hook = "blocks.1.hook_resid_post"
    with pytest.raises(dm.Refusal, match="ctigges/pythia-70m-deduped__res-sm_processed"):
        suite.saes[hook]
    sae = StandardSAE(
        StandardSAEConfig(
            d_in=32,
            d_sae=64,
            device="cpu",
            dtype="float32",
            metadata=SAEMetadata(hook_name=hook, model_name="pythia-70m-deduped"),
        )
    )
    with torch.no_grad():
        sae.W_enc.copy_(sae.W_dec.T)
    sae.save_model(tmp_path / "saes" / "1-res-sm")
    add_to_cache(cache, entry.repository, tmp_path / "saes")

    fit, test = suite.tokens("fit"), suite.tokens("test")
    assert not set(fit.document.tolist()) & set(test.document.tolist())
    assert int(fit.tokens.max()) < suite.model.vocabulary
    few = [t.select(torch.arange(60)) for t in (fit, test)]
    found = dm.survey(suite.model, {hook: suite.saes[hook]}, *few, skip=4, resamples=10)
    assert 0 < found.table.loc[hook, "fvu_nonlinear"] <= found.table.loc[hook, "fvu"]

"""From a name to a survey through the hub's own protocol, as a user does it: in a process that has
nothing in its cache and a stand-in of the hub to ask.

Names, files and formats are those of the real releases; the weights are random, and whatever no
SAE sees is small. Gemma Scope's SAE has its real width, which sae-lens knows by heart.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from darkmatter.suites.catalogue import DOWNLOADABLE
from darkmatter.suites.releases import release
from tests.hub_stand_in import (
    REVISION,
    Fault,
    HubStandIn,
    random_weights,
    residual_moments,
    write_gemma_scope,
    write_language_model,
    write_llama_scope,
    write_sae_lens,
)

GPT2, GEMMA, LLAMA = "resid_pre.1-24576-l10", "resid_post.5-16384-l68", "resid_post.1-32768-l50"
USER = """
import json, sys, torch
import darkmatter as dm
for suite_name, sae, contexts in json.loads(sys.argv[1]):
    suite = dm.load_suite(suite_name)
    # Of many documents.
    rows = {"fit": 20 * torch.arange(contexts), "test": 20 * torch.arange(6)}
    few = [suite.tokens(split).select(chosen) for split, chosen in rows.items()]
    found = dm.survey(
        suite.model, {sae: suite.saes[sae]}, *few, skip=4, resamples=10, downstream=False
    )
    said = {**found.table.loc[sae].to_dict(), "revisions": suite.revisions}
    print(json.dumps({"suite": suite_name, **said}), flush=True)
"""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubStandIn]:
    """The three models and one SAE of each; a cut in the middle of the largest file."""
    home = tmp_path_factory.mktemp("served")
    with HubStandIn() as hub:
        model = write_language_model(home / "gpt2", "gpt2", 768, 2)
        entry = DOWNLOADABLE["gpt2-small"]
        hub.add(entry.model, model, entry.revision or REVISION)
        weights = random_weights(residual_moments(model)[1], 24_576, 10, 0)
        hook = "blocks.1.hook_resid_pre"
        write_sae_lens(home / "jb" / hook, weights, hook)
        repository = str(release("gpt2-small-res-jb")["repo_id"])
        hub.add(repository, home / "jb")
        hub.faults[repository, f"{hook}/sae_weights.safetensors"] = Fault(cut=50 << 20, times=1)

        model = write_language_model(home / "gemma", "gemma2", 2304, 7)
        hub.add("google/gemma-2-2b", model)
        weights = random_weights(residual_moments(model)[6], 16_384, 68, 1)
        write_gemma_scope(home / "scope/layer_5/width_16k/average_l0_68", weights, live=256)
        hub.add("google/gemma-scope-2b-pt-res", home / "scope")

        model = write_language_model(home / "llama", "llama", 64, 3)
        hub.add("meta-llama/Llama-3.1-8B", model)
        source = release("llama_scope_lxr_8x")
        row = source["saes"][1]
        weights = random_weights(residual_moments(model)[2], 512, 20, 2)
        write_llama_scope(
            home / "llama_scope" / row["path"],
            weights,
            "blocks.1.hook_resid_post",
            row["norm_scaling_factor"],
        )
        hub.add(source["repo_id"], home / "llama_scope")
        yield hub


@pytest.fixture(scope="module")
def surveyed(served: HubStandIn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By suite, what a user's process printed."""
    home = tmp_path_factory.mktemp("user")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": served.endpoint, "NO_PROXY": "127.0.0.1"}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    # Contexts of 59 tokens that count: more tokens than dimensions.
    wanted = [["gpt2-small", GPT2, 14], ["gemma-2-2b", GEMMA, 40], ["llama-3.1-8b", LLAMA, 14]]
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USER, json.dumps(wanted)],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    rows = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    return {row["suite"]: row for row in rows} | {"home": home}


def test_gpt2_with_an_sae_of_real_shape(surveyed: dict[str, Any], served: HubStandIn) -> None:
    row = surveyed["gpt2-small"]
    # One latent more, which carries the mean.
    assert (row["hook"], row["d_sae"]) == ("blocks.1.hook_resid_pre", 24_576 + 1)
    check_scores(row, l0=10)
    assert row["revisions"]["openai-community/gpt2"] == DOWNLOADABLE["gpt2-small"].revision
    # The pinned revision of the model was asked for, and of the releases only one SAE.
    repositories = {repository for _, repository, _, _ in served.requests}
    jb = "jbloom/GPT2-Small-SAEs-Reformatted"
    assert repositories & set(DOWNLOADABLE["gpt2-small"].repositories) == {jb}
    files = {name for _, repository, name, _ in served.requests if repository == jb}
    hook = "blocks.1.hook_resid_pre"
    assert files == {f"{hook}/cfg.json", f"{hook}/sae_weights.safetensors"}


def test_a_cut_download_went_on_where_it_was(surveyed: dict[str, Any], served: HubStandIn) -> None:
    weights = "blocks.1.hook_resid_pre/sae_weights.safetensors"
    ranges = [
        where for method, _, name, where in served.requests if (method, name) == ("GET", weights)
    ]
    assert ranges[0] == ""
    assert len(ranges) == 2
    # What the client keeps is whole chunks of 10 MB.
    assert int(ranges[1].removeprefix("bytes=").removesuffix("-")) >= 40 << 20
    folder = surveyed["home"] / "hub"
    assert not list(folder.rglob("*.incomplete"))


def test_gemma_2_with_gemma_scope_in_real_width(surveyed: dict[str, Any]) -> None:
    row = surveyed["gemma-2-2b"]
    assert (row["hook"], row["d_sae"]) == ("blocks.5.hook_resid_post", 16_384)
    # 256 of its 16384 latents are not zeros: about 68 / 16384 of them are active on a token.
    check_scores(row, l0=68 * 256 / 16_384)
    assert row["dead"] >= 1 - 256 / 16_384
    assert row["revisions"]["google/gemma-2-2b"] == REVISION


def test_llama_with_llama_scope(surveyed: dict[str, Any]) -> None:
    """Weights in bfloat16, of activations times a norm that sae-lens knows."""
    row = surveyed["llama-3.1-8b"]
    assert (row["hook"], row["d_sae"]) == ("blocks.1.hook_resid_post", 512)
    check_scores(row, l0=20)


def check_scores(row: dict[str, Any], l0: float) -> None:
    """Random SAEs, fitted on few tokens: no value is expected, only that all hang together."""
    assert all(math.isfinite(row[name]) for name in ("fvu", "fvu_nonlinear", "r2_norm"))
    # Their thresholds are those of Gaussian activations, which these are not; an SAE that got other
    # activations than it reads (not centred, not scaled) would have none or all of its latents.
    assert l0 / 10 < row["l0"] < l0 * 10
    # Random directions add as much as they explain; a norm of 40 that was not undone would stand
    # here squared.
    assert 0 < row["fvu"] < 10

"""The embedded suite as shipped, the promises of its card, and a rebuild at toy size."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import darkmatter as dm
from darkmatter.shards import locked
from darkmatter.suites.pydocs import corpus, recipe
from darkmatter.suites.pydocs.language_model import (
    LanguageModelRecipe,
    TiedCrossEntropy,
    document_contexts,
    learning_rate_scale,
    orthogonalise,
    packed_contexts,
)
from tests.surveys import ended, forked


@pytest.fixture(scope="module")
def suite() -> dm.Suite:
    return dm.load_suite("pydocs")


def test_size_and_every_file_is_listed_with_its_sha256(suite: dm.Suite) -> None:
    files = {p.relative_to(suite.path).as_posix() for p in suite.path.rglob("*") if p.is_file()}
    assert files - set(suite.manifest["files"]) == {"suite.json", "README.md"}
    suite.verify("")
    assert sum((suite.path / f).stat().st_size for f in files) <= 40 * 2**20


def test_card_says_what_the_manifest_says(suite: dm.Suite) -> None:
    text = (suite.path / "README.md").read_text(encoding="utf-8")
    assert f"{suite.manifest['validation']['nats']:.3f} nats a token" in text
    for package in suite.manifest["packages"]:
        assert corpus.is_permitted(package["licence"]), package
        assert f"| {package['name']} | {package['version']} |" in text
    for entry in suite.manifest["saes"]:
        assert f"| {entry['fvu']:.4f} |" in text


def test_every_sae_keeps_what_was_promised(suite: dm.Suite) -> None:
    assert len(suite.catalogue) == 13
    for entry in suite.manifest["saes"]:
        assert entry["training_activations"] >= 10_000_000, entry["name"]
        assert abs(entry["l0"] / entry["aim_l0"] - 1) <= 0.15, entry["name"]
        assert entry["dead"] <= 0.10, entry["name"]
    fvu = suite.catalogue.set_index("name")["fvu"]
    for kind in ("width", "l0"):
        falling = fvu[suite.grid(kind)].tolist()
        assert len(falling) == 5
        assert all(a > b for a, b in pairwise(falling)), kind


def test_validation_cross_entropy(suite: dm.Suite) -> None:
    tokens = torch.cat([suite.tokens(s).tokens[::8] for s in ("fit", "test")])
    loss = float(suite.model.loss(tokens).double().mean())
    assert suite.manifest["validation"]["nats"] <= 2.9
    # An eighth of the contexts: 0.1 nats is four of their standard errors (2 nats over 100 contexts
    # of correlated tokens, about 0.03 a context).
    assert loss == pytest.approx(suite.manifest["validation"]["nats"], abs=0.15)


def test_fit_and_test_share_no_document_for_any_seed(suite: dm.Suite) -> None:
    for seed in (0, 1, 2):
        fit, test = suite.tokens("fit", seed), suite.tokens("test", seed)
        assert not set(fit.document.tolist()) & set(test.document.tolist())
        assert fit.n_contexts + test.n_contexts == 800
    assert not torch.equal(suite.tokens("fit", 1).document, suite.tokens("fit", 2).document)


def test_transformers_bridge_and_nnsight_agree_on_the_suite(suite: dm.Suite) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(suite.path / "model", dtype=torch.float32)
    tokens = suite.tokens("test").tokens[:4]
    with torch.no_grad():
        hidden = plain(tokens, output_hidden_states=True).hidden_states
    hooks = [f"blocks.{block}.hook_resid_post" for block in range(3)]
    models = {b: suite.open_model(b) for b in ("bridge", "nnsight")}
    for name, model in models.items():
        found = model.activations(tokens, hooks)
        for block, hook in enumerate(hooks):
            # float32 through four blocks, different order of sums in attention: 1e-5 of the scale.
            scale = float(hidden[block + 1].std())
            difference = float((found[hook] - hidden[block + 1]).abs().max())
            assert difference <= 1e-4 * max(1.0, scale * 10), (name, hook, difference)
    losses = [m.loss(tokens) for m in models.values()]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)


def test_sae_lens_opens_every_sae_and_its_explained_variance_agrees(suite: dm.Suite) -> None:
    from sae_lens import SAE
    from sae_lens.evals import ExplainedVarianceCalculator

    tokens = suite.tokens("test")
    few = tokens.select(torch.arange(24))
    hooks = sorted({entry["hook"] for entry in suite.manifest["saes"]})
    batch = dm.collect(dm.stream(suite.model, hooks, few))
    at = {hooks[0]: batch.x, **batch.others}
    for entry in suite.manifest["saes"]:
        sae = SAE.load_from_disk(suite.path / "saes" / entry["name"], device="cpu")
        x = at[entry["hook"]]
        with torch.no_grad():
            x_hat = sae.decode(sae.encode(x))
        theirs = ExplainedVarianceCalculator()
        theirs.add_batch(x_hat, x)
        assert dm.fvu(x, x_hat) == pytest.approx(1 - float(theirs.compute()), abs=1e-4)
        assert dm.fvu(x, dm.reconstruct(suite.saes[entry["name"]], x)) == pytest.approx(
            dm.fvu(x, x_hat), abs=1e-5
        )


def test_unknown_names_are_refused_with_what_exists(suite: dm.Suite) -> None:
    with pytest.raises(dm.Refusal, match="known suites: pydocs"):
        dm.load_suite("gpt-17")
    with pytest.raises(dm.Refusal, match=r"choose one of resid_post\.2-512-l8"):
        suite.saes["resid_post.2-513-l8"]
    with pytest.raises(dm.Refusal, match="'fit' or 'test'"):
        suite.tokens("validation")
    with pytest.raises(dm.Refusal, match="'width' or 'l0'"):
        suite.grid("depth")
    assert dm.list_suites()[0]["name"] == "pydocs"


@pytest.fixture
def copy(suite: dm.Suite, tmp_path: Path) -> Iterator[dm.Suite]:
    shutil.copytree(suite.path, tmp_path / "suite")
    yield dm.load_suite(tmp_path / "suite")
    shutil.rmtree(tmp_path / "suite")


@pytest.mark.parametrize("fault", ["altered", "truncated", "missing"])
def test_a_damaged_weight_file_is_named(copy: dm.Suite, fault: str) -> None:
    name = copy.grid("width")[0]
    for file, use in (
        (f"saes/{name}/sae_weights.safetensors", lambda: copy.saes[name]),
        ("tokens.safetensors", lambda: copy.tokens("fit")),
    ):
        path = copy.path / file
        content = bytearray(path.read_bytes())
        if fault == "altered":
            content[-1] ^= 1
        if fault == "missing":
            path.unlink()
        else:
            path.write_bytes(content[: len(content) // 2] if fault == "truncated" else content)
        with pytest.raises(dm.Refusal, match=path.name):
            use()


def test_a_damaged_manifest_is_refused(copy: dm.Suite) -> None:
    (copy.path / "suite.json").write_text("{", encoding="utf-8")
    with pytest.raises(dm.Refusal, match=r"readable suite\.json"):
        dm.load_suite(copy.path)
    (copy.path / "suite.json").write_text(json.dumps({"format": "other"}), encoding="utf-8")
    with pytest.raises(dm.Refusal, match="darkmatter-suite/1"):
        dm.load_suite(copy.path)


def test_a_toy_rebuild_from_corpus_to_survey(tmp_path: Path) -> None:
    lines: list[str] = []
    toy = recipe.SuiteRecipe.toy()
    recipe.build(toy, tmp_path / "work", tmp_path / "out", lines.append)
    built = dm.load_suite(tmp_path / "out")
    # Guessing uniformly costs log 512 = 6.24 nats; sixty steps must learn more than nothing.
    assert built.manifest["validation"]["nats"] < 0.9 * math.log(toy.language_model.vocabulary)
    assert [e["name"] for e in built.manifest["saes"]] == [
        "resid_post.1-64-l4",
        "resid_post.1-128-l4",
    ]
    for entry in built.manifest["saes"]:
        assert 0 < entry["fvu_nonlinear"] <= entry["fvu"] < 1
        assert entry["l0"] == pytest.approx(4, rel=0.3)
    # A second call finds every stage done and only packages again, with the same files.
    before = built.manifest["files"]
    count = len(lines)
    recipe.build(toy, tmp_path / "work", tmp_path / "out", lines.append)
    assert not any("step" in line for line in lines[count:])
    assert dm.load_suite(tmp_path / "out").manifest["files"] == before


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    from darkmatter.suites.pydocs.language_model import train_language_model

    small = LanguageModelRecipe(
        d_model=16,
        n_layer=1,
        n_head=2,
        d_mlp=32,
        n_context=16,
        vocabulary=64,
        batch_contexts=4,
        micro_contexts=2,
        steps=8,
        warmup_steps=2,
    )
    stream = torch.randint(1, 64, (400,), generator=torch.Generator().manual_seed(0)).short()
    validation = packed_contexts(stream, 16, 0)[:4]

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        if line.startswith("step 4 validation"):
            raise Killed

    def run(folder: Path, log: Any) -> Any:
        return train_language_model(small, stream, validation, folder, log, checkpoint_every=2)

    whole = run(tmp_path / "whole", lambda line: None)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill)
    # Killed while saving step 4, so it goes on from step 2, whatever the history says already.
    history = tmp_path / "killed" / "history.jsonl"
    history.write_text(history.read_text() + '{"step": 4}\n')
    resumed = run(tmp_path / "killed", lambda line: None)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [json.loads(line)["step"] for line in history.read_text().splitlines()] == [2, 4, 6, 8]


def tiny_recipe() -> recipe.SuiteRecipe:
    """The toy with the docstrings of one package and six steps of training."""
    toy = recipe.SuiteRecipe.toy()
    sizes = {"d_model": 16, "d_mlp": 32, "n_context": 32, "vocabulary": 300, "steps": 6}
    return replace(
        toy,
        language_model=replace(toy.language_model, batch_contexts=4, micro_contexts=4, **sizes),
        training=replace(toy.training, activations=2000, batch=128, dead_after=1000),
        packages=frozenset({"click"}),
        activations=2000,
        fit_contexts=30,
        test_contexts=20,
        silent_tokens=1000,
    )


def test_a_rebuild_killed_anywhere_goes_on_to_the_same_suite(
    suite: dm.Suite, tmp_path: Path
) -> None:
    """A fork kills itself instead of giving some file or folder its final name."""
    # Imported here, so that no fork has to.
    assert suite.model.n_layer
    assert suite.saes[suite.grid("width")[0]] is not None
    work, out = tmp_path / "work", tmp_path / "out"

    def build(left: int) -> None:
        rename = os.replace

        def counted(*paths: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            rename(*paths)

        with mock.patch.object(os, "replace", counted):
            recipe.build(tiny_recipe(), work, out, lambda line: None)

    # In the corpus, the training, after the model, among the SAEs, and in packaging.
    for left in (3, 3, 2, 3, 3):
        assert ended(forked(partial(build, left))) == -signal.SIGKILL
        assert not out.exists()
    build(10**9)
    recipe.build(tiny_recipe(), tmp_path / "elsewhere", tmp_path / "whole", lambda line: None)
    hashes = [dm.load_suite(folder).manifest["files"] for folder in (out, tmp_path / "whole")]
    for name, sha256 in hashes[0].items():
        # An SAE's settings tell how long it was trained.
        assert name.endswith("cfg.json") or sha256 == hashes[1][name], name
    assert list(hashes[0]) == list(hashes[1])
    assert not list(tmp_path.rglob("*.tmp"))
    assert not (work / "lock").exists()


def test_a_rebuild_has_its_folder_alone_and_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        locked(tmp_path / "lock"),
        pytest.raises(dm.Refusal, match=f"is in use by process {os.getpid()} on"),
    ):
        recipe.build(tiny_recipe(), tmp_path, tmp_path / "out", lambda line: None)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(recipe, "read_corpus", full)
        with pytest.raises(dm.Refusal, match=r"cannot be written \(.*No space left .*make room"):
            recipe.build(tiny_recipe(), tmp_path, tmp_path / "out", lambda line: None)
    recipe.read_corpus(tiny_recipe(), tmp_path, lambda line: None)
    recipe.train_model(tiny_recipe(), tmp_path, lambda line: None)
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(dm.Refusal, match=r"activations take 0\.0 GiB and .* make room"):
        recipe.collect_activations(tiny_recipe(), tmp_path, lambda line: None)


def test_docstrings_in_source_order_with_qualified_names() -> None:
    method = '    """C."""\n    def f(self):\n        """F."""\n'
    source = f'"""M."""\nclass A:\n{method}def g():\n    """G."""\n'
    assert list(corpus.docstrings(source)) == [("", "M."), ("A", "C."), ("A.f", "F."), ("g", "G.")]


def test_deduplication_keeps_a_long_paragraph_once() -> None:
    shared = "A paragraph that is long enough to be recognised wherever it is seen again. " * 2
    own = "Text that only this module has, in a sentence that is long enough to be kept."
    documents = list(
        corpus.deduplicate(
            [
                ("a", "p", [("", f"{shared}\n\n{own} One.")]),
                ("b", "p", [("", f"{shared}\n\n{own} Two.")]),
                ("c", "p", [("", f"{own}   One.".replace("   ", " "))]),
            ]
        )
    )
    assert [d.name for d in documents] == ["a", "b", "c"]
    assert sum(shared.strip() in d.text for d in documents) == 1


@pytest.mark.parametrize(
    ("licence", "permitted"),
    [
        ("MIT", True),
        ("BSD-3-Clause", True),
        ("Apache Software License", True),
        ("PSF-2.0", True),
        ("Python Software Foundation License", True),
        ("MPL-2.0", False),
        ("GNU General Public License (GPL); BSD License", False),
        ("LGPL-2.1 AND MIT", False),
        ("", False),
    ],
)
def test_licences(licence: str, permitted: bool) -> None:
    assert corpus.is_permitted(licence) is permitted


def test_contexts_lie_in_one_document_each() -> None:
    documents = [
        torch.arange(1, 8).short(),
        torch.arange(10, 13).short(),
        torch.arange(20, 30).short(),
    ]
    tokens, index = document_contexts(documents, 4)
    assert tokens.tolist() == [
        [0, 1, 2, 3],
        [0, 4, 5, 6],
        [0, 10, 11, 12],
        [0, 20, 21, 22],
        [0, 23, 24, 25],
        [0, 26, 27, 28],
    ]
    assert index.tolist() == [0, 0, 1, 2, 2, 2]
    assert document_contexts(documents, 4, most=1)[1].tolist() == [0, 1, 2]


def test_tied_cross_entropy_equals_autograd() -> None:
    hidden = torch.randn(12, 8, dtype=torch.float64).float().requires_grad_()
    weight = torch.randn(20, 8).requires_grad_()
    target = torch.randint(0, 20, (12,))
    ours = TiedCrossEntropy.apply(hidden, weight, target)
    ours.backward()
    mine = hidden.grad, weight.grad
    hidden.grad = weight.grad = None
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, target)
    expected.backward()
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    for a, b in zip(mine, (hidden.grad, weight.grad), strict=True):
        # float32 sums of 20 terms.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_orthogonalise_brings_singular_values_near_one() -> None:
    for shape in ((16, 48), (48, 16)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        # The quintic's coefficients aim at 0.7 to 1.2, not at 1 (Jordan 2024); bfloat16 adds 1 %.
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_learning_rate_rises_stays_and_falls() -> None:
    small = LanguageModelRecipe(steps=100, warmup_steps=10, decay_share=0.4)
    scale = [learning_rate_scale(step, small) for step in range(100)]
    assert scale[0] == pytest.approx(0.1)
    assert scale[9:60] == pytest.approx([1.0] * 51)
    assert scale[80] == pytest.approx(0.5)
    assert scale[99] == pytest.approx(1 / 40)

"""The survey against a slow route: everything in memory, one least-squares solve a target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import darkmatter as dm
from darkmatter.activations import Tokens

SKIP = 4


def in_memory(model: Any, sae: Any, tokens: Tokens, hook: str) -> dict[str, torch.Tensor]:
    """Activations, errors, documents of every measured token, by plain indexing."""
    x, document = [], []
    for context, number in zip(tokens.tokens, tokens.document, strict=True):
        at = model.activations(context[None], hook)[0]
        keep = torch.arange(len(context)) >= SKIP
        keep[-1] = False
        keep &= context != 0
        x.append(at[keep])
        document += [int(number)] * int(keep.sum())
    rows = torch.cat(x).double()
    x_hat = sae.decode(sae.encode(rows.float())).double()
    return {"x": rows, "error": rows - x_hat, "document": torch.tensor(document)}


def with_ones(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


@pytest.fixture(scope="module")
def documents(tiny_model: Any) -> Tokens:
    """Forty contexts of twenty documents of random tokens, with a special token now and then."""
    generator = torch.Generator().manual_seed(4)
    size = (40, tiny_model.n_context)
    tokens = torch.randint(0, tiny_model.vocabulary, size, generator=generator)
    tokens[:, 0] = 0
    names = tuple(f"document {i}" for i in range(20))
    return Tokens(tokens, torch.arange(40) // 2, names)


@pytest.fixture(scope="module")
def two_saes(tiny_saes: dict[str, Any]) -> dict[str, Any]:
    return {name: tiny_saes[name] for name in ("jumprelu", "topk")}


@pytest.fixture(scope="module")
def surveyed(tiny_model: Any, documents: Tokens, two_saes: dict[str, Any]) -> Any:
    fit, test = documents.split_documents(0.6, seed=0)
    return dm.survey(tiny_model, two_saes, fit, test, skip=SKIP, resamples=50)


def test_scores_equal_separate_solves_in_memory(
    surveyed: Any, tiny_model: Any, two_saes: dict[str, Any]
) -> None:
    for name, sae in two_saes.items():
        hook = sae.cfg.metadata.hook_name
        fit = in_memory(tiny_model, sae, surveyed.fit, hook)
        test = in_memory(tiny_model, sae, surveyed.test, hook)
        solution = torch.linalg.lstsq(with_ones(fit["x"]), fit["error"], driver="gelsd").solution
        linear = with_ones(test["x"]) @ solution
        nonlinear = test["error"] - linear
        variance = (test["x"] - test["x"].mean(0)).square().sum()
        about = test["error"] - test["error"].mean(0)
        norm = test["error"].square().sum(1)
        norm_fit = fit["error"].square().sum(1, keepdim=True)
        probe = torch.linalg.lstsq(with_ones(fit["x"]), norm_fit, driver="gelsd").solution
        off = norm - (with_ones(test["x"]) @ probe)[:, 0]
        expected = {
            "fvu": test["error"].square().sum() / variance,
            "fvu_nonlinear": nonlinear.square().sum() / variance,
            "r2_vector": (1 - nonlinear.square().sum(0) / about.square().sum(0)).mean(),
            "r2_vector_pooled": 1 - nonlinear.square().sum() / about.square().sum(),
            "r2_norm": 1 - off.square().sum() / (norm - norm.mean()).square().sum(),
        }
        for score, value in expected.items():
            # The survey's activations and codes are float32; a score is a ratio of sums of them.
            assert surveyed.table.loc[name, score] == pytest.approx(float(value), rel=1e-4), score


def test_intervals_contain_their_values_and_frames_agree(surveyed: Any) -> None:
    for name, frame in surveyed.per_token.items():
        for score in ("fvu", "fvu_nonlinear", "r2_vector", "r2_norm"):
            interval = surveyed.interval(name, score)
            assert interval.low <= interval.value <= interval.high
        assert frame["position"].min() == SKIP
        parts = frame["linear_norm2"] + frame["nonlinear_norm2"]
        # |e|^2 = |linear|^2 + |nonlinear|^2 + twice their product, which is small, not zero.
        assert (parts > 0).all()
        assert np.isfinite(frame.to_numpy()).all()
        assert surveyed.table.loc[name, "l0"] == pytest.approx(frame["l0"].mean())


def test_one_set_of_tokens_is_split_by_document(
    tiny_model: Any, documents: Tokens, two_saes: dict[str, Any]
) -> None:
    name = next(iter(two_saes))
    found = dm.survey(tiny_model, {name: two_saes[name]}, documents, skip=SKIP, resamples=10)
    fit, test = set(found.fit.document.tolist()), set(found.test.document.tolist())
    assert not fit & test
    assert fit | test == set(documents.document.tolist())


def test_same_seed_same_table(surveyed: Any, tiny_model: Any, two_saes: dict[str, Any]) -> None:
    again = dm.survey(tiny_model, two_saes, surveyed.fit, surveyed.test, skip=SKIP, resamples=50)
    assert again.table.equals(surveyed.table)


def test_refusals(tiny_model: Any, documents: Tokens, two_saes: dict[str, Any]) -> None:
    with pytest.raises(dm.Refusal, match="expected at least one SAE"):
        dm.survey(tiny_model, {}, documents)
    with pytest.raises(dm.Refusal, match="of different documents"):
        dm.survey(tiny_model, two_saes, documents, documents, skip=SKIP)
    few = documents.select(torch.tensor([0]))
    other = documents.select(documents.document != documents.document[0])
    with pytest.raises(dm.Refusal, match="more fit tokens than"):
        dm.survey(tiny_model, two_saes, few, other, skip=SKIP)

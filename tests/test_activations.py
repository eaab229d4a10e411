"""The stream against a naive loop over contexts and positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.activations import Batch, Tokens, collect, stream
from darkmatter.models import Model
from tests.conftest import HOOK, VOCABULARY


@pytest.fixture
def tokens(tiny_tokens: Tensor) -> Tokens:
    return Tokens(tiny_tokens, torch.tensor([0, 0, 1, 2, 2, 3]), ("a", "b", "c", "d"))


@torch.no_grad()
def naive(folder: Path, tokens: Tokens, skip: int, special: set[int]) -> list[dict[str, Any]]:
    """One context and one position at a time, with plain transformers."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows: list[dict[str, Any]] = []
    for context, document in zip(tokens.tokens, tokens.document, strict=True):
        output = network(context[None], output_hidden_states=True, use_cache=False)
        log_p = output.logits[0].log_softmax(-1)
        for position in range(len(context)):
            token = int(context[position])
            if position < skip or position + 1 == len(context) or token in special:
                continue
            rows.append(
                {
                    # Entry i + 1 is what block i leaves (for all but the last block).
                    "post_1": output.hidden_states[2][0, position],
                    "post_0": output.hidden_states[1][0, position],
                    "token": token,
                    "position": position,
                    "document": int(document),
                    "loss": -log_p[position, context[position + 1]],
                }
            )
    return rows


@pytest.mark.parametrize("batch_contexts", [1, 4, 16])
@pytest.mark.parametrize(("skip", "special"), [(0, ()), (5, (0,)), (7, (0, 12))])
def test_stream_is_the_naive_loop(
    tiny_model_folder: Path,
    tiny_model: Model,
    tokens: Tokens,
    batch_contexts: int,
    skip: int,
    special: tuple[int, ...],
) -> None:
    rows = naive(tiny_model_folder, tokens, skip, set(special))
    hooks = [HOOK, "blocks.0.hook_resid_post"]
    batches = list(stream(tiny_model, hooks, tokens, skip, special, batch_contexts))
    assert len(batches) == -(-6 // batch_contexts)
    batch = collect(batches)
    assert len(batch) == len(rows)
    for name in ("token", "position", "document"):
        assert getattr(batch, name).tolist() == [row[name] for row in rows]
    # float32 rounding through two blocks; batches of other sizes multiply in another order.
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(batch.x, torch.stack([row["post_1"] for row in rows]), **close)
    assert list(batch.others) == ["blocks.0.hook_resid_post"]
    other = batch.others["blocks.0.hook_resid_post"]
    torch.testing.assert_close(other, torch.stack([row["post_0"] for row in rows]), **close)
    torch.testing.assert_close(batch.loss, torch.stack([row["loss"] for row in rows]), **close)


def test_one_forward_serves_all_hooks(
    tiny_model: Model, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    read = tiny_model.read
    monkeypatch.setattr(
        tiny_model, "read", lambda ids, hooks: (calls.append(len(ids)), read(ids, hooks))[1]
    )
    collect(stream(tiny_model, tiny_model.hooks, tokens, skip=2, batch_contexts=4))
    assert calls == [4, 2]


def test_batches_that_do_not_fit_are_halved(
    tiny_model: Model, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = collect(stream(tiny_model, [HOOK, "blocks.0.hook_mlp_out"], tokens, skip=2))
    read, calls, room = tiny_model.read, list[int](), 2

    def crowded(ids: Tensor, hooks: Any) -> Any:
        calls.append(len(ids))
        if len(ids) > room:
            raise torch.OutOfMemoryError
        return read(ids, hooks)

    monkeypatch.setattr(tiny_model, "read", crowded)
    with pytest.warns(RuntimeWarning, match="no memory for 5 contexts at a time.* goes on with 2"):
        halved = collect(
            stream(tiny_model, [HOOK, "blocks.0.hook_mlp_out"], tokens, 2, batch_contexts=5)
        )
    # What did not fit is tried once, and not again for the next batch.
    assert calls == [5, 2, 2, 1, 1]
    # Batches of other sizes multiply in another order.
    torch.testing.assert_close(halved.x, whole.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(halved.loss, whole.loss, rtol=1e-5, atol=1e-5)
    for hook, x in whole.others.items():
        torch.testing.assert_close(halved.others[hook], x, rtol=1e-5, atol=1e-5)
    room = 0
    batches = stream(tiny_model, HOOK, tokens, skip=2, batch_contexts=1)
    with pytest.raises(Refusal, match="cpu has no memory for one context of 32 tokens"):
        next(batches)


def test_contexts_that_are_masked_whole_are_left_out(tiny_model: Model) -> None:
    ids = torch.zeros(3, 8, dtype=torch.int64)
    ids[1, 5] = 7
    tokens = Tokens(ids, torch.arange(3), ("a", "b", "c"))
    batch = collect(stream(tiny_model, HOOK, tokens, skip=2, batch_contexts=1))
    assert (batch.token.tolist(), batch.position.tolist()) == ([7], [5])
    assert batch.document.tolist() == [1]
    assert batch.others == {}


def test_select_and_split(tokens: Tokens) -> None:
    assert (tokens.n_contexts, tokens.n_tokens) == (6, 192)
    assert tokens.select(torch.tensor([5, 0])).document.tolist() == [3, 0]
    assert tokens.select(tokens.document == 2).n_contexts == 2
    first, second = tokens.split_documents(0.5, seed=0)
    assert first.n_contexts + second.n_contexts == 6
    assert len(first.document.unique()) == len(second.document.unique()) == 2
    assert not set(first.document.tolist()) & set(second.document.tolist())
    again, _ = tokens.split_documents(0.5, seed=0)
    assert torch.equal(first.tokens, again.tokens)
    splits = {tuple(tokens.split_documents(0.5, seed=s)[0].document.tolist()) for s in range(9)}
    assert len(splits) > 1


def test_a_split_with_an_empty_part_is_refused(tokens: Tokens) -> None:
    with pytest.raises(Refusal, match="0 of 4 documents"):
        tokens.split_documents(0.1, seed=0)
    with pytest.raises(Refusal, match="0 contexts"):
        tokens.select(tokens.document == 9)


@pytest.mark.usefixtures("unchecked")
def test_tokens_that_make_no_sense_are_refused() -> None:
    ids, document = torch.ones(2, 8, dtype=torch.int64), torch.tensor([0, 1])
    with pytest.raises(Refusal, match="2 contexts of 0 documents"):
        Tokens(ids, document, ())
    with pytest.raises(Refusal, match="0 contexts of 2 documents"):
        Tokens(ids[:0], document[:0], ("a", "b"))
    with pytest.raises(Refusal, match=r"document \(3,\)"):
        Tokens(ids, torch.zeros(3, dtype=torch.int64), ("a", "b"))
    with pytest.raises(Refusal, match="of document 1, expected 0 to 0"):
        Tokens(ids, document, ("a",))
    with pytest.raises(Refusal, match="1 tokens, expected 2 or more"):
        Tokens(ids[:, :1], document, ("a", "b"))
    with pytest.raises(Refusal, match="id is -1"):
        Tokens(-ids, document, ("a", "b"))


def test_stream_refuses_before_it_runs_anything(tiny_model: Model, tokens: Tokens) -> None:
    ids = tokens.tokens.clone()
    ids[3, 20] = VOCABULARY
    outside = Tokens(ids, tokens.document, tokens.names)
    with pytest.raises(Refusal, match=r"Token 300 at position 20 of context 3 \(document 'c'\)"):
        stream(tiny_model, HOOK, outside, skip=1)
    with pytest.raises(Refusal, match=r"skip is 31 and contexts have 32 tokens.*0 to 30"):
        stream(tiny_model, HOOK, tokens, skip=31)
    with pytest.raises(Refusal, match="no hook 'x'"):
        stream(tiny_model, "x", tokens, skip=1)
    with pytest.raises(Refusal, match="each once"):
        stream(tiny_model, [HOOK, HOOK], tokens, skip=1)
    with pytest.raises(Refusal, match="batch_contexts is 0"):
        stream(tiny_model, HOOK, tokens, skip=1, batch_contexts=0)
    long = Tokens(torch.ones(1, 40, dtype=torch.int64), torch.tensor([0]), ("a",))
    with pytest.raises(Refusal, match="40 tokens, but"):
        stream(tiny_model, HOOK, long, skip=1)
    blank = Tokens(torch.zeros(1, 8, dtype=torch.int64), torch.tensor([0]), ("a",))
    with pytest.raises(Refusal, match="No token is left"):
        stream(tiny_model, HOOK, blank, skip=1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_by_name(
    tiny_model: Model, tokens: Tokens, monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    read = tiny_model.read

    def broken(ids: Tensor, hooks: Any) -> Any:
        found, loss = read(ids, hooks)
        # The third context, a document's second; masked positions may hold anything.
        if len(ids) == 1 and torch.equal(ids[0], tokens.tokens[4]):
            found[HOOK][0, 2] = found[HOOK][0, 17] = bad
        return found, loss

    monkeypatch.setattr(tiny_model, "read", broken)
    with pytest.raises(
        Refusal,
        match=rf"{HOOK} is NaN or infinite at position 17 of context 4 \(document 'c'\), 1 of",
    ):
        collect(stream(tiny_model, HOOK, tokens, skip=5, batch_contexts=1))


def test_collect_refuses_nothing_and_mixtures(tiny_model: Model, tokens: Tokens) -> None:
    with pytest.raises(Refusal, match="no batches"):
        collect([])
    one: list[Batch] = list(stream(tiny_model, HOOK, tokens, skip=5))
    two = list(stream(tiny_model, [HOOK, "blocks.0.hook_mlp_out"], tokens, skip=5))
    with pytest.raises(Refusal, match="different hooks"):
        collect(one + two)


def test_some_contexts_are_those_of_all(tiny_model: Model, tokens: Tokens) -> None:
    whole = collect(stream(tiny_model, HOOK, tokens, skip=5, batch_contexts=2))
    assert whole.context.unique().tolist() == list(range(tokens.n_contexts))
    assert torch.equal(tokens.document[whole.context], whole.document)
    assert torch.equal(tokens.tokens[whole.context, whole.position], whole.token)
    some = collect(stream(tiny_model, HOOK, tokens, skip=5, batch_contexts=2, start=2, stop=5))
    rows = (whole.context >= 2) & (whole.context < 4)
    # Batches of the same contexts: the same bits. The third is cut short.
    assert torch.equal(some.x[: int(rows.sum())], whole.x[rows])
    assert some.context.unique().tolist() == [2, 3, 4]
    assert not list(stream(tiny_model, HOOK, tokens, skip=5, start=6))

"""Splicing against plain transformers, sae-lens, hand computation, and costs known beforehand."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.autoencoders import LinearlyCorrected, reconstruct
from darkmatter.leastsquares import LinearMap, LinearStatistics, fvu
from darkmatter.models import Model
from darkmatter.splicing import (
    Randomised,
    Splice,
    covariance_matched,
    isotropic_noise,
    remembered,
    sae_norm,
    same_angle,
    shuffled_error,
    splice,
)
from darkmatter.synthetic import covariance_root
from tests.common import normal
from tests.conftest import D_MODEL, HOOK, N_CONTEXT, VOCABULARY

SKIP = 8
SCORED = N_CONTEXT - 1 - SKIP
# float32 rounding of logits of order 10 through three blocks and a softmax.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="session")
def tokens(tiny_tokens: Tensor) -> Tokens:
    """Six contexts of four documents; two documents have two."""
    return Tokens(tiny_tokens, torch.tensor([0, 0, 1, 2, 2, 4]), ("a", "b", "c", "d", "e"))


@pytest.fixture(scope="session")
def likely(tiny_model: Model) -> Tokens:
    """Text the random model itself finds most likely, so that harm to the model costs something."""
    ids = torch.arange(1, 7)[:, None]
    for _ in range(N_CONTEXT - 1):
        ids = torch.cat([ids, tiny_model.logits(ids)[:, -1:].argmax(-1)], 1)
    return Tokens(ids, torch.tensor([0, 0, 1, 2, 2, 4]), ("a", "b", "c", "d", "e"))


@pytest.fixture(scope="session")
def plain(tiny_model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


def halved(x: Tensor) -> Tensor:
    return x * 0.5


def shifted(x: Tensor) -> Tensor:
    # Not by a constant: LayerNorm takes that away again.
    return x * 0.7 + torch.linspace(-1, 1, D_MODEL)


def flipped(x: Tensor) -> Tensor:
    return x.flip(1)


@torch.no_grad()
def by_transformers(
    plain: Any, tokens: Tensor, function: Callable[[Tensor], Tensor] | None, skip: int
) -> Tensor:
    """Log probabilities with resid_post of block 1 replaced from `skip` on, by a plain hook."""

    def replace(_module: Any, _inputs: Any, output: Any) -> Any:
        assert function is not None
        x = (output[0] if isinstance(output, tuple) else output).clone()
        x[:, skip:] = function(x[:, skip:])
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handle = plain.transformer.h[1].register_forward_hook(replace) if function else None
    try:
        return plain(tokens, use_cache=False).logits.double().log_softmax(-1)
    finally:
        if handle:
            handle.remove()


def test_scores_are_those_of_plain_transformers(
    tiny_model: Model, plain: Any, tokens: Tokens
) -> None:
    found = splice(tiny_model, tokens, HOOK, {"halved": halved, "shifted": shifted}, SKIP)
    ids = tokens.tokens
    log_p = by_transformers(plain, ids, None, SKIP)[:, SKIP:-1].flatten(0, 1)
    target = ids[:, SKIP + 1 :].flatten()[:, None]
    expected = -log_p.gather(1, target)[:, 0]
    torch.testing.assert_close(found.cross_entropy["original"].double(), expected, **CLOSE)
    for name, function in (("halved", halved), ("shifted", shifted)):
        log_q = by_transformers(plain, ids, function, SKIP)[:, SKIP:-1].flatten(0, 1)
        loss, kl = -log_q.gather(1, target)[:, 0], (log_p.exp() * (log_p - log_q)).sum(1)
        torch.testing.assert_close(found.cross_entropy[name].double(), loss, **CLOSE)
        torch.testing.assert_close(found.kl[name].double(), kl, **CLOSE)
        assert torch.equal(found.agreement[name], log_p.argmax(1) == log_q.argmax(1))
        # The means are those of the columns.
        assert found.mean(name).value == pytest.approx(float(loss.mean()), abs=1e-4)
        assert found.mean(name, "kl").value == pytest.approx(float(kl.mean()), abs=1e-4)
        assert found.cost(name).value == pytest.approx(float((loss - expected).mean()), abs=1e-4)
    assert abs(found.cost("halved").value) > 0.01


def test_mean_ablation_is_that_of_plain_transformers(
    tiny_model: Model, plain: Any, tokens: Tokens
) -> None:
    mean = tiny_model.activations(tokens.tokens, HOOK)[:, SKIP:].mean((0, 1))
    found = splice(tiny_model, tokens, HOOK, {"mean": lambda x: mean.expand_as(x)}, SKIP)
    log_q = by_transformers(plain, tokens.tokens, lambda x: mean.expand_as(x), SKIP)[:, SKIP:-1]
    expected = -log_q.gather(2, tokens.tokens[:, SKIP + 1 :, None]).flatten()
    torch.testing.assert_close(found.cross_entropy["mean"].double(), expected, **CLOSE)
    # The mean is what FVU is measured against, but for the last positions, which are not scored.
    assert found.fvu("mean").value == pytest.approx(1, abs=0.01)


def test_splicing_x_itself_costs_nothing_exactly(tiny_model: Model, likely: Tokens) -> None:
    for hook in (HOOK, "blocks.1.hook_mlp_out", "blocks.2.attn.hook_z"):
        variants = {"itself": lambda x: x, "flipped": flipped}
        found = splice(tiny_model, likely, hook, variants, SKIP)
        # The same operations on the same numbers: exact at hooks that replay the whole model and
        # to the rounding of a batch of another shape at those that resume (other unembedding).
        assert found.cost("itself").value == pytest.approx(0, abs=1e-6)
        assert float(found.kl["itself"].abs().max()) < 1e-5
        assert found.agreement["itself"].all()
        assert found.mean("itself", "agreement") == (1.0, 1.0, 1.0)
        assert found.fvu("itself").value == 0
        if hook == HOOK:
            assert found.recovered("itself", base="flipped").value == pytest.approx(1, abs=1e-5)
            assert found.recovered("flipped", base="flipped") == (0.0, 0.0, 0.0)
        with pytest.raises(Refusal, match=r"error of the base 'itself' is 0, expected above zero"):
            found.fvu_share("flipped")


def test_a_constant_at_the_last_block_has_the_kl_computed_by_hand(
    tiny_model: Model, plain: Any, tokens: Tokens
) -> None:
    # Whatever the token, the model then predicts one distribution q, read off the unembedding.
    constant = torch.linspace(-1, 2, D_MODEL)
    hook = "blocks.2.hook_resid_post"
    found = splice(tiny_model, tokens, hook, {"constant": lambda x: constant.expand_as(x)}, SKIP)
    with torch.no_grad():
        log_q = plain.lm_head(plain.transformer.ln_f(constant)).double().log_softmax(0)
    target = tokens.tokens[:, SKIP + 1 :].flatten()
    torch.testing.assert_close(found.cross_entropy["constant"].double(), -log_q[target], **CLOSE)
    log_p = by_transformers(plain, tokens.tokens, None, SKIP)[:, SKIP:-1].flatten(0, 1)
    kl = (log_p.exp() * log_p).sum(1) - log_p.exp() @ log_q
    torch.testing.assert_close(found.kl["constant"].double(), kl, **CLOSE)


def test_kl_of_two_coins_is_what_paper_and_pencil_give() -> None:
    from darkmatter.splicing import _Reference

    fair, loaded = torch.zeros(1, 2), torch.tensor([[log(3.0), 0.0]])
    scores = _Reference(loaded, torch.tensor([1])).score(fair)
    by_hand = 0.75 * log(0.75 / 0.5) + 0.25 * log(0.25 / 0.5)
    assert float(scores["kl"]) == pytest.approx(by_hand, abs=1e-6)
    assert float(scores["cross_entropy"]) == pytest.approx(log(2), abs=1e-6)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
def test_sae_lens_gives_the_same_losses(
    tiny_model: Model, tiny_saes: dict[str, Any], tokens: Tokens, kind: str
) -> None:
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = tiny_saes[kind]
    weight = normal(0, D_MODEL, D_MODEL) * 0.1
    corrected = LinearlyCorrected(sae, LinearMap(weight, normal(1, D_MODEL), 0.0, 100))
    found = splice(
        tiny_model,
        tokens,
        HOOK,
        {"sae": lambda x: reconstruct(sae, x), "corrected": corrected, "zero": torch.zeros_like},
        skip=0,
    )
    for name, candidate in (("sae", sae), ("corrected", corrected)):
        with torch.no_grad():
            theirs = get_recons_loss(
                candidate, tiny_model.underlying, ActivationScaler(), tokens.tokens, True, True
            )
        # They patch all positions, as skip=0 does; they score the last one's KL, we do not.
        for ours, key in (
            (found.cross_entropy[name], "ce_loss_with_sae"),
            (found.cross_entropy["original"], "ce_loss_without_sae"),
            (found.cross_entropy["zero"], "ce_loss_with_ablation"),
        ):
            torch.testing.assert_close(ours, theirs[key].flatten(), **CLOSE)
        kl = theirs["kl_div_with_sae"][:, :-1].flatten()
        torch.testing.assert_close(found.kl[name], kl, **CLOSE)
    assert abs(found.cost("sae").value) > 0.01


def test_backends_and_batches_agree(
    tiny_model: Model, nnsight_model: Model, tokens: Tokens
) -> None:
    variants = {"halved": halved, "shifted": shifted}
    for hook in (HOOK, "blocks.0.hook_mlp_out"):
        whole = splice(tiny_model, tokens, hook, variants, SKIP)
        for other in (
            splice(nnsight_model, tokens, hook, variants, SKIP),
            splice(tiny_model, tokens, hook, variants, SKIP, batch_contexts=1),
        ):
            for name in variants:
                torch.testing.assert_close(
                    whole.cross_entropy[name], other.cross_entropy[name], **CLOSE
                )
                torch.testing.assert_close(whole.kl[name], other.kl[name], **CLOSE)
            torch.testing.assert_close(whole.moments, other.moments, **CLOSE)
            assert torch.equal(whole.document, other.document)


def test_rows_are_the_tokens_that_count(tiny_model: Model, tokens: Tokens) -> None:
    calls: list[Tensor] = []

    def seen(x: Tensor) -> Tensor:
        calls.append(x)
        return x

    found = splice(tiny_model, tokens, HOOK, {"seen": seen}, SKIP, special=(0,), batch_contexts=4)
    kept = tokens.tokens != 0
    kept[:, :SKIP], kept[:, -1] = False, False
    context, position = kept.nonzero(as_tuple=True)
    # Three contexts have a special token among those that are scored.
    assert len(found) == 6 * SCORED - 3 == len(context)
    assert torch.equal(found.context, context)
    assert torch.equal(found.position, position)
    assert torch.equal(found.token, tokens.tokens[kept])
    assert torch.equal(found.document, tokens.document[context])
    torch.testing.assert_close(torch.cat(calls), tiny_model.activations(tokens.tokens, HOOK)[kept])
    loss = tiny_model.loss(tokens.tokens)[kept[:, :-1]]
    torch.testing.assert_close(found.cross_entropy["original"], loss, **CLOSE)
    # Special tokens stay as they are, too.
    half = splice(tiny_model, tokens, HOOK, {"halved": halved}, SKIP, special=(0,))
    mask = kept[..., None]
    loss = tiny_model.loss(tokens.tokens, {HOOK: lambda x: torch.where(mask, x / 2, x)})
    torch.testing.assert_close(half.cross_entropy["halved"], loss[kept[:, :-1]], **CLOSE)


def test_each_batch_is_read_once(tiny_model: Model, tokens: Tokens) -> None:
    network = tiny_model.underlying.original_model
    calls: dict[str, int] = {"first block": 0, "last block": 0}
    counted = {"first block": network.transformer.h[0].mlp, "last block": network.transformer.h[2]}
    tiny_model.resume(tokens.tokens, HOOK, tiny_model.activations(tokens.tokens, HOOK))
    handles = [
        module.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
        for name, module in counted.items()
    ]
    try:
        splice(tiny_model, tokens, HOOK, {str(i): halved for i in range(5)}, SKIP, batch_contexts=3)
    finally:
        for handle in handles:
            handle.remove()
    # Two batches: the first block for the clean forwards alone, the last for all.
    assert calls == {"first block": 2, "last block": 2 * (1 + 5)}


def made(
    costs: dict[str, Tensor], document: Tensor, base: str, errors: dict[str, Tensor] | None = None
) -> Splice:
    """A splice of planted costs: the original has loss 1 at every token."""
    n = len(document)
    rows = torch.arange(n)
    loss = {"original": torch.ones(n, dtype=torch.float64)}
    loss |= {name: 1 + cost for name, cost in costs.items()}
    errors = errors or {name: torch.ones(n, dtype=torch.float64) for name in costs}
    return Splice(
        hook=HOOK,
        skip=0,
        base=dict.fromkeys(costs, base),
        document=document,
        context=rows,
        position=rows,
        token=rows,
        cross_entropy=loss,
        kl={name: cost.abs() for name, cost in costs.items()},
        agreement={name: cost > 0 for name, cost in costs.items()},
        error_norm2=errors,
        added_norm2={name: torch.ones(n, dtype=torch.float64) for name in costs},
        moments=torch.ones(int(document.unique().numel()), 3, dtype=torch.float64),
    )


def test_recovered_is_a_ratio_of_document_sums() -> None:
    document = torch.tensor([0, 0, 0, 1])
    sae = torch.tensor([1.0, 1.0, 1.0, 5.0], dtype=torch.float64)
    linear = torch.tensor([0.5, 0.5, 0.5, 4.0], dtype=torch.float64)
    found = made({"sae": sae, "linear": linear}, document, "sae")
    # (1.5 + 1) / (3 + 5), not the mean over tokens of 0.5, 0.5, 0.5 and 0.2.
    assert found.recovered("linear").value == pytest.approx(2.5 / 8)
    # The only resamples of two documents: twice the first, both, twice the second.
    assert found.recovered("linear").low == pytest.approx(0.2)
    assert found.recovered("linear").high == pytest.approx(0.5)
    assert found.recovered(("linear", "linear")).value == pytest.approx(5 / 8)
    assert found.ratio("sae", "linear", "cost").value == pytest.approx(8 / 5.5)
    assert found.ratio("linear", "sae").value == pytest.approx(5.5 / 8)


def test_the_interval_holds_the_planted_share() -> None:
    """95 % intervals of 200 planted data sets; documents differ in size and in difficulty."""
    inside = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        size = torch.randint(5, 40, (60,), generator=generator)
        document = torch.arange(60).repeat_interleave(size)
        hard = 0.3 + torch.rand(60, generator=generator).double()
        noise = [torch.randn(len(document), generator=generator).double() for _ in range(2)]
        sae = hard[document] + 0.5 * noise[0]
        of_document = 0.1 * torch.randn(60, generator=generator).double()
        linear = sae - hard[document] * (0.6 + of_document[document]) + 0.2 * noise[1]
        interval = made({"sae": sae, "linear": linear}, document, "sae").recovered("linear")
        inside += interval.low <= 0.6 <= interval.high
    # Binomial(200, 0.95): mean 190, standard deviation 3.1; percentile intervals run a little
    # short, so three of them below.
    assert 178 <= inside <= 199


def test_shares_of_fvu_and_norm(tiny_model: Model, tokens: Tokens) -> None:
    direction = torch.zeros(D_MODEL)
    direction[3] = 1.0

    def sae(x: Tensor) -> Tensor:
        return x * 0.6

    variants = {
        "sae": sae,
        "one": lambda x: sae(x) + 0.4 * x * direction,
        "rest": lambda x: sae(x) + 0.4 * x * (1 - direction),
    }
    found = splice(tiny_model, tokens, HOOK, variants, SKIP)
    x = tiny_model.activations(tokens.tokens, HOOK)[:, SKIP:-1].flatten(0, 1)
    for name, function in variants.items():
        assert found.fvu(name).value == pytest.approx(fvu(x, function(x)), rel=1e-5)
    one = float(x[:, 3].double().square().sum() / x.double().square().sum())
    assert found.fvu_share("one").value == pytest.approx(one, rel=1e-5)
    assert found.norm_share("one").value == pytest.approx(one**0.5, rel=1e-5)
    # Orthogonal parts of the error: shares, and squared norm shares, add to one.
    assert found.fvu_share(("one", "rest")).value == pytest.approx(1, rel=1e-5)
    squares = found.norm_share("one").value ** 2 + found.norm_share("rest").value ** 2
    assert squares == pytest.approx(1, rel=1e-5)


def test_shares_of_fitted_parts_add_to_one_on_the_tokens_they_were_fitted_on(
    tiny_model: Model, tokens: Tokens
) -> None:
    def sae(x: Tensor) -> Tensor:
        return 0.5 * x + 2 * x.sin()

    x = tiny_model.activations(tokens.tokens, HOOK)[:, SKIP:-1].flatten(0, 1)
    assert len(x) > 2 * D_MODEL
    probe = LinearStatistics(D_MODEL, D_MODEL).partial_fit(x, x - sae(x)).solve()
    variants = {
        "sae": sae,
        "linear": lambda x: sae(x) + probe(x),
        "nonlinear": lambda x: x - probe(x),
    }
    found = splice(tiny_model, tokens, HOOK, variants, SKIP)
    # The residual of least squares is orthogonal to what was fitted; float32 rounds the splice.
    assert 0.05 < found.fvu_share("nonlinear").value < 0.95
    assert found.fvu_share(("linear", "nonlinear")).value == pytest.approx(1, rel=1e-4)


def test_tables(tiny_model: Model, likely: Tokens) -> None:
    variants = {"sae": flipped, "better": shifted, "itself": lambda x: x}
    found = splice(
        tiny_model, likely, HOOK, variants, SKIP, base={"better": "sae", "itself": "sae"}
    )
    assert found.base == {"sae": "sae", "better": "sae", "itself": "sae"}
    table = found.table
    assert list(table.index) == ["original", "sae", "better", "itself"]
    for name in variants:
        assert table.loc[name, "kl"] == found.mean(name, "kl").value
        assert table.loc[name, "cost_low"] == found.cost(name).low
    assert table.loc["better", "recovered"] == found.recovered("better").value
    assert table.loc["sae"].isna()["recovered"]
    assert table.loc["original"].isna()["cost"]
    rows = found.per_token
    assert len(rows) == 6 * SCORED
    assert rows["cross_entropy/sae"].mean() == pytest.approx(found.mean("sae").value, rel=1e-6)
    assert set(rows["document"]) == {0, 1, 2, 4}


def test_random_variants_depend_on_seed_and_name_only(tiny_model: Model, tokens: Tokens) -> None:
    noise = Randomised(lambda x, generator: isotropic_noise(x, halved(x), generator))

    def losses(variants: dict[str, Any], seed: int = 0) -> Tensor:
        found = splice(tiny_model, tokens, HOOK, variants, SKIP, seed=seed)
        return found.cross_entropy["noise"]

    alone = losses({"noise": noise})
    assert torch.equal(alone, losses({"sae": halved, "other": noise, "noise": noise}))
    assert not torch.equal(alone, losses({"noise": noise}, seed=1))
    both = splice(tiny_model, tokens, HOOK, {"noise": noise, "other": noise}, SKIP)
    assert not torch.equal(both.cross_entropy["noise"], both.cross_entropy["other"])


def test_remembered_computes_once_for_each_tensor() -> None:
    calls: list[int] = []

    @remembered
    def costly(x: Tensor) -> Tensor:
        calls.append(len(x))
        return x * 2

    a, b = torch.ones(2, 3), torch.ones(4, 3)
    for x in (a, a, b, b, a):
        assert torch.equal(costly(x), x * 2)
    assert calls == [2, 4, 2]


# Controls


def rows(seed: int, n: int = 40, d: int = 6) -> tuple[Tensor, Tensor]:
    x = normal(seed, n, d) + 1
    return x, x * 0.8 + 0.3 * normal(seed + 1000, n, d)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 200))
def test_controls_keep_what_they_promise(seed: int) -> None:
    x, x_hat = rows(seed)
    generator = torch.Generator().manual_seed(seed)
    size = (x - x_hat).norm(dim=1)
    root = covariance_root(torch.cov(x.T))
    for new in (
        isotropic_noise(x, x_hat, generator),
        covariance_matched(x, x_hat, root, generator),
        shuffled_error(x, x_hat, generator),
    ):
        # float64 up to the rounding of draws in float32, which are scaled exactly.
        torch.testing.assert_close((x - new).norm(dim=1), size)
        assert not torch.allclose(new, x_hat)
    cosine = torch.cosine_similarity(x, x_hat)
    turned = same_angle(x, x_hat, generator)
    torch.testing.assert_close(torch.cosine_similarity(x, turned), cosine)
    torch.testing.assert_close(turned.norm(dim=1), x_hat.norm(dim=1))
    # Same angle and same length: the error is as long as the SAE's.
    torch.testing.assert_close((x - turned).norm(dim=1), size)
    turned = same_angle(x, x_hat, generator, norm="x")
    torch.testing.assert_close(torch.cosine_similarity(x, turned), cosine)
    torch.testing.assert_close(turned.norm(dim=1), x.norm(dim=1))
    shrunk = sae_norm(x, x_hat)
    torch.testing.assert_close(shrunk.norm(dim=1), x_hat.norm(dim=1))
    torch.testing.assert_close(torch.cosine_similarity(x, shrunk), torch.ones(len(x)).double())


def test_shuffled_errors_are_those_of_other_tokens() -> None:
    x, x_hat = rows(0)
    error = x - x_hat
    new = x - shuffled_error(x, x_hat, torch.Generator().manual_seed(0))
    cosine = torch.nn.functional.normalize(new) @ torch.nn.functional.normalize(error).T
    best, whose = cosine.max(1)
    torch.testing.assert_close(best, torch.ones_like(best))
    assert sorted(whose.tolist()) == list(range(len(x)))
    assert (whose != torch.arange(len(x))).all()


def test_noise_has_the_covariance_it_is_given() -> None:
    x = torch.zeros(20_000, 3, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[4.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]).double()
    root = covariance_root(spread)
    torch.testing.assert_close(root.T @ root, spread)
    new = covariance_matched(x, x + 1, root, generator)
    # Directions are scaled to one length, which changes sizes; where nothing varies stays so.
    assert float(new[:, 2].abs().max()) < 1e-6
    assert float(torch.corrcoef(new[:, :2].T)[0, 1]) > 0.2
    even = isotropic_noise(x, x + 1, generator)
    # |u|^2 = 3 spread evenly over three dimensions; 20,000 draws, standard error 0.01.
    torch.testing.assert_close(torch.cov(even.T), torch.eye(3).double(), atol=0.05, rtol=0)


def test_a_token_without_error_stays_as_it_is() -> None:
    x, _ = rows(0)
    generator = torch.Generator().manual_seed(0)
    for control in (isotropic_noise, shuffled_error, same_angle):
        torch.testing.assert_close(control(x, x, generator), x)
    torch.testing.assert_close(sae_norm(x, x), x)


# Refusals


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_refused(tiny_model: Model, tokens: Tokens) -> None:
    def refused(says: str, **changed: Any) -> None:
        arguments: dict[str, Any] = {"hook": HOOK, "variants": {"halved": halved}, "skip": SKIP}
        with pytest.raises(Refusal, match=says):
            splice(tiny_model, tokens, **(arguments | changed))

    refused("no hook 'blocks.9.hook_resid_post'", hook="blocks.9.hook_resid_post")
    refused("There are no variants", variants={})
    refused("A variant is called 'original'", variants={"original": halved})
    refused("base of 'halved' is 'sae', which is no variant", base="sae")
    refused("base is given for 'sae', which is no variant", base={"sae": "halved"})
    refused("skip is 31 and contexts have 32", skip=N_CONTEXT - 1)
    refused("skip is -1", skip=-1)
    refused("batch_contexts is 0", batch_contexts=0)
    refused("No token is left.*at least one document", special=range(VOCABULARY))
    refused(r"'halved' returned \(138, 31\), expected .*\(138, 32\)", variants={"halved": cut})
    refused("'halved' returned int", variants={"halved": len})
    refused("'halved' changed its input in place", variants={"halved": lambda x: x.mul_(0.5)})


def cut(x: Tensor) -> Tensor:
    return x[:, 1:]


def test_nan_from_a_variant_names_it_and_the_first_token(tiny_model: Model, tokens: Tokens) -> None:
    calls: list[int] = []

    def broken(x: Tensor) -> Tensor:
        calls.append(len(x))
        x = x.clone()
        if len(calls) == 2:
            x[SCORED + 4, 7] = torch.nan
        return x

    # Row SCORED + 4 of the second batch of two contexts: context 3, position SKIP + 4.
    with pytest.raises(
        Refusal, match=rf"variant 'broken'.* position {SKIP + 4} of context 3 \(document 'c'\)"
    ):
        splice(tiny_model, tokens, HOOK, {"ok": halved, "broken": broken}, SKIP, batch_contexts=2)


def test_wrong_questions_are_refused(tiny_model: Model, tokens: Tokens) -> None:
    variants = {"sae": halved, "other": shifted, "itself": lambda x: x}
    found = splice(tiny_model, tokens, HOOK, variants, SKIP, base={"other": "itself"})
    for ask in (found.mean, found.cost, found.fvu, found.recovered, found.norm_share):
        with pytest.raises(Refusal, match="no variant 'nobody'; this splice has sae, other"):
            ask("nobody")
    with pytest.raises(Refusal, match=r"have the bases .*'itself', 'sae'.* expected one"):
        found.recovered(("sae", "other"))
    with pytest.raises(Refusal, match=r"the kl of 'itself' is .* expected above zero"):
        made({"sae": torch.ones(2), "itself": torch.zeros(2)}, torch.arange(2), "sae").ratio(
            "sae", "itself"
        )
    one = tokens.select(torch.tensor([0, 1]))
    alone = splice(tiny_model, one, HOOK, {"sae": halved}, SKIP)
    with pytest.raises(Refusal, match="at least 2 documents"):
        alone.cost("sae")


@pytest.mark.usefixtures("unchecked")
def test_wrong_rows_of_controls_are_refused() -> None:
    x, x_hat = rows(0)
    generator = torch.Generator()
    with pytest.raises(Refusal, match=r"x is \[40, 6\] and x_hat \[40, 5\]"):
        isotropic_noise(x, x_hat[:, :5], generator)
    with pytest.raises(Refusal, match="x has 1 row"):
        shuffled_error(x[:1], x_hat[:1], generator)
    with pytest.raises(Refusal, match="norm is 'y'"):
        same_angle(x, x_hat, generator, norm="y")  # pyright: ignore[reportArgumentType]
    with pytest.raises(Refusal, match=r"root is \[6, 5\], expected \[k, 6\]"):
        covariance_matched(x, x_hat, torch.ones(6, 5), generator)
    with pytest.raises(Refusal, match="symmetric"):
        covariance_root(torch.ones(2, 3))

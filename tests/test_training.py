"""The BatchTopK trainer: gradients against autograd and sae-lens, selection against a full sort."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import fvu
from darkmatter.training import (
    Active,
    Preactivations,
    SaeLensRecipe,
    SparseTrainingRecipe,
    TrainedAutoencoder,
    Weights,
    add_auxiliary,
    gradients,
    train_batch_topk,
    train_with_sae_lens,
)


def random_weights(d_sae: int, d_in: int, seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    decoder = torch.nn.functional.normalize(draw(d_sae, d_in), dim=1)
    return Weights(draw(d_sae, d_in) / d_in**0.5, 0.1 * draw(d_sae), decoder, 0.1 * draw(d_in))


def batch_topk(weights: Weights, x: torch.Tensor, count: int) -> Active:
    pre = (x - weights.b_dec) @ weights.encoder.T + weights.b_enc
    at = pre.flatten().topk(count).indices.sort().values
    row, column = at // pre.shape[1], at % pre.shape[1]
    return Active(row, column, pre[row, column].relu())


@pytest.mark.parametrize(("l0", "d_sae"), [(2, 512), (16, 64)], ids=["gathered", "dense"])
def test_gradients_equal_autograd(l0: int, d_sae: int) -> None:
    weights, x = random_weights(d_sae, 16), torch.randn(32, 16)
    count = l0 * len(x)
    loss, residual, ours = gradients(weights, x, batch_topk(weights, x, count))

    leaves = [w.clone().requires_grad_() for w in weights.all()]
    encoder, b_enc, decoder, b_dec = leaves
    pre = (x - b_dec) @ encoder.T + b_enc
    smallest = pre.flatten().topk(count).values[-1]
    x_hat = (pre * (pre >= smallest)).relu() @ decoder + b_dec
    expected = (x - x_hat).square().sum(1).mean()
    expected.backward()

    assert loss == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(residual, (x - x_hat).detach(), rtol=1e-4, atol=1e-5)
    # The dense branch multiplies in bfloat16, 8 bits of mantissa: 2^-8 of the largest entry.
    rtol = 2e-2 if l0 == 16 else 1e-4
    for mine, leaf in zip(ours, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(
            mine, leaf.grad, rtol=rtol, atol=rtol * float(leaf.grad.abs().max())
        )


def test_gradients_equal_sae_lens() -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    l0, weights, x = 2, random_weights(512, 16), torch.randn(32, 16)
    theirs = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=16,
            d_sae=512,
            k=l0,
            device="cpu",
            dtype="float32",
            apply_b_dec_to_input=True,
            rescale_acts_by_decoder_norm=False,
        )
    )
    theirs.load_state_dict(
        theirs.state_dict()
        | {
            "W_enc": weights.encoder.T.contiguous(),
            "b_enc": weights.b_enc,
            "W_dec": weights.decoder,
            "b_dec": weights.b_dec,
        }
    )
    output = theirs.training_forward_pass(
        TrainStepInput(
            sae_in=x,
            coefficients={},
            dead_neuron_mask=None,
            n_training_steps=0,
            is_logging_step=False,
        )
    )
    output.loss.backward()
    loss, _, ours = gradients(weights, x, batch_topk(weights, x, l0 * len(x)))
    assert loss == pytest.approx(output.loss.item(), rel=1e-5)
    expected = [theirs.W_enc.grad.T, theirs.b_enc.grad, theirs.W_dec.grad, theirs.b_dec.grad]
    for mine, grad in zip(ours, expected, strict=True):
        # float32 sums of 32 rows in another order.
        torch.testing.assert_close(mine, grad, rtol=1e-4, atol=1e-5)


def test_auxiliary_gradient_equals_autograd() -> None:
    weights, x = random_weights(32, 8), torch.randn(16, 8)
    residual, dead = torch.randn(16, 8), torch.tensor([3, 10, 20, 31])
    recipe = SparseTrainingRecipe(d_sae=32, l0=2, auxiliary_k=2)
    ours = [torch.zeros_like(w) for w in weights.all()]
    add_auxiliary(weights, ours, x, residual, dead, recipe)

    leaves = [w.clone().requires_grad_() for w in weights.all()]
    encoder, b_enc, decoder, b_dec = leaves
    # As in Gao et al., the residual and the centring are constants of this loss.
    pre = (x - b_dec.detach()) @ encoder[dead].T + b_enc[dead]
    top = pre.topk(2, 1)
    f = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    (recipe.auxiliary * (residual - f @ decoder[dead]).square().sum(1).mean()).backward()
    for mine, leaf in zip(ours[:3], leaves[:3], strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(mine, leaf.grad, rtol=1e-4, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 60),
    guess=st.floats(0, 8),
    shift=st.floats(-2, 2),
)
def test_selection_is_exact_whatever_the_guess(
    seed: int, count: int, guess: float, shift: float
) -> None:
    buffer = Preactivations(8, 16)
    buffer.pre.copy_(torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) + shift)
    row, column, smallest = buffer.select(count, guess)
    positive = buffer.pre.flatten()[buffer.pre.flatten() > 0].float().sort(descending=True).values
    expected = positive[:count]
    chosen = buffer.pre[row, column].float().sort(descending=True).values
    assert chosen.tolist() == expected.tolist()
    assert (row.diff() >= 0).all()
    assert smallest == (expected[-1] if len(expected) else 0.0)


def planted(n: int, d: int = 16, m: int = 24, seed: int = 0) -> torch.Tensor:
    """Sums of two of m directions, about a large mean."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    active = torch.rand(n, m, generator=generator).topk(2).indices
    values = 1 + torch.rand(n, 2, generator=generator)
    return (values[:, :, None] * directions[active]).sum(1) + 10.0


def reconstruct(trained: TrainedAutoencoder, x: torch.Tensor) -> tuple[torch.Tensor, float]:
    pre = x @ trained.W_enc + trained.b_enc
    f = pre * (pre > trained.threshold)
    return f @ trained.W_dec + trained.b_dec, float((f > 0).float().sum(1).mean())


def test_training_finds_planted_directions_and_keeps_its_l0() -> None:
    x = planted(20_000).half()
    recipe = SparseTrainingRecipe(
        d_sae=48, l0=2, activations=200_000, batch=512, dead_after=10_000, learning_rate=3e-3
    )
    trained = train_batch_topk(x, recipe)
    fresh = planted(4_000, seed=0).float()
    x_hat, l0 = reconstruct(trained, fresh)
    # Two latents a token cannot beat this unless they are the planted directions: the best two
    # principal components of 24 random directions in 16 dimensions leave over 0.7.
    assert fvu(fresh, x_hat) < 0.25
    # The threshold is set on a sample of the same distribution: 1 % is five standard errors.
    assert l0 == pytest.approx(2, rel=0.02)
    torch.testing.assert_close(trained.W_dec.norm(dim=1), torch.ones(48), rtol=0, atol=1e-3)


def test_training_is_reproducible() -> None:
    x = planted(2_000)
    recipe = SparseTrainingRecipe(d_sae=32, l0=2, activations=8_000, batch=256)
    first, second = train_batch_topk(x, recipe), train_batch_topk(x, recipe)
    assert torch.equal(first.W_enc, second.W_enc)
    assert torch.equal(first.threshold, second.threshold)


def test_refusals() -> None:
    with pytest.raises(Refusal, match="at least one batch of 4096 activations, got 10"):
        train_batch_topk(torch.randn(10, 4), SparseTrainingRecipe(d_sae=8, l0=2))
    with pytest.raises(Refusal, match="0 < l0 <= d_sae = 8, got 9"):
        train_batch_topk(torch.randn(10, 4), SparseTrainingRecipe(d_sae=8, l0=9, batch=4))


SMALL = SaeLensRecipe(d_sae=48, k=2, samples=60_000, batch=256)


def test_sae_lens_trainer_finds_planted_features_and_none_in_noise() -> None:
    x = planted(12_000)
    generator = torch.Generator().manual_seed(9)
    root = torch.linalg.cholesky(torch.cov(x.T))
    noise = x.mean(0) + torch.randn(x.shape, generator=generator) @ root.T
    scores: list[float] = []
    for rows in (x, noise):
        sae = train_with_sae_lens(rows[:10_000], SMALL)
        assert type(sae).__name__ == "TopKSAE"
        code = sae.encode(rows[10_000:])
        assert int((code > 0).sum(1).max()) <= 2
        scores.append(fvu(rows[10_000:], sae.decode(code)))
    # Two of the 24 planted directions a row are found; Gaussian rows of their covariance have none.
    assert scores[0] < 0.25
    assert scores[1] > 1.5 * scores[0]


def test_sae_lens_training_does_not_depend_on_units_or_storage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    x = planted(3_000)
    recipe = SaeLensRecipe(d_sae=32, k=2, samples=4_000, batch=200)
    before = torch.get_rng_state()
    plain = train_with_sae_lens(x, recipe)
    assert torch.equal(before, torch.get_rng_state())
    streamed = train_with_sae_lens(x / 64 + 3, recipe, rows_of=lambda rows: (rows - 3) * 64)
    large = train_with_sae_lens(100 * x, recipe)
    y = plain(x)
    # The offset of 3 costs float32 digits of x / 64, about 64 * 2^-22 of a row of size 40.
    assert (streamed(x) - y).norm() < 0.02 * y.norm()
    assert (large(100 * x) / 100 - y).norm() < 0.02 * y.norm()
    assert torch.equal(train_with_sae_lens(x, recipe)(x), y)
    assert not torch.equal(
        train_with_sae_lens(x, SaeLensRecipe(d_sae=32, k=2, samples=4_000, batch=200, seed=1))(x), y
    )
    assert capsys.readouterr() == ("", "")


def test_sae_lens_result_is_what_sae_lens_saves(tmp_path: Path) -> None:
    from sae_lens import SAE

    x = planted(1_000)
    sae = train_with_sae_lens(x, SaeLensRecipe(d_sae=32, k=3, samples=2_000, batch=100))
    sae.save_model(tmp_path)
    read = SAE.load_from_disk(tmp_path, device="cpu")
    assert torch.equal(read(x), sae(x))
    # Decoder rows are folded to unit norm, so the largest pre-activations are the largest parts.
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32), rtol=0, atol=1e-5)
    assert sae.cfg.k == 3


@pytest.mark.parametrize(
    ("rows", "recipe", "message"),
    [
        (torch.randn(50, 4), SaeLensRecipe(8, 2, 1000), "batch of at most 50 rows"),
        (torch.randn(600, 4), SaeLensRecipe(8, 2, 100), "100 samples"),
        (torch.randn(600, 4), SaeLensRecipe(8, 9, 1000), "0 < k <= d_sae = 8, got 9"),
        (torch.ones(600, 4), SaeLensRecipe(8, 2, 1000), "variance of 0"),
        (torch.full((600, 4), torch.nan), SaeLensRecipe(8, 2, 1000), "variance of nan"),
    ],
)
def test_sae_lens_refusals(rows: torch.Tensor, recipe: SaeLensRecipe, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        train_with_sae_lens(rows, recipe)

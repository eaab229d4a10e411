"""Gradients of architectures against sae-lens' training classes; what the trainer makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter.architectures import (
    Entries,
    Parameters,
    batch_largest,
    batch_topk_gradients,
    jumprelu_gradients,
    matching_pursuit_gradients,
)
from darkmatter.autoencoders import hook_of, load_autoencoder, reconstruct, sparse_encode
from darkmatter.leastsquares import fvu
from darkmatter.objectives import Architecture, ObjectiveRecipe, train_objective
from tests.common import normal, refused

NEW: tuple[Architecture, ...] = ("batchtopk", "matryoshka", "jumprelu", "matching_pursuit")


def random_parameters(d: int, m: int, threshold: Tensor | None = None) -> Parameters:
    decoder = torch.nn.functional.normalize(normal(1, m, d), dim=1)
    zeros = torch.zeros(m).double()
    return Parameters(
        normal(2, d, m) / d**0.5, 0.1 * normal(3, m), decoder, 0.1 * normal(4, d), zeros,
        zeros.clone(), threshold,
    )  # fmt: skip


def sae_lens_gradients(
    theirs: Any, parameters: Parameters, z: Tensor, coefficients: dict[str, float]
) -> dict[str, Tensor]:
    from sae_lens.saes.sae import TrainStepInput

    state = dict(theirs.state_dict())
    state |= {name: value for name, value in vars(parameters).items() if name in state}
    theirs.load_state_dict(state)
    step = TrainStepInput(
        sae_in=z,
        coefficients=coefficients,
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    theirs.training_forward_pass(step).loss.backward()
    return {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}


COMMON: dict[str, Any] = {"d_in": 8, "d_sae": 40, "dtype": "float64", "device": "cpu"}


def compare(ours: list[Tensor], theirs: dict[str, Tensor], names: dict[str, int]) -> None:
    assert set(names) <= set(theirs)
    for name, place in names.items():
        # float64 sums of the same terms in another order.
        torch.testing.assert_close(ours[place], theirs[name], rtol=1e-9, atol=1e-12, msg=name)


WEIGHTS = {"W_enc": 0, "b_enc": 1, "W_dec": 2, "b_dec": 3}


@pytest.mark.parametrize("widths", [None, (5, 10, 20, 40)], ids=["batchtopk", "matryoshka"])
def test_batch_topk_gradients_equal_sae_lens(widths: tuple[int, ...] | None) -> None:
    from sae_lens import (
        BatchTopKTrainingSAE,
        BatchTopKTrainingSAEConfig,
        MatryoshkaBatchTopKTrainingSAE,
        MatryoshkaBatchTopKTrainingSAEConfig,
    )

    more: dict[str, Any] = COMMON | {
        "k": 3,
        "apply_b_dec_to_input": False,
        "rescale_acts_by_decoder_norm": False,
    }
    if widths is None:
        theirs: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**more))
    else:
        config = MatryoshkaBatchTopKTrainingSAEConfig(**more, matryoshka_widths=list(widths))
        theirs = MatryoshkaBatchTopKTrainingSAE(config)
    parameters, z = random_parameters(8, 40), normal(7, 50, 8)
    l0, ours = batch_topk_gradients(parameters, z, 3, widths)
    assert l0 == 3
    compare(ours, sae_lens_gradients(theirs, parameters, z, {}), WEIGHTS)


def test_jumprelu_gradients_equal_sae_lens() -> None:
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig

    threshold = 0.3 + 0.4 * torch.rand(40, generator=torch.Generator().manual_seed(5)).double()
    parameters, z = random_parameters(8, 40, threshold), normal(7, 50, 8)
    config = JumpReLUTrainingSAEConfig(**COMMON, jumprelu_bandwidth=0.5, apply_b_dec_to_input=False)
    theirs = sae_lens_gradients(JumpReLUTrainingSAE(config), parameters, z, {"l0": 0.7})
    # sae-lens keeps thresholds in float32 and hands them to float64 codes.
    rounded = random_parameters(8, 40, threshold.float().double())
    l0, ours = jumprelu_gradients(rounded, z, 0.7, 0.5)
    compare(ours, theirs, WEIGHTS)
    torch.testing.assert_close(ours[6].float(), theirs["threshold"], rtol=1e-5, atol=1e-7)
    assert l0 == pytest.approx(
        float((z @ parameters.W_enc + parameters.b_enc > threshold).sum(1).double().mean())
    )


def test_matching_pursuit_gradients_equal_sae_lens() -> None:
    from sae_lens import MatchingPursuitTrainingSAE, MatchingPursuitTrainingSAEConfig

    config = MatchingPursuitTrainingSAEConfig(
        **COMMON,
        max_iterations=6,
        residual_threshold=0.0,
        stop_on_duplicate_support=False,
        decoder_init_norm=1.0,
        apply_b_dec_to_input=True,
    )
    parameters, z = random_parameters(8, 40), normal(7, 50, 8)
    l0, ours = matching_pursuit_gradients(parameters, z, 6)
    theirs = MatchingPursuitTrainingSAE(config)
    found = sae_lens_gradients(theirs, parameters, z, {})
    compare(ours, found, {"W_dec": 2, "b_dec": 3})
    assert l0 == pytest.approx(float((theirs.encode(z) != 0).sum(1).double().mean()))
    assert not ours[0].any()


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 30), m=st.integers(1, 20), k=st.integers(1, 20), shift=st.floats(-3, 3))
def test_batch_largest_is_a_full_sort(n: int, m: int, k: int, shift: float) -> None:
    pre = normal(n + 31 * m, n, m) + shift
    count = min(k * n, n * m)
    at = batch_largest(pre, count)
    positive = pre.flatten()[pre.flatten() > 0].sort(descending=True).values
    assert bool((at.diff() > 0).all())
    chosen = pre.flatten()[at].sort(descending=True).values
    assert chosen.tolist() == positive[:count].tolist()


def test_entries_sum_as_dense_products_do() -> None:
    code = normal(1, 9, 6) * (normal(2, 9, 6) > 0.3)
    W, other = normal(3, 6, 4), normal(4, 9, 4)
    at = code.flatten().nonzero()[:, 0]
    entries, values = Entries(at, 9, 6), code.flatten()[code.flatten() != 0]
    # float64 sums in another order.
    torch.testing.assert_close(entries.decode(values, W), code @ W)
    torch.testing.assert_close(entries.outer(values, other), code.T @ other)
    torch.testing.assert_close(entries.by_latent(values), code.sum(0))


def planted(n: int, d: int = 16, m: int = 24) -> Tensor:
    """Sums of two of m directions, about a large mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(m, d, generator=generator), dim=1)
    active = torch.rand(n, m, generator=generator).topk(2).indices
    values = 1 + torch.rand(n, 2, generator=generator)
    return (values[:, :, None] * directions[active]).sum(1) + 10.0


@pytest.mark.parametrize("objective", NEW)
def test_training_finds_planted_directions_at_its_l0(
    objective: Architecture, tmp_path: Path
) -> None:
    x = planted(9_000)
    recipe = ObjectiveRecipe(objective, 32, 2, samples=60_000, batch=256, steering=0.05)
    trained = train_objective(x[:8_000], recipe, "blocks.0.hook_resid_post")
    sae, fresh = trained.sae, x[8_000:]
    # The best two principal components leave over 0.7 of the variance.
    assert fvu(fresh, reconstruct(sae, fresh)) < 0.35
    l0 = float(sparse_encode(sae, fresh).l0.float().mean())
    # Steered on batches of 256, and a pursuit may choose a latent twice.
    assert l0 == pytest.approx(2, rel=0.2)
    assert hook_of(sae) == "blocks.0.hook_resid_post"
    sae.save_model(tmp_path)
    assert torch.equal(reconstruct(load_autoencoder(tmp_path), fresh), reconstruct(sae, fresh))


@pytest.mark.parametrize("objective", NEW)
def test_training_does_not_depend_on_units(objective: Architecture) -> None:
    x = planted(2_000)
    recipe = ObjectiveRecipe(objective, 24, 2, samples=4_000, batch=200)
    plain, large = (train_objective(rows, recipe).sae for rows in (x, 100 * x))
    y = reconstruct(plain, x)
    # Rounding of float32 may turn a few entries at a threshold on or off.
    assert (reconstruct(large, 100 * x) / 100 - y).norm() < 0.05 * (y - y.mean(0)).norm()


def test_without_a_step_the_start_comes_back() -> None:
    x = planted(2_000)
    recipe = ObjectiveRecipe("matching_pursuit", 24, 2, samples=500, batch=500, learning_rate=0.0)
    sae = train_objective(x, recipe).sae
    centred = x - x.mean(0)
    first = (centred @ sae.W_dec.T).argmax(1)
    code = sae.encode(x)
    assert bool((code.gather(1, first[:, None]) > 0).all())


def test_a_pursuit_needs_a_whole_number_of_steps() -> None:
    with refused("matching_pursuit keeps the same number"):
        train_objective(planted(1_000), ObjectiveRecipe("matching_pursuit", 24, 2.5))

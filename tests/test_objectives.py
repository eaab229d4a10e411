"""Objectives against naive loops, finite differences and sae-lens; gains against lstsq."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter.autoencoders import hook_of
from darkmatter.leastsquares import fvu
from darkmatter.objectives import (
    Gains,
    Objective,
    ObjectiveRecipe,
    Parameters,
    fit_gains,
    initial_parameters,
    objective_gradients,
    objective_loss,
    orthogonality_penalty,
    rescaled,
    rescaled_and_shifted,
    shrinkage,
    train_objective,
)
from tests.common import normal, refused

OBJECTIVES: tuple[Objective, ...] = ("l1", "expanded", "gated", "topk")
NAMES = ("W_enc", "b_enc", "W_dec", "b_dec", "gain", "b_mag")


def random_parameters(objective: Objective, d: int = 4, m: int = 6) -> Parameters:
    decoder = torch.nn.functional.normalize(normal(1, m, d), dim=1)
    gain = 0.3 * normal(5, m)
    if objective == "expanded":
        gain = 1.0 + gain
    return Parameters(
        normal(2, d, m) / d**0.5, 0.1 * normal(3, m), decoder, 0.1 * normal(4, d), gain,
        0.1 * normal(6, m),
    )  # fmt: skip


def naive_loss(
    objective: Objective,
    live: dict[str, np.ndarray],
    held: dict[str, np.ndarray],
    z: np.ndarray,
    sparsity: float,
    k: int,
) -> float:
    """The formulas token by token and latent by latent; `held` is the decoder that is constant."""
    total = 0.0
    for row in z:
        linear = [float(row @ live["W_enc"][:, i]) for i in range(live["W_enc"].shape[1])]
        pre = [a + float(b) for a, b in zip(linear, live["b_enc"], strict=True)]
        f = [max(p, 0.0) for p in pre]

        def decode(code: list[float], by: dict[str, np.ndarray]) -> np.ndarray:
            return by["b_dec"] + sum(v * w for v, w in zip(code, by["W_dec"], strict=True))

        if objective == "topk":
            kept = sorted(range(len(f)), key=lambda i: -f[i])[:k]
            code = [v if i in kept else 0.0 for i, v in enumerate(f)]
            total += float(((row - decode(code, live)) ** 2).sum())
            continue
        total += sparsity * sum(f)
        if objective == "l1":
            total += float(((row - decode(f, live)) ** 2).sum())
            continue
        if objective == "expanded":
            code = [float(p) * v for p, v in zip(live["gain"], f, strict=True)]
        else:
            code = [
                max(np.exp(live["gain"][i]) * linear[i] + live["b_mag"][i], 0.0) * (pre[i] > 0)
                for i in range(len(f))
            ]
        total += float(((row - decode(f, held)) ** 2).sum())
        total += float(((row - decode(code, live)) ** 2).sum())
    return total / len(z)


@pytest.mark.parametrize(("objective", "freeze"), list(product(OBJECTIVES, (True, False))))
def test_loss_and_gradients_equal_naive_finite_differences(
    objective: Objective, freeze: bool
) -> None:
    parameters, z = random_parameters(objective), normal(7, 5, 4)
    for tensor in parameters.all():
        tensor.requires_grad_()
    loss, code = objective_loss(objective, parameters, z, 0.7, 2, freeze)
    loss.backward()
    live = {name: getattr(parameters, name).detach().numpy().copy() for name in NAMES}
    frozen = {name: value.copy() for name, value in live.items()}

    def naive() -> float:
        return naive_loss(objective, live, frozen if freeze else live, z.numpy(), 0.7, 2)

    assert loss.item() == pytest.approx(naive(), rel=1e-12)
    assert (code >= 0).all()
    for name in NAMES:
        given_gradient = getattr(parameters, name).grad
        expected = np.zeros_like(live[name])
        for at in np.ndindex(live[name].shape):
            old, values = live[name][at], []
            for step in (1e-6, -1e-6):
                live[name][at] = old + step
                values.append(naive())
            live[name][at] = old
            expected[at] = (values[0] - values[1]) / 2e-6
        ours = np.zeros_like(expected) if given_gradient is None else given_gradient.numpy()
        # Central differences of a quadratic: rounding, 1e-16 * loss / step, is all there is.
        np.testing.assert_allclose(ours, expected, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(("objective", "freeze"), list(product(OBJECTIVES, (True, False))))
def test_sparse_gradients_equal_autograd(objective: Objective, freeze: bool) -> None:
    parameters, z = random_parameters(objective, d=7, m=30), normal(7, 40, 7)
    l0, ours = objective_gradients(objective, parameters, z, 0.7, 4, freeze)
    for tensor in parameters.all():
        tensor.requires_grad_()
    loss, _ = objective_loss(objective, parameters, z, 0.7, 4, freeze)
    loss.backward()
    on = (z @ parameters.W_enc + parameters.b_enc > 0).sum(1)
    expected_l0 = on.clamp(max=4) if objective == "topk" else on
    assert l0 == pytest.approx(float(expected_l0.double().mean()))
    for mine, leaf in zip(ours, parameters.all(), strict=True):
        expected = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        # float64 sums of 40 rows in another order.
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", ["l1", "gated"])
def test_loss_and_gradients_equal_sae_lens(objective: Objective) -> None:
    """sae-lens weighs its L1 by decoder norms, here one, and trains the decoder in gated's d*."""
    from sae_lens import (
        GatedTrainingSAE,
        GatedTrainingSAEConfig,
        StandardTrainingSAE,
        StandardTrainingSAEConfig,
    )
    from sae_lens.saes.sae import TrainStepInput

    parameters, z = random_parameters(objective), normal(8, 9, 4)
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    common: dict[str, Any] = {"d_in": 4, "d_sae": 6, "dtype": "float64", "device": "cpu"}
    common["apply_b_dec_to_input"] = False
    if objective == "l1":
        theirs: Any = StandardTrainingSAE(StandardTrainingSAEConfig(**common))
        names |= {"b_enc": "b_enc"}
    else:
        theirs = GatedTrainingSAE(GatedTrainingSAEConfig(**common))
        names |= {"b_gate": "b_enc", "r_mag": "gain", "b_mag": "b_mag"}
    theirs.load_state_dict({name: getattr(parameters, ours) for name, ours in names.items()})
    step = TrainStepInput(
        sae_in=z,
        coefficients={"l1": 0.7},
        dead_neuron_mask=None,
        n_training_steps=0,
        is_logging_step=False,
    )
    output = theirs.training_forward_pass(step)
    output.loss.backward()
    for tensor in parameters.all():
        tensor.requires_grad_()
    loss, code = objective_loss(objective, parameters, z, 0.7, freeze_decoder=False)
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-12)
    torch.testing.assert_close(code, output.feature_acts)
    for name, ours in names.items():
        if name == "W_dec":
            # Theirs also moves the norm of the rows, which ours keeps at one: compare the rest.
            units = parameters.W_dec.detach()
            grads = [parameters.W_dec.grad, theirs.W_dec.grad]
            mine, other = (g - (g * units).sum(1, keepdim=True) * units for g in grads)
            torch.testing.assert_close(mine, other)
        else:
            torch.testing.assert_close(getattr(parameters, ours).grad, getattr(theirs, name).grad)


def test_one_dimension_has_the_soft_threshold() -> None:
    """min over f of (x - f)^2 + sparsity f is x - sparsity / 2; the other objectives give x."""
    x = 1.0 + torch.arange(200, dtype=torch.float64)[:, None] / 199
    sparsity, shapes = 0.6, {"W_enc": (1, 1), "b_enc": (1,), "gain": (1,), "b_mag": (1,)}
    found: dict[str, Tensor] = {}
    for objective in ("l1", "gated"):
        start = {name: torch.zeros(shape).double() for name, shape in shapes.items()}
        start["W_enc"] += 1.0
        p = Parameters(W_dec=torch.ones(1, 1).double(), b_dec=torch.zeros(1).double(), **start)
        learned = [p.W_enc, p.b_enc, p.gain, p.b_mag]
        for tensor in learned:
            tensor.requires_grad_()
        # Smooth and of few unknowns, as every x stays above the threshold.
        optimiser = torch.optim.LBFGS(learned, max_iter=200, line_search_fn="strong_wolfe")

        def closure(p: Parameters = p, kind: Any = objective) -> Tensor:
            for tensor in p.all():
                tensor.grad = None
            loss, _ = objective_loss(kind, p, x, sparsity)
            loss.backward()
            return loss

        optimiser.step(closure)  # pyright: ignore[reportArgumentType]
        found[objective] = objective_loss(objective, p, x, sparsity)[1].detach()
    # LBFGS stops at gradients of 1e-7; curvatures are above 0.1.
    torch.testing.assert_close(found["l1"], x - sparsity / 2, rtol=0, atol=1e-4)
    torch.testing.assert_close(found["gated"], x, rtol=0, atol=1e-3)


def planted(n: int = 4000, d: int = 16, seed: int = 0) -> Tensor:
    """Orthonormal directions, each on in one token of six with a value from 2 to 3."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.rand(n, d, generator=generator) < 1 / 6
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return (on * (2 + torch.rand(n, d, generator=generator))) @ basis


def small(objective: Objective, /, **changes: Any) -> ObjectiveRecipe:
    recipe = ObjectiveRecipe(objective, d_sae=24, l0=3, samples=60_000, batch=256, seed=1)
    return replace(recipe, **changes)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_trained_is_an_sae_of_the_wanted_l0(objective: Objective) -> None:
    x = planted()
    trained = train_objective(x, small(objective, learning_rate=1e-2), hook="blocks.1.hook")
    assert hook_of(trained.sae) == "blocks.1.hook"
    code = trained.sae.encode(x)
    l0 = float((code != 0).sum(1).float().mean())
    # Steered on batches of 256 tokens; the learning rate ends at zero, so nothing else moves.
    assert l0 == pytest.approx(3, rel=0.1)
    assert trained.sae.cfg.architecture() == {"gated": "gated", "topk": "topk"}.get(
        objective, "standard"
    )
    assert fvu(x, trained.sae.decode(code)) < 0.5
    norms = trained.sae.W_dec.norm(dim=1)
    gain = trained.gain if objective == "expanded" else torch.ones(24)
    # A row of unit norm, rounded in float32, times p.
    torch.testing.assert_close(norms, gain.abs(), rtol=1e-5, atol=1e-6)
    if objective in ("l1", "topk"):
        assert (trained.gain == 1).all()


def test_training_repeats_and_ignores_the_scale_of_rows() -> None:
    x, recipe = planted(1000), small("expanded", samples=5000)
    first, again = train_objective(x, recipe), train_objective(x, recipe)
    assert torch.equal(first.sae.W_dec, again.sae.W_dec)
    scaled = train_objective(4.0 * x + 1.0, recipe)
    # Another origin and scale: float32 rounding, amplified by training.
    torch.testing.assert_close(scaled.gain, first.gain, rtol=2e-2, atol=2e-2)


def test_objectives_start_from_the_same_weights() -> None:
    x = planted(100)
    l1, gated = (initial_parameters(x, kind, 24, seed=3) for kind in ("l1", "gated"))
    for mine, other in zip(l1.all(), gated.all(), strict=True):
        assert torch.equal(mine, other)
    loss, code = objective_loss("l1", l1, x)
    expanded = initial_parameters(x, "expanded", 24, seed=3)
    twice, same = objective_loss("expanded", expanded, x)
    assert torch.equal(code, same)
    # p = 1: both reconstruction terms are the same number.
    torch.testing.assert_close(twice, 2 * loss)


def test_orthogonality_lowers_the_penalty_it_names() -> None:
    x = planted()
    without = train_objective(x, small("l1", samples=20_000))
    with_it = train_objective(x, small("l1", samples=20_000, orthogonality=20))
    before, after = (float(orthogonality_penalty(t.sae.W_dec)) for t in (without, with_it))
    assert after < before - 0.1


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 9), d=st.integers(2, 5), seed=st.integers(0, 99))
def test_orthogonality_penalty_equals_the_naive_sum(m: int, d: int, seed: int) -> None:
    W = normal(seed, m, d)
    cosines = [
        [float(W[i] @ W[j] / (W[i].norm() * W[j].norm())) for j in range(m) if j != i]
        for i in range(m)
    ]
    largest = [max(row) for row in cosines]
    mean = sum(map(sum, cosines)) / (m * (m - 1))
    expected = mean + sum(largest) / m + max(largest)
    # Sums of at most 72 cosines in float64.
    assert float(orthogonality_penalty(W)) == pytest.approx(expected, abs=1e-12)


def l1_sae(x: Tensor) -> Any:
    return train_objective(x, small("l1", samples=20_000, learning_rate=1e-2)).sae


@pytest.mark.parametrize("shift", [False, True])
def test_gains_equal_lstsq_on_the_design_matrix(shift: bool) -> None:
    x = planted(400)
    sae = l1_sae(x)
    f = sae.encode(x).double()
    # One column for each unknown, one row for each token and dimension.
    design = torch.einsum("nm,md->ndm", f, sae.W_dec.double()).flatten(0, 1)
    if shift:
        on = torch.einsum("nm,md->ndm", (f > 0).double(), sae.W_dec.double()).flatten(0, 1)
        design = torch.cat([design, on], 1)
    target = (x.double() - sae.b_dec.double()).flatten()
    expected = torch.linalg.lstsq(design, target[:, None], driver="gelsd").solution[:, 0]
    gains = fit_gains(sae, x, shift=shift, ridge=1e-9)
    ours = torch.cat([gains.scale, gains.shift]) if shift else gains.scale
    if not shift:
        assert (gains.shift == 0).all()
    # The fits, not the unknowns, are compared: latents that never or always fire alike are free.
    torch.testing.assert_close(design @ ours.double(), design @ expected, rtol=0, atol=2e-2)


def test_gains_find_planted_shrinkage() -> None:
    """An SAE that knows the directions and makes each of its codes shorter by a planted factor."""
    from sae_lens import SAE

    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    on = torch.rand(4000, 16, generator=generator) < 1 / 6
    x = (on * (2 + torch.rand(4000, 16, generator=generator))) @ directions
    config = {"architecture": "standard", "d_in": 16, "d_sae": 16, "dtype": "float32"}
    sae = SAE.from_dict(config | {"device": "cpu", "apply_b_dec_to_input": False})
    factor = torch.linspace(0.5, 0.9, 16)
    zeros = torch.zeros(16)
    weights = {"W_enc": directions.T * factor, "W_dec": directions}
    sae.load_state_dict(weights | {"b_enc": zeros, "b_dec": zeros})
    gains = fit_gains(sae, x)
    # A pull of 1e-4 towards one, on a diagonal that differs by the square of the factors.
    torch.testing.assert_close(gains.scale, 1 / factor, rtol=1e-3, atol=0)
    whole = rescaled(sae, gains)
    torch.testing.assert_close(whole.decode(whole.encode(x)), x, rtol=0, atol=1e-2)


def test_dead_latents_keep_their_gain() -> None:
    x = planted(500)
    sae = l1_sae(x)
    sae.b_enc.data[3] = -1e6
    gains = fit_gains(sae, x, shift=True)
    assert float(gains.scale[3]) == pytest.approx(1, abs=1e-5)
    assert float(gains.shift[3]) == pytest.approx(0, abs=1e-5)


def test_rescaled_copies_are_the_functions_they_say() -> None:
    x = planted(300)
    sae = l1_sae(x)
    f = sae.encode(x)
    gains = Gains(torch.linspace(0.8, 1.5, 24), torch.linspace(0, 0.3, 24))
    scaled = rescaled(sae, Gains(gains.scale, torch.zeros(24)))
    expected = (gains.scale * f) @ sae.W_dec + sae.b_dec
    # float32 products of values of a few units.
    torch.testing.assert_close(scaled.decode(scaled.encode(x)), expected, rtol=0, atol=1e-4)
    shifted = rescaled_and_shifted(sae, gains)
    code = (f > 0) * (gains.scale * f + gains.shift)
    assert shifted.cfg.architecture() == "gated"
    torch.testing.assert_close(shifted.encode(x), code, rtol=0, atol=1e-4)
    assert torch.equal(sae.W_dec, l1_sae(x).W_dec)


def test_shrinkage_by_hand() -> None:
    x = normal(9, 50, 6) + 3.0
    mean = x.mean(0)
    half = shrinkage(x, mean + 0.5 * (x - mean))
    assert half.gamma == pytest.approx(0.5)
    assert half.stretch == pytest.approx(2.0)
    missing = x.clone()
    missing[:, :3] = mean[:3]
    projected = shrinkage(x, missing)
    assert projected.stretch == pytest.approx(1.0)
    share = ((x - mean)[:, 3:].square().sum(1) / (x - mean).square().sum(1)).mean()
    assert projected.gamma == pytest.approx(float(share))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": "l2"}, "There is no objective 'l2'"),
        ({"batch": 2000}, "expected a batch of at most 1000 rows"),
        ({"l0": 0}, "expected 0 < l0 <= d_sae = 24"),
        ({"l0": 40}, "choose a smaller l0"),
        ({"objective": "topk", "l0": 2.5}, "pass a whole number"),
    ],
)
def test_bad_recipes_are_refused(change: dict[str, Any], message: str) -> None:
    with refused(message):
        train_objective(planted(1000), small("l1", **change))


def test_bad_rows_are_refused() -> None:
    with refused("rows are all the same"):
        train_objective(torch.ones(1000, 4), small("l1"))
    x = planted(1000)
    x[7, 2] = torch.nan
    with refused("rows"):
        train_objective(x, small("l1"))
    sae = l1_sae(planted(1000))
    with refused("expected the 16 that the autoencoder writes"):
        fit_gains(sae, torch.ones(5, 3))
    with refused("use rescaled_and_shifted"):
        rescaled(sae, Gains(torch.ones(24), torch.ones(24)))
    topk = train_objective(planted(1000), small("topk", samples=1000)).sae
    with refused("expected a StandardSAE"):
        rescaled_and_shifted(topk, Gains(torch.ones(24), torch.ones(24)))
    with refused("x_hat is the mean"):
        shrinkage(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]), torch.zeros(2, 2))

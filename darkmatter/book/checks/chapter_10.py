"""Checks of chapter 10, a better encoder."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from darkmatter.book.exercises import NotYet, exercise
from darkmatter.errors import split_error
from darkmatter.leastsquares import fvu
from darkmatter.pursuit import gradient_pursuit
from darkmatter.sparse import SparseCode


def _normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _dense(signal: Tensor, weights: Tensor, atoms: Tensor, clip: bool, exact: bool) -> Tensor:
    residual = signal - weights @ atoms
    correlation = residual @ atoms.T
    active = weights != 0
    active[torch.arange(len(signal)), correlation.argmax(1)] = True
    gradient = correlation * active
    along = gradient @ atoms
    length = (along * residual).sum(1) / along.square().sum(1) if exact else along.new_ones(1)
    stepped = weights + length[:, None] * gradient
    return stepped.clamp(min=0) if clip else stepped


@exercise(
    "10.1",
    difficulty=2,
    minutes=15,
    teaches="A pursuit adds one atom a step and moves all active weights along the gradient.",
)
def pursuit_step(answer: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """Three steps on crowded atoms, against the rule and against its likely mistakes."""
    atoms, signal = normalize(_normal(0, 24, 6), dim=1), _normal(1, 40, 6)
    weights = torch.zeros(40, 24)
    # Two atoms that nobody chose, so that some weights will turn negative.
    crowded = weights.clone()
    crowded[:, :2] = 1.0
    for step, start in enumerate((weights, None, None, crowded)):
        weights = weights if start is None else start
        before = weights.clone()
        found = answer(signal, weights, atoms)
        assert found.shape == weights.shape, "Return the new weights, [n, m]."
        assert torch.equal(weights, before), "Your step changes the weights it is given; copy them."
        right = _dense(signal, weights, atoms, clip=True, exact=True)
        if not torch.allclose(found, right, atol=1e-4):
            _name_the_mistake(signal, weights, atoms, found, step)
        weights = right


def _name_the_mistake(
    signal: Tensor, weights: Tensor, atoms: Tensor, found: Tensor, step: int
) -> None:
    active = int((weights != 0).sum(1).max())
    assert (found != 0).sum(1).max() <= active + 1, (
        "Too many weights are active: the gradient counts on the active atoms only, and each step "
        "makes one atom active."
    )
    assert step == 0 or (found != weights).sum(1).max() > 1, (
        "Only the new atom got a weight: that is matching pursuit. All active weights move along "
        "the gradient."
    )
    unit = _dense(signal, weights, atoms, clip=True, exact=False)
    assert not torch.allclose(found, unit, atol=1e-5), (
        "The step has length one. The best length along g is <gD, r> / |gD|^2."
    )
    assert (found >= 0).all(), "A weight is negative: clip at zero after the step."
    raise NotYet(
        "The weights differ from the rule: correlation of the residual with every atom, the "
        "largest one becomes active, and a step of length <gD, r> / |gD|^2 along g."
    )


@exercise(
    "10.2",
    difficulty=3,
    minutes=15,
    teaches="Every reconstruction has its own error, and so its own linear map.",
)
def encoder_error(answer: Callable[..., float]) -> str:
    """A reconstruction that shrinks and one that does not, with noise of different size."""
    x_fit, x = _normal(2, 3000, 6), 1 + _normal(3, 3000, 6)
    sae_fit, sae = 0.7 * x_fit + 0.3 * _normal(4, 3000, 6), 0.7 * x + 0.3 * _normal(5, 3000, 6)
    pursuit_fit, pursuit = x_fit + 0.2 * _normal(6, 3000, 6), x + 0.2 * _normal(7, 3000, 6)

    def left(hat_fit: Tensor, hat: Tensor) -> tuple[float, Tensor]:
        parts = split_error(x_fit, hat_fit, x, hat)
        return fvu(x, hat + parts.linear), parts.linear

    (first, linear), (second, _) = left(sae_fit, sae), left(pursuit_fit, pursuit)
    right = first - second
    found = float(answer(x_fit, sae_fit, pursuit_fit, x, sae, pursuit))
    assert abs(found - (fvu(x, sae) - fvu(x, pursuit))) > 1e-4, (
        "That is the difference of the whole FVUs; take the linear part off both errors first."
    )
    assert abs(found - (first - fvu(x, pursuit + linear))) > 1e-4, (
        "You used the SAE's linear map for the pursuit as well. It has another error: fit its own."
    )
    in_sample = [fvu(x, hat + split_error(x, hat, x, hat).linear) for hat in (sae, pursuit)]
    # Seven parameters on three thousand rows: the maps fitted on the scored rows differ this much.
    assert abs(found - (in_sample[0] - in_sample[1])) > 1e-6, (
        "Your maps are fitted on the rows they are scored on; fit them on the fit rows."
    )
    assert abs(found + right) > 1e-6, "The sign is turned round: SAE less pursuit."
    assert abs(found - right) < 1e-5, (
        f"Expected {right:.4f}, found {found:.4f}: FVU(x, sae + its linear part) less "
        "FVU(x, pursuit + its linear part)."
    )
    whole = fvu(x, sae) - fvu(x, pursuit)
    return f"Encoder error {found:.3f}; the whole FVUs differ by {whole:.3f}."


@exercise(
    "10.3",
    difficulty=2,
    minutes=12,
    teaches="In a padded sparse code index 0 means nothing unless its value is not zero.",
)
def agreement(answer: Callable[[SparseCode, SparseCode], float]) -> None:
    """Two rows: 2 of 3 and 0 of 1 active latents shared, with padding, and latent 0 in earnest."""
    code = SparseCode(
        torch.tensor([[1.0, 2.0, 0.5], [3.0, 0.0, 0.0]]), torch.tensor([[4, 7, 0], [5, 0, 0]])
    )
    other = SparseCode(
        torch.tensor([[9.0, 1.0, 0.0], [2.0, 0.0, 0.0]]), torch.tensor([[7, 4, 0], [6, 0, 0]])
    )
    found = float(answer(code, other))
    assert min(abs(found - 5 / 6), abs(found - 3 / 4)) > 1e-6, (
        "You counted padding: index 0 with value 0 is no active latent."
    )
    assert abs(found - 1 / 3) > 1e-6, "That is the mean over rows; pool the latents of all rows."
    assert abs(found - 2 / 5) > 1e-6, (
        "That is the share of all latents that either uses; divide by those of the first code."
    )
    assert abs(found - 2 / 3) > 1e-6, (
        "You divided by the latents of the second code; divide by those of the first."
    )
    assert abs(found - 2 / 4) < 1e-6, (
        f"Two of four active latents are shared, found {found:.3f}: places do not matter, only "
        "indices with a value."
    )
    zero = SparseCode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    assert abs(float(answer(zero, zero)) - 1) < 1e-6, (
        "Latent 0 is a latent like others where its value is not zero."
    )


@exercise(
    "10.4",
    difficulty=3,
    minutes=15,
    teaches="When a weight meets zero, the others have to be solved for again.",
)
def best_two(answer: Callable[[Tensor, Tensor, Tensor], tuple[float, float]]) -> None:
    """Both positive, one at zero, and both at zero."""
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.6, 0.8])
    inside = answer(2 * a + 1 * b, a, b)
    assert len(inside) == 2, "Return two numbers: wa, wb."
    projections = torch.tensor([2.6, 2.2])
    assert not torch.allclose(torch.tensor(inside), projections, atol=1e-4), (
        "Those are the projections on each atom alone; the atoms overlap, so solve for both."
    )
    assert torch.allclose(torch.tensor(inside), torch.tensor([2.0, 1.0]), atol=1e-4), (
        "A signal of 2 a + 1 b has the weights 2 and 1."
    )
    # s = 2 a - 1 b: free weights (2, -1); with b at zero the best weight of a is s.a = 1.4.
    found = answer(2 * a - b, a, b)
    assert min(found) >= 0, "A weight is negative."
    assert abs(found[0] - 2) > 1e-4, (
        "You set the negative weight to zero and kept the other one that belonged to it. Solve "
        "again for the one that is left: its projection."
    )
    assert torch.allclose(torch.tensor(found), torch.tensor([1.4, 0.0]), atol=1e-4), (
        "With b at zero the best weight of a is s @ a."
    )
    other = answer(2 * b - a, a, b)
    assert torch.allclose(torch.tensor(other), torch.tensor([0.0, 1.4]), atol=1e-4), (
        "It works when b drops out but not when a does."
    )
    nothing = answer(-a - b, a, b)
    assert torch.allclose(torch.tensor(nothing), torch.zeros(2), atol=1e-6), (
        "Both atoms point away from the signal: both weights are zero."
    )


@exercise(
    "10.5",
    difficulty=3,
    minutes=15,
    teaches="A free choice among many atoms explains noise; the choice itself is information.",
)
def noise_dictionary(answer: Callable[[int], Tensor]) -> str:
    """Four atoms a row of isotropic Gaussian noise in 12 dimensions."""
    atoms = answer(12).float()
    assert atoms.shape[1:] == (12,), "Return atoms [m, 12], one a row."
    assert len(atoms) <= 5000, f"You returned {len(atoms)} atoms; at most 5000."
    assert torch.allclose(atoms.norm(dim=1), torch.ones(len(atoms)), atol=1e-4), (
        "Not every atom has length one."
    )
    noise = _normal(8, 1000, 12)
    code = gradient_pursuit(noise, atoms, min(4, len(atoms)))
    explained = 1 - fvu(noise, code.decode(atoms))
    assert explained > 2 / 3, (
        f"Your {len(atoms)} atoms explain {explained:.0%} of the noise. An orthonormal basis gives "
        "about half: the more atoms to choose from, the closer the best one."
    )
    return f"Four of {len(atoms)} atoms that mean nothing explain {explained:.0%} of pure noise."

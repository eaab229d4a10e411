"""Pursuits against closed forms, a naive dense loop and scipy; test_autoencoders has sae-lens'."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from darkmatter import pursuit
from darkmatter.pursuit import gradient_pursuit, matching_pursuit, nonnegative_refit
from darkmatter.sparse import SparseCode
from tests.common import normal, refused

# float64 sums of some dozens of products of order 1.
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def planted(seed: int, n: int, m: int, d: int, k: int) -> tuple[Tensor, Tensor]:
    """Rows of k positive weights on m unit atoms, with noise; and the atoms."""
    atoms = normalize(normal(seed, m, d), dim=1)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(n, m, generator=generator).argsort(1)[:, :k]
    values = torch.rand(n, k, generator=generator, dtype=torch.float64) + 0.3
    x = SparseCode(values, indices).decode(atoms) + 0.03 * normal(seed + 1, n, d)
    return x, atoms


def naive(x: Tensor, atoms: Tensor, l0: Tensor) -> Tensor:
    """Gradient pursuit as it is published: dense weights, three dense products a step."""
    weights, final = x.new_zeros(len(x), len(atoms)), x.new_zeros(len(x), len(atoms))
    for step in range(int(l0.max())):
        residual = x - weights @ atoms
        correlation = residual @ atoms.T
        active = weights != 0
        active[torch.arange(len(x)), correlation.argmax(1)] = True
        gradient = correlation * active
        along = gradient @ atoms
        length = (along * residual).sum(1) / along.square().sum(1)
        weights = (weights + length[:, None] * gradient).clamp(min=0)
        final = torch.where((l0 > step)[:, None], weights, final)
    return final


def residual(x: Tensor, atoms: Tensor, code: SparseCode) -> Tensor:
    return (x - code.decode(atoms)).norm(dim=1)


# Gradient pursuit


@pytest.mark.parametrize("path", ["Gram rows", "products", "small chunks"])
def test_gradient_pursuit_is_the_published_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path != "Gram rows":
        monkeypatch.setattr(pursuit, "_GRAM_ATOMS", 0)
    if path == "small chunks":
        monkeypatch.setattr(pursuit, "_CHUNK", 1)
    # Not a multiple of the atoms that are taken at a time.
    x, atoms = planted(0, n=400, m=600, d=96, k=7)
    x, atoms, bias = x.float(), atoms.float(), normal(5, 96).float()
    l0 = torch.randint(0, 12, (400,), generator=torch.Generator().manual_seed(1))
    expected = naive(x, atoms, l0)
    found = gradient_pursuit(x + bias, atoms, l0, bias)
    assert found.values.shape == (400, 11)
    assert found.values.dtype == torch.float32
    dense = found.dense(600)
    same = ((dense != 0) == (expected != 0)).all(1)
    # Float32 sums in another order may exchange two atoms of nearly equal correlation.
    assert same.float().mean() >= 0.995
    torch.testing.assert_close(dense[same], expected[same], rtol=1e-4, atol=1e-4)
    for row, values in zip(found.indices, found.values, strict=True):
        used = row[values != 0]
        assert len(used.unique()) == len(used)
    assert (found.indices[found.values == 0] == 0).all()


@given(st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_gradient_pursuit_is_the_published_loop_where_atoms_crowd(seed: int) -> None:
    """Five atoms a dimension: steps that clip, atoms that leave and return."""
    x, atoms = planted(seed, n=20, m=40, d=8, k=5)
    l0 = torch.arange(20) % 8
    dense = gradient_pursuit(x, atoms, l0).dense(40)
    torch.testing.assert_close(dense, naive(x, atoms, l0), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("function", [gradient_pursuit, matching_pursuit])
def test_orthonormal_atoms_give_the_largest_projections(function: Any) -> None:
    atoms = torch.linalg.qr(normal(0, 16, 16)).Q[:12]
    x = normal(1, 50, 16)
    projections = (x @ atoms.T).relu()
    for k in (1, 4, 12):
        smallest = projections.topk(k, dim=1).values[:, -1:]
        expected = torch.where(projections >= smallest, projections, 0)
        torch.testing.assert_close(function(x, atoms, k).dense(12), expected, **CLOSE)


@pytest.mark.parametrize("function", [gradient_pursuit, matching_pursuit])
def test_one_step_has_its_closed_form(function: Any) -> None:
    x, atoms = planted(2, n=60, m=30, d=8, k=3)
    best, atom = (x @ atoms.T).max(1)
    code = function(x, atoms, 1)
    torch.testing.assert_close(code.values[:, 0], best, **CLOSE)
    assert torch.equal(code.indices[:, 0], atom)


@given(st.integers(0, 10_000), st.floats(0.1, 10))
@settings(max_examples=20, deadline=None)
def test_order_and_scale_of_the_atoms(seed: int, scale: float) -> None:
    x, atoms = planted(seed, n=15, m=40, d=10, k=4)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(seed))
    for function in (gradient_pursuit, matching_pursuit):
        dense = function(x, atoms, 5).dense(40)
        torch.testing.assert_close(function(x, atoms[order], 5).dense(40), dense[:, order], **CLOSE)
        longer = function(x, scale * atoms, 5).dense(40)
        torch.testing.assert_close(longer * scale, dense, rtol=1e-7, atol=1e-7)
        again = function(scale * x, atoms, 5).dense(40)
        torch.testing.assert_close(again, scale * dense, rtol=1e-7, atol=1e-7)


def test_gradient_pursuit_prefers_long_atoms_and_matching_pursuit_does_not() -> None:
    atoms = torch.tensor([[1.0, 0.0], [3.0, 4.0]]).double()
    x = torch.tensor([[2.0, 0.0]]).double()
    # Correlations 2 and 6; with the directions 2 and 1.2.
    assert gradient_pursuit(x, atoms, 1).dense(2).tolist() == [[0, 6 / 25]]
    assert matching_pursuit(x, atoms, 1).dense(2).tolist() == [[2, 0]]
    zero = torch.zeros(1, 2).double()
    assert matching_pursuit(x, torch.cat([zero, atoms]), 2).dense(3).tolist() == [[0, 2, 0]]
    torch.testing.assert_close(
        matching_pursuit(torch.tensor([[3.0, 4.0]]).double(), atoms, 1).dense(2),
        torch.tensor([[0.0, 1.0]]).double(),
        **CLOSE,
    )


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_matching_pursuit_never_raises_the_residual(seed: int) -> None:
    x, atoms = planted(seed, n=25, m=20, d=6, k=4)
    atoms = atoms * (0.1 + normal(seed, 20, 1).abs())
    last = x.norm(dim=1)
    for k in range(1, 8):
        now = residual(x, atoms, matching_pursuit(x, atoms, k))
        # Rounding of norms of order 1.
        assert (now <= last + 1e-9).all()
        last = now


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_a_gradient_step_that_clips_nothing_lowers_the_residual(seed: int) -> None:
    x, atoms = planted(seed, n=25, m=20, d=6, k=4)
    was = torch.zeros(25, 20).double()
    for k in range(1, 7):
        now = gradient_pursuit(x, atoms, k).dense(20)
        r = x - was @ atoms
        best = (r @ atoms.T).amax(1)
        clipped = ((was > 0) & (now == 0)).any(1) | (best <= 1e-9)
        fall = r.square().sum(1) - (x - now @ atoms).square().sum(1)
        g = (r @ atoms.T) * (now > 0)
        expected = g.square().sum(1).square() / (g @ atoms).square().sum(1)
        torch.testing.assert_close(fall[~clipped], expected[~clipped], rtol=1e-6, atol=1e-9)
        was = now


def test_a_gradient_step_that_clips_can_raise_the_residual() -> None:
    """As published: the line search is exact for the step before weights are clipped at 0."""
    directions = [[0, -1, -3], [-3, -4, -1], [2, -2, -4], [2, 0, -3]]
    atoms = normalize(torch.tensor(directions).double(), dim=1)
    x = torch.tensor([[0.0, -4, -2]]).double()
    norms = [float(residual(x, atoms, gradient_pursuit(x, atoms, k))) for k in range(5)]
    assert norms[0] > norms[1] > norms[2] > norms[3] == pytest.approx(1.166486, abs=1e-6)
    assert norms[4] == pytest.approx(1.731096, abs=1e-6)
    expected = naive(x, atoms, torch.tensor([4]))
    torch.testing.assert_close(gradient_pursuit(x, atoms, 4).dense(4), expected, **CLOSE)


def test_steps_of_one_token_do_not_depend_on_the_others() -> None:
    x, atoms = planted(3, n=40, m=64, d=16, k=4)
    l0 = torch.arange(40) % 9
    for function in (gradient_pursuit, matching_pursuit):
        together = function(x, atoms, l0).dense(64)
        alone = torch.cat([function(x[i : i + 1], atoms, int(l0[i])).dense(64) for i in range(40)])
        torch.testing.assert_close(together, alone, **CLOSE)


def test_edges() -> None:
    x, atoms = planted(4, n=6, m=20, d=8, k=3)
    for function in (gradient_pursuit, matching_pursuit):
        assert function(x, atoms, 0).values.shape == (6, 0)
        assert function(x[:0], atoms, 5).values.shape[0] == 0
        none = function(x, atoms, torch.tensor([0, 2, 0, 0, 1, 0]))
        assert none.values.shape == (6, 2)
        assert none.l0.tolist() == [0, 2, 0, 0, 1, 0]
        # No residual at the start, or after the first step.
        assert function(torch.zeros(2, 8).double(), atoms, 4).values.abs().max() == 0
        exact = function(2 * atoms[:1], atoms, 5).dense(20)
        torch.testing.assert_close(exact[:, 0], torch.tensor([2.0]).double(), **CLOSE)
        # No atom on the side of x.
        behind = -normal(0, 1, 8)
        away = atoms * torch.where(atoms @ behind.T > 0, -1, 1)
        assert function(behind, away, 3).values.abs().max() == 0
        # Of equal atoms the first.
        twice = torch.cat([atoms, atoms])
        assert int(function(x, twice, 1).indices.max()) < 20
    # An atom and its opposite: the gradient vanishes, and 0 / 0 must not move the weights.
    axis = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    code = gradient_pursuit(torch.tensor([[1.0, 5.0]]).double(), axis, 2)
    assert code.dense(2).tolist() == [[1, 0]]


def test_a_repeated_selection_adds_to_the_weight() -> None:
    # At an obtuse angle: what the second atom takes off, the first has to give again.
    directions = [[1.0, 0], [-1, 2], [0, -1], [-1, -2], [-2, -1], [1, -3]]
    atoms = normalize(torch.tensor(directions).double(), dim=1)
    x = torch.tensor([[1.0, 2.0]]).double()
    code = matching_pursuit(x, atoms, 6)
    found = torch.zeros(6).double()
    r = x[0]
    for _ in range(6):
        correlation = atoms @ r
        best = int(correlation.argmax())
        found[best] += correlation[best].clamp(min=0)
        r = x[0] - found @ atoms
    torch.testing.assert_close(code.dense(6)[0], found, **CLOSE)
    assert int((code.values > 1e-9).sum()) == 2


# Non-negative refit


@pytest.mark.parametrize("m", [12, 60])
def test_refit_is_scipys_on_the_support(m: int) -> None:
    x, atoms = planted(7, n=120, m=m, d=10, k=4)
    generator = torch.Generator().manual_seed(8)
    indices = torch.rand(120, m, generator=generator).argsort(1)[:, :9]
    values = torch.rand(120, 9, generator=generator, dtype=torch.float64)
    code = SparseCode(values * (torch.rand(120, 9, generator=generator) > 0.3), indices)
    found = nonnegative_refit(x, atoms, code)
    assert 0.1 < (found.values == 0).double().mean() < 0.9
    for i in range(120):
        support = indices[i][code.values[i] != 0]
        weights, distance = scipy.optimize.nnls(atoms[support].T.numpy(), x[i].numpy())
        dense = torch.zeros(m).double()
        dense[support] = torch.from_numpy(weights)
        torch.testing.assert_close(found.dense(m)[i], dense, rtol=1e-6, atol=1e-6)
        error = (x[i] - found.dense(m)[i] @ atoms).norm()
        assert float(error) == pytest.approx(distance, abs=1e-9)


def test_refit_bounds_every_pursuit_below() -> None:
    x, atoms = planted(9, n=150, m=200, d=24, k=6)
    for function in (gradient_pursuit, matching_pursuit):
        code = function(x, atoms, 8)
        refit = nonnegative_refit(x, atoms, code)
        assert (residual(x, atoms, refit) <= residual(x, atoms, code) + 1e-9).all()
        again = nonnegative_refit(x, atoms, refit)
        torch.testing.assert_close(again.dense(200), refit.dense(200), rtol=1e-7, atol=1e-7)
        for i in range(0, 150, 10):
            support = code.indices[i][code.values[i] != 0]
            distance = scipy.optimize.nnls(atoms[support].T.numpy(), x[i].numpy())[1]
            assert float(residual(x, atoms, code)[i]) >= distance - 1e-9


def test_refit_of_repeated_and_parallel_atoms() -> None:
    x, atoms = planted(10, n=5, m=6, d=8, k=2)
    values, indices = torch.ones(5, 3).double(), torch.tensor([[2, 4, 2]]).expand(5, 3)
    found = nonnegative_refit(x, atoms, SparseCode(values, indices))
    assert (found.values[:, 2] == 0).all()
    once = nonnegative_refit(x, atoms, SparseCode(values[:, :2], indices[:, :2]))
    torch.testing.assert_close(found.dense(6), once.dense(6), **CLOSE)
    # Equal directions: the residual is unique, the weights are not.  And more atoms than dims.
    twice = torch.cat([atoms, atoms, -atoms])
    every = torch.arange(18).expand(5, 18)
    code = nonnegative_refit(x, twice, SparseCode(torch.ones(5, 18).double(), every))
    assert (code.values >= 0).all()
    for i in range(5):
        distance = scipy.optimize.nnls(twice.T.numpy(), x[i].numpy())[1]
        assert float(residual(x, twice, code)[i]) == pytest.approx(distance, abs=1e-6)


def test_refit_keeps_places_bias_and_dtype() -> None:
    x, atoms = planted(11, n=30, m=40, d=12, k=3)
    bias = normal(12, 12)
    code = gradient_pursuit(x, atoms, torch.arange(30) % 5)
    expected = nonnegative_refit(x, atoms, code)
    low = SparseCode(code.values.float(), code.indices)
    found = nonnegative_refit((x + bias).float(), atoms.float(), low, bias.float())
    assert found.values.dtype == torch.float32
    assert torch.equal(found.indices, expected.indices)
    # float32 rounding of activations of order 1.
    torch.testing.assert_close(found.values.double(), expected.values, rtol=1e-4, atol=1e-5)
    empty = SparseCode(torch.zeros(30, 0).double(), torch.zeros(30, 0).long())
    assert nonnegative_refit(x, atoms, empty).values.shape == (30, 0)
    zeros = SparseCode(torch.zeros(30, 2).double(), torch.zeros(30, 2).long())
    assert nonnegative_refit(x, atoms, zeros).l0.sum() == 0


def test_planted_codes_are_found() -> None:
    """Few active atoms of an incoherent dictionary: pursuit names them."""
    x, atoms = planted(13, n=300, m=256, d=128, k=3)
    dense = gradient_pursuit(x, atoms, 3).dense(256)
    generator = torch.Generator().manual_seed(13)
    indices = torch.rand(300, 256, generator=generator).argsort(1)[:, :3]
    truth = torch.zeros(300, 256).scatter_(1, indices, 1.0) > 0
    # Noise of 0.03 a dimension against weights of 0.3 and more, interference of 1 / sqrt(128).
    assert (truth == (dense > 0)).all(1).float().mean() > 0.9
    assert math.isclose(float(np.median(dense[truth])), 0.8, abs_tol=0.05)


# Refusals


@pytest.mark.parametrize("function", [gradient_pursuit, matching_pursuit])
def test_wrong_input_is_refused(function: Any) -> None:
    x, atoms = planted(14, n=6, m=20, d=8, k=3)
    holed = atoms.clone()
    holed[3, 2] = torch.nan
    with refused(r"x is \[6, 7\] and dictionary is \[20, 8\], expected \[n, d\] and \[m, d\]"):
        function(x[:, 1:], atoms, 2)
    with refused(r"m of at least 1"):
        function(x, atoms[:0], 2)
    with refused("dictionary holds NaN or infinity, first in row 3"):
        function(x, holed, 2)
    with refused("x is torch.int64, expected a float tensor"):
        function(x.long(), atoms, 2)
    with refused(r"x has shape \[1, 6, 8\]"):
        function(x[None], atoms, 2)
    with refused(r"l0 runs from -1 to -1, expected 0 to 20"):
        function(x, atoms, -1)
    with refused(r"l0 runs from 2 to 21, expected 0 to 20"):
        function(x, atoms, torch.tensor([2, 2, 21, 2, 2, 2]))
    with refused("l0 is torch.float32, expected integers"):
        function(x, atoms, torch.ones(6))
    with refused("l0 is torch.bool, expected integers"):
        function(x, atoms, torch.ones(6, dtype=torch.bool))
    with refused("l0 is float, expected an int"):
        function(x, atoms, 2.0)
    with refused("l0 is bool, expected an int"):
        function(x, atoms, True)
    with refused(r"l0 has shape \[5\], expected \[6\]"):
        function(x, atoms, torch.ones(5, dtype=torch.int64))
    with refused(r"bias has shape \[7\], expected \[8\]"):
        function(x, atoms, 2, x[0, 1:])
    with refused("bias holds NaN"):
        function(x, atoms, 2, holed[3])


def test_wrong_codes_are_refused() -> None:
    x, atoms = planted(15, n=6, m=20, d=8, k=3)
    code = gradient_pursuit(x, atoms, 2)
    with refused("the code has 6 rows and x has 5"):
        nonnegative_refit(x[1:], atoms, code)
    with refused(r"expected 0 to 3; pass the dictionary"):
        nonnegative_refit(x, atoms[:4], code)
    with refused(r"x is \[6, 7\] and dictionary"):
        nonnegative_refit(x[:, 1:], atoms, code)

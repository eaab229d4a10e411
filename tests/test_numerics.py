"""Fast paths against float64 where float32 sums fail: a mean far from zero, dominant directions.

In residual streams two or three directions hold nearly all of the squared length.  Every score that
comes from float32 activations has to be that of a plain float64 computation on the same numbers, to
1e-6 of its value.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from darkmatter.errors import split_error
from darkmatter.geometry import neighbour_cosines
from darkmatter.intervals import document_sums, fvu_from_totals
from darkmatter.leastsquares import LinearStatistics, Precision, fvu
from darkmatter.pursuit import gradient_pursuit
from darkmatter.scaling import NormMoments, per_token_scaling
from darkmatter.sparse import SparseCode
from tests.bench.rows import generator, residual_stream

N, D = 6000, 48
RIGHT = 1e-6


def centred(x: Tensor) -> Tensor:
    return x.double() - x.double().mean(0)


def plain_fvu(x: Tensor, x_hat: Tensor) -> float:
    """Its definition, in two passes over all rows in float64."""
    rss = (x.double() - x_hat.double()).square().sum()
    return float(rss / centred(x).square().sum())


@pytest.fixture(scope="module")
def rows() -> tuple[Tensor, Tensor]:
    """x and a target that is nearly, but not quite, linear in x; float32."""
    x = residual_stream(N, D) + 20 * torch.randn(D, generator=generator(5))
    error = 0.1 * x + 0.02 * torch.randn(N, D, generator=generator(1))
    return x, error


def test_float32_sums_would_fail_here(rows: tuple[Tensor, Tensor]) -> None:
    x, error = rows
    expected = solved(x, error)
    design = torch.cat([x, x.new_ones(N, 1)], 1)
    weight = torch.linalg.solve(design.T @ design, design.T @ error)
    assert abs(plain_fvu(error, design @ weight) / expected - 1) > 100 * RIGHT


def solved(x: Tensor, y: Tensor) -> float:
    """FVU of the least squares solution in float64 by QR of all rows."""
    design = torch.cat([x.double(), x.new_ones(N, 1).double()], 1)
    weight = torch.linalg.lstsq(design, y.double()).solution
    return plain_fvu(y, design @ weight)


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_streaming_least_squares(rows: tuple[Tensor, Tensor], precision: Precision) -> None:
    x, error = rows
    moments = LinearStatistics(D, D)
    for part, target in zip(x.split(700), error.split(700), strict=True):
        moments.partial_fit(part, target, precision)
    expected = solved(x, error)
    assert moments.fvu(moments.solve()) == pytest.approx(expected, rel=RIGHT)
    # The map is applied in float32, where x of size 100 leaves some 1e-5.
    assert fvu(error, moments.solve()(x)) == pytest.approx(expected, rel=RIGHT)


def test_merged_least_squares(rows: tuple[Tensor, Tensor]) -> None:
    x, error = rows
    parts = [LinearStatistics(D, D) for _ in range(3)]
    for part, where in zip(parts, torch.arange(N).tensor_split(3), strict=True):
        part.partial_fit(x[where], error[where])
    whole = parts[0].merge(parts[1]).merge(parts[2])
    assert whole.fvu(whole.solve()) == pytest.approx(solved(x, error), rel=RIGHT)


def test_split_error(rows: tuple[Tensor, Tensor]) -> None:
    x, error = rows
    x_hat = x - error
    parts = split_error(x, x_hat, x, x_hat)
    found = float(parts.nonlinear.double().square().sum() / centred(x).square().sum())
    # x - x_hat is what the error is to float32 rounding.
    design = torch.cat([x.double(), torch.ones(N, 1).double()], 1)
    target = x.double() - x_hat.double()
    rest = target - design @ torch.linalg.lstsq(design, target).solution
    expected = float(rest.square().sum() / centred(x).square().sum())
    assert found == pytest.approx(expected, rel=RIGHT)


def test_fvu_and_its_totals(rows: tuple[Tensor, Tensor]) -> None:
    x, error = rows
    expected = plain_fvu(x, x - error)
    assert fvu(x, x - error) == pytest.approx(expected, rel=1e-12)
    # As a survey keeps it: totals by document.
    square = (x - (x - error)).double().square().sum(1)
    wide = x.double()
    columns = torch.cat([torch.ones(N, 1), square[:, None], wide.square().sum(1)[:, None], wide], 1)
    sums = document_sums(columns, torch.arange(N) // 100)
    found = float(fvu_from_totals(sums.sum(0, keepdim=True))[0])
    assert found == pytest.approx(expected, rel=RIGHT)


def test_gradient_pursuit(rows: tuple[Tensor, Tensor]) -> None:
    x, _ = rows
    atoms = torch.randn(200, D, generator=generator(2))
    atoms /= atoms.norm(dim=1, keepdim=True)
    bias = x.mean(0)
    low = gradient_pursuit(x, atoms, 8, bias)
    high = gradient_pursuit(x.double(), atoms.double(), 8, bias.double())
    expected = plain_fvu(x, high.decode(atoms.double(), bias.double()))
    exact = SparseCode(low.values.double(), low.indices)
    assert plain_fvu(x, exact.decode(atoms.double(), bias.double())) == pytest.approx(
        expected, rel=RIGHT
    )
    assert fvu(x, low.decode(atoms, bias)) == pytest.approx(expected, rel=RIGHT)


def test_per_token_scaling() -> None:
    random = generator(3)
    common = torch.randn(N, 1, generator=random)
    norms = 300 + 0.3 * common + 0.02 * torch.randn(N, 4, generator=random)
    moments = NormMoments(4)
    for part in norms.split(700):
        moments.partial_fit(part)
    found = per_token_scaling(moments, moments, helper=(1, 2, 3, 0))
    design = torch.cat([norms.double(), torch.ones(N, 1).double()], 1)
    for i, j in ((0, 1), (2, 3)):
        y = norms[:, j].double()
        tss = (y - y.mean()).square().sum()
        for score, columns in ((found.r2, [i, 4]), (found.r2_with, [i, (i + 1) % 4, 4])):
            chosen = design[:, columns]
            rss = (y - chosen @ torch.linalg.lstsq(chosen, y[:, None]).solution[:, 0]).square()
            unexplained = float(rss.sum() / tss)
            # A target that is also the helper leaves nothing but rounding.
            assert score is not None
            assert 1 - float(score[i, j]) == pytest.approx(unexplained, rel=RIGHT, abs=1e-9)


def test_neighbour_cosines_of_crowded_directions() -> None:
    """Directions as activations of one stream are: all within a narrow cone."""
    directions = residual_stream(400, D, seed=4)
    low = neighbour_cosines(directions, (1, 10))
    high = neighbour_cosines(directions.double(), (1, 10))
    # Each cosine is a float32 sum; 1 - cosine, the distance, is what could be lost.
    torch.testing.assert_close(low.double(), high, rtol=0, atol=1e-6)

"""Sparse codes against the dense product, by hand and at random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter._refusal import Refusal
from darkmatter.sparse import SparseCode


def test_by_hand() -> None:
    code = SparseCode(torch.tensor([[2.0, 3.0], [4.0, 0.0]]), torch.tensor([[0, 2], [1, 0]]))
    dictionary = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    bias = torch.tensor([10.0, 20.0])
    assert len(code) == 2
    assert code.l0.tolist() == [2, 1]
    assert code.dense(3).tolist() == [[2, 0, 3], [0, 4, 0]]
    assert code.decode(dictionary).tolist() == [[5, 3], [0, 4]]
    assert code.decode(dictionary, bias).tolist() == [[15, 23], [10, 24]]


@settings(deadline=None)
@given(st.integers(0, 7), st.integers(0, 5), st.integers(1, 9), st.integers(0, 10**6))
def test_decode_is_the_dense_product(n: int, k: int, m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator, dtype=torch.float64)
    values *= torch.rand(n, k, generator=generator) < 0.7
    code = SparseCode(values, torch.randint(m, (n, k), generator=generator))
    dictionary = torch.randn(m, 4, generator=generator, dtype=torch.float64)
    bias = torch.randn(4, generator=generator, dtype=torch.float64)
    # float64 rounding of sums of at most 5 products.
    torch.testing.assert_close(
        code.decode(dictionary, bias), code.dense(m) @ dictionary + bias, rtol=1e-12, atol=1e-12
    )


def test_padding_contributes_nothing() -> None:
    dictionary = torch.full((4, 3), 7.0)
    code = SparseCode(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64))
    assert code.decode(dictionary).tolist() == [[0.0] * 3] * 2
    assert code.l0.tolist() == [0, 0]


def test_decode_keeps_no_gradients_and_takes_the_dtype_of_the_dictionary() -> None:
    dictionary = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    decoded = SparseCode(torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int64)).decode(dictionary)
    assert decoded.dtype == torch.float64
    assert not decoded.requires_grad


@pytest.mark.parametrize("index", [-1, 4])
def test_an_index_outside_is_refused(index: int) -> None:
    code = SparseCode(torch.ones(1, 1), torch.tensor([[index]]))
    with pytest.raises(Refusal, match=f"index {index}, expected 0 to 3"):
        code.decode(torch.ones(4, 3))
    with pytest.raises(Refusal, match="0 to 3"):
        code.dense(4)


@pytest.mark.usefixtures("unchecked")
def test_shapes_that_do_not_match_are_refused() -> None:
    with pytest.raises(Refusal, match=r"values \(2, 3\) and indices \(2, 2\)"):
        SparseCode(torch.ones(2, 3), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(Refusal, match=r"\[n, k\]"):
        SparseCode(torch.ones(2), torch.zeros(2, dtype=torch.int64))
    code = SparseCode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(Refusal, match="bias"):
        code.decode(torch.ones(4, 3), torch.ones(2))

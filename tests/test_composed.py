"""Samplers of composed activations: what each keeps, and that it keeps nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from darkmatter.composed import (
    baseline,
    code_statistics,
    firing_frequencies,
    nearest_in_frequency,
    single_latent,
    structured,
    top_similarity,
    uniform_live,
)
from darkmatter.sparse import SparseCode
from tests.common import normal, refused

M, D = 60, 12
DIRECTIONS = normal(1, M, D)
FREQUENCIES = torch.rand(M, generator=torch.Generator().manual_seed(2), dtype=torch.float64) / 4
FREQUENCIES[[7, 31]] = 0.0
UNIT = DIRECTIONS / DIRECTIONS.norm(dim=1, keepdim=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(seed: int, n: int = 12, k: int = 6) -> SparseCode:
    """Codes of 1 to k latents a token, some padded, in no order of index."""
    g = generator(seed)
    indices = torch.stack([torch.randperm(M, generator=g)[:k] for _ in range(n)])
    values = 0.5 + torch.rand(n, k, generator=g, dtype=torch.float64)
    off = torch.arange(k) >= torch.randint(1, k + 1, (n, 1), generator=g)
    return SparseCode(values.masked_fill(off, 0), indices.masked_fill(off, 0))


def active(code: SparseCode, row: int) -> list[int]:
    return code.indices[row][code.values[row] != 0].tolist()


def sampled(name: str, code: SparseCode, seed: int = 0) -> SparseCode:
    match name:
        case "baseline":
            return baseline(code, FREQUENCIES, generator=generator(seed))
        case "structured":
            return structured(code, DIRECTIONS, FREQUENCIES, 0.3, pool=20)
        case _:
            return uniform_live(code, FREQUENCIES, generator(seed))


# ---------------------------------------------------------------------------- frequencies


def test_frequencies_by_hand() -> None:
    # Padding (value 0, index 0) is no activity.
    code = SparseCode(
        torch.tensor([[1.0, 2.0], [3.0, 0.0], [1.0, 0.0]]), torch.tensor([[2, 1], [1, 0], [2, 0]])
    )
    assert firing_frequencies(code, 4).tolist() == [0, 2 / 3, 2 / 3, 0]


def test_nearest_in_frequency_by_hand() -> None:
    f = torch.tensor([0.1, 0.0, 0.2, 0.11, 0.5, 0.09], dtype=torch.float64)
    # Dead latent 1 never comes; 3 and 5 are as near as rounding says, both before 2.
    assert set(nearest_in_frequency(f, 0, 2)) == {3, 5}
    assert nearest_in_frequency(f, 0, 3)[2] == 2
    assert nearest_in_frequency(f, 4, 2, itself=True) == [4, 2]
    assert nearest_in_frequency(f, 1, 1) == [5]


# ---------------------------------------------------------------------------- invariants


@pytest.mark.parametrize("name", ["baseline", "structured", "uniform"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=8, deadline=None)
def test_values_and_counts_are_kept_and_no_latent_is_dead_or_comes_twice(
    name: str, seed: int
) -> None:
    code = drawn(seed)
    found = sampled(name, code, seed)
    assert torch.equal(found.l0, code.l0)
    for row in range(len(code)):
        latents = active(found, row)
        assert len(set(latents)) == len(latents)
        assert not set(latents) & {7, 31}
        kept = code.values[row][code.values[row] != 0].sort().values
        assert torch.equal(found.values[row][found.values[row] != 0].sort().values, kept)


def by_index(code: SparseCode, row: int) -> list[int]:
    """Active latents in order of index: place j of the composed token stands for the j-th."""
    return sorted(active(code, row))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_baseline_stays_in_the_pool_or_takes_the_nearest_unused(seed: int) -> None:
    code = drawn(seed)
    found = baseline(code, FREQUENCIES, pool=10, generator=generator(seed))
    for row in range(len(code)):
        for old, new in zip(by_index(code, row), active(found, row), strict=True):
            # At most 6 latents a token: of a pool of 10 some are always unused.
            assert new in nearest_in_frequency(FREQUENCIES, old, 10)


def test_baseline_leaves_a_pool_that_is_used_up() -> None:
    # Latents 0 to 2 have one common nearest latent each way round; a pool of 1 must be left.
    f = torch.tensor([0.5, 0.5, 0.5, 0.9], dtype=torch.float64)
    code = SparseCode(torch.ones(1, 3, dtype=torch.float64), torch.tensor([[0, 1, 2]]))
    found = baseline(code, f, pool=1)
    # 0 -> 1 (nearest, tie by index); 1 -> 0; 2 -> 0 and 1 are used, 3 is what is left.
    assert found.indices.tolist() == [[1, 0, 3]]


def test_baseline_of_itself_is_the_code() -> None:
    code = drawn(4)
    # Only live latents can stand for themselves.
    f = torch.full((M,), 0.01, dtype=torch.float64)
    found = baseline(code, f, pool=1, itself=True)
    assert torch.equal(found.dense(M), code.dense(M))
    bias = normal(9, D)
    assert torch.allclose(found.decode(DIRECTIONS, bias), code.decode(DIRECTIONS, bias))


def test_baseline_does_not_keep_cosines_and_structured_not_frequencies() -> None:
    code = drawn(5, n=60)
    real = code_statistics(code, DIRECTIONS, FREQUENCIES)

    def off(name: str, what: str) -> float:
        other = code_statistics(sampled(name, code), DIRECTIONS, FREQUENCIES)
        difference = (getattr(other, what) - getattr(real, what)).abs()
        return float(difference[~difference.isnan()].mean())

    # 60 directions in 12 dimensions: cosines spread by 0.3, matched ones by the spacing of 58.
    assert off("structured", "cosine_to_top") < 0.08 < 0.15 < off("baseline", "cosine_to_top")
    assert off("uniform", "cosine_to_top") > 0.15
    assert off("baseline", "frequency") < off("structured", "frequency")
    assert off("baseline", "frequency") < off("uniform", "frequency")


# ---------------------------------------------------------------------------- structured


def copies(groups: int = 4) -> Tensor:
    """Groups of 5 latents with one Gram matrix; across groups cosines are 0.4 of those within."""
    shape = normal(11, 5, 5)
    shape /= shape.norm(dim=1, keepdim=True)
    rows: list[Tensor] = []
    for g in range(groups):
        own = torch.zeros(5, 5 * (groups + 1), dtype=torch.float64)
        own[:, :5] = math.sqrt(0.4) * shape
        own[:, 5 * (g + 1) : 5 * (g + 2)] = math.sqrt(0.6) * shape
        rows.append(own)
    return torch.cat(rows)


def test_structured_finds_the_planted_copy_with_all_its_cosines() -> None:
    directions = copies()
    f = torch.full((20,), 0.1, dtype=torch.float64)
    code = SparseCode(torch.tensor([[3.0, 1.0, 2.0]]).double(), torch.tensor([[0, 2, 4]]))
    found = structured(code, directions, f, 0.4)
    group = int(found.indices[0, 0]) // 5
    assert group > 0
    assert found.indices[0].tolist() == [5 * group, 5 * group + 2, 5 * group + 4]
    before, after = (code_statistics(c, directions, f) for c in (code, found))
    assert torch.allclose(before.pairwise_cosine, after.pairwise_cosine, atol=1e-12)


@given(seed=st.integers(0, 10_000), similarity=st.floats(-0.5, 0.9))
@settings(max_examples=10, deadline=None)
def test_structured_is_the_naive_loop(seed: int, similarity: float) -> None:
    code = drawn(seed, n=4)
    found = structured(code, DIRECTIONS, FREQUENCIES, similarity, pool=15)
    for row in range(len(code)):
        latents = by_index(code, row)
        dense = code.dense(M)[row]
        top = max(latents, key=lambda i: float(dense[i]))
        pool = nearest_in_frequency(FREQUENCIES, top, 15)
        c = min(pool, key=lambda j: abs(float(UNIT[j] @ UNIT[top]) - similarity))
        used: list[int] = []
        for i in latents:
            free = [j for j in range(M) if FREQUENCIES[j] > 0 and j not in used]
            s = float(UNIT[top] @ UNIT[i])
            used.append(
                c
                if i == top and c in free
                else min(free, key=lambda j: abs(float(UNIT[c] @ UNIT[j]) - s))
            )
        assert active(found, row) == used


# ---------------------------------------------------------------------------- others


def test_uniform_draws_every_live_latent_equally() -> None:
    code = SparseCode(torch.ones(4000, 3), torch.tensor([[0, 1, 2]]).expand(4000, 3))
    counts = torch.bincount(uniform_live(code, FREQUENCIES, generator()).indices.flatten())
    live = counts[FREQUENCIES > 0].double()
    # Poisson counts about 12000 / 58 = 207; 5 standard deviations of 14.4.
    assert float((live - 12000 / 58).abs().max()) < 72
    assert counts[[7, 31]].tolist() == [0, 0]


def test_single_latent_keeps_value_and_distance() -> None:
    base, bias = normal(20, 50, D), normal(21, D)
    far = torch.cdist(base, 2.0 * UNIT + bias)
    distance = float(far.mean())
    found = single_latent(base, UNIT, bias, FREQUENCIES, 2, distance, 0.5, generator())
    assert found.l0.tolist() == [1] * 50
    assert set(found.values.flatten().tolist()) == {2.0}
    off = ((found.decode(UNIT, bias) - base).norm(dim=1) - distance).abs()
    live = FREQUENCIES > 0
    best = (far[:, live] - distance).abs().amin(1)
    # Within the tolerance, or where no latent is, the nearest (to rounding).
    assert bool(((off <= 0.5) | (off <= best + 1e-9)).all())
    assert len(found.indices.unique()) > 10


def test_statistics_by_hand() -> None:
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    f = torch.tensor([0.1, 0.01, 0.0])
    code = SparseCode(
        torch.tensor([[3.0, 1.0, 1.0], [2.0, 0.0, 0.0]]), torch.tensor([[2, 0, 1], [1, 0, 0]])
    )
    found = code_statistics(code, directions, f)
    r = math.sqrt(0.5)
    assert found.l0.tolist() == [3, 1]
    assert found.top_share.tolist() == pytest.approx([0.6, 1])
    assert float(found.cosine_to_top[0]) == pytest.approx(r)
    assert float(found.pairwise_cosine[0]) == pytest.approx(2 * r / 3)
    assert found.cosine_to_top.isnan().tolist() == [False, True]
    assert found.frequency.tolist() == pytest.approx([-13 / 3, -2])


def test_top_similarity_by_hand() -> None:
    directions = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]])
    one = SparseCode(torch.tensor([[1.0, 2.0], [5.0, 2.0]]), torch.tensor([[0, 2], [1, 0]]))
    other = SparseCode(torch.tensor([[1.0, 0.0], [5.0, 2.0]]), torch.tensor([[0, 0], [1, 0]]))
    assert top_similarity(one, other, directions).tolist() == pytest.approx([math.sqrt(0.5), 1])


def test_refusals() -> None:
    code, f = drawn(1), FREQUENCIES
    with refused("pool is 0, expected 1"):
        baseline(code, f, pool=0)
    with refused("similarity is 2, expected a cosine"):
        structured(code, DIRECTIONS, f, 2)
    with refused("60 latents, expected a decoder direction for each"):
        structured(code, DIRECTIONS[:5], f, 0.3)
    with refused("shares of tokens from 0 to 1"):
        uniform_live(code, f - 1)
    with refused("expected more to choose from"):
        uniform_live(code, torch.zeros(M))
    with refused("expected one or more and each once"):
        uniform_live(SparseCode(torch.ones(1, 2), torch.tensor([[3, 3]])), f)
    with refused("distance is -1, expected above 0"):
        single_latent(DIRECTIONS, DIRECTIONS, DIRECTIONS[0], f, 1, -1, 1)
    with refused("has no tokens"):
        firing_frequencies(SparseCode(torch.ones(0, 2), torch.zeros(0, 2).long()), 4)
    with refused("below d_sae=4"):
        firing_frequencies(code, 4)
    with refused("expected pairs"):
        top_similarity(code, drawn(1, n=3), DIRECTIONS)

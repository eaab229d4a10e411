"""The cost of a survey: small numbers by hand, and sums that are known of real models."""

from __future__ import annotations

import pytest

import darkmatter as dm
from darkmatter.arithmetic import Machine, Network, survey_cost

SMALL = Network(d_model=2, n_layer=3, parameters_per_block=10, vocabulary=5, context=4)
MACHINE = Machine(bfloat16=100.0, float64=10.0, share=0.5, price=2.0)


def test_by_hand() -> None:
    # d = 2, m = (4, 6), 100 tokens of which 60 are fitted on; a block is 2 * 10 + 4 * 4 * 2 = 52.
    cost = survey_cost(SMALL, 2, [4, 6], 100, MACHINE, l0=1)
    assert cost.forward == 100 * 2 * 52
    assert cost.encoding == 100 * (2 * 2 * 4 + 4 + 2 * 2 * 6 + 4)
    assert cost.moments == 60 * 2 * 4 * 3
    assert cost.maps == 40 * 2 * 4 * 2
    # Original and three variants of two SAEs, one block after the hook, 2 * 2 * 5 to logits.
    assert cost.downstream == 40 * 7 * (52 + 20)
    assert cost.solving == pytest.approx(8 / 3 + 2 * 8 * 2)
    assert cost.statistics_bytes == 8 * 4 * 3
    # 30 + 10 parameters and the wider SAE, two bytes a number.
    assert cost.resident_bytes == 96 + 2 * 40 + 2 * 2 * 2 * 6
    assert cost.stored_bytes == 4 * 2 * 3 * 100
    low = (cost.forward + cost.encoding + cost.downstream) / 50
    high = (cost.moments + cost.maps + cost.solving) / 5
    assert cost.hours == pytest.approx((low + high) / 3600)
    assert cost.price == pytest.approx(2 * cost.hours)
    assert cost.operations == pytest.approx(50 * low + 5 * high)


def test_without_downstream_only_that_part_goes() -> None:
    whole = survey_cost(SMALL, 2, [4, 6], 100, MACHINE)
    less = survey_cost(SMALL, 2, [4, 6], 100, MACHINE, downstream=False)
    assert less.downstream == 0
    assert whole.operations - less.operations == pytest.approx(whole.downstream)


def test_memory_does_not_grow_with_tokens_but_storing_would() -> None:
    one, ten = (survey_cost(SMALL, 1, [4], n, MACHINE) for n in (1e6, 1e7))
    assert one.resident_bytes == ten.resident_bytes
    assert ten.stored_bytes == 10 * one.stored_bytes


def test_a_forward_of_gemma_is_two_operations_a_parameter() -> None:
    # 9.24e9 parameters with one embedding of 256,000 x 3,584: 18.5 GFLOP a token with no attention.
    gemma = Network(3584, 42, (9.24e9 - 256_000 * 3584) / 42, 256_000, context=1)
    assert gemma.parameters == pytest.approx(9.24e9)
    assert gemma.blocks(42) + gemma.unembedding == pytest.approx(18.5e9, rel=2e-3)


def test_machines_are_whole() -> None:
    cost = survey_cost(SMALL, 2, [4], 1e6, MACHINE)
    assert cost.machines_for(cost.hours) == 1
    assert cost.machines_for(cost.hours / 2.5) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks_before": 4}, "blocks_before is 4, expected 1 to 3"),
        ({"d_sae": []}, "at least one SAE"),
        ({"tokens": 0}, "expected positive numbers"),
        ({"fit_share": 1.0}, "a share below 1"),
    ],
)
def test_refused(change: dict[str, object], message: str) -> None:
    given = {"network": SMALL, "blocks_before": 2, "d_sae": [4], "tokens": 10, "machine": MACHINE}
    with pytest.raises(dm.Refusal, match=message):
        survey_cost(**(given | change))  # pyright: ignore[reportArgumentType]


def test_sizes_are_positive() -> None:
    with pytest.raises(dm.Refusal, match="d_model is 0, expected above zero"):
        Network(0, 1, 1, 1, 1)
    with pytest.raises(dm.Refusal, match="share is 2, expected at most 1"):
        Machine(1, 1, share=2)

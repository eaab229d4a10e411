"""Relations: agree with Python's own evaluation, and refuse what is no relation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from darkmatter._refusal import Refusal
from darkmatter.book import relations

VALUES = {"a": 2.0, "b-1": 3.0, "c": -0.5, "falls": [3.0, 1.0]}
NUMBER = st.sampled_from(["a", "b-1", "c", "0.5", "7", "2e-1", "falls[0]", "falls[-1]"])
SUM = st.recursive(
    NUMBER,
    lambda one: st.tuples(one, st.sampled_from([" + ", " - ", "*"]), one).map(
        lambda parts: f"({''.join(parts)})"
    ),
    max_leaves=4,
)
RELATION = st.lists(SUM, min_size=2, max_size=4).flatmap(
    lambda sums: st.lists(
        st.sampled_from([" < ", " <= ", " > ", " >= "]),
        min_size=len(sums) - 1,
        max_size=len(sums) - 1,
    ).map(lambda signs: "".join(a + b for a, b in zip(sums, [*signs, ""], strict=True)))
)


@given(RELATION)
def test_agrees_with_python(relation: str) -> None:
    # Python is the oracle: its comparison chains mean the same, once ids are names.
    names = {"a": 2.0, "b_1": 3.0, "c": -0.5, "falls": [3.0, 1.0]}
    assert relations.holds(relation, VALUES) is bool(eval(relation.replace("b-1", "b_1"), names))


def test_and_joins_and_precedence_is_the_usual_one() -> None:
    assert relations.holds("1 + 2 * a < 6 and c < 0", VALUES)
    assert not relations.holds("a < 6 and c > 0", VALUES)
    assert relations.ids_of("a < b-1 - 0.5 and a > c") == ["a", "b-1", "c"]


@pytest.mark.parametrize(
    "relation",
    ["", "a", "a <", "a < b <", "(a < 2", "a == 2", "__import__('os') < 1", "a < 2 3", "a[x] < 1"],
)
def test_what_is_no_relation_is_refused(relation: str) -> None:
    with pytest.raises(Refusal, match="relation"):
        relations.validate(relation)


def test_lists_need_an_index_and_missing_values_are_named() -> None:
    with pytest.raises(Refusal, match="write falls"):
        relations.holds("falls < 1", VALUES)
    with pytest.raises(Refusal, match="index inside the 2 values"):
        relations.holds("falls[2] < 1", VALUES)
    with pytest.raises(relations.NotRecorded, match="absent"):
        relations.holds("absent < 1", VALUES)
    with pytest.raises(Refusal, match="divisor"):
        relations.holds("1 / (a - 2) < 1", VALUES)

"""Exercises of chapter 02: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from darkmatter._refusal import Refusal
from darkmatter.book.checks.chapter_02 import simulated_fvu
from tests.book.checks.common import CHAPTERS, answers, refused

Floats = NDArray[np.float64]
WIDTHS = 512.0 * 2.0 ** np.arange(5)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda fvu, non, floor: (fvu - floor, fvu - non, non), "absent and linear error together"),
        (lambda fvu, non, floor: (floor - non, fvu - floor, non), "exchanged"),
        (lambda fvu, non, floor: (fvu - floor, floor - non, fvu - non), "linear map leaves"),
        (lambda fvu, non, floor: (fvu, floor - non, non), "add up"),
        (lambda fvu, non, floor: (0.1, 0.0, 0.15), "Absent is the FVU less the floor"),
        (lambda fvu, non, floor: fvu - floor, "Return three numbers"),
    ],
)
def test_breakdown_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("02.1", answer, message)


def free(width: Floats, fvu: Floats, exponent: float) -> tuple[float, float]:
    slope, floor = np.polyfit(width**-exponent, fvu, 1)
    return float(floor), float(slope)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (free, "came out negative, but no FVU is"),
        (lambda *given: (max(free(*given)[0], 0), free(*given)[1]), "kept the scale"),
        (lambda *given: free(*given)[::-1], "Floor and scale are exchanged"),
        (lambda w, y, g: (0.0, (w**-g @ y) / (w**-g @ w**-g)), "through zero"),
        (lambda w, y, g: (0.1, 1.0), "not recovered"),
        (lambda w, y, g: free(w, y, g)[0], "Return two numbers"),
    ],
)
def test_closed_form_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("02.2", answer, message)


def test_a_scale_below_zero_is_refused() -> None:
    def without_the_last_bound(w: Floats, y: Floats, g: float) -> tuple[float, float]:
        floor, scale = free(w, y, g)
        return (floor, scale) if floor >= 0 else (0.0, float((w**-g @ y) / (w**-g @ w**-g)))

    refused("02.2", without_the_last_bound, "For points that rise")


def error_of(width: Floats, scale: float, exponent: float, columns: int) -> float:
    falls = width**-exponent
    j = np.stack([np.ones(len(width)), falls, -scale * falls * np.log(width)], 1)[:, :columns]
    return float(np.sqrt(np.linalg.inv(j.T @ j)[0, 0]))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda w, a, g, s: s * error_of(w, a, g, 2), "takes the exponent as known"),
        (lambda w, a, g, s: (s * error_of(w, a, g, 3)) ** 2, "the variance of the floor"),
        (lambda w, a, g, s: error_of(w, a, g, 3), "noise of size one"),
        (lambda w, a, g, s: s, "inv"),
        (lambda w, a, g, s: s * error_of(WIDTHS, a, g, 3), "not for others"),
    ],
)
def test_floor_error_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("02.3", answer, message)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda share, n, d: share, "in-sample share itself"),
        (lambda share, n, d: share * n / (n - d - 1), "also pay for the error of the map"),
        (lambda share, n, d: share + (d + 1) / n, "multiply"),
        (lambda share, n, d: share * (n - d) / (n + d), "harder"),
        (lambda share, n, d: share * 1.2, "Expected about"),
    ],
)
def test_new_rows_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("02.4", answer, message)


def test_new_rows_agree_with_a_simulation() -> None:
    generator = np.random.default_rng(0)
    n, d, runs = 300, 29, 200
    inside, outside = [], []
    for _ in range(runs):
        x, y = generator.normal(size=(2 * n, d)), generator.normal(size=2 * n)
        ones = np.column_stack([np.ones(2 * n), x])
        weights = np.linalg.lstsq(ones[:n], y[:n], rcond=None)[0]
        squares = (y - ones @ weights) ** 2
        inside.append(squares[:n].mean())
        outside.append(squares[n:].mean())
    expected_on_new_rows = answers(CHAPTERS["02"], empty=False)["expected_on_new_rows"]
    expected = expected_on_new_rows(np.mean(inside), n, d)
    # First order in p / n = 0.1, and two means of 60000 squares: 2 % covers both.
    assert np.mean(outside) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda width, honest: np.full(5, 4.0), "lengths in proportion to width"),
        (lambda width, honest: 4 * width / 512, "still allows zero|begins at"),
        (lambda width, honest: 4 * width / 512 if honest else np.ones(5), "does not fall"),
        (lambda width, honest: 4 * width / 512 if honest else np.full(5, 16.0), "begins at 0.036"),
        (lambda width, honest: np.full(5, 0.5), "one length from 1 to 1000"),
        (lambda width, honest: 4.0, "one length from 1 to 1000"),
    ],
)
def test_training_length_mistakes(answer: Callable[..., Any], message: str) -> None:
    refused("02.5", answer, message)


def test_simulated_fvu_by_hand() -> None:
    # 0.31 * (1 + 0.02) at the first width; at 1024, trained twice as long, 0.31 * 2**-0.12 * 1.02.
    found = simulated_fvu(np.array([512.0, 1024.0]), np.array([1.0, 2.0]))
    assert found == pytest.approx([0.3162, 0.3162 * 2**-0.12], rel=1e-12)
    with pytest.raises(Refusal, match="for each of 2 widths"):
        simulated_fvu(np.array([512.0, 1024.0]), np.array([1.0]))

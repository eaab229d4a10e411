"""Exercises of chapter 04: the usual mistakes are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter.leastsquares import LinearStatistics, r2
from tests.book.checks.common import refused

Pair = tuple[float, float]


def line(w: Tensor) -> tuple[float, float, float]:
    square = w.square()
    covariance = (w * square).mean() - w.mean() * square.mean()
    slope = covariance / w.var(correction=0)
    constant = square.mean() - slope * w.mean()
    share = covariance**2 / (w.var(correction=0) * square.var(correction=0))
    return float(slope), float(constant), float(share)


def through_origin(w: Tensor) -> tuple[float, float, float]:
    slope = w.pow(3).mean() / w.square().mean()
    return float(slope), 0.0, r2(w.square(), slope * w)


def two_norms(x_fit: Tensor, v_fit: Tensor, x: Tensor, v: Tensor, in_sample: bool = False) -> Pair:
    def one(target: Callable[[Tensor], Tensor]) -> float:
        rows, norms = (x, target(v)) if in_sample else (x_fit, target(v_fit))
        probe = LinearStatistics(x.shape[1], 1).partial_fit(rows, norms).solve()
        return r2(target(v), probe(x)[:, 0])

    return one(lambda v: v.square().sum(1)), one(lambda v: v.norm(dim=1))


def rooted(x_fit: Tensor, v_fit: Tensor, x: Tensor, v: Tensor) -> Pair:
    probe = LinearStatistics(x.shape[1], 1).partial_fit(x_fit, v_fit.square().sum(1)).solve()
    guess = probe(x)[:, 0].clamp(min=0).sqrt()
    return two_norms(x_fit, v_fit, x, v)[0], r2(v.norm(dim=1), guess)


def token_mean(
    token: Tensor, norm2: Tensor, is_fit: Tensor, fallback: str = "rows", leak: bool = False
) -> Tensor:
    rows = torch.ones_like(is_fit) if leak else is_fit
    count = torch.bincount(token[rows], minlength=50).double()
    total = torch.bincount(token[rows], weights=norm2[rows], minlength=50)
    table = total / count
    instead = {
        "rows": norm2[is_fit].mean(),
        "entries": table[count > 0].mean(),
        "all": norm2.mean(),
        "zero": torch.tensor(0.0).double(),
        "nan": torch.tensor(torch.nan).double(),
    }[fallback]
    return torch.where(count > 0, table, instead)[token[~is_fit]]


def lie(
    x: Tensor, norm2: Tensor, rows: int = 40, length: float = 1e3, size: float = 1e6
) -> tuple[Tensor, Tensor]:
    added = torch.zeros(rows, x.shape[1]).double()
    added[:, 0] = length
    return torch.cat([x, added]), torch.cat([norm2, torch.full((rows,), size).double()])


def scattered(x: Tensor, norm2: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([x, x[:40]]), torch.cat([norm2, torch.full((40,), 1e6).double()])


def levels_off(position: list[int], value: list[float], tolerance: float) -> int | None:
    late = max(1, len(value) // 4)
    level = sum(value[-late:]) / late
    near = [abs(one - level) <= tolerance * abs(level) for one in value]
    return next((position[i] for i in range(len(value) - late + 1) if all(near[i:])), None)


def touches(position: list[int], value: list[float], tolerance: float) -> int | None:
    level = sum(value[-2:]) / 2
    near = (p for p, v in zip(position, value, strict=True) if abs(v - level) <= tolerance * level)
    return next(near, None)


def last_value(position: list[int], value: list[float], tolerance: float) -> int | None:
    near = [abs(one - value[-1]) <= tolerance * value[-1] for one in value]
    return next((position[i] for i in range(len(value)) if all(near[i:])), None)


def absolute(position: list[int], value: list[float], tolerance: float) -> int | None:
    level = sum(value[-2:]) / 2
    near = [abs(one - level) <= tolerance for one in value]
    return next((position[i] for i in range(7) if all(near[i:])), None)


def index_of(position: list[int], value: list[float], tolerance: float) -> int | None:
    found = levels_off(position, value, tolerance)
    return None if found is None else position.index(found)


MISTAKES: list[tuple[str, Callable[..., Any], str]] = [
    ("04.1", through_origin, "through the origin"),
    ("04.1", lambda w: (line(w)[0], 0.0, line(w)[2]), "the constant is not"),
    ("04.1", lambda w: (*line(w)[:2], line(w)[2] ** 0.5), "That is the correlation"),
    ("04.1", lambda w: (line(w)[0] * 3999 / 4000, *line(w)[1:]), "same divisor"),
    ("04.1", lambda w: (*line(w)[:2], 0.5), "R2 is not"),
    ("04.1", lambda w: line(w)[0], "three numbers"),
    ("04.2", lambda *rows: two_norms(*rows)[::-1], "swapped"),
    ("04.2", rooted, "nor the root"),
    ("04.2", lambda *rows: two_norms(*rows)[:1] * 2, "Both scores are the same"),
    ("04.2", lambda *rows: (two_norms(*rows)[0], 0.5), "plain norm scores"),
    ("04.2", lambda a, b, c, d: two_norms(a, a, c, c), "norm of v"),
    ("04.2", lambda *rows: two_norms(*rows)[1:] * 2, "squared norm scores"),
    ("04.3", lambda *rows: token_mean(*rows, leak=True), "contain the test rows"),
    ("04.3", lambda *rows: token_mean(*rows, fallback="nan"), "NaN"),
    ("04.3", lambda *rows: token_mean(*rows, fallback="zero"), "Unseen tokens get 0"),
    ("04.3", lambda *rows: token_mean(*rows, fallback="entries"), "table's entries"),
    ("04.3", lambda *rows: token_mean(*rows, fallback="all"), "test rows included"),
    ("04.3", lambda *rows: token_mean(*rows).flip(0), "Some predictions differ"),
    ("04.3", lambda token, norm2, is_fit: norm2, "one prediction for each test row"),
    ("04.4", lambda x, y: (x, y), "No rows were appended"),
    ("04.4", lambda x, y: lie(x, y, rows=41), "41 rows, 40 are allowed"),
    ("04.4", lambda x, y: lie(2 * x, y), "given rows changed"),
    ("04.4", lambda x, y: lie(x, y, size=-1e6), "never negative"),
    ("04.4", lambda x, y: lie(x, y, size=60.0), "not large enough"),
    ("04.4", scattered, "look like the others"),
    ("04.4", lambda x, y: lie(x, y)[0], "Return the pair"),
    ("04.5", touches, "only crosses"),
    ("04.5", index_of, "index of the bin"),
    ("04.5", last_value, "has not levelled off"),
    ("04.5", absolute, "has not levelled off|relative to the late level"),
    ("04.5", lambda p, v, t: None, "None came"),
]


@pytest.mark.parametrize(("id", "answer", "message"), MISTAKES)
def test_the_usual_mistakes_are_named(id: str, answer: Callable[..., Any], message: str) -> None:
    refused(id, answer, message)

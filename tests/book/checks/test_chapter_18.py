"""Exercises of chapter 18: typical wrong answers are refused with what is wrong about them."""

# pyright: reportUnknownLambdaType=false, reportUnknownMemberType=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# The answers are callables of any signature, so a lambda has nothing to be inferred from.
from __future__ import annotations

from typing import Any

import numpy as np

from tests.book.checks.common import refused


def test_in_model_units() -> None:
    refused("18.1", lambda e, d, s: (e, d), "The encoder sees raw activations")
    refused("18.1", lambda e, d, s: (lambda x: e(x * s), d), "divided by scale, not times it")
    refused("18.1", lambda e, d, s: (lambda x: e(x / s), d), "in the SAE's units")
    refused("18.1", lambda e, d, s: (lambda x: e(x / s) * s, d), "Latents times scale")
    refused(
        "18.1",
        lambda e, d, s: (lambda x: e(x / s), lambda z: d(z * s)),
        "leaves the decoder's offset unscaled",
    )
    refused("18.1", lambda e, d, s: (lambda x: e(x / s), lambda z: d(z) / s), "is times scale")
    refused("18.1", lambda e, d, s: e, "Return two functions")


def test_norm_r2() -> None:
    def left(f: Any) -> float:
        return ((f.error_norm2 - f.predicted_norm2) ** 2).sum()

    refused("18.2", lambda f: f.corr().iloc[0, 1] ** 2, "squared correlation")
    refused("18.2", lambda f: 1 - left(f) / (f.error_norm2**2).sum(), "about the mean")
    refused(
        "18.2",
        lambda f: 1 - left(f) / ((f.predicted_norm2 - f.predicted_norm2.mean()) ** 2).sum(),
        "variance of the prediction",
    )
    refused(
        "18.2",
        lambda f: left(f) / ((f.error_norm2 - f.error_norm2.mean()) ** 2).sum(),
        "share that is left",
    )


def test_mean_norm_interval() -> None:
    def tokens(f: Any) -> tuple[float, float]:
        drawn = np.random.default_rng(0).choice(f.error_norm2, (500, len(f)))
        return tuple(np.quantile(drawn.mean(1), [0.025, 0.975]))

    def spread(f: Any) -> tuple[float, float]:
        means = f.groupby("document").error_norm2.mean()
        return tuple(np.quantile(means, [0.025, 0.975]))

    def standard(f: Any) -> tuple[float, float]:
        means = f.groupby("document").error_norm2.mean()
        half = means.std() / len(means) ** 0.5
        return (f.error_norm2.mean() - half, f.error_norm2.mean() + half)

    refused("18.3", tokens, "draw documents, not tokens")
    refused("18.3", spread, "the spread of documents")
    refused("18.3", standard, "cut 2.5 % at both ends")
    refused("18.3", lambda f: (2.0, 1.0), "low comes first")
    refused("18.3", lambda f: (1.0, 2.0), "lies outside")
    refused("18.3", lambda f: 1.0, "two numbers")


def test_moment_bytes() -> None:
    refused("18.4", lambda d, s: 8 * d * d * s, "The covariance of x itself")
    refused("18.4", lambda d, s: 4 * d * d * (1 + s), "Float64")
    refused("18.4", lambda d, s: d * d * (1 + s), "That counts numbers")
    refused("18.4", lambda d, s: 8 * ((1 + s) * d) ** 2, "never multiplied with each other")


def test_flattering() -> None:
    def by_token(f: Any) -> Any:
        ratio = f.error_norm2 / f.x_norm2
        return (ratio <= ratio.quantile(0.4)).to_numpy()

    def ratio(f: Any) -> Any:
        sums = f.groupby("position")[["error_norm2", "x_norm2"]].sum()
        return sums.error_norm2 / sums.x_norm2

    refused("18.5", by_token, "choosing by token")
    refused("18.5", lambda f: (f.position == ratio(f).idxmin()).to_numpy(), "keep a third")
    refused(
        "18.5", lambda f: f.position.isin(ratio(f).nlargest(10).index).to_numpy(), "unkind ones"
    )
    refused(
        "18.5",
        lambda f: f.position.isin(ratio(f).nsmallest(15).index).to_numpy(),
        "with the kindest third",
    )
    refused("18.5", lambda f: f.position, "Return a boolean mask")

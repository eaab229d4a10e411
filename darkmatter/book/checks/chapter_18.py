"""Checks of chapter 18: units, a column made again, resampled documents, memory, a kind mask."""

# pyright: reportUnknownMemberType=false
# pandas' columns are of unknown type.
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from darkmatter.book.checks.common import alike, normal, refuse_mistakes
from darkmatter.book.exercises import NotYet, exercise


@exercise("18.1", difficulty=2, minutes=10, teaches="What goes in and what comes out has a unit.")
def in_model_units(answer: Callable[..., Any]) -> str:
    """x / scale into the encoder, the decoder's answer times scale."""
    weights, bias, scale = normal(1, 5, 12), normal(2, 5), 7.0

    def encode(x: Tensor) -> Tensor:
        return torch.relu(x @ weights - 0.3)

    def decode(latents: Tensor) -> Tensor:
        return latents @ weights.T / 12 + bias

    given: Any = answer(encode, decode, scale)
    if not isinstance(given, tuple) or len(given) != 2 or not all(callable(f) for f in given):
        raise NotYet("Return two functions, (encode, decode).")
    x = scale * normal(3, 20, 5)
    latents, x_hat = given[0](x.clone()), given[1](given[0](x.clone()))
    right = encode(x / scale)
    assert not alike(latents, encode(x)), "The encoder sees raw activations: divide by scale first."
    assert not alike(latents, encode(x * scale)), "Activations were divided by scale, not times it."
    assert not alike(latents, right * scale), (
        "Latents times scale: then the decoder gets what it was not trained on; scale what it "
        "returns instead."
    )
    assert alike(latents, right), "encode(x / scale) are the latents."
    assert not alike(x_hat, decode(right)), (
        "The reconstruction is in the SAE's units; multiply it by scale."
    )
    assert not alike(x_hat, decode(right * scale)), (
        "decode(latents * scale) leaves the decoder's offset unscaled; scale what it returns."
    )
    assert not alike(x_hat, decode(right) / scale), "Back to the model's units is times scale."
    assert alike(x_hat, decode(right) * scale), "decode(latents) * scale is the reconstruction."
    return "Latents in the SAE's units, activations in the model's."


@exercise("18.2", difficulty=2, minutes=8, teaches="An R2 is not a squared correlation.")
def norm_r2(answer: Callable[..., Any]) -> str:
    """1 - squares left / squares about the mean."""
    norm = (3 + normal(4, 200)).square().numpy()
    predicted = 0.7 * norm + 2 + 0.5 * normal(5, 200).numpy()
    frame = pd.DataFrame({"error_norm2": norm, "predicted_norm2": predicted})
    given = float(answer(frame.copy()))
    left = float(((norm - predicted) ** 2).sum())
    right = 1 - left / float(((norm - norm.mean()) ** 2).sum())
    wrong = {
        float(np.corrcoef(norm, predicted)[0, 1] ** 2): (
            "That is the squared correlation: it forgives a wrong mean and a wrong scale."
        ),
        1 - left / float((norm**2).sum()): "The squares below are about the mean of the norm.",
        1 - left / float(((predicted - predicted.mean()) ** 2).sum()): (
            "That divides by the variance of the prediction; the norm is to be explained."
        ),
        1 - right: "That is the share that is left; one minus it is explained.",
    }
    refuse_mistakes(given, wrong)
    assert abs(given - right) < 1e-9, "1 - sum (norm - predicted)^2 / sum (norm - mean)^2."
    return f"R2 {given:.2f}."


@exercise("18.3", difficulty=3, minutes=15, teaches="Tokens of one document are not independent.")
def mean_norm_interval(answer: Callable[..., Any]) -> str:
    """Against the width that is known of documents with one level each."""
    generator = np.random.default_rng(6)
    sizes = generator.integers(50, 150, 60)
    level = generator.normal(10, 2, 60)
    document = np.repeat(np.arange(60), sizes)
    norm = level[document] + generator.normal(0, 1, len(document))
    frame = pd.DataFrame({"document": document, "error_norm2": norm})
    given: Any = answer(frame.copy())
    if not isinstance(given, tuple) or len(given) != 2:
        raise NotYet("Return (low, high), two numbers.")
    low, high = float(given[0]), float(given[1])
    assert low < high, "low comes first, and is below high."
    middle = float(norm.mean())
    assert low < middle < high, f"The mean itself, {middle:.2f}, lies outside of your interval."
    # Of a ratio of sums: 2 * 1.96 * sqrt(sum (total - mean * count)^2) / tokens, to first order.
    residual = np.bincount(document, norm - middle)
    width = 2 * 1.96 * float(np.sqrt((residual**2).sum())) / len(norm)
    tokens = 2 * 1.96 * float(norm.std()) / len(norm) ** 0.5
    found = high - low
    assert not found < 2 * tokens, (
        f"Your interval is {found:.2f} wide, as if all {len(norm)} tokens were independent: draw "
        "documents, not tokens."
    )
    assert not found > 3 * width, (
        f"Your interval is {found:.2f} wide: that is the spread of documents, not of their mean."
    )
    assert 0.8 * width < found < 1.25 * width, (
        f"Your interval is {found:.2f} wide, expected about {width:.2f}: draw as many documents as "
        "there are, weigh each by its tokens, and cut 2.5 % at both ends."
    )
    return f"({low:.2f} to {high:.2f}); from tokens it would seem {width / tokens:.0f} times surer."


@exercise("18.4", difficulty=1, minutes=6, teaches="What a survey has to keep in memory.")
def moment_bytes(answer: Callable[..., Any]) -> str:
    """8 d^2 (1 + S)."""
    given, right = float(answer(4096, 6)), 8 * 4096**2 * 7
    assert given != 8 * 4096**2 * 6, "The covariance of x itself is one more."
    assert given != right / 2, "Float64 takes eight bytes a number."
    assert given != right / 8, "That counts numbers; each takes eight bytes."
    assert given != 8 * (7 * 4096) ** 2, (
        "Errors of different SAEs are never multiplied with each other."
    )
    assert given == right, "One covariance of x, and one of x with each error: 8 d^2 (1 + S)."
    return f"{given / 1e9:.2f} GB for six SAEs of Llama 3.1 8B, whatever the number of tokens."


@exercise("18.5", difficulty=3, minutes=12, teaches="Which positions are left out is a result too.")
def flattering(answer: Callable[..., Any]) -> str:
    """A mask by position, of at least a third of the tokens, with the lowest ratio."""
    generator = np.random.default_rng(7)
    position = np.tile(np.arange(30), 100)
    kindness = generator.uniform(0.1, 0.5, 30)
    x_norm2 = generator.uniform(50, 150, 3000)
    error = x_norm2 * kindness[position] * generator.uniform(0.2, 1.8, 3000)
    frame = pd.DataFrame({"position": position, "x_norm2": x_norm2, "error_norm2": error})
    mask = np.asarray(answer(frame.copy()))
    if mask.shape != (3000,) or mask.dtype != bool:
        raise NotYet("Return a boolean mask with one entry a token.")
    share = mask.reshape(100, 30).mean(0)
    assert bool(((share == 0) | (share == 1)).all()), (
        "Some positions are kept for some tokens only: that is choosing by token. Decide by "
        "position."
    )
    assert mask.sum() >= 1000, f"Only {int(mask.sum())} of 3000 tokens are left; keep a third."
    whole, found = error.sum() / x_norm2.sum(), error[mask].sum() / x_norm2[mask].sum()
    assert found < whole, f"{found:.2f} is not below the honest {whole:.2f}: these are unkind ones."
    by_position = np.bincount(position, error) / np.bincount(position, x_norm2)
    best = np.isin(position, np.argsort(by_position)[:10])
    least = error[best].sum() / x_norm2[best].sum()
    assert found < least + 0.01, f"You got {found:.2f}; with the kindest third it is {least:.2f}."
    return f"FVU {whole:.2f} became {found:.2f}, and every number of the report is true."

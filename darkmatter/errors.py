"""The SAE error, split into what is linear in the activation and what is not.

    x  =  x_hat  +  linear error  +  nonlinear error

    error(x)      =  x - x_hat
    linear(x)     =  x W + b,  W, b = argmin sum |error(x) - x W - b|^2  over the fitting tokens
    nonlinear(x)  =  error(x) - linear(x)

Source: Engels, Smith and Tegmark, "Decomposing the Dark Matter of Sparse Autoencoders", TMLR 2025.
Linear predictability alone proves no structure: an SAE that is dead (x_hat = 0) or only shrinks
(x_hat = 0.9 x) has a wholly linear error.  `scalar_share` is the control for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import (
    LinearMap,
    LinearStatistics,
    column_mean,
    float64_blocks,
    is_constant,
    paired_rows,
    refuse_overflow,
)


@dataclass(frozen=True, eq=False)
class ErrorParts:
    """The two parts of the error on the scored tokens, in units of x, and the map of the first.

    float64 if x was, else float32.
    """

    linear: Float[Tensor, "n d"]
    nonlinear: Float[Tensor, "n d"]
    map: LinearMap

    @property
    def error(self) -> Float[Tensor, "n d"]:
        """x - x_hat, to the rounding of one addition."""
        return self.linear + self.nonlinear


def split_error(
    x_fit: Float[Tensor, "n_fit d"],
    xhat_fit: Float[Tensor, "n_fit d"],
    x: Float[Tensor, "n d"],
    xhat: Float[Tensor, "n d"],
    ridge: float = 0.0,
) -> ErrorParts:
    """Fit error ~ x W + b on (x_fit, xhat_fit), and split the error on (x, xhat) by it.

    Take x_fit and x from different documents: on the rows it was fitted on the linear part is too
    large, by about d / n_fit of the rest.  `ridge` as in `LinearStatistics.solve`.
    Raises Refusal for shapes that do not match, NaN or infinity, or n_fit < d + 1.
    """
    x_fit, xhat_fit = paired_rows("x_fit", x_fit, "xhat_fit", xhat_fit)
    x, xhat = paired_rows("x", x, "xhat", xhat)
    d = x.shape[1]
    if x_fit.shape[1] != d:
        raise Refusal(
            f"x_fit has {x_fit.shape[1]} columns and x has {d}, expected the same; "
            "pass activations of one hook point."
        )
    statistics = LinearStatistics(d, d)
    for block, block_hat in float64_blocks(x_fit, xhat_fit):
        statistics.partial_fit(block, block - block_hat)
    map = statistics.solve(ridge)

    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    linear, nonlinear = (torch.empty(x.shape, dtype=dtype, device=x.device) for _ in range(2))
    start = 0
    for block, block_hat in float64_blocks(x, xhat):
        rows = slice(start, start := start + len(block))
        predicted = map(block)
        linear[rows] = predicted.to(dtype)
        nonlinear[rows] = (block - block_hat - predicted).to(dtype)
    return ErrorParts(linear, nonlinear, map)


def scalar_share(x: Float[Tensor, "n d"], error: Float[Tensor, "n d"]) -> float:
    """Pooled R2 of predicting the error by one scalar times x, plus a constant vector.

        max over s, b of  R2( error, s x + b )  =  <x_c, e_c>^2 / ( |x_c|^2 |e_c|^2 )

    with x_c, e_c centred.  1 for an SAE that only shrinks.  The part of the linear error that needs
    no direction at all; compare it with the pooled R2 of the full map.  Source: a reviewer's
    objection to Engels et al. (10 % shrinkage); one scalar and d constants need no held-out rows.
    Raises Refusal for shapes that differ, NaN or infinity, or x or error without variance.
    """
    x, error = paired_rows("x", x, "error", error)
    mean_x, mean_error = column_mean(x), column_mean(error)
    xx, xe, ee = torch.zeros(3, x.shape[1], dtype=torch.float64, device=mean_x.device)
    for block, block_error in float64_blocks(x, error):
        block, block_error = block - mean_x, block_error - mean_error
        xx += block.square().sum(0)
        xe += (block * block_error).sum(0)
        ee += block_error.square().sum(0)
    for name, tss, mean in (("x", xx, mean_x), ("error", ee, mean_error)):
        refuse_overflow(name, tss.sum())
        if is_constant(tss, mean, len(x)).all():
            raise Refusal(
                f"{name} is the same in all {len(x)} rows, expected rows that vary, as R2 is a "
                "share of the variance; pass more than one distinct row."
            )
    # Two ratios, as the product of two sums of squares may leave the range of float64.
    return float((xe.sum() / xx.sum()) * (xe.sum() / ee.sum()))

"""Autoencoders that choose latents by rank, threshold or pursuit: gradients from active latents.

With pre = z W_enc + b_enc, d(f) = f W_dec + b_dec and unit rows of W_dec, the loss is the mean over
tokens of

    batchtopk         |z - d(f)|^2,  f = pre where among the k n largest positive ones of a batch
    matryoshka        sum over widths w of |z - d(f_1 ... f_w)|^2,  the same f
    jumprelu          |z - d(f)|^2 + sparsity * |f|_0,  f = pre where pre > threshold
    matching_pursuit  |r_k|^2,  r_0 = z - b_dec,  r <- r - relu(r . W_i) W_i,  i = argmax r . W_i

batchtopk: Bussmann et al. 2024 (2412.06410); matryoshka: Bussmann et al. 2025 (2503.17547);
jumprelu: Rajamanoharan et al. 2024 (2407.14435), whose threshold learns by a straight-through
estimator, a window of width `bandwidth` in the place of the derivative of the step; matching
pursuit: Costa et al. 2025 (2506.03093). The losses are those of sae-lens' training classes, and
tests compare gradients with theirs; only the product z W_enc (and for the pursuit W_dec W_dec') is
dense here, which at an L0 of 8 of 512 costs a fraction of what autograd does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from darkmatter.sparse import flat_nonzero
from darkmatter.training import bags, row_dots


@dataclass
class Parameters:
    """W_enc [d, m], b_enc [m], W_dec [m, d], b_dec [d]; what else an objective learns [m].

    `gain` is p of expanded, r of gated; `threshold` is there for jumprelu alone.
    """

    W_enc: Float[Tensor, "d m"]
    b_enc: Float[Tensor, " m"]
    W_dec: Float[Tensor, "m d"]
    b_dec: Float[Tensor, " d"]
    gain: Float[Tensor, " m"]
    b_mag: Float[Tensor, " m"]
    threshold: Float[Tensor, " m"] | None = None

    def all(self) -> list[Tensor]:
        learned = [self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.gain, self.b_mag]
        return learned if self.threshold is None else [*learned, self.threshold]


class Entries:
    """Places of active entries of codes [n, m], given as sorted flat indices, and sums over them.

    `values` below are numbers, one for each entry.
    """

    def __init__(self, at: Int64[Tensor, " a"], n: int, m: int) -> None:
        self.n, self.m = n, m
        self.row = at.div(m, rounding_mode="floor")
        self.column = at - self.row * m
        self.by_column = self.column.argsort(stable=True)

    def decode(self, values: Tensor, W_dec: Float[Tensor, "m d"]) -> Float[Tensor, "n d"]:
        """Code times decoder."""
        return bags(self.row, self.column, values, W_dec, self.n)

    def by_latent(self, values: Tensor) -> Float[Tensor, " m"]:
        """Sums of values, latent by latent."""
        return values.new_zeros(self.m).index_add_(0, self.column, values)

    def outer(
        self, values: Tensor, of: Float[Tensor, "n d"], row: Int64[Tensor, " a"] | None = None
    ) -> Float[Tensor, "m d"]:
        """Sums of value * of[row], latent by latent; `row` in the place of the entries' own."""
        rows = self.row if row is None else row
        order = self.by_column
        return bags(self.column[order], rows[order], values[order], of, self.m)


def batch_largest(pre: Float[Tensor, "n m"], count: int) -> Int64[Tensor, " a"]:
    """Sorted flat indices of the `count` largest positive entries, or of all positive ones.

    A guess from one row in eight sets most entries aside, so that few are sorted.
    """
    some = pre[::8].flatten()
    share = max(1, min(len(some), round(count * len(some) / pre.numel())))
    guess = 0.8 * max(0.0, float(some.topk(share, sorted=False).values.min()))
    at = flat_nonzero(pre > guess)
    if len(at) < count and guess > 0:
        at = flat_nonzero(pre > 0)
    if len(at) > count:
        at = at[pre.view(-1)[at].topk(count, sorted=False).indices].sort().values
    return at


def batch_topk_gradients(
    parameters: Parameters,
    z: Float[Tensor, "n d"],
    k: float | int,
    widths: Sequence[int] | None = None,
) -> tuple[float, list[Tensor]]:
    """(L0, gradients in the order of `Parameters.all`) of batchtopk, or with `widths` matryoshka.

    `widths` ascend to m; a latent learns from the losses of all widths above its place.
    """
    n, (m, d) = len(z), parameters.W_dec.shape
    W_dec, b_dec = parameters.W_dec, parameters.b_dec
    widths = (m,) if widths is None else tuple(widths)
    pre = torch.addmm(parameters.b_enc, z, parameters.W_enc)
    at = batch_largest(pre, round(k * n))
    entries, f = Entries(at, n, m), pre.view(-1)[at]
    level = torch.bucketize(entries.column, torch.tensor(widths), right=True)
    x_hat, parts = b_dec.expand(n, d), list[Tensor]()
    for number in range(len(widths)):
        x_hat = x_hat + entries.decode(f * (level == number), W_dec)
        parts.append((x_hat - z) * (2 / n))
    # What a latent of a level learns from: the losses of its own and all larger widths.
    upstream = torch.stack(parts).flip(0).cumsum(0).flip(0).view(-1, d)
    row = level * n + entries.row
    f_gradient = row_dots(upstream, row, W_dec, entries.column)
    zeros = torch.zeros_like(parameters.b_enc)
    return len(at) / n, [
        entries.outer(f_gradient, z).T.contiguous(),
        entries.by_latent(f_gradient),
        entries.outer(f, upstream, row),
        upstream[:n].sum(0),
        zeros,
        zeros,
    ]


def jumprelu_gradients(
    parameters: Parameters,
    z: Float[Tensor, "n d"],
    sparsity: float | int,
    bandwidth: float | int,
) -> tuple[float, list[Tensor]]:
    """(L0, gradients in the order of `Parameters.all`) of jumprelu.

    The threshold t of a latent, where |pre - t| < bandwidth / 2, takes

        -( t dL/df + sparsity / n ) / bandwidth

    and pre takes dL/df where it is above t, as published: no sparsity reaches the encoder.
    """
    assert parameters.threshold is not None
    n, m = len(z), len(parameters.W_dec)
    W_dec, threshold = parameters.W_dec, parameters.threshold
    pre = torch.addmm(parameters.b_enc, z, parameters.W_enc)
    at = flat_nonzero(pre > threshold - bandwidth / 2)
    entries, value = Entries(at, n, m), pre.view(-1)[at]
    own = threshold[entries.column]
    on = value > own
    f = value * on
    upstream = (entries.decode(f, W_dec) + parameters.b_dec - z) * (2 / n)
    f_gradient = row_dots(upstream, entries.row, W_dec, entries.column)
    inside = (value < own + bandwidth / 2) / bandwidth
    pre_gradient = f_gradient * on
    zeros = torch.zeros_like(threshold)
    return int(on.sum()) / n, [
        entries.outer(pre_gradient, z).T.contiguous(),
        entries.by_latent(pre_gradient),
        entries.outer(f, upstream),
        upstream.sum(0),
        zeros,
        zeros,
        entries.by_latent(-inside * (own * f_gradient + sparsity / n)),
    ]


def matching_pursuit_gradients(
    parameters: Parameters, z: Float[Tensor, "n d"], k: int
) -> tuple[float, list[Tensor]]:
    """(L0, gradients in the order of `Parameters.all`) of matching_pursuit, back through k steps.

    r_{i+1} = r_i - v_i w_i with v_i = r_i . w_i gives, from g = dL/dr_{i+1}, the gradients
    -(v_i g + (g . w_i) r_i) of w_i and g - (g . w_i) w_i of r_i; a step with v_i <= 0 is left out.
    """
    n, W_dec = len(z), parameters.W_dec
    residual = z - parameters.b_dec
    products, gram = residual @ W_dec.T, W_dec @ W_dec.T
    steps = list[tuple[Tensor, Tensor, Tensor, Tensor]]()
    for _ in range(k):
        index = products.argmax(1)
        direction = W_dec[index]
        value = (residual * direction).sum(1, keepdim=True).relu()
        steps.append((index, direction, value, residual))
        residual = residual - value * direction
        products.addcmul_(gram[index], value, value=-1)
    chosen = torch.stack([index for index, _, _, _ in steps], 1).sort(1).values
    l0 = float(1 + (chosen.diff(dim=1) > 0).sum(1).float().mean())
    gradient = residual * (2 / n)
    decoder = torch.zeros_like(W_dec)
    for index, direction, value, before in reversed(steps):
        along = (gradient * direction).sum(1, keepdim=True) * (value > 0)
        decoder.index_add_(0, index, value * gradient + along * before, alpha=-1)
        gradient = gradient - along * direction
    zeros = torch.zeros_like(parameters.b_enc)
    unused = torch.zeros_like(parameters.W_enc)
    return l0, [unused, zeros, decoder, -gradient.sum(0), zeros, zeros]

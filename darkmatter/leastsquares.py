"""Least squares from moments: streaming, mergeable and exact, with its scores FVU and R2.

The problem: given rows (x_i, y_i), x_i in R^d_in, y_i in R^d_out, find

    W, b  =  argmin  sum_i | y_i - x_i W - b |^2  +  lambda |W|^2

Everything about this problem, its solution and the score of any other linear map on the same rows,
is held by n, the two means and the moments about them

    Sxx = sum (x_i - mean)(x_i - mean)^T      Sxy = sum (x_i - mean)(y_i - mean)^T      diag(Syy)

so one pass over activations serves every target, parts computed apart merge exactly, and a map is
scored on unseen rows without a second pass.  All moments are float64: float32 sums are wrong in the
third digit on residual streams, whose mean is large and whose variances span many decades.  Where
float64 products are slow, rows can be multiplied in float32 after these few large directions have
been taken apart.

Sources: Engels, Smith and Tegmark, "Decomposing the Dark Matter of Sparse Autoencoders", TMLR 2025
(the regressions, FVU and R2); Chan, Golub and LeVeque, The American Statistician 37 (1983) 242-247
(merging centred moments).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Float64
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from darkmatter._files import hash_tensors, replacing, understood
from darkmatter._refusal import Refusal

Average = Literal["dims", "pooled"]
Precision = Literal["float64", "float32"]

# A column whose standard deviation is below this share of its mean is a constant seen through
# float64 rounding: no float32 column that varies at all gets there within 10^11 rows.
_CONSTANT = 1e-13
# A pivot of the unit-diagonal Cholesky factor is the share of a column that earlier columns do not
# explain; below this the weights would be rounding noise.
_SMALLEST_PIVOT = 1e-10
# The last always succeeds for moments of rows: with ridge 1 a pivot is at least 1 / (d_in + 1).
_RIDGES = tuple(10.0**power for power in range(-12, 1))
# So many rows are added at a time: their float64 copies stay in a cache until they are multiplied;
# in float32 what is done once for them, on d_in x d_out numbers, is to be little beside products.
_ROWS = {"float64": 1024, "float32": 4096}
# So many directions are taken apart before products in float32, found in so many rows.
_LEADING, _SAMPLE = 16, 1024
# Where the largest number is beyond this, or below its inverse, squares leave the range of float32.
_LARGEST = 1e12
# One entry of metadata: the order of several in a safetensors file is left to chance.
_FORMAT = "darkmatter.LinearStatistics/1"


class RidgeUsedWarning(UserWarning):
    """x was (nearly) collinear, so a ridge was added; its size is in `LinearMap.ridge`."""


@dataclass(frozen=True, eq=False)
class LinearMap:
    """y = x W + b, fitted by `LinearStatistics.solve`.

    weight [d_in, d_out] and bias [d_out] are float64.  `ridge` is the lambda that was used, in
    units of the mean variance of the columns of x (0 for plain least squares); `n` the rows fitted
    on.
    """

    weight: Float64[Tensor, "d_in d_out"]
    bias: Float64[Tensor, "d_out"]
    ridge: float
    n: int

    def __call__(self, x: Float[Tensor, "*rows d_in"]) -> Float[Tensor, "*rows d_out"]:
        """x W + b in the dtype of x, computed in float64 for float64 x, else in float32.

        Raises Refusal if the last axis of x is not d_in.
        """
        d_in = self.weight.shape[0]
        if x.ndim == 0 or x.shape[-1] != d_in:
            raise Refusal(
                f"x has shape {tuple(x.shape)}, expected [..., {d_in}] for a map fitted on "
                f"d_in={d_in}; pass activations of the hook point the map was fitted on."
            )
        working = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight, bias = self.weight.to(x.device, working), self.bias.to(x.device, working)
        return (x.to(working) @ weight + bias).to(x.dtype)


class LinearStatistics:
    """n, means and centred moments of (x, y) rows: all that least squares of y on x needs.

    Public and readable at any time, all float64: `n`, `mean_x` [d_in], `mean_y` [d_out],
    `sxx` [d_in, d_in], `sxy` [d_in, d_out] and `syy` [d_out] (of each target with itself only), the
    last three summed over rows, about the means.  Memory 8 (d_in^2 + d_in d_out) bytes.

    Each batch is summed about its own mean and joined to the rest by

        S(A and B) = S(A) + S(B) + (n_A n_B / (n_A + n_B)) delta delta^T,   delta = mean_B - mean_A

    which has no cancellation, whatever the mean, the order or the cut into batches.  Moments
    live on the device of the first rows (in main memory for mps, which has no float64).
    """

    def __init__(self, d_in: int, d_out: int) -> None:
        if d_in < 1 or d_out < 1:
            raise Refusal(
                f"d_in={d_in} and d_out={d_out}, expected both to be at least 1; "
                "pass the widths of x and y."
            )
        self.d_in, self.d_out, self.n = d_in, d_out, 0
        self.mean_x: Float64[Tensor, "d_in"] = torch.zeros(d_in, dtype=torch.float64)
        self.mean_y: Float64[Tensor, "d_out"] = torch.zeros(d_out, dtype=torch.float64)
        self.sxx: Float64[Tensor, "d_in d_in"] = torch.zeros(d_in, d_in, dtype=torch.float64)
        self.sxy: Float64[Tensor, "d_in d_out"] = torch.zeros(d_in, d_out, dtype=torch.float64)
        self.syy: Float64[Tensor, "d_out"] = torch.zeros(d_out, dtype=torch.float64)

    def __repr__(self) -> str:
        return f"LinearStatistics(d_in={self.d_in}, d_out={self.d_out}, n={self.n})"

    # Inference mode, since in-place sums begun inside it could not go on outside.
    @torch.inference_mode()
    def partial_fit(
        self,
        x: Float[Tensor, "n d_in"],
        y: Float[Tensor, "n d_out"] | Float[Tensor, "n"],
        precision: Precision = "float64",
    ) -> LinearStatistics:
        """Add rows, of any float dtype; no rows is no change.  Returns self.

        Costs one product for Sxx and one for Sxy: 2 n d_in (d_in + d_out) FLOP of `precision`.
        "float32" is twice as fast on CPUs, and far faster on GPUs made for graphics.  With V the
        leading directions of these x,

            z = [x - x V V^T, x V]      y' = y - x V B,     B the coefficients of y on x V

        have large numbers in columns of their own, so that no small one is lost beside them; the
        moments of z and y' are sums of float32 products, and give those of x and y in float64.
        Scores are right to 1e-6 of their value (tests/test_numerics.py); a residual below 1e-7 of
        the variance of y' is not resolved.

        Raises Refusal for a wrong shape, a dtype that is not float, NaN or infinity, or another
        precision; nothing has been added then.
        """
        if precision not in _ROWS:
            raise Refusal(
                f'precision is {precision!r}, expected "float64" or "float32"; float64 is exact.'
            )
        x, y = finite_rows("x", x), finite_rows("y", y)
        if x.shape[1] != self.d_in or y.shape[1] != self.d_out or len(x) != len(y):
            raise Refusal(
                f"x is {list(x.shape)} and y is {list(y.shape)}, expected [n, {self.d_in}] and "
                f"[n, {self.d_out}] with the same n; pass matching rows or make the statistics for "
                "these widths."
            )
        if len(x) == 0:
            return self
        if self.n == 0 and x.device.type != "mps":
            self._move(x.device)
        size = _ROWS[precision]
        for block_x, block_y in zip(x.split(size), y.split(size), strict=True):
            moments = _float32_moments(block_x, block_y) if precision == "float32" else None
            if moments is None:
                self._add(block_x, block_y)
            else:
                mean_x, mean_y, *sums = (self._float64(one) for one in moments)
                for held, one in zip((self.sxx, self.sxy, self.syy), sums, strict=True):
                    held += one
                self._join(len(block_x), mean_x, mean_y)
        return self

    def _add(self, x: Tensor, y: Tensor) -> None:
        """Add rows with float64 products, about their own means."""
        x, y = self._float64(x, copy=True), self._float64(y, copy=True)
        mean_x, mean_y = x.mean(0), y.mean(0)
        x -= mean_x
        y -= mean_y
        self.sxx.addmm_(x.T, x)
        self.sxy.addmm_(x.T, y)
        self.syy += y.square().sum(0)
        self._join(len(x), mean_x, mean_y)

    @torch.inference_mode()
    def merge(self, other: LinearStatistics) -> LinearStatistics:
        """Add the rows that `other` has seen, exactly; `other` is unchanged.  Returns self.

        Raises Refusal if the widths differ.
        """
        if (self.d_in, self.d_out) != (other.d_in, other.d_out):
            raise Refusal(
                f"cannot merge {other!r} into {self!r}: expected the same d_in and d_out; merge "
                "statistics of the same hook point and targets."
            )
        if other.n == 0:
            return self
        if self.n == 0:
            self._move(other.sxx.device)
        self.sxx += self._float64(other.sxx)
        self.sxy += self._float64(other.sxy)
        self.syy += self._float64(other.syy)
        self._join(other.n, self._float64(other.mean_x), self._float64(other.mean_y))
        return self

    def _join(self, n: int, mean_x: Tensor, mean_y: Tensor) -> None:
        """Count n further rows: move the means, and add to the moments what the means differ by."""
        delta_x, delta_y = mean_x - self.mean_x, mean_y - self.mean_y
        total = self.n + n
        between = self.n * n / total
        self.sxx.addr_(delta_x, delta_x, alpha=between)
        self.sxy.addr_(delta_x, delta_y, alpha=between)
        self.syy += between * delta_y.square()
        self.mean_x = self.mean_x + delta_x * (n / total)
        self.mean_y = self.mean_y + delta_y * (n / total)
        self.n = total

    def _float64(self, x: Tensor, copy: bool = False) -> Tensor:
        return x.to(self.sxx.device).to(torch.float64, copy=copy)

    def _move(self, device: torch.device) -> None:
        self.mean_x, self.mean_y = self.mean_x.to(device), self.mean_y.to(device)
        self.sxx, self.sxy, self.syy = (
            moment.to(device) for moment in (self.sxx, self.sxy, self.syy)
        )

    def solve(self, ridge: float = 0.0) -> LinearMap:
        """The map that minimises  |y - x W - b|^2 / n + ridge v |W|^2,  v the mean variance of x.

        The intercept is not penalised.  Cholesky of Sxx scaled to unit diagonal.  A column of x
        that does not vary gets weight 0.  Where a pivot falls below 1e-10 of the largest (columns
        collinear to about 1e-5), the first of 1e-12, 1e-11, ..., 1 above `ridge` that cures it is
        used instead and `RidgeUsedWarning` given.

        Raises Refusal for fewer than d_in + 1 rows, or a ridge that is negative or not finite.
        """
        if not 0 <= ridge < float("inf"):
            raise Refusal(
                f"ridge={ridge}, expected a finite number of at least 0; "
                "0 is plain least squares, 1e-6 a mild ridge."
            )
        if self.n < self.d_in + 1:
            raise Refusal(
                f"{self!r} has too few rows to solve, expected at least d_in + 1 = "
                f"{self.d_in + 1}; add rows with partial_fit or merge."
            )
        refuse_overflow("x or y", self.sxx.diagonal(), self.syy)
        variable = ~is_constant(self.sxx.diagonal(), self.mean_x, self.n)
        for used in (ridge, *(larger for larger in _RIDGES if larger > ridge)):
            diagonal = self.sxx.diagonal() + used * self.sxx.diagonal().mean()
            scale = torch.where(variable, diagonal.rsqrt(), 0)
            scaled = scale[:, None] * self.sxx * scale
            scaled.diagonal().fill_(1)
            factor, failed = torch.linalg.cholesky_ex(scaled)
            pivots = factor.diagonal().square()
            if failed.item() == 0 and pivots.min() >= _SMALLEST_PIVOT * pivots.max():
                break
        else:
            raise Refusal(
                f"the moments of {self!r} are those of no rows, expected sums that were not "
                "altered; collect them again."
            )
        if used != ridge:
            warnings.warn(
                f"columns of x are collinear: ridge {used:g} (of the mean variance of x) was used "
                f"instead of {ridge:g}; the map still predicts, its single weights mean little",
                RidgeUsedWarning,
                stacklevel=2,
            )
        weight = scale[:, None] * torch.cholesky_solve(scale[:, None] * self.sxy, factor)
        return LinearMap(weight, self.mean_y - self.mean_x @ weight, used, self.n)

    def rss(self, map: LinearMap) -> Float64[Tensor, "d_out"]:
        """Residual sum of squares of each target, sum_i (y_i - map(x_i))^2, from the moments alone.

            RSS_j = Syy_j - 2 w_j.Sxy_j + w_j.Sxx w_j + n (mean of the residual)_j^2

        The last term is there because the map may come from other rows.  Rounding is about 1e-15 of
        Syy_j, so a residual smaller than 1e-7 of the target is not resolved (it is never negative).
        Raises Refusal if the map has other widths.
        """
        weight, bias = self._float64(map.weight), self._float64(map.bias)
        if tuple(weight.shape) != (self.d_in, self.d_out):
            raise Refusal(
                f"the map is {list(weight.shape)}, expected [{self.d_in}, {self.d_out}] to score "
                f"it on {self!r}; pass a map for these inputs and targets."
            )
        mean_residual = self.mean_y - self.mean_x @ weight - bias
        within = self.syy + (weight * (self.sxx @ weight - 2 * self.sxy)).sum(0)
        return within.clamp(min=0) + self.n * mean_residual.square()

    def fvu(self, map: LinearMap) -> float:
        """`fvu(y, map(x))` over the rows seen, from the moments.  Raises Refusal as `fvu` does."""
        rss = self.rss(map)
        self._refuse_empty()
        return _fvu(rss, self.syy, self.mean_y, self.n, "y")

    def r2(self, map: LinearMap, average: Average = "dims") -> float:
        """`r2(y, map(x), average)` over the rows seen, from the moments.  Raises as `r2` does."""
        rss = self.rss(map)
        self._refuse_empty()
        return _r2(rss, self.syy, self.mean_y, self.n, average)

    def _refuse_empty(self) -> None:
        if self.n == 0:
            raise Refusal(
                f"{self!r} has no rows to score a map on, expected some; call partial_fit first."
            )

    def to(self, device: torch.device | str) -> LinearStatistics:
        """Move the moments, to add rows that are there.  Returns self."""
        self._move(torch.device(device))
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Everything held, by name: the five moments and n."""
        found = {name: getattr(self, name).contiguous() for name in self._shapes()}
        return {**found, "n": torch.tensor(self.n)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> LinearStatistics:
        """What `tensors` gave.  Raises KeyError or ValueError for anything else."""
        d_in, d_out = (*tensors["sxy"].shape, 0, 0)[:2]
        shapes = {"mean_x": (d_in,), "mean_y": (d_out,), "sxx": (d_in, d_in)}
        shapes |= {"sxy": (d_in, d_out), "syy": (d_out,)}
        # Before anything of these widths is made: a small file can tell of large ones.
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tensor.shape != shape or tensor.dtype != torch.float64:
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}")
            if not tensor.isfinite().all():
                raise ValueError(f"{name} holds NaN or infinity")
        n = tensors["n"]
        if n.dtype != torch.int64 or n.ndim or n < 0:
            raise ValueError(f"n is {n.dtype} {list(n.shape)}, expected a count")
        statistics = cls(d_in, d_out)
        statistics.n = int(n)
        for name in shapes:
            setattr(statistics, name, tensors[name])
        return statistics

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a safetensors file, with a SHA-256; an old file is replaced at once or kept."""
        with replacing(path) as temporary:
            tensors = self.tensors()
            told = f"{_FORMAT} {hash_tensors(tensors)}"
            save_file(tensors, temporary, metadata={"format": told})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearStatistics:
        """Read what `save` wrote, into main memory.

        Raises Refusal for a file that is missing, cut short, or anything else than `save` wrote.
        """
        with understood(path, "a file written by LinearStatistics.save"):
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata() or {}
                # A clone, because what safetensors returns may be a view of the file on disk.
                tensors: dict[str, Tensor] = {
                    name: file.get_tensor(name).clone()
                    for name in file.keys()  # noqa: SIM118
                }
            form, _, content = metadata.get("format", "").partition(" ")
            if form != _FORMAT:
                raise ValueError(f"its format is {metadata.get('format')!r}, expected {_FORMAT!r}")
            if content and content != hash_tensors(tensors):
                raise ValueError("its numbers were altered after they were written")
            try:
                return cls.from_tensors(tensors)
            except (KeyError, ValueError) as error:
                raise ValueError(f"{error}; tensors found: {sorted(tensors)}") from error

    def _shapes(self) -> dict[str, torch.Size]:
        names = ("mean_x", "mean_y", "sxx", "sxy", "syy")
        return {name: getattr(self, name).shape for name in names}


def _float32_moments(x: Tensor, y: Tensor) -> tuple[Tensor, ...] | None:
    """mean x, mean y, Sxx, Sxy and Syy of some rows by products in float32; float64.

    None where squares leave the range of float32: such rows are for float64.
    """
    # Any shift near the mean serves; what is left of the mean is taken out of the sums.
    shift_x, shift_y = x.mean(0).float(), y.mean(0).float()
    x, y = (x - shift_x).float(), (y - shift_y).float()
    for largest in (torch.stack(part.aminmax()).abs().max() for part in (x, y)):
        if not (1 / _LARGEST < largest < _LARGEST or largest == 0):
            return None
    d, leading = x.shape[1], _leading(x)
    along = x @ leading
    slopes = (torch.linalg.pinv((along.T @ along).double(), hermitian=True).float() @ along.T) @ y
    z = torch.cat([x.addmm_(along, leading.T, alpha=-1), along], 1)
    y.addmm_(along, slopes, alpha=-1)
    sums = [z.T @ z, z.T @ y, y.square().sum(0)]
    mean_z, mean_y = z.mean(0).double(), y.mean(0).double()
    szz, szy, syy = (one.double() for one in sums)
    szz = (szz + szz.T) / 2
    szz.addr_(mean_z, mean_z, alpha=-len(z))
    szy.addr_(mean_z, mean_y, alpha=-len(z))
    syy -= len(z) * mean_y.square()
    leading, slopes = leading.double(), slopes.double()

    def of_x(rows: Tensor) -> Tensor:
        """Of moments with z = [x - x V V^T, x V] in their rows those with x."""
        return rows[:d] + leading @ rows[d:]

    sxx = of_x(of_x(szz).T)
    sxy = of_x(szy) + of_x(szz[:, d:]) @ slopes
    syy += (slopes * (2 * szy[d:] + szz[d:, d:] @ slopes)).sum(0)
    return shift_x + of_x(mean_z), shift_y + mean_y + mean_z[d:] @ slopes, sxx, sxy, syy


def _leading(x: Float[Tensor, "n d"]) -> Float[Tensor, "d r"]:
    """About the leading directions V of centred rows, by two steps of orthogonal iteration.

    From some of the rows: any V serves, a better one leaves less beside the rest.
    """
    some = x[:: max(1, len(x) // _SAMPLE)].double()
    directions = some[:_LEADING].T
    for _ in range(3):
        directions = some.T @ (some @ torch.linalg.qr(directions).Q)
    return torch.linalg.qr(directions).Q.float()


def fvu(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> float:
    """Fraction of variance unexplained, pooled over rows and dimensions, in float64.

        FVU = sum_i |x_i - x_hat_i|^2 / sum_i |x_i - mean(x)|^2

    0 for a perfect reconstruction, 1 for predicting the mean, above 1 for worse.  Source: Engels et
    al., TMLR 2025.  Raises Refusal for shapes that differ, NaN or infinity, no rows, constant x.
    """
    rss, tss, mean, n = _sums("x", x, "x_hat", x_hat)
    return _fvu(rss, tss, mean, n, "x")


def r2(
    y: Float[Tensor, "n d"] | Float[Tensor, "n"],
    y_hat: Float[Tensor, "n d"] | Float[Tensor, "n"],
    average: Average = "dims",
) -> float:
    """Coefficient of determination of predictions y_hat of y, in float64.

        "dims":    mean over dimensions j of  1 - RSS_j / TSS_j       (the paper's)
        "pooled":  1 - sum_j RSS_j / sum_j TSS_j  =  1 - FVU

    TSS is about the mean of these y, not of the rows fitted on.  "dims" gives a dimension of tiny
    variance as much say as one of large variance; report both.  Source: Engels et al., TMLR 2025.
    Raises Refusal for shapes that differ, NaN or infinity, no rows, an unknown average, and, naming
    it, a dimension of y that does not vary ("pooled": only when none does).
    """
    rss, tss, mean, n = _sums("y", y, "y_hat", y_hat)
    return _r2(rss, tss, mean, n, average)


def finite_rows(name: str, x: Any) -> Float[Tensor, "n d"]:
    """x as finite [n, d] rows, a vector as one column; Refusal, naming it, for anything else."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        came = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise Refusal(f"{name} is {came}, expected a float tensor; convert it, e.g. with .float().")
    if x.ndim not in (1, 2):
        raise Refusal(
            f"{name} has shape {list(x.shape)}, expected [n, d]; "
            "put all tokens on the first axis, e.g. with .flatten(0, -2)."
        )
    rows = x.detach()[:, None] if x.ndim == 1 else x.detach()
    # NaN and infinity never leave a sum, and one sum is far cheaper than a look at each number.
    if not rows.sum().isfinite() and not (finite := rows.isfinite().all(1)).all():
        first = int(finite.logical_not().nonzero()[0])
        raise Refusal(
            f"{name} holds NaN or infinity, first in row {first}, expected finite numbers; "
            "drop such rows, or find out where they come from."
        )
    return rows


def paired_rows(
    name: str, x: Any, other_name: str, other: Any
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Both as finite rows of one shape, at least one row; Refusal for anything else."""
    x, other = finite_rows(name, x), finite_rows(other_name, other)
    if x.shape != other.shape or len(x) == 0:
        raise Refusal(
            f"{name} is {list(x.shape)} and {other_name} is {list(other.shape)}, expected the same "
            "[n, d] with n of at least 1; pass matching rows of the same activations."
        )
    return x, other


def float64_blocks(*tensors: Tensor, rows: int = 8192) -> Iterator[tuple[Tensor, ...]]:
    """The tensors in float64, some rows at a time, as float64 copies of activations are large."""
    for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True):
        yield tuple(
            (part.cpu() if part.device.type == "mps" else part).to(torch.float64) for part in parts
        )


def _sums(
    name: str, y: Tensor, other_name: str, y_hat: Tensor
) -> tuple[Float64[Tensor, "d"], Float64[Tensor, "d"], Float64[Tensor, "d"], int]:
    """Residual and total sum of squares of each dimension, its mean, and n; two passes over y."""
    y, y_hat = paired_rows(name, y, other_name, y_hat)
    mean = column_mean(y)
    rss, tss = torch.zeros_like(mean), torch.zeros_like(mean)
    for block, block_hat in float64_blocks(y, y_hat):
        rss += (block - block_hat).square().sum(0)
        tss += (block - mean).square().sum(0)
    return rss, tss, mean, len(y)


def column_mean(x: Float[Tensor, "n d"]) -> Float64[Tensor, "d"]:
    """Mean over rows, in float64."""
    total = sum((block.sum(0) for (block,) in float64_blocks(x)), torch.tensor(0.0))
    return total / len(x)


def is_constant(tss: Float64[Tensor, "d"], mean: Float64[Tensor, "d"], n: int) -> Bool[Tensor, "d"]:
    """Which columns have no variance beyond the rounding of their mean."""
    return tss <= n * (_CONSTANT * mean).square()


def refuse_overflow(name: str, *sums: Tensor) -> None:
    """Refusal, naming what was summed, unless its sums of squares are finite."""
    if not all(one.isfinite().all() for one in sums):
        raise Refusal(
            f"{name} is so large, or varies so little beside its error, that sums of squares or "
            "their ratios overflow float64, expected numbers between 1e-150 and 1e150; rescale."
        )


def _fvu(rss: Tensor, tss: Tensor, mean: Tensor, n: int, name: str) -> float:
    if is_constant(tss, mean, n).all():
        raise Refusal(
            f"{name} is the same in all {n} rows, expected rows that vary, as FVU is a share of "
            "the variance; pass more than one distinct row."
        )
    refuse_overflow(name, tss.sum(), rss.sum() / tss.sum())
    return float(rss.sum() / tss.sum())


def _r2(rss: Tensor, tss: Tensor, mean: Tensor, n: int, average: str) -> float:
    if average == "pooled":
        return 1 - _fvu(rss, tss, mean, n, "y")
    if average != "dims":
        raise Refusal(f'average is {average!r}, expected "dims" or "pooled"; choose one.')
    constant = is_constant(tss, mean, n)
    if constant.any():
        first = int(constant.nonzero()[0])
        raise Refusal(
            f"dimension {first} of y is the same in all {n} rows, expected every dimension to "
            'vary, as R2 of a constant is undefined; drop it, or use average="pooled".'
        )
    refuse_overflow("y", tss, rss / tss)
    return float((1 - rss / tss).mean())

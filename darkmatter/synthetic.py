"""Activations with exact known truth: sparse features, a dense part and a faulty planted SAE.

    x      =  sum_i w_i y_i  +  dense              w_i = a_i v_i,  a_i = 1 with probability p_i
    x_hat  =  sum_{i < learned} f_i y_i  +  bias
    f_i    =  a_i (1 - miss_i) ((1 - shrinkage) v_i + noise_i)  +  (1 - a_i) false_i v'_i

    x - x_hat  =  absent  +  dense  +  shrinkage  +  introduced

    absent      =  sum_{i >= learned} w_i y_i                       features not yet learned
    shrinkage   =  shrinkage  sum_{i < learned} w_i y_i             learned, but returned too short
    introduced  =  sum_{i < learned} ((1 - shrinkage) miss_i w_i - a_i (1 - miss_i) noise_i
                                      - (1 - a_i) false_i v'_i) y_i  what the encoder gets wrong

all less their expectation, which the planted SAE knows and holds in its bias.  Everything is drawn
independently, so every second moment is known in closed form, for any directions y_i:

    Cov(x)         =  sum_i Var(w_i) y_i y_i^T          +  Cov(dense)
    Cov(x, error)  =  sum_i Cov(w_i, error_i) y_i y_i^T  +  Cov(dense)

and with them what the best linear map of x predicts of the error, with infinitely many tokens:

    linear share  =  trace( Cov(error, x) Cov(x)^-1 Cov(x, error) ) / trace Cov(x) .

Sources: the two models of the error in Engels, Smith and Tegmark, "Decomposing the Dark Matter of
Sparse Autoencoders" (arXiv v1, section 3, and TMLR 2025, appendix B); the formulas are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, cast, get_args

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.errors import split_error
from darkmatter.leastsquares import finite_rows, fvu
from darkmatter.sparse import SparseCode

# What is larger, or one over it, leaves the range of float64 when it is multiplied.
_LARGEST = 1e150
Values = Literal["constant", "uniform", "half-normal", "exponential", "lognormal"]
Geometry = Literal["orthonormal", "random", "correlated"]
Rarity = Literal["value", "frequency"]
Noise = Literal["isotropic", "covariance", "multiplicative"]
Level = Literal["std", "variance"]


@dataclass(frozen=True)
class PlantedRecipe:
    """How planted activations and the planted SAE are made; `draw` makes them.

    features: `n_features` directions of unit length in R^`d_model`.  "orthonormal" needs n_features
      at most d_model; "random" are independent uniform directions; "correlated" share one common
      direction, so that any two have a cosine of about `overlap`.
    how often: feature i (from 0) is active with probability p_i proportional to (i + 1)^-`zipf`,
      `l0` features a token on average; or give `frequencies`, p_i of every feature, not rising.
    values: v of an active feature, `values` with its usual scale: 1, uniform on [0, 1], |N(0, 1)|,
      exponential of mean 1, exp(`sigma` N(0, 1)).
    dense part: Gaussian, isotropic in `dense_rank` dimensions, `dense_share` of the variance of x;
      `dense_apart` puts it in dimensions that no feature uses.
    SAE: knows the first `learned` features (None: all), returns them too short by `shrinkage`,
      misses an active one with probability `misses`, adds noise of standard deviation
      `weight_noise` times the root mean square value to those it finds, and turns features on that
      are not there, `false_positives` for each one that is, at a value of the same distribution.

    Raises Refusal, when made, for a recipe that cannot be.
    """

    n_features: int = 64
    d_model: int = 64
    l0: float | int = 4.0
    zipf: float | int = 0.0
    frequencies: tuple[float | int, ...] | None = None
    values: Values = "uniform"
    sigma: float | int = 1.0
    geometry: Geometry = "orthonormal"
    overlap: float | int = 0.2
    dense_rank: int = 0
    dense_share: float | int = 0.0
    dense_apart: bool = False
    learned: int | None = None
    shrinkage: float | int = 0.0
    weight_noise: float | int = 0.0
    misses: float | int = 0.0
    false_positives: float | int = 0.0

    def __post_init__(self) -> None:
        for name in ("n_features", "d_model"):
            if getattr(self, name) < 1:
                raise Refusal(f"{name}={getattr(self, name)}, expected at least 1; plant some.")
        _known("geometry", self.geometry, get_args(Geometry))
        value_moments(self.values, self.sigma)
        for name in ("overlap", "shrinkage", "misses"):
            _between_0_and_1(name, getattr(self, name))
        for name in ("weight_noise", "false_positives"):
            if not 0 <= getattr(self, name) < _LARGEST**0.5:
                raise Refusal(
                    f"{name}={getattr(self, name)}, expected a finite number of at least 0, and "
                    "of a finite square; 0 leaves it out."
                )
        if self.geometry == "orthonormal" and self.n_features > self.d_model:
            raise Refusal(
                f"{self.n_features} features in {self.d_model} dimensions, expected at most "
                f'{self.d_model} for orthonormal ones; take fewer or geometry="random".'
            )
        if self.geometry == "correlated" and self.d_model < 2:
            raise Refusal(
                "correlated features in 1 dimension are one, expected d_model of at least 2; raise "
                "it."
            )
        if self.learned is not None and not 0 <= self.learned <= self.n_features:
            raise Refusal(
                f"learned={self.learned}, expected 0 to n_features={self.n_features}; the SAE "
                "knows the first, most common ones."
            )
        self._check_frequencies()
        self._check_dense()

    def _check_frequencies(self) -> None:
        p = self.p
        if len(p) == 0:
            raise Refusal(f"frequencies is empty, expected {self.n_features}; give one a feature.")
        if len(p) != self.n_features or not bool(((p >= 0) & (p <= 1)).all()):
            raise Refusal(
                f"the {len(p)} frequencies run from {float(p.min()):.3g} to {float(p.max()):.3g}, "
                f"expected {self.n_features} probabilities between 0 and 1; lower l0 or zipf, or "
                "give other frequencies."
            )
        if bool((p.diff() > 0).any()):
            raise Refusal(
                "frequencies rise somewhere, expected the most common feature first, as the SAE "
                "learns the first ones; sort them."
            )
        if float(self.variances.sum()) == 0:
            raise Refusal(
                "no feature varies, expected some variance to explain; lower a frequency of 1 or "
                "take values that vary."
            )
        if bool((self.false_rate > 1).any()):
            raise Refusal(
                f"false_positives={self.false_positives} of a feature that is active with "
                f"probability {float(p.max()):.3g} is more than its inactive tokens, expected "
                "false_positives * p <= 1 - p; take fewer."
            )

    def _check_dense(self) -> None:
        if not 0 <= self.dense_share < 1:
            raise Refusal(
                f"dense_share={self.dense_share}, expected at least 0 and less than 1; it is a "
                "share of the variance of x, of which features need some."
            )
        room = self.d_model - self.n_features * self.dense_apart
        if not 0 <= self.dense_rank <= max(room, 0):
            where = "dimensions that no feature uses" if self.dense_apart else "d_model"
            raise Refusal(
                f"dense_rank={self.dense_rank}, expected 0 to {max(room, 0)}, the number of "
                f"{where}; lower it or raise d_model."
            )
        if (self.dense_rank == 0) != (self.dense_share == 0):
            raise Refusal(
                f"dense_rank={self.dense_rank} with dense_share={self.dense_share}, expected both "
                "zero or neither; give the dense part dimensions and variance."
            )

    @property
    def n_learned(self) -> int:
        """Number of features the SAE knows."""
        return self.n_features if self.learned is None else self.learned

    @property
    def p(self) -> Float64[Tensor, " m"]:
        """Probability that a feature is active."""
        if self.frequencies is not None:
            return torch.tensor(self.frequencies, dtype=torch.float64)
        rank = torch.arange(1, self.n_features + 1, dtype=torch.float64)
        return float(self.l0) * rank.pow(-float(self.zipf)) / rank.pow(-float(self.zipf)).sum()

    @property
    def moments(self) -> Float64[Tensor, "m 4"]:
        """E[w_i^k] = p_i E[v^k], k = 1 to 4, inactive tokens included."""
        return self.p[:, None] * value_moments(self.values, self.sigma)

    @property
    def variances(self) -> Float64[Tensor, " m"]:
        """Var(w_i), the share of feature i in the variance of x, as directions have length 1."""
        return self.moments[:, 1] - self.moments[:, 0].square()

    @property
    def false_rate(self) -> Float64[Tensor, " m"]:
        """Probability that an inactive feature is turned on."""
        expected = self.false_positives * self.p
        inactive = 1 - self.p
        return torch.where(expected > 0, expected / inactive, torch.zeros_like(expected))

    @property
    def dense_variance(self) -> float:
        """Total variance of the dense part, in squared units of the values."""
        share = float(self.dense_share)
        return share / (1 - share) * float(self.variances.sum())

    def draw(self, n: int, seed: int = 0) -> Planted:
        """n independent tokens.  The seed fixes directions and tokens; float64, and about 60 bytes
        for each feature of each token while drawing.

        Raises Refusal for n < 1.
        """
        if n < 1:
            raise Refusal(f"n={n}, expected at least 1 token; draw some thousands.")
        generator = torch.Generator().manual_seed(seed)
        directions, dense_basis = self._directions(generator)
        m, known = self.n_features, self.n_learned
        active = _uniform(generator, n, m) < self.p
        value = self._draw_values(generator, n, m)
        weights = torch.where(active, value, 0)

        spread = math.sqrt(self.dense_variance / max(self.dense_rank, 1))
        dense = spread * _normal(generator, n, self.dense_rank) @ dense_basis

        on, learned_weights = active[:, :known], weights[:, :known]
        missed = on & (_uniform(generator, n, known) < self.misses)
        found = on & ~missed
        rms = math.sqrt(float(value_moments(self.values, self.sigma)[1]))
        noise = self.weight_noise * rms * _normal(generator, n, known) * found
        false = ~on & (_uniform(generator, n, known) < self.false_rate[:known])
        wrong = self._draw_values(generator, n, known) * false

        kept = 1 - self.shrinkage
        code = kept * learned_weights * found + noise + wrong
        mean = self.moments[:, 0]
        mean_value = float(value_moments(self.values, self.sigma)[0])
        wrong_mean = (1 - self.p) * self.false_rate * mean_value
        introduced_mean = (kept * self.misses * mean - wrong_mean)[:known]
        introduced = kept * learned_weights * missed - noise - wrong - introduced_mean
        y = directions[:known]
        bias = (
            mean[known:] @ directions[known:]
            + (self.shrinkage * mean[:known] + introduced_mean) @ y
        )
        return Planted(
            recipe=self,
            directions=directions,
            dense_basis=dense_basis,
            weights=weights,
            code=code,
            bias=bias,
            learned=(learned_weights - mean[:known]) @ y,
            absent=(weights[:, known:] - mean[known:]) @ directions[known:],
            dense=dense,
            shrinkage=self.shrinkage * (learned_weights - mean[:known]) @ y,
            introduced=introduced @ y,
        )

    def _directions(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Unit rows [m, d], and orthonormal rows [rank, d] of the dense part."""
        m, d, rank = self.n_features, self.d_model, self.dense_rank
        drawn = _normal(generator, m, d)
        if self.geometry == "orthonormal":
            directions = _orthonormal(drawn)
        elif self.geometry == "random":
            directions = drawn / drawn.norm(dim=1, keepdim=True)
        else:
            common = _orthonormal(_normal(generator, 1, d))
            own = drawn - drawn @ common.T @ common
            own /= own.norm(dim=1, keepdim=True)
            directions = math.sqrt(self.overlap) * common + math.sqrt(1 - self.overlap) * own
        basis = _normal(generator, rank, d)
        if self.dense_apart:
            used = _orthonormal(directions)
            basis -= basis @ used.T @ used
        return directions, _orthonormal(basis)

    def _draw_values(self, generator: torch.Generator, *shape: int) -> Tensor:
        match self.values:
            case "constant":
                return torch.ones(*shape, dtype=torch.float64)
            case "uniform":
                return _uniform(generator, *shape)
            case "half-normal":
                return _normal(generator, *shape).abs()
            case "exponential":
                # 1 - u is never 0, of which the logarithm is infinite.
                return -(1 - _uniform(generator, *shape)).log()
            case "lognormal":
                return (self.sigma * _normal(generator, *shape)).exp()


@dataclass(frozen=True)
class Shares:
    """Parts of the planted error, in shares of the variance of x.

    The four sources are covariances with the whole error, so that they add up to the FVU even where
    two of them are correlated: misses are, with shrinkage.  `linear` and `nonlinear` are what the
    best linear map of x predicts of the error and what it leaves; they add up to the FVU as well.
    """

    absent: float
    dense: float
    shrinkage: float
    introduced: float
    linear: float
    nonlinear: float

    @property
    def fvu(self) -> float:
        """absent + dense + shrinkage + introduced."""
        return self.absent + self.dense + self.shrinkage + self.introduced


@dataclass(frozen=True, eq=False)
class Planted:
    """Tokens drawn from a `PlantedRecipe`, with all that is usually hidden.  float64.

    x = weights @ directions + dense = mean + learned + absent + dense; x_hat = code @ directions
    of the learned + bias.  Every part has expectation zero; absent, dense, shrinkage and introduced
    add up to the error.
    """

    recipe: PlantedRecipe
    directions: Float64[Tensor, "m d"]
    dense_basis: Float64[Tensor, "rank d"]
    weights: Float64[Tensor, "n m"]
    code: Float64[Tensor, "n learned"]
    bias: Float64[Tensor, " d"]
    learned: Float64[Tensor, "n d"]
    absent: Float64[Tensor, "n d"]
    dense: Float64[Tensor, "n d"]
    shrinkage: Float64[Tensor, "n d"]
    introduced: Float64[Tensor, "n d"]

    @cached_property
    def x(self) -> Float64[Tensor, "n d"]:
        """The activation, sum_i w_i y_i + dense."""
        return self.weights @ self.directions + self.dense

    @property
    def mean(self) -> Float64[Tensor, " d"]:
        """Expectation of the activation."""
        return self.recipe.moments[:, 0] @ self.directions

    @cached_property
    def x_hat(self) -> Float64[Tensor, "n d"]:
        """The reconstruction of the planted SAE."""
        return self.code @ self.directions[: self.recipe.n_learned] + self.bias

    @property
    def error(self) -> Float64[Tensor, "n d"]:
        """absent + dense + shrinkage + introduced, which is x - x_hat up to rounding."""
        return self.absent + self.dense + self.shrinkage + self.introduced

    @cached_property
    def shares(self) -> Shares:
        """The exact shares, by formula: those of infinitely many tokens along these directions."""
        recipe, known = self.recipe, self.recipe.n_learned
        variance, p = recipe.variances, recipe.p
        m1, m2, *_ = value_moments(recipe.values, recipe.sigma).tolist()
        s, q, false = float(recipe.shrinkage), float(recipe.misses), recipe.false_rate

        # Of features and false positives only one can be on: p (1 - p) false m1^2 is minus their
        # covariance.
        exclude = p * (1 - p) * false * m1**2
        with_shrinkage = s * (1 - s) * q * variance + s * exclude
        introduced = (
            (1 - s) ** 2 * (q * p * m2 - (q * p * m1) ** 2)
            + p * (1 - q) * float(recipe.weight_noise) ** 2 * m2
            + (1 - p) * false * m2
            - ((1 - p) * false * m1) ** 2
            + 2 * (1 - s) * q * exclude
        )
        # Covariance of each weight with the error of its feature: all of it where absent.
        with_error = torch.where(
            torch.arange(len(p)) < known, (s + (1 - s) * q) * variance + exclude, variance
        )
        y, total = self.directions, float(variance.sum()) + recipe.dense_variance
        dense = recipe.dense_variance / max(recipe.dense_rank, 1) * self.dense_basis
        dense_covariance = dense.T @ self.dense_basis
        covariance = (y.T * variance) @ y + dense_covariance
        cross = (y.T * with_error) @ y + dense_covariance
        # x may leave dimensions empty, so the inverse is that on its span.
        linear = float((cross * (torch.linalg.pinv(covariance, hermitian=True) @ cross)).sum())

        parts = {
            "absent": float(variance[known:].sum()),
            "dense": recipe.dense_variance,
            "shrinkage": float((s**2 * variance + with_shrinkage)[:known].sum()),
            "introduced": float((introduced + with_shrinkage)[:known].sum()),
        }
        nonlinear = max(sum(parts.values()) - linear, 0.0)
        parts |= {"linear": linear, "nonlinear": nonlinear}
        return Shares(**{name: part / total for name, part in parts.items()})

    def measured(self, fit_share: float = 0.5) -> Shares:
        """The same shares from the tokens: a linear probe fitted on the first ones, `fit_share` of
        all, and everything scored on the rest, by FVU and products with the error.

        The probe loses about d / n_fit of the nonlinear share.  Raises Refusal for a share outside
        (0, 1) or too few tokens to fit on.
        """
        n = len(self.weights)
        fitted = round(fit_share * n)
        if not 0 < fit_share < 1 or not self.recipe.d_model < fitted < n:
            raise Refusal(
                f"fit_share={fit_share} of {n} tokens, expected more than d_model="
                f"{self.recipe.d_model} to fit on and some to score; draw more tokens."
            )
        x, x_hat = self.x[fitted:], self.x_hat[fitted:]
        split = split_error(self.x[:fitted], self.x_hat[:fitted], x, x_hat)
        nonlinear = fvu(x, x_hat + split.linear)
        error, total = self.error[fitted:], float((x - x.mean(0)).square().sum())
        parts = {
            name: float((cast("Tensor", getattr(self, name))[fitted:] * error).sum()) / total
            for name in ("absent", "dense", "shrinkage", "introduced")
        }
        return Shares(**parts, linear=fvu(x, x_hat) - nonlinear, nonlinear=nonlinear)


def value_moments(values: Values, sigma: float | int = 1.0) -> Float64[Tensor, " 4"]:
    """E[v^k], k = 1 to 4, of the values of an active feature.

        constant      1
        uniform       1 / (k + 1)
        half-normal   2^(k/2) Gamma((k + 1) / 2) / sqrt(pi)
        exponential   k!
        lognormal     exp(k^2 sigma^2 / 2)

    `sigma` is that of the lognormal's logarithm.  Raises Refusal for an unknown name or a sigma
    that is not positive.
    """
    _known("values", values, get_args(Values))
    # exp(10 sigma^2), the product of its second and fourth moment, is a float up to 8.4.
    if values == "lognormal" and not 0 < sigma <= 8:
        raise Refusal(f"sigma={sigma}, expected a positive number up to 8; 0.5 is mild, 1 is wide.")
    orders = range(1, 5)
    match values:
        case "constant":
            moments = [1.0 for _ in orders]
        case "uniform":
            moments = [1 / (k + 1) for k in orders]
        case "half-normal":
            moments = [2 ** (k / 2) * math.gamma((k + 1) / 2) / math.sqrt(math.pi) for k in orders]
        case "exponential":
            moments = [float(math.factorial(k)) for k in orders]
        case "lognormal":
            moments = [math.exp(k**2 * sigma**2 / 2) for k in orders]
    return torch.tensor(moments, dtype=torch.float64)


def norm_predictability(values: Values, p: float | int = 0.0, sigma: float | int = 1.0) -> float:
    """Best R2 of |x|^2 from x, for orthonormal, independent, identically distributed features.

        R2  =  corr(w, w^2)^2,     w = v with probability p, else 0

    and for p = 0 its limit, E[v^3]^2 / (E[v^2] E[v^4]).  1 for a constant value at any p below 1.
    Source: facts of the norm-prediction test of Engels et al., arXiv v1, appendix A; derived here.
    Raises Refusal for p outside 0 to 1, or a constant value at p = 1, which does not vary.
    """
    _between_0_and_1("p", p)
    m1, m2, m3, m4 = value_moments(values, sigma).tolist()
    # Divided by p throughout, which is what makes p = 0 no special case.
    spread, spread_of_square = m2 - p * m1**2, m4 - p * m2**2
    if spread <= 0 or spread_of_square <= 0:
        raise Refusal(
            f"values={values!r} at p={p} do not vary, expected a norm that differs between tokens; "
            "take p below 1."
        )
    return (m3 - p * m1 * m2) ** 2 / (spread * spread_of_square)


def norm_predictability_of(moments: Float[Tensor, "m 4"]) -> float:
    """Best R2 of |x|^2 from x, for orthonormal, independent features, each with moments of its own.

        R2  =  sum_i cov(w_i, w_i^2)^2 / var(w_i)   /   sum_i var(w_i^2)

    moments [m, 4] holds E[w_i^k], k = 1 to 4, inactive tokens included.  As w_i are independent,
    the best line in x is the sum of the best lines in each w_i.  A Gaussian dimension of variance s
    is the row (0, s, 0, 3 s^2): it adds to what there is and nothing to what is predicted.
    Raises Refusal for moments that no variable has, or none that varies.
    """
    if moments.ndim != 2 or moments.shape[1] != 4 or not bool(moments.isfinite().all()):
        raise Refusal(
            f"moments is {list(moments.shape)}, expected finite [m, 4]; give E[w], E[w^2], E[w^3] "
            "and E[w^4] of every feature."
        )
    m1, m2, m3, m4 = moments.double().T
    variance, of_square, covariance = m2 - m1**2, m4 - m2**2, m3 - m1 * m2
    # Cauchy and Schwarz, with room for the rounding of moments that were measured.
    room = 1e-9 * (m2 * m4)
    if bool((covariance**2 > variance * of_square + room).any()) or bool((m2 < 0).any()):
        raise Refusal(
            "some moments belong to no variable (cov(w, w^2)^2 exceeds var(w) var(w^2)), expected "
            "raw moments E[w^k] of one; check that none is central or divided by p."
        )
    varies = (variance > 1e-12 * m2) & (of_square > 0)
    if not bool(varies.any()):
        raise Refusal(
            "no feature varies, expected a norm that differs between tokens; add one that does."
        )
    predicted = torch.where(varies, covariance**2 / variance, torch.zeros_like(variance))
    return float(predicted.sum() / of_square.clamp(min=0).sum())


def _known(name: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise Refusal(f"{name}={given!r}, expected one of {', '.join(known)}; choose one.")


def _between_0_and_1(name: str, given: float | int) -> None:
    if not 0 <= given <= 1:
        raise Refusal(f"{name}={given}, expected a number between 0 and 1; it is a share.")


def _uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _orthonormal(rows: Float64[Tensor, "k d"]) -> Float64[Tensor, "k d"]:
    """Orthonormal rows that span the given ones, k at most d."""
    return torch.linalg.qr(rows.T).Q.T


# Planted noise on a fixed point of an SAE, whose true parts are known as well.


class NoiseShares(NamedTuple):
    """The two parts of an error, in shares of the variance of the (noised) activation.

    linear     =  FVU(x_hat)  -  FVU(x_hat + map(x))
    nonlinear  =  FVU(x_hat + map(x))
    """

    linear: float
    nonlinear: float


def rare_latents(
    code: SparseCode, d_sae: int, share: float | int, by: Rarity = "value"
) -> Bool[Tensor, " {d_sae}"]:
    """Which round(share * d_sae) latents are the rarest, dead ones first, ties by index.

    "value": of lowest mean value over all tokens, zeros included, as published; a latent that is
    rare but strong may stay. "frequency": active on the fewest tokens. Take `code` from the tokens
    that are fitted on. Source: Engels et al., arXiv v1, released synthetic_simulation.py.
    Raises Refusal for a share outside 0 to 1, another `by`, or an index of d_sae or more.
    """
    _between_0_and_1("share", share)
    _known("by", by, get_args(Rarity))
    inside = code.indices.numel() == 0 or 0 <= code.indices.min() <= code.indices.max() < d_sae
    if d_sae < 1 or not inside:
        raise Refusal(
            f"d_sae={d_sae} does not hold the indices of the code, expected the number of latents "
            "of the SAE that made it; pass that."
        )
    weight = code.values.double() if by == "value" else (code.values != 0).double()
    total = torch.zeros(d_sae, dtype=torch.float64, device=weight.device)
    total.index_add_(0, code.indices.flatten(), weight.flatten())
    rare = torch.zeros(d_sae, dtype=torch.bool, device=weight.device)
    rare[total.argsort(stable=True)[: round(share * d_sae)]] = True
    return rare


def ablate(code: SparseCode, latents: Bool[Tensor, " d_sae"]) -> SparseCode:
    """The code with these latents at 0 wherever they are active; others keep their value.

    Raises Refusal when `latents` is not one truth value for every latent.
    """
    if latents.ndim != 1 or latents.dtype != torch.bool:
        raise Refusal(
            f"latents is {latents.dtype} {list(latents.shape)}, expected bool [d_sae]; pass a mask "
            "such as rare_latents gives."
        )
    if code.indices.numel() and int(code.indices.max()) >= len(latents):
        raise Refusal(
            f"latents has {len(latents)} entries and the code an index "
            f"{int(code.indices.max())}, expected one entry a latent; use the SAE's d_sae."
        )
    return SparseCode(code.values.masked_fill(latents[code.indices], 0), code.indices)


def noise_covariance(
    signal: Float[Tensor, "d d"],
    level: float | int,
    kind: Noise = "isotropic",
    unit: float | int = 1.0,
    level_is: Level = "std",
) -> Float64[Tensor, "d d"]:
    """Covariance of `planted_noise` on activations whose covariance is `signal`, exactly.

        isotropic                     v I
        covariance, multiplicative    v (d / trace(signal)) signal

    v = (level * unit)^2 if the level is a standard deviation ("std"), level * unit^2 if it is a
    variance: the total variance d v is the same for every kind, and 1 is the same level under both
    readings. Raises Refusal as `planted_noise`.
    """
    variance = _noise_variance(level, kind, unit, level_is)
    if signal.ndim != 2 or signal.shape[0] != signal.shape[1] or not float(signal.trace()) > 0:
        raise Refusal(
            f"signal is {list(signal.shape)}, expected a covariance [d, d] with some variance; "
            "pass torch.cov(x.T)."
        )
    signal = signal.double()
    if kind == "isotropic":
        return variance * torch.eye(len(signal), dtype=torch.float64, device=signal.device)
    return variance * len(signal) / signal.trace() * signal


def covariance_root(covariance: Float[Tensor, "d d"]) -> Float[Tensor, "d d"]:
    """R with R' R = covariance, so that normal rows times R have it.

    Directions without variance are kept so. Raises Refusal for a matrix that is not square and
    symmetric.
    """
    symmetric = covariance.ndim == 2 and covariance.shape[0] == covariance.shape[1]
    if not symmetric or not torch.allclose(covariance, covariance.T, rtol=1e-4):
        raise Refusal(
            f"covariance is {list(covariance.shape)} and must be a symmetric matrix [d, d]; pass "
            "torch.cov(x.T)."
        )
    values, vectors = torch.linalg.eigh(covariance.double())
    return values.clamp_min(0).sqrt()[:, None] * vectors.T


def planted_noise(
    x: Float[Tensor, "n d"],
    level: float | int,
    kind: Noise = "isotropic",
    unit: float | int = 1.0,
    level_is: Level = "std",
    seed: int = 0,
) -> Float[Tensor, "n d"]:
    """Noise for activations x, of mean 0 and covariance `noise_covariance`, uncorrelated with x.

    isotropic       Gaussian, the same in all directions, independent of x (published)
    covariance      Gaussian with the covariance of x up to a factor, independent of x
    multiplicative  g (x - mean), one Gaussian number g a token: not independent of x, and neither
                    Gaussian nor of one size, but with the covariance of the kind above

    The released code multiplies standard normal draws by the level ("std"), which its figures call
    a variance ("variance"). `unit` is the standard deviation of level 1, in units of x.
    Source: Engels et al., arXiv v1, released synthetic_simulation.py; the last two kinds are ours,
    for Gurnee's objection that real errors are not isotropic.
    Raises Refusal for a negative or infinite level or unit, another kind or reading, fewer than two
    rows, or x that does not vary.
    """
    variance = _noise_variance(level, kind, unit, level_is)
    x = finite_rows("x", x)
    centred = x.double() - x.double().mean(0)
    if len(x) < 2 or not 1 / _LARGEST < float(centred.square().sum()) < _LARGEST:
        raise Refusal(
            f"x is {list(x.shape)} and does not vary, or out of the range of squares in float64, "
            "expected at least two different rows; pass activations of several tokens."
        )
    generator = torch.Generator().manual_seed(seed)
    match kind:
        case "isotropic":
            noise = math.sqrt(variance) * _normal(generator, *x.shape).to(x.device)
        case "covariance":
            covariance = noise_covariance(centred.T @ centred / len(x), level, kind, unit, level_is)
            noise = _normal(generator, *x.shape).to(x.device) @ covariance_root(covariance)
        case "multiplicative":
            factor = math.sqrt(variance * x.numel() / float(centred.square().sum()))
            noise = factor * _normal(generator, len(x), 1).to(x.device) * centred
    return noise.to(x.dtype)


def estimated_shares(
    x_fit: Float[Tensor, "n_fit d"],
    xhat_fit: Float[Tensor, "n_fit d"],
    x: Float[Tensor, "n d"],
    xhat: Float[Tensor, "n d"],
) -> NoiseShares:
    """What the split says of the error x - xhat: fitted on the first pair, scored on the second.

    They add up to the FVU of xhat. Raises Refusal as `split_error` and `fvu`.
    """
    nonlinear = fvu(x, xhat + split_error(x_fit, xhat_fit, x, xhat).linear)
    return NoiseShares(fvu(x, xhat) - nonlinear, nonlinear)


def expected_shares(
    signal: Float[Tensor, "d d"],
    activation_noise: Float[Tensor, "d d"],
    reconstruction_noise: Float[Tensor, "d d"],
    absent: Float[Tensor, "d d"] | None = None,
    cross: Float[Tensor, "d d"] | None = None,
    offset: Float[Tensor, " d"] | None = None,
) -> NoiseShares:
    """What `estimated_shares` gives of infinitely many tokens, from covariances alone.

    A clean activation s is reconstructed as s - u, then noise is added to both:

        x = s + a,   x_hat = s - u + r,   error = u + a - r

    with a and r uncorrelated with s, u and each other. With G = Cov(s, u) + Cov(a) and
    V = Cov(s) + Cov(a), the covariances of x with the error and with itself,

        linear     =  ( trace(G^T V^-1 G) + |mean u|^2 ) / trace V
        nonlinear  =  ( trace Cov(u) + trace Cov(a) + trace Cov(r) - trace(G^T V^-1 G) ) / trace V

    For u = 0 this is errors in variables: of the noise a only Cov(a) V^-1 a can be told from s.
    Only second moments enter, so noise need be neither Gaussian nor independent of s.
    `absent` is Cov(u), `cross` Cov(s, u) (rows s), `offset` the mean of u; zero if left out.
    Source: ours; least squares with errors in variables is Fuller, Measurement Error Models (1987).
    Raises Refusal for a covariance of another shape, not symmetric or with negative diagonal, or no
    variance at all.
    """
    d = len(signal)
    zero = torch.zeros(d, d, dtype=torch.float64, device=signal.device)
    covariances = {
        "signal": signal,
        "activation_noise": activation_noise,
        "reconstruction_noise": reconstruction_noise,
        "absent": zero if absent is None else absent,
    }
    for name, covariance in covariances.items():
        square = tuple(covariance.shape) == (d, d)
        if not square or not torch.allclose(covariance, covariance.T, rtol=1e-4, atol=1e-6):
            raise Refusal(
                f"{name} is {list(covariance.shape)} or not symmetric, expected a covariance "
                f"[{d}, {d}]; pass torch.cov(rows.T)."
            )
        if bool((covariance.diagonal() < 0).any()):
            raise Refusal(f"{name} has a negative variance, expected a covariance; pass one.")
    cross = zero if cross is None else cross.double()
    offset = zero[0] if offset is None else offset.double()
    if tuple(cross.shape) != (d, d) or tuple(offset.shape) != (d,):
        raise Refusal(
            f"cross is {list(cross.shape)} and offset {list(offset.shape)}, expected [{d}, {d}] "
            f"and [{d}]; pass those of the same activations."
        )
    noise, total = activation_noise.double(), signal.double() + activation_noise.double()
    variance = float(total.trace())
    if not 1 / _LARGEST < variance < _LARGEST:
        raise Refusal(
            f"signal and noise do not vary, or out of the range of float64 (their variance is "
            f"{variance:g}), expected some variance; pass activations."
        )
    explaining = cross + noise
    # The activation may leave directions empty, so the inverse is that on its span.
    inverse = torch.linalg.pinv(total, hermitian=True)
    explained = float((explaining * (inverse @ explaining)).sum())
    error = sum(float(covariances[name].double().trace()) for name in list(covariances)[1:])
    shift = float(offset.square().sum())
    return NoiseShares((explained + shift) / variance, max(error - explained, 0.0) / variance)


def _noise_variance(level: float | int, kind: str, unit: float | int, level_is: str) -> float:
    """Variance of a coordinate, averaged over coordinates."""
    _known("kind", kind, get_args(Noise))
    _known("level_is", level_is, get_args(Level))
    for name, given in (("level", level), ("unit", unit)):
        if not 0 <= given < math.inf:
            raise Refusal(f"{name}={given}, expected a finite number of at least 0; 0 is no noise.")
    level, unit = float(level), float(unit)
    variance = level * (level if level_is == "std" else 1) * unit * unit
    if not variance <= _LARGEST:
        raise Refusal(f"level={level} and unit={unit} make too large a noise; lower one of them.")
    return variance

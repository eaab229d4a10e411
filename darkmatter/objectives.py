"""Shrinkage: the L1 objective, three that repair what it does, and TopK, which needs no repair.

With pre = z W_enc + b_enc, f = relu(pre), d(f) = f W_dec + b_dec and unit rows of W_dec, the loss
is the mean over tokens of

    l1        |z - d(f)|^2                          + sparsity * |f|_1
    expanded  |z - d*(f)|^2 + |z - d(p o f)|^2      + sparsity * |f|_1        x_hat = d(p o f)
    gated     |z - d*(f)|^2 + |z - d(g)|^2          + sparsity * |f|_1        x_hat = d(g)
              g = 1[pre > 0] o relu(exp(r) o (z W_enc) + b_mag)
    topk      |z - d(g)|^2,   g = the k largest of f                          x_hat = d(g)

where d* is d as a constant: this term gives no gradient to the decoder. `gated` is Rajamanoharan et
al. 2024 (2404.16014); `expanded`, its loss without the step function, is jacobcd52's proposal in a
comment on that paper, whose formulas are lost and were put together from its words. Four more, of
`darkmatter.architectures`, choose latents by rank, threshold or pursuit.

A sparsity penalty is comparable between objectives only at equal L0. So `train_objective` takes an
L0 and steers the penalty towards it. What is learned is returned as one of sae-lens' own inference
classes; `expanded` is a StandardSAE whose decoder rows are p_i W_i, which is the same function, and
batchtopk and matryoshka are JumpReLUSAEs with one threshold. `as_training_class` gives the class of
sae-lens whose loss each of the four is (tests compare values and gradients), and
`train_objective_with_sae_lens` trains it by sae-lens' own trainer, two to three times as slowly.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, log
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.architectures import (
    Entries,
    Parameters,
    batch_largest,
    batch_topk_gradients,
    jumprelu_gradients,
    matching_pursuit_gradients,
)
from darkmatter.autoencoders import Autoencoder, decoder_of
from darkmatter.leastsquares import column_mean, finite_rows, float64_blocks, paired_rows
from darkmatter.sparse import flat_nonzero
from darkmatter.training import (
    check_batch,
    difference_directions,
    fit_with_sae_lens,
    row_dots,
)

if TYPE_CHECKING:
    from sae_lens import GatedSAE, StandardSAE

Objective = Literal["l1", "expanded", "gated", "topk"]
Architecture = Literal["batchtopk", "matryoshka", "jumprelu", "matching_pursuit"]
# Adam steps by about its rate, and thresholds are some fifty times as large as weights.
_THRESHOLD_FASTER = 30.0


@dataclass(frozen=True)
class ObjectiveRecipe:
    """What decides an autoencoder, given its rows."""

    objective: Objective | Architecture
    d_sae: int
    l0: float | int
    """What the sparsity penalty is steered to; of topk, batchtopk, matryoshka and pursuit, k."""
    samples: int = 240_000
    """Rows to train on in all, repeats counted."""
    batch: int = 512
    learning_rate: float = 3e-3
    """Adam's. It warms up over the first twentieth and falls to a tenth in the last third."""
    orthogonality: float | int = 0.0
    """Weight of `orthogonality_penalty` of the decoder in the loss."""
    freeze_decoder: bool = True
    """Whether d* is constant, as published; sae-lens' gated SAE trains the decoder there, too."""
    steering: float = 0.02
    """Each batch the logarithm of the penalty moves by it times that of L0 / wanted L0."""
    bandwidth: float | int = 2.0
    """Of the window that stands for the derivative of jumprelu's step; the rows' variance is d."""
    seed: int = 0

    @property
    def widths(self) -> tuple[int, ...]:
        """Nested widths of matryoshka: an eighth, a quarter, half and all of the latents."""
        return tuple(max(1, self.d_sae // part) for part in (8, 4, 2, 1))


@dataclass(frozen=True)
class Trained:
    """The sae-lens autoencoder in the units of the rows, and how its training ended.

    `sparsity` is the penalty at the end, in units in which a row has variance d. `gain` is p of
    expanded, exp(r) of gated, and ones otherwise.
    """

    sae: Any
    sparsity: float
    gain: Float[Tensor, " d_sae"]


def initial_parameters(
    rows: Float[Tensor, "n d"],
    objective: Objective | Architecture,
    d_sae: int,
    seed: int = 0,
    active: float | int | None = None,
) -> Parameters:
    """Decoder rows along differences of two rows, the encoder their transpose, the rest neutral.

    Neutral is p = 1, exp(r) = 1 and every other bias 0. b_enc lets every latent fire on a share
    `active` of the rows, or is 0: a penalty that has to bring down a large L0 kills many latents
    on the way. Of jumprelu the threshold does that, and b_enc is 0. All objectives of one seed
    start equal.
    """
    generator = torch.Generator().manual_seed(seed)
    directions = difference_directions(rows, d_sae, generator, jitter=1e-6)
    zeros = rows.new_zeros(d_sae)
    gain = torch.ones_like(zeros) if objective == "expanded" else zeros.clone()
    fires_above = zeros.clone()
    if active is not None:
        place = len(rows) - max(1, round(active * len(rows)))
        fires_above = (rows @ directions.T).kthvalue(max(1, place), dim=0).values
    learns_threshold = objective == "jumprelu"
    return Parameters(
        # Laid out as its gradient will be: fused Adam reads both in the order of memory.
        directions.T.clone(memory_format=torch.contiguous_format),
        zeros.clone() if learns_threshold else -fires_above,
        directions,
        rows.new_zeros(rows.shape[1]),
        gain,
        zeros.clone(),
        fires_above if learns_threshold else None,
    )


def objective_loss(
    objective: Objective,
    parameters: Parameters,
    z: Float[Tensor, "n d"],
    sparsity: float | int = 0.0,
    k: int = 0,
    freeze_decoder: bool = True,
) -> tuple[Float[Tensor, ""], Float[Tensor, "n m"]]:
    """(loss, code): the formula of the module, and the code whose decoding is x_hat.

    The code of expanded is p o f. `k` is used by topk alone, `sparsity` by the others.
    """
    W_dec, b_dec = parameters.W_dec, parameters.b_dec
    linear = z @ parameters.W_enc
    pre = linear + parameters.b_enc
    f = pre.relu()
    if objective == "topk":
        top = f.topk(k, dim=1, sorted=False)
        code = torch.zeros_like(f).scatter(1, top.indices, top.values)
        return _squares(z - (code @ W_dec + b_dec)), code
    penalty = sparsity * f.sum(1).mean()
    if objective == "l1":
        return _squares(z - (f @ W_dec + b_dec)) + penalty, f
    if objective == "expanded":
        code = parameters.gain * f
    else:
        code = (pre > 0) * (parameters.gain.exp() * linear + parameters.b_mag).relu()
    held = (W_dec.detach(), b_dec.detach()) if freeze_decoder else (W_dec, b_dec)
    auxiliary = _squares(z - (f @ held[0] + held[1]))
    return auxiliary + _squares(z - (code @ W_dec + b_dec)) + penalty, code


def _squares(residual: Tensor) -> Tensor:
    return residual.square().sum(1).mean()


def objective_gradients(
    objective: Objective,
    parameters: Parameters,
    z: Float[Tensor, "n d"],
    sparsity: float | int = 0.0,
    k: int = 0,
    freeze_decoder: bool = True,
) -> tuple[float, list[Tensor]]:
    """(L0, gradients of `objective_loss` in the order of `Parameters.all`), from active latents.

    Only pre is a dense product; all else touches the active entries alone, which at an L0 of 8 of
    512 costs a fraction of what autograd does. L0 counts the latents with pre > 0, or of topk k.
    """
    n, m = len(z), len(parameters.W_dec)
    W_dec, b_dec, gain = parameters.W_dec, parameters.b_dec, parameters.gain
    pre = torch.addmm(parameters.b_enc, z, parameters.W_enc)
    on = pre > 0
    if objective == "topk":
        on &= torch.zeros_like(on).scatter_(1, pre.topk(k, dim=1, sorted=False).indices, True)
    at = flat_nonzero(on)
    entries, f = Entries(at, n, m), pre.view(-1)[at]
    row, column = entries.row, entries.column

    def upstream(code: Tensor) -> Tensor:
        return (entries.decode(code, W_dec) + b_dec - z) * (2 / n)

    first = upstream(f)
    f_gradient = row_dots(first, row, W_dec, column)
    decoder, decoder_bias = torch.zeros_like(W_dec), torch.zeros_like(b_dec)
    if objective in ("l1", "topk") or not freeze_decoder:
        decoder, decoder_bias = entries.outer(f, first), first.sum(0)
    if objective != "topk":
        f_gradient = f_gradient + sparsity / n
    # What reaches the weights of the encoder but not b_enc: the magnitudes of gated.
    magnitude = torch.zeros_like(f)
    gain_gradient = b_mag_gradient = f.new_zeros(m)
    if objective == "expanded":
        second = upstream(gain[column] * f)
        code_gradient = row_dots(second, row, W_dec, column)
        f_gradient = f_gradient + gain[column] * code_gradient
        gain_gradient = entries.by_latent(f * code_gradient)
        decoder = decoder + entries.outer(gain[column] * f, second)
        decoder_bias = decoder_bias + second.sum(0)
    elif objective == "gated":
        scaled = gain.exp()[column] * (f - parameters.b_enc[column])
        code = (scaled + parameters.b_mag[column]).relu()
        second = upstream(code)
        code_gradient = row_dots(second, row, W_dec, column) * (code > 0)
        magnitude = code_gradient * gain.exp()[column]
        gain_gradient = entries.by_latent(code_gradient * scaled)
        b_mag_gradient = entries.by_latent(code_gradient)
        decoder = decoder + entries.outer(code, second)
        decoder_bias = decoder_bias + second.sum(0)
    encoder = entries.outer(f_gradient + magnitude, z).T.contiguous()
    bias = entries.by_latent(f_gradient)
    l0 = len(at) / n
    return l0, [encoder, bias, decoder, decoder_bias, gain_gradient, b_mag_gradient]


def orthogonality_penalty(directions: Float[Tensor, "m d"]) -> Float[Tensor, ""]:
    """mean cos + mean max cos + max max cos, over pairs of different rows; signed cosines.

    Source: a comment of Bart Bussmann under "Do sparse autoencoders find 'true features'?" (Till,
    LessWrong, February 2024). It does not say whether cosines are signed.
    """
    units = torch.nn.functional.normalize(directions, dim=1)
    cosines = units @ units.T
    m = len(units)
    own = torch.eye(m, dtype=torch.bool, device=units.device)
    mean = cosines.masked_fill(own, 0.0).sum() / (m * (m - 1))
    largest = cosines.masked_fill(own, -torch.inf).amax(1)
    return mean + largest.mean() + largest.amax()


def train_objective(
    rows: Float[Tensor, "n d"], recipe: ObjectiveRecipe, hook: str | None = None
) -> Trained:
    """Train on rows in a random order, again and again; float32.

    `hook` is noted in the autoencoder's config as the hook point of the rows; `dm.survey` reads it.

    Inside, rows are z = (x - mean x) * sqrt(d / variance of x), with the variance summed over the
    d dimensions; the scale is folded into the weights at the end, so the SAE takes raw x. Adam;
    after every step the rows of W_dec have unit norm. Each batch, the penalty is multiplied by
    (L0 / wanted L0)^steering, by a factor of exp(steering) at most, and so finds the value that
    the L0 needs.

    Raises Refusal for an unknown objective, fewer rows or samples than a batch, an L0 out of range
    or (topk) not whole, or rows that are not finite or do not vary.
    """
    _check(rows, recipe)
    start = _Start(rows, recipe)
    return start.trained(_optimise(start), hook)


class _Start:
    """Where an objective begins, and the rows it reads, in units in which a row has variance d."""

    def __init__(self, rows: Tensor, recipe: ObjectiveRecipe) -> None:
        self.rows, self.recipe = rows, recipe
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.mean = column_mean(rows).float()
        variance = float((rows[: 1 << 15].float() - self.mean).square().sum(1).mean())
        if not variance > 0:
            raise Refusal(
                "rows are all the same, expected rows that vary; pass more than one token."
            )
        self.scale = (rows.shape[1] / variance) ** 0.5
        self.parameters = initial_parameters(
            self.sample(4096),
            recipe.objective,
            recipe.d_sae,
            recipe.seed,
            min(0.5, 2 * recipe.l0 / recipe.d_sae),
        )
        self.order = torch.empty(0, dtype=torch.int64)

    def sample(self, n: int) -> Float[Tensor, "n d"]:
        """Rows drawn at random, with repeats."""
        drawn = self.rows[torch.randint(len(self.rows), (n,), generator=self.generator)]
        return (drawn.float() - self.mean) * self.scale

    def batch(self, step: int) -> Float[Tensor, "batch d"]:
        """The rows of a step; steps are asked for in order."""
        size = self.recipe.batch
        at = step % (len(self.rows) // size)
        if at == 0:
            self.order = torch.randperm(len(self.rows), generator=self.generator)
        rows = self.rows[self.order[at * size : (at + 1) * size]]
        return (rows.float() - self.mean) * self.scale

    def trained(self, sparsity: float, hook: str | None) -> Trained:
        """What the parameters have become."""
        gain, objective = self.parameters.gain, self.recipe.objective
        if objective == "gated":
            gain = gain.exp()
        elif objective != "expanded":
            gain = torch.ones_like(gain)
        sae = _as_sae(self)
        sae.cfg.metadata.hook_name = hook
        return Trained(sae, sparsity, gain.clone())


def _in_sae_lens(objective: Objective) -> dict[str, str]:
    """Names of the parameters of sae-lens' training class, and of ours."""
    names = {"W_enc": "W_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
    match objective:
        case "gated":
            return names | {"b_gate": "b_enc", "r_mag": "gain", "b_mag": "b_mag"}
        case "expanded":
            return names | {"b_enc": "b_enc", "gain": "gain"}
        case _:
            return names | {"b_enc": "b_enc"}


def as_training_class(
    objective: Objective, parameters: Parameters, sparsity: float | int = 0.0, k: int = 0
) -> Any:
    """sae-lens' training class of an objective, or ours registered with it, with these weights.

    Its `training_forward_pass` is the loss of `objective_loss`; of gated that with
    `freeze_decoder=False`. Weights are copied.
    """
    import sae_lens

    m, d = parameters.W_dec.shape
    config: dict[str, Any] = {
        "d_in": d,
        "d_sae": m,
        "dtype": str(parameters.W_dec.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
    }
    match objective:
        case "topk":
            made: Any = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(**config, k=k))
        case "l1":
            made = sae_lens.StandardTrainingSAE(
                sae_lens.StandardTrainingSAEConfig(**config, l1_coefficient=float(sparsity))
            )
        case "gated":
            made = sae_lens.GatedTrainingSAE(
                sae_lens.GatedTrainingSAEConfig(**config, l1_coefficient=float(sparsity))
            )
        case "expanded":
            from darkmatter import registered

            made = registered.ExpandedTrainingSAE(
                registered.ExpandedTrainingSAEConfig(**config, l1_coefficient=float(sparsity))
            )
    names = _in_sae_lens(objective)
    made.load_state_dict({name: getattr(parameters, ours) for name, ours in names.items()})
    return made


def train_objective_with_sae_lens(
    rows: Float[Tensor, "n d"],
    recipe: ObjectiveRecipe,
    hook: str | None = None,
    sparsity: float | int | None = None,
) -> Trained:
    """`train_objective` by sae-lens' own trainer, from the same start and on the same rows.

    That trainer steers no penalty, so the loss does: after each batch, as in `train_objective`. Or
    `sparsity` is the penalty throughout, in units in which a row has variance d. The trainer clips
    gradients to a norm of one and leaves the norms of decoder rows free; they are folded into the
    encoder at the end. Raises Refusal as `train_objective`, and for an objective that is not one of
    l1, expanded, gated and topk.
    """
    _check(rows, recipe)
    if sparsity is not None and not 0 <= sparsity < inf:
        raise Refusal(
            f"sparsity is {sparsity}, expected a finite number of at least 0; leave it out to have "
            "it steered to the L0 of the recipe."
        )
    match recipe.objective:
        case "l1" | "expanded" | "gated" | "topk" as objective:
            pass
        case other:
            raise Refusal(
                f"expected one of {get_args(Objective)}, got {other!r}; use its class in sae-lens."
            )
    start = _Start(rows, recipe)
    steps = recipe.samples // recipe.batch
    batches = (start.batch(step) for step in range(steps))
    with torch.random.fork_rng(devices=[]):
        penalty = _Penalty(recipe, sparsity)
        made = as_training_class(objective, start.parameters, penalty.value, int(recipe.l0))
        made.training_forward_pass = penalty.around(made.training_forward_pass)
        trained = fit_with_sae_lens(made, batches, steps, recipe.batch, recipe.learning_rate)
        trained.fold_W_dec_norm()
        for name, ours in _in_sae_lens(objective).items():
            setattr(start.parameters, ours, getattr(trained, name).detach().clone())
        return start.trained(penalty.late, hook)


def _check(rows: Tensor, recipe: ObjectiveRecipe) -> None:
    known = get_args(Objective) + get_args(Architecture)
    if recipe.objective not in known:
        raise Refusal(f"There is no objective {recipe.objective!r}; choose one of {known}.")
    finite_rows("rows", rows)
    check_batch(len(rows), recipe.samples, recipe.batch)
    if not 0 < recipe.l0 <= recipe.d_sae:
        raise Refusal(
            f"expected 0 < l0 <= d_sae = {recipe.d_sae}, got {recipe.l0}; choose a smaller l0"
        )
    if recipe.objective in ("topk", "matching_pursuit") and int(recipe.l0) != recipe.l0:
        raise Refusal(
            f"{recipe.objective} keeps the same number of latents of every token, got l0 = "
            f"{recipe.l0}; pass a whole number"
        )


class _Penalty:
    """The weight of the sparsity term, steered to the L0 of a recipe batch by batch, or held."""

    def __init__(self, recipe: ObjectiveRecipe, held: float | int | None = None) -> None:
        self._recipe, self._held, self._step = recipe, held is not None, 0
        # One that shrinks a latent by a tenth or so of its usual size in these units.
        value = 4.0 if held is None else held
        self._log, self._late = log(value) if value else -inf, 0.0
        self._steps = recipe.samples // recipe.batch
        self._counted = max(1, self._steps // 10)

    @property
    def value(self) -> float:
        return exp(self._log)

    @property
    def late(self) -> float:
        """The mean over the last tenth of the steps."""
        return self._late

    def steer(self, l0: float) -> None:
        """After a batch, whose L0 this was."""
        if not self._held:
            aim = self._recipe.l0
            self._log += self._recipe.steering * max(-1.0, min(1.0, log(max(l0, 0.1) / aim)))
        if self._step >= self._steps - self._counted:
            self._late += self.value / self._counted
        self._step += 1

    def around(self, forward: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """The forward pass of one of sae-lens' training classes, with this penalty."""

        def steered(step_input: Any) -> Any:
            if "l1" in step_input.coefficients:
                step_input.coefficients["l1"] = self.value
            output = forward(step_input)
            self.steer(float((output.feature_acts > 0).sum(1).float().mean()))
            return output

        return steered


@torch.no_grad()
def _optimise(start: _Start) -> float:
    """Adam in place; returns the penalty averaged over the last tenth of the steps."""
    recipe, parameters = start.recipe, start.parameters
    groups: list[dict[str, Any]] = [{"params": parameters.all()[:6], "faster": 1.0}]
    if parameters.threshold is not None:
        groups.append({"params": [parameters.threshold], "faster": _THRESHOLD_FASTER})
    optimiser = torch.optim.Adam(groups, fused=True)
    steps = recipe.samples // recipe.batch
    penalty = _Penalty(recipe)
    for step in range(steps):
        z = start.batch(step)
        l0, gradient = _gradients(recipe, parameters, z, penalty.value)
        if recipe.orthogonality:
            with torch.enable_grad():
                decoder = parameters.W_dec.detach().requires_grad_()
                loss = recipe.orthogonality * orthogonality_penalty(decoder)
            gradient[2] = gradient[2] + torch.autograd.grad(loss, decoder)[0]
        for parameter, part in zip(parameters.all(), gradient, strict=True):
            parameter.grad = part
        share = min(1.0, 20 * (step + 1) / steps, max(0.1, 3 * (steps - step) / steps))
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * share * group["faster"]
        optimiser.step()
        W_dec = parameters.W_dec
        W_dec /= W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
        if parameters.threshold is not None:
            parameters.threshold.clamp_(min=0)
        penalty.steer(l0)
    return penalty.late


def _gradients(
    recipe: ObjectiveRecipe, parameters: Parameters, z: Tensor, sparsity: float
) -> tuple[float, list[Tensor]]:
    match recipe.objective:
        case "batchtopk":
            return batch_topk_gradients(parameters, z, recipe.l0)
        case "matryoshka":
            return batch_topk_gradients(parameters, z, recipe.l0, recipe.widths)
        case "jumprelu":
            return jumprelu_gradients(parameters, z, sparsity, recipe.bandwidth)
        case "matching_pursuit":
            return matching_pursuit_gradients(parameters, z, int(recipe.l0))
        case objective:
            return objective_gradients(
                objective, parameters, z, sparsity, int(recipe.l0), recipe.freeze_decoder
            )


def _threshold(start: _Start) -> Float[Tensor, " m"]:
    """The learned thresholds, or the one at which the rows' mean L0 is that of the recipe."""
    parameters = start.parameters
    if parameters.threshold is not None:
        return parameters.threshold
    # A far quantile, which takes more rows than a start.
    z = start.sample(16_384)
    pre = torch.addmm(parameters.b_enc, z, parameters.W_enc)
    at = batch_largest(pre, round(start.recipe.l0 * len(z)) + 1)
    return pre.view(-1)[at].min().expand(pre.shape[1])


def _as_sae(start: _Start) -> Any:
    """The same function of raw rows, x -> z -> x_hat, as an sae-lens object."""
    recipe, parameters, mean, scale = start.recipe, start.parameters, start.mean, start.scale
    W_enc, W_dec = parameters.W_enc, parameters.W_dec
    # pre / scale = x W_enc + b_enc / scale - mean W_enc: codes, too, are in units of x.
    shift = mean @ W_enc
    b_enc = parameters.b_enc / scale - shift
    b_dec = mean + parameters.b_dec / scale
    if recipe.objective == "gated":
        b_mag = parameters.b_mag / scale - parameters.gain.exp() * shift
        state = {"b_gate": b_enc, "b_mag": b_mag, "r_mag": parameters.gain}
        return _new_sae("gated", W_enc, W_dec, b_dec, state)
    if recipe.objective == "matching_pursuit":
        extra = {"max_iterations": int(recipe.l0), "residual_threshold": 0.0}
        extra |= {"stop_on_duplicate_support": False, "apply_b_dec_to_input": True}
        return _new_sae("matching_pursuit", None, W_dec, b_dec, {}, extra)
    if recipe.objective in ("jumprelu", "batchtopk", "matryoshka"):
        state = {"b_enc": b_enc, "threshold": _threshold(start) / scale}
        return _new_sae("jumprelu", W_enc, W_dec, b_dec, state)
    if recipe.objective == "expanded":
        W_dec = parameters.gain[:, None] * W_dec
    architecture = "topk" if recipe.objective == "topk" else "standard"
    extra = {"k": int(recipe.l0)} if architecture == "topk" else {}
    return _new_sae(architecture, W_enc, W_dec, b_dec, {"b_enc": b_enc}, extra)


def _new_sae(
    architecture: str,
    W_enc: Tensor | None,
    W_dec: Tensor,
    b_dec: Tensor,
    state: dict[str, Tensor],
    extra: dict[str, Any] | None = None,
    metadata: Any = None,
) -> Any:
    from sae_lens import SAE

    config = {
        "architecture": architecture,
        "d_in": W_dec.shape[1],
        "d_sae": W_dec.shape[0],
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
    }
    sae = SAE.from_dict(config | (extra or {}))
    weights = {"W_dec": W_dec, "b_dec": b_dec} | state
    if W_enc is not None:
        weights["W_enc"] = W_enc
    sae.load_state_dict({name: value.detach().float().clone() for name, value in weights.items()})
    if metadata is not None:
        sae.cfg.metadata = copy.deepcopy(metadata)
    return sae.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Gains:
    """f_i -> scale_i f_i + shift_i where f_i > 0, the best in squared error; units of f."""

    scale: Float[Tensor, " m"]
    shift: Float[Tensor, " m"]


@torch.no_grad()
def fit_gains(
    sae: Autoencoder,
    x: Float[Tensor, "n d"],
    shift: bool = False,
    ridge: float = 1e-4,
    batch: int = 4096,
) -> Gains:
    """The gain of every latent, and with `shift` an offset, that reconstruct x best.

        minimise over s, t   sum_n | x - b_dec - sum_{i: f_i > 0} (s_i f_i + t_i) W_i |^2

    which latents are active is left as it is. It is least squares in 2 m unknowns whose normal
    matrix is a product entry by entry, (g'g) o (W W'), for g = [f, 1[f > 0]]: no design matrix of
    n d rows is made. s is drawn towards 1 and t towards 0 by `ridge` of the mean diagonal, so
    latents that never fire keep s = 1, t = 0. Without shift it is the "scale" that expanded learns
    as p, of a finished SAE; with it, the "rescale and shift" baseline of Rajamanoharan et al. 2024
    (2404.16014). Raises Refusal for rows that do not fit the SAE or a decoder that is not affine.
    """
    finite_rows("x", x)
    directions, bias = decoder_of(sae)
    W = directions.double()
    if x.shape[1] != W.shape[1]:
        raise Refusal(
            f"x has {x.shape[1]} columns, expected the {W.shape[1]} that the autoencoder writes; "
            "pass activations of its hook."
        )
    m = len(W)
    copies = 2 if shift else 1
    gram = torch.zeros(copies * m, copies * m, dtype=torch.float64)
    right = torch.zeros(copies * m, dtype=torch.float64)
    for part in x.split(batch):
        f = sae.encode(part.float())
        g = torch.cat([f, (f > 0).to(f.dtype)], 1) if shift else f
        gram += (g.T @ g).double()
        right += (g.double() * ((part - bias).double() @ W.T).repeat(1, copies)).sum(0)
    overlap = (W @ W.T).repeat(copies, copies)
    gram, right = gram * overlap / len(x), right / len(x)
    start = torch.cat([torch.ones(m), torch.zeros((copies - 1) * m)]).double()
    # Scales and shifts have other units: each is drawn by the mean diagonal of its own kind.
    pull = ridge * torch.cat([half.mean().expand(m) for half in gram.diagonal().split(m)])
    change = torch.linalg.solve(gram + torch.diag(pull), right - gram @ start)
    solved = (start + change).float()
    return Gains(solved[:m], solved[m:] if shift else torch.zeros(m))


def rescaled(sae: Autoencoder, gains: Gains) -> Any:
    """A copy of the SAE whose decoder rows are scale_i W_i: exactly d(scale o f).

    Raises Refusal when the gains also shift; use `rescaled_and_shifted`.
    """
    if bool(gains.shift.any()):
        raise Refusal("gains also shift, which a decoder cannot do; use rescaled_and_shifted.")
    made: Any = copy.deepcopy(sae)
    made.W_dec.data = made.W_dec.data * gains.scale[:, None]
    return made


def rescaled_and_shifted(sae: StandardSAE, gains: Gains) -> GatedSAE:
    """A ReLU SAE with its codes rescaled and shifted is a gated SAE.

    The gate is the old encoder, the magnitude relu(scale o pre + shift), so exp(r) = scale. The
    relu matters where scale o f + shift is negative. Scales below 0.01 are raised to it, since r
    is a logarithm. Raises Refusal for any autoencoder but a StandardSAE that does not subtract
    b_dec.
    """
    if sae.cfg.architecture() != "standard" or sae.cfg.apply_b_dec_to_input:
        raise Refusal(
            f"expected a StandardSAE that reads x itself, got a {sae.cfg.architecture()} "
            "autoencoder; train it with the objective 'l1'."
        )
    scale = gains.scale.clamp_min(0.01)
    state = {
        "b_gate": sae.b_enc,
        "r_mag": scale.log(),
        "b_mag": scale * sae.b_enc + gains.shift,
    }
    return _new_sae("gated", sae.W_enc, sae.W_dec, sae.b_dec, state, metadata=sae.cfg.metadata)


@dataclass(frozen=True)
class Shrinkage:
    """How short reconstructions are, with x and x_hat about the mean of x.

    gamma     E[ x_hat . x / |x|^2 ]: below 1 for a short reconstruction, and for one that misses
              something. Rajamanoharan et al. 2024, Eq. 10 as corrected in a comment by its authors.
    stretch   sum x_hat . x / sum |x_hat|^2: what x_hat should be multiplied by. Above 1 only if it
              is short: an orthogonal projection of x, however incomplete, has 1.
    """

    gamma: float
    stretch: float


def shrinkage(x: Float[Tensor, "n d"], x_hat: Float[Tensor, "n d"]) -> Shrinkage:
    """Both measures. Raises Refusal for shapes that differ, NaN, or reconstructions all zero."""
    x, x_hat = paired_rows("x", x, "x_hat", x_hat)
    mean = column_mean(x)
    ratio = cross = square = 0.0
    for block, block_hat in float64_blocks(x, x_hat):
        block, block_hat = block - mean, block_hat - mean
        product, length = (block * block_hat).sum(1), block.square().sum(1)
        ratio += float((product / length.clamp_min(1e-300)).sum())
        cross += float(product.sum())
        square += float(block_hat.square().sum())
    if square == 0:
        raise Refusal("x_hat is the mean of x in every row, expected reconstructions that vary.")
    return Shrinkage(ratio / len(x), cross / square)

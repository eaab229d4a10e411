"""Train a BatchTopK sparse autoencoder on stored activations, with hand-written sparse gradients.

    pre   = (x - b_dec) W_enc + b_enc
    f     = pre where pre is among the l0 * n largest positive entries of the batch, else 0
    x_hat = f W_dec + b_dec,   rows of W_dec of unit norm
    loss  = mean_n |x - x_hat|^2 + auxiliary * mean_n |e - e_hat(dead latents)|^2

BatchTopK: Bussmann et al. 2024 (2412.06410); the auxiliary loss on dead latents: Gao et al. 2024
(2406.04093). Only the encoder's product is dense; decoding and every gradient touch the active
latents alone, which on CPU is an order of magnitude faster than dense autograd. The trained
autoencoder is a JumpReLU with one threshold, so its L0 varies by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.sparse import flat_nonzero


@dataclass(frozen=True)
class SparseTrainingRecipe:
    """Everything that decides an autoencoder, given the activations (their order included)."""

    d_sae: int
    l0: float | int
    activations: int = 10_000_000
    batch: int = 4096
    learning_rate: float | None = None
    """Adam's; None is 1e-3, and more below 2048 latents, by the square root of the ratio."""
    warmup_share: float = 0.03
    decay_share: float = 0.3
    auxiliary: float = 1 / 32
    auxiliary_k: int = 32
    dead_after: int = 400_000
    """Activations without firing after which a latent counts as dead while training."""
    revived_at_once: int = 256
    seed: int = 0

    @property
    def rate(self) -> float:
        return self.learning_rate or 1e-3 * max(1.0, (2048 / self.d_sae) ** 0.5)


@dataclass(frozen=True)
class SaeLensRecipe:
    """What decides a TopK autoencoder of sae-lens, given its rows."""

    d_sae: int
    k: int
    samples: int
    """Rows to train on in all, repeats counted."""
    batch: int = 512
    learning_rate: float = 3e-3
    """Adam's. It warms up over the first twentieth and falls to a tenth in the last third."""
    seed: int = 0


@dataclass(frozen=True)
class TrainedAutoencoder:
    """Weights of a JumpReLU autoencoder on raw activations: x_hat = f W_dec + b_dec."""

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"]


@dataclass
class Weights:
    """What is learned, encoder stored by latent (rows) so that sparse gathers are contiguous."""

    encoder: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, " d_sae"]
    decoder: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]

    def all(self) -> list[Tensor]:
        return [self.encoder, self.b_enc, self.decoder, self.b_dec]


@dataclass(frozen=True)
class Active:
    """The active entries of a batch: row (token), column (latent), value; sorted by row."""

    row: Int[Tensor, " a"]
    column: Int[Tensor, " a"]
    value: Float[Tensor, " a"]


class Preactivations:
    """A reused (batch x d_sae) bfloat16 buffer: a fresh one costs more than the product."""

    def __init__(self, batch: int, d_sae: int):
        self.pre = torch.empty(batch, d_sae, dtype=torch.bfloat16)
        self.above = torch.empty(batch, d_sae, dtype=torch.bool)

    def compute(self, weights: Weights, centred: Float[Tensor, "n d"]) -> None:
        """pre = centred W_enc + b_enc, in bfloat16."""
        torch.addmm(
            weights.b_enc.bfloat16(),
            centred.bfloat16(),
            weights.encoder.bfloat16().T,
            out=self.pre,
        )

    def select(
        self, count: int, guess: float
    ) -> tuple[Int[Tensor, " a"], Int[Tensor, " a"], float]:
        """The `count` largest positive entries: their rows, columns and the smallest value.

        `guess` is a value expected to lie below the answer (last batch's): only entries above it
        are sorted. A guess that is too high is lowered until it is not, so the answer is exact.
        """
        while True:
            torch.gt(self.pre, guess, out=self.above)
            at = flat_nonzero(self.above)
            if len(at) >= count or guess <= 0:
                break
            guess = 0.5 * guess if guess > 1e-6 else 0.0
        values = self.pre.view(-1)[at].float()
        if len(at) > count:
            best = values.topk(count, sorted=False).indices.sort().values
            at, values = at[best], values[best]
        d_sae = self.pre.shape[1]
        row = at.div(d_sae, rounding_mode="floor")
        return row, at - row * d_sae, float(values.min()) if len(at) else 0.0


def row_dots(a: Tensor, i: Tensor, b: Tensor, j: Tensor) -> Float[Tensor, " n"]:
    """a[i] . b[j] row by row, in pieces that stay in cache."""
    parts = zip(i.split(2048), j.split(2048), strict=True)
    return torch.cat([(a.index_select(0, r) * b.index_select(0, c)).sum(1) for r, c in parts])


def bags(
    owner: Int[Tensor, " a"], member: Int[Tensor, " a"], weight: Tensor, table: Tensor, n: int
) -> Tensor:
    """sum over entries i with owner i = j of weight_i * table[member_i]; `owner` is sorted."""
    offsets = torch.searchsorted(owner, torch.arange(n))
    return torch.nn.functional.embedding_bag(
        member, table, offsets, mode="sum", per_sample_weights=weight
    )


def gradients(
    weights: Weights, x: Float[Tensor, "n d"], active: Active
) -> tuple[float, Float[Tensor, "n d"], list[Tensor]]:
    """Loss, residual x - x_hat and the gradient of the loss for encoder, b_enc, decoder, b_dec."""
    n, d_sae = len(x), len(weights.decoder)
    centred = x - weights.b_dec
    x_hat = bags(active.row, active.column, active.value, weights.decoder, n) + weights.b_dec
    residual = x - x_hat
    upstream = residual * (-2 / n)
    if len(active.row) * 100 > n * d_sae:
        value_gradient = (upstream.bfloat16() @ weights.decoder.bfloat16().T)[
            active.row, active.column
        ].float()
    else:
        value_gradient = row_dots(upstream, active.row, weights.decoder, active.column)
    order = active.column.argsort(stable=True)
    column, row = active.column[order], active.row[order]
    decoder_gradient = bags(column, row, active.value[order], upstream, d_sae)
    encoder_gradient = bags(column, row, value_gradient[order], centred, d_sae)
    b_enc_gradient = torch.zeros(d_sae).index_add_(0, active.column, value_gradient)
    b_dec_gradient = upstream.sum(0) - b_enc_gradient @ weights.encoder
    loss = float(residual.square().sum() / n)
    return loss, residual, [encoder_gradient, b_enc_gradient, decoder_gradient, b_dec_gradient]


def add_auxiliary(
    weights: Weights,
    gradient: list[Tensor],
    x: Float[Tensor, "n d"],
    residual: Float[Tensor, "n d"],
    dead: Int[Tensor, " dead"],
    recipe: SparseTrainingRecipe,
) -> None:
    """Add the gradient of the loss that lets dead latents predict the residual, in place."""
    centred = x - weights.b_dec
    pre = centred @ weights.encoder[dead].T + weights.b_enc[dead]
    top = pre.topk(min(recipe.auxiliary_k, len(dead)), 1, sorted=False)
    f = torch.zeros_like(pre).scatter_(1, top.indices, top.values.relu())
    upstream = (f @ weights.decoder[dead] - residual) * (2 * recipe.auxiliary / len(x))
    f_gradient = (upstream @ weights.decoder[dead].T) * (f > 0)
    gradient[0][dead] += f_gradient.T @ centred
    gradient[1][dead] += f_gradient.sum(0)
    gradient[2][dead] += f.T @ upstream


def normalise_decoder(weights: Weights, gradient: Tensor | None = None) -> None:
    """Unit norm for every decoder row, or remove a gradient's part along the row."""
    if gradient is None:
        weights.decoder /= weights.decoder.norm(dim=1, keepdim=True).clamp_min_(1e-12)
    else:
        along = (gradient * weights.decoder).sum(1, keepdim=True)
        gradient.addcmul_(weights.decoder, along, value=-1)


def difference_directions(
    rows: Float[Tensor, "n d"], count: int, generator: torch.Generator, jitter: float
) -> Float[Tensor, "count d"]:
    """Unit directions along differences of two random rows each, where decoders begin.

    Noise of size `jitter` gives a direction to a row that is drawn with itself.
    """
    pick = torch.randint(len(rows), (2, count), generator=generator)
    directions = rows[pick[0]] - rows[pick[1]]
    directions += jitter * torch.randn(directions.shape, generator=generator, dtype=rows.dtype)
    return torch.nn.functional.normalize(directions, dim=1)


def initial_weights(sample: Float[Tensor, "n d"], recipe: SparseTrainingRecipe) -> Weights:
    """Decoder rows point along differences of random activations; the encoder is its transpose."""
    generator = torch.Generator().manual_seed(recipe.seed)
    directions = difference_directions(sample, recipe.d_sae, generator, jitter=1e-3)
    zeros = torch.zeros(recipe.d_sae)
    return Weights(directions.clone(), zeros, directions.clone(), torch.zeros(sample.shape[1]))


def train_batch_topk(
    activations: Float[Tensor, "n d"],
    recipe: SparseTrainingRecipe,
    log: Callable[[str], None] | None = None,
) -> TrainedAutoencoder:
    """Train on rows of `activations` (float16 is fine, a memory map too) in a random order.

    Rows are used again, in a new order, when the recipe asks for more activations than there
    are. The result is in the units of `activations`.

    Raises Refusal when there are fewer rows than a batch, or l0 exceeds the width.
    """
    if len(activations) < recipe.batch:
        raise Refusal(
            f"expected at least one batch of {recipe.batch} activations, got {len(activations)}; "
            "collect more or make the batch smaller"
        )
    if not 0 < recipe.l0 <= recipe.d_sae:
        raise Refusal(
            f"expected 0 < l0 <= d_sae = {recipe.d_sae}, got {recipe.l0}; choose a smaller l0"
        )
    generator = torch.Generator().manual_seed(recipe.seed)
    pick = torch.randint(len(activations), (min(len(activations), 65_536),), generator=generator)
    sample = activations[pick].float()
    mean = sample.mean(0)
    scale = float((sample - mean).square().sum(1).mean().rsqrt()) * sample.shape[1] ** 0.5
    weights = initial_weights((sample - mean) * scale, recipe)
    optimiser = torch.optim.Adam(weights.all(), lr=recipe.rate, betas=(0.9, 0.999), fused=True)
    steps = max(1, recipe.activations // recipe.batch)
    per_epoch = len(activations) // recipe.batch
    order = torch.empty(0, dtype=torch.int64)
    silent = torch.zeros(recipe.d_sae, dtype=torch.int64)
    smallest = 0.0
    buffer = Preactivations(recipe.batch, recipe.d_sae)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(activations), generator=generator)
        start = step % per_epoch * recipe.batch
        rows = order[start : start + recipe.batch].sort().values
        x = (activations[rows].float() - mean) * scale
        centred = x - weights.b_dec
        buffer.compute(weights, centred)
        row, column, smallest = buffer.select(round(recipe.l0 * len(x)), 0.8 * smallest)
        # The product chose the latents in bfloat16; their values are computed in float32.
        value = row_dots(centred, row, weights.encoder, column) + weights.b_enc[column]
        loss, residual, gradient = gradients(weights, x, Active(row, column, value.relu_()))
        silent += len(x)
        silent[column] = 0
        dead = (silent > recipe.dead_after).nonzero()[:, 0]
        if len(dead):
            chosen = torch.randperm(len(dead), generator=generator)[: recipe.revived_at_once]
            add_auxiliary(weights, gradient, x, residual, dead[chosen], recipe)
        normalise_decoder(weights, gradient[2])
        for parameter, part in zip(weights.all(), gradient, strict=True):
            parameter.grad = part
        warm = min(1.0, (step + 1) / max(1, int(steps * recipe.warmup_share)))
        cool = min(1.0, (steps - step) / max(1, int(steps * recipe.decay_share)))
        optimiser.param_groups[0]["lr"] = recipe.rate * warm * cool
        optimiser.step()
        normalise_decoder(weights)
        if log and (step + 1) % 100 == 0:
            fvu = loss / float((x - x.mean(0)).square().sum() / len(x))
            log(f"step {step + 1}/{steps} fvu {fvu:.4f} dead {len(dead)}")
    trained = in_raw_units(weights, mean, scale)
    return with_l0(trained, activations, recipe.l0, smallest / scale, generator)


def in_raw_units(weights: Weights, mean: Tensor, scale: float) -> TrainedAutoencoder:
    """Undo x -> (x - mean) * scale: the same function on raw activations, matrices in float16."""
    W_dec = weights.decoder.half().float()
    W_enc = weights.encoder.T.half().float()
    b_dec = mean + weights.b_dec / scale
    b_enc = weights.b_enc / scale - b_dec @ W_enc
    return TrainedAutoencoder(W_enc, b_enc, W_dec, b_dec, torch.zeros(len(b_enc)))


def with_l0(
    trained: TrainedAutoencoder,
    activations: Float[Tensor, "n d"],
    l0: float | int,
    guess: float,
    generator: torch.Generator,
    sample: int = 262_144,
) -> TrainedAutoencoder:
    """Set the threshold at which a sample's mean L0 is l0; `guess` is roughly that threshold."""
    size = min(sample, len(activations))
    rows = torch.randint(len(activations), (size,), generator=generator).sort().values
    count = round(l0 * size)
    floor = 0.7 * guess
    while True:
        above: list[Tensor] = []
        for part in rows.split(2048):
            pre = activations[part].float() @ trained.W_enc + trained.b_enc
            above.append(pre[pre > floor])
        values = torch.cat(above)
        if len(values) > count or floor <= 0:
            break
        floor = 0.5 * floor if floor > 1e-6 else 0.0
    # Active means above the threshold, so the threshold is the first value that is not active.
    threshold = float(values.topk(count + 1).values[-1]) if len(values) > count else 0.0
    return TrainedAutoencoder(
        trained.W_enc,
        trained.b_enc,
        trained.W_dec,
        trained.b_dec,
        torch.full_like(trained.b_enc, threshold),
    )


def check_batch(rows: int, samples: int, batch: int) -> None:
    """Raise Refusal unless a batch can be drawn from the rows, and once from the samples."""
    if not 0 < batch <= min(rows, samples):
        raise Refusal(
            f"expected a batch of at most {rows} rows and {samples} samples, got {batch}; pass "
            "more rows or make the batch smaller"
        )


def train_with_sae_lens(
    rows: Float[Tensor, "n d"],
    recipe: SaeLensRecipe,
    rows_of: Callable[[Float[Tensor, "batch d"]], Float[Tensor, "batch d_in"]] | None = None,
) -> Any:
    """A TopK autoencoder trained by sae-lens' own `SAETrainer`; returns its inference `TopKSAE`.

        minimise  mean_n |z - z_hat|^2,   z = (t - mean t) * sqrt(d_in / variance of t)

    t is a row, or `rows_of` a batch of rows: so an SAE of an error is trained on a stream of
    activations, `rows_of=lambda x: x - sae(x)`, and no error is stored. Rows are read in a random
    order, again and again. Every target is trained at the same size, whatever its variance, so one
    learning rate serves all; the scale is then folded into the weights, which take raw t. Decoder
    rows start along differences of two rows, the encoder as their transpose. sae-lens' auxiliary
    loss on dead latents is on. The random state of torch is left as it was.

    Raises Refusal for fewer rows than a batch, fewer samples than a batch, k out of range, or
    targets that do not vary or are not finite.
    """
    check_batch(len(rows), recipe.samples, recipe.batch)
    if not 0 < recipe.k <= recipe.d_sae:
        raise Refusal(
            f"expected 0 < k <= d_sae = {recipe.d_sae}, got {recipe.k}; choose a smaller k"
        )
    generator = torch.Generator().manual_seed(recipe.seed)

    def target(at: Int[Tensor, " batch"]) -> Tensor:
        taken = rows[at].float()
        return (taken if rows_of is None else rows_of(taken)).detach()

    pick = torch.randint(len(rows), (min(len(rows), 16_384),), generator=generator)
    sample = torch.cat([target(part) for part in pick.split(2048)])
    mean = sample.mean(0)
    variance = float((sample - mean).square().sum(1).mean())
    if not 0 < variance < float("inf"):
        raise Refusal(
            f"expected rows that vary and are finite, got a variance of {variance}; look at what "
            "is to be learnt"
        )
    scale = (sample.shape[1] / variance) ** 0.5

    def batches() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for start in range(0, len(rows) - recipe.batch + 1, recipe.batch):
                yield (target(order[start : start + recipe.batch]) - mean) * scale

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        sae = _topk_start(sample - mean, recipe, generator)
        steps = recipe.samples // recipe.batch
        trained = fit_with_sae_lens(sae, batches(), steps, recipe.batch, recipe.learning_rate)
        trained.fold_activation_norm_scaling_factor(scale)
        trained.b_dec.data += mean
        return _inference_sae(trained)


def _topk_start(sample: Tensor, recipe: SaeLensRecipe, generator: torch.Generator) -> Any:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    sae = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=sample.shape[1], d_sae=recipe.d_sae, k=recipe.k, dtype="float32", device="cpu"
        )
    )
    with torch.no_grad():
        sae.W_dec.copy_(difference_directions(sample, recipe.d_sae, generator, jitter=1e-6))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def fit_with_sae_lens(
    sae: Any, batches: Iterator[Tensor], steps: int, batch: int, learning_rate: float
) -> Any:
    """Train one of sae-lens' training classes by its own `SAETrainer`, silently; returns it.

    The learning rate warms up over the first twentieth and falls to a tenth in the last third.
    """
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training import sae_trainer

    config = SAETrainerConfig(
        total_training_samples=steps * batch,
        train_batch_size_samples=batch,
        lr=learning_rate,
        lr_end=learning_rate / 10,
        lr_warm_up_steps=steps // 20,
        lr_decay_steps=steps // 3,
        dead_feature_window=max(20, steps // 10),
        device="cpu",
    )
    # sae-lens has no switch for its progress bar.
    shown: Any = sae_trainer.tqdm
    sae_trainer.tqdm = partial(shown, disable=True)
    try:
        return SAETrainer(cfg=config, sae=sae, data_provider=batches).fit()
    finally:
        sae_trainer.tqdm = shown


def _inference_sae(trained: Any) -> Any:
    """What sae-lens would read back after `save_inference_model`, without a file."""
    from sae_lens import TopKSAE

    state = {name: value.detach().clone() for name, value in trained.state_dict().items()}
    trained.process_state_dict_for_saving_inference(state)
    sae = TopKSAE.from_dict(trained.cfg.get_inference_sae_cfg_dict())
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False)

"""The published procedures, written from the formulas of the papers and in no way made fast.

Each says which formula it is, and computes what `darkmatter` computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from darkmatter.activations import Tokens
from darkmatter.models import Model


def least_squares(x: Tensor, y: Tensor) -> Tensor:
    """argmin over W of |y - [x, 1] W|^2 by QR of all rows: [d + 1, width of y].

    Engels, Smith and Tegmark 2025: one torch.linalg.lstsq for each SAE and each target, in float32.
    """
    design = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    return torch.linalg.lstsq(design, y, driver="gels").solution


def gradient_pursuit(x: Tensor, atoms: Tensor, l0: Tensor, batch: int = 256) -> Tensor:
    """Non-negative gradient pursuit (Blumensath and Davies 2008; Smith 2024) with dense weights.

    Residual, correlations and g D are three products with the dictionary in every step; weights,
    mask and gradient are [batch, m]; a token takes the weights at its own step.
    """
    parts: list[Tensor] = []
    for signal, steps in zip(x.split(batch), l0.split(batch), strict=True):
        weights = signal.new_zeros(len(signal), len(atoms))
        final = torch.zeros_like(weights)
        rows = torch.arange(len(signal), device=signal.device)
        last, steps = int(steps.max()), steps.to(signal.device)
        for step in range(last):
            residual = signal - weights @ atoms
            correlation = residual @ atoms.T
            active = weights != 0
            active[rows, correlation.argmax(1)] = True
            gradient = correlation * active
            along = gradient @ atoms
            length = (along * residual).sum(1) / along.square().sum(1)
            weights = (weights + length[:, None] * gradient).clamp(min=0)
            final = torch.where((steps > step)[:, None], weights, final)
        parts.append(final)
    return torch.cat(parts)


def neighbour_cosines(directions: Tensor, ranks: Sequence[int], rows: int = 100) -> Tensor:
    """Cosine with the k-th nearest other direction [m, ranks]: cosines of 100 rows, then top-k."""
    units = directions / directions.norm(dim=1, keepdim=True)
    found: list[Tensor] = []
    for start in range(0, len(units), rows):
        cosines = units[start : start + rows] @ units.T
        own = torch.arange(len(cosines), device=units.device)
        cosines[own, start + own] = -torch.inf
        top = cosines.topk(max(ranks), dim=1).values
        found.append(top[:, [rank - 1 for rank in ranks]])
    return torch.cat(found)


def per_token_scaling(fit: Tensor, test: Tensor, helper: Sequence[int]) -> tuple[Tensor, Tensor]:
    """R2 on `test` of norm j from [norm i, 1] and from [norm i, helper i, 1], fitted on `fit`.

    Columns are the norms of w SAEs, then those of their helpers; w^2 pairs, two calls of lstsq
    each. Engels, Smith and Tegmark 2024 (version 1).
    """
    width = len(helper)
    alone, together = torch.zeros(2, width, width, dtype=fit.dtype)
    for i in range(width):
        for j in range(width):
            for into, columns in ((alone, [i]), (together, [i, helper[i]])):
                design = torch.cat([fit[:, columns], fit.new_ones(len(fit), 1)], 1)
                weight = torch.linalg.lstsq(design, fit[:, j : j + 1], driver="gels").solution
                design = torch.cat([test[:, columns], test.new_ones(len(test), 1)], 1)
                y = test[:, j]
                rss = (y - (design @ weight)[:, 0]).square().sum()
                into[i, j] = 1 - rss / (y - y.mean()).square().sum()
    return alone, together


def power_law(width: Sequence[float], fvu: Sequence[float], steps: int) -> float:
    """RSS of floor + scale * width^-exponent after `steps` of Adam on the three (paper: 50,000)."""
    x, y = torch.tensor(width, dtype=torch.float64), torch.tensor(fvu, dtype=torch.float64)
    parameters = torch.tensor([0.1, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([parameters], lr=1e-2)
    for _ in range(steps):
        floor, scale, exponent = parameters
        loss = (floor + scale * x**-exponent - y).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return float(loss.detach())


@torch.no_grad()
def splice(
    model: Model,
    tokens: Tokens,
    hook: str,
    variants: Mapping[str, Callable[[Tensor], Tensor]],
    skip: int,
    batch: int = 8,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Cross entropy and KL of every token by variant, each by a full forward of the model."""
    found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in variants}
    positions = slice(skip, tokens.tokens.shape[1] - 1)
    for ids in tokens.tokens.split(batch):
        log_p = model.logits(ids)[:, positions].log_softmax(-1)
        target = ids[:, skip + 1 :, None].to(log_p.device)
        for name, variant in variants.items():

            def put(x: Tensor, variant: Callable[[Tensor], Tensor] = variant) -> Tensor:
                x[:, positions] = variant(x[:, positions].flatten(0, 1)).view_as(x[:, positions])
                return x

            log_q = model.logits(ids, {hook: put})[:, positions].log_softmax(-1)
            loss = -log_q.gather(-1, target)[..., 0]
            kl = (log_p.exp() * (log_p - log_q)).sum(-1)
            found[name].append((loss.flatten(), kl.flatten()))
    return {
        name: (torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]))
        for name, parts in found.items()
    }


@torch.no_grad()
def curves(
    model: Model, hook: str, tokens: Tensor, paths: Tensor, with_kl: bool
) -> dict[str, Tensor]:
    """L2 (and KL) of the model's end from the first point of a path, by forwards of whole prompts.

    One path at a time, all its points a batch.
    """
    final = f"blocks.{model.n_layer - 1}.hook_resid_post"
    found: dict[str, list[Tensor]] = {"l2": [], "kl": []}
    for prompt, of_prompt in zip(tokens, paths, strict=True):
        for path in of_prompt:
            seen: list[Tensor] = []

            def put(x: Tensor, path: Tensor = path) -> Tensor:
                x[:, -1] = path
                return x

            def keep(x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                seen.append(x[:, -1])
                return x

            logits = model.logits(prompt.expand(len(path), -1), {hook: put, final: keep})
            found["l2"].append((seen[0] - seen[0][:1]).norm(dim=1))
            if with_kl:
                log_q = logits[:, -1].log_softmax(-1)
                found["kl"].append((log_q[:1].exp() * (log_q[:1] - log_q)).sum(-1))
    shape = paths.shape[:3]
    return {name: torch.stack(parts).reshape(shape) for name, parts in found.items() if parts}


def forward(model: Model, tokens: Tensor, batch: int) -> Any:
    """The bare forward: transformers' own network on the same batches, logits and nothing else."""
    network = model._network  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        for ids in tokens.split(batch):
            network(ids.to(model.device), use_cache=False)

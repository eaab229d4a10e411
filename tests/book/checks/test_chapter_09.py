"""Typical wrong answers to the exercises of chapter 09 meet the words that help."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.book.checks.common import refused


def test_shares_recovered() -> None:
    refused("09.1", lambda o, s, v: ((s - v) / (s - o)).mean(), "mean of the shares of single")
    refused("09.1", lambda o, s, v: (v - o).sum() / (s - o).sum(), "share of the harm that stays")
    refused("09.1", lambda o, s, v: (v - s).sum() / (s - o).sum(), "sign is wrong")
    refused("09.1", lambda o, s, v: (s - v).sum() / s.sum(), "Below the line")
    refused("09.1", lambda o, s, v: s - v, "one number for all tokens")
    refused("09.1", lambda o, s, v: 0.5, "CE of the SAE less CE of the variant")


def kl(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def test_kl_from_logits() -> None:
    refused("09.2", lambda p, q: kl(q, p), "weights must be the original's")
    refused("09.2", lambda p, q: kl(p, q) / torch.tensor(2.0).double().log(), "in bits")
    refused("09.2", lambda p, q: kl(p, q) / p.shape[1], "averaged over the vocabulary")
    refused("09.2", lambda p, q: -kl(p, q), "never below zero")
    refused("09.2", lambda p, q: kl(p, q).mean(), "one KL for each row")
    unsafe = refused_softmax
    refused("09.2", unsafe, "log_softmax rather than")


def refused_softmax(p: Tensor, q: Tensor) -> Tensor:
    a, b = p.softmax(-1), q.softmax(-1)
    return (a * (a.log() - b.log())).sum(-1)


def mixed(x: Tensor, x_hat: Tensor, noise: Tensor, orthogonal: bool, unit_noise: bool) -> Tensor:
    unit = x / x.norm(dim=1, keepdim=True)
    cosine = torch.cosine_similarity(x, x_hat)[:, None]
    if orthogonal:
        noise = noise - (noise * unit).sum(1, keepdim=True) * unit
    if unit_noise:
        noise = noise / noise.norm(dim=1, keepdim=True)
    return cosine * unit + (1 - cosine**2).sqrt() * noise


def brought_to(length: Tensor, rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True) * length[:, None]


def test_noise_at_the_same_angle() -> None:
    refused("09.3", lambda x, h, n: h, "x_hat itself")
    refused("09.3", lambda x, h, n: n[0], "one vector for each row")
    refused("09.3", lambda x, h, n: brought_to(x.norm(dim=1), n), "have the length of x")
    refused("09.3", lambda x, h, n: mixed(x, h, n, True, True), "The length is not that of x_hat")
    refused(
        "09.3",
        lambda x, h, n: brought_to(h.norm(dim=1), mixed(x, h, n, False, True)),
        "part of the noise along x away",
    )
    refused(
        "09.3",
        lambda x, h, n: h.norm(dim=1, keepdim=True) * mixed(x, h, -n, True, True),
        "direction must be that of the noise",
    )


def test_moved_labels() -> None:
    refused("09.4", lambda listed, labels: labels, "every bar would be right")
    refused(
        "09.4",
        lambda listed, labels: [listed[sorted(listed).index(label)] for label in labels],
        "two lists are swapped",
    )
    refused("09.4", lambda listed, labels: labels[:2], "one L0 for each label")


def test_catching_moved_labels() -> None:
    refused("09.5", lambda l0, v, labels, values: v in values, "Rounding is no contradiction")
    refused("09.5", lambda l0, v, labels, values: False, "right here")
    refused(
        "09.5",
        lambda l0, v, labels, values: min(abs(w - v) for w in values) < 1e-6,
        "compare it with the value over its own label",
    )


def other_tokens_mixed(original: Tensor, target: Tensor) -> Tensor:
    others = torch.ones_like(original, dtype=torch.bool).scatter(1, target[:, None], False)
    log_p = original.log_softmax(-1)
    rest = log_p[others].view(len(log_p), -1)
    mixed = log_p.clone()
    level = rest.logsumexp(1, keepdim=True) - torch.tensor(float(rest.shape[1])).log()
    mixed[others] = (0.9 * rest + 0.1 * level).flatten()
    lost = mixed[others].view(len(log_p), -1).logsumexp(1) - rest.logsumexp(1)
    mixed[others] -= lost.repeat_interleave(rest.shape[1])
    return mixed


def test_same_cost_but_another_prediction() -> None:
    refused("09.6", lambda o, t: o, "Those are the original's predictions")
    refused("09.6", lambda o, t: o + 7, "Move probability between tokens")
    refused("09.6", lambda o, t: o.roll(1, 1), "the token that came must keep its probability")
    refused("09.6", other_tokens_mixed, "deal the probabilities of all the tokens")
    refused("09.6", lambda o, t: torch.full_like(o, -torch.inf).index_fill(1, t[:1], 0.0), "finite")
    refused("09.6", lambda o, t: o[0], "logits of the shape")

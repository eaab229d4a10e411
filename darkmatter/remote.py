"""The two passes of a survey where the model is: only sums over tokens come back.

    fit_pass, score_part:   as in `passes`, for a model with `Model.remote`

A request is a session of nnsight. It sends tokens and the weights of the SAEs and runs the model on
some batches of contexts, there. What comes back is moments, totals of documents, which latents were
active, and a few numbers a token (losses, KL, L0, squared norms); never an activation of a token.

On NDIF (`open_model(name, backend="nnsight", remote=True)`) this needs a key in NDIF_API_KEY. The
tests run requests as NDIF would, from what was serialised and without darkmatter, but on their own
machine: NDIF itself was never called. nnsight unpickles what NDIF answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens, measured
from darkmatter.leastsquares import LinearStatistics
from darkmatter.passes import BATCH

if TYPE_CHECKING:
    from darkmatter.models import Model
    from darkmatter.passes import FitState, Fitted, Work

# Tokens of a request, where nothing else is asked for. Whatever their number, it sends the weights
# of the SAEs and brings back moments: for 16k latents on Gemma-2-2B 0.4 GB, where the activations
# of these tokens are 2.4 GB.
TOKENS = 1 << 18
_KEY = "NDIF_API_KEY"
# As in `passes`.
_CODES_AT_A_TIME = 1 << 26


def api_key() -> str:
    """The key of the environment. Raises Refusal when there is none."""
    key = os.environ.get(_KEY, "")
    if not key:
        raise Refusal(
            f"There is no {_KEY} in the environment, expected the key that NDIF gives its users; "
            "get one at https://login.ndif.us and set it, or open the model without remote."
        )
    return key


def recipe(name: str, sae: Any) -> dict[str, Any]:
    """What an SAE computes, as tensors and plain values that can be sent.

    Raises Refusal, naming it, for another kind than those that `_request` knows.
    """
    from sae_lens import GatedSAE, JumpReLUSAE, StandardSAE, TopKSAE

    from darkmatter.suites.processing import OnRawActivations, Processing

    processing, own = Processing(), int(sae.cfg.d_sae)
    if isinstance(sae, OnRawActivations):
        processing, sae = sae.processing, sae.sae
    kinds = {
        StandardSAE: ("standard", ("b_enc",)),
        TopKSAE: ("topk", ("b_enc",)),
        JumpReLUSAE: ("jumprelu", ("b_enc", "threshold")),
        GatedSAE: ("gated", ("b_gate", "b_mag", "r_mag")),
    }
    if type(sae) not in kinds:
        raise Refusal(
            f"{name!r} is a {type(sae).__name__}, expected one of sae-lens' "
            f"{', '.join(kind.__name__ for kind in kinds)}, which can be computed where the model "
            "runs; survey it with a model that is opened here (without remote)."
        )
    kind, weights = kinds[type(sae)]
    norms = sae.W_dec.detach().norm(dim=-1)
    if not getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        norms = torch.ones_like(norms)
    tensors = {key: getattr(sae, key).detach().cpu() for key in ("W_enc", "b_dec", *weights)}
    return {
        **tensors,
        "name": name,
        "kind": kind,
        "k": int(getattr(sae.cfg, "k", 0)),
        "norms": norms.cpu(),
        "directions": (sae.W_dec.detach() / norms[:, None]).cpu(),
        "b_in": tensors["b_dec"] * bool(sae.cfg.apply_b_dec_to_input),
        "latents": own,
        "centred": processing.centred,
        "scale": processing.scale,
        "normalisation": sae.cfg.normalize_activations,
    }


def fit_pass(
    work: Work,
    share: range,
    state: FitState,
    save: Callable[[FitState], None],
    tick: Callable[[int], None],
) -> None:
    """`passes.fit_pass`, a part a request."""
    for i, hooks, begin in state.rounds(work, share, save):
        saes = {
            hook: [recipe(name, work.saes[name]) for name in names] for hook, names in hooks.items()
        }
        for part in work.parts(work.fit, share):
            if part.start < begin:
                continue
            found = _asked(work, work.fit, part, saes)
            for hook, names in hooks.items():
                prefix = f"moments/{hook}/"
                moments = {
                    key.removeprefix(prefix): tensor
                    for key, tensor in found.items()
                    if key.startswith(prefix)
                }
                if moments:
                    state.statistics[i, hook].merge(LinearStatistics.from_tensors(moments))
                    for name in names:
                        state.active[name] = state.active[name].cpu() | found[f"{name}/active"]
            tick(int(_counted(work, work.fit, part).sum()))
            if part.stop < share.stop:
                state.position = (i, part.stop)
                save(state)


def score_part(
    work: Work,
    fitted: Mapping[str, Fitted],
    saes: Mapping[str, Any],
    part: range,
    tick: Callable[[int], None],
) -> dict[str, Tensor]:
    """`passes.score_part`, in one request."""
    recipes: dict[str, list[dict[str, Any]]] = {}
    for name, sae in saes.items():
        one = fitted[name]
        maps = {
            "weight": one.error_map.weight,
            "bias": one.error_map.bias,
            "norm_weight": one.norm_map.weight,
            "norm_bias": one.norm_map.bias,
            "slope": one.scalar[0],
            "constant": one.scalar[1],
        }
        sent = {**recipe(name, sae), **{key: tensor.cpu() for key, tensor in maps.items()}}
        recipes.setdefault(work.about[name].hook, []).append(sent)
    found = _asked(work, work.test, part, recipes)
    documents = work.test.document[part.start : part.stop].unique()
    if not found:
        return {"documents": documents[:0]}
    context, position = _counted(work, work.test, part).nonzero(as_tuple=True)
    context = context + part.start
    totals = ("/sum", "/downstream")
    present = found[f"x/{next(iter(recipes))}"][:, 0] > 0
    tick(len(context))
    return {
        "document": work.test.document[context],
        "context": context,
        "position": position,
        "token": work.test.tokens[context, position],
        **{
            key: tensor[present] if key.startswith("x/") or key.endswith(totals) else tensor
            for key, tensor in found.items()
        },
        "documents": documents[present],
    }


def _counted(work: Work, tokens: Tokens, part: range) -> Tensor:
    return measured(tokens.tokens[part.start : part.stop], work.skip, work.special)


def _asked(
    work: Work, tokens: Tokens, part: range, saes: Mapping[str, list[dict[str, Any]]]
) -> dict[str, Tensor]:
    """The answer to a request about some contexts, checked; empty where no token counts."""
    counts = _counted(work, tokens, part)
    if not counts.any():
        return {}
    document = tokens.document[part.start : part.stop]
    slots = torch.searchsorted(document.unique(), document)
    model = work.model
    try:
        ids = tokens.tokens[part.start : part.stop]
        found = _request(model, ids, counts, slots, dict(saes), work.downstream)
    except Exception as error:
        if model.remote is not True:
            raise
        # Whatever the transport or the server raises, of whichever library.
        lines = str(error).strip().splitlines() or [type(error).__name__]
        told = lines[-1].replace(api_key(), "(key)")
        raise Refusal(
            f"NDIF did not answer a request of {model.name} ({told}); see https://nnsight.net/status"
            " for the models that run there, and go on with resume=True."
        ) from None
    for key, tensor in found.items():
        if not tensor.isfinite().all():
            raise Refusal(
                f"{key} of contexts {part.start} to {part.stop - 1} is NaN or infinite; leave the "
                f"documents out where {model.name} overflows."
            )
    return found


def _backend(model: Model) -> Any:
    """What runs a session of nnsight: NDIF, or None for this process."""
    if model.remote is not True:
        return None
    from nnsight.intervention.backends.remote import RemoteBackend

    underlying = model.underlying
    return RemoteBackend(
        underlying.to_model_key(),
        env=underlying._remoteable_get_env(),  # pyright: ignore[reportPrivateUsage]
        api_key=api_key(),
    )


def _request(
    model: Any,
    tokens: Tensor,
    counts: Tensor,
    slots: Tensor,
    saes: dict[str, list[dict[str, Any]]],
    downstream: bool,
) -> dict[str, Tensor]:
    """Run the model on contexts [c, p] where it is; sums over the tokens that count [c, p].

    `saes`: recipes by hook, with the maps of the first pass for the second. `slots` [c]: the row of
    a context's document in totals.
    """
    from nnsight import save

    envoy, batch, codes = model.underlying, BATCH, _CODES_AT_A_TIME
    sites: list[Any] = model.sites(saes)
    rejoins: dict[str, Any] = {hook: model.rejoins(hook) for hook in saes}
    scored = any("weight" in one for several in saes.values() for one in several)
    answer: dict[str, Tensor] = {}
    # The body is sent as source, with the values of the names in it, to a server that has torch and
    # no darkmatter, where functions of an installed package go by name only: so it is written out
    # here and calls nothing of ours, although `passes` and `splicing` have the same steps. No name
    # in it but torch is one of this module's, which would be sent along.
    with envoy.session(backend=_backend(model)):
        sums, rows, moments, active = {}, {}, {}, {}
        for first in range(0, len(tokens), batch):
            ids = tokens[first : first + batch]
            row, position = counts[first : first + batch].nonzero(as_tuple=True)
            if len(row) == 0:
                continue
            found, clean = {}, []
            with torch.no_grad(), envoy.trace(ids, use_cache=False) as tracer:
                for hook, module, side in sites:
                    whole = module.input if side == "input" else module.output
                    found[hook] = (whole[0] if isinstance(whole, tuple) else whole).detach()
                if not scored:
                    tracer.stop()
                clean.append(envoy.output.logits.detach())
            if scored:
                # Context by context: log-probabilities of a batch can be larger than the model.
                losses = [
                    torch.nn.functional.cross_entropy(
                        one[:-1].float(), target[1:].to(one.device), reduction="none"
                    )
                    for one, target in zip(clean[0], ids, strict=True)
                ]
                rows.setdefault("loss", []).append(torch.stack(losses).cpu()[row, position])
            for hook in saes:
                device = found[hook].device
                at_rows = row.to(device), position.to(device)
                x = found[hook][at_rows]
                # Weights are moved once: this does nothing when they are there.
                saes[hook] = [
                    {
                        key: value.to(device) if isinstance(value, torch.Tensor) else value
                        for key, value in one.items()
                    }
                    for one in saes[hook]
                ]
                wide = x.double()
                x_norm2 = wide.square().sum(1, keepdim=True)
                # A product, since index_add_ on a GPU adds in any order.
                documents = torch.nn.functional.one_hot(slots[first + row], int(slots.max()) + 1)
                documents = documents.to(wide).T
                if scored:
                    total = documents @ torch.cat([torch.ones_like(x_norm2), x_norm2, wide], 1)
                    sums[f"x/{hook}"] = sums.get(f"x/{hook}", 0) + total
                errors, norms = [], []
                for one in saes[hook]:
                    name, parts = one["name"], []
                    l0s = []
                    used = active.setdefault(
                        name, torch.zeros(one["latents"], dtype=torch.bool, device=device)
                    )
                    for some in x.split(max(1, codes // one["latents"])):
                        # As suites.processing and sae-lens do it: to what the SAE reads ...
                        y = some.to(one["W_enc"].dtype)
                        mean = y.mean(-1, keepdim=True) if one["centred"] else 0
                        y = (y - mean) * one["scale"]
                        shift, unit = 0, 1
                        if one["normalisation"] == "layer_norm":
                            shift = y.mean(-1, keepdim=True)
                            unit = (y - shift).std(-1, keepdim=True)
                            y = (y - shift) / (unit + 1e-5)
                        elif one["normalisation"] == "constant_norm_rescale":
                            unit = y.norm(dim=-1, keepdim=True) / y.shape[1] ** 0.5
                            y = y / unit
                        # ... its code ...
                        pre = (y - one["b_in"]) @ one["W_enc"]
                        if one["kind"] == "gated":
                            code = (pre * one["r_mag"].exp() + one["b_mag"]).relu()
                            code = code * (pre + one["b_gate"] > 0)
                        elif one["kind"] == "topk":
                            pre = (pre + one["b_enc"]) * one["norms"]
                            top, latent = pre.topk(one["k"], dim=-1)
                            code = torch.zeros_like(pre).scatter(-1, latent, top.relu())
                        elif one["kind"] == "jumprelu":
                            pre = pre + one["b_enc"]
                            code = pre * (pre > one["threshold"].clamp(min=0))
                        else:
                            code = (pre + one["b_enc"]).relu()
                        # ... and back.
                        y_hat = (code @ one["directions"] + one["b_dec"]) * unit + shift
                        parts.append(y_hat / one["scale"] + mean)
                        l0s.append((code != 0).sum(1))
                        used[: code.shape[1]] |= (code != 0).any(0)
                    x_hat, l0 = torch.cat(parts), torch.cat(l0s)
                    if not scored:
                        errors.append((x - x_hat).double())
                        norms.append(errors[-1].square().sum(1, keepdim=True))
                        continue
                    error = wide - x_hat
                    linear = wide @ one["weight"] + one["bias"]
                    nonlinear = error - linear
                    norm2 = error.square().sum(1, keepdim=True)
                    predicted = wide @ one["norm_weight"] + one["norm_bias"]
                    off = error - (one["slope"] * wide + one["constant"])
                    nonlinear_norm2 = nonlinear.square().sum(1, keepdim=True)
                    columns = [norm2, nonlinear_norm2]
                    columns += [(norm2 - predicted).square(), norm2.square(), norm2]
                    columns += [l0[:, None].double()]
                    columns += [nonlinear.square(), error.square(), error, off.square()]
                    total = documents @ torch.cat(columns, 1)
                    sums[f"{name}/sum"] = sums.get(f"{name}/sum", 0) + total
                    for key, value in {
                        "l0": l0,
                        "x_norm2": x_norm2[:, 0],
                        "error_norm2": norm2[:, 0],
                        "linear_norm2": linear.square().sum(1),
                        "nonlinear_norm2": nonlinear_norm2[:, 0],
                        "predicted_norm2": predicted[:, 0],
                    }.items():
                        rows.setdefault(f"{name}/row/{key}", []).append(value.cpu())
                    if not downstream:
                        continue
                    given = linear.to(x_hat.dtype)
                    entropies, divergences = [rows["loss"][-1]], []
                    for new in (x_hat, x_hat + given, x - given):
                        put = found[hook].clone()
                        put[at_rows] = new.to(put.dtype)
                        spliced = []
                        with torch.no_grad(), envoy.trace(ids, use_cache=False):
                            for where, module, side in sites:
                                if where == hook:
                                    whole = module.input if side == "input" else module.output
                                    several = isinstance(whole, tuple)
                                    other = (put, *whole[1:]) if several else put
                                    if side == "input":
                                        module.input = other
                                    else:
                                        module.output = other
                            if rejoins[hook] is not None:
                                # The stream passes beside the norm before the MLP.
                                whole = rejoins[hook].output
                                several = isinstance(whole, tuple)
                                other = (whole[0] if several else whole) + (put - found[hook])
                                rejoins[hook].output = (other, *whole[1:]) if several else other
                            spliced.append(envoy.output.logits.detach())
                        entropy, divergence = [], []
                        for one_clean, one_new, target in zip(
                            clean[0], spliced[0], ids, strict=True
                        ):
                            log_p = one_clean[:-1].float().log_softmax(-1)
                            log_q = one_new[:-1].float().log_softmax(-1)
                            divergence.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
                            told = target[1:, None].to(log_q.device)
                            entropy.append(-log_q.gather(1, told)[:, 0])
                        entropies.append(torch.stack(entropy).cpu()[row, position])
                        divergences.append(torch.stack(divergence).cpu()[row, position])
                    columns = torch.stack([*entropies, *divergences], 1).double()
                    total = documents.cpu() @ columns
                    key = f"{name}/downstream"
                    sums[key] = sums.get(key, 0) + total
                    rows.setdefault(f"{name}/row/cross_entropy", []).append(entropies[1])
                    rows.setdefault(f"{name}/row/kl", []).append(divergences[0])
                if not scored:
                    # Each batch about its own mean, joined as LinearStatistics joins them.
                    targets = torch.cat([*errors, *norms, x_norm2], 1)
                    mean_x, mean_y = wide.mean(0), targets.mean(0)
                    centred_x, centred_y = wide - mean_x, targets - mean_y
                    new = {
                        "n": torch.tensor(len(wide)),
                        "mean_x": mean_x,
                        "mean_y": mean_y,
                        "sxx": centred_x.T @ centred_x,
                        "sxy": centred_x.T @ centred_y,
                        "syy": centred_y.square().sum(0),
                    }
                    old = moments.setdefault(hook, {})
                    if old:
                        total = old["n"] + new["n"]
                        share = (new["n"] / total.double()).item()
                        between = old["n"].item() * share
                        delta_x = mean_x - old["mean_x"]
                        delta_y = mean_y - old["mean_y"]
                        new["sxx"] += old["sxx"] + between * torch.outer(delta_x, delta_x)
                        new["sxy"] += old["sxy"] + between * torch.outer(delta_x, delta_y)
                        new["syy"] += old["syy"] + between * delta_y.square()
                        new["mean_x"] = old["mean_x"] + share * delta_x
                        new["mean_y"] = old["mean_y"] + share * delta_y
                        new["n"] = total
                    old.update(new)
        answer = {key: torch.cat(values) for key, values in rows.items()}
        answer.update({key: value.cpu() for key, value in sums.items()})
        for hook, several in moments.items():
            answer.update({f"moments/{hook}/{key}": value.cpu() for key, value in several.items()})
        answer.update({f"{name}/active": used.cpu() for name, used in active.items()})
        save(answer)
    return answer

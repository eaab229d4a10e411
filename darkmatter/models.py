"""Open a language model, read its activations, put others in their place.

One interface, two backends that must agree: `TransformerBridge` of transformer-lens and
`TransformersModel` of nnsight, both on the weights as transformers loads them (nothing folded,
nothing centred, eager attention). Hook points have transformer-lens' names:

    blocks.{L}.hook_resid_pre     the residual stream as block L gets it        [b, p, d_model]
    blocks.{L}.attn.hook_z        the heads, before their output matrix [b, p, heads * d_head]
    blocks.{L}.hook_resid_mid     the residual stream between attention and MLP [b, p, d_model]
    blocks.{L}.hook_mlp_out       what the MLP adds to the residual stream      [b, p, d_model]
    blocks.{L}.hook_resid_post    the residual stream as block L leaves it      [b, p, d_model]

resid_post = resid_mid + mlp_out, and stays so when either is replaced.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from darkmatter._hub import locate, locate_without_weights
from darkmatter._refusal import Refusal

Backend = Literal["bridge", "nnsight"]
Remote = bool | Literal["local"]
Replacement = Callable[[Tensor], Tensor]
"""Maps activations [b, p, d] of a hook to what goes on in their place, of the same shape."""

RESID_PRE, Z, RESID_MID = "hook_resid_pre", "attn.hook_z", "hook_resid_mid"
MLP_OUT, RESID_POST = "hook_mlp_out", "hook_resid_post"
_STAGES = (RESID_PRE, Z, RESID_MID, MLP_OUT, RESID_POST)
_BACKENDS = ("bridge", "nnsight")

# The opening check. Activations: |backend - transformers| / |transformers - mean|, which in
# float32 is about 1e-6 after tens of blocks; 1e-4 moves an FVU by 1e-8, far below any that is
# reported. Half precision rounds by 1e-3 (float16) and 8e-3 (bfloat16) at every operation.
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 6e-2,
}
# Log-probabilities are of order 10 nats, so the same relative error is ten times larger.
_NATS_PER_TOLERANCE = 10.0
_CHECK_CONTEXTS, _CHECK_POSITIONS = 4, 32


class BackendDisagreement(Refusal):
    """A backend does not compute what plain transformers computes from the same weights.

    `hook` where they differ, `size` of the difference and the `tolerance` it exceeds.
    """

    def __init__(self, model: str, backend: str, hook: str, size: float, tolerance: float) -> None:
        super().__init__(
            f"{backend} and transformers disagree on {model} at {hook} by {size:.3g}, expected at "
            f"most {tolerance:.3g}; use the other backend or the locked versions of the libraries "
            "(check=False opens the model all the same)."
        )
        self.hook, self.size, self.tolerance = hook, size, tolerance


class Model(ABC):
    """An open language model. Made by `open_model`; every method runs without gradients.

    `name` as given, `backend`, `d_model`, `n_layer`, `n_context` (longest context), `vocabulary`
    (number of token ids), `hooks` (every hook point that can be read and replaced), `device`,
    `dtype`, and `underlying`, the TransformerBridge or nnsight object itself. `remote`: see
    `open_model`; `checkpoint`: name and revision on the hub of one that runs elsewhere.
    """

    backend: Backend
    remote: Remote = False
    checkpoint: str = ""
    underlying: Any
    hooks: tuple[str, ...]

    def __init__(self, name: str, folder: Path, network: Any) -> None:
        config = network.config.get_text_config()
        self.name, self._folder = name, folder
        self.d_model = int(config.hidden_size)
        self.n_layer = int(config.num_hidden_layers)
        self.n_context = _longest_context(config)
        self.vocabulary = int(config.vocab_size)
        heads = int(config.num_attention_heads)
        self._d_heads = heads * int(getattr(config, "head_dim", None) or self.d_model // heads)
        self.device = torch.device(network.device)
        self.dtype: torch.dtype = network.dtype
        self._network = network

    def __repr__(self) -> str:
        return (
            f"Model({self.name!r}, backend={self.backend!r}, d_model={self.d_model}, "
            f"n_layer={self.n_layer}, n_context={self.n_context}, vocabulary={self.vocabulary})"
        )

    @property
    def network(self) -> Any:
        """The transformers model, as its backend holds it."""
        return self._network

    @cached_property
    def tokenizer(self) -> Any:
        """The model's own tokenizer (transformers). It adds no tokens: pass ids everywhere."""
        return load_tokenizer(self._folder)

    def width(self, hook: str) -> int:
        """Width of the activations at a hook. Raises Refusal, with what exists, if unknown."""
        if hook not in self.hooks:
            stages = [stage for stage in _STAGES if f"blocks.0.{stage}" in self.hooks]
            raise Refusal(
                f"{self.name} has no hook {hook!r}; it has blocks.L.S with L from 0 to "
                f"{self.n_layer - 1} and S one of {', '.join(stages)}."
            )
        return self._d_heads if hook.endswith(Z) else self.d_model

    @overload
    def activations(self, tokens: Int[Tensor, "b p"], hook: str) -> Float[Tensor, "b p d"]: ...
    @overload
    def activations(
        self, tokens: Int[Tensor, "b p"], hook: list[str] | tuple[str, ...]
    ) -> dict[str, Tensor]: ...
    def activations(
        self, tokens: Int[Tensor, "b p"], hook: str | list[str] | tuple[str, ...]
    ) -> Float[Tensor, "b p d"] | dict[str, Tensor]:
        """Activations at a hook, or a dict of them at several; nothing beyond the last is run."""
        hooks = (hook,) if isinstance(hook, str) else tuple(hook)
        if not hooks:
            raise Refusal("No hook was asked for; name at least one.")
        found, _ = self._run(tokens, hooks, {}, with_logits=False)
        return found[hook] if isinstance(hook, str) else found

    def logits(
        self, tokens: Int[Tensor, "b p"], replace: Mapping[str, Replacement] | None = None
    ) -> Float[Tensor, "b p v"]:
        """Logits of every next token, with activations replaced at any number of hooks."""
        return self._logits(tokens, (), replace)[1]

    def loss(
        self, tokens: Int[Tensor, "b p"], replace: Mapping[str, Replacement] | None = None
    ) -> Float[Tensor, "b q"]:
        """Cross entropy in nats, float32: loss[i, j] of predicting token j + 1 of context i.

        [b, p - 1]. `replace` maps hooks to functions of the activations [b, p, d]; when several are
        given, the later ones see what the earlier ones changed. Raises Refusal when a function
        returns another shape.
        """
        return self.read(tokens, (), replace)[1]

    def read(
        self,
        tokens: Int[Tensor, "b p"],
        hooks: Sequence[str],
        replace: Mapping[str, Replacement] | None = None,
    ) -> tuple[dict[str, Tensor], Float[Tensor, "b q"]]:
        """Activations at `hooks` and the loss [b, p - 1] in nats, both from one forward.

        At a hook that is also replaced, the activations are those that were put there.
        """
        if tokens.ndim == 2 and tokens.shape[1] < 2:
            raise Refusal(
                f"Contexts have {tokens.shape[1]} tokens, expected 2 or more: the loss of a "
                "position is that of its next token."
            )
        found, logits = self._logits(tokens, hooks, replace)
        target = tokens.to(self.device).long()
        # One context at a time: log-probabilities of a whole batch can be larger than the model.
        rows = [
            nn.functional.cross_entropy(row[:-1].float(), ids[1:], reduction="none")
            for row, ids in zip(logits, target, strict=True)
        ]
        return found, torch.stack(rows)

    def resumes_at(self, hook: str) -> bool:
        """Whether `resume` goes on from this hook: resid_post of a block, resid_pre of a later one.

        Raises Refusal for an unknown hook.
        """
        self.width(hook)
        return self._last_skipped(hook) is not None and _blocks_of(self._network) is not None

    @torch.no_grad()
    def resume(
        self,
        tokens: Int[Tensor, "b p"],
        hook: str,
        x: Float[Tensor, "b p d"],
        positions: slice = slice(None),
    ) -> Float[Tensor, "b q v"]:
        """Logits at `positions` when x stands at `hook`; only the blocks after it are run.

        Equal to logits(tokens, {hook: lambda _: x})[:, positions] to the rounding of the library.
        Where the model takes the positions itself (logits_to_keep), no others are unembedded.
        Raises Refusal for a hook other than those of `resumes_at`, or x not [b, p, d_model].
        """
        blocks = _blocks_of(self._network)
        if not self.resumes_at(hook) or blocks is None:
            raise Refusal(
                f"{self.name} cannot go on from {hook!r}, expected a residual stream after the "
                "first block (blocks.L.hook_resid_post); use logits(tokens, replace={hook: f})."
            )
        self._check_tokens(tokens)
        if x.shape != (*tokens.shape, self.d_model):
            raise Refusal(
                f"x has shape {tuple(x.shape)}, expected {(*tokens.shape, self.d_model)}, the "
                "residual stream of every token; put activations of all positions there."
            )
        x = x.detach().to(self.device, self.dtype)
        last = self._last_skipped(hook)
        assert last is not None
        known = "logits_to_keep" in inspect.signature(self._network.forward).parameters
        kept = torch.arange(tokens.shape[1], device=self.device)[positions]
        more = {"logits_to_keep": kept} if known else {}
        with _returning(blocks[: last + 1], (x, None) if self._blocks_give_tuples else x):
            output = self._network(tokens.to(self.device).long(), use_cache=False, **more)
        return output.logits if known else output.logits[:, kept]

    def last_position(
        self,
        tokens: Int[Tensor, "b p"],
        hook: str,
        read: Sequence[str] = (),
        with_logits: bool = True,
        cached: bool = True,
    ) -> LastPosition:
        """What the model makes of other activations at the last position of some prompts.

            run = model.last_position(tokens, hook, read)
            found, logits = run(x, prompt)          # x [n, d], prompt [n]: rows of tokens

        Row i stands at `hook` at the last position of prompt[i]. found[h] [n, width] at every hook
        of `read`, all after `hook`; logits [n, v], or None without them. Attention looks back, so
        the other positions stay as they are: with `cached` their keys and values are kept and only
        the last position is run, in the blocks that are left. Where this is not supported (another
        hook than a residual one, or a model whose first answers differ from full forwards), whole
        prompts are run. `run.cached` tells which. Raises Refusal for unknown hooks, or for one of
        `read` that does not come after `hook`.
        """
        late = [name for name in read if self._place(name) <= self._place(hook)]
        if late:
            raise Refusal(
                f"{late[0]!r} cannot be read when {hook!r} is replaced, expected hooks that come "
                "after it; read a later one."
            )
        self._check_tokens(tokens)
        tokens = tokens.to(self.device).long()
        whole = _WholePrompts(self, tokens, hook, tuple(read), with_logits)
        if cached and _LastAlone.supports(self, hook, read):
            alone = _LastAlone(self, tokens, hook, tuple(read), with_logits)
            # Any cache of another kind, or mask that counts otherwise, shows here.
            x = self.activations(tokens[:1], hook)[:, -1]
            first = tokens.new_zeros(1)
            if alone.usable and _agree(alone(x, first), whole(x, first), self.dtype):
                return alone
        return whole

    def _place(self, hook: str) -> int:
        self.width(hook)
        return self.hooks.index(hook)

    def _last_skipped(self, hook: str) -> int | None:
        """The last block that need not run when activations stand at a residual hook."""
        block, stage = _stage(hook)
        last = {RESID_POST: block, RESID_PRE: block - 1}.get(stage, -1)
        return last if last >= 0 else None

    @cached_property
    def _blocks_give_tuples(self) -> bool:
        found: list[bool] = []
        blocks = _blocks_of(self._network)
        assert blocks is not None
        handle = blocks[0].register_forward_hook(
            lambda _module, _inputs, output: found.append(isinstance(output, tuple))
        )
        with handle:
            self._network(torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=False)
        return found[0]

    def _logits(
        self, tokens: Tensor, hooks: Sequence[str], replace: Mapping[str, Replacement] | None
    ) -> tuple[dict[str, Tensor], Tensor]:
        found, logits = self._run(tokens, hooks, replace or {}, with_logits=True)
        assert logits is not None
        return found, logits

    def _run(
        self,
        tokens: Tensor,
        hooks: Sequence[str],
        replace: Mapping[str, Replacement],
        with_logits: bool,
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        for hook in (*hooks, *replace):
            self.width(hook)
        self._check_tokens(tokens)
        visit = _Visit(tuple(hooks), dict(replace), with_logits)
        # Not inference_mode: its tensors could not be used in anything that needs gradients.
        with torch.no_grad():
            logits = self._forward(tokens.to(self.device).long(), visit)
        return {hook: visit.found[hook] for hook in hooks}, logits

    @abstractmethod
    def _forward(self, tokens: Tensor, visit: _Visit) -> Tensor | None:
        """One forward that calls `visit` at its points, in order; logits unless it ends early."""

    def _check_tokens(self, tokens: Tensor) -> None:
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise Refusal(
                f"tokens has shape {tuple(tokens.shape)}, expected [contexts, positions] with some "
                "of each; add an axis to a single context (tokens[None])."
            )
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise Refusal(f"tokens is of {tokens.dtype}, expected integers; pass token ids.")
        if tokens.shape[1] > self.n_context:
            raise Refusal(
                f"Contexts have {tokens.shape[1]} tokens, but {self.name} reads {self.n_context} "
                "at most; cut them shorter."
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocabulary:
            raise Refusal(
                f"Token {low if low < 0 else high} is outside the vocabulary of {self.name}, 0 to "
                f"{self.vocabulary - 1}; use the model's own tokenizer."
            )


def _stage(hook: str) -> tuple[int, str]:
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
    assert match is not None
    return int(match[1]), match[2]


class _Visit:
    """What one forward reads and replaces: called with the flat activations of every point."""

    def __init__(
        self, read: tuple[str, ...], replace: dict[str, Replacement], with_logits: bool
    ) -> None:
        self.read, self.replace, self.with_logits = read, replace, with_logits
        self.found: dict[str, Tensor] = {}
        self._shift: dict[int, Tensor] = {}
        # Both backends reach resid_mid only as the input of the norm before the MLP, beside which
        # the residual stream passes unchanged: the change is added where they meet again.
        rejoin = [
            f"blocks.{_stage(hook)[0]}.{RESID_POST}" for hook in replace if hook.endswith(RESID_MID)
        ]
        points = sorted({*read, *replace, *rejoin}, key=self._order)
        if not with_logits:
            last = max(read, key=self._order)
            points = [point for point in points if self._order(point) <= self._order(last)]
        self.points = points

    @staticmethod
    def _order(hook: str) -> tuple[int, int]:
        block, stage = _stage(hook)
        return block, _STAGES.index(stage)

    def __call__(self, hook: str, x: Tensor) -> Tensor | None:
        """What goes on in place of x, or None when x does."""
        block, stage = _stage(hook)
        new = x
        if stage == RESID_POST and block in self._shift:
            new = new + self._shift.pop(block)
        if hook in self.replace:
            new = self._replaced(hook, new)
            if stage == RESID_MID:
                self._shift[block] = new - x
        if hook in self.read:
            self.found[hook] = new.detach()
        return None if new is x else new

    def _replaced(self, hook: str, x: Tensor) -> Tensor:
        # nnsight calls this in a thread of its own, where gradients are on; a copy, so that a
        # function that works in place does not reach other tensors of the model.
        with torch.no_grad():
            new: Any = self.replace[hook](x.clone())
        if not isinstance(new, Tensor) or new.shape != x.shape:
            came = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise Refusal(
                f"The replacement at {hook} returned {came}, expected a tensor of the shape it was "
                f"given, {tuple(x.shape)}."
            )
        return new.detach().to(x)

    @property
    def done(self) -> bool:
        return not self.with_logits and len(self.found) == len(set(self.read))


class LastPosition(ABC):
    """Made by `Model.last_position`."""

    cached: bool

    def __init__(
        self, model: Model, tokens: Tensor, hook: str, read: tuple[str, ...], with_logits: bool
    ) -> None:
        self.model, self.tokens, self.hook = model, tokens, hook
        self.read, self.with_logits = read, with_logits

    @torch.no_grad()
    def __call__(
        self, x: Float[Tensor, "n d"], prompt: Int[Tensor, " n"]
    ) -> tuple[dict[str, Tensor], Float[Tensor, "n v"] | None]:
        """Activations at every hook of `read`, and logits, at the last position of each row."""
        if x.shape != (*prompt.shape, self.model.width(self.hook)):
            raise Refusal(
                f"x has shape {tuple(x.shape)} for {len(prompt)} prompts, expected one row of "
                f"{self.model.width(self.hook)} for each; pass activations of {self.hook}."
            )
        return self._run(x.detach().to(self.model.device, self.model.dtype), prompt)

    @abstractmethod
    def _run(self, x: Tensor, prompt: Tensor) -> tuple[dict[str, Tensor], Tensor | None]: ...


class _WholePrompts(LastPosition):
    """By full forwards of every prompt."""

    cached = False

    def _run(self, x: Tensor, prompt: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        found: dict[str, Tensor] = {}

        def put(whole: Tensor) -> Tensor:
            whole[:, -1] = x
            return whole

        def keep(name: str) -> Replacement:
            def act(whole: Tensor) -> Tensor:
                found[name] = whole[:, -1]
                return whole

            return act

        replace = {self.hook: put, **{name: keep(name) for name in self.read}}
        logits = self.model.logits(self.tokens[prompt], replace)
        return found, logits[:, -1] if self.with_logits else None


class _LastAlone(LastPosition):
    """With the keys and values of the other positions from one forward of each prompt."""

    cached = True

    @staticmethod
    def supports(model: Model, hook: str, read: Sequence[str]) -> bool:
        stages = {_stage(name)[1] for name in (hook, *read)}
        network = model._network  # pyright: ignore[reportPrivateUsage]
        return stages <= {RESID_PRE, RESID_POST} and _blocks_of(network) is not None

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        model = self.model
        self.network = model._network  # pyright: ignore[reportPrivateUsage]
        blocks = _blocks_of(self.network)
        assert blocks is not None
        block, stage = _stage(self.hook)
        self.blocks, self.first = blocks, block + (stage == RESID_POST)
        parameters = inspect.signature(self.network.forward).parameters
        none = torch.arange(0, device=model.device)
        self.more = (
            {"logits_to_keep": none}
            if "logits_to_keep" in parameters and not self.with_logits
            else {}
        )
        with torch.no_grad():
            before = self.tokens[:, :-1]
            output = self.network(before, use_cache=True) if before.shape[1] else None
        self.past: Any = getattr(output, "past_key_values", None)
        # Models that keep something else than keys and values (a state) have no such cache.
        self.usable = output is None or hasattr(self.past, "batch_select_indices")

    def _run(self, x: Tensor, prompt: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        past = copy.deepcopy(self.past)
        if past is not None:
            past.batch_select_indices(prompt)
        x = x[:, None]
        found: dict[str, Tensor] = {}

        def put(_module: nn.Module, inputs: Any, named: Any) -> Any:
            if inputs:
                return (x, *inputs[1:]), named
            return inputs, {**named, "hidden_states": x}

        def keep(name: str) -> Callable[..., None]:
            def act(_module: nn.Module, _inputs: Any, output: Any) -> None:
                found[name] = (output[0] if isinstance(output, tuple) else output)[:, -1]

            return act

        handles = [
            block.register_forward_pre_hook(put, prepend=True, with_kwargs=True)
            for block in self.blocks[self.first : self.first + 1]
        ]
        for name in self.read:
            block, stage = _stage(name)
            handles.append(
                self.blocks[block - (stage == RESID_PRE)].register_forward_hook(keep(name))
            )
        passed = (x, None) if self.model._blocks_give_tuples else x  # pyright: ignore[reportPrivateUsage]
        try:
            with _returning(self.blocks[: self.first], passed):
                output = self.network(
                    self.tokens[prompt, -1:],
                    past_key_values=past,
                    use_cache=past is not None,
                    **self.more,
                )
        finally:
            for handle in handles:
                handle.remove()
        return found, output.logits[:, -1] if self.with_logits else None


def _agree(
    one: tuple[dict[str, Tensor], Tensor | None],
    other: tuple[dict[str, Tensor], Tensor | None],
    dtype: torch.dtype,
) -> bool:
    pairs = [(one[0][name], other[0][name]) for name in other[0]]
    if one[1] is not None and other[1] is not None:
        pairs.append((one[1], other[1]))
    return all(
        float((a.double() - b.double()).norm()) <= _TOLERANCE[dtype] * float(b.double().norm())
        for a, b in pairs
    )


class _BridgeModel(Model):
    backend = "bridge"

    def __init__(self, name: str, folder: Path, network: Any) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        super().__init__(name, folder, network)
        with _named(folder):
            self.underlying = TransformerBridge.boot_transformers(
                str(folder),
                hf_model=network,
                tokenizer=load_tokenizer(folder),
                dtype=self.dtype,
                device=str(self.device),
            )
        known = self.underlying.hook_dict
        self.hooks = tuple(
            hook
            for block in range(self.n_layer)
            for hook in (f"blocks.{block}.{stage}" for stage in _STAGES)
            if hook in known
        )

    def _forward(self, tokens: Tensor, visit: _Visit) -> Tensor | None:
        from transformer_lens.model_bridge.exceptions import StopAtLayerException

        def at(point: str) -> Callable[..., Tensor | None]:
            def act(x: Tensor, hook: Any) -> Tensor | None:
                # hook_z has an axis of heads.
                flat = x.flatten(2)
                new = visit(point, flat)
                if visit.done:
                    raise StopAtLayerException(flat)
                return None if new is None else new.reshape(x.shape)

            return act

        logits = self.underlying.run_with_hooks(
            tokens, fwd_hooks=[(point, at(point)) for point in visit.points], use_cache=False
        )
        return logits if visit.with_logits else None


class _NnsightModel(Model):
    backend = "nnsight"

    def __init__(self, name: str, folder: Path, network: Any) -> None:
        super().__init__(name, folder, network)
        self.underlying = self._wrapped(network)
        self._sites: dict[str, tuple[Any, Literal["input", "output"]]] = {}
        for block, module in enumerate(_layers(self.underlying, network)):
            for stage, site in _sites(module, name).items():
                self._sites[f"blocks.{block}.{stage}"] = site
        self.hooks = tuple(self._sites)

    def _wrapped(self, network: Any) -> Any:
        from nnsight.modeling.transformers import TransformersModel

        return TransformersModel(network, tokenizer=self.tokenizer, task="text-generation")

    def sites(self, hooks: Iterable[str]) -> list[tuple[str, Any, Literal["input", "output"]]]:
        """Hook, nnsight's module and its side, in the order in which a forward comes by."""
        return [(hook, *self._sites[hook]) for hook in sorted(hooks, key=self.hooks.index)]

    def rejoins(self, hook: str) -> Any:
        """The block whose output gets what is put at its resid_mid (see `_Visit`), or None."""
        block, stage = _stage(hook)
        return self._sites[f"blocks.{block}.{RESID_POST}"][0] if stage == RESID_MID else None

    def _forward(self, tokens: Tensor, visit: _Visit) -> Tensor | None:
        sites = [(point, *self._sites[point]) for point in visit.points]
        output: Any = None
        with self.underlying.trace(tokens, use_cache=False) as tracer:
            for point, module, side in sites:
                # Blocks of some versions of transformers return a tuple, of others a tensor.
                whole = module.input if side == "input" else module.output
                x = whole[0] if isinstance(whole, tuple) else whole
                new = visit(point, x)
                if new is not None:
                    new = (new, *whole[1:]) if isinstance(whole, tuple) else new
                    if side == "input":
                        module.input = new
                    else:
                        module.output = new
            if visit.done:
                tracer.stop()
            else:
                output = self.underlying.output.save()
        return output.logits if visit.with_logits else None


class _RemoteModel(_NnsightModel):
    """A model that NDIF runs: config and tokenizer are here, the weights are not."""

    remote = True

    def __init__(self, name: str, folder: Path, underlying: Any) -> None:
        self._whole = underlying
        super().__init__(name, folder, underlying._module)
        # Where what comes back goes; the network is on the meta device.
        self.device = torch.device("cpu")

    def _wrapped(self, network: Any) -> Any:
        return self._whole

    def _forward(self, tokens: Tensor, visit: _Visit) -> Tensor | None:
        raise Refusal(
            f"{self.name} runs elsewhere (remote=True) and gives no activations or logits, only "
            "what a survey sums up there; open it without remote for anything else."
        )


def _open_remote(
    name_or_path: str | os.PathLike[str], revision: str | None, centred: bool
) -> _RemoteModel:
    from darkmatter.remote import api_key

    api_key()
    name = os.fspath(name_or_path)
    if centred:
        raise Refusal(
            f"The weights of {name} are not here to be centred (remote=True); pass centred=False."
        )
    repository, folder = locate_without_weights(name_or_path, revision)
    from nnsight.modeling.transformers import TransformersModel

    with _named(folder):
        # Of the folder, which asks nobody; NDIF knows the model by its name.
        underlying = TransformersModel(
            str(folder),
            tokenizer=load_tokenizer(folder),
            task="text-generation",
            # As load_transformers: NDIF runs the model with the attention it has here.
            attn_implementation="eager",
        )
    underlying.repo_id, underlying.revision = repository, revision
    model = _RemoteModel(name, folder, underlying)
    model.checkpoint = f"{repository} {revision}"
    return model


def _layers(model: Any, network: Any) -> Any:
    """The blocks of GPT-2's layout or of Llama's; others have parts with other meanings."""
    for outer, inner in (("transformer", "h"), ("model", "layers")):
        if hasattr(network, outer) and hasattr(getattr(network, outer), inner):
            return getattr(getattr(model, outer), inner)
    raise _other_layout(type(network).__name__)


def _other_layout(name: str) -> Refusal:
    return Refusal(
        f"The nnsight backend knows models laid out as GPT-2 (transformer.h, attn.c_proj, mlp) or "
        f"as Llama and Gemma (model.layers, self_attn.o_proj, mlp), and {name} is neither; open it "
        "with backend='bridge'."
    )


def _sites(block: Any, name: str) -> dict[str, tuple[Any, Literal["input", "output"]]]:
    """Module and side of every hook point of one block."""

    def part(path: str) -> Any:
        module = block
        for step in path.split("."):
            module = getattr(module, step, None)
        return module

    mlp = part("mlp")
    if part("attn.c_proj") is not None:
        z, before_mlp = part("attn.c_proj"), part("ln_2")
    elif part("post_feedforward_layernorm") is not None:
        # Gemma 2: the MLP has a norm of its own on either side, and what is added is the norm's.
        z, before_mlp = part("self_attn.o_proj"), part("pre_feedforward_layernorm")
        mlp = part("post_feedforward_layernorm")
    else:
        z, before_mlp = part("self_attn.o_proj"), part("post_attention_layernorm")
    if z is None or before_mlp is None or mlp is None:
        raise _other_layout(name)
    return {
        RESID_PRE: (block, "input"),
        Z: (z, "input"),
        RESID_MID: (before_mlp, "input"),
        MLP_OUT: (mlp, "output"),
        RESID_POST: (block, "output"),
    }


def open_model(
    name_or_path: str | os.PathLike[str],
    backend: Backend = "bridge",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    check: bool = True,
    revision: str | None = None,
    centred: bool = False,
    remote: Remote = False,
) -> Model:
    """Open a causal language model from a Hugging Face folder or a hub name.

    Weights are read from safetensors only and converted to `dtype`. A hub name (at `revision`, a
    commit, tag or branch) that is cached is opened without the network. With `centred`, whatever
    writes to the residual stream loses its mean over d_model, as transformer-lens does by default:
    x - mean(x) stands where x stood, for SAEs trained so, and the logits stay. With `check`, hidden
    states of every block and log-probabilities are compared with plain transformers' on one fixed
    batch (random ids, seed 0), and the parts of every block with their sum.

    remote=True (with backend="nnsight" and a hub name): the model is one that NDIF runs, whose key
    is in the environment as NDIF_API_KEY. Of its files only config and tokenizer are fetched, and
    all that can be done with it is `survey`, which sums up where the activations are. NDIF itself
    was never called in tests. remote="local": surveys go the same way, but the model is opened and
    run here, as a rehearsal.

    Raises Refusal for an unknown backend, a device that is not there, a missing folder, config,
    weight or tokenizer, a name that is not cached when the hub does not answer or does not give it
    (within 5 s), a model that cannot be centred, `remote` without a key, and BackendDisagreement,
    naming hook and size, when the check fails.
    """
    if backend not in _BACKENDS:
        raise Refusal(f"There is no backend {backend!r}; choose one of {', '.join(_BACKENDS)}.")
    if dtype not in _TOLERANCE:
        known = ", ".join(str(kind) for kind in _TOLERANCE)
        raise Refusal(f"dtype is {dtype}, expected one of {known}.")
    if remote and (remote not in (True, "local") or backend != "nnsight"):
        raise Refusal(
            f"remote is {remote!r} and the backend {backend!r}, expected True or 'local' with "
            "backend='nnsight'; pass both."
        )
    if remote is True:
        return _open_remote(name_or_path, revision, centred)
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise Refusal(f"The device is {device!r}, but no GPU is there; pass device='cpu'.")
    folder = locate(name_or_path, revision)
    name = os.fspath(name_or_path)
    network = load_transformers(folder, device, dtype)
    if centred:
        centre_writing_weights(network)
    # Before the backend gets hold of the network, since it wraps and may change its modules.
    reference = _reference(network) if check else None
    kind = _BridgeModel if backend == "bridge" else _NnsightModel
    model = kind(name, folder, network)
    if reference is not None:
        compare_with_transformers(model, reference)
    model.remote = remote
    return model


def load_transformers(folder: Path, device: str, dtype: torch.dtype) -> Any:
    """The plain transformers model of a folder, with eager attention as the bridge needs it.

    Raises Refusal when it is no causal language model, or when weights are missing or of another
    shape (transformers itself would fill them with random numbers and warn).
    """
    from transformers import AutoModelForCausalLM

    with _named(folder), _without_progress_bar():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            # Nor is anything asked: code that comes with a model is never run.
            trust_remote_code=False,
            output_loading_info=True,
        )
    network, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise Refusal(
            f"The weights in {folder} lack {len(missing)} tensors, the first {missing[0]}; they "
            f"are not those of a {type(network).__name__}: check config.json against them."
        )
    return network.to(device).eval().requires_grad_(False)


@torch.no_grad()
def centre_writing_weights(network: Any) -> None:
    """Take the mean over d_model off all that a GPT-2 writes to its residual stream, in place.

    Its LayerNorms take it off anyway, so nothing that is read from the stream changes. The
    unembedding, which is no writer, is no longer the embedding. Raises Refusal for a model of
    another layout, since RMS norms do not take the mean off.
    """
    stream = getattr(network, "transformer", None)
    if not all(hasattr(stream, part) for part in ("wte", "wpe", "h", "ln_f")):
        raise Refusal(
            f"A {type(network).__name__} cannot be centred, expected GPT-2's layout with its "
            "LayerNorms; open it with centred=False."
        )
    assert stream is not None
    network.config.tie_word_embeddings = False
    network.lm_head.weight = nn.Parameter(network.lm_head.weight.clone(), requires_grad=False)
    written = [stream.wte.weight, stream.wpe.weight]
    for block in stream.h:
        for part in (block.attn.c_proj, block.mlp.c_proj):
            written += [part.weight, part.bias]
    for weight in written:
        weight -= weight.mean(-1, keepdim=True)


def _blocks_of(network: Any) -> list[nn.Module] | None:
    """The blocks of a transformers model in order, or None when it has no list of its depth."""
    n_layer = network.config.get_text_config().num_hidden_layers
    lists = (module for module in network.modules() if isinstance(module, nn.ModuleList))
    return next((list(found) for found in lists if len(found) == n_layer), None)


@contextmanager
def _returning(blocks: Sequence[nn.Module], value: Any) -> Generator[None, None, None]:
    """Inside, these blocks compute nothing and return `value`.

    Their own `forward`, which a backend may have put on the instance, is back afterwards.
    """

    def passed(*_: Any, **__: Any) -> Any:
        return value

    own = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            # Not setattr, which the bridge's blocks hand on to what they wrap.
            vars(block)["forward"] = passed
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            vars(block).pop("forward")
            if forward is not None:
                vars(block)["forward"] = forward


def _longest_context(config: Any) -> int:
    # Models without position embeddings of any kind (ALiBi) have no limit.
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model's folder. Raises Refusal when it cannot be read."""
    from transformers import AutoTokenizer

    with _named(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


@contextmanager
def _named(folder: Path) -> Generator[None, None, None]:
    """Errors of a library while it reads a model's folder become refusals that name it."""
    try:
        yield
    except Refusal:
        raise
    except (ValueError, OSError, KeyError, RuntimeError, NotImplementedError) as error:
        first = str(error).strip().split("\n")[0]
        raise Refusal(
            f"The model in {folder} cannot be opened ({first}); expected a causal language model "
            "saved by save_pretrained, with its tokenizer."
        ) from error


@contextmanager
def _without_progress_bar() -> Generator[None, None, None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@dataclass(frozen=True, eq=False)
class _Reference:
    """What plain transformers computes on the fixed batch."""

    tokens: Int[Tensor, "b p"]
    resid_post: list[Tensor]
    log_probabilities: Float[Tensor, "b p v"]


def _reference(network: Any) -> _Reference:
    config = network.config.get_text_config()
    tokens = torch.randint(
        int(config.vocab_size),
        (_CHECK_CONTEXTS, min(_CHECK_POSITIONS, _longest_context(config))),
        generator=torch.Generator().manual_seed(0),
    ).to(network.device)
    # Not output_hidden_states: its last entry has gone through the final LayerNorm.
    blocks = _blocks_of(network)
    if blocks is None:
        raise Refusal(
            f"No list of {config.num_hidden_layers} blocks was found in a "
            f"{type(network).__name__}, so it cannot be checked; pass check=False."
        )
    resid_post: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        resid_post.append((output[0] if isinstance(output, tuple) else output).detach().clone())

    handles = [block.register_forward_hook(keep) for block in blocks]
    try:
        with torch.no_grad():
            logits = network(tokens, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return _Reference(tokens, resid_post, logits.double().log_softmax(-1))


def compare_with_transformers(model: Model, reference: _Reference) -> None:
    """Raise BackendDisagreement at the first hook where the backend is not what it should be.

    Every block's resid_post and the log-probabilities against transformers', resid_pre against the
    block before, and resid_mid + mlp_out against resid_post. Position 0 is left out of the sizes:
    its activations are tens of times larger than all others in many models and would hide them.
    """
    tolerance = _TOLERANCE[model.dtype]
    found, logits = model._run(reference.tokens, model.hooks, {}, with_logits=True)  # pyright: ignore[reportPrivateUsage]

    def require(hook: str, size: float, limit: float = tolerance) -> None:
        # Negated so that NaN fails.
        if not size <= limit:
            raise BackendDisagreement(model.name, model.backend, hook, size, limit)

    for block, expected in enumerate(reference.resid_post):
        hook = f"blocks.{block}."
        if block > 0:
            before = reference.resid_post[block - 1]
            require(hook + RESID_PRE, _difference(found[hook + RESID_PRE], before))
        require(hook + RESID_POST, _difference(found[hook + RESID_POST], expected))
        if hook + RESID_MID in found and hook + MLP_OUT in found:
            total = found[hook + RESID_MID].double() + found[hook + MLP_OUT].double()
            require(hook + RESID_MID, _difference(total, expected))
    assert logits is not None
    log_probabilities = logits.double().log_softmax(-1)
    size = float((log_probabilities - reference.log_probabilities).abs().max())
    require("the log-probabilities", size, tolerance * _NATS_PER_TOLERANCE)


def _difference(value: Tensor, expected: Tensor) -> float:
    """|value - expected| / |expected - mean over tokens|, without position 0."""
    expected = expected[:, 1:].double()
    spread = expected - expected.mean((0, 1))
    return float((value[:, 1:].double() - expected).norm() / spread.norm())

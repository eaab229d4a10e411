"""Sparse autoencoders of sae-lens: open, check, encode sparsely, correct linearly.

There is no class of our own around them: whatever has `encode`, `decode`, `W_dec`, `b_dec` and
`cfg` as sae-lens' SAEs do is an autoencoder here, and `adapt` makes one of whatever has `encode`
and `decode`.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import tokenize
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from darkmatter._files import CorruptFile, understood, verify_safetensors, verify_sha256
from darkmatter._refusal import Refusal
from darkmatter.leastsquares import LinearMap
from darkmatter.models import Model
from darkmatter.pursuit import gradient_pursuit
from darkmatter.sparse import SparseCode, flat_nonzero

__all__ = [
    "Adapted",
    "Autoencoder",
    "CorruptFile",
    "LazyAutoencoders",
    "LinearlyCorrected",
    "PursuitEncoder",
    "adapt",
    "check_fits",
    "decoder_of",
    "hook_of",
    "load_autoencoder",
    "open_autoencoders",
    "reconstruct",
    "sparse_decode",
    "sparse_encode",
    "verify_sha256",
]

# Decoders that are f @ W_dec + b (rows possibly divided by their norm), as read in sae-lens 6.54.
# Others (transcoders with a skip, TemporalSAE) also use the input.
_AFFINE_DECODERS = {
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "matching_pursuit",
    "transcoder",
    "jumprelu_transcoder",
    "adapted",
}
# The files of an SAE: of sae-lens, and of Gemma Scope.
_CONFIG, _WEIGHTS, _PARAMETERS = "cfg.json", "sae_weights.safetensors", "params.npz"
_WHOLE_NPZ = "a whole .npz file"
# Weights are random enough that none packs to a hundredth; what tells of more would fill memory.
_MOST_PACKED = 100
# Codes of single latents that are decoded at a time: this many numbers (64 MiB of float32).
_UNIT_CODES = 1 << 24
# Their codes depend on the other tokens of the batch.
_BATCH_DEPENDENT = {"batchtopk", "matryoshka_batchtopk"}
# These two divide by a norm of the input, which decoding then needs.
_STATEFUL_NORMALISATION = {"layer_norm", "constant_norm_rescale"}


@runtime_checkable
class Autoencoder(Protocol):
    """What is needed of a sparse autoencoder; every sae_lens.SAE has it."""

    @property
    def cfg(self) -> Any: ...
    @property
    def W_dec(self) -> Tensor: ...
    @property
    def b_dec(self) -> Tensor: ...
    def encode(self, x: Tensor, /) -> Tensor: ...
    def decode(self, feature_acts: Tensor, /) -> Tensor: ...


def load_autoencoder(path: str | Path, device: str = "cpu", sha256: str | None = None) -> Any:
    """A sae_lens.SAE from a folder with cfg.json and sae_weights.safetensors, ready to encode.

    Weights may be stored in half precision; they are computed with in float32. `sha256` is that of
    the weights. Gradients are off. Raises Refusal when the folder or a file is missing or the
    config is unknown to sae-lens, and CorruptFile when a file is cut short or altered.
    """
    folder = Path(path).expanduser()
    if sha256 is not None and (folder / _WEIGHTS).is_file():
        verify_sha256(folder / _WEIGHTS, sha256)
    _config_of(folder)

    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(folder, device=device, dtype="float32")
        if not isinstance(getattr(sae.cfg, "apply_b_dec_to_input", True), bool):
            raise TypeError("apply_b_dec_to_input is no truth value")
    except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0][:300]
        raise Refusal(
            f"sae-lens cannot open {folder} ({type(error).__name__}: {first}); its config and "
            "weights must be those of one of sae-lens' inference architectures."
        ) from error
    return sae.eval().requires_grad_(False)


def _config_of(folder: Path) -> dict[str, Any]:
    """The config in an SAE's folder, whose files are there and whole."""
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise Refusal(
                f"There is no {folder / name}; pass a folder with {_CONFIG} and {_WEIGHTS}, as "
                "sae-lens' save_model and save_inference_model write it."
            )
    verify_safetensors(folder / _WEIGHTS)
    with understood(folder / _CONFIG, "JSON of a config, an object"):
        return dict(json.loads((folder / _CONFIG).read_text()))


def hook_of(sae: Autoencoder) -> str:
    """The hook point an autoencoder was trained at. Raises Refusal when its config has none."""
    hook = sae.cfg.metadata.hook_name
    if hook is None:
        raise Refusal(
            "The autoencoder's config names no hook point (metadata.hook_name); set it, or pass "
            "hook=."
        )
    return str(hook)


def check_fits(sae: Autoencoder, model: Model, hook: str | None = None) -> None:
    """Raise Refusal unless the autoencoder reads the activations of the model at that hook.

    The hook must be the one in its config (which need not name one if `hook` is given), exist in
    the model and have the width d_in.
    """
    trained_at = sae.cfg.metadata.hook_name
    hook = hook_of(sae) if hook is None else _agreed_hook("The autoencoder", trained_at, hook)
    _check_width("The autoencoder", int(sae.cfg.d_in), model, hook)


def _agreed_hook(what: str, trained_at: str | None, hook: str | None) -> str:
    if trained_at is not None and hook not in (None, trained_at):
        raise Refusal(
            f"{what} was trained at {trained_at}, not at {hook}; read the activations of "
            f"{trained_at}."
        )
    return str(trained_at or hook)


def _check_width(what: str, d_in: int, model: Model, hook: str) -> None:
    width = model.width(hook)
    if width != d_in:
        raise Refusal(
            f"{what} reads activations of width {d_in}, but {model.name} has {width} at {hook}; "
            "use the model it was trained on."
        )


@contextmanager
def _flat(sae: Autoencoder) -> Generator[None, None, None]:
    """Autoencoders of hook_z that split heads themselves take flat rows inside this."""
    if not getattr(sae, "hook_z_reshaping_mode", False):
        yield
        return
    module: Any = sae
    module.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        module.turn_on_forward_pass_hook_z_reshaping()


def _rows(sae: Autoencoder, x: Tensor, batch: int) -> Iterator[Tensor]:
    if x.ndim != 2 or x.shape[1] != sae.cfg.d_in:
        raise Refusal(
            f"x has shape {tuple(x.shape)}, expected [n, {sae.cfg.d_in}] for this autoencoder; "
            "pass flat activations of the hook it was trained at."
        )
    if batch < 1:
        raise Refusal(f"batch is {batch}, expected 1 or more rows at a time.")
    if _architecture(sae) in _BATCH_DEPENDENT:
        raise Refusal(
            f"The codes of a {_architecture(sae)} autoencoder in training depend on the batch; "
            "save_inference_model it and load the result."
        )
    return iter(x.split(batch))


def _architecture(sae: Autoencoder) -> str:
    return str(sae.cfg.architecture())


def _encoded(sae: Autoencoder, x: Tensor) -> SparseCode:
    """The code of one batch of rows."""
    from sae_lens import JumpReLUSAE

    if type(sae) is not JumpReLUSAE:
        dense = sae.encode(x)
        return _kept(dense, dense != 0)
    # encode's own passes over all latents, relu(pre) * (pre > threshold), take several times as
    # long as the matrix product.
    pre = torch.addmm(sae.b_enc, sae.process_sae_in(x), sae.W_enc)
    return _kept(pre, pre > sae.threshold.clamp(min=0))


def _kept(dense: Tensor, active: Tensor) -> SparseCode:
    """The entries of dense [n, m] where active, row by row."""
    flat = flat_nonzero(active)
    row = flat // dense.shape[1]
    count = torch.bincount(row, minlength=len(dense))
    k = int(count.max()) if len(dense) else 0
    # An entry's place is its rank minus those of the rows before.
    place = torch.arange(len(row), device=row.device) - (count.cumsum(0) - count)[row]
    values, indices = dense.new_zeros(len(dense), k), row.new_zeros(len(dense), k)
    values[row, place], indices[row, place] = dense.reshape(-1)[flat], flat % dense.shape[1]
    return SparseCode(values, indices)


def _stacked(parts: list[SparseCode], like: Tensor) -> SparseCode:
    k = max((part.values.shape[1] for part in parts), default=0)
    n = sum(len(part) for part in parts)
    values = like.new_zeros(n, k, dtype=parts[0].values.dtype if parts else like.dtype)
    indices = like.new_zeros(n, k, dtype=torch.int64)
    start = 0
    for part in parts:
        stop = start + len(part)
        values[start:stop, : part.values.shape[1]] = part.values.to(like.device)
        indices[start:stop, : part.indices.shape[1]] = part.indices.to(like.device)
        start = stop
    return SparseCode(values, indices)


@torch.no_grad()
def sparse_encode(sae: Autoencoder, x: Float[Tensor, "n d"], batch: int = 2048) -> SparseCode:
    """The codes sae.encode(x), of which only non-zero entries are kept; any architecture.

    Hooks after the pre-activations of a JumpReLU SAE are not run. Dense codes exist for `batch`
    rows at a time, 4 * batch * d_sae bytes. Raises Refusal when x is not [n, d_in], or for an
    autoencoder whose codes depend on the batch.
    """
    with _flat(sae):
        parts = [_encoded(sae, rows.to(sae.W_dec.device)) for rows in _rows(sae, x, batch)]
    return _stacked(parts, x)


@torch.no_grad()
def decoder_of(sae: Autoencoder) -> tuple[Float[Tensor, "m d"], Float[Tensor, " d"]]:
    """(directions, bias) with sae.decode(f) = f @ directions + bias.

    Raises Refusal when the decoder is of no such form: it also uses the input, or undoes a
    normalisation of the input.
    """
    if not _is_affine(sae):
        raise Refusal(
            f"The decoder of a {_architecture(sae)} autoencoder with normalize_activations="
            f"{sae.cfg.normalize_activations!r} is not affine or also needs the input; use "
            "reconstruct(sae, x)."
        )
    directions = sae.W_dec.detach()
    if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
        directions = directions / directions.norm(dim=-1, keepdim=True)
    # Of no active latents; matching pursuit, for one, adds b_dec only if it was subtracted.
    with _flat(sae):
        bias = sae.decode(directions.new_zeros(1, len(directions)))[0]
    return directions, bias


def _is_affine(sae: Autoencoder) -> bool:
    return (
        _architecture(sae) in _AFFINE_DECODERS
        and sae.cfg.normalize_activations not in _STATEFUL_NORMALISATION
    )


def sparse_decode(sae: Autoencoder, code: SparseCode) -> Float[Tensor, "n d"]:
    """sae.decode of a sparse code. Raises Refusal when the decoder also needs the input."""
    directions, bias = decoder_of(sae)
    here = code.values.device
    return code.decode(directions.to(here), bias.to(here))


@torch.no_grad()
def reconstruct(
    sae: Autoencoder, x: Float[Tensor, "n d"], batch: int = 2048
) -> Float[Tensor, "n d_out"]:
    """sae.decode(sae.encode(x)) [n, d_in], `batch` rows at a time, in the dtype of the autoencoder.

    Where the decoder allows, only active latents are decoded. d_out is d_in except for transcoders.
    """
    rows = _rows(sae, x, batch)
    here = sae.W_dec.device
    parts: list[Tensor] = [sae.W_dec.new_zeros(0, sae.W_dec.shape[1], device=x.device)]
    decoder = decoder_of(sae) if _is_affine(sae) else None
    with _flat(sae):
        for part in rows:
            part = part.to(here)
            decoded = (
                sae.decode(sae.encode(part))
                if decoder is None
                else _encoded(sae, part).decode(*decoder)
            )
            parts.append(decoded.to(x.device))
    return torch.cat(parts)


def config_as_used(sae: Autoencoder, more: int = 0) -> Any:
    """A copy of an SAE's config for W_dec as it is used in decoding, with `more` latents."""
    config = copy.deepcopy(sae.cfg)
    config.d_sae = int(sae.cfg.d_sae) + more
    if hasattr(config, "rescale_acts_by_decoder_norm"):
        config.rescale_acts_by_decoder_norm = False
    return config


class WithDirections(ABC):
    """Like an autoencoder, with directions as they are used in decoding: x_hat = f W_dec + b_dec.

    `encode` is each one's own.
    """

    W_dec: Float[Tensor, "latents d"]
    b_dec: Float[Tensor, " d"]

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @abstractmethod
    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows latents"]:
        """The dense code of x."""

    @torch.no_grad()
    def decode(self, feature_acts: Float[Tensor, "*rows latents"]) -> Float[Tensor, "*rows d"]:
        """f W_dec + b_dec."""
        return feature_acts @ self.W_dec + self.b_dec

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """x_hat."""
        return self.decode(self.encode(x))


class LinearlyCorrected:
    """An autoencoder plus a linear map of its input, itself like an autoencoder:

        x_hat = Sae(x) + x W + b

    With W, b fitted to the error x - Sae(x), what is left is the nonlinear error (Engels, Smith and
    Tegmark 2025, section 3). As an autoencoder, its latents are those of the SAE followed by x
    itself, encode(x) = [f(x), x], with directions W_dec = [W_dec of the SAE; W] and bias
    b_dec = b_dec of the SAE + b; so sae-lens' evals take it (get_recons_loss). W = 0, b = 0 is the
    SAE. Raises Refusal when the map is not d_in to the width the SAE writes.
    """

    def __init__(self, sae: Autoencoder, map: LinearMap) -> None:
        expected = (int(sae.cfg.d_in), int(sae.W_dec.shape[1]))
        if tuple(map.weight.shape) != expected:
            raise Refusal(
                f"The map's weight is {tuple(map.weight.shape)}, expected {expected}, the widths "
                "that the autoencoder reads and writes; fit it on this autoencoder's error."
            )
        self.sae, self.map = sae, map
        self.cfg = config_as_used(sae, expected[0])

    @property
    def device(self) -> torch.device:
        return self.sae.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.sae.W_dec.dtype

    @property
    def W_dec(self) -> Float[Tensor, "latents d"]:
        """Directions of the SAE's latents, then of the components of x."""
        directions, _ = decoder_of(self.sae)
        return torch.cat([directions, self.map.weight.to(directions)])

    @property
    def b_dec(self) -> Float[Tensor, " d"]:
        _, bias = decoder_of(self.sae)
        return bias + self.map.bias.to(bias)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows latents"]:
        """[f(x), x]: the SAE's dense code, then x."""
        x = x.to(self.dtype)
        with _flat(self.sae):
            return torch.cat([self.sae.encode(x), x], -1)

    @torch.no_grad()
    def decode(self, feature_acts: Float[Tensor, "*rows latents"]) -> Float[Tensor, "*rows d"]:
        """The SAE's decoding of the first d_sae latents plus the map of the last d_in."""
        code, x = feature_acts.split([int(self.sae.cfg.d_sae), int(self.sae.cfg.d_in)], -1)
        with _flat(self.sae):
            return self.sae.decode(code) + self.map(x)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """Sae(x) + x W + b."""
        flat = x.reshape(-1, x.shape[-1])
        corrected = reconstruct(self.sae, flat) + self.map(flat.to(self.dtype))
        return corrected.reshape(*x.shape[:-1], corrected.shape[-1])


class PursuitEncoder(WithDirections):
    """An autoencoder with its encoder replaced by a pursuit on its decoder directions:

        f(x) = pursuit(x, W_dec, l0(x), b_dec),   x_hat = f(x) W_dec + b_dec

    l0(x) is the number of latents that the SAE's own encoder activates on x, so that every token
    keeps its sparsity (Engels, Smith and Tegmark 2025, section 6.1).  `pursuit` is called as
    pursuit(x [n, d], dictionary [m, d], l0 [n], bias [d]) and returns a SparseCode.  W_dec and
    b_dec are as they are used in decoding.  It is like an autoencoder: sae-lens' evals take it, and
    LinearlyCorrected(PursuitEncoder(sae), map) is SAE + pursuit + linear map.

    Raises Refusal for a transcoder, as a pursuit has to write the space that it reads, and for a
    decoder that also needs the input.
    """

    def __init__(
        self, sae: Autoencoder, pursuit: Callable[..., SparseCode] = gradient_pursuit
    ) -> None:
        if "transcoder" in _architecture(sae) or int(sae.W_dec.shape[1]) != int(sae.cfg.d_in):
            raise Refusal(
                f"A {_architecture(sae)} reads width {sae.cfg.d_in} and writes width "
                f"{sae.W_dec.shape[1]} of another hook point, expected an autoencoder, which "
                "writes what it reads; pass an SAE."
            )
        self.sae, self.pursuit = sae, pursuit
        self.W_dec, self.b_dec = decoder_of(sae)
        self.cfg = config_as_used(sae)

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows latents"]:
        """The pursuit's dense code, with at most as many active latents as the SAE's."""
        x = x.to(self.dtype)
        with _flat(self.sae):
            own = self.sae.encode(x)
        l0 = (own != 0).sum(-1).flatten()
        code = self.pursuit(x.flatten(0, -2), self.W_dec, l0, self.b_dec)
        return code.dense(own.shape[-1]).to(own).view_as(own)

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """x_hat, `reconstruct`ed some rows at a time."""
        return reconstruct(self, x.flatten(0, -2)).view_as(x)


# Opening what a researcher names


@dataclass(frozen=True)
class _Source:
    """An SAE that can be opened: what is known of it before its weights are read.

    `hook` it was trained at, if its config says so; `open` gives it a hook.
    """

    where: str
    hook: str | None
    d_in: int
    d_sae: int
    open: Callable[[str], Any]

    @property
    def bytes(self) -> int:
        """Of encoder and decoder in float32."""
        return 8 * self.d_in * self.d_sae


class LazyAutoencoders(Mapping[str, Any]):
    """SAEs by name, each read when it is asked for. Made by `open_autoencoders`.

    Those that were opened last are kept, as many as fit in `keep_bytes` (8 GiB) and always one, so
    that SAEs which together are larger than memory can be surveyed one at a time. `hooks` and
    `widths` (d_sae) are known without reading weights.
    """

    def __init__(self, sources: Mapping[str, _Source], hooks: Mapping[str, str]) -> None:
        self._sources, self.hooks = dict(sources), dict(hooks)
        self.widths = {name: source.d_sae for name, source in sources.items()}
        self.keep_bytes = 8 << 30
        self._opened: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, name: object) -> bool:
        return name in self._sources

    def __getitem__(self, name: str) -> Any:
        if name not in self._sources:
            raise Refusal(f"There is no SAE {name!r} here; choose one of {', '.join(self)}.")
        sae = self._opened.pop(name, None)
        if sae is None:
            room = self.keep_bytes - self._sources[name].bytes
            while self._opened and sum(self._sources[one].bytes for one in self._opened) > room:
                del self._opened[next(iter(self._opened))]
            sae = self._sources[name].open(self.hooks[name])
        self._opened[name] = sae
        return sae


def open_autoencoders(
    spec: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model: Model | None = None,
    hook: str | None = None,
    device: str | None = None,
) -> LazyAutoencoders:
    """SAEs by name, as autoencoders of raw activations (darkmatter.suites.processing).

    A spec, or each of several, is

        RELEASE/ID     of sae-lens' list ("gpt2-small-res-jb/blocks.8.hook_resid_pre"), from the
                       local cache or the hub; * and ? in ID stand for any characters
        a folder       with cfg.json and sae_weights.safetensors of sae-lens, or with params.npz of
                       Gemma Scope, or a folder of such folders
        a .npz file    of Gemma Scope: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec and
                       threshold, of an SAE that is used as JumpReLU

    They are called by ID or by the name of their folder, with - for /, and where two would have one
    name, by the whole spec. `hook` is needed where an SAE does not say where it was trained (npz
    never does), and must be that hook where it does. Weights are read, in float32, when an SAE is
    asked for; `device` is the model's, or "cpu".

    Raises Refusal at once, before any weights are read or downloaded, for a spec that is none of
    these, a release or id that sae-lens does not know, a missing hook or one that the SAE was not
    trained at, a hook or width that does not fit `model`, a transcoder, and weights that are not
    floating-point numbers or not of these shapes; CorruptFile for files that are not whole.
    """
    given = [spec] if isinstance(spec, str | os.PathLike) else list(spec)
    device = device or ("cpu" if model is None else str(model.device))
    found = [pair for one in given for pair in _sources(os.fspath(one), device)]
    if not found:
        raise Refusal("No SAE was named; pass RELEASE/ID, a folder or an .npz file.")
    short = [name for name, _ in found]
    sources: dict[str, _Source] = {}
    hooks: dict[str, str] = {}
    for name, source in found:
        name = name if short.count(name) == 1 else source.where.strip("/").replace("/", "-")
        if name in sources:
            raise Refusal(f"{source.where} is named twice, expected each SAE once.")
        if hook is None and source.hook is None:
            raise Refusal(
                f"{source.where} does not say at which hook point it was trained; pass hook= "
                "(--hook), such as 'blocks.8.hook_resid_post'."
            )
        hooks[name] = _agreed_hook(source.where, source.hook, hook)
        if model is not None:
            _check_width(source.where, source.d_in, model, hooks[name])
        sources[name] = source
    return LazyAutoencoders(sources, hooks)


def _sources(spec: str, device: str) -> list[tuple[str, _Source]]:
    path = Path(spec).expanduser()
    if path.is_file():
        if path.suffix != ".npz":
            raise Refusal(
                f"{path} is no .npz file of an SAE; pass one, the folder that holds {_CONFIG}, or "
                "RELEASE/ID."
            )
        return [(path.parent.name if path.name == _PARAMETERS else path.stem, _npz(path, device))]
    if path.is_dir():
        return _in_folder(path, device)
    release, slash, wanted = spec.partition("/")
    if not slash or not wanted or path.is_absolute() or release in {".", "..", "~"}:
        raise Refusal(
            f"There is no SAE {spec!r}, expected RELEASE/ID of sae-lens, a folder that exists or "
            "an .npz file; check the name."
        )
    return _released(release, wanted, device)


def _in_folder(folder: Path, device: str) -> list[tuple[str, _Source]]:
    found: list[tuple[str, _Source]] = []
    for file in sorted([*folder.rglob(_CONFIG), *folder.rglob(_PARAMETERS)]):
        inside = file.parent.relative_to(folder)
        name = "-".join(inside.parts) or folder.resolve().name
        found.append((name, (_folder if file.name == _CONFIG else _npz)(file, device)))
    if not found:
        raise Refusal(
            f"The folder {folder} has no SAE, expected {_CONFIG} with {_WEIGHTS}, or {_PARAMETERS},"
            " in it or below it; pass another."
        )
    return found


def _folder(config: Path, device: str) -> _Source:
    from safetensors import safe_open

    folder = config.parent
    known = _config_of(folder)
    # Before version 6 of sae-lens what is metadata now stood beside the rest.
    with understood(config, "a config of sae-lens"):
        metadata: dict[str, Any] = {**known, **(known.get("metadata") or {})}
    with safe_open(str(folder / _WEIGHTS), framework="numpy") as weights:
        slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
        kinds = {key: str(one.get_dtype()) for key, one in slices.items()}
        decoder = [int(n) for n in slices["W_dec"].get_shape()] if "W_dec" in slices else []
    for key, kind in kinds.items():
        if kind not in {"F64", "F32", "F16", "BF16"}:
            raise Refusal(
                f"{key} of {folder} is stored as {kind}, expected floating-point numbers of 16 bits"
                " or more; convert the weights."
            )
    if len(decoder) != 2:
        raise Refusal(f"The weights of {folder} have no matrix W_dec; pass an SAE of sae-lens.")
    hook: str | None = metadata.get("hook_name") or metadata.get("hook_point")
    _refuse_transcoder(str(folder), metadata, decoder[1])

    def read(hook: str) -> Any:
        with warnings.catch_warnings():
            # That the model has to be processed, which is taken care of.
            warnings.filterwarnings("ignore", message="\nThis SAE has non-empty")
            return _ready(load_autoencoder(folder, device), hook)

    return _Source(str(folder), hook, decoder[1], decoder[0], read)


def _refuse_transcoder(where: str, config: Mapping[str, Any], d_out: int) -> None:
    written = config.get("hook_name_out")
    other = written is not None and written != config.get("hook_name")
    if other or "transcoder" in str(config.get("architecture")) or config.get("d_in") != d_out:
        raise Refusal(
            f"{where} reads width {str(config.get('d_in'))[:40]} and writes width {d_out}"
            f"{f' at {written}' if other else ''} ({config.get('architecture')}), expected an "
            "autoencoder, which writes what it reads; pass an SAE."
        )


def _ready(sae: Any, hook: str) -> Any:
    from darkmatter.suites.processing import on_raw_activations

    if sae.cfg.metadata.hook_name is None:
        sae.cfg.metadata.hook_name = hook
    return on_raw_activations(sae)


def _released(release: str, wanted: str, device: str) -> list[tuple[str, _Source]]:
    from darkmatter.suites import releases

    known = [str(row["id"]) for row in releases.release(release)["saes"]]
    ids = [one for one in known if fnmatchcase(one, wanted)] if set("*?") & set(wanted) else []
    return [
        (sae_id.replace("/", "-"), _of_release(release, sae_id, device))
        for sae_id in ids or [wanted]
    ]


def _of_release(release: str, sae_id: str, device: str) -> _Source:
    from darkmatter._hub import fetch, from_cache_only
    from darkmatter.suites import releases

    where = f"{release}/{sae_id}"
    files = releases.files_of(release, sae_id)
    if files is None:
        # Refuses, with what is to be done.
        releases.open_release(release, sae_id)
    for file in (files or ())[:-1]:
        fetch(releases.release(release)["repo_id"], file)

    from sae_lens.loading.pretrained_sae_loaders import load_sae_config_from_huggingface

    with from_cache_only():
        config = load_sae_config_from_huggingface(release, sae_id)
    _refuse_transcoder(where, config, int(config.get("d_out") or config["d_in"]))

    def read(hook: str) -> Any:
        return _ready(releases.open_release(release, sae_id, device), hook)

    hook: str | None = config["metadata"].get("hook_name")
    return _Source(where, hook, int(config["d_in"]), int(config.get("d_sae") or 0), read)


def _npz(path: Path, device: str) -> _Source:
    shapes = {key: shape for key, (_, shape) in _npz_arrays(path).items()}
    d_in, d_sae = (*shapes.get("W_enc", ()), 0, 0)[:2]
    expected = {
        "W_enc": (d_in, d_sae),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_in),
        "b_dec": (d_in,),
        "threshold": (d_sae,),
    }
    if shapes != expected or d_in < 1 or d_sae < 1:
        raise Refusal(
            f"{path} holds {', '.join(f'{k} {v}' for k, v in sorted(shapes.items())) or 'nothing'}"
            ", expected W_enc (d_in, d_sae), b_enc (d_sae), W_dec (d_sae, d_in), b_dec (d_in) and "
            "threshold (d_sae), as Gemma Scope stores them."
        )
    return _Source(str(path), None, d_in, d_sae, lambda hook: _open_npz(path, hook, device))


def _npz_arrays(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file and shape of every array, by the name of the weight; nothing else is read.

    Older files have a small w.
    """
    arrays: dict[str, tuple[str, tuple[int, ...]]] = {}
    with understood(path, _WHOLE_NPZ), zipfile.ZipFile(path) as archive:
        declared = 0
        for info in archive.infolist():
            member = info.filename
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{member} is packed in another way than numpy does")
            with archive.open(info) as stream:
                version = np.lib.format.read_magic(stream)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                try:
                    shape, _, dtype = read(stream)
                except tokenize.TokenError as error:  # codespell:ignore
                    raise ValueError(f"the header of {member} is none") from error
            name = member.removesuffix(".npy")
            if dtype.kind != "f":
                raise Refusal(
                    f"{name[:80]} of {path} is of {str(dtype)[:80]}, expected floating-point "
                    "numbers; nothing else is read, and pickled objects never."
                )
            arrays[re.sub("^w_", "W_", name)] = (name, tuple(shape))
            declared += math.prod(shape) * dtype.itemsize
        if declared > _MOST_PACKED * path.stat().st_size:
            raise ValueError(f"it tells of {declared} bytes")
    return arrays


def _open_npz(path: Path, hook: str, device: str) -> Any:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    with understood(path, _WHOLE_NPZ), np.load(path, allow_pickle=False) as stored:
        weights = {
            # Some of its types are none of torch's.
            name: torch.from_numpy(stored[key].astype(np.float32, copy=False)).to(device)
            for name, (key, _) in _npz_arrays(path).items()
        }
    d_in, d_sae = weights["W_enc"].shape
    config = JumpReLUSAEConfig(
        d_in=d_in,
        d_sae=d_sae,
        # Nothing is allocated before the weights take their places.
        device="meta",
        apply_b_dec_to_input=False,
        reshape_activations="hook_z" if hook.endswith("hook_z") else "none",
        metadata=SAEMetadata(hook_name=hook, prepend_bos=True),
    )
    sae = JumpReLUSAE(config)
    sae.load_state_dict(weights, assign=True)
    sae.cfg.device = device
    # Nothing moves: this tells the SAE where its weights are.
    return sae.to(device).eval().requires_grad_(False)


# Anything with encode and decode


@dataclass
class AdaptedConfig:
    """What is known of an adapted autoencoder, under sae-lens' names."""

    d_in: int
    d_sae: int
    metadata: Any
    device: str
    dtype: str
    affine: bool = True
    normalize_activations: str = "none"
    reshape_activations: str = "none"
    apply_b_dec_to_input: bool = False

    def architecture(self) -> str:
        """Of no family of sae-lens'."""
        return "adapted" if self.affine else "adapted_nonaffine"


class Adapted(WithDirections):
    """An autoencoder made by `adapt`: encode and decode are the object's own, in its dtype.

    W_dec [d_sae, d_in] is what each latent alone decodes to, less b_dec = decode(0); it has no rows
    when the decoder is not affine.
    """

    def __init__(
        self,
        module: Any,
        config: AdaptedConfig,
        W_dec: Float[Tensor, "m d"],
        b_dec: Float[Tensor, " d"],
    ) -> None:
        self.module, self.cfg, self.W_dec, self.b_dec = module, config, W_dec, b_dec

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows latents"]:
        """The object's latents of x."""
        return self.module.encode(x.to(self.device, self.dtype))

    @torch.no_grad()
    def decode(self, feature_acts: Float[Tensor, "*rows latents"]) -> Float[Tensor, "*rows d"]:
        """The object's x_hat of latents."""
        return self.module.decode(feature_acts)


@torch.no_grad()
def adapt(
    module: Any,
    hook: str,
    d_in: int | None = None,
    d_sae: int | None = None,
    affine: bool = True,
) -> Adapted:
    """An autoencoder of anything with encode(x [n, d_in]) -> latents and decode(latents) -> x_hat.

    Put a torch module in eval mode on the device, and in the dtype, that it is to run in. `hook`
    is where it was trained; for attention (hook_z) rows are the heads side by side. d_in is that of
    the object's W_dec, cfg, d_in or activation_dim where it is not given; d_sae is what encode
    returns and is checked if given. Directions are found by decoding every latent alone, some at a
    time, d_sae * d_in numbers in all.

    The object is tried on 64 random rows. Raises Refusal when it has no encode or decode or they
    fail, for latents or x_hat that are no tensors of the right shape, a transcoder (x_hat of
    another width than x), codes that change from call to call or depend on the other rows of the
    batch, and a decoder that is not affine, decode(f) = f W_dec + b_dec, such as one that also
    needs the input. With affine=False the last is allowed: `reconstruct` works, what needs
    directions (PursuitEncoder, `sparse_decode`) refuses.
    """
    name = type(module).__name__
    for method in ("encode", "decode"):
        if not callable(getattr(module, method, None)):
            raise Refusal(f"{name} has no method {method}; give it encode(x) and decode(latents).")
    like = _first_tensor(module)
    dtype, device = like.dtype, like.device
    d_in = d_in or _width_of(module)
    if d_in is None:
        raise Refusal(f"The width that {name} reads is not known; pass d_in=model.width(hook).")
    draws = torch.randn(64, d_in, generator=torch.Generator().manual_seed(0))
    x = draws.to(device, dtype)
    code = _tried(name, "encode", module.encode, x)
    if code.ndim != 2 or len(code) != len(x) or d_sae not in (None, code.shape[1]):
        raise Refusal(
            f"encode of {name} returned {tuple(code.shape)} for x {tuple(x.shape)}, expected "
            f"({len(x)}, {d_sae or 'd_sae'}), one row of latents each."
        )
    x_hat = _tried(name, "decode", module.decode, code)
    if x_hat.ndim == 2 and x_hat.shape[1] != d_in:
        raise Refusal(
            f"{name} reads width {d_in} and writes width {x_hat.shape[1]}, like a transcoder, "
            "expected an autoencoder, which writes what it reads; pass an SAE."
        )
    if x_hat.shape != x.shape:
        raise Refusal(
            f"decode of {name} returned {tuple(x_hat.shape)}, expected {tuple(x.shape)}, one row "
            "for each row of latents."
        )
    if _differ(module.encode(x), code):
        raise Refusal(
            f"encode of {name} answers differently when called twice with the same x, expected a "
            "function of x alone; put it in eval mode (module.eval())."
        )
    if _differ(torch.cat([module.encode(row) for row in x[:8].split(1)]), code[:8]):
        raise Refusal(
            f"The latents of a row depend on the other rows that {name} encodes with it, expected "
            "each row by itself; fix its threshold as for inference."
        )
    decoder = _affine_decoder(module, x, code, x_hat)
    if affine and decoder is None:
        raise Refusal(
            f"decode of {name} is not affine in the latents, or also needs the input, expected "
            "f W_dec + b_dec; pass affine=False to take it as it is."
        )
    from sae_lens.saes.sae import SAEMetadata

    kind = str(dtype).removeprefix("torch.")
    metadata = SAEMetadata(hook_name=hook)
    config = AdaptedConfig(
        d_in, code.shape[1], metadata, str(device), kind, affine=decoder is not None
    )
    return Adapted(module, config, *(decoder or (code.new_empty(0, d_in), code.new_zeros(d_in))))


def _first_tensor(module: Any) -> Tensor:
    """One whose dtype and device are the object's."""
    if isinstance(module, torch.nn.Module):
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                return tensor
    own = getattr(module, "W_dec", None)
    return own if isinstance(own, Tensor) else torch.empty(0)


def _width_of(module: Any) -> int | None:
    for holder in (getattr(module, "cfg", None), module):
        for attribute in ("d_in", "activation_dim"):
            if isinstance(width := getattr(holder, attribute, None), int):
                return width
    directions = getattr(module, "W_dec", None)
    return directions.shape[1] if isinstance(directions, Tensor) else None


def _tried(name: str, method: str, function: Callable[[Tensor], Any], x: Tensor) -> Tensor:
    try:
        found = function(x)
    except Exception as error:
        # The object is the user's: whatever it raises.
        raise Refusal(
            f"{method} of {name} failed on {tuple(x.shape)} of {x.dtype} ({type(error).__name__}: "
            f"{str(error).strip().partition(chr(10))[0]}); it is called with one row a token."
        ) from error
    if not isinstance(found, Tensor):
        raise Refusal(
            f"{method} of {name} returned {type(found).__name__}, expected one tensor; wrap it in "
            "an object whose encode and decode return tensors."
        )
    return found


def _affine_decoder(
    module: Any, x: Tensor, code: Tensor, x_hat: Tensor
) -> tuple[Tensor, Tensor] | None:
    """(W, b) with decode(f) = f W + b, or None when there are none."""
    dense = torch.rand(code.shape, generator=torch.Generator().manual_seed(1)).to(code)
    try:
        directions, bias = _decoded_alone(module, code)
        # Another x than that of the code, for decoders that keep something of it.
        module.encode(x.flip(0) * 3 + 1)
        found = [module.decode(code), code @ directions + bias, dense @ directions + bias]
        expected = [x_hat, x_hat, module.decode(dense)]
    except Exception:
        # It decodes what it encoded (that was tried before), and nothing else.
        return None
    differ = any(map(_differ, found, expected))
    return None if differ else (directions, bias)


def _decoded_alone(module: Any, code: Tensor) -> tuple[Tensor, Tensor]:
    """decode(e_i) - decode(0) for every latent i, and decode(0)."""
    d_sae = code.shape[1]
    bias = module.decode(code.new_zeros(1, d_sae))[0]
    rows = max(1, _UNIT_CODES // d_sae)
    parts: list[Tensor] = []
    for latents in torch.arange(d_sae, device=code.device).split(rows):
        alone = code.new_zeros(len(latents), d_sae)
        alone[torch.arange(len(latents)), latents] = 1
        parts.append(module.decode(alone) - bias)
    return torch.cat(parts), bias


def _differ(found: Tensor, expected: Tensor) -> bool:
    """By more than sums of thousands of roundings, relative to the largest number."""
    allowed = {torch.float64: 1e-8, torch.float32: 1e-3}.get(expected.dtype, 0.1)
    return bool((found - expected).abs().max() > allowed * expected.abs().max())

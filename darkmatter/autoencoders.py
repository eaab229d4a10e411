"""Sparse autoencoders of sae-lens: load, check, encode sparsely, correct linearly.

There is no class of our own around them: whatever has `encode`, `decode`, `W_dec`, `b_dec` and
`cfg` as sae-lens' SAEs do is an autoencoder here.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from darkmatter._files import CorruptFile, verify_safetensors, verify_sha256
from darkmatter._refusal import Refusal
from darkmatter.leastsquares import LinearMap
from darkmatter.models import Model
from darkmatter.pursuit import gradient_pursuit
from darkmatter.sparse import SparseCode, flat_nonzero

__all__ = [
    "Autoencoder",
    "CorruptFile",
    "LinearlyCorrected",
    "PursuitEncoder",
    "check_fits",
    "decoder_of",
    "hook_of",
    "load_autoencoder",
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
}
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
    config, weights = folder / "cfg.json", folder / "sae_weights.safetensors"
    for file in (config, weights):
        if not file.is_file():
            raise Refusal(
                f"There is no {file}; pass a folder with cfg.json and sae_weights.safetensors, as "
                "sae-lens' save_model and save_inference_model write it."
            )
    if sha256 is not None:
        verify_sha256(weights, sha256)
    verify_safetensors(weights)
    try:
        json.loads(config.read_text())
    except ValueError as error:
        raise CorruptFile(f"{config} is not JSON ({error}); restore the file.") from error

    from sae_lens import SAE

    try:
        sae = SAE.load_from_disk(folder, device=device, dtype="float32")
    except (KeyError, ValueError, TypeError, RuntimeError) as error:
        first = str(error).strip().split("\n")[0]
        raise Refusal(
            f"sae-lens cannot open {folder} ({type(error).__name__}: {first}); its config and "
            "weights must be those of one of sae-lens' inference architectures."
        ) from error
    return sae.eval().requires_grad_(False)


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
    if hook is None:
        hook = hook_of(sae)
    elif trained_at is not None and hook != trained_at:
        raise Refusal(
            f"The autoencoder was trained at {trained_at}, not at {hook}; read the activations of "
            f"{trained_at}."
        )
    width = model.width(hook)
    if width != sae.cfg.d_in:
        raise Refusal(
            f"The autoencoder reads activations of width {sae.cfg.d_in}, but {model.name} has "
            f"{width} at {hook}; use the model it was trained on."
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
            f"{sae.cfg.normalize_activations!r} also needs the input; use reconstruct(sae, x)."
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
        self.cfg: Any = copy.deepcopy(sae.cfg)
        self.cfg.d_sae = int(sae.cfg.d_sae) + expected[0]
        if hasattr(self.cfg, "rescale_acts_by_decoder_norm"):
            # W_dec below is the directions as they are used.
            self.cfg.rescale_acts_by_decoder_norm = False

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


class PursuitEncoder:
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
        self.cfg: Any = copy.deepcopy(sae.cfg)
        if hasattr(self.cfg, "rescale_acts_by_decoder_norm"):
            # W_dec is the directions as they are used.
            self.cfg.rescale_acts_by_decoder_norm = False

    @property
    def device(self) -> torch.device:
        return self.W_dec.device

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

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
    def decode(self, feature_acts: Float[Tensor, "*rows latents"]) -> Float[Tensor, "*rows d"]:
        """f W_dec + b_dec."""
        return feature_acts @ self.W_dec + self.b_dec

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """x_hat, `reconstruct`ed some rows at a time."""
        return reconstruct(self, x.flatten(0, -2)).view_as(x)

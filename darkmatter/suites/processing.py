"""What activations an SAE was trained on, and the same SAE on those that the model has.

    raw x  ->  less its mean over d_model  ->  times a scale  ->  divided by its own norm  ->  SAE

and back in the opposite order. Each step is there or not; `processing_of` tells which.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.autoencoders import Autoencoder, WithDirections, config_as_used

Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]


@dataclass(frozen=True)
class Processing:
    """How the activations of an SAE are made of those of the model as transformers loads it.

    centred: less their mean over d_model, as transformer-lens' center_writing_weights makes them.
    scale: times one number for all tokens (None: there is one, but not in the config).
    normalisation: of each token by its own norm, as sae-lens' SAEs do and undo it themselves.
    prepend_bos: contexts began with BOS in training. source: how all this is known.
    """

    centred: bool = False
    scale: float | None = 1.0
    normalisation: Normalisation = "none"
    prepend_bos: bool = True
    source: str = "the SAE's config"

    @property
    def is_raw(self) -> bool:
        """Whether the SAE is one of raw activations as it is, with a decoder f W_dec + b_dec."""
        return not self.centred and self.scale == 1 and self.normalisation == "none"


# What configs need not say, by Neuronpedia's name of an SAE: whether it read centred activations,
# and how that is known. A scale that sae-lens knows is in the weights once sae-lens opened them.
_CENTRED: dict[str, tuple[bool, str]] = {
    r"gpt2-small/\d+-(res-jb|res_fs\d+-jb|mlp-tm)": (
        True,
        "sae-lens' list of releases (center_writing_weights)",
    ),
    r"gpt2-small/\d+-\w+-oai": (False, "LayerNorm at the SAE's input centres by itself"),
    r"gemma-2-[\w-]+/\d+-gemmascope-[\w-]+": (
        False,
        "Lieberum et al. (2408.05147): raw, the scale folded into the weights at release",
    ),
    r"llama3\.1-8b/\d+-llamascope-[\w-]+": (
        False,
        "sae-lens: raw, the scale folded into the weights when opened (norm_scaling_factor)",
    ),
    r"pythia-70m-deduped/\w+-(res|mlp|att)-sm": (
        False,
        "Marks et al. (2403.19647): raw activations read by nnsight",
    ),
}


def processing_of(sae: Autoencoder) -> Processing:
    """What the SAE's config and metadata, and else the table of known releases, say.

    Raises Refusal for a normalisation that is known neither here nor to the SAE (whitening that was
    not folded into the weights).
    """
    metadata = sae.cfg.metadata
    kind = getattr(sae.cfg, "normalize_activations", None) or "none"
    scale: float | None = 1.0
    if kind == "expected_average_only_in":
        kind, scale = "none", None
    if kind not in ("none", "layer_norm", "constant_norm_rescale"):
        raise Refusal(
            f"The SAE expects activations under {kind!r} and holds no statistics for it, expected "
            "weights that it was folded into; save_inference_model it where it was trained."
        )
    bos = getattr(metadata, "prepend_bos", None)
    found = Processing(
        scale=scale, normalisation=kind, prepend_bos=True if bos is None else bool(bos)
    )
    processed = getattr(metadata, "model_from_pretrained_kwargs", None) or {}
    if "center_writing_weights" in processed:
        return replace(found, centred=bool(processed["center_writing_weights"]))
    name = str(getattr(metadata, "neuronpedia_id", None) or "")
    for pattern, (centred, source) in _CENTRED.items():
        if re.fullmatch(pattern, name):
            return replace(found, centred=centred, source=source)
    return found


def on_raw_activations(
    sae: Any, processing: Processing | None = None, already_centred: bool = False
) -> Any:
    """The SAE as one of the activations that the model has: itself, or an `OnRawActivations`.

    `already_centred`: the model was opened with centred weights. Raises Refusal when the SAE needs
    a scale that is not in its config; give it, as processing=Processing(scale=...).
    """
    processing = processing or processing_of(sae)
    if already_centred:
        processing = replace(processing, centred=False)
    if processing.scale is None:
        raise Refusal(
            "The SAE was trained on activations times one number (expected_average_only_in), which "
            "its config does not hold; pass processing=Processing(scale=...), which is sqrt(d_in) "
            "over the mean norm of the activations."
        )
    return sae if processing.is_raw else OnRawActivations(sae, processing, already_centred)


class OnRawActivations(WithDirections):
    """An SAE of processed activations, presented as one of raw activations x [n, d].

    With y = P(x) what the SAE reads, f = f(y) its code and y = g (x - m 1), where m is the mean of
    x over its components (0 unless it is taken off) and 1 / g a norm of x (or a constant):

        x_hat = (f W_dec + b_dec) / g + m 1,        x - x_hat = (y - y_hat) / g

    So the code of x is [f / g, 1 / g, m], with directions [W_dec; b_dec; 1] and bias 0: the decoder
    is affine, and whatever takes an autoencoder takes this. Where g is one number for all tokens it
    is in the directions, and the code is [f, m]. The last `carried` latents are no latents of the
    SAE's but what has to be carried from its input to its output; they are in l0 and d_sae. The
    latents that are active are the SAE's. `already_centred`: m is 0, and is not carried.
    """

    def __init__(self, sae: Any, processing: Processing, already_centred: bool = False) -> None:
        if getattr(sae, "hook_z_reshaping_mode", False):
            sae = copy.copy(sae)
            sae.turn_off_forward_pass_hook_z_reshaping()
        assert processing.scale is not None
        self.sae, self.processing, self._scale = sae, processing, processing.scale
        by_token = processing.normalisation != "none"
        self._takes_mean = not already_centred and (
            processing.centred or processing.normalisation == "layer_norm"
        )
        self.carried = int(by_token) + int(self._takes_mean)
        self.cfg = config_as_used(sae, self.carried)
        self.cfg.normalize_activations = "none"

        directions = sae.W_dec.detach()
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            directions = directions / directions.norm(dim=-1, keepdim=True)
        directions, bias = directions / self._scale, sae.b_dec.detach() / self._scale
        rows = [directions, bias[None]] if by_token else [directions]
        if self._takes_mean:
            rows.append(torch.ones_like(bias)[None])
        self.W_dec = torch.cat(rows)
        self.b_dec = torch.zeros_like(bias) if by_token else bias

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows latents"]:
        """The SAE's dense code of P(x) in raw units, then what is carried."""
        x = x.to(self.dtype)
        mean = x.mean(-1, keepdim=True)
        y = (x - mean if self.processing.centred else x) * self._scale
        code, carried = self.sae.encode(y), [mean] if self._takes_mean else []
        match self.processing.normalisation:
            case "layer_norm":
                # sae-lens divides by std + 1e-5 and multiplies by std.
                norm = (y - y.mean(-1, keepdim=True)).std(-1, keepdim=True)
            case "constant_norm_rescale":
                norm = y.norm(dim=-1, keepdim=True) / y.shape[-1] ** 0.5
            case _:
                return torch.cat([code, *carried], -1)
        return torch.cat([code * norm, norm, *carried], -1)

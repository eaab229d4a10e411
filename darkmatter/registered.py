"""Training classes that sae-lens lacks, registered with it: importing this module is all it takes.

With pre = x W_enc + b_enc, f = relu(pre), d(f) = f W_dec + b_dec and d* = d as a constant:

    expanded          |x - d(p o f)|^2 + |x - d*(f)|^2 + l1 * |f|_1,  W_i kept at unit norm
                      x_hat = d(p o f); saved as a StandardSAE with decoder rows p_i W_i
    rescaled_shifted  |x - d(g)|^2,  g = 1[pre > 0] o relu(exp(r) o pre + t);  only r and t learn
                      x_hat = d(g); saved as a GatedSAE

each a mean over tokens. sae-lens' own SAETrainer trains them, `SAE.load_from_disk` opens what
`save_inference_model` wrote, with or without this module, and `TrainingSAE.load_from_disk` what
`save_model` wrote, with it. `darkmatter.objectives` has the same losses in a faster loop (tests
compare values and gradients) and the best r and t in closed form. Sources: as there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import (
    GatedSAEConfig,
    SAEConfig,
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    register_sae_training_class,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from torch import Tensor, nn
from typing_extensions import override

from darkmatter._refusal import Refusal


@dataclass
class ExpandedTrainingSAEConfig(StandardTrainingSAEConfig):
    """As of a StandardTrainingSAE: d_in, d_sae, l1_coefficient, l1_warm_up_steps."""

    decoder_init_norm: float | None = 1.0

    @override
    @classmethod
    def architecture(cls) -> str:
        return "expanded"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class ExpandedTrainingSAE(StandardTrainingSAE):
    """Gains p on the codes in the reconstruction; the penalty sees the codes without them.

    Decoder rows are put back to unit norm before every step. sae-lens' way to hold them, an L1
    weighed by their norms, fails beside d*: the penalty shrinks the rows, and the one term that
    would resist takes them as constants.
    """

    gain: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        self.gain = nn.Parameter(torch.ones_like(self.b_enc))

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        return self.hook_sae_acts_post(self.gain * self.activation_fn(pre)), pre

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self.W_dec.data /= self.get_W_dec_norm()[:, None]
        return super().training_forward_pass(step_input)

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        f = self.activation_fn(hidden_pre)
        held = f @ self.W_dec.detach() + self.b_dec.detach()
        return {
            "l1_loss": step_input.coefficients["l1"] * f.sum(-1).mean(),
            "auxiliary_reconstruction_loss": (step_input.sae_in - held).square().sum(-1).mean(),
        }

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        state_dict["W_dec"] = (state_dict.pop("gain")[:, None] * state_dict["W_dec"]).contiguous()


@dataclass
class RescaledShiftedTrainingSAEConfig(TrainingSAEConfig):
    """d_in and d_sae of the StandardSAE whose codes are rescaled and shifted."""

    decoder_init_norm: float | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "rescaled_shifted"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return GatedSAEConfig


class RescaledShiftedTrainingSAE(TrainingSAE[RescaledShiftedTrainingSAEConfig]):
    """A finished SAE that learns a gain exp(r) and a shift t of each latent, and nothing else."""

    b_enc: nn.Parameter
    r_mag: nn.Parameter
    shift: nn.Parameter

    @override
    def initialize_weights(self) -> None:
        super().initialize_weights()
        zeros = torch.zeros(self.cfg.d_sae, dtype=self.dtype, device=self.device)
        self.b_enc = nn.Parameter(zeros.clone())
        for held in (self.W_enc, self.b_enc, self.W_dec, self.b_dec):
            held.requires_grad_(False)
        self.r_mag, self.shift = nn.Parameter(zeros.clone()), nn.Parameter(zeros.clone())

    @override
    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = self.hook_sae_acts_pre(self.process_sae_in(x) @ self.W_enc + self.b_enc)
        magnitude = self.activation_fn(self.r_mag.exp() * pre + self.shift)
        return self.hook_sae_acts_post((pre > 0).to(magnitude) * magnitude), pre

    @override
    def get_coefficients(self) -> dict[str, Any]:
        return {}

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: Tensor,
        hidden_pre: Tensor,
        sae_out: Tensor,
    ) -> dict[str, Tensor]:
        return {}

    @override
    @torch.no_grad()
    def fold_W_dec_norm(self) -> None:
        self.shift.data *= self.W_dec.norm(dim=-1)
        super().fold_W_dec_norm()

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        b_gate = state_dict.pop("b_enc")
        state_dict["b_gate"] = b_gate
        state_dict["b_mag"] = state_dict["r_mag"].exp() * b_gate + state_dict.pop("shift")


def rescale_and_shift(sae: StandardSAE) -> RescaledShiftedTrainingSAE:
    """The training class around a finished StandardSAE; exp(r) = 1 and t = 0, the same function.

    Raises Refusal for any other architecture.
    """
    if sae.cfg.architecture() != "standard":
        raise Refusal(
            f"expected a StandardSAE, got a {sae.cfg.architecture()} autoencoder; an L1 penalty is "
            "what rescaling and shifting repairs."
        )
    config = RescaledShiftedTrainingSAEConfig(
        d_in=sae.cfg.d_in,
        d_sae=sae.cfg.d_sae,
        dtype=sae.cfg.dtype,
        device=sae.cfg.device,
        apply_b_dec_to_input=sae.cfg.apply_b_dec_to_input,
        normalize_activations=sae.cfg.normalize_activations,
    )
    made = RescaledShiftedTrainingSAE(config)
    made.load_state_dict(made.state_dict() | sae.state_dict())
    made.cfg.metadata.hook_name = sae.cfg.metadata.hook_name
    return made


register_sae_training_class("expanded", ExpandedTrainingSAE, ExpandedTrainingSAEConfig)
register_sae_training_class(
    "rescaled_shifted", RescaledShiftedTrainingSAE, RescaledShiftedTrainingSAEConfig
)

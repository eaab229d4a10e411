"""Autoencoders against sae-lens' own encode, decode and evals."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.autoencoders import (
    Autoencoder,
    CorruptFile,
    LinearlyCorrected,
    PursuitEncoder,
    check_fits,
    decoder_of,
    hook_of,
    load_autoencoder,
    reconstruct,
    sparse_decode,
    sparse_encode,
    verify_sha256,
)
from darkmatter.leastsquares import LinearMap, LinearStatistics, fvu
from darkmatter.models import Model
from darkmatter.pursuit import matching_pursuit as one_atom_at_a_time
from darkmatter.pursuit import nonnegative_refit
from tests.conftest import D_MODEL, HOOK

NAMES = ("jumprelu", "topk", "topk_rescaled", "standard", "gated", "normalised")
AFFINE = NAMES[:-1]
# float32 rounding of sums of up to 96 products of order 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def x() -> Tensor:
    return torch.randn(50, D_MODEL) * 2 + 1


@pytest.fixture
def matching_pursuit() -> Any:
    import sae_lens

    sae = sae_lens.MatchingPursuitSAE(
        sae_lens.MatchingPursuitSAEConfig(
            d_in=D_MODEL, d_sae=96, max_iterations=6, apply_b_dec_to_input=False
        )
    )
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(96, D_MODEL), dim=-1))
        sae.b_dec.fill_(5.0)
    return sae


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [7, 2048])
def test_sparse_is_dense(tiny_saes: dict[str, Any], x: Tensor, name: str, batch: int) -> None:
    sae = tiny_saes[name]
    dense = sae.encode(x)
    code = sparse_encode(sae, x, batch)
    assert torch.equal(code.l0, (dense != 0).sum(1))
    assert code.values.shape[1] == int(code.l0.max())
    torch.testing.assert_close(code.dense(96), dense, **CLOSE)
    expected = sae.decode(sae.encode(x))
    torch.testing.assert_close(reconstruct(sae, x, batch), expected, **CLOSE)
    if name in AFFINE:
        torch.testing.assert_close(sparse_decode(sae, code), expected, **CLOSE)
        directions, bias = decoder_of(sae)
        torch.testing.assert_close(dense @ directions + bias, expected, **CLOSE)


@torch.no_grad()
def test_matching_pursuit_does_not_add_a_bias_it_did_not_take(
    matching_pursuit: Any, x: Tensor
) -> None:
    expected = matching_pursuit.decode(matching_pursuit.encode(x))
    torch.testing.assert_close(reconstruct(matching_pursuit, x), expected, **CLOSE)
    assert decoder_of(matching_pursuit)[1].abs().max() == 0


@torch.no_grad()
def test_a_jumprelu_below_zero_is_a_relu(tiny_saes: dict[str, Any], x: Tensor) -> None:
    sae = copy.deepcopy(tiny_saes["jumprelu"])
    sae.threshold.copy_(torch.linspace(-2, 2, 96))
    dense = sae.encode(x)
    assert (dense[:, :48] > 0).any()
    torch.testing.assert_close(sparse_encode(sae, x).dense(96), dense, **CLOSE)


def test_no_rows(tiny_saes: dict[str, Any]) -> None:
    none = torch.zeros(0, D_MODEL)
    assert len(sparse_encode(tiny_saes["topk"], none)) == 0
    assert reconstruct(tiny_saes["topk"], none).shape == (0, D_MODEL)


@torch.no_grad()
def test_autoencoders_of_hook_z_take_flat_rows(x: Tensor) -> None:
    import sae_lens

    metadata = sae_lens.saes.sae.SAEMetadata(hook_name="blocks.0.attn.hook_z")
    config = sae_lens.StandardSAEConfig(
        d_in=D_MODEL, d_sae=96, reshape_activations="hook_z", metadata=metadata
    )
    sae = sae_lens.StandardSAE(config)
    by_head = sae.decode(sae.encode(x.reshape(50, 1, 4, 8))).reshape(50, D_MODEL)
    torch.testing.assert_close(reconstruct(sae, x), by_head, **CLOSE)
    # And they split heads again afterwards.
    assert sae.hook_z_reshaping_mode
    again = sae.decode(sae.encode(x.reshape(50, 1, 4, 8)))
    torch.testing.assert_close(again.reshape(50, D_MODEL), by_head, **CLOSE)


def test_sae_lens_explained_variance_is_one_minus_fvu(tiny_saes: dict[str, Any], x: Tensor) -> None:
    from sae_lens.evals import ExplainedVarianceCalculator

    x_hat = reconstruct(tiny_saes["topk"], x)
    calculator = ExplainedVarianceCalculator()
    for rows, rows_hat in zip(x.split(20), x_hat.split(20), strict=True):
        calculator.add_batch(rows_hat, rows)
    # Theirs squares in float32 and subtracts the mean's share.
    assert calculator.compute() == pytest.approx(1 - fvu(x, x_hat), abs=1e-5)


# Loading


def test_weights_stored_in_half_precision_are_computed_in_float32(
    tiny_saes: dict[str, Any], x: Tensor, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    sae = tiny_saes["jumprelu"]
    weights, _ = sae.save_model(tmp_path)
    stored = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(stored, weights)
    digest = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    loaded = load_autoencoder(tmp_path, sha256=digest.upper())
    assert loaded.dtype == loaded.W_dec.dtype == torch.float32
    assert isinstance(loaded, Autoencoder)
    assert hook_of(loaded) == HOOK
    for name, tensor in stored.items():
        assert torch.equal(loaded.state_dict()[name], tensor.float())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    # float16 rounds weights by 5e-4 of their size; sums of 32 products of order 1.
    torch.testing.assert_close(loaded.encode(x), sae.encode(x), rtol=0.1, atol=0.1)


def test_damaged_files_are_refused_by_name(tiny_saes: dict[str, Any], tmp_path: Path) -> None:
    weights, config = tiny_saes["topk"].save_model(tmp_path)
    weights, config = Path(weights), Path(config)
    whole, settings = weights.read_bytes(), config.read_text()
    with pytest.raises(CorruptFile, match=r"sae_weights\.safetensors has SHA-256 .* expected 00"):
        load_autoencoder(tmp_path, sha256="00" * 32)
    altered = bytearray(whole)
    altered[-1] ^= 1
    weights.write_bytes(altered)
    with pytest.raises(CorruptFile, match="SHA-256"):
        verify_sha256(weights, hashlib.sha256(whole).hexdigest())
    weights.write_bytes(whole[:-10])
    with pytest.raises(CorruptFile, match=r"sae_weights\.safetensors is not a whole safetensors"):
        load_autoencoder(tmp_path)
    weights.write_bytes(whole)
    config.write_text(settings[:-5])
    with pytest.raises(CorruptFile, match=r"cfg\.json is not JSON"):
        load_autoencoder(tmp_path)
    config.write_text(json.dumps({**json.loads(settings), "architecture": "perceptron"}))
    with pytest.raises(Refusal, match="sae-lens cannot open"):
        load_autoencoder(tmp_path)
    config.write_text(json.dumps({**json.loads(settings), "architecture": "jumprelu"}))
    with pytest.raises(Refusal, match="sae-lens cannot open"):
        load_autoencoder(tmp_path)
    config.unlink()
    with pytest.raises(Refusal, match=r"no .*cfg\.json"):
        load_autoencoder(tmp_path)
    with pytest.raises(Refusal, match="no file"):
        verify_sha256(tmp_path / "nothing", "00")


def test_an_autoencoder_must_fit_the_model(tiny_saes: dict[str, Any], tiny_model: Model) -> None:
    import sae_lens

    sae = tiny_saes["topk"]
    check_fits(sae, tiny_model)
    check_fits(sae, tiny_model, HOOK)
    with pytest.raises(Refusal, match=r"trained at blocks\.1\.hook_resid_post, not at"):
        check_fits(sae, tiny_model, "blocks.0.hook_resid_post")
    config = sae_lens.TopKSAEConfig(d_in=16, d_sae=64, k=2)
    other = sae_lens.TopKSAE(config)
    with pytest.raises(Refusal, match="names no hook point"):
        check_fits(other, tiny_model)
    with pytest.raises(Refusal, match=r"width 16, but .* has 32 at"):
        check_fits(other, tiny_model, HOOK)
    other.cfg.metadata.hook_name = "blocks.9.hook_resid_post"
    with pytest.raises(Refusal, match=r"no hook 'blocks\.9"):
        check_fits(other, tiny_model)


@pytest.mark.usefixtures("unchecked")
def test_wrong_input_is_refused(tiny_saes: dict[str, Any], x: Tensor) -> None:
    import sae_lens

    with pytest.raises(Refusal, match=r"\(50, 31\), expected \[n, 32\]"):
        sparse_encode(tiny_saes["topk"], x[:, 1:])
    with pytest.raises(Refusal, match="batch is 0"):
        reconstruct(tiny_saes["topk"], x, 0)
    with pytest.raises(Refusal, match=r"normalize_activations='layer_norm'.*reconstruct"):
        decoder_of(tiny_saes["normalised"])
    config = sae_lens.BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=96, k=5)
    with pytest.raises(Refusal, match="depend on the batch"):
        sparse_encode(sae_lens.BatchTopKTrainingSAE(config), x)


# An autoencoder plus a linear map


@pytest.fixture
def linear_map(tiny_saes: dict[str, Any], x: Tensor) -> LinearMap:
    statistics = LinearStatistics(D_MODEL, D_MODEL)
    return statistics.partial_fit(x, x - reconstruct(tiny_saes["topk"], x)).solve()


@torch.no_grad()
@pytest.mark.parametrize("name", ["topk", "topk_rescaled", "jumprelu"])
def test_linearly_corrected_is_the_sum(
    tiny_saes: dict[str, Any], linear_map: LinearMap, x: Tensor, name: str
) -> None:
    sae = tiny_saes[name]
    corrected = LinearlyCorrected(sae, linear_map)
    expected = sae.decode(sae.encode(x)) + linear_map(x)
    # Weights of a fit on 50 rows in 32 dimensions are of order 1.
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(corrected(x), expected, **close)
    torch.testing.assert_close(corrected(x.view(5, 10, -1)), expected.view(5, 10, -1), **close)
    torch.testing.assert_close(corrected.decode(corrected.encode(x)), expected, **close)
    torch.testing.assert_close(
        corrected.encode(x) @ corrected.W_dec + corrected.b_dec, expected, **close
    )
    torch.testing.assert_close(reconstruct(corrected, x), expected, **close)
    assert isinstance(corrected, Autoencoder)
    assert corrected.cfg.d_sae == 96 + D_MODEL == len(corrected.W_dec)
    assert sae.cfg.d_sae == 96
    assert hook_of(corrected) == HOOK


@torch.no_grad()
def test_a_zero_map_is_the_autoencoder(tiny_saes: dict[str, Any], x: Tensor) -> None:
    nothing = torch.zeros(D_MODEL, D_MODEL, dtype=torch.float64)
    corrected = LinearlyCorrected(tiny_saes["topk"], LinearMap(nothing, nothing[0], 0.0, 100))
    assert torch.equal(corrected(x), reconstruct(tiny_saes["topk"], x))


def test_a_map_of_another_width_is_refused(tiny_saes: dict[str, Any]) -> None:
    nothing = torch.zeros(D_MODEL, 1, dtype=torch.float64)
    with pytest.raises(Refusal, match=r"\(32, 1\), expected \(32, 32\)"):
        LinearlyCorrected(tiny_saes["topk"], LinearMap(nothing, nothing[0], 0.0, 100))


# A pursuit in place of the encoder


@torch.no_grad()
@pytest.mark.parametrize("name", AFFINE)
@pytest.mark.parametrize("pursuit", [None, one_atom_at_a_time])
def test_pursuit_encoder_keeps_every_tokens_sparsity(
    tiny_saes: dict[str, Any], x: Tensor, name: str, pursuit: Any
) -> None:
    sae = tiny_saes[name]
    pursued = PursuitEncoder(sae) if pursuit is None else PursuitEncoder(sae, pursuit)
    own, code = sparse_encode(sae, x), sparse_encode(pursued, x)
    assert (code.l0 <= own.l0).all()
    # Atoms are selected again where there are three a dimension and as many active as dimensions.
    assert code.l0.float().mean() > 0.5 * own.l0.float().mean()
    assert (code.values >= 0).all()
    expected = sparse_decode(pursued, code)
    torch.testing.assert_close(pursued(x), expected, **CLOSE)
    torch.testing.assert_close(pursued(x.view(5, 10, -1)), expected.view(5, 10, -1), **CLOSE)
    torch.testing.assert_close(pursued.decode(pursued.encode(x)), expected, **CLOSE)
    torch.testing.assert_close(reconstruct(pursued, x), expected, **CLOSE)
    # Random encoders know nothing of their decoders; a search on the decoder must do better.
    assert fvu(x, expected) < 0.9 * fvu(x, reconstruct(sae, x))
    assert isinstance(pursued, Autoencoder)
    assert hook_of(pursued) == HOOK
    assert (pursued.device, pursued.dtype) == (sae.W_dec.device, sae.W_dec.dtype)


@torch.no_grad()
def test_pursuit_encoder_takes_any_pursuit_and_a_linear_map(
    tiny_saes: dict[str, Any], linear_map: LinearMap, x: Tensor
) -> None:
    sae = tiny_saes["topk"]

    def refit(x: Tensor, dictionary: Tensor, l0: Tensor, bias: Tensor) -> Any:
        own = sparse_encode(sae, x)
        assert torch.equal(l0, own.l0)
        return nonnegative_refit(x, dictionary, own, bias)

    pursued = PursuitEncoder(sae, refit)
    assert fvu(x, pursued(x)) < fvu(x, reconstruct(sae, x))
    both = LinearlyCorrected(pursued, linear_map)
    torch.testing.assert_close(both(x), pursued(x) + linear_map(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_pursuit_encoder_uses_the_bias_of_the_decoder(matching_pursuit: Any, x: Tensor) -> None:
    # Its b_dec is not added in decoding, so that it may not be subtracted either.
    pursued = PursuitEncoder(matching_pursuit, one_atom_at_a_time)
    own = matching_pursuit.encode(x)
    # Theirs ends a row early when an atom is selected again.
    whole = (own != 0).sum(1) == 6
    assert whole.float().mean() > 0.9
    torch.testing.assert_close(pursued(x)[whole], matching_pursuit.decode(own)[whole], **CLOSE)


def test_pursuit_encoder_refuses_what_does_not_write_what_it_reads(
    tiny_saes: dict[str, Any],
) -> None:
    import sae_lens

    config = sae_lens.TranscoderConfig(
        d_in=D_MODEL, d_sae=96, d_out=D_MODEL, apply_b_dec_to_input=False
    )
    with pytest.raises(Refusal, match="expected an autoencoder"):
        PursuitEncoder(sae_lens.Transcoder(config))
    with pytest.raises(Refusal, match="also needs the input"):
        PursuitEncoder(tiny_saes["normalised"])


def test_sae_lens_evals_agree_with_our_splice(
    tiny_model: Model, tiny_saes: dict[str, Any], linear_map: LinearMap, tiny_tokens: Tensor
) -> None:
    from sae_lens.evals import get_recons_loss
    from sae_lens.training.activation_scaler import ActivationScaler

    sae = tiny_saes["topk"]
    corrected, pursued = LinearlyCorrected(sae, linear_map), PursuitEncoder(sae)
    for candidate, function in (
        (sae, lambda a: reconstruct(sae, a.flatten(0, 1)).view_as(a)),
        (corrected, corrected),
        (pursued, pursued),
    ):
        with torch.no_grad():
            theirs = get_recons_loss(
                candidate, tiny_model.underlying, ActivationScaler(), tiny_tokens, False, True
            )
        # float32 rounding of reconstructions of order 10 through one block.
        ours = tiny_model.loss(tiny_tokens, {HOOK: function})
        torch.testing.assert_close(ours, theirs["ce_loss_with_sae"], rtol=1e-4, atol=1e-4)
        clean = tiny_model.loss(tiny_tokens)
        torch.testing.assert_close(clean, theirs["ce_loss_without_sae"], rtol=1e-4, atol=1e-4)
        zero = tiny_model.loss(tiny_tokens, {HOOK: torch.zeros_like})
        torch.testing.assert_close(zero, theirs["ce_loss_with_ablation"], rtol=1e-4, atol=1e-4)
        assert (ours - clean).abs().mean() > 0.01

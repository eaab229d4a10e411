"""Autoencoders against sae-lens' own encode, decode and evals."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from darkmatter._refusal import Refusal
from darkmatter.autoencoders import (
    Autoencoder,
    CorruptFile,
    LinearlyCorrected,
    PursuitEncoder,
    adapt,
    check_fits,
    decoder_of,
    hook_of,
    load_autoencoder,
    open_autoencoders,
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


# Opening what a researcher names


def parameters(d_in: int = D_MODEL, d_sae: int = 64) -> dict[str, np.ndarray[Any, Any]]:
    """Weights of a JumpReLU SAE under Gemma Scope's names."""
    draw = np.random.default_rng(5)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    arrays = {key: draw.normal(size=shape, scale=0.3) for key, shape in shapes.items()}
    arrays["threshold"] = draw.uniform(0.1, 1, d_sae)
    return {key: array.astype(np.float32) for key, array in arrays.items()}


def write_npz(folder: Path, **arrays: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **arrays)
    return folder / "params.npz"


@torch.no_grad()
@pytest.mark.parametrize("small", [False, True])
def test_gemma_scope_npz_is_its_equation(
    tmp_path: Path, x: Tensor, small: bool, tiny_model: Model
) -> None:
    arrays = parameters()
    stored = {k.replace("W_", "w_") if small else k: a for k, a in arrays.items()}
    file = write_npz(tmp_path / "average_l0_71", **stored)
    saes = open_autoencoders(file, tiny_model, hook=HOOK)
    assert (list(saes), saes.hooks, saes.widths) == (
        ["average_l0_71"],
        {"average_l0_71": HOOK},
        {"average_l0_71": 64},
    )
    sae = saes["average_l0_71"]
    # Lieberum et al. (2408.05147), equations 1 to 3, with numpy in float64.
    w = {key: array.astype(np.float64) for key, array in arrays.items()}
    pre = x.double().numpy() @ w["W_enc"] + w["b_enc"]
    code = np.where(pre > w["threshold"], np.maximum(pre, 0), 0)
    torch.testing.assert_close(sae.encode(x).double(), torch.from_numpy(code), **CLOSE)
    x_hat = torch.from_numpy(code @ w["W_dec"] + w["b_dec"])
    torch.testing.assert_close(reconstruct(sae, x).double(), x_hat, **CLOSE)
    assert hook_of(sae) == HOOK
    assert (sae.dtype, str(sae.device), sae.cfg.d_sae) == (torch.float32, "cpu", 64)
    assert not any(parameter.requires_grad for parameter in sae.parameters())


def test_npz_files_that_are_none_are_refused(tmp_path: Path) -> None:
    arrays = parameters()
    without = {key: array for key, array in arrays.items() if key != "threshold"}
    for wrong, message in (
        (without, r"holds W_dec \(64, 32\).* expected W_enc \(d_in, d_sae\)"),
        ({**arrays, "W_dec": arrays["W_dec"].T}, r"holds W_dec \(32, 64\)"),
        ({**arrays, "extra": arrays["b_dec"]}, r"extra \(32,\)"),
        ({**arrays, "b_enc": np.zeros(64, np.int8)}, "b_enc of .* is of int8, expected floating"),
        ({**arrays, "b_enc": np.array([{}] * 64)}, "is of object.*pickled objects never"),
        ({}, "holds nothing"),
    ):
        file = write_npz(tmp_path, **wrong)
        with pytest.raises(Refusal, match=message):
            open_autoencoders(file, hook=HOOK)
    file = write_npz(tmp_path, **arrays)
    with pytest.raises(Refusal, match=r"does not say at which hook point .* pass hook="):
        open_autoencoders(file)
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"nothing"):
        file.write_bytes(damaged)
        with pytest.raises(CorruptFile, match=r"params\.npz is not a whole \.npz file"):
            open_autoencoders(file, hook=HOOK)
    # Damage in an array shows when it is read.
    file.write_bytes(whole[:3000] + bytes(100) + whole[3100:])
    (name,) = saes = open_autoencoders(file, hook=HOOK)
    with pytest.raises(CorruptFile, match="not a whole"):
        saes[name]


def test_folders_of_folders_are_opened_by_name(
    tiny_saes: dict[str, Any], tiny_model: Model, tmp_path: Path, x: Tensor
) -> None:
    for name, place in (("topk", "a/one"), ("jumprelu", "a/two"), ("gated", "b")):
        tiny_saes[name].save_model(tmp_path / place)
    saes = open_autoencoders(tmp_path, tiny_model)
    assert list(saes) == ["a-one", "a-two", "b"]
    assert set(saes.hooks.values()) == {HOOK}
    assert len(saes) == 3
    assert "b" in saes
    assert torch.equal(saes["a-one"].encode(x), tiny_saes["topk"].encode(x))
    assert saes["b"] is saes["b"]
    assert list(open_autoencoders(tmp_path / "b", tiny_model)) == ["b"]
    # Two of one name are called by all of it.
    tiny_saes["topk"].save_model(tmp_path / "c" / "b")
    both = open_autoencoders([tmp_path / "b", tmp_path / "c" / "b"])
    assert [name.rpartition("-")[2] for name in both] == ["b", "b"]
    assert len(both) == 2
    with pytest.raises(Refusal, match="named twice"):
        open_autoencoders([tmp_path / "b", tmp_path / "b"])
    with pytest.raises(Refusal, match="no SAE 'z' here; choose one of b"):
        open_autoencoders(tmp_path / "b")["z"]


def test_wide_saes_are_kept_one_at_a_time(tiny_saes: dict[str, Any], tmp_path: Path) -> None:
    for name in ("topk", "jumprelu", "gated"):
        tiny_saes[name].save_model(tmp_path / name)
    saes = open_autoencoders(tmp_path)
    one = 8 * D_MODEL * 96
    saes.keep_bytes = 2 * one
    first, second = saes["topk"], saes["jumprelu"]
    assert saes["topk"] is first
    saes["gated"]
    # The one that was asked for longest ago is read anew.
    assert saes["topk"] is first
    assert saes["jumprelu"] is not second
    saes.keep_bytes = 0
    assert saes["topk"] is saes["topk"]


def test_saes_that_expect_other_activations_are_put_on_raw_ones(
    tiny_saes: dict[str, Any], tmp_path: Path, x: Tensor
) -> None:
    sae = copy.deepcopy(tiny_saes["standard"])
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    sae.save_model(tmp_path)
    (opened,) = open_autoencoders(tmp_path).values()
    mean = x.mean(1, keepdim=True)
    expected = reconstruct(tiny_saes["standard"], x - mean) + mean
    torch.testing.assert_close(reconstruct(opened, x), expected, **CLOSE)


def test_attention_autoencoders_take_flat_heads(
    tiny_model: Model, tmp_path: Path, x: Tensor
) -> None:
    import sae_lens

    hook = "blocks.1.attn.hook_z"
    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=hook)
    config = sae_lens.StandardSAEConfig(
        d_in=D_MODEL, d_sae=48, reshape_activations="hook_z", metadata=metadata
    )
    sae = sae_lens.StandardSAE(config)
    sae.save_model(tmp_path / "sae")
    write_npz(tmp_path / "npz", **parameters())
    saes = open_autoencoders(tmp_path / "sae", tiny_model)
    npz = open_autoencoders(tmp_path / "npz", tiny_model, hook=hook)
    z = tiny_model.activations(torch.tensor([[0, 5, 6, 7]]), hook)[0]
    with torch.no_grad():
        expected = sae.decode(sae.encode(z.view(4, 4, 8))).flatten(1)
    torch.testing.assert_close(reconstruct(saes["sae"], z), expected, **CLOSE)
    assert reconstruct(npz["npz"], z).shape == z.shape


def test_specs_that_do_not_fit_are_refused_before_weights_are_read(
    tiny_saes: dict[str, Any], tiny_model: Model, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    def written(name: str, **changes: Any) -> Path:
        folder = tmp_path / name
        tiny_saes["standard"].save_model(folder)
        config = json.loads((folder / "cfg.json").read_text())
        metadata = {**config["metadata"], **changes.pop("metadata", {})}
        (folder / "cfg.json").write_text(json.dumps({**config, "metadata": metadata, **changes}))
        return folder

    for folder, hook, message in (
        (written("a"), "blocks.0.hook_resid_post", r"trained at blocks\.1\..* not at blocks\.0"),
        (written("b", metadata={"hook_name": "blocks.9.hook_mlp_out"}), None, "no hook 'blocks.9"),
        (written("c", metadata={"hook_name": None}), None, "does not say at which hook"),
        (written("d", architecture="transcoder"), None, "expected an autoencoder, which writes"),
        (written("e", metadata={"hook_name_out": "blocks.1.hook_mlp_out"}), None, "at blocks.1.h"),
        (written("f", d_in=16), None, "reads width 16 and writes width 32"),
    ):
        with pytest.raises(Refusal, match=message) as refused:
            open_autoencoders(folder, tiny_model, hook)
        assert "\n" not in str(refused.value)
    weights = tmp_path / "a" / "sae_weights.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "W_enc": tensors["W_enc"].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(Refusal, match=r"W_enc of .* is stored as F8_E4M3, expected floating"):
        open_autoencoders(tmp_path / "a")
    save_file({"W_enc": tensors["W_enc"]}, weights)
    with pytest.raises(Refusal, match="have no matrix W_dec"):
        open_autoencoders(tmp_path / "a")
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(CorruptFile, match="whole safetensors"):
        open_autoencoders(tmp_path / "a")
    weights.unlink()
    with pytest.raises(Refusal, match=r"There is no .*sae_weights\.safetensors"):
        open_autoencoders(tmp_path / "a")
    npz = write_npz(tmp_path / "g", **parameters(d_in=16))
    with pytest.raises(Refusal, match=r"params\.npz reads activations of width 16, but .* has 32"):
        open_autoencoders(npz, tiny_model, HOOK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refusal, match="has no SAE, expected"):
        open_autoencoders(tmp_path / "empty")
    (tmp_path / "ae.pt").touch()
    with pytest.raises(Refusal, match=r"ae\.pt is no \.npz file"):
        open_autoencoders(tmp_path / "ae.pt")
    for spec in ("nothing", str(tmp_path / "nowhere"), "./no/where", "release/"):
        with pytest.raises(Refusal, match="There is no SAE"):
            open_autoencoders(spec)
    with pytest.raises(Refusal, match="No SAE was named"):
        open_autoencoders([])


def test_releases_are_refused_by_name() -> None:
    with pytest.raises(Refusal, match="knows no release 'no-such-release'"):
        open_autoencoders("no-such-release/blocks.0.hook_resid_pre")
    with pytest.raises(Refusal, match=r"'gpt2-small-res-jb' has no SAE 'blocks\.99\.x'"):
        open_autoencoders("gpt2-small-res-jb/blocks.99.x")
    # Its files are pickles.
    with pytest.raises(Refusal, match="format of their own"):
        open_autoencoders("deepseek-r1-distill-llama-8b-qresearch/blocks.19.hook_resid_post")


def test_the_hook_of_a_release_is_known_without_its_weights(tiny_model: Model) -> None:
    spec = "gemma-scope-2b-pt-res/layer_*/width_16k/average_l0_7?"
    saes = open_autoencoders(spec)
    assert saes.hooks["layer_20-width_16k-average_l0_71"] == "blocks.20.hook_resid_post"
    assert set(saes.widths.values()) == {16384}
    assert len(saes) > 1
    with pytest.raises(Refusal, match=r"has no hook 'blocks\.20\.hook_resid_post'"):
        open_autoencoders(spec.replace("*", "20"), tiny_model)


def test_a_release_in_the_cache_is_opened_with_its_processing(
    tiny_saes: dict[str, Any],
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    x: Tensor,
) -> None:
    from tests.hub_stand_in import add_to_cache, write_sae_lens

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    hook = "blocks.1.hook_resid_pre"
    # In the format of that release, from before version 6 of sae-lens.
    weights = tiny_saes["standard"].state_dict()
    write_sae_lens(tmp_path / "files" / hook, weights, hook)
    repository = "jbloom/GPT2-Small-SAEs-Reformatted"
    with pytest.raises(Refusal, match=rf"{repository}.* HF_HUB_OFFLINE is set"):
        open_autoencoders(f"gpt2-small-res-jb/{hook}")
    add_to_cache(tmp_path / "hub", repository, tmp_path / "files")
    saes = open_autoencoders(f"gpt2-small-res-jb/{hook}", tiny_model)
    assert saes.hooks == {hook: hook}
    # sae-lens' list says that it was trained on centred activations.
    mean = x.mean(1, keepdim=True)
    expected = reconstruct(tiny_saes["standard"], x - mean) + mean
    torch.testing.assert_close(reconstruct(saes[hook], x), expected, **CLOSE)
    with pytest.raises(Refusal, match=r"was trained at blocks\.1\..* not at blocks\.0"):
        open_autoencoders(f"gpt2-small-res-jb/{hook}", hook="blocks.0.hook_resid_pre")


# Anything with encode and decode


class Plain(nn.Module):
    """A ReLU autoencoder of torch layers."""

    def __init__(self, d_out: int = D_MODEL, d_sae: int = 70) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D_MODEL, d_sae), nn.Linear(d_sae, d_out)

    def encode(self, x: Tensor) -> Any:
        return self.encoder(x).relu()

    def decode(self, latents: Tensor) -> Any:
        return self.decoder(latents)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_torch_module_is_adapted(
    x: Tensor, tiny_model: Model, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Several chunks of latents, the last one smaller.
    monkeypatch.setattr("darkmatter.autoencoders._UNIT_CODES", 70 * 16)
    module = Plain().to(dtype)
    sae = adapt(module, HOOK, d_in=D_MODEL)
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else CLOSE
    torch.testing.assert_close(sae.W_dec, module.decoder.weight.T, **close)
    torch.testing.assert_close(sae.b_dec, module.decoder.bias, **close)
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.dtype) == (D_MODEL, 70, dtype)
    assert hook_of(sae) == HOOK
    assert isinstance(sae, Autoencoder)
    check_fits(sae, tiny_model)
    x = x.to(dtype)
    expected = module.decode(module.encode(x))
    # Two ways of summing 70 products, in bfloat16 after 3 digits each.
    close = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else CLOSE
    torch.testing.assert_close(reconstruct(sae, x), expected, **close)
    torch.testing.assert_close(sparse_decode(sae, sparse_encode(sae, x)), expected, **close)
    assert torch.equal(sae(x), expected)


@torch.no_grad()
def test_adapted_and_original_are_the_same_everywhere(
    tiny_saes: dict[str, Any], linear_map: LinearMap, x: Tensor
) -> None:
    sae = tiny_saes["topk"]
    adapted = adapt(sae, HOOK)
    torch.testing.assert_close(adapted.W_dec, sae.W_dec, **CLOSE)
    for wrapper in (PursuitEncoder, lambda one: LinearlyCorrected(one, linear_map)):
        torch.testing.assert_close(wrapper(adapted)(x), wrapper(sae)(x), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_decoder_that_is_not_affine_is_taken_when_asked_for(
    tiny_saes: dict[str, Any], x: Tensor
) -> None:
    class Squashed(Plain):
        def decode(self, latents: Tensor) -> Any:
            return super().decode(latents).tanh()

    # The second divides by a norm of what it encoded last.
    for module in (Squashed(), tiny_saes["normalised"]):
        with pytest.raises(Refusal, match=r"is not affine in the latents.*affine=False"):
            adapt(module, HOOK, D_MODEL)
        sae = adapt(module, HOOK, D_MODEL, affine=False)
        expected = module.decode(module.encode(x))
        torch.testing.assert_close(reconstruct(sae, x), expected, **CLOSE)
        with pytest.raises(Refusal, match="is not affine"):
            decoder_of(sae)


def test_what_is_opened_and_adapted_can_be_surveyed(
    tiny_saes: dict[str, Any], tiny_model: Model, tmp_path: Path
) -> None:
    import darkmatter as dm

    class Squashed(Plain):
        def decode(self, latents: Tensor) -> Any:
            return super().decode(latents).tanh()

    tokens = dm.Tokens(
        torch.randint(1, 300, (16, 32)), torch.arange(16) // 2, tuple(map(str, range(8)))
    )
    for name in ("topk", "gated"):
        tiny_saes[name].save_model(tmp_path / name)
    opened = open_autoencoders(tmp_path, tiny_model)
    opened.keep_bytes = 0
    adapted = {name: adapt(tiny_saes[name], HOOK) for name in opened}
    tables = [
        dm.survey(tiny_model, saes, tokens, skip=4, resamples=10, one_at_a_time=alone).table
        for saes, alone in (
            ({n: tiny_saes[n] for n in opened}, False),
            (opened, True),
            (adapted, False),
        )
    ]
    for table in tables[1:]:
        # Of float32 codes, found in batches of other sizes or on directions that were decoded.
        for column in ("fvu", "fvu_nonlinear", "r2_norm", "l0", "kl", "dead"):
            np.testing.assert_allclose(table[column], tables[0][column], rtol=1e-3)
    squashed = adapt(Squashed(), HOOK, D_MODEL, affine=False)
    found = dm.survey(tiny_model, {"squashed": squashed}, tokens, skip=4, resamples=10)
    assert 0 < found.table.loc["squashed", "l0"] < 70


def test_what_is_no_autoencoder_is_not_adapted(x: Tensor) -> None:
    class Batched(Plain):
        def encode(self, x: Tensor) -> Any:
            code = super().encode(x)
            return code * (code >= code.flatten().topk(5 * len(x)).values[-1])

    class Dropping(Plain):
        def encode(self, x: Tensor) -> Any:
            return nn.functional.dropout(super().encode(x), 0.5)

    class Pair(Plain):
        def encode(self, x: Tensor) -> Any:
            return super().encode(x), x

    class Counting(Plain):
        def decode(self, latents: Tensor) -> Any:
            return super().decode(latents)[1:]

    class Summed(Plain):
        def encode(self, x: Tensor) -> Any:
            return super().encode(x).sum(0)

    for module, message in (
        (nn.Linear(3, 3), "Linear has no method encode"),
        (Plain(d_out=48), "reads width 32 and writes width 48, like a transcoder"),
        (Batched(), "depend on the other rows that Batched encodes"),
        (Dropping(), "answers differently when called twice"),
        (Pair(), "encode of Pair returned tuple, expected one tensor"),
        (Counting(), r"decode of Counting returned \(63, 32\), expected \(64, 32\)"),
        (Summed(), r"encode of Summed returned \(70,\) for x \(64, 32\)"),
    ):
        with pytest.raises(Refusal, match=message):
            adapt(module, HOOK, D_MODEL)
    with pytest.raises(Refusal, match=r"width that Plain reads is not known; pass d_in="):
        adapt(Plain(), HOOK)
    with pytest.raises(Refusal, match=r"encode of Plain failed on \(64, 16\).*RuntimeError"):
        adapt(Plain(), HOOK, 16)
    with pytest.raises(Refusal, match=r"returned \(64, 70\) .* expected \(64, 71\)"):
        adapt(Plain(), HOOK, D_MODEL, d_sae=71)

"""SAEs of processed activations, presented as SAEs of those that the model has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import darkmatter as dm
from darkmatter.autoencoders import decoder_of
from darkmatter.models import Model, open_model
from darkmatter.suites.processing import OnRawActivations, Processing, on_raw_activations
from darkmatter.suites.processing import processing_of as found_of
from tests.common import refused
from tests.conftest import D_MODEL, HOOK

CENTRED = Processing(centred=True)


@pytest.fixture(scope="module")
def x() -> Tensor:
    """Rows whose mean over components is far from 0 and whose norms differ."""
    rows = torch.randn(40, D_MODEL, generator=torch.Generator().manual_seed(5))
    return rows * torch.linspace(0.5, 4, 40)[:, None] + torch.linspace(-2, 3, 40)[:, None]


def sae_of(kind: str = "standard", **more: Any) -> Any:
    """A random SAE with metadata of our choice."""
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    metadata = SAEMetadata(hook_name=HOOK, **more.pop("metadata", {}))
    names = {"standard": "StandardSAE", "topk": "TopKSAE", "jumprelu": "JumpReLUSAE"}
    config = getattr(sae_lens, f"{names[kind]}Config")
    torch.manual_seed(6)
    sae = getattr(sae_lens, names[kind])(config(d_in=D_MODEL, d_sae=48, metadata=metadata, **more))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return sae.eval().requires_grad_(False)


KINDS: list[tuple[str, dict[str, Any], Processing, int]] = [
    ("standard", {}, CENTRED, 1),
    ("jumprelu", {}, Processing(scale=0.3), 0),
    ("jumprelu", {}, Processing(scale=0.3, centred=True), 1),
    (
        "topk",
        {"k": 5, "normalize_activations": "layer_norm", "rescale_acts_by_decoder_norm": True},
        Processing(normalisation="layer_norm"),
        2,
    ),
    (
        "standard",
        {"normalize_activations": "constant_norm_rescale"},
        Processing(normalisation="constant_norm_rescale"),
        1,
    ),
    (
        "standard",
        {"normalize_activations": "constant_norm_rescale"},
        Processing(normalisation="constant_norm_rescale", centred=True, scale=2.0),
        2,
    ),
]


@pytest.mark.parametrize(("kind", "config", "processing", "carried"), KINDS)
def test_it_is_the_sae_run_on_processed_activations_and_undone(
    x: Tensor, kind: str, config: dict[str, Any], processing: Processing, carried: int
) -> None:
    sae = sae_of(kind, **config)
    adapted = OnRawActivations(sae, processing)
    mean = x.mean(1, keepdim=True) if processing.centred else torch.zeros(len(x), 1)
    scale = processing.scale or 0.0
    # Its forward normalises by itself, and undoes that.
    expected = sae((x - mean) * scale) / scale + mean
    # float32 sums of 48 latents of order 10; 1e-5 of the layer norm's, which is divided by
    # std + 1e-5 and multiplied by std.
    torch.testing.assert_close(adapted(x), expected, rtol=1e-4, atol=1e-4)
    assert adapted.carried == carried
    assert adapted.W_dec.shape == (48 + carried, D_MODEL)
    assert adapted.cfg.d_sae == 48 + carried
    # The latents that are active are the SAE's.
    active = adapted.encode(x)[:, :48] != 0
    assert torch.equal(active, sae.encode((x - mean) * scale) != 0)
    # As all autoencoders are used here: sparse codes of an affine decoder.
    directions, bias = decoder_of(adapted)
    torch.testing.assert_close(directions, adapted.W_dec)
    torch.testing.assert_close(bias, adapted.b_dec)
    code = dm.sparse_encode(adapted, x)
    torch.testing.assert_close(dm.sparse_decode(adapted, code), adapted(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(code.l0, active.sum(1) + carried)
    torch.testing.assert_close(dm.reconstruct(adapted, x), adapted(x), rtol=1e-4, atol=1e-4)


def test_by_hand() -> None:
    """One latent that reads and writes the first of two components of centred activations."""
    from sae_lens import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=2, d_sae=1))
    with torch.no_grad():
        sae.W_enc.copy_(torch.tensor([[1.0], [0.0]]))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0]]))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    adapted = on_raw_activations(sae, CENTRED)
    # Mean 4, centred (1, -1) and (-2, 2): the latent takes 1 and, being a ReLU, 0.
    raw = torch.tensor([[5.0, 3.0], [2.0, 6.0]])
    assert adapted.encode(raw).tolist() == [[1.0, 4.0], [0.0, 4.0]]
    assert adapted(raw).tolist() == [[5.0, 4.0], [4.0, 4.0]]


def test_configs_and_the_table_tell_the_processing() -> None:
    kwargs = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    assert found_of(sae_of(metadata=kwargs)) == CENTRED
    assert found_of(sae_of(metadata={"prepend_bos": False})) == Processing(prepend_bos=False)
    for name, centred in {
        "gpt2-small/8-res-jb": True,
        "gpt2-small/8-res_fs24576-jb": True,
        "gpt2-small/8-res_post_32k-oai": False,
        "gemma-2-9b/20-gemmascope-res-131k": False,
        "llama3.1-8b/15-llamascope-res-32k": False,
        "pythia-70m-deduped/3-res-sm": False,
    }.items():
        found = found_of(sae_of(metadata={"neuronpedia_id": name}))
        assert found.centred is centred, name
        assert found.source != Processing().source, name
    normalised = sae_of("topk", k=3, normalize_activations="layer_norm")
    assert found_of(normalised) == Processing(normalisation="layer_norm")


def test_sae_lens_says_the_same_of_what_it_lists_as_centred() -> None:
    """The table of known releases against sae-lens' list, for every release of GPT-2 small."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    for name, entry in get_pretrained_saes_directory().items():
        kwargs: Any = (entry.config_overrides or {}).get("model_from_pretrained_kwargs") or {}
        if entry.model != "gpt2-small":
            continue
        for neuronpedia in filter(None, entry.neuronpedia_id.values()):
            found = found_of(sae_of(metadata={"neuronpedia_id": neuronpedia}))
            assert found.centred == bool(kwargs.get("center_writing_weights")), (name, neuronpedia)


def test_raw_saes_are_themselves_and_what_cannot_be_known_is_refused() -> None:
    sae = sae_of()
    assert on_raw_activations(sae) is sae
    centred = sae_of(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    assert on_raw_activations(centred, already_centred=True) is centred
    assert isinstance(on_raw_activations(centred), OnRawActivations)
    scaled = sae_of(normalize_activations="expected_average_only_in")
    with refused("which its config does not hold; pass processing=Processing"):
        on_raw_activations(scaled)
    assert on_raw_activations(scaled, Processing(scale=0.5)).carried == 0
    with refused("expects activations under 'covariance_whitening'"):
        on_raw_activations(sae_of(normalize_activations="covariance_whitening"))


# In a model: raw against centred weights


@pytest.fixture(scope="module")
def centred_model(tiny_model_folder: Any) -> Model:
    return open_model(tiny_model_folder, centred=True)


@pytest.mark.parametrize("backend", ["bridge", "nnsight"])
def test_centred_weights_take_the_mean_off_and_leave_the_logits(
    tiny_model: Model, tiny_model_folder: Any, tiny_tokens: Tensor, backend: Any
) -> None:
    centred = open_model(tiny_model_folder, backend=backend, centred=True)
    hooks = [f"blocks.{b}.hook_{s}" for b in range(3) for s in ("resid_pre", "resid_post")]
    raw, found = (m.activations(tiny_tokens, hooks) for m in (tiny_model, centred))
    for hook in hooks:
        expected = raw[hook] - raw[hook].mean(-1, keepdim=True)
        # float32 through three blocks.
        torch.testing.assert_close(found[hook], expected, rtol=1e-4, atol=1e-4)
        # The case is one: the raw stream has a mean.
        assert raw[hook].mean(-1).abs().max() > 0.01
    logits = [m.logits(tiny_tokens) for m in (tiny_model, centred)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    # resume runs the later blocks by another way.
    again = centred.resume(tiny_tokens, HOOK, found[HOOK])
    torch.testing.assert_close(again, logits[1], rtol=1e-4, atol=1e-4)


def test_transformer_lens_processes_activations_to_the_same(
    tiny_model: Model, tiny_model_folder: Any, tiny_tokens: Tensor, centred_model: Model
) -> None:
    """Against transformer-lens' own processing, which SAEs on "centred" weights were trained on."""
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(tiny_model_folder), dtype=torch.float32)
    bridge.enable_compatibility_mode()
    _, cache = bridge.run_with_cache(tiny_tokens)
    found = centred_model.activations(tiny_tokens, HOOK)
    torch.testing.assert_close(found, cache[HOOK], rtol=1e-4, atol=1e-4)


def test_spliced_with_its_mean_put_back_the_logits_are_those_of_the_centred_model(
    tiny_model: Model, centred_model: Model, tiny_tokens: Tensor
) -> None:
    sae = sae_of(metadata={"model_from_pretrained_kwargs": {"center_writing_weights": True}})
    adapted = on_raw_activations(sae)
    on_raw = tiny_model.logits(tiny_tokens, replace={HOOK: adapted})
    on_centred = centred_model.logits(tiny_tokens, replace={HOOK: sae})
    torch.testing.assert_close(on_raw, on_centred, rtol=1e-3, atol=1e-3)
    # Which is not what the SAE would do to raw activations.
    wrong = tiny_model.logits(tiny_tokens, replace={HOOK: sae})
    assert (wrong - on_raw).abs().max() > 0.01


def test_models_of_other_layouts_cannot_be_centred(tmp_path: Any) -> None:
    from tests.conftest import write_model

    with refused("LlamaForCausalLM cannot be centred, expected GPT-2's layout"):
        open_model(write_model(tmp_path, "llama"), centred=True)

"""A language model and autoencoders of a few kilobytes, made anew for every test session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before anything imports huggingface_hub, which reads them once: no test touches the network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jaxtyping
import pytest
import torch
from torch import Tensor

from darkmatter.models import Model, open_model

D_MODEL, N_LAYER, N_CONTEXT, VOCABULARY = 32, 3, 32, 300
HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Without the shape checks that the test run wraps around every function.

    Users run without them, so what a wrong shape meets is the function's own refusal.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def write_tokenizer(folder: Path) -> None:
    """Byte-level BPE with one special token, <|endoftext|>, id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the cat sat on the mat, and the dog on the log"] * 2, trainer)
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_model(folder: Path, kind: str = "gpt2", dtype: torch.dtype = torch.float32) -> Path:
    """A random model of a few thousand weights in Hugging Face format, with its tokenizer."""
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(1)
    special = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": VOCABULARY}
    if kind == "gpt2":
        network = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                n_positions=N_CONTEXT,
                n_embd=D_MODEL,
                n_layer=N_LAYER,
                n_head=4,
                n_inner=96,
                activation_function="gelu_pytorch_tanh",
                # Large enough that activations and losses differ well between tokens.
                initializer_range=0.2,
                **special,
            )
        )
    else:
        sizes = {
            "hidden_size": D_MODEL,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": N_CONTEXT,
            "initializer_range": 0.2,
        }
        grouped = {"num_key_value_heads": 2, "head_dim": 12}
        network = {
            "llama": lambda: transformers.LlamaForCausalLM(
                transformers.LlamaConfig(**sizes, **grouped, **special)
            ),
            "gemma2": lambda: transformers.Gemma2ForCausalLM(
                transformers.Gemma2Config(**sizes, **grouped, **special)
            ),
            "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
                transformers.GPTNeoXConfig(**sizes, **special)
            ),
        }[kind]()
    network.to(dtype).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 architecture, 3 layers, d_model 32, vocabulary 300, context 32, stored in float16."""
    return write_model(tmp_path_factory.mktemp("tiny"), dtype=torch.float16)


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> Model:
    """The tiny model, opened with the bridge."""
    return open_model(tiny_model_folder)


@pytest.fixture(scope="session")
def nnsight_model(tiny_model_folder: Path) -> Model:
    """The tiny model through the second backend."""
    return open_model(tiny_model_folder, backend="nnsight")


@pytest.fixture(params=["bridge", "nnsight"])
def model(request: pytest.FixtureRequest, tiny_model: Model, nnsight_model: Model) -> Model:
    """The tiny model through each backend in turn."""
    return tiny_model if request.param == "bridge" else nnsight_model


@pytest.fixture(scope="session")
def tiny_tokens() -> Tensor:
    """Token ids [6, 32]; every context starts with the special token 0, some have one inside."""
    tokens = torch.randint(
        1, VOCABULARY, (6, N_CONTEXT), generator=torch.Generator().manual_seed(2)
    )
    tokens[:, 0] = 0
    tokens[::2, 9] = 0
    return tokens


@pytest.fixture(scope="session")
def tiny_saes() -> dict[str, Any]:
    """Random autoencoders at `HOOK`, d_in 32 and d_sae 96, one of every inference architecture."""
    return random_saes()


def random_saes() -> dict[str, Any]:
    """Those of `tiny_saes`, made anew."""
    import sae_lens

    torch.manual_seed(3)
    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 5}),
        "topk_rescaled": (
            sae_lens.TopKSAE,
            sae_lens.TopKSAEConfig,
            {"k": 5, "rescale_acts_by_decoder_norm": True},
        ),
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "gated": (sae_lens.GatedSAE, sae_lens.GatedSAEConfig, {}),
        "normalised": (
            sae_lens.StandardSAE,
            sae_lens.StandardSAEConfig,
            {"normalize_activations": "layer_norm"},
        ),
    }
    saes: dict[str, Any] = {}
    for name, (kind, config, more) in kinds.items():
        metadata = sae_lens.saes.sae.SAEMetadata(hook_name=HOOK, model_name="tiny")
        sae = kind(config(d_in=D_MODEL, d_sae=96, metadata=metadata, **more))
        with torch.no_grad():
            for parameter in sae.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3)
            if name == "jumprelu":
                sae.threshold.abs_().add_(1.0)
        saes[name] = sae.eval().requires_grad_(False)
    return saes

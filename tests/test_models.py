"""The two backends against plain transformers, and against what replacing must do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from darkmatter import models
from darkmatter._files import CorruptFile
from darkmatter._refusal import Refusal
from darkmatter.models import BackendDisagreement, Model, open_model
from tests.conftest import N_CONTEXT, N_LAYER, VOCABULARY, write_model, write_tokenizer

STAGES = ("hook_resid_pre", "attn.hook_z", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
# float32 rounding of sums of order 1 to 10 through three blocks, computed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="session")
def network(tiny_model_folder: Path) -> Any:
    """Plain transformers, loaded as its documentation says, default attention included."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


def by_hand(
    network: Any, tokens: Tensor, replace: dict[str, Callable[[Tensor], Tensor]] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """GPT-2 written out block by block: every hook point and the loss."""
    replace = replace or {}
    found: dict[str, Tensor] = {}

    def at(block: int, stage: str, x: Tensor) -> Tensor:
        hook = f"blocks.{block}.{stage}"
        found[hook] = replace[hook](x) if hook in replace else x
        return found[hook]

    body = network.transformer
    n, p = tokens.shape
    x = body.wte(tokens) + body.wpe(torch.arange(p))
    for i, block in enumerate(body.h):
        x = at(i, "hook_resid_pre", x)
        heads = [
            part.view(n, p, 4, 8).transpose(1, 2)
            for part in block.attn.c_attn(block.ln_1(x)).split(32, -1)
        ]
        z = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        z = at(i, "attn.hook_z", z.transpose(1, 2).reshape(n, p, 32))
        x = at(i, "hook_resid_mid", x + block.attn.c_proj(z))
        x = x + at(i, "hook_mlp_out", block.mlp(block.ln_2(x)))
        x = at(i, "hook_resid_post", x)
    log_p = network.lm_head(body.ln_f(x)).log_softmax(-1)
    loss = -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return found, loss


def test_what_it_says_of_itself(model: Model) -> None:
    assert (model.d_model, model.n_layer) == (32, N_LAYER)
    assert (model.n_context, model.vocabulary) == (N_CONTEXT, VOCABULARY)
    assert model.hooks == tuple(f"blocks.{i}.{stage}" for i in range(N_LAYER) for stage in STAGES)
    assert model.width("blocks.0.attn.hook_z") == 32
    assert model.dtype == torch.float32
    assert model.tokenizer.decode(model.tokenizer("the cat")["input_ids"]) == "the cat"
    assert model.backend in repr(model)


@torch.no_grad()
def test_activations_and_loss_are_those_of_transformers(
    model: Model, network: Any, tiny_tokens: Tensor
) -> None:
    expected, expected_loss = by_hand(network, tiny_tokens)
    found, loss = model.read(tiny_tokens, model.hooks)
    assert list(found) == list(model.hooks)
    for hook in model.hooks:
        torch.testing.assert_close(found[hook], expected[hook], **CLOSE)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    torch.testing.assert_close(model.loss(tiny_tokens), expected_loss, **CLOSE)
    theirs = network(tiny_tokens, use_cache=False).logits
    torch.testing.assert_close(model.logits(tiny_tokens), theirs, **CLOSE)
    # The mean of ours is the loss that transformers reports itself.
    reported = network(tiny_tokens, labels=tiny_tokens).loss
    torch.testing.assert_close(loss.mean(), reported, **CLOSE)


def test_ending_early_changes_nothing(model: Model, tiny_tokens: Tensor) -> None:
    whole, _ = model.read(tiny_tokens, model.hooks)
    for hook in model.hooks:
        assert torch.equal(model.activations(tiny_tokens, hook), whole[hook])
    several = model.activations(tiny_tokens, ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"])
    assert list(several) == ["blocks.1.hook_resid_post", "blocks.0.attn.hook_z"]
    for hook, value in several.items():
        assert torch.equal(value, whole[hook])


def test_ending_early_does_not_run_later_blocks(
    tiny_model_folder: Path, tiny_tokens: Tensor
) -> None:
    for backend in ("bridge", "nnsight"):
        model = open_model(tiny_model_folder, backend=backend)
        network = model.underlying.original_model if backend == "bridge" else None
        blocks = network.transformer.h if network else model.underlying._module.transformer.h
        calls: list[int] = []
        for i, block in enumerate(blocks):
            block.register_forward_hook(lambda *_, i=i, calls=calls: calls.append(i))
        model.activations(tiny_tokens, "blocks.1.hook_resid_pre")
        assert 2 not in calls
        model.loss(tiny_tokens)
        assert calls[-1] == 2


@torch.no_grad()
@pytest.mark.parametrize("stage", STAGES)
def test_replacing_is_what_it_is_by_hand(
    model: Model, network: Any, tiny_tokens: Tensor, stage: str
) -> None:
    hook = f"blocks.1.{stage}"
    direction = torch.randn(32)
    replace = {hook: lambda x: 0.5 * x + direction}
    expected, expected_loss = by_hand(network, tiny_tokens, replace)
    found, loss = model.read(tiny_tokens, model.hooks, replace)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    for name in model.hooks:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)
    # The control: it did something.
    assert (loss - model.loss(tiny_tokens)).abs().max() > 0.01
    # And leaves nothing behind.
    torch.testing.assert_close(model.loss(tiny_tokens), by_hand(network, tiny_tokens)[1], **CLOSE)


@torch.no_grad()
def test_replacing_at_all_hooks_at_once(model: Model, network: Any, tiny_tokens: Tensor) -> None:
    replace = {hook: lambda x, i=i: x * (1 + 0.02 * i) - 0.1 for i, hook in enumerate(model.hooks)}
    expected, expected_loss = by_hand(network, tiny_tokens, replace)
    found, loss = model.read(tiny_tokens, model.hooks, replace)
    torch.testing.assert_close(loss, expected_loss, **CLOSE)
    for name in model.hooks:
        torch.testing.assert_close(found[name], expected[name], **CLOSE)


def test_replacing_with_the_same_changes_nothing(model: Model, tiny_tokens: Tensor) -> None:
    clean = model.loss(tiny_tokens)
    for hook in model.hooks:
        assert torch.equal(model.loss(tiny_tokens, {hook: lambda x: x}), clean)
    assert torch.equal(model.loss(tiny_tokens, dict.fromkeys(model.hooks, torch.clone)), clean)


def test_a_function_that_works_in_place_reaches_only_its_hook(
    model: Model, tiny_tokens: Tensor
) -> None:
    hook = "blocks.1.hook_resid_mid"
    before = model.activations(tiny_tokens, "blocks.0.hook_resid_post")
    in_place = model.read(tiny_tokens, ("blocks.0.hook_resid_post",), {hook: lambda x: x.mul_(2)})
    torch.testing.assert_close(in_place[1], model.loss(tiny_tokens, {hook: lambda x: x * 2}))
    assert torch.equal(in_place[0]["blocks.0.hook_resid_post"], before)


def test_results_are_ordinary_tensors(model: Model, tiny_tokens: Tensor) -> None:
    weight = torch.ones(32, requires_grad=True)
    x = model.activations(tiny_tokens, "blocks.0.hook_resid_post")
    loss = model.loss(tiny_tokens, {"blocks.0.hook_resid_post": lambda a: a * weight})
    assert not x.requires_grad
    assert not loss.requires_grad
    assert not x.is_inference()
    (x * weight).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_other_layouts_agree_between_backends(
    tmp_path: Path, kind: str, tiny_tokens: Tensor
) -> None:
    folder = write_model(tmp_path, kind)
    bridge, nnsight = open_model(folder), open_model(folder, backend="nnsight")
    assert bridge.hooks == nnsight.hooks
    assert bridge.width("blocks.0.attn.hook_z") == 4 * 12
    replace = {"blocks.0.hook_resid_mid": lambda x: x * 0.7, "blocks.1.hook_mlp_out": torch.tanh}
    for change in ({}, replace):
        ours, loss = bridge.read(tiny_tokens, bridge.hooks, change)
        theirs, other_loss = nnsight.read(tiny_tokens, bridge.hooks, change)
        torch.testing.assert_close(loss, other_loss, **CLOSE)
        for hook in bridge.hooks:
            torch.testing.assert_close(ours[hook], theirs[hook], **CLOSE)
            assert ours[hook].shape[-1] == bridge.width(hook)


def test_a_layout_nnsight_does_not_know_is_refused(tmp_path: Path, tiny_tokens: Tensor) -> None:
    folder = write_model(tmp_path, "gpt_neox")
    with pytest.raises(Refusal, match=r"GPTNeoXForCausalLM is neither.*backend='bridge'"):
        open_model(folder, backend="nnsight")
    # The bridge knows it; its blocks run attention and MLP side by side, so have no resid_mid.
    model = open_model(folder)
    assert "blocks.0.hook_resid_mid" not in model.hooks
    with pytest.raises(Refusal, match=r"no hook 'blocks\.0\.hook_resid_mid'"):
        model.activations(tiny_tokens, "blocks.0.hook_resid_mid")


# Going on from a residual stream


@pytest.mark.parametrize(
    "hook", ["blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"]
)
def test_resuming_is_a_full_forward_with_replacement(
    model: Model, tiny_tokens: Tensor, hook: str
) -> None:
    # Not a constant, which LayerNorm would take away again.
    x = model.activations(tiny_tokens, hook) * 0.7 + torch.linspace(-1, 1, 32)
    clean, expected = model.logits(tiny_tokens), model.logits(tiny_tokens, {hook: lambda _: x})
    assert model.resumes_at(hook)
    torch.testing.assert_close(model.resume(tiny_tokens, hook, x), expected, **CLOSE)
    some = slice(5, -1)
    part = model.resume(tiny_tokens, hook, x, some)
    torch.testing.assert_close(part, expected[:, some], **CLOSE)
    # The control: it did something; and it leaves nothing behind.
    assert (expected - clean).abs().max() > 0.1
    assert torch.equal(model.logits(tiny_tokens), clean)


def test_resuming_runs_only_the_blocks_after_it(model: Model, tiny_tokens: Tensor) -> None:
    hook = "blocks.1.hook_resid_post"
    x = model.activations(tiny_tokens, hook)
    model.resume(tiny_tokens, hook, x)
    blocks = models._blocks_of(model._network)
    assert blocks is not None
    calls: list[int] = []
    handles = [
        block.mlp.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, block in enumerate(blocks)
    ]
    model.resume(tiny_tokens, hook, x)
    for handle in handles:
        handle.remove()
    assert set(calls) == {2}


def write_bloom(folder: Path) -> Path:
    """A model whose blocks return tuples."""
    import transformers

    config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox", "bloom"])
def test_other_layouts_resume(tmp_path: Path, kind: str, tiny_tokens: Tensor) -> None:
    folder = write_bloom(tmp_path) if kind == "bloom" else write_model(tmp_path, kind)
    model = open_model(folder)
    assert model._blocks_give_tuples == (kind == "bloom")
    hook = "blocks.0.hook_resid_post"
    x = model.activations(tiny_tokens, hook) * 0.7 + torch.linspace(-1, 1, 32)
    expected = model.logits(tiny_tokens, {hook: lambda _: x})
    torch.testing.assert_close(model.resume(tiny_tokens, hook, x), expected, **CLOSE)


def test_a_failed_resumption_leaves_the_model_whole(model: Model, tiny_tokens: Tensor) -> None:
    hook = "blocks.1.hook_resid_post"
    x, clean = model.activations(tiny_tokens, hook), model.logits(tiny_tokens)
    blocks = models._blocks_of(model._network)
    assert blocks is not None

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        model.resume(tiny_tokens, hook, x)
    handle.remove()
    assert torch.equal(model.logits(tiny_tokens), clean)


@pytest.mark.usefixtures("unchecked")
def test_hooks_that_cannot_be_resumed_are_refused(model: Model, tiny_tokens: Tensor) -> None:
    x = torch.zeros(*tiny_tokens.shape, 32)
    for stage in ("0.hook_resid_pre", "1.hook_mlp_out", "1.hook_resid_mid", "1.attn.hook_z"):
        assert not model.resumes_at(f"blocks.{stage}")
        with pytest.raises(Refusal, match=r"cannot go on from .*replace=\{hook: f\}"):
            model.resume(tiny_tokens, f"blocks.{stage}", x)
    with pytest.raises(Refusal, match="no hook 'resid_post'"):
        model.resumes_at("resid_post")
    with pytest.raises(Refusal, match=r"x has shape \(6, 31, 32\), expected \(6, 32, 32\)"):
        model.resume(tiny_tokens, "blocks.1.hook_resid_post", x[:, 1:])


# The opening check


@pytest.mark.parametrize("backend", ["bridge", "nnsight"])
@pytest.mark.parametrize(
    ("part", "hook"),
    [("h.1.mlp.c_proj.weight", "blocks.1.hook_resid_post"), ("ln_f.bias", "log-probabilities")],
)
def test_a_planted_disagreement_is_found(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, backend: Any, part: str, hook: str
) -> None:
    reference_of = models._reference

    def then_disturb(network: Any) -> Any:
        reference = reference_of(network)
        with torch.no_grad():
            network.transformer.get_parameter(part).view(-1)[5] += 0.2
        return reference

    monkeypatch.setattr(models, "_reference", then_disturb)
    with pytest.raises(BackendDisagreement, match=f"{backend} and transformers.*{hook}") as caught:
        open_model(tiny_model_folder, backend=backend)
    assert hook in caught.value.hook
    assert caught.value.size > caught.value.tolerance
    assert open_model(tiny_model_folder, backend=backend, check=False).n_layer == N_LAYER


def test_a_hook_with_another_meaning_is_found(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites_of = models._sites

    def confused(block: Any, name: str) -> Any:
        norm, _ = sites_of(block, name)["hook_resid_mid"]
        return {**sites_of(block, name), "hook_resid_mid": (norm, "output")}

    monkeypatch.setattr(models, "_sites", confused)
    with pytest.raises(BackendDisagreement, match=r"blocks.0.hook_resid_mid"):
        open_model(tiny_model_folder, backend="nnsight")


def test_half_precision_weights_are_computed_in_float32(
    tiny_model_folder: Path, tmp_path: Path, tiny_tokens: Tensor, tiny_model: Model
) -> None:
    from safetensors.torch import load_file, save_file

    stored = load_file(tiny_model_folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    shutil.copytree(tiny_model_folder, tmp_path / "full")
    save_file(
        {name: tensor.float() for name, tensor in stored.items()},
        tmp_path / "full" / "model.safetensors",
        metadata={"format": "pt"},
    )
    full = open_model(tmp_path / "full")
    assert torch.equal(full.loss(tiny_tokens), tiny_model.loss(tiny_tokens))


# Refusals


def test_unknown_names_are_refused_with_what_exists(
    model: Model, tiny_model_folder: Path, tiny_tokens: Tensor
) -> None:
    with pytest.raises(Refusal, match=r"no hook 'resid_post'.*0 to 2.*hook_mlp_out"):
        model.loss(tiny_tokens, {"resid_post": lambda x: x})
    with pytest.raises(Refusal, match=r"blocks\.3\.hook_resid_post"):
        model.activations(tiny_tokens, "blocks.3.hook_resid_post")
    with pytest.raises(Refusal, match="name at least one"):
        model.activations(tiny_tokens, [])


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_of_open_model_are_refused(tiny_model_folder: Path) -> None:
    with pytest.raises(Refusal, match=r"no backend 'hooked'; choose one of bridge, nnsight"):
        open_model(tiny_model_folder, backend="hooked")  # pyright: ignore[reportArgumentType]
    with pytest.raises(Refusal, match=r"torch\.int8.*torch\.float32"):
        open_model(tiny_model_folder, dtype=torch.int8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        (torch.zeros(5, dtype=torch.int64), r"shape \(5,\), expected \[contexts, positions\]"),
        (torch.zeros(0, 5, dtype=torch.int64), "with some of each"),
        (torch.zeros(2, 5), "float32, expected integers"),
        (torch.zeros(2, 33, dtype=torch.int64), "33 tokens, but .* reads 32 at most"),
        (torch.full((2, 5), 300), "Token 300 is outside .* 0 to 299"),
        (torch.full((2, 5), -1), "Token -1 is outside"),
        (torch.zeros(2, 1, dtype=torch.int64), "1 tokens, expected 2 or more"),
    ],
)
def test_wrong_tokens_are_refused(model: Model, tokens: Tensor, says: str) -> None:
    with pytest.raises(Refusal, match=says):
        model.loss(tokens)


def test_a_replacement_of_another_shape_is_refused(model: Model, tiny_tokens: Tensor) -> None:
    hook = "blocks.1.attn.hook_z"
    with pytest.raises(Refusal, match=r"blocks\.1\.attn\.hook_z returned \(6, 32, 31\).*32, 32"):
        model.loss(tiny_tokens, {hook: lambda x: x[..., 1:]})
    assert torch.isfinite(model.loss(tiny_tokens)).all()


def test_folders_that_are_no_model_are_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no folder .*nowhere"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(Refusal, match=r"lacks config\.json"):
        open_model(tmp_path)
    shutil.copy(tiny_model_folder / "config.json", tmp_path)
    with pytest.raises(Refusal, match="lacks weights in safetensors"):
        open_model(tmp_path)
    whole = (tiny_model_folder / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(CorruptFile, match=r"model\.safetensors is not a whole safetensors file"):
        open_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    with pytest.raises(Refusal, match="lacks a tokenizer"):
        open_model(tmp_path)


def test_weights_that_are_not_of_the_config_are_refused(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "deeper"
    shutil.copytree(tiny_model_folder, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_layer": 4}))
    with pytest.raises(Refusal, match=r"lack \d+ tensors, the first transformer\.h\.3"):
        open_model(folder)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "unheard_of"}))
    with pytest.raises(Refusal, match=r"deeper cannot be opened \("):
        open_model(folder)


# The hub: its cache, its absence, and a stand-in for it on this machine

NAME = "some-owner/some-model"


def test_offline_a_name_that_is_not_cached_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(Refusal, match=rf"'{NAME}'.*HF_HUB_OFFLINE.*load_suite"):
        open_model(NAME)
    assert time.monotonic() - start < 5


def locate_in_another_process(home: Path, endpoint: str, name: str) -> tuple[str, float]:
    """What `locate` says, and the seconds it took, with a hub of its own and not offline."""
    code = (
        "import time; from huggingface_hub import constants, try_to_load_from_cache\n"
        "from darkmatter._hub import locate; start = time.monotonic()\n"
        f"try: print(locate({name!r}))\n"
        "except ValueError as error: print(error)\n"
        "print(time.monotonic() - start)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "NO_PROXY": "127.0.0.1"}
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    output = subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return output[-2], float(output[-1])


def test_without_network_a_name_that_is_not_cached_is_refused_within_5_seconds(
    tmp_path: Path,
) -> None:
    # Port 9 (discard) of this machine: nothing listens there.
    said, seconds = locate_in_another_process(tmp_path, "http://127.0.0.1:9", NAME)
    assert seconds < 5
    assert NAME in said
    assert "http://127.0.0.1:9 does not answer" in said


def test_a_cached_name_needs_no_network(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    for name in (NAME, "openai-community/gpt2"):
        cache = tmp_path / ("models--" + name.replace("/", "--"))
        shutil.copytree(tiny_model_folder, cache / "snapshots" / "c0ffee")
        (cache / "refs").mkdir()
        (cache / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert open_model(NAME).name == NAME
    # The hub's own redirect, so that there is one cached copy under one name.
    assert open_model("gpt2", check=False).n_layer == N_LAYER
    # An interrupted download is not a model.
    (tmp_path / "models--some-owner--some-model/snapshots/c0ffee/model.safetensors").unlink()
    with pytest.raises(Refusal, match="nor whole in the local cache"):
        open_model(NAME)


def test_a_name_is_downloaded(tiny_model_folder: Path, tmp_path: Path) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.wfile.write(self.answer())

        def answer(self) -> bytes:
            file = tiny_model_folder / self.path.rpartition("/")[2]
            found = self.path.startswith(f"/{NAME}/resolve/main/") and file.is_file()
            body = file.read_bytes() if found else b""
            self.send_response(200 if found else 404)
            if found:
                self.send_header("ETag", f'"{file.name}"')
                self.send_header("X-Repo-Commit", "c0ffee" + "0" * 34)
            elif self.path.startswith(f"/{NAME}/"):
                self.send_header("X-Error-Code", "EntryNotFound")
            else:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            return body

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        folder, _ = locate_in_another_process(tmp_path, endpoint, NAME)
        missing, _ = locate_in_another_process(tmp_path, endpoint, "some-owner/other-model")
        server.shutdown()
    assert "no model 'some-owner/other-model'" in missing
    assert open_model(folder).n_layer == N_LAYER
    # From now on it is in the cache, and found there with the hub gone.
    assert locate_in_another_process(tmp_path, endpoint, NAME)[0] == folder

"""A stand-in of the Hugging Face hub: a server on this machine, or a cache that is already full.

Repositories hold random weights under real names and in the real formats of every release.

    with HubStandIn() as hub:                       # HF_ENDPOINT=hub.endpoint, HF_HOME=some folder
        hub.add("openai-community/gpt2", write_gpt2(folder))
        hub.faults["openai-community/gpt2", "config.json"] = Fault(status=500)

    fill_cache(home)                                # then HF_HOME=home HF_HUB_OFFLINE=1
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from darkmatter.models import load_tokenizer
from darkmatter.suites import EMBEDDED, load_suite
from darkmatter.suites.catalogue import DOWNLOADABLE, listing
from darkmatter.suites.releases import release
from tests.conftest import VOCABULARY, write_tokenizer

REVISION = "c0ffee" + "0" * 34


@dataclass
class Fault:
    """What goes wrong with a file, or with every file of a repository (file "*").

    status, code: answered in place of the file, with X-Error-Code. cut: the connection is closed
    after so many bytes, the first `times` times that the file is asked for (whence it is resumed).
    longer: announced Content-Length minus the true one. other: the ETag is the SHA-256 of another
    file. slow: seconds before anything is answered. stall: seconds in the middle of a file, the
    first `times` times.
    """

    status: int = 0
    code: str = ""
    cut: int = 0
    times: int = 10**9
    longer: int = 0
    other: bool = False
    slow: float = 0.0
    stall: float = 0.0


class HubStandIn:
    """The part of the hub's protocol that downloading needs: HEAD and GET of resolve, and model
    pages. `requests` lists what was asked: (method, repository, file, Range or "")."""

    def __init__(self) -> None:
        self.folders: dict[str, Path] = {}
        self.revisions: dict[str, str] = {}
        self.faults: dict[tuple[str, str], Fault] = {}
        self.requests: list[tuple[str, str, str, str]] = []
        self._digests: dict[Path, str] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                hub.answer(self, "HEAD")

            def do_GET(self) -> None:
                hub.answer(self, "GET")

            def log_message(self, format: str, *args: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def add(self, repository: str, folder: Path, revision: str = REVISION) -> None:
        """Serve the files below `folder` as those of a repository."""
        self.folders[repository], self.revisions[repository] = folder, revision

    def answer(self, asked: BaseHTTPRequestHandler, method: str) -> None:
        page = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", asked.path)
        if page is not None and page[1] in self.folders:
            said = {"id": page[1], "sha": self.revisions[page[1]], "siblings": self._files(page[1])}
            self._send(asked, method, 200, json.dumps(said).encode(), {})
            return
        wanted = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", asked.path)
        if wanted is None:
            self._send(asked, method, 404, b"", {})
            return
        repository, revision, name = wanted.groups()
        where = asked.headers.get("Range") or ""
        self.requests.append((method, repository, name, where))
        fault = self.faults.get((repository, name)) or self.faults.get((repository, "*")) or Fault()
        time.sleep(fault.slow)
        if fault.status:
            self._send(asked, method, fault.status, b"", {"X-Error-Code": fault.code})
            return
        missing = self._missing(repository, revision, name)
        if missing:
            self._send(asked, method, 404, b"", {"X-Error-Code": missing})
            return
        file = self.folders[repository] / name
        digest = hashlib.sha256(b"another file").hexdigest() if fault.other else self._digest(file)
        headers = {"ETag": f'"{digest}"', "X-Repo-Commit": self.revisions[repository]}
        if method == "HEAD":
            length = file.stat().st_size + fault.longer
            self._send(asked, method, 200, b"", {**headers, "Content-Length": str(length)})
            return
        body = file.read_bytes()
        start = int(where.removeprefix("bytes=").partition("-")[0]) if where else 0
        if where:
            headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        rest = body[start:]
        sent = len(rest)
        if fault.cut and fault.times > 0:
            fault.times -= 1
            sent = fault.cut
        stall = 0.0
        if fault.stall and fault.times > 0:
            fault.times -= 1
            stall = fault.stall
        self._send(asked, method, 206 if where else 200, rest, headers, sent, stall)

    def _digest(self, file: Path) -> str:
        if file not in self._digests:
            with file.open("rb") as stream:
                self._digests[file] = hashlib.file_digest(stream, "sha256").hexdigest()
        return self._digests[file]

    def _files(self, repository: str) -> list[dict[str, str]]:
        folder = self.folders[repository]
        files = (file for file in folder.rglob("*") if file.is_file())
        return [{"rfilename": file.relative_to(folder).as_posix()} for file in files]

    def _missing(self, repository: str, revision: str, name: str) -> str:
        if repository not in self.folders:
            return "RepoNotFound"
        if revision not in ("main", self.revisions[repository]):
            return "RevisionNotFound"
        return "" if (self.folders[repository] / name).is_file() else "EntryNotFound"

    @staticmethod
    def _send(
        asked: BaseHTTPRequestHandler,
        method: str,
        status: int,
        body: bytes,
        headers: dict[str, str],
        sent: int | None = None,
        stall: float = 0.0,
    ) -> None:
        asked.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            if value:
                asked.send_header(key, value)
        asked.end_headers()
        if method == "GET":
            half = len(body) // 2 if stall else 0
            asked.wfile.write(body[:half])
            # Not a sleep, which a test may have taken from the client.
            threading.Event().wait(stall)
            # A client that gave up has closed the connection.
            with suppress(ConnectionError):
                asked.wfile.write(body[half:sent])
            if sent is not None and sent < len(body):
                asked.close_connection = True


# Random weights in the formats of the releases


def write_language_model(
    folder: Path,
    kind: str,
    d_model: int,
    n_layer: int,
    n_context: int = 64,
    of_pydocs: bool = False,
) -> Path:
    """A random model of the architecture "gpt2", "gemma2", "llama" or "gpt_neox", and a tokenizer.

    Everything that no SAE sees is small: vocabulary, heads, MLPs. The tokenizer has 300 tokens,
    nearly all of one byte, or is that `of_pydocs`, with which a text has a quarter of the tokens.
    """
    import transformers
    from transformers.utils import logging

    logging.disable_progress_bar()
    vocabulary = VOCABULARY
    if of_pydocs:
        tokenizer = load_tokenizer(EMBEDDED["pydocs"] / "model")
        tokenizer.save_pretrained(folder)
        vocabulary = len(tokenizer)
    else:
        write_tokenizer(folder)
    torch.manual_seed(1)
    special: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "vocab_size": vocabulary}
    sizes: dict[str, Any]
    if kind == "gpt2":
        sizes = {"n_embd": d_model, "n_layer": n_layer, "n_head": 4, "n_inner": 64}
        config: Any = transformers.GPT2Config(
            n_positions=n_context, initializer_range=0.1, **sizes, **special
        )
    else:
        sizes = {
            "hidden_size": d_model,
            "num_hidden_layers": n_layer,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "max_position_embeddings": n_context,
            "initializer_range": 0.1,
        }
        grouped: dict[str, Any] = {"num_key_value_heads": 2, "head_dim": 16}
        config = {
            "gemma2": lambda: transformers.Gemma2Config(**sizes, **grouped, **special),
            "llama": lambda: transformers.LlamaConfig(**sizes, **grouped, **special),
            "gpt_neox": lambda: transformers.GPTNeoXConfig(**sizes, **special),
        }[kind]()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def learn(folder: Path, steps: int) -> None:
    """Train a model with the tokenizer of `pydocs` for a few steps on its held-out text, 16
    contexts of 64 at a time.

    After some dozens it predicts from the token before, so that harm to the residual stream costs
    cross entropy, as in a real model, and shares of that cost exist.
    """
    from transformers import AutoModelForCausalLM

    rows = load_suite("pydocs").tokens("fit").tokens[:, :64]
    network: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    order = torch.Generator().manual_seed(4)
    for _ in range(steps):
        part = rows[torch.randint(len(rows), (16,), generator=order)]
        optimiser.zero_grad()
        network(part, labels=part).loss.backward()
        optimiser.step()
    network.save_pretrained(folder)


def residual_streams(folder: Path, tokens: Tensor) -> list[Tensor]:
    """Every block's input at these tokens but the first of each row, [n, d_model] (and what the
    final norm makes of the last one's output)."""
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    with torch.no_grad():
        states = network(tokens, output_hidden_states=True).hidden_states
    return [state[:, 1:].flatten(0, 1).float() for state in states]


def residual_moments(folder: Path) -> list[tuple[Tensor, float]]:
    """Of every block's input the mean over tokens drawn at random, and the root mean square about
    it by component: what a random SAE needs for its L0."""
    tokens = torch.randint(VOCABULARY, (16, 64), generator=torch.Generator().manual_seed(3))
    streams = residual_streams(folder, tokens)
    return [(x.mean(0), float((x - x.mean(0)).square().mean().sqrt())) for x in streams]


def random_weights(
    moments: tuple[Tensor, float], d_sae: int, l0: float, seed: int
) -> dict[str, Tensor]:
    """W_enc, W_dec, b_enc, b_dec: unit directions, read by themselves above a common threshold.

    On Gaussian activations with these moments, about `l0` latents are active.
    """
    mean, spread = moments
    directions = torch.randn(d_sae, len(mean), generator=torch.Generator().manual_seed(seed))
    directions /= directions.norm(dim=1, keepdim=True)
    above = float(torch.special.ndtri(torch.tensor(1 - min(l0 / d_sae, 0.5), dtype=torch.float64)))
    return {
        "W_enc": directions.T.contiguous(),
        "W_dec": directions,
        "b_enc": torch.full((d_sae,), -above * spread),
        "b_dec": mean,
    }


def fitted_weights(x: Tensor, d_sae: int, l0: float, seed: int) -> dict[str, Tensor]:
    """Random directions above one threshold, with about `l0` latents on a row of x if there are as
    many directions as dimensions, more if there are more.

    All are scaled so that the error on x is least: it is below the variance and falls with width,
    as that of trained SAEs does, and laws can be fitted to it.
    """
    weights = random_weights((x.mean(0), 1.0), d_sae, l0, seed)
    directions, centred = weights["W_dec"], x - x.mean(0)
    read = centred @ directions.T
    # Without the power the error would not fall: of many random directions few lie in the data.
    active = min(0.5, l0 / d_sae * (d_sae / x.shape[1]) ** 0.3)
    threshold = read.flatten().kthvalue(int((1 - active) * read.numel())).values
    made = (read - threshold).relu() @ directions
    scale = float((centred * made).sum() / made.square().sum())
    b_enc = torch.full((d_sae,), -scale * float(threshold))
    return {**weights, "W_enc": scale * weights["W_enc"], "b_enc": b_enc}


def write_sae_lens(folder: Path, weights: dict[str, Tensor], hook: str, **more: Any) -> None:
    """cfg.json of sae-lens before version 6, as the releases of GPT-2 small have it; weights."""
    folder.mkdir(parents=True, exist_ok=True)
    d_sae, d_in = weights["W_dec"].shape
    config = {
        "model_name": "gpt2-small",
        "hook_point": hook,
        "hook_point_head_index": None,
        "dataset_path": "Skylion007/openwebtext",
        "context_size": 128,
        "d_in": d_in,
        "d_sae": d_sae,
        "dtype": "torch.float32",
        "device": "cpu",
        **more,
    }
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / _WEIGHTS)
    save_file({"sparsity": torch.full((d_sae,), -3.0)}, folder / "sparsity.safetensors")


_WEIGHTS = "sae_weights.safetensors"
TOPK_OF_LAYER_NORM = {
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": 32},
    "normalize_activations": "layer_norm",
}


def write_gemma_scope(folder: Path, weights: dict[str, Tensor], live: int) -> None:
    """params.npz as Gemma Scope has it; latents after the first `live` are zeros, packed well."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {
        "w_enc": weights["W_enc"].clone(),
        "w_dec": weights["W_dec"].clone(),
        "b_enc": torch.zeros_like(weights["b_enc"]),
        "b_dec": weights["b_dec"],
        "threshold": -weights["b_enc"],
    }
    # The released encoders subtract no bias; here it is in b_enc.
    arrays["b_enc"] -= weights["b_dec"] @ weights["W_enc"]
    for name, axis in (("w_enc", 1), ("w_dec", 0), ("b_enc", 0)):
        arrays[name].narrow(axis, live, len(weights["b_enc"]) - live).zero_()
    packed: dict[str, Any] = {key: value.numpy() for key, value in arrays.items()}
    np.savez_compressed(folder / "params.npz", **packed)


def write_llama_scope(
    folder: Path, weights: dict[str, Tensor], hook: str, norm_scaling_factor: float
) -> None:
    """hyperparams.json and checkpoints/final.safetensors in bfloat16 as Llama Scope has them.

    Its weights read activations times `norm_scaling_factor`.
    """
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    d_sae, d_in = weights["W_dec"].shape
    config = {
        "d_model": d_in,
        "d_sae": d_sae,
        "hook_point_in": hook,
        "hook_point_out": hook,
        # sae-lens multiplies it by the factor that folding puts into the encoder.
        "jump_relu_threshold": float(-weights["b_enc"][0]),
        "dataset_average_activation_norm": {
            "in": d_in**0.5 / norm_scaling_factor,
            "out": d_in**0.5 / norm_scaling_factor,
        },
    }
    (folder / "hyperparams.json").write_text(json.dumps(config))
    tensors = {
        "encoder.weight": weights["W_enc"].T,
        "encoder.bias": -(weights["b_dec"] * norm_scaling_factor) @ weights["W_enc"],
        "decoder.weight": weights["W_dec"].T,
        "decoder.bias": weights["b_dec"] * norm_scaling_factor,
    }
    save_file(
        {key: value.bfloat16().contiguous() for key, value in tensors.items()},
        folder / "checkpoints" / "final.safetensors",
    )


# A whole suite of GPT-2 small


def write_gpt2_small(
    folder: Path, smaller: int = 12, steps: int = 0
) -> Iterator[tuple[str, Path, str]]:
    """Every repository of the suite gpt2-small: (name, folder, revision).

    12 blocks, all SAEs of the suite at their hooks; d_model, every width and every L0 are divided
    by `smaller` (an L0 is 2 at least), so that a code is as sparse beside d_model as it is there.
    The tokens are those of `pydocs`, so that the suite's text has as many as it has in GPT-2's,
    about; contexts have 256. With `steps` the model is no longer quite random, see `learn`.
    """
    entry = DOWNLOADABLE["gpt2-small"]
    model = write_language_model(
        folder / "model", "gpt2", entry.d_model // smaller, 12, 256, of_pydocs=True
    )
    if steps:
        learn(model, steps)
    yield entry.model, model, entry.revision or REVISION
    streams = residual_streams(model, load_suite("pydocs").tokens("fit").tokens[:32, :64])
    for number, row in enumerate(listing(entry)):
        block, stage = int(row["hook"].split(".")[1]), row["hook"].rpartition("_")[2]
        d_sae, l0 = row["d_sae"] // smaller, max(2, row["aim_l0"] / smaller)
        # All of them read centred activations, those of v5 at unit variance as well.
        x = streams[block + (stage == "post")]
        x = x - x.mean(1, keepdim=True)
        more: dict[str, Any] = {}
        if "-v5-" in row["release"]:
            x = x / x.std(1, keepdim=True)
            more = {**TOPK_OF_LAYER_NORM, "activation_fn_kwargs": {"k": max(2, 32 // smaller)}}
        weights = fitted_weights(x, d_sae, l0, number)
        to = folder / row["release"] / _path_of(row)
        write_sae_lens(to, {k: v.half() for k, v in weights.items()}, row["hook"], **more)
    for source in entry.sources:
        yield str(release(source.release)["repo_id"]), folder / source.release, REVISION


def _path_of(row: dict[str, Any]) -> str:
    return next(s["path"] for s in release(row["release"])["saes"] if s["id"] == row["id"])


def add_to_cache(cache: Path, repository: str, source: Path, revision: str = REVISION) -> None:
    """What the hub's client leaves behind: refs/main and a snapshot folder."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / revision, dirs_exist_ok=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(revision)


def fill_cache(home: Path, smaller: int = 12, steps: int = 0) -> None:
    """A HF_HOME that holds the suite gpt2-small, random and reduced, see `write_gpt2_small`."""
    for repository, folder, revision in write_gpt2_small(home / "written", smaller, steps):
        add_to_cache(home / "hub", repository, folder, revision)
    shutil.rmtree(home / "written")


if __name__ == "__main__":
    fill_cache(Path(sys.argv[1]))

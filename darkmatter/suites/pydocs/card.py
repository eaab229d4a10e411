"""The card of a `pydocs` build: what it is made of, how, and how good it came out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any


def card(manifest: dict[str, Any]) -> str:
    """Markdown; every number is read from the manifest."""
    model, validation = manifest["language_model"], manifest["validation"]
    saes = "\n".join(
        f"| `{s['name']}` | `{s['hook']}` | {s['d_sae']} | {s['aim_l0']:g} | {s['l0']:.2f} "
        f"| {s['fvu']:.4f} | {s['fvu_nonlinear']:.4f} | {100 * s['dead']:.1f} % "
        f"| {s['training_activations'] / 1e6:.1f} M | {s['learning_rate']:.1e} "
        f"| {s['training_seconds']:.0f} |"
        for s in manifest["saes"]
    )
    packages = "\n".join(
        f"| {p['name']} | {p['version']} | {p['licence']} |" for p in manifest["packages"]
    )
    files = "\n".join(f"| `{name}` | `{digest}` |" for name, digest in manifest["files"].items())
    trained_on = model["steps"] * model["batch_contexts"] * model["n_context"]
    # Several entries restart at zero when the training was resumed: each part's last time counts.
    hours = _hours([entry["seconds"] for entry in manifest["training"]])
    versions = ", ".join(f"{k} {v}" for k, v in manifest["versions"].items())
    return f"""# The suite `{manifest["name"]}`

A GPT-2-architecture language model trained from scratch on Python docstrings, held-out tokens,
and {len(manifest["saes"])} sparse autoencoders. Rebuild it with
`python -m darkmatter.suites.pydocs --work WORK --out OUT`.

## Model
{model["n_layer"]} blocks, d_model {model["d_model"]}, {model["n_head"]} heads, d_mlp
{model["d_mlp"]}, context {model["n_context"]}, vocabulary {model["vocabulary"]} (byte-level BPE),
tied embeddings, no dropout. Trained on {trained_on / 1e6:.1f} M tokens ({model["steps"]} steps of
{model["batch_contexts"]} contexts, bfloat16, Muon for matrices at {model["muon_rate"]:g} and Adam
at {model["adam_rate"]:g}, seed {model["seed"]}) in {hours:.1f} hours on two CPU cores shared with
other work.
Validation cross entropy: {validation["nats"]:.3f} nats a token over {validation["tokens"]}
predicted tokens of {validation["documents"]} documents that were never trained on.
Weights are stored in float16.

## Autoencoders
BatchTopK trained on activations of positions 1 and on of training documents, all on the same
number of activations; saved as JumpReLU with one threshold. Matrices are stored in float16.
FVU, nonlinear FVU and L0: test documents, positions {manifest["skip"]} and on, probes fitted on the
fit documents. Dead: never active on 1 M held-out tokens.

| name | hook | d_sae | aimed L0 | L0 | FVU | FVU nonlinear | dead | activations | rate | seconds |
|---|---|---|---|---|---|---|---|---|---|---|
{saes}

## Text
Docstrings of the standard library and of the installed packages under PSF, BSD, MIT or Apache
licences; a document is a module. Each docstring and each paragraph of 100 characters or more is
kept once in the whole corpus; documents are split by a hash of their name.

| package | version | licence as declared |
|---|---|---|
{packages}

## Versions
{versions}; seed {manifest["seed"]}.

## Files (sha256)
| file | sha256 |
|---|---|
{files}
"""


def _hours(seconds: list[float]) -> float:
    return sum(a for a, b in pairwise([*seconds, 0.0]) if b < a) / 3600

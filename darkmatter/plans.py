"""What a survey is to do: checked before anything runs, and described by hashes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens, stream
from darkmatter.autoencoders import check_fits, hook_of
from darkmatter.leastsquares import Precision
from darkmatter.passes import About, Work
from darkmatter.remote import api_key, recipe
from darkmatter.shards import FORMAT, fingerprint, hash_tensors, hash_text, identity_of

if TYPE_CHECKING:
    from darkmatter.models import Model

_PACKAGES = ("darkmatter-book", "torch", "transformers", "transformer-lens", "sae-lens", "nnsight")


def planned(
    model: Model,
    saes: Mapping[str, Any],
    tokens: Tokens,
    test: Tokens | None,
    skip: int,
    seed: int,
    share: float,
    special: Sequence[int] | None,
    downstream: bool,
    one_at_a_time: bool,
    checkpoint_tokens: int,
    precision: Precision = "float64",
) -> Work:
    """All that can be refused is, before anything runs."""
    if model.remote is True:
        api_key()
    if not saes:
        raise Refusal("expected at least one SAE, got an empty mapping; pass {name: sae}")
    if checkpoint_tokens < 1:
        raise Refusal(f"checkpoint_tokens is {checkpoint_tokens}, expected 1 or more.")
    if precision not in ("float64", "float32") or (model.remote and precision != "float64"):
        raise Refusal(
            f'precision is {precision!r}, expected "float64" or, for a model that runs here, '
            '"float32"; float64 is exact.'
        )
    fit, test = (tokens, test) if test is not None else tokens.split_documents(share, seed)
    shared = _documents_of(fit) & _documents_of(test)
    if shared:
        raise Refusal(
            f"expected fit and test tokens of different documents, got {len(shared)} in both "
            f"(such as {min(shared)!r}); split with Tokens.split_documents"
        )
    if len(test.document.unique()) < 2:
        raise Refusal(
            "The test tokens are of one document, expected at least 2 to resample; pass more."
        )
    about: dict[str, About] = {}
    for name in saes:
        sae = saes[name]
        check_fits(sae, model)
        hook = hook_of(sae)
        if int(sae.W_dec.shape[1]) != model.width(hook):
            raise Refusal(
                f"{name!r} writes width {int(sae.W_dec.shape[1])}, but activations at {hook} have "
                f"{model.width(hook)}; expected an SAE, which writes what it reads."
            )
        if model.remote:
            recipe(name, sae)
        about[name] = About(hook, int(sae.cfg.d_sae), fingerprint(sae))
    hooks = tuple(dict.fromkeys(one.hook for one in about.values()))
    usable = fit.n_contexts * (fit.tokens.shape[1] - skip - 1)
    for hook in hooks:
        if usable <= model.width(hook):
            raise Refusal(
                f"expected more fit tokens than the {model.width(hook)} dimensions at {hook}, "
                f"got at most {usable}; pass more documents"
            )
    ids = tuple(model.tokenizer.all_special_ids) if special is None else tuple(special)
    for part in (fit, test):
        # Nothing is read yet: this refuses tokens that the model cannot read.
        stream(model, hooks, part, skip, ids)
    return Work(
        model, saes, about, fit, test, skip, ids, downstream, checkpoint_tokens, one_at_a_time,
        precision,
    )  # fmt: skip


def _documents_of(tokens: Tokens) -> set[str]:
    return {tokens.names[i] for i in tokens.document.unique().tolist()}


def described(work: Work, seed: int, resamples: int) -> dict[str, Any]:
    """What is computed on what; `identity` is of the inputs and the settings."""
    inputs = {"model": hash_tensors(dict(work.model.network.state_dict()))}
    if work.model.remote is True:
        # Its weights are not here: the name of the checkpoint stands for them.
        inputs["model"] = hash_text(f"{work.model.checkpoint} {inputs['model']}")
    inputs |= {f"SAE {name!r}": one.sha256 for name, one in work.about.items()}
    documents = {"fit": list(work.fit.names)}
    if work.test.names != work.fit.names:
        documents["test"] = list(work.test.names)
    for part, tokens in (("fit", work.fit), ("test", work.test)):
        ids = hash_tensors({"tokens": tokens.tokens, "document": tokens.document})
        inputs[f"{part} tokens"] = hash_text("\n".join([ids, *tokens.names]))
    description: dict[str, Any] = {
        "format": FORMAT,
        "identity": "",
        "versions": {package: _version(package) for package in _PACKAGES},
        "model": {
            "name": work.model.name,
            "backend": work.model.backend,
            "dtype": str(work.model.dtype).removeprefix("torch."),
            "device": work.model.device.type,
            "d_model": work.model.d_model,
            "n_layer": work.model.n_layer,
            "vocabulary": work.model.vocabulary,
            **({"remote": work.model.remote} if work.model.remote else {}),
        },
        "saes": {n: {"hook": one.hook, "d_sae": one.d_sae} for n, one in work.about.items()},
        "inputs": inputs,
        "settings": {
            "saes": list(work.about),
            "skip": work.skip,
            "special": list(work.special),
            "seed": seed,
            "resamples": resamples,
            "downstream": work.downstream,
            "one_at_a_time": work.one_at_a_time,
            "checkpoint_tokens": work.checkpoint_tokens,
            "precision": work.precision,
            "backend": work.model.backend,
        },
        "documents": documents,
    }
    return {**description, "identity": identity_of(description)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def pieces_of(model: Model, test: Tokens) -> dict[int, str]:
    """The text of every token id that occurs."""
    ids: list[int] = test.tokens.unique().tolist()
    tokens = model.tokenizer.convert_ids_to_tokens(ids)
    pieces: dict[int, str] = {}
    for number, token in zip(ids, tokens, strict=True):
        piece = str(model.tokenizer.decode([number]))
        # Sentencepiece tokenizers drop the space that begins a text.
        spaced = str(token).startswith("\u2581") and not piece.startswith(" ")
        pieces[number] = f" {piece}" if spaced else piece
    return pieces

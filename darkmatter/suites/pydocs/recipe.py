"""The recipe of `pydocs`: from this environment's docstrings to a model, its SAEs and tokens.

Every stage leaves its result in the work folder and is skipped when it is there, so a rebuild
that was killed goes on where it was.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter._files import replacing, sha256_of, writing
from darkmatter._refusal import Refusal
from darkmatter.shards import locked
from darkmatter.suites.pydocs import corpus, language_model
from darkmatter.suites.pydocs.language_model import LanguageModelRecipe
from darkmatter.training import SparseTrainingRecipe, TrainedAutoencoder, train_batch_topk

Log = Callable[[str], None]


@dataclass(frozen=True)
class AutoencoderRecipe:
    """One SAE of the suite: where it reads, how wide it is, how many latents it may use."""

    hook: str
    d_sae: int
    l0: float | int

    @property
    def name(self) -> str:
        """ "blocks.2.hook_resid_post", 2048, 8 -> "resid_post.2-2048-l8"."""
        parts = self.hook.split(".")
        return f"{parts[-1].removeprefix('hook_')}.{parts[1]}-{self.d_sae}-l{self.l0:g}"


MIDDLE = "blocks.2.hook_resid_post"
WIDTHS = (512, 1024, 2048, 4096, 8192)
SPARSITIES = (4, 16, 32, 64)
OTHER_HOOKS = (
    "blocks.1.hook_resid_post",
    "blocks.2.hook_mlp_out",
    "blocks.2.attn.hook_z",
    "blocks.1.hook_resid_pre",
)


@dataclass(frozen=True)
class SuiteRecipe:
    """All settings of a build; `toy()` is the same build at a size for a test."""

    language_model: LanguageModelRecipe = field(default_factory=LanguageModelRecipe)
    autoencoders: tuple[AutoencoderRecipe, ...] = (
        *(AutoencoderRecipe(MIDDLE, width, 8) for width in WIDTHS),
        *(AutoencoderRecipe(MIDDLE, 2048, l0) for l0 in SPARSITIES),
        *(AutoencoderRecipe(hook, 2048, 8) for hook in OTHER_HOOKS),
    )
    packages: frozenset[str] | None = None
    """Distribution names to read; None reads all under a permitted licence."""
    activations: int = 10_010_000
    """Activations collected at each hook, positions 1 and on of training documents."""
    training: SparseTrainingRecipe = field(
        default_factory=lambda: SparseTrainingRecipe(d_sae=1, l0=1, activations=10_010_000)
    )
    """Settings that every SAE shares; width and L0 are filled in for each."""
    held_out: float = 0.1
    fit_contexts: int = 480
    test_contexts: int = 320
    contexts_of_a_document: int = 3
    silent_tokens: int = 1_000_000
    """Held-out tokens on which a latent must fire at least once not to be called dead."""
    skip: int = 32
    seed: int = 0

    @staticmethod
    def toy() -> SuiteRecipe:
        """Minutes become seconds: a few packages, one block less, two small SAEs."""
        middle = "blocks.1.hook_resid_post"
        return SuiteRecipe(
            language_model=LanguageModelRecipe(
                d_model=32,
                n_layer=2,
                n_head=2,
                d_mlp=64,
                n_context=64,
                vocabulary=512,
                batch_contexts=8,
                micro_contexts=8,
                steps=60,
                warmup_steps=5,
            ),
            autoencoders=(AutoencoderRecipe(middle, 64, 4), AutoencoderRecipe(middle, 128, 4)),
            packages=frozenset({"click", "packaging", "jinja2", "attrs", "networkx"}),
            activations=20_000,
            training=SparseTrainingRecipe(
                d_sae=1, l0=1, activations=40_000, batch=256, dead_after=5_000
            ),
            held_out=0.3,
            fit_contexts=60,
            test_contexts=40,
            silent_tokens=5_000,
            skip=8,
        )


def read_corpus(recipe: SuiteRecipe, work: Path, log: Log) -> list[corpus.Package]:
    """Stage 1: documents, tokenizer, token ids by split; returns the packages used."""
    done = work / "packages.json"
    if not done.exists():
        packages, documents = corpus.collect(recipe.packages)
        log(f"corpus: {len(documents)} documents of {len(packages)} packages")
        split = {d.name: corpus.split_of(d, recipe.held_out) for d in documents}
        train = [d.text for d in documents if split[d.name] == "train"]
        # A quarter of the text is plenty for 4096 merges.
        tokenizer = language_model.train_tokenizer(
            iter(train[::4] if recipe.packages is None else train), recipe.language_model.vocabulary
        )
        tokenizer.save(str(work / "tokenizer.json"))
        tokens: dict[str, Any] = {}
        for name in ("train", "fit", "test"):
            chosen = [d for d in documents if split[d.name] == name]
            ids = language_model.encode_documents(tokenizer, [d.text for d in chosen])
            tokens[name] = torch.cat(ids)
            tokens[f"{name}/lengths"] = torch.tensor([len(i) for i in ids])
            _write(work / f"{name}.names.json", json.dumps([d.name for d in chosen]))
        from safetensors.torch import save_file

        with replacing(work / "tokens.safetensors") as temporary:
            save_file(tokens, temporary)
        text = [asdict(p) for p in packages]
        _write(done, json.dumps(text, indent=1))
    return [corpus.Package(**p) for p in json.loads(done.read_text(encoding="utf-8"))]


def documents_of(work: Path, split: str) -> tuple[list[Tensor], list[str]]:
    """Token ids and names of the documents of one split, as stage 1 left them."""
    from safetensors import safe_open

    with safe_open(work / "tokens.safetensors", "pt") as file:
        lengths: list[int] = file.get_tensor(f"{split}/lengths").tolist()
        tokens = list(file.get_tensor(split).split(lengths))
    return tokens, json.loads((work / f"{split}.names.json").read_text(encoding="utf-8"))


def held_out_contexts(recipe: SuiteRecipe, work: Path, split: str) -> tuple[Tensor, Tensor]:
    """Every context of a held-out split: (tokens, document index)."""
    documents, _ = documents_of(work, split)
    return language_model.document_contexts(documents, recipe.language_model.n_context)


def train_model(recipe: SuiteRecipe, work: Path, log: Log) -> Path:
    """Stage 2: the language model, in Hugging Face format, weights in float16."""
    folder = work / "model"
    if (folder / "model.safetensors").exists():
        return folder
    documents, _ = documents_of(work, "train")
    stream = language_model.training_stream(documents, recipe.seed)
    validation, _ = held_out_contexts(recipe, work, "fit")
    pick = torch.randperm(len(validation), generator=torch.Generator().manual_seed(recipe.seed))
    model = language_model.train_language_model(
        recipe.language_model, stream, validation[pick[:128]], work / "training", log
    )
    from transformers import PreTrainedTokenizerFast

    temporary = work / "model.tmp"
    tokenizer: Any = PreTrainedTokenizerFast(
        tokenizer_file=str(work / "tokenizer.json"),
        bos_token=language_model.END_OF_TEXT,
        eos_token=language_model.END_OF_TEXT,
    )
    tokenizer.save_pretrained(temporary)
    model.half().save_pretrained(temporary)
    os.replace(temporary, folder)
    return folder


class ActivationWriter:
    """Forward hooks that append float16 activations of several hook points to memory maps."""

    def __init__(self, model: Any, hooks: Sequence[str], folder: Path, rows: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.at = 0
        self.rows = rows
        self.files: dict[str, Tensor] = {}
        self.handles: list[Any] = []
        width = int(model.config.n_embd)
        for hook in hooks:
            self.files[hook] = torch.from_file(
                str(folder / f"{hook}.f16"), shared=True, size=rows * width, dtype=torch.float16
            ).view(rows, width)
            block = model.transformer.h[int(hook.split(".")[1])]
            if hook.endswith("resid_post"):
                self.handles.append(block.register_forward_hook(self._output(hook)))
            elif hook.endswith("resid_pre"):
                self.handles.append(block.register_forward_pre_hook(self._input(hook)))
            elif hook.endswith("mlp_out"):
                self.handles.append(block.mlp.register_forward_hook(self._output(hook)))
            else:
                self.handles.append(block.attn.c_proj.register_forward_pre_hook(self._input(hook)))

    def _store(self, hook: str, x: Tensor) -> None:
        # Position 0 is <|endoftext|>; nothing is learned about it, nothing measured on it.
        flat = x[:, 1:].flatten(0, 1)[: self.rows - self.at]
        self.files[hook][self.at : self.at + len(flat)] = flat

    def _output(self, hook: str) -> Callable[..., None]:
        def store(module: Any, inputs: Any, output: Any) -> None:
            self._store(hook, output[0] if isinstance(output, tuple) else output)

        return store

    def _input(self, hook: str) -> Callable[..., None]:
        def store(module: Any, inputs: Any) -> None:
            self._store(hook, inputs[0])

        return store

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()


def collect_activations(recipe: SuiteRecipe, work: Path, log: Log) -> dict[str, Tensor]:
    """Stage 3: float16 activations of training documents at every hook, in files."""
    from transformers import GPT2LMHeadModel

    hooks = list(dict.fromkeys(a.hook for a in recipe.autoencoders))
    folder = work / "activations"
    done = folder / "done.json"
    width = recipe.language_model.d_model
    if done.exists():
        rows = int(json.loads(done.read_text(encoding="utf-8"))["rows"])
        return {
            hook: torch.from_file(
                str(folder / f"{hook}.f16"), shared=False, size=rows * width, dtype=torch.float16
            ).view(rows, width)
            for hook in hooks
        }
    model: Any = GPT2LMHeadModel.from_pretrained(work / "model", dtype=torch.float32).eval()
    documents, _ = documents_of(work, "train")
    stream = language_model.training_stream(documents, recipe.seed + 1)
    n_context = recipe.language_model.n_context
    # Contexts cut at the middle of those the model was trained on.
    contexts = language_model.packed_contexts(stream, n_context, n_context // 2)
    order = torch.randperm(len(contexts), generator=torch.Generator().manual_seed(recipe.seed))
    rows = min(recipe.activations, len(contexts) * (n_context - 1))
    # Blocks above the highest hook are not run.
    model.transformer.h = model.transformer.h[: 1 + max(int(h.split(".")[1]) for h in hooks)]
    size, free = len(hooks) * rows * width * 2, shutil.disk_usage(work).free
    if size > free:
        # A write into a mapped file that the disk has no room for is no error but SIGBUS.
        raise Refusal(
            f"The activations take {size / 2**30:.1f} GiB and {work} has {free / 2**30:.1f} GiB "
            "free; make room, or give a --work on another disk, and build again."
        )
    writer = ActivationWriter(model, hooks, folder, rows)
    start = time.monotonic()
    # Products in bfloat16 on a float32 residual stream: faster, and the noise is a ten-thousandth
    # of the variance, far below what an SAE misses.
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        for number, part in enumerate(contexts[order].split(32)):
            model.transformer(part.long())
            writer.at = min(rows, writer.at + len(part) * (n_context - 1))
            if number % 100 == 99 or writer.at == rows:
                rate = writer.at / (time.monotonic() - start)
                log(f"activations: {writer.at}/{rows} {rate:.0f}/s")
            if writer.at == rows:
                break
    writer.close()
    _write(done, json.dumps({"rows": rows}))
    return collect_activations(recipe, work, log)


def save_autoencoder(
    trained: TrainedAutoencoder, which: AutoencoderRecipe, training: dict[str, Any], folder: Path
) -> None:
    """Write sae-lens' format: cfg.json and sae_weights.safetensors, matrices in float16."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata
    from safetensors.torch import save_file

    config = JumpReLUSAEConfig(
        d_in=len(trained.b_dec),
        d_sae=len(trained.b_enc),
        dtype="float32",
        device="cpu",
        apply_b_dec_to_input=False,
        metadata=SAEMetadata(
            model_name="pydocs",
            hook_name=which.hook,
            trained_as="BatchTopK",
            aim_l0=which.l0,
            **training,
        ),
    )
    temporary = folder.with_suffix(".tmp")
    temporary.mkdir(parents=True, exist_ok=True)
    sae = JumpReLUSAE(config)
    _write(temporary / "cfg.json", json.dumps(sae.cfg.to_dict(), indent=1, sort_keys=True))
    save_file(
        {
            "W_enc": trained.W_enc.half().contiguous(),
            "W_dec": trained.W_dec.half().contiguous(),
            "b_enc": trained.b_enc,
            "b_dec": trained.b_dec,
            "threshold": trained.threshold,
        },
        temporary / "sae_weights.safetensors",
    )
    os.replace(temporary, folder)


def train_autoencoders(recipe: SuiteRecipe, work: Path, log: Log) -> None:
    """Stage 4: every SAE of the recipe."""
    todo = [a for a in recipe.autoencoders if not (work / "saes" / a.name).exists()]
    if not todo:
        return
    activations = collect_activations(recipe, work, log)
    for which in todo:
        start = time.monotonic()
        settings = replace(recipe.training, d_sae=which.d_sae, l0=which.l0)
        trained = train_batch_topk(
            activations[which.hook], settings, lambda line, n=which.name: log(f"{n}: {line}")
        )
        facts = {
            "training_activations": settings.activations // settings.batch * settings.batch,
            "learning_rate": settings.rate,
            "seed": settings.seed,
            "training_seconds": round(time.monotonic() - start, 1),
        }
        save_autoencoder(trained, which, facts, work / "saes" / which.name)
        log(f"{which.name}: done in {facts['training_seconds']} s")


def choose_contexts(
    recipe: SuiteRecipe, work: Path, split: str, count: int
) -> tuple[Tensor, list[str]]:
    """The first `count` contexts of a split's documents in a shuffled order, with their names."""
    documents, names = documents_of(work, split)
    n_context = recipe.language_model.n_context
    tokens, index = language_model.document_contexts(
        documents, n_context, recipe.contexts_of_a_document
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    rank = torch.randperm(len(documents), generator=generator)
    kept = rank[index.long()].argsort(stable=True)[:count]
    return tokens[kept], [names[i] for i in index[kept].tolist()]


def dead_shares(
    recipe: SuiteRecipe, work: Path, saes: dict[str, Any], model: Any, log: Log
) -> dict[str, float]:
    """Share of latents of each SAE that never fire on held-out tokens (positions 1 and on)."""
    contexts = torch.cat([held_out_contexts(recipe, work, s)[0] for s in ("fit", "test")])
    n_context = recipe.language_model.n_context
    contexts = contexts[: -(-recipe.silent_tokens // (n_context - 1))]
    alive = {name: torch.zeros(int(sae.cfg.d_sae), dtype=torch.bool) for name, sae in saes.items()}
    hooks = list({sae.cfg.metadata.hook_name for sae in saes.values()})
    with torch.inference_mode():
        for number, part in enumerate(contexts.split(16)):
            x = model.activations(part.long(), hooks)
            for name, sae in saes.items():
                at = x[sae.cfg.metadata.hook_name][:, 1:].flatten(0, 1)
                alive[name] |= (sae.encode(at) > 0).any(0)
            if number % 50 == 49:
                log(f"dead latents: {(number + 1) * 16}/{len(contexts)} contexts")
    log(f"dead latents counted on {len(contexts) * (n_context - 1)} held-out tokens")
    return {name: 1 - float(a.float().mean()) for name, a in alive.items()}


def package(recipe: SuiteRecipe, work: Path, out: Path, log: Log) -> None:
    """Stage 5: put the parts together, measure them, write manifest and card.

    `out` is replaced in one step when everything is there.
    """
    from safetensors.torch import save_file

    from darkmatter.suites import FORMAT, load_suite
    from darkmatter.suites.pydocs.card import card
    from darkmatter.survey import survey

    new = out.with_name(out.name + ".tmp")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    shutil.copytree(work / "model", new / "model")
    for which in recipe.autoencoders:
        shutil.copytree(work / "saes" / which.name, new / "saes" / which.name)
    counts = {"fit": recipe.fit_contexts, "test": recipe.test_contexts}
    chosen = {s: choose_contexts(recipe, work, s, n) for s, n in counts.items()}
    documents = sorted({name for _, names in chosen.values() for name in names})
    number = {name: i for i, name in enumerate(documents)}
    stored: dict[str, Tensor] = {}
    for split, (tokens, names) in chosen.items():
        stored[f"{split}/tokens"] = tokens.contiguous()
        stored[f"{split}/document"] = torch.tensor([number[n] for n in names], dtype=torch.int32)
    save_file(stored, new / "tokens.safetensors")
    _write(new / "documents.json", json.dumps(documents, indent=0))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "name": "pydocs",
        "hook": recipe.autoencoders[0].hook,
        "skip": recipe.skip,
        "saes": [
            {"name": a.name, "hook": a.hook, "d_sae": a.d_sae, "aim_l0": a.l0}
            for a in recipe.autoencoders
        ],
        "packages": json.loads((work / "packages.json").read_text(encoding="utf-8")),
        "language_model": asdict(recipe.language_model),
        "seed": recipe.seed,
        "versions": {
            p: importlib.metadata.version(p) for p in ("torch", "transformers", "sae-lens")
        },
        "training": [json.loads(line) for line in _lines(work / "training" / "history.jsonl")],
        "files": {
            f.relative_to(new).as_posix(): sha256_of(f)
            for f in sorted(new.rglob("*"))
            if f.is_file()
        },
    }
    _write(new / "suite.json", json.dumps(manifest, indent=1))
    suite = load_suite(new)
    fit, test = suite.tokens("fit"), suite.tokens("test")
    log("measuring")
    manifest["validation"] = {
        "nats": validation_loss(suite.model, torch.cat([fit.tokens, test.tokens])),
        "tokens": (fit.n_contexts + test.n_contexts) * (recipe.language_model.n_context - 1),
        "documents": len(documents),
    }
    saes = dict(suite.saes)
    found = survey(suite.model, saes, fit, test, skip=recipe.skip, resamples=200, downstream=False)
    dead = dead_shares(recipe, work, saes, suite.model, log)
    for entry in manifest["saes"]:
        row = found.table.loc[entry["name"]]
        metadata = saes[entry["name"]].cfg.metadata
        entry |= {k: round(float(row[k]), 5) for k in ("l0", "fvu", "fvu_nonlinear")}
        entry["dead"] = round(dead[entry["name"]], 5)
        entry["learning_rate"] = metadata.learning_rate
        entry["training_activations"] = metadata.training_activations
        entry["training_seconds"] = metadata.training_seconds
    _write(new / "README.md", card(manifest))
    _write(new / "suite.json", json.dumps(manifest, indent=1))
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        os.replace(out, old)
    os.replace(new, out)
    shutil.rmtree(old, ignore_errors=True)
    log(f"suite written to {out}")


def validation_loss(model: Any, contexts: Tensor) -> float:
    """Mean cross entropy in nats over every predicted token of whole contexts."""
    losses = [model.loss(part) for part in contexts.split(16)]
    return float(torch.cat(losses).double().mean())


def build(recipe: SuiteRecipe, work: Path, out: Path, log: Log) -> None:
    """All stages; a stage whose result is in `work` is not repeated.

    Raises Refusal when another build is at work in that folder, or the disk is full.
    """
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    with locked(work / "lock"), writing(work):
        for left in work.rglob(".*.tmp"):
            left.unlink()
        read_corpus(recipe, work, log)
        train_model(recipe, work, log)
        train_autoencoders(recipe, work, log)
        package(recipe, work, out, log)


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")

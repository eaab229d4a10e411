"""A suite is a model, held-out tokens and the SAEs to study, under one name.

`pydocs` is embedded: its files lie beside this one and nothing is downloaded. Others name a model
and a release of SAEs on the hub and are fetched when first used; their tokens are the held-out
text of `pydocs` in the model's own tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from darkmatter._files import verify_sha256
from darkmatter._hub import is_cached, require_cached_or_hub
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.autoencoders import check_fits, load_autoencoder
from darkmatter.models import Backend, Model, open_model

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

FORMAT = "darkmatter-suite/1"
EMBEDDED = {"pydocs": Path(__file__).parent / "pydocs" / "data"}
SPLITS = ("fit", "test")


@dataclass(frozen=True)
class HubEntry:
    """A suite that is downloaded: only SAEs trained on activations as transformers gives them."""

    model: str
    repository: str
    """Where the SAEs are; `release` and `saes` are sae-lens' names of them."""
    release: str
    saes: tuple[str, ...]
    hook: str
    skip: int
    mebibytes: int


DOWNLOADABLE = {
    "pythia-70m": HubEntry(
        model="EleutherAI/pythia-70m-deduped",
        repository="ctigges/pythia-70m-deduped__res-sm_processed",
        release="pythia-70m-deduped-res-sm",
        saes=tuple(f"blocks.{block}.hook_resid_post" for block in range(6)),
        hook="blocks.3.hook_resid_post",
        skip=32,
        mebibytes=1100,
    ),
}


class Autoencoders(Mapping[str, Any]):
    """The SAEs of a suite by name, read from disk and verified when first asked for."""

    def __init__(self, suite: Suite):
        self._suite = suite
        self._opened: dict[str, SAE[Any]] = {}

    def __iter__(self) -> Iterator[str]:
        return (entry["name"] for entry in self._suite.manifest["saes"])

    def __len__(self) -> int:
        return len(self._suite.manifest["saes"])

    def __contains__(self, name: object) -> bool:
        return any(name == known for known in self)

    def __getitem__(self, name: str) -> SAE[Any]:
        if name not in self:
            raise Refusal(
                f"expected the name of an SAE of suite {self._suite.name!r}, got {name!r}; "
                f"choose one of {', '.join(self)}"
            )
        if name not in self._opened:
            sae = self._suite.read_sae(name)
            check_fits(sae, self._suite.model)
            self._opened[name] = sae
        return self._opened[name]


@dataclass(frozen=True)
class Suite:
    """Model, tokens, SAEs and what was measured of them when the suite was built."""

    name: str
    path: Path
    manifest: dict[str, Any]

    @cached_property
    def model(self) -> Model:
        """The language model, through TransformerBridge, compared with transformers on opening."""
        return self.open_model()

    def open_model(self, backend: Backend = "bridge") -> Model:
        """The model through another backend, see `darkmatter.open_model`."""
        self.verify("model/")
        return open_model(self.path / "model", backend=backend)

    def read_sae(self, name: str) -> SAE[Any]:
        """One SAE from its folder, verified; `saes` keeps those that were read."""
        self.verify(f"saes/{name}/")
        return load_autoencoder(self.path / "saes" / name)

    @cached_property
    def saes(self) -> Autoencoders:
        """Name -> sae-lens SAE."""
        return Autoencoders(self)

    @property
    def hook(self) -> str:
        """The hook point of the width and L0 grid."""
        return str(self.manifest["hook"])

    @property
    def skip(self) -> int:
        """Positions at the start of a context that are not measured by default."""
        return int(self.manifest["skip"])

    @cached_property
    def catalogue(self) -> pd.DataFrame:
        """One row an SAE: name, hook, d_sae, aim_l0, and fvu, l0, dead share as built."""
        import pandas as pd

        return pd.DataFrame(self.manifest["saes"])

    def grid(self, kind: str) -> list[str]:
        """Names of the SAEs at the middle hook, by rising "width" (L0 8) or by rising "l0" (2048).

        Raises Refusal for another kind.
        """
        if kind not in ("width", "l0"):
            raise Refusal(f"expected kind 'width' or 'l0', got {kind!r}; choose one of the two")
        held, rising = ("aim_l0", "d_sae") if kind == "width" else ("d_sae", "aim_l0")
        rows = [s for s in self.manifest["saes"] if s["hook"] == self.hook]
        common = max({r[held] for r in rows}, key=lambda v: sum(r[held] == v for r in rows))
        return [r["name"] for r in sorted(rows, key=lambda r: r[rising]) if r[held] == common]

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """Names of the held-out documents; `Tokens.document` counts in this list."""
        self.verify("documents.json")
        return tuple(json.loads((self.path / "documents.json").read_text(encoding="utf-8")))

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        self.verify("tokens.safetensors")
        return load_file(self.path / "tokens.safetensors")

    def tokens(self, split: str, seed: int = 0) -> Tokens:
        """Held-out contexts of "fit" or "test"; no document is in both.

        Seed 0 is the split the suite was built with; another seed deals the same documents
        anew, at the same share, so that a result can be seen over splits.

        Raises Refusal for another split.
        """
        if split not in SPLITS:
            raise Refusal(f"expected split 'fit' or 'test', got {split!r}; choose one of the two")
        stored = self._stored
        parts = [
            Tokens(
                stored[f"{part}/tokens"].long(), stored[f"{part}/document"].long(), self.documents
            )
            for part in SPLITS
        ]
        if seed != 0:
            both = Tokens(
                torch.cat([p.tokens for p in parts]),
                torch.cat([p.document for p in parts]),
                self.documents,
            )
            share = parts[0].n_contexts / both.n_contexts
            parts = list(both.split_documents(share, seed))
        return parts[SPLITS.index(split)]

    def verify(self, prefix: str) -> None:
        """Compare every file below `prefix` with the sha256 in the manifest.

        Raises CorruptFile (a Refusal) naming the file that is missing or differs.
        """
        for file, digest in self.manifest["files"].items():
            if file.startswith(prefix):
                verify_sha256(self.path / file, digest)


class HubSuite(Suite):
    """A suite whose model and SAEs come from the hub (or its local cache)."""

    @property
    def entry(self) -> HubEntry:
        return DOWNLOADABLE[self.name]

    def open_model(self, backend: Backend = "bridge") -> Model:
        """The model, downloaded once. Raises Refusal naming the repository when it cannot be."""
        return open_model(self.entry.model, backend=backend)

    def read_sae(self, name: str) -> SAE[Any]:
        """One SAE of the release, downloaded once."""
        from sae_lens import SAE

        require_cached_or_hub(self.entry.repository, "SAEs")
        return SAE.from_pretrained(self.entry.release, name, device="cpu").eval()

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        embedded = load_suite("pydocs")
        reader: Any = embedded.model.tokenizer
        writer: Any = self.model.tokenizer
        length = min(256, self.model.n_context) - 1
        stored: dict[str, torch.Tensor] = {}
        for split in SPLITS:
            source = embedded.tokens(split)
            rows: list[list[int]] = []
            document: list[int] = []
            for number in source.document.unique_consecutive().tolist():
                ids = source.tokens[source.document == number][:, 1:].flatten()
                new = writer(reader.decode(ids), add_special_tokens=False)["input_ids"]
                cut = [new[i : i + length] for i in range(0, len(new) - length + 1, length)]
                rows += [[writer.bos_token_id, *part] for part in cut]
                document += [number] * len(cut)
            stored[f"{split}/tokens"] = torch.tensor(rows)
            stored[f"{split}/document"] = torch.tensor(document)
        return stored

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """Names of the held-out documents, those of `pydocs`."""
        return load_suite("pydocs").documents


def list_suites() -> list[dict[str, Any]]:
    """What can be loaded: name, where from, size in MiB, number of SAEs, whether it is here."""
    rows: list[dict[str, Any]] = []
    for name, path in EMBEDDED.items():
        manifest = _read_manifest(name, path)
        size = sum((path / f).stat().st_size for f in manifest["files"] if (path / f).exists())
        rows.append(
            {
                "name": name,
                "source": "embedded",
                "mebibytes": round(size / 2**20, 1),
                "saes": len(manifest["saes"]),
                "cached": True,
            }
        )
    for name, entry in DOWNLOADABLE.items():
        rows.append(
            {
                "name": name,
                "source": f"{entry.model}, {entry.repository}",
                "mebibytes": float(entry.mebibytes),
                "saes": len(entry.saes),
                "cached": is_cached(entry.model) and is_cached(entry.repository),
            }
        )
    return rows


def load_suite(name_or_path: str | Path = "pydocs") -> Suite:
    """Open a suite by name, or a suite folder made by a rebuild.

    An embedded suite or folder: reads the manifest; weights are verified and read when first
    used. A downloadable suite: opens the model, downloading it if it is not cached.

    Raises Refusal for an unknown name (listing those that exist), a folder without a manifest,
    and, within 5 seconds, a downloadable suite without network or cache.
    """
    text = str(name_or_path)
    if text in DOWNLOADABLE:
        entry = DOWNLOADABLE[text]
        manifest: dict[str, Any] = {"name": text, "hook": entry.hook, "skip": entry.skip}
        manifest |= {"files": {}, "saes": [{"name": n, "hook": n} for n in entry.saes]}
        suite = HubSuite(text, Path(), manifest)
        suite.model  # noqa: B018 - refuses now, not in the middle of work
        return suite
    path = EMBEDDED.get(text)
    if path is None:
        path = Path(name_or_path)
        if not (path / "suite.json").exists():
            raise Refusal(
                f"expected the name of a suite or a suite folder, got {text!r}; "
                f"known suites: {', '.join([*EMBEDDED, *DOWNLOADABLE])}"
            )
    found = _read_manifest(text, path)
    return Suite(str(found["name"]), path, found)


def _read_manifest(name: str, path: Path) -> dict[str, Any]:
    file = path / "suite.json"
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(
            f"expected a readable suite.json for suite {name!r} at {path}, got {error}; "
            "reinstall the package or rebuild the suite with python -m darkmatter.suites.pydocs"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Refusal(
            f"expected a suite.json of format {FORMAT!r} at {path}, got another file; "
            "rebuild the suite with python -m darkmatter.suites.pydocs"
        )
    return manifest


def digest(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

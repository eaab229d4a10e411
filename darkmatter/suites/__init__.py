"""A suite is a model, held-out tokens and the SAEs to study, under one name.

`pydocs` is embedded: its files lie beside this one and nothing is downloaded. Others name a model
and releases of SAEs on the hub, of which each is fetched when it is first used; their tokens are
the held-out text of `pydocs` in the model's own tokens, or the data set of the paper.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors.torch import load_file

from darkmatter._files import understood, verify_sha256
from darkmatter._hub import cached_revision, is_cached
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.autoencoders import check_fits, load_autoencoder
from darkmatter.models import Backend, Model, load_tokenizer, open_model
from darkmatter.suites.catalogue import DOWNLOADABLE, HubEntry, grid, listing
from darkmatter.suites.processing import on_raw_activations
from darkmatter.suites.releases import is_here, open_release

if TYPE_CHECKING:
    import pandas as pd
    from sae_lens import SAE

FORMAT = "darkmatter-suite/1"
EMBEDDED = {"pydocs": Path(__file__).parent / "pydocs" / "data"}
SPLITS = ("fit", "test")
# Documents of the embedded text are short; longer contexts would leave few of them.
_OFFLINE_CONTEXT, _OFFLINE_SKIP = 256, 32
# The paper: 300 contexts of the data set shuffled with seed 42, 60 % of the tokens to fit.
_OWN_CONTEXTS, _DATASET_SEED, _FIT_SHARE = 300, 42, 0.6


class Autoencoders(Mapping[str, Any]):
    """The SAEs of a suite by name, read from disk and verified when first asked for.

    Those of more than 1 GiB are not kept, so that a loop over them holds one at a time.
    """

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
        if name in self._opened:
            return self._opened[name]
        sae = self._suite.read_sae(name)
        check_fits(sae, self._suite.model)
        if 2 * sae.W_dec.numel() * sae.W_dec.element_size() <= 2**30:
            self._opened[name] = sae
        return sae


@dataclass(frozen=True)
class Suite:
    """Model, tokens, SAEs and what was measured of them when the suite was built."""

    name: str
    path: Path
    manifest: dict[str, Any]
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    """Of the model; SAEs compute in float32."""

    @cached_property
    def model(self) -> Model:
        """The language model, through TransformerBridge, compared with transformers on opening."""
        return self.open_model()

    def open_model(self, backend: Backend = "bridge") -> Model:
        """The model through another backend, see `darkmatter.open_model`."""
        self.verify("model/")
        return open_model(self.path / "model", backend, self.device, self.dtype)

    def read_sae(self, name: str) -> SAE[Any]:
        """One SAE from its folder, verified; `saes` keeps those that were read."""
        self.verify(f"saes/{name}/")
        return load_autoencoder(self.path / "saes" / name, self.device)

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
        """Names of the SAEs at `hook`: by rising "width" at one L0, or by rising "l0" at one width.

        Raises Refusal for another kind.
        """
        _check_kind(kind)
        held, rising = ("aim_l0", "d_sae") if kind == "width" else ("d_sae", "aim_l0")
        rows = [s for s in self.manifest["saes"] if s["hook"] == self.hook]
        common = max({r[held] for r in rows}, key=lambda v: sum(r[held] == v for r in rows))
        return [r["name"] for r in sorted(rows, key=lambda r: r[rising]) if r[held] == common]

    @property
    def middle(self) -> str:
        """Name of the SAE that chapters look at when they look at one: where the two grids cross,
        or in the middle of the width grid."""
        widths = self.grid("width")
        crossing = [name for name in widths if name in self.grid("l0")]
        return crossing[0] if len(crossing) == 1 else widths[len(widths) // 2]

    @property
    def second(self) -> str:
        """Name of another SAE at `hook`: the next narrower of the width grid, or the next wider."""
        widths = self.grid("width")
        at = widths.index(self.middle)
        return widths[at - 1 if at else min(1, len(widths) - 1)]

    @property
    def places(self) -> dict[str, str]:
        """Role -> name of the SAE there, most like `middle` in width and then in L0.

        "same place" (`middle` itself), "block before" (the same stage of it), "MLP" and "heads"
        (what wrote into the stream last), "block 1 entry". A role without an SAE is missing.
        """
        _, number, stage = self.hook.split(".", 2)
        block = int(number)
        # A stream at the entry of a block was written by the block before.
        writer = block - 1 if stage == "hook_resid_pre" else block
        hooks = {
            "block before": f"blocks.{block - 1}.{stage}",
            "MLP": f"blocks.{writer}.hook_mlp_out",
            "heads": f"blocks.{writer}.attn.hook_z",
            "block 1 entry": "blocks.1.hook_resid_pre",
        }
        rows: list[dict[str, Any]] = self.manifest["saes"]
        (own,) = (row for row in rows if row["name"] == self.middle)
        found = {"same place": self.middle}
        for role, hook in hooks.items():
            there = [row for row in rows if row["hook"] == hook]
            if there and hook != self.hook:
                found[role] = min(there, key=lambda row: _apart(row, own))["name"]
        return found

    @property
    def studied(self) -> list[str]:
        """Names of the SAEs of both grids and of `places`, in the order of `saes`; of `pydocs` all,
        of a suite that is downloaded the few of its many that are compared with each other."""
        chosen = {*self.grid("width"), *self.grid("l0"), *self.places.values()}
        return [name for name in self.saes if name in chosen]

    @cached_property
    def documents(self) -> tuple[str, ...]:
        """Names of the held-out documents; `Tokens.document` counts in this list."""
        self.verify("documents.json")
        with understood(self.path / "documents.json", "a list of names"):
            text = (self.path / "documents.json").read_text(encoding="utf-8")
            return tuple(str(name) for name in json.loads(text))

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        self.verify("tokens.safetensors")
        with understood(self.path / "tokens.safetensors", "the tokens of a suite"):
            stored = load_file(self.path / "tokens.safetensors")
            for split in SPLITS:
                _ = stored[f"{split}/tokens"].shape, stored[f"{split}/document"].shape
            return stored

    def tokens(self, split: str, seed: int = 0) -> Tokens:
        """Held-out contexts of "fit" or "test"; no document is in both.

        Seed 0 is the split the suite was built with; another seed deals the same documents
        anew, at the same share, so that a result can be seen over splits.

        Raises Refusal for another split.
        """
        _check_split(split)
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


@dataclass(frozen=True)
class HubSuite(Suite):
    """A suite whose model and SAEs come from the hub (or its local cache).

    SAEs are presented as autoencoders of the activations that `model` has, see
    `darkmatter.suites.processing`.
    """

    text: str = "pydocs"
    """Which text `tokens` gives: that of the embedded suite, or "own", the entry's data set."""

    @property
    def entry(self) -> HubEntry:
        """Where everything comes from, its size, licence and settings."""
        return DOWNLOADABLE[self.name]

    def open_model(self, backend: Backend = "bridge") -> Model:
        """The model, downloaded once. Raises Refusal naming the repository when it cannot be."""
        entry = self.entry
        return open_model(entry.model, backend, self.device, self.dtype, revision=entry.revision)

    def read_sae(self, name: str) -> SAE[Any]:
        """One SAE of its release, downloaded once, on the activations of `model`."""
        (row,) = (row for row in listing(self.entry) if row["name"] == name)
        sae = open_release(row["release"], row["id"], self.device)
        return on_raw_activations(sae)

    @property
    def skip(self) -> int:
        """Positions not measured: the paper's for the suite's own text, at most 32 for `pydocs`,
        whose documents hold no contexts as long as the paper's."""
        return self.entry.skip if self.text == "own" else min(self.entry.skip, _OFFLINE_SKIP)

    def grid(self, kind: str) -> list[str]:
        """As of any suite; the width grid is at an L0 near the paper's."""
        _check_kind(kind)
        return [row["name"] for row in grid(self.entry, kind)]

    @property
    def revisions(self) -> dict[str, str]:
        """Repository -> commit of the model and of every release in the cache."""
        entry = self.entry
        asked = {entry.model: entry.revision} | dict.fromkeys(entry.repositories)
        found = {name: cached_revision(name, revision) for name, revision in asked.items()}
        return {name: commit for name, commit in found.items() if commit is not None}

    def tokens(self, split: str, seed: int = 0) -> Tokens:
        """Held-out contexts of "fit" or "test"; no document is in both, for any seed.

        Raises Refusal for another split, and when the suite's own text is asked for and the hub
        does not answer.
        """
        if self.text == "pydocs":
            return super().tokens(split, seed)
        _check_split(split)
        return self._own.split_documents(_FIT_SHARE, seed)[SPLITS.index(split)]

    @cached_property
    def _own(self) -> Tokens:
        """The paper's amount of text: the first whole context of each of 300 documents."""
        from darkmatter.documents import read_dataset, tokenise

        context = min(self.entry.context, self.model.n_context)
        text = read_dataset(self.entry.text, seed=_DATASET_SEED)
        return tokenise(
            self.model, text, context, tokens=_OWN_CONTEXTS * context, bos=True, per_document=1
        )

    @cached_property
    def _stored(self) -> dict[str, torch.Tensor]:
        embedded = load_suite("pydocs")
        reader = load_tokenizer(embedded.path / "model")
        writer: Any = self.model.tokenizer
        length = min(_OFFLINE_CONTEXT, self.model.n_context) - 1
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
        """Names of the held-out documents, those of `pydocs` or the rows of the data set."""
        return load_suite("pydocs").documents if self.text == "pydocs" else self._own.names


def list_suites() -> list[dict[str, Any]]:
    """What can be loaded, one row a suite.

    name; source: where from; mebibytes: what is downloaded (model and width grid, about); saes:
    how many can be asked for; cached: whether model and width grid are here; memory_gib: model and
    widest SAE of the grid, in float32; licence: where one has to be accepted first, or None; text:
    the data set of the paper's setting; saes_cached: SAEs in the cache.
    """
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
                # Weights are stored in half precision.
                "memory_gib": round(2 * size / 2**30, 1),
                "licence": None,
                "text": "embedded",
                "saes_cached": len(manifest["saes"]),
            }
        )
    for name, entry in DOWNLOADABLE.items():
        every, widths = listing(entry), grid(entry, "width")
        here = {row["name"] for row in every if is_here(row["release"], row["id"])}
        size = entry.mebibytes + sum(entry.bytes_of(row) for row in widths) / 2**20
        rows.append(
            {
                "name": name,
                "source": ", ".join((entry.model, *entry.repositories)),
                "mebibytes": float(round(size)),
                "saes": len(every),
                "cached": is_cached(entry.model) and all(row["name"] in here for row in widths),
                "memory_gib": round(entry.memory_gib(), 1),
                "licence": entry.licence,
                "text": entry.text,
                "saes_cached": len(here),
            }
        )
    return rows


def load_suite(
    name_or_path: str | Path = "pydocs",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    text: str = "pydocs",
) -> Suite:
    """Open a suite by name, or a suite folder made by a rebuild.

    An embedded suite or folder: reads the manifest; weights are verified and read when first
    used. A downloadable suite: opens the model, downloading it if it is not cached; an SAE is
    downloaded when it is first asked for. `text`: what its tokens are, the held-out text of the
    embedded suite or "own", 300 documents of the data set of the paper's setting, from the hub.

    Raises Refusal for an unknown name (listing those that exist), a folder without a manifest, and,
    within 5 seconds, a downloadable suite without network or cache or whose licence was not
    accepted.
    """
    name = str(name_or_path)
    if text not in ("pydocs", "own"):
        raise Refusal(f"expected text 'pydocs' or 'own', got {text!r}; choose one of the two")
    if name in DOWNLOADABLE:
        entry = DOWNLOADABLE[name]
        manifest: dict[str, Any] = {"name": name, "hook": entry.hook, "skip": entry.skip}
        manifest |= {"files": {}, "saes": [dict(row) for row in listing(entry)]}
        suite = HubSuite(name, Path(), manifest, device, dtype, text)
        suite.model  # noqa: B018 - refuses now, not in the middle of work
        return suite
    path = EMBEDDED.get(name)
    if path is None:
        path = Path(name_or_path)
        if not (path / "suite.json").exists():
            raise Refusal(
                f"expected the name of a suite or a suite folder, got {name!r}; "
                f"known suites: {', '.join([*EMBEDDED, *DOWNLOADABLE])}"
            )
    found = _read_manifest(name, path)
    return Suite(str(found["name"]), path, found, device, dtype)


def _apart(row: dict[str, Any], other: dict[str, Any]) -> tuple[float, float]:
    """Distance of two SAEs in log width, then in L0 where both are known."""
    l0s = row["aim_l0"], other["aim_l0"]
    apart = abs((l0s[0] or 0) - (l0s[1] or 0))
    return abs(math.log(row["d_sae"] / other["d_sae"])), float(apart)


def _check_kind(kind: str) -> None:
    if kind not in ("width", "l0"):
        raise Refusal(f"expected kind 'width' or 'l0', got {kind!r}; choose one of the two")


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise Refusal(f"expected split 'fit' or 'test', got {split!r}; choose one of the two")


def _read_manifest(name: str, path: Path) -> dict[str, Any]:
    file = path / "suite.json"
    try:
        manifest: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(
            f"expected a readable suite.json for suite {name!r} at {path}, got {error}; "
            "reinstall the package or rebuild the suite with python -m darkmatter.suites.pydocs"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise Refusal(
            f"expected a suite.json of format {FORMAT!r} at {path}, got another file; "
            "rebuild the suite with python -m darkmatter.suites.pydocs"
        )
    with understood(file, "the card of a suite"):
        _check_manifest(cast("dict[str, Any]", manifest))
    return manifest


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ValueError, KeyError or TypeError unless all that is read of a suite is there."""
    places = [str(manifest["name"]), *manifest["files"]]
    for row in manifest["saes"]:
        places.append(str(row["name"]))
        _, number, _ = row["hook"].split(".", 2)
        l0 = row["aim_l0"]
        if not str(number).isdecimal() or type(row["d_sae"]) is not int or row["d_sae"] < 1:
            raise ValueError(f"{row['name']!r} has no hook of a block, or no width")
        if l0 is not None and (isinstance(l0, bool) or not 0 <= l0 < math.inf):
            raise ValueError(f"{row['name']!r} has an L0 of {l0!r}")
    for place in places:
        # What a card names lies in its folder.
        if Path(place).is_absolute() or {"..", "."} & set(place.split("/")) or "\0" in place:
            raise ValueError(f"{place!r} leads out of the folder")
    if manifest["hook"] not in {row["hook"] for row in manifest["saes"]}:
        raise ValueError(f"no SAE is at {manifest['hook']!r}")
    if len({row["name"] for row in manifest["saes"]}) < len(manifest["saes"]):
        raise ValueError("two SAEs have one name")
    if type(manifest["skip"]) is not int or manifest["skip"] < 0:
        raise ValueError(f"skip is {manifest['skip']!r}")
    if not all(isinstance(digest, str) for digest in manifest["files"].values()):
        raise ValueError("files has no SHA-256 for each")

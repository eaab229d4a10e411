"""The suites that are downloaded: models, releases of SAEs, and the settings they are studied in.

Layers, contexts and masks are those of Engels, Smith and Tegmark (2410.14670) where they are
published; where not, `note` says so. What sae-lens knows (ids, repositories, L0s) is read from it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

from darkmatter.suites.releases import release

# Named after thousands, of powers of two.
_NAMES = ("4k", "8k", "16k", "32k", "65k", "131k", "262k", "524k", "1m")
_WIDTHS = {name: 1 << power for power, name in enumerate(_NAMES, start=12)}


@dataclass(frozen=True)
class Source:
    """SAEs of one release: those whose id matches `ids` as a whole.

    The groups `block`, `width` (such as 768 or 16k) and `l0` of the pattern say what an id does;
    `hook` with the block in its place is the hook point, `d_sae` the width where ids name none.
    """

    release: str
    ids: str
    hook: str
    d_sae: int = 0
    bytes_per_weight: int = 4


@dataclass(frozen=True)
class HubEntry:
    """A suite that is downloaded."""

    model: str
    parameters: int
    """Of the model; with 4 bytes each and its widest SAE of the width grid they fill the memory."""
    mebibytes: int
    """Download of the model's weights, about."""
    d_model: int
    sources: tuple[Source, ...]
    hook: str
    """Where the grids are."""
    near_l0: int | None
    """The width grid takes, of every width, the SAE whose L0 is nearest this (None: unknown)."""
    l0_width: int
    """The width of the L0 grid."""
    skip: int
    context: int
    text: str
    """The hub's data set that the paper, or else the SAEs, used."""
    licence: str | None
    """Where a licence has to be accepted before the model can be read, None without a gate."""
    note: str
    revision: str | None = None
    """The commit of the model; None: what main is, which `Suite.revisions` then tells."""

    @property
    def repositories(self) -> tuple[str, ...]:
        """Where the SAEs are."""
        return tuple(str(release(source.release)["repo_id"]) for source in self.sources)

    def bytes_of(self, row: dict[str, Any]) -> int:
        """Size of one SAE's encoder and decoder as they are stored."""
        (source,) = (s for s in self.sources if s.release == row["release"])
        return 2 * self.d_model * int(row["d_sae"]) * source.bytes_per_weight

    def memory_gib(self) -> float:
        """Model and the widest SAE of the width grid, both in float32."""
        widest = max(row["d_sae"] for row in grid(self, "width"))
        return 4 * (self.parameters + 2 * self.d_model * widest) / 2**30


def _gemma(size: str, d_model: int, layers: str, parameters: int, mebibytes: int) -> dict[str, Any]:
    ids = rf"layer_(?P<block>{layers})/width_(?P<width>\w+)/average_l0_(?P<l0>\d+)"
    model = f"google/gemma-2-{size}"
    return {
        "model": model,
        "parameters": parameters,
        "mebibytes": mebibytes,
        "d_model": d_model,
        "sources": (Source(f"gemma-scope-{size}-pt-res", ids, "blocks.{}.hook_resid_post"),),
        "near_l0": 60,
        "l0_width": 1 << 14,
        "skip": 200,
        "context": 1024,
        "text": "monology/pile-uncopyrighted",
        "licence": f"https://huggingface.co/{model}",
    }


_PRE, _POST = "blocks.{}.hook_resid_pre", "blocks.{}.hook_resid_post"

DOWNLOADABLE: dict[str, HubEntry] = {
    "pythia-70m": HubEntry(
        model="EleutherAI/pythia-70m-deduped",
        parameters=70_426_624,
        mebibytes=160,
        d_model=512,
        sources=(
            Source(
                "pythia-70m-deduped-res-sm",
                r"blocks\.(?P<block>\d+)\.hook_resid_post",
                _POST,
                1 << 15,
            ),
        ),
        hook="blocks.3.hook_resid_post",
        near_l0=None,
        l0_width=1 << 15,
        skip=32,
        context=256,
        text="monology/pile-uncopyrighted",
        licence=None,
        note="Not in the paper; one width a block, so that neither grid has more than one SAE.",
    ),
    "gpt2-small": HubEntry(
        model="openai-community/gpt2",
        parameters=124_439_808,
        mebibytes=523,
        d_model=768,
        sources=(
            Source(
                "gpt2-small-res-jb-feature-splitting",
                r"blocks\.(?P<block>\d+)\.hook_resid_pre_(?P<width>\d+)",
                _PRE,
            ),
            Source("gpt2-small-res-jb", r"blocks\.(?P<block>\d+)\.hook_resid_pre", _PRE, 24_576),
            Source(
                "gpt2-small-resid-post-v5-32k",
                r"blocks\.(?P<block>\d+)\.hook_resid_post",
                _POST,
                1 << 15,
            ),
            Source(
                "gpt2-small-resid-post-v5-128k",
                r"blocks\.(?P<block>\d+)\.hook_resid_post",
                _POST,
                1 << 17,
            ),
        ),
        hook="blocks.8.hook_resid_pre",
        near_l0=40,
        l0_width=24_576,
        skip=10,
        context=512,
        text="Skylion007/openwebtext",
        licence=None,
        note="Context and mask are those of the paper's code, which has no published number for "
        "GPT-2; its L0 grid is two SAEs of different trainings. The SAEs at resid_pre read centred "
        "activations: the mean over d_model is taken off and put back (one latent more).",
        revision="607a30d783dfa663caf39e06633721c8d4cfcd7e",
    ),
    "gemma-2-2b": HubEntry(
        hook="blocks.12.hook_resid_post",
        note="The paper's layers (5, 12, 19), context, mask and text; which SAE it took of every "
        "width is published for the 9B model only.",
        **_gemma("2b", 2304, "5|12|19", 2_614_341_888, 9_980),
    ),
    "gemma-2-9b": HubEntry(
        hook="blocks.20.hook_resid_post",
        note="The paper's layers (9, 20, 31), context, mask and text, and the SAEs of its figure 1 "
        "as far as sae-lens lists them: at width 262k it has L0 50 and not the paper's 64.",
        **_gemma("9b", 3584, "9|20|31", 9_241_705_984, 35_260),
    ),
    "llama-3.1-8b": HubEntry(
        model="meta-llama/Llama-3.1-8B",
        parameters=8_030_261_248,
        mebibytes=15_320,
        d_model=4096,
        sources=tuple(
            Source(f"llama_scope_lxr_{x}x", rf"l(?P<block>\d+)r_{x}x", _POST, x * 4096, 2)
            for x in (8, 32)
        ),
        hook="blocks.15.hook_resid_post",
        near_l0=50,
        l0_width=1 << 15,
        skip=200,
        context=1024,
        text="monology/pile-uncopyrighted",
        licence="https://huggingface.co/meta-llama/Llama-3.1-8B",
        note="The paper's widths (8x and 32x), mask and text; its values by layer, and which layer "
        "it took where it took one, are not published. Its code reads contexts of 2048.",
    ),
}


@cache
def listing(entry: HubEntry) -> tuple[dict[str, Any], ...]:
    """One row an SAE: name, hook, d_sae, aim_l0 (None: unknown), release, id, neuronpedia.

    A name says what its SAE is, as in the embedded suite: resid_pre.8-24576-l40.
    """
    rows: list[dict[str, Any]] = []
    for source in entry.sources:
        for known in release(source.release)["saes"]:
            said = re.fullmatch(source.ids, known["id"])
            if said is None:
                continue
            block, parts = int(said["block"]), said.groupdict()
            width = parts.get("width")
            d_sae = source.d_sae if width is None else _WIDTHS.get(width) or int(width)
            l0 = int(parts.get("l0") or known.get("l0") or 0) or None
            stage = source.hook.rpartition("hook_")[2]
            rows.append(
                {
                    "name": f"{stage}.{block}-{d_sae}" + (f"-l{l0}" if l0 else ""),
                    "hook": source.hook.format(block),
                    "d_sae": d_sae,
                    "aim_l0": l0,
                    "release": source.release,
                    "id": known["id"],
                    "neuronpedia": known.get("neuronpedia"),
                }
            )
    return tuple(sorted(rows, key=lambda r: (r["hook"], r["d_sae"], r["aim_l0"] or 0)))


def grid(entry: HubEntry, kind: str) -> list[dict[str, Any]]:
    """Rows at the suite's hook: of every width the one nearest in L0, or every L0 of one width."""
    rows = [row for row in listing(entry) if row["hook"] == entry.hook]
    if kind == "l0":
        return [row for row in rows if row["d_sae"] == entry.l0_width]
    if entry.near_l0 is None:
        return rows
    aim = math.log(entry.near_l0)
    widths = sorted({row["d_sae"] for row in rows})
    return [
        min(
            (row for row in rows if row["d_sae"] == width),
            key=lambda row: abs(math.log(row["aim_l0"]) - aim),
        )
        for width in widths
    ]

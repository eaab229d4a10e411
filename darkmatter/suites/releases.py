"""Releases of SAEs that sae-lens knows: what is in them, and one SAE of them, downloaded with care.

Ids, repositories, hooks, L0s and norms are read from sae-lens' own list (pretrained_saes.yaml)
without importing sae-lens, which takes seconds.
"""

from __future__ import annotations

import re
import warnings
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from darkmatter._files import CorruptFile, verify_safetensors
from darkmatter._hub import cached_file, fetch, from_cache_only
from darkmatter._refusal import Refusal

# By sae-lens' name of the format: the files of one SAE below its folder, the weights last.
_FILES: dict[str | None, tuple[str, ...]] = {
    None: ("cfg.json", "sae_weights.safetensors"),
    "gemma_2": ("params.npz",),
    "llama_scope": ("hyperparams.json", "checkpoints/final.safetensors"),
}


@cache
def release(name: str) -> dict[str, Any]:
    """sae-lens' entry of a release: repo_id, model, saes (id, path, l0, ...), config_overrides.

    Raises Refusal for a release that sae-lens does not know.
    """
    import yaml

    found = re.search(rf"^{re.escape(name)}:\n((?:[ -].*\n?|\n)*)", _directory(), re.MULTILINE)
    if found is None:
        raise Refusal(
            f"sae-lens knows no release {name!r}; its list of releases is in its documentation "
            "(pretrained SAEs)."
        )
    # The C loader is ten times faster; PyYAML can be built without it.
    return yaml.load(found[1], Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def _directory() -> str:
    spec = find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "pretrained_saes.yaml").read_text(encoding="utf-8")


@cache
def _by_id(name: str) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in release(name)["saes"]}


def _row(name: str, sae_id: str) -> dict[str, Any]:
    rows = _by_id(name)
    if sae_id not in rows:
        raise Refusal(
            f"Release {name!r} has no SAE {sae_id!r}; it has {len(rows)}, such as "
            f"{', '.join(list(rows)[:3])}."
        )
    return rows[sae_id]


def files_of(name: str, sae_id: str) -> tuple[str, ...] | None:
    """Paths in the repository of what one SAE needs, or None for a format that is not known here.

    Raises Refusal for an unknown release or id.
    """
    entry, row = release(name), _row(name, sae_id)
    files = _FILES.get(entry.get("conversion_func"))
    return None if files is None else tuple(f"{row['path']}/{file}" for file in files)


def is_here(name: str, sae_id: str) -> bool:
    """Whether the weights of an SAE are in the local cache."""
    files = files_of(name, sae_id)
    return files is not None and cached_file(release(name)["repo_id"], files[-1]) is not None


def open_release(name: str, sae_id: str, device: str = "cpu") -> Any:
    """One SAE of a release as a sae_lens.SAE in float32, from the cache or the hub.

    It is as it was trained: see `darkmatter.suites.processing` for the activations it expects.
    Raises Refusal, naming the repository, when it cannot be had, within 5 seconds when there is no
    network, and CorruptFile when what arrived is not whole.
    """
    entry = release(name)
    repository, files = str(entry["repo_id"]), files_of(name, sae_id)
    if files is None:
        raise Refusal(
            f"The SAEs of {name!r} are stored in a format of their own "
            f"({entry['conversion_func']}); open one with sae_lens.SAE.from_pretrained({name!r}, "
            f"{sae_id!r}) and pass the object."
        )
    for file in files:
        path = fetch(repository, file)
        if path is None:
            raise Refusal(
                f"{repository!r} has no {file}, which SAE {sae_id!r} of {name!r} should have; "
                "check that sae-lens' list is that of the release (update sae-lens)."
            )
        if path.suffix == ".safetensors":
            verify_safetensors(path)

    from sae_lens import SAE

    try:
        with from_cache_only(), warnings.catch_warnings():
            # How the model has to be processed is for `darkmatter.suites.processing`.
            warnings.filterwarnings("ignore", message="\nThis SAE has non-empty")
            sae = SAE.from_pretrained(name, sae_id, device=device)
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise CorruptFile(
            f"SAE {sae_id!r} of {repository!r} cannot be read ({type(error).__name__}: {first}); "
            f"delete {fetch(repository, files[-1])} and run it again."
        ) from error
    return sae.eval().requires_grad_(False)

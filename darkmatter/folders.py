"""The folder of a survey: held by one run at a time, never overwritten unasked."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from darkmatter._files import sha256_of, understood, verify_sha256, writing
from darkmatter._refusal import Refusal
from darkmatter.passes import Work
from darkmatter.plans import pieces_of
from darkmatter.shards import (
    FORMAT,
    description_in,
    differences,
    hash_text,
    locked,
    otherwise_divided,
    read_json,
    write_json,
    write_tokens,
)

# Everything that a survey writes into its folder, and nothing else is ever removed from there.
_OWN = (
    "survey.json",
    "table.parquet",
    "table.csv",
    "per_token",
    "statistics",
    "maps",
    "tokens.safetensors",
    "pieces.json",
    "figures",
    "report.html",
    "shards",
    "state",
)


# Systems of files take names of 255 bytes, of which a temporary name needs some.
_LONGEST_NAME = 180
# What a run that goes on takes from the one that began, besides checkpoints.
_BESIDE = ("tokens.safetensors", "pieces.json")


def compare(folder: Path, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    if theirs.get("format") != FORMAT:
        raise Refusal(
            f"{folder} holds a survey of format {str(theirs.get('format'))[:40]!r}, expected "
            f"{FORMAT!r} to go on; begin it anew with force=True, or pass another folder."
        )
    told = differences(ours, theirs)
    if told:
        raise Refusal(
            f"{folder} was begun with other inputs, expected the same to go on; what differs: "
            f"{'; '.join(told)}; pass the same, or another folder."
        )


@contextmanager
def entered(
    folder: Path,
    description: Mapping[str, Any] | None,
    resume: bool,
    force: bool,
    processes: int = 1,
) -> Generator[bool, None, None]:
    """Hold a folder to write a survey into; whether there is a finished one to go on with."""
    if folder.exists() and not folder.is_dir():
        raise Refusal(f"{folder} is a file, expected a folder or a new name; pass another.")
    there = {path.name for path in folder.iterdir()} if folder.exists() else set[str]()
    if there - {"lock"} and not (resume or force):
        raise Refusal(
            f"{folder} is not empty, expected a new folder; pass resume=True to go on with the "
            "survey in it, force=True to replace it, or another folder."
        )
    if there - {"lock"} and not there & {"survey.json", "state", "shards"}:
        raise Refusal(f"{folder} holds no survey but other things; pass another folder.")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / "lock"):
        for path in folder.rglob(".*.tmp"):
            path.unlink(missing_ok=True)
        if force:
            # What tells that this is a survey goes last.
            (folder / "state").mkdir(exist_ok=True)
            for name in _OWN:
                path = folder / name
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        finished = (folder / "survey.json").exists()
        begun = folder / ("survey.json" if finished else "state/description.json")
        if description is not None and begun.exists():
            compare(folder, description, read_json(begun))
        others = otherwise_divided(folder / "state", processes)
        if others and not finished:
            raise Refusal(
                f"{folder} was begun by another number of processes than {processes} (there is "
                f"{min(others)}); start as many, or pass force=True."
            )
        if finished:
            # Killed between its last file and cleaning up.
            shutil.rmtree(folder / "state", ignore_errors=True)
        yield finished


def file_of(kind: str, name: str, suffix: str) -> str:
    """The file of an SAE or a hook, whose name may have any characters."""
    safe = quote(name, safe=" =+,@")
    if len(safe) > _LONGEST_NAME:
        safe = f"{safe[: _LONGEST_NAME - 33]}-{hash_text(name)[:32]}"
    return f"{kind}/{safe}.{suffix}"


def begin(base: Path, work: Work, description: dict[str, Any]) -> None:
    """What a resumed run and `merge` need to know, the description last."""
    base.mkdir(parents=True, exist_ok=True)
    if (base / "description.json").exists():
        read_description(base)
        return
    write_tokens(base / "tokens.safetensors", work.fit, work.test)
    pieces = pieces_of(work.model, work.test)
    write_json(base / "pieces.json", {str(token): piece for token, piece in pieces.items()})
    files = {name: sha256_of(base / name) for name in _BESIDE}
    write_json(base / "description.json", {**description, "files": files})


def read_description(base: Path) -> dict[str, Any]:
    """What `begin` was given; Refusal when the files beside it are not those that it wrote."""
    path = base / "description.json"
    description = description_in(path)
    with understood(path, "the description of a survey"):
        files = dict(description.pop("files", {}))
        for name in _BESIDE:
            if name in files:
                verify_sha256(base / name, files[name])
    return description

"""The plain files that a survey leaves while it runs: what it is of, its checkpoints, its shards.

    description.json                what is computed on what; `identity` is its SHA-256
    tokens.safetensors, pieces.json fit and test tokens; token id -> text
    fit-0003-of-0010.safetensors    pass 1 over one share: moments, and which latents were active
    fit.safetensors                 all shares of pass 1, merged
    test-0003-of-0010-00007.safetensors   part 7 of pass 2 over one share
    test-0003-of-0010.json          written when pass 2 is through with the share; names the parts

Every file carries the identity and the SHA-256 of its content, so that a file of another survey, a
damaged one, one that comes twice and one that is missing are found and named.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from darkmatter._files import CorruptFile, hash_tensors, replacing, understood, writing
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.leastsquares import LinearStatistics
from darkmatter.passes import FitState

FORMAT = "darkmatter-survey/1"
_WHOLE = "a whole file of a survey"


# Fingerprints of inputs.


def hash_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def fingerprint(thing: Any) -> str:
    """SHA-256 of all that decides what an SAE-like object computes: tensors, settings, kind."""
    tensors: dict[str, Tensor] = {}
    lines: list[str] = []
    _walk("", thing, tensors, lines, set())
    return hash_text("\n".join([*sorted(lines), hash_tensors(tensors)]))


def _walk(
    path: str, thing: Any, tensors: dict[str, Tensor], lines: list[str], seen: set[int]
) -> None:
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    if isinstance(thing, Tensor):
        tensors[path] = thing
    elif thing is None or isinstance(thing, bool | int | float | str | torch.dtype):
        lines.append(f"{path} {thing!r}")
    elif id(thing) in seen:
        return
    elif isinstance(thing, torch.nn.Module):
        seen.add(id(thing))
        tensors.update({f"{path}.{key}": t for key, t in thing.state_dict().items()})
        lines.append(f"{path} {kind}")
        _walk(f"{path}.cfg", getattr(thing, "cfg", None), tensors, lines, seen)
    elif isinstance(thing, Mapping | list | tuple):
        seen.add(id(thing))
        items: Iterable[tuple[Any, Any]] = (
            thing.items() if isinstance(thing, Mapping) else enumerate(thing)  # type: ignore[reportUnknownVariableType]
        )
        for key, value in items:
            _walk(f"{path}.{key}", value, tensors, lines, seen)
    elif callable(thing) and hasattr(thing, "__qualname__"):
        lines.append(f"{path} {thing.__module__}.{thing.__qualname__}")
    else:
        seen.add(id(thing))
        lines.append(f"{path} {kind}")
        for key, value in sorted(getattr(thing, "__dict__", {}).items()):
            # Where it is and where it came from do not change what it computes.
            if key not in ("device", "metadata"):
                _walk(f"{path}.{key}", value, tensors, lines, seen)


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What differs between two descriptions, in words: inputs by name, settings with values."""
    told: list[str] = []
    for key in sorted({*found["inputs"], *expected["inputs"]}):
        if found["inputs"].get(key) != expected["inputs"].get(key):
            told.append(f"the {key}" if key in found["inputs"] else f"the {key} (it has none)")
    for key in sorted({*found["settings"], *expected["settings"]}):
        ours, theirs = found["settings"].get(key), expected["settings"].get(key)
        if ours != theirs:
            told.append(f"{key} ({theirs}, not {ours})")
    return told


def identity_of(description: Mapping[str, Any]) -> str:
    """SHA-256 of the inputs and settings of a survey; versions and devices do not count."""
    counted = {key: description[key] for key in ("inputs", "settings")}
    return hash_text(json.dumps(counted, sort_keys=True))


# One run in a folder at a time.


@contextmanager
def locked(path: Path) -> Generator[None, None, None]:
    """Hold a lock file with this process' id and host; Refusal when another run holds it.

    The system gives the lock of a dead process of this host back. That of another host cannot be
    told from a live one.
    """
    host = socket.gethostname()
    while True:
        with writing(path.parent):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            held = False
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                held = True
            owner = os.read(file, 1000).decode(errors="replace").split()
            if held or (len(owner) == 2 and owner[1] != host):
                who = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
                raise Refusal(
                    f"{path.parent} is in use by {who}, expected one run in a folder at a time; "
                    f"wait for it, or, if it is gone, delete {path}."
                )
            try:
                same = os.stat(path).st_ino == os.fstat(file).st_ino
            except FileNotFoundError:
                same = False
            if not same:
                # Its last owner removed it between our open and our lock.
                continue
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()} {host}\n".encode(), 0)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(file)


# Files of tensors.


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    """Write tensors with metadata and the SHA-256 of the content, which is returned."""
    here = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    told = json.dumps(metadata, sort_keys=True)
    content = hash_text(hash_tensors(here) + told)
    # One entry, as the order of several in a safetensors file is left to chance.
    entry = json.dumps({"content": content, "told": told})
    with replacing(path) as temporary:
        save_file(here, temporary, metadata={"darkmatter": entry})
    return content


class TensorFile(Mapping[str, Tensor]):
    """A file that `write_tensors` wrote: `metadata`, and tensors read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with understood(path, _WHOLE):
            with safe_open(path, framework="pt") as file:
                entry = json.loads((file.metadata() or {})["darkmatter"])
                self._names = dict.fromkeys(file.keys())
            self._told: str = entry["told"]
            self.content: str = entry["content"]
            self.metadata: dict[str, Any] = dict(json.loads(self._told))

    def __getitem__(self, key: str) -> Tensor:
        with understood(self.path, _WHOLE), safe_open(self.path, framework="pt") as file:
            # A clone, because what safetensors returns may be a view of the file on disk.
            return file.get_tensor(key).clone()

    def __contains__(self, key: object) -> bool:
        return key in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def verify(self) -> None:
        """Raise CorruptFile unless the content is what was written."""
        if hash_text(hash_tensors(self) + self._told) != self.content:
            raise CorruptFile(
                f"{self.path} was altered after it was written (its content hash differs); delete "
                "it and run its shard again."
            )


def pack(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}/{key}": tensor for key, tensor in tensors.items()}


def read_statistics(file: TensorFile, prefix: str) -> LinearStatistics:
    keys = ("mean_x", "mean_y", "sxx", "sxy", "syy", "n")
    return LinearStatistics.from_tensors({key: file[f"{prefix}/{key}"] for key in keys})


def write_tokens(path: Path, fit: Tokens, test: Tokens) -> None:
    """Both parts; names stay in the description."""
    tensors = {
        f"{part}.{key}": getattr(tokens, key).to(torch.int32)
        for part, tokens in (("fit", fit), ("test", test))
        for key in ("tokens", "document")
    }
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": FORMAT})


def read_tokens(path: Path, names: Mapping[str, list[str]]) -> tuple[Tokens, Tokens]:
    """What `write_tokens` wrote."""
    with understood(path, "the tokens of a survey"), safe_open(path, framework="pt") as file:
        fit, test = (
            Tokens(
                file.get_tensor(f"{part}.tokens").long(),
                file.get_tensor(f"{part}.document").long(),
                tuple(names.get(part, names["fit"])),
            )
            for part in ("fit", "test")
        )
        return fit, test


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object of JSON in a file of a survey."""
    with understood(path, "an object of JSON"):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def description_in(path: Path) -> dict[str, Any]:
    """What a survey is of, description.json; CorruptFile when it lacks what is read of it."""
    found = read_json(path)
    with understood(path, "the description of a survey"):
        settings, documents = found["settings"], found["documents"]
        numbers = [settings[key] for key in ("skip", "seed", "resamples")]
        numbers += [one["d_sae"] for one in found["saes"].values()]
        words = [found["identity"], *found["saes"], *documents["fit"], *documents.get("test", [])]
        words += [one["hook"] for one in found["saes"].values()]
        if not all(type(number) is int and 0 <= number < 1 << 40 for number in numbers):
            raise ValueError(f"its numbers are {numbers}")
        # As UTF-8 can write them: some are names of files.
        "".join(words).encode()
        if not isinstance(settings["downstream"], bool) or not found["saes"]:
            raise ValueError("it has no SAE, or downstream is no truth value")
    return found


def read_pieces(path: Path) -> dict[int, str]:
    """Token id -> text, pieces.json."""
    found = read_json(path)
    with understood(path, "the texts of token ids"):
        return {int(token): str(piece) for token, piece in found.items()}


# Shards.


@dataclass(frozen=True)
class Share:
    """One of `of` shares of a survey, and the folder of its files."""

    folder: Path
    identity: str
    shard: int = 0
    of: int = 1

    @property
    def name(self) -> str:
        return f"{self.shard:04d}-of-{self.of:04d}"

    @property
    def fit_path(self) -> Path:
        return self.folder / f"fit-{self.name}.safetensors"

    @property
    def manifest_path(self) -> Path:
        return self.folder / f"test-{self.name}.json"

    @property
    def lock_path(self) -> Path:
        return self.folder / f"lock-{self.name}"

    def part_path(self, number: int) -> Path:
        return self.folder / f"test-{self.name}-{number:05d}.safetensors"

    def remove(self, stage: str) -> None:
        """Delete the share's files of a stage, and of a later one."""
        for path in self.folder.glob(f"test-{self.name}*"):
            path.unlink()
        if stage == "fit":
            self.fit_path.unlink(missing_ok=True)

    def _metadata(self, **more: Any) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "identity": self.identity,
            "shard": self.shard,
            "of": self.of,
            **more,
        }

    def _is_ours(self, file: TensorFile, **more: Any) -> bool:
        return {**file.metadata, **self._metadata(**more)} == file.metadata

    def save_fit(self, state: FitState) -> None:
        write_fit(self.fit_path, state, self._metadata(stage="fit"))

    def load_fit(self, device: torch.device) -> FitState | None:
        """The checkpoint of pass 1, if there is one."""
        if not self.fit_path.exists():
            return None
        file = TensorFile(self.fit_path)
        file.verify()
        if not self._is_ours(file, stage="fit"):
            raise Refusal(
                f"{self.fit_path} is a checkpoint of another survey (its inputs or settings "
                "differ); take it out, or begin anew with force=True."
            )
        return read_fit(file, device)

    def save_part(self, number: int, tensors: Mapping[str, Tensor], fit: str) -> str:
        metadata = self._metadata(stage="test", part=number, fit=fit)
        return write_tensors(self.part_path(number), tensors, metadata)

    def parts_done(self, fit: str) -> list[str]:
        """Content hashes of the parts of pass 2 that are there, from the first on."""
        done: list[str] = []
        while self.part_path(len(done)).exists():
            file = TensorFile(self.part_path(len(done)))
            if not self._is_ours(file, stage="test", part=len(done), fit=fit):
                break
            file.verify()
            done.append(file.content)
        return done

    def finish(self, parts: list[str], fit: str) -> Path:
        write_json(self.manifest_path, self._metadata(stage="test", fit=fit, parts=parts))
        return self.manifest_path


def write_fit(path: Path, state: FitState, metadata: dict[str, Any]) -> str:
    """Write a state of pass 1; returns its content hash."""
    tensors: dict[str, Tensor] = {}
    for (i, hook), statistics in state.statistics.items():
        tensors |= pack(statistics.tensors(), f"statistics/{i}/{hook}")
    tensors |= pack(dict(state.active), "active")
    more = {"position": state.position, "finished": state.finished}
    return write_tensors(path, tensors, {**metadata, **more})


def read_fit(file: TensorFile, device: torch.device) -> FitState:
    """What `write_fit` wrote, its moments where they can go on (main memory for mps)."""
    there = torch.device("cpu") if device.type == "mps" else device
    statistics: dict[tuple[int, str], LinearStatistics] = {}
    with understood(file.path, _WHOLE):
        prefixes = [k.removesuffix("/sxx") for k in file if k.endswith("/sxx")]
        prefixes.sort(key=lambda prefix: int(prefix.split("/")[1]))
        for prefix in prefixes:
            _, number, hook = prefix.split("/", 2)
            statistics[int(number), hook] = read_statistics(file, prefix)
        latents = [key for key in file if key.startswith("active/")]
        active = {key.removeprefix("active/"): file[key].bool() for key in latents}
        finished, (i, start) = bool(file.metadata["finished"]), file.metadata["position"]
        position = int(i), int(start)
    for moments in statistics.values():
        moments.to(there)
    return FitState(statistics, active, position, finished)


def otherwise_divided(folder: Path, of: int) -> set[str]:
    """Names of the shards of the fit pass that are of another number than `of`."""
    there = folder.glob("fit-*-of-*")
    return {path.name for path in there if not path.stem.endswith(f"-of-{of:04d}")}


def merged_fit(path: Path, identity: str) -> TensorFile:
    """The merged shards of the fit pass, verified; Refusal when they are of another survey."""
    file = TensorFile(path)
    file.verify()
    if file.metadata.get("identity") != identity:
        raise Refusal(f"{path} is of another survey; merge the shards of the fit pass again.")
    return file


def collect(
    paths: Iterable[Path], identity: str, stage: str, read: Callable[[Path], Mapping[str, Any]]
) -> list[tuple[Path, Mapping[str, Any]]]:
    """The shards of a stage in order, each once and all there; Refusal, naming the file, if not."""
    found: dict[int, tuple[Path, Mapping[str, Any]]] = {}
    count: int | None = None
    for path in sorted(paths):
        metadata = read(path)
        if metadata.get("format") != FORMAT or metadata.get("stage") != stage:
            raise Refusal(
                f"{path} is no shard of the {stage} pass, expected only such files; take it out."
            )
        if metadata.get("identity") != identity:
            raise Refusal(
                f"{path} is a shard of another survey (its inputs or settings differ); take it out."
            )
        with understood(path, "a shard of a survey"):
            shard, of = int(metadata["shard"]), int(metadata["of"])
            if not 0 <= shard < of:
                raise ValueError(f"shard {shard} of {of}")
        if count is not None and of != count:
            raise Refusal(
                f"{path} is shard {shard} of {of}, expected shards of {count}; take out what was "
                "added, or run all with the same number."
            )
        if shard in found:
            raise Refusal(
                f"{path} and {found[shard][0]} are both shard {shard} of {of}; take one out."
            )
        count, found[shard] = of, (path, metadata)
    if count is None:
        raise Refusal(f"There is no shard of the {stage} pass; run survey with shard=(i, n) first.")
    missing = count - len(found)
    if missing:
        # Not a list of all: a file may tell of any number.
        first = islice((i for i in range(count) if i not in found), 5)
        names = ", ".join(f"{stage}-{i:04d}-of-{count:04d}" for i in first)
        raise Refusal(
            f"{missing} of {count} shards of the {stage} pass are missing ({names}); run them "
            "with shard=(i, n) before merging."
        )
    return [found[i] for i in range(count)]


def merge_fits(
    paths: Iterable[Path], identity: str, target: Path, device: torch.device
) -> tuple[FitState, str]:
    """All shares of pass 1 as one, written to `target`; with its content hash."""
    files: dict[Path, TensorFile] = {}

    def read(path: Path) -> Mapping[str, Any]:
        files[path] = TensorFile(path)
        return files[path].metadata

    merged: FitState | None = None
    ordered = collect(paths, identity, "fit", read)
    for path, metadata in ordered:
        if not metadata.get("finished"):
            raise Refusal(
                f"{path} is a shard that was interrupted; run it again with resume=True first."
            )
    for path, _ in ordered:
        files[path].verify()
        state = read_fit(files[path], device)
        if merged is None:
            merged = state
        else:
            with understood(path, "a shard of the same survey"):
                merged.merge(state)
    assert merged is not None
    sources = [files[path].content for path, _ in ordered]
    metadata = {"format": FORMAT, "identity": identity, "stage": "merged", "sources": sources}
    return merged, write_fit(target, merged, metadata)


def collect_parts(paths: Iterable[Path], identity: str, fit: str) -> list[TensorFile]:
    """Every part of pass 2, verified, shard after shard."""
    parts: list[TensorFile] = []
    for path, manifest in collect(paths, identity, "test", read_json):
        if manifest.get("fit") != fit:
            raise Refusal(
                f"{path} was scored with maps of another merge of the fit pass; run this shard of "
                "the test pass again with force=True."
            )
        share = Share(path.parent, identity, int(manifest["shard"]), int(manifest["of"]))
        with understood(path, "the list of a shard's parts"):
            contents = [str(content) for content in manifest["parts"]]
        for number, content in enumerate(contents):
            part_path = share.part_path(number)
            if not part_path.exists():
                raise Refusal(
                    f"{part_path}, part {number} of shard {share.shard} of {share.of}, is missing; "
                    "bring it back or run this shard again with force=True."
                )
            file = TensorFile(part_path)
            file.verify()
            if file.content != content:
                raise Refusal(
                    f"{part_path} is not the part that shard {share.shard} of {share.of} wrote; "
                    "run this shard again with force=True."
                )
            parts.append(file)
    return parts

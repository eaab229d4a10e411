"""Weights on disk are checked before they are read: truncated or altered files are refused."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from darkmatter._refusal import Refusal


class CorruptFile(Refusal):
    """A file is not what it was when it was written: cut short, altered, or of another kind."""


def verify_sha256(path: str | Path, expected: str) -> None:
    """Raise CorruptFile, naming the file, unless its SHA-256 is `expected` (hex, any case)."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"There is no file {path}; give the path of the file to verify.")
    found = sha256_of(path)
    if found != expected.lower():
        raise CorruptFile(
            f"{path} has SHA-256 {found}, expected {expected.lower()}; restore the file (check it "
            "out or download it again)."
        )


def verify_safetensors(path: str | Path) -> None:
    """Raise CorruptFile, naming the file, unless its header is whole and fits its length.

    Reads the header only, so it costs milliseconds for a file of any size.
    """
    try:
        # As numpy, which spares whoever only looks for a model the import of torch.
        with safe_open(str(path), framework="numpy") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise CorruptFile(
            f"{path} is not a whole safetensors file ({error}); restore the file (check it out or "
            "download it again)."
        ) from error


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A name to write to, which becomes `path` at once when the block ends, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

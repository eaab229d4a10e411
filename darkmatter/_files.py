"""Weights on disk are checked before they are read: truncated or altered files are refused."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
import zipfile
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from darkmatter._refusal import Refusal

if TYPE_CHECKING:
    from torch import Tensor


class CorruptFile(Refusal):
    """A file is not what it was when it was written: cut short, altered, or of another kind."""


class Unwritable(Refusal, OSError):
    """A file cannot be written: the disk is full, or its folder is read-only."""


_NO_WRITING = frozenset(
    (errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EPERM, errno.EROFS)
)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Generator[None, None, None]:
    """Inside, a disk that is full and a folder that is read-only become Unwritable."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has one error for everything, and tells this one as "I/O error".
        of_disk = getattr(error, "errno", None) in _NO_WRITING or "I/O error" in str(error)
        if isinstance(error, Refusal) or not of_disk:
            raise
        raise Unwritable(
            f"{os.fspath(path)} cannot be written ({error}), and nothing of it was kept; make "
            "room, or choose a folder that you may write to, and run it again (a survey goes on "
            "with resume=True)."
        ) from error


# Whatever reading a file meets that holds something else than what it should.
_MISREADING = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SafetensorError,
    SyntaxError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)


class understood:
    """Inside, what goes wrong in reading a file becomes CorruptFile; a Refusal stays one.

    `what` the file should be, as in "a whole .npz file".
    """

    # Not a generator's context, of which a type checker has to assume that it swallows errors.
    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self._path, self._what = path, what

    def __enter__(self) -> None: ...

    def __exit__(self, _: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _MISREADING) and not isinstance(error, Refusal):
            told = " ".join(str(error).split())[:300] or type(error).__name__
            raise CorruptFile(
                f"{os.fspath(self._path)} is not {self._what} ({told}); restore the file (check it "
                "out or download it again), or write it again."
            ) from error


def verify_sha256(path: str | Path, expected: str) -> None:
    """Raise CorruptFile, naming the file, unless its SHA-256 is `expected` (hex, any case)."""
    path = Path(path)
    if not path.is_file():
        raise Refusal(f"There is no file {path}; give the path of the file to verify.")
    found = sha256_of(path)
    if found != expected.lower():
        raise CorruptFile(
            f"{path} has SHA-256 {found}, expected {expected.lower()[:64]}; restore the file "
            "(check it out or download it again)."
        )


def verify_safetensors(path: str | Path) -> None:
    """Raise CorruptFile, naming the file, unless its header is whole and fits its length.

    Reads the header only, so it costs milliseconds for a file of any size.
    """
    # As numpy, which spares whoever only looks for a model the import of torch.
    whole = understood(path, "a whole safetensors file")
    with whole, safe_open(str(path), framework="numpy") as file:
        file.keys()


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Generator[Path, None, None]:
    """A name to write to, which becomes `path` at once when the block ends, or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with writing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, hex."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of names, dtypes, shapes and numbers, whatever the device and the order."""
    # Not above, where whoever only looks for a file would wait for it.
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.is_meta:
            # A model that runs elsewhere has no numbers here.
            continue
        flat = tensor.cpu().contiguous().reshape(-1)
        for part in flat.split(1 << 24):
            digest.update(part.view(torch.uint8).numpy().data)
    return digest.hexdigest()

"""Files of the Hugging Face hub: from the local cache, or downloaded with care.

The hub is asked once for every file before anything is handed to its downloader, which retries for
half a minute before it gives up and then does not name the repository. So whatever is wrong (no
network, a licence that was not accepted, a wrong name, a hub that is out of order, a full disk) is
one sentence within 5 seconds, and what arrives is compared with the length and the SHA-256 that
the hub announced.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from darkmatter._files import CorruptFile, understood, verify_safetensors, verify_sha256
from darkmatter._refusal import Refusal

_PROBE_SECONDS = 3.0
# GPT-2's short names, which the hub redirects: one name means one cached copy.
_ALIASES = {
    "gpt2": "openai-community/gpt2",
    "gpt2-small": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
}
_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FILE = re.compile(r"[\w.-]{1,200}(?<!^\.)(?<!^\.\.)")
_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
_OPTIONAL = (
    *_TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "generation_config.json",
)


def locate(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder that holds a model's config, safetensors weights and tokenizer.

    A folder is taken as it is; a hub name (`openai-community/gpt2`), at a `revision` (a commit,
    tag or branch; None is main), is looked for in the local cache and only then downloaded. Raises
    Refusal, within 5 seconds, when there is no such folder, when files are missing, or when a name
    is not cached and the hub (HF_ENDPOINT) does not answer or does not give it; CorruptFile when
    weights are cut short.
    """
    folder = Path(name_or_path).expanduser()
    name = os.fspath(name_or_path)
    if folder.is_dir():
        lacking = missing_files(folder)
        if lacking:
            raise Refusal(
                f"The folder {folder} lacks {lacking}; a model is a Hugging Face folder with "
                f"{_CONFIG}, {_WEIGHTS} (save_pretrained writes them) and a tokenizer."
            )
        return folder
    if not _NAME.fullmatch(name) or isinstance(name_or_path, os.PathLike):
        raise Refusal(
            f"There is no folder {folder}; pass the folder of a saved model or a hub name such as "
            "'openai-community/gpt2'."
        )
    return _from_hub(_ALIASES.get(name, name), revision)


def locate_without_weights(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> tuple[str, Path]:
    """Repository of a hub name, and the folder of its config and tokenizer, for a model that runs
    elsewhere. Raises Refusal for a folder, and as `fetch`."""
    name = os.fspath(name_or_path)
    if Path(name).expanduser().is_dir() or not _NAME.fullmatch(name):
        raise Refusal(
            f"{name!r} is no hub name, expected one such as 'openai-community/gpt2' for a model "
            "that runs elsewhere; pass its name, or open it here."
        )
    repository = _ALIASES.get(name, name)
    folder = _fetch_config(repository, revision)
    if not any((folder / file).is_file() for file in _TOKENIZERS):
        for file in _OPTIONAL:
            fetch(repository, file, revision)
    return repository, folder


def is_cached(repository: str) -> bool:
    """Whether anything of a repository is in the local Hugging Face cache."""
    return (_in_cache(repository) / "snapshots").is_dir()


def cached_file(repository: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a repository in the local cache, or None."""
    from huggingface_hub import constants, try_to_load_from_cache

    found = try_to_load_from_cache(
        repository, name, cache_dir=constants.HF_HUB_CACHE, revision=revision
    )
    return Path(found) if isinstance(found, str) else None


def cached_revision(repository: str, revision: str | None = None) -> str | None:
    """The commit that a cached repository's branch or tag (None: main) stands for, if known."""
    reference = _in_cache(repository) / "refs" / (revision or "main")
    if reference.is_file():
        return reference.read_text().strip()
    known = revision and (_in_cache(repository) / "snapshots" / revision).is_dir()
    return revision if known else None


def _in_cache(repository: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"


def no_hub() -> str:
    """Why nothing can be downloaded, or nothing."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or _ask(constants.ENDPOINT, {}) is None:
        return _silence()
    return ""


def _silence() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT} does not answer"


@contextmanager
def from_cache_only() -> Generator[None, None, None]:
    """Inside, the hub's client looks nowhere but in its cache.

    For libraries that ask the hub about files which are here: each question costs half a minute
    when the network is gone.
    """
    from huggingface_hub import constants

    was = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = was


def fetch(repository: str, name: str, revision: str | None = None) -> Path | None:
    """A file of a repository, from the cache or the hub; None when the repository has no such file.

    Raises Refusal, naming the repository, when the hub does not answer or does not give the file,
    when the download breaks off (the next call goes on or begins anew, and never takes half a file
    for a whole one) or the disk is full, and CorruptFile when what arrived has another length or
    SHA-256 than the hub announced.
    """
    cached = cached_file(repository, name, revision)
    if cached is not None:
        return cached
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    answer = None
    if not constants.HF_HUB_OFFLINE:
        answer = _ask(hf_hub_url(repository, name, revision=revision), build_hf_headers())
    if answer is None:
        raise Refusal(
            f"{name} of {repository!r} is not in the local cache, and {_silence()}; run once with "
            "the network on, or use the embedded suite (load_suite('pydocs'))."
        )
    if answer.no_such_file:
        return None
    if said := answer.refusal(repository):
        raise Refusal(said)
    _check_space(repository, name, answer.size)
    path = _download(repository, name, revision)
    if path is not None and answer.sha256 is not None:
        try:
            verify_sha256(path, answer.sha256)
        except CorruptFile as error:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise CorruptFile(
                f"{name} of {repository!r} arrived with another SHA-256 than the hub announced; "
                "it was deleted, run it again."
            ) from error
    return path


@dataclass(frozen=True)
class _Answer:
    """What the hub said about a file before it is downloaded."""

    status: int
    headers: Any
    """A mapping of names in any case, of urllib or of the hub's client."""

    @property
    def code(self) -> str:
        return self.headers.get("X-Error-Code") or ""

    @property
    def no_such_file(self) -> bool:
        return self.status == 404 and self.code == "EntryNotFound"

    @property
    def size(self) -> int:
        """Bytes, 0 when they were not announced."""
        text = self.headers.get("X-Linked-Size") or self.headers.get("Content-Length") or "0"
        return int(text) if text.isdigit() else 0

    @property
    def sha256(self) -> str | None:
        """Of files in large storage, whose ETag it is."""
        tag = (self.headers.get("X-Linked-Etag") or self.headers.get("ETag") or "").strip('W/"')
        return tag if re.fullmatch(r"[0-9a-f]{64}", tag) else None

    def refusal(self, repository: str) -> str:
        """Why the hub does not give the file and what to do, or nothing."""
        from huggingface_hub import constants

        page = f"{constants.ENDPOINT}/{repository}"
        match self.status:
            case 401 | 403 if self.code == "GatedRepo" or self.status == 403:
                return (
                    f"The hub does not let you read {repository!r} ({self.status}), whose licence "
                    f"has to be accepted; accept it at {page} and log in (hf auth login, or "
                    "HF_TOKEN)."
                )
            case 404 if self.code == "RevisionNotFound":
                return f"The hub's {repository!r} has no such revision; see {page}/commits."
            case 401 | 404:
                return (
                    f"The hub has no model {repository!r} that you may read; check the name, or "
                    "accept its licence and log in (hf auth login) if it is gated."
                )
            case 429:
                wait = self.headers.get("Retry-After") or "a few hundred"
                return (
                    f"The hub has had too many requests from here to give {repository!r} (429); "
                    f"wait {wait} seconds, or log in (hf auth login) for a higher limit."
                )
            case status if status >= 400:
                return (
                    f"The hub answers {status} for {repository!r}; try again later, or use the "
                    "embedded suite (load_suite('pydocs'))."
                )
            case _:
                return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The first answer is the one that counts; a login must not travel to another host."""

    def redirect_request(self, *_: Any, **__: Any) -> None:
        return None


def _ask(address: str, headers: Mapping[str, str]) -> _Answer | None:
    """What this address answers to HEAD within a few seconds, or None."""
    answered: list[_Answer] = []
    opener = urllib.request.build_opener(_NoRedirect)

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD", headers=dict(headers))
            with opener.open(request, timeout=_PROBE_SECONDS) as response:
                answered.append(_Answer(response.status, response.headers))
        except urllib.error.HTTPError as error:
            answered.append(_Answer(error.code, error.headers))
        except (OSError, ValueError):
            pass

    # A thread, because the time limit of urlopen does not cover looking up the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1)
    return answered[0] if answered else None


def _check_space(repository: str, name: str, size: int) -> None:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache).free
    if size > free:
        raise Refusal(
            f"{name} of {repository!r} takes {size / 2**30:.1f} GiB and {cache} has "
            f"{free / 2**30:.1f} GiB free; make room, or set HF_HOME to a folder on another disk."
        )


def _broken_off(repository: str, name: str) -> Refusal:
    return Refusal(
        f"The download of {name} of {repository!r} broke off; run it again, what is whole is kept."
    )


def _download(repository: str, name: str, revision: str | None) -> Path | None:
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
    )

    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise _broken_off(repository, name) from error
    except EntryNotFoundError:
        return None
    except HfHubHTTPError as error:
        answer = _Answer(error.response.status_code, error.response.headers)
        raise Refusal(answer.refusal(repository) or str(error)) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Refusal(
                f"The disk of {constants.HF_HUB_CACHE} is full, so {name} of {repository!r} cannot "
                "be downloaded; make room, or set HF_HOME to a folder on another disk."
            ) from error
        if "Consistency check failed" in str(error):
            raise CorruptFile(
                f"{name} of {repository!r} arrived with another length than the hub announced; "
                "nothing of it was kept, run it again."
            ) from error
        raise Refusal(
            f"{name} of {repository!r} cannot be written to {constants.HF_HUB_CACHE} "
            f"({error.strerror or error}); check its permissions, or set HF_HOME."
        ) from error
    except Exception as error:
        # Of whichever HTTP or storage client is installed.
        raise _broken_off(repository, name) from error


def missing_files(folder: Path) -> str:
    """What a model's folder lacks, in words, or nothing; refuses weights that are cut short."""
    if not (folder / _CONFIG).is_file():
        return _CONFIG
    weights = weight_files(folder)
    if weights is None:
        return f"weights in safetensors ({_WEIGHTS} or {_INDEX}; other formats are never read)"
    for file in weights:
        if not file.is_file():
            return file.name
        verify_safetensors(file)
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        return f"a tokenizer (one of {', '.join(_TOKENIZERS)})"
    return ""


def weight_files(folder: Path) -> list[Path] | None:
    """The safetensors files of a model, whether they are there or not; None without a list."""
    if (folder / _WEIGHTS).is_file():
        return [folder / _WEIGHTS]
    index = folder / _INDEX
    if not index.is_file():
        return None
    with understood(index, "an index of weights"):
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        # A path would lead out of the folder.
        if outside := [name for name in names if not _FILE.fullmatch(name)]:
            raise ValueError(f"{outside[0]!r} is no name of a file beside it")
    return [folder / name for name in names]


def _fetch_config(repository: str, revision: str | None) -> Path:
    """The folder of a model's config."""
    config = fetch(repository, _CONFIG, revision)
    if config is None:
        raise Refusal(f"The hub's {repository!r} has no {_CONFIG}; give the name of a model.")
    return config.parent


def _from_hub(repository: str, revision: str | None) -> Path:
    cached = cached_file(repository, _CONFIG, revision)
    if cached is not None and not missing_files(cached.parent):
        return cached.parent
    if reason := no_hub():
        raise Refusal(
            f"The model {repository!r} is neither a folder here nor whole in the local cache, and "
            f"{reason}; open it once with the network on, pass the path of its folder, or use the "
            "embedded suite (load_suite('pydocs'))."
        )
    folder = _fetch_config(repository, revision)
    # Before gigabytes of weights, so that a repository without a tokenizer is refused at once.
    for name in _OPTIONAL:
        fetch(repository, name, revision)
    if fetch(repository, _WEIGHTS, revision) is None and fetch(repository, _INDEX, revision):
        for shard in weight_files(folder) or []:
            fetch(repository, shard.name, revision)
    if lacking := missing_files(folder):
        raise Refusal(
            f"The hub's {repository!r} lacks {lacking}; save it in that format and pass its folder."
        )
    return folder

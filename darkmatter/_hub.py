"""Where a language model's files are: a folder, the local Hugging Face cache, or the hub.

The hub is asked whether it is there before anything is handed to a downloader, since the
downloaders retry for half a minute before they give up and then do not name the repository.
"""

from __future__ import annotations

import json
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from darkmatter._files import CorruptFile, verify_safetensors
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


def locate(name_or_path: str | os.PathLike[str]) -> Path:
    """The folder that holds a model's config, safetensors weights and tokenizer.

    A folder is taken as it is; a hub name (`openai-community/gpt2`) is looked for in the local
    cache and only then downloaded. Raises Refusal, within 5 seconds, when there is no such folder,
    when files are missing, or when a name is not cached and the hub (HF_ENDPOINT) does not answer;
    CorruptFile when weights are cut short.
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
    is_name = re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None
    if not is_name or isinstance(name_or_path, os.PathLike):
        raise Refusal(
            f"There is no folder {folder}; pass the folder of a saved model or a hub name such as "
            "'openai-community/gpt2'."
        )
    return _from_hub(_ALIASES.get(name, name))


def is_cached(repository: str) -> bool:
    """Whether anything of a repository is in the local Hugging Face cache."""
    from huggingface_hub import constants

    folder = f"models--{repository.replace('/', '--')}"
    return (Path(constants.HF_HUB_CACHE) / folder / "snapshots").is_dir()


def require_cached_or_hub(repository: str, what: str) -> None:
    """Raise Refusal, within 5 seconds, when a repository is not cached and the hub is not there."""
    if is_cached(repository):
        return
    reason = _no_hub()
    if reason:
        raise Refusal(
            f"The {what} of {repository!r} are not in the local cache, and {reason}; run once with "
            "the network on, or use the embedded suite (load_suite('pydocs'))."
        )


def _no_hub() -> str:
    """Why nothing can be downloaded, or nothing."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    if not _answers(constants.ENDPOINT):
        return f"{constants.ENDPOINT} does not answer"
    return ""


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
    try:
        shards: dict[str, str] = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError) as error:
        raise CorruptFile(f"{index} is not an index of weights; download it again.") from error
    return [folder / name for name in sorted(set(shards.values()))]


def _from_hub(repository: str) -> Path:
    from huggingface_hub import constants, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, _CONFIG, cache_dir=constants.HF_HUB_CACHE)
    if isinstance(cached, str) and not missing_files(Path(cached).parent):
        return Path(cached).parent
    reason = _no_hub()
    if not reason:
        return _download(repository)
    raise Refusal(
        f"The model {repository!r} is neither a folder here nor whole in the local cache, and "
        f"{reason}; open it once with the network on, pass the path of its folder, or use the "
        "embedded suite (load_suite('pydocs'))."
    )


def _answers(endpoint: str) -> bool:
    """Whether anything answers HTTP at this address within a few seconds, whatever it answers."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            with urllib.request.urlopen(request, timeout=_PROBE_SECONDS):
                answered.append(True)
        except urllib.error.HTTPError:
            answered.append(True)
        except (OSError, ValueError):
            answered.append(False)

    # A thread, because the time limit of urlopen does not cover looking up the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS + 1)
    return answered == [True]


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(repository, name))
        except LocalEntryNotFoundError as error:
            raise Refusal(
                f"The download of {name} of {repository!r} broke off; run it again, it goes on "
                "where it was."
            ) from error
        except EntryNotFoundError:
            return None
        except RepositoryNotFoundError as error:
            raise Refusal(
                f"The hub has no model {repository!r} that you may read; check the name, or accept "
                "its licence and log in (hf auth login) if it is gated."
            ) from error
        except (HfHubHTTPError, HFValidationError) as error:
            raise Refusal(
                f"The hub refused {name} of {repository!r} ({error}); check the name, or your "
                "login."
            ) from error

    config = fetch(_CONFIG)
    if config is None:
        raise Refusal(f"The hub's {repository!r} has no {_CONFIG}; give the name of a model.")
    folder = config.parent
    if fetch(_WEIGHTS) is None and fetch(_INDEX) is not None:
        for shard in weight_files(folder) or []:
            fetch(shard.name)
    for name in _OPTIONAL:
        fetch(name)
    lacking = missing_files(folder)
    if lacking:
        raise Refusal(
            f"The hub's {repository!r} lacks {lacking}; save it in that format and pass its folder."
        )
    return folder

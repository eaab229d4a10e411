"""Text to contexts of tokens: files, hub datasets and token files.

    read_documents(paths), read_dataset(name)  ->  (name, text), lazily
    tokenise(model, documents)                 ->  contexts of equal length, of one document each
    read_tokens(path), save_tokens(...)        ->  contexts that are tokenised already

A document is a plain file (or what stands between separators in it), a line of a .jsonl file or a
row of a parquet file or data set. A long document comes in several pieces, one after the other and
all under its name, so that no file is ever in memory whole.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from darkmatter._files import CorruptFile, replacing, understood, verify_safetensors
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.models import Model

Document = tuple[str, str]
"""(name, text). Consecutive pairs of one name are pieces of one document."""

_BLOCK = 1 << 20  # bytes of a plain file, or characters of a row, at a time
_PIECE = 1 << 16  # characters that are tokenised as one
_LONGEST_LINE = 1 << 28  # bytes of a line of JSON, which is in memory whole: packed, it is small
_AHEAD = 1 << 18  # characters that are read before they are tokenised together
_CONTEXT = 256


def read_documents(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    column: str = "text",
    separator: str | None = None,
    seed: int | None = None,
) -> Iterator[Document]:
    """Documents of files, in order, or of files in an order drawn with `seed`.

    By the end of a file's name, before any .gz:

        .jsonl, .ndjson   a document a line, in the field `column`, called FILE#LINE (from 1)
        .parquet          a document a row, in the column `column`, called FILE#ROW (from 1)
        anything else     plain text: one document called FILE; with `separator`, what stands
                          between two of them is a document, called FILE#NUMBER (from 1)

    A folder stands for all files below it, by name, hidden ones left out; the documents are called
    by their paths in it. Documents without text are passed over; a byte order mark is dropped.
    Raises Refusal at once for a path that does not exist, an empty folder or an empty separator;
    and while reading, naming file and place, for text that is not UTF-8 (byte offset) or binary, a
    line that is not JSON, or a field or column that is missing or no text; CorruptFile for gzip or
    parquet that is cut short or damaged.
    """
    given = [paths] if isinstance(paths, str | os.PathLike) else list(paths)
    if separator == "":
        raise Refusal("The separator of documents is empty, expected some text, such as '\\n\\n'.")
    files = [found for path in given for found in _files_of(Path(path).expanduser())]
    if not files:
        raise Refusal("No file was given, expected text to read; name files or folders.")
    if seed is not None:
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))
        files = [files[i] for i in order.tolist()]
    return _documents(files, column, separator)


def read_dataset(
    dataset: str | os.PathLike[str],
    column: str = "text",
    subset: str | None = None,
    split: str = "train",
    seed: int | None = None,
) -> Iterator[Document]:
    """Documents of a data set of the Hugging Face hub, streamed: only what is read is fetched.

    `dataset` is a hub name ("NeelNanda/pile-10k") or a folder of data files; documents are called
    NAME#ROW. With a `seed`, shards and a buffer of 1000 rows are shuffled. Raises Refusal, within 5
    seconds, when the hub does not answer, and for a data set, subset, split or column that is not
    there or a row that is no text.
    """
    name = os.fspath(dataset)
    if not Path(name).exists():
        from darkmatter._hub import no_hub

        if reason := no_hub():
            raise Refusal(
                f"The data set {name!r} is streamed from the hub, and {reason}; run with the "
                "network on, or pass files (--text)."
            )
    import datasets

    datasets.disable_progress_bars()
    with _streaming(name, subset, split):
        rows: Any = datasets.load_dataset(name, subset, split=split, streaming=True)
        if seed is not None:
            rows = rows.shuffle(seed=seed, buffer_size=1000)
    if rows.column_names is not None and column not in rows.column_names:
        raise Refusal(_no_column(f"The data set {name!r}", column, rows.column_names))

    def values() -> Iterator[Any]:
        with _streaming(name, subset, split):
            for row in rows:
                yield row.get(column)

    return _rows(name, values(), column)


@contextmanager
def _streaming(name: str, subset: str | None, split: str) -> Generator[None, None, None]:
    """Whatever goes wrong in `datasets`, which passes on errors of half a dozen libraries."""
    try:
        yield
    except Exception as error:
        first = str(error).strip().split("\n")[0]
        raise Refusal(
            f"The data set {name!r} (subset {subset!r}, split {split!r}) cannot be streamed "
            f"({type(error).__name__}: {first}); check its name on the hub, or log in (hf auth "
            "login) if it is gated."
        ) from error


@dataclass(frozen=True, eq=False)
class TokenisedText(Tokens):
    """Tokens and what was left out in making them; what was not read is not counted.

    short_documents had no whole context; dropped_tokens, without BOS, are those of short documents
    and of the ends of others.
    """

    short_documents: int = 0
    dropped_tokens: int = 0


def tokenise(
    model: Model,
    documents: Iterable[Document],
    context: int | None = None,
    tokens: int | None = None,
    bos: bool | None = None,
    per_document: int | None = None,
) -> TokenisedText:
    """Contexts of `context` tokens, each of one document, in the order that documents come.

    context: tokens in a context, BOS included (256, or the model's longest where that is less).
    tokens: at most so many tokens in all, BOS included; reading ends there (no limit).
    bos: whether each context begins with the tokenizer's BOS token, as the SAE was trained (if the
    tokenizer has one). per_document: at most so many contexts of one document (no limit).

    Documents are never joined: what is left of one after its last whole context is dropped, and
    counted. A special token that is written out in the text ("<|endoftext|>") becomes that token.
    Text is tokenised in pieces of up to 65,536 characters, cut between words where that gives the
    same tokens as tokenising all at once; one word of more characters is cut inside. So time is
    linear in the text and memory is that of the result.

    Raises Refusal for a context that the model cannot read, a limit below one context, a BOS that
    the tokenizer does not have, or text in which no document fills a context.
    """
    tokenizer = model.tokenizer
    context = min(_CONTEXT, model.n_context) if context is None else context
    if not 2 <= context <= model.n_context:
        raise Refusal(
            f"A context of {context} tokens was asked for, expected 2 to {model.n_context}, the "
            f"longest that {model.name} reads."
        )
    if tokens is not None and tokens < context:
        raise Refusal(
            f"At most {tokens} tokens were asked for, expected at least one context of {context}; "
            "ask for more tokens or shorter contexts."
        )
    if per_document is not None and per_document < 1:
        raise Refusal(f"per_document is {per_document}, expected 1 or more contexts of a document.")
    begin: int | None = tokenizer.bos_token_id
    if bos and begin is None:
        raise Refusal(
            f"The tokenizer of {model.name} has no BOS token to begin contexts with; pass bos=False"
            " (--no-bos)."
        )
    lead = torch.tensor([begin] if bos is not False and begin is not None else [])
    body = context - len(lead)
    most = None if tokens is None else tokens // context
    rows: list[Tensor] = []
    index: list[int] = []
    names: list[str] = []
    short, dropped = 0, 0
    for name, pieces in groupby(_encoded(tokenizer, documents), key=lambda pair: pair[0]):
        count, rest = 0, torch.empty(0, dtype=torch.int64)
        for _, ids in pieces:
            rest = torch.cat([rest, ids])
            whole = len(rest) // body
            room = [limit for limit in (most and most - len(index), per_document) if limit]
            taken = min([whole, *(limit - count for limit in room)])
            rows.append(rest[: taken * body].view(taken, body))
            rest = rest[taken * body :]
            count += taken
            if any(count == limit for limit in room):
                break
        else:
            dropped += len(rest)
            short += count == 0
        if count:
            index += [len(names)] * count
            names.append(name[1])
        if most is not None and len(index) == most:
            break
    if not index:
        raise Refusal(
            f"None of the {short} documents has the {body} tokens of a context, the text has "
            f"{dropped} tokens in all; pass longer documents or a shorter context."
        )
    text = torch.cat(rows)
    every = torch.cat([lead.to(text).expand(len(text), -1), text], 1)
    return TokenisedText(every, torch.tensor(index), tuple(names), short, dropped)


def read_tokens(path: str | os.PathLike[str], split: str | None = None) -> Tokens:
    """Contexts of a safetensors file with integer `tokens` [c, p] and `document` [c].

    The names of the documents are a JSON list in the file's metadata (`names`), as `save_tokens`
    writes it, or in documents.json beside the file; without either they are called "document N". A
    file of several splits ("fit/tokens", "fit/document", ...) as suites keep them gives those of
    `split`, or all. Raises Refusal for a file or split that is not there, tensors that are missing
    or not integers, or names that do not fit; CorruptFile for a file that is cut short.
    """
    from safetensors import safe_open

    file = Path(path).expanduser()
    if not file.is_file():
        raise Refusal(f"There is no file {file}; pass a safetensors file of tokens.")
    verify_safetensors(file)
    with safe_open(str(file), framework="pt") as stored:
        keys = list(stored.keys())
        known = sorted(key.removesuffix("tokens") for key in keys if f"/{key}".endswith("/tokens"))
        chosen = known if split is None else [f"{split}/"]
        wanted = [f"{part}{what}" for part in chosen or [""] for what in ("tokens", "document")]
        lacking = [key for key in wanted if key not in keys]
        if lacking:
            raise Refusal(
                f"{file} has no {lacking[0]!r}, expected tokens [contexts, positions] and document "
                f"[contexts]; it has {', '.join(keys) or 'nothing'}."
            )
        found = {key: stored.get_tensor(key) for key in wanted}
        listed: str | None = (stored.metadata() or {}).get("names")
    for key, tensor in found.items():
        other = tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool
        if other or tensor.numel() == 0 or tensor.ndim != (2 if key.endswith("tokens") else 1):
            raise Refusal(
                f"{key!r} in {file} is {tuple(tensor.shape)} of {tensor.dtype}, expected integers, "
                "and some: tokens [contexts, positions] and document [contexts]; save token ids "
                "(darkmatter.documents.save_tokens)."
            )
    if len({found[key].shape[1:] for key in wanted[::2]}) > 1:
        raise Refusal(f"The splits of {file} have contexts of different lengths; name a split.")
    tokens, document = (torch.cat([found[key].long() for key in wanted[i::2]]) for i in range(2))
    beside = file.with_name("documents.json")
    where = file if listed is not None else beside
    with understood(where, "a list of names, as it is not JSON of that kind"):
        if listed is None and beside.is_file():
            listed = beside.read_text(encoding="utf-8")
        if listed is not None:
            names: Any = json.loads(listed)
            if not isinstance(names, list):
                raise ValueError(f"it holds {type(names).__name__}")
            return Tokens(tokens, document, tuple(str(name) for name in names))  # type: ignore[reportUnknownVariableType]
    # Those that occur: a number may be larger than any list of names.
    known, document = document.unique(return_inverse=True)
    return Tokens(tokens, document, tuple(f"document {i}" for i in known.tolist()))


def save_tokens(tokens: Tokens, path: str | os.PathLike[str]) -> None:
    """Write tokens (int32) and names to a safetensors file that `read_tokens` reads."""
    from safetensors.torch import save_file

    tensors = {"tokens": tokens.tokens, "document": tokens.document}
    with replacing(Path(path)) as partial:
        save_file(
            {key: tensor.int().cpu().contiguous() for key, tensor in tensors.items()},
            partial,
            {"names": json.dumps(tokens.names)},
        )


# Files


def _files_of(path: Path) -> list[tuple[str, Path]]:
    """(name, file) of a file or of all files below a folder."""
    if path.is_file():
        return [(str(path), path)]
    if not path.is_dir():
        raise Refusal(f"There is no file or folder {path}; name the text to read.")
    below = ((file.relative_to(path), file) for file in sorted(path.rglob("*")) if file.is_file())
    found = [
        (name.as_posix(), file)
        for name, file in below
        if not any(part.startswith(".") for part in name.parts)
    ]
    if not found:
        raise Refusal(f"The folder {path} has no files, expected text; name another.")
    return found


def _documents(
    files: list[tuple[str, Path]], column: str, separator: str | None
) -> Iterator[Document]:
    for name, file in files:
        match file.name.lower().removesuffix(".gz").rpartition(".")[2]:
            case "jsonl" | "ndjson":
                yield from _rows(name, _json_lines(file, column), column)
            case "parquet":
                yield from _rows(name, _parquet(file, column), column)
            case _:
                yield from _separated(name, _plain(file), separator)


@contextmanager
def _opened(file: Path) -> Generator[io.BufferedReader | gzip.GzipFile, None, None]:
    """The bytes of a file, unpacked if it is .gz."""
    try:
        with file.open("rb") as stream:
            yield gzip.GzipFile(fileobj=stream) if file.suffix.lower() == ".gz" else stream
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorruptFile(
            f"{file} is not a whole gzip file ({error}); restore it (download it again)."
        ) from error
    except OSError as error:
        raise Refusal(f"{file} cannot be read ({error}); check its permissions.") from error


def _plain(file: Path) -> Iterator[str]:
    """The text of a file, a block at a time."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    offset = 0
    with _opened(file) as stream:
        while block := stream.read(_BLOCK):
            yield _decoded(file, decoder, block, offset)
            offset += len(block)
        yield _decoded(file, decoder, b"", offset, final=True)


def _decoded(
    file: Path, decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool = False
) -> str:
    if (zero := block.find(0)) >= 0:
        raise Refusal(
            f"{file} looks binary (a zero byte at offset {offset + zero}), expected text in UTF-8; "
            "leave it out or convert it."
        )
    # Bytes of a character that began in the block before.
    waiting = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise Refusal(
            f"{file} is not UTF-8 at byte {offset - waiting + error.start} ({error.reason}); "
            "convert it (iconv -t utf-8) or leave it out."
        ) from error


def _separated(name: str, blocks: Iterator[str], separator: str | None) -> Iterator[Document]:
    """One document, or one between each two separators, in pieces of about a block."""
    if separator is None:
        yield from ((name, block) for block in blocks if block)
        return
    number, held = 1, ""
    for block in blocks:
        *ended, held = (held + block).split(separator)
        for text in ended:
            if text:
                yield f"{name}#{number}", text
            number += 1
        # What may be the beginning of a separator stays.
        safe = len(held) - len(separator) + 1
        if safe >= _BLOCK:
            yield f"{name}#{number}", held[:safe]
            held = held[safe:]
    if held:
        yield f"{name}#{number}", held


def _json_lines(file: Path, column: str) -> Iterator[Any]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")
    offset = 0
    with _opened(file) as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), b""), 1):
            if len(line) == _LONGEST_LINE:
                raise Refusal(
                    f"Line {number} of {file} has {_LONGEST_LINE} bytes or more, expected a "
                    "document a line; cut it up, or name it a plain text file."
                )
            text = _decoded(file, decoder(), line, offset, final=True)
            offset += len(line)
            if not text.strip():
                yield None
                continue
            try:
                row: Any = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise Refusal(
                    f"Line {number} of {file} is not JSON ({error}), expected an object a line; "
                    "mend it or leave the file out."
                ) from error
            if not isinstance(row, dict) or column not in row:
                fields: list[str] = list(row) if isinstance(row, dict) else []
                raise Refusal(_no_column(f"Line {number} of {file}", column, fields))
            yield row[column]


def _parquet(file: Path, column: str) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            if column not in table.schema_arrow.names:
                raise Refusal(_no_column(str(file), column, table.schema_arrow.names))
            for batch in table.iter_batches(batch_size=256, columns=[column]):
                yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first = str(error).split("\n")[0]
        raise CorruptFile(
            f"{file} is not a whole parquet file ({first}); restore it (download it again)."
        ) from error


def _rows(name: str, values: Iterable[Any], column: str) -> Iterator[Document]:
    for number, text in enumerate(values, 1):
        if text is None or text == "":
            continue
        if not isinstance(text, str):
            raise Refusal(
                f"{column!r} of row {number} of {name} is {type(text).__name__}, expected text; "
                "name another column (--column)."
            )
        for start in range(0, len(text), _BLOCK):
            yield f"{name}#{number}", text[start : start + _BLOCK]


def _no_column(where: str, column: str, there: Sequence[str]) -> str:
    return (
        f"{where} has no {column!r}, but {', '.join(map(repr, there)) or 'no fields'}; name the "
        "one with the text (--column)."
    )


# Tokens


def _encoded(
    tokenizer: Any, documents: Iterable[Document]
) -> Iterator[tuple[tuple[int, str], Tensor]]:
    """((number, name), ids) of every piece of every document, some pieces ahead of the reader."""

    def encode(texts: list[str]) -> list[list[int]]:
        found = tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            # Texts longer than the model's context are what is expected here.
            verbose=False,
        )
        return found["input_ids"]

    seams = _seams(encode)
    waiting: list[tuple[tuple[int, str], str]] = []
    ahead = 0

    def flush() -> Iterator[tuple[tuple[int, str], Tensor]]:
        for (key, _), ids in zip(waiting, encode([text for _, text in waiting]), strict=True):
            yield key, torch.tensor(ids, dtype=torch.int64)

    for number, (name, pieces) in enumerate(groupby(documents, key=lambda document: document[0])):
        for text in _pieces((text for _, text in pieces), seams):
            waiting.append(((number, name), text))
            ahead += len(text)
            if ahead >= _AHEAD:
                yield from flush()
                waiting, ahead = [], 0
    if waiting:
        yield from flush()


def _seams(encode: Callable[[list[str]], list[list[int]]]) -> re.Pattern[str] | None:
    """Where a text can be cut so that its parts have the tokens of the whole.

    Before a space between words for tokenizers that join it to the next word; for those that put
    one before every text themselves, at the space, which is dropped; and after a newline. None
    where nothing of this holds.
    """
    whole, one, spaced, two, line, lines = encode(
        ["one. two", "one.", " two", "two", "one.\n", "one.\ntwo"]
    )
    seams: list[str] = []
    if whole == one + spaced:
        seams.append(r"(?<=\S)(?= \S)")
    elif whole == one + two:
        seams.append(r"(?<=\S) (?=\S)")
    if lines == line + two:
        seams.append(r"(?<=\S\n)(?=\S)")
    return re.compile("|".join(seams)) if seams else None


def _pieces(texts: Iterable[str], seams: re.Pattern[str] | None) -> Iterator[str]:
    """The same text in pieces of at most `_PIECE` characters, cut at the last seam of each."""
    held = ""
    for text in texts:
        held += text
        start = 0
        # One more than a piece, since a seam looks at the character that follows.
        while len(held) - start > _PIECE:
            stop = after = start + _PIECE
            # The last seam is nearly always close to the end.
            for window in (_PIECE // 64, _PIECE - 1) if seams else ():
                found = list(seams.finditer(held, stop - window, stop + 1)) if seams else []
                if found:
                    stop, after = found[-1].span()
                    break
            yield held[start:stop]
            start = after
        held = held[start:]
    if held:
        yield held

"""Text and its tokens, against files written by hand and the tokenizer called once."""

from __future__ import annotations

import gzip
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter import documents
from darkmatter._files import CorruptFile
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.documents import (
    read_dataset,
    read_documents,
    read_tokens,
    save_tokens,
    tokenise,
)
from darkmatter.models import Model
from tests.conftest import N_CONTEXT

CAT = "the cat sat on the mat, and the dog on the log"


def joined(pairs: Iterator[tuple[str, str]]) -> dict[str, str]:
    """Whole documents by name."""
    found: dict[str, str] = {}
    for name, text in pairs:
        found[name] = found.get(name, "") + text
    return found


def ids_of(model: Model, text: str) -> list[int]:
    return model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


# Files


def test_files_of_every_kind(tmp_path: Path) -> None:
    lines = [{"text": "första", "n": 1}, {"text": ""}, {"text": None}, {"text": "4th"}]
    jsonl = "\n".join(json.dumps(line) for line in lines) + "\n\n"
    (tmp_path / "b.jsonl").write_text(jsonl)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(jsonl.encode()))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfbyte order mark")
    (tmp_path / "d.md.gz").write_bytes(gzip.compress("naïve".encode()))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "empty.gz").touch()
    table = pyarrow.table({"text": ["one", None, "three"], "other": ["x", "y", "z"]})
    pyarrow.parquet.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "g").write_text("below")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "h").write_bytes(b"\x00")
    assert joined(read_documents(tmp_path)) == {
        "a.txt": "byte order mark",
        "b.jsonl#1": "första",
        "b.jsonl#4": "4th",
        "c.jsonl.gz#1": "första",
        "c.jsonl.gz#4": "4th",
        "d.md.gz": "naïve",
        "e.parquet#1": "one",
        "e.parquet#3": "three",
        "f/g": "below",
    }
    only = str(tmp_path / "e.parquet")
    assert joined(read_documents(only, column="other"))[f"{only}#2"] == "y"


def test_files_are_read_in_a_drawn_order(tmp_path: Path) -> None:
    names = [f"{i:02}" for i in range(20)]
    for name in names:
        (tmp_path / name).write_text(name)
    orders = [[name for name, _ in read_documents(tmp_path, seed=s)] for s in (None, 0, 0, 1)]
    assert orders[0] == names
    assert orders[1] == orders[2]
    assert orders[1] != orders[3]
    assert sorted(orders[1]) == sorted(orders[3]) == names


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("separator", [None, "\n\n", "<|end|>", "x"])
def test_blocks_do_not_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, separator: str | None
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    text = "één\n\ntwee 三\n\n\n\nxfour<|end|>five<|end<|end|>x"
    (tmp_path / "a").write_text(text)
    parts = [text] if separator is None else text.split(separator)
    expected = {"a" if separator is None else f"a#{i}": part for i, part in enumerate(parts, 1)}
    expected = {name: part for name, part in expected.items() if part}
    assert joined(read_documents(tmp_path, separator=separator)) == expected
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.jsonl").write_text(json.dumps({"text": text}))
    assert joined(read_documents(rows)) == {"a.jsonl#1": text}


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("fine")
    (tmp_path / "b").write_bytes(b"\x00")
    reading = read_documents(tmp_path)
    assert next(reading) == ("a", "fine")
    with pytest.raises(Refusal, match="looks binary"):
        next(reading)


def test_paths_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"no file or folder .*nowhere"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(Refusal, match="has no files"):
        read_documents(tmp_path)
    with pytest.raises(Refusal, match="No file was given"):
        read_documents([])
    with pytest.raises(Refusal, match="separator of documents is empty"):
        read_documents(tmp_path, separator="")


def parquet(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok \xff\xfe", r"a\.txt is not UTF-8 at byte 3"),
        ("a.txt", b"ends in half a \xe4\xb8", r"not UTF-8 at byte 15"),
        ("a.txt", b"ab\x00c", r"looks binary \(a zero byte at offset 2\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}', r"a\.jsonl is not UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\nnonsense', r"Line 2 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b"[" * 100_000, r"Line 1 of .*a\.jsonl is not JSON"),
        ("a.jsonl", b'{"body": "a"}', r"Line 1 of .* has no 'text', but 'body'"),
        ("a.jsonl", b"[1, 2]", r"Line 1 of .* has no 'text', but no fields"),
        ("a.jsonl", b'{"text": 5}', r"'text' of row 1 of .* is int, expected text"),
        ("a.gz", gzip.compress(b"text " * 1000)[:-20], "is not a whole gzip file"),
        ("a.gz", b"never packed", "is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n')[:-9], "is not a whole gzip file"),
        ("a.parquet", b"no parquet", "is not a whole parquet file"),
        ("a.parquet", parquet(text=["a"] * 9)[:-30], "is not a whole parquet file"),
        ("a.parquet", parquet(body=["a"]), r"has no 'text', but 'body'"),
        ("a.parquet", parquet(text=[[1]]), r"'text' of row 1 of .* is list, expected text"),
    ],
)
def test_what_is_no_text_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Refusal, match=message) as refused:
        list(read_documents(tmp_path))
    assert isinstance(refused.value, CorruptFile) == ("whole" in message)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_byte_of_a_character_cut_by_a_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(documents, "_BLOCK", block)
    (tmp_path / "a").write_bytes("é三".encode() + b"\xe4\xb8z")
    with pytest.raises(Refusal, match="not UTF-8 at byte 5"):
        list(read_documents(tmp_path))


# Data sets


def test_a_data_set_is_streamed(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "n": i} for i in range(30)]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = list(read_dataset(tmp_path))
    assert found[:2] == [(f"{tmp_path}#1", "row 0"), (f"{tmp_path}#2", "row 1")]
    drawn = [text for _, text in read_dataset(tmp_path, seed=3)]
    assert drawn == [text for _, text in read_dataset(tmp_path, seed=3)]
    assert sorted(drawn) == sorted(text for _, text in found)
    assert drawn != [text for _, text in found]
    with pytest.raises(Refusal, match="has no 'body', but 'text', 'n'"):
        list(read_dataset(tmp_path, column="body"))
    with pytest.raises(Refusal, match=r"'n' of row 1 of .* is int, expected text"):
        list(read_dataset(tmp_path, column="n"))
    with pytest.raises(Refusal, match=r"split 'test'\) cannot be streamed"):
        read_dataset(tmp_path, split="test")


def test_a_data_set_without_network_is_refused_at_once() -> None:
    start = time.monotonic()
    with pytest.raises(Refusal, match="'nobody/nothing' is streamed from the hub, and HF_HUB_OFF"):
        read_dataset("nobody/nothing")
    # The promise is 5 s; importing `datasets` is not part of it and happens after.
    assert time.monotonic() - start < 5


# Tokens


def test_contexts_by_hand(tiny_model: Model) -> None:
    texts = {"a": CAT * 3, "short": "the", "b": f"{CAT}. " * 2}
    ids = {name: ids_of(tiny_model, text) for name, text in texts.items()}
    found = tokenise(tiny_model, texts.items(), context=10)
    rows = [
        [0, *ids[name][i : i + 9]] for name in ("a", "b") for i in range(0, len(ids[name]) - 8, 9)
    ]
    assert found.tokens.tolist() == rows
    assert found.names == ("a", "b")
    assert found.document.tolist() == [0] * (len(ids["a"]) // 9) + [1] * (len(ids["b"]) // 9)
    assert found.short_documents == 1
    assert found.dropped_tokens == sum(map(len, ids.values())) - 9 * len(rows)
    bare = tokenise(tiny_model, texts.items(), context=10, bos=False)
    assert bare.tokens[0].tolist() == ids["a"][:10]
    assert isinstance(found, Tokens)
    assert tokenise(tiny_model, texts.items()).tokens.shape[1] == N_CONTEXT
    # Special tokens that are written out become what they name.
    written = tokenise(tiny_model, [("a", f"the<|endoftext|>{CAT}")], context=8, bos=False)
    assert written.tokens[0, 1] == 0 or 0 in written.tokens[0].tolist()


def test_pieces_of_a_document_are_one(tiny_model: Model) -> None:
    pieces = [("a", CAT[:11]), ("a", CAT[11:] + CAT), ("b", CAT * 2)]
    whole = [("a", CAT * 2), ("b", CAT * 2)]
    ours, theirs = (tokenise(tiny_model, pairs, context=6) for pairs in (pieces, whole))
    assert torch.equal(ours.tokens, theirs.tokens)
    assert ours.names == theirs.names == ("a", "b")


def test_limits_end_the_reading(tiny_model: Model) -> None:
    read: list[int] = []

    def endless() -> Iterator[tuple[str, str]]:
        for number in range(10**9):
            read.append(number)
            yield f"document {number}", CAT * 500

    found = tokenise(tiny_model, endless(), context=16, tokens=16 * 7 + 15, per_document=3)
    assert found.document.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert found.n_tokens == 16 * 7
    assert len(read) * len(CAT) * 500 < 3 * documents._AHEAD
    whole = tokenise(tiny_model, endless(), context=16, tokens=16 * 7)
    assert whole.document.tolist() == [0] * 7


def encode(model: Model) -> Any:
    return lambda texts: model.tokenizer(texts, add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(alphabet="ab .,\n\t0é三'", min_size=1, max_size=300),
    size=st.sampled_from([16, 64]),
)
def test_cutting_does_not_change_the_tokens(tiny_model: Model, text: str, size: int) -> None:
    # A seam every few characters, so that no word is cut inside.
    text = "the cat.\nsat ".join([text[i : i + 5] for i in range(0, len(text), 5)])
    text = "\n".join(line if len(line) < 9 else line[:8] for line in text.split("\n"))
    seams = documents._seams(encode(tiny_model))
    assert seams is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_PIECE", size)
        pieces = list(documents._pieces([text], seams))
    assert "".join(pieces) == text
    assert all(len(piece) <= size for piece in pieces)
    at = [sum(map(len, pieces[:i])) for i in range(1, len(pieces))]
    if all(seams.match(text, i) for i in at):
        assert [i for ids in encode(tiny_model)(pieces) for i in ids] == ids_of(tiny_model, text)


# Llama 3's, https://huggingface.co/meta-llama/Meta-Llama-3-8B (tokenizer.json).
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def like(kind: str) -> Any:
    """A small tokenizer that cuts text up as that of a family of models does."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=False))
    marked = normalizers.Replace(" ", "▁")
    match kind:
        case "gpt2":
            tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        case "llama3":
            cut = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
            level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
            tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, level])
        case "gemma":
            tokenizer.normalizer = marked
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)(?=▁)"), "isolated")
        case _:
            tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marked])
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?<!▁)(?=▁)"), "isolated")
    letters = [*pre_tokenizers.ByteLevel.alphabet(), *"▁\n\t é三", *map(chr, range(32, 127))]
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(LONG.split("|"), trainer)
    return lambda texts: [
        one.ids for one in tokenizer.encode_batch(texts, add_special_tokens=False)
    ]


LONG = "|".join(
    [
        "The cat's 12345 mats, (all of them).  Two  spaces;\n\n- a list\n- of é三 things",
        "x\ty. " * 3,
    ]
    + [f"def f_{i}(a, b):\n    return a ** {i * 97}  # {i}!\n" for i in range(9)]
)


@pytest.mark.parametrize("kind", ["gpt2", "llama3", "gemma", "llama2"])
def test_text_in_pieces_has_the_tokens_of_the_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = like(kind)
    seams = documents._seams(encode)
    assert seams is not None
    assert (seams.pattern[7:] == " (?=\\S)") is (kind == "llama2")
    for size in (24, 40, 64, 100):
        monkeypatch.setattr(documents, "_PIECE", size)
        pieces = list(documents._pieces([LONG], seams))
        assert len(pieces) > len(LONG) // size
        assert [i for ids in encode(pieces) for i in ids] == encode([LONG])[0]


def test_the_seam_follows_the_tokenizer(tiny_model: Model) -> None:
    assert documents._seams(encode(tiny_model)).pattern.startswith(r"(?<=\S)(?= \S)")  # type: ignore[union-attr]
    vocabulary: dict[str, int] = {}

    def prefixed(texts: list[str]) -> list[list[int]]:
        """Words with the space before each, one put before the text: as Llama 2's."""
        found: list[list[int]] = []
        for text in texts:
            marked = "▁" + text.replace(" ", "▁")
            units = ["▁" + unit for unit in marked.split("▁")[1:]]
            found.append([vocabulary.setdefault(unit, len(vocabulary)) for unit in units])
        return found

    seams = documents._seams(prefixed)
    assert seams is not None
    assert seams.pattern == r"(?<=\S) (?=\S)"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_PIECE", 8)
        pieces = list(documents._pieces(["one two three four five"], seams))
    assert pieces == ["one two", "three", "four", "five"]
    assert [i for ids in prefixed(pieces) for i in ids] == prefixed(["one two three four five"])[0]
    # Characters with a mark at the end of every text have no seam at all.
    assert documents._seams(lambda texts: [[*map(ord, text), -1] for text in texts]) is None


@pytest.mark.parametrize("text", ["x", "the cat sat on the mat. ", "a  b  "])
def test_one_gigantic_line_takes_linear_time(tiny_model: Model, tmp_path: Path, text: str) -> None:
    def seconds(characters: int) -> float:
        (tmp_path / "line").write_text(text * (characters // len(text)))
        start = time.perf_counter()
        found = tokenise(tiny_model, read_documents(tmp_path / "line"), context=32)
        took = time.perf_counter() - start
        assert found.n_contexts > characters // len(text) // 100
        return took

    seconds(50_000)
    small, large = min(seconds(50_000) for _ in range(3)), seconds(400_000)
    # Eight times the text; quadratic time would take 64 times as long. Half as much again and a
    # fixed second are for the noise of a busy machine.
    assert large < 24 * small + 1


def test_tokenise_refuses(tiny_model: Model) -> None:
    texts = [("a", CAT)]
    for context in (1, N_CONTEXT + 1):
        with pytest.raises(Refusal, match=rf"context of {context} tokens .* expected 2 to 32"):
            tokenise(tiny_model, texts, context=context)
    with pytest.raises(Refusal, match=r"At most 9 tokens .* one context of 10"):
        tokenise(tiny_model, texts, context=10, tokens=9)
    with pytest.raises(Refusal, match="per_document is 0"):
        tokenise(tiny_model, texts, per_document=0)
    with pytest.raises(Refusal, match=r"None of the 2 documents has the 31 tokens.*2 tokens in"):
        tokenise(tiny_model, [("a", "a"), ("b", "b")])
    with pytest.raises(Refusal, match="None of the 0 documents"):
        tokenise(tiny_model, [])


def test_a_tokenizer_without_bos(tiny_model: Model) -> None:
    class Bare:
        bos_token_id = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return tiny_model.tokenizer(*args, **kwargs)

    model: Any = SimpleNamespace(tokenizer=Bare(), n_context=N_CONTEXT, name="bare")
    found = tokenise.__wrapped__(model, [("a", CAT * 3)], context=8)  # type: ignore[attr-defined]
    assert found.tokens[0].tolist() == ids_of(tiny_model, CAT)[:8]
    with pytest.raises(Refusal, match="tokenizer of bare has no BOS token"):
        tokenise.__wrapped__(model, [("a", CAT)], bos=True)  # type: ignore[attr-defined]


# Token files


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(torch.arange(12).view(3, 4), torch.tensor([0, 0, 1]), ("å", "b"))


def test_tokens_survive_a_file(tokens: Tokens, tmp_path: Path) -> None:
    save_tokens(tokens, tmp_path / "t.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["t.safetensors"]
    again = read_tokens(tmp_path / "t.safetensors")
    assert torch.equal(again.tokens, tokens.tokens)
    assert torch.equal(again.document, tokens.document)
    assert again.names == tokens.names


def test_tokens_of_a_suite(tmp_path: Path) -> None:
    import darkmatter as dm

    suite = dm.load_suite("pydocs")
    file = suite.path / "tokens.safetensors"
    fit, test = suite.tokens("fit"), suite.tokens("test")
    found = read_tokens(file, "test")
    assert torch.equal(found.tokens, test.tokens)
    assert found.names == test.names == suite.documents
    both = read_tokens(file)
    assert both.n_contexts == fit.n_contexts + test.n_contexts
    with pytest.raises(Refusal, match="has no 'third/tokens'"):
        read_tokens(file, "third")


def test_token_files_that_are_none_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "t.safetensors"
    whole = {"tokens": torch.ones(2, 4, dtype=torch.int32), "document": torch.tensor([0, 1])}
    save_file(whole, file)
    assert read_tokens(file).names == ("document 0", "document 1")
    (tmp_path / "documents.json").write_text('["a", "b", "c"]')
    assert read_tokens(file).names == ("a", "b", "c")
    (tmp_path / "documents.json").write_text('["a"]')
    with pytest.raises(Refusal, match="document 1, expected 0 to 0"):
        read_tokens(file)
    (tmp_path / "documents.json").write_text("[")
    with pytest.raises(CorruptFile, match="not JSON"):
        read_tokens(file)
    (tmp_path / "documents.json").unlink()
    with pytest.raises(Refusal, match="There is no file"):
        read_tokens(tmp_path / "nothing")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CorruptFile, match="whole safetensors"):
        read_tokens(file)
    for wrong, message in (
        ({"tokens": whole["tokens"]}, "has no 'document', expected tokens"),
        ({"ids": whole["tokens"]}, "has no 'tokens', expected .* it has ids"),
        ({**whole, "tokens": torch.ones(2, 4)}, r"'tokens' in .* is \(2, 4\) of torch.float32"),
        ({**whole, "tokens": whole["tokens"][:0]}, r"'tokens' in .* is \(0, 4\)"),
    ):
        save_file(wrong, file)
        with pytest.raises(Refusal, match=message):
            read_tokens(file)
    splits = {"a/tokens": whole["tokens"], "b/tokens": whole["tokens"][:, 1:].clone()}
    splits |= {f"{part}/document": torch.tensor([0, 1]) for part in "ab"}
    save_file(splits, file)
    with pytest.raises(Refusal, match="contexts of different lengths"):
        read_tokens(file)
    assert read_tokens(file, "b").tokens.shape == (2, 3)

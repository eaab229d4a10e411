"""Files that are damaged, or made to do harm: every reader gives its answer or one Refusal.

Valid files are bent: bits, bytes and lengths of any file; keys, types and sizes of what is JSON or
YAML; dtypes, shapes, offsets and numbers of tensors, with hashes made right again where there are
any. `DARKMATTER_FUZZ=50` tries fifty times as many, each time others.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from safetensors.torch import load as tensors_in
from safetensors.torch import save_file

from darkmatter import _hub, documents, shards
from darkmatter._files import sha256_of
from darkmatter._refusal import Refusal
from darkmatter.activations import Tokens
from darkmatter.autoencoders import open_autoencoders
from darkmatter.book import claims, quizzes, relations, results
from darkmatter.book.atlas import add_entry, read_entries
from darkmatter.book.paths import Book
from darkmatter.leastsquares import LinearMap, LinearStatistics
from darkmatter.passes import FitState
from darkmatter.suites import load_suite
from darkmatter.survey import Survey, merge
from tests.book.minibook import CLAIMS
from tests.common import normal
from tests.planted_survey import HOOK, planted_survey

TIMES = int(os.environ.get("DARKMATTER_FUZZ", "1"))
# More address space than any of these small files may ask for.
ROOM = 2 << 30


def bounded(examples: int) -> settings:
    return settings(
        deadline=None,
        max_examples=examples * TIMES,
        derandomize=TIMES == 1,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def little_room() -> Iterator[None]:
    """What asks for the memory that a file of a few kilobytes declares meets a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if not statm.exists():
        yield
        return
    used = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# Bending.

ODD: list[Any] = [
    None, True, False, 0, -1, 1, 2, 10**12, 2**63, 10**400, -0.5, 1e308, float("nan"),
    float("inf"), "", "x", "../../x", "\u0000", "\ud800", "9" * 5000, "2001-99-99", [], {}, [[]],
    [None], {"": None}, {"x": {"y": [1]}}, [1, 2], ["a", 1], "F32", "I64", "BOOL",
]  # fmt: skip


def deep(levels: int = 10_000) -> str:
    return "[" * levels + "]" * levels


def bent(data: bytes, by: random.Random) -> bytes:
    """Bits turned, bytes put in, taken out or put elsewhere, the end cut off or made longer."""
    new = bytearray(data)
    for _ in range(by.choice((1, 1, 1, 2, 5))):
        at = by.randrange(len(new) + 1)
        match by.randrange(6):
            case 0 if at < len(new):
                new[at] ^= 1 << by.randrange(8)
            case 1:
                del new[at:]
            case 2:
                new += by.randbytes(by.choice((1, 8, 100)))
            case 3:
                new[at : at + by.choice((1, 4, 8))] = by.choice(
                    (b"\xff" * 8, bytes(8), struct.pack("<Q", 10**12), b"\x80", b'"', b"{", b"\n")
                )
            case 4:
                del new[at : at + by.choice((1, 2, 16))]
            case _:
                new[at:at] = new[by.randrange(len(new) + 1) :][: by.choice((1, 16, 64))]
    return bytes(new)


def bent_tree(value: Any, by: random.Random) -> Any:
    """JSON data with an entry somewhere changed, doubled, renamed or gone."""
    if not isinstance(value, dict | list) or not value or by.random() < 0.1:
        return by.choice(ODD)
    new: Any = value.copy()
    key = by.choice(list(new) if isinstance(new, dict) else range(len(new)))
    match by.randrange(8):
        case 0:
            del new[key]
        case 1 if isinstance(new, list):
            new.append(by.choice(new))
        case 1 if isinstance(new, dict):
            new[by.choice(["x", "", "../x", "format"])] = new.pop(key)
        case 2:
            new[key] = by.choice(ODD)
        case _:
            new[key] = bent_tree(new[key], by)
    return new


def bent_json(data: bytes, by: random.Random) -> bytes:
    if by.random() < 0.3:
        return bent(data, by)
    if by.random() < 0.03:
        return deep().encode()
    lines = data.splitlines() or [b"0"]
    whole = [data] if data[:1] in b"[{" and lines[-1][:1] in b"]}" else lines
    at = by.randrange(len(whole))
    whole[at] = json.dumps(bent_tree(json.loads(whole[at]), by)).encode("utf-8", "surrogatepass")
    return b"\n".join(whole)


def bent_yaml(data: bytes, by: random.Random) -> bytes:
    if by.random() < 0.4:
        return bent(data, by)
    tree = bent_tree(yaml.safe_load(data), by)
    try:
        return yaml.safe_dump(tree, sort_keys=False).encode("utf-8", "surrogatepass")
    except yaml.YAMLError:
        return bent(data, by)


def bent_safetensors(data: bytes, by: random.Random) -> bytes:
    """Of the header: its length, its entries, a dtype, a shape; of the numbers: bits."""
    length = int.from_bytes(data[:8], "little")
    header, rest = json.loads(data[8 : 8 + length]), data[8 + length :]
    match by.randrange(6):
        case 0:
            return bent(data, by)
        case 1:
            odd = by.choice((0, 1, length - 1, length + 1, len(data), 10**8, 10**12, 2**64 - 1))
            return struct.pack("<Q", odd) + data[8:]
        case 2:
            header = bent_tree(header, by)
        case 3:
            if "__metadata__" not in header:
                return bent(data, by)
            key = by.choice(list(header["__metadata__"]))
            told = header["__metadata__"][key]
            if told.startswith(("{", "[")) and by.random() < 0.8:
                header["__metadata__"][key] = bent_json(told.encode(), by).decode(
                    "utf-8", "replace"
                )
            else:
                header["__metadata__"][key] = str(by.choice(ODD))
        case 4:
            one = header[by.choice([key for key in header if key != "__metadata__"])]
            start, stop = one["data_offsets"]
            kinds = {"F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "F16": 2}
            kinds |= {"BF16": 2, "I16": 2, "U16": 2, "U8": 1, "I8": 1, "BOOL": 1, "F8_E4M3": 1}
            kind = by.choice(list(kinds))
            numbers = (stop - start) // kinds[kind]
            shape = [numbers, [], [1, numbers], [numbers, 1], [numbers, 1, 1], [0, 10**12]]
            chosen = by.choice((one["shape"], *shape))
            one["dtype"], one["shape"] = kind, chosen if isinstance(chosen, list) else [chosen]
        case _:
            place = by.randrange(max(1, len(rest) // 8)) * 8
            odd = by.choice((float("nan"), float("inf"), -1e300, 1e300, -1, 2**62, 10**12, 5000))
            number = struct.pack("<q" if isinstance(odd, int) else "<d", odd)
            rest = rest[:place] + number + rest[place + 8 :]
    told = json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + rest


def bent_survey_tensors(data: bytes, by: random.Random) -> bytes:
    """A file of `shards.write_tensors` with other tensors or metadata and the right hash."""
    if by.random() < 0.4:
        return bent_safetensors(data, by)
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["darkmatter"])
    tensors, metadata = tensors_in(data), json.loads(entry["told"])
    if by.random() < 0.5:
        metadata = bent_tree(metadata, by)
    else:
        key = by.choice(list(tensors))
        one = tensors.pop(key)
        changes: list[Callable[[Any], Any]] = [
            lambda t: t.flatten()[: t.numel() // 2], lambda t: t.float(), lambda t: t.bool(),
            lambda t: t[None], lambda t: t * 10**12, lambda t: t.double() / 0,
            lambda t: -t.double(),
        ]  # fmt: skip
        if by.random() < 0.8:
            tensors[by.choice((key, key, key, "x/sxx", "active/x"))] = by.choice(changes)(one)
    path = Path(os.environ["TMPDIR_OF_FUZZ"]) / "again.safetensors"
    try:
        shards.write_tensors(path, tensors, metadata)
    except UnicodeEncodeError:
        return bent(data, by)
    return path.read_bytes()


def bent_gz(data: bytes, by: random.Random) -> bytes:
    if by.random() < 0.5:
        return bent(data, by)
    return gzip.compress(bent(gzip.decompress(data), by), 1)


def bent_zip(data: bytes, by: random.Random) -> bytes:
    """Of an .npz: its bytes, or those of one array, or an array's header, in a whole archive."""
    if by.random() < 0.4:
        return bent(data, by)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = by.choice(list(members))
    content = members.pop(name)
    if by.random() < 0.5:
        content = bent(content, by)
    else:
        size = int.from_bytes(content[8:10], "little")
        head = content[10 : 10 + size].decode("latin1").strip()
        old = by.choice(("<f4", "(", ")", ",", "False", "'shape'", "{", "4", "6"))
        odd = by.choice(("|O", ">f8", "<c8", "(((", "[" * 300, "1000000000000, ", "-1", "\\", "\n",
                         "'", "9" * 5000, "True", "lambda: 1", "f'{1}'", "    "))  # fmt: skip
        told = head.replace(old, odd, 1).encode("latin1")
        version = by.choice((content[6:8], b"\x02\x00", b"\x03\x00", b"\x09\x09"))
        width = "<H" if version[0] == 1 else "<I"
        content = (
            content[:6] + version + struct.pack(width, len(told)) + told + content[10 + size :]
        )
    members[by.choice((name, name, "../../x.npy", "x.npy"))] = content
    out = io.BytesIO()
    how = by.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA))
    with zipfile.ZipFile(out, "w", how) as archive:
        for member, bytes_ in members.items():
            archive.writestr(member, bytes_)
    return bent(out.getvalue(), by) if by.random() < 0.2 else out.getvalue()


BENDERS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    ".json": bent_json, ".jsonl": bent_json, ".yml": bent_yaml, ".gz": bent_gz, ".npz": bent_zip,
    ".safetensors": bent_safetensors,
}  # fmt: skip


# What is read: how a folder of valid files is made, and what reads all of it.


def write_statistics(folder: Path) -> None:
    x = normal(0, 9, 3)
    LinearStatistics(3, 2).partial_fit(x, x[:, :2].square()).save(folder / "s.safetensors")


def read_statistics(folder: Path) -> None:
    found = LinearStatistics.load(folder / "s.safetensors")
    found.fvu(found.solve())


def write_token_files(folder: Path) -> None:
    tokens = Tokens(torch.arange(12).view(3, 4), torch.tensor([0, 0, 1]), ("å", "b"))
    documents.save_tokens(tokens, folder / "named.safetensors")
    stored = {"fit/tokens": tokens.tokens, "fit/document": tokens.document}
    stored |= {key.replace("fit", "test"): one.clone() for key, one in stored.items()}
    save_file(stored, folder / "splits.safetensors")
    (folder / "documents.json").write_text('["a", "b"]')


def read_token_files(folder: Path) -> None:
    for name in ("named", "splits"):
        documents.read_tokens(folder / f"{name}.safetensors")
    documents.read_tokens(folder / "splits.safetensors", "fit")


def weights(d_in: int = 4, d_sae: int = 6) -> dict[str, np.ndarray]:
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,),
              "threshold": (d_sae,)}  # fmt: skip
    return {key: np.ones(shape, np.float32) / 7 for key, shape in shapes.items()}


def write_npz(folder: Path) -> None:
    np.savez(folder / "params.npz", **weights())


def read_npz(folder: Path) -> None:
    saes = open_autoencoders(folder / "params.npz", hook=HOOK)
    for name in saes:
        saes[name].encode(torch.ones(2, 4))


def write_sae(folder: Path) -> None:
    import sae_lens

    metadata = sae_lens.saes.sae.SAEMetadata(hook_name=HOOK, model_name="tiny")
    config = sae_lens.JumpReLUSAEConfig(d_in=4, d_sae=6, metadata=metadata)
    sae_lens.JumpReLUSAE(config).save_model(folder)


def read_sae(folder: Path) -> None:
    saes = open_autoencoders(folder)
    for name in saes:
        saes[name].encode(torch.ones(2, 4))


def write_texts(folder: Path) -> None:
    lines = "\n".join(json.dumps({"text": text, "n": [1]}) for text in ("one", "två", None, "3"))
    (folder / "a.jsonl").write_text(lines, encoding="utf-8")
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "c.txt").write_text("plain ☃ text", encoding="utf-8")
    (folder / "d.txt.gz").write_bytes(gzip.compress("packed ☃ text".encode()))
    pq.write_table(pa.table({"text": ["one", "two", None], "n": [1, 2, 3]}), folder / "e.parquet")


def read_texts(folder: Path) -> None:
    for file in sorted(folder.iterdir()):
        for _, text in documents.read_documents(file):
            assert isinstance(text, str)


def write_claims(folder: Path) -> None:
    (folder / "claims.yml").write_text(CLAIMS)


def read_claims(folder: Path) -> None:
    for claim in claims.load_claims(folder / "claims.yml").values():
        claims.verdict_of(claim, [0.3, 0.2], {"mini-fvu": 0.3})


def write_quizzes(folder: Path) -> None:
    wrong = [{"option": f"Wrong {n}.", "because": f"Reason {n}."} for n in (1, 2)]
    question = {"ask": "Why?", "right": "Right.", "because": "It is.", "wrong": wrong}
    (folder / "quizzes.yml").write_text(yaml.safe_dump({"99": [question] * 3}))


def read_quizzes(folder: Path) -> None:
    quizzes.quiz_page(quizzes.load_quizzes(folder / "quizzes.yml"), {"99": "99_mini.ipynb"})


def write_results(folder: Path) -> None:
    values = {"a": {"chapter": "99", "value": 0.5, "interval": None}}
    content = {"suite": "pydocs", "seed": 0, "records": values, "seal": results.digest(values)}
    (folder / "book" / "results").mkdir(parents=True)
    (folder / "book" / "results" / "pydocs.json").write_text(json.dumps(content))


def read_results(folder: Path) -> None:
    results.load_reference(Book(folder), "pydocs")


def small_survey() -> Survey:
    """Two SAEs with all that `Survey.load` reads."""
    made = planted_survey({"a/b": (512, 8.0), "c": (2048, 8.0)})
    x = normal(0, 9, 4)
    saes = {name: {"hook": HOOK, "d_sae": 512} for name in made.table.index}
    described = {**made.settings, "saes": saes}
    object.__setattr__(made, "settings", described)
    maps = {name: LinearMap(normal(1, 4, 1), normal(1, 1), 0.0, 9) for name in made.table.index}
    object.__setattr__(made, "norm_maps", maps)
    object.__setattr__(made, "statistics", {HOOK: LinearStatistics(4, 4).partial_fit(x, x.sin())})
    return made


def write_survey(folder: Path) -> None:
    small_survey().save(folder / "found")


def read_survey(folder: Path) -> None:
    found = Survey.load(folder / "found")
    for name in found.per_token:
        _ = found.per_token[name], found.error_maps[name], found.norm_maps[name]
    for hook in found.statistics:
        found.statistics[hook].solve()


def write_atlas(folder: Path) -> None:
    (folder / "book").mkdir()
    made = planted_survey({"a": (512, 8.0)})
    add_entry(Book(folder), made, "mine")


def read_atlas(folder: Path) -> None:
    read_entries(Book(folder))


NORMS = ("l0", "x_norm2", "error_norm2", "linear_norm2", "nonlinear_norm2", "predicted_norm2")


def write_shards(folder: Path) -> None:
    """Two shards of each pass, as a survey with one hook and one SAE leaves them."""
    base = folder / "shards"
    base.mkdir()
    made = small_survey()
    identity = "f" * 64
    described = {**made.settings, "identity": identity}
    described["saes"] = {"a": {"hook": HOOK, "d_sae": 8}}
    described["settings"] = {**described["settings"], "resamples": 5, "downstream": False}
    shards.write_tokens(base / "tokens.safetensors", made.fit, made.test)
    shards.write_json(base / "pieces.json", {"1": "a"})
    shards.write_json(base / "description.json", described)
    d = 3
    for shard in range(2):
        x = normal(shard, 9, d)
        y = torch.cat([x.sin(), x.square().sum(1, keepdim=True), x.sum(1, keepdim=True)], 1)
        state = FitState(
            {(0, HOOK): LinearStatistics(d, d + 2).partial_fit(x, y)},
            {"a": torch.ones(8, dtype=torch.bool)}, (1, 0), True,
        )  # fmt: skip
        shards.Share(base, identity, shard, 2).save_fit(state)
    merge(folder)
    content = shards.TensorFile(base / "fit.safetensors").content
    for shard in range(2):
        own = shards.Share(base, identity, shard, 2)
        x, e, ones = normal(shard, 9, d), normal(shard + 5, 9, d), torch.ones(9)
        norm2 = e.square().sum(1, keepdim=True)
        columns = [ones[:, None].double(), x.square().sum(1, keepdim=True), x]
        # e, half of it nonlinear, its norm predicted to a tenth, an L0 of 3, no scalar part.
        sums = [norm2, norm2 / 4, norm2 / 100, norm2.square(), norm2, 3 * columns[0]]
        sums += [e.square() / 4, e.square(), e, e.square()]
        part = {
            "documents": torch.arange(9) + 9 * shard, f"x/{HOOK}": torch.cat(columns, 1),
            "a/sum": torch.cat(sums, 1), "a/active": torch.ones(8).bool(),
            **{key: torch.arange(9) for key in ("document", "context", "position", "token")},
            "loss": ones, **{f"a/row/{key}": ones.clone() for key in NORMS},
        }  # fmt: skip
        own.finish([own.save_part(0, part, content)], content)


def read_shards(folder: Path) -> None:
    base = folder / "shards"
    identity = "f" * 64
    own = shards.Share(base, identity, 0, 2)
    own.load_fit(torch.device("cpu"))
    for path in (base / "fit.safetensors", base / "fit-0001-of-0002.safetensors"):
        shards.read_fit(shards.TensorFile(path), torch.device("cpu"))
    file = shards.merged_fit(base / "fit.safetensors", identity)
    own.parts_done(file.content)
    merge([base / "fit-0000-of-0002.safetensors", base / "fit-0001-of-0002.safetensors"])
    merge(folder, folder / "found", force=True)


def write_suite(folder: Path) -> None:
    rows = [
        {"name": f"a-{2**k}", "hook": HOOK, "d_sae": 2**k, "aim_l0": 8, "l0": 8.1, "fvu": 0.3}
        for k in (4, 5, 6)
    ]
    tokens = {f"{s}/{k}": torch.arange(4).view(2, 2) if k == "tokens" else torch.arange(2)
              for s in ("fit", "test") for k in ("tokens", "document")}  # fmt: skip
    save_file(tokens, folder / "tokens.safetensors")
    (folder / "documents.json").write_text('["a", "b"]')
    files = {n: sha256_of(folder / n) for n in ("tokens.safetensors", "documents.json")}
    manifest = {"format": "darkmatter-suite/1", "name": "mine", "hook": HOOK, "skip": 2,
                "saes": rows, "files": files}  # fmt: skip
    (folder / "suite.json").write_text(json.dumps(manifest))


def read_suite(folder: Path) -> None:
    suite = load_suite(folder)
    _ = suite.hook, suite.skip, suite.middle, suite.second, suite.places, suite.studied
    assert set(suite.grid("width")) <= set(suite.saes)
    suite.tokens("fit")
    suite.tokens("test", seed=1)
    assert len(suite.catalogue) == len(suite.saes)


def write_index(folder: Path) -> None:
    save_file({"w": torch.ones(2)}, folder / "model-1.safetensors")
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    index = {"weight_map": {"w": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_index(folder: Path) -> None:
    _hub.missing_files(folder)


# name: (write, read, inputs tried)
READERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None], int]] = {
    "statistics": (write_statistics, read_statistics, 100),
    "tokens": (write_token_files, read_token_files, 100),
    "npz": (write_npz, read_npz, 100),
    "sae": (write_sae, read_sae, 60),
    "texts": (write_texts, read_texts, 100),
    "claims": (write_claims, read_claims, 60),
    "quizzes": (write_quizzes, read_quizzes, 60),
    "results": (write_results, read_results, 50),
    "survey": (write_survey, read_survey, 40),
    "atlas": (write_atlas, read_atlas, 60),
    "shards": (write_shards, read_shards, 25),
    "suite": (write_suite, read_suite, 60),
    "index": (write_index, read_index, 50),
}


def told_in_one_sentence(error: Refusal) -> bool:
    """One line, of a length that someone reads."""
    return "\n" not in str(error) and 20 < len(str(error)) < 2000


def kept_in(folder: Path) -> dict[Path, bytes]:
    """Every file and its content, by its path in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


def rehashed(folder: Path) -> None:
    """survey.json or suite.json with the hashes of the files as they are now."""
    for listed, key in (("found/survey.json", "outputs"), ("suite.json", "files")):
        if (folder / listed).is_file():
            told = json.loads((folder / listed).read_text())
            home = (folder / listed).parent
            told[key] = {name: sha256_of(home / name) for name in told[key]}
            (folder / listed).write_text(json.dumps(told))


@pytest.mark.parametrize("name", READERS)
def test_a_bent_file_is_read_or_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> None:
    write, read, examples = READERS[name]
    monkeypatch.setenv("TMPDIR_OF_FUZZ", str(tmp_path))
    whole, folder = tmp_path / "whole", tmp_path / "bent"
    whole.mkdir()
    write(whole)
    shutil.copytree(whole, folder)
    read(folder)
    kept = kept_in(whole)
    files = sorted(path for path in kept if path.suffix != ".csv")

    @bounded(examples)
    @given(st.randoms(use_true_random=True))
    def tried(by: random.Random) -> None:
        file = by.choice(files)
        bend = BENDERS.get(file.suffix, bent)
        if b'"darkmatter"' in kept[file][:200]:
            bend = bent_survey_tensors
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
        (folder / file).write_bytes(bend(kept[file], by))
        if file.name not in ("survey.json", "suite.json") and by.random() < 0.7:
            rehashed(folder)
        said: Exception | None = None
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                read(folder)
        except Exception as error:
            said = error
        note(f"{file}: {said!r}")
        assert said is None or isinstance(said, Refusal)
        assert said is None or told_in_one_sentence(said)

    tried()


# Small files that tell of large things.


def refused_small(read: Callable[[], object], match: str) -> None:
    """Refused for what it is, and not because the memory was asked for and not given."""
    with pytest.raises(Refusal, match=match) as refused:
        read()
    assert told_in_one_sentence(refused.value)
    assert "alloc" not in str(refused.value)


def safetensors_of(header: dict[str, Any], rest: bytes = b"") -> bytes:
    told = json.dumps(header).encode()
    return struct.pack("<Q", len(told)) + told + rest


def test_declared_sizes_are_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "s.safetensors"
    shape = {"dtype": "F64", "shape": [10**6, 10**6], "data_offsets": [0, 8 * 10**12]}
    path.write_bytes(safetensors_of({"sxx": shape}, bytes(80)))
    refused_small(lambda: LinearStatistics.load(path), "not a file written by")
    path.write_bytes(struct.pack("<Q", 10**12) + b"{}")
    refused_small(lambda: LinearStatistics.load(path), "not a file written by")
    # d_in of a hundred thousand in a file of 1.6 MB: sxx would be 80 GB.
    save_file(
        {"sxy": torch.zeros(10**5, 1, dtype=torch.float64), "mean_x": torch.zeros(10**5).double(),
         "mean_y": torch.zeros(1).double(), "syy": torch.zeros(1).double(), "n": torch.tensor(9),
         "sxx": torch.zeros(1, 1).double()},
        path, metadata={"format": "darkmatter.LinearStatistics/1"},
    )  # fmt: skip
    refused_small(lambda: LinearStatistics.load(path), r"sxx is torch.float64 \[1, 1\]")


def test_a_number_of_a_document_is_no_number_of_names(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"tokens": torch.ones(2, 4).long(), "document": torch.tensor([3, 10**12])}, path)
    found = documents.read_tokens(path)
    assert found.names == ("document 3", f"document {10**12}")
    assert found.document.tolist() == [0, 1]


def test_a_shard_of_any_number_is_missing_at_once(tmp_path: Path) -> None:
    path = tmp_path / "test-0000-of-0002.json"
    shards.write_json(path, {"format": shards.FORMAT, "identity": "a", "stage": "test",
                             "shard": 0, "of": 10**15})  # fmt: skip
    refused_small(
        lambda: shards.collect([path], "a", "test", shards.read_json),
        r"999999999999999 of 1000000000000000 shards .*test-0001-of-1000000000000000",
    )


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".txt.gz"])
def test_a_packed_line_without_end(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_LONGEST_LINE", 1 << 24)
    path = tmp_path / f"bomb{suffix}"
    block = gzip.compress(b"a" * (1 << 24))
    with path.open("wb") as file:
        for _ in range(8):
            file.write(block)
    assert path.stat().st_size < 1 << 20
    texts = documents.read_documents(path)
    if suffix == ".jsonl.gz":
        refused_small(lambda: list(texts), "Line 1 of .* has 16777216 bytes or more")
    else:
        # Plain text comes a block at a time, whatever its length.
        assert max(len(text) for _, text in texts) <= 1 << 20


def test_an_npz_that_unpacks_to_more_than_weights_do(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez_compressed(path, **{k: np.zeros_like(a) for k, a in weights(512, 2048).items()})
    refused_small(lambda: open_autoencoders(path, hook=HOOK), r"it tells of \d+ bytes")
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000), }"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("W_enc.npy", member)
    refused_small(lambda: open_autoencoders(path, hook=HOOK), "it tells of 4000000000000 bytes")


def test_a_table_of_more_rows_than_tokens(tmp_path: Path) -> None:
    write_survey(tmp_path)
    path = tmp_path / "found" / "per_token" / "c.parquet"
    # A billion rows in some kilobytes: one value, run-length encoded.
    rows = pa.table({"l0": pa.array(np.zeros(10**6, np.int8))})
    with pq.ParquetWriter(path, rows.schema, compression="zstd") as writer:
        for _ in range(3):
            writer.write_table(rows)
    rehashed(tmp_path)
    found = Survey.load(tmp_path / "found")
    refused_small(lambda: found.per_token["c"], "it has 3000000 rows, expected at most 960")


def laughs(levels: int = 9) -> str:
    """YAML of some hundred bytes that stands for 10^levels words."""
    lines = ["- &a0 [lol]"]
    lines += [f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize("where", ["id", "paper", "expect", "itself", "deep", "date", "key"])
def test_yaml_that_is_more_than_it_looks(where: str, tmp_path: Path) -> None:
    path = tmp_path / "claims.yml"
    bombs = {
        "itself": "- &a [*a]", "deep": deep(2_000), "date": "- 2001-99-99",
        "key": CLAIMS.replace("  kind:", "  1: x\n  two: y\n  kind:", 1),
    }  # fmt: skip
    entry = CLAIMS.split("- id: mini-random")[0].replace("mini-fvu", "last")
    value = {"id": "id: last", "paper": "paper: {", "expect": "tolerance: 0.01"}.get(where)
    text = bombs.get(where) or laughs() + "\n" + entry.replace(str(value), f"{where}: *a9 #")
    path.write_text(text)
    refused_small(lambda: claims.load_claims(path), "claim|YAML")
    refused_small(lambda: quizzes.load_quizzes(path), "chapters|YAML")
    path.write_text(f"'99': [{', '.join(['&x [lol, lol]'] + ['*x'] * 2)}]")
    refused_small(lambda: quizzes.load_quizzes(path), "question 99.1: expected ask")


@pytest.mark.parametrize("text", ["-" * 5000, "(" * 5000 + "a < b", "a < b and " * 1000])
def test_a_relation_nested_deeper_than_the_stack(text: str) -> None:
    refused_small(lambda: relations.validate(text), "relation")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": "<script>alert(1)</script>"}, "is no count"),
        ({"documents": "[x](javascript:alert(1))"}, "is no count"),
        ({"model": "a` <script>alert(1)</script> `"}, "is no name"),
        ({"identity": "`<b>"}, "is no name"),
        ({"skip": True}, "is no count"),
        ({"n_fit": 10**400}, "is no count"),
        ({"rows": [{"name": "a`<img src=x onerror=alert(1)>`"}]}, "hook|is no name"),
    ],
)
def test_an_entry_of_the_atlas_is_words_and_numbers(
    change: dict[str, Any], said: str, tmp_path: Path
) -> None:
    write_atlas(tmp_path)
    (path,) = (tmp_path / "book" / "results" / "atlas").glob("*.json")
    entry = json.loads(path.read_text()) | change
    path.write_text(json.dumps(entry))
    refused_small(lambda: read_entries(Book(tmp_path)), said)

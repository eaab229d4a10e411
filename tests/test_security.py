"""What a file, a text or a server may not do: run code, leave a folder, learn a secret."""

from __future__ import annotations

import ast
import gzip
import io
import json
import logging
import os
import pickle
import re
import tarfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from bs4 import BeautifulSoup
from huggingface_hub import constants

import darkmatter as dm
from darkmatter import _hub, documents, shards
from darkmatter._files import replacing, sha256_of
from darkmatter._refusal import Refusal
from darkmatter.autoencoders import load_autoencoder, open_autoencoders
from darkmatter.book import claims, quizzes, results
from darkmatter.book.atlas import read_entries
from darkmatter.book.execution import execute
from darkmatter.book.paths import Book
from darkmatter.folders import file_of
from darkmatter.interpretation import EndpointJudge, LocalJudge, UnusableReply
from darkmatter.leastsquares import LinearStatistics
from darkmatter.survey import merge
from tests.book.minibook import write_book
from tests.conftest import HOOK
from tests.hostile import HOSTILE, hostile_pages, not_text
from tests.hub_stand_in import Fault, HubStandIn
from tests.surveys import SKIP, documents_of

ROOT = Path(__file__).parents[1]


# Nothing is unpickled.


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[bytes]:
    """A pickle that leaves a mark, and has not left it when the test ends."""
    mark = tmp_path / "unpickled"
    planted = pickle.dumps(Bomb(mark))
    pickle.loads(planted)
    assert mark.is_dir(), "the bomb works"
    mark.rmdir()
    yield planted
    assert not mark.exists()


def packed(bomb: bytes, tmp_path: Path) -> bytes:
    """torch.save's format, which torch.load would unpickle."""
    out = io.BytesIO()
    torch.save(Bomb(tmp_path / "unpickled"), out)
    assert zipfile.is_zipfile(out)
    return out.getvalue()


@pytest.mark.parametrize("how", ["bare", "packed"])
def test_a_pickle_in_the_place_of_tensors_is_refused(
    bomb: bytes, how: str, tmp_path: Path, tiny_model_folder: Path
) -> None:
    content = bomb if how == "bare" else packed(bomb, tmp_path)
    file = tmp_path / "s.safetensors"
    file.write_bytes(content)
    sae = tmp_path / "sae"
    sae.mkdir()
    (sae / "cfg.json").write_text('{"d_in": 4, "d_sae": 6, "architecture": "standard"}')
    (sae / "sae_weights.safetensors").write_bytes(content)
    npz = tmp_path / "params.npz"
    npz.write_bytes(content)
    model = tmp_path / "model"
    model.mkdir()
    for kept in tiny_model_folder.iterdir():
        (model / kept.name).write_bytes(kept.read_bytes())
    (model / "model.safetensors").write_bytes(content)
    survey = tmp_path / "survey"
    survey.mkdir()
    told = {"format": shards.FORMAT, "saes": {}, "documents": {"fit": ["a"]}}
    told |= {"settings": {"skip": 0}, "outputs": {"tokens.safetensors": sha256_of(file)}}
    (survey / "survey.json").write_text(json.dumps(told))
    (survey / "tokens.safetensors").write_bytes(content)
    base = tmp_path / "shards"
    base.mkdir()
    (base / "fit-0000-of-0001.safetensors").write_bytes(content)
    readers: list[Callable[[], object]] = [
        lambda: LinearStatistics.load(file),
        lambda: documents.read_tokens(file),
        lambda: shards.TensorFile(file),
        lambda: open_autoencoders(sae),
        lambda: load_autoencoder(sae),
        lambda: open_autoencoders(npz, hook=HOOK),
        lambda: dm.open_model(model),
        lambda: dm.Survey.load(survey),
        lambda: merge([base / "fit-0000-of-0001.safetensors"]),
        lambda: LocalJudge(model),
    ]
    for read in readers:
        with pytest.raises(Refusal):
            read()
    # A pickle of weights beside or instead of safetensors is not looked at.
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(Refusal, match="other formats are never read"):
        dm.open_model(model)
    with pytest.raises(Refusal, match="is not a model"):
        LocalJudge(model)


def test_arrays_of_objects_are_refused(bomb: bytes, tmp_path: Path) -> None:
    arrays = {"W_enc": np.ones((4, 6), np.float32), "W_dec": np.ones((6, 4), np.float32),
              "b_dec": np.ones(4, np.float32), "threshold": np.ones(6, np.float32)}  # fmt: skip
    objects = np.array([Bomb(tmp_path / "unpickled")] * 6, dtype=object)
    np.savez(tmp_path / "params.npz", **arrays, b_enc=objects)
    with pytest.raises(Refusal, match="pickled objects never"):
        open_autoencoders(tmp_path / "params.npz", hook=HOOK)
    np.savez(tmp_path / "params.npz", **arrays, b_enc=np.ones(6, np.float32))
    with zipfile.ZipFile(tmp_path / "params.npz", "a") as archive:
        archive.writestr("extra.pkl", bomb)
    with pytest.raises(Refusal, match="not a whole"):
        open_autoencoders(tmp_path / "params.npz", hook=HOOK)


def test_texts_that_are_pickles_are_refused_or_text(bomb: bytes, tmp_path: Path) -> None:
    for name, content in {
        "a.jsonl": bomb, "a.jsonl.gz": gzip.compress(bomb), "a.txt": bomb, "a.parquet": bomb,
        "a.pkl": bomb, "a.gz": gzip.compress(bomb),
    }.items():  # fmt: skip
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refusal):
            list(documents.read_documents(tmp_path / name))
    # What pyarrow before 14.0.1 unpickled (CVE-2023-47248): a type of a column, in its metadata.
    field = pa.field("text", pa.string(), metadata={
        "ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb,
    })  # fmt: skip
    table = pa.table([pa.array(["one"])], schema=pa.schema([field]))
    pq.write_table(table, tmp_path / "b.parquet")
    assert [text for _, text in documents.read_documents(tmp_path / "b.parquet")] == ["one"]
    assert list(pd.read_parquet(tmp_path / "b.parquet")["text"]) == ["one"]
    pq.write_table(pa.table({"text": [bomb]}), tmp_path / "c.parquet")
    with pytest.raises(Refusal, match="is bytes, expected text"):
        list(documents.read_documents(tmp_path / "c.parquet"))


@pytest.mark.filterwarnings("ignore")
def test_a_folder_of_data_with_code_and_pickles_in_it(
    bomb: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    code = f"import os\nos.mkdir({str(tmp_path / 'unpickled')!r})\n"
    for kind in ("script", "pickle", "tar"):
        folder = tmp_path / kind
        folder.mkdir()
        if kind == "script":
            (folder / "script.py").write_text(code)
        elif kind == "pickle":
            (folder / "train.pkl").write_bytes(bomb)
        else:
            with tarfile.open(folder / "train.tar", "w") as archive:
                for name in ("0.txt", "0.pickle", "0.pth", "0.pyd", "../../0.json"):
                    member = tarfile.TarInfo(name)
                    content = packed(bomb, tmp_path) if name == "0.pth" else bomb
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        with pytest.raises(Refusal):
            list(documents.read_dataset(folder))


def test_yaml_makes_plain_data_only(bomb: bytes, tmp_path: Path) -> None:
    path = tmp_path / "claims.yml"
    for tag in ("object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir", "module:os"):
        path.write_text(f"- !!python/{tag} [{tmp_path / 'unpickled'}]\n")
        for load in (claims.load_claims, quizzes.load_quizzes):
            with pytest.raises(Refusal, match="could not determine a constructor"):
                load(path)


def test_code_that_comes_with_a_model_is_not_run(
    bomb: bytes, tmp_path: Path, tiny_model_folder: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for kept in tiny_model_folder.iterdir():
        (folder / kept.name).write_bytes(kept.read_bytes())
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'unpickled')!r})\n")
    for name, own in (("config.json", "Config"), ("tokenizer_config.json", "Tokenizer")):
        told = json.loads((folder / name).read_text())
        told["auto_map"] = {f"Auto{kind}": "evil.Evil" for kind in (own, "ModelForCausalLM")}
        if own == "Tokenizer":
            told["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
        else:
            told["model_type"] = "evil"
        (folder / name).write_text(json.dumps(told))
    with pytest.raises(Refusal):
        dm.open_model(folder)
    with pytest.raises(Refusal):
        LocalJudge(folder)


@pytest.mark.parametrize(
    "module", sorted((ROOT / "darkmatter").rglob("*.py")), ids=lambda p: p.stem
)
def test_no_module_can_unpickle_or_evaluate(module: Path) -> None:
    """Calls and arguments that would; `trust_remote_code` only as False."""
    forbidden = {"eval", "exec", "compile", "__import__"}
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
        unpickling = {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
        assert not {name.split(".")[0] for name in names} & unpickling
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in forbidden, f"line {node.lineno}"
        assert called not in ("torch.load", "pd.read_pickle", "os.system", "yaml.unsafe_load")
        for given in node.keywords:
            told = (given.arg, ast.unparse(given.value))
            assert told not in {("allow_pickle", "True"), ("trust_remote_code", "True"),
                                ("weights_only", "False"), ("shell", "True")}  # fmt: skip
        if called == "yaml.load":
            (loader,) = (ast.unparse(one.value) for one in node.keywords if one.arg == "Loader")
            assert set(re.findall(r"\w*Loader", loader)) <= {"SafeLoader", "CSafeLoader"}


# Nothing that a text says becomes part of a page.


@pytest.mark.parametrize("name", ["report", "latents", "view"])
def test_hostile_names_and_tokens_stay_text(name: str, tmp_path: Path) -> None:
    pages = [page for page in hostile_pages(tmp_path) if page.parent.name == name]
    assert pages
    for page in pages:
        soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
        assert not_text(soup) == []
        # They are there, as text: not cleaned away.
        seen = soup.get_text()
        assert sum(one in seen or one.strip() in seen for one in HOSTILE) >= 3


# Nothing leads out of a folder.

OUT = (
    "../../out",
    "/tmp/out",
    "..",
    ".",
    "a/../../b",
    "a\\..\\b",
    "",
    "x" * 300,
    "é" * 200,
    "a\nb",
)


@pytest.mark.parametrize("name", OUT)
def test_a_name_of_an_sae_is_a_name_of_a_file_in_the_folder(name: str, tmp_path: Path) -> None:
    relative = file_of("maps", name, "safetensors")
    path = (tmp_path / relative).resolve()
    assert path.parent == (tmp_path / "maps").resolve()
    path.parent.mkdir()
    # Also with what is put around the name while it is written.
    with replacing(path) as temporary:
        temporary.write_bytes(b"")
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert file_of("maps", name + "!", "safetensors") != relative


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../secret": "0" * 64}},
        {"files": {"/etc/passwd": "0" * 64}},
        {"files": {"saes/../../secret": "0" * 64}},
        {"sae": "../../secret"},
        {"sae": "/etc"},
        {"name": "../pydocs"},
    ],
)
def test_a_card_of_a_suite_names_nothing_outside(change: dict[str, Any], tmp_path: Path) -> None:
    row = {"name": "a", "hook": HOOK, "d_sae": 16, "aim_l0": 8}
    manifest: dict[str, Any] = {"format": "darkmatter-suite/1", "name": "mine", "hook": HOOK}
    manifest |= {"skip": 2, "saes": [row], "files": {}}
    (tmp_path / "suite.json").write_text(json.dumps(manifest))
    assert list(dm.load_suite(tmp_path).saes) == ["a"]
    row["name"] = change.pop("sae", "a")
    (tmp_path / "suite.json").write_text(json.dumps(manifest | change))
    with pytest.raises(Refusal, match="leads out of the folder"):
        dm.load_suite(tmp_path)


@pytest.mark.parametrize("name", ["../w.safetensors", "/w.safetensors", "a/w.safetensors", "..", 5])
def test_an_index_of_weights_names_files_beside_it(name: Any, tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(Refusal, match="is not an index of weights"):
        _hub.weight_files(tmp_path)


def test_a_list_of_parts_names_nothing(tmp_path: Path) -> None:
    """Parts are found by the numbers of the shard; what stands in the list is only compared."""
    told = {"format": shards.FORMAT, "identity": "a", "stage": "test", "fit": "b", "of": 1}
    path = tmp_path / "shards" / "test-0000-of-0001.json"
    path.parent.mkdir()
    shards.write_json(path, {**told, "shard": 0, "parts": ["../../secret"]})
    with pytest.raises(Refusal, match=r"shards/test-0000-of-0001-00000\.safetensors, part 0 of"):
        shards.collect_parts([path], "a", "b")
    shards.write_json(path, {**told, "shard": "../../0", "parts": []})
    with pytest.raises(Refusal, match="is not a shard of a survey"):
        shards.collect_parts([path], "a", "b")


@pytest.mark.parametrize("suite", ["../../etc", "/etc", "pydocs/../x", "nobody's", "", None, 7])
def test_a_chapter_runs_on_a_suite_that_has_a_name(suite: Any, tmp_path: Path) -> None:
    book = write_book(tmp_path)
    with pytest.raises(Refusal, match="expected a suite by its name") as refused:
        list(execute(book, parameters={"suite": suite}))
    assert "\n" not in str(refused.value)
    if isinstance(suite, str):
        with pytest.raises(Refusal, match="the name of a suite"):
            Book(tmp_path).results(suite + "/")


@pytest.mark.parametrize("seed", ["0", 1.0, -1, True, None, [0], "__import__('os')", float("nan")])
def test_a_seed_is_a_whole_number(seed: Any, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="expected a seed that is a whole number") as refused:
        list(execute(write_book(tmp_path), parameters={"seed": seed}))
    assert "\n" not in str(refused.value)
    with pytest.raises(Refusal, match="expected one of the parameters"):
        list(execute(Book(tmp_path), parameters={"seed; import os": 0}))


def test_files_that_others_send_and_that_are_pickles(bomb: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "book" / "results" / "atlas"
    folder.mkdir(parents=True)
    (folder / "mine.json").write_bytes(bomb)
    (folder.parent / "pydocs.json").write_bytes(bomb)
    with pytest.raises(Refusal):
        read_entries(Book(tmp_path))
    with pytest.raises(Refusal):
        results.load_reference(Book(tmp_path), "pydocs")


# Secrets.

SECRETS = {"HF_TOKEN": "hf_SentinelOfTheHubXXXXXXXXXXXXXXXXXX", "NDIF_API_KEY": "ndif-Sentinel-123",
           "OPENAI_API_KEY": "sk-SentinelOfTheJudge123456789"}  # fmt: skip


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def without_secrets(text: str) -> None:
    assert [name for name, value in SECRETS.items() if value in text] == []


def test_no_secret_is_in_what_a_survey_writes(
    secrets: dict[str, str],
    tiny_model: Any,
    tiny_saes: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    tokens = documents_of(tiny_model, contexts=32)
    saes = {"one": tiny_saes["topk"]}
    found = dm.survey(tiny_model, saes, tokens, skip=SKIP, resamples=5, folder=tmp_path / "found")
    found.report()
    for path in tmp_path.rglob("*"):
        if path.suffix == ".parquet":
            without_secrets(pd.read_parquet(path).to_csv() + str(pq.read_schema(path)))
        elif path.is_file():
            without_secrets(path.read_bytes().decode("latin1"))
    without_secrets(repr(found) + json.dumps(found.settings) + caplog.text)
    without_secrets("".join(capsys.readouterr()))


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500])
def test_no_secret_is_in_what_a_refusing_hub_makes_us_say(
    status: int,
    secrets: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    with HubStandIn() as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        resolve = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + resolve)
        hub.faults["a/b", "*"] = Fault(status=status)
        with pytest.raises(Refusal) as refused:
            _hub.fetch("a/b", "config.json")
        assert hub.requests, "the hub was asked"
    without_secrets("".join(traceback.format_exception(refused.value)) + caplog.text)


@pytest.fixture
def echo() -> Iterator[str]:
    """A judge that answers every question with an error in which the key stands."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            said = f"Incorrect API key provided: {self.headers['Authorization']}"
            body = json.dumps({"error": {"message": said, "code": "invalid_api_key"}}).encode()
            self.send_response(401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


def test_no_secret_is_in_what_a_judge_makes_us_say(
    secrets: dict[str, str], echo: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    judge = EndpointJudge("model", echo, retries=0)
    with pytest.raises(UnusableReply) as refused:
        judge.ask("Is it?")
    without_secrets("".join(traceback.format_exception(refused.value)) + caplog.text + repr(judge))


def test_no_secret_lies_in_the_repository() -> None:
    keys = re.compile(
        r"\b(hf_(?!Sentinel)[A-Za-z0-9]{30,}|sk-(?!Sentinel)[A-Za-z0-9_-]{24,}|gh[pousr]_[A-Za-z0-9]{30,}"
        r"|AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY)"
    )
    texts = {".py", ".md", ".ipynb", ".yml", ".yaml", ".json", ".toml", ".lock", ".css", ".bib"}
    for folder in ("book", "darkmatter", "tests", ".ci", ".github"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in texts and path.name != "tokenizer.json":
                assert not keys.search(path.read_text(encoding="utf-8")), path


# Servers of the tests.


def test_servers_listen_on_this_machine_only() -> None:
    served = 0
    for path in [*(ROOT / "tests").rglob("*.py"), *(ROOT / "darkmatter").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            called = ast.unparse(node.func)
            if called.endswith(("HTTPServer", "TCPServer", "UDPServer", ".bind", "create_server")):
                where = ast.unparse(node.args[0])
                assert where.startswith("('127.0.0.1', "), f"{path}:{node.lineno} {where}"
                assert "darkmatter" not in path.relative_to(ROOT).parts, (
                    "the package serves nothing"
                )
                served += 1
    assert served >= 5
    with HubStandIn() as hub:
        assert hub.server.server_address[0] == "127.0.0.1"

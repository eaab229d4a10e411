"""Surveys where the model is, by a server that has what was serialised, torch and no darkmatter."""

from __future__ import annotations

import copy
import importlib.util
import io
import json
import linecache
import shutil
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from zstandard import ZstdDecompressor

import darkmatter as dm
from darkmatter import remote
from darkmatter.__main__ import main
from darkmatter.activations import Tokens
from darkmatter.models import Model
from darkmatter.passes import FitState
from darkmatter.plans import planned
from darkmatter.suites.processing import Processing, on_raw_activations
from tests.conftest import D_MODEL
from tests.hub_stand_in import add_to_cache
from tests.surveys import SKIP, documents_of

KEY = "a-key-that-nobody-must-see"
# Two batches of contexts a request, so that both the server and the client add up.
REQUEST = 32 * 32
OURS = ("darkmatter", "tests", "sae_lens", "transformer_lens", "jaxtyping", "beartype")


@contextmanager
def without_us() -> Iterator[None]:
    """Nothing that only the client has can be imported, or was read by nnsight before."""
    from nnsight.tracing.globals import BLOCKS, SOURCES

    class Nowhere:
        def find_spec(self, name: str, *_: object) -> None:
            if name.partition(".")[0] in OURS:
                raise ModuleNotFoundError(name)

    hidden = {name: sys.modules[name] for name in sys.modules if name.partition(".")[0] in OURS}
    memories: list[Any] = [sys.modules, BLOCKS, SOURCES, linecache.cache]
    before = [dict(memory) for memory in memories]
    nowhere: Any = Nowhere()
    sys.meta_path.insert(0, nowhere)
    try:
        for name in hidden:
            del sys.modules[name]
        for memory in memories[1:]:
            memory.clear()
        yield
    finally:
        sys.meta_path.remove(nowhere)
        for memory, was in zip(memories, before, strict=True):
            memory.clear()
            memory.update(was)


class Server:
    """In the place of the connection to NDIF: what it does with the bytes of a request.

    `model` has the weights. `sent`: the name of the model and the bytes of each request;
    `came_back`: what each returned.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sent: list[tuple[str, bytes]] = []
        self.came_back: list[dict[str, Any]] = []

    def answer(self, backend: Any, request: Any, tracer: Any) -> Any:
        from nnsight.schema.request import RequestModel
        from nnsight.tracing.tracer import _saves  # pyright: ignore[reportPrivateUsage]
        from zstandard import ZstdCompressor

        blob = backend._serialize(tracer)
        self.sent.append((request.model_key, blob))
        known = self.model.underlying._remoteable_persistent_objects()
        with without_us():
            restored = RequestModel.deserialize(blob, known, compress=request.compress)
            assert set(restored.info.frame.f_globals) == {"torch"}
            restored.execute(restored.info.code)
            names = restored.info.frame.f_locals
            saved = {name: value for name, value in names.items() if id(value) in _saves()}
        self.came_back.append(saved)
        file = io.BytesIO()
        torch.save(saved, file)
        return backend.finalize(ZstdCompressor().compress(file.getvalue()))


@contextmanager
def serving(model: Model) -> Iterator[Server]:
    """A server in the place of NDIF; requests of models with remote="local" also go there."""
    from nnsight.intervention.backends.remote import RemoteBackend

    backend, server = remote._backend, Server(model)

    def to_the_server(asking: Model) -> Any:
        return backend(asking) or RemoteBackend("local", api_key=KEY)

    def request(self: Any, request: Any, tracer: Any) -> Any:
        return server.answer(self, request, tracer)

    with (
        mock.patch.object(remote, "_backend", to_the_server),
        mock.patch.object(RemoteBackend, "request", request),
    ):
        yield server


def tensors_in(value: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of nested containers, with where it is."""
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items:
            yield from ((f"{key}/{path}", tensor) for path, tensor in tensors_in(one))
    else:
        raise AssertionError(f"{type(value)} came back")


def activations_in(came_back: list[dict[str, Any]], documents: int) -> list[str]:
    """What came back and is neither a vector, a total of documents nor a moment [d, ...]."""
    return [
        path
        for result in came_back
        for path, tensor in tensors_in(result)
        if tensor.ndim > 2 or (tensor.ndim == 2 and len(tensor) not in (documents, D_MODEL))
    ]


@pytest.fixture(scope="module")
def elsewhere(tiny_model_folder: Path) -> Model:
    return dm.open_model(tiny_model_folder, backend="nnsight", remote="local")


@pytest.fixture(scope="module")
def tokens(tiny_model: Model) -> tuple[Tokens, Tokens]:
    """Documents of two contexts; batches in which no token counts, and some, are in both."""
    whole = documents_of(tiny_model, 112)
    fit, test = whole.split_documents(0.6, 0)
    for part in (fit, test):
        part.tokens[16:32] = 0
        part.tokens[40, 10:] = 0
    return fit, test


@pytest.fixture(scope="module")
def saes(tiny_saes: dict[str, Any]) -> dict[str, Any]:
    """Every kind that can be sent, at two hooks, and SAEs of processed activations."""
    centred, rescaled = copy.deepcopy(tiny_saes["topk"]), copy.deepcopy(tiny_saes["normalised"])
    shifted = copy.deepcopy(tiny_saes["standard"])
    shifted.cfg.metadata.hook_name = "blocks.0.hook_resid_mid"
    shifted.cfg.apply_b_dec_to_input = True
    return {
        **tiny_saes,
        "centred": on_raw_activations(centred, Processing(centred=True, scale=1.5)),
        "layer norm": on_raw_activations(rescaled),
        "elsewhere": shifted,
    }


OPTIONS: dict[str, Any] = {"skip": SKIP, "resamples": 20}


@pytest.fixture(scope="module")
def served(
    elsewhere: Model, saes: dict[str, Any], tokens: tuple[Tokens, Tokens]
) -> tuple[dm.Survey, Server]:
    with serving(elsewhere) as server:
        return dm.survey(elsewhere, saes, *tokens, checkpoint_tokens=REQUEST, **OPTIONS), server


@pytest.fixture(scope="module")
def ordinary(nnsight_model: Model, saes: dict[str, Any], tokens: tuple[Tokens, Tokens]) -> Any:
    return dm.survey(nnsight_model, saes, *tokens, **OPTIONS)


def assert_same(found: pd.DataFrame, expected: pd.DataFrame, rtol: float = 1e-6) -> None:
    """Codes are float32, rounded to 6e-8, and their products are added in another order; a score is
    a ratio of sums of hundreds of squares, over which this averages. Costs, and the shares divided
    by them, are differences of cross entropies of several nats, which are rounded to 5e-7; in some
    resamples a cost is a hundredth of a nat.
    """
    assert list(found.columns) == list(expected.columns)
    assert list(found.index) == list(expected.index)
    for column in map(str, expected):
        if str(expected[column].dtype).startswith("float"):
            differences = column.startswith(("cost", "recovered"))
            np.testing.assert_allclose(
                found[column],
                expected[column],
                rtol=1e-4 if differences else rtol,
                atol=1e-6 if differences else 0,
                err_msg=column,
            )
        else:
            assert list(found[column]) == list(expected[column]), column


def test_the_table_is_that_of_a_survey_here(
    served: tuple[dm.Survey, Server], ordinary: Any
) -> None:
    found, server = served
    assert len(server.sent) >= 4
    assert_same(found.table, ordinary.table)
    for name, frame in ordinary.per_token.items():
        # Of one token: squares of differences, which do not average.
        assert_same(found.per_token[name], frame, rtol=1e-5)
        assert frame["error_norm2"].gt(0).all()


def test_moments_are_those_of_a_survey_here(
    served: tuple[dm.Survey, Server], ordinary: Any
) -> None:
    for hook, expected in ordinary.statistics.items():
        found = served[0].statistics[hook]
        assert found.n == expected.n
        for key, tensor in expected.tensors().items():
            # Relative to the largest: products of centred columns are near zero where they cancel.
            scale = float(tensor.abs().max())
            torch.testing.assert_close(found.tensors()[key], tensor, rtol=1e-6, atol=1e-6 * scale)


def test_no_activation_of_a_token_comes_back(
    served: tuple[dm.Survey, Server], tokens: tuple[Tokens, Tokens]
) -> None:
    fit, test = tokens
    requests = [documents_in(fit, i) for i in range(0, fit.n_contexts, 32)]
    requests += [documents_in(test, i) for i in range(0, test.n_contexts, 32)]
    came_back = served[1].came_back
    # Two rounds of none: both hooks are read in one run of the model.
    assert len(came_back) == len(requests)
    for result, documents in zip(came_back, requests, strict=True):
        assert activations_in([result], documents) == []


def documents_in(tokens: Tokens, first: int) -> int:
    return len(tokens.document[first : first + 32].unique())


def with_a_plant(folder: Path, plant: str) -> ModuleType:
    """darkmatter.remote with something else that is saved."""
    source = Path(str(remote.__file__)).read_text()
    assert source.count("        save(answer)\n") == 1
    path = folder / "planted.py"
    path.write_text(
        source.replace("        save(answer)\n", f"        {plant}\n        save(answer)\n")
    )
    spec = importlib.util.spec_from_file_location("planted", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        ("answer['planted'] = x", ["answer/planted/"]),
        ("answer['planted'] = ids[0].outer(ids[0]).double()[None]", ["answer/planted/"]),
        ("errors = save(errors)", ["errors/0/"]),
        ("pass", []),
    ],
)
def test_an_activation_that_is_planted_is_found(
    plant: str,
    found: list[str],
    elsewhere: Model,
    saes: dict[str, Any],
    tokens: tuple[Tokens, Tokens],
    tmp_path: Path,
) -> None:
    planted: Any = with_a_plant(tmp_path, plant)
    chosen = {"jumprelu": saes["jumprelu"]}
    work = planned(elsewhere, chosen, *tokens, SKIP, 0, 0.6, None, True, False, REQUEST)
    share = range(32, 50)

    def nothing(_: object) -> None: ...

    with serving(elsewhere) as server:
        planted._backend = remote._backend
        planted.fit_pass(work, share, FitState.empty(work, share), nothing, nothing)
    assert activations_in(server.came_back, documents=-1) == found


# Models that NDIF runs


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    return KEY


@pytest.fixture
def hub_name(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A name of which config and tokenizer are in the cache, and no weights."""
    from huggingface_hub import constants
    from nnsight.modeling import huggingface

    source = tmp_path / "source"
    shutil.copytree(
        tiny_model_folder, source, ignore=shutil.ignore_patterns("*.safetensors", "generation*")
    )
    add_to_cache(tmp_path / "hub", "someone/tiny", source)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # What NDIF's client asks the hub for: the name in its canonical spelling.
    monkeypatch.setitem(huggingface._ID_CACHE, "someone/tiny", "someone/tiny")
    return "someone/tiny"


def test_a_model_that_is_not_here_is_surveyed(
    key: str,
    hub_name: str,
    elsewhere: Model,
    ordinary: Any,
    saes: dict[str, Any],
    tokens: tuple[Tokens, Tokens],
    tmp_path: Path,
) -> None:
    model = dm.open_model(hub_name, backend="nnsight", remote=True)
    assert all(weight.is_meta for weight in model.network.parameters())
    chosen = {name: saes[name] for name in ("gated", "elsewhere")}
    with serving(elsewhere) as server:
        found = dm.survey(
            model, chosen, *tokens, folder=tmp_path / "survey", checkpoint_tokens=REQUEST, **OPTIONS
        )
    assert_same(found.table, ordinary.table.loc[list(chosen)])
    assert found.settings["model"]["remote"] is True
    for file in (tmp_path / "survey").rglob("*"):
        assert not file.is_file() or key.encode() not in file.read_bytes(), file
    assert all(hub_name in name for name, _ in server.sent)
    assert all(key.encode() not in ZstdDecompressor().decompress(blob) for _, blob in server.sent)
    assert key not in repr(model) + repr(vars(model)) + json.dumps(found.settings)


def test_the_key_goes_to_ndif_with_the_name_of_the_model(key: str, hub_name: str) -> None:
    model = dm.open_model(hub_name, backend="nnsight", remote=True, revision=None)
    backend = remote._backend(model)  # pyright: ignore[reportPrivateUsage]
    assert backend.api_key == key
    assert json.loads(backend.model_key.partition(":")[2])["repo_id"] == hub_name
    assert backend.env["attn_implementation"] == "eager"


def test_ndif_that_does_not_answer_is_one_sentence_without_the_key(
    key: str,
    hub_name: str,
    saes: dict[str, Any],
    tokens: tuple[Tokens, Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nnsight.schema.config import CONFIG

    model = dm.open_model(hub_name, backend="nnsight", remote=True)
    # Nobody listens at port 1.
    monkeypatch.setattr(CONFIG.API, "HOST", "http://127.0.0.1:1")
    monkeypatch.setattr(CONFIG.APP, "REMOTE_LOGGING", False)
    with pytest.raises(dm.Refusal, match="NDIF did not answer") as refused:
        dm.survey(model, {"gated": saes["gated"]}, *tokens, **OPTIONS)
    said = "".join(traceback.format_exception(refused.value))
    assert key not in said
    assert str(refused.value).count("\n") == 0


def test_refusals(
    elsewhere: Model,
    hub_name: str,
    tiny_model_folder: Path,
    tiny_model: Model,
    saes: dict[str, Any],
    tokens: tuple[Tokens, Tokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    with pytest.raises(dm.Refusal, match="There is no NDIF_API_KEY in the environment"):
        dm.open_model("openai-community/gpt2", backend="nnsight", remote=True)
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    model = dm.open_model(hub_name, backend="nnsight", remote=True)
    with pytest.raises(dm.Refusal, match="runs elsewhere"):
        model.logits(torch.zeros(1, 4, dtype=torch.int64))
    with pytest.raises(dm.Refusal, match="is no hub name"):
        dm.open_model(tiny_model_folder, backend="nnsight", remote=True)
    with pytest.raises(dm.Refusal, match="with backend='nnsight'; pass both"):
        dm.open_model(hub_name, remote=True)
    with pytest.raises(dm.Refusal, match="are not here to be centred"):
        dm.open_model(hub_name, backend="nnsight", remote=True, centred=True)
    corrected = dm.PursuitEncoder(saes["standard"])
    with pytest.raises(dm.Refusal, match="'pursuit' is a PursuitEncoder, expected one of"):
        dm.survey(elsewhere, {"pursuit": corrected}, *tokens, **OPTIONS)
    # Before anything is asked of anybody.
    monkeypatch.delenv("NDIF_API_KEY")
    with pytest.raises(dm.Refusal, match="There is no NDIF_API_KEY"):
        dm.survey(model, saes, *tokens, **OPTIONS)


def test_nan_that_comes_back_is_refused(
    elsewhere: Model, saes: dict[str, Any], tokens: tuple[Tokens, Tokens]
) -> None:
    broken = copy.deepcopy(saes["gated"])
    broken.b_dec.data[0] = torch.nan
    with pytest.raises(dm.Refusal, match="contexts 0 to 31 is NaN or infinite"):
        dm.survey(elsewhere, {"broken": broken}, *tokens, checkpoint_tokens=REQUEST, **OPTIONS)


def test_a_survey_that_was_cut_off_goes_on_and_gives_the_same(
    elsewhere: Model, saes: dict[str, Any], tokens: tuple[Tokens, Tokens], tmp_path: Path
) -> None:
    chosen = {"topk": saes["topk"]}
    options: dict[str, Any] = {**OPTIONS, "checkpoint_tokens": REQUEST}
    whole = dm.survey(elsewhere, chosen, *tokens, folder=tmp_path / "whole", **options)
    request = remote._request
    for allowed in (1, 2):
        answers = iter(range(allowed))

        def until(*given: Any, answers: Iterator[int] = answers) -> Any:
            if next(answers, None) is None:
                raise KeyboardInterrupt
            return request(*given)

        with (
            mock.patch.object(remote, "_request", until),
            pytest.raises(KeyboardInterrupt),
        ):
            dm.survey(elsewhere, chosen, *tokens, folder=tmp_path / "cut", resume=True, **options)
    dm.survey(elsewhere, chosen, *tokens, folder=tmp_path / "cut", resume=True, **options)
    assert (tmp_path / "cut" / "table.csv").read_bytes() == (
        tmp_path / "whole" / "table.csv"
    ).read_bytes()
    assert len(whole.table) == 1


def test_the_command(
    key: str,
    hub_name: str,
    elsewhere: Model,
    ordinary: Any,
    saes: dict[str, Any],
    tokens: tuple[Tokens, Tokens],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saes["topk"].save_model(tmp_path / "sae")
    whole = torch.cat([part.tokens for part in tokens])
    document = torch.cat([part.document for part in tokens])
    save_file({"tokens": whole, "document": document}, tmp_path / "tokens.safetensors")
    out = tmp_path / "out"
    named = ["survey", "--model", hub_name, "--sae", str(tmp_path / "sae"), "--skip", str(SKIP)]
    named += ["--tokens-file", str(tmp_path / "tokens.safetensors"), "--out", str(out), "--remote"]
    named += ["--resamples", "20", "--no-report"]
    assert main(named) == 2
    assert "pass both" in capsys.readouterr().err
    named += ["--backend", "nnsight"]
    with serving(elsewhere) as server:
        assert main(named) == 0
    assert len(server.sent) == 2
    found = dm.Survey.load(out).table.iloc[0]
    # Documents in another order are split otherwise, but drawn from the same tokens.
    assert found["fvu"] == pytest.approx(ordinary.table.loc["topk", "fvu"], rel=0.1)
    assert key not in "".join(capsys.readouterr())
    monkeypatch.delenv("NDIF_API_KEY")
    assert main([*named, "--force"]) == 2
    assert "There is no NDIF_API_KEY" in capsys.readouterr().err
    assert main(["survey", "--suite", "pydocs", "--remote", "--out", str(tmp_path / "new")]) == 2
    assert "name its model with --model" in capsys.readouterr().err

"""Detection scoring: groups and scores by hand, judges on planted rules, replies of all kinds."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from darkmatter._refusal import Refusal
from darkmatter.interpretation import (
    GROUPS,
    Answer,
    Context,
    Detection,
    EndpointJudge,
    LocalJudge,
    OfflineJudge,
    Sampling,
    Text,
    UnusableReply,
    activation_of,
    clues_of,
    deciles,
    detect,
    eligible_latents,
    kind_of,
    read_list,
    vocabulary_pieces,
)
from darkmatter.sparse import SparseCode
from tests.conftest import VOCABULARY, write_tokenizer

PIECES = ("\n", " the", " cat", " sat", "(", " 42", "Name", "  ", ".")


def text_of(token: Sequence[int], document: Sequence[int] | None = None) -> Text:
    """Rows of neighbouring positions, one context a document."""
    numbers = torch.tensor(document if document else [0] * len(token))
    return Text(torch.tensor(token), torch.arange(len(token)), numbers, PIECES)


def random_text(n: int, seed: int, documents: int = 20) -> Text:
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(len(PIECES), (n,), generator=generator)
    document = torch.arange(n) * documents // n
    return Text(token, torch.arange(n), document, PIECES)


# ------------------------------------------------------------------------------------- contexts


def test_context_is_marked_and_ends_with_its_document() -> None:
    text = text_of([1, 2, 3, 0, 1, 2], [0, 0, 0, 0, 1, 1])
    assert str(text.context(2, before=5, after=5)) == " the cat<< sat>>\\n"
    assert str(text.context(2, before=1, after=0)) == " cat<< sat>>"
    assert str(text.context(4, before=5, after=5)) == "<< the>> cat"


def test_context_ends_where_tokens_were_masked() -> None:
    text = Text(torch.tensor([1, 2, 3]), torch.tensor([4, 6, 7]), torch.zeros(3).long(), PIECES)
    assert text.context(2).pieces == (" cat", " sat")


def test_refusals_of_texts(unchecked: None) -> None:
    with pytest.raises(Refusal, match="marked is 3 in a context of 2"):
        Context((" a", " b"), 3)
    with pytest.raises(Refusal, match="one shape"):
        Text(torch.tensor([1, 2]), torch.tensor([0]), torch.tensor([0, 0]), PIECES)
    with pytest.raises(Refusal, match="of the 9 pieces"):
        text_of([1, 99])
    with pytest.raises(Refusal, match="row is 7"):
        text_of([1, 2]).context(7)


def test_pieces_are_the_text_of_each_id(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    pieces = vocabulary_pieces(tokenizer, VOCABULARY)
    ids = tokenizer("the cat sat")["input_ids"]
    assert "".join(pieces[i] for i in ids) == "the cat sat"


@pytest.mark.parametrize(
    ("piece", "kind"),
    [
        ("\n\n", "line break"),
        ("   ", "blank"),
        (" 42", "number"),
        ("42", "number, no space before"),
        (" SELF", "word in capitals"),
        (" Self", "capitalised word"),
        ("_name", "lower-case word, no space before"),
        (" A", "capitalised word"),
        ("().", "punctuation"),
        ("", "nothing"),
    ],
)
def test_kinds(piece: str, kind: str) -> None:
    assert kind_of(piece) == kind


def test_clues_see_the_line_and_not_what_follows() -> None:
    seen = clues_of(Context((" cat", "\n", "  ", " the", " sat"), 3))
    assert "first in its line" in seen
    assert {"token ' the'", "one before '  '", "two before '\\n'", "earlier 'cat'"} <= set(seen)
    assert not any("sat" in clue for clue in seen)
    # The start of a window is not the start of a line.
    assert "first in its line" not in clues_of(Context(("  ", " the"), 1))


# -------------------------------------------------------------------------------------- deciles


@settings(max_examples=30, deadline=None)
@given(active=st.integers(40, 200), per_decile=st.integers(1, 4), seed=st.integers(0, 99))
def test_deciles_are_even_and_in_order(active: int, per_decile: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    activation = torch.zeros(300)
    places = torch.randperm(300, generator=generator)[:active]
    activation[places] = torch.rand(active, generator=generator) + 0.1
    rows, group = deciles(activation, per_decile, generator)
    assert torch.bincount(group, minlength=11)[1:].tolist() == [per_decile] * 10
    assert len(rows.unique()) == len(rows)
    assert (activation[rows] > 0).all()
    for q in range(1, 10):
        weaker, stronger = activation[rows[group == q]], activation[rows[group == q + 1]]
        assert weaker.max() < stronger.min()


def test_deciles_refuse_what_has_none(unchecked: None) -> None:
    generator = torch.Generator()
    with pytest.raises(Refusal, match="never active in 50 rows"):
        deciles(torch.zeros(50), 1, generator)
    with pytest.raises(Refusal, match="active in 9 rows, expected at least 10"):
        deciles(torch.cat([torch.arange(1.0, 10), torch.zeros(9)]), 1, generator)
    with pytest.raises(Refusal, match="one value in all 50 rows"):
        deciles(torch.ones(50), 1, generator)
    with pytest.raises(Refusal, match="finite"):
        deciles(torch.full((20,), math.nan), 1, generator)


def test_activation_and_eligible_latents() -> None:
    code = SparseCode(
        torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.5, 0.0]]), torch.tensor([[2, 1], [2, 0], [2, 0]])
    )
    assert activation_of(code, 2).tolist() == [1.0, 3.0, 0.5]
    # Padding is of index 0 and value 0: latent 0 never fires.
    assert activation_of(code, 0).tolist() == [0.0, 0.0, 0.0]
    assert eligible_latents(code, 4, at_least=1).tolist() == [1, 2]
    assert eligible_latents(code, 4, at_least=1, at_most=2).tolist() == [1]


# ---------------------------------------------------------------------------------- offline judge


def contexts(text: Text, rows: torch.Tensor) -> list[Context]:
    return [text.context(row) for row in rows.tolist()]


def test_offline_judge_is_penalised_logistic_regression() -> None:
    """At the optimum the gradient of the penalised likelihood vanishes, and sum of errors is 0."""
    text = random_text(200, seed=1)
    examples = [text.context(row) for row in range(20, 60)]
    rule = OfflineJudge(penalty=0.7).learn(examples[:15], examples[15:])
    miss = [
        float(i < 15) - 1 / (1 + math.exp(-rule.score(context)))
        for i, context in enumerate(examples)
    ]
    # Newton stops at 1e-10 in the dual; a handful of clues add up in a gradient.
    assert sum(miss) == pytest.approx(0, abs=1e-7)
    for clue, weight in rule.weights.items():
        gradient = sum(m for m, c in zip(miss, examples, strict=True) if clue in clues_of(c))
        assert gradient == pytest.approx(0.7 * weight, abs=1e-7)


def test_offline_judge_generalises_a_rule_to_unseen_documents() -> None:
    learn, held = random_text(3000, seed=2), random_text(3000, seed=3)

    def active(text: Text) -> torch.Tensor:
        """Active at " cat" after "("."""
        after = torch.cat([torch.tensor([False]), text.token[:-1] == 4])
        return (text.token == 2) & after

    on, off = (m.nonzero()[:, 0] for m in (active(learn), ~active(learn)))
    rule = OfflineJudge().learn(contexts(learn, on[:20]), contexts(learn, off[:200]))
    assert "token ' cat'" in rule.text
    assert "one before '('" in rule.text
    truth = active(held)
    rows = torch.cat([truth.nonzero()[:30, 0], (~truth).nonzero()[:300, 0]])
    said = torch.tensor([bool(a.active) for a in rule.detect(contexts(held, rows))])
    # A tenth of the silent ones are " cat" elsewhere or another token after "(": hard for a rule
    # learnt from 20 examples, and still nearly all are right.
    assert (said == truth[rows]).float().mean() > 0.93


def test_offline_judge_is_deterministic_and_refuses_too_few() -> None:
    text = random_text(100, seed=4)
    examples = [text.context(row) for row in range(40)]
    first, second = (OfflineJudge().learn(examples[:20], examples[20:]) for _ in range(2))
    assert first == second
    with pytest.raises(Refusal, match="1 active and 20 silent"):
        OfflineJudge().learn(examples[:1], examples[20:])
    with pytest.raises(Refusal, match="penalty is 0"):
        OfflineJudge(penalty=0.0)


def test_a_rule_without_clues_says_so() -> None:
    same = [Context((" the",), 0)] * 4
    assert OfflineJudge().learn(same, same).text == "no clue speaks for activity"


# -------------------------------------------------------------------------------------- detection


class Scripted:
    """A judge that answers by a function of the context's marked piece."""

    fault = None
    text = "scripted"

    def __init__(self, answer: Callable[[str], Answer]) -> None:
        self.answer = answer

    def learn(self, active: Sequence[Context], inactive: Sequence[Context]) -> Scripted:
        return self

    def detect(self, contexts: Sequence[Context]) -> list[Answer]:
        return [self.answer(context.pieces[context.marked]) for context in contexts]


def by_token(text: Text, latents: dict[int, int], seed: int = 0) -> SparseCode:
    """Latent l is active, at a random value, wherever the token is latents[l]."""
    generator = torch.Generator().manual_seed(seed)
    fires = torch.stack([text.token == token for token in latents.values()], 1)
    values = fires * (0.1 + torch.rand(fires.shape, generator=generator))
    return SparseCode(values, torch.tensor(list(latents)).expand(len(text), -1).clone())


SAMPLING = Sampling(examples=20, per_decile=3, silent=30)


def planted(judge: Any, sampling: Sampling = SAMPLING) -> Detection:
    learn, held = random_text(4000, seed=5), random_text(4000, seed=6)
    latents = {10: 1, 11: 2, 12: 6, 13: 8}
    codes = by_token(learn, latents), by_token(held, latents)
    return detect(judge, (codes[0], learn), (codes[1], held), list(latents), sampling)


def test_planted_token_latents_are_detected() -> None:
    found = planted(OfflineJudge())
    assert found.balanced().value == 1.0
    assert {share.value for share in found.by_group().values()} == {1.0}
    assert "token ' cat'" in found.rules[11]
    assert not found.faults


def test_shuffled_latents_are_at_chance() -> None:
    """Activations that belong to other tokens: nothing generalises, the score is one half."""
    learn, held = random_text(4000, seed=5), random_text(4000, seed=6)
    latents = {latent: latent % len(PIECES) for latent in range(20)}
    generator = torch.Generator().manual_seed(7)
    codes: list[SparseCode] = []
    for text in (learn, held):
        code, order = by_token(text, latents), torch.randperm(len(text), generator=generator)
        codes.append(SparseCode(code.values[order], code.indices))
    found = detect(OfflineJudge(), (codes[0], learn), (codes[1], held), list(latents), SAMPLING)
    # 20 latents x 60 answers: the standard error is 1 / (2 sqrt(1200)), 0.015; four of them.
    assert found.balanced().value == pytest.approx(0.5, abs=0.06)


def test_always_active_is_chance() -> None:
    found = planted(Scripted(lambda piece: Answer(True)))
    shares = found.by_group()
    assert [shares[name].value for name in GROUPS] == [1.0] * 10 + [0.0]
    assert tuple(found.balanced()) == (0.5, 0.5, 0.5)


def test_groups_and_counts_of_questions() -> None:
    found = planted(OfflineJudge())
    for latent in (10, 11, 12, 13):
        mine = found.group[found.latent == latent]
        assert torch.bincount(mine, minlength=11).tolist() == [30] + [3] * 10
    again = planted(OfflineJudge())
    assert torch.equal(found.row, again.row)
    other = planted(OfflineJudge(), Sampling(examples=20, per_decile=3, silent=30, seed=1))
    assert not torch.equal(found.row, other.row)


def test_faults_count_as_wrong_or_are_left_out() -> None:
    """ " cat" is refused; the rest is right: one latent of four has no answers in its deciles."""

    def answer(piece: str) -> Answer:
        return Answer(None, "refused") if piece == " cat" else Answer(piece in PIECES[1:])

    found = planted(Scripted(answer))
    refused_silent = sum(
        a.fault is not None and g == 0
        for a, g in zip(found.answers, found.group.tolist(), strict=True)
    )
    assert found.faults == {"refused": 30 + refused_silent}
    assert found.by_group("wrong")["Q5"].value == 0.75
    assert found.by_group("left out")["Q5"].value == 1.0
    said_silent = sum(a.active is False for a in found.answers)
    assert found.by_group("wrong")["Not"].value == pytest.approx(said_silent / 120)
    assert found.by_group("left out")["Not"].value == pytest.approx(
        said_silent / (120 - refused_silent)
    )


def test_no_usable_answer_at_all_is_no_score() -> None:
    found = planted(Scripted(lambda piece: Answer(None, "empty")))
    assert found.faults == {"empty": 240}
    assert math.isnan(found.balanced("left out").value)
    assert found.balanced("wrong").value == 0.0
    assert math.isnan(found.by_group("left out")["Q1"].value)


def test_intervals_over_latents_are_those_of_a_hand_made_bootstrap() -> None:
    """Two latents right, two wrong, equal sizes: a resample is a binomial of four over four."""
    right = {" the", " cat"}
    found = planted(Scripted(lambda piece: Answer(piece in right)))
    share = found.by_group(over="latents")["Q7"]
    assert share.value == 0.5
    # P(0 of 4) = 1/16 is more than the tail of 2.5 %, so the interval is the whole range.
    assert (share.low, share.high) == (0.0, 1.0)
    by_document = found.by_group(over="documents")["Q7"]
    assert by_document.value == 0.5
    assert 0.0 <= by_document.low < 0.5 < by_document.high <= 1.0


def test_latents_that_cannot_be_judged_are_named() -> None:
    learn, held = random_text(2000, seed=5), random_text(2000, seed=6)
    codes = by_token(learn, {1: 1, 2: 2}), by_token(held, {1: 1, 2: 2})
    found = detect(OfflineJudge(), (codes[0], learn), (codes[1], held), [1, 5, 2], SAMPLING)
    assert list(found.rules) == [1, 2]
    assert "never active" in found.skipped[5]
    always = SparseCode(torch.rand(2000, 1) + 0.1, torch.full((2000, 1), 3))
    with pytest.raises(Refusal, match=r"None of 1 latents.*silent in 0 rows"):
        detect(OfflineJudge(), (always, learn), (always, held), [3], SAMPLING)


def test_refusals_of_detect(unchecked: None) -> None:
    text = random_text(2000, seed=5)
    code = by_token(text, {1: 1})
    short = random_text(100, seed=5)
    with pytest.raises(Refusal, match="code of held has 2000 rows and its text 100"):
        detect(OfflineJudge(), (code, text), (code, short), [1], SAMPLING)
    with pytest.raises(Refusal, match="0 latents"):
        detect(OfflineJudge(), (code, text), (code, text), [], SAMPLING)
    with pytest.raises(Refusal, match="2 latents, 1 of them different"):
        detect(OfflineJudge(), (code, text), (code, text), [1, 1], SAMPLING)
    with pytest.raises(Refusal, match="at least 2, 1 and 1"):
        Sampling(examples=1)
    with pytest.raises(Refusal, match="expected at least 0"):
        Sampling(before=-1)
    with pytest.raises(Refusal, match="exactly one of them"):
        Answer(None)
    with pytest.raises(Refusal, match='"wrong" or "left out"'):
        planted(OfflineJudge()).balanced("dropped")  # type: ignore[arg-type]

    class Terse(Scripted):
        def detect(self, contexts: Sequence[Context]) -> list[Answer]:
            return [Answer(True)]

    with pytest.raises(Refusal, match="1 answers to 60 questions"):
        planted(Terse(lambda piece: Answer(True)))


# --------------------------------------------------------------------------------------- replies


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("[1, 0, 1]", [True, False, True]),
        ("The answer is [1,0,1].", [True, False, True]),
        ("", "empty"),
        ("  \n", "empty"),
        ("[1, 0]", "malformed"),
        ("1, 0, 1", "malformed"),
        ("[1, 0, 2]", "malformed"),
        ("[1, 0, 1] or rather [0, 0, 0]", "malformed"),
        ("I'm sorry, but I cannot help with that.", "refused"),
        ("I can’t judge this.", "refused"),
        ("Sorry, here it is: [1, 0, 1]", [True, False, True]),
    ],
)
def test_replies_are_read_or_named(reply: str, answer: list[bool] | str) -> None:
    three = [Context((" the",), 0)] * 3
    if isinstance(answer, list):
        assert read_list(reply, three) == answer
    else:
        with pytest.raises(UnusableReply) as raised:
            read_list(reply, three)
        assert raised.value.fault == answer


# -------------------------------------------------------------------------------- endpoint judge


class Server:
    """Speaks the chat-completions protocol; `reply` makes (status, body) of a request.

    With `drip` the body is sent byte by byte, so many seconds apart.
    """

    def __init__(
        self, reply: Callable[[dict[str, Any]], tuple[int, Any]], kind: str, drip: float
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[Message] = []
        self.paths: list[str] = []
        self.reply, self.kind, self.drip = reply, kind, drip
        self.url = ""


@contextmanager
def serving(
    reply: Callable[[dict[str, Any]], tuple[int, Any]],
    kind: str = "application/json",
    drip: float = 0.0,
) -> Iterator[Server]:
    server = Server(reply, kind, drip)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.requests.append(request)
            server.headers.append(self.headers)
            server.paths.append(self.path)
            status, body = server.reply(request)
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            # A client that gave up has closed the connection.
            with suppress(ConnectionError):
                self.answer(status, sent)

        def answer(self, status: int, sent: bytes) -> None:
            self.send_response(status)
            if status in (302, 307):
                self.send_header("Location", f"{server.url}/elsewhere")
            # So that the client does not pause before it asks again.
            self.send_header("Retry-After-Ms", "1")
            self.send_header("Content-Type", server.kind)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            for part in [bytes([byte]) for byte in sent] if server.drip else [sent]:
                self.wfile.write(part)
                time.sleep(server.drip)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        # The poll is how long `shutdown` waits.
        threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield server
        finally:
            http.shutdown()


def saying(content: Any, ended: str = "stop", **more: Any) -> tuple[int, Any]:
    message = {"role": "assistant", "content": content} | more
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": ended}]}


def honest(request: dict[str, Any]) -> tuple[int, Any]:
    """A model that knows the rule: the marked token is the one of the first active example."""
    question = request["messages"][-1]["content"]
    if "In one sentence" in question:
        marked = question.split("<<")[1].split(">>")[0]
        return saying(f"The latent is active\nat {marked!r}.")
    rule = question.split("'")[1]
    lines = [line for line in question.splitlines() if "<<" in line]
    return saying(str([int(f"<<{rule}>>" in line) for line in lines]))


def endpoint(server: Server, **more: Any) -> EndpointJudge:
    return EndpointJudge("test-model", server.url, key="secret", **more)


def test_endpoint_judge_learns_and_detects_over_the_protocol() -> None:
    with serving(honest) as server:
        judge = endpoint(server, at_once=7)
        found = planted(judge)
    assert found.balanced().value == 1.0
    assert not found.faults
    assert found.rules[11] == "The latent is active at ' cat'."
    # For each of 4 latents: one explanation and 60 questions, 7 at a time.
    assert len(server.requests) == 4 * (1 + 9)
    request = server.requests[1]
    assert (request["model"], request["temperature"]) == ("test-model", 0)
    assert [m["role"] for m in request["messages"]] == ["system", "user"]
    assert request["messages"][1]["content"].count("<<") == 7
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert set(server.paths) == {"/v1/chat/completions"}
    assert "secret" not in repr(judge)


def test_endpoint_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(lambda request: saying("[1]")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url + "/")
        monkeypatch.setenv("OPENAI_API_KEY", "from-environment")
        assert EndpointJudge("m").ask("?") == "[1]"
        monkeypatch.delenv("OPENAI_API_KEY")
        assert EndpointJudge("m").ask("?") == "[1]"
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == ["Bearer from-environment", "Bearer none"]
    monkeypatch.delenv("OPENAI_BASE_URL")
    with pytest.raises(Refusal, match="set OPENAI_BASE_URL"):
        EndpointJudge("m")


def failing(status: int, code: object = None) -> tuple[int, Any]:
    return status, {"error": {"message": "no", "type": "error", "code": code}}


@pytest.mark.parametrize(
    ("reply", "fault", "requests"),
    [
        (saying("I cannot say."), "refused", 1),
        (saying(None, refusal="No."), "refused", 1),
        (saying("[1, 1, 1]", ended="content_filter"), "refused", 1),
        (failing(400, "content_filter"), "refused", 1),
        (failing(400, "context_length_exceeded"), "too long", 1),
        (saying(""), "empty", 1),
        (saying(None), "empty", 1),
        (saying("yes"), "malformed", 1),
        (failing(500), "failed", 3),
        (failing(503, ["odd"]), "failed", 3),
        (failing(429), "failed", 3),
        (failing(408), "failed", 3),
        (failing(400, 400), "failed", 1),
        (failing(401), "failed", 1),
        (failing(404), "failed", 1),
        ((500, {"error": "down"}), "failed", 3),
        ((400, ["?"]), "failed", 1),
        ((302, {}), "failed", 1),
        ((307, {}), "failed", 1),
        ((200, {}), "failed", 1),
        ((200, {"choices": []}), "failed", 1),
        ((200, {"choices": None}), "failed", 1),
        ((200, {"choices": [{"message": "yes"}]}), "failed", 1),
        ((200, {"choices": [None]}), "failed", 1),
        ((200, ["?"]), "failed", 1),
        ((200, 7), "failed", 1),
        ((200, b"<html>"), "failed", 1),
        ((200, b"\xff{"), "failed", 1),
        ((200, b""), "failed", 1),
    ],
)
def test_every_kind_of_bad_reply_is_counted(
    reply: tuple[int, Any], fault: str, requests: int
) -> None:
    def answer(request: dict[str, Any]) -> tuple[int, Any]:
        explain = "In one sentence" in request["messages"][-1]["content"]
        return saying("At commas.") if explain else reply

    with serving(answer) as server:
        rule = endpoint(server, retries=2).learn([Context((",",), 0)] * 2, [Context((".",), 0)] * 2)
        answers = rule.detect([Context((",",), 0)] * 3)
    assert [a.fault for a in answers] == [fault] * 3
    assert len(server.requests) == 1 + requests
    assert set(server.paths) == {"/v1/chat/completions"}


def test_a_page_instead_of_an_answer_is_a_failure() -> None:
    with serving(lambda request: (200, b"<html>"), kind="text/html") as server:
        with pytest.raises(UnusableReply, match="failed"):
            endpoint(server).ask("?")
        assert len(server.requests) == 1


def test_a_terse_completion_is_enough() -> None:
    """Local servers leave out fields that OpenAI's own always sends."""
    body = {"choices": [{"message": {"content": "[1]"}}]}
    with serving(lambda request: (200, body)) as server:
        assert endpoint(server).ask("?") == "[1]"


def test_a_failure_that_passes_is_tried_again() -> None:
    replies = iter([(503, {}), saying("[1]")])
    with serving(lambda request: next(replies)) as server:
        assert endpoint(server).ask("?") == "[1]"


def test_slow_replies_are_tried_again_and_counted() -> None:
    came, answer = threading.Semaphore(0), threading.Event()

    def late(request: dict[str, Any]) -> tuple[int, Any]:
        came.release()
        answer.wait(60)
        return saying("[1]")

    with serving(late) as server:
        with pytest.raises(UnusableReply, match="slow"):
            endpoint(server, timeout=0.2, retries=1).ask("?")
        # A busy server may read the second request after the client gave it up.
        assert came.acquire(timeout=60)
        assert came.acquire(timeout=60)
        answer.set()
        assert not came.acquire(timeout=0.1)


def test_a_reply_that_comes_in_drips_is_slow() -> None:
    """No single read takes as long as the limit; read to its end, the reply is "failed"."""
    blank = (200, b" " * 100)
    with (
        serving(lambda request: blank, drip=0.01) as server,
        pytest.raises(UnusableReply, match="slow"),
    ):
        endpoint(server, timeout=0.2, retries=0).ask("?")


def test_no_server_is_a_failure() -> None:
    with serving(honest) as server:
        judge = endpoint(server, retries=0)
    with pytest.raises(UnusableReply, match="failed"):
        judge.ask("?")


def test_without_a_rule_nothing_is_asked_and_everything_counted() -> None:
    with serving(lambda request: saying("")) as server:
        found = planted(endpoint(server))
    assert len(server.requests) == 4
    assert found.faults == {"no rule": 240}
    assert found.rule_faults == {"empty": 4}
    assert found.balanced("wrong").value == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"base_url": "ftp://there/v1"}, "http or https"),
        ({"base_url": "file:///etc/passwd"}, "http or https"),
        ({"base_url": "http://x/v1", "timeout": 0}, "above 0"),
        ({"base_url": "http://x/v1", "at_once": 0}, "at least one context"),
        ({"base_url": "http://x/v1", "retries": -1}, "retries is -1"),
    ],
)
def test_endpoint_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(Refusal, match=message):
        EndpointJudge("m", **arguments)


# ----------------------------------------------------------------------------------- local judge


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for a prompt; the tokenizer is of bytes, so prompts are long."""
    import transformers

    folder = tmp_path_factory.mktemp("roomy")
    config = transformers.GPT2Config(
        n_positions=3000, n_embd=16, n_layer=1, n_head=2, vocab_size=VOCABULARY
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


FEW = [Context((" the", " cat"), 1)] * 3


def test_local_judge_counts_what_a_random_model_says(roomy_model: Path) -> None:
    judge = LocalJudge(roomy_model, max_tokens=4)
    rule = judge.learn(FEW, FEW)
    assert rule.fault in (None, "empty")
    answers = rule.detect(FEW)
    assert {a.fault for a in answers} <= {"malformed", "empty", "no rule"}
    assert judge.ask("same") == judge.ask("same")


def test_local_judge_says_when_a_question_does_not_fit(tiny_model_folder: Path) -> None:
    rule = LocalJudge(tiny_model_folder).learn(FEW, FEW)
    assert rule.fault == "too long"
    assert [a.fault for a in rule.detect(FEW)] == ["no rule"] * 3


def test_local_judge_counts_slow_answers(roomy_model: Path) -> None:
    with pytest.raises(UnusableReply, match="slow"):
        LocalJudge(roomy_model, timeout=1e-9, max_tokens=4).ask("?")


def test_local_judge_uses_the_chat_template(roomy_model: Path) -> None:
    judge = LocalJudge(roomy_model, max_tokens=1)
    plain = judge._ids("hello")
    judge._tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}"
    )
    decoded = judge._tokenizer.decode(judge._ids("hello")[0])
    assert decoded.startswith("system:You study one latent")
    assert decoded.endswith("user:hello")
    assert not torch.equal(plain, judge._ids("hello"))


def test_local_judge_refusals(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=r"holds no config\.json"):
        LocalJudge(tmp_path)
    with pytest.raises(Refusal, match="max_tokens is 0"):
        LocalJudge(tmp_path, max_tokens=0)

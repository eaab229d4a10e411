"""Detection scoring: can a latent be told from text alone?

    learn    a judge sees contexts where the latent is active and where it is not, and makes a rule
    detect   for unseen contexts it says whether the latent is active at the marked token

The active contexts are dealt into ten equal groups by activation, Q1 (weakest) to Q10 (strongest),
"Not" holds contexts where the latent is silent, and each group is scored by its share of right
answers.  A judge that says "active" at any constant rate scores 1/2 in balanced accuracy,

    ( mean over Q1..Q10 of share right  +  share right in Not ) / 2 ,

so that is chance.  A judge is anything with `learn`: `OfflineJudge` fits a rule by arithmetic,
`EndpointJudge` and `LocalJudge` ask a language model.  An answer that cannot be used is counted by
its kind, and every score can be read with such answers as wrong or left out.

Sources: Paulo, Mallen, Juang and Belrose, "Automatically Interpreting Millions of Features in Large
Language Models" (2410.13928): detection scoring; Engels, Smith and Tegmark, TMLR 2025, section on
SAEs trained on error parts: deciles, random negatives.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import time
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from darkmatter._files import understood
from darkmatter._refusal import Refusal
from darkmatter.intervals import Interval, bootstrap, document_sums
from darkmatter.sparse import SparseCode

Fault = Literal["empty", "malformed", "refused", "slow", "failed", "too long", "no rule"]
"""Why an answer cannot be used.

empty: no text came; malformed: text that is not of the asked form; refused: the model declined;
slow: no answer within the time limit; failed: the transport or the server failed; too long: the
question does not fit the model; no rule: nothing was asked, as no rule could be had.
"""

Faulty = Literal["wrong", "left out"]
NOT = 0
DECILES = tuple(range(1, 11))
GROUPS = ("Q1", "Q2", "Q3", "Q4", "Q5", "Q6", "Q7", "Q8", "Q9", "Q10", "Not")

# All that a language model is told. {examples}, {rule}, {count} and {contexts} are filled in.
SYSTEM_PROMPT = (
    "You study one latent of a sparse autoencoder that reads a language model. The latent is "
    "active at some tokens of a text and silent at others. In each context one token is marked "
    "<<like this>>. Only the marked token and the text before it can matter."
)
EXPLAIN_PROMPT = (
    "Contexts where the latent is active at the marked token:\n{active}\n\n"
    "Contexts where it is silent at the marked token:\n{inactive}\n\n"
    "In one sentence, say when the latent is active."
)
DETECT_PROMPT = (
    "A rule for when the latent is active: {rule}\n\n"
    "{contexts}\n\n"
    "For each of the {count} contexts, is the latent active at the marked token? Answer with a "
    "list of {count} numbers and nothing else, 1 for active and 0 for silent, like {example}."
)
_DECLINED = re.compile(r"\s*(i'?m sorry|i am sorry|sorry,|i can(no|'|’)t|i cannot|as an ai)", re.I)
_LIST = re.compile(r"\[\s*([01](?:\s*,\s*[01])*)\s*\]")


@dataclass(frozen=True)
class Context:
    """Pieces of text, one a token, and which of them is asked about."""

    pieces: tuple[str, ...]
    marked: int

    def __post_init__(self) -> None:
        if not 0 <= self.marked < len(self.pieces):
            raise Refusal(
                f"marked is {self.marked} in a context of {len(self.pieces)} pieces, expected the "
                "index of one of them."
            )

    def __str__(self) -> str:
        """The text with the token in question <<marked>>, line breaks written as \\n."""
        before, after = self.pieces[: self.marked], self.pieces[self.marked + 1 :]
        text = "".join((*before, "<<", self.pieces[self.marked], ">>", *after))
        return text.replace("\n", "\\n")


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of n rows of activations, so that a row can be shown in its context.

    token, position and document as in `activations.Batch`, in the order of the text; pieces[t] is
    the text of token id t.  Raises Refusal for lengths that differ or a token without a piece.
    """

    token: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    document: Int64[Tensor, " n"]
    pieces: tuple[str, ...]

    def __post_init__(self) -> None:
        shapes = [tuple(t.shape) for t in (self.token, self.position, self.document)]
        if len(set(shapes)) > 1 or self.token.ndim != 1 or len(self.token) == 0:
            raise Refusal(
                f"token, position and document have shapes {shapes}, expected one shape [n] with n "
                "of at least 1; take the three of one Batch."
            )
        if int(self.token.min()) < 0 or int(self.token.max()) >= len(self.pieces):
            raise Refusal(
                f"tokens run from {int(self.token.min())} to {int(self.token.max())}, expected ids "
                f"of the {len(self.pieces)} pieces; pass the pieces of the whole vocabulary."
            )

    def __len__(self) -> int:
        return len(self.token)

    def context(self, row: int, before: int = 12, after: int = 3) -> Context:
        """The token of a row, up to `before` tokens before it and `after` after it.

        The window ends where the context does, or where tokens were masked.
        """
        if not 0 <= row < len(self):
            raise Refusal(f"row is {row}, expected 0 to {len(self) - 1}, a row of this text.")
        first, last = row, row
        while row - first < before and self._joined(first - 1):
            first -= 1
        while last - row < after and self._joined(last):
            last += 1
        pieces = tuple(self.pieces[t] for t in self.token[first : last + 1].tolist())
        return Context(pieces, row - first)

    def _joined(self, row: int) -> bool:
        """Whether row and row + 1 are neighbours in one context."""
        return (
            0 <= row < len(self) - 1
            and int(self.position[row + 1]) == int(self.position[row]) + 1
            and int(self.document[row + 1]) == int(self.document[row])
        )


def vocabulary_pieces(tokenizer: Any, size: int) -> tuple[str, ...]:
    """The text of every token id of a tokenizer, by itself."""
    return tuple(str(tokenizer.decode([token])) for token in range(size))


@dataclass(frozen=True)
class Answer:
    """What a judge says of one context: active or not, or None and the kind of fault."""

    active: bool | None
    fault: Fault | None = None

    def __post_init__(self) -> None:
        if (self.active is None) != (self.fault is not None):
            raise Refusal(
                f"an answer has active={self.active} and fault={self.fault!r}, expected exactly "
                "one of them; a fault has no answer."
            )


@runtime_checkable
class Rule(Protocol):
    """What a judge has learnt of one latent. `fault` is set when nothing could be learnt."""

    @property
    def text(self) -> str: ...
    @property
    def fault(self) -> Fault | None: ...
    def detect(self, contexts: Sequence[Context]) -> list[Answer]:
        """One answer for each context, in order."""
        ...


@runtime_checkable
class Judge(Protocol):
    """Learns a rule from contexts where a latent is active and where it is silent."""

    def learn(self, active: Sequence[Context], inactive: Sequence[Context]) -> Rule: ...


# ---------------------------------------------------------------------------------- offline judge


def kind_of(piece: str) -> str:
    """The class of a token's text: what its characters are, and whether a space leads."""
    if piece == "":
        return "nothing"
    if "\n" in piece:
        return "line break"
    if piece.isspace():
        return "blank"
    core = piece.strip()
    if core.isdigit():
        kind = "number"
    elif core.replace("_", "a").isalnum():
        if core.isupper() and len(core) > 1:
            kind = "word in capitals"
        elif core[0].isupper():
            kind = "capitalised word"
        else:
            kind = "lower-case word"
    else:
        kind = "punctuation"
    return kind if piece[0].isspace() or kind == "punctuation" else f"{kind}, no space before"


def clues_of(context: Context) -> list[str]:
    """What the offline judge sees of a context, each a readable clue."""
    at = context.marked
    before = [*reversed(context.pieces[:at])]
    near = [*before[:2], "", ""]
    line: list[str] = [*itertools.takewhile(lambda piece: "\n" not in piece, before)]
    ends = len(line) < len(before)
    clues = [
        f"token {context.pieces[at]!r}",
        f"token is a {kind_of(context.pieces[at])}",
        f"one before {near[0]!r}",
        f"one before is a {kind_of(near[0])}",
        f"two before {near[1]!r}",
    ]
    if ends and all(piece.isspace() for piece in line):
        clues.append("first in its line")
    stripped = dict.fromkeys(piece.strip() for piece in before)
    return clues + [f"earlier {piece!r}" for piece in stripped if len(piece) > 1]


@dataclass(frozen=True)
class LearntRule:
    """Weights of clues: active where bias + sum of the weights of a context's clues is above 0."""

    bias: float
    weights: dict[str, float]
    fault: Fault | None = None

    @property
    def text(self) -> str:
        """The three clues that speak most for activity, and the one most against it."""
        ranked = sorted(self.weights.items(), key=lambda clue: (-clue[1], clue[0]))
        speak_for = [clue for clue, weight in ranked[:3] if weight > 0.05]
        against = [clue for clue, weight in ranked[-1:] if weight < -0.05]
        told = "active if " + " or ".join(speak_for) if speak_for else "no clue speaks for activity"
        return told + ("; silent if " + against[0] if against else "")

    def score(self, context: Context) -> float:
        """Log odds that the latent is active."""
        return self.bias + sum(self.weights.get(clue, 0.0) for clue in clues_of(context))

    def detect(self, contexts: Sequence[Context]) -> list[Answer]:
        return [Answer(self.score(context) > 0) for context in contexts]


@dataclass(frozen=True)
class OfflineJudge:
    """A judge without a language model: logistic regression on readable clues.

        P(active | context) = sigmoid( bias + sum of weights of the context's clues )
        weights = argmin  -log likelihood of the examples + penalty / 2 |weights|^2

    It sees the marked token and its class (word, capitals, number, punctuation, blank, line
    break), the two tokens before it, whether it stands first in its line, and which tokens came
    earlier in the window.  It does not see meaning: not that two words are synonyms, not syntax
    beyond two tokens, not counting, nothing outside the window and nothing after the token.  So
    its score is a lower bound on what text tells, and it favours latents of single tokens.

    It must generalise: a clue met once in the examples is given little weight, and one that was
    not met none.  Deterministic.  Raises Refusal for fewer than 2 examples of either sort.
    """

    penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.penalty < math.inf:
            raise Refusal(f"penalty is {self.penalty}, expected a finite number above 0, e.g. 1.0.")

    def learn(self, active: Sequence[Context], inactive: Sequence[Context]) -> LearntRule:
        """Newton's method on the dual, where the matrix is of examples, not of clues."""
        _enough(active, inactive)
        found = [clues_of(context) for context in (*active, *inactive)]
        names = sorted({clue for clues in found for clue in clues})
        column = {name: j for j, name in enumerate(names)}
        design = torch.zeros(len(found), len(names), dtype=torch.float64)
        for row, clues in enumerate(found):
            design[row, [column[clue] for clue in clues]] = 1
        target = torch.zeros(len(found), dtype=torch.float64)
        target[: len(active)] = 1
        dual, bias = _dual_logistic(design @ design.T, target, self.penalty)
        weights = (design.T @ dual).tolist()
        return LearntRule(bias, dict(zip(names, weights, strict=True)))


def _dual_logistic(
    kernel: Float[Tensor, "n n"], target: Float[Tensor, " n"], penalty: float
) -> tuple[Float[Tensor, " n"], float]:
    """a, b that minimise  -log likelihood(K a + b) + penalty / 2 a.K a,  by 25 Newton steps.

    At the optimum  penalty a = target - sigmoid(K a + b),  which each step linearises:
        (K + penalty R^-1) a + b = z,   sum a = 0,   with  R = p (1 - p),  z = f + (y - p) / R.
    """
    n = len(target)
    dual, bias = torch.zeros(n, dtype=torch.float64), 0.0
    system = torch.ones(n + 1, n + 1, dtype=torch.float64)
    system[n, n] = 0
    right = torch.zeros(n + 1, dtype=torch.float64)
    for _ in range(25):
        score = kernel @ dual + bias
        share = score.sigmoid()
        spread = (share * (1 - share)).clamp(min=1e-6)
        system[:n, :n] = kernel + torch.diag(penalty / spread)
        right[:n] = score + (target - share) / spread
        solved = torch.linalg.solve(system, right)
        moved = float((solved[:n] - dual).abs().max())
        dual, bias = solved[:n], float(solved[n])
        if moved < 1e-10:
            break
    return dual, bias


def _enough(active: Sequence[Context], inactive: Sequence[Context]) -> None:
    if len(active) < 2 or len(inactive) < 2:
        raise Refusal(
            f"There are {len(active)} active and {len(inactive)} silent examples, expected at "
            "least 2 of each; read more text or choose a latent that fires more often."
        )


# --------------------------------------------------------------------------- language-model judges


class UnusableReply(Exception):
    """A language model's reply cannot be used; `fault` says why."""

    def __init__(self, fault: Fault):
        super().__init__(fault)
        self.fault: Fault = fault


@dataclass(frozen=True)
class WrittenRule:
    """A rule in words, and the language model that applies it."""

    text: str
    ask: Callable[[str], str]
    at_once: int
    fault: Fault | None = None

    def detect(self, contexts: Sequence[Context]) -> list[Answer]:
        """Asks about `at_once` contexts at a time; an unusable reply counts for each of them."""
        if self.fault is not None:
            return [Answer(None, "no rule") for _ in contexts]
        answers: list[Answer] = []
        for start in range(0, len(contexts), self.at_once):
            part = contexts[start : start + self.at_once]
            try:
                answers += [Answer(said) for said in read_list(self.ask(self.question(part)), part)]
            except UnusableReply as unusable:
                answers += [Answer(None, unusable.fault) for _ in part]
        return answers

    def question(self, contexts: Sequence[Context]) -> str:
        """What is asked about some contexts."""
        example = str([i % 2 for i in range(len(contexts))])
        return DETECT_PROMPT.format(
            rule=self.text, contexts=_numbered(contexts), count=len(contexts), example=example
        )


def read_list(reply: str, contexts: Sequence[Context]) -> list[bool]:
    """The one list of 0 and 1 in a reply, of the length asked for; UnusableReply otherwise."""
    _refuse_empty(reply)
    lists = cast("list[str]", _LIST.findall(reply))
    if not lists and _DECLINED.match(reply):
        raise UnusableReply("refused")
    numbers = lists[0].split(",") if len(lists) == 1 else []
    if len(numbers) != len(contexts):
        raise UnusableReply("malformed")
    return [int(number) == 1 for number in numbers]


def _refuse_empty(reply: str) -> None:
    if not reply.strip():
        raise UnusableReply("empty")


def _numbered(contexts: Sequence[Context]) -> str:
    return "\n".join(f"{i}. {context}" for i, context in enumerate(contexts, start=1))


def _learn_in_words(
    ask: Callable[[str], str],
    at_once: int,
    active: Sequence[Context],
    inactive: Sequence[Context],
) -> WrittenRule:
    _enough(active, inactive)
    prompt = EXPLAIN_PROMPT.format(active=_numbered(active), inactive=_numbered(inactive))
    try:
        reply = ask(prompt)
        _refuse_empty(reply)
        if _DECLINED.match(reply):
            raise UnusableReply("refused")
    except UnusableReply as unusable:
        return WrittenRule("", ask, at_once, unusable.fault)
    # One line, so that a talkative rule cannot pose as a context.
    return WrittenRule(" ".join(reply.split()), ask, at_once)


def _check_question_size(at_once: int, timeout: float | int) -> None:
    if at_once < 1 or not 0 < timeout < math.inf:
        raise Refusal(
            f"at_once is {at_once} and timeout {timeout}, expected at least one context a question "
            "and a finite number of seconds above 0."
        )


# What the error codes of the protocol say of the question.
_FAULTS: dict[str, Fault] = {"content_filter": "refused", "context_length_exceeded": "too long"}


@dataclass(frozen=True)
class EndpointJudge:
    """A language model behind any endpoint that speaks OpenAI's chat-completions protocol.

    POST {base_url}/chat/completions at temperature 0, sent by the `openai` client.  `base_url` and
    `key` come from the arguments or from OPENAI_BASE_URL and OPENAI_API_KEY; where there is no key
    the word "none" is sent, which servers that want none ignore.

    Each attempt waits `timeout` seconds for a reply to begin and as long for it to end.  The client
    makes at most `retries` further attempts, after growing pauses, where nothing came (no
    connection, no reply in time) or the status is 408, 409, 429 or 5xx; no other status is asked
    again.  What then fails is counted, as is a redirect: questions go to no other address.

    Raises Refusal for a base_url that is missing or no http(s) address, or numbers out of range.
    """

    model: str
    base_url: str | None = None
    key: str | None = field(default=None, repr=False)
    timeout: float | int = 60.0
    retries: int = 2
    at_once: int = 5
    max_tokens: int = 256

    def __post_init__(self) -> None:
        _check_question_size(self.at_once, self.timeout)
        if self.retries < 0 or self.max_tokens < 1:
            raise Refusal(
                f"retries is {self.retries} and max_tokens {self.max_tokens}, expected at least 0 "
                "and 1."
            )
        address = urllib.parse.urlsplit(self._base())
        if address.scheme not in ("http", "https") or not address.netloc:
            raise Refusal(
                f"base_url is {self._base()!r}, expected an http or https address such as "
                "http://localhost:8000/v1; pass base_url or set OPENAI_BASE_URL."
            )

    def learn(self, active: Sequence[Context], inactive: Sequence[Context]) -> WrittenRule:
        return _learn_in_words(self.ask, self.at_once, active, inactive)

    def ask(self, prompt: str) -> str:
        """The reply to one question; UnusableReply when there is none."""
        import openai

        with openai.OpenAI(
            base_url=self._base(),
            api_key=self.key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=self.retries,
            http_client=openai.DefaultHttpxClient(
                follow_redirects=False, event_hooks={"response": [self._hurry]}
            ),
        ) as client:
            try:
                reply = client.chat.completions.create(
                    model=self.model,
                    temperature=0,
                    max_tokens=self.max_tokens,
                    messages=[
                        {"role": "system", "content": SYSTEM_PROMPT},
                        {"role": "user", "content": prompt},
                    ],
                )
            except openai.APIStatusError as error:
                fault = _FAULTS.get(str(error.code), "failed")
                # Some servers repeat the key that they refuse, and tracebacks go into logs.
                told = None if client.api_key in str(error) else error
                raise UnusableReply(fault) from told
            except (openai.OpenAIError, OSError, ValueError) as error:
                # ValueError: the body was no JSON.
                chain = (error, error.__cause__)
                late = any(isinstance(e, (openai.APITimeoutError, TimeoutError)) for e in chain)
                raise UnusableReply("slow" if late else "failed") from error
        return _content(reply)

    def _base(self) -> str:
        return (self.base_url or os.environ.get("OPENAI_BASE_URL", "")).rstrip("/")

    def _hurry(self, response: Any) -> None:
        """Limit the time of a body: the client's limit is for each read, and a server may drip."""
        deadline = time.monotonic() + self.timeout
        read: Callable[..., Iterator[bytes]] = response.iter_raw

        def in_time(chunk_size: int | None = None) -> Iterator[bytes]:
            for part in read(chunk_size):
                if time.monotonic() > deadline:
                    raise TimeoutError
                yield part

        response.iter_raw = in_time


def _content(reply: Any) -> str:
    """The text in a chat completion; UnusableReply when the model declined or it is none."""
    try:
        # The client does not check what it parsed, and a field that did not come is missing.
        choice = reply.choices[0]
        message = choice.message
        declined = message.refusal or getattr(choice, "finish_reason", None) == "content_filter"
        content = message.content or ""
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise UnusableReply("failed") from error
    if declined:
        raise UnusableReply("refused")
    return str(content)


class LocalJudge:
    """A causal language model from a local folder in Hugging Face format, decoded greedily.

    The tokenizer's chat template is used where it has one.  A question longer than the model's
    context, less the reply, is not cut but counted as "too long".  Raises Refusal when the folder
    holds no model or numbers are out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        device: str = "cpu",
        timeout: float | int = 60.0,
        at_once: int = 5,
        max_tokens: int = 64,
    ) -> None:
        _check_question_size(at_once, timeout)
        if max_tokens < 1:
            raise Refusal(f"max_tokens is {max_tokens}, expected at least 1.")
        if not (Path(folder) / "config.json").is_file():
            raise Refusal(
                f"{os.fspath(folder)} holds no config.json, expected a folder with a model in "
                "Hugging Face format; download one first."
            )
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Weights are safetensors; code that comes with a model is never run.
        with understood(folder, "a model in Hugging Face format"):
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False
            )
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        self._model = model.to(device).eval()
        self._device, self._timeout = device, timeout
        self._at_once, self._max_tokens = at_once, max_tokens

    def learn(self, active: Sequence[Context], inactive: Sequence[Context]) -> WrittenRule:
        return _learn_in_words(self.ask, self._at_once, active, inactive)

    @torch.inference_mode()
    def ask(self, prompt: str) -> str:
        """The reply to one question; UnusableReply when it is too long or takes too long."""
        ids = self._ids(prompt)
        room = getattr(self._model.config, "max_position_embeddings", None)
        if room is not None and ids.shape[1] + self._max_tokens > room:
            raise UnusableReply("too long")
        begun = time.monotonic()
        output = self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=self._max_tokens,
            max_time=float(self._timeout),
            pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
        )
        if time.monotonic() - begun > self._timeout:
            raise UnusableReply("slow")
        return str(self._tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))

    def _ids(self, prompt: str) -> Tensor:
        if self._tokenizer.chat_template:
            said = [
                {"role": "system", "content": SYSTEM_PROMPT},
                {"role": "user", "content": prompt},
            ]
            text = self._tokenizer.apply_chat_template(
                said, tokenize=False, add_generation_prompt=True
            )
        else:
            text = f"{SYSTEM_PROMPT}\n\n{prompt}\n"
        return self._tokenizer(text, return_tensors="pt")["input_ids"].to(self._device)


# --------------------------------------------------------------------------------------- detection


@dataclass(frozen=True)
class Sampling:
    """How many contexts are drawn for each latent.

    examples: active ones to learn from, and as many silent ones; per_decile: active ones to judge
    in each decile; silent: silent ones to judge; before, after: tokens shown around the marked one.
    """

    examples: int = 50
    per_decile: int = 10
    silent: int = 50
    before: int = 12
    after: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.examples < 2 or min(self.per_decile, self.silent) < 1:
            raise Refusal(
                f"examples is {self.examples}, per_decile {self.per_decile} and silent "
                f"{self.silent}, expected at least 2, 1 and 1."
            )
        if min(self.before, self.after) < 0:
            raise Refusal(f"before is {self.before} and after {self.after}, expected at least 0.")


@dataclass(frozen=True, eq=False)
class Detection:
    """Every answer of a judge on every latent.

    One entry a question: latent, row of the judged text, document of that row, group (1 to 10 for
    the deciles of activation, 0 where the latent is silent), and the answer.  `rules` holds what
    the judge said of each latent, `rule_faults` counts rules it could not give, `skipped` names
    latents that could not be judged, with the reason.
    """

    latent: Int64[Tensor, " q"]
    row: Int64[Tensor, " q"]
    document: Int64[Tensor, " q"]
    group: Int64[Tensor, " q"]
    answers: tuple[Answer, ...]
    rules: dict[int, str]
    rule_faults: Counter[str]
    skipped: dict[int, str]

    @property
    def faults(self) -> Counter[str]:
        """How many questions got no usable answer, by kind."""
        return Counter(answer.fault for answer in self.answers if answer.fault is not None)

    def by_group(
        self,
        faulty: Faulty = "wrong",
        over: Literal["latents", "documents"] = "latents",
        seed: int = 0,
    ) -> dict[str, Interval]:
        """Share of right answers in Q1 ... Q10 and Not, intervals from latents (or documents).

        NaN where fewer than two latents (documents) have an answer.
        """
        sums = self._sums(faulty, over)
        shares: dict[str, Interval] = {}
        for place, name in enumerate(GROUPS):
            right, asked = sums[:, place], sums[:, len(GROUPS) + place]
            shares[name] = _share(torch.stack([right, asked], dim=1), _ratio, seed)
        return shares

    def balanced(
        self,
        faulty: Faulty = "wrong",
        over: Literal["latents", "documents"] = "latents",
        seed: int = 0,
    ) -> Interval:
        """Mean of the shares of right answers in Q1 ... Q10 and in Not; 1/2 is chance."""
        return _share(self._sums(faulty, over), _balanced, seed)

    def _sums(self, faulty: Faulty, over: str) -> Tensor:
        """[clusters, 22]: right answers in Q1 ... Q10, Not; then questions counted in each."""
        if faulty not in ("wrong", "left out") or over not in ("latents", "documents"):
            raise Refusal(
                f'faulty is {faulty!r} and over {over!r}, expected "wrong" or "left out", and '
                '"latents" or "documents".'
            )
        active = self.group != NOT
        said = torch.tensor([bool(answer.active) for answer in self.answers])
        usable = torch.tensor([answer.fault is None for answer in self.answers])
        right = usable & (said == active)
        counted = usable if faulty == "left out" else torch.ones_like(usable)
        place = torch.where(active, self.group - 1, len(DECILES))
        columns = torch.zeros(len(place), 2 * len(GROUPS))
        each = torch.arange(len(place))
        columns[each, place] = right.float()
        columns[each, len(GROUPS) + place] = counted.float()
        return document_sums(columns, self.latent if over == "latents" else self.document)


def _ratio(totals: Tensor) -> Tensor:
    right, asked = totals.chunk(2, dim=1)
    return (right / asked).squeeze(1)


def _balanced(totals: Tensor) -> Tensor:
    right, asked = totals.chunk(2, dim=1)
    share = right / asked
    return (share[:, : len(DECILES)].mean(1) + share[:, len(DECILES)]) / 2


def _share(sums: Tensor, statistic: Callable[[Tensor], Tensor], seed: int) -> Interval:
    """Bootstrap over clusters; NaN where a group has answers in fewer than two of them."""
    asked = sums[:, sums.shape[1] // 2 :]
    if ((asked > 0).sum(0) < 2).any():
        return Interval(math.nan, math.nan, math.nan)
    plain = statistic(sums.sum(0, keepdim=True))

    def filled(totals: Tensor) -> Tensor:
        # A resample may draw no cluster with answers in some group; it says nothing new.
        values = statistic(totals)
        return torch.where(values.isnan(), plain, values)

    return bootstrap(filled, sums, seed=seed)


def deciles(
    activation: Float[Tensor, " n"], per_decile: int, generator: torch.Generator
) -> tuple[Int64[Tensor, " q"], Int64[Tensor, " q"]]:
    """Rows where a latent is active, drawn evenly from ten groups of equal size by activation.

    Returns rows and their group, 1 (weakest) to 10.  Ties are dealt by lot.  Raises Refusal for a
    latent that is never active, fewer active rows than 10 * per_decile, or one value everywhere.
    """
    if activation.ndim != 1 or not activation.isfinite().all():
        raise Refusal(
            f"activation is {list(activation.shape)}, expected [n] finite numbers; pass the values "
            "of one latent."
        )
    rows = (activation > 0).nonzero()[:, 0]
    if len(rows) == 0:
        raise Refusal(
            f"The latent is never active in {len(activation)} rows, expected one that fires; "
            "choose another or read more text."
        )
    if len(rows) < 10 * per_decile:
        raise Refusal(
            f"The latent is active in {len(rows)} rows, expected at least {10 * per_decile}, that "
            f"is {per_decile} in each decile; ask for fewer or read more text."
        )
    values = activation[rows]
    if bool(values.max() == values.min()):
        raise Refusal(
            f"The latent has one value in all {len(rows)} rows where it is active, expected values "
            "that differ, as deciles are by activation."
        )
    lot = torch.randperm(len(rows), generator=generator)
    rows = rows[lot][values[lot].argsort(stable=True)]
    taken: list[Tensor] = []
    group: list[Tensor] = []
    for number, part in zip(DECILES, rows.tensor_split(10), strict=True):
        pick = torch.randperm(len(part), generator=generator)[:per_decile]
        taken.append(part[pick])
        group.append(torch.full_like(pick, number))
    return torch.cat(taken), torch.cat(group)


def eligible_latents(
    code: SparseCode, d_sae: int, at_least: int, at_most: int | None = None
) -> Int64[Tensor, " latents"]:
    """Latents active in at least (and at most) so many rows."""
    counts = torch.bincount(code.indices[code.values > 0], minlength=d_sae)
    most = len(code) if at_most is None else at_most
    return ((counts >= at_least) & (counts <= most)).nonzero()[:, 0]


def detect(
    judge: Judge,
    learn: tuple[SparseCode, Text],
    held: tuple[SparseCode, Text],
    latents: Sequence[int] | Int64[Tensor, " latents"],
    sampling: Sampling | None = None,
) -> Detection:
    """Let a judge learn each latent on one text and detect it on another.

    `learn` and `held` are the code of an SAE and the text of its rows; take them from different
    documents.  Examples are drawn evenly from the deciles of activation on `learn`.  Every latent
    draws with its own seed, so its answers do not depend on which others are asked for.  A latent
    that cannot be judged is named in `skipped`.  Raises Refusal for a code and text of different
    length, no latents, a latent asked for twice, or when none can be judged.
    """
    sampling = Sampling() if sampling is None else sampling
    for name, (code, text) in (("learn", learn), ("held", held)):
        if len(code) != len(text):
            raise Refusal(
                f"The code of {name} has {len(code)} rows and its text {len(text)}, expected the "
                "same; encode the activations of that text."
            )
    wanted = [int(latent) for latent in latents]
    if not wanted or len(set(wanted)) < len(wanted):
        raise Refusal(
            f"There are {len(wanted)} latents, {len(set(wanted))} of them different, expected at "
            "least one and each once."
        )
    found: list[tuple[int, Tensor, Tensor, list[Answer]]] = []
    rules: dict[int, str] = {}
    rule_faults: Counter[str] = Counter()
    skipped: dict[int, str] = {}
    for latent in wanted:
        generator = torch.Generator().manual_seed(1_000_003 * sampling.seed + latent)
        try:
            examples = _examples(*learn, latent, sampling, generator)
            rows, group = _questions(held[0], latent, sampling, generator)
        except Refusal as refusal:
            skipped[latent] = str(refusal)
            continue
        rule = judge.learn(*examples)
        rules[latent] = rule.text
        if rule.fault is not None:
            rule_faults[rule.fault] += 1
        answers = rule.detect(_contexts(held[1], rows, sampling))
        if len(answers) != len(rows):
            raise Refusal(
                f"The judge gave {len(answers)} answers to {len(rows)} questions, expected one "
                "each; return Answer(None, 'malformed') where there is none."
            )
        found.append((latent, rows, group, answers))
    if not found:
        reason = next(iter(skipped.values()))
        raise Refusal(f"None of {len(wanted)} latents could be judged; the first: {reason}")
    rows = torch.cat([rows for _, rows, _, _ in found])
    return Detection(
        latent=torch.cat([torch.full_like(rows, latent) for latent, rows, _, _ in found]),
        row=rows,
        document=held[1].document[rows],
        group=torch.cat([group for _, _, group, _ in found]),
        answers=tuple(answer for _, _, _, answers in found for answer in answers),
        rules=rules,
        rule_faults=rule_faults,
        skipped=skipped,
    )


def activation_of(code: SparseCode, latent: int) -> Float[Tensor, " n"]:
    """The activation of one latent in every row."""
    return torch.where(code.indices == latent, code.values, 0).sum(1)


def _examples(
    code: SparseCode, text: Text, latent: int, sampling: Sampling, generator: torch.Generator
) -> tuple[list[Context], list[Context]]:
    activation = activation_of(code, latent)
    rows, _ = deciles(activation, math.ceil(sampling.examples / 10), generator)
    active = rows[torch.randperm(len(rows), generator=generator)[: sampling.examples]]
    inactive = _silent(activation, sampling.examples, generator)
    return _contexts(text, active, sampling), _contexts(text, inactive, sampling)


def _questions(
    code: SparseCode, latent: int, sampling: Sampling, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    activation = activation_of(code, latent)
    rows, group = deciles(activation, sampling.per_decile, generator)
    silent = _silent(activation, sampling.silent, generator)
    # In random order, so that a judge asked about several at once cannot count.
    order = torch.randperm(len(rows) + len(silent), generator=generator)
    group = torch.cat([group, torch.full_like(silent, NOT)])
    return torch.cat([rows, silent])[order], group[order]


def _silent(activation: Tensor, count: int, generator: torch.Generator) -> Tensor:
    rows = (activation <= 0).nonzero()[:, 0]
    if len(rows) < count:
        raise Refusal(
            f"The latent is silent in {len(rows)} rows, expected at least {count}; a latent that "
            "fires nearly everywhere cannot be judged by detection."
        )
    return rows[torch.randperm(len(rows), generator=generator)[:count]]


def _contexts(text: Text, rows: Tensor, sampling: Sampling) -> list[Context]:
    return [text.context(row, sampling.before, sampling.after) for row in rows.tolist()]

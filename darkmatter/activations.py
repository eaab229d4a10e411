"""From tokens to activations: ordered batches that keep token, position, document and loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from darkmatter._refusal import Refusal
from darkmatter.models import Model

Found = TypeVar("Found")


@dataclass(frozen=True, eq=False)
class Tokens:
    """Contexts of token ids and the documents they come from.

    tokens [c, p]: every context has the same length p and belongs to one document; document [c] is
    the index of that document in `names`. Raises Refusal for no contexts, no names, contexts of
    fewer than two tokens, negative ids, or a document without a name.
    """

    tokens: Int64[Tensor, "c p"]
    document: Int64[Tensor, " c"]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.document.shape != self.tokens.shape[:1]:
            raise Refusal(
                f"tokens has shape {tuple(self.tokens.shape)} and document "
                f"{tuple(self.document.shape)}, expected [contexts, positions] and [contexts]."
            )
        if len(self.names) == 0 or len(self.tokens) == 0:
            raise Refusal(
                f"There are {len(self.tokens)} contexts of {len(self.names)} documents, expected "
                "at least one; pass the documents to read."
            )
        if self.tokens.shape[1] < 2:
            raise Refusal(
                f"A context has {self.tokens.shape[1]} tokens, expected 2 or more: the loss of a "
                "position is that of its next token."
            )
        if int(self.tokens.min()) < 0:
            raise Refusal(f"A token id is {int(self.tokens.min())}, expected ids from 0.")
        low, high = int(self.document.min()), int(self.document.max())
        if low < 0 or high >= len(self.names):
            raise Refusal(
                f"A context is of document {low if low < 0 else high}, expected 0 to "
                f"{len(self.names) - 1}, the indices of the {len(self.names)} names."
            )

    @property
    def n_contexts(self) -> int:
        return len(self.tokens)

    @property
    def n_tokens(self) -> int:
        """All positions, before any is masked."""
        return self.tokens.numel()

    def select(self, contexts: Bool[Tensor, " c"] | Int[Tensor, " n"]) -> Tokens:
        """These contexts only (a mask or indices), in that order; names and indices stay."""
        return Tokens(self.tokens[contexts], self.document[contexts], self.names)

    def split_documents(self, share: float, seed: int) -> tuple[Tokens, Tokens]:
        """Two parts that have no document in common, the first with `share` of the documents.

        Contexts keep their order. Raises Refusal when a part would be empty.
        """
        documents = torch.unique(self.document)
        first = round(share * len(documents))
        if not 0 < first < len(documents):
            raise Refusal(
                f"A share of {share} puts {first} of {len(documents)} documents in the first part, "
                "expected both parts to have some; pass more documents or another share."
            )
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
        chosen = torch.isin(self.document, documents[order[:first].to(documents.device)])
        return self.select(chosen), self.select(~chosen)


@dataclass(frozen=True, eq=False)
class Batch:
    """Activations of n tokens, in the order of the text.

    x [n, d] at the first hook and `others` by hook name; token (id), position (in its context),
    document (index into `Tokens.names`) and context (row of `Tokens.tokens`) of every row; loss:
    the cross entropy in nats of predicting the next token at that position.
    """

    x: Float[Tensor, "n d"]
    token: Int64[Tensor, " n"]
    position: Int64[Tensor, " n"]
    document: Int64[Tensor, " n"]
    context: Int64[Tensor, " n"]
    loss: Float[Tensor, " n"]
    others: dict[str, Float[Tensor, "n _"]] = field(default_factory=dict[str, Tensor])

    def __len__(self) -> int:
        return len(self.x)


def stream(
    model: Model,
    hook: str | Sequence[str],
    tokens: Tokens,
    skip: int = 32,
    special: Sequence[int] | None = None,
    batch_contexts: int = 16,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Batch]:
    """Activations of every token that counts, in order, from one forward per batch of contexts.

    Left out: the first `skip` positions of a context, its last position (it has no next token, so
    no loss), and positions whose own token is `special` (None: one of those of the tokenizer, in
    `pydocs` token 0). Several hooks are read in the same
    forward; the first is `Batch.x`, the others are in `Batch.others`. Tensors are on the model's
    device. Only the contexts from `start` to before `stop` are read. A batch for which the device
    has no memory is run in halves, as are those that follow, which a RuntimeWarning says.

    Raises Refusal at once for an unknown hook, tokens outside the vocabulary (naming document and
    position), contexts longer than the model's, or a mask that leaves nothing; and while running
    for NaN or infinity in activations or loss, naming document and position.
    """
    hooks = (hook,) if isinstance(hook, str) else tuple(hook)
    if not hooks or len(set(hooks)) < len(hooks):
        raise Refusal(f"The hooks are {list(hooks)}, expected at least one and each once.")
    for name in hooks:
        model.width(name)
    if batch_contexts < 1:
        raise Refusal(f"batch_contexts is {batch_contexts}, expected 1 or more.")
    length = tokens.tokens.shape[1]
    if length > model.n_context:
        raise Refusal(
            f"Contexts have {length} tokens, but {model.name} reads {model.n_context} at most; cut "
            "them shorter."
        )
    if not 0 <= skip < length - 1:
        raise Refusal(
            f"skip is {skip} and contexts have {length} tokens, expected skip from 0 to "
            f"{length - 2}: the last position has no next token; skip fewer or read longer "
            "contexts."
        )
    outside = (tokens.tokens >= model.vocabulary).nonzero()
    if len(outside):
        context, position = (int(i) for i in outside[0])
        raise Refusal(
            f"Token {int(tokens.tokens[context, position])} at position {position} of context "
            f"{context} (document {tokens.names[int(tokens.document[context])]!r}) is outside the "
            f"vocabulary of {model.vocabulary} of {model.name}; use the model's own tokenizer."
        )
    special = tuple(model.tokenizer.all_special_ids if special is None else special)
    counts = measured(tokens.tokens, skip, special)
    if not bool(counts.any()):
        raise Refusal(
            f"No token is left: of {tokens.n_tokens}, all are special {list(special)} or among the "
            f"first {skip} positions; pass more text or mask less."
        )
    stop = tokens.n_contexts if stop is None else min(stop, tokens.n_contexts)
    parts = [slice(i, min(i + batch_contexts, stop)) for i in range(start, stop, batch_contexts)]
    return _batches(model, hooks, tokens, counts, parts)


def measured(
    tokens: Int64[Tensor, "c p"], skip: int, special: Sequence[int]
) -> Bool[Tensor, "c p"]:
    """Which positions count: not the first `skip`, the last of a context or a special token."""
    counts = ~torch.isin(tokens, torch.tensor(list(special), dtype=torch.int64))
    counts[:, :skip] = False
    counts[:, -1] = False
    return counts


def _batches(
    model: Model, hooks: tuple[str, ...], tokens: Tokens, counts: Tensor, parts: Sequence[slice]
) -> Iterator[Batch]:
    halves = Halves(model, tokens.tokens.shape[1])
    for part in parts:
        context, position = counts[part].nonzero(as_tuple=True)
        if len(context) == 0:
            continue
        read = halves(part, lambda some: model.read(tokens.tokens[some], hooks))
        activations, loss = read[0] if len(read) == 1 else _joined(hooks, read)
        rows = context.to(loss.device), position.to(loss.device)
        taken = {hook: activations[hook][rows] for hook in hooks}
        document = tokens.document[part][context]
        token_loss = loss[rows]
        for what, values in (*taken.items(), ("the loss", token_loss[:, None])):
            bad = (~torch.isfinite(values).all(1)).nonzero()
            if len(bad):
                row = int(bad[0])
                raise Refusal(
                    f"{what} is NaN or infinite at position {int(position[row])} of context "
                    f"{part.start + int(context[row])} (document "
                    f"{tokens.names[int(document[row])]!r}), {len(bad)} of {len(context)} tokens "
                    f"of its batch; open {model.name} in float32 or leave the document out."
                )
        yield Batch(
            x=taken.pop(hooks[0]),
            token=tokens.tokens[part][context, position].to(loss.device),
            position=rows[1],
            document=document.to(loss.device),
            context=(part.start + context).to(loss.device),
            loss=token_loss,
            others=taken,
        )


def _joined(
    hooks: tuple[str, ...], read: list[tuple[dict[str, Tensor], Tensor]]
) -> tuple[dict[str, Tensor], Tensor]:
    activations = {hook: torch.cat([part[hook] for part, _ in read]) for hook in hooks}
    return activations, torch.cat([loss for _, loss in read])


class Halves:
    """Contexts are worked on together, or as many at a time as the device has memory for."""

    def __init__(self, model: Model, length: int) -> None:
        self.model, self.length = model, length
        self.most: int | None = None

    def __call__(self, contexts: slice, work: Callable[[slice], Found]) -> list[Found]:
        """What `work` returns of all these contexts or, in order, of parts of them.

        Raises Refusal when there is no memory for one. A part that does not fit is begun again.
        """
        found: list[Found] = []
        at: int = contexts.start
        while at < contexts.stop:
            size = min(self.most or contexts.stop, contexts.stop - at)
            try:
                found.append(work(slice(at, at + size)))
            except RuntimeError as error:
                if not lacks_memory(error):
                    raise
                self.most = size // 2
            else:
                at += size
                continue
            # Not in the handler, where the error would keep what did not fit.
            if self.most == 0:
                raise Refusal(
                    f"{self.model.device} has no memory for one context of {self.length} tokens"
                    f" of {self.model.name}; read shorter contexts, or open it in half precision "
                    "or on another device."
                )
            warnings.warn(
                f"{self.model.device} has no memory for {size} contexts at a time; it goes on with "
                f"{self.most}.",
                RuntimeWarning,
                stacklevel=4,
            )
        return found


def lacks_memory(error: RuntimeError) -> bool:
    """Whether a device had no memory. torch has a class for CUDA's; others tell it in words."""
    told = str(error)
    words = "out of memory" in told or "can't allocate memory" in told
    return isinstance(error, torch.OutOfMemoryError) or words


def collect(batches: Iterable[Batch]) -> Batch:
    """All batches as one. Raises Refusal for none, or for batches of different hooks."""
    every = list(batches)
    if not every:
        raise Refusal("There are no batches to collect; stream some tokens first.")
    hooks = list(every[0].others)
    if any(list(batch.others) != hooks for batch in every):
        raise Refusal("The batches are of different hooks; collect those of one stream.")
    return Batch(
        x=torch.cat([batch.x for batch in every]),
        token=torch.cat([batch.token for batch in every]),
        position=torch.cat([batch.position for batch in every]),
        document=torch.cat([batch.document for batch in every]),
        context=torch.cat([batch.context for batch in every]),
        loss=torch.cat([batch.loss for batch in every]),
        others={hook: torch.cat([batch.others[hook] for batch in every]) for hook in hooks},
    )

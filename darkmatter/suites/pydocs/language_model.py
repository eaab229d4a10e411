"""Train the suite's language model: GPT-2 architecture, from scratch, on two CPU cores.

Weights are bfloat16 while computing and float32 where they accumulate. Matrices inside the
blocks are updated by Muon (momentum, then the nearest semi-orthogonal matrix by Newton-Schulz;
Jordan 2024), everything else by Adam. The learning rate is constant, then falls linearly to
zero over the last 36 % of steps. Training is checkpointed and goes on where it was.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from darkmatter._files import replacing

END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class LanguageModelRecipe:
    """Everything that decides the weights, given the corpus."""

    d_model: int = 256
    n_layer: int = 4
    n_head: int = 4
    d_mlp: int = 768
    n_context: int = 256
    vocabulary: int = 4096
    batch_contexts: int = 48
    micro_contexts: int = 8
    steps: int = 1100
    warmup_steps: int = 60
    decay_share: float = 0.364
    muon_rate: float = 0.02
    adam_rate: float = 3e-3
    seed: int = 0


def train_tokenizer(texts: Iterator[str], vocabulary: int) -> Any:
    """Byte-level BPE with one special token, `<|endoftext|>`, which is id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_documents(tokenizer: Any, texts: Sequence[str]) -> list[Tensor]:
    """Token ids of every text (int16: the vocabulary is at most 4096)."""
    encodings: list[Tensor] = []
    for start in range(0, len(texts), 1000):
        for encoding in tokenizer.encode_batch(list(texts[start : start + 1000])):
            encodings.append(torch.tensor(encoding.ids, dtype=torch.int16))
    return encodings


def training_stream(documents: Sequence[Tensor], seed: int) -> Tensor:
    """All documents in a shuffled order, each led by `<|endoftext|>`, as one row of tokens."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed))
    end = torch.zeros(1, dtype=torch.int16)
    return torch.cat([part for i in order.tolist() for part in (end, documents[i])])


def packed_contexts(stream: Tensor, n_context: int, offset: int) -> Tensor:
    """Cut a stream into contexts of `<|endoftext|>` and n_context - 1 consecutive tokens."""
    length = n_context - 1
    usable = (len(stream) - offset) // length * length
    body = stream[offset : offset + usable].view(-1, length)
    return torch.cat([torch.zeros(len(body), 1, dtype=body.dtype), body], 1)


def document_contexts(
    documents: Sequence[Tensor], n_context: int, most: int | None = None
) -> tuple[Tensor, Tensor]:
    """Contexts that lie in one document each: (tokens, document index of each context).

    The tail of a document that does not fill a context is left out, so short documents are
    skipped, as in the paper. `most` limits the contexts of one document.
    """
    length = n_context - 1
    rows: list[Tensor] = []
    index: list[int] = []
    for i, document in enumerate(documents):
        count = len(document) // length
        count = count if most is None else min(count, most)
        if count:
            rows.append(document[: count * length].view(count, length))
            index += [i] * count
    body = torch.cat(rows)
    begin = torch.zeros(len(body), 1, dtype=body.dtype)
    return torch.cat([begin, body], 1), torch.tensor(index, dtype=torch.int32)


def build_model(recipe: LanguageModelRecipe) -> Any:
    """A GPT-2 with random weights (Hugging Face class, tied embeddings, no dropout)."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(recipe.seed)
    config = GPT2Config(
        vocab_size=recipe.vocabulary,
        n_positions=recipe.n_context,
        n_embd=recipe.d_model,
        n_layer=recipe.n_layer,
        n_head=recipe.n_head,
        n_inner=recipe.d_mlp,
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


class TiedCrossEntropy(torch.autograd.Function):
    """Mean of -log softmax(h W')[target] with both gradients made in the forward pass.

    The (tokens x vocabulary) logits, the largest tensor of a step, are written once and reused;
    autograd's own path writes four tensors of that size and is 15 % slower here.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        logits = hidden @ weight.T
        log_p = logits.float()
        log_p -= log_p.logsumexp(1, keepdim=True)
        loss = -log_p.gather(1, target[:, None]).mean()
        probability = log_p.exp_()
        minus_one = torch.full((len(target), 1), -1.0)
        gradient = logits.copy_(probability.scatter_add_(1, target[:, None], minus_one))
        gradient /= len(target)
        ctx.save_for_backward(gradient @ weight, gradient.T @ hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight = ctx.saved_tensors
        return hidden * upstream[0], weight * upstream[0], None


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Roughly U V' of the singular value decomposition, by five quintic Newton-Schulz steps."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = (matrix / (matrix.norm() + 1e-7)).bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).float()


class Optimiser:
    """Muon for block matrices, Adam for the rest, on float32 masters of bfloat16 weights."""

    def __init__(self, model: torch.nn.Module, recipe: LanguageModelRecipe):
        self.recipe = recipe
        self.parameters = dict(model.named_parameters())
        self.masters = {k: p.detach().float().clone() for k, p in self.parameters.items()}
        self.first = {k: torch.zeros_like(m) for k, m in self.masters.items()}
        self.second = {
            k: torch.zeros_like(m) for k, m in self.masters.items() if not self.is_matrix(k)
        }

    def is_matrix(self, name: str) -> bool:
        return ".h." in name and name.endswith("weight") and ".ln_" not in name

    @torch.no_grad()
    def step(self, number: int, scale: float) -> None:
        """One update; `scale` multiplies both learning rates."""
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None, name
            gradient, master = parameter.grad.float(), self.masters[name]
            if self.is_matrix(name):
                momentum = self.first[name].lerp_(gradient, 0.05)
                update = gradient.lerp(momentum, 0.95)
                # Query, key and value are three maps, so they are orthogonalised apart.
                parts = update.chunk(3, 1) if "c_attn" in name else (update,)
                update = torch.cat([orthogonalise(p) for p in parts], 1)
                gain = max(1.0, update.shape[1] / len(parts) / update.shape[0]) ** 0.5
                master.add_(update, alpha=-self.recipe.muon_rate * scale * gain)
            else:
                m = self.first[name].lerp_(gradient, 0.1)
                v = self.second[name].lerp_(gradient.square(), 0.05)
                m_hat, v_hat = m / (1 - 0.9**number), v / (1 - 0.95**number)
                master.addcdiv_(
                    m_hat, v_hat.sqrt().add_(1e-10), value=-self.recipe.adam_rate * scale
                )
            parameter.copy_(master)
            parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        groups = {"master": self.masters, "first": self.first, "second": self.second}
        return {f"{g}/{k}": v for g, part in groups.items() for k, v in part.items()}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        for name, value in self.state().items():
            value.copy_(state[name])
        for name, parameter in self.parameters.items():
            parameter.copy_(self.masters[name])


def learning_rate_scale(step: int, recipe: LanguageModelRecipe) -> float:
    """Linear warm-up, constant, linear decay to zero over the last share of steps."""
    decay = max(1, int(recipe.steps * recipe.decay_share))
    return min(1.0, (step + 1) / recipe.warmup_steps, (recipe.steps - step) / decay)


def mean_loss(model: Any, contexts: Tensor, batch: int = 16) -> float:
    """Cross entropy in nats a token over contexts, position 0 (`<|endoftext|>`) as input only."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for rows in contexts.long().split(batch):
            logits = model(rows).logits[:, :-1].float()
            target = rows[:, 1:]
            total += float(
                torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), reduction="sum"
                )
            )
            count += target.numel()
    return total / count


def train_language_model(
    recipe: LanguageModelRecipe,
    stream: Tensor,
    validation: Tensor,
    folder: Path,
    log: Any = print,
    checkpoint_every: int = 100,
) -> Any:
    """Train, or go on training, and return the model in float32.

    `folder` receives `checkpoint.safetensors` (replaced in one step, so a kill leaves the last
    good one) and `history.jsonl`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = build_model(recipe).to(torch.bfloat16)
    optimiser = Optimiser(model, recipe)
    checkpoint = folder / "checkpoint.safetensors"
    begin = 0
    if checkpoint.exists():
        state = load_file(checkpoint)
        begin = int(state.pop("step"))
        optimiser.load(state)
        log(f"going on at step {begin}")
    # Killed between writing the two files, the history is ahead of the checkpoint.
    history: list[str] = []
    if begin:
        with (folder / "history.jsonl").open(encoding="utf-8") as file:
            history = [line for line in file if json.loads(line)["step"] <= begin]
    per_epoch = (len(stream) - recipe.n_context) // (recipe.n_context - 1) // recipe.batch_contexts
    if per_epoch < 1:
        raise ValueError(
            f"the corpus fills no batch: expected at least {recipe.batch_contexts} contexts of "
            f"{recipe.n_context} tokens, got {len(stream)} tokens; use more text or a smaller batch"
        )
    epoch, order, contexts = -1, torch.empty(0), torch.empty(0)
    start, micro = time.monotonic(), recipe.batch_contexts // recipe.micro_contexts
    for step in range(begin, recipe.steps):
        if step // per_epoch != epoch:
            epoch = step // per_epoch
            generator = torch.Generator().manual_seed(recipe.seed * 1000 + epoch)
            offset = int(torch.randint(recipe.n_context - 1, (), generator=generator))
            contexts = packed_contexts(stream, recipe.n_context, offset)
            order = torch.randperm(len(contexts), generator=generator)
        where = step % per_epoch * recipe.batch_contexts
        rows = contexts[order[where : where + recipe.batch_contexts]].long()
        loss = 0.0
        for part in rows.split(recipe.micro_contexts):
            hidden = model.transformer(part).last_hidden_state[:, :-1].flatten(0, 1)
            value = TiedCrossEntropy.apply(hidden, model.lm_head.weight, part[:, 1:].flatten())
            (value / micro).backward()
            loss += float(value.detach()) / micro
        if not math.isfinite(loss):
            raise FloatingPointError(f"loss is {loss} at step {step}; lower the learning rates")
        optimiser.step(step + 1, learning_rate_scale(step, recipe))
        done = step + 1
        if done % 20 == 0:
            rate = (
                (done - begin)
                * recipe.batch_contexts
                * recipe.n_context
                / (time.monotonic() - start)
            )
            log(f"step {done}/{recipe.steps} loss {loss:.3f} {rate:.0f} tokens/s")
        if done % checkpoint_every == 0 or done == recipe.steps:
            held_out = mean_loss(model, validation[:128])
            entry = {
                "step": done,
                "loss": loss,
                "validation": held_out,
                "seconds": time.monotonic() - start,
            }
            history.append(json.dumps(entry) + "\n")
            log(f"step {done} validation {held_out:.4f}")
            with replacing(folder / "history.jsonl") as temporary:
                temporary.write_text("".join(history), encoding="utf-8")
            with replacing(checkpoint) as temporary:
                save_file({**optimiser.state(), "step": torch.tensor(done)}, temporary)
    final = build_model(recipe)
    with torch.no_grad():
        for name, parameter in final.named_parameters():
            parameter.copy_(optimiser.masters[name])
    return final.eval()


def recipe_as_dict(recipe: LanguageModelRecipe) -> dict[str, Any]:
    return asdict(recipe)

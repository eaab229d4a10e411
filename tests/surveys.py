"""Surveys of the tiny model in processes of their own, which tests kill, divide and measure."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

SKIP = 4


def documents_of(model: Any, contexts: int, seed: int = 4) -> Any:
    """Random tokens in documents of two contexts, each context beginning with a special token."""
    from darkmatter.activations import Tokens

    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, model.vocabulary, (contexts, model.n_context), generator=generator)
    tokens[:, 0] = 0
    names = tuple(f"document {i}" for i in range(-(-contexts // 2)))
    return Tokens(tokens, torch.arange(contexts) // 2, names)


def forked(work: Callable[[], object], **environment: str) -> int:
    """Start `work` in a fork, which has the model and the libraries already; its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.environ.update(environment)
        # The parent's threads are not in the fork, and a pool of one needs none.
        torch.set_num_threads(1)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a fork: its exit code, or the negative number of the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


@contextmanager
def killed_after(calls: int) -> Iterator[None]:
    """SIGKILL of this process after that many reconstructions and writes of files."""
    import darkmatter.passes

    left = calls

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **keys: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keys)

        return counted

    reconstructed = counting(darkmatter.passes.reconstructed)
    with (
        mock.patch.object(darkmatter.passes, "reconstructed", reconstructed),
        mock.patch.object(os, "replace", counting(os.replace)),
        # As if every part of the first pass took long.
        mock.patch.object(darkmatter.passes, "SECONDS", 0.0),
    ):
        yield

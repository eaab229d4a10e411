"""What several test files of the bare-tensor modules share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from torch import Tensor

from darkmatter._refusal import Refusal


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The annotations, checked in tests only, would answer first; a user meets the Refusal."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(Refusal, match=message):
            yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal float64 draws."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

"""What the checks of several chapters share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def refuse_mistakes(given: float, mistakes: Mapping[float, str]) -> None:
    """Fail with the message of the mistake whose value is given, to rounding."""
    for value, message in mistakes.items():
        assert abs(given - value) > 1e-9, message


def alike(given: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree to float32 rounding."""
    return torch.allclose(given.double(), other.double(), atol=1e-6)

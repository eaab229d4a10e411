"""What the checks of several chapters share."""

from __future__ import annotations

import torch
from torch import Tensor


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers in float64, the same for a seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def alike(given: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree to float32 rounding."""
    return torch.allclose(given.double(), other.double(), atol=1e-6)

"""Sparse codes: the few active latents of every token, as (values, indices)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from darkmatter._refusal import Refusal


def flat_nonzero(mask: Bool[Tensor, "*shape"]) -> Int64[Tensor, " n"]:
    """Where a mask is true, as indices into its flattened entries, ascending."""
    if mask.device.type == "cpu":
        # NumPy reads a boolean array several times faster than torch's nonzero does.
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.flatten().nonzero()[:, 0]


@dataclass(frozen=True, eq=False)
class SparseCode:
    """Codes f of n tokens: f[i, indices[i, j]] = values[i, j], everything else 0.

    values [n, k] and indices [n, k] (int64); rows with fewer than k active latents are padded with
    value 0 and index 0. An index may come twice in a row: its values add up. Raises Refusal when
    the two do not have the same shape [n, k].
    """

    values: Float[Tensor, "n k"]
    indices: Int64[Tensor, "n k"]

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.shape != self.indices.shape:
            raise Refusal(
                f"A sparse code has values {tuple(self.values.shape)} and indices "
                f"{tuple(self.indices.shape)}, expected one shape [n, k]; pad rows with value 0."
            )

    def __len__(self) -> int:
        return len(self.values)

    @property
    def l0(self) -> Int[Tensor, " n"]:
        """Number of non-zero values of every token."""
        return (self.values != 0).sum(1)

    @torch.no_grad()
    def decode(
        self, dictionary: Float[Tensor, "m d"], bias: Float[Tensor, " d"] | None = None
    ) -> Float[Tensor, "n d"]:
        """f @ dictionary + bias, in the dtype of the dictionary, at 2 n k d FLOP; no gradients.

        Padding contributes nothing, whatever the first direction is. Raises Refusal when an index
        is not a row of the dictionary or when the bias has another width.
        """
        self._check_indices(len(dictionary))
        if bias is not None and bias.shape != dictionary.shape[1:]:
            raise Refusal(
                f"The bias has shape {tuple(bias.shape)}, expected ({dictionary.shape[1]},), the "
                "width of the dictionary's directions."
            )
        if self.values.numel() == 0:
            decoded = dictionary.new_zeros(len(self), dictionary.shape[1])
        else:
            # Dense products would read every direction; embedding_bag reads the active ones. Its
            # backward is what is expensive, so only its forward is used.
            decoded = torch.nn.functional.embedding_bag(
                self.indices,
                dictionary,
                per_sample_weights=self.values.to(dictionary.dtype),
                mode="sum",
            )
        return decoded if bias is None else decoded + bias

    def dense(self, d_sae: int) -> Float[Tensor, "n {d_sae}"]:
        """The codes as a matrix [n, d_sae]. Raises Refusal when an index is d_sae or more."""
        self._check_indices(d_sae)
        return self.values.new_zeros(len(self), d_sae).scatter_add_(1, self.indices, self.values)

    def _check_indices(self, rows: int) -> None:
        if self.indices.numel() == 0:
            return
        low, high = int(self.indices.min()), int(self.indices.max())
        if low < 0 or high >= rows:
            raise Refusal(
                f"The code has an index {low if low < 0 else high}, expected 0 to {rows - 1} for a "
                f"dictionary of {rows} directions; use the dictionary it was encoded with."
            )

"""What a survey costs before it is run: floating-point operations, bytes, hours.

With d = d_model, d_sae m_i of SAE i of S and k its L0, B parameters of a block, L blocks of which l
are run up to the hook, context c and vocabulary V, a token costs

    forward to the hook     l (2 B + 4 c d)                                     every token
    encode and decode       sum_i 2 d m_i + 2 k d                               every token
    moments                 2 d^2 (1 + S)                     float64           fit tokens
    maps                    2 d^2 S                           float64           test tokens
    downstream              (1 + 3 S) ((L - l) (2 B + 4 c d) + 2 d V)           test tokens

A token is read in one pass, fit or test. Once for all tokens, to factorise and to solve in float64:
d^3 / 3 + 2 d^3 S. The moments stay in 8 d^2 (1 + S) bytes for any number of tokens; float32
activations and errors, which the released code of Engels, Smith and Tegmark (2410.14670) stores,
would take 4 d (1 + S) bytes a token. One multiply-add counts as two operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from darkmatter._refusal import Refusal


@dataclass(frozen=True)
class Network:
    """A language model's sizes; parameters_per_block counts one block's weights."""

    d_model: int
    n_layer: int
    parameters_per_block: float | int
    vocabulary: int
    context: int

    def __post_init__(self) -> None:
        _require_positive(self)

    @property
    def parameters(self) -> float:
        """Blocks and one embedding."""
        return float(self.n_layer * self.parameters_per_block + self.vocabulary * self.d_model)

    def blocks(self, count: int) -> float:
        """Operations a token of `count` blocks: 2 B of weights and 4 c d of attention each."""
        return count * (2.0 * self.parameters_per_block + 4 * self.context * self.d_model)

    @property
    def unembedding(self) -> float:
        """Operations a token from the last residual stream to logits."""
        return 2.0 * self.d_model * self.vocabulary


@dataclass(frozen=True)
class Machine:
    """One accelerator: peak operations a second, the share of them that is reached, its price.

    `bfloat16` is the rate of the model and the encoders, `float64` that of the moments; `price` is
    in any currency an hour.
    """

    bfloat16: float | int
    float64: float | int
    share: float | int = 0.4
    price: float | int = 1.0

    def __post_init__(self) -> None:
        _require_positive(self)
        if self.share > 1:
            raise Refusal(f"share is {self.share}, expected at most 1, the whole of the peak rate.")


@dataclass(frozen=True)
class Cost:
    """Operations by part of the work, bytes of memory and disk, and hours of one accelerator."""

    forward: float
    encoding: float
    moments: float
    maps: float
    downstream: float
    solving: float
    statistics_bytes: float
    resident_bytes: float
    stored_bytes: float
    hours: float
    price: float

    @property
    def operations(self) -> float:
        """All parts together."""
        parts = (self.forward, self.encoding, self.moments, self.maps, self.downstream)
        return sum(parts) + self.solving

    def machines_for(self, hours: float | int) -> int:
        """Accelerators that finish within so many hours: ceil(hours of one / hours)."""
        if not hours > 0:
            raise Refusal(f"hours is {hours}, expected above zero.")
        return max(1, int(-(-self.hours // hours)))


def survey_cost(
    network: Network,
    blocks_before: int,
    d_sae: Sequence[int],
    tokens: float | int,
    machine: Machine,
    l0: float | int = 60,
    fit_share: float = 0.6,
    downstream: bool = True,
) -> Cost:
    """The formulas of this module with numbers put in.

    blocks_before: blocks whose output the hook needs (resid_post of block 20 needs 21). Weights are
    held in two bytes a number, one SAE at a time. `stored_bytes` is what storing activations and
    errors would have taken. Raises Refusal for sizes or shares that are not positive, no SAE, or a
    hook after the last block.
    """
    if not 0 < blocks_before <= network.n_layer:
        raise Refusal(
            f"blocks_before is {blocks_before}, expected 1 to {network.n_layer}, the blocks up to "
            "the hook."
        )
    if not d_sae or min(d_sae) < 1:
        raise Refusal(f"d_sae is {list(d_sae)}, expected the width of at least one SAE.")
    if not (tokens > 0 and l0 > 0 and 0 < fit_share < 1):
        raise Refusal(
            f"tokens is {tokens}, l0 {l0} and fit_share {fit_share}, expected positive numbers and "
            "a share below 1."
        )
    d, saes = network.d_model, len(d_sae)
    test = (1 - fit_share) * tokens
    forward = tokens * network.blocks(blocks_before)
    encoding = tokens * sum(2.0 * d * m + 2 * l0 * d for m in d_sae)
    moments = fit_share * tokens * 2.0 * d * d * (1 + saes)
    maps = test * 2.0 * d * d * saes
    after = network.blocks(network.n_layer - blocks_before) + network.unembedding
    spliced = test * (1 + 3 * saes) * after if downstream else 0.0
    solving = d**3 / 3 + 2.0 * d**3 * saes
    seconds = (forward + encoding + spliced) / (machine.bfloat16 * machine.share)
    seconds += (moments + maps + solving) / (machine.float64 * machine.share)
    statistics = 8.0 * d * d * (1 + saes)
    return Cost(
        forward=forward,
        encoding=encoding,
        moments=moments,
        maps=maps,
        downstream=spliced,
        solving=solving,
        statistics_bytes=statistics,
        resident_bytes=statistics + 2 * network.parameters + 2 * 2.0 * d * max(d_sae),
        stored_bytes=4.0 * d * (1 + saes) * tokens,
        hours=seconds / 3600,
        price=seconds / 3600 * machine.price,
    )


def _require_positive(numbers: Network | Machine) -> None:
    for field in fields(numbers):
        value = getattr(numbers, field.name)
        if not value > 0:
            raise Refusal(f"{field.name} is {value}, expected above zero.")

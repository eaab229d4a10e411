"""The processes of `torchrun -m darkmatter survey`: which is this one, and what all have seen."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

from darkmatter._refusal import Refusal
from darkmatter.leastsquares import LinearStatistics

if TYPE_CHECKING:
    from darkmatter.passes import FitState

# While one process writes the result, the others wait.
_PATIENCE = timedelta(days=2)


class Ranks:
    """This process among `world` processes, which talk through gloo, or nccl on CUDA devices."""

    def __init__(self, rank: int, world: int, device: torch.device) -> None:
        self.rank, self.world = rank, world
        self.device = device if device.type == "cuda" else torch.device("cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self._own = not distributed.is_initialized()
        if self._own:
            backend = "nccl" if self.device.type == "cuda" else "gloo"
            distributed.init_process_group(backend, timeout=_PATIENCE)

    @classmethod
    def from_environment(cls, device: torch.device) -> Ranks | None:
        """The processes that RANK and WORLD_SIZE tell of, if there are several."""
        rank, world = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
        if rank is None or world is None or int(world) < 2:
            return None
        return cls(int(rank), int(world), device)

    def agree(self, refusal: Refusal | None) -> None:
        """Wait for all; raise Refusal in every process when any has one."""
        refused = torch.tensor(refusal is not None, dtype=torch.int32, device=self.device)
        distributed.all_reduce(refused, distributed.ReduceOp.SUM)
        if refusal is not None:
            raise refusal
        if int(refused):
            raise Refusal("Another process of this run refused to start; its message says why.")

    def merge(self, state: FitState) -> FitState:
        """What all processes have seen: moments merged in the order of ranks, so alike in each.

        One process' moments travel at a time, so that two are held, however many processes.
        """
        for key, own in state.statistics.items():
            whole: LinearStatistics | None = None
            for rank in range(self.world):
                sent = self._from(rank, own)
                whole = sent if whole is None else whole.merge(sent)
            assert whole is not None
            state.statistics[key] = whole.to(own.sxx.device)
        for name, active in state.active.items():
            seen = active.to(self.device, torch.uint8)
            distributed.all_reduce(seen, distributed.ReduceOp.MAX)
            state.active[name] = seen.to(active.device, torch.bool)
        return state

    def _from(self, rank: int, own: LinearStatistics) -> LinearStatistics:
        received: dict[str, Tensor] = {}
        for key, tensor in own.tensors().items():
            # A copy, as what is received is written into it.
            received[key] = tensor.to(self.device, copy=True)
            distributed.broadcast(received[key], rank)
        return LinearStatistics.from_tensors(received)

    def close(self) -> None:
        """End the conversation that this object began."""
        if self._own:
            distributed.destroy_process_group()

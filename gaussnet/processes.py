"""The processes that accelerate or torchrun started for a command, and what they hand each other.

    accelerate launch --cpu --multi_gpu --num_processes 2 --no_python gaussnet COMMAND ...

Work is shared by rank; results travel as Python objects over gloo, whatever the device of the work.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

T = TypeVar("T")
_PATIENCE = timedelta(days=7)  # of a process that has done its share


@dataclass(frozen=True)
class Processes:
    """This process among how many."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    def gather(self, share: list[T]) -> list[T]:
        """The shares of all processes, in the order of ranks; in every process."""
        if self.world == 1:
            return share
        shares: list[list[T]] = [[] for _ in range(self.world)]
        distributed.all_gather_object(shares, share)
        return [entry for part in shares for entry in part]

    def device(self, name: str | None = None) -> torch.device:
        """The device that `--device` names; default: this process's GPU if there is one."""
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        # Without a number the index is None, whatever PyTorch's annotations say.
        if device.type == "cuda" and device.index is None and self.world > 1:  # pyright: ignore[reportUnnecessaryComparison]
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return device


@contextmanager
def joined_processes() -> Generator[Processes]:
    """Joins the processes of a launcher, for as long as the context lasts; one, without a launcher."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        yield Processes()
        return
    distributed.init_process_group("gloo", timeout=_PATIENCE)
    try:
        yield Processes(distributed.get_rank(), distributed.get_world_size())
        # All end together. Without a pause, gloo's threads may still hold what was gathered; to let go of it,
        # they need the interpreter, with which PyTorch 2.6 waits for them in vain in what follows.
        distributed.barrier()
    finally:
        distributed.destroy_process_group()

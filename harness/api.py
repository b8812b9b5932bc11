"""The pieces for a training loop of one's own, in one place; each can be used without the others.

docs/own.md shows how. These names stay; what they do beyond their documentation may change.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from harness import checkpoint
from harness.buffers import (
    averaged_buffers,
    gather_buffers,
    gather_residuals,
    restore_buffers,
    restore_residuals,
)
from harness.comm import Communicator, broadcast_bytes, open_communicator
from harness.comm.together import together
from harness.config import load_config
from harness.data.sampler import GlobalBatchSampler
from harness.errors import CheckpointError
from harness.lamb import LAMB
from harness.lars import LARS
from harness.optimizer import set_rates
from harness.reducer import GradientReducer
from harness.schedule.growth import Fixed, Geometric, Linear, Listed
from harness.schedule.rates import RateSchedule
from harness.schedule.updates import Update, Updates
from harness.torchvision_ops import import_tolerantly
from harness.units import Duration

__all__ = [
    "LAMB",
    "LARS",
    "Checkpoints",
    "Communicator",
    "Duration",
    "Fixed",
    "Geometric",
    "GlobalBatchSampler",
    "GradientReducer",
    "Linear",
    "Listed",
    "RateSchedule",
    "Update",
    "Updates",
    "import_tolerantly",
    "load_config",
    "open_communicator",
    "set_rates",
]


class Stateful(Protocol):
    """What can be saved: a model, an optimizer, a reducer, `Updates`, …"""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """Saves parts of a run together and restores them: atomic, verified, the newest valid wins.

    Rank 0 writes and reads, the others get it from there. On as many ranks the run goes on bit for
    bit; on another number batch norm's running statistics are the mean over ranks, and what fp16's
    error feedback owes is shared out. The files are those of a harness run: a dict by part, which
    ``torch.load(weights_only=True)`` reads, and its SHA-256.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        comm: Communicator,
        keep: int = 3,
        **parts: Stateful,
    ) -> None:
        """``keep``: how many stay on the disk; ``parts``: by the names that they have in the file.

        Raises ValueError if there is nothing to save.
        """
        if not parts:
            raise ValueError("name the parts to save, as model=model, optimizer=optimizer")
        self._directory, self._comm, self._keep, self._parts = Path(directory), comm, keep, parts

    def save(self, update: int) -> None:
        """Write one of the run after so many updates. Collective. Raises AllLeave if rank 0 cannot.

        A model's buffers are written as the mean over ranks, and each rank's own beside them.
        """
        models = [part for part in self._parts.values() if isinstance(part, nn.Module)]
        tables = [gather_buffers(model, self._comm) for model in models]
        owed = [gather_residuals(part.residuals, self._comm) for part in self._reducers()]
        states: dict[str, Any] = {}
        for name, part in self._parts.items():
            if isinstance(part, nn.Module):
                with averaged_buffers(part, tables[models.index(part)]):
                    # The buffers are put back before the file is written.
                    states[name] = {k: v.detach().clone() for k, v in part.state_dict().items()}
            else:
                states[name] = part.state_dict()
        states |= {"rank_buffers": tables, "rank_residuals": owed}
        together(self._comm, lambda: self._write(update, states) if self._comm.rank == 0 else None)

    def restore(self) -> bool:
        """Go on from the newest valid one, if there is any. Collective.

        One that is damaged is passed over with a warning. Raises AllLeave where none of several is
        valid, or if it does not fit the parts.
        """
        content = together(self._comm, lambda: self._read() if self._comm.rank == 0 else b"")
        content = broadcast_bytes(
            self._comm, content if self._comm.rank == 0 else None, "checkpoint"
        )
        if not content:
            return False
        together(self._comm, lambda: self._load(checkpoint.load_state(content, "checkpoint")))
        return True

    def _write(self, update: int, states: dict[str, Any]) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        checkpoint.save_checkpoint(self._directory, update, states, self._keep, lambda: None)

    def _read(self) -> bytes:
        if not self._directory.is_dir():
            return b""

        def passed_over(path: Path, why: str) -> None:
            warnings.warn(f"{path} is passed over: {why}", stacklevel=5)

        found = checkpoint.newest_valid(self._directory, passed_over)
        return b"" if found is None else found.content

    def _load(self, state: dict[str, Any]) -> None:
        missing = sorted(self._parts.keys() - state.keys())
        if missing:
            raise CheckpointError(f"checkpoint: it has no part {', '.join(missing)}")
        tables, owed = iter(state["rank_buffers"]), iter(state["rank_residuals"])
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
            if isinstance(part, nn.Module):
                restore_buffers(part, next(tables), self._comm)
            elif isinstance(part, GradientReducer):
                restore_residuals(part.residuals, next(owed), self._comm)

    def _reducers(self) -> list[GradientReducer]:
        return [part for part in self._parts.values() if isinstance(part, GradientReducer)]

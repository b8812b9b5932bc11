"""A small model that holds a rank at a moment of its work, or spoils what it computes there.

It lies beside a run (``model.name=planted:net``) with ``plan.json``, which says what is to happen
to whom and when. A rank that is held writes ``held`` and waits for ``go``; what is to be done to
it, or to others, is done from outside in between. With ``kill`` it ends itself there instead. A
plan is carried out once, by whichever launch of the run comes to its moment first.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import time
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness import checkpoint, environment
from harness.gradient_step import GradientStep
from harness.reducer import GradientReducer

SIDE, CLASSES = 8, 10


class Plan:
    """What is to happen in this process; without ``plan.json`` nothing is."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rank = environment.launched_rank()
        self.updates = 0
        """That this launch has begun."""
        self._times = 0
        """How often this process has come to the moment."""
        try:
            self._plan: dict[str, Any] = json.loads((folder / "plan.json").read_text("utf-8"))
        except FileNotFoundError:
            self._plan = {"moment": None}

    @property
    def pause(self) -> float:
        """Seconds that each training pass takes more."""
        return float(self._plan.get("pause", 0.0))

    def here(self, moment: str) -> bool:
        """Whether this rank has come to the plan's moment, and nobody has before."""
        if moment != self._plan["moment"] or self._rank != self._plan["rank"]:
            return False
        if self.updates < self._plan["update"]:
            return False
        self._times += 1
        if self._times < self._plan.get("times", 1):
            return False
        first = self._first()
        return first or self._plan.get("always", False)

    def _first(self) -> bool:
        try:
            struck = os.open(self._folder / "struck", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        os.write(struck, repr(time.time()).encode())
        os.close(struck)
        return True

    def hold(self, moment: str) -> None:
        """Wait here to be released, or worse, if this is the plan's moment."""
        if not self.here(moment):
            return
        if self._plan.get("kill", False):
            os.kill(os.getpid(), signal.SIGKILL)
        part = self._folder / "held.part"
        part.write_text(str(os.getpid()), encoding="ascii")
        part.replace(self._folder / "held")
        while not (self._folder / "go").exists():
            time.sleep(0.002)

    def enters_collective(self) -> None:
        """Tell that this rank is about to wait for the one that is held before the collective."""
        others = self._plan["moment"] == "collective" and self._rank != self._plan["rank"]
        if others and self.updates == self._plan["update"]:
            (self._folder / f"entered-{self._rank}").touch()

    def spoiled(self, what: str, value: Tensor) -> Tensor:
        """The same, or with NaN or inf for its first number."""
        if not self.here(what):
            return value
        value = value.clone()
        value.view(-1)[0] = float(self._plan["value"])
        return value

    def exhaust_memory(self) -> None:
        """Take all memory there is for this process, which is little from here on."""
        if not self.here("memory"):
            return
        used = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
        limit = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, limit))
        taken = [torch.ones(2**22) for _ in range(64)]  # 16 MiB each: one of them is too many
        raise AssertionError(f"{len(taken)} tensors found room")


PLAN = Plan(Path.cwd())


class _Spoil(torch.autograd.Function):
    """The identity, whose gradient the plan may spoil."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return PLAN.spoiled("gradients", gradient)


class Planted(nn.Module):
    """One hidden layer, on images of 1 × 8 × 8."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(SIDE * SIDE, width)
        self.out = nn.Linear(width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10) of images (N, 1, 8, 8)."""
        values = images.flatten(1)
        if values.device.type == "cpu":
            if self.training:
                time.sleep(PLAN.pause)
                PLAN.exhaust_memory()
                values = PLAN.spoiled("inputs", values)
            else:
                PLAN.hold("evaluation")
        # Before the ReLU, which gives back nothing where it is inactive.
        values = torch.relu(_Spoil.apply(self.hidden(values)))
        logits: Tensor = self.out(values)
        return PLAN.spoiled("loss", logits) if self.training else logits


class _Slow(io.RawIOBase):
    """Hands on what torch writes of a checkpoint; a plan may hold it in the middle."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> Any:
        written = self._target.write(content)
        PLAN.hold("checkpoint")
        return written


def _watch() -> None:
    """Let the plan know where this process is."""
    gradient, finish = GradientStep.gradient, GradientReducer.finish
    save, write_atomic = torch.save, checkpoint.write_atomic

    @wraps(gradient)
    def watched_gradient(*arguments: Any) -> Any:
        PLAN.updates += 1
        PLAN.hold("update")
        return gradient(*arguments)

    @wraps(finish)
    def watched_finish(*arguments: Any) -> Any:
        PLAN.hold("collective")
        PLAN.enters_collective()
        return finish(*arguments)

    @wraps(save)
    def watched_save(state: Any, file: Any) -> None:
        save(state, _Slow(file))

    @wraps(write_atomic)
    def watched_write(*arguments: Any) -> None:
        write_atomic(*arguments)
        PLAN.hold("digest")

    GradientStep.gradient = watched_gradient  # type: ignore[method-assign]
    GradientReducer.finish = watched_finish  # type: ignore[method-assign]
    torch.save = watched_save
    checkpoint.write_atomic = watched_write


def net(width: int = 16) -> nn.Module:
    """The model of a run; from here on its process follows the plan."""
    PLAN.hold("start")
    _watch()
    return Planted(width)

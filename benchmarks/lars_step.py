"""Time of one optimizer step on ResNet-50's parameters: SGD, LARS, LAMB, AdamW, a LARS loop.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/lars_step.py [--repeats 21] [--device cuda]

Prints a Markdown table. On a CPU all run with one thread; on a GPU times are those between two
events, and a column counts how often a step makes the host wait for the device.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from harness.lamb import LAMB
from harness.lars import LARS
from harness.torchvision_ops import import_tolerantly

DECAY = {"lr": 0.1, "weight_decay": 1e-4}
SGD = DECAY | {"momentum": 0.9}


class LoopLARS(torch.optim.Optimizer):
    """LARS as it is commonly written: a loop over parameters, each with a few plain operations."""

    def __init__(self, params: Iterable[Tensor], **options: Any) -> None:
        super().__init__(params, options)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for w in group["params"]:
                g, decay, trust = w.grad, 0.0, 1.0
                if w.dim() > 1:
                    decay = group["weight_decay"]
                    w_norm, g_norm = w.norm().item(), g.norm().item()
                    if w_norm > 0 and g_norm > 0:
                        trust = 0.001 * w_norm / (g_norm + decay * w_norm)
                update = g.add(w, alpha=decay).mul(trust * group["lr"])
                state = self.state[w]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(w)
                v = state["momentum_buffer"]
                v.mul_(group["momentum"]).add_(update)
                w.add_(v, alpha=-1.0)


SUBJECTS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "torch SGD, foreach": lambda params: torch.optim.SGD(params, **SGD, foreach=True),
    "torch SGD, fused": lambda params: torch.optim.SGD(params, **SGD, fused=True),
    "LARS": lambda params: LARS(params, **SGD),
    "LARS, Nesterov": lambda params: LARS(params, **SGD, nesterov=True),
    "LARS as a loop over parameters": lambda params: LoopLARS(params, **SGD),
    "LAMB": lambda params: LAMB(params, **DECAY),
    "torch AdamW, foreach": lambda params: torch.optim.AdamW(params, **DECAY, foreach=True),
    "torch AdamW, fused": lambda params: torch.optim.AdamW(params, **DECAY, fused=True),
}


def parameters(device: str) -> list[nn.Parameter]:
    """ResNet-50's, with gradients."""
    model = import_tolerantly("torchvision.models").resnet50().to(device)
    for parameter in model.parameters():
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    return list(model.parameters())


def on_cpu(step: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)


def on_cuda(step: Callable[[], Any]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def syncs(step: Callable[[], Any]) -> int:
    """How often the host waits for the GPU in a step."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    cuda = asked.device == "cuda"
    timed = on_cuda if cuda else on_cpu
    steps = {name: build(parameters(asked.device)).step for name, build in SUBJECTS.items()}
    for step in steps.values():  # the states are made in the first step
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(asked.repeats):  # in turn, so that a busy spell slows all alike
        for name, step in steps.items():
            times[name].append(timed(step))
    base = statistics.median(times["torch SGD, foreach"])
    waits = {name: syncs(step) for name, step in steps.items()} if cuda else {}
    print("| step | median, ms | fastest to slowest | × SGD, foreach |" + " waits |" * cuda)
    print("|---|---|---|---|" + "---|" * cuda)
    for name, spent in times.items():
        middle = statistics.median(spent)
        row = f"| {name} | {middle:.1f} | {min(spent):.1f} to {max(spent):.1f} |"
        print(f"{row} {middle / base:.2f} |" + (f" {waits[name]} |" if cuda else ""))


if __name__ == "__main__":
    main()

"""What TensorBoard's scalars cost a run: CPU time of their calls against that of all training.

Usage: .venv/bin/python benchmarks/tensorboard_cost.py [KEY=VALUE ...]
Processor time, so that other work on the machine does not count.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness.tensorboard import Scalars
from harness.worker import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "adabatch-digits.yaml"
spent = {"line": 0.0, "evaluation": 0.0, "sync": 0.0}
calls = dict.fromkeys(spent, 0)


def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        begin = time.thread_time()
        result = method(*arguments)
        spent[name] += time.thread_time() - begin
        calls[name] += 1
        return result

    return call


def main() -> int:
    for name in spent:
        setattr(Scalars, name, timed(name, getattr(Scalars, name)))
    with tempfile.TemporaryDirectory() as directory:
        words = ["train.duration=10ep", "train.tensorboard=true", *sys.argv[1:]]
        begin = time.process_time()
        code = train(CONFIG, words, Path(directory) / "run", resume=False)
        total = time.process_time() - begin
    share = sum(spent.values()) / total
    print(json.dumps({"calls": calls, "seconds": spent, "all": total, "share": share}))
    return code


if __name__ == "__main__":
    sys.exit(main())

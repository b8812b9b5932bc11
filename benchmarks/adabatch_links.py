"""What a growing batch saves in wall time on two ranks, on an unlimited and on a slow link.

    sudo python benchmarks/adabatch_links.py [--rates 0,1gbit] [--repeats 3] [--duration 30ep]

The variants of configs/studies/adabatch.yaml on two test hosts of this machine, one rank each
(tests/testbed.py; root is needed), in turn; time is that of training as the run's record has it,
without starts, evaluations and checkpoints. Speed-up is over the small fixed batch, paired by
repeat, with a 95 % interval. Devarakonda, Naumov and Garland (2017) print 3.54 for VGG19 and 6.25
for ResNet-20 on CIFAR-100 and four P100 (Section 3, Figure 1), against a fixed batch of 128.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from math import exp, log
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

VARIANTS = ("fixed-64", "adaptive-x2", "adaptive-x4", "adaptive-x8")
PRINTED = (3.54, 6.25)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", default="0,1gbit", help="of the links; 0: unlimited")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--duration", default="30ep")
    options = parser.parse_args()
    from testbed import missing_for_testbed

    reason = missing_for_testbed()
    if reason is not None:
        raise SystemExit(f"adabatch_links: {reason}")
    printed = " and ".join(map(str, PRINTED))
    print(f"Two ranks, {options.repeats} repeats; the paper's speed-ups: {printed}.\n")
    print("| link | variant | updates | seconds | speed-up [95 %] |")
    print("|---|---|---|---|---|")
    for rate in options.rates.split(","):
        with tempfile.TemporaryDirectory() as folder:
            _compare(Path(folder), rate, options.repeats, options.duration)


def _compare(folder: Path, rate: str, repeats: int, duration: str) -> None:
    from testbed import Testbed

    from harness.environment import CYCLE_TIME, FUSION, YIELD
    from harness.student import mean_interval

    os.environ.update({"OMP_NUM_THREADS": "1", CYCLE_TIME: "0.1", FUSION: "0", YIELD: "1"})
    passed = ["PATH", "OMP_NUM_THREADS", CYCLE_TIME, FUSION, YIELD]
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    updates: dict[str, int] = {}
    limit = {} if rate == "0" else {"rate": rate}
    with Testbed(2, folder, **limit) as bed:
        for repeat in range(repeats):
            for name in VARIANTS:
                run = folder / f"{name}-{repeat}"
                command = [sys.executable, "-m", "harness", "train", str(_config(name, folder))]
                command += [f"seed={repeat}", f"train.duration={duration}", "--run-dir", str(run)]
                done = subprocess.run(bed.mpirun(command, passed), capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
                lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
                end = next(e for e in map(json.loads, lines) if e["kind"] == "end")
                times[name].append(end["seconds"])
                updates[name] = end["update"]
    for name in VARIANTS:
        pairs = zip(times["fixed-64"], times[name], strict=True)
        mean, low, high = mean_interval([log(slow / fast) for slow, fast in pairs])
        told = f"{exp(mean):.2f}"
        if low is not None and high is not None:
            told += f" [{exp(low):.2f}, {exp(high):.2f}]"
        seconds = sum(times[name]) / repeats
        where = "unlimited" if rate == "0" else rate
        print(f"| {where} | {name} | {updates[name]} | {seconds:.2f} | {told} |", flush=True)


def _config(variant: str, folder: Path) -> Path:
    """The study's configuration of a variant on two ranks."""
    from harness.config import dump_config
    from harness.study.cells import Arm, load_study

    config = load_study(ROOT / "configs" / "studies" / "adabatch.yaml").cell(Arm(variant), 0).config
    ranks = config.ranks.model_copy(update={"start": 2})
    comm = config.comm.model_copy(update={"backend": "horovod"})
    path = folder / f"{variant}.yaml"
    config = config.model_copy(update={"ranks": ranks, "comm": comm})
    path.write_text(dump_config(config), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()

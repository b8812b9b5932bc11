"""What a growing batch saves in wall time on two ranks, on an unlimited and on a slow link.

    sudo .venv/bin/python benchmarks/adabatch_links.py [--rates 0,1gbit] [--repeats 5]

The variants of configs/studies/adabatch.yaml on two test hosts of this machine, one rank each
(tests/testbed.py; root is needed), in random order within each repeat; time is that of training as
the run's record has it, without starts, evaluations and checkpoints. Speed-up is over the small
fixed batch, paired by repeat, with a 95 % interval. Devarakonda, Naumov and Garland (2017) print
3.54 for VGG19 and 6.25 for ResNet-20 on CIFAR-100 and four P100 (Section 3, Figure 1), against a
fixed batch of 128. Writes adabatch-links.md and .csv to --out.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

NAME = "adabatch-links"
VARIANTS = ("fixed-64", "adaptive-x2", "adaptive-x4", "adaptive-x8")
PRINTED = (3.54, 6.25)


@dataclass(frozen=True)
class Timed:
    """One run."""

    link: str
    variant: str
    repeat: int
    updates: int
    seconds: float
    accuracy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rates", default="0,1gbit", help="of the links; 0: unlimited")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--duration", default="30ep")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "studies")
    options = parser.parse_args()
    from testbed import missing_for_testbed

    reason = missing_for_testbed()
    if reason is not None:
        raise SystemExit(f"adabatch_links: {reason}")
    runs: list[Timed] = []
    for rate in options.rates.split(","):
        with tempfile.TemporaryDirectory() as folder:
            runs += _compare(Path(folder), rate, options.repeats, options.duration)
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(asdict(runs[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) for one in runs)
    text = page(runs, options.duration)
    (options.out / f"{NAME}.md").write_text(text, encoding="utf-8")
    print(text)


def _compare(folder: Path, rate: str, repeats: int, duration: str) -> list[Timed]:
    from testbed import Testbed

    from harness.environment import CYCLE_TIME, FUSION, YIELD
    from harness.jsonl import read_jsonl

    os.environ.update({"OMP_NUM_THREADS": "1", CYCLE_TIME: "0.1", FUSION: "0", YIELD: "1"})
    passed = ["PATH", "OMP_NUM_THREADS", CYCLE_TIME, FUSION, YIELD]
    limit = {} if rate == "0" else {"rate": rate}
    link = "unlimited" if rate == "0" else rate.replace("gbit", " Gbit/s")
    found = []
    with Testbed(2, folder, **limit) as bed:
        for repeat in range(repeats):
            for name in random.Random(repeat).sample(VARIANTS, len(VARIANTS)):  # noqa: S311
                run = folder / f"{name}-{repeat}"
                command = [sys.executable, "-m", "harness", "train", str(_config(name, folder))]
                command += [f"seed={repeat}", f"train.duration={duration}", "--run-dir", str(run)]
                done = subprocess.run(bed.mpirun(command, passed), capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
                events = [line for line in read_jsonl(run / "events.jsonl") if line]
                end = next(one for one in events if one["kind"] == "end")
                last = [one for one in events if one["kind"] == "evaluation"][-1]
                print(f"{link}: {name}, {repeat}", file=sys.stderr, flush=True)
                found.append(
                    Timed(link, name, repeat, end["update"], end["seconds"], last["accuracy"])
                )
    return found


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


def page(runs: Sequence[Timed], duration: str) -> str:
    repeats = 1 + max(one.repeat for one in runs)
    printed = " and ".join(f"{value} ×" for value in PRINTED)
    return "\n".join([
        "# What a growing batch saves in wall time on two ranks",
        "",
        "The variants of [adabatch](adabatch.md) on two ranks, each with a host and a thread to",
        "itself, joined by a link without a limit (memory, in truth) or of the given rate. Time is",
        f"that of the updates of {duration[:-2]} epochs. Speed-up is over the fixed batch of 64",
        "at the same number of epochs, paired by repeat: geometric means with 95 % intervals over",
        f"{repeats} repeats (Student's t of logarithms).",
        "",
        "    sudo .venv/bin/python benchmarks/adabatch_links.py",
        "",
        "| link | variant | updates | seconds | speed-up (95 %) | test accuracy at the end, % |",
        "|---|---|---|---|---|---|",
        *(row(runs, link, name) for link in dict.fromkeys(one.link for one in runs)
          for name in VARIANTS),
        "",
        f"Devarakonda, Naumov and Garland (2017, Section 3) print {printed} for VGG19 and",
        "ResNet-20 on CIFAR-100 and four P100, of batches that grow from 1,024 to 16,384 against a",
        "fixed batch of 128. Theirs begin eight times larger, on devices that large batches fill",
        "better. Here all begin with 64 and grow by accumulation, so that an image takes as long",
        "in a large batch as in a small one: what is saved is the fixed cost of an update and its",
        "allreduce, and at most as much as updates are.",
        "",
        f"Every run: [{NAME}.csv]({NAME}.csv).",
        "",
    ])  # fmt: skip


def row(runs: Sequence[Timed], link: str, variant: str) -> str:
    from harness.student import ratio_text

    def of(name: str) -> list[Timed]:
        return [one for one in runs if (one.link, one.variant) == (link, name)]

    own = of(variant)
    pairs = zip(of("fixed-64"), own, strict=True)
    logs = [log(slow.seconds / fast.seconds) for slow, fast in pairs]
    told = "1.00" if variant == "fixed-64" else ratio_text(logs)
    seconds = sum(one.seconds for one in own) / len(own)
    accuracy = 100 * sum(one.accuracy for one in own) / len(own)
    return f"| {link} | {variant} | {own[0].updates} | {seconds:.2f} | {told} | {accuracy:.2f} |"


if __name__ == "__main__":
    main()

"""Causes that were planted in real runs, found by the page that each run leaves: a slow loader, a
large optimizer step, a slow link, ranks with unequal work, and none. A slow rank is in
test_profile_ranks.py."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from images import encoded, photo, write
from jobs import Where, harness, here, lines
from support import require
from testbed import Testbed, missing_for_testbed

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

# Models of one's own. Work: much of it for each sample, and few weights. Weights: the reverse.
MODELS = """
from torch import nn


def work(num_classes):
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, num_classes))


def small(num_classes):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(32, num_classes))


def weights(num_classes):
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16, 2000), nn.Linear(2000, 2000),
        nn.Linear(2000, num_classes))
"""
DIGITS: dict[str, Any] = {
    "name": "planted",
    "data": {"dataset": "digits", "augment": False},
    "model": {"name": "mine:work"},
    "batch": {"initial": 64, "micro": 32},
    "lr": {"base": 0.01},
    "ranks": {"threads": 1},
    "launch": {"interfaces": ["lo"]},
    "comm": {"compression": "none"},
    "train": {"duration": "60up", "eval_every": None, "checkpoint_every": None, "log_every": 5},
}
OF_A_BUSY_MACHINE = ("uneven", "sums", "comm_exposed")
SLOW_LINK = 20e6
"""Bits a second."""


def run(
    folder: Path, changes: dict[str, Any], hosts: str = "localhost:2", where: Where = here
) -> Path:
    """A run of two ranks; its report's directory."""
    content = DIGITS | {key: DIGITS.get(key, {}) | value for key, value in changes.items()}
    (folder / "mine.py").write_text(MODELS)
    config = folder / "planted.yaml"
    config.write_text(yaml.safe_dump(content))
    words = ["run", config, "--ranks", "2", "--hosts", hosts, "--run-dir", folder / "run"]
    done = harness(*words, "--max-restarts", "0", cwd=folder, where=where)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "run" / "report"


def causes(report: Path) -> dict[str, str]:
    """Kind and sentences of each cause, which the page says and nothing else.

    Left out is what ranks of one host lose to each other and to whatever else runs there, since a
    machine that has other things to do makes them wait, and the page is right to say so.
    """
    summary = json.loads((report / "summary.json").read_text(encoding="utf-8"))
    (one,) = summary["runs"]
    found = {finding["kind"]: finding["text"] for finding in one["findings"]}
    page = re.sub(r"<[^>]+>", "", (report / "index.html").read_text(encoding="utf-8"))
    for text in found.values():
        assert text in html.unescape(page)
    if not found:
        assert "no other phase takes a fifth or more" in html.unescape(page)
    return {kind: text for kind, text in found.items() if kind not in OF_A_BUSY_MACHINE}


def numbers(report: Path) -> dict[str, float]:
    summary = json.loads((report / "summary.json").read_text(encoding="utf-8"))
    return {one["name"]: one["value"] for one in summary["runs"][0]["numbers"]}


def test_no_cause_is_named_where_there_is_none(tmp_path: Path) -> None:
    assert causes(run(tmp_path, {})) == {}


def test_a_slow_loader(tmp_path: Path) -> None:
    """Large photographs that the rank itself decodes."""
    for split, count in (("train", 32), ("val", 2)):
        for label in "ab":
            data = encoded(photo(1600, 1200, ord(label)))
            for i in range(count):
                write(tmp_path / "photos" / split / label / f"{i:02}.jpg", data)
    data = {"dataset": "folder", "root": str(tmp_path / "photos"), "image_size": 32}
    changes = {"data": data, "model": {"name": "mine:small"}, "train": {"duration": "20up"}}
    report = run(tmp_path, changes)
    found = causes(report)
    assert found.keys() == {"data"}
    assert found["data"].startswith("Waiting for data takes ")
    assert "more than anything else" in found["data"]
    assert "data.workers" in found["data"]


def test_a_large_optimizer_step(tmp_path: Path) -> None:
    changes = {
        "model": {"name": "mine:weights"},
        "batch": {"initial": 2, "micro": 1},
        "optimizer": {"name": "lamb", "weight_decay": 1e-4},
        "comm": {"compression": "fp16"},
    }
    found = causes(run(tmp_path, changes))
    assert found.keys() == {"optimizer"}
    assert found["optimizer"].startswith("Optimizer step takes ")
    assert "A larger global batch makes fewer steps" in found["optimizer"]


def test_micro_batches_that_do_not_divide_evenly_among_the_ranks(tmp_path: Path) -> None:
    report = run(tmp_path, {"batch": {"initial": 96, "micro": 32}})
    assert causes(report) == {}  # no rank is slow: one of them has more to do
    (told,) = json.loads((report / "summary.json").read_text(encoding="utf-8"))["causes"]
    assert told.startswith("Waiting for ranks that come later takes ")
    assert "3 micro-batches do not divide evenly among 2 ranks" in told


def test_a_slow_link(tmp_path: Path) -> None:
    missing = missing_for_testbed()
    require(missing is None, str(missing))
    changes = {
        "model": {"name": "lenet5"},
        "launch": {"interfaces": ["eth0"]},
        "train": {"duration": "60up"},
    }
    with Testbed(2, tmp_path, rate=f"{SLOW_LINK:.0f}bit") as bed:
        report = run(tmp_path, changes, "n1:1,n2:1", lambda command: bed.on("n1", command))
    found = causes(report)
    assert found.keys() == {"link"}
    assert found["link"].startswith("Exposed communication takes ")
    assert "more than anything else" in found["link"]
    assert "The sums over ranks take it, not a slow rank" in found["link"]
    assert "between hosts" in found["link"]
    told = numbers(report)
    # Of two ranks each sends its gradients once, and the link lets a burst pass. How far below its
    # rate they stay is the machine's matter as well.
    sent = sum(line["comm_bytes"] for line in lines(tmp_path / "run" / "metrics.jsonl"))
    assert told["bus_bytes_per_update"] == pytest.approx(sent / 60, rel=1e-3)
    assert 0 < told["bus_bandwidth_low"] < 1.5 * SLOW_LINK

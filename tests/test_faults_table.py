"""What the fault matrix makes of its findings: tables, slopes, the page that shows them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from faults import cycles, matrix, publish, soak
from faults.cycles import Cycle
from faults.scene import Finding
from faults.soak import Look

WANTED = {
    "SIGKILL": ("kill-update-0", "kill-update-1", "kill-collective-0", "kill-collective-1"),
    "inside": ("kill-checkpoint-0", "kill-evaluation-1", "kill-start-0", "kill-start-1"),
    "asked to stop": ("term-one", "term-all", "int-launcher", "usr2-one", "usr2-all"),
    "hang": ("hang-0", "hang-1"),
    "network": ("cut", "cut-restored", "drop", "drop-restored"),
    "disk": ("full-checkpoint", "full-metrics", "read-only"),
    "checkpoint": (
        "checkpoint-truncated",
        "checkpoint-bit",
        "checkpoint-empty",
        "checkpoint-foreign",
        "checkpoint-newer",
    ),
    "two writers": ("race", "old-writer"),
    "numbers": ("nan-loss", "inf-gradients", "nan-inputs", "memory", "clock-back"),
}


def test_every_kind_of_fault_has_its_rows() -> None:
    names = [row.name for row in matrix.ROWS]
    assert len(set(names)) == len(names)
    assert {name for group in WANTED.values() for name in group} <= set(names)
    assert any(row.quick for row in matrix.ROWS)


class TestChoosing:
    def test_a_name_stands_for_itself_and_all_that_begin_with_it(self) -> None:
        assert [row.name for row in matrix.chosen(["cut"], quick=False)] == [
            "cut",
            "cut-restored",
            "cut-briefly",
        ]
        assert matrix.chosen([], quick=False) == list(matrix.ROWS)
        assert all(row.quick for row in matrix.chosen([], quick=True))

    def test_another_name_is_answered_with_the_valid_ones(self) -> None:
        with pytest.raises(ValueError, match=r"no row nan-los \(did you mean nan-loss\?\); valid:"):
            matrix.chosen(["nan-los"], quick=False)


class TestTable:
    def test_has_a_line_for_each_row_with_its_repeats_together(self) -> None:
        findings = [
            Finding("cut", n, 0, "a | b", "lost <it>", 10.0 + n, "fault", [0], n, True, True)
            for n in range(3)
        ]
        (line,) = [row for row in matrix.table(findings).splitlines() if "`cut`" in row]
        assert line == (
            "| `cut`: a \\| b, 3 times | lost &lt;it> | 10.0 to 12.0 | 0 to 2 | 0 | yes | yes |"
        )

    def test_says_what_was_not_kept_and_what_was_not_tried(self) -> None:
        bad = Finding("race", 0, 0, "two", "x", same_weights=False, broken=["the weights differ"])
        none = Finding("cut", 0, 0, skipped="test hosts need root")
        text = matrix.table([bad, none])
        assert "**Broken: the weights differ**" in text
        assert "| **no** |" in text
        assert "| `cut` | not tried: test hosts need root |" in text
        found = matrix.summary([bad, none])
        assert (found["tried"], found["kept"], found["not_tried"]) == (1, 0, ["cut"])

    def test_findings_survive_a_stop_of_the_matrix(self, tmp_path: Path) -> None:
        found = Finding("race", 0, 7, "two", "x", 0.5, "fault", [0, 2], 3, True, True)
        (tmp_path / matrix.FILE).write_text(
            json.dumps({"findings": [found.as_dict()]}), encoding="utf-8"
        )
        assert matrix.load(tmp_path) == [found]


def looks(growth_per_hour: float, seed: int, processes: int = 12) -> list[Look]:
    """Of ranks that live a minute each, at levels of their own, and of one launcher."""
    noise = random.Random(seed)
    found = []
    for number in range(processes):
        level = noise.uniform(100, 120)
        for second in range(0, 80, 2):
            now = 80.0 * number + second
            value = level + growth_per_hour * second / 3600 + noise.gauss(0, 0.05)
            found.append(Look(now, "rank", number, second > 19, value, value, 20, 8))
            whole = 50 + growth_per_hour * now / 3600 + noise.gauss(0, 0.05)
            found.append(Look(now, "launcher", -1, True, whole, whole, 9, 2))
    return found


class TestSlope:
    @pytest.mark.parametrize("who", ["rank", "launcher"])
    def test_the_interval_holds_the_truth_nearly_always(self, who: str) -> None:
        for truth in (0.0, 30.0):
            slopes = [soak.slope(looks(truth, seed), who, "rss_mib") for seed in range(40)]
            assert sum(s.low <= truth <= s.high for s in slopes) >= 34
            assert all(math.isclose(s.per_hour, truth, abs_tol=15) for s in slopes)

    @pytest.mark.parametrize("who", ["rank", "launcher"])
    def test_a_leak_is_seen(self, who: str) -> None:
        assert not soak.slope(looks(60.0, 1), who, "rss_mib").flat
        assert soak.slope(looks(0.0, 1), who, "fds").flat

    def test_too_little_to_tell_is_said(self) -> None:
        assert soak.slope(looks(0.0, 1, processes=2), "rank", "rss_mib").per_hour is None
        assert soak.slope([], "launcher", "fds").per_hour is None


def test_cycles_are_counted_by_moment_and_victim() -> None:
    made = [
        Cycle(0, 1, "two ranks", "rank 1", "update", struck=True, stage=0, compared=True),
        Cycle(0, 1, "two ranks", "rank 1", "update", struck=True, stage=1),
        Cycle(0, 1, "two ranks", "rank 0", "checkpoint", finished=True),
    ]
    assert "| as an update begins | 2 |" in cycles.table(made)
    told = cycles.sentence(made)
    assert told.startswith("2 launches killed (1 in stage 0, 1 in stage 1); 1 newest checkpoints")
    assert "0 differed" in told


class TestPublishing:
    def test_only_what_is_between_the_markers_is_replaced(self) -> None:
        text = "a\n<!-- faults: soak -->\nold\n<!-- end of soak -->\nb\n"
        new = publish.between(text, "soak", r"new \1")
        assert new == "a\n<!-- faults: soak -->\nnew \\1\n<!-- end of soak -->\nb\n"
        with pytest.raises(ValueError, match="faults: matrix"):
            publish.between(text, "matrix", "")

    def test_the_page_has_room_for_all(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(publish.PAGE.read_text("utf-8"), encoding="utf-8")
        publish.publish(tmp_path, page)
        assert page.read_text("utf-8") == publish.PAGE.read_text("utf-8")
        for name in ("matrix", "cycles", "soak"):
            publish.between(page.read_text("utf-8"), name, "")

"""What people see while a run goes on."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from dataclasses import asdict

import pytest
from rich.console import Console

from harness.progress import MARK, LiveBar, Pace, PlainLines, Relay, Status, parse_relayed


def status(news: bool = False, accuracy: float | None = None) -> Status:
    return Status(
        fraction=0.5,
        epoch=15.0,
        epochs=30.0,
        stage=3,
        global_batch=512,
        ranks=2,
        accumulation=8,
        micro_batch=32,
        loss=0.125,
        images_per_sec=12345.6,
        eta_seconds=75.2,
        accuracy=accuracy,
        news=news,
    )


def test_a_line_holds_what_people_ask_for() -> None:
    stream = io.StringIO()
    PlainLines(stream).show(status(news=True, accuracy=0.975))
    assert stream.getvalue() == (
        "epoch  15.00/30  stage 3  batch 512 = 2 × 8 × 32  loss 0.1250  test acc 97.50%  "
        "12,346 images/s  ETA 1m15s\n"
    )


def test_plain_lines_come_for_news_and_now_and_then() -> None:
    rare, eager = io.StringIO(), io.StringIO()
    for stream, period in ((rare, 1e9), (eager, 0.0)):
        lines = PlainLines(stream, period)
        for news in (False, False, True):
            lines.show(status(news))
    assert rare.getvalue().count("\n") == 1
    assert eager.getvalue().count("\n") == 3


@pytest.mark.parametrize("around", ["{}", "[1,0]<stdout>:{}", "{}[1,1]<stdout>:", "[0]<stdout>:{}"])
def test_a_relayed_status_survives_what_launchers_do_to_lines(around: str) -> None:
    stream = io.StringIO()
    Relay(stream).show(status(news=True, accuracy=0.5))
    assert parse_relayed(around.format(stream.getvalue().rstrip()) + "\n") == status(True, 0.5)


@pytest.mark.parametrize("line", ["epoch 1", "@harness-progress {", '@harness-progress {"a": 1}'])
def test_other_lines_are_no_status(line: str) -> None:
    assert parse_relayed(line) is None


@pytest.mark.parametrize("width", [60, 80, 119, 120, 200])
def test_the_live_bar_keeps_to_one_line_with_the_most_telling_first(width: int) -> None:
    stream = io.StringIO()
    bar = LiveBar(Console(file=stream, force_terminal=True, width=width, color_system=None))
    bar.show(status())
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()).split("\r")[-1]
    bar.close()
    assert "\n" not in shown.strip("\n")
    assert len(shown.rstrip()) <= width
    assert ("━" in shown) == (width >= 120)
    assert " 50 %  ETA 1m15s  epoch  15.00/30  stage 3" in shown


def test_pace_is_the_rate_of_late() -> None:
    pace = Pace()
    assert pace.images_per_sec == 0.0
    for _ in range(100):
        pace.add(100, 1.0)
    assert pace.images_per_sec == pytest.approx(100)
    for _ in range(100):
        pace.add(300, 1.0)
    assert pace.images_per_sec == pytest.approx(300)


def test_a_reader_that_goes_away_ends_nothing() -> None:
    code = (
        "import sys\n"
        "from harness.progress import Unbreakable\n"
        "out = Unbreakable(sys.stdout)\n"
        "assert not out.isatty() and out.encoding\n"
        "for number in range(100000):\n"
        "    print(number, file=out, flush=True)\n"
        "print('still here', file=sys.stderr)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        assert process.stderr.read() == "still here\n"
        assert process.wait() == 0


@pytest.mark.parametrize(
    "payload", ['{"fraction": "a"}', "[" * 200_000, '{"epoch": 1}', "null", "[1]"], ids=range(5)
)
def test_what_a_rank_prints_that_is_no_status(payload: str) -> None:
    assert parse_relayed(f"{MARK}{payload}") is None


def test_a_status_of_other_types_is_none() -> None:
    words = asdict(status()) | {"fraction": "a"}
    assert parse_relayed(f"{MARK}{json.dumps(words)}") is None

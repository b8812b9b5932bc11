"""bench.json: what is written is read back; what is broken is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from benches import bench, point

from harness.benchfile import Failure, holds_bench, point_name, read_bench, write_bench
from harness.errors import DataError
from harness.schedule.costs import read_throughput

FULL = bench(point(1, 900.0, 1000.0, 1100.0), point(2, 1800.0), failures=(Failure("r", 1, "x"),))


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert not holds_bench(tmp_path)
    write_bench(tmp_path, FULL)
    assert holds_bench(tmp_path)
    assert read_bench(tmp_path) == FULL
    assert read_bench(tmp_path / "bench.json") == FULL


def test_what_is_not_known_is_null(tmp_path: Path) -> None:
    bare = bench(
        parameters=None,
        gradient_bytes=None,
        flops_per_image=None,
        peak_flops_per_rank=None,
        peak_source=None,
        status="partial",
    )
    write_bench(tmp_path, bare)
    written = json.loads((tmp_path / "bench.json").read_text())
    assert [written[key] for key in ("parameters", "flops_per_image", "peak_source")] == [None] * 3
    assert read_bench(tmp_path) == bare


def test_one_repeat_has_no_interval() -> None:
    one, three = FULL.points[1], FULL.points[0]
    assert (one.images_per_sec_low, one.images_per_sec_high) == (None, None)
    assert three.images_per_sec_low is not None
    assert three.images_per_sec_low < three.images_per_sec == pytest.approx(1000.0)


def test_keys_that_are_not_known_are_left_alone(tmp_path: Path) -> None:
    raw = FULL.as_dict() | {"later": [1, 2]}
    for key in ("failures", "seed", "order", "settings"):  # of nobody but harness bench
        del raw[key]
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    assert read_bench(tmp_path).points == FULL.points


def changed(path: str, value: Any) -> dict[str, Any]:
    """FULL with one value replaced; ``...``: taken away."""
    raw: dict[str, Any] = json.loads(json.dumps(FULL.as_dict()))
    *outer, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = raw
    for part in outer:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return raw


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("format", 2, "format must be 1"),
        ("mode", "sideways", "mode must be one of weak, strong, grid, not"),
        ("status", None, "status must be one of"),
        ("name", 3, "name must be text, not 3"),
        ("model", ..., "model must be text, but is missing"),
        ("parameters", ..., "parameters must be there, null where it is not known"),
        ("parameters", 1.5, "parameters must be a whole number"),
        ("flops_per_image", 0, "flops_per_image must be a number, more than 0"),
        ("machine", [], "machine must be a JSON object"),
        ("points", {}, "points must be a list"),
        ("points.0.ranks", 0, "points[0]: ranks must be a whole number, 1 or more, not 0"),
        ("points.1.images_per_sec", None, "points[1]: images_per_sec must be a number"),
        ("points.0.images_per_sec_low", "x", "images_per_sec_low must be a number"),
        ("points.0.confidence", 1.5, "confidence must be a number, more than 0, at most 1"),
        ("points.0.seconds.data", -1, "points[0]: seconds: data must be a number, 0 or more"),
        ("points.0.repeats", [], "repeats must be a list of one or more"),
        ("points.0.repeats.1.repeat", 0, "each with a number of its own"),
        ("points.0.repeats.2.warmup_windows", 100, "repeats[2]: warmup_windows must be less"),
        ("points.0.repeats.0.settled", 1, "settled must be true or false"),
        ("points.0.repeats.0", [], "repeats[0]: must be a JSON object, not []"),
        ("points.1.ranks", True, "ranks must be a whole number"),
        ("order", [["a", "b"]], "order must be a list of pairs"),
        ("failures", [{}], "failures[0]: point must be text, but is missing"),
    ],
)
def test_broken_files_are_refused(path: str, value: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(changed(path, value)))
    with pytest.raises(DataError) as refused:
        read_bench(tmp_path)
    assert said in str(refused.value)
    assert str(refused.value).startswith(str(file))


def test_a_point_that_stands_there_twice_is_refused(tmp_path: Path) -> None:
    write_bench(tmp_path, bench(point(1, 5.0), point(1, 6.0)))
    with pytest.raises(DataError, match="r0001-a0001-m0032 stands there twice"):
        read_bench(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "[" * 100_000])
def test_what_is_no_object_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text(content)
    with pytest.raises(DataError, match=r"not JSON|must be a JSON object"):
        read_bench(tmp_path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such file.*harness bench"):
        read_bench(tmp_path)


def test_names_tell_points_apart() -> None:
    assert point_name(4, 2, 32, 256) == "r0004-a0002-m0032"
    assert point_name(3, 1, 22, 64) == "r0003-a0001-m0022-b64"


def test_a_plan_is_priced_by_a_bench(tmp_path: Path) -> None:
    points = (point(2, 640.0), point(2, 800.0, accumulation=2), point(1, 500.0))
    write_bench(tmp_path, bench(*points))
    for path in (tmp_path, tmp_path / "bench.json"):
        found = read_throughput(path)
        assert found.seconds(2, 1, 32) == (pytest.approx(64 / 640), "measured")
        assert found.seconds(2, 2, 32) == (pytest.approx(128 / 800), "measured")
        seconds, basis = found.seconds(2, 3, 32) or (0.0, "")
        assert (seconds, basis) == (pytest.approx(0.22), "fitted")
        assert found.seconds(1, 1, 32) == (pytest.approx(32 / 500), "measured")
        assert found.seconds(4, 1, 32) is None
        assert found.bytes_per_update == 123460


def test_an_empty_bench_prices_nothing(tmp_path: Path) -> None:
    write_bench(tmp_path, bench(status="partial"))
    with pytest.raises(DataError, match="no point has been measured yet"):
        read_throughput(tmp_path)

"""`harness init`: what is asked, measured, written, and never overwritten."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft7Validator
from support import ROOT

from harness.config import load_config
from harness.data_sizes import CIFAR_TEST, CIFAR_TRAIN
from harness.dataset_table import DATASETS
from harness.doctor.looks import Look
from harness.errors import HarnessError, UsageError
from harness.first_config import Answers, InitRequest, best_point, configuration, init
from harness.schedule.plan import build_plan
from harness.schema import Data
from harness.yamlfile import read_yaml

QUICK: dict[str, Any] = {"measure": False}


def measured(*speeds: float, stopped: str = "no gain") -> Look:
    points = [
        {"micro": 8 * 2**k, "images_per_sec": speed, "memory_bytes": 10**6}
        for k, speed in enumerate(speeds)
    ]
    facts = {"device": "CPU", "threads": 1, "points": points, "stopped": stopped}
    return Look(json.loads(json.dumps(facts)))


def load(text: str, folder: Path) -> Any:
    path = folder / "made.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


@given(
    name=st.sampled_from(sorted(DATASETS)),
    ranks=st.integers(1, 3000),
    length=st.sampled_from(["1ep", "2.5ep", "90ep", "7up", "9000up", "400sa", "1s", "30min", "9h"]),
    samples=st.integers(1, 2_000_000),
    found=st.sampled_from([Look(), measured(100), measured(100, 190, 350, 360, 361),
                           measured(5, 9, stopped="memory")]),
)  # fmt: skip
def test_whatever_is_answered_makes_a_configuration_and_a_plan(
    tmp_path_factory: pytest.TempPathFactory, name: str, ranks: int, length: str, samples: int,
    found: Look,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("made")
    data = Data(dataset=name, root=str(folder) if DATASETS[name].files else None)
    text = configuration(Answers(data, "lenet5", ranks, length), found, samples)
    config = load(text, folder)
    assert config.ranks.start == ranks
    assert config.batch.micro * ranks <= max(config.batch.initial, ranks)
    plan = build_plan(config, samples)
    assert plan.stages[0].ranks == ranks
    if (config.batch.max or 0) > config.batch.initial and config.train.duration.unit == "ep":
        assert plan.stages[-1].global_batch <= config.batch.max


@given(st.lists(st.floats(1, 1e6), min_size=1, max_size=8), st.integers(8, 2048))
def test_the_smallest_micro_batch_that_is_nearly_the_fastest(
    speeds: list[float], at_most: int
) -> None:
    point = best_point(measured(*speeds), at_most)
    fitting = [speed for k, speed in enumerate(speeds) if 8 * 2**k <= at_most]
    assert point is not None
    assert point["micro"] <= at_most
    assert point["images_per_sec"] >= 0.95 * max(fitting)
    smaller = [s for k, s in enumerate(fitting) if 8 * 2**k < point["micro"]]
    assert all(speed < 0.95 * max(fitting) for speed in smaller)


def test_a_time_becomes_epochs_by_what_was_measured(tmp_path: Path) -> None:
    answers = Answers(Data(dataset="digits"), "lenet5", 2, "10min")
    config = load(configuration(answers, measured(100.0, 200.0, 400.0), 1437), tmp_path)
    assert str(config.train.duration) == f"{int(600 * 400 * 2 / 1437)}ep"
    text = configuration(answers, Look(failure="no torch"), 1437)
    assert "10min was wanted; nothing was measured" in text
    assert "batch.micro is a guess (no torch)" in text


# The command


def made(folder: Path, **given: Any) -> Path:
    out = folder / "first.yaml"
    assert init(InitRequest(out, yes=True, **{**QUICK, **given}), None) == 0
    return out


def test_what_is_written_is_valid_for_editors_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = made(tmp_path)
    first, *_ = out.read_text("utf-8").splitlines()
    assert first == "# yaml-language-server: $schema=harness.schema.json"
    schema = json.loads((tmp_path / "harness.schema.json").read_text("utf-8"))
    assert list(Draft7Validator(schema).iter_errors(read_yaml(out).data)) == []
    assert load_config(out).data.dataset == "digits"
    said = capsys.readouterr().out
    for command in ("plan", "doctor --ranks", "run", "config"):
        assert f"  harness {command} " in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.yaml", "harness.schema.json"]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_is_measured_for_no_time_is_refused(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--seconds .*: must be more than 0 and at most 3600"):
        init(InitRequest(tmp_path / "first.yaml", yes=True, seconds=seconds), None)
    assert not (tmp_path / "first.yaml").exists()


def test_nothing_is_overwritten_unless_it_is_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "first.yaml"
    out.write_text("mine")
    (tmp_path / "harness.schema.json").write_text("mine too")
    with pytest.raises(UsageError, match=r"first\.yaml is there already; .*--force"):
        made(tmp_path)
    assert out.read_text() == "mine"
    made(tmp_path, force=True)
    assert load_config(out)
    assert (tmp_path / "harness.schema.json").read_text() == "mine too"
    link = tmp_path / "link.yaml"
    link.symlink_to("nowhere")
    with pytest.raises(UsageError, match="is there already"):
        init(InitRequest(link, yes=True, measure=False), None)


def test_a_directory_of_files_is_recognised(tmp_path: Path) -> None:
    for name in (*CIFAR_TRAIN["cifar10"], CIFAR_TEST["cifar10"]):
        (tmp_path / name).write_bytes(b"")
    config = load_config(made(tmp_path, data=str(tmp_path)))
    assert (config.data.dataset, config.data.root) == ("cifar10", str(tmp_path))
    assert config.model.name == "resnet20"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"data": "digit"}, "digit is neither a directory nor a data set; valid: digits,"),
        ({"data": "cifar10"}, "cifar10 needs its files: give their directory"),
        ({"data": "."}, "no data set is found in it; say which: --data NAME --root ."),
        ({"data": "digits", "root": Path()}, "data.root = "),
        ({"model": "lenet-5"}, r"did you mean lenet5\?"),
        ({"ranks": 0}, "0 is no number of ranks"),
        ({"duration": "soon"}, "soon is no length; write epochs"),
        ({"duration": "0ep"}, "0ep is no length"),
        ({"duration": "0.0 h"}, "is no length"),
    ],
)
def test_answers_that_are_none(
    given: dict[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HarnessError, match=said):
        made(tmp_path, **given)
    assert list(tmp_path.iterdir()) == []


def test_questions_are_asked_until_they_are_answered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answers = io.StringIO("nothing\n\nresnet2\nresnet20\n-1\n4\n\n")
    assert init(InitRequest(measure=False), answers) == 0
    config = load_config(tmp_path / "digits-resnet20.yaml")
    assert (config.data.dataset, config.ranks.start) == ("digits", 4)
    said = capsys.readouterr().out
    assert [said.count(f"{word}: ") for word in ("Data", "Model", "Ranks", "How long")] == [
        2, 2, 2, 1,
    ]  # fmt: skip
    assert "did you mean" in said


def test_what_is_given_is_not_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = InitRequest(tmp_path / "a.yaml", "digits", None, "lenet5", 1, "3up", measure=False)
    assert init(request, io.StringIO("")) == 0
    assert "[" not in capsys.readouterr().out.partition("is written")[0]


def test_nobody_answers(tmp_path: Path) -> None:
    out = tmp_path / "a.yaml"
    with pytest.raises(UsageError, match="nothing was written"):
        init(InitRequest(out, measure=False), io.StringIO("digits\n"))
    with pytest.raises(UsageError, match="give --data, --model, --ranks, --duration, or --yes"):
        init(InitRequest(out, measure=False), None)
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ranks_available")
def test_a_machine_is_measured_and_the_run_runs(tmp_path: Path) -> None:
    out = tmp_path / "first.yaml"
    words = [sys.executable, "-m", "harness"]
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "init", str(out), "--yes", "--seconds", "1", "--ranks", "1", "--duration", "1ep"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    text = out.read_text("utf-8")
    assert "# Measured on " in text
    assert text.count("images/s") >= 3
    assert f"micro {load_config(out).batch.micro:>5}: " in text
    trained = subprocess.run(
        [*words, "train", str(out), "--run-dir", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environ,
    )
    assert trained.returncode == 0, trained.stderr
    assert (tmp_path / "run" / "metrics.jsonl").stat().st_size > 0

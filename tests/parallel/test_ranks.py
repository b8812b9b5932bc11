"""The same trajectory on any number of ranks, under the real launchers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import (
    CONFIG,
    Job,
    assert_same_run,
    events,
    harness,
    identical,
    metrics,
    relative_difference,
    run_arguments,
    train,
    weights,
)

from harness.config import load_config

# Sizes where nothing divides: 1,437 samples, 14 updates of 100 and one of 37 per epoch, each of
# micro-batches of 7 with a last one of 2.
UNEVEN = ("batch={initial: 100, micro: 7}", "batch.growth.policy=fixed", "lr.on_growth=1")
FLOAT = ("comm.compression=none", "comm.summation=float")
EXACT = ("comm.compression=none", "comm.summation=exact")


def test_two_ranks_give_the_weights_of_one(tmp_path: Path) -> None:
    for ranks in (1, 2):
        train(tmp_path / str(ranks), ranks, *UNEVEN, *FLOAT, "train.duration=2ep")
    assert relative_difference(tmp_path / "2", tmp_path / "1") < 1e-5
    assert [line["loss"] for line in metrics(tmp_path / "2")] == pytest.approx(
        [line["loss"] for line in metrics(tmp_path / "1")], rel=1e-5
    )


@pytest.mark.slow
def test_exact_summation_is_bitwise_equal_on_1_2_3_and_4_ranks(tmp_path: Path) -> None:
    for ranks in (1, 2, 3, 4):
        train(tmp_path / str(ranks), ranks, *UNEVEN, *EXACT, "train.duration=12ep")
    for ranks in (2, 3, 4):
        assert identical(weights(tmp_path / str(ranks)), weights(tmp_path / "1")), ranks
    accuracies = [[e["accuracy"] for e in events(tmp_path / str(r), "evaluation")] for r in (1, 4)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_growing_by_ranks_follows_the_trajectory_of_one_rank(tmp_path: Path) -> None:
    growing = (
        *EXACT,
        "batch={initial: 24, max: 96, micro: 12, growth: {policy: geometric, every: 2ep}}",
        "train={duration: 6ep, checkpoint_every: null}",
        "lr.on_growth=1",
    )
    train(tmp_path / "one", 1, *growing)
    directory = tmp_path / "grown"
    done = harness(
        *run_arguments(directory, None, *growing, "ranks={start: 1, max: 4, threads: 1}")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert [event["ranks"] for event in events(directory, "stage")] == [1, 2, 4]
    assert identical(weights(directory), weights(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["{policy: noise}", "{policy: loss, loss: sample, sample: 300}"])
def test_growth_by_measurement_does_not_depend_on_the_ranks(policy: str, tmp_path: Path) -> None:
    measured = (
        *EXACT,
        f"batch={{initial: 32, max: 512, micro: 8, growth: {policy}}}",
        "lr={base: 0.05, scaling: none}",
        "train.duration=6ep",
    )
    train(tmp_path / "one", 1, *measured)
    train(tmp_path / "three", 3, *measured)
    batches = [
        [e["global_batch"] for e in events(tmp_path / run, "decision")] for run in ("one", "three")
    ]
    assert batches[0] == batches[1]
    assert len(set(batches[0])) > 2, "it should have grown"
    assert identical(weights(tmp_path / "three"), weights(tmp_path / "one"))


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "controller"), [("horovodrun", "gloo"), ("mpirun", "mpi")])
def test_a_dead_rank_ends_the_job_and_is_named(
    launcher: str, controller: str, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    arguments = [
        *run_arguments(directory, 2, f"comm.controller={controller}"),
        "--launcher",
        launcher,
    ]
    with Job(directory, *arguments) as job:
        job.wait_for_update(20)
        job.signal_rank(1, signal.SIGKILL)
        code, output = job.finish()
    assert code == 1
    assert "rank 1" in output.splitlines()[-1]
    assert "SIGKILL" in output.splitlines()[-1]
    assert "Traceback" not in output


@pytest.mark.slow
def test_the_promised_world_size_is_asserted(tmp_path: Path) -> None:
    ranks = [
        sys.executable,
        "-m",
        "harness",
        "train",
        str(CONFIG),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    launch = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-np", "2", "-bind-to", "none"]
    variables = {**os.environ, "HARNESS_WORLD_SIZE": "3"}
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    done = subprocess.run(
        [*launch, *ranks], capture_output=True, text=True, env=variables, timeout=120, check=False
    )
    assert done.returncode == 1
    assert "promised 3 ranks, but this process sees a world of 2" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    settings = (directory, 1, "train.duration=900ep")  # longer than the second one's patience
    with Job(directory, *run_arguments(*settings)) as job:
        job.wait_for_update(5)
        second = harness(*run_arguments(*settings, resume=True))
        assert second.returncode == 2
        assert "is in use by pid" in second.stderr
        assert job.process.poll() is None


USERS_MODEL = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2),
            nn.Flatten(), nn.Linear(4 * 49, num_classes))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)
"""


@pytest.mark.slow
def test_a_users_own_model_with_batch_norm_and_dropout(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS_MODEL)
    for ranks in (1, 2):
        arguments = run_arguments(
            Path(str(ranks)), ranks, *UNEVEN, *EXACT, "model.name=mine:Net", "train.duration=2ep"
        )
        done = harness(*arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    trained = [key for key in one if "running" not in key and "tracked" not in key]
    assert identical({k: one[k] for k in trained}, {k: two[k] for k in trained})
    # Running statistics are averaged over ranks, so each rank's recent past weighs in.
    assert not identical(one["body.1.running_mean"], two["body.1.running_mean"])
    difference = (one["body.1.running_mean"] - two["body.1.running_mean"]).abs().max()
    assert difference < 0.1 * one["body.1.running_var"].sqrt().max()


BAD_INPUT = {
    "unknown key": (["batch.inital=32"], "did you mean 'initial'"),
    "wrong type": (["batch.initial=many"], "batch.initial"),
    "negative batch": (["batch.initial=-64"], "batch.initial"),
    "micro above batch": (["batch.micro=65"], "batch.micro"),
    "growth below 1": (["batch.growth.factor=0.5"], "batch.growth.factor"),
    "missing root": (["data.dataset=mnist", "data.root=/no/such/place"], "/no/such/place"),
    "more ranks than slots": (["--ranks", "2", "--hosts", "localhost:1"], "slots"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_and_exit_code_2(case: str, tmp_path: Path) -> None:
    words, expected = BAD_INPUT[case]
    done = harness("run", CONFIG, "--run-dir", tmp_path / "run", *words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.count("harness: ") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_truncated_idx_file_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    root = tmp_path / "mnist"
    root.mkdir()
    for part in ("train", "t10k"):
        (root / f"{part}-images-idx3-ubyte").write_bytes(
            b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (60, 28, 28)) + bytes(100)
        )
        (root / f"{part}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + (60).to_bytes(4, "big") + bytes(60)
        )
    done = harness(
        "run", CONFIG, "data.dataset=mnist", f"data.root={root}", "--run-dir", tmp_path / "run"
    )
    assert done.returncode == 2
    assert "truncated" in done.stderr
    assert done.stderr.count("harness: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_yaml_list_and_a_used_directory(tmp_path: Path) -> None:
    listed = tmp_path / "list.yaml"
    listed.write_text("- a\n- b\n")
    done = harness("run", listed, "--run-dir", tmp_path / "run")
    assert (done.returncode, "a list" in done.stderr) == (2, True)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "config.yaml").write_text("name: x\n")
    done = harness("run", CONFIG, "--run-dir", tmp_path / "used")
    assert (done.returncode, "already holds a run" in done.stderr) == (2, True)


@pytest.mark.slow
def test_values_with_shell_characters_reach_the_ranks_unharmed(tmp_path: Path) -> None:
    name = 'it\'s $(touch pwned) `x` "q" ; & | a'
    directory = tmp_path / "a dir; with $HOME 'quotes'"
    for launcher in ("horovodrun", "mpirun"):
        target = directory / launcher
        overrides = (f"name={json.dumps(name)}", "train.duration=3up", "lr.warmup=null")
        arguments = run_arguments(target, 2, *overrides)
        done = harness(*arguments, "--launcher", launcher, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        assert load_config(target / "config.yaml").name == name
    assert not list(tmp_path.rglob("pwned"))


@pytest.mark.slow
def test_same_run_again_is_bitwise_the_same(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(tmp_path / name, 2, "train.duration=3ep")
    assert_same_run(tmp_path / "a", tmp_path / "b")

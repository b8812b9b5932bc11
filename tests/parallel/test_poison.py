"""NaN, inf and want of memory on one rank: no rank's weights are spoilt, and all end alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jobs import attempts, events, harness, last_state, metrics, rank_processes, run_arguments
from torch import Tensor

pytestmark = [pytest.mark.slow, pytest.mark.parallel(2)]

SETTINGS = (
    "model.name=spoilt:net",
    "batch={initial: 64, micro: 16}",
    "batch.growth.policy=fixed",
    "lr.on_growth=1",
    # At each checkpoint the ranks' weights are compared, and looked at.
    "train={duration: 2ep, checkpoint_every: 1up, log_every: 1, keep_checkpoints: 1000}",
    "launch.restart_pause=0",
)

SPOILT = """
import os, resource, signal
import torch
from torch import nn

RANK = next(
    os.environ[name]
    for name in ("OMPI_COMM_WORLD_RANK", "HOROVOD_RANK", "RANK")
    if name in os.environ
)

class Spoilt(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=4), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * 49, 10))
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        planted = self.training and RANK == "1" and self.calls {when}
        if planted:
            {before}
        out = self.body(x)
        if planted:
            {after}
        return out

def net(num_classes):
    torch.manual_seed(1)
    return Spoilt()
"""

PLACES = {
    "inputs": ("x = x.clone(); x[0, 0, 5, 5] = float('nan')", "pass"),
    "loss": ("pass", "out = out * float('inf')"),
    "gradient": ("pass", "out.register_hook(lambda gradient: gradient * float('nan'))"),
}
MICRO_BATCHES = 2  # of each rank in an update


def arguments(
    folder: Path,
    before: str = "pass",
    after: str = "pass",
    when: str = "== 0",
    settings: tuple[str, ...] = (),
    restarts: int = 0,
) -> list[str]:
    (folder / "spoilt.py").write_text(SPOILT.format(when=when, before=before, after=after))
    words = run_arguments(folder / "run", 2, *SETTINGS, *settings)
    words[words.index("--max-restarts") + 1] = str(restarts)
    return words


def floats(value: object) -> list[Tensor]:
    """All tensors of floating-point numbers in a nested state."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value
    if isinstance(parts, str) or not hasattr(parts, "__iter__"):
        return []
    return [tensor for part in parts for tensor in floats(part)]


def assert_sound(directory: Path) -> None:
    for path in (directory / "checkpoints").glob("*.pt"):
        state = torch.load(path, weights_only=True)
        found = floats({key: state[key] for key in ("model", "optimizer", "rank_buffers")})
        assert len(found) >= 9  # of the update that was skipped as the first: no momentum yet
        assert all(bool(torch.isfinite(tensor).all()) for tensor in found), path.name


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("place", "update", "settings"),
    [
        ("inputs", 1, ()),
        ("gradient", 20, ("comm.backend=torch",)),
        pytest.param("inputs", 20, ("comm.backend=torch",), marks=LONG),
        pytest.param("loss", 1, ("comm.compression=fp16_feedback",), marks=LONG),
        pytest.param("loss", 20, ("comm={compression: none, summation: exact}",), marks=LONG),
        pytest.param("gradient", 1, ("train.precision=bf16",), marks=LONG),
        pytest.param("inputs", 20, ("train.sync_batch_norm=true",), marks=LONG),
        pytest.param("loss", 20, ("batch.growth={policy: noise}", "batch.max=256"), marks=LONG),
    ],
)
def test_one_bad_number_on_one_rank_costs_one_update(
    place: str, update: int, settings: tuple[str, ...], tmp_path: Path
) -> None:
    before, after = PLACES[place]
    when = f"== {MICRO_BATCHES * (update - 1) + 2}"
    done = harness(*arguments(tmp_path, before, after, when, settings), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "run"
    (skipped,) = events(directory, "skipped_update")
    assert skipped["update"] == update
    assert "a gradient is inf or NaN" in skipped["reason"]
    assert_sound(directory)
    bad = [line["update"] for line in metrics(directory) if line["loss"] is None]
    assert bad == ([] if place == "gradient" else [update])
    assert all(event["loss"] is not None for event in events(directory, "evaluation"))


@pytest.mark.long
@pytest.mark.parametrize("place", PLACES)
def test_bad_numbers_that_stay_end_the_run(place: str, tmp_path: Path) -> None:
    before, after = PLACES[place]
    done = harness(*arguments(tmp_path, before, after, "> 40", restarts=3), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "10 updates in a row were skipped, up to update 30" in done.stderr
    directory = tmp_path / "run"
    assert attempts(directory) == 1  # it would end in the same way again
    assert_sound(directory)
    assert last_state(directory)["update"] == 29


@pytest.mark.long
def test_weights_that_are_no_numbers_are_not_written_down(tmp_path: Path) -> None:
    spoils = "self.body[4].weight.data[0, 0] = float('inf')"
    words = arguments(tmp_path, spoils, when="== 41", settings=("train.checkpoint_every=10up",))
    # On all ranks alike, as a step that is too long would do.
    model = (tmp_path / "spoilt.py").read_text().replace('and RANK == "1"', "")
    (tmp_path / "spoilt.py").write_text(model)
    done = harness(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "The run has diverged" in done.stderr or "skipped" in done.stderr
    assert_sound(tmp_path / "run")
    assert last_state(tmp_path / "run")["update"] == 20


MEMORY = {
    # As much more as it has now, and then all that: torch says what it could not get.
    "by the process's limit": (
        "size = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize(); "
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**26,) * 2); "
        "torch.empty(2**30, dtype=torch.uint8).fill_(1)",
        "out of memory (",
    ),
    "in Python": ("bytearray(2**62)", "out of memory (MemoryError"),
    "by the kernel": ("os.kill(os.getpid(), signal.SIGKILL)", "was killed by signal 9 (SIGKILL"),
}


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("by the process's limit", ()),
        pytest.param("by the process's limit", ("comm.backend=torch",), marks=LONG),
        pytest.param("in Python", ("comm.backend=torch",), marks=LONG),
        pytest.param("by the kernel", (), marks=LONG),
        pytest.param("by the kernel", ("comm.backend=torch",), marks=LONG),
    ],
)
def test_want_of_memory_on_one_rank_ends_all_and_is_told(
    way: str, settings: tuple[str, ...], tmp_path: Path
) -> None:
    planted, said = MEMORY[way]
    done = harness(*arguments(tmp_path, planted, when="== 40", settings=settings), cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    last = done.stderr.splitlines()[-1]
    assert "rank 1 on" in last
    assert said in last
    assert "--resume" in last
    assert "Traceback" not in done.stdout + done.stderr
    directory = tmp_path / "run"
    assert rank_processes(directory) == {}
    assert_sound(directory)
    assert last_state(directory)["update"] == 19


@pytest.mark.long
def test_want_of_memory_that_passes_is_made_up_for(tmp_path: Path) -> None:
    first = "first = not os.path.exists('once'); open('once', 'w').close(); "
    planted = f"{first}first and {MEMORY['in Python'][0]}"
    done = harness(*arguments(tmp_path, planted, when="== 40", restarts=1), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    directory = tmp_path / "run"
    (fault,) = events(directory, "fault")
    assert "out of memory" in fault["reason"]
    assert_sound(directory)

"""Signs of life: when a job hangs and on whom, and what is left of processes that do not answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import processes, pulse
from harness.processes import Look, Process, descendants, look, threads_of
from harness.pulse import MARK, MEETING, Silence, tick_of
from harness.rundir import RunDirectory
from launch.execute import kill_group
from launch.hangs import Hang, HangWatch, Stuck, Told, Vigil
from launch.outcome import Ended, judge
from launch.spec import Host, LaunchSpec

SPEC = LaunchSpec(ranks=3, hosts=(Host("n1", 1), Host("n2", 2)), command=("x",))


def told(
    rank: int, silent: float = 0.0, place: str = MEETING, size: int = 3, training: bool = True
) -> Told:
    host = SPEC.host_of(rank) or "n9"
    return Told(rank, size, host, 100 + rank, 7, 5, None, training, silent, place, "bucket.0")


def line(one: Told) -> str:
    return f"[1,{one.rank}]<stdout>:{MARK}{json.dumps(asdict(one))}\n"


# Clocks


@given(
    st.lists(st.tuples(st.floats(0.0, 50.0), st.booleans()), max_size=60),
    st.floats(0.1, 5.0),
)
def test_a_silence_counts_no_more_than_the_time_that_was_looked_at(
    looks: list[tuple[float, bool]], tick: float
) -> None:
    silence, now, watched = Silence(tick, 0.0), 0.0, 0.0
    for passed, sign in looks:
        now += passed
        watched = 0.0 if sign else watched + (passed if passed <= max(4 * tick, 2.0) else 0.0)
        assert silence.look(sign, now) == pytest.approx(watched, abs=1e-9)


def test_a_wait_by_its_own_rules_is_no_silence() -> None:
    silence = Silence(1.0, 0.0)
    assert [silence.look(False, now, until=3.5) for now in (1.0, 2.0, 3.0)] == [0.0] * 3
    assert [silence.look(False, now, until=3.5) for now in (4.0, 5.0)] == [1.0, 2.0]


@given(st.floats(1.0, 1e6))
def test_looks_are_frequent_enough_to_tell_who_answers(seconds: float) -> None:
    assert 0 < tick_of(seconds) <= min(seconds / 8, 5.0)


# The verdict


def watched(vigil: Vigil, start: float, end: float, step: float = 0.5) -> Iterator[float]:
    """Moments at which the vigil looks, as long as nothing hangs."""
    for i in range(1, int((end - start) / step) + 1):
        now = start + i * step
        if vigil.look(now):
            return
        yield now


def test_it_hangs_once_nobody_has_got_on_for_the_time_that_is_set() -> None:
    vigil = Vigil(40.0, 3, now=0.0)
    for rank in range(3):
        vigil.hear(told(rank), 1.0)
    vigil.progress(30.0)
    for now in watched(vigil, 0.0, 100.0):
        last = now
        if now in (50.0, 60.0, 70.0):
            vigil.hear(told(0, silent=now - 30.0), now)
            vigil.hear(told(2, silent=now - 30.0, place="waiting for data"), now)
    assert last == 69.5
    stuck = vigil.stuck(70.0)
    assert [rank.answers for rank in stuck] == [True, False, True]
    assert [rank.waits for rank in stuck] == [True, False, False]
    assert [rank.rank for rank in Hang(40.0, tuple(stuck)).causes] == [1, 2]


@given(st.lists(st.integers(0, 2), min_size=10, max_size=40))
def test_a_rank_that_gets_on_keeps_all_waiting(order: list[int]) -> None:
    """Whoever it is, and however long the others have waited."""
    vigil = Vigil(40.0, 3, now=0.0)
    for rank in range(3):
        vigil.hear(told(rank), 0.0)
    now = 0.0
    for rank in order:
        for _ in range(20):
            now += 1.0
            assert not vigil.look(now)
        for other in range(3):
            vigil.hear(told(other, silent=0.0 if other == rank else now), now)
    assert vigil.look(now + 5.0) is False
    assert any(vigil.look(now + after) for after in range(6, 42))


def test_ranks_that_do_not_train_yet_have_more_time() -> None:
    vigil = Vigil(40.0, 3, now=0.0)
    vigil.hear(told(0), 3.0)
    vigil.hear(told(1, training=False), 3.0)
    moments = list(watched(vigil, 0.0, 500.0))
    assert moments[-1] == 122.5
    (missing,) = [rank for rank in vigil.stuck(123.0) if rank.told is None]
    assert str(missing) == "rank 2 has not begun"
    vigil.hear(told(2), 123.0)
    assert vigil.limit == 120.0  # rank 1 does not train yet
    vigil.hear(told(1), 123.0)
    assert vigil.limit == 40.0


def test_time_does_not_count_while_this_process_was_stopped() -> None:
    vigil = Vigil(40.0, 1, now=0.0)
    vigil.hear(told(0, size=1), 1.0)
    moments = list(watched(vigil, 0.0, 20.0))
    assert not vigil.look(10_000.0)
    vigil.hear(told(0, size=1), 10_000.5)
    moments += list(watched(vigil, 10_000.5, 11_000.0))
    assert moments[-1] == pytest.approx(10_040.0, abs=1.0)


def test_what_was_heard_right_after_a_stop_is_not_in_the_future() -> None:
    vigil = Vigil(40.0, 1, now=0.0)
    vigil.hear(told(0, size=1), 1.0)
    vigil.hear(told(0, size=1), 10_000.0)  # before the first look after the stop
    assert list(watched(vigil, 10_000.0, 11_000.0))[-1] < 10_041.0


def test_time_does_not_count_while_output_is_held_up() -> None:
    vigil = Vigil(40.0, 1, now=0.0)
    vigil.hear(told(0, size=1), 0.0)
    assert not any(vigil.look(now / 2, reading=False) for now in range(1, 400))
    assert not vigil.look(200.5)


def test_ranks_of_a_world_that_has_become_smaller_are_not_waited_for() -> None:
    vigil = Vigil(40.0, 3, now=0.0)
    for rank in range(3):
        vigil.hear(told(rank), 1.0)
    for rank in range(2):
        vigil.hear(told(rank, size=2), 5.0)
    assert [rank.rank for rank in vigil.stuck(6.0)] == [0, 1]


# What is said


def stuck(rank: int, place: str, answers: bool = True, state: str = "?") -> Stuck:
    return Stuck(rank, told(rank, place=place), answers, 41.2, Look(state))


MESSAGES = {
    "rank 1 on n2 does not answer (pid 101 is stopped, as by SIGSTOP); no rank": (
        [stuck(0, MEETING), stuck(1, MEETING, False, "T")]
    ),
    "rank 1 on n2 does not answer; no rank": [stuck(0, MEETING), stuck(1, MEETING, False)],
    "rank 1 on n2 does not answer (pid 101 has ended); no rank": (
        [stuck(0, MEETING), stuck(1, MEETING, False, "")]
    ),
    "rank 2 on n2 has been waiting for data for 41 s; no rank": (
        [stuck(0, MEETING), stuck(1, MEETING), stuck(2, "waiting for data")]
    ),
    "none of 2 ranks answers: ": [stuck(0, MEETING, False), stuck(1, MEETING, False)],
    "all ranks wait for each other in bucket.0; no rank": [stuck(0, MEETING), stuck(1, MEETING)],
    "rank 0 has not begun; no rank": [Stuck(0, None, False, 0.0), stuck(1, MEETING)],
}


@pytest.mark.parametrize("beginning", MESSAGES)
def test_the_message_names_whom_the_others_wait_for(beginning: str) -> None:
    message = Hang(40.0, tuple(MESSAGES[beginning])).message
    assert message.startswith(beginning)
    assert message.endswith("got any further for 40 s (launch.hang_seconds), and the job was ended")


def test_ranks_in_different_collectives_are_told_apart() -> None:
    ranks = [stuck(0, MEETING), stuck(1, MEETING), stuck(2, MEETING)]
    other = Told(**{**asdict(told(1)), "collective": "together"})
    ranks[1] = Stuck(1, other, True, 41.0)
    message = Hang(40.0, tuple(ranks)).message
    assert "2 ranks (the first is 0) in bucket.0, 1 rank (the first is 1) in together" in message


def test_what_else_is_stopped_is_told() -> None:
    ranks = (stuck(0, MEETING, False), stuck(1, MEETING, False))
    message = Hang(40.0, ranks, ("mpirun (pid 5) is stopped, as by SIGSTOP",)).message
    assert "; mpirun (pid 5) is stopped, as by SIGSTOP; no rank has got any further" in message


def test_of_many_ranks_a_few_are_named() -> None:
    ranks = tuple(Stuck(rank, None, False, 0.0) for rank in range(30))
    message = Hang(40.0, (*ranks, stuck(1, MEETING))).message
    assert "rank 7 has not begun and 22 more" in message


def test_a_launch_that_hung_has_failed_and_may_be_tried_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    hang = Hang(40.0, (stuck(0, MEETING), stuck(1, MEETING, False, "T")))
    outcome = judge(Ended(137, "", hang), SPEC, directory)
    assert (outcome.kind, outcome.rank, outcome.host, outcome.final) == ("failed", 1, "n2", False)
    (cause,) = outcome.facts["stuck"]
    assert (cause["rank"], cause["answers"], cause["state"]) == (1, False, "T")
    directory.events.write_text('{"kind":"start"}\n{"kind":"end"}\n')  # it hung as it left
    assert judge(Ended(137, "", hang), SPEC, directory).kind == "done"


# What ranks say


@given(st.integers(0, 5000), st.floats(0.0, 1e6), st.text(max_size=30))
def test_signs_of_life_come_back_whole(rank: int, silent: float, place: str) -> None:
    one = Told(rank, 5001, "n1", 5, 6, 7, "12.3", True, silent, place, "x")
    assert Told.parse(line(one)) == one


@given(st.text(max_size=80) | st.recursive(st.none() | st.integers(), st.lists).map(json.dumps))
def test_broken_signs_of_life_are_none(payload: str) -> None:
    assert Told.parse(payload) is None
    assert Told.parse(f"{MARK}{payload}") is None
    told_wrong = {**asdict(told(0)), "pid": payload}
    assert Told.parse(f"{MARK}{json.dumps(told_wrong)}") is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": 10**12},
        {"rank": 3},
        {"rank": -1},
        {"pid": 0},
        {"silent": float("nan")},
        {"silent": float("inf")},
        {"silent": -1.0},
        {"silent": None},
        {"training": 1},
        {"place": None},
        {"more": 1},
    ],
    ids=str,
)
def test_signs_of_life_that_cannot_be_are_none(wrong: dict[str, object]) -> None:
    assert Told.parse(f"{MARK}{json.dumps({**asdict(told(0)), **wrong})}") is None


def test_a_sign_of_life_is_not_shown(tmp_path: Path) -> None:
    watch = HangWatch(40.0, SPEC, "mpirun", RunDirectory(tmp_path))
    assert watch.takes(line(told(0)))
    assert watch.takes(f"{MARK}broken")
    assert not watch.takes("harness: all is well\n")


def test_meetings_are_counted_and_the_place_comes_back() -> None:
    pulse.at("computing")
    before = pulse._signs.met
    with pulse.meeting():
        assert pulse._signs.place == MEETING
    assert (pulse._signs.place, pulse._signs.met) == ("computing", before + 1)
    with pytest.raises(OSError, match="gone"), pulse.meeting():
        raise OSError("gone")
    assert (pulse._signs.place, pulse._signs.met) == ("computing", before + 1)


RANK = """
import ctypes, os, sys, time
from pathlib import Path
from harness import pulse

pulse.start(Path(sys.argv[1]))
pulse.at("computing")
pulse.begins("bucket.3")
pulse.trains(True)

def busy():
    for _ in range(40):
        time.sleep(0.05)
        pulse.beat()

def a_file_that_does_not_come():
    time.sleep(1000)

def held_up():  # PyDLL does not let go of the interpreter
    ctypes.PyDLL(None).sleep(1000)

busy()
print("now", flush=True)
{what}()
"""


@pytest.fixture
def rank(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that gives signs of life for two seconds, and then does as told."""
    started: list[subprocess.Popen[str]] = []

    def start(what: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", RANK.format(what=what), str(tmp_path / "stacks")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HARNESS_HANG_SECONDS": "1"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], enough: Callable[[str], bool]) -> list[str]:
    lines = []
    assert process.stdout is not None
    for text in process.stdout:
        lines.append(text)
        if enough(text):
            return lines
    raise AssertionError(f"it has ended: {lines}")


def test_a_rank_tells_of_life_and_then_of_its_silence(
    rank: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = rank("a_file_that_does_not_come")
    before = read_until(process, lambda text: text == "now\n")
    signs = [one for text in before if (one := Told.parse(text))]
    assert len(signs) > 1
    assert all(one.silent < 0.5 for one in signs[1:])
    after = read_until(process, lambda text: (Told.parse(text) or told(0)).silent >= 1.0)
    last = Told.parse(after[-1])
    assert last is not None
    assert (last.pid, last.place, last.collective) == (process.pid, "computing", "bucket.3")
    written = (tmp_path / "stacks" / "rank-00000.txt").read_text()
    assert "a_file_that_does_not_come" in written
    assert "computing for" in written


def test_a_rank_that_goes_on_takes_its_stacks_back(
    rank: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    process = rank("time.sleep(1.5), busy")
    read_until(process, lambda text: (Told.parse(text) or told(0)).silent >= 0.75)
    wait_for(lambda: (tmp_path / "stacks" / "rank-00000.txt").exists())
    read_until(process, lambda text: (Told.parse(text) or told(0, 9.0)).silent < 0.25)
    wait_for(lambda: not list((tmp_path / "stacks").iterdir()))


def test_a_rank_says_at_once_that_it_trains_no_more(
    rank: Callable[[str], subprocess.Popen[str]],
) -> None:
    """Its thread may not look again: an interpreter that ends does not let it."""
    process = rank("pulse.trains(False) or os.abort")
    lines, _ = process.communicate(timeout=60)
    signs = [one for text in lines.splitlines() if (one := Told.parse(text))]
    assert signs[1].training
    assert not signs[-1].training


def test_the_stack_of_a_held_up_interpreter_can_be_had_from_outside(
    rank: Callable[[str], subprocess.Popen[str]],
) -> None:
    process = rank("held_up")
    signs = [Told.parse(text) for text in read_until(process, lambda text: text == "now\n")]
    last = [one for one in signs if one][-1]
    wait_for(lambda: "held_up" in look(last.pid, last.begun, last.dump).dump)
    command = [sys.executable, "-m", "harness.processes", "kill", last.name]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "held_up" in Look(**json.loads(done.stdout)).dump
    assert process.wait(timeout=60) == -signal.SIGKILL


def wait_for(condition: Callable[[], bool]) -> None:
    while not condition():
        time.sleep(0.02)


# Processes


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def test_a_stopped_process_is_seen_and_killed(sleeper: subprocess.Popen[bytes]) -> None:
    mine = Process.of(sleeper.pid)
    assert mine is not None
    assert mine.parent == os.getpid()
    os.kill(sleeper.pid, signal.SIGSTOP)
    wait_for(lambda: look(mine.pid, mine.begun, 0).state == "T")
    assert any("stopped" in text for text in threads_of(mine.pid))
    mine.kill()
    assert sleeper.wait(timeout=60) == -signal.SIGKILL
    assert not mine.lives
    assert look(mine.pid, mine.begun, 0) == Look("")


def test_a_process_that_has_come_to_the_number_later_is_let_alone(
    sleeper: subprocess.Popen[bytes],
) -> None:
    mine = Process.of(sleeper.pid)
    assert mine is not None
    other = Process(mine.pid, "S", mine.parent, mine.begun - 1)
    assert not other.lives
    other.kill()
    processes.main(["kill", f"{mine.pid}:{mine.begun + 1}:0"])
    assert mine.lives


def test_what_a_launcher_has_started_ends_with_it() -> None:
    """Also where it has a session of its own, and is stopped."""
    words = "import subprocess\nsubprocess.run(['setsid', 'sleep', '1000'])"
    launcher = subprocess.Popen(
        [sys.executable, "-c", words], text=True, start_new_session=True, stdout=subprocess.PIPE
    )
    wait_for(lambda: bool(descendants(launcher.pid)))
    (below,) = descendants(launcher.pid)
    os.kill(below.pid, signal.SIGSTOP)
    kill_group(launcher)
    launcher.wait(timeout=60)
    wait_for(lambda: not below.lives)
    launcher.communicate()


def test_there_is_no_process_of_a_number_that_is_none() -> None:
    assert Process.of(2**22 + 1) is None
    assert threads_of(2**22 + 1) == []
    assert processes.killed_for_memory() >= 0

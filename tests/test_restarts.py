"""When a run is started again after a failure: counts, pauses, hosts that are left out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.restarts import Again, GiveUp, Restarts

FAILURE = st.tuples(st.sampled_from([None, "a", "b", "c"]), st.booleans())


def test_pauses_grow_while_nothing_is_gained_and_begin_anew_with_a_checkpoint() -> None:
    restarts = Restarts(limit=100, first_pause=2.0, host_failures=9)
    progress = [True, False, False, True, False]
    verdicts = [restarts.after(None, progressed, hosts=1) for progressed in progress]
    assert [v.pause for v in verdicts if isinstance(v, Again)] == [2.0, 2.0, 4.0, 2.0, 2.0]


def test_three_launches_without_a_checkpoint_are_a_crash_loop() -> None:
    restarts = Restarts(limit=100, first_pause=0.0, host_failures=9)
    verdicts = [restarts.after("a", False, hosts=1) for _ in range(3)]
    assert [type(v) for v in verdicts] == [Again, Again, GiveUp]
    assert verdicts[-1] == GiveUp("3 launches in a row have died without a new checkpoint")


def test_a_launch_that_ends_well_ends_the_row() -> None:
    """As one that stops to grow: it may have trained for hours since the failures before it."""
    restarts = Restarts(limit=100, first_pause=2.0, host_failures=3)
    for _ in range(2):
        restarts.after("a", False, hosts=2)
    restarts.ended_well()
    verdicts = [restarts.after("a", False, hosts=2) for _ in range(2)]
    assert verdicts == [Again(2.0), Again(4.0)]
    assert restarts.used == 4


def test_without_restarts_the_first_failure_is_the_last() -> None:
    assert Restarts(0, 1.0, 2).after("a", True, hosts=4) == GiveUp("")


@pytest.mark.parametrize("progressed", [True, False])
def test_a_host_that_fails_again_and_again_is_left_out(progressed: bool) -> None:
    restarts = Restarts(limit=100, first_pause=0.0, host_failures=2)
    hosts = ["a", "b", "b", "a", "b"]
    left = [restarts.after(host, progressed, hosts=4) for host in hosts[: 5 if progressed else 3]]
    assert [v.leave_out for v in left if isinstance(v, Again)][:3] == [None, None, "b"]
    assert not [v for v in left[3:] if isinstance(v, Again) and v.leave_out]


def test_the_last_host_is_never_left_out() -> None:
    restarts = Restarts(limit=100, first_pause=0.0, host_failures=1)
    verdict = restarts.after("a", True, hosts=1)
    assert verdict == Again(0.0, None)


@given(
    st.lists(FAILURE, max_size=40),
    st.integers(0, 12),
    st.floats(0, 100),
    st.integers(1, 4),
)
def test_laws(
    failures: list[tuple[str | None, bool]], limit: int, pause: float, host_failures: int
) -> None:
    """Never more restarts than allowed; pauses between the first and a minute; only the host of
    the last failures is left out, and never the only one."""
    restarts, hosts, again = Restarts(limit, pause, host_failures), {"a", "b", "c"}, 0
    for host, progressed in failures:
        failed = host if host in hosts else None
        verdict = restarts.after(failed, progressed, len(hosts))
        if isinstance(verdict, GiveUp):
            break
        again += 1
        assert min(pause, 60.0) <= verdict.pause <= max(pause, 60.0)
        if verdict.leave_out is not None:
            assert verdict.leave_out == failed
            hosts.discard(verdict.leave_out)
        assert hosts
    assert again <= limit


@given(st.lists(st.booleans(), min_size=3, max_size=20))
def test_a_crash_loop_ends_after_the_third_barren_launch_in_a_row(progress: list[bool]) -> None:
    restarts = Restarts(limit=10**6, first_pause=0.0, host_failures=10**6)
    barren = 0
    for progressed in progress:
        verdict = restarts.after(None, progressed, hosts=2)
        barren = 0 if progressed else barren + 1
        assert isinstance(verdict, GiveUp) == (barren == 3)
        if isinstance(verdict, GiveUp):
            break

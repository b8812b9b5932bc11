"""Settings of the whole test run."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import HealthCheck, settings
from support import REQUIRE, require_ranks

settings.register_profile(
    "harness",
    deadline=None,  # shared machines stall for longer than any limit that would tell something
    suppress_health_check=[HealthCheck.too_slow],
    max_examples=100 if os.environ.get("CI") else 50,
    print_blob=True,
)
settings.load_profile("harness")


def pytest_configure(config: pytest.Config) -> None:
    value = os.environ.get(REQUIRE, "")
    if value not in ("", "all"):
        raise pytest.UsageError(f"{REQUIRE}={value} is not known; valid: all, or unset")
    # A shell that starts the tests behind itself has them ignore Ctrl-C, as would all they start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("parallel") is not None:
        require_ranks()


@pytest.fixture
def ranks_available() -> None:
    """For tests that start Horovod ranks: skips or fails (``support.require``) without."""
    require_ranks()

"""The errors that a user can meet; each message says what is wrong, where, and what would be valid.

HarnessError             exit code 1
  UsageError             exit code 2: nothing was started, nothing was changed
    ConfigError          the YAML file or an override
    DataError            a data file that is missing, truncated or of another format
      CorruptImage       exit code 1: one of its images, met while the run goes on
    RunDirectoryError    the run directory is in use, already holds a run, or is not a run
    LaunchError          the ranks cannot be started as asked
  CheckpointError        no checkpoint can be read, or one does not fit this model
  RankFailure            a rank died, or the ranks do not form the world that was promised
    PeerLost             the same seen from another rank: a consequence, not the cause
  StorageError           exit code 74: the run directory cannot be written while the run goes on
  StoppedEarly           exit code 75: stopped on request, with a checkpoint; run again to go on
  Superseded             exit code 76: a newer attempt has taken the run over; this one ends
"""

from __future__ import annotations

from typing import ClassVar


class HarnessError(Exception):
    """Base of every error that is reported as one message without a traceback."""

    exit_code: ClassVar[int] = 1


def told(error: Exception) -> str:
    """An error's message for a terminal, on which nothing that a file has put into it can draw."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in str(error))


class UsageError(HarnessError):
    exit_code = 2


class ConfigError(UsageError):
    pass


class DataError(UsageError):
    pass


class CorruptImage(DataError):  # noqa: N818 - named as data.on_corrupt names it
    exit_code = 1


class RunDirectoryError(UsageError):
    pass


class LaunchError(UsageError):
    pass


class CheckpointError(HarnessError):
    pass


class RankFailure(HarnessError):  # noqa: N818 - an event of the job, named as the field names it
    pass


class PeerLost(RankFailure):
    pass


class StorageError(HarnessError):
    exit_code = 74


class StoppedEarly(HarnessError):  # noqa: N818
    exit_code = 75


class Superseded(HarnessError):  # noqa: N818 - what has happened to this attempt
    exit_code = 76

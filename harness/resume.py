"""Whether a run may go on as asked, told without torch: the launching process asks it too."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import TypeGuard

from harness.config import dump_config, load_config
from harness.errors import CheckpointError, ConfigError, RunDirectoryError
from harness.files import write_atomic
from harness.jsonl import read_jsonl
from harness.records import of_trajectory
from harness.rundir import RunDirectory
from harness.schema import Config
from harness.yamlfile import dump_yaml, one_line, parse_yaml, read_yaml

# Keys that do not change what is computed, only how and where; a resumed run may change them.
_FREE = frozenset(
    {
        "paper",
        "code",
        "data.root",
        "data.workers",
        "data.prefetch",
        "data.share",
        "data.on_corrupt",
        "batch.growth.throughput",
        "ranks.start",
        "ranks.max",
        "ranks.prefer",
        "ranks.per_node",
        "ranks.threads",
        "ranks.pin",
        "ranks.restart_seconds",
        "comm.backend",
        "comm.controller",
        "comm.bucket_mb",
        "comm.cycle_ms",
        "comm.fusion_mb",
        "comm.yield_when_idle",
        "train.keep_checkpoints",
        "train.tensorboard",
        "train.trackers",
    }
)
_FREE_SECTIONS = ("paper.", "profile.", "launch.", "slurm.")


def check_same_run(config: Config, run: RunDirectory) -> None:
    """Raise RunDirectoryError if the configuration would change a run's trajectory."""
    before = _settled(_stored(run.newest().config))
    after = _settled(_as_stored(config))
    changed = _changed(before, after, before.keys() | after.keys())
    if changed:
        raise RunDirectoryError(
            f"{run.path} holds a run of another configuration ({changed}); resume it "
            f"with {run.config}, or choose another --run-dir"
        )


def _stored(path: Path) -> object:
    """A run's configuration. Keys that came later than it have their defaults."""
    try:
        return _as_stored(load_config(path))
    except ConfigError:  # of a version with other keys
        return read_yaml(path).data


def _as_stored(config: Config) -> object:
    return parse_yaml(dump_config(config), "configuration").data


def settled(config: Config) -> dict[str, object]:
    """What of a configuration the trajectory depends on: values by their keys' full names."""
    return _settled(config.model_dump(mode="json"))


def check_same_settings(found: object, config: Config, name: str) -> None:
    """Raise CheckpointError if a checkpoint is of a run with other settings.

    ``found``: as from ``settled``. Keys that only one of both knows are passed over: they came or
    went with a version of this program.
    """
    if isinstance(found, dict):
        mine = settled(config)
        changed = _changed(found, mine, found.keys() & mine.keys())
        if changed:
            raise CheckpointError(
                f"{name}: it is of another configuration ({one_line(changed, 300)})"
            )


def _settled(data: object) -> dict[str, object]:
    return {
        key: value
        for key, value in _flat(data).items()
        if key not in _FREE and not key.startswith(_FREE_SECTIONS)
    }


def _changed(before: Mapping[str, object], after: Mapping[str, object], keys: Set[str]) -> str:
    return "; ".join(
        f"{key}: {before.get(key)} → {after.get(key)}"
        for key in sorted(keys)
        if before.get(key) != after.get(key)
    )


def keep_choices(config: Config, run: RunDirectory) -> None:
    """Write what a resumed run has chosen anew of its data into its attempt's config.yaml, from
    which it is resumed the next time. Ranks are chosen at each launch, and left alone."""
    stored = read_yaml(run.config).data
    chosen = parse_yaml(dump_config(config), "configuration").data["data"]
    if stored["data"] != chosen:
        stored["data"] = chosen
        write_atomic(run.config, dump_yaml(stored).encode())


def has_finished(run: RunDirectory) -> bool:
    """Whether a run's last word on its trajectory is that it has ended."""
    last = None
    for event in read_jsonl(run.newest().events):
        if event and of_trajectory(event):
            last = event["kind"]
    return last == "end"


def ranks_of_late(run: RunDirectory) -> int:
    """Ranks that the run's last attempt had, or asked for as it stopped; 0 if it had none."""
    ranks = 0
    for event in read_jsonl(run.newest().events):
        if event and event.get("kind") in ("start", "resume", "stop"):
            named = event.get("ranks_wanted") or event.get("ranks")
            ranks = named if _is_count(named) else ranks
    return ranks


def ranks_wanted(run: RunDirectory) -> int:
    """Ranks that the run asked for when it last stopped; 0 if it did not ask."""
    wanted = 0
    for event in read_jsonl(run.newest().events):
        if event and event.get("kind") == "stop":
            named = event.get("ranks_wanted")
            wanted = named if _is_count(named) else 0
    return wanted


def _is_count(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**31


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        key: leaf
        for name, entry in value.items()
        for key, leaf in _flat(entry, f"{prefix}.{name}" if prefix else str(name)).items()
    }

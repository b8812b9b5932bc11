"""Every engine under every launcher: the same sums, and an end when something is wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import CONFIG, Job, command, events, harness, relative_difference, run_arguments
from support import require

from harness.environment import communication_settings
from harness.schema import Comm
from launch import horovodrun, mpirun
from launch.execute import child_environment
from launch.spec import Host, LaunchSpec

pytestmark = pytest.mark.usefixtures("ranks_available")

RANKS = 3
TORCHRUN = ("torchrun", "--nproc-per-node", str(RANKS), "--no-python")


def launch(
    launcher: str, script: Path, *arguments: str, settings: Comm | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a script on all ranks, as the harness starts them."""
    spec = LaunchSpec(
        ranks=RANKS,
        hosts=(Host("localhost", RANKS),),
        command=(sys.executable, str(script), *arguments),
        environment={"OMP_NUM_THREADS": "1", **communication_settings(settings or Comm())},
        controller="gloo" if launcher == "horovodrun-gloo" else "mpi",
        as_root=os.geteuid() == 0,
    )
    if launcher == "torchrun":
        words = [*TORCHRUN, *spec.command]
    else:
        words = (mpirun if launcher == "mpirun" else horovodrun).arguments(spec)
    return subprocess.run(
        words,
        env=child_environment(spec),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# Collectives

COLLECTIVES = """
import json, sys
from pathlib import Path
import torch
from harness.comm import allreduce, broadcast_bytes, open_communicator
from harness.comm.topology import gather_topology

backend, folder = sys.argv[1:]
torch.set_num_threads(1)
comm = open_communicator(backend)
found = {
    "kind": comm.kind, "size": comm.size, "local_rank": comm.local_rank,
    "local_size": comm.local_size, "device": str(comm.device), "sums": {}, "ordered": [],
    "topology": comm.topology.as_list(),
    "same_topology": gather_topology(comm, through_mpi=False) == comm.topology,
}
for kind in ("float32", "float64", "float16", "int64"):
    dtype = getattr(torch, kind)
    generator = torch.Generator().manual_seed(comm.rank)
    values = torch.randn(1001, generator=generator, dtype=torch.float64)
    values = (values * 100).round() if dtype == torch.int64 else values
    found["sums"][kind] = allreduce(comm, values.to(dtype), kind).double().tolist()

# As the reducer does: all begin, then the first ones may come last.
tensors = [torch.full((10 ** (i % 5),), float(i + comm.rank)) for i in range(12)]
handles = [comm.allreduce_async(tensor, f"t{i}") for i, tensor in enumerate(tensors)]
for handle in reversed(handles):
    comm.wait(handle)
found["ordered"] = [tensor.unique().tolist() for tensor in tensors]

mine = torch.full((4,), comm.rank + 1)
comm.broadcast(mine, "broadcast")
found["broadcast"] = mine.tolist()
found["bytes"] = broadcast_bytes(comm, b"of 0" if comm.rank == 0 else None, "bytes").decode()
try:
    found["bf16"] = allreduce(comm, torch.ones(2, dtype=torch.bfloat16), "bf16").tolist()
except ValueError as error:
    found["bf16"] = str(error)
Path(folder, f"{comm.rank}.json").write_text(json.dumps(found))
comm.close()
"""

ENGINES = {
    "horovod under mpirun": ("mpirun", "horovod", "horovod-mpi"),
    "horovod under horovodrun --mpi": ("horovodrun-mpi", "horovod", "horovod-mpi"),
    "horovod under horovodrun --gloo": ("horovodrun-gloo", "horovod", "horovod-gloo"),
    "torch under mpirun": ("mpirun", "torch", "torch-gloo"),
    "torch under horovodrun --mpi": ("horovodrun-mpi", "torch", "torch-gloo"),
    "torch under horovodrun --gloo": ("horovodrun-gloo", "torch", "torch-gloo"),
    "torch under torchrun": ("torchrun", "torch", "torch-gloo"),
}


@pytest.fixture(scope="module", params=ENGINES)
def collectives(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, list[dict[str, Any]]]:
    """The kind that an engine should have, and what its ranks found."""
    launcher, backend, kind = ENGINES[request.param]
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "collectives.py"
    script.write_text(COLLECTIVES)
    done = launch(launcher, script, backend, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return kind, [json.loads((folder / f"{r}.json").read_text()) for r in range(RANKS)]


@pytest.mark.slow
def test_every_engine_finds_the_same_sums(
    collectives: tuple[str, list[dict[str, Any]]],
) -> None:
    _, found = collectives
    parts = [
        torch.randn(1001, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
        for rank in range(RANKS)
    ]
    expected = {
        "float32": (sum(part.float().double() for part in parts), 1e-6),
        "float64": (sum(parts), 1e-14),
        "float16": (sum(part.half().double() for part in parts), 4e-3),
        "int64": (sum((part * 100).round() for part in parts), 0.0),
    }
    for kind, (total, tolerance) in expected.items():
        sums = [torch.tensor(one["sums"][kind], dtype=torch.float64) for one in found]
        torch.testing.assert_close(sums[0], total, rtol=0, atol=tolerance)
        assert all(torch.equal(one, sums[0]) for one in sums), f"{kind} differs between ranks"


@pytest.mark.slow
def test_operations_may_be_waited_for_in_any_order(
    collectives: tuple[str, list[dict[str, Any]]],
) -> None:
    _, found = collectives
    wanted = [[float(RANKS * i + sum(range(RANKS)))] for i in range(12)]
    assert [one["ordered"] for one in found] == [wanted] * RANKS


@pytest.mark.slow
def test_all_ranks_get_what_rank_0_has(collectives: tuple[str, list[dict[str, Any]]]) -> None:
    _, found = collectives
    assert [one["broadcast"] for one in found] == [[1, 1, 1, 1]] * RANKS
    assert [one["bytes"] for one in found] == ["of 0"] * RANKS


@pytest.mark.slow
def test_ranks_know_who_and_where_they_are(
    collectives: tuple[str, list[dict[str, Any]]],
) -> None:
    kind, found = collectives
    assert {(one["kind"], one["size"], one["local_size"]) for one in found} == {
        (kind, RANKS, RANKS)
    }
    assert [one["local_rank"] for one in found] == list(range(RANKS))
    (host,) = found[0]["topology"]
    assert host["ranks"] == host["local_ranks"] == list(range(RANKS))
    assert host["threads"] == [1] * RANKS
    assert host["devices"] == [found[0]["device"]] * RANKS
    assert all(one["topology"] == found[0]["topology"] for one in found)
    assert all(one["same_topology"] for one in found)


@pytest.mark.slow
def test_bfloat16_is_summed_or_refused_by_name(
    collectives: tuple[str, list[dict[str, Any]]],
) -> None:
    kind, found = collectives
    for one in found:
        if kind.startswith("torch"):
            assert one["bf16"] == [RANKS, RANKS]
        else:
            assert "BFloat16" in one["bf16"]


# Settings

SETTINGS = """
import ctypes, json, os, statistics, sys, time
from pathlib import Path
import torch
from harness.comm import allreduce, open_communicator

torch.set_num_threads(1)
comm = open_communicator("horovod")
seconds = []
for _ in range(12):
    begin = time.perf_counter()
    allreduce(comm, torch.ones(1), "one")
    seconds.append(time.perf_counter() - begin)
ours = ("HOROVOD_", "OMPI_MCA_mpi")
found = {
    "variables": {n: v for n, v in os.environ.items() if n.startswith(ours)},
    "latency": statistics.median(seconds),
}
if comm.kind == "horovod-mpi":
    mpi = ctypes.CDLL("libmpi.so.40")
    found["gives_way"] = ctypes.c_bool.in_dll(mpi, "ompi_mpi_yield_when_idle").value
Path(sys.argv[1], f"{comm.rank}.json").write_text(json.dumps(found))
comm.close()
"""
SLOW_CYCLES = Comm(cycle_ms=40.0, fusion_mb=1.0, yield_when_idle=False)


def settings_of_ranks(
    launcher: str, folder: Path, settings: Comm | None = None
) -> list[dict[str, Any]]:
    folder.mkdir()
    script = folder / "settings.py"
    script.write_text(SETTINGS)
    done = launch(launcher, script, str(folder), settings=settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{r}.json").read_text()) for r in range(RANKS)]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-mpi", "horovodrun-gloo"])
def test_settings_reach_horovod_and_mpi_on_every_rank(launcher: str, tmp_path: Path) -> None:
    plain = settings_of_ranks(launcher, tmp_path / "plain")
    slow = settings_of_ranks(launcher, tmp_path / "slow", SLOW_CYCLES)
    shared = len(os.sched_getaffinity(0)) <= RANKS
    for one in plain:
        assert one["variables"]["HOROVOD_CYCLE_TIME"] == "0.1"
        assert one["variables"]["HOROVOD_FUSION_THRESHOLD"] == "0"
        assert one.get("gives_way", shared) == shared
    for one in slow:
        assert one["variables"]["HOROVOD_CYCLE_TIME"] == "40"
        assert one["variables"]["HOROVOD_FUSION_THRESHOLD"] == str(2**20)
        assert one["variables"]["OMPI_MCA_mpi_yield_when_idle"] == "0"
        assert not one.get("gives_way", False)
    # Each operation waits for the next cycle, so the setting has been read and not only passed on.
    assert slow[0]["latency"] > 3 * plain[0]["latency"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["horovodrun", "mpirun"])
def test_keys_of_a_configuration_arrive_and_are_recorded(launcher: str, tmp_path: Path) -> None:
    keys = ("comm.cycle_ms=3", "comm.yield_when_idle=false", "train.duration=2up", "lr.warmup=null")
    arguments = run_arguments(tmp_path / "run", 2, *keys)
    done = harness(*arguments, "--launcher", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    provenance = json.loads((tmp_path / "run" / "provenance.json").read_text())
    variables = provenance["environment"]
    assert variables["HOROVOD_CYCLE_TIME"] == "3"
    assert variables["HOROVOD_FUSION_THRESHOLD"] == "0"
    assert variables["OMPI_MCA_mpi_yield_when_idle"] == "0"
    (host,) = provenance["communication"]["hosts"]
    assert (host["ranks"], host["threads"]) == ([0, 1], [1, 1])


# Runs over torch.distributed


def trained(directory: Path, backend: str, launcher: str, controller: str) -> Path:
    """The run directory of a short run on two ranks."""
    keys = (f"comm.backend={backend}", f"comm.controller={controller}", "train.duration=2ep")
    arguments = run_arguments(directory, 2, *keys, "comm.compression=none")
    done = harness(*arguments, "--launcher", launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def by_horovod(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "horovod", "horovod", "mpirun", "mpi")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "controller"), [("mpirun", "mpi"), ("horovodrun", "mpi"), ("horovodrun", "gloo")]
)
def test_torch_trains_to_the_weights_of_horovod(
    launcher: str, controller: str, by_horovod: Path, tmp_path: Path
) -> None:
    directory = trained(tmp_path / "torch", "torch", launcher, controller)
    assert relative_difference(directory, by_horovod) < 1e-5
    assert [event["communication"] for event in events(directory, "start")] == ["torch-gloo"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "controller"), [("mpirun", "mpi"), ("horovodrun", "mpi"), ("horovodrun", "gloo")]
)
def test_a_dead_rank_ends_a_torch_job_and_is_named(
    launcher: str, controller: str, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    keys = ("comm.backend=torch", f"comm.controller={controller}", "train.duration=900ep")
    with Job(directory, *run_arguments(directory, 2, *keys), "--launcher", launcher) as job:
        job.wait_for_update(20)
        job.signal_rank(1, signal.SIGKILL)
        code, output = job.finish()
    assert code == 1
    assert "rank 1" in output.splitlines()[-1]
    assert "SIGKILL" in output.splitlines()[-1]
    assert "Traceback" not in output


LEAVES = """
import os, sys, torch
from harness.comm import allreduce, open_communicator
from harness.errors import PeerLost

comm = open_communicator("torch")
allreduce(comm, torch.ones(1), "together")
if comm.rank == 1:
    os._exit(0)  # torchrun does not end the others for this
try:
    allreduce(comm, torch.ones(1), "alone")
except PeerLost as error:
    os.write(1, f"rank {comm.rank}: {error}\\n".encode())  # one write, which no other rank splits
"""


@pytest.mark.slow
def test_a_lost_peer_is_told_as_such(tmp_path: Path) -> None:
    script = tmp_path / "leaves.py"
    script.write_text(LEAVES)
    done = launch("torchrun", script)
    said = "another rank left in the middle of a collective"
    assert re.findall(rf"rank (\d): {said}", done.stdout), done.stdout + done.stderr


@pytest.mark.slow
def test_a_world_of_another_size_than_promised_is_refused(tmp_path: Path) -> None:
    words = command("train", CONFIG, "comm.backend=torch", "--run-dir", tmp_path / "run")
    spec = LaunchSpec(
        2,
        (Host("localhost", 2),),
        tuple(words),
        {"HARNESS_WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"},
        as_root=os.geteuid() == 0,
    )
    done = subprocess.run(
        mpirun.arguments(spec),
        env=child_environment(spec),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "promised 3 ranks, but this process sees a world of 2" in done.stderr
    assert not (tmp_path / "run").exists()


# Hosts of their own

MEETS = """
import os, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from harness.comm.rendezvous import meet_through


class Written:
    size = 3

    def __init__(self, rank, path):
        self.rank, self.path = rank, path

    def share(self, message):
        if self.rank == 0:
            self.path.with_suffix(".part").write_bytes(message)
            self.path.with_suffix(".part").rename(self.path)
        while not self.path.exists():
            time.sleep(0.05)
        return self.path.read_bytes()


met = meet_through(Written(int(sys.argv[1]), Path(sys.argv[2])), 60)
dist.init_process_group("gloo", store=met.store, rank=met.rank, world_size=met.size)
total = torch.tensor([10 ** met.rank])
dist.all_reduce(total)
print(os.environ["GLOO_SOCKET_IFNAME"], int(total))
dist.barrier()
"""


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=30)


@pytest.fixture
def two_hosts() -> Any:
    """Two network namespaces with a cable between them: one host name, but no common loopback."""
    require(os.geteuid() == 0 and shutil.which("ip"), "network namespaces need root and ip")
    mark = uuid.uuid4().hex[:6]
    names = [f"host-{end}-{mark}" for end in "ab"]
    cables = [f"{end}{mark}" for end in "ab"]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
        except subprocess.CalledProcessError as error:
            require(False, f"network namespaces cannot be made: {error.stderr.decode().strip()}")
        ip("link", "add", cables[0], "netns", names[0], "type", "veth",
           "peer", "name", cables[1], "netns", names[1])  # fmt: skip
        for number, (name, cable) in enumerate(zip(names, cables, strict=True), start=1):
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", cable, "up")
            ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", cable)
        yield names, cables
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


@pytest.mark.slow
def test_hosts_without_a_common_loopback_meet(
    two_hosts: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    (first, second), (cable, other) = two_hosts
    script = tmp_path / "meets.py"
    script.write_text(MEETS)
    processes = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, sys.executable, str(script), str(rank),
             str(tmp_path / "told")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, host in enumerate((first, second, first))
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120)[0].split() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert said == [[cable, "111"], [other, "111"], [cable, "111"]]
